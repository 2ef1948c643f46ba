"""diffusers' schedulers as tables of steps: what the network is told at each, and the noise there.

A scheduler's corruption is linear in image and noise, so its alpha and sigma are read off by giving
it a one and a zero; nothing here knows its formulas, but for what pipelines compute before they ask
a scheduler for its steps.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from drl_data.diffusion_spec import ScheduleSpec
from drl_data.errors import SpecError
from drl_data.schedule import Step

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
class DynamicShift:
    """How a pipeline asks its scheduler for steps: with sigmas of its own or not; and, of one with
    `use_dynamic_shifting`, with the shift `mu`, which grows with the number of image tokens
    (diffusers 0.42, `calculate_shift`)."""

    max_shift: float
    """What the pipeline takes for `max_shift` if the scheduler's configuration has none."""
    own_sigmas: bool
    """Whether the pipeline gives the sigmas itself, from 1 to 1/n in n equal steps, unless the
    scheduler has `use_flow_sigmas`."""

    def arguments(
        self, config: Mapping[str, object], n_steps: int, n_tokens: int
    ) -> dict[str, object]:
        """What `set_timesteps` is given for `n_steps` steps over an image of `n_tokens` tokens."""
        base_tokens, max_tokens, base_shift, max_shift = (
            float(str(config.get(name, default)))
            for name, default in (
                ("base_image_seq_len", 256),
                ("max_image_seq_len", 4096),
                ("base_shift", 0.5),
                ("max_shift", self.max_shift),
            )
        )
        slope = (max_shift - base_shift) / (max_tokens - base_tokens)
        mu = n_tokens * slope + (base_shift - slope * base_tokens)
        shifts = {"mu": mu} if config.get("use_dynamic_shifting") else {}
        if self.own_sigmas and not config.get("use_flow_sigmas"):
            return {"sigmas": np.linspace(1.0, 1 / n_steps, n_steps), **shifts}
        return {"num_inference_steps": n_steps, **shifts}


FLUX_SHIFT = DynamicShift(max_shift=1.15, own_sigmas=True)
SD3_SHIFT = DynamicShift(max_shift=1.16, own_sigmas=False)


@dataclass(frozen=True)
class DiffusersSampler:
    """One of diffusers' schedulers; a `schedule.Sampler`."""

    scheduler: SchedulerMixin
    name: str
    shift: DynamicShift | None = None
    n_tokens: int | None = None
    """Tokens of the image, on which a dynamic shift depends."""

    @classmethod
    def of(
        cls,
        config: Mapping[str, object],
        spec: ScheduleSpec,
        n_tokens: int | None = None,
        *,
        shift: DynamicShift | None = None,
    ) -> DiffusersSampler:
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
        scheduler = scheduler_class(**{k: v for k, v in chosen.items() if k in settings})
        return cls(scheduler, name, shift, n_tokens)

    @property
    def n_timesteps(self) -> int:
        return int(self.scheduler.config.num_train_timesteps)

    @property
    def order(self) -> int:
        return int(self.scheduler.order)

    def times(self, n_steps: int) -> tuple[float, ...]:
        arguments: dict[str, object] = {"num_inference_steps": n_steps}
        flow = self.name in FLOW or self.scheduler.config.get("use_dynamic_shifting")
        if flow and self.shift is not None and self.n_tokens is not None:
            arguments = self.shift.arguments(self.scheduler.config, n_steps, self.n_tokens)
        try:
            self.scheduler.set_timesteps(**arguments)
        except (ValueError, TypeError) as error:
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
