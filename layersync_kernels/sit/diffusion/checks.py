"""What transport and samplers check, and how they ask a model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

SampleFn = Callable[..., Tensor]
"""``sample(z, model_fn, **model_kwargs)``: from noise to data; see `Sampler`."""


def predict(
    model_fn: Callable[..., Any], x: Tensor, t: Tensor, dtype: torch.dtype, model_kwargs: Mapping[str, Any]
) -> Tensor:
    """Asks the model in the sampled type; the answer is in the type of the state `x`."""
    prediction = model_fn(x.to(dtype), t, **model_kwargs)
    check_prediction(prediction, x)
    return prediction.to(x.dtype)


def check_prediction(prediction: object, x: Tensor) -> None:
    """Raises ValueError for anything but a tensor like `x`."""
    if not isinstance(prediction, Tensor):
        raise ValueError(f"the model returned {type(prediction).__name__}; expected a tensor shaped like the samples")
    if prediction.shape != x.shape:
        raise ValueError(
            f"the model returned shape {tuple(prediction.shape)}; expected {tuple(x.shape)}, as the samples"
        )


def check_steps(num_steps: int) -> None:
    """Raises ValueError for fewer than two times."""
    if num_steps < 2:
        raise ValueError(f"num_steps={num_steps}; expected at least 2, both ends included")


def choose(what: str, name: str, known: Iterable[str]) -> str:
    """`name` in lower case; raises ValueError where it is not known."""
    choice = str(name).lower()
    if choice not in known:
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}")
    return choice


@contextmanager
def evaluating(model_fn: Callable[..., Any]) -> Iterator[None]:
    """Puts the module behind `model_fn`, if there is one, into evaluation mode: no label may be dropped in sampling."""
    while isinstance(model_fn, functools.partial):
        model_fn = model_fn.func
    module = getattr(model_fn, "__self__", model_fn)
    modes = [(part, part.training) for part in module.modules()] if isinstance(module, nn.Module) else []
    for part, _ in modes:
        part.training = False
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
