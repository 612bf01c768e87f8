"""Times the providers of a case against each other.

Providers take turns inside every round, so that a slow spell of the machine hits them alike and ratios hold where
single times do not. From round to round inputs rotate through 256 MB or 16 sets, and inside a round they are the same
for all: small ones are in the cache by the second provider's turn. A provider is timed only after its outputs and
gradients have been checked against fp64, one that fails is a row with its problem, and a copy of one tensor runs in the
same rounds as the yardstick of bandwidth.
"""

from __future__ import annotations

import dataclasses
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from ..runtime.memory import keep_freed_memory
from .cases import MODES, PROVIDERS, Case, Function, eager, exact, provider

_ROTATE_BYTES = 256 << 20
_MAX_SETS = 16


@dataclass
class Row:
    """One provider, case and mode.

    Attributes:
        p20_ms, p50_ms, p80_ms: quantiles of the time, milliseconds.
        bytes_moved: what an ideal kernel reads and writes; None for an op with matrix products.
        gb_per_s: that over the median time.
        copy_fraction: that, over the bandwidth of copying one tensor in the same rounds, a read and a write. No limit:
            more than 1 where inputs come from the cache, as a backward pass finds there what the forward pass has just
            read, and where a kernel's stores go past it, while the copy's first fetch the line that they write to.
        saved_bytes: bytes kept for the backward pass beyond the inputs.
        peak_bytes: most memory allocated beyond the inputs (GPU only).
        vs_eager, vs_compile: how many times faster; the median over rounds of the ratio inside a round.
        problem: why there are no times.
    """

    op: str
    case: str
    mode: str
    provider: str
    device: str
    bytes_moved: int | None = None
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    gb_per_s: float | None = None
    copy_fraction: float | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    vs_eager: float | None = None
    vs_compile: float | None = None
    problem: str | None = None
    machine: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        """For a line of JSON."""
        return asdict(self)


def machine_facts(device: str) -> dict[str, str]:
    """Where and with what a figure was measured."""
    from importlib.metadata import PackageNotFoundError, version

    from .. import __version__

    def version_of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "none"

    facts = {
        "layersync_kernels": __version__,
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "threads": str(torch.get_num_threads()),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {"gpu": properties.name, "cuda": torch.version.cuda or "none"}
    return facts


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def relative_error(actual: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    """‖actual − truth‖ / ‖truth‖ of each pair."""
    pairs = zip(actual, truth, strict=True)
    return [((a.double() - t).norm() / t.norm().clamp_min(1e-300)).item() for a, t in pairs]


def _outputs(function: Function, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    outputs = function(*inputs)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def gradients_of(outputs: Sequence[Tensor]) -> list[Tensor]:
    """What arrives at the outputs: one at a loss, noise at hidden states."""
    generator = torch.Generator().manual_seed(2)
    return [
        torch.ones_like(x) if x.dim() == 0 else torch.randn(x.shape, generator=generator).to(x.device, x.dtype)
        for x in outputs
    ]


def check(case: Case, function: Function) -> str | None:
    """Compare outputs and gradients with fp64; None when all are right, else what is wrong.

    A provider may be twice as far off as the eager formula, plus eight ulp of the dtype, of fp32 for a loss: orders of
    a sum differ by that. The largest case that is checked has 8,192 rows: fp64 copies of more would not fit everywhere.
    """
    small = dataclasses.replace(case, rows=min(case.rows, 8192))
    inputs = small.inputs(seed=1)
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]

    def run(f: Function, given: Sequence[Tensor]) -> list[Tensor]:
        outputs = _outputs(f, given)
        wanted = [x for x in given if x.requires_grad]
        gradients = torch.autograd.grad(outputs, wanted, gradients_of(outputs)) if wanted else ()
        return [*(x.detach() for x in outputs), *gradients]

    truth = run(exact(case), wide)
    allowed = relative_error(run(eager(case), inputs), truth)
    actual = run(function, inputs)
    count = len(actual) - sum(x.requires_grad for x in inputs)
    names = [f"output {i + 1}" for i in range(count)] + [f"gradient {i + 1}" for i in range(len(actual) - count)]
    for what, tensor, error, allow in zip(names, actual, relative_error(actual, truth), allowed, strict=True):
        if not error <= 2 * allow + 8 * torch.finfo(tensor.dtype).eps:
            return f"wrong {what}: relative error {error:.2g}, eager has {allow:.2g}"
    return None


def saved_bytes(function: Function, inputs: Sequence[Tensor]) -> int:
    """Bytes that the autograd graph keeps beyond the inputs' own storages."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _outputs(function, inputs)
    own = {x.untyped_storage().data_ptr() for x in inputs}
    return sum(nbytes for pointer, nbytes in storages.items() if pointer not in own)


class Timer:
    """Milliseconds of one call: the wall clock on the CPU, events on a GPU."""

    def __init__(self, device: str) -> None:
        self._gpu = device == "cuda"

    def __call__(self, call: Callable[[], object]) -> float:
        """Time a call."""
        if not self._gpu:
            began = time.perf_counter()
            call()
            return (time.perf_counter() - began) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        # The launch is hidden behind a kernel that is already running, as it is inside a training step.
        torch.cuda._sleep(2_000_000)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def timed(
    timer: Timer, function: Function, mode: str, inputs: Sequence[Tensor], gradients: Sequence[Tensor], repeats: int
) -> float:
    """Milliseconds of a call of `function` in a mode, the mean of `repeats` calls."""
    turns = range(repeats)

    def forward() -> tuple[Tensor, ...]:
        return _outputs(function, inputs)

    def backward(results: Iterable[tuple[Tensor, ...]]) -> None:
        for outputs in results:
            torch.autograd.backward(outputs, gradients)

    for x in inputs:
        x.grad = None
    if mode == "forward":
        milliseconds = timer(lambda: [forward() for _ in turns])
    elif mode == "backward":
        results = [forward() for _ in turns]
        milliseconds = timer(lambda: backward(results))
    else:
        milliseconds = timer(lambda: backward(forward() for _ in turns))
    for x in inputs:
        x.grad = None
    return milliseconds / repeats


def quantile(values: Sequence[float], fraction: float) -> float:
    """The value that a fraction of the others do not reach."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.floor(fraction * len(ordered)))]


def measure(
    case: Case,
    providers: Sequence[str],
    *,
    modes: Sequence[str] = MODES,
    rounds: int = 15,
    warmup: int = 3,
    seconds: float = 60,
    keep_memory: bool = True,
) -> Iterator[Row]:
    """Check and time every provider that can run on a case.

    Args:
        case: what to compute.
        providers: names of `cases.PROVIDERS`.
        modes: of "forward", "backward", "both"; those that the case does not have are left out.
        rounds: measured rounds of each mode; every provider is timed once in a round.
        warmup: rounds that are not counted.
        seconds: about how long one mode may take; ends its rounds early, but not before the fifth.
        keep_memory: on a CPU, let the process keep what it frees, as the trainer does. Otherwise page faults are up to
            half of the time, of every provider, by their luck.

    Yields:
        one row per mode and provider, and one for the copy. A provider that cannot run, computes something wrong or
        fails in whatever way, in its check or later, has a problem instead of times, and the others go on.

    Raises:
        ValueError: an unknown provider.
    """
    if unknown := set(providers) - set(PROVIDERS):
        raise ValueError(f"unknown provider {', '.join(sorted(unknown))}; expected some of {', '.join(PROVIDERS)}")
    if keep_memory and case.device == "cpu":
        keep_freed_memory()
    facts = machine_facts(case.device)
    functions: dict[str, Function] = {}
    problems: dict[str, str] = {}
    saved: dict[str, int] = {}
    first = case.inputs(0)
    for name in providers:
        try:
            function = provider(name, case)
            problem = check(case, function)
            if problem is None:
                functions[name], saved[name] = function, saved_bytes(function, first)
        except Exception as error:  # Triton's and Inductor's are of many classes
            problem = describe_failure(error)
        if problem is not None:
            problems[name] = problem

    size = sum(x.numel() * x.element_size() for x in first)
    sets = [first, *map(case.inputs, range(1, min(_MAX_SETS, max(2, -(-_ROTATE_BYTES // size)))))]
    gradients = gradients_of(_outputs(eager(case), first))
    source = torch.empty((case.rows, case.width), dtype=case.dtype, device=case.device).normal_()
    target = torch.empty_like(source)
    timer = Timer(case.device)
    for mode in [mode for mode in modes if mode in case.modes]:
        times: dict[str, list[float]] = {name: [] for name in ("copy", *functions)}
        peaks: dict[str, int] = {}
        began = time.perf_counter()
        for turn in range(warmup + rounds):
            if turn >= warmup + 5 and time.perf_counter() - began > seconds:
                break
            inputs = sets[turn % len(sets)]
            milliseconds = {"copy": timer(lambda: target.copy_(source))}
            for name, function in list(functions.items()):
                if case.device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                try:
                    milliseconds[name] = timed(timer, function, mode, inputs, gradients, case.repeats)
                except Exception as error:  # out of memory: the check was of fewer rows
                    problems[name] = describe_failure(error)
                    del functions[name]
                    continue
                if case.device == "cuda":
                    peaks[name] = torch.cuda.max_memory_allocated() - before
            if turn >= warmup:
                for name, value in milliseconds.items():
                    times[name].append(value)
        copy_speed = 2 * case.tensor_bytes / statistics.median(times["copy"])
        for name in ("copy", *functions):
            moved = 2 * case.tensor_bytes if name == "copy" else case.ideal_bytes(mode)
            median = statistics.median(times[name])
            yield Row(
                case.op, case.name, mode, name, case.device, moved,
                p20_ms=quantile(times[name], 0.2), p50_ms=median, p80_ms=quantile(times[name], 0.8),
                gb_per_s=None if moved is None else moved / median / 1e6,
                copy_fraction=None if moved is None else moved / median / copy_speed,
                saved_bytes=saved.get(name), peak_bytes=peaks.get(name),
                vs_eager=_speedup(times, name, "eager"), vs_compile=_speedup(times, name, "compile"),
                machine=facts,
            )  # fmt: skip
        for name, problem in problems.items():
            yield Row(case.op, case.name, mode, name, case.device, problem=problem, machine=facts)


def describe_failure(error: Exception) -> str:
    """The message, and the class where that says more than that something is not possible here."""
    return str(error) if type(error) is RuntimeError else f"{type(error).__name__}: {error}"


def _speedup(times: dict[str, list[float]], name: str, against: str) -> float | None:
    if name == "copy" or len(times.get(against, ())) != len(times[name]):  # not asked for, or it failed
        return None
    return statistics.median(other / own for own, other in zip(times[name], times[against], strict=True))
