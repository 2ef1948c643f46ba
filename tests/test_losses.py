"""The tap `loss`: tables of denoising losses equal plain loops over candidates and draws of noise.

Diffusion Classifier (Li et al. 2023): errors[image, prompt, timestep, noise].
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DModel,
)
from PIL import Image
from torch import Tensor

from drl_data.backbones import find_model, load_backbone
from drl_data.diffusion_spec import ConditionSpec, ScheduleSpec
from drl_data.errors import SpecError, TapError
from drl_data.flops import count_forwards
from drl_data.noise import draw_normal
from drl_data.pipeline import Pipeline
from drl_data.runs import extract, prepare
from drl_data.schedule import NoiseSchedule, NoSchedule
from drl_data.schedule_edm import EDMSchedule
from drl_data.schedule_flow import FlowSchedule
from drl_data.spec import BackboneSpec, ResolvedTime, TapSpec
from drl_data.store import FeatureStore
from drl_data.tiny_models import save_tiny
from tests.test_families import told_by_sd3

pytestmark = pytest.mark.usefixtures("one_thread")

N = 4
WHEN = ResolvedTime(requested=0, convention="x", model_time=0, alpha=0.8, sigma=0.6)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from drl_data.testing import write_photo_tars

    return write_photo_tars(tmp_path_factory.mktemp("photos"), n_samples=N, n_tars=1, size=16)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_tiny(name, root / name) for name in ("dit", "sd3", "ddpm", "dinov2")}


def pipeline(photos: Path, model: Path, store: Path, **changes: object) -> Pipeline:
    return Pipeline.parse(
        {
            "name": "losses",
            "dataset": {"tars": str(photos / "*.tar")},
            "images": {"size": 16, "resize": "none"},
            "backbone": {"model": str(model)},
            "latents": {"posterior": "mean"},
            "schedule": {"timesteps": [100, 700]},
            "noise": {"kind": "bank", "members": 2},
            "taps": ["loss"],
            "features": {"dtype": "float32", "batch_size": N, "rows_per_unit": N},
            "store": {"url": str(store)},
            **changes,
        }
    )


def read_photos(path: Path) -> tuple[list[str], Tensor]:
    """Keys and images [b, 3, 16, 16] in -1..1."""
    with tarfile.open(path) as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar if m.name.endswith("jpg")}  # type: ignore[union-attr]
    arrays = [np.array(Image.open(io.BytesIO(data))) for data in files.values()]
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    return [name.split(".")[0] for name in files], pixels.float() / 255 * 2 - 1


def bank(shape: tuple[int, ...], member: int, t: float) -> Tensor:
    return torch.from_numpy(draw_normal(shape, "noise", 0, "bank", member, t)).expand(N, *shape)


def table(store: FeatureStore, array: str = "loss") -> Tensor:
    """[t, image, candidate, member]."""
    return torch.tensor(np.stack([store.read_unit(array, t, store.units[0]) for t in (0, 1)]))


@torch.no_grad()
def test_losses_of_dit_over_classes(models: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    """Its output has a variance too, which is left out."""
    given = pipeline(
        photos,
        models["dit"],
        tmp_path / "s.zarr",
        condition={"candidates": {"classes": 3}},
        taps=["loss", "loss.l1", "loss.huber"],
    )
    assert given.condition.candidates == (0, 1, 2)
    store = extract(given).store
    loss, l1, huber = store.features
    assert [a.tap for a in store.features] == ["loss", "loss.l1", "loss.huber"]
    assert (loss.dims, loss.shape) == (("candidate", "member"), (3, 2))
    _, images = read_photos(photos / "photos-000000.tar")
    vae = AutoencoderKL.from_pretrained(models["dit"] / "vae").eval()
    network = DiTTransformer2DModel.from_pretrained(models["dit"] / "transformer").eval()
    scheduler = DDIMScheduler.from_pretrained(models["dit"] / "scheduler")
    clean = vae.encode(images).latent_dist.mean * 0.18215
    want = torch.empty(3, 2, N, 3, 2)
    for i, t in enumerate((100, 700)):
        for member in range(2):
            eps = bank((4, 8, 8), member, t)
            noisy = scheduler.add_noise(clean, eps, torch.full((N,), t))
            for label in range(3):
                times, labels = torch.full((N,), t), torch.full((N,), label)
                out = network(noisy, timestep=times, class_labels=labels).sample[:, :4]
                error = out - eps
                want[0, i, :, label, member] = error.square().flatten(1).mean(1)
                want[1, i, :, label, member] = error.abs().flatten(1).mean(1)
                huber_of = torch.where(error.abs() < 1, error.square() / 2, error.abs() - 0.5)
                want[2, i, :, label, member] = huber_of.flatten(1).mean(1)
    assert torch.equal(table(store), want[0])
    assert torch.equal(table(store, l1.name), want[1])
    torch.testing.assert_close(table(store, huber.name), want[2])
    assert len(torch.unique(want)) == want.numel()  # all differ, so that none stands for another
    assert count_forwards(store.spec) == (2 * 2 * 3, 0)


@torch.no_grad()
def test_losses_of_sd3_over_prompts(models: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    """The target of a flow is its velocity; `template` is filled by the candidates."""
    given = pipeline(
        photos,
        models["sd3"],
        tmp_path / "s.zarr",
        condition={"template": "A small {label}", "candidates": ["cat", "dog"]},
        schedule={"convention": "flow", "timesteps": [0.25, 0.5]},
        noise={"kind": "per_sample"},
    )
    store = extract(given).store
    keys, images = read_photos(photos / "photos-000000.tar")
    vae = AutoencoderKL.from_pretrained(models["sd3"] / "vae").eval()
    network = SD3Transformer2DModel.from_pretrained(models["sd3"] / "transformer").eval()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    clean = (vae.encode(images).latent_dist.mean - 0.0609) * 1.5305
    eps = torch.stack(
        [torch.from_numpy(draw_normal((16, 8, 8), "noise", 0, "key", k, 0, "all")) for k in keys]
    )
    told = told_by_sd3(models["sd3"])  # of "A small cat"
    for i, t in enumerate((0.25, 0.5)):
        noisy = scheduler.scale_noise(clean, torch.full((N,), 1000.0 * t), eps)
        out = network(
            noisy,
            timestep=torch.full((N,), 1000 * t).long(),
            **{name: x.expand(N, *x.shape[1:]) for name, x in told.items()},
        ).sample
        want = (out - (eps - clean)).square().flatten(1).mean(1)
        assert torch.equal(table(store)[i, :, 0, 0], want)
        assert not torch.equal(table(store)[i, :, 1, 0], want)


def test_targets_are_what_predictions_invert() -> None:
    torch.manual_seed(0)
    schedule = NoiseSchedule(DDPMScheduler().alphas_cumprod)
    clean, eps = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    noisy = WHEN.alpha * clean + WHEN.sigma * eps
    assert torch.equal(schedule.target(clean, eps, WHEN), eps)
    for prediction in ("sample", "v_prediction"):
        other = NoiseSchedule(schedule.alphas_cumprod, prediction)  # type: ignore[arg-type]
        target = other.target(clean, eps, WHEN)
        # what the network should put out is what `predicted` makes x0 and eps of
        torch.testing.assert_close(other.predicted("x0", target, noisy, WHEN), clean)
        torch.testing.assert_close(other.predicted("eps", target, noisy, WHEN), eps)


def test_targets_of_flow_and_edm_are_what_their_predictions_invert() -> None:
    torch.manual_seed(0)
    clean, eps = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    flow = WHEN.model_copy(update={"alpha": 0.7, "sigma": 0.3})
    noisy = 0.7 * clean + 0.3 * eps
    target = FlowSchedule().target(clean, eps, flow)
    torch.testing.assert_close(FlowSchedule().predicted("x0", target, noisy, flow), clean)
    torch.testing.assert_close(FlowSchedule().predicted("eps", target, noisy, flow), eps)
    assert torch.equal(FlowSchedule().predicted("v", target, noisy, flow), eps - clean)
    edm = EDMSchedule()
    (when,) = edm.resolve(ScheduleSpec(convention="edm_sigma", timesteps=(0.3,)))
    seen = when.alpha * clean + when.sigma * eps  # c_in (x_0 + sigma eps)
    target = edm.target(clean, eps, when)
    torch.testing.assert_close(edm.predicted("x0", target, seen, when), clean)
    torch.testing.assert_close(edm.predicted("eps", target, seen, when), eps, atol=1e-4, rtol=1e-4)
    # eq. 8: for data of standard deviation sigma_data the target has unit variance
    data = 0.5 * torch.randn(200_000)
    scaled = edm.target(data, torch.randn(200_000), when)
    assert abs(float(scaled.var()) - 1) < 0.02


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"condition": {}}, "scores images against condition.candidates"),
        ({"taps": ["transformer_blocks.0"]}, "they are for the tap `loss`"),
        ({"taps": ["loss", "transformer_blocks.0"]}, "other taps are told one condition"),
        ({"noise": {"kind": "none"}}, "adds no noise to be predicted"),
        ({"taps": [{"path": "loss", "reduce": "mean"}]}, "it has no reductions"),
        ({"features": {"dtype": "int8"}}, "features.dtype int8 is for channels"),
        ({"condition": {"candidates": [0, 11]}}, "class_label 11"),
        ({"condition": {"candidates": ["a cat"]}}, "takes no text"),
    ],
)
def test_what_does_not_go_together_is_refused(
    models: dict[str, Path],
    photos: Path,
    tmp_path: Path,
    changes: dict[str, object],
    message: str,
) -> None:
    with pytest.raises(SpecError, match=message):
        prepare(
            pipeline(
                photos,
                models["dit"],
                tmp_path / "s.zarr",
                **{"condition": {"candidates": {"classes": 2}}, **changes},
            )
        )


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ({"candidates": [1, 1]}, "want none twice"),
        ({"candidates": [1, "a"]}, "all prompts or all classes"),
        ({"candidates": ["a"], "prompt": "b"}, "leave out prompt"),
        ({"candidates": [1], "class_label": 2}, "leave out prompt"),
    ],
)
def test_candidates_are_of_one_kind(condition: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConditionSpec.model_validate(condition)


def test_encoders_and_parts_are_refused(models: dict[str, Path]) -> None:
    with pytest.raises(TapError, match="the site loss has the parts l1 or huber"):
        load_backbone(find_model(BackboneSpec(model=str(models["ddpm"]))), "meta").resolve(
            [TapSpec(path="loss.noisy")]
        )
    with pytest.raises(TapError, match="this model is no denoiser"):
        NoSchedule().target(torch.zeros(1), torch.zeros(1), WHEN)
    with pytest.raises(TapError, match="this model is no denoiser"):
        NoSchedule().predicted("x0", torch.zeros(1), torch.zeros(1), WHEN)


def test_a_table_has_no_channels(models: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    given = pipeline(
        photos, models["dit"], tmp_path / "s.zarr", condition={"candidates": {"classes": 2}}
    )
    (array,) = extract(given).store.features
    with pytest.raises(SpecError, match="it is a table, not features"):
        _ = array.channel_axis


@torch.no_grad()
def test_predictions_of_a_pixel_network(
    models: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    """x0 and eps of a store are the scheduler's own."""
    given = pipeline(
        photos,
        models["ddpm"],
        tmp_path / "s.zarr",
        schedule={"timesteps": [100, 700]},
        noise={"kind": "per_sample"},
        taps=["x0", "eps"],
    )
    store = extract(given).store
    keys, images = read_photos(photos / "photos-000000.tar")
    unet = UNet2DModel.from_pretrained(models["ddpm"] / "unet").eval()
    scheduler = DDPMScheduler(clip_sample=False)
    eps = torch.stack(
        [torch.from_numpy(draw_normal((3, 16, 16), "noise", 0, "key", k, 0, "all")) for k in keys]
    )
    for i, t in enumerate((100, 700)):
        noisy = scheduler.add_noise(images, eps, torch.full((N,), t))
        out = unet(noisy, torch.full((N,), t)).sample
        want = scheduler.step(out, t, noisy).pred_original_sample
        assert torch.equal(table(store, "eps")[i], out)
        torch.testing.assert_close(table(store, "x0")[i], want)
