"""What is timed: ops at sizes of real models, and the ways to compute them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import layersync_loss
from ..ops import _dispatch

Loss = Callable[[Tensor, Tensor], Tensor]
MODES = ("forward", "backward", "both")

# Bytes that an ideal kernel moves, in tensors of the size of the student.
_TENSORS_MOVED = {"forward": 2, "backward": 3, "both": 5}


@dataclass(frozen=True)
class Case:
    """cosine_alignment on (rows, width) tokens.

    Attributes:
        rows: batch times tokens.
        width: channels.
        dtype: of student and teacher.
        device: "cpu" or "cuda".
    """

    rows: int
    width: int
    dtype: torch.dtype
    device: str

    op = "cosine_alignment"

    @property
    def name(self) -> str:
        """E.g. "8192x1152 bfloat16"."""
        return f"{self.rows}x{self.width} {str(self.dtype).removeprefix('torch.')}"

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the student, called MD."""
        return self.rows * self.width * self.dtype.itemsize

    @property
    def repeats(self) -> int:
        """Calls that are timed together: one, or as many as make a tiny case outlast the clock and cold caches."""
        return 1 if self.rows * self.width >= 1 << 16 else 100

    def ideal_bytes(self, mode: str) -> int:
        """Bytes that an ideal kernel reads and writes."""
        return _TENSORS_MOVED[mode] * self.tensor_bytes

    def inputs(self, seed: int) -> tuple[Tensor, Tensor]:
        """Student (requires grad) and teacher, related as hidden states of one model are."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.rows, self.width)
        teacher = torch.randn(shape, generator=generator)
        student = 0.5 * teacher + torch.randn(shape, generator=generator)
        student, teacher = (x.to(self.device, self.dtype) for x in (student, teacher))
        return student.requires_grad_(), teacher


def eager_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The formula as training repositories write it, upcast to fp32."""
    student, teacher = F.normalize(student.float(), dim=-1), F.normalize(teacher.float(), dim=-1)
    return -(student * teacher).sum(dim=-1).mean()


PROVIDERS = ("eager", "compile", "cpp", "triton", "cuda")


def provider(name: str, case: Case) -> Loss:
    """The loss as a provider computes it.

    Raises:
        RuntimeError: the provider cannot run on the case's device; says why.
        ValueError: unknown provider.
    """
    if name == "eager":
        return eager_loss
    if name == "compile":
        torch._dynamo.reset()  # a graph per case, specialised to its shape: the best that the compiler does
        return torch.compile(eager_loss, dynamic=False)
    if name not in PROVIDERS:
        raise ValueError(f"unknown provider {name!r}; expected one of {', '.join(PROVIDERS)}")
    if name == "triton" and case.device == "cpu":
        raise RuntimeError("Triton needs a GPU to be timed")
    _dispatch.choose(name, case.device, case.dtype)
    return functools.partial(layersync_loss, backend=name)


# In order of importance: a run that is cut short has the figures that matter. The sizes are SiT-XL/2's width at a small
# batch, at a large one (256 images x 256 tokens on a GPU), SiT-S and B, and a tiny one that times the call itself.
_CPU = ((8192, 1152), (32768, 1152), (8192, 384), (8192, 768), (2, 8))
_CUDA = ((65536, 1152), (16384, 1152), (65536, 768), (65536, 384), (2, 8))
_CPU_DTYPES = (torch.float32, torch.bfloat16)
_CUDA_DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def cases(device: str, *, quick: bool = False) -> list[Case]:
    """The suite for a device, by importance; `quick` keeps one size, and a small one on the CPU."""
    sizes: tuple[tuple[int, int], ...] = _CUDA if device == "cuda" else _CPU
    if quick:
        sizes = sizes[:1] if device == "cuda" else ((1024, 1152),)
    dtypes = _CUDA_DTYPES if device == "cuda" else _CPU_DTYPES
    return [Case(rows, width, dtype, device) for rows, width in sizes for dtype in dtypes]
