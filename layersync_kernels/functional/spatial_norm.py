"""Normalisation of a teacher over the tokens of a sample."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import compiled, dispatch
from ..ops.spatial_norm import spatial_norm as _spatial_norm
from ..ops.spatial_norm import spatial_norm_reference
from .checks import check_tokens


def spatial_norm(x: Tensor, *, alpha: float = 1.0, eps: float = 1e-6, backend: str = "auto") -> Tensor:
    """Takes from a teacher what the tokens of a sample share, channel by channel: its z-score over the tokens.

    (x - alpha·mean) / (std + eps), with mean and unbiased standard deviation over the tokens of each sample, in fp32
    and free of cancellation. One read and one write of x.

    Args:
        x: (..., N, D) tokens of a teacher, usually (B, N, D); float32, bfloat16 or float16, and float64 through the
            reference. It counts as a constant: where a gradient is asked for, no kernel runs. The last
            dimension should be contiguous, samples and tokens may have any stride (tokens behind a class token cost no
            copy).
        alpha: how much of the mean goes.
        eps: added to the standard deviation; at least 1e-12.
        backend: "auto", "reference", "cpp", "triton", "cuda" or "compile" (the reference under torch.compile).

    Returns:
        Like x, rounded once. Where all tokens are equal, (1 - alpha)·x / eps. A NaN or infinity makes a NaN of its
        channel in its sample.

    Raises:
        ValueError: a single token, which has no standard deviation; eps below 1e-12.
        TypeError: a tensor that is not dense or not floating point.
        RuntimeError: a backend that was asked for and cannot run: a fused one where a gradient is asked for, too.

    Source: iREPA (Singh et al. 2025, arXiv:2512.10794), its spatial normalisation.
    """
    check_tokens("spatial_norm", "x", x)
    if x.dim() < 2:
        raise ValueError(f"spatial_norm: x must have the shape (..., N, D), got {tuple(x.shape)}")
    if x.shape[-2] == 1:
        raise ValueError(
            f"spatial_norm: one token has no standard deviation, got x {tuple(x.shape)}; "
            "expected (..., N, D) with N > 1. Leave the normalisation out for pooled features"
        )
    if not eps >= 1e-12:
        raise ValueError(f"spatial_norm: eps must be at least 1e-12, got {eps}")
    grad = x.requires_grad and torch.is_grad_enabled()
    name = dispatch.resolve("spatial_norm", backend, x.device.type, x.dtype, grad, x)
    if x.numel() == 0:
        return x.clone()
    samples = x if x.dim() == 3 else x.reshape(-1, *x.shape[-2:])
    if name in dispatch.PLAIN:
        result = compiled.plain("spatial_norm", name, spatial_norm_reference, x.shape[-1])(samples, alpha, eps)
    else:
        result = _spatial_norm(samples, alpha, eps, name)
    return result if x.dim() == 3 else result.reshape(x.shape)
