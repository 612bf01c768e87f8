"""Alignment with an external teacher: REPA, iREPA and SRA."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional.checks import check_tokens, row_mask
from ..functional.cosine import layersync_loss, weighted_mean
from ..functional.spatial_norm import spatial_norm
from .base import AlignmentLoss, zero_loss
from .pairs import Block, distinct_pairs, pair_label, sorted_blocks
from .projectors import Mlp, TokenConv, grid_of, is_mlp, mlp, projected_loss

_METHODS = ("repa", "irepa", "sra")


class RepresentationAlignmentLoss(AlignmentLoss):
    """Aligns projected hidden tokens with those of an external teacher: REPA, iREPA and SRA.

    Σ over pairs of weight · factor(step) · row loss(projector(hidden), teacher). The projectors are parameters of this
    module: give it to the optimiser, to DDP or FSDP, and to the checkpoint, as part of the model or beside it. In steps
    that the schedule skips do not call it under DDP, which waits for gradients.

    Args:
        hidden_size: D, channels of the model's tokens.
        teacher_size: T, channels of the teacher's tokens; a mapping of teachers to their T where pairs name them. May
            be left out for "sra", whose teacher is a copy of the model.
        blocks: the block whose output is projected, counted from 1, or several, each with a projector of its own. In
            place of a block a (block, teacher) pair names its teacher, so that one block can have several.
        method: "repa": projector Linear-SiLU-Linear-SiLU-Linear, `projector_dim` wide inside. "irepa": 3×3 convolution
            over the grid of tokens, and the teacher normalised over the tokens of a sample. "sra": Linear-SiLU-Linear,
            D + T wide inside.
        projector: a module (B, N, D) → (B, N, T) instead, or one for each pair, as REPA's `model.projectors`;
            `nn.Identity()` where D = T. The last of linear layers with SiLU in between is fused with the loss.
        projector_dim: inner width of REPA's projector.
        weights: λ, one for all pairs or one each. Published: 0.5 (REPA, SRA with cosine rows, iREPA in pixels), 1.0
            (iREPA in latents), 2.0 falling (SRA with smooth-L1).
        rows: what two tokens are compared by: "cosine" (its negative), or "smooth_l1", the mean over channels.
        beta: of smooth-L1, where its parabola ends.
        grid: (rows, columns) of the student's tokens, for "irepa" and `interpolate`. Default: square.
        interpolate: resample a teacher with another number of tokens to the student's grid, bilinearly. Otherwise it is
            an error.
        spatial_norm_alpha: how much of its mean over tokens the teacher loses: (x - α·mean) / std, each channel of each
            sample for itself, over all its tokens. Default: 0.6 for "irepa", else no normalisation. Published: 0.6
            (latents), 0.8 (pixels).
        check_teacher: look for NaN and infinity in the teacher in every call, at the price of a host synchronisation.
            Otherwise the first call alone is checked, where wrong weights and overflowing precision show; a later NaN
            makes the loss NaN.
        schedule: "constant"; or "linear" or "cosine" from 1 at `start_step` to 0 at `stop_step`.
        start_step: where the decay begins (not for "constant").
        stop_step: from this step on the loss is off. "constant" runs forever without it; the others need it.
        every: compute the loss in every n-th step only (those divisible by n), with unchanged weight.
        eps: a token whose norm is below it has cosine 0 and gradient 0.
        backend: "auto", "reference", "cpp", "triton" or "cuda".

    Attributes:
        layers: the blocks to capture, ascending.
        captures: the same, under the name by which a model is asked for what a loss needs.
        projectors: nn.ModuleList, one for each pair. With "repa" its keys are those of REPA's `model.projectors`.
        cosine: the mean cosine of each pair when the loss was last computed, keyed by block, or "block:teacher" where
            the pair names one: detached 0-d tensors, NaN before. Steps that the schedule skips leave them.

    Raises:
        ValueError: no blocks, one twice, unknown method or rows, no teacher_size, a number of weights or projectors
            other than of pairs, an incomplete schedule.

    Source: REPA (Yu et al. 2024, arXiv:2410.06940), iREPA (Singh et al. 2025, arXiv:2512.10794), SRA (Jiang et al.
    2025, arXiv:2505.02831; its published code takes the cosine over the tokens of each channel, this over channels).
    """

    captures: tuple[Block, ...]

    def __init__(
        self,
        hidden_size: int,
        teacher_size: int | Mapping[Block, int] | None = None,
        blocks: Block | Sequence[Block | tuple[Block, Block]] = 8,
        *,
        method: str = "repa",
        projector: nn.Module | Sequence[nn.Module] | None = None,
        projector_dim: int = 2048,
        weights: float | Sequence[float] = 0.5,
        rows: str = "cosine",
        beta: float = 0.05,
        grid: tuple[int, int] | None = None,
        interpolate: bool = False,
        spatial_norm_alpha: float | None = None,
        check_teacher: bool = False,
        schedule: str = "constant",
        start_step: int = 0,
        stop_step: int | None = None,
        every: int = 1,
        eps: float = 1e-6,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            _pairs_of(blocks), weights, schedule=schedule, start_step=start_step, stop_step=stop_step, every=every
        )
        self.layers = self.captures = sorted_blocks(block for block, _ in self.pairs)
        if method not in _METHODS:
            raise ValueError(f"RepresentationAlignmentLoss: unknown method {method!r}; expected one of {_METHODS}")
        if rows not in ("cosine", "smooth_l1"):
            raise ValueError(f"RepresentationAlignmentLoss: unknown rows={rows!r}; expected 'cosine' or 'smooth_l1'")
        self.method, self.rows, self.beta, self.grid, self.interpolate = method, rows, beta, grid, interpolate
        self.spatial_norm_alpha = 0.6 if spatial_norm_alpha is None and method == "irepa" else spatial_norm_alpha
        self.check_teacher, self._checked = check_teacher, False
        self.eps, self.backend = eps, backend
        self.hidden_size = hidden_size
        self.teacher_sizes = tuple(self._teacher_size(teacher_size, teacher) for _, teacher in self.pairs)
        if projector is None:
            projector = [self._projector(projector_dim, size) for size in self.teacher_sizes]
        elif isinstance(projector, nn.Module) and not isinstance(projector, nn.ModuleList):
            projector = [projector]
        self.projectors = nn.ModuleList(projector)
        if len(self.projectors) != len(self.pairs):
            raise ValueError(
                f"RepresentationAlignmentLoss: {len(self.projectors)} projectors for {len(self.pairs)} pairs; "
                "give one each"
            )

    def _teacher_size(self, sizes: int | Mapping[Block, int] | None, teacher: Block) -> int:
        if sizes is None and self.method == "sra":
            return self.hidden_size
        size = sizes.get(teacher) if isinstance(sizes, Mapping) else sizes
        if size is None:
            raise ValueError(
                f"RepresentationAlignmentLoss: teacher_size of {teacher!r} is missing; give the channels of the "
                "teacher's tokens (768 for DINOv2 ViT-B)"
            )
        return int(size)

    def _projector(self, projector_dim: int, size: int) -> nn.Module:
        if self.method == "irepa":
            return TokenConv(self.hidden_size, size, self.grid)
        if self.method == "sra":
            return mlp(self.hidden_size, self.hidden_size + size, size)
        return mlp(self.hidden_size, projector_dim, projector_dim, size)

    def forward(
        self,
        states: Mapping[Any, Any],
        teacher: Tensor | Mapping[Any, Tensor],
        *,
        step: int | None = None,
        mask: Tensor | None = None,
        token_weight: Tensor | None = None,
    ) -> Tensor:
        """The weighted sum over all pairs, fp32.

        Args:
            states: block → (B, N, D) output of that block, for each of `layers`. May be empty in inactive steps.
            teacher: (B, N, T) tokens for all pairs; or block, or name of a teacher, → its tokens. A constant: no
                gradient flows into it. Not looked at in inactive steps.
            step: the trainer's step, from 0; needed by decaying schedules, `stop_step` and `every`.
            mask: bool, True for tokens that count, broadcast over the leading dimensions as in `layersync_loss`.
            token_weight: float weight of each token, shaped like `mask`; multiplied with it.

        Returns:
            a 0-d tensor.

        Raises:
            ValueError: a block was not captured, a teacher is missing, has other tokens or channels than expected, or
                holds NaN or infinity; a projector gives other channels; a step is needed and missing.
            TypeError: hidden states or a teacher that are no dense floating tensors.
        """
        factor = self.factor(step)
        if factor == 0:
            return zero_loss(states)
        self.check_captured([block for block, _ in self.pairs if block not in states], states)
        terms, cosine = [], {}
        for pair, projector, weight, size in zip(
            self.pairs, self.projectors, self.weights, self.teacher_sizes, strict=True
        ):
            name = pair_label(pair)
            hidden = states[pair[0]]
            target = self._target(hidden, self._teacher(teacher, pair[1]).detach(), name, size, mask)
            loss, cosine[name] = self._aligned(projector, hidden, target, name, mask, token_weight)
            terms.append((weight * factor) * loss)
        self.cosine = cosine
        self._checked = self._checked or not torch.compiler.is_compiling()
        return functools.reduce(torch.add, terms)

    def _aligned(
        self,
        projector: nn.Module,
        hidden: Tensor,
        target: Tensor,
        name: str,
        mask: Tensor | None,
        token_weight: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """(loss, mean cosine) of a pair."""
        options: dict[str, Any] = {"mask": mask, "token_weight": token_weight, "eps": self.eps, "backend": self.backend}
        if self.rows == "cosine" and isinstance(projector, Mlp):  # called as a module, which DDP and FSDP need
            loss = projector(hidden, target, **options)
            return loss, -loss.detach()
        if self.rows == "cosine" and is_mlp(projector):
            loss = projected_loss(cast(nn.Sequential, projector), hidden, target, **options)
            return loss, -loss.detach()
        projected = projector(hidden)
        if projected.shape != target.shape:
            raise ValueError(
                f"RepresentationAlignmentLoss: the projector of block {name} gives {tuple(projected.shape)}, the "
                f"teacher {tuple(target.shape)}; give one from {hidden.shape[-1]} to {target.shape[-1]} channels"
            )
        if self.rows == "cosine":
            loss = layersync_loss(projected, target, **options)
            return loss, -loss.detach()
        with torch.no_grad():
            cosine = -layersync_loss(projected, target, **options)
        return self._smooth_l1(projected, target, mask, token_weight), cosine

    def _smooth_l1(self, projected: Tensor, target: Tensor, mask: Tensor | None, token_weight: Tensor | None) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(projected.dtype, target.dtype), torch.float32)
        projected, target = projected.to(dtype), target.to(dtype)
        if mask is not None:
            masked = ~row_mask("RepresentationAlignmentLoss", mask, projected).unsqueeze(-1)
            projected = projected.masked_fill(masked, 0)  # and so its gradient, which 0·NaN would spoil
        rows = F.smooth_l1_loss(projected, target, beta=self.beta, reduction="none").mean(dim=-1)
        return weighted_mean("RepresentationAlignmentLoss", rows, mask, token_weight)

    @staticmethod
    def _teacher(teacher: Tensor | Mapping[Any, Tensor], name: Block) -> Tensor:
        if isinstance(teacher, Tensor):
            return teacher
        if name not in teacher:
            raise ValueError(
                f"RepresentationAlignmentLoss: no tokens of teacher {name!r}, only of {sorted(teacher, key=str)}"
            )
        return teacher[name]

    def _target(self, hidden: Tensor, teacher: Tensor, name: str, size: int, mask: Tensor | None) -> Tensor:
        """The teacher's tokens, checked, on the student's grid and normalised."""
        check_tokens("RepresentationAlignmentLoss", f"block {name}", hidden)
        check_tokens("RepresentationAlignmentLoss", f"the teacher of block {name}", teacher)
        if hidden.dim() != 3 or hidden.shape[-1] != self.hidden_size:
            raise ValueError(
                f"RepresentationAlignmentLoss: block {name} gave {tuple(hidden.shape)}; expected (batch, tokens, "
                f"hidden_size={self.hidden_size})"
            )
        if teacher.dim() != 3 or teacher.shape[-1] != size or teacher.shape[0] != hidden.shape[0]:
            raise ValueError(
                f"RepresentationAlignmentLoss: the teacher of block {name} gave {tuple(teacher.shape)}; expected "
                f"(batch={hidden.shape[0]}, tokens, teacher_size={size})"
            )
        if teacher.shape[1] != hidden.shape[1]:
            if not self.interpolate:
                raise ValueError(
                    f"RepresentationAlignmentLoss: block {name} has {hidden.shape[1]} tokens, its teacher "
                    f"{teacher.shape[1]}; interpolate=True resamples the teacher's grid, or drop its class token"
                )
            teacher = self._resampled(teacher, hidden.shape[1])
        if (self.check_teacher or not self._checked) and not torch.compiler.is_compiling():
            # Normalised over the tokens of a sample, a masked NaN would be everywhere.
            _check_finite(teacher, name, mask if self.spatial_norm_alpha is None else None)
        if self.spatial_norm_alpha is not None:
            teacher = spatial_norm(teacher, alpha=self.spatial_norm_alpha)
        return teacher

    def _resampled(self, teacher: Tensor, tokens: int) -> Tensor:
        rows, columns = grid_of(tokens, self.grid)
        scale = math.sqrt(teacher.shape[1] / tokens)
        source = round(rows * scale), round(columns * scale)
        if source[0] * source[1] != teacher.shape[1]:
            raise ValueError(
                f"RepresentationAlignmentLoss: {teacher.shape[1]} tokens of the teacher are no grid of the shape "
                f"{rows}x{columns}; resample them yourself"
            )
        image = teacher.unflatten(1, source).permute(0, 3, 1, 2)
        image = F.interpolate(image, (rows, columns), mode="bilinear", align_corners=False)
        return image.permute(0, 2, 3, 1).flatten(1, 2)

    def extra_repr(self) -> str:
        """The pairs, weights and schedule, for `print(module)`."""
        pairs = ", ".join(f"{pair_label(pair)} x {w:g}" for pair, w in zip(self.pairs, self.weights, strict=True))
        schedule = f"schedule={self.schedule.kind}, every={self.schedule.every}"
        return f"{pairs}, method={self.method}, rows={self.rows}, {schedule}"


def _check_finite(teacher: Tensor, name: str, mask: Tensor | None) -> None:
    bad = ~teacher.isfinite().all(dim=-1)
    if mask is not None:
        bad = bad & row_mask("RepresentationAlignmentLoss", mask, teacher)
    count = int(bad.sum())
    if count:
        raise ValueError(
            f"RepresentationAlignmentLoss: the teacher of block {name} gave NaN or infinity in {count} of "
            f"{bad.numel()} tokens; check its weights and its precision (fp16 overflows), or mask those tokens"
        )


def _pairs_of(blocks: Block | Sequence[Block | tuple[Block, Block]]) -> tuple[tuple[Block, Block], ...]:
    if isinstance(blocks, str) or not isinstance(blocks, Sequence):
        blocks = [blocks]
    given = [block if isinstance(block, tuple) else (block, block) for block in blocks]
    pairs = distinct_pairs("RepresentationAlignmentLoss", "block", given)
    for block, _ in pairs:
        if isinstance(block, int) and block < 1:
            raise ValueError(f"RepresentationAlignmentLoss: blocks are counted from 1, got {block}")
    return pairs
