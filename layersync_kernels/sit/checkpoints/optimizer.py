"""The state of AdamW as named tensors, and back."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from ...errors import CheckpointError
from ..distributed.shards import divided_like, own_part
from .weights import is_finite

_MOMENTS = ("exp_avg", "exp_avg_sq")
_STEP = "step"


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """The state of an optimiser as named tensors. `names`: those of its parameters, in order."""
    state = optimizer.state_dict()["state"]
    return {f"{names[i]}.{key}": value for i, entry in state.items() for key, value in entry.items()}


def moments_like(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """Tensors of the names, shapes and types of an optimiser's moments: its parameters."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return {f"{name}.{key}": p for name, p in zip(names, parameters, strict=True) for key in _MOMENTS}


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Sequence[str],
    tensors: Mapping[str, Tensor],
    *,
    step: int,
    optional: Collection[str] = (),
    overflows: bool = False,
) -> None:
    """Puts back what `optimizer_tensors` took out; hyperparameters stay those of `optimizer`.

    Everything is checked first: the fused AdamW reads past the end of moments that are smaller than their parameter.

    Args:
        optimizer: an AdamW.
        names: those of its parameters, in order.
        tensors: PARAMETER.exp_avg, PARAMETER.exp_avg_sq, PARAMETER.step; whole, or divided as the parameters are.
        step: steps of the run. The optimiser's own count may be lower, where fp16 gradients overflowed, but is the same
            for all parameters that are not `optional`.
        optional: names of parameters that may have been left out of some or all steps.
        overflows: whether gradients may have overflowed in all steps, so that there is nothing.

    Raises:
        CheckpointError: a tensor belongs to no parameter, is missing, or has another shape, type or range.
    """
    parameters = dict(zip(names, (p for group in optimizer.param_groups for p in group["params"]), strict=True))
    state: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition(".")
        if name not in parameters or key not in (*_MOMENTS, _STEP):
            raise CheckpointError(f"the optimiser state has {full_name!r}, which is no parameter of this model")
        like = parameters[name] if key in _MOMENTS else torch.empty(())
        if (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
            raise CheckpointError(
                f"the optimiser state has {full_name!r} as {tensor.dtype} {tuple(tensor.shape)}; "
                f"expected {like.dtype} {tuple(like.shape)}"
            )
        own = own_part(tensor)
        if not is_finite(own) or (key != "exp_avg" and own.numel() and own.min() < 0):
            raise CheckpointError(f"the optimiser state has numbers in {full_name!r} that cannot be")
        state.setdefault(name, {})[key] = tensor
    for name, entry in state.items():
        if missing := {*_MOMENTS, _STEP} - entry.keys():
            raise CheckpointError(f"the optimiser state has no {', '.join(sorted(missing))} of {name!r}")
    _check_complete(state, [name for name in names if name not in optional], step, overflows)
    for name, entry in state.items():
        entry.update({key: divided_like(entry[key], parameters[name]) for key in _MOMENTS})
    numbers = {name: i for i, name in enumerate(names)}
    optimizer.load_state_dict(
        {
            "state": {numbers[name]: entry for name, entry in state.items()},
            "param_groups": optimizer.state_dict()["param_groups"],
        }
    )


def _check_complete(
    state: Mapping[str, Mapping[str, Tensor]], required: Sequence[str], step: int, overflows: bool
) -> None:
    counts = {name: float(entry[_STEP]) for name, entry in state.items()}
    if odd := next((name for name, count in counts.items() if count > step or count % 1), None):
        raise CheckpointError(f"the optimiser state of {odd!r} is of step {counts[odd]:g}, the run at {step}")
    there = [name for name in required if name in state]
    if len(there) < len(required) and (there or (step > 0 and not overflows)):
        lost = next(name for name in required if name not in state)
        raise CheckpointError(
            f"the optimiser state is that of {len(there)} of {len(required)} parameters; {lost!r} is missing"
        )
    if odd := next((name for name in there if counts[name] != counts[there[0]]), None):
        raise CheckpointError(
            f"the optimiser state is of several steps: {there[0]!r} has {counts[there[0]]:g}, {odd!r} {counts[odd]:g}"
        )
