"""The denoiser: SiT, a diffusion transformer with adaLN-Zero conditioning.

Names, shapes, initialisation and outputs are those of the published SiT (Ma et al. 2024, arXiv:2401.08740), so its
checkpoints load with ``strict=True`` and one seed gives the same weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...compiler.recompute import check_mode
from ...functional.seam import Tap
from ...modules.block import AdaLNZeroBlock
from ...modules.norm import Stream
from ...modules.published import SiTBlock
from ..spec import SampleSpec
from .embedders import LabelEmbedder, TimestepEmbedder
from .patches import FinalLayer, PatchEmbed, PlainFinalLayer, sincos_positions, unpatchify

Capture = int | tuple[int, int]
"""What `SiT.forward` can hand back: the output of a block, or the cosine of a (student, teacher) pair."""


class SiT(nn.Module):
    """Scalable interpolant transformer: predicts velocity, noise or score from x_t, the time and a class label.

    Args:
        input_size: side H = W of the square samples (pixels, or latents of an autoencoder); a multiple of `patch_size`.
        patch_size: side of a patch; T = (input_size / patch_size)² tokens.
        in_channels: channels of the samples.
        hidden_size: token width D; a multiple of 4 (positions) and of `num_heads`.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: inner width of the MLP over D.
        class_dropout_prob: share of labels replaced by the null label in training; 0 leaves no null label, and with it
            no classifier-free guidance.
        num_classes: labels are 0..num_classes-1, and num_classes is the null label.
        learn_sigma: the last layer has twice the channels, of which the second half is unused: the layout of the
            published checkpoints.
        kernels: "fused": blocks on the ops of `functional`; "eager": the published blocks in plain PyTorch, with the
            same parameters and the same results within the precision of the dtype.
        recompute: "none"; "light": norms, gates and activations are computed again in the backward pass; "full":
            whole blocks are.

    Raises:
        ValueError: sizes that do not divide, or are out of range; unknown kernels or recompute.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
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
    ) -> None:
        super().__init__()
        if kernels not in ("fused", "eager"):
            raise ValueError(f"SiT: unknown kernels={kernels!r}; expected 'fused' or 'eager'")
        check_mode(recompute)
        for name, size in {
            "input_size": input_size,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "hidden_size": hidden_size,
            "depth": depth,
            "num_heads": num_heads,
            "num_classes": num_classes,
        }.items():
            if size < 1:
                raise ValueError(f"SiT: {name}={size}; expected at least 1")
        if input_size % patch_size:
            raise ValueError(f"SiT: input_size={input_size} is not a multiple of patch_size={patch_size}")
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"SiT: hidden_size={hidden_size}; expected a multiple of 4 and of num_heads={num_heads}")
        if not 0 <= class_dropout_prob <= 1:
            raise ValueError(f"SiT: class_dropout_prob={class_dropout_prob}; expected a share between 0 and 1")
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.hidden_size = hidden_size
        self.depth = depth
        self.num_heads = num_heads
        self.num_classes = num_classes
        self.learn_sigma = learn_sigma
        self.kernels = kernels

        grid = input_size // patch_size
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pos_embed = nn.Parameter(torch.empty(1, grid * grid, hidden_size), requires_grad=False)
        block: type[nn.Module] = AdaLNZeroBlock if kernels == "fused" else SiTBlock
        self.blocks = nn.ModuleList(block(hidden_size, num_heads, mlp_ratio, recompute=recompute) for _ in range(depth))
        final_layer = FinalLayer if kernels == "fused" else PlainFinalLayer
        self.final_layer = final_layer(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

    @property
    def spec(self) -> SampleSpec:
        """The samples that the model takes and predicts."""
        return SampleSpec(self.in_channels, (self.input_size, self.input_size))

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draws the published initialisation, with which every block is the identity and the prediction is 0.

        Call it again after `to_empty` when the model was built on the meta device.
        """

        def init_linear(module: nn.Module) -> None:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

        # The order of the random draws is the published one: it makes equal seeds give equal weights.
        self.apply(init_linear)
        self.pos_embed.copy_(sincos_positions(self.hidden_size, self.input_size // self.patch_size))
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))  # as a linear layer over the patch: a view
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for name in ("mlp.0.weight", "mlp.2.weight"):
            nn.init.normal_(self.t_embedder.get_parameter(name), std=0.02)
        zero = [self.x_embedder.get_parameter("proj.bias"), *self.final_layer.parameters()]
        for block in self.blocks:
            zero += block.get_submodule("adaLN_modulation").parameters()
        for parameter in zero:
            nn.init.zeros_(parameter)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """Lays patches out as images: (N, T, patch²·out_channels) → (N, in_channels, H, W), unused channels dropped."""
        patches = tokens.unflatten(2, (self.patch_size, self.patch_size, self.out_channels))
        return unpatchify(patches[..., : self.in_channels], self.input_size // self.patch_size)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, capture: Sequence[Capture] = ()
    ) -> Tensor | tuple[Tensor, dict[Capture, Tensor]]:
        """Predicts the transport's target at x_t.

        Args:
            x: (N, in_channels, H, W) samples x_t = alpha(t)·data + sigma(t)·noise, floating point.
            t: (N,) times, from 0 (noise) to 1 (data).
            y: (N,) integer labels, 0..num_classes.
            capture: what to hand back too: a block's number, counted from 1, for its output; a pair
                (student, teacher) of them for the cosine of their tokens, which costs two passes over a hidden state
                in the whole step (fused kernels only; no block twice as student, none twice as teacher).

        Returns:
            The prediction (N, in_channels, H, W); with a non-empty `capture` also {number: hidden (N, T, D), the raw
            residual stream, differentiable; pair: cosine (N, T) fp32, differentiable in the student}.

        Raises:
            ValueError: shapes that do not fit, a block number outside 1..depth, on the CPU a label out of range, pairs
                that cannot be fused.
            TypeError: labels that are not integers, a `capture` that is no sequence of ints and pairs.
        """
        self._check_inputs(x, t, y)
        pairs = self._check_capture(capture)
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        states: dict[Capture, Tensor] = {}
        if self.kernels == "fused":
            tokens = self._fused_blocks(x, c, capture, pairs, states)
        else:
            for number, block in enumerate(self.blocks, start=1):
                x = block(x, c)
                if number in capture:
                    states[number] = x
            tokens, _ = self.final_layer(Stream(x), c)
        prediction = self.unpatchify(tokens)
        return (prediction, states) if states else prediction

    def _fused_blocks(
        self,
        x: Tensor,
        c: Tensor,
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
                stream, hidden, cosine, tap = module(stream, c, **options)
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
        y: Tensor,
        cfg_scale: float,
        *,
        cfg_channels: int | None = None,
        guidance_interval: tuple[float, float] | None = None,
    ) -> Tensor:
        """Predicts with classifier-free guidance: unconditional + cfg_scale · (conditional - unconditional).

        The batch is doubled as in the published code: the first half of `y` holds the labels, the second half null
        labels (`num_classes`). Only the first half of `x` and `t` is read, so that both halves see the same sample.

        Args:
            x: (2N, in_channels, H, W).
            t: (2N,) times.
            y: (2N,) labels.
            cfg_scale: 1 is the conditional prediction, more is more guidance.
            cfg_channels: guide this many leading channels. Default: 3 of 4, which is what the published code does to
                Stable Diffusion latents, and all channels of anything else.
            guidance_interval: (low, high): guide only while low <= t <= high, and take the conditional prediction
                elsewhere (Kynkäänniemi et al. 2024, arXiv:2404.07724). Outside, the unconditional half of the work is
                skipped, for one read of `t` on the host per call (not under torch.compile, where both halves run).

        Returns:
            (2N, in_channels, H, W): the guided channels are equal in both halves, the others are each half's own.

        Raises:
            ValueError: an odd batch, `cfg_channels` or an interval out of range, a model without null label.
        """
        if x.shape[0] % 2 or t.shape != (x.shape[0],) or y.shape != t.shape:
            raise ValueError(
                f"SiT.forward_with_cfg: x {tuple(x.shape)}, t {tuple(t.shape)}, y {tuple(y.shape)}; expected the batch"
                " twice: x = cat([x, x]), t of length 2N, y = cat([labels, null labels])"
            )
        if self.y_embedder.dropout_prob == 0:
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
            guide = ((t >= low) & (t <= high)).view(half, 1, 1, 1)
            if not torch.compiler.is_compiling() and not guide.any():
                prediction = self(x, t, y[:half])
                return torch.cat([prediction, prediction])
        conditional, unconditional = self(torch.cat([x, x]), torch.cat([t, t]), y).chunk(2)
        guided = unconditional + cfg_scale * (conditional - unconditional)
        first = torch.cat([guided[:, :cfg_channels], conditional[:, cfg_channels:]], dim=1)
        second = torch.cat([guided[:, :cfg_channels], unconditional[:, cfg_channels:]], dim=1)
        if guide is not None:
            first, second = torch.where(guide, first, conditional), torch.where(guide, second, conditional)
        return torch.cat([first, second])

    def _check_inputs(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        expected = self.spec.shape
        if tuple(x.shape[1:]) != expected:
            shape = ", ".join(map(str, expected))
            raise ValueError(f"SiT: x has shape {tuple(x.shape)}; this model expects (N, {shape})")
        if t.ndim != 1 or y.ndim != 1 or t.shape[0] != x.shape[0] or y.shape[0] != x.shape[0]:
            raise ValueError(
                f"SiT: t has shape {tuple(t.shape)} and y {tuple(y.shape)}; expected one time and one label per sample,"
                f" both ({x.shape[0]},)"
            )
        if y.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"SiT: labels y are {y.dtype}; expected int64 or int32")

    def _check_capture(self, capture: Sequence[Capture]) -> list[tuple[int, int]]:
        if not isinstance(capture, Sequence) or not all(
            type(item) is int or (isinstance(item, tuple) and len(item) == 2 and all(type(n) is int for n in item))
            for item in capture
        ):
            raise TypeError(
                f"SiT: capture={capture!r}; expected a sequence of block numbers and (student, teacher) pairs"
            )
        pairs = [item for item in capture if isinstance(item, tuple)]
        if not all(1 <= n <= self.depth for item in capture for n in (item if isinstance(item, tuple) else (item,))):
            raise ValueError(f"SiT: capture={tuple(capture)}; blocks are counted from 1 to {self.depth}")
        if pairs:
            if self.kernels != "fused":
                raise ValueError('SiT: pairs are captured by kernels="fused"; capture both blocks instead')
            if not all(student < teacher for student, teacher in pairs):
                raise ValueError(f"SiT: capture={tuple(capture)}; a student comes before its teacher")
            if any(len({pair[side] for pair in pairs}) < len(pairs) for side in (0, 1)):
                raise ValueError(
                    f"SiT: capture={tuple(capture)}; a block may be the student of one pair and the teacher of one: "
                    "capture the blocks of the others by number"
                )
        return pairs
