"""Noise schedules: timestep conventions to (model time, alpha, sigma), and the corruption itself.

x_t = alpha x_0 + sigma eps,    alpha = sqrt(abar_t),  sigma = sqrt(1 - abar_t)
                                (Ho et al. 2020, eq. 4: variance-preserving diffusion)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from drl_data.errors import SpecError
from drl_data.spec import ResolvedTime, ScheduleSpec


class Schedule(Protocol):
    """What a backbone knows of time: it resolves requested timesteps in its own conventions."""

    def resolve(self, spec: ScheduleSpec) -> tuple[ResolvedTime, ...]:
        """Every requested timestep with what the network is told and how much noise is added.

        Raises:
            SpecError: for a convention that is not its own, or a timestep outside of it.
        """


def require_convention(spec: ScheduleSpec, kind: str, *conventions: str) -> None:
    """Raise SpecError if a schedule is asked in a convention that is not its own."""
    if spec.convention not in conventions:
        raise SpecError(
            f"schedule.convention {spec.convention}: this model has {kind}; want "
            f"{' or '.join(conventions)}"
        )


class NoSchedule:
    """No noise and no time: encoders see the clean image."""

    def resolve(self, spec: ScheduleSpec) -> tuple[ResolvedTime, ...]:
        """One pseudo-timestep, 0.

        Raises:
            SpecError: if any other is asked for.
        """
        require_convention(spec, "no noise schedule", "none")
        if spec.timesteps != (0,):
            raise SpecError(
                f"schedule.timesteps {list(spec.timesteps)}: without noise there is one, 0; leave "
                "`timesteps` out"
            )
        return (ResolvedTime(requested=0, convention="none", model_time=0, alpha=1.0, sigma=0.0),)


@dataclass(frozen=True)
class NoiseSchedule:
    """A variance-preserving schedule: abar_0 .. abar_{n-1}, float32, from clean to noise."""

    alphas_cumprod: Tensor

    def resolve(self, spec: ScheduleSpec) -> tuple[ResolvedTime, ...]:
        """Every requested timestep with what the network is told and how much noise is added.

        Raises:
            SpecError: if a timestep lies outside the schedule, or is no whole number.
        """
        require_convention(spec, "a schedule of discrete timesteps", "ddpm_index")
        n = len(self.alphas_cumprod)
        bad = [t for t in spec.timesteps if not 0 <= t < n or t != int(t)]
        if bad:
            raise SpecError(
                f"schedule.timesteps {bad}: this model has {n} timesteps; want 0..{n - 1} "
                f"({spec.convention})"
            )
        return tuple(self._ddpm_index(int(t)) for t in spec.timesteps)

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
