"""Stable Diffusion in plain diffusers and transformers calls, for the references of its recipes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from drl_data.noise import draw_normal
from tests.references import N_SAMPLES, Rehearsed


def encoded(model: Path, prompts: Sequence[str]) -> Tensor:
    """CLIP's last hidden states, each prompt for itself: [b, token, channel]."""
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(model / "text_encoder").eval()
    states = [
        encoder(tokenizer(p, padding="max_length", truncation=True, return_tensors="pt").input_ids)
        for p in prompts
    ]
    return torch.cat([s.last_hidden_state for s in states])


class PlainSd:
    """The parts of a rehearsal's Stable Diffusion, loaded by diffusers; four samples at a time.

    They are frozen: torch picks another kernel for a linear layer whose weights want gradients,
    even under `no_grad`, and its bits differ.
    """

    def __init__(self, run: Rehearsed) -> None:
        self.run = run
        self.vae = AutoencoderKL.from_pretrained(run.model / "vae").requires_grad_(False)
        self.unet = UNet2DConditionModel.from_pretrained(run.model / "unet").requires_grad_(False)
        self.scheduler = DDIMScheduler.from_pretrained(run.model / "scheduler")
        self.text = encoded(run.model, [""]).expand(N_SAMPLES, -1, -1)

    def mean(self, pixels: Tensor) -> Tensor:
        """Scaled mean of the posterior, [4, c, h, w]."""
        mean: Tensor = self.vae.encode(pixels).latent_dist.mean
        return mean * self.vae.config.scaling_factor

    def sample(self, pixels: Tensor, member: int = 0) -> Tensor:
        """Scaled draw from the posterior, [4, c, h, w]."""
        posterior = self.vae.encode(pixels).latent_dist
        eps = self.run.noise(posterior.mean.shape[1:], role="posterior", member=member)
        z: Tensor = posterior.mean + posterior.std * eps
        return z * self.vae.config.scaling_factor

    def own_noise(self, latents: Tensor, *, member: int = 0, timestep: object = "all") -> Tensor:
        """Each sample's noise."""
        return self.run.noise(latents.shape[1:], member=member, timestep=timestep)

    def forward(self, latents: Tensor, noise: Tensor | None, t: int) -> None:
        """One whole forward at t; hooks keep what they want."""
        times = torch.full((len(latents),), t)
        noisy = latents if noise is None else self.scheduler.add_noise(latents, noise, times)
        self.unet(noisy, times, encoder_hidden_states=self.text)


def shared_noise(latents: Tensor, *, seed: int, base: int | None) -> Tensor:
    """One draw for all samples like `latents`, interpolated from a square if `base` is given."""
    c, h, w = latents.shape[1:]
    side = (h, w) if base is None else (base, base)
    one = torch.from_numpy(draw_normal((c, *side), "noise", seed, "shared", 0, "all"))[None]
    if side != (h, w):
        one = F.interpolate(one, size=(h, w), mode="bicubic", align_corners=False)
    return one.expand(len(latents), -1, -1, -1)
