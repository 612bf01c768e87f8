"""What a SiT checks of its sizes and of what it is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...functional.checks import check_lengths
from ..spec import SampleSpec


def check_names(**settings: tuple[str, Sequence[str]]) -> None:
    """Raises ValueError for a setting, given with the names that are known, that is none of them."""
    for name, (value, known) in settings.items():
        if value not in known:
            raise ValueError(f"SiT: unknown {name}={value!r}; expected one of {', '.join(map(repr, known))}")


def check_sizes(extent: tuple[int, ...], patch: tuple[int, ...], **sizes: int) -> None:
    """Raises ValueError for sizes below 1, and samples that are not made of patches."""
    for name, size in {"input_size": min(extent, default=0), "patch_size": min(patch, default=0), **sizes}.items():
        if size < 1:
            raise ValueError(f"SiT: {name}={size}; expected at least 1")
    if not 1 <= len(extent) <= 3 or len(patch) != len(extent):
        raise ValueError(
            f"SiT: input_size={_plain(extent)} and patch_size={_plain(patch)}; expected one to three sizes, and "
            "a patch size for each"
        )
    if any(size % step for size, step in zip(extent, patch, strict=True)):
        raise ValueError(f"SiT: input_size={_plain(extent)} is not a multiple of patch_size={_plain(patch)}")


def _plain(sizes: tuple[int, ...]) -> int | tuple[int, ...]:
    """One number for a square, as it is given."""
    return sizes[0] if len(sizes) == 2 and len(set(sizes)) == 1 else sizes


def check_width(hidden_size: int, num_heads: int) -> None:
    """Raises ValueError for a width that is no multiple of 4 and of the heads."""
    for name, size in {"hidden_size": hidden_size, "num_heads": num_heads}.items():
        if size < 1:
            raise ValueError(f"SiT: {name}={size}; expected at least 1")
    if hidden_size % num_heads or hidden_size % 4:
        raise ValueError(f"SiT: hidden_size={hidden_size}; expected a multiple of 4 and of num_heads={num_heads}")


def check_samples(x: Tensor, spec: SampleSpec, patch: tuple[int, ...], *, other_sizes: bool) -> None:
    """Raises ValueError for samples x that are not those of a model, or of another size that it does not take."""
    expected, given = spec.shape, tuple(x.shape[1:])
    if given != expected:
        fits = len(given) == len(expected) and given[0] == expected[0]
        steps = zip(given[1:], patch, strict=False)
        if not fits or not other_sizes or any(size < step or size % step for size, step in steps):
            shape = ", ".join(map(str, expected))
            raise ValueError(f"SiT: x has shape {tuple(x.shape)}; this model expects (N, {shape})")


def check_condition(
    x: Tensor, t: Tensor, y: Tensor | None, text: Tensor | None, *, labelled: bool, text_width: int | None
) -> None:
    """Raises as `SiT.forward` does for times, labels and words that do not fit the samples x."""
    if labelled:
        if y is None:
            raise ValueError("SiT: the model is conditioned on classes; give labels y")
        if y.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"SiT: labels y are {y.dtype}; expected int64 or int32")
    if t.ndim != 1 or t.shape[0] != x.shape[0] or (y is not None and y.shape != t.shape):
        raise ValueError(
            f"SiT: t has shape {tuple(t.shape)} and y {None if y is None else tuple(y.shape)}; expected one time "
            f"and one label per sample, both ({x.shape[0]},)"
        )
    if text_width is not None and (
        text is None or text.ndim != 3 or text.shape[0] != x.shape[0] or text.shape[2] != text_width
    ):
        came = "nothing" if text is None else tuple(text.shape)
        raise ValueError(f"SiT: text is {came}; expected words ({x.shape[0]}, L, {text_width})")


def check_sample_lengths(lengths: Tensor, x: Tensor) -> None:
    """Raises as `check_lengths` does, and on the CPU ValueError for lengths outside 1..L of x (N, C, L, ...)."""
    check_lengths("SiT", lengths, x)
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(lengths.min()), int(lengths.max())
        if low < 1 or high > x.shape[2]:
            raise ValueError(f"SiT: lengths run from {low} to {high}; expected 1 to {x.shape[2]}")


def check_capture(capture: Sequence[Any], depth: int, kernels: str) -> list[tuple[int, int]]:
    """The pairs among what is to be captured; raises as `SiT.forward` does."""
    if not isinstance(capture, Sequence) or not all(
        type(item) is int or (isinstance(item, tuple) and len(item) == 2 and all(type(n) is int for n in item))
        for item in capture
    ):
        raise TypeError(f"SiT: capture={capture!r}; expected a sequence of block numbers and (student, teacher) pairs")
    pairs = [item for item in capture if isinstance(item, tuple)]
    if not all(1 <= n <= depth for item in capture for n in (item if isinstance(item, tuple) else (item,))):
        raise ValueError(f"SiT: capture={tuple(capture)}; blocks are counted from 1 to {depth}")
    if pairs:
        if kernels != "fused":
            raise ValueError('SiT: pairs are captured by kernels="fused"; capture both blocks instead')
        if not all(student < teacher for student, teacher in pairs):
            raise ValueError(f"SiT: capture={tuple(capture)}; a student comes before its teacher")
        if any(len({pair[side] for pair in pairs}) < len(pairs) for side in (0, 1)):
            raise ValueError(
                f"SiT: capture={tuple(capture)}; a block may be the student of one pair and the teacher of one: "
                "capture the blocks of the others by number"
            )
    return pairs
