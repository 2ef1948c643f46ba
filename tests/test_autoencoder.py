"""A VAE alone as a backbone, against plain diffusers."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from drl_data.backbones import find_model, load_backbone
from drl_data.backbones.inventory import tappable_modules
from drl_data.decode import decode_image
from drl_data.diffusion_spec import ConditionSpec
from drl_data.errors import SpecError, TapError
from drl_data.pipeline import Pipeline
from drl_data.runs import extract
from drl_data.spec import BackboneSpec, ImageSpec, TapSpec
from drl_data.testing import write_photo_tars
from drl_data.tiny_models import save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def photos_of(folder: Path) -> list[tuple[bytes, ImageSpec]]:
    """Every JPEG of a folder of tars, and the size that it is decoded to."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    file = tar.extractfile(member)
                    assert file is not None
                    found.append((file.read(), ImageSpec(size=16)))
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny("autoencoder", tmp_path / "vae")


def test_latents_encoder_and_decoder(folder: Path, tmp_path: Path) -> None:
    photos = write_photo_tars(tmp_path / "photos", n_samples=4, n_tars=1)
    pipeline = Pipeline.parse(
        {
            "name": "vae",
            "dataset": {"tars": str(photos / "*.tar")},
            "images": {"size": 16},
            "backbone": {"model": str(folder)},
            "latents": {"posterior": "mean"},
            "schedule": {"convention": "none"},
            "noise": {"kind": "none"},
            "taps": ["latent", "latent.moments", "vae.enc[0]", "vae.dec[1]"],
            "features": {"dtype": "float32", "batch_size": 4, "rows_per_unit": 4},
            "store": {"url": str(tmp_path / "store")},
        }
    )
    store = extract(pipeline).store
    kept: dict[str, Tensor] = {}
    vae = AutoencoderKL.from_pretrained(folder).eval()
    for name, block in (("enc", vae.encoder.down_blocks[0]), ("dec", vae.decoder.up_blocks[1])):
        block.register_forward_hook(lambda _m, _i, out, name=name: kept.update({name: out}))
    pixels = torch.stack([torch.from_numpy(decode_image(*sample)) for sample in photos_of(photos)])
    with torch.no_grad():
        posterior = vae.encode(pixels.float() / 255 * 2 - 1).latent_dist
        latents = posterior.mean * vae.config.scaling_factor
        vae.decode(latents / vae.config.scaling_factor)
    (unit,) = store.units

    def stored(name: str) -> Tensor:
        return torch.tensor(store.read_unit(name, 0, unit))

    assert torch.equal(stored("latent"), latents)
    assert torch.equal(stored("latent.moments"), torch.cat([posterior.mean, posterior.std], dim=1))
    assert torch.equal(stored("vae.encoder.down_blocks.0"), kept["enc"])
    assert torch.equal(stored("vae.decoder.up_blocks.1"), kept["dec"])
    assert store.verify(deep=True) == []


def test_it_has_no_denoiser_no_noise_and_no_condition(folder: Path) -> None:
    backbone = load_backbone(find_model(BackboneSpec(model=str(folder))), "meta")
    with pytest.raises(TapError, match="matches no module"):
        backbone.resolve([TapSpec(path="encoder.mid_block")])
    with pytest.raises(SpecError, match="an autoencoder takes no text"):
        backbone.conditioning(ConditionSpec(prompt="a cat"))
    with pytest.raises(SpecError, match="an autoencoder takes none"):
        backbone.conditioning(ConditionSpec(class_label=3))
    taps = backbone.resolve([TapSpec(path="latent.moments")])
    flops = backbone.flops(taps, ImageSpec(size=16), ConditionSpec())
    assert flops.whole == flops.cut == 0
    assert flops.encode > 0


def test_its_modules_are_listed_by_the_names_that_taps_have(folder: Path) -> None:
    found = tappable_modules(BackboneSpec(model=str(folder)), 16)
    paths = {module.path: module for module in found.modules}
    assert paths["vae.encoder.down_blocks.0"].shape == (8, 8, 8)
    assert paths["vae.encoder.mid_block"].dims == ("channel", "height", "width")
    backbone = load_backbone(find_model(BackboneSpec(model=str(folder))), "meta")
    assert backbone.resolve([TapSpec(path=path) for path in paths])
