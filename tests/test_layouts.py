"""Exports read as the published code reads them: REPA's dataset.py, LightningDiT's
img_latent_dataset.py; written anew here, step by step what theirs does (both MIT)."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from drl_data.datasets import FeatureDataset
from drl_data.errors import SpecError
from drl_data.pipeline import Pipeline
from drl_data.runs import extract
from drl_data.store import FeatureStore
from drl_data.tasks.export import export
from drl_data.testing import write_photo_tars
from drl_data.tiny_models import save_tiny

N = 12


class RepaData:
    """Pairs what lies in `images` with what lies in `vae-sd` by the order of their names."""

    def __init__(self, folder: Path) -> None:
        PIL.Image.init()
        kinds = {*PIL.Image.EXTENSION, ".npy"}

        def names(root: Path) -> list[str]:
            found = {
                os.path.relpath(os.path.join(at, name), start=root)
                for at, _, files in os.walk(root)
                for name in files
            }
            return sorted(name for name in found if os.path.splitext(name)[1].lower() in kinds)

        self.images, self.features = folder / "images", folder / "vae-sd"
        self.image_names, self.feature_names = names(self.images), names(self.features)
        listed = dict(json.loads((self.features / "dataset.json").read_bytes())["labels"])
        labels = np.array([listed[name.replace("\\", "/")] for name in self.feature_names])
        self.labels = labels.astype({1: np.int64, 2: np.float32}[labels.ndim])

    def __len__(self) -> int:
        assert len(self.image_names) == len(self.feature_names)
        return len(self.feature_names)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        with open(self.images / self.image_names[i], "rb") as file:
            image = np.array(PIL.Image.open(file))
        image = image.reshape(*image.shape[:2], -1).transpose(2, 0, 1)
        features = np.load(self.features / self.feature_names[i])
        return torch.from_numpy(image), torch.from_numpy(features), torch.tensor(self.labels[i])


class LightningLatents:
    """Items of all shards in the order of their names; statistics over all of them."""

    def __init__(self, folder: Path) -> None:
        self.places: list[tuple[Path, int]] = []
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt", device="cpu") as file:
                n = file.get_slice("labels").get_shape()[0]
            self.places += [(path, i) for i in range(n)]
        latents = torch.cat([self.slice(i, "latents") for i in range(len(self.places))])
        self.mean = latents.mean(dim=[0, 2, 3], keepdim=True)
        self.std = latents.std(dim=[0, 2, 3], keepdim=True)

    def slice(self, i: int, name: str) -> Tensor:
        path, at = self.places[i]
        with safe_open(path, framework="pt", device="cpu") as file:
            found: Tensor = file.get_slice(name)[at : at + 1]
        return found

    def item(self, i: int, flipped: bool) -> tuple[Tensor, Tensor]:
        latent = self.slice(i, "latents_flip" if flipped else "latents")
        return ((latent - self.mean) / self.std).squeeze(0), self.slice(i, "labels").squeeze(0)


def latents(folder: Path, tap: str, labels: bool = True, **images: object) -> FeatureStore:
    """A tiny VAE's moments, or draws, of photographs with labels."""
    photos = write_photo_tars(folder / "photos", n_samples=N, n_tars=2, size=20)
    model = save_tiny("autoencoder", folder / "model")
    dataset: dict[str, object] = {"tars": f"{photos}/*.tar"}
    if not labels:
        dataset["label"] = None
    made = Pipeline.parse(
        {
            "name": "latents",
            "dataset": dataset,
            "images": {"size": 16, **images},
            "backbone": {"model": str(model)},
            "schedule": {"convention": "none"},
            "noise": {"kind": "none"},
            "taps": [{"path": tap, "name": "vae"}],
            "features": {"dtype": "float32", "batch_size": 4, "rows_per_unit": 4},
            "store": {"url": str(folder / "s.zarr")},
        }
    )
    return extract(made).store


@pytest.mark.parametrize("names", ["key", "row"])
def test_repa_reads_moments_images_and_labels(tmp_path: Path, names: str) -> None:
    store = latents(tmp_path, "latent.moments")
    out = tmp_path / "out"
    export(store, "npy", out, names=names, images=True)  # type: ignore[arg-type]
    (out / "vae-sd").symlink_to(out / "vae" / "all")
    read = RepaData(out)
    dataset = FeatureDataset(store, images=True)
    assert len(read) == len(dataset) == N
    order = range(N) if names == "row" else np.argsort(dataset.read(range(N)).key)
    batch = dataset.read([int(i) for i in order])
    assert batch.pixels is not None
    for i in range(N):
        image, moments, label = read[i]
        assert torch.equal(image, batch.pixels[i])
        assert torch.equal(moments, batch.features["vae"][i, 0])
        assert label == batch.label[i]
    assert moments.shape[0] % 2 == 0
    deviation = torch.chunk(moments[None], 2, dim=1)[1]  # mean and standard deviation, not its log
    assert bool((deviation > 0).all())


def test_lightningdit_reads_latents_flips_and_labels(tmp_path: Path) -> None:
    store = latents(tmp_path, "latent", views=["id", "hflip"])
    export(store, "safetensors", tmp_path / "out", rows_per_file=5)
    folder = tmp_path / "out" / "vae" / "all"
    read = LightningLatents(folder)
    assert len(read.places) == N
    with safe_open(folder / "stats" / "latents_stats.safetensors", "pt") as file:
        mean, std = file.get_tensor("mean"), file.get_tensor("std")
    torch.testing.assert_close(mean, read.mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(std, read.std, rtol=1e-4, atol=1e-6)
    for view in ("id", "hflip"):
        batch = FeatureDataset(store, view=view).read(range(N))
        for i in range(N):
            latent, label = read.item(i, view == "hflip")
            want = ((batch.features["vae"][i] - read.mean) / read.std)[0]
            assert torch.equal(latent, want)
            assert label == batch.label[i]


def test_what_their_readers_stumble_over_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Half of LightningDiT's items are mirrored, and REPA has no samples without labels."""
    store = latents(tmp_path, "latent", labels=False)
    with caplog.at_level(logging.WARNING):
        export(store, "safetensors", tmp_path / "s")
        export(store, "npy", tmp_path / "n", images=True)
    assert "no view hflip, so no `latents_flip`" in caplog.text
    assert f"{N} samples have no label, and -1 in `labels`" in caplog.text
    assert "REPA's reader raises KeyError" in caplog.text
    with pytest.raises(SafetensorError, match="latents_flip"):
        LightningLatents(tmp_path / "s" / "vae" / "all").item(0, flipped=True)
    (tmp_path / "n" / "vae-sd").symlink_to(tmp_path / "n" / "vae" / "all")
    with pytest.raises(TypeError):
        RepaData(tmp_path / "n")


def test_images_are_of_trees_and_of_the_view_id(tmp_path: Path) -> None:
    store = latents(tmp_path, "latent", views=["hflip"])
    with pytest.raises(SpecError, match="only a tree of npy"):
        export(store, "parquet", tmp_path / "p", images=True)
    with pytest.raises(SpecError, match="want the view id"):
        export(store, "npy", tmp_path / "n", images=True)
