"""Backends against each other on this machine: what `layersync tune` measures, and what it concludes.

Every candidate that can run is checked against fp64, then all take turns inside each round, forward and backward
together, and each begins a round as often as the others. What the rules take stays the choice unless another candidate
is faster at every shape of a class, by more than `MARGIN` and by more than the spread of the ratios between the rounds.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..ops import dispatch, registry
from .cases import OPS, Case, Function, eager
from .engine import Timer, check, describe_failure, gradients_of, quantile, saved_bytes, timed, truth_of

MARGIN = 0.03
"""A candidate has to be faster than the rules' by this, whatever the spread."""
KEPT = 1 / 16
"""A candidate may keep more for the backward pass than the rules', by this part of its inputs."""

_WARMUP = 2
_ROTATE_BYTES = 256 << 20  # inputs in turn, so that no cache holds them from round to round
_MOST_SETS = 8
_FEWEST_ROUNDS = 5
_FUNCTIONS = {  # case → public function, where their names differ
    "cosine_alignment": "layersync_loss",
    "projected_alignment": "projected_alignment_loss",
    "gram_alignment": "gram_alignment_loss",
}

# (rows, width) by case; the first one is what --quick measures. Widths are those of SiT and DiT from S to XL, of a
# small model, and of FLUX.
_ROW_OPS = ("cosine_alignment", "gated_residual_norm", "modulated_layer_norm", "spatial_norm")
_CPU_ROWS = ((4096, 384), (4096, 1152), (8192, 96), (2048, 3072))
_CUDA_ROWS = ((16384, 1152), (65536, 384), (65536, 128), (8192, 3072))
_SIZES: dict[str, dict[str, tuple[tuple[int, int], ...]]] = {
    "cpu": {
        **dict.fromkeys(_ROW_OPS, _CPU_ROWS),
        "gelu_mlp": ((256, 384), (256, 1152), (2048, 96)),
        "projected_alignment": ((1024, 384), (1024, 1152), (2048, 96)),
        "gram_alignment": ((1024, 384), (1024, 1152), (1024, 64)),
        "self_attention": ((512, 384), (512, 1152), (1024, 128)),
    },
    "cuda": {
        **dict.fromkeys(_ROW_OPS, _CUDA_ROWS),
        "gelu_mlp": ((16384, 1152), (16384, 384), (65536, 128), (4096, 3072)),
        "projected_alignment": ((16384, 1152), (65536, 384), (65536, 128), (8192, 3072)),
        "gram_alignment": ((4096, 1152), (4096, 384), (4096, 64), (4096, 3072)),
        "self_attention": ((16384, 1152),),
    },
}
_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16, torch.float32, torch.float16)}
_SUITED = {"cpu": ("cpp", "compile"), "cuda": ("cuda", "triton", "compile")}  # the others are for another device


@dataclass
class Candidate:
    """A backend or route at one shape.

    Attributes:
        p50_ms: the median time, forward and backward together, milliseconds.
        ratio: how many times as fast as the base of its shape: the median over rounds of the ratio inside a round.
        spread: between the 20th and the 80th percentile of those ratios.
        saved_bytes: kept for the backward pass beyond the inputs.
        problem: why it was not timed, or not to the end.
    """

    p50_ms: float | None = None
    ratio: float | None = None
    spread: float | None = None
    saved_bytes: int | None = None
    problem: str | None = None


@dataclass
class Shape:
    """What was measured at one shape.

    Attributes:
        rows, width: of the case.
        input_bytes: of all inputs.
        candidates: name → result.
    """

    rows: int
    width: int
    input_bytes: int = 0
    candidates: dict[str, Candidate] = field(default_factory=dict)


@dataclass
class Entry:
    """An op, a dtype and a class of widths.

    Attributes:
        op: the public function.
        dtype: e.g. "float32".
        width_class: one of `tuning.CLASSES`.
        rule: what the rules take.
        shapes: what was measured.
        base: what the others are compared with: the rules' choice, or where that fails one that works.
        choice: what "auto" is to take; None where nothing worked.
        margin: how many times as fast as the base that is, at the shape where it is least so.
    """

    op: str
    dtype: str
    width_class: str
    rule: str
    shapes: list[Shape]
    base: str | None = None
    choice: str | None = None
    margin: float = 1.0

    def as_dict(self) -> dict[str, Any]:
        """For the table."""
        fields = dataclasses.asdict(self)
        return {"class": fields.pop("width_class"), **fields}


def suite(device: str, quick: bool) -> list[Case]:
    """What is measured on a type of device."""
    return [
        Case(op, rows, width, dtype, device)
        for op, sizes in _SIZES[device].items()
        for dtype in _DTYPES[device]
        for rows, width in (sizes[:1] if quick else sizes)
    ]


def function_of(case: Case) -> str:
    """The public function that a case calls."""
    return _FUNCTIONS.get(case.op, case.op)


def candidates_of(case: Case) -> dict[str, str | None]:
    """What might run a case → why it cannot here, or None. The reference is among them where the rules take it."""
    function = function_of(case)
    found = dispatch.candidates(function, case.device, case.dtype)
    ruled = dispatch.rule(function, case.device, case.dtype).backend
    routes = registry.find(function).routes if case.device == "cuda" else ()
    return {name: why for name, why in found.items() if name in (ruled, *_SUITED[case.device], *routes)}


def provider(name: str, case: Case) -> Function:
    """The op on one of its candidates."""
    return functools.partial(OPS[case.op].fused, backend=name)


def measure(case: Case, candidates: Mapping[str, str | None], *, rounds: int, seconds: float = 10) -> Shape:
    """Check and time the candidates of a case.

    Args:
        case: what to compute.
        candidates: as `candidates_of` gives them.
        rounds: in which each is timed once.
        seconds: about how long; ends the rounds early, but not before the fifth.

    Returns:
        the shape, without ratios. Whatever fails, in whatever way, is a candidate with a problem.
    """
    shape = Shape(case.rows, case.width)
    shape.candidates = {name: Candidate(problem=why) for name, why in candidates.items()}
    functions: dict[str, Function] = {}
    try:
        first = case.inputs(0)
        shape.input_bytes = sum(x.numel() * x.element_size() for x in first)
        count = min(max(2, -(-_ROTATE_BYTES // shape.input_bytes)), _MOST_SETS)
        sets = [first, *map(case.inputs, range(1, count))]
        outputs = eager(case)(*first)
        gradients = gradients_of(outputs if isinstance(outputs, tuple) else (outputs,))
        del outputs
        truth = truth_of(case)
    except Exception as error:  # out of memory
        for candidate in shape.candidates.values():
            candidate.problem = candidate.problem or f"the case itself fails: {describe_failure(error)}"
        return shape
    for name, candidate in shape.candidates.items():
        if candidate.problem is not None:
            continue
        try:
            function = provider(name, case)
            candidate.problem = check(case, function, truth)
            if candidate.problem is None:
                candidate.saved_bytes, functions[name] = saved_bytes(function, first), function
        except Exception as error:  # Triton's and Inductor's are of many classes
            candidate.problem = describe_failure(error)
    del truth
    times: dict[str, list[float]] = {name: [] for name in functions}
    timer, mode, began = Timer(case.device), case.modes[-1], time.perf_counter()
    for turn in range(_WARMUP + rounds):
        if turn >= _WARMUP + _FEWEST_ROUNDS and time.perf_counter() - began > seconds:
            break
        names = list(functions)
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]  # what begins finds no inputs in the cache
            try:
                milliseconds = timed(timer, functions[name], mode, sets[turn % len(sets)], gradients, case.repeats)
            except Exception as error:
                shape.candidates[name].problem = describe_failure(error)
                del functions[name]
                continue
            if turn >= _WARMUP:
                times[name].append(milliseconds)
    _summarise(shape, {name: times[name] for name in functions}, _base(shape, function_of(case), case))
    return shape


def _base(shape: Shape, function: str, case: Case) -> str | None:
    """The rules' choice, or where that fails another that works."""
    ruled = dispatch.rule(function, case.device, case.dtype).backend
    works = [name for name, candidate in shape.candidates.items() if candidate.problem is None]
    return ruled if ruled in works else next(iter(works), None)


def _summarise(shape: Shape, times: Mapping[str, Sequence[float]], base: str | None) -> None:
    for name, own in times.items():
        assert base is not None  # one of them
        ratios = [other / mine for mine, other in zip(own, times[base], strict=True)]
        candidate = shape.candidates[name]
        candidate.p50_ms, candidate.ratio = statistics.median(own), statistics.median(ratios)
        candidate.spread = quantile(ratios, 0.8) - quantile(ratios, 0.2)


def decide(entry: Entry) -> None:
    """Set the choice of an entry, from its shapes."""
    names = [name for name in entry.shapes[0].candidates if all(_timed(shape, name) for shape in entry.shapes)]
    if not names:
        return
    entry.base = entry.rule if entry.rule in names else names[0]
    ratios = {name: min(_ratio(shape, name, entry.base) for shape in entry.shapes) for name in names}
    better = [name for name in names if all(_better(shape, name, entry.base) for shape in entry.shapes)]
    entry.choice = max(better, key=lambda name: ratios[name], default=entry.base)
    entry.margin = ratios[entry.choice]


def _timed(shape: Shape, name: str) -> bool:
    return shape.candidates[name].ratio is not None


def _ratio(shape: Shape, name: str, base: str) -> float:
    """As measured; where the shape's own base was another, by way of that."""
    own, other = shape.candidates[name].ratio, shape.candidates[base].ratio
    assert own is not None
    assert other is not None
    return own / other


def _better(shape: Shape, name: str, base: str) -> bool:
    own, other = shape.candidates[name], shape.candidates[base]
    assert own.spread is not None
    assert own.saved_bytes is not None
    assert other.saved_bytes is not None
    if own.saved_bytes - other.saved_bytes > KEPT * shape.input_bytes:
        return False
    return _ratio(shape, name, base) - 1 > max(MARGIN, own.spread)
