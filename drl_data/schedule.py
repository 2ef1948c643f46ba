"""Noise schedules: timestep conventions to (model time, alpha, sigma), and the corruption itself.

x_t = alpha x_0 + sigma eps,    alpha = sqrt(abar_t),  sigma = sqrt(1 - abar_t)
                                (Ho et al. 2020, eq. 4: variance-preserving diffusion)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from drl_data.errors import SpecError
from drl_data.spec import ResolvedTime, ScheduleSpec


@dataclass(frozen=True)
class NoiseSchedule:
    """A variance-preserving schedule: abar_0 .. abar_{n-1}, float32, from clean to noise."""

    alphas_cumprod: Tensor

    def resolve(self, spec: ScheduleSpec) -> tuple[ResolvedTime, ...]:
        """Every requested timestep with what the network is told and how much noise is added.

        Raises:
            SpecError: if a timestep lies outside the schedule.
        """
        n = len(self.alphas_cumprod)
        if spec.convention == "flow":
            raise SpecError("schedule.convention flow: this model diffuses; want ddpm_index")
        whole = [t for t in spec.timesteps if isinstance(t, int)]
        bad = [t for t in spec.timesteps if not (isinstance(t, int) and 0 <= t < n)]
        if bad:
            raise SpecError(
                f"schedule.timesteps {bad}: this model has {n} timesteps; want 0..{n - 1} "
                f"({spec.convention})"
            )
        return tuple(self._ddpm_index(t) for t in whole)

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
