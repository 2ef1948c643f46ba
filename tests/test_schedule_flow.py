"""Flow models among the other schedules: a scheduler's steps, and what is told apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from drl_data.backbones import ModelFolder
from drl_data.backbones.loader import load_flow_schedule, load_schedule
from drl_data.errors import SpecError
from drl_data.schedule_flow import FlowSchedule
from drl_data.spec import BackboneSpec, NoiseSpec, ScheduleSpec
from drl_data.tiny_models import save_tiny_ddpm, save_tiny_flux, save_tiny_sd3


@pytest.fixture(scope="session")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> FlowSchedule:
    """SD3's own: FlowMatchEulerDiscreteScheduler with shift 3."""
    return flow(save_tiny_sd3(tmp_path_factory.mktemp("flow") / "sd3"))


def flow(path: Path, time_scale: float = 1000.0) -> FlowSchedule:
    return load_flow_schedule(ModelFolder.find(BackboneSpec(model=str(path))), time_scale)


def steps(position: int, **changes: object) -> ScheduleSpec:
    return ScheduleSpec.model_validate(
        {
            "convention": "scheduler_position",
            "timesteps": (position,),
            "n_steps": 28,
            **changes,
        }
    )


def test_position_in_the_schedulers_steps_is_seg4diffs(sd3: FlowSchedule) -> None:
    (time,) = sd3.resolve(steps(-8))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(28)
    assert time.model_time == pytest.approx(float(scheduler.timesteps[-8]), rel=1e-7)
    assert round(time.model_time) == 515
    assert time.sigma == float(scheduler.sigmas[:-1][-8])
    assert time.alpha == pytest.approx(1 - time.sigma, abs=1e-7)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_descending_index_is_vidfm3ds(sd3: FlowSchedule) -> None:
    """Wan's scheduler is UniPC, whose ladder of sigmas is another and whose times are whole."""
    spec = ScheduleSpec(
        convention="descending_index",
        timesteps=(749,),
        scheduler="UniPCMultistepScheduler",
        scheduler_config={"use_flow_sigmas": True, "flow_shift": 3.0},
    )
    (time,) = sd3.resolve(spec)
    assert time.model_time == 502
    assert time.sigma == pytest.approx(0.502, abs=5e-4)


def test_steps_are_told_in_the_familys_unit(tmp_path: Path) -> None:
    """Flux's pipeline divides the scheduler's time by 1000."""
    spec = steps(-8, scheduler_config={"use_dynamic_shifting": False, "shift": 3.0})
    schedule = flow(save_tiny_flux(tmp_path / "flux"), 1.0)
    (time,) = schedule.resolve(spec)
    assert time.model_time == pytest.approx(0.515, abs=1e-3)
    with pytest.raises(SpecError, match="use_dynamic_shifting"):
        schedule.resolve(steps(-8))


def test_the_network_can_be_told_another_time_than_the_noises() -> None:
    spec = ScheduleSpec(convention="flow", timesteps=(0.25, 0.5), condition_at=(0,))
    first, second = FlowSchedule().resolve(spec)
    assert (first.sigma, second.sigma) == (0.25, 0.5)
    assert first.model_time == second.model_time == 0


def test_no_convention_of_time_is_a_clean_image_at_time_0() -> None:
    (time,) = FlowSchedule().resolve(ScheduleSpec(convention="none", timesteps=(0,)))
    assert (time.model_time, time.alpha, time.sigma) == (0, 1, 0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (steps(5, convention="generation_label"), "a flow from 0 .* want flow or none or sched"),
        (steps(28), r"has no step 28; want -28\.\.27"),
        (steps(5, scheduler="DDIMScheduler"), "DDIMScheduler: alpha .* are no flow's"),
        (
            ScheduleSpec(convention="flow", timesteps=(0.5,), model_time="fraction"),
            "model_time fraction: a flow model is told",
        ),
        (
            ScheduleSpec(convention="flow", timesteps=(0.5,), condition_at=(500,)),
            r"condition_at \[500\]: want 0 \(clean\)",
        ),
    ],
)
def test_what_a_flow_has_not_is_refused(
    sd3: FlowSchedule, spec: ScheduleSpec, message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        sd3.resolve(spec)


def test_without_a_scheduler_there_are_no_steps_to_count() -> None:
    with pytest.raises(SpecError, match="comes without one: use ddpm_index, or flow"):
        FlowSchedule().resolve(steps(5))


def test_the_schedule_of_a_folder_is_that_of_its_scheduler(tmp_path: Path) -> None:
    path = save_tiny_ddpm(tmp_path / "unet")
    folder = ModelFolder.find(BackboneSpec(model=str(path)))
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(path / "scheduler")
    schedule = load_schedule(folder)
    assert isinstance(schedule, FlowSchedule)
    assert round(schedule.resolve(steps(-8))[0].model_time) == 515
    DDIMScheduler().save_pretrained(path / "scheduler")
    assert json.loads((path / "scheduler" / "scheduler_config.json").read_text())
    assert not isinstance(load_schedule(folder), FlowSchedule)


def test_shift_belongs_to_flow_alone() -> None:
    with pytest.raises(ValueError, match="shift has a meaning with convention: flow only"):
        ScheduleSpec(timesteps=(5,), shift=3.0)


def test_noise_of_one_timestep_may_be_a_fraction() -> None:
    """Flow times are no whole numbers: 0.26 and 0.27 must not share a draw."""
    from drl_data.noise import batch_noise

    spec = NoiseSpec(per_timestep=True)
    draws = [batch_noise(spec, ["a"], (1, 2, 2), timestep=t) for t in (0.26, 0.27, 0.26)]
    assert all(draw is not None for draw in draws)
    assert draws[0].tolist() == draws[2].tolist() != draws[1].tolist()
