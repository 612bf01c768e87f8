"""Samples along the probability-flow ODE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .checks import SampleFn, check_steps, choose, evaluating, predict
from .transport import Transport

FIXED_STEP_SOLVERS = {
    "euler": "euler",
    "heun": "heun2",  # torchdiffeq's "heun3" is a third-order relative, its "adaptive_heun" chooses its own steps
    "heun2": "heun2",
    "heun3": "heun3",
    "midpoint": "midpoint",
    "rk4": "rk4",
}
ADAPTIVE_SOLVERS = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")


class ODESampler:
    """The half of `Sampler` that follows the ODE."""

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
        norm: Callable[[Tensor], Tensor] | None = None,
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
            norm: of an adaptive solver's errors, (B, ...) to 0-d; None: the root of the mean square.

        Raises:
            ValueError: an unknown solver, fewer than 2 times, a tolerance that is not positive.
            ImportError: torchdiffeq is not installed.
            RuntimeError: while sampling, an adaptive solver cannot go on (the model's output is not finite, or stiff).
        """
        method = choose("sampling_method", sampling_method, (*ADAPTIVE_SOLVERS, *FIXED_STEP_SOLVERS))
        adaptive = method in ADAPTIVE_SOLVERS
        solver = method if adaptive else FIXED_STEP_SOLVERS[method]
        check_steps(num_steps)
        if not (atol > 0 and rtol > 0):
            raise ValueError(f"sample_ode: atol={atol}, rtol={rtol}; expected positive numbers")
        try:
            from torchdiffeq import odeint  # here, because it imports SciPy: a second that training does not need
        except ImportError as error:
            raise ImportError("ODE sampling needs torchdiffeq: pip install torchdiffeq") from error
        ends = self.transport.interval(self.transport.sample_eps)
        start, end = ends[::-1] if reverse else ends
        low, high = ends

        @torch.no_grad()
        def sample(z: Tensor, model_fn: Callable[..., Any], **model_kwargs: Any) -> Tensor:
            x = z.to(torch.promote_types(z.dtype, torch.float32))
            times = torch.linspace(start, end, num_steps, dtype=x.dtype, device=x.device)
            if self.transport.time_shift != 1:
                times = low + (high - low) * self.transport.shifted((times - low) / (high - low))

            def velocity(t: Tensor, x: Tensor) -> Tensor:
                t = t.expand(x.shape[0])
                return self.transport.velocity(predict(model_fn, x, t, z.dtype, model_kwargs), x, t)

            # Only the two ends are asked for: the states in between would be kept.
            options: dict[str, Any] = (
                {"step_t": times[-1:]} if adaptive else {"grid_constructor": lambda func, y0, t: times}
            )
            if adaptive and norm is not None:
                options["norm"] = norm
            with evaluating(model_fn):
                try:
                    x = odeint(velocity, x, times[[0, -1]], method=solver, atol=atol, rtol=rtol, options=options)[-1]
                except AssertionError as error:
                    raise RuntimeError(
                        f"sample_ode: {method} cannot go on ({error}): the model's output is not finite, or too stiff"
                        f" for atol={atol}, rtol={rtol}"
                    ) from error
            return x.to(z.dtype)

        return sample
