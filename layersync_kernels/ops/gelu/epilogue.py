"""Products with GELU in their epilogue, by libraries: routes of the op behind one interface.

Where a library cannot take what a call gives it, the call goes the plain way: the product, and our pass behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ..registry import Route
from . import cublaslt, quack, raw


class Epilogue(NamedTuple):
    """A library's products with GELU in their epilogue.

    Attributes:
        route: when it is taken.
        forward: x (M, I), weight (O, I), bias (O,) or None → the activation and the pre-activation, (M, O).
        backward: d_output (M, O), weight2 (O, H), preactivation (M, H), whether the activation is wanted, and whether
            the sums for the bias are → the gradient of the pre-activation, the activation, and the sums of that
            gradient over rows; what is not wanted may be empty.
        recomputes: whether its gradient's product has the activation for one write, so that none need be kept.
    """

    route: Route
    forward: Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, bool, bool], tuple[Tensor, Tensor, Tensor]]
    recomputes: bool


EPILOGUES = {
    "cublaslt": Epilogue(cublaslt.ROUTE, raw.GEMM_FORWARD["cuda"], cublaslt.backward, recomputes=False),
    "quack": Epilogue(quack.ROUTE, raw.GEMM_FORWARD["quack"], quack.backward, recomputes=True),
}
ROUTES = {name: epilogue.route for name, epilogue in EPILOGUES.items()}


def kernels_of(backend: str) -> str:
    """The backend whose passes run for a backend or route."""
    return ROUTES[backend].backend if backend in ROUTES else backend


def named(backend: str) -> Epilogue | None:
    """The library of a route, or of a backend for which the environment asks for one."""
    return EPILOGUES.get("cublaslt" if cublaslt.ENABLED and backend == cublaslt.ROUTE.backend else backend)


def serving(backend: str, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Epilogue | None:
    """The library that runs a product of (M, K) rows with a weight: asked for, and within its limits; None: plain.

    The limits are half types, and widths and row strides that are multiples of 8: cuBLASLt's pre-activation needs such
    a stride, 16-byte accesses and TMA need the rest.
    """
    found = named(backend)
    if found is None or rows.dtype not in raw.HALVES or (bias is not None and bias.stride(0) != 1):
        return None
    fits = weight.shape[0] % 8 == 0 and _aligned_rows(rows) and _aligned_rows(weight)
    return found if fits else None


def _aligned_rows(matrix: Tensor) -> bool:
    (count, width), (stride, inner) = matrix.shape, matrix.stride()
    return count > 0 and width > 0 and width % 8 == 0 and inner == 1 and stride >= width and stride % 8 == 0
