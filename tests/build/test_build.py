"""Installing on machines that lack something: a compiler, a CUDA toolkit, or an nvcc that is what it seems."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TREE = ("layersync_kernels", "csrc", "setup.py", "build_backend.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def setup_script():
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def install(folder, environment):
    """`pip install` a copy of the sources under a changed environment; returns where, and what pip said."""
    source, target = folder / "source", folder / "target"
    source.mkdir()
    for name in TREE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--no-build-isolation", "--no-index"]
    report = subprocess.run(
        [*command, "--target", target, source],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert report.returncode == 0, report.stdout + report.stderr
    return target, report.stdout + report.stderr


LOSS = """
import sys
# An editable installation of this package would lend its extension to the copy under test.
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", type(f).__module__)]
import torch
from layersync_kernels import layersync_loss
from layersync_kernels.ops import dispatch, native
student, teacher = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)
layersync_loss(student, teacher).backward()
assert student.grad.abs().sum() > 0
import layersync_kernels; print(layersync_kernels.__file__)
print(dispatch.choose("cosine_alignment", "auto", "cpu", torch.float32))
print(native.cuda().reason)
"""


def run_loss(target):
    environment = {**os.environ, "PYTHONPATH": str(target)}
    return subprocess.run(
        [sys.executable, "-c", LOSS], env=environment, capture_output=True, text=True, check=True, cwd=target
    ).stdout


def test_without_a_compiler_the_package_installs_and_works(tmp_path):
    empty = tmp_path / "bin"
    empty.mkdir()
    target, said = install(tmp_path, {"PATH": str(empty), "CXX": ""})
    assert "no C++ compiler found" in said
    printed = run_loss(target)
    assert str(target) in printed
    assert "backend='reference'" in printed
    assert "without a C++ compiler" in printed


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.slow
def test_without_a_cuda_toolkit_the_cpu_kernels_are_built(tmp_path):
    quick = tmp_path / "quick"  # what is built is asked one question: it need not be fast, and optimising takes minutes
    quick.write_text(f'#!/bin/sh\nexec {shutil.which("c++")} "$@" -O0\n')
    quick.chmod(0o755)
    target, _ = install(tmp_path, {"CUDA_HOME": str(tmp_path / "nowhere"), "CXX": str(quick)})
    printed = run_loss(target)
    assert str(target) in printed
    assert "backend='cpp'" in printed
    assert "no CUDA toolkit" in printed


def _toolkit(folder):
    (folder / "bin").mkdir(parents=True)
    (folder / "include").mkdir()
    (folder / "include" / "cuda_runtime.h").touch()
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(
        f'#!/bin/sh\necho "#\\$ TOP={folder}/bin/.." >&2\necho "Cuda compilation tools, release 13.0, V13.0.88"\n'
    )
    nvcc.chmod(0o755)
    return nvcc


@pytest.fixture
def clean_environment(monkeypatch):
    for name in ("CUDA_HOME", "CUDA_PATH", "MAX_JOBS", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_an_nvcc_that_wraps_another_is_resolved_to_its_toolkit(tmp_path, setup_script, clean_environment):
    home = tmp_path / "cuda"
    nvcc = _toolkit(home)
    wrapper = tmp_path / "local" / "bin" / "nvcc"
    wrapper.parent.mkdir(parents=True)
    wrapper.write_text(f'#!/bin/sh\nexec {nvcc} "$@"\n')
    wrapper.chmod(0o755)
    clean_environment.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    assert setup_script.find_cuda_home() == home
    assert setup_script.toolkit_version(home) == (13, 0)


def test_an_nvcc_behind_a_link_is_resolved(tmp_path, setup_script, clean_environment):
    home = tmp_path / "cuda"
    nvcc = _toolkit(home)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to(nvcc)
    clean_environment.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert setup_script.find_cuda_home() == home


def test_cuda_home_is_believed_only_if_it_holds_a_toolkit(tmp_path, setup_script, clean_environment):
    clean_environment.setenv("CUDA_HOME", str(tmp_path))
    assert setup_script.find_cuda_home() is None
    _toolkit(tmp_path)
    assert setup_script.find_cuda_home() == tmp_path


VERSION = """
import sys, warnings
warnings.simplefilter("ignore")
sys.modules["torch"] = None  # importing it fails
from setuptools.config.pyprojecttoml import read_configuration
print(read_configuration("pyproject.toml")["project"]["version"])
"""


def test_the_version_stands_in_the_package_and_is_read_without_torch():
    import layersync_kernels

    done = subprocess.run([sys.executable, "-c", VERSION], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == layersync_kernels.__version__


def test_every_op_is_found_by_its_files(setup_script, clean_environment, tmp_path):
    clean_environment.setattr(setup_script, "ROOT", tmp_path)
    for name in ("old/cpu.cpp", "old/cpu_kernels.cpp", "new/cpu_kernels.cpp", "new/cpu_more.cpp", "new/cuda.cu"):
        (tmp_path / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "csrc" / name).touch()
    clean_environment.setattr(setup_script, "INSTRUCTION_SETS", ("generic", "avx2"))
    written = setup_script.kernel_sources()
    assert [path.stem for path in written] == ["new_generic", "new_avx2", "old_generic", "old_avx2"]
    assert written[1].read_text() == '#define LAYERSYNC_ISA_AVX2\n#include "../../csrc/new/cpu_kernels.cpp"\n'
    before = written[1].stat().st_mtime_ns
    assert setup_script.kernel_sources() == written
    assert written[1].stat().st_mtime_ns == before
    assert [path.name for path in setup_script.sources("cuda*.cu")] == ["cuda.cu"]


def test_default_architectures_follow_the_toolkit(setup_script):
    assert setup_script.default_archs((13, 0)) == "8.0;9.0;10.0+PTX"
    assert setup_script.default_archs((12, 4)) == "8.0;9.0+PTX"


def test_jobs_are_bounded_by_memory_and_cores(setup_script, clean_environment):
    clean_environment.setattr(setup_script, "MEMORY_PER_JOB_GIB", 1e6)
    assert setup_script.bounded_jobs() == 1
    clean_environment.setattr(setup_script, "MEMORY_PER_JOB_GIB", 1e-6)
    assert setup_script.bounded_jobs() == os.cpu_count()


def test_two_pythons_that_share_a_tree_load_their_own_library(tmp_path, monkeypatch):
    from layersync_kernels.ops import native

    if not native.cpp().loaded:
        pytest.skip(native.cpp().reason)
    loaded = []
    monkeypatch.setattr(native, "_FOLDER", str(tmp_path))
    monkeypatch.setattr(native.torch.ops, "load_library", loaded.append)
    monkeypatch.setattr(native.torch.version, "cuda", "13.0")
    for other in ("cpython-30", "cpython-399", "cpython-311-other"):
        (tmp_path / f"_cuda.{other}-x86_64-linux-gnu.so").touch()
    assert not native.cuda.__wrapped__().loaded
    own = tmp_path / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    own.touch()
    library = native.cuda.__wrapped__()
    assert library.loaded
    assert [library.path] == loaded == [str(own)]


@pytest.mark.parametrize(
    ("environment", "match"),
    [
        ({"LAYERSYNC_BUILD": "gpu"}, "expected auto, none, cpu or cuda"),
        ({"LAYERSYNC_BUILD": "cpu", "PATH": "", "CXX": "no-such-compiler"}, "no C.. compiler; install"),
    ],
)
def test_impossible_builds_are_explained(environment, match, setup_script, clean_environment):
    for name, value in environment.items():
        clean_environment.setenv(name, value)
    with pytest.raises(SystemExit, match=match):
        setup_script.extensions()
