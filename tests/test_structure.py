"""The tree keeps its shape: imports run one way, without circles, and no file grows past what one reads at a sitting.

Read from the source, imports inside of functions and for type checkers too: a lazy import points somewhere as well.
"""

import ast
import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "layersync_kernels"
# A module imports its own part and those with a lower number. Equals never meet. "": the public names.
PARTS = {
    **dict.fromkeys(["errors", "runtime"], 0),
    "ops": 1,
    "functional": 2,
    "compiler": 3,
    **dict.fromkeys(["losses", "modules"], 4),
    **dict.fromkeys(["sit", "integrate"], 5),
    **dict.fromkeys(["", "analysis", "inductor"], 6),
    "bench": 7,
    **dict.fromkeys(["cli", "doctor"], 8),
    "__main__": 9,
}
ROOMS = {
    **dict.fromkeys(["spec", "batch", "files", "extras", "console", "device"], 0),
    "config": 1,
    **dict.fromkeys(["modality", "presets", "text"], 2),
    **dict.fromkeys(["diffusion", "models", "data"], 3),
    "distributed": 4,
    "checkpoints": 5,
    **dict.fromkeys(["teachers", "sampling"], 6),
    **dict.fromkeys(["evaluation", "training"], 7),
    "studies": 8,
    "commands": 9,
    "": 10,
}
# The dispersive loss compares the samples of all processes, of a group that its caller has made.
PROCESS_GROUPS = ("sit.distributed", "functional.dispersive", "ops.dispersive")


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def _imports(name: str) -> set[tuple[str, str]]:
    """(module of the package, name taken from it or "") for each import in a module."""
    found = set()
    package = [PACKAGE, *name.split(".")] if name else [PACKAGE]
    package = package if MODULES[name].name == "__init__.py" else package[:-1]
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            targets = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            targets = [(base, alias.name) for alias in node.names]
        else:
            continue
        for target, taken in targets:
            if f"{target}.".startswith(f"{PACKAGE}."):
                inner = target.removeprefix(PACKAGE).removeprefix(".")
                submodule = f"{inner}.{taken}".lstrip(".")
                found.add((submodule, "") if submodule in MODULES else (inner, taken))
    return found


IMPORTS = {name: _imports(name) for name in MODULES}
ARROWS = sorted({(name, target) for name, found in IMPORTS.items() for target, _ in found})


def _against(numbers: dict[str, int], arrows: list[tuple[str, str]]) -> list[str]:
    """The arrows that do not point to a lower number or stay within their own part."""
    parts = [(source.split(".")[0], target.split(".")[0], source, target) for source, target in arrows]
    return [f"{source} -> {target}" for a, b, source, target in parts if a != b and numbers[a] <= numbers[b]]


def test_packages_import_one_way():
    assert {name.split(".")[0] for name in MODULES} <= PARTS.keys(), "give a new part its number"
    assert _against(PARTS, ARROWS) == []


def test_the_rooms_of_sit_import_lower_numbers_only():
    inside = [tuple(end.removeprefix("sit").lstrip(".") for end in arrow) for arrow in ARROWS if _within_sit(*arrow)]
    assert {name.split(".")[1] for name in MODULES if name.startswith("sit.")} <= ROOMS.keys(), "give a room its number"
    assert _against(ROOMS, inside) == []


def _within_sit(*ends: str) -> bool:
    return all(end.split(".")[0] == "sit" for end in ends)


def test_no_circle():
    graph = {name: {target for target, _ in found if target != name} for name, found in IMPORTS.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"a circle of imports: {' <- '.join(error.args[1])}") from None


def test_private_names_stay_in_their_module():
    taken = [(name, target, what) for name, found in IMPORTS.items() for target, what in found]
    private = [entry for entry in taken if any(part.startswith("_") for part in (*entry[1].split("."), entry[2]))]
    assert [entry for entry in private if entry[2] != "__version__"] == []


def test_process_groups_have_one_room():
    users = {name for name, tree in TREES.items() if any(map(_names_distributed, ast.walk(tree)))}
    known = {name for name in users if f"{name}.".startswith(tuple(f"{room}." for room in PROCESS_GROUPS))}
    assert users - known == set()


def _names_distributed(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and not node.level:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
        names = [ast.unparse(node)] if isinstance(node, ast.Attribute) else []
    return any(f"{name}.".startswith("torch.distributed.") for name in names)


def test_no_file_is_too_long_to_read():
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in MODULES.values()}
    assert {name: count for name, count in lines.items() if count > 400} == {}


def test_pytest_looks_into_every_folder_of_tests(request):
    """By default it passes over folders named build, and says nothing."""
    ignored = request.config.getini("norecursedirs")
    for folder in {path.parent.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py")}:
        for part in folder.parts:
            assert not any(fnmatch.fnmatch(part, pattern) for pattern in ignored), f"{folder} is passed over"


def test_tests_are_collected_without_the_extras():
    """benchmarks/gpu.sh collects all of them on a machine that has none: a module of tests asks for such a package."""
    extras = {"soundfile", "librosa", "diffusers", "datasets", "bvhio", "av", "pybullet", "accelerate", "peft", "timm"}
    extras |= {"transformers", "efficientnet_lite_pytorch", "mlxtend", "wandb"}
    found = []
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                found += [f"{path.relative_to(ROOT)}: {name}" for name in names if name.split(".")[0] in extras]
    assert found == []
