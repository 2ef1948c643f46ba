"""Noise schedules against the published tables and against diffusers' own corruption."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from drl_data.errors import SpecError
from drl_data.schedule import NoiseSchedule, corrupt
from drl_data.spec import ScheduleSpec

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}

# noise levels sigma = sqrt(1 - abar) / sqrt(abar), as the literature tabulates them
SIGMAS = [
    (
        STABLE_DIFFUSION,
        {0: 0.029, 1: 0.041, 25: 0.155, 50: 0.226, 100: 0.344, 201: 0.574, 261: 0.725},
    ),
    (LINEAR, {11: 0.05, 50: 0.176, 90: 0.308, 121: 0.416, 150: 0.522, 250: 0.958, 300: 1.24}),
]


def schedule_of(config: dict[str, object]) -> tuple[DDPMScheduler, NoiseSchedule]:
    scheduler = DDPMScheduler(**config)
    return scheduler, NoiseSchedule(scheduler.alphas_cumprod)


@pytest.mark.parametrize(("config", "table"), SIGMAS)
def test_noise_levels_are_the_published_ones(
    config: dict[str, object], table: dict[int, float]
) -> None:
    _, schedule = schedule_of(config)
    times = schedule.resolve(ScheduleSpec(timesteps=tuple(table)))
    for time, want in zip(times, table.values(), strict=True):
        assert time.sigma / time.alpha == pytest.approx(want, abs=0.0051 if want > 1 else 6e-4)
        assert time.model_time == time.requested


@pytest.mark.parametrize("config", [STABLE_DIFFUSION, LINEAR])
def test_corruption_is_diffusers_own_bit_for_bit(config: dict[str, object]) -> None:
    scheduler, schedule = schedule_of(config)
    clean, noise = torch.randn(2, 1, 4, 8, 8).unbind()
    for time in schedule.resolve(ScheduleSpec(timesteps=tuple(range(0, 1000, 37)))):
        want = scheduler.add_noise(clean, noise, torch.tensor([int(time.requested)]))
        assert torch.equal(corrupt(clean, noise, time), want)


def test_without_noise_the_input_stays_clean() -> None:
    _, schedule = schedule_of(LINEAR)
    clean = torch.randn(1, 3, 4, 4)
    (time,) = schedule.resolve(ScheduleSpec(timesteps=(500,)))
    assert corrupt(clean, None, time) is clean


def test_a_timestep_outside_the_schedule_is_refused() -> None:
    _, schedule = schedule_of(LINEAR)
    with pytest.raises(SpecError, match=r"\[-1, 1000\]: this model has 1000 timesteps.*0\.\.999"):
        schedule.resolve(ScheduleSpec(timesteps=(-1, 5, 1000)))
