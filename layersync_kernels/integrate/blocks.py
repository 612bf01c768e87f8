"""Finds the blocks of a model that somebody else wrote, behind whatever wrappers it wears."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

# What wrappers call the module inside of them: DDP, torch.compile, checkpoint_wrapper, FSDP1.
_WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")

# Containers of blocks as the usual models name them; those of one line run one after the other.
_CONTAINERS = (
    ("blocks",),
    ("layers",),
    ("layer",),
    ("transformer_blocks", "single_transformer_blocks"),
    ("double_blocks", "single_blocks"),
    ("double_stream_layers", "single_stream_layers"),
    ("joint_blocks",),
    ("joint_transformer_blocks", "single_transformer_blocks"),
    ("in_blocks", "mid_block", "out_blocks"),
    ("h",),
    ("resblocks",),
)


# Parameters that timm, torchvision and transformers put before the tokens; the last one's stand in `embeddings`.
_CLASS_TOKENS = ("cls_token", "class_token")


@dataclass(frozen=True)
class Block:
    """A block of a model.

    Attributes:
        module: the outermost module at the path: hooks on what a wrapper wraps are skipped by torch.compile.
        path: without the names of wrappers.
        number: depth, counted from 1, if the block is in the model's stack of blocks.
        depth: how many blocks there are.
    """

    module: nn.Module
    path: str
    number: int | None
    depth: int | None

    @property
    def key(self) -> int | str:
        """Its number, else its path."""
        return self.path if self.number is None else self.number

    def __str__(self) -> str:
        return self.path if self.number is None else f"{self.path} (block {self.number} of {self.depth})"


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside of DDP, torch.compile, checkpoint_wrapper and their kin."""
    while (inner := next((n for n in _WRAPPERS if isinstance(getattr(module, n, None), nn.Module)), None)) is not None:
        module = getattr(module, inner)
    return module


def _clean(path: str) -> str:
    return ".".join(name for name in path.split(".") if name not in _WRAPPERS)


class Blocks:
    """The blocks of a model by depth, path or identity.

    Args:
        model: any module.
        containers: paths of what holds the blocks, in the order in which they run; None looks for the usual names.

    Raises:
        ValueError: the model is a DataParallel; a path that is not there.
    """

    def __init__(self, model: nn.Module, containers: str | Sequence[str] | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"LayerSync: model must be an nn.Module, got {type(model).__name__}")
        if any(isinstance(module, nn.DataParallel) for module in model.modules()):
            raise ValueError(
                "LayerSync: nn.DataParallel runs copies of the model in threads, whose hidden states would mix; use "
                "DistributedDataParallel"
            )
        self._name = type(unwrapped(model)).__name__
        self._modules: dict[str, nn.Module] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            self._modules.setdefault(_clean(path), module)  # the outermost comes first
        self._why_none = ""
        self.paths: list[str] = []
        if containers is None:
            self.containers = self._find_containers()
        else:
            given = [containers] if isinstance(containers, str) else list(containers)
            self.containers = [self._full_path(path) for path in given]
        self.paths = [path for container in self.containers for path in self._members(container)]

    @property
    def depth(self) -> int:
        """How many blocks there are; 0 where they were not found."""
        return len(self.paths)

    def _members(self, path: str) -> list[str]:
        module = unwrapped(self._modules[path])
        if isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict):
            return [f"{path}.{name}" for name in module._modules]
        return [path]

    def _find_containers(self) -> list[str]:
        parents: dict[str, list[str]] = {}
        names = {name for group in _CONTAINERS for name in group}
        for path, module in self._modules.items():
            parent, _, name = path.rpartition(".")
            many = isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict) and len(module) > 1
            if (
                name in names
                and many
                and not any(path.startswith(f"{p}.") for found in parents.values() for p in found)
            ):
                parents.setdefault(parent, []).append(path)
        if not parents:
            self._why_none = "no list of blocks with one of the usual names in it"
            return []
        levels = {parent: len(parent.split(".")) if parent else 0 for parent in parents}
        nearest = [found for parent, found in parents.items() if levels[parent] == min(levels.values())]
        if len(nearest) == 1:
            found = nearest[0]
            present = {path.rpartition(".")[2] for path in found}
            for group in _CONTAINERS:
                if present <= set(group):
                    parent = found[0].rpartition(".")[0]
                    paths = [f"{parent}.{name}" if parent else name for name in group]
                    return [path for path in paths if path in self._modules]
        several = [path for found in nearest for path in found]
        self._why_none = f"several lists of blocks: {', '.join(several)}"
        return []

    def _full_path(self, path: str) -> str:
        """The path as the model has it; the end of a path is enough where it is unique (PEFT puts names in front)."""
        wanted = _clean(path)
        if wanted in self._modules:
            return wanted
        matches = [candidate for candidate in self._modules if candidate.endswith(f".{wanted}")]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise ValueError(f"LayerSync: {path!r} could be any of {', '.join(matches)}; give the whole path")
        known = ", ".join(self.paths[:1] + self.paths[-1:]) if self.paths else ""
        near = f"; blocks were found at {known}" if known else "; model.named_modules() lists what there is"
        raise ValueError(f"LayerSync: {self._name} has no module {path!r}{near}")

    def find(self, which: int | str | nn.Module) -> Block:
        """The block at a depth (from 1), at a path, or that very module.

        Raises:
            ValueError: it is not there, or the depth is asked for and the blocks were not found.
            TypeError: anything else.
        """
        if isinstance(which, nn.Module):
            path = next((path for path, module in self._modules.items() if module is which), None)
            if path is None:
                raise ValueError(f"LayerSync: the given {type(which).__name__} is not a submodule of the model")
        elif isinstance(which, str):
            path = self._full_path(which)
        elif isinstance(which, int) and not isinstance(which, bool):
            if not self.paths:
                raise ValueError(
                    f"LayerSync: cannot number the blocks of {self._name}: {self._why_none}. Name what holds them, as "
                    "in blocks='dit.blocks', or give module paths as student and teacher"
                )
            if not 1 <= which <= self.depth:
                raise ValueError(
                    f"LayerSync: no block {which}; {self._name} has blocks 1 ({self.paths[0]}) to {self.depth} "
                    f"({self.paths[-1]}), counted from 1"
                )
            path = self.paths[which - 1]
        else:
            raise TypeError(
                f"LayerSync: a block is an int (depth, from 1), a module path or a module, got {type(which).__name__}"
            )
        number = self.paths.index(path) + 1 if path in self.paths else None
        return Block(self._modules[path], path, number, self.depth if number else None)

    def class_token(self, block: Block) -> str | None:
        """The path of a learnt class token that stands among the tokens of a block, as far as its name tells."""
        for path, module in self._modules.items():
            around = path.rpartition(".")[0] if path.endswith("embeddings") else path
            if f"{block.path}.".startswith(f"{around}." if around else ""):
                for name in _CLASS_TOKENS:
                    if name in module._parameters:
                        return f"{path}.{name}" if path else name
        return None
