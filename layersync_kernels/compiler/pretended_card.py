"""A card that is not there: whoever asks torch, Inductor or Triton for the GPU hears of it. Nothing is run."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import importlib.util
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .cards import Card
from .torch_inside import inside, moved, patch_in


class _Driver:
    """Triton's, of a card that is not there."""

    def __init__(self, card: Card) -> None:
        target = inside("triton.backends.compiler:GPUTarget")
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
        getattr(inside(path), "cache_clear", lambda: None)()


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

    interface = inside("torch._dynamo.device_interface:CudaInterface")
    loader = inside("torch._inductor.codecache:PyCodeCache")
    _forget()
    try:
        with contextlib.ExitStack() as stack:
            patch = functools.partial(patch_in, stack)
            for name, value in of_cuda.items():
                patch(torch.cuda, name, says(value))
            patch(torch.cuda, "get_rng_state", lambda *args, **kwargs: torch.get_rng_state())
            for name, value in {**answers, "exchange_device": 0, "maybe_exchange_device": 0}.items():
                patch(interface, name, staticmethod(says(value)))
            for name in ("current_device", "get_device_properties"):
                patch(interface.Worker, name, staticmethod(says(answers[name])))
            patch(torch._C, "_cuda_hasPrimaryContext", says(False))
            for module in ("torch.utils._triton", "torch._inductor.scheduler"):
                patch(inside(module), "has_triton", says(True))
            patch(inside("triton:runtime.driver"), "_active", _Driver(card))
            patch(inside("torch._inductor.runtime.triton_helpers"), "set_driver_to_gpu", says(None))
            patch(loader, "load_by_key_path", classmethod(lambda *args, **kwargs: _NotRun()))
            patch(loader, "write", classmethod(says(("key", __file__))))
            stack.enter_context(
                inside("torch._inductor.config").patch(
                    compile_threads=1, fx_graph_cache=False, force_disable_caches=True, use_static_cuda_launcher=False
                )
            )
            yield
    finally:
        _forget()


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
            if not hasattr(tuner, "precompile") or not hasattr(tuner, "compile_results"):
                raise moved("what compiles Inductor's kernels (CachingAutotuner.precompile)")
            tuner.precompile(warm_cache_only=True)
            return [result.kernel.asm["cubin"] for result in tuner.compile_results]
        finally:
            del sys.modules[name]
