"""Recipes along a DDIM inversion, against the equation written out around plain diffusers calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from drl_data.backbones import find_model, load_backbone
from drl_data.backbones.backbone import CLEAN
from drl_data.diffusion_spec import ConditionSpec
from drl_data.pipeline import Pipeline
from drl_data.recipes import find_recipe
from drl_data.spec import BackboneSpec
from tests.references import Rehearsed, hooked, rehearse

pytestmark = pytest.mark.usefixtures("one_thread")

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LATENT = (4, 16, 16)


def text_of(model: Path, prompt: str) -> Tensor:
    """CLIP's last hidden states of one prompt for four images: [4, token, channel]."""
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(model / "text_encoder").eval()
    ids = tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return encoder(ids).last_hidden_state.expand(4, -1, -1)


def latents_of(run: Rehearsed, *, draws: bool) -> Tensor:
    """A draw from the VAE's posterior, or its mean; scaled. [4, 4, 16, 16]"""
    vae = AutoencoderKL.from_pretrained(run.model / "vae").eval()
    posterior = vae.encode(run.pixels(Image.Resampling.BILINEAR)).latent_dist
    z = posterior.mean
    if draws:
        z = z + posterior.std * run.noise(LATENT, role="posterior")
    return z * 0.18215


def ascending(n_steps: int, offset: int) -> list[int]:
    """-1 (the clean input), then diffusers' own DDIM times from clean to noise."""
    scheduler = DDIMScheduler(**BETAS, steps_offset=offset)
    scheduler.set_timesteps(n_steps)
    return [-1, *reversed(scheduler.timesteps.tolist())]


def inverted(
    x: Tensor, times: list[int], predict: Callable[[Tensor, int, int], Tensor]
) -> Iterator[Tensor]:
    """The latents at each time but the last (Song et al. 2021, eq. 12 with eta 0, backwards).

    `predict(x, t, after)` is epsilon of the latents of time t, on the way to the time after it.
    """
    abar = DDIMScheduler(**BETAS).alphas_cumprod
    for t, after in pairwise(times):
        yield x
        at = torch.ones(()) if t < 0 else abar[t]
        eps = predict(x, t, after)
        x0 = (x - eps * (1 - at).sqrt()) / at.sqrt()
        x = abar[after].sqrt() * x0 + (1 - abar[after]).sqrt() * eps


def features_by_label(
    run: Rehearsed, prompt: str, offset: int, paths: list[str], n_labels: int = 50
) -> list[dict[str, Tensor]]:
    """Outputs of modules at the first `n_labels` places of a 50-step inversion, clean first; each
    told the time of the latents that it is given (Hyperfeatures, SatDiFuser)."""
    unet = UNet2DConditionModel.from_pretrained(run.model / "unet").eval()
    text = text_of(run.model, prompt)
    kept = hooked(unet, *paths)
    places: list[dict[str, Tensor]] = []

    def predict(x: Tensor, t: int, after: int) -> Tensor:
        (eps,) = unet(x, t, encoder_hidden_states=text, return_dict=False)
        places.append({path: out.clone() for path, out in kept.items()})
        return eps

    times = ascending(50, offset)[: n_labels + 1]
    for _ in inverted(latents_of(run, draws=True), times, predict):
        pass
    return places


UP_RESNETS = [f"up_blocks.{i}.resnets.{j}" for i in range(4) for j in range(3)]
SHORT_OF = "-pre_residual"


@torch.no_grad()
def test_hyperfeatures(tmp_path: Path) -> None:
    run = rehearse("hyperfeatures", tmp_path)
    labels = [49, 45, 40, 35, 30, 25, 20, 15, 10, 5, 0]
    told = [time.model_time for time in run.store.times]
    assert told == [-1, *range(60, 1000, 100)]  # published: labels 45, 40 .. 0 are 60, 160 .. 960
    paths = [f"{path}.conv2" for path in UP_RESNETS]
    places = features_by_label(run, "", 0, [*paths, *UP_RESNETS])
    assert len(run.store.arrays) == 12
    for t, label in enumerate(labels):
        for path in UP_RESNETS:
            got = run.features(f"{path}{SHORT_OF}", t)
            assert torch.equal(got, places[49 - label][f"{path}.conv2"])
            # What a hook on the resnet would give instead is far from it (recipes.md section 8).
            assert (got - places[49 - label][path]).abs().max() > 0.1


@torch.no_grad()
def test_hyperfeatures_one_step(tmp_path: Path) -> None:
    run = rehearse("hyperfeatures_one_step", tmp_path)
    assert [(time.model_time, time.sigma) for time in run.store.times] == [(-1, 0)]
    unet = UNet2DConditionModel.from_pretrained(run.model / "unet").eval()
    kept = hooked(unet, *(f"{path}.conv2" for path in UP_RESNETS))
    unet(latents_of(run, draws=True), -1, encoder_hidden_states=text_of(run.model, ""))
    for path in UP_RESNETS:
        assert torch.equal(run.features(f"{path}{SHORT_OF}"), kept[f"{path}.conv2"])


@torch.no_grad()
def test_satdifuser(tmp_path: Path) -> None:
    run = rehearse("satdifuser", tmp_path)
    assert [time.model_time for time in run.store.times] == [21, 61, 161]
    convs = [f"{path}.conv2" for path in UP_RESNETS]
    attentions = [
        f"up_blocks.{i}.attentions.{j}.transformer_blocks.0.attn1"
        for i in (1, 2, 3)
        for j in range(3)
    ]
    assert [array.name for array in run.store.arrays] == [*attentions, *convs]
    places = features_by_label(run, "A satellite image", 1, [*convs, *attentions], n_labels=10)
    for t, label in enumerate((47, 45, 40)):
        place = places[49 - label]
        for path in convs:
            assert torch.equal(run.features(path, t), place[path])
        for path in attentions:
            tokens = place[path]
            side = int(tokens.shape[1] ** 0.5)
            want = tokens.reshape(4, side, side, -1).permute(0, 3, 1, 2)
            assert torch.equal(run.features(path, t), want)


def told_next(run: Rehearsed, *paths: str) -> Iterator[tuple[int, Tensor, dict[str, Tensor]]]:
    """(label, latents, outputs of modules) along an inversion as PnP's, clean first: each step is
    told the time of the latents that it makes."""
    n_steps = run.pipeline.schedule.n_steps
    unet = UNet2DConditionModel.from_pretrained(run.model / "unet").eval()
    text = text_of(run.model, "")
    kept = hooked(unet, *paths)

    def predict(x: Tensor, t: int, after: int) -> Tensor:
        return unet(x, after, encoder_hidden_states=text, return_dict=False)[0]

    latents = inverted(latents_of(run, draws=False), ascending(n_steps, 1), predict)
    waiting: tuple[int, Tensor] | None = None
    for i, x in enumerate(latents):
        if waiting is not None:
            yield (*waiting, dict(kept))
        waiting = (n_steps - 1 - i, x)
    assert waiting is not None
    yield (*waiting, dict(kept))


@torch.no_grad()
def test_pnp_latents(tmp_path: Path) -> None:
    recipe = Pipeline.load(find_recipe("pnp_latents"))
    assert recipe.schedule is not None
    published = ascending(999, 1)  # 999 is the real number of steps, too slow to rehearse
    assert [published[998 - int(label)] for label in recipe.schedule.timesteps] == [
        *range(981, 0, -20)  # what its sampler of 50 steps visits
    ]
    run = rehearse("pnp_latents", tmp_path)
    stored = 0
    for label, x, _ in told_next(run):
        if label in (2, 12, 22):
            assert torch.equal(run.features("latent.noisy", (2, 12, 22).index(label)), x)
            stored += 1
    assert stored == 3


@torch.no_grad()
def test_pnp_features(tmp_path: Path) -> None:
    run = rehearse("pnp_features", tmp_path)
    # output_blocks 4 .. 11 of the original code: all but the first attention from up_blocks.1 on
    blocks = [(i, j) for i in (1, 2, 3) for j in range(3) if (i, j) != (1, 0)]
    attn1 = [f"up_blocks.{i}.attentions.{j}.transformer_blocks.0.attn1" for i, j in blocks]
    want = {"up_blocks.1.resnets.1-pre_residual": "up_blocks.1.resnets.1.conv2"}
    want |= {f"{path}-attn.{part}": f"{path}.to_{part}" for path in attn1 for part in "qk"}
    assert {array.name for array in run.store.arrays} == set(want)
    for label, _, kept in told_next(run, *want.values()):
        if label not in (2, 12, 22):
            continue
        for array, path in want.items():
            out = kept[path]
            if out.ndim == 3:
                side = int(out.shape[1] ** 0.5)
                out = out.reshape(4, side, side, -1).permute(0, 3, 1, 2)
            assert torch.equal(run.features(array, (2, 12, 22).index(label)), out), array


# --- the real models ----------------------------------------------------------------------------

# recipe: (arrays, bytes of an image at one time in float16); Hyperfeatures': recipes.md 1.3
REAL = {
    "hyperfeatures": (12, 14.3e6),
    "hyperfeatures_one_step": (12, 14.3e6),
    "satdifuser": (21, 7.0e6),
    "pnp_latents": (1, 2 * 4 * 64 * 64),
    "pnp_features": (17, 26.9e6),
}


@pytest.mark.parametrize("name", REAL)
def test_size_of_the_real_model(name: str) -> None:
    n_arrays, n_bytes = REAL[name]
    recipe = Pipeline.load(find_recipe(name))
    model = find_model(BackboneSpec(model="bundled:stable-diffusion-v1-5"))
    backbone = load_backbone(model, "meta")
    taps = backbone.resolve(recipe.taps)
    arrays = backbone.arrays(taps, recipe.images, ConditionSpec(), CLEAN, "float16")
    assert len(arrays) == n_arrays
    assert sum(array.bytes_per_row for array in arrays) == pytest.approx(n_bytes, rel=0.01)
