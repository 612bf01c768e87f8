"""Builds the extension for the card at hand alone, which is quickest, and puts it into the package.

From a copy without pyproject.toml, so that an old setuptools will do. What the compiler has made of unchanged files
stays, and a build that was cut short goes on. The kernels of the CPU, which nothing on a card times, are not optimised:
that would take longer than those of the card.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ..machine import source_digest

PACKAGE = Path(__file__).resolve().parents[2]
ROOT = PACKAGE.parent


def stamp(root: Path) -> Path:
    """What says that the extension in the package is of this source, for the card and Python of this machine."""
    return root / "build" / "gpu" / f"built-{source_digest()}"


def copy_sources(work: Path) -> None:
    """What the build reads, with its times, or everything would be compiled again."""
    work.mkdir(parents=True, exist_ok=True)
    for name in ("setup.py", "build_backend.py"):
        shutil.copy2(ROOT / name, work / name)
    if (work / "csrc").exists():
        shutil.rmtree(work / "csrc")
    shutil.copytree(ROOT / "csrc", work / "csrc")


def quick_compiler(path: Path) -> Path:
    """Write a compiler that optimises all but the kernels of the CPU; setup.py names their files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    compiler = shutil.which(os.environ.get("CXX") or "c++") or "c++"
    path.write_text(
        f'#!/bin/sh\ncase "$*" in\n*build/kernels/*) exec {compiler} "$@" -O0 ;;\n*) exec {compiler} "$@" ;;\nesac\n'
    )
    path.chmod(0o755)
    return path


def main(argv: Sequence[str]) -> int:
    """`[--dry-run]`: build, but leave the package as it is."""
    import torch

    dry_run = "--dry-run" in argv
    if not dry_run and stamp(ROOT).exists():
        print(f"the extension in {PACKAGE.name}/ is of this source already")
        return 0
    work = ROOT / "build" / "gpu" / "tree"
    copy_sources(work)
    archs = "9.0" if dry_run else "{}.{}".format(*torch.cuda.get_device_capability())
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "lib"],
        cwd=work,
        env={
            **os.environ, "LAYERSYNC_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": archs,
            "CXX": str(quick_compiler(work / "quick-c++")),
        },
        check=False,
    )  # fmt: skip
    if done.returncode != 0:
        return done.returncode
    built = sorted((work / "lib" / PACKAGE.name).glob("*.so"))
    for library in built:
        print(library.name, library.stat().st_size)
        if not dry_run:
            shutil.copy(library, PACKAGE / library.name)
    if not dry_run:
        stamp(ROOT).touch()
    return 0 if built else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
