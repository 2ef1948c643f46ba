"""Recipes on Stable Diffusion 1 and 2, against straight lines of plain diffusers calls."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from tests.references import hooked, rehearse

pytestmark = pytest.mark.usefixtures("one_thread")


def encoded(model: Path, prompts: list[str]) -> Tensor:
    """CLIP's last hidden states, each prompt for itself: [b, token, channel]."""
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(model / "text_encoder").eval()
    states = [
        encoder(tokenizer(p, padding="max_length", truncation=True, return_tensors="pt").input_ids)
        for p in prompts
    ]
    return torch.cat([s.last_hidden_state for s in states])


@torch.no_grad()
def test_dift_sd21_spair(tmp_path: Path) -> None:
    run = rehearse("dift_sd21_spair", tmp_path)
    vae = AutoencoderKL.from_pretrained(run.model / "vae").eval()
    unet = UNet2DConditionModel.from_pretrained(run.model / "unet").eval()
    scheduler = DDIMScheduler.from_pretrained(run.model / "scheduler")
    text = encoded(run.model, [f"a photo of a {p.label}" for p in run.photos])
    posterior = vae.encode(run.pixels()).latent_dist
    kept = hooked(unet, "up_blocks.1")
    t = torch.full((4,), 261)
    total = torch.zeros(())
    for member in range(8):
        eps = run.noise((4, 16, 16), role="posterior", member=member)
        latents = (posterior.mean + posterior.std * eps) * vae.config.scaling_factor
        noisy = scheduler.add_noise(latents, run.noise((4, 16, 16), member=member), t)
        unet(noisy, t, encoder_hidden_states=text)
        total = total + kept["up_blocks.1"]
    assert torch.equal(run.features("up1"), total / 8)
