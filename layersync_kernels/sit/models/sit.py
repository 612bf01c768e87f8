"""The denoiser: SiT, a diffusion transformer with adaLN-Zero conditioning.

Names, shapes, initialisation and outputs are those of the published SiT (Ma et al. 2024, arXiv:2401.08740), so its
checkpoints load with ``strict=True`` and one seed gives the same weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...compiler.recompute import check_mode
from ...functional.seam import Tap
from ...modules.attention import rotary_positions
from ...modules.block import AdaLNZeroBlock
from ...modules.norm import Stream
from ...modules.published import SiTBlock
from ..batch import Condition, within_lengths
from ..spec import SampleSpec
from .checks import (
    check_capture,
    check_condition,
    check_names,
    check_sample_lengths,
    check_samples,
    check_sizes,
    check_width,
)
from .embedders import LabelEmbedder, TextEmbedder, TimestepEmbedder
from .patches import FinalLayer, PatchEmbed, PlainFinalLayer, sincos_positions, unpatchify

POSITIONS = ("sincos", "learnt", "rope")
CONDITIONS = ("class", "none", "embedding", "cross")
Capture = int | tuple[int, int]
"""What `SiT.forward` can hand back: the output of a block, or the cosine of a (student, teacher) pair."""


class SiT(nn.Module):
    """Scalable interpolant transformer: predicts velocity, noise or score from x_t, the time and a condition.

    Args:
        input_size: of a sample, for each of its one to three dimensions; one number: H = W of square images. Multiples
            of `patch_size`.
        patch_size: of a patch, for each dimension, or one number for all.
        in_channels: channels of the samples.
        hidden_size: token width D; a multiple of 4 (positions) and of `num_heads`.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: inner width of the MLP over D.
        class_dropout_prob: share of conditions replaced by the null condition in training; 0 leaves no null label, and
            with it no classifier-free guidance.
        num_classes: labels are 0..num_classes-1, and num_classes is the null label.
        learn_sigma: the last layer has twice the channels, of which the second half is unused: the layout of the
            published checkpoints.
        kernels: "fused": blocks on the ops of `functional`; "eager": the published blocks in plain PyTorch, with the
            same parameters and the same results within the precision of the dtype.
        recompute: "none"; "light": norms, gates and activations are computed again in the backward pass; "full":
            whole blocks are.
        positions: "sincos", the fixed ones (see `sincos_positions`); "learnt"; "rope": rotary ones in the attention
            (see `rotary_positions`).
        condition: "class": a label; "none"; "embedding": the mean of a text's words, added to the time; "cross":
            attention to those words in each block, as PixArt has it.
        text_width: channels of the words.

    Raises:
        ValueError: sizes that do not divide, or are out of range; unknown names.
    """

    def __init__(
        self,
        input_size: int | Sequence[int] = 32,
        patch_size: int | Sequence[int] = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        kernels: str = "fused",
        recompute: str = "none",
        positions: str = "sincos",
        condition: str = "class",
        text_width: int | None = None,
    ) -> None:
        super().__init__()
        check_mode(recompute)
        check_names(
            kernels=(kernels, ("fused", "eager")), positions=(positions, POSITIONS), condition=(condition, CONDITIONS)
        )
        extent = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
        patch = (patch_size,) * len(extent) if isinstance(patch_size, int) else tuple(patch_size)
        check_sizes(extent, patch, in_channels=in_channels, depth=depth, num_classes=num_classes)
        check_width(hidden_size, num_heads)
        if not 0 <= class_dropout_prob <= 1:
            raise ValueError(f"SiT: class_dropout_prob={class_dropout_prob}; expected a share between 0 and 1")
        if condition in ("embedding", "cross") and (text_width is None or text_width < 1):
            raise ValueError(
                f"SiT: condition={condition!r} needs text_width, the channels of the words; got {text_width}"
            )
        self.extent = extent
        self.patch_size = patch
        self.grid = self.grid_of(extent)
        self.in_channels = in_channels
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.hidden_size = hidden_size
        self.depth = depth
        self.num_heads = num_heads
        self.num_classes = num_classes
        self.learn_sigma = learn_sigma
        self.kernels = kernels
        self.positions = positions
        self.condition = condition
        self.text_width = text_width if condition in ("embedding", "cross") else None

        self.x_embedder = PatchEmbed(patch, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        labelled, cross = condition == "class", condition == "cross"
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob) if labelled else None
        self.text_embedder: TextEmbedder | None = None
        if text_width is not None and condition in ("embedding", "cross"):
            self.text_embedder = TextEmbedder(text_width, hidden_size, class_dropout_prob, pooled=not cross)
        self.pos_embed: nn.Parameter | None = None
        if positions == "rope":
            rotary_positions(self.grid, hidden_size // num_heads)  # whether the head's width fits
        else:
            tokens = torch.empty(1, math.prod(self.grid), hidden_size)
            self.pos_embed = nn.Parameter(tokens, requires_grad=positions == "learnt")
        block: type[nn.Module] = AdaLNZeroBlock if kernels == "fused" else SiTBlock
        options = {"cross": cross, "recompute": recompute}
        self.blocks = nn.ModuleList(block(hidden_size, num_heads, mlp_ratio, **options) for _ in range(depth))
        final_layer = FinalLayer if kernels == "fused" else PlainFinalLayer
        self.final_layer = final_layer(hidden_size, patch, self.out_channels)
        self.initialize_weights()

    @property
    def spec(self) -> SampleSpec:
        """The samples that the model takes and predicts."""
        return SampleSpec(self.in_channels, self.extent)

    @property
    def guidable(self) -> bool:
        """Whether there is a null condition, which classifier-free guidance needs."""
        embedder = self.y_embedder if self.text_embedder is None else self.text_embedder
        return embedder is not None and embedder.dropout_prob > 0

    def grid_of(self, extent: Sequence[int]) -> tuple[int, ...]:
        """Tokens along each dimension of samples of that size."""
        return tuple(size // step for size, step in zip(extent, self.patch_size, strict=True))

    def token_lengths(self, lengths: Tensor, extent: Sequence[int] | None = None) -> Tensor:
        """How many of the tokens of samples of these lengths (B,) are there: int64 (B,).

        Args:
            lengths: along the first dimension.
            extent: of the samples; None: `self.extent`.
        """
        step, *_ = self.patch_size
        return (lengths + step - 1) // step * math.prod(self.grid_of(extent or self.extent)[1:])

    def without(self, condition: Condition) -> Condition:
        """The null condition in place of labels and words; lengths stay.

        Raises:
            ValueError: the model has no null condition (see `guidable`).
        """
        if not self.guidable:
            raise ValueError("SiT: the model has no null condition; train with class_dropout_prob > 0")
        if self.text_embedder is None:
            return dataclasses.replace(condition, labels=torch.full_like(condition.labels, self.num_classes))
        return dataclasses.replace(condition, text_lengths=torch.zeros_like(condition.labels))

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draws the published initialisation, with which every block is the identity and the prediction is 0.

        On the meta device it does nothing: call it again after `to_empty`.
        """
        if self.x_embedder.get_parameter("proj.weight").is_meta:
            return

        def init_linear(module: nn.Module) -> None:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

        # The order of the random draws is the published one: it makes equal seeds give equal weights.
        self.apply(init_linear)
        if self.positions == "sincos":
            self.get_parameter("pos_embed").copy_(sincos_positions(self.hidden_size, self.grid))
        nn.init.xavier_uniform_(self.x_embedder.get_parameter("proj.weight").flatten(1))  # as a linear layer: a view
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for name in ("mlp.0.weight", "mlp.2.weight"):
            nn.init.normal_(self.t_embedder.get_parameter(name), std=0.02)
        zero = [self.x_embedder.get_parameter("proj.bias"), *self.final_layer.parameters()]
        for block in self.blocks:
            zero += block.get_submodule("adaLN_modulation").parameters()
            if self.condition == "cross":
                zero += block.get_submodule("cross_attn.proj").parameters()
        for parameter in zero:
            nn.init.zeros_(parameter)
        if self.positions == "learnt":
            nn.init.normal_(self.get_parameter("pos_embed"), std=0.02)
        if self.text_embedder is not None:
            nn.init.normal_(self.text_embedder.null, std=0.02)

    def unpatchify(self, tokens: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        """Lays patches out as samples: (N, T, values) → (N, in_channels, ...), unused channels dropped.

        Args:
            tokens: the prediction of each patch.
            grid: tokens along each dimension; None: `self.grid`.
        """
        patches = tokens.unflatten(2, (*self.patch_size, self.out_channels))
        return unpatchify(patches[..., : self.in_channels], grid or self.grid)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        capture: Sequence[Capture] = (),
        *,
        lengths: Tensor | None = None,
        text: Tensor | None = None,
        text_lengths: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict[Capture, Tensor]]:
        """Predicts the transport's target at x_t.

        Args:
            x: (N, in_channels, ...) samples x_t = alpha(t)·data + sigma(t)·noise, floating point. Their size may be
                another than `extent`, a multiple of the patch, unless positions are learnt.
            t: (N,) times, from 0 (noise) to 1 (data).
            y: (N,) integer labels, 0..num_classes; not read with another condition than "class".
            capture: what to hand back too: a block's number, counted from 1, for its output; a pair
                (student, teacher) of them for the cosine of their tokens, which costs two passes over a hidden state
                in the whole step (fused kernels only; no block twice as student, none twice as teacher).
            lengths: int64 (N,), how much of the first dimension is there, from 1 on. What lies beyond is not read, no
                token attends to it, and its prediction is 0. None: all is there.
            text: (N, L, text_width), words of a text-conditioned model.
            text_lengths: int64 (N,), how many of the L are there; 0: the null condition. None: all.

        Returns:
            The prediction (N, in_channels, ...); with a non-empty `capture` also {number: hidden (N, T, D), the raw
            residual stream, differentiable; pair: cosine (N, T) fp32, differentiable in the student}.

        Raises:
            ValueError: shapes that do not fit, a block number outside 1..depth, on the CPU a label or length out of
                range, pairs that cannot be fused, a condition that is missing.
            TypeError: labels or lengths that are not integers, a `capture` that is no sequence of ints and pairs.
        """
        check_samples(x, self.spec, self.patch_size, other_sizes=self.positions != "learnt")
        check_condition(x, t, y, text, labelled=self.y_embedder is not None, text_width=self.text_width)
        pairs = check_capture(capture, self.depth, self.kernels)
        grid = self.grid_of(x.shape[2:])
        inside, token_lengths = None, None
        if lengths is not None:
            check_sample_lengths(lengths, x)
            inside = within_lengths(lengths, x)
            x = torch.where(inside, x, 0)
            token_lengths = self.token_lengths(lengths, x.shape[2:])
        c = self.t_embedder(t)
        x = self.x_embedder(x)
        options: dict[str, Any] = {"lengths": token_lengths}
        if self.positions == "rope":
            options["rope"] = rotary_positions(grid, self.hidden_size // self.num_heads, device=x.device)
        else:
            x = x + self._positions(grid, x.dtype)
        if self.y_embedder is not None:
            c = c + self.y_embedder(y)
        elif self.text_embedder is not None:
            words, there = self.text_embedder(text, text_lengths)
            if self.text_embedder.pooled:
                c = c + words
            else:
                options.update(text=words, text_lengths=there)
        states: dict[Capture, Tensor] = {}
        if self.kernels == "fused":
            tokens = self._fused_blocks(x, c, options, capture, pairs, states)
        else:
            for number, block in enumerate(self.blocks, start=1):
                x = block(x, c, **options)
                if number in capture:
                    states[number] = x
            tokens, _ = self.final_layer(Stream(x), c)
        prediction = self.unpatchify(tokens, grid)
        if inside is not None:
            prediction = torch.where(inside, prediction, 0)
        return (prediction, states) if states else prediction

    def _positions(self, grid: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if grid == self.grid or self.positions == "learnt":
            return self.get_parameter("pos_embed")
        return sincos_positions(self.hidden_size, grid, self.get_parameter("pos_embed").device)[None].to(dtype)

    def _fused_blocks(
        self,
        x: Tensor,
        c: Tensor,
        given: Mapping[str, Any],
        capture: Sequence[Capture],
        pairs: Sequence[tuple[int, int]],
        states: dict[Capture, Tensor],
    ) -> Tensor:
        """Every module finishes the update of the one before, whose output it hands back."""
        stream = Stream(x)
        students = {student for student, _ in pairs}
        student_of = {teacher: student for student, teacher in pairs}
        taps: dict[int, Tap | None] = {}
        for number, module in enumerate([*self.blocks, self.final_layer]):
            student = student_of.get(number)
            options = {"student": None if student is None else taps[student], "tap": number in students}
            if number < self.depth:
                stream, hidden, cosine, tap = module(stream, c, lend_bias=True, **given, **options)
            else:
                tokens, (hidden, _, cosine, tap) = module(stream, c, **options)
            taps[number] = tap
            if number in capture:
                states[number] = hidden
            if student is not None:
                states[student, number] = cosine
        return tokens

    def forward_with_cfg(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        cfg_scale: float = 1.0,
        *,
        cfg_channels: int | None = None,
        guidance_interval: tuple[float, float] | None = None,
        **others: Tensor,
    ) -> Tensor:
        """Predicts with classifier-free guidance: unconditional + cfg_scale · (conditional - unconditional).

        The batch is doubled as in the published code: the first half of `y` holds the labels, the second half null
        labels (`num_classes`); the second half of `text_lengths` is 0. Only the first half of `x` and `t` is read, so
        that both halves see the same sample.

        Args:
            x: (2N, in_channels, ...).
            t: (2N,) times.
            y: (2N,) labels.
            cfg_scale: 1 is the conditional prediction, more is more guidance.
            cfg_channels: guide this many leading channels. Default: 3 of 4, which is what the published code does to
                Stable Diffusion latents, and all channels of anything else.
            guidance_interval: (low, high): guide only while low <= t <= high, and take the conditional prediction
                elsewhere (Kynkäänniemi et al. 2024, arXiv:2404.07724). Outside, the unconditional half of the work is
                skipped, for one read of `t` on the host per call (not under torch.compile, where both halves run).
            others: lengths, text and text_lengths of `forward`, for 2N samples.

        Returns:
            (2N, in_channels, ...): the guided channels are equal in both halves, the others are each half's own.

        Raises:
            ValueError: an odd batch, `cfg_channels` or an interval out of range, a model without null condition.
        """
        if x.shape[0] % 2 or t.shape != (x.shape[0],) or (y is not None and y.shape != t.shape):
            raise ValueError(
                f"SiT.forward_with_cfg: x {tuple(x.shape)}, t {tuple(t.shape)}, "
                f"y {None if y is None else tuple(y.shape)}; expected the batch "
                "twice: x = cat([x, x]), t of length 2N, y = cat([labels, null labels])"
            )
        if not self.guidable:
            raise ValueError("SiT.forward_with_cfg: the model has no null label; train with class_dropout_prob > 0")
        if cfg_channels is None:
            cfg_channels = 3 if self.in_channels == 4 else self.in_channels
        elif not 1 <= cfg_channels <= self.in_channels:
            raise ValueError(f"SiT.forward_with_cfg: cfg_channels={cfg_channels}; expected 1..{self.in_channels}")
        half = x.shape[0] // 2
        x, t = x[:half], t[:half]
        guide: Tensor | None = None
        if guidance_interval is not None:
            low, high = guidance_interval
            if not low <= high:
                raise ValueError(f"SiT.forward_with_cfg: guidance_interval=({low}, {high}); expected low <= high")
            guide = ((t >= low) & (t <= high)).view(half, *[1] * (x.ndim - 1))
            if not torch.compiler.is_compiling() and not guide.any():
                first_half = {name: value[:half] for name, value in others.items()}
                prediction = self(x, t, None if y is None else y[:half], **first_half)
                return torch.cat([prediction, prediction])
        conditional, unconditional = self(torch.cat([x, x]), torch.cat([t, t]), y, **others).chunk(2)
        guided = unconditional + cfg_scale * (conditional - unconditional)
        first = torch.cat([guided[:, :cfg_channels], conditional[:, cfg_channels:]], dim=1)
        second = torch.cat([guided[:, :cfg_channels], unconditional[:, cfg_channels:]], dim=1)
        if guide is not None:
            first, second = torch.where(guide, first, conditional), torch.where(guide, second, conditional)
        return torch.cat([first, second])
