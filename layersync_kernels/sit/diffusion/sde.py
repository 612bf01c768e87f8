"""Samples along an SDE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .checks import SampleFn, check_steps, choose, evaluating, predict
from .interpolants import DIFFUSION_FORMS, per_sample
from .transport import Transport

SDE_METHODS = ("euler", "heun")
LAST_STEPS = ("mean", "tweedie", "euler")

SINGULAR_EPS = 1e-3
"""How far to stay from an end of [0, 1] where a quotient is infinite, when the transport does not say."""


def normal_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers of the shape, dtype and device of `x`."""
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


class SDESampler:
    """The half of `Sampler` that follows an SDE."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport

    def sample_sde(
        self,
        *,
        sampling_method: str = "euler",
        diffusion_form: str = "sigma",
        diffusion_norm: float = 1.0,
        last_step: str | None = "mean",
        last_step_size: float = 0.04,
        num_steps: int = 250,
        generator: torch.Generator | None = None,
        normal: Callable[[Tensor, torch.Generator | None], Tensor] | None = None,
    ) -> SampleFn:
        """Follows the SDE dx = (v + w·score) dt + sqrt(2w) dW, which has the marginals of the ODE for any w(t) >= 0.

        Velocity and score come from one evaluation of the model (the published code makes two). Where they are
        infinite at an end of [0, 1] and the transport's `sample_eps` is 0, the end is kept 1e-3 away: "sbdm" at
        t = 0 and Heun without last step at t = 1 (the published code gives NaN).

        Args:
            sampling_method: "euler" (Euler-Maruyama) or "heun" (noise first, then a Heun step of the drift).
            diffusion_form: w(t): "constant", "sbdm", "sigma", "linear", "decreasing" or "increasing-decreasing" (also
                in the published spelling "inccreasing-decreasing").
            diffusion_norm: magnitude of w.
            last_step: what to do at time 1 - last_step_size: "mean" (a step without noise), "euler" (a step of the
                ODE), "tweedie" (the expected data), or None (the SDE runs to the end).
            last_step_size: how long before the end.
            num_steps: times that the SDE visits up to the last step, as in the published code: num_steps - 1 steps, and
                the last one.
            generator: draws the noise; on the device of `z`.
            normal: gives the noise of a step, of the state and the generator; None: standard normal numbers like it.

        Raises:
            ValueError: an unknown name, fewer than 2 times, a number out of range.
        """
        method = choose("sampling_method", sampling_method, SDE_METHODS)
        form = "increasing-decreasing" if diffusion_form == "inccreasing-decreasing" else diffusion_form
        form = choose("diffusion_form", form, DIFFUSION_FORMS)
        last = None if last_step is None else choose("last_step", last_step, LAST_STEPS)
        check_steps(num_steps)
        if not diffusion_norm >= 0:
            raise ValueError(f"sample_sde: diffusion_norm={diffusion_norm}; expected at least 0")
        if last is not None and not 0 < last_step_size < 1:
            raise ValueError(f"sample_sde: last_step_size={last_step_size}; expected in (0, 1), or last_step=None")

        transport, interpolant = self.transport, self.transport.interpolant
        start, end = transport.interval(transport.sample_eps)
        if form == "sbdm" and interpolant.pure_noise_at_0:
            start = start or SINGULAR_EPS
        if last is not None:
            end = 1.0 - last_step_size
        elif method == "heun":
            end = min(end, 1.0 - SINGULAR_EPS)
        if not start < end:
            raise ValueError(f"sample_sde: last_step_size={last_step_size} leaves no time after the start at t={start}")
        # Python floats, so that no step waits for the device.
        times = torch.linspace(start, end, num_steps).tolist()
        dt = times[1] - times[0]

        @torch.no_grad()
        def sample(z: Tensor, model_fn: Callable[..., Any], **model_kwargs: Any) -> Tensor:
            x = z.to(torch.promote_types(z.dtype, torch.float32))

            def at(time: float) -> Tensor:
                return torch.full((x.shape[0],), time, dtype=x.dtype, device=x.device)

            def answer(x: Tensor, t: Tensor) -> Tensor:
                return predict(model_fn, x, t, z.dtype, model_kwargs)

            def diffusion(t: Tensor) -> Tensor:
                return interpolant.diffusion(per_sample(t, x), form, diffusion_norm)

            def drift(x: Tensor, t: Tensor) -> Tensor:
                prediction = answer(x, t)
                return transport.velocity(prediction, x, t) + diffusion(t) * transport.score(prediction, x, t)

            with evaluating(model_fn):
                for time in times[:-1]:
                    t = at(time)
                    noise = (normal or normal_like)(x, generator) * dt**0.5
                    noise = (2 * diffusion(t)).sqrt() * noise
                    if method == "euler":
                        x = x + drift(x, t) * dt + noise
                    else:
                        x = x + noise
                        slope = drift(x, t)
                        x = x + 0.5 * dt * (slope + drift(x + dt * slope, at(time + dt)))
                t = at(end)
                if last == "mean":
                    x = x + drift(x, t) * last_step_size
                elif last == "euler":
                    x = x + transport.velocity(answer(x, t), x, t) * last_step_size
                elif last == "tweedie":
                    (alpha, _), (sigma, _) = interpolant.alpha(per_sample(t, x)), interpolant.sigma(per_sample(t, x))
                    x = (x + sigma.square() * transport.score(answer(x, t), x, t)) / alpha
            return x.to(z.dtype)

        return sample
