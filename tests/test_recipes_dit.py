"""Recipes on diffusion transformers (DiT, SD3, Flux), against straight lines of plain calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.models.embeddings import Timesteps
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
from drl_data.diffusion_spec import ConditionSpec
from drl_data.errors import SpecError, WeightsError
from drl_data.examples.concept_attention import tiny_folder
from drl_data.noise import draw_normal
from drl_data.spec import BackboneSpec
from drl_data.views import seeded_crop
from tests.references import Rehearsed, hooked, hooked_inputs, planned_shapes, rehearse

pytestmark = pytest.mark.usefixtures("one_thread")

N_T5 = 16
"""Tokens of T5 in rehearsals of Flux, whose real pipelines have 512, and 256 of schnell."""


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

    def __init__(
        self,
        run: Rehearsed,
        prompts: Sequence[str],
        resample: Image.Resampling = Image.Resampling.BICUBIC,
    ) -> None:
        model = run.model
        self.run = run
        self.transformer = FluxTransformer2DModel.from_pretrained(model / "transformer").eval()
        self.vae = AutoencoderKL.from_pretrained(model / "vae").eval()
        self.states = t5_states(model, prompts, N_T5)
        self.pooled = clip_pooled(model, prompts)
        self.posterior = self.vae.encode(run.pixels(resample)).latent_dist

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
    normed = kept[f"{block}.norm"][0][:, N_T5:]
    torch.testing.assert_close(ditf_by_hand(raw, linear, ()), normed, atol=1e-5, rtol=1e-5)
    # To average after the norm would not be the same.
    late = ensemble(
        flux, 0.26, 8, lambda: ditf_by_hand(inputs[block]["hidden_states"], linear, (3, 14))
    )
    assert (as_map(late, 8, 8) - run.features("ditf")).abs().max() > 1e-3


@torch.no_grad()
def test_ditf_flux_davis(tmp_path: Path) -> None:
    run = rehearse("ditf_flux_davis", tmp_path)
    flux = Flux(run, [""] * 4, Image.Resampling.BILINEAR)
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
    flux = Flux(run, [""] * 4)
    flux.pooled = torch.zeros_like(flux.pooled)
    blocks = [f"transformer_blocks.{i}" for i in range(19)]
    inputs = hooked_inputs(flux.transformer, *blocks, *(f"{b}.attn.to_out.0" for b in blocks))
    kept = hooked(flux.transformer, *blocks, *(f"{b}.attn" for b in blocks))
    flux(flux.noisy(0.5), 0.5)

    # The stream of concepts, after the forward: it reads the image's, which does not know of it.
    states = t5_states(run.model, concepts, N_T5)[:, 0]
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


def test_concepts_are_planned_without_weights_and_digested_with_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    name = "python:drl_data.examples.concept_attention"
    real = find_model(BackboneSpec(model=f"{name}:schnell", revision="main"), structure_only=True)
    digests = {real.digest(), find_model(BackboneSpec(model=f"{name}:tiny")).digest()}
    assert len(digests) == 2
    with pytest.raises(WeightsError, match="neither in the local cache"):
        load_backbone(real, "cpu")


class DiT:
    """A tiny DiT of a rehearsal, its sinusoids as Peebles and Xie's code has them."""

    def __init__(self, run: Rehearsed) -> None:
        self.run = run
        self.transformer = DiTTransformer2DModel.from_pretrained(run.model / "transformer").eval()
        for module in self.transformer.modules():
            if isinstance(module, Timesteps):
                assert module.downscale_freq_shift == 1
                module.downscale_freq_shift = 0
        self.vae = AutoencoderKL.from_pretrained(run.model / "vae").eval()
        # linear betas from 1e-4 to 0.02, as DiT's create_diffusion("")
        self.scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")

    def __call__(self, x: Tensor, told: int) -> None:
        labels = torch.full((len(x),), 10)  # the null class of the tiny model, as 1000 of DiT's
        self.transformer(x, timestep=torch.full((len(x),), told), class_labels=labels)


def check_ddae_dit(run: Rehearsed, t: int) -> None:
    dit = DiT(run)
    kept = hooked(dit.transformer, "transformer_blocks.13")
    unit = run.store.units[0]

    def pooled(pixels: Tensor, keys: Sequence[str], *, told: int = t) -> Tensor:
        def drawn(role: str) -> Tensor:
            return torch.stack(
                [
                    torch.from_numpy(draw_normal((4, 8, 8), role, 0, "key", key, 0, "all"))
                    for key in keys
                ]
            )

        posterior = dit.vae.encode(pixels).latent_dist
        latents = (posterior.mean + posterior.std * drawn("posterior")) * 0.18215
        dit(dit.scheduler.add_noise(latents, drawn("noise"), torch.full((4,), t)), told)
        return as_map(kept["transformer_blocks.13"], 4, 4).mean((2, 3))

    got = run.features("block13")
    assert got.shape == (4, 32)
    plain = run.pixels(Image.Resampling.BILINEAR)
    assert torch.equal(got, pooled(plain, run.keys))
    # 1-based as DDAE's UNets count, the network would be told t - 1, and see other noise.
    assert (got - pooled(plain, run.keys, told=t - 1)).abs().max() > 1e-5

    # The copies: crops of at least the area that a shift by 4 px leaves, as large as the image.
    assert run.pipeline.images.n_views == 11
    views = run.pipeline.images.views[1]
    assert views.area[0] == pytest.approx((1 - 4 / {121: 32, 81: 64}[t]) ** 2, abs=0.005)
    for number in (0, 9):
        crops = [
            seeded_crop(p.image, (16, 16), Image.Resampling.BILINEAR, views, number, p.key)
            for p in run.photos
        ]
        arrays = torch.stack([torch.from_numpy(np.array(crop)) for crop in crops])
        pixels = arrays.permute(0, 3, 1, 2).contiguous().float() / 255 * 2 - 1
        keys = [f"{key}\x1fcrop-0-{number}" for key in run.keys]
        copy = torch.tensor(run.store.read_unit("block13", 0, unit, view=1 + number))
        assert torch.equal(copy, pooled(pixels, keys))
        assert not torch.equal(copy, got)


@torch.no_grad()
def test_ddae_dit_cifar10(tmp_path: Path) -> None:
    check_ddae_dit(rehearse("ddae_dit_cifar10", tmp_path), 121)


@torch.no_grad()
def test_ddae_dit_tiny_imagenet(tmp_path: Path) -> None:
    check_ddae_dit(rehearse("ddae_dit_tiny_imagenet", tmp_path), 81)


@torch.no_grad()
def test_revelio_dit(tmp_path: Path) -> None:
    run = rehearse("revelio_dit", tmp_path)
    dit = DiT(run)
    blocks = [f"transformer_blocks.{i}" for i in range(28)]
    kept = hooked(dit.transformer, *blocks)
    latents = dit.vae.encode(run.pixels()).latent_dist.mode() * 0.18215
    dit(latents, 25)
    assert [array.name for array in run.store.features] == blocks
    for name in blocks:
        assert torch.equal(run.features(name), as_map(kept[name], 4, 4)), name
    dit(latents, 0)
    assert not torch.equal(run.features(blocks[0]), as_map(kept[blocks[0]], 4, 4))


@torch.no_grad()
def test_a_select_dit(tmp_path: Path) -> None:
    run = rehearse("a_select_dit", tmp_path)
    dit = DiT(run)
    blocks = [f"transformer_blocks.{i}" for i in range(28)]
    kept = hooked(dit.transformer, *blocks)
    latents = dit.vae.encode(run.pixels()).latent_dist.mean * 0.18215
    matrix = torch.from_numpy(draw_normal((32, 32), "projection", 0, 32, 32) / 32**0.5)
    assert [time.requested for time in run.store.times] == list(range(0, 1000, 50))
    for position, t in enumerate(range(0, 1000, 50)):
        dit(dit.scheduler.add_noise(latents, run.noise((4, 8, 8)), torch.full((4,), t)), t)
        for name in blocks:
            want = as_map(kept[name] @ matrix.float(), 4, 4)
            # The product of another layout of the tokens may round otherwise.
            torch.testing.assert_close(
                run.features(name, position), want, atol=1e-5, rtol=1e-5, msg=f"{name} at {t}"
            )


@torch.no_grad()
def test_mmdiff_flux(tmp_path: Path) -> None:
    run = rehearse("mmdiff_flux", tmp_path)
    flux = Flux(run, [p.caption for p in run.photos])
    double, single = "transformer_blocks.18", "single_transformer_blocks.9"
    inputs = hooked_inputs(flux.transformer, f"{double}.ff", single)
    kept = hooked(flux.transformer, f"{single}.norm.linear")
    for position, t in enumerate((0.1, 0.3, 0.5, 0.7, 0.9)):
        flux(flux.noisy(t), t)
        ditf = ditf_by_hand(inputs[single]["hidden_states"], kept[f"{single}.norm.linear"], (3, 14))
        for name, tokens in (("double18", inputs[f"{double}.ff"][0]), ("single9", ditf)):
            want = functional.avg_pool2d(as_map(tokens, 8, 8).contiguous(), 2)
            assert run.features(name, position).shape == (4, 32, 4, 4)
            # Adaptive and plain pooling add up in another order.
            torch.testing.assert_close(run.features(name, position), want, atol=1e-6, rtol=1e-6)


# recipe: {array: shape of one row at full size} (recipes.md 1.1)
REAL: dict[str, dict[str, tuple[int, ...]]] = {
    "ditf_flux_spair": {"ditf": (3072, 40, 40)},
    "ditf_flux_davis": {"ditf": (3072, 30, 52)},
    "ditf_flux_double": {"ditf": (3072, 40, 40)},
    "seg4diff_sd3": {"image_to_text": (77, 64, 64)},
    "concept_attention_flux": {f"scores_{i}": (4, 64, 64) for i in range(15, 19)},
    "mmdiff_flux": {"double18": (3072, 32, 32), "single9": (3072, 32, 32)},
    "ddae_dit_cifar10": {"block13": (1152,)},
    "ddae_dit_tiny_imagenet": {"block13": (1152,)},
    "revelio_dit": {f"transformer_blocks.{i}": (1152, 32, 32) for i in range(28)},
    "a_select_dit": {f"transformer_blocks.{i}": (32, 16, 16) for i in range(28)},
}


@pytest.mark.parametrize("name", REAL)
def test_shapes_of_the_real_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert planned_shapes(name) == REAL[name]
