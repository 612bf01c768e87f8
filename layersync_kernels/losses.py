"""Alignment losses as modules over captured hidden states."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import cosine_loss, layersync_loss, projected_alignment_loss, spatial_norm

__all__ = ["LayerSyncLoss", "RepresentationAlignmentLoss", "default_pair"]

_PUBLISHED_PAIRS = {28: (8, 16), 24: (8, 18), 30: (9, 17)}  # SiT-XL, SiT-L, Wan 2.1 1.3B
_EPS = 1e-6
_SCHEDULES = ("constant", "linear", "cosine")
_METHODS = ("repa", "irepa", "sra")

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


class _AlignmentLoss(nn.Module):
    """What the losses share: weights of their pairs, and when they are on. Arguments as in `LayerSyncLoss`."""

    pairs: tuple[tuple[Block, Block], ...]
    layers: tuple[Block, ...]
    cosine: dict[str, Tensor]

    def __init__(self, *, schedule: str, start_step: int, stop_step: int | None, every: int) -> None:
        super().__init__()
        self.schedule, self.start_step, self.stop_step, self.every = schedule, start_step, stop_step, every
        self.cosine = {}
        name = type(self).__name__
        if schedule not in _SCHEDULES:
            raise ValueError(f"{name}: unknown schedule {schedule!r}; expected one of {_SCHEDULES}")
        if every < 1:
            raise ValueError(f"{name}: every must be at least 1, got {every}")
        if schedule == "constant":
            if start_step != 0:
                raise ValueError(f"{name}: start_step is where a decay begins; a constant schedule has none")
        elif stop_step is None or stop_step <= start_step:
            raise ValueError(
                f"{name}: schedule {schedule!r} needs stop_step > start_step, "
                f"got start_step={start_step}, stop_step={stop_step}"
            )

    def set_weights(self, weights: float | Sequence[float]) -> None:
        """Change λ, of all pairs or of each.

        Raises:
            ValueError: a number of weights other than of pairs.
        """
        if isinstance(weights, int | float):
            weights = (float(weights),) * len(self.pairs)
        self.weights = tuple(map(float, weights))
        if len(self.weights) != len(self.pairs):
            raise ValueError(
                f"{type(self).__name__}: {len(self.weights)} weights for {len(self.pairs)} pairs; give one each"
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

    def _factor(self, step: int | None) -> float:
        """`factor`, for a step that may be left out where nothing depends on it."""
        if step is None and self.needs_step:
            raise ValueError(f"{type(self).__name__}: this schedule needs to know the step; call it with step=")
        return 1.0 if step is None else self.factor(step)

    def _check_captured(self, missing: tuple[Block, ...], states: Mapping[Any, Any]) -> None:
        if missing:
            raise ValueError(
                f"{type(self).__name__}: blocks {list(missing)} were not captured, only {sorted(states, key=str)}; "
                f"capture {self.layers}"
            )


def _zero(states: Mapping[Any, Any]) -> Tensor:
    """A loss that is off, on the device of the states."""
    return torch.zeros((), device=next((s.device for s in states.values() if isinstance(s, Tensor)), None))


class LayerSyncLoss(_AlignmentLoss):
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
        eps: float = _EPS,
        backend: str = "auto",
    ) -> None:
        super().__init__(schedule=schedule, start_step=start_step, stop_step=stop_step, every=every)
        self.pairs = tuple((_block(student), _block(teacher)) for student, teacher in pairs)
        self.set_weights(weights)
        self.teacher_grad, self.eps, self.backend = teacher_grad, eps, backend
        self._validate()
        self.layers = _sorted(block for pair in self.pairs for block in pair)
        self.captures = self._captures()

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
        factor = self._factor(step)
        self.cosine = {}
        if factor == 0:
            return _zero(states)
        self._check_captured(
            _sorted(b for pair in self.pairs if pair not in states for b in pair if b not in states), states
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
        return functools.reduce(torch.add, terms)

    def extra_repr(self) -> str:
        """The pairs, weights and schedule, for `print(module)`."""
        pairs = ", ".join(f"{s}:{t} x {w:g}" for (s, t), w in zip(self.pairs, self.weights, strict=True))
        return f"{pairs}, schedule={self.schedule}, every={self.every}, backend={self.backend}"


class _Mlp(nn.Sequential):
    """Linear layers with SiLU in between. Given a teacher, the loss of what they make of the student's tokens.

    The last layer and the loss are one op. It runs inside this module, where DDP and FSDP have its parameters at hand.
    """

    def forward(self, input: Tensor, teacher: Tensor | None = None, **options: Any) -> Tensor:
        *body, last = self
        for layer in body:
            input = layer(input)
        if teacher is None:
            return last(input)
        if type(last) is not nn.Linear:  # sharded by itself, quantised, with LoRA: its own forward knows how
            return layersync_loss(last(input), teacher, **options)
        return projected_alignment_loss(input, last.weight, last.bias, teacher, **options)


def _mlp(*widths: int) -> _Mlp:
    layers: list[nn.Module] = []
    for width_in, width_out in itertools.pairwise(widths):
        linear = nn.Linear(width_in, width_out)
        nn.init.xavier_uniform_(linear.weight)  # as the published models initialise every linear layer of theirs
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.SiLU()]
    return _Mlp(*layers[:-1])


class _TokenConv(nn.Conv2d):
    """A 3×3 convolution over tokens (B, N, D) on their grid; tokens are a channels-last image, so nothing is copied."""

    def __init__(self, width_in: int, width_out: int, grid: tuple[int, int] | None) -> None:
        super().__init__(width_in, width_out, kernel_size=3, padding=1)
        self.grid = grid

    def forward(self, hidden: Tensor) -> Tensor:
        image = hidden.unflatten(1, _grid_of(hidden.shape[1], self.grid)).permute(0, 3, 1, 2)
        return super().forward(image).permute(0, 2, 3, 1).flatten(1, 2)


def _grid_of(tokens: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    rows, columns = grid or (math.isqrt(tokens),) * 2
    if rows * columns != tokens:
        raise ValueError(
            f"RepresentationAlignmentLoss: {tokens} tokens do not fill "
            + ("a square grid; give grid=(rows, columns)" if grid is None else f"the grid of {rows}x{columns}")
        )
    return rows, columns


class RepresentationAlignmentLoss(_AlignmentLoss):
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
        projector: a module (B, N, D) → (B, N, T) instead, or one for each pair; `nn.Identity()` where D = T.
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
        schedule: as in `LayerSyncLoss`, with `start_step`, `stop_step` and `every`.
        start_step: as in `LayerSyncLoss`.
        stop_step: likewise.
        every: likewise.
        eps: a token whose norm is below it has cosine 0 and gradient 0.
        backend: as in `functional.layersync_loss`.

    Attributes:
        layers: the blocks to capture, ascending.
        captures: the same, as `LayerSyncLoss` has it.
        projectors: nn.ModuleList, one for each pair. With "repa" its keys are those of REPA's `model.projectors`.
        cosine: after a forward pass, the mean cosine of each pair as a detached 0-d tensor, keyed by block, or
            "block:teacher" where the pair names one.

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
        eps: float = _EPS,
        backend: str = "auto",
    ) -> None:
        super().__init__(schedule=schedule, start_step=start_step, stop_step=stop_step, every=every)
        self.pairs = self._pairs(blocks)
        self.set_weights(weights)
        self.layers = self.captures = _sorted(block for block, _ in self.pairs)
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

    @staticmethod
    def _pairs(blocks: Block | Sequence[Block | tuple[Block, Block]]) -> tuple[tuple[Block, Block], ...]:
        if isinstance(blocks, str) or not isinstance(blocks, Sequence):
            blocks = [blocks]
        pairs = [block if isinstance(block, tuple) else (block, block) for block in blocks]
        pairs = [(_block(block), _block(teacher)) for block, teacher in pairs]
        if not pairs:
            raise ValueError("RepresentationAlignmentLoss: give at least one block")
        if len(set(pairs)) != len(pairs):
            raise ValueError(
                f"RepresentationAlignmentLoss: a block is given twice in {pairs}; raise its weight instead"
            )
        for block, _ in pairs:
            if isinstance(block, int) and block < 1:
                raise ValueError(f"RepresentationAlignmentLoss: blocks are counted from 1, got {block}")
        return tuple(pairs)

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
            return _TokenConv(self.hidden_size, size, self.grid)
        if self.method == "sra":
            return _mlp(self.hidden_size, self.hidden_size + size, size)
        return _mlp(self.hidden_size, projector_dim, projector_dim, size)

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
            mask: as in `functional.layersync_loss`.
            token_weight: as in `functional.layersync_loss`.

        Returns:
            a 0-d tensor.

        Raises:
            ValueError: a block was not captured, a teacher is missing, has other tokens or channels than expected, or
                holds NaN or infinity; a projector gives other channels; a step is needed and missing.
        """
        factor = self._factor(step)
        self.cosine = {}
        if factor == 0:
            return _zero(states)
        self._check_captured(_sorted(block for block, _ in self.pairs if block not in states), states)
        terms = []
        for pair, projector, weight, size in zip(
            self.pairs, self.projectors, self.weights, self.teacher_sizes, strict=True
        ):
            name = _label(pair)
            hidden = states[pair[0]]
            target = self._target(hidden, self._teacher(teacher, pair[1]).detach(), name, size, mask)
            loss, self.cosine[name] = self._aligned(projector, hidden, target, name, mask, token_weight)
            terms.append((weight * factor) * loss)
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
        if self.rows == "cosine" and isinstance(projector, _Mlp):
            loss = projector(hidden, target, **options)
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
            masked = ~_counting(projected, mask).unsqueeze(-1)
            projected = projected.masked_fill(masked, 0)  # and so its gradient, which 0·NaN would spoil
        rows = F.smooth_l1_loss(projected, target, beta=self.beta, reduction="none").mean(dim=-1)
        return cosine_loss(-rows, mask=mask, token_weight=token_weight)

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
        rows, columns = _grid_of(tokens, self.grid)
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
        pairs = ", ".join(f"{_label(pair)} x {w:g}" for pair, w in zip(self.pairs, self.weights, strict=True))
        return f"{pairs}, method={self.method}, rows={self.rows}, schedule={self.schedule}, every={self.every}"


def _label(pair: tuple[Block, Block]) -> str:
    block, teacher = pair
    return str(block) if block == teacher else f"{block}:{teacher}"


def _counting(x: Tensor, mask: Tensor) -> Tensor:
    """The mask, one value for each token."""
    ones = torch.ones(x.shape[:-1], device=x.device)
    return cosine_loss(ones, mask=mask, reduction="none") != 0


def _check_finite(teacher: Tensor, name: str, mask: Tensor | None) -> None:
    bad = ~teacher.isfinite().all(dim=-1)
    if mask is not None:
        bad = bad & _counting(teacher, mask)
    count = int(bad.sum())
    if count:
        raise ValueError(
            f"RepresentationAlignmentLoss: the teacher of block {name} gave NaN or infinity in {count} of "
            f"{bad.numel()} tokens; check its weights and its precision (fp16 overflows), or mask those tokens"
        )
