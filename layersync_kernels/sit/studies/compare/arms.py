"""What is compared: methods of training, each with the flags that are its own."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

import tyro

from ....errors import ConfigError
from ...config import flag
from ...config.loss import AlignConfig, DispersiveConfig, LayerSyncConfig
from ...config.run import TrainConfig

METHODS = ("vanilla", "layersync", "repa", "both")
"""What is compared where --methods does not say it."""
KNOWN_METHODS = (*METHODS, "irepa", "sra", "dispersive")
_TEACHER = "efficientnet-lite0"
_OF_ALL = ("teacher", "teacher_size", "teacher_weights", "features")
_NAME = re.compile(r"[A-Za-z0-9][\w.:+-]*")


@dataclass(frozen=True)
class Arm:
    """A way to train, under a name of its own."""

    name: str
    method: str
    config: TrainConfig


@dataclass(frozen=True)
class _Losses:
    """The settings that an arm may have for itself."""

    layersync: LayerSyncConfig = field(default_factory=LayerSyncConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    dispersive: DispersiveConfig = field(default_factory=DispersiveConfig)


def arms(config: TrainConfig, methods: Sequence[str]) -> list[Arm]:
    """What --methods asks for.

    Args:
        config: what all arms have in common.
        methods: each a method, or "NAME=METHOD FLAGS" with flags of the losses as `layersync train` has them.

    Raises:
        ConfigError: an unknown method, a flag that an arm cannot have, fewer than two arms, a name that is there twice.
    """
    found = [_arm(config, text) for text in methods]
    names = [arm.name for arm in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"--methods: {', '.join(twice)} is there twice; give each a name, as in NAME=layersync ...")
    if len(found) < 2:
        raise ConfigError(f"--methods {' '.join(methods)}: expected two or more")
    return found


def _arm(config: TrainConfig, text: str) -> Arm:
    named, equals, rest = text.partition("=")
    has_name = bool(equals and _NAME.fullmatch(named))
    try:
        method, *flags = shlex.split(rest if has_name else text) or [""]
    except ValueError as error:
        raise ConfigError(f"--methods '{text}': {error}") from error
    name = named if has_name else method
    if method not in KNOWN_METHODS:
        raise ConfigError(
            f"--methods '{text}': no method {method!r}; expected one of {', '.join(KNOWN_METHODS)}, "
            "or NAME=METHOD FLAGS"
        )
    if flags and name == method:
        raise ConfigError(f"--methods '{text}': give it a name, as in NAME={text}")
    own = method_config(config, method)
    if flags:
        losses = _parsed(_Losses(own.layersync, own.align, own.dispersive), flags, text)
        align = _with_teacher(losses.align, config.align)
        own = dataclasses.replace(own, layersync=losses.layersync, align=align, dispersive=losses.dispersive)
    own.validate()
    return Arm(name, method, own)


def _parsed(default: _Losses, flags: Sequence[str], text: str) -> _Losses:
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            losses = tyro.cli(_Losses, args=list(flags), default=default, prog="", config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as error:
        words = " ".join(re.sub(r"[^\x20-\x7e]|(?<=\s)-{3,}", " ", said.getvalue()).split())
        raise ConfigError(
            f"--methods '{text}': {words[:400]}; expected flags of the losses of `layersync train`"
        ) from error
    for name in _OF_ALL:
        if getattr(losses.align, name) != getattr(default.align, name):
            raise ConfigError(f"--methods '{text}': give {flag(name)} for all methods, outside of --methods")
    return losses


def method_config(config: TrainConfig, method: str) -> TrainConfig:
    """`config` as `method` trains it. The time limit goes: `Comparison` sees to it; the rate follows steps."""
    replace = dataclasses.replace
    config = replace(config, optim=replace(config.optim, max_seconds=None))
    if method not in ("layersync", "both"):
        config = replace(config, layersync=replace(config.layersync, layersync=("off",)))
    align, dispersive = config.align, config.dispersive
    if method in ("vanilla", "layersync", "dispersive"):
        align = replace(align, align="off")
    elif method != "both" or align.align == "off":
        align = replace(align, align="repa" if method == "both" else method)
    if method != "dispersive":
        dispersive = replace(dispersive, dispersive="off")
    elif dispersive.dispersive == "off":
        dispersive = replace(dispersive, dispersive="auto")
    return replace(config, align=_with_teacher(align, config.align), dispersive=dispersive)


def _with_teacher(align: AlignConfig, given: AlignConfig) -> AlignConfig:
    """With the teacher that was given, or the default one, where `align` has one at all."""
    if align.align in ("off", "sra"):
        return dataclasses.replace(align, teacher=None, features=None)
    default = _TEACHER if given.teacher is None and given.features is None else given.teacher
    return dataclasses.replace(align, teacher=default, features=given.features)


def unused(config: TrainConfig, found: Sequence[Arm]) -> str | None:
    """What was asked for and is in no arm; None: nothing."""
    align = config.align.align
    if align != "off" and all(arm.config.align.align != align for arm in found):
        return f"--align {align} is in none of the --methods; name {align} or both"
    if config.dispersive.dispersive != "off" and all(arm.config.dispersive.dispersive == "off" for arm in found):
        return "--dispersive is in none of the --methods; name dispersive"
    if config.layersync.layersync == ("off",) and any(
        arm.method in ("layersync", "both") and arm.config.layersync.layersync == ("off",) for arm in found
    ):
        return "--layersync off leaves nothing to compare; leave it out, or choose other --methods"
    return None
