"""The denoiser: SiT, a diffusion transformer with adaLN-Zero conditioning.

Names, shapes, initialisation and outputs are those of the published SiT (Ma et al. 2024, arXiv:2401.08740), so its
checkpoints load with ``strict=True`` and one seed gives the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import Seam, Tap
from ..modules import AdaLNZeroBlock, ModulatedNorm, Stream
from ..recompute import check_mode, recomputed

__all__ = ["FinalLayer", "SiT", "SiTBlock", "modulate", "sit_models"]


Capture = int | tuple[int, int]
"""What `SiT.forward` can hand back: the output of a block, or the cosine of a (student, teacher) pair."""


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The affine map of adaLN, x·(1 + scale) + shift: x (N, T, D), shift and scale (N, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class PatchEmbed(nn.Module):
    """Cuts an image into square patches and projects each."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Image (N, C, H, W) → tokens (N, T, D), row after row."""
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Embeds times: cosines and sines of geometrically spaced frequencies, then an MLP."""

    def __init__(self, hidden_size: int, frequencies: int = 256, max_period: float = 10_000.0) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.frequencies = frequencies
        self.max_period = max_period

    def forward(self, t: Tensor) -> Tensor:
        """Times (N,) → (N, D)."""
        # Computed here rather than kept in a buffer: `model.to(bfloat16)` would round a buffer to 8 bits, and
        # `to_empty` after a meta-device construction would leave it uninitialised.
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        half = self.frequencies // 2
        frequency = torch.exp(torch.arange(half, dtype=t.dtype, device=t.device) * (-math.log(self.max_period) / half))
        angle = t[:, None] * frequency
        embedding = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return self.mlp(embedding.to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Embeds class labels; while training, a share of them becomes the null label `num_classes`."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def forward(self, y: Tensor) -> Tensor:
        """Labels (N,) → (N, D)."""
        if self.training and self.dropout_prob > 0:
            dropped = torch.rand(y.shape[0], device=y.device) < self.dropout_prob
            y = torch.where(dropped, self.num_classes, y)
        try:
            return self.embedding_table(y)
        except IndexError as error:  # raised on the CPU only: elsewhere the check would cost a synchronisation
            null = f"{self.num_classes} is the null label" if self.dropout_prob > 0 else "there is no null label"
            last = self.embedding_table.num_embeddings - 1
            raise ValueError(f"SiT: labels run from {y.min()} to {y.max()}; expected 0..{last} ({null})") from error


class Attention(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (N, T, D) → (N, T, D)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Linear, tanh-GELU, linear."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (N, T, D) → (N, T, D)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SiTBlock(nn.Module):
    """Attention and MLP on a residual stream, each behind a modulated LayerNorm and a gate (adaLN-Zero).

    The published block in plain PyTorch, op by op: what `AdaLNZeroBlock` computes in single passes.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0, *, recompute: str = "none") -> None:
        super().__init__()
        self.recompute = recompute
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens x (N, T, D) and condition c (N, D) → (N, T, D)."""
        return recomputed(self.recompute, self._forward, x, c)

    def _forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Projects tokens to the pixels of their patches."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = ModulatedNorm(hidden_size)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(
        self, stream: Stream, c: Tensor, *, student: Tap | None = None, tap: bool = False
    ) -> tuple[Tensor, Seam]:
        """Stream (N, T, D) and condition c (N, D) → (N, T, patch²·C), channels last in a patch, and its entrance."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        seam = self.norm_final.enter(stream, shift, scale, student, tap)
        return self.linear(seam.normed), seam


class PlainFinalLayer(FinalLayer):
    """The same in plain PyTorch, op by op."""

    def forward(
        self, stream: Stream, c: Tensor, *, student: Tap | None = None, tap: bool = False
    ) -> tuple[Tensor, Seam]:
        """As `FinalLayer`, for a stream without pending update and without alignment."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        x = stream.residual
        normed = modulate(F.layer_norm(x, x.shape[-1:], eps=self.norm_final.eps), shift, scale)
        return self.linear(normed), Seam(x, normed, None, None)


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
        self.pos_embed.copy_(_sincos_positions(self.hidden_size, self.input_size // self.patch_size))
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
        grid = self.input_size // self.patch_size
        patches = tokens.unflatten(2, (self.patch_size, self.patch_size, self.out_channels))[..., : self.in_channels]
        return patches.unflatten(1, (grid, grid)).permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

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
        expected = (self.in_channels, self.input_size, self.input_size)
        if x.ndim != 4 or tuple(x.shape[1:]) != expected:
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


def _sincos_positions(hidden_size: int, grid: int) -> Tensor:
    """Fixed 2-D positions (grid², D): a quarter each of sin and cos of the column, then of the row (as in MAE)."""
    frequency = 10_000.0 ** -(torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    column = axis.expand(grid, -1, -1)
    return torch.cat([column, column.transpose(0, 1)], dim=2).flatten(0, 1)


# Width, depth, heads. XL to S are the published sizes; Ti (the shape of ViT-Ti), N and P are ours, for small images
# and CPUs.
_SIZES = {
    "XL": (1152, 28, 16),
    "L": (1024, 24, 16),
    "B": (768, 12, 12),
    "S": (384, 12, 6),
    "Ti": (192, 12, 3),
    "N": (192, 6, 3),
    "P": (128, 6, 2),
}

sit_models: dict[str, Callable[..., SiT]] = {
    f"SiT-{size}/{patch}": partial(SiT, hidden_size=width, depth=depth, num_heads=heads, patch_size=patch)
    for size, (width, depth, heads) in _SIZES.items()
    for patch in (2, 4, 8)
}
"""Constructors by name, "SiT-XL/2" being size XL with patches of 2; any keyword of `SiT` can be given or overridden."""
