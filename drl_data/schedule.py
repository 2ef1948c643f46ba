"""Noise schedules: timestep conventions to (model time, alpha, sigma), and the corruption itself.

x_t = alpha x_0 + sigma eps,    alpha = sqrt(abar_t),  sigma = sqrt(1 - abar_t)
                                (Ho et al. 2020, eq. 4: variance-preserving diffusion)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from drl_data.errors import SpecError
from drl_data.spec import ResolvedTime, ScheduleSpec

Prediction = Literal["epsilon", "sample", "v_prediction", "flow_prediction"]
"""What a network's output means: eps, x_0, alpha eps - sigma x_0, or eps - x_0."""


@dataclass(frozen=True)
class NoiseSchedule:
    """A variance-preserving schedule: abar_0 .. abar_{n-1}, float32, from clean to noise."""

    alphas_cumprod: Tensor
    prediction: Prediction = "epsilon"

    def resolve(self, spec: ScheduleSpec) -> tuple[ResolvedTime, ...]:
        """Every requested timestep with what the network is told and how much noise is added.

        Raises:
            SpecError: if a timestep lies outside the schedule.
        """
        n = len(self.alphas_cumprod)
        bad = [t for t in spec.timesteps if not 0 <= t < n]
        if bad:
            raise SpecError(
                f"schedule.timesteps {bad}: this model has {n} timesteps; want 0..{n - 1} "
                f"({spec.convention})"
            )
        return tuple(self._ddpm_index(t) for t in spec.timesteps)

    def _ddpm_index(self, t: int) -> ResolvedTime:
        # The square roots are taken in float32, as diffusers' `add_noise` does, to be bit-equal.
        abar = self.alphas_cumprod[t]
        return ResolvedTime(
            requested=t,
            convention="ddpm_index",
            model_time=t,
            alpha=float(abar**0.5),
            sigma=float((1 - abar) ** 0.5),
        )


def corrupt(clean: Tensor, noise: Tensor | None, time: ResolvedTime) -> Tensor:
    """x_t = alpha x_0 + sigma eps for [b, c, h, w]; without noise, x_0 as it is."""
    return clean if noise is None else time.alpha * clean + time.sigma * noise


def to_x0(output: Tensor, x: Tensor, time: ResolvedTime, prediction: Prediction) -> Tensor:
    """The clean image that the network's `output` for x_t means; all [b, c, h, w]."""
    if prediction == "epsilon":
        return (x - time.sigma * output) / time.alpha
    if prediction == "sample":
        return output
    if prediction == "v_prediction":  # Salimans and Ho 2022, appendix D
        return time.alpha * x - time.sigma * output
    return x - time.sigma * output


def to_eps(output: Tensor, x: Tensor, time: ResolvedTime, prediction: Prediction) -> Tensor:
    """The noise that the network's `output` for x_t means; all [b, c, h, w]."""
    if prediction == "epsilon":
        return output
    if prediction == "sample":
        return (x - time.alpha * output) / time.sigma
    if prediction == "v_prediction":
        return time.alpha * output + time.sigma * x
    return x + time.alpha * output


def to_v(output: Tensor, x: Tensor, time: ResolvedTime, prediction: Prediction) -> Tensor:
    """v = alpha eps - sigma x_0 (Salimans and Ho 2022) that the network's `output` means."""
    if prediction == "v_prediction":
        return output
    eps, x0 = (to(output, x, time, prediction) for to in (to_eps, to_x0))
    return time.alpha * eps - time.sigma * x0
