"""CONTRIBUTING.md's op, added to a copy of the package from the text, passes the tests that every op gets."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^`(\S+\.py)`:\n\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILES = dict(BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text()))
OP = "layersync_kernels/ops/softcap/op.py"
LISTS = [path for path in (*ROOT.glob("layersync_kernels/**/*.py"), ROOT / "setup.py") if "softcap" in path.read_text()]


def add_op(root, files):
    """A copy of the package and of what its ops' tests need, with the op in it."""
    shutil.copytree(
        ROOT / "layersync_kernels", root / "layersync_kernels", ignore=shutil.ignore_patterns("__pycache__")
    )
    for folder in ("tests/ops", "tests/support"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("tests/__init__.py", "tests/conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / file, root / file)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def run(root, *command):
    environment = {**os.environ, "PYTHONPATH": str(root), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *command], cwd=root, env=environment, capture_output=True, text=True, check=False
    )


def check_softcap(root, *extra):
    files = ("tests/ops/test_registry.py", "tests/ops/test_softcap.py")
    return run(root, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", "softcap", *extra)


def test_the_example_is_in_its_own_folders_alone():
    assert set(FILES) == {
        *(f"layersync_kernels/ops/softcap/{name}.py" for name in ("__init__", "op", "reference", "triton")),
        "tests/ops/test_softcap.py",
    }
    assert LISTS == []


def test_an_op_is_added_by_its_folder_and_its_test_file(tmp_path):
    pytest.importorskip("triton")
    add_op(tmp_path, FILES)
    report = check_softcap(tmp_path)
    assert report.returncode == 0, report.stdout[-3000:]
    assert "9 passed" in report.stdout  # three of its own, the others generic
    doctor = run(tmp_path, "-c", "from layersync_kernels import doctor; doctor.main([])")
    assert re.search(r"softcap .*cpu .*reference", doctor.stdout), doctor.stderr


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("return x.new_empty(x.shape)", "return x.double()"),
        ('"softcap_forward", _fake_forward, kind="rows"', '"softcap_forward", _fake_forward, kind="norms"'),
        ("softcap_reference, backends=(\"triton\",)", "softcap_reference, backends=(\"triton\", \"cpp\")"),
    ],
)  # fmt: skip
def test_a_wrong_declaration_fails_the_generic_tests(tmp_path, right, wrong):
    pytest.importorskip("triton")
    assert FILES[OP].count(right) == 1
    add_op(tmp_path, {**FILES, OP: FILES[OP].replace(right, wrong)})
    report = check_softcap(tmp_path, "-x")
    assert report.returncode == 1, report.stdout[-3000:]
    assert "test_registry.py" in report.stdout[report.stdout.index("short test summary") :]
