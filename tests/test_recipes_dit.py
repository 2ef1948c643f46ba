"""Recipes on diffusion transformers (DiT, SD3, Flux), against straight lines of plain calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5EncoderModel,
    T5Tokenizer,
)

from drl_data.backbones import find_model, load_backbone
from drl_data.errors import SpecError
from drl_data.examples.concept_attention import tiny_folder
from drl_data.spec import BackboneSpec, ConditionSpec
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


def sd3_text(model: Path, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """What SD3's pipeline without its third encoder tells of each prompt: [b, 154, c], [b, c]."""
    encoders = [
        part
        for suffix in ("", "_2")
        for part in (
            CLIPTextModelWithProjection.from_pretrained(model / f"text_encoder{suffix}").eval(),
            CLIPTokenizer.from_pretrained(model / f"tokenizer{suffix}"),
        )
    ]
    transformer = SD3Transformer2DModel.from_pretrained(model / "transformer")
    pipeline = StableDiffusion3Pipeline(transformer, None, None, *encoders, None, None)
    told = [
        pipeline.encode_prompt(
            p, None, None, do_classifier_free_guidance=False, max_sequence_length=77
        )
        for p in prompts
    ]
    return torch.cat([t[0] for t in told]), torch.cat([t[2] for t in told])


@torch.no_grad()
def test_seg4diff_sd3(tmp_path: Path) -> None:
    run = rehearse("seg4diff_sd3", tmp_path)
    transformer = SD3Transformer2DModel.from_pretrained(run.model / "transformer").eval()
    vae = AutoencoderKL.from_pretrained(run.model / "vae").eval()
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(run.model / "scheduler")
    states, pooled = sd3_text(run.model, [p.caption for p in run.photos])
    assert states.shape == (4, 154, 48)
    assert not states[:, 77:].any()

    scheduler.set_timesteps(28)
    t = scheduler.timesteps[-8]
    assert float(t) == pytest.approx(514.7, abs=0.5)
    mean = vae.encode(run.pixels(Image.Resampling.BILINEAR)).latent_dist.mean
    latents = (mean - vae.config.shift_factor) * vae.config.scaling_factor
    noisy = scheduler.scale_noise(latents, t[None], run.noise((16, 8, 8)))
    block = "transformer_blocks.9.attn"
    names = ("to_q", "to_k", "add_q_proj", "add_k_proj")
    kept = hooked(transformer, *(f"{block}.{name}" for name in names))
    transformer(noisy, states, pooled, t.expand(4))

    def probabilities(*keys: str) -> Tensor:
        """Of image queries over the keys named: [b, query, key], the mean of the heads."""
        q, *k = (
            kept[f"{block}.{name}"].unflatten(2, (4, 8)).transpose(1, 2) for name in ("to_q", *keys)
        )
        return (q @ torch.cat(k, dim=2).transpose(-1, -2) * 8**-0.5).softmax(-1).mean(1)

    # SD3's processor puts the image first, then the text.
    joint = probabilities("to_k", "add_k_proj")
    want = as_map(joint[:, :, 16 : 16 + 77], 4, 4)
    assert run.features("image_to_text").shape == (4, 77, 4, 4)
    assert torch.equal(run.features("image_to_text"), want)
    # Neither the other order, nor a softmax over the text alone.
    for wrong in (joint[:, :, :77], probabilities("add_k_proj")[:, :, :77]):
        assert (as_map(wrong, 4, 4) - run.features("image_to_text")).abs().max() > 1e-4


@torch.no_grad()
def test_concept_attention_flux(tmp_path: Path) -> None:
    run = replace(rehearse("concept_attention_flux", tmp_path), model=tiny_folder())
    concepts = ["background", "temple", "flower", "sky"]
    flux = Flux(run, [""] * 4, n_tokens=256)
    flux.pooled = torch.zeros_like(flux.pooled)
    blocks = [f"transformer_blocks.{i}" for i in range(19)]
    inputs = hooked_inputs(flux.transformer, *blocks, *(f"{b}.attn.to_out.0" for b in blocks))
    kept = hooked(flux.transformer, *blocks, *(f"{b}.attn" for b in blocks))
    flux(flux.noisy(0.5), 0.5)

    # The stream of concepts, after the forward: it reads the image's, which does not know of it.
    states = t5_states(run.model, concepts, 256)[:, 0]
    state = flux.transformer.context_embedder(states[None].expand(4, -1, -1))
    ids = FluxPipeline._prepare_latent_image_ids(4, 8, 8, "cpu", torch.float32)
    cos, sin = flux.transformer.pos_embed(torch.cat([torch.zeros(4, 3), ids]))

    def rotated(x: Tensor) -> Tensor:
        """[b, head, n, d] with pairs of channels turned (Su et al. 2021)."""
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * cos + torch.stack([-b, a], dim=-1).flatten(-2) * sin

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(2, (2, 16)).transpose(1, 2)

    for i, name in enumerate(blocks):
        block = flux.transformer.transformer_blocks[i]
        attention = block.attn
        temb = inputs[name]["temb"]
        image = block.norm1(inputs[name]["hidden_states"], emb=temb)[0]
        text, gate, shift, scale, gate_mlp = block.norm1_context(state, emb=temb)
        q = attention.norm_added_q(heads(attention.add_q_proj(text)))
        k = attention.norm_added_k(heads(attention.add_k_proj(text)))
        v = heads(attention.add_v_proj(text))
        image_q = attention.norm_q(heads(attention.to_q(image)))
        image_k = attention.norm_k(heads(attention.to_k(image)))
        q = rotated(torch.cat([q, image_q], dim=2))
        k = rotated(torch.cat([k, image_k], dim=2))
        v = torch.cat([v, heads(attention.to_v(image))], dim=2)
        weights = (q @ k.transpose(-1, -2) / 16**0.5).softmax(-1)
        vectors = (weights @ v)[:, :, :4].transpose(1, 2).flatten(2)
        attended = inputs[f"{name}.attn.to_out.0"][0]
        if i >= 15:
            want = torch.einsum("bkc,bnc->bkn", vectors, attended).unflatten(2, (8, 8))
            got = run.features(f"scores_{i}")
            assert got.shape == (4, 4, 8, 8)
            # A fused attention and one by hand differ in their last bits.
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
            assert torch.equal(torch.softmax(got, 1).argmax(1), torch.softmax(want, 1).argmax(1))
            # It is the attention's output before its projection that the published code takes.
            projected = kept[f"{name}.attn"][0]
            other = torch.einsum("bkc,bnc->bkn", vectors, projected).unflatten(2, (8, 8))
            assert (got - other).abs().max() > 1e-2
        state = state + gate[:, None] * attention.to_add_out(vectors)
        normed = functional.layer_norm(state, (32,), eps=1e-6)
        state = state + gate_mlp[:, None] * block.ff_context(
            normed * (1 + scale[:, None]) + shift[:, None]
        )


@torch.no_grad()
def test_concepts_leave_flux_as_it_is(tmp_path: Path) -> None:
    """Nothing attends to them, so that Flux's own taps do not know of the concepts."""
    spec = BackboneSpec(model="python:drl_data.examples.concept_attention:tiny")
    backbone = load_backbone(find_model(spec), "cpu")
    plain = FluxTransformer2DModel.from_pretrained(tiny_folder() / "transformer").eval()
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    told = backbone.conditioning(ConditionSpec(prompt="cat, dog", t5_tokens=8))
    kwargs = told.expand(2)
    got = backbone.forward(x, torch.full((2,), 0.5), kwargs)
    kwargs.pop("concepts")
    (want,) = plain(
        FluxPipeline._pack_latents(x, 2, 16, 8, 8),
        timestep=torch.full((2,), 0.5),
        img_ids=FluxPipeline._prepare_latent_image_ids(2, 4, 4, "cpu", x.dtype),
        txt_ids=torch.zeros(8, 3),
        **kwargs,
        return_dict=False,
    )
    assert torch.equal(got, FluxPipeline._unpack_latents(want, 32, 32, 4))
    with pytest.raises(SpecError, match="want concepts, separated by commas"):
        backbone.conditioning(ConditionSpec())
