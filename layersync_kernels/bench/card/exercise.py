"""Every kernel on sizes that reach each of its paths, for compute-sanitizer: `.exercise BACKENDS DEVICE`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import functional

_HALVES = ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16))
_STREAMS = ((torch.float32, torch.bfloat16), (torch.float16, torch.float16), (torch.float32, torch.float32))


def _differentiate(total: Tensor, leaves: Sequence[Tensor], what: object) -> None:
    for tensor in (total, *torch.autograd.grad(total.sum(), leaves)):
        if not tensor.isfinite().all():
            raise SystemExit(f"not finite: {what}")


def _loss(backend: str, device: str) -> None:
    for width in (1, 77, 384, 1152, 5000):
        for dtypes in _HALVES:
            student, teacher = (torch.randn(3, 11, width, device=device).to(dtype) for dtype in dtypes)
            student[0, 0], teacher[0, 1] = 0, 1e4
            mask = torch.rand(3, 11, device=device) > 0.3
            for reduction in ("mean", "none"):
                leaves = [x.clone()[:, 1:].requires_grad_() for x in (student, teacher)]
                loss = functional.layersync_loss(
                    *leaves, mask=mask[:, 1:], reduction=reduction, teacher_grad=True, backend=backend
                )
                _differentiate(loss, leaves, ("layersync_loss", backend, width, dtypes, reduction))


def _seams(backend: str, device: str) -> None:
    for width in (1, 77, 384, 1152, 2100, 5000, 9000):
        for stream, half in _STREAMS:

            def draw(*shape: int, dtype: torch.dtype = half, width: int = width) -> Tensor:
                return torch.randn(*shape, width, device=device).to(dtype).requires_grad_()

            x, s = draw(3, 12, dtype=stream), draw(3, 12, dtype=stream)
            for shape in ((), (3,), (3, 12)):
                branch, gate, shift, scale = draw(3, 12), draw(*shape), draw(*shape), draw(*shape)
                seam, norm = functional.aligned_residual_norm, "rms" if shape else "layer"
                student = seam(s, branch, gate, shift, scale, tap=True, norm=norm, backend=backend)
                teacher = seam(x, branch, gate, shift, scale, student=student.tap, norm=norm, backend=backend)
                alone = functional.modulated_layer_norm(x, shift, scale, backend=backend)
                parts = (*teacher[:3], student.residual, student.normed, alone)
                total = torch.stack([part.float().sum() for part in parts if part is not None]).sum()
                what = ("aligned_residual_norm", backend, width, stream, half, shape)
                _differentiate(total, (x, s, branch, gate, shift, scale), what)
            weight = draw(40)
            activation = functional.linear_gelu(draw(12), weight, weight.new_zeros(40), backend=backend)
            mlp = functional.gelu_mlp(draw(12), weight, None, draw(40).t(), None, backend=backend)
            _differentiate(activation.float().sum() + mlp.float().sum(), [weight], ("gelu", backend, width, half))


def _family(backend: str, device: str) -> None:
    for width in (1, 77, 384):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            tokens, weight = (torch.randn(*shape, width, device=device).to(dtype) for shape in ((3, 300), (40,)))
            tokens[0, 0] = 0
            hidden, projection = tokens.clone().requires_grad_(), weight.clone().requires_grad_()
            teacher = functional.spatial_norm(tokens[:, 1:] + 1, backend=backend)
            total = functional.gram_alignment_loss(hidden[:, 1:], teacher, margin=0.1, backend=backend)
            target = torch.randn(3, 300, 40, device=device).to(dtype)
            total = total + functional.projected_alignment_loss(hidden, projection, None, target, backend=backend)
            _differentiate(total, (hidden, projection), ("family", backend, width, dtype))


def main(argv: Sequence[str]) -> int:
    """E.g. `cuda,triton cuda`."""
    backends, device = argv[0].split(","), argv[1]
    torch.manual_seed(0)
    for backend in backends:
        _loss(backend, device)
        _seams(backend, device)
        _family(backend, device)
    print("exercised", *backends, "on", device)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
