"""What is timed: ops at sizes of real models, and the ways to compute them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional
from ..ops import dispatch
from ..ops.attention import length_mask

Function = Callable[..., Tensor | tuple[Tensor, ...]]
Shape = tuple[int, ...]
MODES = ("forward", "backward", "both")


_TOKENS = 256  # of a sample: a latent of 32x32 in patches of 2x2
_HEAD = 64
_TEACHER_WIDTH = 768  # channels of ViT-B, the usual teacher
_GRAM_MARGIN = 0.1


# The formulas, as training repositories write them.


def eager_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The alignment loss, upcast to fp32."""
    student, teacher = F.normalize(student.float(), dim=-1), F.normalize(teacher.float(), dim=-1)
    return -(student * teacher).sum(dim=-1).mean()


def _eager_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def _eager_residual_norm(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    residual = x + gate.unsqueeze(1) * branch
    return residual, _eager_norm(residual, shift, scale)


def _eager_mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, weight1, bias1), approximate="tanh"), weight2, bias2)


def _eager_projected(hidden: Tensor, weight: Tensor, bias: Tensor, teacher: Tensor) -> Tensor:
    return eager_loss(F.linear(hidden, weight, bias), teacher)


def _eager_gram(student: Tensor, teacher: Tensor, margin: float = _GRAM_MARGIN) -> Tensor:
    """VideoREPA's token relation distillation and, without its margin, VA-VAE's matrix term, in the tokens' dtype."""
    student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    difference = torch.bmm(student, student.mT) - torch.bmm(teacher, teacher.mT)
    return F.relu(difference.abs() - margin).mean()


def _eager_attention(qkv: Tensor) -> Tensor:
    q, k, v = qkv.unflatten(-1, (3, -1, _HEAD)).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _lengths(qkv: Tensor) -> Tensor:
    """From a fifth of the tokens to all of them: three fifths on average."""
    batch, tokens = qkv.shape[:2]
    return torch.linspace(tokens / 5, tokens, batch, device=qkv.device).round().long()


def _eager_padded_attention(qkv: Tensor) -> Tensor:
    """With a mask of keys, as training repositories have it; what padding gets is 0."""
    q, k, v = qkv.unflatten(-1, (3, -1, _HEAD)).permute(2, 0, 3, 1, 4).unbind(0)
    there = length_mask(_lengths(qkv), qkv.shape[1])
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=there[:, None, None])
    return output.transpose(1, 2).flatten(2).masked_fill(~there[..., None], 0)


def _eager_spatial_norm(x: Tensor) -> Tensor:
    return (x - x.mean(dim=1, keepdim=True)) / (x.std(dim=1, keepdim=True) + 1e-6)


# The same in fp64, where they cast to fp32.


def _fp64_loss(student: Tensor, teacher: Tensor) -> Tensor:
    return -torch.cosine_similarity(student, teacher, dim=-1, eps=1e-12).mean()


def _fp64_projected(hidden: Tensor, weight: Tensor, bias: Tensor, teacher: Tensor) -> Tensor:
    return _fp64_loss(F.linear(hidden, weight, bias), teacher)


# What is timed against them, where it is not a function as it stands.


def _fused_attention(qkv: Tensor, *, backend: str) -> Tensor:
    return functional.self_attention(qkv, qkv.shape[-1] // (3 * _HEAD), backend=backend)


def _fused_padded_attention(qkv: Tensor, *, backend: str) -> Tensor:
    return functional.self_attention(qkv, qkv.shape[-1] // (3 * _HEAD), lengths=_lengths(qkv), backend=backend)


def _linear_and_cosine(hidden: Tensor, weight: Tensor, bias: Tensor, teacher: Tensor) -> Tensor:
    return functional.layersync_loss(F.linear(hidden, weight, bias), teacher)


# Sizes of their inputs.


def _tokens(rows: int, width: int) -> Shape:
    """(B, N, D)."""
    tokens = min(rows, _TOKENS)
    return rows // tokens, tokens, width


def _per_sample(rows: int, width: int) -> Shape:
    """(B, D)."""
    return _tokens(rows, width)[0], width


def _norm_inputs(rows: int, width: int) -> list[Shape]:
    return [_tokens(rows, width), *[_per_sample(rows, width)] * 2]


def _residual_norm_inputs(rows: int, width: int) -> list[Shape]:
    return [*[_tokens(rows, width)] * 2, *[_per_sample(rows, width)] * 3]


def _mlp_inputs(rows: int, width: int) -> list[Shape]:
    return [_tokens(rows, width), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]


def _projected_inputs(rows: int, width: int) -> list[Shape]:
    return [_tokens(rows, width), (_TEACHER_WIDTH, width), (_TEACHER_WIDTH,), _tokens(rows, _TEACHER_WIDTH)]


@dataclass(frozen=True)
class Op:
    """An op that is timed.

    Attributes:
        eager: its formula as training repositories write it.
        fused: the same with a `backend` keyword.
        inputs: (rows, width) to the sizes of its inputs.
        constants: how many of the last inputs need no gradient.
        moved: (rows, width)-sized tensors that an ideal kernel reads and writes forward and backward, or None for an op
            with matrix products.
        exact: the formula for fp64 inputs, where eager casts to fp32.
        beside: the formula with its kinks moved to either side by what fp32 may round, for fp64 inputs: a rounding puts
            a value that lies there on the other side, and the gradient of one pair in 16 million is seen.
        unfused: the op as a linear layer and a fused loss, if it is one.
        function: of the package that it calls, where the case has another name.
    """

    eager: Function
    fused: Function
    inputs: Callable[[int, int], list[Shape]]
    constants: int = 0
    moved: tuple[int, int] | None = None
    exact: Function | None = None
    beside: tuple[Function, ...] = ()
    unfused: Function | None = None
    function: str | None = None


OPS = {
    "cosine_alignment": Op(
        eager_loss,
        functional.layersync_loss,
        inputs=lambda rows, width: [(rows, width), (rows, width)],
        constants=1,
        moved=(2, 3),
        exact=_fp64_loss,
    ),
    "modulated_layer_norm": Op(_eager_norm, functional.modulated_layer_norm, inputs=_norm_inputs, moved=(2, 3)),
    "gated_residual_norm": Op(
        _eager_residual_norm, functional.gated_residual_norm, inputs=_residual_norm_inputs, moved=(4, 6)
    ),
    "gelu_mlp": Op(_eager_mlp, functional.gelu_mlp, inputs=_mlp_inputs),
    "projected_alignment": Op(
        _eager_projected,
        functional.projected_alignment_loss,
        inputs=_projected_inputs,
        constants=1,
        exact=_fp64_projected,
        unfused=_linear_and_cosine,
    ),
    "gram_alignment": Op(
        _eager_gram,
        functools.partial(functional.gram_alignment_loss, margin=_GRAM_MARGIN),
        inputs=lambda rows, width: [(1, rows, width), (1, rows, width)],
        constants=1,
        beside=tuple(functools.partial(_eager_gram, margin=_GRAM_MARGIN * (1 + side * 2.0**-20)) for side in (-1, 1)),
    ),
    "self_attention": Op(_eager_attention, _fused_attention, inputs=lambda rows, width: [_tokens(rows, 3 * width)]),
    "padded_attention": Op(
        _eager_padded_attention,
        _fused_padded_attention,
        inputs=lambda rows, width: [_tokens(rows, 3 * width)],
        function="self_attention",
    ),
    "spatial_norm": Op(
        _eager_spatial_norm,
        functional.spatial_norm,
        inputs=lambda rows, width: [_tokens(rows, width)],
        constants=1,
        moved=(2, 0),
    ),
}


@dataclass(frozen=True)
class Case:
    """An op on (rows, width) tokens.

    Attributes:
        op: a name of `OPS`.
        rows: batch times tokens; from 256 on a multiple of 256, the tokens of a sample. For gram_alignment the tokens
            of one sample, any number.
        width: channels; for attention a multiple of 64.
        dtype: of all inputs.
        device: "cpu" or "cuda".
    """

    op: str
    rows: int
    width: int
    dtype: torch.dtype
    device: str

    @property
    def name(self) -> str:
        """E.g. "8192x1152 bfloat16"."""
        return f"{self.rows}x{self.width} {self.dtype_name}"

    @property
    def dtype_name(self) -> str:
        """E.g. "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def tensor_bytes(self) -> int:
        """Bytes of a (rows, width) tensor, called MD."""
        return self.rows * self.width * self.dtype.itemsize

    @property
    def repeats(self) -> int:
        """Calls that are timed together: one, or as many as make a tiny case outlast the clock and cold caches."""
        return 1 if self.rows * self.width >= 1 << 16 else 100

    @property
    def modes(self) -> tuple[str, ...]:
        """What can be timed: an op on constants alone has no backward pass."""
        op = OPS[self.op]
        return MODES if len(op.inputs(self.rows, self.width)) > op.constants else ("forward",)

    def ideal_bytes(self, mode: str) -> int | None:
        """Bytes that an ideal kernel reads and writes, where memory is what limits it."""
        moved = OPS[self.op].moved
        if moved is None:
            return None
        return {"forward": moved[0], "backward": moved[1], "both": sum(moved)}[mode] * self.tensor_bytes

    def inputs(self, seed: int) -> list[Tensor]:
        """Tokens of unit variance, related as hidden states of one model are, weights as they are initialised.

        Drawn on the case's device: the same seed gives other numbers on another kind of device.
        """
        generator = torch.Generator(self.device).manual_seed(seed)
        op = OPS[self.op]
        drawn: list[Tensor] = []
        for shape in op.inputs(self.rows, self.width):
            tensor = torch.randn(shape, generator=generator, device=self.device)
            if drawn and drawn[0].shape == shape:
                tensor += 0.5 * drawn[0]
            elif drawn:
                tensor *= shape[-1] ** -0.5
            drawn.append(tensor)
        drawn = [x.to(self.dtype) for x in drawn]
        for x in drawn[: len(drawn) - op.constants]:
            x.requires_grad_()
        return drawn


PROVIDERS = ("eager", "compile", "inductor", "unfused", "cpp", "triton", "cuda")


def eager(case: Case) -> Function:
    """The op in plain PyTorch."""
    return OPS[case.op].eager


def exact(case: Case) -> Function:
    """The op in plain PyTorch, for fp64 inputs."""
    op = OPS[case.op]
    return op.exact or op.eager


_compiled: set[Case] = set()  # whose graphs the compiler holds: one case at most


def _own_graphs(case: Case) -> None:
    """Let the compiler forget other cases, whose graphs would make it give up on specialising to this one's shape."""
    if case not in _compiled:
        torch._dynamo.reset()
        _compiled.clear()
        _compiled.add(case)


def provider(name: str, case: Case) -> Function:
    """The op as a provider computes it. What is compiled for a case is compiled once, until another case's turn.

    Raises:
        RuntimeError: the provider cannot run on the case's device; says why.
        ValueError: unknown provider.
    """
    if name == "eager":
        return eager(case)
    if name == "compile":
        _own_graphs(case)  # specialised to its shape: the best that the compiler does
        return torch.compile(eager(case), dynamic=False)
    if name == "unfused":
        unfused = OPS[case.op].unfused
        if unfused is None:
            raise RuntimeError("only projected_alignment has a form of linear layer and fused loss")
        return unfused
    if name == "inductor":
        return _compiled_with_pass(case)
    if name not in PROVIDERS:
        raise ValueError(f"unknown provider {name!r}; expected one of {', '.join(PROVIDERS)}")
    if name == "triton" and case.device == "cpu":
        raise RuntimeError("Triton needs a GPU to be timed")
    dispatch.choose(OPS[case.op].function or case.op, name, case.device, case.dtype)
    return functools.partial(OPS[case.op].fused, backend=name)


def _compiled_with_pass(case: Case) -> Function:
    """What torch.compile makes of the eager formula when `layersync_kernels.inductor` is on."""
    if case.op != "cosine_alignment":
        raise RuntimeError("the Inductor pass knows the alignment's formula alone")
    formula = eager(case)

    def own_code(*inputs: Tensor) -> Tensor | tuple[Tensor, ...]:  # else it would be given the graph of "compile"
        return formula(*inputs)

    _own_graphs(case)
    compiled = torch.compile(own_code, dynamic=False)

    def run(*inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        from ..compiler import inductor

        with inductor.enable():
            return compiled(*inputs)

    return run


# In order of importance: a run that is cut short has the figures that matter. The sizes are SiT-XL/2's width at small
# batches, at a large one (256 images x 256 tokens on a GPU), SiT-S and B, and a tiny one that times the call itself.
_CPU = (
    ("cosine_alignment", ((8192, 1152), (32768, 1152), (8192, 384), (8192, 768), (2, 8))),
    ("gated_residual_norm", ((4096, 1152), (2048, 384))),
    ("modulated_layer_norm", ((4096, 1152), (2048, 384))),
    ("gelu_mlp", ((2048, 384),)),
    ("projected_alignment", ((8192, 1152),)),
    ("gram_alignment", ((3600, 1152), (1024, 1152), (256, 1152), (4096, 64))),
    ("self_attention", ((2048, 384),)),
    ("padded_attention", ((2048, 384),)),
    ("spatial_norm", ((16384, 768),)),
)
_CUDA = (
    ("gated_residual_norm", ((65536, 1152), (16384, 1152))),
    ("cosine_alignment", ((65536, 1152), (16384, 1152), (65536, 768), (65536, 384), (2, 8))),
    ("modulated_layer_norm", ((65536, 1152),)),
    ("gelu_mlp", ((16384, 1152),)),
    ("spatial_norm", ((65536, 768),)),
    ("projected_alignment", ((65536, 1152),)),
    ("gram_alignment", ((3600, 1152), (16384, 1152))),
)
_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16, torch.float32, torch.float16)}


def cases(device: str, *, ops: tuple[str, ...] = tuple(OPS), quick: bool = False) -> list[Case]:
    """The suite for a device, by importance; `quick` keeps one size of each op, and a small one on the CPU."""
    suite = []
    for op, sizes in _CUDA if device == "cuda" else _CPU:
        if op not in ops:
            continue
        kept: tuple[tuple[int, int], ...] = sizes
        if quick:
            kept = sizes[:1] if device == "cuda" else ((1024, 384),)
        suite += [Case(op, rows, width, dtype, device) for rows, width in kept for dtype in _DTYPES[device]]
    return suite
