"""A small LightningDiT, its parts, names and options those of hustvl/LightningDiT."""

import math

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, HEADS, DEPTH, GRID = 32, 2, 2, 4


def modulate(x, shift, scale):
    scaled = x * (1 + scale.unsqueeze(1))
    return scaled if shift is None else scaled + shift.unsqueeze(1)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


class VisionRotaryEmbeddingFast(nn.Module):
    """Neighbouring channels turn, the first half of a head by rows, the second by columns."""

    def __init__(self, dim, pt_seq_len):
        super().__init__()
        speeds = 10_000 ** (-torch.arange(0, dim, 2) / dim)
        angles = (torch.arange(pt_seq_len)[:, None] * speeds).repeat_interleave(2, dim=-1)
        shape = (pt_seq_len, pt_seq_len, dim)
        grid = torch.cat([angles[:, None].expand(shape), angles[None].expand(shape)], dim=-1).flatten(0, 1)
        self.register_buffer("freqs_cos", grid.cos())
        self.register_buffer("freqs_sin", grid.sin())

    def forward(self, t):
        first, second = t.unflatten(-1, (-1, 2)).unbind(-1)
        return t * self.freqs_cos + torch.stack((-second, first), dim=-1).flatten(-2) * self.freqs_sin


class Attention(nn.Module):
    def __init__(self, dim, num_heads, norm=None, drop=0.0):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = norm(dim // num_heads) if norm else nn.Identity()
        self.k_norm = norm(dim // num_heads) if norm else nn.Identity()
        self.attn_drop = nn.Dropout(drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop)

    def forward(self, x, rope=None):
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rope(q), rope(k)
        x = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, dropout_p=self.attn_drop.p)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(batch, tokens, width)))


class SwiGLUFFN(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Parts(nn.Module):
    """Of a block, all but its forward."""

    def __init__(self, use_qknorm=True, use_swiglu=True, use_rmsnorm=True, wo_shift=False):
        super().__init__()
        if use_rmsnorm:
            self.norm1, self.norm2 = RMSNorm(WIDTH), RMSNorm(WIDTH)
        else:
            self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attn = Attention(WIDTH, HEADS, use_qknorm and (RMSNorm if use_rmsnorm else nn.LayerNorm))
        self.mlp = SwiGLUFFN(WIDTH, int(2 / 3 * 4 * WIDTH)) if use_swiglu else Mlp(WIDTH, 4 * WIDTH)
        self.wo_shift = wo_shift
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, (4 if wo_shift else 6) * WIDTH))


def run_block(self, x, c, feat_rope=None):
    if self.wo_shift:
        scale1, gate1, scale2, gate2 = self.adaLN_modulation(c).chunk(4, dim=1)
        shift1 = shift2 = None
    else:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
    x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1), rope=feat_rope)
    return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class LightningDiTBlock(Parts):
    forward = run_block


class CompiledBlock(Parts):
    """The forward decorated, as the published one is."""

    forward = torch.compile(run_block, backend="eager", dynamic=False)


class LightningDiT(nn.Module):
    def __init__(self, use_rope=True, block=LightningDiTBlock, **options):
        super().__init__()
        self.x_embedder = nn.Linear(4, WIDTH)
        self.feat_rope = VisionRotaryEmbeddingFast(WIDTH // HEADS // 2, GRID) if use_rope else None
        self.blocks = nn.ModuleList([block(**options) for _ in range(DEPTH)])
        self.final_layer = nn.Linear(WIDTH, 4)
        with torch.no_grad():  # adaLN-Zero starts as the identity
            for parameter in self.parameters():
                parameter.add_(torch.randn_like(parameter) / math.sqrt(WIDTH))

    def forward(self, x, c):
        x = self.x_embedder(x)
        for block in self.blocks:
            x = block(x, c, self.feat_rope)
        return self.final_layer(x)


def batch():
    return torch.randn(2, GRID**2, 4), torch.randn(2, WIDTH)
