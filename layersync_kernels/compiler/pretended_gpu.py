"""A GPU that is not there: PyTorch traces, and Inductor lowers, as if there were one. Nothing is run.

What this takes from the inside of torch is here and in pretended_card.py, tried with torch 2.11 and 2.14.

1. Fake tensors of the CPU carry shapes and no memory (`fake_mode`). Not of CUDA: without a driver, a CUDA build of
   torch cannot run a backward pass of fake CUDA tensors, because the autograd engine asks the driver for streams.
2. While they are traced (`gpu_ops`), our ops resolve as for CUDA tensors, and attention is the kernel that a GPU runs.
   What else PyTorch chooses by device in C++, and which ops autocast casts, is the CPU's choice.
3. The graphs are moved to fake CUDA tensors (`moved_to_gpu`), and Inductor lowers them (`lower`), while whoever asks
   for the device is answered with a card's properties.

All of it is undone at the end of the `with` blocks, whatever happens inside.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..functional import projected
from ..ops import dispatch, native
from ..ops.projected_alignment import chunks
from .cards import Card
from .pretended_card import card_at_hand
from .torch_inside import inside, moved, patch_in

BACKENDS = ("cuda", "triton")
MODEL_DEVICE = torch.device("cpu", 0)
"""Stands for the GPU while a model is traced; "cpu" without the number is what the model itself leaves on the host."""


def obstacle() -> str | None:
    """Why graphs cannot be lowered for a GPU here, or None. Neither a GPU nor a driver is needed."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA, in which Inductor does not write kernels for GPUs"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed, for which Inductor writes its kernels"
    return None


def mix_order_reduction() -> bool:
    """Inductor's setting of that name; False where it has none."""
    return bool(getattr(inside("torch._inductor.config:triton"), "mix_order_reduction", False))


def fake_mode() -> Any:
    """A mode in which tensors have shapes and no memory."""
    return inside("torch._subclasses.fake_tensor:FakeTensorMode")(allow_non_fake_inputs=True)


# ---- Tracing


@contextlib.contextmanager
def gpu_ops(backend: str = "cuda") -> Iterator[None]:
    """Ops choose as for tensors on a GPU, with the extension built for it or, for "triton", without.

    Raises:
        ValueError: unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: expected one of {', '.join(BACKENDS)}")
    built = native.Library(
        backend == "cuda", "pretended to be built" if backend == "cuda" else "pretended to be absent"
    )

    def by_rule(op: str, backend: str, dtype: torch.dtype, grad: bool) -> str:
        return dispatch.choose(op, backend, "cuda", dtype, grad).backend

    def resolve(
        op: str, backend: str, device: str, dtype: torch.dtype, grad: bool = False, tokens: Any = None, parts: int = 1
    ) -> str:
        """As `dispatch.resolve`, without what was measured on this machine."""
        return by_rule(op, backend, dtype, grad)

    by_rule._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in dispatch
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(native, "cuda", return_value=built))
        stack.enter_context(mock.patch.object(dispatch, "resolve", resolve))
        stack.enter_context(mock.patch.object(projected, "linear_rows", _linear_rows))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", _attention))
        yield


def _linear_rows(width: int, dtype: torch.dtype, device: str) -> int:
    return chunks.linear_rows(width, dtype, "cuda")


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The kernel of a GPU: FlashAttention for halves, the memory-efficient one for fp32."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if enable_gqa:
        raise NotImplementedError("counts of GPU graphs: attention with enable_gqa=True is not known")
    half = query.dtype in (torch.bfloat16, torch.float16)
    if half and attn_mask is None and query.shape[-1] % 8 == 0:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    log_sum = torch.is_grad_enabled()
    return efficient(query, key, value, attn_mask, log_sum, dropout_p, is_causal, scale=scale)[0]


def compile_with(function: Callable[[], Any], lowered: Callable[..., Callable[[list[Any]], Any]]) -> Callable[[], Any]:
    """torch.compile, but that `lowered(graph, inputs, **options)` stands in Inductor's place for each graph.

    The graphs are those of AOTAutograd and of Inductor's partition into forward and backward pass.
    """
    compile_fx = inside("torch._inductor.compile_fx:compile_fx")

    def step() -> Any:
        return function()

    # A code object of its own: Dynamo keeps what it compiles at the code, and this is not to be found by anybody else.
    code = step.__code__.replace(co_name="counted_step")
    own = types.FunctionType(code, step.__globals__, "counted_step", None, step.__closure__)
    compiled = torch.compile(
        own, backend=functools.partial(compile_fx, inner_compile=lowered), fullgraph=True, dynamic=False
    )

    def run() -> Any:
        with inside("torch._functorch.config").patch(enable_autograd_cache=False):
            return compiled()

    return run


@contextlib.contextmanager
def cuda_graphs() -> Iterator[None]:
    """What is compiled inside is to run as CUDA graphs, as mode="reduce-overhead" has it."""
    with inside("torch._inductor.config").patch({"triton.cudagraphs": True}):
        yield


def refusals(compiled: Any) -> list[str]:
    """Why Inductor itself would not run what it compiled as a CUDA graph."""
    if not hasattr(compiled, "disabled_cudagraphs_reason") or not hasattr(compiled, "cudagraph_info"):
        raise moved("what Inductor says of CUDA graphs (CompiledFxGraph.cudagraph_info)")
    info, reason = compiled.cudagraph_info, compiled.disabled_cudagraphs_reason
    if info is None:
        return [reason or "CUDA graphs were not asked for"]
    return [*info.cudagraph_fail_reasons, *([reason] if reason else [])]


# ---- Lowering


class Launch(NamedTuple):
    """A kernel that a lowered graph launches, or an op that it calls.

    Attributes:
        name: of Inductor's kernel, or of the op.
        bytes: that it reads and writes, as Inductor's scheduler counts them.
        node: the node of an op in the graph; None for Inductor's own kernels.
    """

    name: str
    bytes: int
    node: fx.Node | None


class Lowered(NamedTuple):
    """What Inductor made of a graph.

    Attributes:
        launches: in no particular order.
        code: the Python that would launch them, with the Triton source of each kernel.
        compiled: Inductor's own result.
        graph: the graph after Inductor's passes.
    """

    launches: list[Launch]
    code: str
    compiled: Any
    graph: fx.GraphModule


def moved_to_gpu(graph: fx.GraphModule, inputs: Sequence[Any]) -> tuple[Any, list[Any]]:
    """Make a graph of CPU tensors one of CUDA tensors, in place.

    Returns:
        the mode of its fake tensors, its inputs.
    """
    mode = fake_mode()
    device = torch.device("cuda", 0)
    inputs = [on_gpu(mode, value) for value in inputs]

    def place(value: Any) -> Any:
        return device if value == MODEL_DEVICE else value

    for node in graph.graph.nodes:
        node.args, node.kwargs = (fx.node.map_aggregate(given, place) for given in (node.args, node.kwargs))
    graph.recompile()
    prop = inside("torch.fx.passes.fake_tensor_prop:FakeTensorProp")
    prop(graph, mode).propagate_dont_convert_inputs(*inputs)
    return mode, inputs


def on_gpu(mode: Any, value: Any) -> Any:
    """A fake CUDA tensor like one of the model; what is no tensor, or on the host, as it is."""
    if not isinstance(value, Tensor) or value.device == torch.device("cpu"):
        return value
    with mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")


def lower(graph: fx.GraphModule, inputs: Sequence[Any], card: Card, **options: Any) -> Lowered:
    """Let Inductor lower a graph of CPU tensors for a card. Changes the graph.

    Args:
        graph: of AOTAutograd, as `compile_with` hands it on.
        inputs: fake CPU tensors.
        card: to be pretended.
        options: of `compile_fx_inner`.
    """
    guards, virtualized = inside("torch._guards"), inside("torch._inductor.virtualized:V")
    mode, inputs = moved_to_gpu(graph, inputs)
    recorder = _Recorder()
    traced = guards.tracing(guards.TracingContext(mode))  # the current one is of the CPU's tensors
    with card_at_hand(card), recorder.recording(), virtualized.set_fake_mode(mode), traced:
        compiled = inside("torch._inductor.compile_fx:compile_fx_inner")(graph, inputs, **options)
    return Lowered(recorder.launches(), "\n".join(recorder.sources), compiled, graph)


class _Recorder:
    """Notes what is scheduled and which kernels are written for it."""

    def __init__(self) -> None:
        self.sources: list[str] = []
        self._called: list[Launch] = []
        self._scheduled: dict[Any, int] = {}  # node of the scheduler → bytes
        self._written: list[tuple[str, Any]] = []  # kernel, node of the scheduler

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        lowering = inside("torch._inductor.graph:GraphLowering")
        scheduling = inside("torch._inductor.codegen.triton:TritonScheduling")
        base = inside("torch._inductor.scheduler:BaseSchedulerNode")
        schedule, define = lowering._update_scheduler, scheduling.define_kernel

        def scheduled(graph: Any) -> None:
            schedule(graph)
            self._note(graph.scheduler.nodes)

        def defined(backend: Any, source: str, nodes: Any, kernel: Any) -> str:
            name: str = define(backend, source, nodes, kernel)
            node = next(node for node in nodes if isinstance(node, base))
            self._written.append((name, backend.scheduler.name_to_fused_node[node.get_name()]))
            return name

        with contextlib.ExitStack() as stack:
            patch = functools.partial(patch_in, stack)
            patch(lowering, "_update_scheduler", scheduled)
            patch(lowering, "save_output_code", staticmethod(self.sources.append))
            patch(scheduling, "define_kernel", defined)
            yield

    def _note(self, nodes: Sequence[Any]) -> None:
        scheduler, ir = inside("torch._inductor.scheduler"), inside("torch._inductor.ir")
        for node in nodes:
            if isinstance(node, scheduler.NopKernelSchedulerNode) or _runs_on_host(node):
                continue
            if not isinstance(node, scheduler.ExternKernelSchedulerNode):
                self._scheduled[node] = node.get_read_write_buffers_sizes()
            elif not isinstance(node.node, ir.MultiOutput):  # one of the results of a call, which is there too
                name = getattr(node.node, "python_kernel_name", None) or type(node.node).__name__
                self._called.append(Launch(str(name), node.get_read_write_buffers_sizes(), _origin(node.node)))

    def launches(self) -> list[Launch]:
        bytes_of = dict(self._scheduled)
        # A node that is split into several kernels is counted with the first.
        written = [Launch(name, bytes_of.pop(node, 0), None) for name, node in self._written]
        if bytes_of:
            raise moved("what writes Inductor's kernels: some were scheduled and never written")
        return written + self._called


def _runs_on_host(node: Any) -> bool:
    device = node.get_device()
    return device is not None and device.type == "cpu"


def _origin(called: Any) -> fx.Node | None:
    """The node of the graph that an op is called for."""
    origin, overload = called.get_origin_node(), getattr(called, "op_overload", None)
    if origin is None and overload is not None:  # an op with several results has none of its own
        origin = next((node for node in called.origins if node.target is overload), None)
    return origin
