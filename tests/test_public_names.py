"""What README and docs tell users to import is there."""

import ast
import importlib
import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^ *```(python|diff)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
DOTTED = re.compile(r"\blayersync_kernels(?:\.[A-Za-z_]\w*)+")


def imports(text):
    """(module, name or None) of all that the blocks of a page import from this package."""
    for language, block in BLOCK.findall(text):
        code = textwrap.dedent(block)
        if language == "diff":  # of somebody's file: its new lines, of which the imports stand for themselves
            added = (line[1:].strip() for line in code.splitlines() if line.startswith("+"))
            code = "\n".join(line for line in added if line.startswith(("import ", "from ")))
        if "import " not in code:  # a signature, or lines that stand in the middle of something
            continue
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Import):
                yield from ((alias.name, None) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from ((node.module, alias.name) for alias in node.names)


def resolved(dotted):
    """The object of a dotted name: the longest part of it that is a module, then attributes."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for name in parts[end:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(dotted)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_imports_or_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    for module, name in imports(text):
        if module.split(".")[0] == "layersync_kernels":
            resolved(module if name is None else f"{module}.{name}")
    for dotted in DOTTED.findall(text):
        resolved(dotted)


def test_the_pages_are_read():
    """A page whose blocks are no longer found would pass without a word."""
    found = {name for page in PAGES for _, name in imports(page.read_text(encoding="utf-8"))}
    assert {"layersync_loss", "LayerSyncLoss", "LayerSync", "apply_layersync_kernels", "dispersive_loss"} <= found
    assert {"RepresentationAlignmentLoss", "default_pair", "gelu_mlp", "AdaLNZeroBlock", "Stream"} <= found
