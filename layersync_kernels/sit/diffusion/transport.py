"""Training targets: what a model predicts along an interpolant, and its loss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ..batch import WHOLE, Share, within_lengths
from ..config.sampling import TransportConfig
from .checks import check_prediction, choose
from .interpolants import INTERPOLANTS, Interpolant, per_sample

PREDICTIONS = ("velocity", "noise", "score")
LOSS_WEIGHTS = ("velocity", "likelihood")
TIME_SAMPLINGS = ("uniform", "logit-normal")


@dataclass(frozen=True)
class Transport:
    """An interpolant, what the model predicts along it, and how its error is weighted; made by `create_transport`."""

    interpolant: Interpolant
    prediction: str
    loss_weight: str | None
    train_eps: float
    sample_eps: float
    time_sampling: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    time_shift: float = 1.0

    def draw_times(
        self, count: int, *, generator: torch.Generator | None, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Times (count,) for training, within the interval that it keeps to."""
        options: dict[str, Any] = {"generator": generator, "dtype": dtype, "device": device}
        low, high = self.interval(self.train_eps)
        if self.time_sampling == "uniform":
            t = torch.rand(count, **options)
        else:
            t = (self.logit_mean + self.logit_std * torch.randn(count, **options)).sigmoid()
        return self.shifted(t) * (high - low) + low

    def shifted(self, t: Tensor) -> Tensor:
        """Times in [0, 1] moved towards noise, which is at 0: t / (s - (s - 1)·t) for a `time_shift` s.

        That is the noise level u = 1 - t going to s·u / (1 + (s - 1)·u) (Esser et al. 2024, arXiv:2403.03206).
        """
        s = self.time_shift
        return t if s == 1 else t / (s - (s - 1) * t)

    def interval(self, eps: float) -> tuple[float, float]:
        """The times that keep `eps` away from the singular ends of [0, 1]: (eps, 1 - eps), or (0, 1 - eps) for VP."""
        return (eps if self.interpolant.pure_noise_at_0 else 0.0), 1.0 - eps

    def training_losses(
        self,
        model: Callable[..., Any],
        x1: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
        *,
        generator: torch.Generator | None = None,
        t: Tensor | None = None,
        x0: Tensor | None = None,
        share: Share = WHOLE,
    ) -> dict[str, Any]:
        """The loss of every sample, at random times and with random noise.

        Args:
            model: called as ``model(x_t, t, **model_kwargs)``; returns the prediction, shaped like `x1`, or
                ``(prediction, states)``.
            x1: (B, ...) data, floating point. Half types are interpolated, and their losses computed, in fp32; the
                model gets x_t in the dtype of `x1` and the times in fp32.
            model_kwargs: keywords of the model, such as labels. Where ``lengths`` (B,) are among them, the loss of a
                sample is the mean over so much of its first dimension.
            generator: draws the noise, then the times; on the device of `x1`.
            t: (B,) times to use instead of random ones, for a validation loss without that noise.
            x0: noise to use instead of random noise, shaped like `x1`.
            share: where several processes have a part of the batch: noise and times are drawn for all of it by each of
                them, from equal generators, so that they are those of a single process.

        Returns:
            "loss" (B,) at least fp32, the mean square error over all but the batch; "pred", the model's prediction;
            "t" and "x0", the times and the noise; "states", when the model handed back states.

        Raises:
            TypeError: `x1` is not floating point.
            ValueError: `t`, `x0` or the prediction has the wrong shape.
        """
        if not x1.is_floating_point() or x1.ndim < 2:
            raise TypeError(f"training_losses: x1 is {x1.dtype} {tuple(x1.shape)}; expected floating point (B, ...)")
        dtype = torch.promote_types(x1.dtype, torch.float32)
        if x0 is None:
            shape = (x1.shape[0] * share.world, *x1.shape[1:])
            x0 = share.of(torch.randn(shape, generator=generator, dtype=dtype, device=x1.device))
        if t is None:
            count = x1.shape[0] * share.world
            t = share.of(self.draw_times(count, generator=generator, dtype=dtype, device=x1.device))
        if t.shape != x1.shape[:1] or x0.shape != x1.shape:
            raise ValueError(
                f"training_losses: t has shape {tuple(t.shape)} and x0 {tuple(x0.shape)}; expected"
                f" {tuple(x1.shape[:1])} and {tuple(x1.shape)}"
            )
        time = per_sample(t, x1)
        x_t, velocity = self.interpolant.interpolate(time, x0, x1)
        output = model(x_t.to(x1.dtype), t, **(model_kwargs or {}))
        prediction, states = output if isinstance(output, tuple) else (output, None)
        check_prediction(prediction, x1)

        if self.prediction == "velocity":
            error = prediction - velocity
        elif self.prediction == "noise":
            error = prediction - x0
        else:
            error = prediction * self.interpolant.sigma(time)[0] + x0
        square = error.square()
        if self.loss_weight == "velocity":
            square = (self.interpolant.rate(time) / self.interpolant.sigma(time)[0]).square() * square
        elif self.loss_weight == "likelihood":
            square = self.interpolant.rate(time) / self.interpolant.sigma(time)[0].square() * square
        lengths = (model_kwargs or {}).get("lengths")
        terms = {"loss": _mean(square, lengths), "pred": prediction, "t": t, "x0": x0}
        return terms if states is None else {**terms, "states": states}

    def velocity(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The velocity that the model's prediction at x_t = `x` (B, ...) and times `t` (B,) stands for."""
        if self.prediction == "velocity":
            return prediction
        return self.interpolant.velocity_from_score(self.score(prediction, x, t), x, per_sample(t, x))

    def score(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The score that the model's prediction at x_t = `x` (B, ...) and times `t` (B,) stands for."""
        if self.prediction == "score":
            return prediction
        time = per_sample(t, x)
        if self.prediction == "noise":
            return prediction / -self.interpolant.sigma(time)[0]
        return self.interpolant.score_from_velocity(prediction, x, time)


def _mean(square: Tensor, lengths: Tensor | None) -> Tensor:
    """The mean of each sample (B, C, L, ...) over what is there: (B,)."""
    if lengths is None:
        return square.mean(dim=tuple(range(1, square.ndim)))
    total = torch.where(within_lengths(lengths, square), square, 0).flatten(1).sum(1)
    return total / (lengths * (square[0].numel() // square.shape[2]))


def create_transport(
    path_type: str = "linear",
    prediction: str = "velocity",
    loss_weight: str | None = None,
    train_eps: float | None = None,
    sample_eps: float | None = None,
    time_sampling: str = "uniform",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    time_shift: float = 1.0,
) -> Transport:
    """Makes a `Transport` from names, in upper or lower case.

    Args:
        path_type: the interpolant, by the published code's word for it: "linear", "gvp" or "vp".
        prediction: what the model predicts: "velocity", "noise" or "score".
        loss_weight: None, "velocity" or "likelihood": weights of the noise and score losses that make them bound the
            velocity error and the likelihood.
        train_eps: distance kept from the singular ends of [0, 1] in training. Default: 0 for the velocity of the linear
            and GVP interpolants, which is regular everywhere, 1e-3 for their noise and score, 1e-5 for VP.
        sample_eps: the same in sampling. Default: 0 for the velocity of linear and GVP, else 1e-3. Each of the
            two defaults stands by itself (the published code drops a `sample_eps` that comes without `train_eps`).
        time_sampling: how training times are drawn: "uniform", or "logit-normal" (as in Stable Diffusion 3).
        logit_mean: of logit-normal times before the sigmoid; below 0 lies more noise.
        logit_std: their standard deviation there.
        time_shift: above 1 moves the times of training, and of fixed-step ODE solvers, towards noise; see `shifted`.

    Raises:
        ValueError: an unknown name, a distance outside [0, 0.5), a `sample_eps` of 0 for noise or score, a
            `loss_weight` for velocity (it has none), a `logit_std` or `time_shift` that is not positive.
    """
    path_type = choose("path_type", path_type, INTERPOLANTS)
    prediction = choose("prediction", prediction, PREDICTIONS)
    if loss_weight is not None:
        loss_weight = choose("loss_weight", loss_weight, LOSS_WEIGHTS)
        if prediction == "velocity":
            raise ValueError(f"loss_weight={loss_weight!r} applies to noise and score; the velocity loss has no weight")
    default_train, default_sample = 1e-3, 1e-3
    if path_type == "vp":
        default_train = 1e-5
    elif prediction == "velocity":
        default_train, default_sample = 0.0, 0.0
    train_eps = default_train if train_eps is None else train_eps
    sample_eps = default_sample if sample_eps is None else sample_eps
    for name, eps in {"train_eps": train_eps, "sample_eps": sample_eps}.items():
        if not 0 <= eps < 0.5:
            raise ValueError(f"{name}={eps}; expected a number in [0, 0.5)")
    if sample_eps == 0 and prediction != "velocity":
        raise ValueError(f"sample_eps=0: the velocity of a {prediction} prediction is infinite at the ends; take 1e-3")
    time_sampling = choose("time_sampling", time_sampling, TIME_SAMPLINGS)
    for name, value in {"logit_std": logit_std, "time_shift": time_shift}.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value}; expected a positive number")
    times = (time_sampling, logit_mean, logit_std, time_shift)
    return Transport(INTERPOLANTS[path_type](), prediction, loss_weight, train_eps, sample_eps, *times)


def build_transport(config: TransportConfig) -> Transport:
    """The transport that `config` describes.

    Raises:
        ConfigError: a combination that does not exist.
    """
    try:
        return create_transport(**dataclasses.asdict(config))
    except ValueError as error:
        raise ConfigError(str(error)) from error
