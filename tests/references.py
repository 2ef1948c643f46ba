"""What the straight-line references of recipes share.

A reference computes a recipe's features with plain diffusers or transformers calls. Of drl_data it
takes the definition of the random numbers (`draw_normal`, golden-tested) and the photographs, but
nothing that computes.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence
from torch import Tensor, nn

from drl_data.backbones import find_model, load_backbone
from drl_data.conditions import of_sample
from drl_data.noise import draw_normal
from drl_data.pipeline import Pipeline
from drl_data.recipes import find_recipe
from drl_data.rehearse import rehearsal
from drl_data.runs import extract_all
from drl_data.schedule import resolve_times
from drl_data.spec import NumericSpec
from drl_data.store import FeatureStore

N_SAMPLES = 4
"""One whole batch: references compute the same batch, so that they may ask for equal bits."""


@dataclass(frozen=True)
class Photo:
    """A sample of a rehearsal."""

    key: str
    image: Image.Image
    label: int
    caption: str
    frames: tuple[Image.Image, ...] = ()
    """Of a video."""


@dataclass(frozen=True)
class Rehearsed:
    """A recipe that has been run on its tiny model."""

    pipeline: Pipeline
    store: FeatureStore
    model: Path
    photos: tuple[Photo, ...]

    @property
    def keys(self) -> list[str]:
        return [photo.key for photo in self.photos]

    def pixels(self, resample: Image.Resampling = Image.Resampling.BICUBIC) -> Tensor:
        """Photographs stretched to the pipeline's size (they are square): [4, 3, h, w], -1..1."""
        height, width = self.pipeline.images.size
        sized = [p.image.resize((width, height), resample) for p in self.photos]
        arrays = torch.stack([torch.from_numpy(np.array(image)) for image in sized])
        return arrays.permute(0, 3, 1, 2).contiguous().float() / 255 * 2 - 1

    def video(self, resample: Image.Resampling = Image.Resampling.BICUBIC) -> Tensor:
        """The first frames of each video, as `pixels`: [4, 3, f, h, w]."""
        frames = zip(*(photo.frames for photo in self.photos), strict=True)
        pixels = [
            replace(self, photos=tuple(Photo("", image, 0, "") for image in images)).pixels(
                resample
            )
            for images in frames
        ]
        return torch.stack(pixels[: self.pipeline.images.frames], dim=2)

    def noise(
        self,
        shape: tuple[int, ...],
        *,
        role: str = "noise",
        member: int = 0,
        timestep: object = "all",
    ) -> Tensor:
        """The noise of each sample, [4, *shape]."""
        seed = self.pipeline.noise.seed
        return torch.stack(
            [
                torch.from_numpy(draw_normal(shape, role, seed, "key", key, member, timestep))
                for key in self.keys
            ]
        )

    def features(self, array: str, t: int = 0) -> Tensor:
        """What the store has: [4, *shape] (with views: of the first one)."""
        return torch.tensor(self.store.read_unit(array, t, self.store.units[0]))


def rehearse(name: str, folder: Path, **changes: object) -> Rehearsed:
    """Run a recipe on its tiny model and four photographs, stored in float32.

    `changes` are other settings of the whole pipeline, for what the recipe itself leaves open.
    """
    recipe = Pipeline.load(find_recipe(name))
    pipeline = rehearsal(recipe, folder, n_samples=N_SAMPLES)
    numeric = pipeline.features.model_dump() | {"dtype": "float32"}
    pipeline = pipeline.model_copy(update={"features": NumericSpec(**numeric), **changes})
    (summary,) = extract_all(pipeline)
    assert not summary.failed, summary.failed
    assert summary.n_ok == N_SAMPLES
    photos = [photo for tar in sorted(folder.glob("photos/*.tar")) for photo in _photos(tar)]
    return Rehearsed(pipeline, summary.store, folder / "model", tuple(photos))


def _photos(path: Path) -> list[Photo]:
    with tarfile.open(path) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    photos: dict[str, Photo] = {}
    for name, data in members.items():
        key, extension = name.split(".")
        if extension not in ("jpg", "tif"):
            continue
        image = Image.open(io.BytesIO(data))
        frames = tuple(frame.convert("RGB") for frame in ImageSequence.Iterator(image))
        label, caption = int(members[f"{key}.cls"]), members[f"{key}.txt"].decode()
        photos[key] = Photo(key, frames[0], label, caption, frames)
    return list(photos.values())


def hooked(network: nn.Module, *paths: str) -> dict[str, object]:
    """Outputs of modules, filled by each forward."""
    kept: dict[str, object] = {}
    for path in paths:
        network.get_submodule(path).register_forward_hook(
            lambda _m, _args, out, path=path: kept.update({path: out})
        )
    return kept


def hooked_inputs(network: nn.Module, *paths: str) -> dict[str, Mapping[object, object]]:
    """Arguments of modules by position and by name, filled by each forward."""
    kept: dict[str, Mapping[object, object]] = {}
    for path in paths:
        network.get_submodule(path).register_forward_pre_hook(
            lambda _m, args, kwargs, path=path: kept.update(
                {path: {**dict(enumerate(args)), **kwargs}}
            ),
            with_kwargs=True,
        )
    return kept


def planned_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Shape of a row of each array of a recipe, by the bundled configuration of its model."""
    recipe = Pipeline.load(find_recipe(name))
    assert recipe.backbone is not None
    assert recipe.schedule is not None
    backbone = load_backbone(find_model(recipe.backbone, structure_only=True), "meta")
    time = resolve_times(backbone.schedule_for(recipe.images), recipe.schedule, recipe.noise)[0]
    told = of_sample(recipe.condition, 0, "a caption")
    arrays = backbone.arrays(backbone.resolve(recipe.taps), recipe.images, told, time, "float16")
    return {array.name: array.shape for array in arrays}
