"""EDM (Karras et al. 2022): noise levels instead of timesteps, and the preconditioning of table 1.

The network F of a denoiser D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) sees c_in x, where
x = x_0 + sigma eps, and is told c_noise. Features are F's, so here

    alpha = c_in,   sigma = c_in * sigma_edm,   model_time = c_noise = ln(sigma_edm) / 4

and `sigma / alpha` is EDM's sigma, the same measure of noise as everywhere else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from drl_data.diffusion_spec import ScheduleSpec
from drl_data.errors import SpecError
from drl_data.schedule import Step, convert, require_convention, resolve_steps
from drl_data.spec import ResolvedTime

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

        `condition_at` is in the same units: the network is told the c_noise of its levels. The
        input keeps the c_in of the noise that is in it, so that its variance is what the network
        knows. Level 0, the clean image scaled by c_in, has no c_noise and needs `condition_at`.

        Raises:
            SpecError: for another convention, or a level that the network cannot be told.
        """
        require_convention(spec, "EDM preconditioning", "edm_sigma", "edm_index")
        if spec.model_time != "index":
            raise SpecError(
                f"schedule.model_time {spec.model_time}: an EDM network is told ln(sigma) / 4 "
                "(c_noise); leave it out"
            )
        return resolve_steps(spec, lambda field, values: self._steps(spec, field, values))

    def _steps(self, spec: ScheduleSpec, field: str, values: Sequence[float]) -> list[Step]:
        """Places with noise; of `timesteps`, also without if the network is told another."""
        may_be_clean = field == "timesteps" and spec.condition_at != "same"
        if spec.convention == "edm_sigma":
            sigmas = [float(t) for t in values]
        else:
            n_steps = spec.n_steps or EDM_STEPS
            if n_steps < 2:
                raise SpecError(f"schedule.n_steps {n_steps}: a ladder has at least 2 levels")
            ladder = sigma_ladder(n_steps, self.sigma_min, self.sigma_max, self.rho)
            first = 0 if may_be_clean else 1
            bad = [t for t in values if t != int(t) or not first <= t <= n_steps]
            if bad:
                least = "clean" if may_be_clean else "least noise"
                raise SpecError(
                    f"schedule.{field} {bad}: want {first} ({least}) .. {n_steps} (edm_index)"
                )
            sigmas = [ladder[int(t)] for t in values]
        if min(sigmas) < 0 or (min(sigmas) == 0 and not may_be_clean):
            raise SpecError(
                f"schedule.{field} {list(values)}: want noise levels above 0; for a clean image "
                "say in condition_at which level the network is told"
            )
        return [self._at(sigma) for sigma in sigmas]

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

    def _at(self, sigma: float) -> Step:
        if sigma == 0:
            return Step(time=-math.inf, alpha=1 / self.sigma_data, sigma=0.0)
        c = precondition(sigma, self.sigma_data)
        return Step(time=c.c_noise, alpha=c.c_in, sigma=c.c_in * sigma)
