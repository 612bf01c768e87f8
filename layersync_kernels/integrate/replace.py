"""Fused blocks in a live model that somebody else wrote: the adaLN-Zero blocks of SiT, DiT, REPA and LightningDiT.

A block is replaced where two things hold: its parts are the published ones, which this file looks at, and it computes
what the published block computes, which `proof` finds out.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from torch import nn

from ..compiler.recompute import check_mode
from ..modules.block import AdaLNZeroBlock
from ..modules.published import SiTBlock
from .parts import NORMS, assembled, is_rms_norm, linears, rms_norms, share_norms, sizes
from .proof import MODULE_STATE, Verdict, examine
from .rotary import ARGUMENT, RotaryBlock, rotary_modules

__all__ = ["Replacement", "apply_layersync_kernels"]

logger = logging.getLogger(__name__)

_PARTS: dict[str, type[nn.Module]] = {
    "norm1": nn.LayerNorm,
    "norm2": nn.LayerNorm,
    "adaLN_modulation": nn.Sequential,
    "adaLN_modulation.0": nn.SiLU,
}
_ALREADY_FUSED = "it is fused already"


class Replacement:
    """What `apply_layersync_kernels` did to a model. As a context manager it undoes it at the end.

    Attributes:
        replaced: path in the model → class of the block that was there.
        left: path in the model → why the block stayed.
    """

    def __init__(
        self,
        model: nn.Module,
        swaps: Mapping[str, tuple[nn.Module, AdaLNZeroBlock]],
        left: Mapping[str, str],
    ) -> None:
        self.replaced = {path: type(old).__name__ for path, (old, _) in swaps.items()}
        self.left = dict(left)
        self._model = model
        self._swaps = dict(swaps)

    def undo(self) -> None:
        """Put the old blocks back, with the parameters as they are now. A second call does nothing.

        The new blocks' hooks and training mode go along; what `.compile()` made of them does not.

        Raises:
            RuntimeError: a block has been wrapped, sharded or changed since; none is put back then.
        """
        for path, (old, new) in self._swaps.items():
            if not _untouched(self._model, path, old, new):
                raise RuntimeError(
                    f"apply_layersync_kernels: cannot undo, {path} was wrapped, sharded or changed after it was "
                    "replaced; take that back first"
                )
        for path, (old, new) in self._swaps.items():
            share_norms(new, old)  # a checkpoint loaded by assignment has made new ones
            _put(self._model, path, new, old)
        self._swaps.clear()

    def __enter__(self) -> Replacement:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)} of {len(self.replaced) + len(self.left)} blocks by fused ones"]
        lines += [f"  {paths}: {name}" for name, paths in _by_value(self.replaced).items()]
        lines += [f"  {paths} left: {reason}" for reason, paths in _by_value(self.left).items()]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Replacement: {self}>"


def apply_layersync_kernels(
    model: nn.Module, *, recompute: str = "none", trust: Sequence[type[nn.Module]] = ()
) -> Replacement:
    """Replace the adaLN-Zero blocks of a SiT, DiT, REPA or LightningDiT model by fused ones, in place.

    The fused blocks share the parameters of the old ones: the optimiser, the moving average, the keys of the
    state_dict and the random numbers to come are what they would have been, so it may happen at any time before
    compile(), FSDP and LoRA, also inside of DDP. Hooks on a block itself stay in force.

    A block is replaced if it is built from the published parts (LayerNorm without weights or RMSNorm with one,
    attention over qkv and proj with biases, its queries and keys with or without an RMSNorm, tanh-GELU between fc1 and
    fc2 or SwiGLU between w12 and w3, SiLU and one linear layer for the six modulations, no dropout) and computes the
    same outputs and gradients as the published block, for any number of samples and tokens: see `proof`, which tries
    each kind of block once, on the CPU with random parameters. That takes two seconds, and 25 seconds of a core at 1152
    channels; twice that where the model holds rotary positions (a module with freqs_cos and freqs_sin) that its blocks
    take as `feat_rope`. Models on the meta device can be replaced as well.

    Args:
        model: holds the blocks, at any depth and behind any wrapper.
        recompute: what the fused blocks compute again in the backward pass, see `recompute.recomputed`.
        trust: classes of blocks, by exact type, that you know to compute what the published block computes, although
            the proof cannot: it overrides another forward, runs ops that the published block has no use for, asks for
            the number of tokens, or keeps something on the side, which is lost. What is seen to differ, or to draw
            random numbers, is left all the same.

    Returns:
        what was replaced and what was left, and why. It is also logged, as a warning if blocks were left that are not
        fused already.

    Raises:
        TypeError: the model is no nn.Module; trust holds something that is no class of modules.
        ValueError: an unknown recompute.

    Warns:
        UserWarning: nothing was replaced, and not because all blocks are fused already: what was found of a model that
            cannot be fused.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"apply_layersync_kernels: model must be an nn.Module, got {type(model).__name__}")
    check_mode(recompute)
    if not (isinstance(trust, Sequence) and all(isinstance(c, type) and issubclass(c, nn.Module) for c in trust)):
        raise TypeError(f"apply_layersync_kernels: trust={trust!r}; expected classes of blocks, as in [MyBlock]")
    blocks = {path: m for path, m in model.named_modules(remove_duplicate=False) if _looks_like_a_block(m)}
    ropes = list({_kind(rope): rope for rope in rotary_modules(model)}.values())
    swaps: dict[str, tuple[nn.Module, AdaLNZeroBlock]] = {}
    left: dict[str, str] = {}
    fused: dict[nn.Module, AdaLNZeroBlock] = {}  # a module at two paths stays one
    verdicts: dict[Hashable, Verdict] = {}
    for path, block in blocks.items():
        obstacle = _obstacle(path, block)
        turned = obstacle is None and _takes_positions(block)
        if turned and not ropes and not any(getattr(m, ARGUMENT, m) is None for m in model.modules()):
            obstacle = (
                f"its forward takes {ARGUMENT}, and the model holds none to try it with: a module whose buffers are "
                "freqs_cos and freqs_sin, (N, D / heads)"
            )
        if obstacle is None:
            kind = _kind(block)
            if kind not in verdicts:
                verdicts[kind] = examine(block, [None, *ropes] if turned else [None])
            obstacle = _unproven(block, verdicts[kind], trust)
        if obstacle is not None:
            left[path] = obstacle
            continue
        if block not in fused:
            new = assembled(RotaryBlock if turned else AdaLNZeroBlock, block, recompute)
            if isinstance(new, RotaryBlock):
                new.proven = tuple({type(rope): None for rope in ropes})
            fused[block] = new
        swaps[path] = block, fused[block]
    for path, (old, new) in swaps.items():
        _put(model, path, old, new)
    replacement = Replacement(model, swaps, left)
    refused = not blocks or any(reason != _ALREADY_FUSED for reason in left.values())
    if refused and not swaps:
        found = str(replacement)
        if not blocks:
            found = (
                f"{type(model).__name__} has no block of a SiT, DiT, REPA or LightningDiT model: no module in it has a "
                "child named attn* next to one named norm1 or adaLN_modulation. Give the model that holds them"
            )
        hint = "layersync_kernels.modules.AdaLNZeroBlock is the fused block, for a model of your own to be made of"
        warnings.warn(f"apply_layersync_kernels: {found}. {hint}", stacklevel=2)
    else:
        logger.log(logging.WARNING if refused else logging.INFO, "apply_layersync_kernels: %s", replacement)
    return replacement


def _unproven(block: nn.Module, verdict: Verdict, trust: Sequence[type[nn.Module]]) -> str | None:
    if verdict.difference is not None or verdict.doubt is None or type(block) in trust:
        return verdict.difference
    name = type(block).__name__
    return f"{verdict.doubt}. If {name} computes what the published block does all the same, say trust=[{name}]"


def _looks_like_a_block(module: nn.Module) -> bool:
    names = [name for name, _ in module.named_children()]
    return any(name.startswith("attn") for name in names) and ("norm1" in names or "adaLN_modulation" in names)


def _obstacle(path: str, block: nn.Module) -> str | None:
    """Why a block cannot be replaced, as far as its parts tell."""
    if isinstance(block, AdaLNZeroBlock):
        return _ALREADY_FUSED
    if path == "":
        return "it is the model itself; give the module that holds it"
    if path.rpartition(".")[2] == "_orig_mod" or block._compiled_call_impl is not None:
        return "it is compiled; call apply_layersync_kernels before compile()"
    modules = dict(block.named_modules(remove_duplicate=False))
    missing = [name for name in ("attn", "mlp", *_PARTS) if name not in modules]
    missing += [name for name in (linears(block) if "mlp" in modules else ()) if name not in modules]
    if missing:
        return f"it has no {', '.join(name for name in missing if name.rpartition('.')[0] not in missing)}"
    for name, module in modules.items():
        if reason := _odd_part(name, module, linears(block)):
            return reason
    return _odd_parameters(block) or _odd_behaviour(block, modules)


def _odd_part(name: str, module: nn.Module, layers: Sequence[str]) -> str | None:
    expected = nn.Linear if name in layers else _PARTS.get(name)
    if name in NORMS and is_rms_norm(module):
        eps = getattr(module, "eps", None)
        return None if isinstance(eps, float) and eps > 0 else f"{name}.eps is {eps}; expected a positive number"
    if expected is not None:
        if type(module) is not expected:  # LoRA and quantised layers derive from nn.Linear
            return f"{name} is a {type(module).__module__}.{type(module).__qualname__}, not torch.nn's"
    elif name not in ("", "attn", "mlp"):
        inert = type(module) is nn.Identity or (type(module) is nn.Dropout and module.p == 0)
        if not inert and not (name == "mlp.act" and type(module) is nn.GELU and module.approximate == "tanh"):
            return f"{name} is {type(module).__name__}({module.extra_repr()}), which the published block does not have"
    return None


def _odd_parameters(block: Any) -> str | None:
    (width, inner, condition), heads = sizes(block), getattr(block.attn, "num_heads", None)
    if type(heads) is not int or heads < 1 or width % heads:
        return f"attn.num_heads is {heads}; expected a divisor of {width}"
    modulation, halves = block.adaLN_modulation[1].out_features, 2 if hasattr(block.mlp, "w12") else 1
    if modulation == 4 * width:
        return "its modulation has no shifts (wo_shift), four values for each channel of the six"
    shapes = ((3 * width, width), (width, width), (halves * inner, width), (width, inner), (6 * width, condition))
    expected: dict[str, tuple[int, ...]] = {}
    for name, shape in zip(linears(block), shapes, strict=True):
        expected |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    weighted = rms_norms(block)
    for names, channels in ((NORMS[:2], width), (NORMS[2:], width // heads)):
        if not set(weighted).isdisjoint(names):
            expected |= {f"{name}.weight": (channels,) for name in names}
    parameters = dict(block.named_parameters(remove_duplicate=False))
    found = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    if found.keys() != expected.keys():
        return f"its parameters differ from the published ones in {', '.join(sorted(found.keys() ^ expected.keys()))}"
    for name, parameter in parameters.items():
        if type(parameter) is not nn.Parameter:
            return f"{name} is a {type(parameter).__name__}; call apply_layersync_kernels before sharding or quantising"
        if found[name] != expected[name]:
            return f"{name} has the shape {found[name]}, not {expected[name]}"
    if buffers := [name for name, _ in block.named_buffers()]:
        return f"it has the buffers {', '.join(buffers)}"
    return None


def _odd_behaviour(block: Any, modules: Mapping[str, nn.Module]) -> str | None:
    for name, module in modules.items():
        if "forward" in vars(module):
            return f"{name or 'it'} has a forward that was patched onto the instance"
        if name and any(hooks for key, hooks in vars(module).items() if key.endswith("_hooks")):
            return f"{name} has hooks, which the fused block would not call; put them on the block"
    arguments = inspect.signature(block.forward).parameters
    ours = type(block) is SiTBlock and block.cross_attn is None  # whose other arguments the fused block takes too
    if len(arguments) != 2 and not ours and not _takes_positions(block):
        return f"its forward takes ({', '.join(map(str, arguments.values()))}), not (x, c)"
    return None


def _takes_positions(block: nn.Module) -> bool:
    """Whether a block is called as LightningDiT's."""
    arguments = list(inspect.signature(block.forward).parameters.values())
    return len(arguments) == 3 and arguments[2].name == ARGUMENT and arguments[2].default is None


def _put(model: nn.Module, path: str, old: nn.Module, new: nn.Module) -> None:
    """Set a block in the place of another, whose hooks and mode it takes over."""
    for name, value in vars(old).items():
        if name in MODULE_STATE and "hook" in name:
            setattr(new, name, value)  # the very dictionaries: the handles that remove a hook refer to them
    new.train(old.training)
    model.set_submodule(path, new)


def _untouched(model: nn.Module, path: str, old: nn.Module, new: AdaLNZeroBlock) -> bool:
    try:
        here = model.get_submodule(path)
    except AttributeError:
        return False
    same = here is new and type(new) in (AdaLNZeroBlock, RotaryBlock)  # FSDP changes the class
    return same and all(new.get_submodule(name) is old.get_submodule(name) for name in linears(old))


def _kind(block: nn.Module) -> Hashable:
    """Equal for blocks that compute the same function of their parameters."""
    return tuple(
        (
            path,
            type(module),
            *(parameter.dtype for parameter in module.parameters(recurse=False)),
            *sorted((k, v if _is_plain(v) else id(v)) for k, v in vars(module).items() if k not in MODULE_STATE),
        )
        for path, module in block.named_modules()
    )


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | float | None) or (isinstance(value, tuple) and all(map(_is_plain, value)))


def _by_value(values: Mapping[str, str]) -> dict[str, str]:
    """Value → the paths that have it, in brief."""
    paths: dict[str, list[str]] = {}
    for path, value in values.items():
        paths.setdefault(value, []).append(path or "the model")
    return {
        value: ", ".join(found) if len(found) < 4 else f"{found[0]}, {found[1]} ... {found[-1]}"
        for value, found in paths.items()
    }
