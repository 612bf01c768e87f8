"""A training step counted on the graphs that a GPU would run, op by op or through torch.compile, without a GPU.

Eager, the ops of the forward and backward pass are counted as `analysis.count_step` counts them, on fake tensors and
with the ops that a GPU takes. Compiled, Inductor lowers both passes for a card whose properties are pretended, and each
kernel that it schedules and each op that it calls is counted. Nothing is run, and no model is too large.
"""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry

from ..errors import UserError
from ..ops import registry
from . import pretended_gpu
from .analysis import PRODUCTS, Moved, Op, OpCounter, moved_beside, tensors_in
from .cards import CARDS, Card

GROUPS = {
    "gemm": "matrix products and convolutions, with their epilogues",
    "attention": "scaled dot-product attention",
    "ours": "the fused ops of this package, layersync_*::",
    "other": "the rest: Inductor's kernels, or those of PyTorch op by op",
}
"""What a kernel is counted as."""


class Kernel(NamedTuple):
    """What is launched.

    Attributes:
        phase: "forward" or "backward".
        group: a key of `GROUPS`.
        name: of the op, or of Inductor's kernel without its number.
        bytes: that it reads and writes.
        flops: of matrix products and attention, else 0.
        dtype: in which it multiplies matrices, e.g. torch.bfloat16; None where it does not.
        beside: of the bytes of a matrix product, those that its epilogue moves beside the product.
    """

    phase: str
    group: str
    name: str
    bytes: int
    flops: int = 0
    dtype: torch.dtype | None = None
    beside: int = 0


@dataclass(frozen=True)
class GpuStep:
    """The counts of a training step, forward and backward, or of a sum, a difference or a multiple of such.

    Attributes:
        kernels: how often each is launched.
        saved_bytes: alive between forward and backward pass, without parameters, inputs, the loss and `weight_bytes`.
        weight_bytes: alive there too, but of parameters alone: their copies, as autocast makes them.
        code: what Inductor wrote, for each graph; empty for an eager step.
    """

    kernels: dict[Kernel, int] = field(default_factory=dict)
    saved_bytes: int = 0
    weight_bytes: int = 0
    code: tuple[str, ...] = ()

    def __add__(self, other: GpuStep) -> GpuStep:
        kernels = {k: self.kernels.get(k, 0) + other.kernels.get(k, 0) for k in {**self.kernels, **other.kernels}}
        return GpuStep(
            {kernel: count for kernel, count in kernels.items() if count},
            self.saved_bytes + other.saved_bytes,
            self.weight_bytes + other.weight_bytes,
            self.code,
        )

    def __mul__(self, factor: int) -> GpuStep:
        return GpuStep(
            {kernel: factor * count for kernel, count in self.kernels.items() if factor},
            factor * self.saved_bytes,
            factor * self.weight_bytes,
            self.code,
        )

    def __sub__(self, other: GpuStep) -> GpuStep:
        return self + other * -1

    def bytes(self, *groups: str) -> int:
        """Bytes read and written by the kernels of some groups; of all without any."""
        return sum(count * k.bytes for k, count in self.kernels.items() if not groups or k.group in groups)

    def launches(self, *groups: str) -> int:
        """Kernels of some groups that are launched; of all without any."""
        return sum(count for k, count in self.kernels.items() if not groups or k.group in groups)

    @property
    def outside(self) -> int:
        """Bytes outside of matrix products and attention, and those that epilogues of products move beside them."""
        return self.bytes("ours", "other") + sum(count * k.beside for k, count in self.kernels.items())


Part = Tensor | tuple[Tensor, ...]
"""What `forward` returns: the loss of a step, or the results of a part of a model."""


def count_gpu_step(
    make: Callable[[], Callable[[], Part]],
    *,
    compiled: bool = False,
    card: Card = CARDS["h100"],
    backend: str = "cuda",
) -> GpuStep:
    """Count a training step, forward and backward, as a GPU would run it. Works without a GPU, and without its memory.

    Args:
        make: builds the model and its inputs, on the default device, and returns `forward`, which runs the model and
            returns the loss, a 0-d tensor; or which runs a part of a model and returns one tensor or several, whose
            gradients then come from outside. Both functions run on fake tensors, whose values cannot be asked for.
            Autocast is that of the CPU, `torch.autocast("cpu", torch.bfloat16)`, which stands for the GPU's.
        compiled: through torch.compile, in one graph, instead of op by op.
        card: whose code Inductor writes.
        backend: of our ops, where a GPU has them: "cuda", the extension, or "triton".

    Raises:
        ValueError: forward() gives nothing that requires grad; unknown backend.
        UserWarning: autocast for CUDA, where there is none, which would silently count fp32.
        UserError: compiled graphs cannot be lowered here, see `obstacle`; or torch has moved what this takes from its
            inside, which is known to be there from 2.10 to 2.14.
        torch._dynamo.exc.Unsupported: `compiled`, and the step does not compile into one graph.
    """
    if compiled:
        return _compiled(make, card, backend)
    counter = _Kernels()
    with _traced(make, backend) as forward, counter:
        outputs, gradients = _ends(forward())
        counter.end_forward(*outputs)
        counter.phase = "backward"
        torch.autograd.backward(outputs, gradients)
    return GpuStep(dict(Counter(counter.kernels)), counter.saved_bytes, counter.weight_bytes)


@contextlib.contextmanager
def _traced(make: Callable[[], Callable[[], Part]], backend: str) -> Iterator[Callable[[], Part]]:
    """`forward` of a model of fake tensors, where ops choose as on a GPU."""
    with pretended_gpu.gpu_ops(backend), pretended_gpu.fake_mode(), warnings.catch_warnings():
        # Autocast for CUDA does nothing on tensors of the CPU, and a count would silently be that of fp32.
        warnings.filterwarnings("error", message=".*CUDA is not available.*")
        with pretended_gpu.MODEL_DEVICE:
            forward = make()
        yield forward


def compile_step(
    make: Callable[[], Callable[[], Part]],
    lowered: Callable[..., None],
    backend: str,
    alive: OpCounter | None = None,
) -> None:
    """Compile a step, forward and backward, as torch.compile does, with `lowered` in Inductor's place.

    Args:
        make: as `count_gpu_step` takes it.
        backend: as `count_gpu_step` takes it.
        lowered: called with the graph of each pass, which it may change, its inputs, and the options of Inductor.
        alive: counts the ops that run, for what is kept between the passes.

    Raises:
        as `count_gpu_step`.
    """
    reason = obstacle()
    if reason is not None:
        raise UserError(f"graphs of torch.compile cannot be counted here: {reason}")
    around = OpCounter() if alive is None else alive

    def inner(graph: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[[list[Any]], Any]:
        traced = copy.deepcopy(graph)
        lowered(graph, inputs, **options)
        return _interpreted(traced, around)

    with _traced(make, backend) as forward:
        outputs, gradients = _ends(pretended_gpu.compile_with(forward, inner)())
        around.end_forward(*outputs)
        torch.autograd.backward(outputs, gradients)


def compose_step(two: GpuStep, three: GpuStep, depth: int) -> tuple[GpuStep, GpuStep]:
    """A block and a step of a model that is a pile of equal blocks, from models of two blocks and of three.

    Args:
        two: of the one.
        three: of the other.
        depth: blocks of the model in question.

    Returns:
        (block, step): what a block adds, and the whole step.
    """
    block = three - two
    return block, two + block * (depth - 2)


def obstacle() -> str | None:
    """Why `count_gpu_step(compiled=True)` cannot work here, or None."""
    return pretended_gpu.obstacle()


def mix_order_reduction() -> bool:
    """Whether Inductor may sum rows and columns in one kernel (torch._inductor.config.triton.mix_order_reduction)."""
    return pretended_gpu.mix_order_reduction()


class _Kernels(OpCounter):
    """Notes each op as a kernel."""

    phase = "forward"

    def __init__(self, phase: str = "forward") -> None:
        super().__init__()
        self.phase = phase
        self.kernels: list[Kernel] = []

    def count_inside(self, implementation: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """On CUDA tensors, by whose device the implementation cuts its work into chunks."""
        mode = pretended_gpu.fake_mode()
        on_gpu = [pretended_gpu.on_gpu(mode, value) for value in args]
        with mode, self:
            implementation(*on_gpu, **kwargs)
        return func(*args, **kwargs)

    def counted(
        self, op: Op, moved: Moved, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """A kernel, with what it multiplies."""
        self.kernels.append(_kernel(self.phase, op.name, moved.total, func, args, kwargs, output))


def _compiled(make: Callable[[], Callable[[], Part]], card: Card, backend: str) -> GpuStep:
    kernels: list[Kernel] = []
    code: list[str] = []
    alive = OpCounter()

    def lowered(graph: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> None:
        made = pretended_gpu.lower(graph, inputs, card, **options)
        code.append(made.code)
        kernels.extend(_kernels_of(made.launches, "backward" if options.get("is_backward") else "forward"))

    compile_step(make, lowered, backend, alive)
    return GpuStep(dict(Counter(kernels)), alive.saved_bytes, alive.weight_bytes, tuple(code))


def _ends(returned: Any) -> tuple[list[Tensor], list[Tensor | None]]:
    """The results of `forward` that have a gradient, and where that comes from outside, the gradients."""
    outputs = [tensor for tensor in tensors_in([returned]) if tensor.requires_grad]
    if not outputs:
        raise ValueError("count_gpu_step: forward() must return the loss, or tensors that require grad")
    return outputs, [None if tensor.dim() == 0 else torch.empty_like(tensor) for tensor in outputs]


def _interpreted(graph: fx.GraphModule, around: Any) -> Callable[[list[Any]], Any]:
    """The graph as a function of a list of fake tensors, as AOTAutograd calls one."""

    def run(arguments: list[Any]) -> Any:
        with around:
            return fx.Interpreter(graph).boxed_run(arguments)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _kernels_of(launches: Iterable[pretended_gpu.Launch], phase: str) -> list[Kernel]:
    found: list[Kernel] = []
    for launch in launches:
        if launch.node is None:
            found.append(Kernel(phase, _group(launch.name), re.sub(r"_\d+$", "", launch.name), launch.bytes))
            continue
        func = launch.node.target
        name = func.name() if isinstance(func, torch._ops.OpOverload) else launch.name
        raw = registry.find_raw(name)
        args, kwargs = fx.node.map_aggregate((launch.node.args, launch.node.kwargs), _value)
        if raw is not None and raw.kind == registry.COMPOSITE:
            counter = _Kernels(phase)
            with next(tensors_in(list(args))).fake_mode, counter:  # type: ignore[attr-defined]
                func(*args, **kwargs)  # type: ignore[operator]
            found += counter.kernels
        else:
            found.append(_kernel(phase, name, launch.bytes, func, args, kwargs, launch.node.meta.get("val")))
    return found


def _kernel(
    phase: str, name: str, nbytes: int, func: Any, args: Sequence[Any], kwargs: dict[str, Any], output: Any
) -> Kernel:
    flops, dtype = _products(func, args, kwargs, output)
    raw = registry.find_raw(name)
    beside = 0 if raw is None else moved_beside(raw, func, args, kwargs, output).total
    return Kernel(phase, _group(name), name, nbytes, flops, dtype, beside)


def _value(node: Any) -> Any:
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def _group(name: str) -> str:
    if name.startswith("layersync"):
        raw = registry.find_raw(name)
        return "gemm" if raw is not None and raw.beside is not None else "ours"
    if "dot_product" in name:
        return "attention"
    return "gemm" if name.rpartition("::")[2].partition(".")[0].removesuffix("_") in PRODUCTS else "other"


def _products(func: Any, args: Sequence[Any], kwargs: dict[str, Any], output: Any) -> tuple[int, torch.dtype | None]:
    """Floating point operations of an op that multiplies matrices, and their dtype; (0, None) for others."""
    raw = registry.find_raw(func.name()) if isinstance(func, torch._ops.OpOverload) else None
    formula = flop_registry.get(getattr(func, "overloadpacket", func))
    if raw is not None and raw.kind == "products":  # rows (M, K) times a weight of K times anything
        rows, weight = args[0], args[1]
        return 2 * rows.shape[0] * weight.numel(), rows.dtype
    if formula is None:
        return 0, None
    return int(formula(*args, **kwargs, out_val=output)), next(tensors_in(list(args))).dtype
