"""Recipes of encoders and of training targets, against plain calls of the libraries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModel,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
)

from drl_data.noise import draw_normal
from drl_data.tasks.stats import run_stats
from tests.references import Rehearsed, hooked, planned_shapes, rehearse

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def normalised(
    run: Rehearsed,
    statistics: tuple[Sequence[float], Sequence[float]] = IMAGENET,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Tensor:
    """Pixels 0..1, then (x - mean) / std."""
    bytes_0_255 = ((run.pixels(resample) + 1) / 2 * 255).round()
    mean, std = (torch.tensor(values)[:, None, None] for values in statistics)
    return (bytes_0_255 / 255 - mean) / std


def encoder(run: Rehearsed) -> PreTrainedModel:
    return AutoModel.from_pretrained(run.model).eval()


def grid(tokens: Tensor) -> Tensor:
    """Patch tokens [b, 16, c] as a map [b, c, 4, 4]."""
    return tokens.transpose(1, 2).unflatten(2, (4, 4))


@torch.no_grad()
def test_repa_dinov2(tmp_path: Path) -> None:
    run = rehearse("repa_dinov2", tmp_path)
    tokens = encoder(run)(normalised(run)).last_hidden_state
    assert tokens.shape == (4, 17, 32)
    assert torch.equal(run.features("patches"), grid(tokens[:, 1:]))
    # Of pixels -1..1, as diffusion models take them, it would be another.
    other = encoder(run)(run.pixels()).last_hidden_state
    assert (grid(other[:, 1:]) - run.features("patches")).abs().max() > 0.1


@torch.no_grad()
def test_reg_dinov2(tmp_path: Path) -> None:
    run = rehearse("reg_dinov2", tmp_path)
    tokens = encoder(run)(normalised(run)).last_hidden_state
    assert torch.equal(run.features("cls"), tokens[:, 0])
    assert torch.equal(run.features("patches"), grid(tokens[:, 1:]))


@torch.no_grad()
def test_irepa_dinov2(tmp_path: Path) -> None:
    run = rehearse("irepa_dinov2", tmp_path)
    tokens = encoder(run)(normalised(run)).last_hidden_state[:, 1:]
    mean, std = tokens.mean(1, keepdim=True), tokens.std(1, keepdim=True)
    want = grid((tokens - mean) / (std + 1e-6))
    # Mean and standard deviation of another layout of the tokens add up in another order.
    torch.testing.assert_close(run.features("patches"), want, atol=1e-5, rtol=1e-5)
    got = run.features("patches").flatten(2)
    torch.testing.assert_close(got.mean(2), torch.zeros(4, 32), atol=1e-5, rtol=0)


@torch.no_grad()
def test_rae_dinov2(tmp_path: Path) -> None:
    run = rehearse("rae_dinov2", tmp_path)
    network = encoder(run)
    affine = network(normalised(run)).last_hidden_state
    network.layernorm.weight = network.layernorm.bias = None  # as RAE does
    tokens = network(normalised(run)).last_hidden_state
    assert tokens.shape == (4, 1 + 4 + 16, 32)
    assert torch.equal(run.features("latents"), grid(tokens[:, 5:]))
    assert (run.features("latents") - grid(affine[:, 5:])).abs().max() > 0.1

    # Its normalisation by the dataset: channel by channel and position by position.
    assert run.pipeline.stats is not None
    result = run_stats(run.pipeline)
    (cell,) = result.cells
    assert (cell.tap, cell.count) == ("latents", 4)
    found = load_file(Path(run.pipeline.results) / result.tensors)
    z = grid(tokens[:, 5:]).double()
    assert found["latents.0.mean"].shape == (32, 4, 4)
    torch.testing.assert_close(found["latents.0.mean"], z.mean(0))
    torch.testing.assert_close(found["latents.0.variance"], z.var(0))


def moments(run: Rehearsed, pixels: Tensor) -> Tensor:
    """Mean and standard deviation of the VAE's posterior, [b, 2 c, h, w]."""
    vae = AutoencoderKL.from_pretrained(run.model).eval()
    posterior = vae.encode(pixels).latent_dist
    return torch.cat([posterior.mean, posterior.std], dim=1)


@torch.no_grad()
def test_repa_moments(tmp_path: Path) -> None:
    run = rehearse("repa_moments", tmp_path)
    assert run.features("moments").shape == (4, 8, 8, 8)
    assert torch.equal(run.features("moments"), moments(run, run.pixels()))


@torch.no_grad()
def test_dpt_moments(tmp_path: Path) -> None:
    run = rehearse("dpt_moments", tmp_path)
    for view, pixels in enumerate((run.pixels(), run.pixels().flip(-1).contiguous())):
        unit = run.store.units[0]
        got = torch.tensor(run.store.read_unit("moments", 0, unit, view=view))
        assert torch.equal(got, moments(run, pixels))


@torch.no_grad()
def test_lightningdit_vavae(tmp_path: Path) -> None:
    run = rehearse("lightningdit_vavae", tmp_path)
    for view, (name, pixels) in enumerate(
        (("", run.pixels()), ("\x1fhflip", run.pixels().flip(-1).contiguous()))
    ):
        mean, std = moments(run, pixels).chunk(2, dim=1)
        assert mean.shape == (4, 32, 8, 8)
        eps = torch.stack(
            [
                torch.from_numpy(
                    draw_normal((32, 8, 8), "posterior", 0, "key", f"{key}{name}", 0, "all")
                )
                for key in run.keys
            ]
        )
        unit = run.store.units[0]
        got = torch.tensor(run.store.read_unit("latent", 0, unit, view=view))
        assert torch.equal(got, mean + std * eps)
    assert run.pipeline.stats is not None
    (cell,) = run_stats(run.pipeline).cells  # latents_stats.pt: one mean and variance a channel
    assert cell.tap == "latent"


@torch.no_grad()
def test_self_guided_dino(tmp_path: Path) -> None:
    run = rehearse("self_guided_dino", tmp_path)
    tokens = encoder(run)(normalised(run, resample=Image.Resampling.BILINEAR)).last_hidden_state
    assert torch.equal(run.features("cls"), functional.normalize(tokens[:, 0]))
    torch.testing.assert_close(run.features("cls").norm(dim=1), torch.ones(4))


@torch.no_grad()
def test_cedm_dino(tmp_path: Path) -> None:
    run = rehearse("cedm_dino", tmp_path)
    tokens = encoder(run)(normalised(run)).last_hidden_state
    assert torch.equal(run.features("cls"), tokens[:, 0])


@torch.no_grad()
def test_dpt_msn(tmp_path: Path) -> None:
    run = rehearse("dpt_msn", tmp_path)
    network = encoder(run)
    small = [p.image.resize((19, 19), Image.Resampling.BILINEAR) for p in run.photos]
    cut = np.stack([np.asarray(image)[2:18, 2:18] for image in small])  # round(1.5) is 2
    mean, std = (torch.tensor(values)[:, None, None] for values in IMAGENET)
    pixels = torch.from_numpy(cut).permute(0, 3, 1, 2).contiguous().float() / 255
    out = network((pixels - mean) / std, output_hidden_states=True)
    # The last of the hidden states is the last block's; `last_hidden_state` has the norm after it.
    assert torch.equal(run.features("cls"), out.hidden_states[-1][:, 0])
    assert (run.features("cls") - out.last_hidden_state[:, 0]).abs().max() > 0.1


@torch.no_grad()
def test_rcg_dino(tmp_path: Path) -> None:
    run = rehearse("rcg_dino", tmp_path)
    rep = encoder(run)(normalised(run)).last_hidden_state[:, 0]
    want = (rep - rep.mean(1, keepdim=True)) / rep.std(1, keepdim=True)
    # Mean and standard deviation at once or one after the other differ in their last bits.
    torch.testing.assert_close(run.features("cls"), want, atol=1e-6, rtol=1e-6)


def image_embedding(run: Rehearsed) -> Tensor:
    network = CLIPVisionModelWithProjection.from_pretrained(run.model).eval()
    embedding: Tensor = network(normalised(run, CLIP)).image_embeds
    return embedding


@torch.no_grad()
def test_rdm_clip(tmp_path: Path) -> None:
    run = rehearse("rdm_clip", tmp_path)
    want = image_embedding(run)
    assert want.shape == (4, 24)
    assert torch.equal(run.features("image_embedding"), want)


@torch.no_grad()
def test_knn_diffusion_clip(tmp_path: Path) -> None:
    run = rehearse("knn_diffusion_clip", tmp_path)
    want = functional.normalize(image_embedding(run))
    assert torch.equal(run.features("image_embedding"), want)


@torch.no_grad()
def test_synthetic_sd15(tmp_path: Path) -> None:
    run = rehearse("synthetic_sd15", tmp_path)
    vae = AutoencoderKL.from_pretrained(run.model / "vae").eval()
    unet = UNet2DConditionModel.from_pretrained(run.model / "unet").eval()
    scheduler = DDIMScheduler.from_pretrained(run.model / "scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(run.model / "tokenizer")
    text = CLIPTextModel.from_pretrained(run.model / "text_encoder").eval()
    states = torch.cat(
        [
            text(
                tokenizer(
                    photo.caption, padding="max_length", truncation=True, return_tensors="pt"
                ).input_ids
            ).last_hidden_state
            for photo in run.photos
        ]
    )
    posterior = vae.encode(run.pixels()).latent_dist
    eps = run.noise((4, 16, 16), role="posterior")
    latents = (posterior.mean + posterior.std * eps) * vae.config.scaling_factor
    t = torch.full((4,), 100)
    kept = hooked(unet, "up_blocks.1")
    unet(scheduler.add_noise(latents, run.noise((4, 16, 16)), t), t, encoder_hidden_states=states)
    want = functional.adaptive_avg_pool2d(kept["up_blocks.1"], 16)
    assert torch.equal(run.features("up1"), want)
    # The captions of the tars, which group StableRep's positives, are beside the features.
    table = run.store.samples()
    assert table.column("caption").to_pylist() == [photo.caption for photo in run.photos]


# recipe: {array: shape of one row at full size} (recipes.md 1.3)
REAL: dict[str, dict[str, tuple[int, ...]]] = {
    "repa_dinov2": {"patches": (768, 16, 16)},
    "reg_dinov2": {"cls": (768,), "patches": (768, 16, 16)},
    "irepa_dinov2": {"patches": (768, 16, 16)},
    "rae_dinov2": {"latents": (768, 16, 16)},
    "repa_moments": {"moments": (8, 32, 32)},
    "dpt_moments": {"moments": (8, 32, 32)},
    "self_guided_dino": {"cls": (768,)},
    "cedm_dino": {"cls": (768,)},
    "dpt_msn": {"cls": (1024,)},
    "rcg_dino": {"cls": (768,)},
    "rdm_clip": {"image_embedding": (512,)},
    "knn_diffusion_clip": {"image_embedding": (512,)},
    "synthetic_sd15": {"up1": (1280, 16, 16)},
}


@pytest.mark.parametrize("name", REAL)
def test_shapes_of_the_real_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert planned_shapes(name) == REAL[name]
