"""What the C++ kernels of an instruction set must not hold."""

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
STRUCT = re.compile(r"^struct \w+[^;]*?\{(.*?)^\};", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", sorted(CSRC.rglob("*.inl")), ids=lambda path: str(path.relative_to(CSRC)))
def test_no_constructor_of_vectors_is_left_to_the_compiler(path):
    """GCC makes it without the instruction set of the pragma around it: not inlined, it passes vectors the other way.

    Sums over rows were NaN with -O0.
    """
    for struct in STRUCT.findall(path.read_text()):
        members = [line for line in struct.splitlines() if re.match(r"  Vec \w+(\[\w+\])? *(=|\{)", line)]
        assert members == [], "give the struct a constructor of its own"
