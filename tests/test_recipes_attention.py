"""Recipes that store attention maps, against attention processors that hold the probabilities."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from drl_data.backbones import find_model, load_backbone
from drl_data.backbones.backbone import CLEAN
from drl_data.diffusion_spec import ConditionSpec
from drl_data.noise import draw_uniform
from drl_data.pipeline import Pipeline
from drl_data.recipes import find_recipe
from drl_data.spec import BackboneSpec
from tests.references import Rehearsed, rehearse

pytestmark = pytest.mark.usefixtures("one_thread")

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LATENT = (4, 16, 16)


class MapsProcessor:
    """An attention processor that computes softmax(q k^T / sqrt(d)) and keeps it, [b, h, q, k].

    What the network goes on with is the fused kernel's output, as without it: the sum over the
    probabilities would round otherwise.
    """

    def __init__(self, name: str, kept: dict[str, Tensor]) -> None:
        self.name, self.kept = name, kept

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        assert attention_mask is None
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]))
        self.kept[self.name] = scores.softmax(-1)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


class Plain:
    """The tiny model of a run; every forward keeps its attention maps."""

    def __init__(self, run: Rehearsed) -> None:
        self.run = run
        self.unet = UNet2DConditionModel.from_pretrained(run.model / "unet").eval()
        self.maps: dict[str, Tensor] = {}
        self.unet.set_attn_processor(
            {
                name: MapsProcessor(name.removesuffix(".processor"), self.maps)
                for name in self.unet.attn_processors
            }
        )

    def latents(self, resample: Image.Resampling, *, draws: bool) -> Tensor:
        """A draw from the VAE's posterior, or its mean; scaled. [4, 4, 16, 16]"""
        vae = AutoencoderKL.from_pretrained(self.run.model / "vae").eval()
        posterior = vae.encode(self.run.pixels(resample)).latent_dist
        z = posterior.mean
        if draws:
            z = z + posterior.std * self.run.noise(LATENT, role="posterior")
        return z * vae.config.scaling_factor

    def text(self, prompts: list[str]) -> Tensor:
        """CLIP's last hidden states, each prompt for itself: [b, token, channel]."""
        tokenizer = CLIPTokenizer.from_pretrained(self.run.model / "tokenizer")
        encoder = CLIPTextModel.from_pretrained(self.run.model / "text_encoder").eval()
        states = [
            encoder(
                tokenizer(p, padding="max_length", truncation=True, return_tensors="pt").input_ids
            )
            for p in prompts
        ]
        return torch.cat([s.last_hidden_state for s in states])

    def forward(self, x: Tensor, t: int, text: Tensor) -> Tensor:
        (eps,) = self.unet(x, torch.full((4,), t), encoder_hidden_states=text, return_dict=False)
        return eps


def on_grid(maps: Tensor) -> Tensor:
    """[b, query, key] as [b, key, row of the query, column]."""
    side = int(maps.shape[1] ** 0.5)
    return maps.transpose(1, 2).unflatten(-1, (side, side))


def attention(block: str, attentions: range | tuple[int, ...], kind: str) -> list[str]:
    return [f"{block}.attentions.{i}.transformer_blocks.0.{kind}" for i in attentions]


def assert_stored(run: Rehearsed, t: int, want: Mapping[str, Tensor]) -> None:
    """The arrays, and no others. The bits of a mean depend on strides: callers choose keys first,
    into memory of their own, as storing fewer of them does."""
    assert {array.name for array in run.store.arrays} == {f"{name}-attn.probs" for name in want}
    for name, tensor in want.items():
        got = run.features(f"{name}-attn.probs", t)
        assert got.shape == tensor.shape, name
        assert torch.equal(got, tensor), (name, (got - tensor).abs().max())


@torch.no_grad()
def test_ldm_correspondences(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    learnt = torch.randn(77, 24, generator=generator)
    save_file({"prompt_embeds": learnt}, tmp_path / "token.safetensors")
    told = ConditionSpec(prompt_embeddings=str(tmp_path / "token.safetensors"))
    run = rehearse("ldm_correspondences", tmp_path / "run", condition=told)
    plain = Plain(run)
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(50)
    latents = plain.latents(Image.Resampling.BICUBIC, draws=False)
    # Numbers from [0, 1), not Gaussian ones: `torch.rand_like` in the published code.
    noise = torch.stack(
        [
            torch.from_numpy(draw_uniform(LATENT, "noise", 0, "key", key, 0, "all"))
            for key in run.keys
        ]
    )
    assert noise.min() >= 0
    layers = [
        *attention("up_blocks.1", range(3), "attn2"),
        *attention("up_blocks.2", (0,), "attn2"),
    ]
    for position, want in ((-8, 140), (-3, 40)):
        t = int(scheduler.timesteps[position])
        assert t == want  # golden (recipes.md 2.2)
        noisy = scheduler.add_noise(latents, noise, torch.full((4,), t))
        plain.forward(noisy, t, learnt.expand(4, -1, -1))
        maps = {}
        for layer in layers:
            probabilities = plain.maps[layer]
            assert probabilities.shape[1] == 8
            kept = probabilities[:, 4:, :, 1:2]  # the second half of the heads, the learnt token
            maps[layer] = on_grid(kept.mean(1))
        assert_stored(run, 0 if position == -8 else 1, maps)


@torch.no_grad()
def test_daam(tmp_path: Path) -> None:
    run = rehearse("daam", tmp_path)
    plain = Plain(run)
    text = plain.text([photo.caption for photo in run.photos])
    latents, noise = plain.latents(Image.Resampling.BICUBIC, draws=True), run.noise(LATENT)
    layers = [
        name
        for name in plain.unet.attn_processors
        if ".attn2." in name and not name.startswith("mid_block")
    ]
    layers = [name.removesuffix(".processor") for name in layers]
    assert len(layers) == 15
    totals: dict[str, Tensor] = {}
    times = range(50, 1000, 100)
    for t in times:
        noisy = DDIMScheduler(**BETAS).add_noise(latents, noise, torch.full((4,), t))
        plain.forward(noisy, t, text)
        for layer in layers:
            words = on_grid(plain.maps[layer][..., :24].contiguous().mean(1))
            totals[layer] = totals[layer] + words if layer in totals else words
    assert_stored(run, 0, {name: total / len(times) for name, total in totals.items()})


@torch.no_grad()
def test_slime(tmp_path: Path) -> None:
    learnt = torch.randn(77, 24, generator=torch.Generator().manual_seed(1))
    save_file({"prompt_embeds": learnt}, tmp_path / "parts.safetensors")
    told = ConditionSpec(prompt_embeddings=str(tmp_path / "parts.safetensors"))
    run = rehearse("slime", tmp_path / "run", condition=told)
    plain = Plain(run)
    noisy = DDIMScheduler(**BETAS).add_noise(
        plain.latents(Image.Resampling.BILINEAR, draws=True),
        run.noise(LATENT),
        torch.full((4,), 100),
    )
    plain.forward(noisy, 100, learnt.expand(4, -1, -1))
    cross = [
        *attention("up_blocks.1", range(3), "attn2"),
        *attention("up_blocks.2", range(2), "attn2"),
    ]
    own = attention("up_blocks.3", range(3), "attn1")
    want = {name: on_grid(plain.maps[name][..., :8].contiguous().mean(1)) for name in cross}
    assert_stored(run, 0, want | {name: on_grid(plain.maps[name].mean(1)) for name in own})


@torch.no_grad()
def test_diffseg(tmp_path: Path) -> None:
    run = rehearse("diffseg", tmp_path)
    plain = Plain(run)
    clean = plain.latents(Image.Resampling.BILINEAR, draws=False)
    plain.forward(clean, 300, plain.text([""] * 4))  # told 300 of a latent without noise
    own = {name: on_grid(maps.mean(1)) for name, maps in plain.maps.items() if "attn1" in name}
    assert len(own) == 16
    assert_stored(run, 0, own)


@torch.no_grad()
def test_prompt_to_prompt(tmp_path: Path) -> None:
    run = rehearse("prompt_to_prompt", tmp_path)
    plain = Plain(run)
    text = plain.text([photo.caption for photo in run.photos])
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(50)
    abar, x = scheduler.alphas_cumprod, plain.latents(Image.Resampling.BICUBIC, draws=False)
    times = [-1, *reversed(scheduler.timesteps.tolist())]
    wanted = {49 - label: t for t, label in enumerate((49, 44, 39, 34, 29, 24, 19, 14, 9, 4))}
    for i, (t, after) in enumerate(pairwise(times)):
        eps = plain.forward(x, after, text)  # told the time of what the step makes
        if i in wanted:
            want = {}
            for block, numbers in (("down_blocks.2", range(2)), ("up_blocks.1", range(3))):
                for name in attention(block, numbers, "attn2"):
                    want[name] = on_grid(plain.maps[name][..., :24].contiguous().mean(1))
                for name in attention(block, numbers, "attn1"):
                    want[name] = on_grid(plain.maps[name].mean(1))
            assert_stored(run, wanted.pop(i), want)
        if not wanted:
            break
        at = torch.ones(()) if t < 0 else abar[t]
        x0 = (x - eps * (1 - at).sqrt()) / at.sqrt()
        x = abar[after].sqrt() * x0 + (1 - abar[after]).sqrt() * eps


# --- the real models ----------------------------------------------------------------------------

REAL: Mapping[str, dict[tuple[int, ...], int]] = {
    "ldm_correspondences": {(1, 16, 16): 3, (1, 32, 32): 1},
    "daam": {(24, 64, 64): 5, (24, 32, 32): 5, (24, 16, 16): 5},
    "slime": {(8, 16, 16): 3, (8, 32, 32): 2, (4096, 64, 64): 3},
    "diffseg": {(4096, 64, 64): 5, (1024, 32, 32): 5, (256, 16, 16): 5, (64, 8, 8): 1},
    "prompt_to_prompt": {(24, 16, 16): 5, (256, 16, 16): 5},
}
"""How many arrays of each shape."""


@pytest.mark.parametrize("name", REAL)
def test_shapes_of_the_real_model(name: str) -> None:
    """SD 1.4 and 1.5 are one architecture."""
    recipe = Pipeline.load(find_recipe(name))
    model = BackboneSpec(model="bundled:stable-diffusion-v1-5")
    backbone = load_backbone(find_model(model), "meta")
    taps = backbone.resolve(recipe.taps)
    arrays = backbone.arrays(taps, recipe.images, ConditionSpec(), CLEAN, "float16")
    counts: dict[tuple[int, ...], int] = {}
    for array in arrays:
        counts[array.shape] = counts.get(array.shape, 0) + 1
    assert counts == REAL[name]
