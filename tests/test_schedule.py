"""Noise schedules against the published tables and against diffusers' own schedulers."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from drl_data.backbones import ModelFolder, load_backbone
from drl_data.backbones.samplers import FLOW, VARIANCE_PRESERVING, DiffusersSampler
from drl_data.diffusion_spec import NoiseSpec, ScheduleSpec
from drl_data.errors import SpecError, WeightsError
from drl_data.schedule import (
    NoiseSchedule,
    Prediction,
    Step,
    corrupt,
    ddim_step,
    inversion_times,
    mask_patches,
    resolve_times,
    sampler_step,
    to_eps,
    to_v,
    to_x0,
)
from drl_data.spec import BackboneSpec, ResolvedTime
from drl_data.tiny_models import save_tiny_ddpm

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

# scheduler_config.json of the real models, as far as the steps depend on it
DDIM = {"_class_name": "DDIMScheduler", **STABLE_DIFFUSION, "clip_sample": False}
SD15 = {
    "_class_name": "PNDMScheduler", **STABLE_DIFFUSION, "skip_prk_steps": True, "steps_offset": 1,
    "set_alpha_to_one": False,
}  # fmt: skip
SDXL = {
    "_class_name": "EulerDiscreteScheduler", **STABLE_DIFFUSION, "timestep_spacing": "leading",
    "steps_offset": 1,
}  # fmt: skip
HEUN = {**SDXL, "_class_name": "HeunDiscreteScheduler"}  # two network calls a step
SD3 = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
WAN = {
    "_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction",
    "use_flow_sigmas": True, "flow_shift": 3.0,
}  # fmt: skip


def schedule_of(config: dict[str, object]) -> tuple[DDPMScheduler, NoiseSchedule]:
    scheduler = DDPMScheduler(**config)
    return scheduler, NoiseSchedule(scheduler.alphas_cumprod)


def stepping(config: dict[str, object], **changes: object) -> NoiseSchedule:
    """The schedule of a model whose scheduler_config.json is `config`."""
    betas = {k: v for k, v in config.items() if k.startswith("beta")}
    return NoiseSchedule(
        DDPMScheduler(**betas).alphas_cumprod,
        make_sampler=lambda spec: DiffusersSampler.of(config, spec),
        **changes,
    )


def resolved(
    config: dict[str, object], convention: str, timesteps: list[float], **settings: object
) -> dict[float, ResolvedTime]:
    spec = ScheduleSpec(convention=convention, timesteps=timesteps, **settings)
    return {time.requested: time for time in stepping(config).resolve(spec)}


def told(
    config: dict[str, object], convention: str, timesteps: list[float], **settings: object
) -> list[float]:
    """What the network is told at each of `timesteps`."""
    times = resolved(config, convention, timesteps, **settings)
    return [times[t].model_time for t in timesteps]


# --- ddpm_index ---------------------------------------------------------------------------------


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
    spec = ScheduleSpec(timesteps=(500,))
    (time,) = resolve_times(schedule, spec, NoiseSpec(kind="none"))
    assert corrupt(clean, None, time) is clean
    assert (time.model_time, time.alpha, time.sigma) == (500, 1, 0)


@pytest.mark.parametrize(
    ("convention", "bad", "want"),
    [
        ("ddpm_index", (-1, 5, 1000), r"timesteps \[-1, 1000\]: this model has 1000.*0\.\.999"),
        ("ddpm_index", (0.5,), r"timesteps \[0\.5\].*whole numbers"),
        ("ddpm_1based", (0, 1000), r"timesteps \[0\].*1\.\.1000 \(ddpm_1based\)"),
        ("sigma", (0.01,), r"timesteps 0\.01: this model knows the noise levels 0\.01.*\.\.1"),
        ("learned", (261,), "carries no learned timestep"),
        ("descending_index", (1,), "comes without one: use ddpm_index"),
    ],
)
def test_a_timestep_outside_the_schedule_is_refused(
    convention: str, bad: tuple[float, ...], want: str
) -> None:
    _, schedule = schedule_of(LINEAR)
    with pytest.raises(SpecError, match=want):
        schedule.resolve(ScheduleSpec(convention=convention, timesteps=bad))


# --- what the network is told -------------------------------------------------------------------


def test_noise_and_told_time_are_apart() -> None:
    same = resolved(DDIM, "ddpm_index", [0, 100])
    for condition_at in (25, [25, 25]):
        apart = resolved(DDIM, "ddpm_index", [0, 100], condition_at=condition_at)
        for t in (0, 100):
            assert apart[t] == same[t].model_copy(update={"model_time": 25})
    assert told(DDIM, "ddpm_index", [0, 100], condition_at=[7, 9]) == [7, 9]
    with pytest.raises(SpecError, match=r"schedule.condition_at \[1000\]: .*0\.\.999"):
        resolved(DDIM, "ddpm_index", [0], condition_at=1000)


def test_counting_from_one() -> None:
    """DDAE's t = 11 of 1..1000 is diffusers' 10; its own networks are told 0.011."""
    ten = resolved(DDIM, "ddpm_index", [10])[10]
    for model_time, want in (("index", 10), ("fraction", 0.011)):
        time = resolved(DDIM, "ddpm_1based", [11], model_time=model_time)[11]
        assert (time.model_time, time.alpha, time.sigma) == (want, ten.alpha, ten.sigma)
    assert told(DDIM, "ddpm_index", [11], model_time="fraction") == [0.011]


def test_no_schedule_is_clean_at_time_zero() -> None:
    _, schedule = schedule_of(LINEAR)
    (time,) = schedule.resolve(ScheduleSpec(convention="none", timesteps=(0,)))
    assert (time.model_time, time.alpha, time.sigma) == (0, 1, 0)


def test_noise_levels_resolve_to_the_indices_that_have_them() -> None:
    """k-diffusion's `sigma_to_t`: at an index that index, between two the one that diffusers'
    Euler scheduler interpolates."""
    scheduler, schedule = schedule_of(STABLE_DIFFUSION)
    abar = scheduler.alphas_cumprod.double()
    levels = ((1 - abar) / abar).sqrt()
    at = [float(levels[t]) for t in (0, 50, 261)] + [0.2256, 7.0]
    times = schedule.resolve(ScheduleSpec(convention="sigma", timesteps=at))
    for time, t in zip(times, (0, 50, 261), strict=False):
        assert time.model_time == pytest.approx(t, abs=1e-6)
        assert time.alpha == pytest.approx(float(abar[t].sqrt()), rel=1e-6)
    euler = EulerDiscreteScheduler(**STABLE_DIFFUSION)
    log_levels = levels.log().numpy()
    for time in times:
        want = euler._sigma_to_t(torch.tensor(time.requested).double().numpy(), log_levels)
        assert time.model_time == pytest.approx(float(want), abs=1e-4)
        assert time.alpha**2 + time.sigma**2 == pytest.approx(1)
        assert time.sigma / time.alpha == pytest.approx(time.requested)


def test_the_checkpoint_carries_the_learned_time(tmp_path: Path) -> None:
    folder = save_tiny_ddpm(tmp_path / "m")
    (weights,) = (folder / "unet").glob("*.safetensors")
    spec = ScheduleSpec(convention="learned", timesteps=(261,))
    backbone = load_backbone(ModelFolder.find(BackboneSpec(model=str(folder))), "meta")
    with pytest.raises(WeightsError, match="a tensor of one number called 'timestep'"):
        backbone.schedule.resolve(spec)
    save_file({**load_file(weights), "timestep": torch.tensor(273.25)}, weights)
    (time,) = backbone.schedule.resolve(spec)
    (index,) = backbone.schedule.resolve(ScheduleSpec(timesteps=(261,)))
    assert time.model_time == 273.25
    assert (time.alpha, time.sigma) == (index.alpha, index.sigma)
    apart = spec.model_copy(update={"condition_at": (5,)})
    with pytest.raises(SpecError, match="condition_at: convention learned tells the network the"):
        backbone.schedule.resolve(apart)


# --- the steps of a scheduler -------------------------------------------------------------------


def test_positions_of_published_systems() -> None:
    at = "scheduler_position"
    assert told(DDIM, at, [-8, -3], n_steps=50) == [140, 40]  # LDM_correspondences
    (seg4diff,) = told(SD3, at, [-8], n_steps=28)
    assert round(seg4diff) == 515
    assert resolved(SD3, at, [-8], n_steps=28)[-8].sigma == pytest.approx(0.515, abs=1e-3)
    wan = resolved(WAN, "descending_index", [749])[749]
    assert wan.model_time == 502  # VidFM3D
    assert wan.sigma == pytest.approx(0.502, abs=1e-3)
    assert wan.alpha == pytest.approx(1 - wan.sigma)
    assert told(DDIM, "descending_index", [0, 749, 999]) == [999, 250, 0]


def test_labels_of_published_systems() -> None:
    labels = [49, 45, 40, 35, 0]
    hyperfeatures = told(DDIM, "generation_label", labels, n_steps=50)
    assert hyperfeatures == [-1, 60, 160, 260, 960]
    settings = {"n_steps": 50, "scheduler": "DDIMScheduler"}
    config = {"steps_offset": 0}
    from_sd15 = told(SD15, "generation_label", labels, **settings, scheduler_config=config)
    assert from_sd15 == hyperfeatures
    satdiffuser = told(SD15, "generation_label", [47, 45, 40], **settings)
    assert satdiffuser == [21, 61, 161]  # offset 1, as SD 1.5's configuration has it


def test_the_clean_label_has_no_noise_and_the_others_have_their_own() -> None:
    times = resolved(DDIM, "generation_label", [49, 45], n_steps=50)
    assert (times[49].alpha, times[49].sigma) == (1, 0)
    same = resolved(DDIM, "ddpm_index", [60])[60]
    assert (times[45].alpha, times[45].sigma) == (same.alpha, same.sigma)


def test_a_scheduler_that_remembers_its_step_is_asked_anew_for_each() -> None:
    times = resolved(SDXL, "generation_label", [48, 20, 3], n_steps=50)
    for t, time in times.items():
        same = resolved(DDIM, "ddpm_index", [time.model_time])[time.model_time]
        assert time.model_time == 1 + 20 * (48 - t)
        assert time.alpha == pytest.approx(same.alpha, abs=1e-5)
        assert time.sigma == pytest.approx(same.sigma, abs=1e-5)


def test_strength_of_image_to_image() -> None:
    """GDF: 50 is 51 with PNDM, whose list has one time twice and an offset; 50 with Euler."""
    assert told(SD15, "img2img_strength", [50]) == [51]
    time = resolved(SDXL, "img2img_strength", [50])[50]
    assert time.model_time == 50
    assert time.sigma / time.alpha == pytest.approx(0.2256, abs=5e-5)


@pytest.mark.parametrize(
    ("scheduler", "config"),
    [(PNDMScheduler, SD15), (EulerDiscreteScheduler, SDXL), (HeunDiscreteScheduler, HEUN)],
)
def test_strength_is_the_pipelines_own_at_every_timestep(
    scheduler: type[PNDMScheduler], config: dict[str, object]
) -> None:
    """diffusers' `get_timesteps`, run by a pipeline object without models."""
    pipeline = object.__new__(diffusers.StableDiffusionImg2ImgPipeline)
    pipeline.scheduler = scheduler(**{k: v for k, v in config.items() if k[0] != "_"})
    pipeline.scheduler.set_timesteps(1000)
    chosen = [1, 7, 29, 57, 58, 113, 500, 997]
    want = [float(pipeline.get_timesteps(1000, t / 1000, "cpu")[0][0]) for t in chosen]
    assert told(config, "img2img_strength", chosen) == want


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
def test_every_scheduler_keeps_the_variance_and_tells_its_own_times(name: str) -> None:
    """alpha^2 + sigma^2 = 1 with the input scaled, and where a told time is an index of the
    training schedule, its noise."""
    config = {**STABLE_DIFFUSION, "_class_name": name}
    own = getattr(diffusers, name)(**STABLE_DIFFUSION)
    own.set_timesteps(10)
    times = resolved(config, "scheduler_position", list(range(len(own.timesteps))), n_steps=10)
    is_shifted = name.startswith("CogVideoX")  # these have a table of their own
    abar = (own if is_shifted else DDPMScheduler(**STABLE_DIFFUSION)).alphas_cumprod
    for time, want in zip(times.values(), own.timesteps.tolist(), strict=True):
        assert time.model_time == want
        assert time.alpha**2 + time.sigma**2 == pytest.approx(1, abs=1e-5)
        if want == int(want):
            assert time.alpha == pytest.approx(float(abar[int(want)].sqrt()), abs=2e-3)


@pytest.mark.parametrize("position", [0, 3, -1])
def test_corruption_is_eulers_with_the_input_scaled(position: int) -> None:
    """Exact but for one rounding: diffusers divides the sum, we multiply both summands."""
    euler = EulerDiscreteScheduler(**{k: v for k, v in SDXL.items() if k[0] != "_"})
    euler.set_timesteps(10)
    when = euler.timesteps[position]
    clean, noise = torch.randn(2, 1, 4, 8, 8).unbind()
    want = euler.scale_model_input(euler.add_noise(clean, noise, when[None]), when)
    time = resolved(SDXL, "scheduler_position", [position], n_steps=10)[position]
    torch.testing.assert_close(corrupt(clean, noise, time), want, rtol=0, atol=1e-6)
    assert not torch.allclose(clean + noise * euler.sigmas[position], want, atol=1e-3)


@pytest.mark.parametrize(
    ("scheduler", "config"),
    [(FlowMatchEulerDiscreteScheduler, SD3), (UniPCMultistepScheduler, WAN)],
)
def test_corruption_of_flow_schedulers_is_diffusers_own(
    scheduler: type[UniPCMultistepScheduler], config: dict[str, object]
) -> None:
    own = scheduler(**{k: v for k, v in config.items() if k[0] != "_"})
    own.set_timesteps(28)
    clean, noise = torch.randn(2, 1, 4, 8, 8).unbind()
    for position in (0, 9, -8, -1):
        when = own.timesteps[position][None]
        name = config["_class_name"]
        want = (
            own.scale_noise(clean, when, noise) if name in FLOW
            else own.add_noise(clean, noise, when)
        )  # fmt: skip
        time = resolved(config, "scheduler_position", [position], n_steps=28)[position]
        torch.testing.assert_close(corrupt(clean, noise, time), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "convention", "t", "settings", "want"),
    [
        (DDIM, "scheduler_position", 50, {"n_steps": 50}, r"no step 50; want -50\.\.49"),
        (DDIM, "scheduler_position", 0.5, {"n_steps": 50}, "0.5 is no whole number"),
        (DDIM, "descending_index", -1, {}, r"no step -1; want 0\.\.999"),
        (DDIM, "generation_label", 50, {"n_steps": 50}, r"no step 50; want 0\.\.49"),
        (SDXL, "img2img_strength", 0, {}, r"no step 0; want 1\.\.1000"),
        (SD15, "generation_label", 5, {"n_steps": 50}, "51 times of 50.*scheduler: DDIMScheduler"),
        (SD15, "descending_index", 0, {}, "is the time 1000; the model has 0..999"),
        (DDIM, "descending_index", 0, {"scheduler": "DDIM"}, "want one of .*DDIMScheduler"),
        (DDIM, "descending_index", 0, {"n_steps": 1001}, "DDIMScheduler with 1001 steps: "),
        (
            DDIM, "descending_index", 0, {"scheduler_config": {"offset": 1}},
            "'offset': DDIMScheduler has no such setting; nearest: .*steps_offset",
        ),
    ],
)  # fmt: skip
def test_steps_that_do_not_exist_are_refused(
    config: dict[str, object], convention: str, t: float, settings: dict[str, object], want: str
) -> None:
    with pytest.raises(SpecError, match=want):
        resolved(config, convention, [t], **settings)


class Countdown:
    """A scheduler whose n steps tell n-1 .. 0."""

    name, n_timesteps, order = "countdown", 1000, 1

    def times(self, n_steps: int) -> tuple[float, ...]:
        return tuple(float(t) for t in reversed(range(n_steps)))

    def step(self, n_steps: int, position: int) -> Step:
        return Step(n_steps - 1 - position, 1, 0)


@given(st.integers(1, 60), st.data())
def test_positions_and_labels_are_one_list_in_two_directions(n: int, data: st.DataObject) -> None:
    position = data.draw(st.integers(-n, n - 1))
    spec = ScheduleSpec(convention="scheduler_position", timesteps=(0,), n_steps=n)
    want = list(reversed(range(n)))[position]
    assert sampler_step(Countdown(), spec, position).time == want
    label = data.draw(st.integers(0, n - 1))
    spec = ScheduleSpec(convention="generation_label", timesteps=(0,), n_steps=n)
    assert sampler_step(Countdown(), spec, label).time == ([-1, *range(n)])[n - 1 - label]


def test_a_models_own_scheduler_counts_its_steps(tmp_path: Path) -> None:
    folder = save_tiny_ddpm(tmp_path / "m")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**SDXL, "prediction_type": "v_prediction"}))
    schedule = load_backbone(ModelFolder.find(BackboneSpec(model=str(folder))), "meta").schedule
    assert schedule.prediction == "v_prediction"
    spec = ScheduleSpec(convention="img2img_strength", timesteps=(50,))
    assert schedule.resolve(spec)[0].model_time == 50


# --- schedule and noise together ----------------------------------------------------------------


def inversion(**settings: object) -> ScheduleSpec:
    return ScheduleSpec(
        **{"convention": "generation_label", "n_steps": 50, "timesteps": (49, 45), **settings}
    )


def test_an_inversion_tells_the_current_time_or_the_next() -> None:
    spec = inversion()
    for which, want in (("current", [-1, 60]), ("next", [0, 80])):
        noise = NoiseSpec(kind="inversion", told=which)
        times = resolve_times(stepping(DDIM), spec, noise)
        assert [time.model_time for time in times] == want
        assert [time.alpha for time in times] == [
            time.alpha for time in resolved(DDIM, "generation_label", [49, 45], n_steps=50).values()
        ]


@pytest.mark.parametrize(
    ("spec", "prediction", "want"),
    [
        (ScheduleSpec(timesteps=(0,)), "epsilon", "needs schedule.convention generation_label"),
        (inversion(condition_at=45), "epsilon", "no condition_at"),
        (inversion(timesteps=(50, -1)), "epsilon", r"\[50, -1\]: an inversion of 50.*0\.\.49"),
        (inversion(), "sample", "needs one that predicts epsilon or v"),
    ],
)
def test_an_inversion_that_cannot_be_is_refused(
    spec: ScheduleSpec, prediction: Prediction, want: str
) -> None:
    with pytest.raises(SpecError, match=want):
        resolve_times(stepping(DDIM, prediction=prediction), spec, NoiseSpec(kind="inversion"))


def test_the_share_of_a_mask_is_recorded() -> None:
    noise = NoiseSpec(kind="patch_mask")
    (time,) = resolve_times(schedule_of(LINEAR)[1], ScheduleSpec(timesteps=(50,)), noise)
    assert (time.model_time, time.alpha, time.sigma) == (50, 0.95, 0.05)
    spec = ScheduleSpec(convention="sigma", timesteps=(1,))
    with pytest.raises(SpecError, match=r"needs schedule\.convention ddpm_index, got sigma"):
        resolve_times(schedule_of(LINEAR)[1], spec, noise)


@given(st.integers(0, 1000), st.integers(1, 6), st.integers(1, 6), st.integers(1, 4))
def test_a_mask_zeroes_whole_patches_and_as_many_as_asked(
    t: int, rows: int, columns: int, patch: int
) -> None:
    order = torch.rand(2, 1, rows, columns)
    clean = torch.rand(2, 3, rows * patch, columns * patch) + 1
    share = t / 1000
    time = ResolvedTime(requested=t, convention="", model_time=t, alpha=1 - share, sigma=share)
    masked = mask_patches(clean, order, time)
    for i in range(2):
        # MDM's random_masking: the first int(L (1 - ratio)) of the patches, sorted by their number
        kept = order[i].flatten().sort().indices[: int(rows * columns * (1 - share))].tolist()
        for place in range(rows * columns):
            top, left = (place // columns) * patch, (place % columns) * patch
            window = (i, slice(None), slice(top, top + patch), slice(left, left + patch))
            want = clean[window] if place in kept else torch.zeros_like(clean[window])
            assert torch.equal(masked[window], want)


# --- what a network's output means --------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "flow_prediction"])
def test_every_prediction_gives_back_image_noise_and_v(prediction: Prediction) -> None:
    x0, eps = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64).unbind()
    sigma = 0.3
    alpha = 1 - sigma if prediction == "flow_prediction" else (1 - sigma**2) ** 0.5
    time = ResolvedTime(requested=0, convention="", model_time=0, alpha=alpha, sigma=sigma)
    x = alpha * x0 + sigma * eps
    v = alpha * eps - sigma * x0
    output = {
        "epsilon": eps, "sample": x0, "v_prediction": v, "flow_prediction": eps - x0
    }[prediction]  # fmt: skip
    for to, want in ((to_x0, x0), (to_eps, eps), (to_v, v)):
        torch.testing.assert_close(to(output, x, time, prediction), want)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_inversion_steps_are_diffusers_own(prediction: Prediction) -> None:
    """DDIMInverseScheduler, whose networks are told the next time, bit for bit."""
    own = DDIMInverseScheduler(
        **STABLE_DIFFUSION,
        clip_sample=False,
        prediction_type=prediction,
        timestep_spacing="leading",
    )
    own.set_timesteps(50)
    schedule = stepping(DDIM, prediction=prediction)
    path = inversion_times(schedule, inversion(), NoiseSpec(kind="inversion", told="next"))
    x = want = torch.randn(2, 4, 8, 8)
    for here, there, t in zip(path, path[1:], own.timesteps.tolist(), strict=False):
        assert here.model_time == t
        output = torch.randn(2, 4, 8, 8)
        want = own.step(output, t, want).prev_sample
        x = ddim_step(output, x, here, there, prediction)
        assert torch.equal(x, want)
    forward = DDIMScheduler(**STABLE_DIFFUSION)
    assert path[-1].alpha == float(forward.alphas_cumprod[980] ** 0.5)
