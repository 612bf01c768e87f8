"""Packages that a card's Python may lack. Only of the standard library: it runs before they are there.

python packages.py missing     names those that are missing here, as pip knows them
python packages.py wheels      prints the command that downloads all of them, with what they need, for Python 3.12
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec

PACKAGES = {
    "numpy": "numpy",
    "ninja": "ninja",
    "pybind11": "pybind11",
    "pytest": "pytest",
    "pytest_benchmark": "pytest-benchmark",
    "rich": "rich",
    "safetensors": "safetensors",
    "setuptools": "setuptools",
    "tyro": "tyro",
    "yaml": "pyyaml",
}
"""Module to package: what building, testing and timing import beside torch and Triton."""
_PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux_2_27_x86_64", "manylinux_2_28_x86_64")


def missing() -> list[str]:
    """Those that cannot be imported."""
    return [package for module, package in PACKAGES.items() if find_spec(module) is None]


def wheels(folder: str = "wheels", python: str = "3.12") -> str:
    """One command of pip; none of them needs torch."""
    options = f"--only-binary=:all: --python-version {python} --implementation cp"
    platforms = " ".join(f"--platform {name}" for name in _PLATFORMS)
    return f"python3 -m pip download --dest {folder} {options} {platforms} {' '.join(PACKAGES.values())}"


def main(argv: Sequence[str]) -> int:
    """Print what is asked for."""
    if list(argv) == ["missing"]:
        print(*missing())
    elif list(argv) == ["wheels"]:
        print(wheels())
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
