"""Flow models among the other schedules: a scheduler's steps, and what is told apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn

from drl_data.backbones import ModelFolder, load_backbone
from drl_data.backbones.loader import load_flow_schedule, load_schedule
from drl_data.diffusion_spec import ConditionSpec, NoiseSpec, ScheduleSpec
from drl_data.errors import SpecError
from drl_data.pipeline import Pipeline
from drl_data.runs import prepare
from drl_data.schedule import corrupt
from drl_data.schedule_flow import FlowSchedule
from drl_data.spec import BackboneSpec, ImageSpec, TapSpec
from drl_data.testing import write_photo_tars
from drl_data.tiny_models import save_tiny_ddpm, save_tiny_flux, save_tiny_sana, save_tiny_sd3


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
        schedule.resolve(steps(-8))  # without the number of tokens


# --- steps that are shifted by the number of image tokens ---------------------------------------


def sees(network: nn.Module) -> list[Tensor]:
    """What the network is told of the time, call by call."""
    told: list[Tensor] = []
    network.register_forward_pre_hook(
        lambda _, args, kwargs: told.append(kwargs["timestep"][0].clone()), with_kwargs=True
    )
    return told


@torch.no_grad()
def told_by_flux(path: Path, size: tuple[int, int], n_steps: int) -> tuple[list[Tensor], Tensor]:
    """What FluxPipeline tells its network, and the sigmas of its scheduler."""
    transformer = FluxTransformer2DModel.from_pretrained(path / "transformer")
    told = sees(transformer)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(path / "scheduler")
    vae = AutoencoderKL.from_pretrained(path / "vae")
    pipeline = FluxPipeline(scheduler, vae, None, None, None, None, transformer)
    pipeline.set_progress_bar_config(disable=True)
    pipeline(
        prompt_embeds=torch.zeros(1, 3, 24),
        pooled_prompt_embeds=torch.zeros(1, 24),
        height=size[0],
        width=size[1],
        num_inference_steps=n_steps,
        output_type="latent",
    )
    return told, pipeline.scheduler.sigmas


@torch.no_grad()
def told_by_sd3(path: Path, size: tuple[int, int], n_steps: int) -> tuple[list[Tensor], Tensor]:
    """What StableDiffusion3Pipeline tells its network, and the sigmas of its scheduler."""
    transformer = SD3Transformer2DModel.from_pretrained(path / "transformer")
    told = sees(transformer)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(path / "scheduler")
    vae = AutoencoderKL.from_pretrained(path / "vae")
    nothing = (None,) * 6
    pipeline = StableDiffusion3Pipeline(transformer, scheduler, vae, *nothing)
    pipeline.set_progress_bar_config(disable=True)
    pipeline(
        prompt_embeds=torch.zeros(1, 3, 48),
        pooled_prompt_embeds=torch.zeros(1, 40),
        height=size[0],
        width=size[1],
        num_inference_steps=n_steps,
        guidance_scale=1.0,
        output_type="latent",
    )
    return told, pipeline.scheduler.sigmas


SHIFTED = {"flux": (save_tiny_flux, told_by_flux), "sd3": (save_tiny_sd3, told_by_sd3)}


@pytest.mark.parametrize(
    "config",
    [{}, {"base_shift": 0.3, "max_shift": 2.0}, {"use_dynamic_shifting": False, "shift": 1.0}],
)
@pytest.mark.parametrize("size", [(32, 24), (16, 32)])
@pytest.mark.parametrize("family", SHIFTED)
def test_steps_are_the_pipelines_own(
    tmp_path: Path, family: str, size: tuple[int, int], config: dict[str, float]
) -> None:
    """With a shift by the size of the image, and without one (Flux-schnell)."""
    save, run = SHIFTED[family]
    path = save(tmp_path / family)
    settings = {"shift": 3.0, "use_dynamic_shifting": True, **config}
    FlowMatchEulerDiscreteScheduler(**settings).save_pretrained(path / "scheduler")
    told, sigmas = run(path, size, 5)
    backbone = load_backbone(ModelFolder.find(BackboneSpec(model=str(path))), "meta")
    schedule = backbone.schedule_for(ImageSpec(size=size))
    times = schedule.resolve(steps(0, timesteps=(0, 1, 2, 3, 4), n_steps=5))
    assert [torch.tensor(time.model_time) for time in times] == told
    assert [time.sigma for time in times] == sigmas[:-1].tolist()
    assert len(set(told)) == 5


def test_a_store_of_other_images_is_shifted_otherwise(tmp_path: Path) -> None:
    path = save_tiny_flux(tmp_path / "flux")
    tars = write_photo_tars(tmp_path / "tars", n_samples=2, n_tars=1)
    sigmas = []
    for side in (16, 32):
        data = {
            "name": "x",
            "dataset": {"tars": str(tars / "*.tar")},
            "images": {"size": side},
            "backbone": {"model": str(path)},
            "schedule": {"convention": "scheduler_position", "timesteps": [20], "n_steps": 28},
            "taps": ["transformer_blocks.0"],
            "store": {"url": str(tmp_path / "s")},
        }
        (time,) = prepare(Pipeline.parse(data)).times
        assert time.sigma == float(told_by_flux(path, (side, side), 28)[1][20])
        sigmas.append(time.sigma)
    assert sigmas[0] < sigmas[1]  # more tokens, more noise


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(("family", "largest"), [("flux", 1.15), ("sd3", 1.16)])
def test_a_scheduler_without_numbers_of_its_own_has_the_pipelines(
    tmp_path: Path, family: str, largest: float
) -> None:
    """UniPC knows `mu` and nothing of what it is made of; FluxPipeline leaves it its own sigmas."""
    from diffusers import UniPCMultistepScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    path = SHIFTED[family][0](tmp_path / family)
    config = {"use_flow_sigmas": True, "use_dynamic_shifting": True}
    spec = steps(3, n_steps=10, scheduler="UniPCMultistepScheduler", scheduler_config=config)
    backbone = load_backbone(ModelFolder.find(BackboneSpec(model=str(path))), "meta")
    (time,) = backbone.schedule_for(ImageSpec(size=(32, 24))).resolve(spec)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", **config)
    scheduler.set_timesteps(10, mu=calculate_shift(8 * 6, max_shift=largest))
    assert time.sigma == pytest.approx(float(scheduler.sigmas[3]), rel=2e-6)


def test_a_family_whose_pipeline_does_not_shift_by_size_is_refused(tmp_path: Path) -> None:
    path = save_tiny_sana(tmp_path / "sana")
    backbone = load_backbone(ModelFolder.find(BackboneSpec(model=str(path))), "meta")
    spec = steps(3, scheduler_config={"use_dynamic_shifting": True})
    with pytest.raises(SpecError, match="28 steps: `mu` must be passed"):
        backbone.schedule_for(ImageSpec(size=32)).resolve(spec)


def test_a_fixed_shift_does_not_depend_on_the_image(tmp_path: Path) -> None:
    path = save_tiny_flux(tmp_path / "flux")
    schedule = load_backbone(ModelFolder.find(BackboneSpec(model=str(path))), "meta").schedule
    assert isinstance(schedule, FlowSchedule)
    spec = steps(-8, scheduler_config={"use_dynamic_shifting": False, "shift": 3.0})
    for n_tokens in (48, 4096):
        assert schedule.for_tokens(n_tokens).resolve(spec) == schedule.for_tokens(1).resolve(spec)


def test_without_a_scheduler_the_number_of_tokens_is_nothing() -> None:
    assert FlowSchedule().for_tokens(64) == FlowSchedule()


def test_the_network_can_be_told_another_time_than_the_noises() -> None:
    spec = ScheduleSpec(convention="flow", timesteps=(0.25, 0.5), condition_at=(0,))
    first, second = FlowSchedule().resolve(spec)
    assert (first.sigma, second.sigma) == (0.25, 0.5)
    assert first.model_time == second.model_time == 0


@pytest.mark.parametrize("family", SHIFTED)
def test_features_of_a_flow_told_another_time_are_plain_diffusers(
    tmp_path: Path, family: str
) -> None:
    """`condition_at` is t before the shift, as `timesteps` are; SD3 is told 1000 t, Flux t."""
    path = SHIFTED[family][0](tmp_path / family)
    backbone = load_backbone(ModelFolder.find(BackboneSpec(model=str(path))), "cpu")
    told = sees(backbone.network)
    spec = ScheduleSpec(convention="flow", timesteps=(0.26, 0), condition_at=(0.5,), shift=3.0)
    times = backbone.schedule.resolve(spec)
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 1, 16, 8, 8, generator=generator)
    inputs = [corrupt(x, noise, time) for time in times]
    taps = backbone.resolve([TapSpec(path="transformer_blocks.0")])
    condition = backbone.conditioning(ConditionSpec())
    with torch.no_grad():
        for given, time in zip(inputs, times, strict=True):
            backbone.tap(given, time, condition, taps, lambda _, x, __: x)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(timesteps=[260.0], sigmas=[0.26])
    want = scheduler.scale_noise(x, scheduler.timesteps, noise)
    assert torch.equal(inputs[0], want)
    assert torch.equal(inputs[1], x)
    at = torch.tensor(0.75, dtype=torch.float32)  # 3 * 0.5 / (1 + 2 * 0.5)
    scale = {"flux": 1.0, "sd3": 1000.0}[family]
    assert [float(t) for t in told] == [float(at * scale)] * 2


def test_steps_of_a_scheduler_may_be_told_apart_from_the_noise(sd3: FlowSchedule) -> None:
    (time,) = sd3.resolve(steps(20, condition_at=(4,)))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(28)
    assert time.sigma == float(scheduler.sigmas[20])
    assert time.model_time == float(scheduler.timesteps[4])


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
