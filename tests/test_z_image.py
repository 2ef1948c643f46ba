"""What only Z-Image has: time from noise to clean, a negated output, prompts of any length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImageImg2ImgPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, Qwen3Model

from drl_data.backbones import Backbone, Conditioning, ModelFolder, load_backbone
from drl_data.capture import Streams
from drl_data.diffusion_spec import ConditionSpec, ScheduleSpec
from drl_data.errors import TapError
from drl_data.pipeline import Pipeline
from drl_data.runs import extract, prepare
from drl_data.schedule import corrupt
from drl_data.schedule_flow import FlowSchedule
from drl_data.spec import BackboneSpec, TapSpec
from drl_data.taps import resolve
from drl_data.testing import write_photo_tars
from drl_data.tiny_models import save_tiny_z_image

pytestmark = pytest.mark.usefixtures("one_thread")

CAT = ConditionSpec(prompt="A small cat")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_z_image(tmp_path_factory.mktemp("z_image") / "model")


@pytest.fixture(scope="session")
def backbone(folder: Path) -> Backbone:
    return load(folder, "cpu")


def load(folder: Path, device: str) -> Backbone:
    return load_backbone(ModelFolder.find(BackboneSpec(model=str(folder))), device)


def pipeline_of(folder: Path, cls: type = ZImagePipeline) -> ZImagePipeline:
    pipeline = cls(
        FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        AutoencoderKL.from_pretrained(folder / "vae").eval(),
        Qwen3Model.from_pretrained(folder / "text_encoder").eval(),
        AutoTokenizer.from_pretrained(folder / "tokenizer"),
        ZImageTransformer2DModel.from_pretrained(folder / "transformer").eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noisy(n: int = 2) -> Tensor:
    return torch.randn(n, 16, 8, 12, generator=torch.Generator().manual_seed(3))


def tapped(
    backbone: Backbone, x: Tensor, schedule: ScheduleSpec, told: Conditioning, *paths: str
) -> dict[str, Tensor]:
    (time,) = backbone.schedule.resolve(schedule)
    taps = backbone.resolve([TapSpec(path=path) for path in paths])
    with torch.no_grad():
        return backbone.tap(x, time, told, taps, lambda _tap, value, _dims: value.clone())


# --- time and sign ------------------------------------------------------------------------------


def test_a_step_of_the_pipeline_goes_along_v(folder: Path, backbone: Backbone) -> None:
    """Time and sign are those of the pipeline: its sampler goes from x along the tap v."""
    pipeline, x = pipeline_of(folder), noisy(1)
    steps: list[Tensor] = []
    pipeline(
        prompt=CAT.prompt,
        height=16,
        width=24,
        num_inference_steps=3,
        guidance_scale=0.0,
        latents=x,
        output_type="latent",
        callback_on_step_end=lambda _p, _i, _t, kept: steps.append(kept["latents"]) or {},
    )
    sigmas = pipeline.scheduler.sigmas
    assert sigmas[0] == 1
    told = backbone.conditioning(CAT)
    for i, (before, after) in enumerate(zip([x, *steps[:-1]], steps, strict=True)):
        at = ScheduleSpec(convention="flow", timesteps=(float(sigmas[i]),))
        v = tapped(backbone, before, at, told, "v")["v"]
        assert torch.equal(after, before + (sigmas[i + 1] - sigmas[i]) * v)


@pytest.mark.parametrize("t", [0.0, 0.09, 0.26, 0.5, 0.735, 1.0])
def test_the_network_is_told_how_clean_its_input_is(backbone: Backbone, t: float) -> None:
    (time,) = backbone.schedule.resolve(ScheduleSpec(convention="flow", timesteps=(t,)))
    scheduler_time = torch.tensor(t) * 1000
    assert time.model_time == float((1000 - scheduler_time) / 1000)
    assert time.model_time == pytest.approx(1 - t, abs=1e-6)
    assert (time.alpha, time.sigma) == pytest.approx((1 - t, t), abs=1e-7)


def test_steps_of_the_scheduler_are_told_as_the_pipeline_does(
    folder: Path, backbone: Backbone
) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(7)
    spec = ScheduleSpec(convention="scheduler_position", timesteps=tuple(range(7)), n_steps=7)
    times = backbone.schedule.resolve(spec)
    assert [time.model_time for time in times] == ((1000 - scheduler.timesteps) / 1000).tolist()
    assert [time.sigma for time in times] == pytest.approx(scheduler.sigmas[:-1].tolist())


def test_no_noise_is_told_as_clean() -> None:
    schedule = FlowSchedule(1.0, counts_from_noise=True)
    (time,) = schedule.resolve(ScheduleSpec(convention="none"))
    assert (time.model_time, time.alpha, time.sigma) == (1, 1, 0)


def test_a_perfect_network_predicts_the_clean_latent(folder: Path) -> None:
    """Z-Image is trained to put out x_0 - eps."""
    backbone = load(folder, "cpu")
    clean, noise = noisy(), torch.randn(2, 16, 8, 12)
    perfect = list((clean - noise).unsqueeze(2))
    backbone.network.register_forward_hook(lambda *_: (perfect,))
    at = ScheduleSpec(convention="flow", timesteps=(0.26,))
    (time,) = backbone.schedule.resolve(at)
    x = corrupt(clean, noise, time)
    told = backbone.conditioning(CAT)
    got = tapped(backbone, x, at, told, "x0", "eps", "v")
    torch.testing.assert_close(got["x0"], clean, rtol=0, atol=1e-6)
    torch.testing.assert_close(got["eps"], noise, rtol=0, atol=1e-6)
    output, _ = backbone.denoise(x, time, told, (), lambda _tap, value, _dims: value)
    assert torch.equal(output, backbone.schedule.target(clean, noise, time))


def test_the_image_to_image_pipeline_starts_from_the_same_latents(
    folder: Path, backbone: Backbone
) -> None:
    pipeline = pipeline_of(folder, ZImageImg2ImgPipeline)
    pixels = torch.rand(2, 3, 16, 24) * 2 - 1
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(4)
    with torch.no_grad():
        posterior = backbone.encode(pixels)
        want = pipeline.prepare_latents(
            pixels, scheduler.timesteps[2:3], 2, 16, 16, 24, torch.float32, "cpu",
            [torch.Generator().manual_seed(i) for i in range(2)],
        )  # fmt: skip
    draws, noise = [], []
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    for role in (draws, noise):
        role += [torch.randn(1, 16, 8, 12, generator=generator) for generator in generators]
    spec = ScheduleSpec(convention="scheduler_position", timesteps=(2,), n_steps=4)
    (time,) = backbone.schedule.resolve(spec)
    got = corrupt(posterior.latents(torch.cat(draws)), torch.cat(noise), time)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


# --- prompts of any length ----------------------------------------------------------------------


def test_prompts_of_a_batch_do_not_move_each_other(backbone: Backbone) -> None:
    """A longer prompt in the batch hides behind a mask; positions are each sample's own. The sums
    over keys are grouped otherwise, so this holds up to rounding."""
    long = ConditionSpec(prompt="A photo of a very small cat on a sofa")
    alone = [backbone.conditioning(spec) for spec in (CAT, long)]
    lengths = [one.kwargs["encoder_hidden_states"].shape[1] for one in alone]
    assert lengths == [30, 56]  # padded by the network to 32 and 64
    both = Conditioning.stack(alone)
    assert both.kwargs["encoder_attention_mask"].sum(1).tolist() == lengths
    x, at = noisy(), ScheduleSpec(convention="flow", timesteps=(0.26,))
    paths = ("layers.0", "layers.2", "v")
    got = tapped(backbone, x, at, both, *paths)
    for i, one in enumerate(alone):
        want = tapped(backbone, x[i : i + 1], at, one, *paths)
        for path in paths:
            torch.testing.assert_close(got[path][i : i + 1], want[path], rtol=1e-4, atol=1e-5)
        other = tapped(backbone, x[i : i + 1], at, alone[1 - i], *paths)
        assert not torch.allclose(got["v"][i : i + 1], other["v"], rtol=1e-3, atol=1e-3)


def test_a_mask_hides_tokens_of_precomputed_embeddings(backbone: Backbone, tmp_path: Path) -> None:
    states = torch.randn(9, 24)
    mask = torch.tensor([1, 1, 0, 1, 0, 1, 1, 0, 1])
    files = {
        "masked": {"prompt_embeds": states, "prompt_attention_mask": mask},
        "short": {"prompt_embeds": states[mask.bool()]},
    }
    got = []
    for name, tensors in files.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        path = str(tmp_path / f"{name}.safetensors")
        told = backbone.conditioning(ConditionSpec(prompt_embeddings=path))
        at = ScheduleSpec(convention="flow", timesteps=(0.5,))
        got.append(tapped(backbone, noisy(), at, told, "v", "context_refiner.0"))
    assert got[0]["context_refiner.0"].shape == (2, 6, 32)
    for name in got[0]:
        assert torch.equal(got[0][name], got[1][name])


def spec_of(folder: Path, root: Path, taps: list[str], **condition: object) -> Pipeline:
    return Pipeline.parse(
        {
            "name": "captions",
            "dataset": {"tars": str(root / "*.tar")},
            "images": {"size": 16},
            "backbone": {"model": str(folder)},
            "condition": condition,
            "latents": {"posterior": "mean"},
            "schedule": {"convention": "flow", "timesteps": [0.26]},
            "taps": taps,
            "features": {"dtype": "float32", "batch_size": 3, "rows_per_unit": 3},
            "store": {"url": str(root / "s.zarr")},
        }
    )


def test_a_store_tells_each_sample_its_own_caption(folder: Path, tmp_path: Path) -> None:
    def rows(name: str, **condition: object) -> np.ndarray:
        write_photo_tars(tmp_path / name, n_samples=6, n_tars=1, size=16)
        store = extract(spec_of(folder, tmp_path / name, ["layers.1"], **condition)).store
        return np.concatenate([store.read_unit("layers.1", 0, unit) for unit in store.units])

    mixed = rows("mixed", caption=True)
    assert mixed.shape == (6, 32, 4, 4)
    for i, prompt in enumerate(["a temple", "a flower"]):
        alone = rows(f"only{i}", prompt=prompt)
        np.testing.assert_allclose(mixed[i::2], alone[i::2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "tap", ["context_refiner.0", "layers.0@out.text", "layers.0.attention@attn.probs.image"]
)
def test_text_tokens_of_captions_are_refused(folder: Path, tmp_path: Path, tap: str) -> None:
    write_photo_tars(tmp_path, n_samples=4, n_tars=1, size=16)
    reduced = {"path": tap, "reduce": ["head_mean"]} if "probs" in tap else tap
    with pytest.raises(TapError, match=r"does not pad prompts to one length.* tap image tokens"):
        prepare(spec_of(folder, tmp_path, [reduced], caption=True))  # type: ignore[list-item]
    prepare(spec_of(folder, tmp_path, [reduced], prompt="a cat"))  # type: ignore[list-item]


# --- tokens -------------------------------------------------------------------------------------


def test_probabilities_are_among_tokens_without_padding(backbone: Backbone) -> None:
    path = "layers.0.attention@attn.probs"
    taps = [TapSpec(path=f"{path}.{parts}", reduce=("head_mean",))
            for parts in ("image.image", "image.text", "text.image")]  # fmt: skip
    (time,) = backbone.schedule.resolve(ScheduleSpec(convention="flow", timesteps=(0.26,)))
    with torch.no_grad():
        got = backbone.tap(
            noisy(), time, backbone.conditioning(CAT), resolve(backbone.network, taps),
            lambda _tap, value, _dims: value.clone(),
        )  # fmt: skip
    shapes = [tuple(value.shape) for value in got.values()]
    assert shapes == [(2, 24, 4, 6), (2, 30, 4, 6), (2, 30, 24)]
    sums = sum(value.flatten(2).sum(1) for value in list(got.values())[:2])
    assert isinstance(sums, Tensor)
    assert (sums < 1).all()  # the rest is on the padding
    assert (sums > 0.5).all()


@pytest.mark.parametrize("path", ["all_x_embedder.2-1", "cap_embedder", "cap_embedder.0@in"])
def test_rows_of_the_whole_batch_are_refused(backbone: Backbone, path: str) -> None:
    at = ScheduleSpec(convention="flow", timesteps=(0.26,))
    with pytest.raises(TapError, match=r"whole batch in one row; tap what follows, noise_refiner"):
        tapped(backbone, noisy(), at, backbone.conditioning(CAT), path)


def test_the_first_refiner_takes_the_embedded_patches(backbone: Backbone) -> None:
    at = ScheduleSpec(convention="flow", timesteps=(0.26,))
    (got,) = tapped(
        backbone, noisy(), at, backbone.conditioning(CAT), "noise_refiner.0@in"
    ).values()
    embed = backbone.network.get_submodule("all_x_embedder.2-1")
    for y, x in ((0, 0), (1, 4), (3, 5)):
        patch = noisy()[:, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].permute(0, 2, 3, 1).flatten(1)
        torch.testing.assert_close(got[:, :, y, x], embed(patch), rtol=1e-5, atol=1e-6)


def test_adaln_is_the_modulation(backbone: Backbone) -> None:
    block = "layers.1"
    paths = [f"{block}@adaln.scale", f"{block}@adaln.scale_mlp", f"{block}.attention_norm1"]
    paths += [f"{block}.attention@in", f"{block}.ffn_norm1", f"{block}@ff.in"]
    at = ScheduleSpec(convention="flow", timesteps=(0.26,))
    got = tapped(backbone, noisy(), at, backbone.conditioning(CAT), *paths)
    scale, scale_mlp, norm1, attended, norm2, fed = got.values()
    for factor, norm, want in ((scale, norm1, attended), (scale_mlp, norm2, fed)):
        assert torch.equal(norm * (1 + factor[:, :, None, None]), want)
    with pytest.raises(TapError, match=r"has the site adaln\.shift"):
        backbone.resolve([TapSpec(path=f"{block}@adaln.shift")])


def test_spans_skip_the_padding() -> None:
    streams = Streams(24, 30, text_first=False, multiple=32)
    assert streams.span(32, "image") == (0, 24)
    assert streams.span(32, "text") == (0, 30)
    assert streams.span(64, "image") == (0, 24)
    assert streams.span(64, "text") == (32, 30)
    assert streams.span(24, "image") is None
    assert Streams(64, 33, text_first=True, multiple=32).span(128, "image") == (64, 64)
