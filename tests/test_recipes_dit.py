"""Recipes on diffusion transformers (DiT, SD3, Flux), against straight lines of plain calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from tests.references import Rehearsed, hooked, hooked_inputs, rehearse

pytestmark = pytest.mark.usefixtures("one_thread")


def t5_states(model: Path, prompts: Sequence[str], n_tokens: int) -> Tensor:
    """T5's last hidden states, each prompt for itself, padding included: [b, n_tokens, c]."""
    tokenizer = T5Tokenizer.from_pretrained(model / "tokenizer_2")
    encoder = T5EncoderModel.from_pretrained(model / "text_encoder_2").eval()
    rows = [
        encoder(
            tokenizer(
                prompt,
                padding="max_length",
                max_length=n_tokens,
                truncation=True,
                return_tensors="pt",
            ).input_ids
        ).last_hidden_state
        for prompt in prompts
    ]
    return torch.cat(rows)


def clip_pooled(model: Path, prompts: Sequence[str]) -> Tensor:
    """CLIP's pooled vectors [b, c]."""
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(model / "text_encoder").eval()
    rows = [
        encoder(
            tokenizer(p, padding="max_length", truncation=True, return_tensors="pt").input_ids
        ).pooler_output
        for p in prompts
    ]
    return torch.cat(rows)


class Flux:
    """A tiny Flux of a rehearsal, called as the pipeline of diffusers calls it."""

    def __init__(self, run: Rehearsed, prompts: Sequence[str], n_tokens: int = 512) -> None:
        model = run.model
        self.run = run
        self.transformer = FluxTransformer2DModel.from_pretrained(model / "transformer").eval()
        self.vae = AutoencoderKL.from_pretrained(model / "vae").eval()
        self.states = t5_states(model, prompts, n_tokens)
        self.pooled = clip_pooled(model, prompts)
        resample = {"bilinear": Image.Resampling.BILINEAR}.get(run.pipeline.images.filter)
        self.posterior = self.vae.encode(run.pixels(*([resample] if resample else []))).latent_dist

    def latents(self, member: int = 0) -> Tensor:
        """A draw from the posterior, shifted and scaled: [b, c, h, w]."""
        shape = tuple(self.posterior.mean.shape[1:])
        eps = self.run.noise(shape, role="posterior", member=member)
        z = self.posterior.mean + self.posterior.std * eps
        return (z - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def noisy(self, t: float, member: int = 0) -> Tensor:
        """x_t = (1 - t) x_0 + t eps."""
        x, time = self.latents(member), torch.tensor(t)
        return (1 - time) * x + time * self.run.noise(tuple(x.shape[1:]), member=member)

    def __call__(self, x: Tensor, t: float) -> None:
        b, c, h, w = x.shape
        self.transformer(
            hidden_states=FluxPipeline._pack_latents(x, b, c, h, w),
            timestep=torch.full((b,), t),
            guidance=torch.full((b,), 3.5) if self.transformer.config.guidance_embeds else None,
            encoder_hidden_states=self.states,
            pooled_projections=self.pooled,
            txt_ids=torch.zeros(self.states.shape[1], 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(b, h // 2, w // 2, "cpu", x.dtype),
        )


def as_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """[b, n, c] to [b, c, height, width]."""
    return tokens.transpose(1, 2).unflatten(2, (height, width))


def ensemble(flux: Flux, t: float, n_members: int, take: Callable[[], Tensor]) -> Tensor:
    """The mean of what `take` finds after each member's forward, in float32."""
    total = torch.zeros(())
    for member in range(n_members):
        flux(flux.noisy(t, member), t)
        total = total + take()
    return total / n_members


def ditf_by_hand(raw: Tensor, norm_linear: Tensor, zeroed: Sequence[int]) -> Tensor:
    """DiTF's off-line part: raw [b, n, c] -> zeroed channels, LayerNorm, (1 + scale) x + shift."""
    raw = raw.clone()
    raw[..., list(zeroed)] = 0.0
    shift, scale, _ = norm_linear.chunk(3, dim=1)
    normed = functional.layer_norm(raw, raw.shape[-1:], eps=1e-6)
    return normed * (1 + scale[:, None]) + shift[:, None]


@torch.no_grad()
def test_ditf_flux_spair(tmp_path: Path) -> None:
    run = rehearse("ditf_flux_spair", tmp_path)
    flux = Flux(run, [f"a photo of a {p.label}" for p in run.photos])
    block = "single_transformer_blocks.9"
    inputs = hooked_inputs(flux.transformer, block)
    kept = hooked(flux.transformer, f"{block}.norm.linear", f"{block}.norm")
    raw = ensemble(flux, 0.26, 8, lambda: inputs[block]["hidden_states"])
    linear = ensemble(flux, 0.26, 8, lambda: kept[f"{block}.norm.linear"])
    want = ditf_by_hand(raw, linear, (3, 14))
    assert run.features("ditf").shape == (4, 32, 8, 8)
    assert torch.equal(run.features("ditf"), as_map(want, 8, 8))

    # Without discarding, and of one draw, it is what the block's own norm puts out.
    flux(flux.noisy(0.26), 0.26)
    raw = inputs[block]["hidden_states"]
    normed = kept[f"{block}.norm"][0][:, 512:]
    torch.testing.assert_close(ditf_by_hand(raw, linear, ()), normed, atol=1e-5, rtol=1e-5)
    # To average after the norm would not be the same.
    late = ensemble(
        flux, 0.26, 8, lambda: ditf_by_hand(inputs[block]["hidden_states"], linear, (3, 14))
    )
    assert (as_map(late, 8, 8) - run.features("ditf")).abs().max() > 1e-3


@torch.no_grad()
def test_ditf_flux_davis(tmp_path: Path) -> None:
    run = rehearse("ditf_flux_davis", tmp_path)
    flux = Flux(run, [""] * 4)
    block = "single_transformer_blocks.5"
    inputs = hooked_inputs(flux.transformer, block)
    kept = hooked(flux.transformer, f"{block}.norm.linear")
    flux(flux.noisy(0.09), 0.09)
    want = ditf_by_hand(inputs[block]["hidden_states"], kept[f"{block}.norm.linear"], (3, 14))
    assert torch.equal(run.features("ditf"), as_map(want, 6, 8))


@torch.no_grad()
def test_ditf_flux_double(tmp_path: Path) -> None:
    run = rehearse("ditf_flux_double", tmp_path)
    flux = Flux(run, [f"a photo of a {p.label}" for p in run.photos])
    block = "transformer_blocks.18"
    kept = hooked(flux.transformer, f"{block}.norm2", f"{block}.norm1.linear")

    def modulated() -> Tensor:
        _, _, _, shift, scale, _ = kept[f"{block}.norm1.linear"].chunk(6, dim=1)
        return kept[f"{block}.norm2"] * (1 + scale[:, None]) + shift[:, None]

    want = ensemble(flux, 0.26, 8, modulated)
    assert torch.equal(run.features("ditf"), as_map(want, 8, 8))
    plain = ensemble(flux, 0.26, 8, lambda: kept[f"{block}.norm2"])
    assert (run.features("ditf") - as_map(plain, 8, 8)).abs().max() > 0.1
