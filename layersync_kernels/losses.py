"""Alignment losses as modules over captured hidden states."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .functional import cosine_loss, layersync_loss

__all__ = ["LayerSyncLoss", "default_pair"]

_PUBLISHED_PAIRS = {28: (8, 16), 24: (8, 18), 30: (9, 17)}  # SiT-XL, SiT-L, Wan 2.1 1.3B
_EPS = 1e-6
_SCHEDULES = ("constant", "linear", "cosine")

Block = int | str
"""A block's depth, counted from 1, or a name of its own."""


def default_pair(depth: int) -> tuple[int, int]:
    """The (student, teacher) blocks to start from for a model of `depth` blocks, counted from 1.

    Published pairs where there are any (depth 24, 28, 30), else the mean relative depths of SiT's two, 0.31 and 0.66:
    the student is not among the very first blocks, the teacher not among the last fifth (from depth 4 on).

    Raises:
        ValueError: fewer than two blocks.
    """
    if depth < 2:
        raise ValueError(f"LayerSync needs a model of at least 2 blocks, got depth {depth}")
    if depth in _PUBLISHED_PAIRS:
        return _PUBLISHED_PAIRS[depth]
    student = max(1, round(0.31 * depth))
    return student, max(student + 1, round(0.66 * depth))


def _block(block: Block) -> Block:
    return block if isinstance(block, str) else int(block)  # integers of NumPy are none that isinstance knows


def _sorted(blocks: Iterable[Block]) -> tuple[Block, ...]:
    """Each once, numbers ascending, then names."""
    return tuple(sorted(set(blocks), key=lambda block: (isinstance(block, str), block)))


class LayerSyncLoss(nn.Module):
    """Σ over pairs of weight · factor(step) · layersync_loss(student, teacher).

    Args:
        pairs: (student, teacher) block numbers, counted from 1, student before teacher; or names, whose order nobody
            checks. Every pair counts.
        weights: λ, one for all pairs or one each. The paper uses 0.2 (SiT-XL, SiT-L), 0.3 (B), 0.002 (Wan LoRA).
        schedule: "constant"; or "linear" or "cosine" from 1 at `start_step` to 0 at `stop_step`.
        start_step: where the decay begins (not for "constant").
        stop_step: from this step on the loss is off. "constant" runs forever without it; the others need it.
        every: compute the loss in every n-th step only (those divisible by n), with unchanged weight.
        teacher_grad, eps, backend: as in `functional.layersync_loss`.

    Attributes:
        layers: the block numbers to capture, ascending.
        captures: the same for a model that hands back cosines of pairs, as `sit.SiT` does: pairs, and numbers where a
            pair cannot be fused (a block that is student or teacher twice, a teacher with gradient, an explicit backend
            or eps).
        cosine: after a forward pass, the mean cosine of each pair as a detached 0-d tensor, keyed "student:teacher".
            Reading it costs no host synchronisation until its value is asked for.

    Raises:
        ValueError: no pairs, a student at or behind its teacher (the loss would be constant, or pull the deep block
            to the shallow one), a number of weights other than of pairs, an incomplete schedule.
    """

    layers: tuple[Block, ...]
    captures: tuple[Block | tuple[Block, Block], ...]
    cosine: dict[str, Tensor]

    def __init__(
        self,
        pairs: Sequence[tuple[Block, Block]],
        weights: float | Sequence[float] = 0.2,
        *,
        schedule: str = "constant",
        start_step: int = 0,
        stop_step: int | None = None,
        every: int = 1,
        teacher_grad: bool = False,
        eps: float = _EPS,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.pairs = tuple((_block(student), _block(teacher)) for student, teacher in pairs)
        self.set_weights(weights)
        self.schedule, self.start_step, self.stop_step, self.every = schedule, start_step, stop_step, every
        self.teacher_grad, self.eps, self.backend = teacher_grad, eps, backend
        self._validate()
        self.layers = _sorted(block for pair in self.pairs for block in pair)
        self.captures = self._captures()
        self.cosine = {}

    def set_weights(self, weights: float | Sequence[float]) -> None:
        """Change λ, of all pairs or of each.

        Raises:
            ValueError: a number of weights other than of pairs.
        """
        if isinstance(weights, int | float):
            weights = (float(weights),) * len(self.pairs)
        self.weights = tuple(map(float, weights))
        if len(self.weights) != len(self.pairs):
            raise ValueError(f"LayerSyncLoss: {len(self.weights)} weights for {len(self.pairs)} pairs; give one each")

    def _captures(self) -> tuple[Block | tuple[Block, Block], ...]:
        if self.teacher_grad or self.backend != "auto" or self.eps != _EPS:
            return self.layers
        fused: list[tuple[Block, Block]] = []
        for student, teacher in self.pairs:
            if all(student != s and teacher != t for s, t in fused):
                fused.append((student, teacher))
        return *fused, *_sorted(block for pair in self.pairs if pair not in fused for block in pair)

    def _validate(self) -> None:
        if not self.pairs:
            raise ValueError("LayerSyncLoss: give at least one (student, teacher) pair of block numbers")
        for student, teacher in self.pairs:
            if isinstance(student, int) and student < 1:
                raise ValueError(f"LayerSyncLoss: blocks are counted from 1, got student {student}")
            if student == teacher:
                raise ValueError(
                    f"LayerSyncLoss: student and teacher are both block {student}; the loss would be constant. "
                    "Give a deeper teacher"
                )
            if isinstance(student, int) and isinstance(teacher, int) and student > teacher:
                raise ValueError(
                    f"LayerSyncLoss: student {student} lies behind teacher {teacher}; the pair is (shallow, deep): "
                    f"did you mean ({teacher}, {student})?"
                )
        if len(set(self.pairs)) != len(self.pairs):
            raise ValueError(f"LayerSyncLoss: a pair is given twice in {self.pairs}; raise its weight instead")
        if self.schedule not in _SCHEDULES:
            raise ValueError(f"LayerSyncLoss: unknown schedule {self.schedule!r}; expected one of {_SCHEDULES}")
        if self.every < 1:
            raise ValueError(f"LayerSyncLoss: every must be at least 1, got {self.every}")
        if self.schedule == "constant":
            if self.start_step != 0:
                raise ValueError("LayerSyncLoss: start_step is where a decay begins; a constant schedule has none")
        elif self.stop_step is None or self.stop_step <= self.start_step:
            raise ValueError(
                f"LayerSyncLoss: schedule {self.schedule!r} needs stop_step > start_step, "
                f"got start_step={self.start_step}, stop_step={self.stop_step}"
            )

    @property
    def needs_step(self) -> bool:
        """Whether the schedule depends on the step."""
        return self.stop_step is not None or self.every > 1

    def factor(self, step: int) -> float:
        """The schedule's factor at a step, in [0, 1]; 0 in the steps that `every` skips."""
        if step % self.every or (self.stop_step is not None and step >= self.stop_step):
            return 0.0
        if self.schedule == "constant" or step <= self.start_step:
            return 1.0
        assert self.stop_step is not None
        progress = (step - self.start_step) / (self.stop_step - self.start_step)
        return 1 - progress if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))

    def active(self, step: int) -> bool:
        """Whether the loss is computed at a step. Where it is not, nothing needs capturing."""
        return self.factor(step) > 0

    def forward(
        self,
        states: Mapping[Any, Any],
        *,
        step: int | None = None,
        mask: Tensor | None = None,
        token_weight: Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """The weighted sum over all pairs, fp32.

        Args:
            states: block number → (B, N, D) output of that block, for each of `layers`; or pair → (B, N) cosines, for
                each of `captures`; or pair → its (student, teacher) tokens. May be empty in inactive steps.
            step: the trainer's step, from 0; needed by decaying schedules, `stop_step` and `every`.
            mask: as in `functional.layersync_loss`.
            token_weight: as in `functional.layersync_loss`.
            reduction: as in `functional.layersync_loss`; "none" needs pairs with the same number of tokens.

        Returns:
            a 0-d tensor, or (B, N) for "none".

        Raises:
            ValueError: a block of a pair was not captured; a step is needed and missing.
        """
        if step is None and self.needs_step:
            raise ValueError("LayerSyncLoss: this schedule needs to know the step; call it with step=")
        factor = 1.0 if step is None else self.factor(step)
        self.cosine = {}
        if factor == 0:
            device = next((state.device for state in states.values() if isinstance(state, Tensor)), None)
            return torch.zeros((), device=device)
        missing = _sorted(b for pair in self.pairs if pair not in states for b in pair if b not in states)
        if missing:
            raise ValueError(
                f"LayerSyncLoss: blocks {list(missing)} were not captured, only {sorted(states, key=str)}; "
                f"capture {self.layers}"
            )
        terms = []
        for (student, teacher), weight in zip(self.pairs, self.weights, strict=True):
            state = states[student, teacher] if (student, teacher) in states else (states[student], states[teacher])
            if isinstance(state, Tensor):
                cosine = state
            else:
                # Masked tokens are not read, whatever the reduction; weights come in where it is made.
                loss = layersync_loss(
                    *state,
                    mask=mask,
                    token_weight=token_weight if reduction == "mean" else None,
                    reduction="mean" if reduction == "mean" else "none",
                    teacher_grad=self.teacher_grad,
                    eps=self.eps,
                    backend=self.backend,
                )
                cosine = -loss
            if isinstance(state, Tensor) or reduction != "mean":
                loss = cosine_loss(cosine, mask=mask, token_weight=token_weight, reduction=reduction)
                cosine = -cosine_loss(cosine.detach(), mask=mask, token_weight=token_weight)
            self.cosine[f"{student}:{teacher}"] = cosine.detach()
            terms.append((weight * factor) * loss)
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total

    def extra_repr(self) -> str:
        """The pairs, weights and schedule, for `print(module)`."""
        pairs = ", ".join(f"{s}:{t} x {w:g}" for (s, t), w in zip(self.pairs, self.weights, strict=True))
        return f"{pairs}, schedule={self.schedule}, every={self.every}, backend={self.backend}"
