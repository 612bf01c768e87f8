"""Transport, and how samples are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from . import at_least, positive, require


@dataclass(frozen=True)
class TransportConfig:
    """The interpolant between noise and data, and what the model predicts."""

    path_type: Literal["linear", "gvp", "vp"] = "linear"
    prediction: Literal["velocity", "noise", "score"] = "velocity"
    loss_weight: Literal["velocity", "likelihood"] | None = None
    train_eps: float | None = None
    """Distance kept from both ends of the time axis in training; None: the published choice for the path."""
    sample_eps: float | None = None
    """The same in sampling."""
    time_sampling: Literal["uniform", "logit-normal"] = "uniform"
    """How training times are drawn; logit-normal (Stable Diffusion 3) favours the middle."""
    logit_mean: float = 0.0
    """Of logit-normal times; below 0 lies more noise."""
    logit_std: float = 1.0
    """Of logit-normal times."""
    time_shift: float = 1.0
    """Above 1, times in training and of fixed-step samplers move towards noise, as long sequences need."""

    def validate(self) -> None:
        """Checks ranges.

        Raises:
            ConfigError: naming the flag, its value and what it may be.
        """
        positive(logit_std=self.logit_std, time_shift=self.time_shift)


@dataclass(frozen=True)
class SamplingConfig:
    """How samples are drawn."""

    sampler: Literal["ode", "sde"] = "ode"
    solver: Literal["dopri5", "heun", "euler"] = "dopri5"
    """ode: any of the three; sde: euler (Euler-Maruyama) or heun."""
    sampling_steps: int = 50
    """Times from noise to data that a fixed-step solver visits; dopri5 chooses its own steps."""
    cfg_scale: float = 1.0
    """Classifier-free guidance; 1 is off."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Guide only at times within these bounds (0: noise, 1: data)."""
    diffusion_form: str = "sigma"
    """Noise strength of the SDE over time."""
    diffusion_norm: float = 1.0
    """Factor on that strength."""

    def validate(self) -> None:
        """Checks ranges.

        Raises:
            ConfigError: naming the flag, its value and what it may be.
        """
        at_least(2, sampling_steps=self.sampling_steps)
        low, high = self.guidance_interval
        require(
            0 <= low <= high <= 1, f"--guidance-interval {low} {high}: expected two times in [0, 1], the smaller first"
        )
        require(
            self.sampler == "ode" or self.solver != "dopri5", "--sampler sde needs --solver euler or heun, not dopri5"
        )
