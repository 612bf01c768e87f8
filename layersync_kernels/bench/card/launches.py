"""Which Triton kernels a run compiles: launches are recorded, and nothing runs.

Triton chooses at import to compile or to interpret, so this is for a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import importlib
import os
import types
from collections.abc import Callable
from typing import Any

import torch

from ...ops import registry


class Launches:
    """What was recorded.

    Attributes:
        found: "op.kernel" to its specialisations; may be cleared between two counts.
        compiled: those of all times, with the kernel's name.
        seconds: CPU seconds that compiling each of them took, where `compiling` is on.
    """

    def __init__(self, compiling: bool = False) -> None:
        self.compiling = compiling
        self.found: dict[str, set[tuple[object, ...]]] = {}
        self.compiled: set[tuple[object, ...]] = set()
        self.seconds: dict[str, list[float]] = {}

    def counts(self) -> dict[str, int]:
        """How often each kernel is compiled."""
        return {name: len(keys) for name, keys in sorted(self.found.items()) if keys}


def _trait(value: object, general: bool) -> object:
    """What Triton specialises a kernel on, of one argument."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int) and not general:
        return value == 1, value % 16 == 0, abs(value) >= 1 << 31
    return type(value).__name__


class _Recorder:
    """Stands in for a kernel."""

    def __init__(self, name: str, kernel: Any, launches: Launches) -> None:
        self._name, self._kernel, self._launches = name, kernel, launches

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **keywords: Any) -> None:
            names = self._kernel.arg_names
            given = dict(zip(names, args, strict=False)) | keywords
            key: list[object] = []
            for parameter in self._kernel.params:
                value = given.pop(parameter.name)
                key.append(value if parameter.is_constexpr else _trait(value, parameter.do_not_specialize))
            key += sorted(given.items())  # options of the launch
            keys = self._launches.found.setdefault(self._name, set())
            if tuple(key) in keys:
                return
            keys.add(tuple(key))
            if self._launches.compiling and (self._name, *key) not in self._launches.compiled:
                self._launches.compiled.add((self._name, *key))
                began = sum(os.times()[:4])  # of ptxas too
                self._kernel.warmup(*args, grid=grid, **keywords)
                self._launches.seconds.setdefault(self._name, []).append(sum(os.times()[:4]) - began)

        return launch


def pretend_card(capability: int = 90) -> None:
    """Let Triton compile for a card that is not here; its driver is asked for names only."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    driver.set_active(
        types.SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda _: 0,
        )
    )


def record(compiling: bool = False) -> Launches:
    """From now on launches of the ops' kernels are recorded in place of being run.

    Args:
        compiling: compile each specialisation for an H100, and time that.
    """
    from ...ops import tiles

    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("record() needs kernels that compile: unset TRITON_INTERPRET before Triton is imported")
    modules = {"tiles": tiles}
    for op in registry.ops():
        if "triton" in op.backends:
            modules[op.name] = importlib.import_module(f"layersync_kernels.ops.{op.name}.triton")
    os.environ["TRITON_INTERPRET"] = "1"  # of dispatch alone, which would refuse the tensors of a CPU
    if compiling:
        pretend_card()
    launches = Launches(compiling)
    for place, module in modules.items():
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel") and hasattr(kernel, "arg_names"):
                setattr(module, name, _Recorder(f"{place}.{name}", kernel, launches))
    return launches
