"""diffusers' schedulers as tables of steps: what the network is told at each, and the noise there.

A scheduler's corruption is linear in image and noise, so its alpha and sigma are read off by giving
it a one and a zero; nothing here knows its formulas.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from drl_data.errors import SpecError
from drl_data.schedule import Step
from drl_data.spec import ScheduleSpec

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

VARIANCE_PRESERVING = (
    "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "DDIMScheduler", "DDPMScheduler",
    "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
    "LCMScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
"""Schedulers that corrupt by `add_noise` and `scale_model_input`."""

FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
"""Schedulers that corrupt by `scale_noise`."""


@dataclass(frozen=True)
class DiffusersSampler:
    """One of diffusers' schedulers; a `schedule.Sampler`."""

    scheduler: SchedulerMixin
    name: str

    @classmethod
    def of(cls, config: Mapping[str, object], spec: ScheduleSpec) -> DiffusersSampler:
        """The scheduler that `spec` names, else that of scheduler_config.json; its settings are
        those of the file, with what `spec.scheduler_config` has different.

        Raises:
            SpecError: for a scheduler or a setting that diffusers does not have.
        """
        import diffusers

        name = spec.scheduler or str(config.get("_class_name"))
        known = (*VARIANCE_PRESERVING, *FLOW)
        if name not in known:
            raise SpecError(f"schedule.scheduler {name!r}: want one of {', '.join(known)}")
        scheduler_class = getattr(diffusers, name)
        settings = list(inspect.signature(scheduler_class.__init__).parameters)[1:]
        for setting in spec.scheduler_config:
            if setting not in settings:
                near = difflib.get_close_matches(setting, settings, n=3, cutoff=0.3) or settings
                raise SpecError(
                    f"schedule.scheduler_config {setting!r}: {name} has no such setting; nearest: "
                    f"{', '.join(near)}"
                )
        chosen = {**config, **spec.scheduler_config}
        return cls(scheduler_class(**{k: v for k, v in chosen.items() if k in settings}), name)

    @property
    def n_timesteps(self) -> int:
        return int(self.scheduler.config.num_train_timesteps)

    @property
    def order(self) -> int:
        return int(self.scheduler.order)

    def times(self, n_steps: int) -> tuple[float, ...]:
        try:
            self.scheduler.set_timesteps(n_steps)
        except ValueError as error:
            raise SpecError(f"schedule: {self.name} with {n_steps} steps: {error}") from error
        return tuple(self.scheduler.timesteps.tolist())

    def step(self, n_steps: int, position: int) -> Step:
        self.times(n_steps)  # anew, because scheduler objects remember the step they are at
        time = self.scheduler.timesteps[position]
        one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
        try:
            alpha, sigma = (self._corrupted(*x, time) for x in ((one, zero), (zero, one)))
        except IndexError as error:  # PNDM with steps_offset 1 has a step past its own schedule
            raise SpecError(
                f"schedule: step {position} of {self.name} with {n_steps} steps is the time "
                f"{float(time):g}; the model has 0..{self.n_timesteps - 1}"
            ) from error
        return Step(time=float(time), alpha=float(alpha), sigma=float(sigma))

    def _corrupted(
        self, clean: torch.Tensor, noise: torch.Tensor, time: torch.Tensor
    ) -> torch.Tensor:
        """What the network would be given, [1, 1, 1, 1]."""
        if self.name in FLOW:
            flowed: torch.Tensor = self.scheduler.scale_noise(clean, time[None], noise)
            return flowed
        noisy = self.scheduler.add_noise(clean, noise, time[None])
        scaled: torch.Tensor = self.scheduler.scale_model_input(noisy, time)
        return scaled
