"""From settings to objects: device, precision, model, loss, transport."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ..config.sampling import TransportConfig
from .interpolants import DIFFUSION_FORMS, PATHS, Path


def build_transport(config: TransportConfig) -> Transport:
    """The transport that `config` describes.

    Raises:
        ConfigError: a combination that does not exist.
    """
    try:
        return create_transport(**dataclasses.asdict(config))
    except ValueError as error:
        raise ConfigError(str(error)) from error


PREDICTIONS = ("velocity", "noise", "score")
LOSS_WEIGHTS = ("velocity", "likelihood")

FIXED_STEP_SOLVERS = {
    "euler": "euler",
    "heun": "heun2",  # torchdiffeq's "heun3" is a third-order relative, its "adaptive_heun" chooses its own steps
    "heun2": "heun2",
    "heun3": "heun3",
    "midpoint": "midpoint",
    "rk4": "rk4",
}
ADAPTIVE_SOLVERS = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
SDE_METHODS = ("euler", "heun")
LAST_STEPS = ("mean", "tweedie", "euler")

# How far to stay from an end of the path where a quotient is infinite, when the transport does not say.
_SINGULAR_EPS = 1e-3
SampleFn = Callable[..., Tensor]


@dataclass(frozen=True)
class Transport:
    """A path, what the model predicts along it, and how its error is weighted; made by `create_transport`."""

    path: Path
    prediction: str
    loss_weight: str | None
    train_eps: float
    sample_eps: float

    def interval(self, eps: float) -> tuple[float, float]:
        """The times that keep `eps` away from the singular ends of the path: (eps, 1 - eps), or (0, 1 - eps) for VP."""
        return (eps if self.path.pure_noise_at_0 else 0.0), 1.0 - eps

    def training_losses(
        self,
        model: Callable[..., Any],
        x1: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
        *,
        generator: torch.Generator | None = None,
        t: Tensor | None = None,
        x0: Tensor | None = None,
    ) -> dict[str, Any]:
        """The loss of every sample, at random times and with random noise.

        Args:
            model: called as ``model(x_t, t, **model_kwargs)``; returns the prediction, shaped like `x1`, or
                ``(prediction, states)``.
            x1: (B, ...) data, floating point. Half types are interpolated, and their losses computed, in fp32; the
                model gets x_t in the dtype of `x1` and the times in fp32.
            model_kwargs: keywords of the model, such as labels.
            generator: draws the noise, then the times; on the device of `x1`.
            t: (B,) times to use instead of random ones, for a validation loss without that noise.
            x0: noise to use instead of random noise, shaped like `x1`.

        Returns:
            "loss" (B,) at least fp32, the mean square error over all but the batch; "pred", the model's prediction;
            "states", when the model handed back states.

        Raises:
            TypeError: `x1` is not floating point.
            ValueError: `t`, `x0` or the prediction has the wrong shape.
        """
        if not x1.is_floating_point() or x1.ndim < 2:
            raise TypeError(f"training_losses: x1 is {x1.dtype} {tuple(x1.shape)}; expected floating point (B, ...)")
        dtype = torch.promote_types(x1.dtype, torch.float32)
        if x0 is None:
            x0 = torch.randn(x1.shape, generator=generator, dtype=dtype, device=x1.device)
        if t is None:
            low, high = self.interval(self.train_eps)
            t = torch.rand(x1.shape[0], generator=generator, dtype=dtype, device=x1.device) * (high - low) + low
        if t.shape != x1.shape[:1] or x0.shape != x1.shape:
            raise ValueError(
                f"training_losses: t has shape {tuple(t.shape)} and x0 {tuple(x0.shape)}; expected"
                f" {tuple(x1.shape[:1])} and {tuple(x1.shape)}"
            )
        time = _per_sample(t, x1)
        x_t, velocity = self.path.interpolate(time, x0, x1)
        output = model(x_t.to(x1.dtype), t, **(model_kwargs or {}))
        prediction, states = output if isinstance(output, tuple) else (output, None)
        _check_prediction(prediction, x1)

        if self.prediction == "velocity":
            error = prediction - velocity
        elif self.prediction == "noise":
            error = prediction - x0
        else:
            error = prediction * self.path.sigma(time)[0] + x0
        square = error.square()
        if self.loss_weight == "velocity":
            square = (self.path.rate(time) / self.path.sigma(time)[0]).square() * square
        elif self.loss_weight == "likelihood":
            square = self.path.rate(time) / self.path.sigma(time)[0].square() * square
        terms = {"loss": square.mean(dim=tuple(range(1, x1.ndim))), "pred": prediction}
        return terms if states is None else {**terms, "states": states}

    def velocity(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The velocity that the model's prediction at x_t = `x` (B, ...) and times `t` (B,) stands for."""
        if self.prediction == "velocity":
            return prediction
        return self.path.velocity_from_score(self.score(prediction, x, t), x, _per_sample(t, x))

    def score(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The score that the model's prediction at x_t = `x` (B, ...) and times `t` (B,) stands for."""
        if self.prediction == "score":
            return prediction
        time = _per_sample(t, x)
        if self.prediction == "noise":
            return prediction / -self.path.sigma(time)[0]
        return self.path.score_from_velocity(prediction, x, time)


def create_transport(
    path_type: str = "linear",
    prediction: str = "velocity",
    loss_weight: str | None = None,
    train_eps: float | None = None,
    sample_eps: float | None = None,
) -> Transport:
    """Makes a `Transport` from names, in upper or lower case.

    Args:
        path_type: "linear", "gvp" or "vp".
        prediction: what the model predicts: "velocity", "noise" or "score".
        loss_weight: None, "velocity" or "likelihood": weights of the noise and score losses that make them bound the
            velocity error and the likelihood.
        train_eps: distance kept from the singular ends of the path in training. Default: 0 for velocity on the linear
            and GVP paths, which is regular everywhere, 1e-3 for noise and score there, 1e-5 on the VP path.
        sample_eps: the same in sampling. Default: 0 for velocity on the linear and GVP paths, else 1e-3. Each of the
            two defaults stands by itself (the published code drops a `sample_eps` that comes without `train_eps`).

    Raises:
        ValueError: an unknown name, a distance outside [0, 0.5), a `sample_eps` of 0 for noise or score, a
            `loss_weight` for velocity (it has none).
    """
    path_type = _choose("path_type", path_type, PATHS)
    prediction = _choose("prediction", prediction, PREDICTIONS)
    if loss_weight is not None:
        loss_weight = _choose("loss_weight", loss_weight, LOSS_WEIGHTS)
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
    return Transport(PATHS[path_type](), prediction, loss_weight, train_eps, sample_eps)


class Sampler:
    """Draws samples by following a transport's flow.

    Both methods return a function ``sample(z, model_fn, **model_kwargs)``: `z` (B, ...) is noise, `model_fn` the model
    or one of its methods, called as ``model_fn(x, t, **model_kwargs)`` with times (B,); the result has the shape and
    dtype of `z`. Where `z` is a half type, the state is kept in fp32. Gradients are off, and a module in training mode
    is put into evaluation mode for as long. It raises ValueError when the model returns anything but a tensor like `z`.
    """

    def __init__(self, transport: Transport) -> None:
        self.transport = transport

    def sample_ode(
        self,
        *,
        sampling_method: str = "dopri5",
        num_steps: int = 50,
        atol: float = 1e-6,
        rtol: float = 1e-3,
        reverse: bool = False,
    ) -> SampleFn:
        """Follows the probability-flow ODE dx = v dt with a solver of torchdiffeq.

        An adaptive solver lands on the last time; in the published code it steps past the end and interpolates back,
        and so asks the model about times that do not exist.

        Args:
            sampling_method: adaptive ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun") or of fixed step
                ("euler", "midpoint", "rk4", "heun3", "heun" or "heun2", Heun's second-order method).
            num_steps: times that a fixed-step solver visits, both ends included, as in the published code: it makes
                num_steps - 1 steps. Adaptive solvers ignore it.
            atol: absolute tolerance of an adaptive solver.
            rtol: its relative tolerance.
            reverse: from data to noise.

        Raises:
            ValueError: an unknown solver, fewer than 2 times, a tolerance that is not positive.
            ImportError: torchdiffeq is not installed.
            RuntimeError: while sampling, an adaptive solver cannot go on (the model's output is not finite, or stiff).
        """
        method = _choose("sampling_method", sampling_method, (*ADAPTIVE_SOLVERS, *FIXED_STEP_SOLVERS))
        adaptive = method in ADAPTIVE_SOLVERS
        solver = method if adaptive else FIXED_STEP_SOLVERS[method]
        _check_steps(num_steps)
        if not (atol > 0 and rtol > 0):
            raise ValueError(f"sample_ode: atol={atol}, rtol={rtol}; expected positive numbers")
        try:
            from torchdiffeq import odeint  # here, because it imports SciPy: a second that training does not need
        except ImportError as error:
            raise ImportError("ODE sampling needs torchdiffeq: pip install torchdiffeq") from error
        ends = self.transport.interval(self.transport.sample_eps)
        start, end = ends[::-1] if reverse else ends

        @torch.no_grad()
        def sample(z: Tensor, model_fn: Callable[..., Any], **model_kwargs: Any) -> Tensor:
            x = z.to(torch.promote_types(z.dtype, torch.float32))
            times = torch.linspace(start, end, num_steps, dtype=x.dtype, device=x.device)

            def velocity(t: Tensor, x: Tensor) -> Tensor:
                t = t.expand(x.shape[0])
                return self.transport.velocity(_predict(model_fn, x, t, z.dtype, model_kwargs), x, t)

            # Only the two ends are asked for: the states in between would be kept.
            options: dict[str, Any] = (
                {"step_t": times[-1:]} if adaptive else {"grid_constructor": lambda func, y0, t: times}
            )
            with _evaluating(model_fn):
                try:
                    x = odeint(velocity, x, times[[0, -1]], method=solver, atol=atol, rtol=rtol, options=options)[-1]
                except AssertionError as error:
                    raise RuntimeError(
                        f"sample_ode: {method} cannot go on ({error}): the model's output is not finite, or too stiff"
                        f" for atol={atol}, rtol={rtol}"
                    ) from error
            return x.to(z.dtype)

        return sample

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
    ) -> SampleFn:
        """Follows the SDE dx = (v + w·score) dt + sqrt(2w) dW, which has the marginals of the ODE for any w(t) >= 0.

        Velocity and score come from one evaluation of the model (the published code makes two). Where they are
        infinite at an end of the path and the transport's `sample_eps` is 0, the end is kept 1e-3 away: "sbdm" at
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

        Raises:
            ValueError: an unknown name, fewer than 2 times, a number out of range.
        """
        method = _choose("sampling_method", sampling_method, SDE_METHODS)
        form = "increasing-decreasing" if diffusion_form == "inccreasing-decreasing" else diffusion_form
        form = _choose("diffusion_form", form, DIFFUSION_FORMS)
        last = None if last_step is None else _choose("last_step", last_step, LAST_STEPS)
        _check_steps(num_steps)
        if not diffusion_norm >= 0:
            raise ValueError(f"sample_sde: diffusion_norm={diffusion_norm}; expected at least 0")
        if last is not None and not 0 < last_step_size < 1:
            raise ValueError(f"sample_sde: last_step_size={last_step_size}; expected in (0, 1), or last_step=None")

        transport, path = self.transport, self.transport.path
        start, end = transport.interval(transport.sample_eps)
        if form == "sbdm" and path.pure_noise_at_0:
            start = start or _SINGULAR_EPS
        if last is not None:
            end = 1.0 - last_step_size
        elif method == "heun":
            end = min(end, 1.0 - _SINGULAR_EPS)
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

            def predict(x: Tensor, t: Tensor) -> Tensor:
                return _predict(model_fn, x, t, z.dtype, model_kwargs)

            def diffusion(t: Tensor) -> Tensor:
                return path.diffusion(_per_sample(t, x), form, diffusion_norm)

            def drift(x: Tensor, t: Tensor) -> Tensor:
                prediction = predict(x, t)
                return transport.velocity(prediction, x, t) + diffusion(t) * transport.score(prediction, x, t)

            with _evaluating(model_fn):
                for time in times[:-1]:
                    t = at(time)
                    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device) * dt**0.5
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
                    x = x + transport.velocity(predict(x, t), x, t) * last_step_size
                elif last == "tweedie":
                    (alpha, _), (sigma, _) = path.alpha(_per_sample(t, x)), path.sigma(_per_sample(t, x))
                    x = (x + sigma.square() * transport.score(predict(x, t), x, t)) / alpha
            return x.to(z.dtype)

        return sample


def _per_sample(t: Tensor, x: Tensor) -> Tensor:
    """Times (B,) shaped to broadcast against `x` (B, ...)."""
    return t.view(-1, *[1] * (x.ndim - 1))


def _predict(
    model_fn: Callable[..., Any], x: Tensor, t: Tensor, dtype: torch.dtype, model_kwargs: Mapping[str, Any]
) -> Tensor:
    prediction = model_fn(x.to(dtype), t, **model_kwargs)
    _check_prediction(prediction, x)
    return prediction.to(x.dtype)


def _check_prediction(prediction: object, x: Tensor) -> None:
    if not isinstance(prediction, Tensor):
        raise ValueError(f"the model returned {type(prediction).__name__}; expected a tensor shaped like the samples")
    if prediction.shape != x.shape:
        raise ValueError(
            f"the model returned shape {tuple(prediction.shape)}; expected {tuple(x.shape)}, as the samples"
        )


def _check_steps(num_steps: int) -> None:
    if num_steps < 2:
        raise ValueError(f"num_steps={num_steps}; expected at least 2, both ends included")


def _choose(what: str, name: str, known: Iterable[str]) -> str:
    choice = str(name).lower()
    if choice not in known:
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}")
    return choice


@contextmanager
def _evaluating(model_fn: Callable[..., Any]) -> Iterator[None]:
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
