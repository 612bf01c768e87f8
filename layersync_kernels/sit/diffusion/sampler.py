"""Both samplers under the published name."""

from __future__ import annotations

from .ode import ODESampler
from .sde import SDESampler


class Sampler(ODESampler, SDESampler):
    """Draws samples by following a transport's flow.

    Both methods return a function ``sample(z, model_fn, **model_kwargs)``: `z` (B, ...) is noise, `model_fn` the model
    or one of its methods, called as ``model_fn(x, t, **model_kwargs)`` with times (B,); the result has the shape and
    dtype of `z`. Where `z` is a half type, the state is kept in fp32. Gradients are off, and a module in training mode
    is put into evaluation mode for as long. It raises ValueError when the model returns anything but a tensor like `z`.
    """
