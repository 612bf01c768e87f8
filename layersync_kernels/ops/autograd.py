"""The autograd.Function that every fused op derives from."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function


class FusedFunction(Function):
    """An op with a hand-written gradient, in `setup_context` style. Call it by `run`, not by `apply`."""

    _eager: ClassVar[type[Function]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)

        def forward(ctx: Any, *inputs: Any) -> Any:
            output = cls.forward(*inputs)
            cls.setup_context(ctx, inputs, output)
            return output

        members = {"forward": staticmethod(forward), "backward": staticmethod(cls.backward)}
        cls._eager = type(cls.__name__, (Function,), members)

    @classmethod
    def run(cls, *inputs: Any) -> Any:
        """Apply the op, by the cheapest way that is right.

        `setup_context` is what functorch and Dynamo need, but it makes `apply` inspect the signature of `forward` in
        each call: 45 µs, against 10 µs for the same op with the context handed to forward.
        """
        if runs_eagerly():
            return cls._eager.apply(*inputs)
        return cls.apply(*_each_once(inputs))


def runs_eagerly() -> bool:
    """Whether neither Dynamo nor functorch traces the call: a context may then keep state in Python."""
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


def _each_once(inputs: tuple[Any, ...]) -> list[Any]:
    """A tensor that is given twice as a tensor and a view of it: Dynamo traces no Function that gets one twice."""
    given: list[Any] = []
    for value in inputs:
        again = isinstance(value, Tensor) and any(value is other for other in given)
        given.append(value.view_as(value) if again else value)
    return given


class _OnceDifferentiable(Function):
    @staticmethod
    def forward(gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "layersync_kernels: the fused ops are differentiable once; for second derivatives use backend='reference'"
        )


def differentiable_once(gradient: Tensor, *inputs: Tensor) -> Tensor:
    """Make a second derivative through `gradient` an error, where it would silently miss its dependence on `inputs`.

    torch's `once_differentiable` looks at the incoming gradients alone, and misses the saved tensors.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _OnceDifferentiable.apply(gradient, *inputs)
    return gradient
