"""Interpolants between noise and data: x_t = alpha(t)·x1 + sigma(t)·x0, x1 the data, x0 standard normal noise.

Time runs from 0 (noise) to 1 (data), as in SiT (Ma et al. 2024, arXiv:2401.08740, sections 2 and 3). The three things
that a model can predict, all conditional means given x_t, are tied together by

    velocity v = E[alpha'·x1 + sigma'·x0] = (alpha'/alpha)·x_t + rate·s
    score    s = grad log p_t(x_t) = -E[x0] / sigma
    rate       = (alpha'/alpha)·sigma² - sigma·sigma'

Every method takes times shaped to broadcast against the samples, (B, 1, 1, 1) for images. At the ends of [0, 1] some of
the quotients are infinite; `Transport` keeps away from there where it matters.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

DIFFUSION_FORMS = ("constant", "sbdm", "sigma", "linear", "decreasing", "increasing-decreasing")


def per_sample(t: Tensor, x: Tensor) -> Tensor:
    """Times (B,) shaped to broadcast against `x` (B, ...)."""
    return t.view(-1, *[1] * (x.ndim - 1))


class Interpolant(ABC):
    """An interpolant, and what follows from it for any model."""

    pure_noise_at_0 = True
    """alpha(0) = 0: x_0 is the noise itself, and alpha'/alpha is infinite there."""

    @abstractmethod
    def alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The coefficient of the data and its time derivative."""

    @abstractmethod
    def sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The coefficient of the noise and its time derivative."""

    @abstractmethod
    def d_log_alpha(self, t: Tensor) -> Tensor:
        """alpha'/alpha."""

    def rate(self, t: Tensor) -> Tensor:
        """The factor of the score in the velocity, which is also the diffusion of the SDE that noises the data."""
        sigma, d_sigma = self.sigma(t)
        return self.d_log_alpha(t) * sigma.square() - sigma * d_sigma

    def interpolate(self, t: Tensor, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and the velocity on the way from `x0` to `x1`."""
        (alpha, d_alpha), (sigma, d_sigma) = self.alpha(t), self.sigma(t)
        return alpha * x1 + sigma * x0, d_alpha * x1 + d_sigma * x0

    def velocity_from_score(self, score: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The velocity at x_t = `x`; infinite at t = 0 where that is pure noise."""
        return self.d_log_alpha(t) * x + self.rate(t) * score

    def score_from_velocity(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The score at x_t = `x`; infinite at t = 1."""
        # The relation above times alpha/alpha': sampling starts at t = 0, where alpha'/alpha may be infinite.
        (alpha, d_alpha), (sigma, d_sigma) = self.alpha(t), self.sigma(t)
        ratio = alpha / d_alpha
        return (ratio * velocity - x) / (sigma.square() - ratio * d_sigma * sigma)

    def diffusion(self, t: Tensor, form: str, norm: float = 1.0) -> Tensor:
        """The diffusion w(t) of the sampling SDE dx = (v + w·s) dt + sqrt(2w) dW; all w >= 0 have the same marginals.

        Args:
            t: times.
            form: one of `DIFFUSION_FORMS`; "sbdm" is that of the noising SDE, `rate`.
            norm: its magnitude.
        """
        if form == "constant":
            return torch.full_like(t, norm)
        if form == "sbdm":
            return norm * self.rate(t)
        if form == "sigma":
            return norm * self.sigma(t)[0]
        if form == "linear":
            return norm * (1 - t)
        if form == "decreasing":
            return 0.25 * (norm * torch.cos(math.pi * t) + 1).square()
        if form == "increasing-decreasing":
            return norm * torch.sin(math.pi * t).square()
        raise ValueError(f"unknown diffusion form {form!r}; known: {', '.join(DIFFUSION_FORMS)}")


class LinearInterpolant(Interpolant):
    """alpha = t, sigma = 1 - t: rectified flow."""

    def alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficient t, slope 1."""
        return t, torch.ones_like(t)

    def sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficient 1 - t, slope -1."""
        return 1 - t, -torch.ones_like(t)

    def d_log_alpha(self, t: Tensor) -> Tensor:
        """1 / t."""
        return 1 / t


class GVPInterpolant(Interpolant):
    """alpha = sin(pi t / 2), sigma = cos(pi t / 2): generalised variance preserving, alpha² + sigma² = 1."""

    def alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """A quarter of a sine."""
        angle = t * (math.pi / 2)
        return torch.sin(angle), math.pi / 2 * torch.cos(angle)

    def sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """A quarter of a cosine."""
        angle = t * (math.pi / 2)
        return torch.cos(angle), -math.pi / 2 * torch.sin(angle)

    def d_log_alpha(self, t: Tensor) -> Tensor:
        """(pi / 2) / tan(pi t / 2)."""
        return math.pi / 2 / torch.tan(t * (math.pi / 2))


class VPInterpolant(Interpolant):
    """DDPM's variance-preserving diffusion in continuous time: (log alpha)' = beta(t) / 2 and sigma² = 1 - alpha².

    Here beta falls linearly from `beta_max` at t = 0 to `beta_min` at t = 1 (Song et al. 2021, arXiv:2011.13456, with
    time reversed). alpha(0) is 0.0066: noise with a trace of the data.
    """

    pure_noise_at_0 = False
    beta_min = 0.1
    beta_max = 20.0

    def _log_alpha(self, t: Tensor) -> Tensor:
        left = 1 - t
        return -0.25 * left.square() * (self.beta_max - self.beta_min) - 0.5 * left * self.beta_min

    def alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The exponential of the integral of -beta / 2 from t to 1."""
        alpha = self._log_alpha(t).exp()
        return alpha, alpha * self.d_log_alpha(t)

    def sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(1 - alpha²); its derivative is infinite at t = 1."""
        # expm1: at t = 1 - 1e-5, where training ends, sqrt(1 - exp(...)) in fp32 is 1.4 % off.
        twice = 2 * self._log_alpha(t)
        sigma = (-torch.expm1(twice)).sqrt()
        return sigma, -twice.exp() * self.d_log_alpha(t) / sigma

    def d_log_alpha(self, t: Tensor) -> Tensor:
        """beta(t) / 2."""
        return 0.5 * (self.beta_min + (1 - t) * (self.beta_max - self.beta_min))

    def rate(self, t: Tensor) -> Tensor:
        """beta(t) / 2, to which the general expression reduces."""
        return self.d_log_alpha(t)


INTERPOLANTS: dict[str, type[Interpolant]] = {"linear": LinearInterpolant, "gvp": GVPInterpolant, "vp": VPInterpolant}
