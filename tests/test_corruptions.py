"""Every way to corrupt the input: the store equals a straight loop of plain diffusers calls.

The loops hold no drl_data code but the definition of the random numbers. Shapes: b 4 images.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMInverseScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from drl_data.backbones import ModelFolder, load_backbone
from drl_data.errors import SpecError
from drl_data.features import FeatureComputer
from drl_data.noise import draw_normal, draw_uniform
from drl_data.pipeline import Pipeline
from drl_data.runs import extract, prepare
from drl_data.schedule import resolve_times
from drl_data.spec import BackboneSpec
from drl_data.store import FeatureStore
from drl_data.taps import resolve
from drl_data.testing import write_photo_tars
from drl_data.tiny_models import save_tiny_ddpm, save_tiny_dit, save_tiny_stable_diffusion

pytestmark = pytest.mark.usefixtures("one_thread")

N_SAMPLES, BATCH = 8, 4
TAP = "up_blocks.1.resnets.0.conv2"
Batch = tuple[list[str], Tensor]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photo_tars(tmp_path_factory.mktemp("photos"), n_samples=N_SAMPLES)


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_stable_diffusion(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_ddpm(tmp_path_factory.mktemp("ddpm"))


def pipeline(photos: Path, model: Path, store: Path, **changes: object) -> Pipeline:
    data: dict[str, object] = {
        "name": "test",
        "dataset": {"tars": str(photos / "*.tar")},
        "images": {"size": 16},
        "backbone": {"model": str(model)},
        "schedule": {"timesteps": [0, 300]},
        "taps": [TAP],
        "features": {"dtype": "float32", "batch_size": BATCH, "rows_per_unit": N_SAMPLES},
        "store": {"url": str(store)},
    }
    return Pipeline.parse({**data, **changes})


def features_of(store: FeatureStore) -> np.ndarray:
    """[t, row, ...] of the store's only array."""
    (array,), (unit,) = store.arrays, store.units
    return np.stack([store.read_unit(array.name, t, unit) for t in range(len(store.times))])


def batches(photos: Path) -> list[Batch]:
    """Keys and pixels in -1..1 [b, 3, 16, 16] of the images, four at a time."""
    keys, images = [], []
    for path in sorted(photos.glob("*.tar")):
        with tarfile.open(path) as tar:
            for name in sorted(n for n in tar.getnames() if n.endswith(".jpg")):
                image = Image.open(tar.extractfile(name)).convert("RGB")
                image = image.resize((16, 16), Image.Resampling.BICUBIC)
                images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).float())
                keys.append(name.removesuffix(".jpg"))
    x = torch.stack(images) / 255 * 2 - 1
    return [(keys[i : i + BATCH], x[i : i + BATCH]) for i in range(0, len(keys), BATCH)]


def normal(keys: list[str], shape: tuple[int, ...], role: str, member: int = 0) -> Tensor:
    """The per-sample noise [b, *shape] of seed 0."""
    draws = [draw_normal(shape, role, 0, "key", key, member, "all") for key in keys]
    return torch.from_numpy(np.stack(draws))


def tapped(network: nn.Module, path: str = TAP) -> list[Tensor]:
    """A list that each forward appends the output of a module to."""
    kept: list[Tensor] = []
    network.get_submodule(path).register_forward_hook(lambda m, args, out: kept.append(out.clone()))
    return kept


class Plain:
    """Stable Diffusion's parts by plain diffusers calls, with the empty prompt."""

    def __init__(self, folder: Path) -> None:
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
        self.vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
        self.scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
        ids = tokenizer("", padding="max_length", return_tensors="pt").input_ids
        self.text = encoder(ids).last_hidden_state.expand(BATCH, -1, -1)
        self.kept = tapped(self.unet)

    def latents(self, pixels: Tensor, eps: Tensor | None = None) -> Tensor:
        posterior = self.vae.encode(pixels).latent_dist
        z = posterior.mean if eps is None else posterior.mean + posterior.std * eps
        return z * self.vae.config.scaling_factor

    def predict(self, x: Tensor, t: float) -> Tensor:
        told = torch.full((BATCH,), t)
        return self.unet(x, told, encoder_hidden_states=self.text).sample


@torch.no_grad()
def test_noise_is_at_one_time_and_another_is_told(photos: Path, sd: Path, tmp_path: Path) -> None:
    schedule = {"timesteps": [0, 300], "condition_at": [25, 40]}
    chosen = pipeline(photos, sd, tmp_path / "s", schedule=schedule, latents={"posterior": "mean"})
    store = extract(chosen).store
    assert [(t.requested, t.model_time) for t in store.times] == [(0, 25), (300, 40)]
    plain = Plain(sd)
    want: list[list[Tensor]] = [[], []]
    for keys, pixels in batches(photos):
        latents = plain.latents(pixels)
        eps = normal(keys, (4, 8, 8), "noise")
        for t, (noised, told) in enumerate(((0, 25), (300, 40))):
            plain.predict(plain.scheduler.add_noise(latents, eps, torch.tensor([noised])), told)
            want[t].append(plain.kept.pop())
    reference = np.stack([torch.cat(parts).numpy() for parts in want])
    np.testing.assert_array_equal(features_of(store), reference)


@torch.no_grad()
@pytest.mark.parametrize("per_member", [True, False])
def test_posterior_is_drawn_for_each_member_or_once(
    photos: Path, sd: Path, tmp_path: Path, per_member: bool
) -> None:
    chosen = pipeline(
        photos,
        sd,
        tmp_path / "s",
        schedule={"timesteps": [300]},
        noise={"members": 3},
        latents={"per_member": per_member},
    )
    plain = Plain(sd)
    want = []
    for keys, pixels in batches(photos):
        total = torch.zeros(())
        for member in range(3):
            draw = normal(keys, (4, 8, 8), "posterior", member if per_member else 0)
            eps = normal(keys, (4, 8, 8), "noise", member)
            latents = plain.latents(pixels, draw)
            plain.predict(plain.scheduler.add_noise(latents, eps, torch.tensor([300])), 300)
            total = total + plain.kept.pop()
        want.append(total / 3)
    np.testing.assert_array_equal(features_of(extract(chosen).store)[0], torch.cat(want).numpy())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bank", "per_sample", "uniform"])
def test_every_timestep_has_its_own_draw(
    photos: Path, ddpm: Path, tmp_path: Path, kind: str
) -> None:
    noise = {"kind": kind, "per_timestep": kind != "bank"}
    store = extract(pipeline(photos, ddpm, tmp_path / "s", noise=noise)).store
    unet = UNet2DModel.from_pretrained(ddpm / "unet").eval()
    scheduler = DDPMScheduler.from_pretrained(ddpm / "scheduler")
    kept = tapped(unet)
    draw = draw_uniform if kind == "uniform" else draw_normal
    want: list[list[Tensor]] = [[], []]
    for keys, pixels in batches(photos):
        for t, when in enumerate((0, 300)):
            owners = [("bank",)] * BATCH if kind == "bank" else [("key", key) for key in keys]
            eps = [draw((3, 16, 16), "noise", 0, *owner, 0, when) for owner in owners]
            noisy = scheduler.add_noise(
                pixels, torch.from_numpy(np.stack(eps)), torch.tensor([when])
            )
            unet(noisy, torch.full((BATCH,), when))
            want[t].append(kept.pop())
    reference = np.stack([torch.cat(parts).numpy() for parts in want])
    np.testing.assert_array_equal(features_of(store), reference)


@torch.no_grad()
def test_masked_patches_and_no_noise(photos: Path, ddpm: Path, tmp_path: Path) -> None:
    """MDM: of 16 patches the int(16 (1 - t/1000)) with the smallest numbers stay."""
    noise = {"kind": "patch_mask", "patch": 4}
    chosen = pipeline(photos, ddpm, tmp_path / "s", schedule={"timesteps": [50, 300]}, noise=noise)
    store = extract(chosen).store
    unet = UNet2DModel.from_pretrained(ddpm / "unet").eval()
    kept = tapped(unet)
    want: list[list[Tensor]] = [[], []]
    for keys, pixels in batches(photos):
        for t, (told, n_kept) in enumerate(((50, 15), (300, 11))):
            masked = torch.zeros_like(pixels)
            for i, key in enumerate(keys):
                numbers = draw_uniform((1, 4, 4), "noise", 0, "key", key, 0, "all").flatten()
                for place in np.argsort(numbers)[:n_kept]:
                    rows = slice(place // 4 * 4, place // 4 * 4 + 4)
                    columns = slice(place % 4 * 4, place % 4 * 4 + 4)
                    masked[i, :, rows, columns] = pixels[i, :, rows, columns]
            unet(masked, torch.full((BATCH,), told))
            want[t].append(kept.pop())
    reference = np.stack([torch.cat(parts).numpy() for parts in want])
    np.testing.assert_array_equal(features_of(store), reference)


def test_patches_that_do_not_tile_are_refused_before_a_worker_starts(
    photos: Path, sd: Path, tmp_path: Path
) -> None:
    chosen = pipeline(photos, sd, tmp_path / "s", noise={"kind": "patch_mask", "patch": 3})
    with pytest.raises(SpecError, match=r"noise\.patch 3: .* do not tile 8x8"):
        prepare(chosen)


# --- DDIM inversion -----------------------------------------------------------------------------

LABELS = [9, 2, 6]  # of 10 steps: the clean input, then deep, then between


def inverting(photos: Path, model: Path, store: Path, told: str, **changes: object) -> Pipeline:
    schedule = {
        "convention": "generation_label",
        "n_steps": 10,
        "timesteps": LABELS,
        "scheduler": "DDIMScheduler",
    }
    noise = {"kind": "inversion", "told": told}
    return pipeline(
        photos,
        model,
        store,
        **{"schedule": schedule, "noise": noise, "latents": {"posterior": "mean"}, **changes},
    )


def hyperfeatures(
    x: Tensor, abar: Tensor, predict: Callable[[Tensor, float], object], kept: list[Tensor]
) -> list[Tensor]:
    """The features of all 10 steps, last step first, so that they are indexed by label.

    Song et al. 2021, eq. 12 with eta 0, along -1, 0, 100 .. 800 -> 0, 100 .. 900; abar_{-1} = 1.
    """
    times = [-1, *range(0, 1000, 100)]
    for t, after in pairwise(times):
        at = torch.ones(()) if t < 0 else abar[t]
        eps = predict(x, t)
        x0 = (x - eps * (1 - at).sqrt()) / at.sqrt()
        x = abar[after].sqrt() * x0 + (1 - abar[after]).sqrt() * eps
    features = [kept.pop() for _ in range(10)]
    assert not kept
    return features


@torch.no_grad()
def test_inversion_equals_the_equation_written_out(photos: Path, sd: Path, tmp_path: Path) -> None:
    """As Hyperfeatures: every step tells the time of what it is given, -1 for the clean input."""
    store = extract(inverting(photos, sd, tmp_path / "s", "current")).store
    assert [(t.requested, t.model_time) for t in store.times] == [(9, -1), (2, 600), (6, 200)]
    plain = Plain(sd)
    abar = plain.scheduler.alphas_cumprod
    parts = [
        hyperfeatures(plain.latents(pixels), abar, plain.predict, plain.kept)
        for _, pixels in batches(photos)
    ]
    want = np.stack([torch.cat([part[label] for part in parts]).numpy() for label in LABELS])
    np.testing.assert_array_equal(features_of(store), want)


@torch.no_grad()
def test_inversion_equals_diffusers_inverse_scheduler(
    photos: Path, sd: Path, tmp_path: Path
) -> None:
    """Which tells the time of what a step makes."""
    store = extract(inverting(photos, sd, tmp_path / "s", "next")).store
    assert [t.model_time for t in store.times] == [0, 700, 300]
    plain = Plain(sd)
    scheduler = DDIMInverseScheduler.from_pretrained(sd / "scheduler", clip_sample=False)
    scheduler.register_to_config(set_alpha_to_one=True)
    parts = []
    for _, pixels in batches(photos):
        x = plain.latents(pixels)
        scheduler.set_timesteps(10)
        scheduler.initial_alpha_cumprod = torch.tensor(1.0)
        for t in scheduler.timesteps.tolist():
            x = scheduler.step(plain.predict(x, t), t, x).prev_sample
        parts.append([plain.kept.pop() for _ in range(10)])
    want = np.stack([torch.cat([part[label] for part in parts]).numpy() for label in LABELS])
    np.testing.assert_array_equal(features_of(store), want)


@torch.no_grad()
def test_inversion_leaves_a_predicted_variance_out(photos: Path, tmp_path: Path) -> None:
    """DiT puts out noise and variance, 4 + 4 channels."""
    model = save_tiny_dit(tmp_path / "dit")
    tap = "transformer_blocks.2.ff"
    chosen = inverting(photos, model, tmp_path / "s", "current", taps=[{"path": tap}])
    got = features_of(extract(chosen).store)
    network = DiTTransformer2DModel.from_pretrained(model / "transformer").eval()
    vae = AutoencoderKL.from_pretrained(model / "vae").eval()
    abar = DDPMScheduler.from_pretrained(model / "scheduler").alphas_cumprod
    kept = tapped(network, tap)
    null = torch.full((BATCH,), 10)

    def predict(x: Tensor, t: float) -> Tensor:
        told = torch.full((BATCH,), t)
        return network(x, timestep=told, class_labels=null).sample[:, :4]

    parts = []
    for _, pixels in batches(photos):
        latents = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
        parts.append(hyperfeatures(latents, abar, predict, kept))
    for t, label in enumerate(LABELS):
        tokens = torch.cat([part[label] for part in parts])  # [row, token, channel], a 4x4 grid
        want = tokens.transpose(1, 2).reshape(N_SAMPLES, -1, 4, 4)
        np.testing.assert_array_equal(got[t], want.numpy())


def test_inversion_is_one_pass_that_ends_at_the_last_tap_of_the_deepest_label(
    photos: Path, sd: Path
) -> None:
    chosen = inverting(photos, sd, Path("/none"), "current")
    spec = prepare(chosen).spec
    backbone = load_backbone(ModelFolder.find(BackboneSpec(model=str(sd))), "cpu")
    computer = FeatureComputer(
        backbone,
        resolve(backbone.network, spec.taps),
        backbone.conditioning(spec.condition),
        resolve_times(backbone.schedule, spec.schedule, spec.noise),
        spec,
    )
    begun, ended, encoded = [], [], []
    backbone.network.conv_in.register_forward_hook(lambda m, args, out: begun.append(1))
    backbone.network.conv_out.register_forward_hook(lambda m, args, out: ended.append(1))
    backbone.vae.encoder.register_forward_hook(lambda m, args, out: encoded.append(1))
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 16, 16), dtype=np.uint8)
    order = [t for t, _ in computer.compute(pixels, ["a", "b", "c", "d"])]
    assert order == [0, 2, 1]
    assert (len(begun), len(ended), len(encoded)) == (8, 7, 1)  # label 2 is the eighth step of 10


@torch.no_grad()
def test_a_mean_over_an_inversion_is_of_all_its_labels(
    photos: Path, sd: Path, tmp_path: Path
) -> None:
    """Its timesteps come in another order than the spec's, and the last to come is not the last."""
    store = extract(
        inverting(
            photos,
            sd,
            tmp_path / "s",
            "current",
            taps=[{"path": TAP}, {"path": TAP, "name": "mean", "reduce": "time_mean"}],
        )
    ).store
    each = np.stack(
        [np.concatenate([store.read_unit(TAP, t, unit) for unit in store.units]) for t in range(3)]
    )
    mean = np.concatenate([store.read_unit("mean", 0, unit) for unit in store.units])
    np.testing.assert_allclose(mean, each.mean(0), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_predictions_along_an_inversion(photos: Path, sd: Path, tmp_path: Path) -> None:
    """The network's noise is what moves the latents, and `latent.noisy` what it was given."""
    taps = [{"path": "eps"}, {"path": "latent.noisy"}, {"path": "x0"}]
    store = extract(inverting(photos, sd, tmp_path / "s", "current", taps=taps)).store
    plain = Plain(sd)
    abar = plain.scheduler.alphas_cumprod
    at = dict(zip(LABELS, (torch.ones(()), abar[600], abar[200]), strict=True))
    for t, label in enumerate(LABELS):
        eps, x, x0 = (
            torch.cat([torch.tensor(store.read_unit(name, t, unit)) for unit in store.units])
            for name in ("eps", "latent.noisy", "x0")
        )
        torch.testing.assert_close(x, at[label].sqrt() * x0 + (1 - at[label]).sqrt() * eps)
    clean, eps = (
        torch.cat([torch.tensor(store.read_unit(name, 0, unit)) for unit in store.units])
        for name in ("latent.noisy", "eps")
    )
    latents = [plain.latents(pixels) for _, pixels in batches(photos)]
    assert torch.equal(clean, torch.cat(latents))
    assert torch.equal(eps, torch.cat([plain.predict(x, -1) for x in latents]))


def test_inversion_does_not_depend_on_the_seed(photos: Path, ddpm: Path, tmp_path: Path) -> None:
    stores = [
        extract(
            inverting(
                photos,
                ddpm,
                tmp_path / str(seed),
                "current",
                noise={"kind": "inversion", "seed": seed},
            )
        ).store
        for seed in (0, 1)
    ]
    np.testing.assert_array_equal(*(features_of(store) for store in stores))
    assert stores[0].fingerprint != stores[1].fingerprint


# --- latents ------------------------------------------------------------------------------------


@torch.no_grad()
def test_latents_are_scaled_by_the_vaes_statistics(photos: Path, sd: Path, tmp_path: Path) -> None:
    """(z - mean_c) factor / std_c, as StableDiffusionXLImg2ImgPipeline.prepare_latents has it."""
    settings = {
        "schedule": {"timesteps": [100]},
        "noise": {"kind": "none"},
        "latents": {"posterior": "mean", "scale": "per_channel"},
    }
    with pytest.raises(SpecError, match=r"scale per_channel: .* has no latents_mean"):
        prepare(pipeline(photos, sd, tmp_path / "s", **settings))
    model = save_tiny_stable_diffusion(tmp_path / "sd")
    vae = AutoencoderKL.from_pretrained(model / "vae").eval()
    mean, std = [0.1, -0.2, 0.3, 0.4], [1.5, 2.0, 0.5, 1.0]
    vae.register_to_config(latents_mean=mean, latents_std=std)
    vae.save_pretrained(model / "vae")
    got = features_of(extract(pipeline(photos, model, tmp_path / "s", **settings)).store)
    plain = Plain(model)
    want = []
    for _, pixels in batches(photos):
        z = vae.encode(pixels).latent_dist.mean
        m, s = (torch.tensor(v).view(1, 4, 1, 1) for v in (mean, std))
        plain.predict((z - m) * vae.config.scaling_factor / s, 100)
        want.append(plain.kept.pop())
    np.testing.assert_array_equal(got[0], torch.cat(want).numpy())
