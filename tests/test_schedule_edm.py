"""EDM's noise levels and preconditioning, against the published ladder and diffusers' own."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler, UNet2DModel
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from drl_data.backbones import Conditioning, find_model, load_backbone
from drl_data.diffusion_spec import ConditionSpec, LatentSpec, NoiseSpec, ScheduleSpec
from drl_data.errors import SpecError
from drl_data.features import FeatureComputer
from drl_data.noise import batch_noise
from drl_data.schedule import NoiseSchedule
from drl_data.schedule_edm import EDMSchedule, precondition, sigma_ladder
from drl_data.spec import BackboneSpec, FeatureSpec, ImageSpec, TapSpec
from drl_data.tiny_models import save_tiny_edm


def test_the_ladder_of_18_steps_is_the_published_one() -> None:
    want = {1: 0.002, 2: 0.0075, 3: 0.0229, 4: 0.0599, 5: 0.1395, 6: 0.296, 7: 0.585, 18: 80.0}
    ladder = sigma_ladder(18, 0.002, 80, 7)
    assert ladder[0] == 0
    assert len(ladder) == 19
    for index, sigma in want.items():
        assert ladder[index] == pytest.approx(sigma, rel=5e-3)
    spec = ScheduleSpec(convention="edm_index", timesteps=tuple(want))
    for time, sigma in zip(EDMSchedule().resolve(spec), want.values(), strict=True):
        assert time.sigma / time.alpha == pytest.approx(sigma, rel=5e-3)
        assert time.model_time == pytest.approx(math.log(sigma) / 4, abs=2e-3)


@given(n=st.integers(2, 60))
def test_the_ladder_is_diffusers_own_reversed(n: int) -> None:
    scheduler = EDMEulerScheduler()
    scheduler.set_timesteps(n)
    ours = sigma_ladder(n, 0.002, 80, 7)
    np.testing.assert_allclose(ours, scheduler.sigmas.flip(0), rtol=1e-5)


@given(sigma=st.floats(0.002, 80), sigma_data=st.floats(0.1, 2))
def test_preconditioning_is_diffusers_own(sigma: float, sigma_data: float) -> None:
    scheduler = EDMEulerScheduler(sigma_data=sigma_data)
    c = precondition(sigma, sigma_data)
    x, f = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    level = torch.tensor(sigma)
    assert float(scheduler.precondition_noise(level)) == pytest.approx(c.c_noise, abs=1e-5)
    assert float(scheduler.precondition_inputs(x, level)[0]) == pytest.approx(c.c_in, rel=1e-5)
    skip, out = scheduler.precondition_outputs(x, f, level).tolist()
    assert (skip, out) == pytest.approx((c.c_skip, c.c_out), rel=1e-5)


@given(sigma=st.floats(0.002, 80))
def test_network_input_and_target_have_unit_variance(sigma: float) -> None:
    """The requirement that table 1 is derived from (Karras et al. 2022, appendix B.6)."""
    c = precondition(sigma)
    assert c.c_in**2 * (0.25 + sigma**2) == pytest.approx(1)
    assert ((1 - c.c_skip) ** 2 * 0.25 + (c.c_skip * sigma) ** 2) / c.c_out**2 == pytest.approx(1)


def spec_of(schedule: ScheduleSpec, noise: NoiseSpec) -> FeatureSpec:
    return FeatureSpec(
        dataset="d", n_samples=2, weights="w", backbone_dtype="float32", images=ImageSpec(size=16),
        latents=LatentSpec(), condition=ConditionSpec(), schedule=schedule, noise=noise,
        taps=(TapSpec(path="output_blocks.1"),), dtype="float32", batch_size=2, rows_per_unit=2,
        overflow="error",
    )  # fmt: skip


def test_features_equal_the_equations_and_plain_diffusers(tmp_path: Path) -> None:
    """c_in (x + sigma n) here, c_in x + c_in sigma n there: equal up to float32's rounding."""
    root = save_tiny_edm(tmp_path / "edm")
    spec = spec_of(ScheduleSpec(convention="edm_index", timesteps=(4, 7)), NoiseSpec(seed=3))
    backbone = load_backbone(find_model(BackboneSpec(model=str(root))), "cpu")
    times = backbone.schedule.resolve(spec.schedule)
    computer = FeatureComputer(backbone, backbone.resolve(spec.taps), Conditioning(), times, spec)
    raw = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16), dtype=np.uint8)
    got = [features["output_blocks.1"] for _, features in computer.compute(raw, ["a", "b"])]

    network = UNet2DModel.from_pretrained(root / "unet").eval()
    scheduler = EDMEulerScheduler.from_pretrained(root / "scheduler")
    scheduler.set_timesteps(18)
    clean = torch.from_numpy(raw).float() / 255 * 2 - 1
    noise = batch_noise(spec.noise, ["a", "b"], (3, 16, 16))
    assert noise is not None
    kept: list[Tensor] = []
    network.up_blocks[0].register_forward_hook(lambda m, a, out: kept.append(out))
    for index in (4, 7):
        sigma = scheduler.sigmas[-1 - index]
        told = scheduler.precondition_noise(sigma).expand(2)
        with torch.no_grad():
            network(scheduler.precondition_inputs(clean + sigma * noise, sigma), told)
    for mine, want in zip(got, kept, strict=True):
        torch.testing.assert_close(mine, want, atol=2e-5, rtol=1e-4)
    assert (got[0] - got[1]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (ScheduleSpec(timesteps=(4,)), "has EDM preconditioning; want edm_sigma or edm_index"),
        (ScheduleSpec(convention="edm_index", timesteps=(0,)), r"\[0\]: want 1 \(least noise\)"),
        (ScheduleSpec(convention="edm_index", timesteps=(19,)), r"\[19\]: want 1 .* \.\. 18"),
        (ScheduleSpec(convention="edm_index", timesteps=(1.5,)), r"\[1\.5\]: want 1"),
        (
            ScheduleSpec(convention="edm_index", timesteps=(1,), n_steps=1),
            "n_steps 1: a ladder has at least 2",
        ),
        (ScheduleSpec(convention="edm_sigma", timesteps=(0.0,)), "want noise levels above 0"),
    ],
)
def test_what_edm_does_not_know_is_refused(spec: ScheduleSpec, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        EDMSchedule().resolve(spec)


def test_the_scheduler_s_configuration_is_read(tmp_path: Path) -> None:
    root = save_tiny_edm(tmp_path / "edm")
    EDMEulerScheduler(sigma_min=0.01, sigma_data=1.0, rho=5).save_pretrained(root / "scheduler")
    backbone = load_backbone(find_model(BackboneSpec(model=str(root))), "meta")
    assert backbone.schedule == EDMSchedule(0.01, 80.0, 1.0, 5)
    (time,) = backbone.schedule.resolve(ScheduleSpec(convention="edm_sigma", timesteps=(1.0,)))
    assert (time.model_time, time.alpha) == (0, pytest.approx(1 / math.sqrt(2)))


def test_noise_levels_between_whole_numbers_draw_their_own_noise() -> None:
    spec = NoiseSpec(per_timestep=True)
    draws = [batch_noise(spec, ["a"], (4,), timestep=t) for t in (0.05, 0.1, 0)]
    assert all(draw is not None for draw in draws)
    assert len({tuple(draw.flatten().tolist()) for draw in draws if draw is not None}) == 3


def test_noise_levels_below_1_draw_their_own_noise(tmp_path: Path) -> None:
    """With `per_timestep`: 0.05 and 0.1 are two timesteps, not both 0."""
    noise = NoiseSpec(per_timestep=True)
    spec = spec_of(ScheduleSpec(convention="edm_sigma", timesteps=(0.05, 0.1)), noise)
    spec = spec.model_copy(update={"taps": (TapSpec(path="conv_in@in"),)})
    model = find_model(BackboneSpec(model=str(save_tiny_edm(tmp_path / "edm"))))
    backbone = load_backbone(model, "cpu")
    times = backbone.schedule.resolve(spec.schedule)
    computer = FeatureComputer(backbone, backbone.resolve(spec.taps), Conditioning(), times, spec)
    grey = np.full((1, 3, 16, 16), 128, dtype=np.uint8)
    clean = 128 / 255 * 2 - 1
    drawn = [
        (features["conv_in-in"] / time.alpha - clean) / (time.sigma / time.alpha)
        for time, (_, features) in zip(times, computer.compute(grey, ["a"]), strict=True)
    ]
    for noise_drawn in drawn:
        assert float(noise_drawn.std()) == pytest.approx(1, abs=0.1)
    assert (drawn[0] - drawn[1]).abs().max() > 0.5


def test_discrete_timesteps_are_whole_numbers_in_their_own_convention() -> None:
    schedule = NoiseSchedule(torch.linspace(0.99, 0.01, 1000))
    with pytest.raises(SpecError, match=r"\[1\.5\]: this model has 1000 timesteps"):
        schedule.resolve(ScheduleSpec(timesteps=(1.5,)))
    with pytest.raises(SpecError, match="edm_sigma: this model has a schedule of discrete"):
        schedule.resolve(ScheduleSpec(convention="edm_sigma", timesteps=(1.0,)))


# --- told another level than the noise's --------------------------------------------------------


def test_an_edm_network_can_be_told_another_level_in_the_conventions_units() -> None:
    by_level = ScheduleSpec(convention="edm_sigma", timesteps=(0.1, 1.0), condition_at=(0.5, 2.0))
    plain = EDMSchedule().resolve(by_level.model_copy(update={"condition_at": "same"}))
    for told, time, level in zip(EDMSchedule().resolve(by_level), plain, (0.5, 2.0), strict=True):
        assert (told.alpha, told.sigma) == (time.alpha, time.sigma)
        assert told.model_time == math.log(level) / 4 != time.model_time
    by_index = ScheduleSpec(convention="edm_index", timesteps=(4, 7), condition_at=(9,), n_steps=20)
    ladder = sigma_ladder(20, 0.002, 80, 7)
    for told, index in zip(EDMSchedule().resolve(by_index), (4, 7), strict=True):
        assert told.model_time == math.log(ladder[9]) / 4
        assert told.sigma / told.alpha == pytest.approx(ladder[index])


def test_a_clean_image_is_told_a_level_and_scaled_as_clean() -> None:
    """c_in(0) = 1 / sigma_data, the limit of table 1."""
    spec = ScheduleSpec(convention="edm_sigma", timesteps=(0, 0.25), condition_at=(0.25,))
    clean, noisy = EDMSchedule(sigma_data=0.8).resolve(spec)
    assert (clean.alpha, clean.sigma) == (1 / 0.8, 0)
    assert clean.model_time == noisy.model_time == math.log(0.25) / 4
    limit = precondition(1e-9, 0.8)
    assert clean.alpha == pytest.approx(limit.c_in)
    ladder = ScheduleSpec(convention="edm_index", timesteps=(0,), condition_at=(4,))
    (first,) = EDMSchedule().resolve(ladder)
    assert (first.alpha, first.sigma) == (2, 0)


def test_features_told_another_level_equal_plain_diffusers(tmp_path: Path) -> None:
    """The input is preconditioned by the level of its noise, the network told another."""
    root = save_tiny_edm(tmp_path / "edm")
    schedule = ScheduleSpec(convention="edm_sigma", timesteps=(0, 0.3), condition_at=(1.5,))
    spec = spec_of(schedule, NoiseSpec(seed=3))
    backbone = load_backbone(find_model(BackboneSpec(model=str(root))), "cpu")
    times = backbone.schedule.resolve(spec.schedule)
    computer = FeatureComputer(backbone, backbone.resolve(spec.taps), Conditioning(), times, spec)
    raw = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16), dtype=np.uint8)
    got = [features["output_blocks.1"] for _, features in computer.compute(raw, ["a", "b"])]

    network = UNet2DModel.from_pretrained(root / "unet").eval()
    scheduler = EDMEulerScheduler.from_pretrained(root / "scheduler")
    clean = torch.from_numpy(raw).float() / 255 * 2 - 1
    noise = batch_noise(spec.noise, ["a", "b"], (3, 16, 16))
    assert noise is not None
    kept: list[Tensor] = []
    network.up_blocks[0].register_forward_hook(lambda m, a, out: kept.append(out))
    told = scheduler.precondition_noise(torch.tensor(1.5)).expand(2)
    for level in (0.0, 0.3):
        sigma = torch.tensor(level)
        with torch.no_grad():
            network(scheduler.precondition_inputs(clean + sigma * noise, sigma), told)
    for mine, want in zip(got, kept, strict=True):
        torch.testing.assert_close(mine, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_time": "fraction"},
            r"model_time fraction: an EDM network is told ln",
        ),
        ({"condition_at": (0,)}, r"condition_at \[0\]: want noise levels above 0"),
        ({"condition_at": (-1,)}, r"condition_at \[-1\]: want noise levels above 0"),
        ({"condition_at": (1,), "timesteps": (-1,)}, r"timesteps \[-1\]: want noise levels"),
        (
            {"convention": "edm_index", "timesteps": (4,), "condition_at": (0,)},
            r"condition_at \[0\]: want 1 \(least noise\) \.\. 18",
        ),
        (
            {"convention": "edm_index", "timesteps": (-1,), "condition_at": (1,)},
            r"timesteps \[-1\]: want 0 \(clean\) \.\. 18",
        ),
    ],
)
def test_what_an_edm_network_cannot_be_told_is_refused(
    change: dict[str, object], message: str
) -> None:
    spec = ScheduleSpec.model_validate({"convention": "edm_sigma", "timesteps": (0.1,), **change})
    with pytest.raises(SpecError, match=message):
        EDMSchedule().resolve(spec)


def test_the_ladder_has_as_many_levels_as_the_spec_says() -> None:
    spec = ScheduleSpec(convention="edm_index", n_steps=40, timesteps=(1, 7, 40))
    levels = [time.sigma / time.alpha for time in EDMSchedule().resolve(spec)]
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    assert levels == pytest.approx([0.002, (low + 6 / 39 * (high - low)) ** 7, 80])
    with pytest.raises(SpecError, match=r"\[41\]: want 1 \(least noise\) \.\. 40"):
        EDMSchedule().resolve(spec.model_copy(update={"timesteps": (41,)}))
