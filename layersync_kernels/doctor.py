"""`layersync doctor`: what is installed, which backend each op takes where and why, every environment variable."""

from __future__ import annotations

import importlib.util
import platform
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import __version__
from .ops import dispatch, native, registry, tuning
from .runtime import environment
from .runtime.machine import version_of

_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


@dataclass
class _NoArguments:
    """What is installed, which backend each op takes on each device and why, every environment variable."""


def facts() -> Iterator[tuple[str, str]]:
    """(what, value) rows about the installation."""
    yield "layersync_kernels", __version__
    yield "Python", f"{platform.python_version()} on {platform.platform()}"
    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}, {torch.get_num_threads()} CPU threads"
    yield "triton", version_of("triton", "not installed") if importlib.util.find_spec("triton") else "not installed"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield (
                f"GPU {index}",
                f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory >> 30} GiB",
            )
    else:
        yield "GPU", "none visible to torch"
    cpp = native.cpp()
    yield "C++ extension", cpp.reason
    if cpp.facts is not None:
        try:
            yield "CPU kernels", f"{cpp.facts.cpu_isa()} (of generic, avx2, avx512)"
        except RuntimeError as error:  # LAYERSYNC_CPU_ISA asks for what there is not
            yield "CPU kernels", str(error)
    yield "CUDA extension", native.cuda().reason


def choices() -> Iterator[tuple[str, str, str, str, str]]:
    """(op, device, dtypes, backend, reason) rows; dtypes with the same choice share one."""
    for op in registry.ops():
        for device in ("cpu", "cuda"):
            if device == "cuda" and not torch.cuda.is_available():
                backends = ", ".join(name for name in ("cuda", "triton") if name in op.backends)
                serves = f"; on one runs {backends or op.otherwise}"
                yield op.name, device, "all", "-", f"no GPU is visible to torch{serves}"
                continue
            grouped: dict[tuple[str, str], list[str]] = {}
            for dtype, name in _DTYPES.items():
                try:
                    choice = tuple(dispatch.choose(op.name, "auto", device, dtype))
                except (RuntimeError, ValueError) as error:  # LAYERSYNC_BACKEND asks for what cannot run
                    choice = ("error", str(error))
                if choice[0] in op.backends and not op.differentiable:
                    choice = (choice[0], f"{choice[1]}; the reference where a gradient is asked for")
                grouped.setdefault(choice, []).append(name)  # type: ignore[arg-type]
            for (backend, reason), dtypes in grouped.items():
                yield op.name, device, ", ".join(dtypes), backend, reason


def tuned() -> Iterator[tuple[str, str, str, str, str]]:
    """(function, device, dtype and widths, backend, reason) rows: what the tables in force make of a call."""
    for device in tuning.DEVICES:
        table = tuning.state(device).table
        for function, dtype, widths in table.entries if table is not None else ():
            arguments = (function, "auto", device, tuning.DTYPES[dtype])
            try:
                backend, reason = dispatch.choose(*arguments, width=tuning.width_of(widths))
            except (RuntimeError, ValueError) as error:  # as in choices
                backend, reason = "error", str(error)
            yield function, device, f"{dtype}, {widths} channels", backend, reason


def tables() -> Iterator[tuple[str, str]]:
    """(device, its tuning table or why there is none) rows."""
    for device in tuning.DEVICES:
        with warnings.catch_warnings():  # the row says it
            warnings.simplefilter("ignore")
            table, reason = tuning.state(device)
        yield device, reason if table is None else f"{table.path}, {reason}, {len(table.entries)} entries"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=len(columns) > 2)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def main(argv: Sequence[str] = ()) -> int:
    """Print the report; takes no arguments."""
    tyro.cli(_NoArguments, prog="layersync doctor", args=argv)
    console = Console()
    table = _table("Installation", "what", "value")
    for row in facts():
        table.add_row(*row)
    console.print(table)
    table = _table("Backends (backend='auto')", "op", "device", "dtypes", "backend", "reason")
    for choice in choices():
        table.add_row(*choice)
    console.print(table)
    table = _table("Tuning tables (layersync tune)", "device", "table")
    for row in tables():
        table.add_row(*map(escape, row))
    console.print(table)
    table = _table("Backends (backend='auto') by these tables", "function", "device", "calls", "backend", "reason")
    for choice in tuned():
        table.add_row(*map(escape, choice))
    if table.row_count:
        console.print(table)
    table = _table("Environment variables", "name", "default", "value here", "meaning")
    for variable in environment.VARIABLES:
        table.add_row(variable.name, variable.default, variable.get(), variable.meaning)
    console.print(table)
    return 0
