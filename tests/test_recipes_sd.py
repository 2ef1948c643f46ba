"""Recipes on Stable Diffusion 1 and 2, against straight lines of plain diffusers calls.

Those that are fused with DINOv2, and ODISE, are in test_recipes_sd_fused.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from drl_data.backbones import find_model, load_backbone
from drl_data.backbones.backbone import CLEAN
from drl_data.diffusion_spec import ConditionSpec, NoiseSpec
from drl_data.pipeline import Pipeline
from drl_data.recipes import find_recipe
from drl_data.spec import BackboneSpec
from tests.references import N_SAMPLES, hooked, rehearse
from tests.references_sd import PlainSd, encoded, shared_noise

pytestmark = pytest.mark.usefixtures("one_thread")


def dift(name: str, folder: Path, tap: str, t: int, prompt: str | None = None) -> None:
    """DIFT (recipes.md 3A): eight draws of posterior and noise, features averaged."""
    run = rehearse(name, folder)
    sd = PlainSd(run)
    if prompt is not None:
        sd.text = encoded(run.model, [prompt.format(p.label) for p in run.photos])
    kept = hooked(sd.unet, tap)
    total = torch.zeros(())
    for member in range(8):
        latents = sd.sample(run.pixels(), member)
        sd.forward(latents, sd.own_noise(latents, member=member), t)
        total = total + kept[tap]
    (array,) = run.pipeline.taps
    assert array.name is not None
    assert torch.equal(run.features(array.name), total / 8)


@torch.no_grad()
def test_dift_sd21_spair(tmp_path: Path) -> None:
    dift("dift_sd21_spair", tmp_path, "up_blocks.1", 261, "a photo of a {}")


@torch.no_grad()
def test_dift_sd21_hpatches(tmp_path: Path) -> None:
    dift("dift_sd21_hpatches", tmp_path, "up_blocks.2", 0)


@torch.no_grad()
def test_dift_sd21_davis(tmp_path: Path) -> None:
    dift("dift_sd21_davis", tmp_path, "up_blocks.2", 51)


def cleandift(name: str, folder: Path) -> None:
    """CleanDIFT: other weights, clean latents, told 261, the third module of the second level."""
    run = rehearse(name, folder)
    assert run.pipeline.backbone is not None
    assert run.pipeline.backbone.weights is not None
    sd = PlainSd(run)
    latents = sd.sample(run.pixels())
    kept = hooked(sd.unet, "up_blocks.1.upsamplers.0")
    sd.forward(latents, None, 261)
    assert not torch.allclose(run.features("us6"), kept["up_blocks.1.upsamplers.0"], atol=1e-3)
    sd.unet.load_state_dict(load_file(run.pipeline.backbone.weights))
    sd.forward(latents, None, 261)
    assert torch.equal(run.features("us6"), kept["up_blocks.1.upsamplers.0"])
    # us6 is the end of the block, DIFT's up_blocks.1, but not of its last attention, us5.
    kept = hooked(sd.unet, "up_blocks.1", "up_blocks.1.attentions.1")
    sd.forward(latents, None, 261)
    assert torch.equal(run.features("us6"), kept["up_blocks.1"])


@torch.no_grad()
def test_cleandift_sd21(tmp_path: Path) -> None:
    cleandift("cleandift_sd21", tmp_path)


@torch.no_grad()
def test_cleandift_sd15(tmp_path: Path) -> None:
    cleandift("cleandift_sd15", tmp_path)


@torch.no_grad()
def test_sd4match_sd21_spair(tmp_path: Path) -> None:
    run = rehearse("sd4match_sd21_spair", tmp_path)
    sd = PlainSd(run)
    file = run.pipeline.condition.prompt_embeddings
    assert file is not None
    sd.text = load_file(file)["prompt_embeds"].expand(N_SAMPLES, -1, -1)
    latents = sd.sample(run.pixels())  # one for all members
    kept = hooked(sd.unet, "up_blocks.1")
    total, redrawn = torch.zeros(()), torch.zeros(())
    for member in range(8):
        sd.forward(latents, sd.own_noise(latents, member=member), 261)
        total = total + kept["up_blocks.1"]
        sd.forward(sd.sample(run.pixels(), member), sd.own_noise(latents, member=member), 261)
        redrawn = redrawn + kept["up_blocks.1"]
    assert torch.equal(run.features("up1"), total / 8)
    assert not torch.equal(run.features("up1"), redrawn / 8)  # that is DIFT


@torch.no_grad()
def test_probe3d_sd21(tmp_path: Path) -> None:
    run = rehearse("probe3d_sd21", tmp_path)
    sd = PlainSd(run)
    sd.text = encoded(run.model, [p.caption for p in run.photos])
    latents = sd.mean(run.pixels())
    taps = [f"up_blocks.{i}" for i in range(4)]
    kept = hooked(sd.unet, *taps)
    sd.forward(latents, sd.own_noise(latents), 1)
    for tap in taps:
        assert torch.equal(run.features(tap), kept[tap])


SCR_TAPS = ("down_blocks.1", "down_blocks.2", "down_blocks.3", "mid_block")


@torch.no_grad()
@pytest.mark.parametrize("policy", ["per_run", "per_image"])
def test_scr_sd15(tmp_path: Path, policy: str) -> None:
    changes = {"noise": NoiseSpec()} if policy == "per_image" else {}
    run = rehearse("scr_sd15", tmp_path, **changes)
    sd = PlainSd(run)
    sd.text = encoded(run.model, [p.caption for p in run.photos])
    latents = sd.sample(run.pixels())
    noises = [shared_noise(latents, seed=0, base=None), sd.own_noise(latents)]
    noise, other = noises if policy == "per_run" else noises[::-1]
    kept = hooked(sd.unet, *SCR_TAPS)
    sd.forward(latents, noise, 0)
    for tap in SCR_TAPS:
        found = kept[tap]  # down blocks return (hidden state, skips)
        want = found[0] if isinstance(found, tuple) else found
        assert torch.equal(run.features(tap), want)
    sd.forward(latents, other, 0)
    assert not torch.equal(run.features("mid_block"), kept["mid_block"])


@torch.no_grad()
def test_revelio_sd15(tmp_path: Path) -> None:
    run = rehearse("revelio_sd15", tmp_path)
    sd = PlainSd(run)
    latents = sd.mean(run.pixels(Image.Resampling.BILINEAR))
    taps = ["mid_block", *(f"up_blocks.{i}" for i in range(4))]
    kept = hooked(sd.unet, *taps)
    sd.forward(latents, sd.own_noise(latents), 25)
    for tap in taps:
        assert torch.equal(run.features(tap), kept[tap])


@torch.no_grad()
def test_readout_sd15(tmp_path: Path) -> None:
    run = rehearse("readout_sd15", tmp_path)
    sd = PlainSd(run)
    latents = sd.sample(run.pixels())
    resnets = [f"up_blocks.{i}.resnets.{j}" for i in range(4) for j in range(3)]
    kept = hooked(sd.unet, *resnets, *(f"{name}.conv2" for name in resnets))
    assert len(run.store.arrays) == 12
    for position, t in enumerate(range(0, 1000, 100)):
        sd.forward(latents, sd.own_noise(latents, timestep=t), t)
        for name in resnets:
            got = run.features(f"{name}-pre_residual", position)
            assert torch.equal(got, kept[f"{name}.conv2"])
            assert not torch.allclose(got, kept[name], atol=1e-2)  # the sum with the shortcut


@torch.no_grad()
def test_vpd_frozen_sd15(tmp_path: Path) -> None:
    run = rehearse("vpd_frozen_sd15", tmp_path)
    sd = PlainSd(run)
    unscaled = sd.vae.encode(run.pixels()).latent_dist.mode()
    taps = {
        "out1": "up_blocks.0.resnets.1",
        "out4": "up_blocks.1.attentions.1",
        "out7": "up_blocks.2.attentions.1",
        "last": "up_blocks.3",
    }
    kept = hooked(sd.unet, *taps.values())

    def outputs() -> dict[str, Tensor]:
        found = {array: kept[path] for array, path in taps.items()}
        return {k: v[0] if isinstance(v, tuple) else v for k, v in found.items()}

    sd.forward(unscaled, None, 1)
    for array, want in outputs().items():
        assert torch.equal(run.features(array), want)
    sd.forward(unscaled * sd.vae.config.scaling_factor, None, 1)
    for array, scaled in outputs().items():
        assert not torch.allclose(run.features(array), scaled, atol=1e-3)


@torch.no_grad()
def test_diff3f_sd15(tmp_path: Path) -> None:
    run = rehearse("diff3f_sd15", tmp_path)
    sd = PlainSd(run)
    prompt = "{},best quality,highly detailed,photorealistic,photo"
    sd.text = encoded(run.model, [prompt.format(p.label) for p in run.photos])
    latents = sd.sample(run.pixels())
    # The last 18 of 30 DDIM steps, as diffusers places them for SD 1.5.
    sd.scheduler.register_to_config(steps_offset=1)
    sd.scheduler.set_timesteps(30)
    times = sd.scheduler.timesteps[-18:].tolist()
    assert list(run.pipeline.schedule.timesteps) == times  # type: ignore[union-attr]
    kept = hooked(sd.unet, "up_blocks.1")
    total = torch.zeros(())
    for t in times:
        sd.forward(latents, sd.own_noise(latents), t)
        found = kept["up_blocks.1"]
        assert isinstance(found, Tensor)
        total = total + F.normalize(found, dim=1)
    assert torch.equal(run.features("up1"), total / 18)


# --- the real models ------------------------------------------------------------------------------

SHAPES: dict[str, list[tuple[int, ...]]] = {
    "dift_sd21_spair": [(1280, 48, 48)],
    "dift_sd21_hpatches": [(640, 96, 96)],
    "dift_sd21_davis": [(640, 56, 104)],
    "cleandift_sd21": [(1280, 48, 48)],
    "cleandift_sd15": [(1280, 32, 32)],
    "sd4match_sd21_spair": [(1280, 48, 48)],
    "probe3d_sd21": [(1280, 16, 16), (1280, 32, 32), (640, 64, 64), (320, 64, 64)],
    "scr_sd15": [(640, 8, 8), (1280, 4, 4), (1280, 4, 4), (1280, 4, 4)],
    "revelio_sd15": [
        (1280, 8, 8), (1280, 16, 16), (1280, 32, 32), (640, 64, 64), (320, 64, 64)
    ],
    "readout_sd15": [
        *[(1280, 8, 8)] * 3, *[(1280, 16, 16)] * 3, *[(640, 32, 32)] * 3, *[(320, 64, 64)] * 3
    ],
    "vpd_frozen_sd15": [(1280, 8, 8), (1280, 16, 16), (640, 32, 32), (320, 64, 64)],
    "diff3f_sd15": [(1280, 32, 32)],
    "sd_dino_sd15": [(640, 60, 60), (1280, 30, 30), (1280, 15, 15)],
    "geoaware_sd15": [(640, 60, 60), (1280, 30, 30), (1280, 15, 15)],
    "sd_dino_dinov2": [(768, 60, 60)],
    "geoaware_dinov2": [(768, 60, 60)],
    "diff3f_dinov2": [(768, 37, 37)],
    "odise_sd13": [
        (512, 128, 128), (512, 64, 64),
        (2560, 8, 8), (1920, 16, 16), (960, 32, 32), (640, 64, 64),
        (512, 64, 64), (512, 128, 128),
    ],
}  # fmt: skip
"""Rows of each recipe's arrays on the real model, in the order of taps (recipes.md 1.1 and 3)."""

SAME_STRUCTURE = {"CompVis/stable-diffusion-v1-3": "bundled:stable-diffusion-v1-5"}
"""Models of which no configuration is bundled, and one that has the same modules."""


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_the_real_model(name: str) -> None:
    recipe = Pipeline.load(find_recipe(name))
    assert recipe.backbone is not None
    model = SAME_STRUCTURE.get(recipe.backbone.model, recipe.backbone.model)
    backbone = load_backbone(find_model(BackboneSpec(model=model), structure_only=True), "meta")
    taps = backbone.resolve(recipe.taps)
    arrays = backbone.arrays(taps, recipe.images, ConditionSpec(), CLEAN, "float16")
    assert [array.shape for array in arrays] == SHAPES[name]


def test_known_sizes_of_rows() -> None:
    """recipes.md 1.3: megabytes of one image."""
    megabytes = {name: sum(np.prod(s) for s in SHAPES[name]) * 2 / 1e6 for name in SHAPES}
    assert megabytes["dift_sd21_spair"] == pytest.approx(5.90, abs=0.01)
    assert megabytes["readout_sd15"] == pytest.approx(14.3, abs=0.1)
    both = 2 * (megabytes["geoaware_sd15"] + megabytes["geoaware_dinov2"])  # float32 as published
    assert both == pytest.approx(26.0, abs=0.1)
