import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
COMPILER = shutil.which("g++")
FLAGS = ["-std=c++20", "-O0", "-g", "-fno-strict-aliasing", "-Wno-unknown-pragmas", "-Wall", "-Werror"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """Compile a program of this folder once: name → path."""
    if COMPILER is None:
        pytest.skip("the emulator is compiled with g++, and there is none")
    built: dict[str, Path] = {}

    def build(name: str) -> Path:
        if name not in built:
            binary = tmp_path_factory.mktemp("emulation") / name
            source = FOLDER / f"{name}.cpp"
            subprocess.run([COMPILER, *FLAGS, *SANITIZERS, source, "-o", binary], check=True)
            built[name] = binary
        return built[name]

    return build
