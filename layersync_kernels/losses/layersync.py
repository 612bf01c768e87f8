"""LayerSync: blocks of a model learn from deeper ones of the same pass."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..functional.cosine import cosine_loss, layersync_loss
from .base import AlignmentLoss, zero_loss
from .pairs import Block, distinct_pairs, pair_label, sorted_blocks

EPS = 1e-6


class LayerSyncLoss(AlignmentLoss):
    """Σ over pairs of weight · factor(step) · layersync_loss(student, teacher).

    Args:
        pairs: (student, teacher) block numbers, counted from 1, student before teacher; or names, whose order nobody
            checks. Every pair counts.
        weights: λ, one for all pairs or one each. The paper uses 0.2 (SiT-XL, SiT-L), 0.3 (B), 0.002 (Wan LoRA).
        schedule: "constant"; or "linear" or "cosine" from 1 at `start_step` to 0 at `stop_step`.
        start_step: where the decay begins (not for "constant").
        stop_step: from this step on the loss is off. "constant" runs forever without it; the others need it.
        every: compute the loss in every n-th step only (those divisible by n), with unchanged weight.
        teacher_grad: differentiate the teacher too. By default it is a constant, as in the paper (stop-gradient).
        eps: a token whose norm is below it has cosine 0 and gradient 0.
        backend: "auto", "reference", "cpp", "triton", "cuda" or "compile".

    Attributes:
        layers: the block numbers to capture, ascending.
        captures: the same for a model that hands back cosines of pairs, as `sit.SiT` does: pairs, and numbers where a
            pair cannot be fused (a block that is student or teacher twice, a teacher with gradient, an explicit backend
            or eps).
        cosine: the mean cosine of each pair when the loss was last computed, keyed "student:teacher": detached 0-d
            tensors, NaN before. Steps that the schedule skips leave them. Reading one costs no host synchronisation
            until its value is asked for.

    Raises:
        ValueError: no pairs, a student at or behind its teacher (the loss would be constant, or pull the deep block
            to the shallow one), a number of weights other than of pairs, an incomplete schedule.
    """

    captures: tuple[Block | tuple[Block, Block], ...]

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
        eps: float = EPS,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            _checked_pairs(pairs), weights, schedule=schedule, start_step=start_step, stop_step=stop_step, every=every
        )
        self.teacher_grad, self.eps, self.backend = teacher_grad, eps, backend
        self.layers = sorted_blocks(block for pair in self.pairs for block in pair)
        self.captures = self._captures()

    def _captures(self) -> tuple[Block | tuple[Block, Block], ...]:
        if self.teacher_grad or self.backend != "auto" or self.eps != EPS:
            return self.layers
        fused: list[tuple[Block, Block]] = []
        for student, teacher in self.pairs:
            if all(student != s and teacher != t for s, t in fused):
                fused.append((student, teacher))
        return *fused, *sorted_blocks(block for pair in self.pairs if pair not in fused for block in pair)

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
            mask: bool, True for tokens that count, broadcast over the leading dimensions as in `layersync_loss`.
            token_weight: float weight of each token, shaped like `mask`; multiplied with it.
            reduction: of each pair's tokens: "mean" (over the sum of weights), "sum", or "none", which needs pairs with
                the same number of tokens.

        Returns:
            a 0-d tensor, or (B, N) for "none".

        Raises:
            ValueError: a block of a pair was not captured; a step is needed and missing.
        """
        factor = self.factor(step)
        if factor == 0:
            return zero_loss(states)
        self.check_captured([b for pair in self.pairs if pair not in states for b in pair if b not in states], states)
        terms, cosine = [], {}
        for pair, weight in zip(self.pairs, self.weights, strict=True):
            state = states[pair] if pair in states else tuple(states[block] for block in pair)
            loss, cosine[pair_label(pair)] = self._aligned(state, mask, token_weight, reduction)
            terms.append((weight * factor) * loss)
        self.cosine = cosine
        return functools.reduce(torch.add, terms)

    def _aligned(
        self, state: Tensor | tuple[Tensor, Tensor], mask: Tensor | None, token_weight: Tensor | None, reduction: str
    ) -> tuple[Tensor, Tensor]:
        """(loss, mean cosine) of a pair, from its tokens or from their cosines."""
        options: dict[str, Any] = {"teacher_grad": self.teacher_grad, "eps": self.eps, "backend": self.backend}
        if isinstance(state, Tensor):
            cosine = state
        elif reduction == "mean":
            loss = layersync_loss(*state, mask=mask, token_weight=token_weight, **options)
            return loss, -loss.detach()
        else:  # the loss's own reduction would leave no cosines to average
            cosine = -layersync_loss(*state, mask=mask, reduction="none", **options)
        loss = cosine_loss(cosine, mask=mask, token_weight=token_weight, reduction=reduction)
        return loss, -cosine_loss(cosine.detach(), mask=mask, token_weight=token_weight)

    def extra_repr(self) -> str:
        """The pairs, weights and schedule, for `print(module)`."""
        pairs = ", ".join(f"{pair_label(pair)} x {w:g}" for pair, w in zip(self.pairs, self.weights, strict=True))
        return f"{pairs}, schedule={self.schedule.kind}, every={self.schedule.every}, backend={self.backend}"


def _checked_pairs(pairs: Sequence[tuple[Block, Block]]) -> tuple[tuple[Block, Block], ...]:
    checked = distinct_pairs("LayerSyncLoss", "(student, teacher) pair of blocks", pairs)
    for student, teacher in checked:
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
    return checked
