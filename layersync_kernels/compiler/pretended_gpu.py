"""A GPU that is not there: PyTorch traces, and Inductor lowers, as if there were one. Nothing is run.

Everything private of torch that the counts of GPU graphs need is in this file, tried with torch 2.11 and 2.14. The steps:

1. Fake tensors on the CPU carry shapes and no memory (`fake_mode`). Not on CUDA: a CUDA build of torch without a driver
   cannot run a backward pass of fake CUDA tensors, because the autograd engine asks the driver for streams.
2. While they are traced (`gpu_ops`), our ops resolve as for CUDA tensors, and attention is the kernel that a GPU runs.
   Other choices that PyTorch makes by device in C++ are those of the CPU.
3. The graphs are moved to fake CUDA tensors (`moved_to_gpu`), and Inductor lowers them (`lower`), while whoever asks for
   the device is answered with a card's properties.

All of it is undone at the end of the `with` blocks, whatever happens inside.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import importlib.util
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..errors import UserError
from ..functional import projected
from ..ops import dispatch, native
from ..ops.projected_alignment import chunks
from .cards import Card

BACKENDS = ("cuda", "triton")
MODEL_DEVICE = torch.device("cpu", 0)
"""Stands for the GPU while a model is traced; "cpu" without the number is what the model itself leaves on the host."""


def moved(what: object) -> UserError:
    """What to raise where a version of torch lacks something that this file takes from its inside."""
    return UserError(
        "counts of GPU graphs (layersync bench traffic --device h100) were written for torch 2.10-2.14; "
        f"torch {torch.__version__} moved {what}"
    )


@functools.cache
def _inside(path: str) -> Any:
    """Something private of torch, "module:name.name" or a module."""
    module, _, names = path.partition(":")
    try:
        return functools.reduce(getattr, filter(None, names.split(".")), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise moved(path.replace(":", ".")) from error


def obstacle() -> str | None:
    """Why graphs cannot be lowered for a GPU here, or None. Neither a GPU nor a driver is needed."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA, in which Inductor does not write kernels for GPUs"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed, for which Inductor writes its kernels"
    return None


def mix_order_reduction() -> bool:
    """Inductor's setting of that name; False where it has none."""
    return bool(getattr(_inside("torch._inductor.config:triton"), "mix_order_reduction", False))


def fake_mode() -> Any:
    """A mode in which tensors have shapes and no memory."""
    return _inside("torch._subclasses.fake_tensor:FakeTensorMode")(allow_non_fake_inputs=True)


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

    def resolve(op: str, backend: str, device: str, dtype: torch.dtype, grad: bool = False) -> str:
        return dispatch.choose(op, backend, "cuda", dtype, grad).backend

    resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as dispatch.resolve itself
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(native, "cuda", lambda: built))
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
    compile_fx = _inside("torch._inductor.compile_fx:compile_fx")

    def step() -> Any:
        return function()

    # A code object of its own: Dynamo keeps what it compiles at the code, and this is not to be found by anybody else.
    code = step.__code__.replace(co_name="counted_step")
    own = types.FunctionType(code, step.__globals__, "counted_step", None, step.__closure__)
    compiled = torch.compile(
        own, backend=functools.partial(compile_fx, inner_compile=lowered), fullgraph=True, dynamic=False
    )

    def run() -> Any:
        with _inside("torch._functorch.config").patch(enable_autograd_cache=False):
            return compiled()

    return run


@contextlib.contextmanager
def cuda_graphs() -> Iterator[None]:
    """What is compiled inside is to run as CUDA graphs, as mode="reduce-overhead" has it."""
    with _inside("torch._inductor.config").patch({"triton.cudagraphs": True}):
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
    prop = _inside("torch.fx.passes.fake_tensor_prop:FakeTensorProp")
    prop(graph, mode).propagate_dont_convert_inputs(*inputs)
    return mode, inputs


def on_gpu(mode: Any, value: Any) -> Any:
    """A fake CUDA tensor like one of the model; anything else as it is."""
    if not isinstance(value, Tensor) or value.device != MODEL_DEVICE:
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
    guards, virtualized = _inside("torch._guards"), _inside("torch._inductor.virtualized:V")
    mode, inputs = moved_to_gpu(graph, inputs)
    recorder = _Recorder()
    with card_at_hand(card), recorder.recording():
        # Outside of the pretence no driver answers for what a tracing context keeps of the CPU's tensors.
        with virtualized.set_fake_mode(mode), guards.tracing(guards.TracingContext(mode)):
            compiled = _inside("torch._inductor.compile_fx:compile_fx_inner")(graph, inputs, **options)
    return Lowered(recorder.launches(), "\n".join(recorder.sources), compiled, graph)


def triton_sources(code: str) -> dict[str, str]:
    """Kernel → source, as Inductor's code has them."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    return {
        ast.literal_eval(call.args[0]): ast.literal_eval(call.args[1])
        for call in calls
        if ast.unparse(call.func) == "async_compile.triton"
    }


def machine_code(name: str, source: str, card: Card) -> list[bytes]:
    """The cubins of a kernel of Inductor's, one for each configuration that it would try on the card."""
    with tempfile.TemporaryDirectory() as folder, card_at_hand(card):
        path = Path(folder) / f"{name}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # where the kernel looks for its globals
        try:
            spec.loader.exec_module(module)
            tuner = getattr(module, name)
            tuner.precompile(warm_cache_only=True)
            return [result.kernel.asm["cubin"] for result in tuner.compile_results]
        except AttributeError as error:
            raise moved(f"what compiles Inductor's kernels ({error})") from error
        finally:
            del sys.modules[name]


class _Recorder:
    """Notes what is scheduled and which kernels are written for it."""

    def __init__(self) -> None:
        self.sources: list[str] = []
        self._called: list[Launch] = []
        self._scheduled: dict[Any, int] = {}  # node of the scheduler → bytes
        self._written: list[tuple[str, Any]] = []  # kernel, node of the scheduler

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        lowering = _inside("torch._inductor.graph:GraphLowering")
        scheduling = _inside("torch._inductor.codegen.triton:TritonScheduling")
        base = _inside("torch._inductor.scheduler:BaseSchedulerNode")
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
            patch = functools.partial(_patch, stack)
            patch(lowering, "_update_scheduler", scheduled)
            patch(lowering, "save_output_code", staticmethod(self.sources.append))
            patch(scheduling, "define_kernel", defined)
            yield

    def _note(self, nodes: Sequence[Any]) -> None:
        scheduler, ir = _inside("torch._inductor.scheduler"), _inside("torch._inductor.ir")
        for node in nodes:
            if isinstance(node, scheduler.NopKernelSchedulerNode):
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


def _origin(called: Any) -> fx.Node | None:
    """The node of the graph that an op is called for."""
    origin, overload = called.get_origin_node(), getattr(called, "op_overload", None)
    if origin is None and overload is not None:  # an op with several results has none of its own
        origin = next((node for node in called.origins if node.target is overload), None)
    return origin


class _Driver:
    """Triton's, of a card that is not there."""

    def __init__(self, card: Card) -> None:
        target = _inside("triton.backends.compiler:GPUTarget")
        major, minor = card.capability
        self._target = target("cuda", 10 * major + minor, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_current_stream(self, *_: Any) -> int:
        return 0

    def is_active(self) -> bool:
        return True


class _NotRun:
    """Stands where the generated module would, and for what runs the parts of a graph in it."""

    __file__ = __file__

    def __init__(self) -> None:
        self.partitions: list[Any] = []

    @property
    def runner(self) -> _NotRun:
        return self

    def recursively_apply_fns(self, functions: Any) -> None:
        """Inductor would wrap the parts into CUDA graphs."""

    def call(self, args: Any) -> Any:
        raise RuntimeError("generated for a GPU that is not here")


def _properties(card: Card) -> types.SimpleNamespace:
    """What torch.cuda.get_device_properties would give."""
    major, minor = card.capability
    return types.SimpleNamespace(
        name=card.title, major=major, minor=minor, multi_processor_count=card.multiprocessors,
        total_memory=card.memory, L2_cache_size=card.l2, warp_size=32, max_threads_per_multi_processor=2048,
        max_threads_per_block=1024, regs_per_multiprocessor=65536, is_integrated=0, shared_memory_per_block=49152,
        shared_memory_per_block_optin=card.shared_per_block,
        shared_memory_per_multiprocessor=card.shared_per_multiprocessor, gcnArchName="", uuid="0" * 16,
    )  # fmt: skip


# Modules whose cached functions remember what a device answered. Others cache what was registered once, and are left.
_CACHES = ("torch._inductor.utils", "torch.utils._triton", "torch._inductor.codegen.cuda.cuda_env")
_CACHED = ("torch._inductor.runtime.hints:DeviceProperties.create", "torch._inductor.codecache:CacheBase.get_system")


def _forget() -> None:
    for name in _CACHES:
        with contextlib.suppress(ImportError):
            for function in list(vars(importlib.import_module(name)).values()):
                if callable(getattr(function, "cache_clear", None)):
                    function.cache_clear()
    for path in _CACHED:
        getattr(_inside(path), "cache_clear", lambda: None)()


def _patch(stack: contextlib.ExitStack, target: Any, name: str, value: Any) -> None:
    if not hasattr(target, name):
        raise moved(f"{getattr(target, '__name__', target)}.{name}")
    stack.enter_context(mock.patch.object(target, name, value))


@contextlib.contextmanager
def card_at_hand(card: Card) -> Iterator[None]:
    """Whoever asks torch or Triton for the GPU hears of this card; nothing is loaded or run on it."""
    properties = _properties(card)
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": properties,
        "is_bf16_supported": True, "synchronize": None, "set_device": None,
    }  # fmt: skip
    of_cuda = {
        **answers, "_exchange_device": 0, "_maybe_exchange_device": 0, "get_device_capability": card.capability,
        "get_device_name": card.title, "_lazy_init": None, "set_rng_state": None, "is_current_stream_capturing": False,
    }  # fmt: skip

    def says(value: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: value

    interface = _inside("torch._dynamo.device_interface:CudaInterface")
    loader = _inside("torch._inductor.codecache:PyCodeCache")
    _forget()
    try:
        with contextlib.ExitStack() as stack:
            patch = functools.partial(_patch, stack)
            for name, value in of_cuda.items():
                patch(torch.cuda, name, says(value))
            patch(torch.cuda, "get_rng_state", lambda *args, **kwargs: torch.get_rng_state())
            for name, value in {**answers, "exchange_device": 0, "maybe_exchange_device": 0}.items():
                patch(interface, name, staticmethod(says(value)))
            for name in ("current_device", "get_device_properties"):
                patch(interface.Worker, name, staticmethod(says(answers[name])))
            patch(torch._C, "_cuda_hasPrimaryContext", says(False))
            for module in ("torch.utils._triton", "torch._inductor.scheduler"):
                patch(_inside(module), "has_triton", says(True))
            patch(_inside("triton:runtime.driver"), "_active", _Driver(card))
            patch(_inside("torch._inductor.runtime.triton_helpers"), "set_driver_to_gpu", says(None))
            patch(loader, "load_by_key_path", classmethod(lambda *args, **kwargs: _NotRun()))
            patch(loader, "write", classmethod(says(("key", __file__))))
            stack.enter_context(
                _inside("torch._inductor.config").patch(
                    compile_threads=1, fx_graph_cache=False, force_disable_caches=True, use_static_cuda_launcher=False
                )
            )
            yield
    finally:
        _forget()
