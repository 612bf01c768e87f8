"""All of csrc through clang++, the host side of the CUDA ops included: nothing may use memory that is gone."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
CLANG = shutil.which("clang++")
SOURCES = sorted(path for suffix in ("cpp", "cu") for path in (ROOT / "csrc").rglob(f"*.{suffix}"))
DANGLING = ["-Werror=dangling", "-Werror=dangling-gsl", "-Werror=return-stack-address"]

pytestmark = pytest.mark.skipif(CLANG is None, reason="needs clang++ (Debian: apt-get install clang)")


def check(source: Path) -> subprocess.CompletedProcess[str]:
    """Parse and check a file of C++, or the host code of a .cu file, as far as the emulator and a stub go for CUDA."""
    pybind11 = pytest.importorskip("pybind11")
    includes = [*include_paths(), pybind11.get_include(), sysconfig.get_path("include")]
    command = [CLANG, "-fsyntax-only", "-std=c++20", *DANGLING, "-Wno-unknown-pragmas"]
    command += [f"-isystem{path}" for path in includes] + ["-include", FOLDER / "host" / "borrowing.h"]
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    command += ["-DLAYERSYNC_X86"] if is_x86 else []
    if source.name == "cpu_kernels.cpp":
        command.append("-DLAYERSYNC_ISA_AVX512" if is_x86 else "-DLAYERSYNC_ISA_GENERIC")
    if source.stem.startswith("cuda"):
        command += ["-DUSE_CUDA", f"-I{FOLDER / 'host'}"]
    if source.suffix == ".cu":
        command += ["-include", FOLDER / "emulator.h"]
    return subprocess.run([*command, "-x", "c++", source], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_outlives_the_memory_that_it_borrows(source):
    report = check(source)
    assert report.returncode == 0, report.stderr


@pytest.mark.parametrize("sizes", ["{0}", "= {2, 3}", "= std::vector<int64_t>{2}", "= x.dim() ? x.sizes() : Ref{0}"])
def test_the_check_finds_a_reference_to_a_temporary(sizes, tmp_path):
    source = tmp_path / "mistake.cpp"
    source.write_text(
        "#include <torch/csrc/stable/ops.h>\n#include <torch/csrc/stable/tensor.h>\n#include <vector>\n"
        "using Ref = torch::headeronly::IntHeaderOnlyArrayRef;\n"
        "torch::stable::Tensor mistake(const torch::stable::Tensor& x) {\n"
        f"  const Ref sizes {sizes};\n  return torch::stable::new_empty(x, sizes);\n}}\n"
    )
    assert "will be destroyed at the end of the full-expression" in check(source).stderr
