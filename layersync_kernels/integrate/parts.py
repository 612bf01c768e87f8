"""The parts of a block by their names, whoever wrote it, and a block of another class on the same parts."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from ..modules.block import AdaLNZeroBlock
from ..modules.published import SiTBlock

NORMS = ("norm1", "norm2", "attn.q_norm", "attn.k_norm")

_Block = TypeVar("_Block", SiTBlock, AdaLNZeroBlock)


def linears(block: Any) -> tuple[str, ...]:
    """Paths of the linear layers, those of a gated MLP or of one with GELU."""
    mlp = ("mlp.w12", "mlp.w3") if hasattr(block.mlp, "w12") else ("mlp.fc1", "mlp.fc2")
    return ("attn.qkv", "attn.proj", *mlp, "adaLN_modulation.1")


def is_rms_norm(module: object) -> bool:
    """Whether a module may be an RMSNorm: a weight is all that it has, and it is not LayerNorm."""
    if not isinstance(module, nn.Module) or isinstance(module, nn.LayerNorm):
        return False
    return [name for name, _ in [*module.named_parameters(), *module.named_buffers()]] == ["weight"]


def rms_norms(block: Any) -> tuple[str, ...]:
    """Paths of the norms that have a weight."""
    modules = dict(block.named_modules(remove_duplicate=False))
    return tuple(name for name in NORMS if is_rms_norm(modules.get(name)))


def sizes(block: Any) -> tuple[int, int, int]:
    """Channels of the tokens, of the MLP's inside and of the condition."""
    inner = block.get_submodule(linears(block)[3]).in_features
    return block.attn.proj.out_features, inner, block.adaLN_modulation[1].in_features


def assembled(kind: type[_Block], block: Any, recompute: str) -> _Block:
    """A block of another class on the linear layers and the norms' weights of this one, in the same order."""
    weighted: tuple[str, ...] = rms_norms(block)
    options: dict[str, Any] = {
        "norm": "rms" if "norm1" in weighted else "layer",
        "qk_norm": "attn.q_norm" in weighted,
        "mlp": "swiglu" if hasattr(block.mlp, "w12") else "gelu",
    }
    with torch.device("meta"):  # its own linear layers need neither memory nor random numbers
        new = kind(sizes(block)[0], block.attn.num_heads, recompute=recompute, **options)
    for name in linears(block):
        new.set_submodule(name, block.get_submodule(name))
    share_norms(block, new)
    for name in ("norm1", "norm2", *weighted):
        new.get_submodule(name).eps = block.get_submodule(name).eps
    for path in ("", "attn", "mlp"):
        own = new.get_submodule(path)._modules
        for name in block.get_submodule(path)._modules:
            if name in own:
                own[name] = own.pop(name)
    return new


def share_norms(source: nn.Module, target: nn.Module) -> None:
    """Give one block the weights of the other's norms."""
    for name in rms_norms(source):
        target.get_submodule(name).weight = source.get_submodule(name).weight
