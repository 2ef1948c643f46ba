"""What only Qwen-Image has: a VAE of videos, latents scaled per channel, prompts of any length."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageImg2ImgPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from torch import Tensor
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from drl_data.backbones import Backbone, Conditioning, ModelFolder, load_backbone
from drl_data.backbones.vae import decode_latents, vae_factor
from drl_data.diffusion_spec import ConditionSpec, ScheduleSpec
from drl_data.errors import TapError
from drl_data.pipeline import Pipeline
from drl_data.runs import extract, prepare
from drl_data.schedule import corrupt
from drl_data.spec import BackboneSpec, TapSpec
from drl_data.testing import write_photo_tars
from drl_data.tiny_models import save_tiny_qwen_image

pytestmark = pytest.mark.usefixtures("one_thread")

CAT = ConditionSpec(prompt="A small cat")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_qwen_image(tmp_path_factory.mktemp("qwen_image") / "model")


@pytest.fixture(scope="session")
def backbone(folder: Path) -> Backbone:
    return load(folder, "cpu")


def load(folder: Path, device: str, **changes: object) -> Backbone:
    return load_backbone(ModelFolder.find(BackboneSpec(model=str(folder), **changes)), device)


def pipeline_of(folder: Path, cls: type = QwenImagePipeline) -> QwenImagePipeline:
    pipeline = cls(
        FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        AutoencoderKLQwenImage.from_pretrained(folder / "vae").eval(),
        Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder").eval(),
        AutoTokenizer.from_pretrained(folder / "tokenizer"),
        QwenImageTransformer2DModel.from_pretrained(folder / "transformer").eval(),
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


def test_a_step_of_the_pipeline_goes_along_v(folder: Path, backbone: Backbone) -> None:
    pipeline, x = pipeline_of(folder), noisy(1)
    steps: list[Tensor] = []
    pipeline(
        prompt=CAT.prompt,
        height=16,
        width=24,
        num_inference_steps=3,
        latents=QwenImagePipeline._pack_latents(x, 1, 16, 8, 12),
        output_type="latent",
        callback_on_step_end=lambda _p, _i, _t, kept: steps.append(kept["latents"]) or {},
    )
    sigmas = pipeline.scheduler.sigmas
    steps = [QwenImagePipeline._unpack_latents(step, 16, 24, 2).squeeze(2) for step in steps]
    told = backbone.conditioning(CAT)
    for i, (before, after) in enumerate(zip([x, *steps[:-1]], steps, strict=True)):
        at = ScheduleSpec(convention="flow", timesteps=(float(sigmas[i]),))
        v = tapped(backbone, before, at, told, "v")["v"]
        # the pipeline divides 1000 sigma by 1000 again, which may round
        torch.testing.assert_close(after, before + (sigmas[i + 1] - sigmas[i]) * v)


def test_a_perfect_network_predicts_the_clean_latent(folder: Path) -> None:
    backbone = load(folder, "cpu")
    clean, noise = noisy(), torch.randn(2, 16, 8, 12)
    perfect = QwenImagePipeline._pack_latents(noise - clean, 2, 16, 8, 12)
    backbone.network.register_forward_hook(lambda *_: (perfect,))
    at = ScheduleSpec(convention="flow", timesteps=(0.26,))
    (time,) = backbone.schedule.resolve(at)
    assert time.model_time == pytest.approx(0.26)
    x = corrupt(clean, noise, time)
    got = tapped(backbone, x, at, backbone.conditioning(CAT), "x0", "eps", "v")
    torch.testing.assert_close(got["x0"], clean, rtol=0, atol=1e-6)
    torch.testing.assert_close(got["eps"], noise, rtol=0, atol=1e-6)
    assert torch.equal(got["v"], backbone.schedule.target(clean, noise, time))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_latents_are_those_of_the_image_to_image_pipeline(folder: Path, dtype: str) -> None:
    backbone = load(folder, "cpu", dtype=dtype)
    pipeline = pipeline_of(folder, QwenImageImg2ImgPipeline)
    pipeline.vae.to(backbone.dtype)
    pixels = (torch.rand(2, 3, 16, 24) * 2 - 1).to(backbone.dtype)
    draw = torch.randn(
        2, 16, 1, 8, 12, generator=torch.Generator().manual_seed(0), dtype=backbone.dtype
    ).squeeze(2)
    with torch.no_grad():
        posterior = backbone.encode(pixels)
        want = pipeline._encode_vae_image(pixels.unsqueeze(2), torch.Generator().manual_seed(0))
    for scale in (True, "per_channel"):
        assert torch.equal(posterior.latents(draw, scale=scale), want.squeeze(2))
    assert torch.equal(posterior.latents(None, scale=False), posterior.mean)
    assert not torch.allclose(want.squeeze(2), posterior.mean)


def test_latents_decode_as_the_pipeline_decodes_them(folder: Path, backbone: Backbone) -> None:
    pipeline, x = pipeline_of(folder), noisy(1)
    want = pipeline(
        prompt=CAT.prompt, height=16, width=24, num_inference_steps=1, output_type="pt",
        latents=QwenImagePipeline._pack_latents(x, 1, 16, 8, 12),
    ).images  # fmt: skip
    at = ScheduleSpec(convention="flow", timesteps=(1.0,))
    clean = tapped(backbone, x, at, backbone.conditioning(CAT), "x0")["x0"]
    with torch.no_grad():
        (got,) = decode_latents(backbone.vae, clean, scaled=True)  # type: ignore[misc, arg-type]
    torch.testing.assert_close((got[:, :, 0] / 2 + 0.5).clamp(0, 1), want)
    assert vae_factor(backbone.vae) == 2  # type: ignore[arg-type]


def pipeline_spec(folder: Path, root: Path, taps: list[str], **condition: object) -> Pipeline:
    return Pipeline.parse(
        {
            "name": "qwen",
            "dataset": {"tars": str(root / "*.tar")},
            "images": {"size": 16},
            "backbone": {"model": str(folder)},
            "condition": condition,
            "schedule": {"convention": "flow", "timesteps": [0.26]},
            "taps": taps,
            "features": {"dtype": "float32", "batch_size": 3, "rows_per_unit": 3},
            "store": {"url": str(root / "s.zarr")},
        }
    )


def test_blocks_of_the_vae_are_maps(folder: Path, tmp_path: Path) -> None:
    write_photo_tars(tmp_path, n_samples=3, n_tars=1, size=16)
    taps = ["vae.enc[0]", "vae.encoder.mid_block", "vae.dec[0]", "latent.moments", "latent"]
    store = extract(pipeline_spec(folder, tmp_path, taps)).store
    shapes = {array.name: (array.dims, array.shape) for array in store.arrays}
    maps = ("channel", "height", "width")
    assert shapes["vae.encoder.mid_block"] == (maps, (16, 8, 8))
    assert shapes["latent.moments"] == (maps, (32, 8, 8))
    assert shapes["latent"] == (maps, (16, 8, 8))
    assert all(dims == maps for dims, _ in shapes.values())


def test_prompts_of_a_batch_do_not_move_each_other(backbone: Backbone) -> None:
    """Up to rounding: behind the mask there are more keys."""
    long = ConditionSpec(prompt="A photo of a very small cat on a sofa")
    alone = [backbone.conditioning(spec) for spec in (CAT, long)]
    both = Conditioning.stack(alone)
    lengths = [one.kwargs["encoder_hidden_states"].shape[1] for one in alone]
    assert both.kwargs["encoder_hidden_states_mask"].sum(1).tolist() == lengths
    x, at = noisy(), ScheduleSpec(convention="flow", timesteps=(0.26,))
    got = tapped(backbone, x, at, both, "transformer_blocks.1", "v")
    for i, one in enumerate(alone):
        want = tapped(backbone, x[i : i + 1], at, one, "transformer_blocks.1", "v")
        for path, value in want.items():
            torch.testing.assert_close(got[path][i : i + 1], value, rtol=1e-4, atol=1e-5)
    other = tapped(backbone, x[:1], at, alone[1], "v")["v"]
    assert not torch.allclose(got["v"][:1], other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tap", ["transformer_blocks.0@out.0", "transformer_blocks.0.txt_mlp"])
def test_text_tokens_of_captions_are_refused(folder: Path, tmp_path: Path, tap: str) -> None:
    write_photo_tars(tmp_path, n_samples=4, n_tars=1, size=16)
    with pytest.raises(TapError, match=r"does not pad prompts to one length.* tap image tokens"):
        prepare(pipeline_spec(folder, tmp_path, [tap], caption=True))
    prepare(pipeline_spec(folder, tmp_path, [tap], prompt="a cat"))
    prepare(pipeline_spec(folder, tmp_path, ["transformer_blocks.0@out.1"], caption=True))


def test_a_long_prompt_is_cut(folder: Path, backbone: Backbone) -> None:
    long = ConditionSpec(prompt="cat " * 400)
    for place in (backbone, load(folder, "meta")):
        assert place.conditioning(long).kwargs["encoder_hidden_states"].shape == (1, 512, 24)
    want, _ = pipeline_of(folder).encode_prompt(long.prompt, max_sequence_length=512)
    assert torch.equal(backbone.conditioning(long).kwargs["encoder_hidden_states"], want)


def test_adaln_is_the_modulation_of_the_image(backbone: Backbone) -> None:
    """x (1 + scale) + shift of the normalised input is what the attention takes."""
    block = "transformer_blocks.1"
    paths = [f"{block}@adaln.{part}" for part in ("shift", "scale", "scale_mlp", "shift_mlp")]
    paths += [f"{block}.img_norm1", f"{block}.attn@in", f"{block}.img_norm2", f"{block}@ff.in"]
    at = ScheduleSpec(convention="flow", timesteps=(0.26,))
    got = tapped(backbone, noisy(), at, backbone.conditioning(CAT), *paths)
    shift, scale, scale_mlp, shift_mlp, norm1, attended, norm2, fed = got.values()
    for vector, factor, norm, want in (
        (shift, scale, norm1, attended),
        (shift_mlp, scale_mlp, norm2, fed),
    ):
        modulated = norm * (1 + factor[:, :, None, None]) + vector[:, :, None, None]
        assert torch.equal(modulated, want)
