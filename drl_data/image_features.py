"""Features of images that are in no store, computed as a store's own: what a query image has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import webdataset

from drl_data.errors import InputError, SpecError, StoreMismatchError
from drl_data.pipeline import Pipeline, StoreSpec
from drl_data.runs import extract, prepare
from drl_data.spec_base import Spec
from drl_data.store import FeatureStore

OF_THE_DATA = ("dataset", "n_samples", "rows_per_unit")
"""What differs between a store and one of other images by the same pipeline."""


def features_of_images(
    pipeline: Pipeline, like: FeatureStore, images: Sequence[Path], folder: Path
) -> FeatureStore:
    """A store under `folder`, which must be empty, of image files by the pipeline of `like`.

    A sample's key is its file's name without the extension (and its noise that of the key), row i
    is image i. Fitted reductions are those of `like`.

    Raises:
        InputError: an image that is not there or does not decode; two of one name.
        StoreMismatchError: the pipeline is not that of `like` any more.
        UserError: the pipeline needs more than images, labels for example.
    """
    tar = folder / "images.tar"
    _pack(images, tar)
    own = pipeline.model_copy(
        update={
            "dataset": pipeline.dataset.model_copy(
                update={"tars": {"query": (str(tar),)}, "labels": None}
            ),
            "store": StoreSpec(url=str(folder / "features.zarr")),
            "features": pipeline.features.model_copy(update={"rows_per_unit": "auto"}),
            "run": pipeline.run.model_copy(update={"executor": "local"}),
        }
    )
    prepared = prepare(own)
    changes = {name: getattr(like.spec, name) for name in OF_THE_DATA}
    if prepared.spec.model_copy(update=changes) != like.spec:
        raise StoreMismatchError(
            f"{like.url} was made with other settings or weights than the pipeline "
            f"{pipeline.name!r} has now ({_differing(prepared.spec, like.spec)}); features of "
            "other images would not compare"
        )
    store = FeatureStore.create(
        str(folder / "features.zarr"),
        prepared.spec,
        prepared.arrays,
        prepared.times,
        prepared.index,
    )
    for fit in like.folder.list("fits"):
        store.folder.put_if_absent(fit.path, [like.folder.get(fit.path)])
    summary = extract(own)
    if summary.failed:
        raise InputError(f"query images: {summary.failed[0][1]}")
    bad = [row for receipt in summary.store.receipts().values() for row in receipt.invalid]
    if bad:
        raise InputError(f"{images[bad[0].row]}: {bad[0].stage}: {bad[0].reason}")
    return summary.store


def _pack(images: Sequence[Path], tar: Path) -> None:
    keys = [image.name.partition(".")[0] for image in images]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise SpecError(f"two query images are called {twice!r}; want names that differ")
    with webdataset.TarWriter(str(tar), mtime=0, encoder=False) as writer:
        for image, key in zip(images, keys, strict=True):
            try:
                data = image.read_bytes()
            except OSError as error:
                raise InputError(f"{image}: {error.strerror or error}") from error
            writer.write({"__key__": key, image.suffix.lstrip(".").lower() or "png": data})


def _differing(mine: Spec, other: Spec) -> str:
    names = [
        name
        for name in type(mine).model_fields
        if name not in OF_THE_DATA and getattr(mine, name) != getattr(other, name)
    ]
    return ", ".join(names)
