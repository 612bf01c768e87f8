"""Trading time for activation memory: what a block computes again in its backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ..ops import registry

RECOMPUTE = ("none", "light", "full")

_KEPT_OF_ATEN = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::_scaled_dot_product",
)


def check_mode(mode: str) -> str:
    """`mode`, if it is one of `RECOMPUTE`.

    Raises:
        ValueError: it is not.
    """
    if mode not in RECOMPUTE:
        raise ValueError(f"unknown recompute={mode!r}; expected one of {', '.join(RECOMPUTE)}")
    return mode


@functools.cache  # the policy is asked before every op
def _is_kept(op: Any) -> bool:
    raw = registry.find_raw(op.name())
    return op.name().startswith(_KEPT_OF_ATEN) if raw is None else raw.kept


def _light_policy(_context: Any, op: Any, *args: Any, **_kwargs: Any) -> CheckpointPolicy:
    # Autocast's copies of the weights would be made twice, and are no activations.
    kept = _is_kept(op) or (op is torch.ops.aten._to_copy.default and isinstance(args[0], torch.nn.Parameter))
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def recomputed(mode: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function such that its backward pass computes part of its activations again.

    Args:
        mode: "none"; "light": norms, gates and activations, which are a few percent of the time, while the results of
            matrix products and attention are kept; "full": everything but its inputs.
        function: pure but for random numbers, which are drawn again.
        args: its arguments.
        kwargs: its keyword arguments.

    Works eagerly and inside of torch.compile.
    """
    if mode == "none" or not torch.is_grad_enabled():
        return function(*args, **kwargs)
    options: dict[str, Any] = {}
    if mode == "light":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _light_policy)
    return checkpoint(function, *args, use_reentrant=False, **options, **kwargs)
