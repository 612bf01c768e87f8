"""The autograd.Function that every fused op derives from."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import Function, forward_ad


class FusedFunction(Function):
    """An op with a hand-written gradient, in `setup_context` style. Call it by `run`, not by `apply`."""

    instead: ClassVar[str] = "use backend='reference' there"
    """What to do under a transform that the op knows nothing of."""

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
        """Apply the op, by the cheapest way that is right. Under vmap and in forward mode there is none: RuntimeError.

        `setup_context` is what functorch and Dynamo need, but it makes `apply` inspect the signature of `forward` in
        each call, which takes more than three times as long as to hand the context to forward (docs/design.md).
        """
        if forward_ad._current_level < 0 and runs_eagerly():
            return cls._eager.apply(*inputs)
        running = transform()
        if running is not None:
            op = cls.__module__.split(".")[-2]
            raise RuntimeError(f"layersync_kernels: {op}: fused ops know nothing of {running}; {cls.instead}")
        return cls.apply(*_each_once(inputs))


def transform() -> str | None:
    """The transform around this call that fused kernels know nothing of: torch.func.vmap, or forward-mode derivatives.

    What the reference is for: it is plain PyTorch. torch.func.grad is none of them.
    """
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    if torch._C._are_functorch_transforms_active():
        for interpreter in torch._C._functorch.get_interpreter_stack():
            if interpreter.key() == TransformType.Vmap:
                return "torch.func.vmap"
    return None


transform._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in dispatch


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
    generate_vmap_rule = True  # torch.func.jacrev maps over a backward pass

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
