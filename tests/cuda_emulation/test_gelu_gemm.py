"""GEMMs with GELU in cuBLASLt's epilogue: set up on an emulated library, declared as in the real one's header."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from .conftest import COMPILER, FLAGS, FOLDER
from .harness import BF16, HALF, NAMES, rows_of, run_program

COUNT, WIDTH, HIDDEN = 5, 24, 40
DTYPES = pytest.mark.parametrize("dtype", [BF16, HALF], ids=NAMES.get)


def run_gemm(
    program: Path, backward: bool, rows: Tensor, weight: Tensor, third: Tensor | None, workspace: int = 0, refuse=False
) -> list[Tensor | None]:
    """The raw op on the emulated library."""
    count, width = rows.shape
    hidden = weight.shape[1 if backward else 0]
    options = {"count": count, "width": width, "hidden": hidden, "workspace": workspace, "refuse": refuse}
    outputs = [(rows.dtype, (count, hidden)), (rows.dtype, (hidden,) if backward else (count, hidden))]
    inputs = {"rows": rows, "weight": weight, "third": third}
    return run_program(program, options | {"backward": backward}, inputs, [], outputs)


def wider(tensor: Tensor) -> Tensor:
    """The same values with the rows further apart."""
    return torch.cat([tensor, torch.full((len(tensor), 16), torch.nan, dtype=tensor.dtype)], -1)[:, : tensor.shape[1]]


def assert_rounded(found: Tensor, exact: Tensor) -> None:
    eps = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), exact, rtol=eps / 2 * 1.001, atol=1e-6)


@DTYPES
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("spread", [lambda t: t, wider], ids=["dense", "strided"])
def test_forward_multiplies_by_the_transposed_weight(program, dtype, bias, spread):
    x, weight = rows_of(COUNT, WIDTH, dtype=dtype), rows_of(HIDDEN, WIDTH, dtype=dtype, seed=1) / 4
    offset = rows_of(HIDDEN, dtype=dtype, seed=2) if bias else None
    activation, preactivation = run_gemm(program("gelu_gemm"), False, spread(x), spread(weight), offset, workspace=48)
    u = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
    assert_rounded(preactivation, u)
    assert_rounded(activation, F.gelu(u, approximate="tanh"))


@DTYPES
@pytest.mark.parametrize("spread", [lambda t: t, wider], ids=["dense", "strided"])
def test_backward_sums_the_gradient_over_rows_and_not_over_channels(program, dtype, spread):
    d_output, weight = rows_of(COUNT, WIDTH, dtype=dtype), rows_of(WIDTH, HIDDEN, dtype=dtype, seed=1) / 4
    u = rows_of(COUNT, HIDDEN, dtype=dtype, seed=2)
    d_u, d_bias = run_gemm(program("gelu_gemm"), True, spread(d_output), spread(weight), u)
    wide = u.double().requires_grad_()
    output = F.linear(F.gelu(wide, approximate="tanh"), weight.double())
    (exact,) = torch.autograd.grad(output, wide, d_output.double())
    assert_rounded(d_u, exact)
    assert_rounded(d_bias, exact.sum(0))


def test_an_epilogue_that_the_library_lacks_is_an_error_with_shapes(program):
    x, weight = rows_of(COUNT, WIDTH, dtype=BF16), rows_of(HIDDEN, WIDTH, dtype=BF16)
    with pytest.raises(AssertionError, match=r"no forward GEMM of 1x24 by 24x40, .*bfloat16; LAYERSYNC_CUBLASLT=0"):
        run_gemm(program("gelu_gemm"), False, x, weight, None, refuse=True)
    odd = rows_of(36, WIDTH, dtype=BF16)  # its pre-activation has a stride that 8 does not divide
    with pytest.raises(AssertionError, match="supports no forward GEMM of 1x24 by 24x36"):
        run_gemm(program("gelu_gemm"), False, x, odd, None)


def cuda_folders() -> list[Path]:
    """Where the headers of CUDA and its libraries may lie: a toolkit, and the wheels beside torch."""
    wheels = Path(torch.__file__).parents[1].glob("nvidia/*/include")
    toolkits = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    return [*(Path(home) / "include" for home in toolkits if home), *wheels]


def test_declarations_match_the_library(tmp_path):
    includes = [folder for folder in cuda_folders() if folder.exists()]
    needed = ("cublasLt.h", "crt/host_defines.h")
    if COMPILER is None or not all(any((folder / name).exists() for folder in includes) for name in needed):
        pytest.skip("needs g++ and the headers of cuBLASLt")
    binary = tmp_path / "cublaslt_abi"
    flags = [*FLAGS, *(f"-I{folder}" for folder in includes)]
    subprocess.run([COMPILER, *flags, FOLDER / "cublaslt_abi.cpp", "-o", binary, "-ldl"], check=True)
    libraries = [found for folder in includes for found in sorted(folder.parent.glob("lib*/libcublasLt.so.*"))]
    for library in libraries[:1]:
        done = subprocess.run([binary, library], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        # Every descriptor and attribute was taken; what is missing is the handle of a GPU.
        assert "cublasLtMatmulAlgoGetHeuristic failed with status 1 for the forward GEMM" in done.stdout
