"""Flow models (Lipman et al. 2023; Liu et al. 2023): timesteps to (model time, alpha, sigma).

x_t = (1 - t) x_0 + t eps,    alpha = 1 - t,  sigma = t,    t from 0 (clean) to 1 (noise)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from drl_data.errors import SpecError
from drl_data.spec import ResolvedTime, ScheduleSpec


@dataclass(frozen=True)
class FlowSchedule:
    """A straight path from image to noise; the network is told `time_scale` * t.

    SD3 and Sana are told 1000 t; Flux is told t and multiplies by itself.
    """

    time_scale: float = 1000.0

    def resolve(self, spec: ScheduleSpec) -> tuple[ResolvedTime, ...]:
        """Every requested timestep with what the network is told and how much noise is added.

        Raises:
            SpecError: for another convention, or a timestep outside 0..1.
        """
        if spec.convention != "flow":
            raise SpecError(
                f"schedule.convention {spec.convention}: this is a flow model; want "
                "`convention: flow` and timesteps from 0 (clean) to 1 (noise)"
            )
        bad = [t for t in spec.timesteps if not 0 <= t <= 1]
        if bad:
            raise SpecError(
                f"schedule.timesteps {bad}: want 0 (clean) to 1 (noise) with convention: flow; "
                "a step of 1000 is divided by 1000"
            )
        return tuple(self._flow(t, spec.shift or 1.0) for t in spec.timesteps)

    def _flow(self, requested: float, shift: float) -> ResolvedTime:
        t = shift * requested / (1 + (shift - 1) * requested)  # Esser et al. 2024, eq. 23
        # In float32, as diffusers' `scale_noise` does, to be bit-equal.
        sigma = torch.tensor(t, dtype=torch.float32)
        return ResolvedTime(
            requested=requested,
            convention="flow",
            model_time=float(sigma * self.time_scale),
            alpha=float(1.0 - sigma),
            sigma=float(sigma),
        )
