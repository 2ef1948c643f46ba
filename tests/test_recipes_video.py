"""Recipes on transformers of videos, against straight lines of plain diffusers calls."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXTransformer3DModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from PIL import Image
from torch import Tensor
from transformers import T5EncoderModel, T5Tokenizer, UMT5EncoderModel

from drl_data.backbones import find_model, load_backbone
from drl_data.pipeline import Pipeline
from drl_data.recipes import find_recipe
from tests.references import hooked, rehearse

pytestmark = pytest.mark.usefixtures("one_thread")


def as_map(tokens: Tensor, frames: int, height: int, width: int) -> Tensor:
    """[b, f h w, c] to [b, c, f, h, w]."""
    return tokens.reshape(len(tokens), frames, height, width, -1).permute(0, 4, 1, 2, 3)


@torch.no_grad()
def test_vidfm3d_wan(tmp_path: Path) -> None:
    run = rehearse("vidfm3d_wan", tmp_path)
    vae = AutoencoderKLWan.from_pretrained(run.model / "vae").eval()
    network = WanTransformer3DModel.from_pretrained(run.model / "transformer").eval()
    tokenizer = T5Tokenizer.from_pretrained(run.model / "tokenizer")
    encoder = UMT5EncoderModel.from_pretrained(run.model / "text_encoder").eval()
    scheduler = UniPCMultistepScheduler.from_pretrained(run.model / "scheduler", flow_shift=3.0)

    scheduler.set_timesteps(1000)
    t = scheduler.timesteps[749].expand(4)
    assert int(t[0]) == 502
    assert float(scheduler.sigmas[749]) == pytest.approx(0.502, abs=5e-4)
    prompt = tokenizer("", padding="max_length", max_length=226, return_tensors="pt")
    text = torch.zeros(1, 226, 24)
    n_tokens = int(prompt.attention_mask.sum())
    text[:, :n_tokens] = encoder(**prompt).last_hidden_state[:, :n_tokens]
    mean, std = (
        torch.tensor(values).view(1, 16, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    z = vae.encode(run.video(Image.Resampling.LANCZOS)).latent_dist.mean
    noisy = scheduler.add_noise((z - mean) * (1.0 / std), run.noise((16, 3, 4, 6)), t)
    kept = hooked(network, "blocks.20")
    network(noisy, timestep=t, encoder_hidden_states=text.expand(4, -1, -1))
    assert torch.equal(run.features("block20"), as_map(kept["blocks.20"], 3, 2, 3))


def cogvideox_text(model: Path) -> Tensor:
    """T5's states of the empty prompt and of its padding: [4, 8, 24]."""
    tokenizer = T5Tokenizer.from_pretrained(model / "tokenizer")
    encoder = T5EncoderModel.from_pretrained(model / "text_encoder").eval()
    prompt = tokenizer("", padding="max_length", max_length=8, return_tensors="pt")
    return encoder(prompt.input_ids).last_hidden_state.expand(4, -1, -1)


@torch.no_grad()
def test_vidfm3d_cogvideox(tmp_path: Path) -> None:
    run = rehearse("vidfm3d_cogvideox", tmp_path)
    vae = AutoencoderKLCogVideoX.from_pretrained(run.model / "vae").eval()
    network = CogVideoXTransformer3DModel.from_pretrained(run.model / "transformer").eval()
    scheduler = CogVideoXDDIMScheduler.from_pretrained(run.model / "scheduler")

    scheduler.set_timesteps(1000)
    t = scheduler.timesteps[749].expand(4)
    assert int(t[0]) == 250
    z = vae.encode(run.video(Image.Resampling.LANCZOS)).latent_dist.mean
    latents = (z * vae.config.scaling_factor).permute(0, 2, 1, 3, 4)
    noise = run.noise((4, 3, 4, 6)).permute(0, 2, 1, 3, 4)
    rotary = get_3d_rotary_pos_embed(16, ((0, 0), (2, 3)), (2, 3), 3)
    kept = hooked(network, "transformer_blocks.20")
    network(
        scheduler.add_noise(latents, noise, t),
        encoder_hidden_states=cogvideox_text(run.model),
        timestep=t,
        image_rotary_emb=rotary,
    )
    image, text = kept["transformer_blocks.20"]
    assert text.shape[1] == 8
    assert torch.equal(run.features("block20"), as_map(image, 3, 2, 3))


@torch.no_grad()
def test_difftrack_cogvideox(tmp_path: Path) -> None:
    run = rehearse("difftrack_cogvideox", tmp_path)
    vae = AutoencoderKLCogVideoX.from_pretrained(run.model / "vae").eval()
    network = CogVideoXTransformer3DModel.from_pretrained(run.model / "transformer").eval()
    scheduler = CogVideoXDDIMScheduler.from_pretrained(run.model / "scheduler")

    scheduler.set_timesteps(50)
    t = scheduler.timesteps[49].expand(4)
    assert int(t[0]) == 19
    frames = run.video(Image.Resampling.BILINEAR).transpose(1, 2).flatten(0, 1)  # [4 f, c, H, W]
    posterior = vae.encode(frames[:, :, None]).latent_dist
    mean, std = (x.reshape(4, 3, 4, 4, 6) for x in (posterior.mean, posterior.std))
    eps = run.noise((4, 3, 4, 6), role="posterior").transpose(1, 2)
    latents = (mean + std * eps) * vae.config.scaling_factor
    attention = "transformer_blocks.17.attn1"
    kept = hooked(network, f"{attention}.norm_q", f"{attention}.norm_k", f"{attention}.to_q")
    network(latents, encoder_hidden_states=cogvideox_text(run.model), timestep=t)
    for name, norm in (("query", "norm_q"), ("key", "norm_k")):
        by_head = kept[f"{attention}.{norm}"][:, :, 8:]  # [4, head, f h w, c], after the text's
        tokens = by_head.transpose(1, 2).flatten(2)
        assert torch.equal(run.features(name), as_map(tokens, 3, 2, 3))
    before_the_norm = as_map(kept[f"{attention}.to_q"][:, 8:], 3, 2, 3)
    assert not torch.allclose(run.features("query"), before_the_norm, atol=0.1)


@pytest.mark.parametrize(
    ("name", "shape", "told", "sigma", "n_parameters"),
    [
        ("vidfm3d_wan", (1536, 21, 30, 52), 502, 0.502, 1_418_996_800),
        ("vidfm3d_cogvideox", (3072, 13, 30, 45), 250, None, 5_570_283_072),
        ("difftrack_cogvideox", (1920, 13, 30, 45), 19, None, 1_693_783_872),
    ],
)
def test_the_real_models_have_the_published_shapes(
    name: str, shape: tuple[int, ...], told: float, sigma: float | None, n_parameters: int
) -> None:
    recipe = Pipeline.load(find_recipe(name))
    assert recipe.backbone is not None
    assert recipe.schedule is not None
    backbone = load_backbone(find_model(recipe.backbone, structure_only=True), "meta")
    # Counted from the bundled configurations, so that none changes unseen.
    assert sum(p.numel() for p in backbone.network.parameters()) == n_parameters
    (time,) = backbone.schedule.resolve(recipe.schedule)
    assert time.model_time == told
    if sigma is not None:
        assert time.sigma == pytest.approx(sigma, abs=5e-4)
    taps = backbone.resolve(recipe.taps)
    arrays = backbone.arrays(taps, recipe.images, recipe.condition, time, "float16")
    assert {array.shape for array in arrays} == {shape}
    assert {array.dims for array in arrays} == {("channel", "frame", "height", "width")}
