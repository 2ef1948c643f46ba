"""Recipes of one noised forward on many backbones: GDF, DistillDIFT's teachers, DiffCut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PixArtTransformer2DModel,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5EncoderModel,
    T5Tokenizer,
)

from drl_data.backbones import find_model, load_backbone
from drl_data.backbones.backbone import CLEAN
from drl_data.diffusion_spec import ConditionSpec
from drl_data.noise import draw_normal
from drl_data.pipeline import Pipeline
from drl_data.recipes import find_recipe
from drl_data.spec import BackboneSpec
from tests.references import Rehearsed, hooked, rehearse

pytestmark = pytest.mark.usefixtures("one_thread")

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LATENT = (4, 16, 16)
Paths = Mapping[str, str]
BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC


def photo_of(run: Rehearsed) -> list[str]:
    return [f"a photo of a {photo.label}" for photo in run.photos]


def latents_of(
    run: Rehearsed, resample: Image.Resampling, *, draws: bool = True, unit_range: bool = False
) -> Tensor:
    """A draw from the VAE's posterior, or its mean; scaled. [4, 4, 16, 16]

    `unit_range`: of pixels in 0..1 instead of -1..1.
    """
    vae = AutoencoderKL.from_pretrained(run.model / "vae").eval()
    pixels = run.pixels(resample)
    if unit_range:
        pixels = torch.round((pixels + 1) / 2 * 255) / 255
    posterior = vae.encode(pixels).latent_dist
    z = posterior.mean
    if draws:
        z = z + posterior.std * run.noise(LATENT, role="posterior")
    return z * vae.config.scaling_factor


@dataclass
class Told:
    """A UNet and what it is told besides the time."""

    unet: UNet2DConditionModel
    kwargs: dict[str, object]

    @classmethod
    def of(cls, run: Rehearsed, prompts: list[str]) -> Told:
        """Of Stable Diffusion, or of SDXL with both CLIPs and the sizes; each prompt for itself."""
        unet = UNet2DConditionModel.from_pretrained(run.model / "unet").eval()
        is_xl = (run.model / "text_encoder_2").is_dir()
        tokenizer = CLIPTokenizer.from_pretrained(run.model / "tokenizer")
        ids = [
            tokenizer(p, padding="max_length", truncation=True, return_tensors="pt").input_ids
            for p in prompts
        ]
        first = CLIPTextModel.from_pretrained(run.model / "text_encoder").eval()
        states = [first(i, output_hidden_states=True) for i in ids]
        if not is_xl:
            text = torch.cat([s.last_hidden_state for s in states])
            return cls(unet, {"encoder_hidden_states": text})
        second = CLIPTextModelWithProjection.from_pretrained(run.model / "text_encoder_2").eval()
        others = [second(i, output_hidden_states=True) for i in ids]
        text = torch.cat(
            [
                torch.cat([a.hidden_states[-2], b.hidden_states[-2]], dim=-1)
                for a, b in zip(states, others, strict=True)
            ]
        )
        side = run.pipeline.images.size[0]
        sizes = torch.tensor([side, side, 0, 0, side, side]).expand(len(prompts), 6)
        added = {"text_embeds": torch.cat([b.text_embeds for b in others]), "time_ids": sizes}
        return cls(unet, {"encoder_hidden_states": text, "added_cond_kwargs": added})

    def features(self, noisy: Tensor, t: Tensor | float, *paths: str) -> dict[str, Tensor]:
        """Outputs of modules in one forward; tokens as maps."""
        kept = hooked(self.unet, *paths)
        self.unet(noisy, t, **self.kwargs)
        return {path: as_map(kept[path]) for path in paths}


def as_map(out: object) -> Tensor:
    """What a module gives, tokens [b, n, c] of a square image as [b, c, h, w]."""
    x = out[0] if isinstance(out, tuple) else out
    assert isinstance(x, Tensor)
    if x.ndim == 4:
        return x
    side = int(x.shape[1] ** 0.5)
    return x.reshape(len(x), side, side, -1).permute(0, 3, 1, 2)


def assert_stored(run: Rehearsed, want: dict[str, Tensor]) -> None:
    """The arrays, by name, in this order and no others."""
    assert [array.name for array in run.store.arrays] == list(want)
    for name, tensor in want.items():
        assert torch.equal(run.features(name), tensor), name


# --- Generic Diffusion Feature ------------------------------------------------------------------


def blocks(up: int, attention: int, block: int = 0) -> str:
    return f"up_blocks.{up}.attentions.{attention}.transformer_blocks.{block}"


PRACTICAL_15 = {
    "up-level1-repeat1-vit-block0-cross-q": f"{blocks(1, 1)}.attn2.to_q",
    "up-level1-repeat2-res-out": "up_blocks.1.resnets.2",
    "up-level2-repeat1-vit-block0-cross-q": f"{blocks(2, 1)}.attn2.to_q",
    "up-level3-repeat0-vit-block0-self-k": f"{blocks(3, 0)}.attn1.to_k",
}
LEGACY_15 = {
    "up-level0-upsampler-out": "up_blocks.0.upsamplers.0",
    "up-level1-upsampler-out": "up_blocks.1.upsamplers.0",
    "up-level2-upsampler-out": "up_blocks.2.upsamplers.0",
    "up-level3-repeat2-vit-out": "up_blocks.3.attentions.2",
}
PRACTICAL_XL = {
    "up-level0-repeat0-vit-block7-out": blocks(0, 0, 7),
    "up-level0-repeat0-vit-block5-out": blocks(0, 0, 5),
    "up-level1-repeat0-vit-block0-cross-q": f"{blocks(1, 0)}.attn2.to_q",
    "up-level1-repeat0-vit-block0-out": blocks(1, 0),
}
LEGACY_XL = {
    "up-level0-upsampler-out": "up_blocks.0.upsamplers.0",
    "up-level1-upsampler-out": "up_blocks.1.upsamplers.0",
    "up-level2-repeat2-res-out": "up_blocks.2.resnets.2",
}


@torch.no_grad()
def gdf(
    run: Rehearsed, pipeline: type, scheduler: PNDMScheduler | EulerDiscreteScheduler, paths: Paths
) -> tuple[float, dict[str, Tensor]]:
    """What `extract(t=50)` of the published code does: the time that diffusers' own image-to-image
    pipeline begins at, and the features there."""
    scheduler.set_timesteps(1000)
    img2img = object.__new__(pipeline)  # without weights: only its method is wanted
    object.__setattr__(img2img, "scheduler", scheduler)
    timesteps, _ = pipeline.get_timesteps(img2img, 1000, 50 / 1000, "cpu")  # type: ignore[attr-defined]
    t = timesteps[:1]
    noisy = scheduler.add_noise(latents_of(run, BICUBIC), run.noise(LATENT), t.repeat(4))
    noisy = scheduler.scale_model_input(noisy, t)
    got = Told.of(run, photo_of(run)).features(noisy, t.repeat(4), *paths.values())
    return float(t), {name: got[path] for name, path in paths.items()}


def gdf_sd15(name: str, paths: Paths, tmp_path: Path) -> None:
    run = rehearse(name, tmp_path)
    scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1)
    t, want = gdf(run, StableDiffusionImg2ImgPipeline, scheduler, paths)
    assert t == 51  # the golden value (recipes.md 2.2)
    assert [time.model_time for time in run.store.times] == [51]
    assert_stored(run, want)


def test_gdf_practical_sd15(tmp_path: Path) -> None:
    gdf_sd15("gdf_practical_sd15", PRACTICAL_15, tmp_path)


def test_gdf_legacy_sd15(tmp_path: Path) -> None:
    gdf_sd15("gdf_legacy_sd15", LEGACY_15, tmp_path)


def gdf_sdxl(name: str, paths: Paths, tmp_path: Path) -> None:
    run = rehearse(name, tmp_path)
    scheduler = EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1)
    t, want = gdf(run, StableDiffusionXLImg2ImgPipeline, scheduler, paths)
    (time,) = run.store.times
    assert t == time.model_time == 50
    assert time.sigma / time.alpha == pytest.approx(0.2256, abs=1e-4)  # recipes.md 2.2
    assert time.sigma**2 + time.alpha**2 == pytest.approx(1, abs=1e-6)
    assert [array.name for array in run.store.arrays] == list(want)
    for array, tensor in want.items():
        # Not to the bit: (x + sigma eps) / sqrt(sigma^2 + 1) rounds otherwise than alpha x + s eps.
        torch.testing.assert_close(run.features(array), tensor, rtol=1e-4, atol=1e-5)


def test_gdf_practical_sdxl(tmp_path: Path) -> None:
    gdf_sdxl("gdf_practical_sdxl", PRACTICAL_XL, tmp_path)


def test_gdf_legacy_sdxl(tmp_path: Path) -> None:
    gdf_sdxl("gdf_legacy_sdxl", LEGACY_XL, tmp_path)


# --- DistillDIFT's teachers ---------------------------------------------------------------------


def numbered(unet: UNet2DConditionModel) -> list[str]:
    """The layers of DistillDIFT's extractor: 0 is the middle, then what its own forward of the up
    blocks appends to `intermediates`."""
    layers = ["mid_block"]
    for i, block in enumerate(unet.up_blocks):
        kind = "attentions" if hasattr(block, "attentions") else "resnets"
        layers += [f"up_blocks.{i}.{kind}.{j}" for j in range(len(block.resnets))]
        layers += [f"up_blocks.{i}.upsamplers.0"] if block.upsamplers else []
    return layers


@torch.no_grad()
def teacher(name: str, t: int, layers: list[int], tmp_path: Path) -> None:
    run = rehearse(name, tmp_path)
    told = Told.of(run, photo_of(run))
    noisy = DDIMScheduler(**BETAS).add_noise(
        latents_of(run, BILINEAR), run.noise(LATENT), torch.full((4,), t)
    )
    paths = numbered(told.unet)
    got = told.features(noisy, torch.full((4,), t), *(paths[i] for i in layers))
    assert_stored(run, {f"layer{i}": got[paths[i]] for i in layers})


def test_distilldift_sd15(tmp_path: Path) -> None:
    teacher("distilldift_sd15", 201, [5], tmp_path)


def test_distilldift_sd21(tmp_path: Path) -> None:
    teacher("distilldift_sd21", 261, [0, 3, 5, 8, 11, 13, 15], tmp_path)


def test_distilldift_sdxl(tmp_path: Path) -> None:
    teacher("distilldift_sdxl", 101, [1], tmp_path)


def test_distilldift_sdxl_turbo(tmp_path: Path) -> None:
    teacher("distilldift_sdxl_turbo", 101, [1], tmp_path)


def test_distilldift_lcm_sdxl(tmp_path: Path) -> None:
    teacher("distilldift_lcm_sdxl", 64, [1], tmp_path)
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "model" / "unet")
    assert unet.time_embedding.cond_proj is not None  # it could be told one


@torch.no_grad()
def test_distilldift_pixart(tmp_path: Path) -> None:
    run = rehearse("distilldift_pixart", tmp_path)
    transformer = PixArtTransformer2DModel.from_pretrained(run.model / "transformer").eval()
    tokenizer = T5Tokenizer.from_pretrained(run.model / "tokenizer")
    encoder = T5EncoderModel.from_pretrained(run.model / "text_encoder").eval()
    tokens = [
        tokenizer(p, padding="max_length", max_length=120, truncation=True, return_tensors="pt")
        for p in photo_of(run)
    ]
    states = [encoder(t.input_ids, attention_mask=t.attention_mask)[0] for t in tokens]
    kept = hooked(transformer, "transformer_blocks.10.attn2.to_q")
    transformer(
        latents_of(run, BILINEAR, unit_range=True),
        encoder_hidden_states=torch.cat(states),
        encoder_attention_mask=torch.cat([t.attention_mask for t in tokens]),
        timestep=torch.zeros(4, dtype=torch.long),
        added_cond_kwargs={
            "resolution": torch.full((4, 2), 32.0),
            "aspect_ratio": torch.ones(4, 1),
        },
    )
    assert_stored(run, {"layer10": as_map(kept["transformer_blocks.10.attn2.to_q"])})


# --- DiffCut ------------------------------------------------------------------------------------


@torch.no_grad()
def diffcut(name: str, block: int, tmp_path: Path) -> None:
    """`block` is the index into down_blocks that the published code has for the model."""
    run = rehearse(name, tmp_path)
    told = Told.of(run, [""] * 4)
    level = len(told.unet.down_blocks) + block
    attentions = told.unet.down_blocks[level].attentions
    last = f"down_blocks.{level}.attentions.{len(attentions) - 1}"
    path = f"{last}.transformer_blocks.{len(attentions[-1].transformer_blocks) - 1}.attn1"
    noise = torch.from_numpy(draw_normal(LATENT, "noise", 42, "shared", 0, "all"))
    noisy = DDIMScheduler(**BETAS).add_noise(
        latents_of(run, BILINEAR, draws=False), noise.expand(4, *LATENT), torch.full((4,), 50)
    )
    got = told.features(noisy, torch.full((4,), 50), path)
    assert_stored(run, {"attention": got[path]})


def test_diffcut_ssd1b(tmp_path: Path) -> None:
    diffcut("diffcut_ssd1b", -1, tmp_path)


def test_diffcut_sd14(tmp_path: Path) -> None:
    diffcut("diffcut_sd14", -2, tmp_path)


# --- the real models ----------------------------------------------------------------------------

SD15, SD21 = "stable-diffusion-v1-5", "stable-diffusion-2-1"
SDXL, PIXART = "stable-diffusion-xl-base-1.0", "PixArt-XL-2-1024-MS"

# recipe: (bundled configuration of its architecture, shape of each array)
REAL: Mapping[str, tuple[str, list[tuple[int, int, int]]]] = {
    "gdf_practical_sd15": (SD15, [(1280, 16, 16), (1280, 16, 16), (640, 32, 32), (320, 64, 64)]),
    "gdf_legacy_sd15": (SD15, [(1280, 16, 16), (1280, 32, 32), (640, 64, 64), (320, 64, 64)]),
    "gdf_practical_sdxl": (SDXL, [(1280, 32, 32)] * 2 + [(640, 64, 64)] * 2),
    "gdf_legacy_sdxl": (SDXL, [(1280, 64, 64), (640, 128, 128), (320, 128, 128)]),
    "distilldift_sd15": (SD15, [(1280, 24, 24)]),
    "distilldift_sd21": (
        SD21,
        [
            (1280, 12, 12),
            (1280, 12, 12),
            (1280, 24, 24),
            (1280, 48, 48),
            (640, 48, 48),
            (320, 96, 96),
            (320, 96, 96),
        ],
    ),
    "distilldift_sdxl": (SDXL, [(1280, 24, 24)]),
    "distilldift_sdxl_turbo": (SDXL, [(1280, 24, 24)]),
    "distilldift_lcm_sdxl": (SDXL, [(1280, 32, 32)]),
    "distilldift_pixart": (PIXART, [(1152, 64, 64)]),
    "diffcut_ssd1b": ("SSD-1B", [(1280, 32, 32)]),
    "diffcut_sd14": (SD15, [(1280, 32, 32)]),
}


@pytest.mark.parametrize("name", REAL)
def test_shapes_of_the_real_model(name: str) -> None:
    architecture, want = REAL[name]
    recipe = Pipeline.load(find_recipe(name))
    backbone = load_backbone(find_model(BackboneSpec(model=f"bundled:{architecture}")), "meta")
    taps = backbone.resolve(recipe.taps)
    arrays = backbone.arrays(taps, recipe.images, ConditionSpec(), CLEAN, "float16")
    assert [array.shape for array in arrays] == want


@pytest.mark.parametrize(
    ("name", "n_channels"),
    [
        ("gdf_practical_sd15", 3520),
        ("gdf_legacy_sd15", 3520),
        ("gdf_practical_sdxl", 3840),
        ("gdf_legacy_sdxl", 2240),
    ],
)
def test_gdf_has_the_published_channels(name: str, n_channels: int) -> None:
    """`feature_len` of the published configurations."""
    assert sum(shape[0] for shape in REAL[name][1]) == n_channels
