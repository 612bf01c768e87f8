"""GELU and its derivative in the epilogues of quack's products (PyPI: quack-kernels), on Hopper and Blackwell.

Never taken by rule, and never run on a card yet: what is here follows quack's source, of which the tests have a
stand-in. `layersync tune` measures it where the package is installed, after a comparison with fp64.

quack's `gemm_act` stores the pre-activation beside the activation. Its `gemm_dact` gives the gradient of the
pre-activation and the activation in one product, so that the activation need never be kept. It gives no sums over rows:
those for the bias are a pass over that gradient. (quack has an epilogue with these sums, but its own tests expect wrong
ones of it on Blackwell with clusters of two.) Untuned, because a choice measured at the first call would differ from
run to run, and be made anew for every number of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime import machine
from ..registry import Route
from . import raw

_ARCHITECTURES = (9, 10)
_ACTIVATION = "gelu_tanh_approx"
_ALIGNMENT = 16  # bytes, of what TMA reads


def _obstacle(dtype: torch.dtype) -> str | None:
    if dtype not in raw.HALVES:
        return f"quack's epilogues are for half precision, the tensors are {dtype}"
    if machine.version_of("quack-kernels") == "none":
        return "quack-kernels is not installed; pip install 'layersync_kernels[quack]'"
    if not torch.cuda.is_available():
        return "no GPU is visible to torch"
    major, minor = torch.cuda.get_device_capability()
    if major not in _ARCHITECTURES:
        return f"quack's epilogues are for Hopper and Blackwell (sm_90, sm_100), the GPU is sm_{major}{minor}"
    return None


ROUTE = Route("triton", _obstacle)


def _aligned(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The raw op `linear_gelu_gemm`."""
    from quack.gemm_interface import gemm_act

    from ..tiles import device_of

    with device_of(x):
        preactivation, activation = gemm_act(
            _aligned(x),
            _aligned(weight).t(),
            bias=None if bias is None else _aligned(bias),
            activation=_ACTIVATION,
            store_preact=True,
            tuned=False,
        )
    return activation, preactivation


def recompute(d_output: Tensor, weight2: Tensor, preactivation: Tensor) -> tuple[Tensor, Tensor]:
    """The raw op `gelu_mlp_gemm_recompute`."""
    from quack.gemm_interface import gemm_dact

    from ..tiles import device_of

    with device_of(d_output):
        d_preactivation, activation = gemm_dact(
            _aligned(d_output), _aligned(weight2), _aligned(preactivation), activation=_ACTIVATION, tuned=False
        )
    return d_preactivation, activation


def backward(
    d_output: Tensor, weight2: Tensor, preactivation: Tensor, activation: bool, bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `epilogue.Epilogue.backward`; the sums for the bias are a pass of their own."""
    d_preactivation, value = raw.GEMM_RECOMPUTE["quack"](d_output, weight2, preactivation)
    d_bias = d_preactivation.sum(0, dtype=torch.float32) if bias else d_preactivation.new_empty(0)
    return d_preactivation, value, d_bias
