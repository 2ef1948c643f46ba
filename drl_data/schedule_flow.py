"""Flow models (Lipman et al. 2023; Liu et al. 2023): timesteps to (model time, alpha, sigma).

x_t = (1 - t) x_0 + t eps,    alpha = 1 - t,  sigma = t,    t from 0 (clean) to 1 (noise)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from drl_data.diffusion_spec import ScheduleSpec
from drl_data.errors import SpecError
from drl_data.schedule import (
    Sampler,
    Step,
    convert,
    require_convention,
    require_sampler,
    resolve_steps,
    sampler_step,
)
from drl_data.spec import ResolvedTime

CONVENTIONS = ("flow", "none", "scheduler_position", "descending_index")


class MakeSampler(Protocol):
    """Makes the scheduler that a spec counts the steps of."""

    def __call__(self, spec: ScheduleSpec, n_tokens: int | None = None) -> Sampler:
        """The scheduler, for an image of `n_tokens` tokens where its steps depend on that."""


@dataclass(frozen=True)
class FlowSchedule:
    """A straight path from image to noise; the network is told `time_scale` * t.

    SD3 and Sana are told 1000 t; Flux is told t and multiplies by itself. Z-Image is told how clean
    its input is, 1 - t.
    """

    time_scale: float = 1000.0
    make_sampler: MakeSampler | None = None
    """The scheduler that a spec counts the steps of."""
    counts_from_noise: bool = False
    """Whether the network is told `time_scale` * (1 - t) instead."""

    def for_tokens(self, n_tokens: int) -> FlowSchedule:
        """The same for an image of `n_tokens` tokens (Esser et al. 2024, section 5.3.2: more pixels
        want more noise); only schedulers with `use_dynamic_shifting` mind."""
        if self.make_sampler is None:
            return self
        return replace(self, make_sampler=partial(self.make_sampler, n_tokens=n_tokens))

    def resolve(self, spec: ScheduleSpec) -> tuple[ResolvedTime, ...]:
        """Every requested timestep with what the network is told and how much noise is added.

        Raises:
            SpecError: for another convention, or a timestep outside 0..1.
        """
        require_convention(spec, "a flow from 0 (clean) to 1 (noise)", *CONVENTIONS)
        if spec.model_time != "index":
            raise SpecError(
                f"schedule.model_time {spec.model_time}: a flow model is told its time in the one "
                "unit that its family has; leave it out"
            )
        return resolve_steps(spec, lambda field, values: self._steps(spec, field, values))

    def predicted(self, what: str, output: Tensor, x: Tensor, time: ResolvedTime) -> Tensor:
        """The velocity v = eps - x_0 that the network puts out, as x0, eps or v."""
        return output if what == "v" else convert(what, output, x, time, "flow_prediction")

    def target(self, clean: Tensor, noise: Tensor, time: ResolvedTime) -> Tensor:
        """The velocity eps - x_0."""
        return noise - clean

    def _steps(self, spec: ScheduleSpec, field: str, values: Sequence[float]) -> list[Step]:
        if spec.convention == "none":
            return [self._at(0) for _ in values]
        if spec.convention != "flow":
            sampler = require_sampler(self.make_sampler, spec)
            return [self._of_sampler(sampler, sampler_step(sampler, spec, v)) for v in values]
        bad = [t for t in values if not 0 <= t <= 1]
        if bad:
            raise SpecError(
                f"schedule.{field} {bad}: want 0 (clean) to 1 (noise) with convention: flow; "
                "a step of 1000 is divided by 1000"
            )
        return [self._at(t, spec.shift or 1.0) for t in values]

    def _at(self, t: float, shift: float = 1.0) -> Step:
        t = shift * t / (1 + (shift - 1) * t)  # Esser et al. 2024, eq. 23
        # In float32, as diffusers' `scale_noise` does, to be bit-equal.
        sigma = torch.tensor(t, dtype=torch.float32)
        told = self._from_noise(1000 * sigma, 1000) if self.counts_from_noise else sigma
        return Step(float(told * self.time_scale), float(1.0 - sigma), float(sigma))

    def _of_sampler(self, sampler: Sampler, step: Step) -> Step:
        """A scheduler's step, whose time runs to its number of timesteps."""
        if abs(step.alpha + step.sigma - 1) > 1e-4:
            raise SpecError(
                f"schedule.scheduler {sampler.name}: alpha {step.alpha:.4g} and sigma "
                f"{step.sigma:.4g} are no flow's, which add up to 1; want one that this model was "
                "made with, for example FlowMatchEulerDiscreteScheduler"
            )
        n = sampler.n_timesteps
        if self.counts_from_noise:
            told = float(self._from_noise(torch.tensor(step.time, dtype=torch.float32), n))
        else:
            told = step.time / n
        return Step(told * self.time_scale, step.alpha, step.sigma)

    @staticmethod
    def _from_noise(time: Tensor, n: int) -> Tensor:
        """1 - t for a scheduler's time n t, rounded as Z-Image's pipeline rounds it in float32."""
        return (n - time) / n
