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
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..runtime.memory import keep_freed_memory
from .cases import MODES, OPS, PROVIDERS, Case, Function, eager, exact, provider
from .machine import free_bytes, machine_facts

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
        checked_rows: how many of the case's rows the check against fp64 had.
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
    checked_rows: int | None = None
    problem: str | None = None
    machine: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        """For a line of JSON."""
        return asdict(self)


def relative_error(actual: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    """‖actual − truth‖ / ‖truth‖ of each pair."""
    pairs = zip(actual, truth, strict=True)
    return [((a.double() - t).norm() / t.norm().clamp_min(1e-300)).item() for a, t in pairs]


def _outputs(function: Function, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    outputs = function(*inputs)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def gradients_of(outputs: Sequence[Tensor]) -> list[Tensor]:
    """What arrives at the outputs: one at a loss, noise at hidden states."""
    generator = torch.Generator(outputs[0].device).manual_seed(2)
    return [
        torch.ones_like(x) if x.dim() == 0 else torch.randn(x.shape, generator=generator, device=x.device).to(x.dtype)
        for x in outputs
    ]


def _outputs_and_gradients(function: Function, inputs: Sequence[Tensor]) -> list[Tensor]:
    outputs = _outputs(function, inputs)
    wanted = [x for x in inputs if x.requires_grad]
    gradients = torch.autograd.grad(outputs, wanted, gradients_of(outputs)) if wanted else ()
    return [*(x.detach() for x in outputs), *gradients]


@dataclass(frozen=True)
class Truth:
    """What a case's providers are held against.

    Attributes:
        inputs: of the case, or of one with fewer rows where fp64 copies of all would not fit.
        values: outputs and gradients in fp64.
        allowed: how far off the eager formula is, of each; of a gradient also that with its kinks moved by a rounding.
        rows: of the inputs.
    """

    inputs: list[Tensor]
    values: list[Tensor]
    allowed: list[float]
    rows: int


def _fp64_bytes(case: Case) -> int:
    """About what the formula in fp64 takes with its gradients; matrices of cosines are squares of the tokens."""
    values = sum(math.prod(shape) for shape in OPS[case.op].inputs(case.rows, case.width))
    return 8 * (16 * values + (8 * case.rows**2 if case.op == "gram_alignment" else 0))


def truth_of(case: Case) -> Truth:
    """Compute the truth of a case, at its own size wherever half of the free memory holds that.

    At another size a compiler would compile for the check what is never timed.
    """
    while case.rows > 256 and _fp64_bytes(case) > free_bytes(case.device) // 2:
        case = dataclasses.replace(case, rows=case.rows // 2 // 256 * 256 or 256)
    inputs = case.inputs(seed=1)
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    values = _outputs_and_gradients(exact(case), wide)
    allowed = relative_error(_outputs_and_gradients(eager(case), inputs), values)
    outputs = len(values) - sum(x.requires_grad for x in inputs)
    for formula in OPS[case.op].beside:
        errors = relative_error(_outputs_and_gradients(formula, wide), values)
        allowed[outputs:] = map(max, allowed[outputs:], errors[outputs:])
    return Truth(inputs, values, allowed, case.rows)


def check(case: Case, function: Function, truth: Truth | None = None) -> str | None:
    """Compare outputs and gradients with fp64; None when all are right, else what is wrong.

    A provider may be twice as far off as the eager formula, plus eight ulp of the dtype, of fp32 for a loss: orders of
    a sum differ by that.

    Args:
        case: what to compute.
        function: the provider's.
        truth: of `truth_of`, where it is there already.
    """
    truth = truth or truth_of(case)
    actual = _outputs_and_gradients(function, truth.inputs)
    count = len(actual) - sum(x.requires_grad for x in truth.inputs)
    names = [f"output {i + 1}" for i in range(count)] + [f"gradient {i + 1}" for i in range(len(actual) - count)]
    errors = relative_error(actual, truth.values)
    for what, tensor, error, allow in zip(names, actual, errors, truth.allowed, strict=True):
        if not error <= 2 * allow + 8 * torch.finfo(tensor.dtype).eps:
            return f"wrong {what}: relative error {error:.2g}, twice {allow:.2g} is allowed"
    return None


DEVICE_LOST = 75
"""Exit code of a process that ends because of `DeviceLost`: another one can go on."""


def is_wrong(problem: object) -> bool:
    """Whether a problem is one that `check` tells."""
    return isinstance(problem, str) and problem.startswith("wrong ")


class DeviceLost(RuntimeError):
    """Nothing runs on the device any more in this process, as after an illegal address on a GPU."""


def device_lost(device: str) -> bool:
    """Whether an error of the past stays with the process."""
    if device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


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
        DeviceLost: a provider has left the device unusable. All rows that were due have come before, those that could
            not be timed with this as their problem; other cases need another process.
    """
    if unknown := set(providers) - set(PROVIDERS):
        raise ValueError(f"unknown provider {', '.join(sorted(unknown))}; expected some of {', '.join(PROVIDERS)}")
    if keep_memory and case.device == "cpu":
        keep_freed_memory()
    modes = [mode for mode in modes if mode in case.modes]
    facts = machine_facts(case.device)
    common: dict[str, Any] = {"op": case.op, "case": case.name, "device": case.device, "machine": facts}

    def failed(mode: str, problems: Mapping[str, str]) -> Iterator[Row]:
        for name in providers:
            if name in problems:
                yield Row(**common, mode=mode, provider=name, problem=problems[name])

    def lost_by(name: str, problem: str, left: Iterable[str]) -> Iterator[Row]:
        """A provider has taken the device with it: what is left of the case cannot be timed."""
        others = dict.fromkeys(providers, f"{name} has left the device unusable before its turn")
        for mode in left:
            yield from failed(mode, {**others, **problems, name: problem})
        raise DeviceLost(f"{case.op} {case.name}: {name} has left the device unusable: {problem}")

    functions: dict[str, Function] = {}
    problems: dict[str, str] = {}
    saved: dict[str, int] = {}
    try:
        first = case.inputs(0)
        size = sum(x.numel() * x.element_size() for x in first)
        sets = [first, *map(case.inputs, range(1, min(_MAX_SETS, max(2, -(-_ROTATE_BYTES // size)))))]
        with torch.no_grad():
            gradients = gradients_of(_outputs(eager(case), first))
        source = torch.empty((case.rows, case.width), dtype=case.dtype, device=case.device).normal_()
        target = torch.empty_like(source)
        truth = truth_of(case)
    except Exception as error:  # out of memory, or what an earlier case has left behind
        problem = f"the case itself fails: {describe_failure(error)}"
        if device_lost(case.device):
            yield from lost_by(providers[0], problem, modes)
        for mode in modes:
            yield from failed(mode, dict.fromkeys(providers, problem))
        return
    for name in providers:
        try:
            function = provider(name, case)
            wrong = check(case, function, truth)
            if wrong is None:
                functions[name], saved[name] = function, saved_bytes(function, first)
            else:
                problems[name] = wrong
        except Exception as error:  # Triton's and Inductor's are of many classes
            problems[name] = describe_failure(error)
            if device_lost(case.device):
                yield from lost_by(name, problems[name], modes)
    checked_rows = truth.rows
    del truth

    timer = Timer(case.device)
    for number, mode in enumerate(modes):
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
                except Exception as error:  # out of memory, or an error that the device reports late
                    problems[name] = describe_failure(error)
                    if device_lost(case.device):
                        yield from lost_by(name, problems[name], modes[number:])
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
                **common, mode=mode, provider=name, bytes_moved=moved,
                p20_ms=quantile(times[name], 0.2), p50_ms=median, p80_ms=quantile(times[name], 0.8),
                gb_per_s=None if moved is None else moved / median / 1e6,
                copy_fraction=None if moved is None else moved / median / copy_speed,
                saved_bytes=saved.get(name), peak_bytes=peaks.get(name),
                vs_eager=_speedup(times, name, "eager"), vs_compile=_speedup(times, name, "compile"),
                checked_rows=None if name == "copy" else checked_rows,
            )  # fmt: skip
        yield from failed(mode, problems)


def describe_failure(error: Exception) -> str:
    """The message, and the class where that says more than that something is not possible here."""
    return str(error) if type(error) is RuntimeError else f"{type(error).__name__}: {error}"


def _speedup(times: dict[str, list[float]], name: str, against: str) -> float | None:
    if name == "copy" or len(times.get(against, ())) != len(times[name]):  # not asked for, or it failed
        return None
    return statistics.median(other / own for own, other in zip(times[name], times[against], strict=True))
