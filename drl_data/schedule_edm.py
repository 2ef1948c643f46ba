"""EDM (Karras et al. 2022): noise levels instead of timesteps, and the preconditioning of table 1.

The network F of a denoiser D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) sees c_in x, where
x = x_0 + sigma eps, and is told c_noise. Features are F's, so here

    alpha = c_in,   sigma = c_in * sigma_edm,   model_time = c_noise = ln(sigma_edm) / 4

and `sigma / alpha` is EDM's sigma, the same measure of noise as everywhere else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from drl_data.errors import SpecError
from drl_data.schedule import convert, require_convention
from drl_data.spec import ResolvedTime, ScheduleSpec

EDM_STEPS = 18
"""Steps of the ladder if the spec does not say."""


@dataclass(frozen=True)
class Preconditioning:
    """The four functions of sigma, table 1, column "Ours"."""

    c_skip: float
    c_out: float
    c_in: float
    c_noise: float


def precondition(sigma: float, sigma_data: float = 0.5) -> Preconditioning:
    """EDM's preconditioning at noise level `sigma`, for data of standard deviation `sigma_data`; at
    sigma 0 the network would be told -inf."""
    total = math.hypot(sigma, sigma_data)
    return Preconditioning(
        c_skip=sigma_data**2 / total**2,
        c_out=sigma * sigma_data / total,
        c_in=1 / total,
        c_noise=math.log(sigma) / 4 if sigma else -math.inf,
    )


def sigma_ladder(n_steps: int, sigma_min: float, sigma_max: float, rho: float) -> list[float]:
    """The noise levels of an `n_steps` sampler from clean to noise (eq. 5, reversed): entry 0 is 0,
    entry 1 sigma_min, entry n_steps sigma_max. What DDAE calls "t = 4" is entry 4 of 18."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return [0.0, *((low + i / (n_steps - 1) * (high - low)) ** rho for i in range(n_steps))]


@dataclass(frozen=True)
class EDMSchedule:
    """What diffusers' EDMEulerScheduler configures; the defaults are the paper's."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    rho: float = 7.0

    def resolve(self, spec: ScheduleSpec) -> tuple[ResolvedTime, ...]:
        """Every requested noise level (`edm_sigma`) or position on the ladder (`edm_index`).

        Raises:
            SpecError: for another convention, or no noise at all: c_noise is not finite there.
        """
        require_convention(spec, "EDM preconditioning", "edm_sigma", "edm_index")
        if spec.condition_at != "same" or spec.model_time != "index":
            raise SpecError(
                "schedule.condition_at and model_time: an EDM network is told its own noise level "
                "(c_noise); leave them out"
            )
        if spec.convention == "edm_sigma":
            sigmas = [float(t) for t in spec.timesteps]
        else:
            n_steps = spec.n_steps or EDM_STEPS
            ladder = sigma_ladder(n_steps, self.sigma_min, self.sigma_max, self.rho)
            bad = [t for t in spec.timesteps if t != int(t) or not 1 <= t <= n_steps]
            if bad:
                raise SpecError(
                    f"schedule.timesteps {bad}: want 1 (least noise) .. {n_steps} (edm_index)"
                )
            sigmas = [ladder[int(t)] for t in spec.timesteps]
        if min(sigmas) <= 0:
            raise SpecError(
                f"schedule.timesteps {list(spec.timesteps)}: want noise levels above 0; for a "
                "clean image say `noise: {kind: none}` and the level that the network is told"
            )
        return tuple(
            self._resolved(t, spec.convention, sigma)
            for t, sigma in zip(spec.timesteps, sigmas, strict=True)
        )

    def predicted(self, what: str, output: Tensor, x: Tensor, time: ResolvedTime) -> Tensor:
        """The preconditioned F for x = c_in (x_0 + sigma eps), as x0 = D, eps or v."""
        c = precondition(time.sigma / time.alpha, self.sigma_data)
        clean = c.c_skip * x / time.alpha + c.c_out * output
        return convert(what, clean, x, time, "sample")

    def target(self, clean: Tensor, noise: Tensor, time: ResolvedTime) -> Tensor:
        """F's target (x_0 - c_skip x) / c_out, of unit variance at every level (eq. 8)."""
        sigma = time.sigma / time.alpha
        c = precondition(sigma, self.sigma_data)
        return (clean - c.c_skip * (clean + sigma * noise)) / c.c_out

    def _resolved(self, requested: float, convention: str, sigma: float) -> ResolvedTime:
        c = precondition(sigma, self.sigma_data)
        return ResolvedTime(
            requested=requested,
            convention=convention,
            model_time=c.c_noise,
            alpha=c.c_in,
            sigma=c.c_in * sigma,
        )
