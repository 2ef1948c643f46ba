"""The diffusion classifier's recipes, against loops of plain diffusers calls."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTTransformer2DModel,
    UNet2DConditionModel,
)
from torch import Tensor

from drl_data.noise import draw_normal
from tests.references import N_SAMPLES, Rehearsed, rehearse
from tests.test_recipes_sd import encoded

pytestmark = pytest.mark.usefixtures("one_thread")


def noisy_at(run: Rehearsed, clean: Tensor, t: int) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, the one noise of all images, and the times."""
    shape = tuple(clean.shape[1:])
    eps = torch.from_numpy(draw_normal(shape, "noise", 0, "bank", 0, t))
    times = torch.full((N_SAMPLES,), t)
    scheduler = DDIMScheduler.from_pretrained(run.model / "scheduler")
    return scheduler.add_noise(clean, eps.expand_as(clean), times), eps, times


def clean_latents(run: Rehearsed) -> Tensor:
    vae = AutoencoderKL.from_pretrained(run.model / "vae").eval()
    return vae.encode(run.pixels()).latent_dist.mean * vae.config.scaling_factor


@torch.no_grad()
def test_diffusion_classifier_sd20(tmp_path: Path) -> None:
    run = rehearse("diffusion_classifier_sd20", tmp_path)
    unet = UNet2DConditionModel.from_pretrained(run.model / "unet").eval()
    clean = clean_latents(run)
    for i, t in enumerate((10, 990)):
        x, eps, times = noisy_at(run, clean, t)
        for j, name in enumerate(("cat", "dog")):
            text = encoded(run.model, [f"a photo of a {name}"]).expand(N_SAMPLES, -1, -1)
            error = unet(x, times, encoder_hidden_states=text).sample - eps
            assert torch.equal(run.features("l2", i)[:, j, 0], error.square().flatten(1).mean(1))
            assert torch.equal(run.features("l1", i)[:, j, 0], error.abs().flatten(1).mean(1))


@torch.no_grad()
def test_diffusion_classifier_dit(tmp_path: Path) -> None:
    run = rehearse("diffusion_classifier_dit", tmp_path)
    network = DiTTransformer2DModel.from_pretrained(run.model / "transformer").eval()
    for block in network.transformer_blocks:  # the original's sinusoids, which trained the weights
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    clean = clean_latents(run)
    for i, t in enumerate((50, 950)):
        x, eps, times = noisy_at(run, clean, t)
        for label in range(3):
            labels = torch.full((N_SAMPLES,), label)
            out = network(x, timestep=times, class_labels=labels).sample[:, :4]
            want = (out - eps).square().flatten(1).mean(1)
            assert torch.equal(run.features("l2", i)[:, label, 0], want)
