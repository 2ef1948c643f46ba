"""Features as files of other formats, for code that exists already.

    npy          a folder of each (tap, timestep), a file of each sample, REPA's dataset.json
    safetensors  LightningDiT's shards of 10,000 rows, and their statistics
    parquet      vectors beside row, key, split and label
    webdataset   tars of .npy, joined with the images by their keys
    hdf5         datasets of each (tap, timestep)

A file is written whole or not at all, and one that is there is not written again: run the same
export again to go on. Rows without features are left out and counted.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch
from torch import Tensor

from drl_data.datasets import FeatureDataset
from drl_data.errors import InputError, SpecError, redacted
from drl_data.export_formats import (
    IMAGES,
    Part,
    import_h5py,
    npy_path,
    whole,
    write_hdf5,
    write_images,
    write_npy,
    write_parquet,
    write_safetensors,
    write_webdataset,
)
from drl_data.moments import Moments
from drl_data.progress import SILENT, Progress
from drl_data.results import TaskResult
from drl_data.row_pixels import Images
from drl_data.selection import NO_LABEL, Rows
from drl_data.store import FeatureStore

log = logging.getLogger(__name__)

Format = Literal["npy", "safetensors", "parquet", "webdataset", "hdf5"]

MAX_ROWS = 10_000
"""Rows of a file, as LightningDiT has them."""
MAX_BYTES = 512 << 20
"""Features of a file, which are in memory at once; fewer rows where they are large."""

FLIP = "hflip"


class ExportResult(TaskResult):
    """What an export is of, and whether it is complete: `export.json` in its folder."""

    task: ClassVar[str] = "export"

    store: str
    fingerprint: str
    to: Format
    taps: tuple[str, ...]
    timesteps: tuple[float, ...]
    split: str | None
    view: str | None
    names: Literal["key", "row"]
    rows_per_file: int
    images: bool = False
    n_samples: int
    """Rows that were exported."""
    n_invalid: int
    """Rows of the split that have no features."""
    complete: bool = False


def export(
    store: FeatureStore,
    to: Format,
    out: Path,
    *,
    taps: Sequence[str] | None = None,
    timesteps: Sequence[float] | None = None,
    split: str | None = None,
    view: str | None = None,
    names: Literal["key", "row"] = "key",
    rows_per_file: int | None = None,
    images: bool = False,
    progress: Progress = SILENT,
) -> ExportResult:
    """Write the features of a finished store as other files under `out`.

    A tap that has one entry for all timesteps is written once, as `all`. With `images` a tree of
    `.npy` has the images beside it, as features were computed of them: REPA's data folder is then
    `images` and, by the name `vae-sd`, the folder of one tap and timestep.

    Raises:
        TapError: an unknown tap, timestep or view.
        SpecError: no rows are left; keys that are not unique; h5py is missing; images of videos,
            or of another format than npy.
        InputError: `out` holds another export.
        StoreError: units are pending.
    """
    if to == "hdf5":
        import_h5py()
    if images:
        _require_images(store, to)
    dataset = FeatureDataset(
        store, taps, timesteps, split=split, view=view, images=_pixels_of(store, view, images)
    )
    chosen = dataset.selection
    (choice,) = chosen.choices  # one store, not joined ones
    if to in ("npy", "webdataset") and names == "key":
        _require_unique(chosen.keys)
    samples = store.samples()
    in_split = np.ones(len(samples), bool)
    if split is not None:
        in_split = np.asarray(samples["split"].to_pylist()) == split
    row_bytes = sum(
        4 * int(np.prod(store.array(tap).shape, dtype=int)) * len(choice.times)
        for tap in choice.taps
    ) + (int(np.prod(store.image_spec.shape)) if images else 0)
    result = ExportResult(
        store=redacted(store.url),
        fingerprint=store.fingerprint,
        to=to,
        taps=choice.taps,
        timesteps=tuple(store.times[t].requested for t in choice.times.positions),
        split=split,
        view=view,
        names=names,
        rows_per_file=rows_per_file or max(min(MAX_ROWS, MAX_BYTES // row_bytes), 1),
        images=images,
        n_samples=len(dataset),
        n_invalid=int(in_split.sum()) - len(dataset),
    )
    _begin(out, result)
    flipped = None
    if to == "safetensors" and view is None and FLIP in store.spec.view_names:
        flipped = FeatureDataset(store, taps, timesteps, split=split, view=FLIP)
    _warn_of_readers(result, store, chosen.labels, has_flip=flipped is not None)
    splits = samples["split"].combine_chunks().take(pa.array(chosen.rows)).to_pylist()
    with progress.bar("export", len(dataset), "images") as bar:
        for number, start in enumerate(range(0, len(dataset), result.rows_per_file)):
            places = np.arange(start, min(start + result.rows_per_file, len(dataset)))
            writes = _writes(result, store, out, number)
            if any(not path.exists() for path, _ in writes):
                part = _part(dataset, flipped, places, splits)
                for path, write in writes:
                    if not path.exists():
                        write(path, part)
            bar.advance(len(places))
    if to == "npy":
        _write_labels(out, result, store, dataset)
    if to == "safetensors":
        _write_statistics(out, result, store)
    done = result.model_copy(update={"complete": True})
    _save(out, done)
    return done


def _require_images(store: FeatureStore, to: Format) -> None:
    if to != "npy":
        raise SpecError(f"export to {to} with images: only a tree of npy has them (REPA)")
    if store.image_spec.frames > 1:
        raise SpecError(f"{store.url}: features of videos, which are no PNG; leave images out")
    if any(array.name == IMAGES for array in store.features):
        raise SpecError(f"{store.url}: an array is called {IMAGES!r}, as the folder of images is")


def _pixels_of(store: FeatureStore, view: str | None, images: bool) -> Images:
    """How the images of the exported view are decoded; None without them."""
    if not images:
        return None
    if store.view_index(view) != 0 or store.spec.view_names[:1] not in ((), ("id",)):
        raise SpecError("export with images: want the view id, that of the images as they are")
    return store.image_spec.model_copy(update={"views": ()})


def _warn_of_readers(
    result: ExportResult, store: FeatureStore, labels: Rows, *, has_flip: bool
) -> None:
    """Say what the published readers of a layout would stumble over."""
    n_unlabelled = int((labels == NO_LABEL).sum())
    if n_unlabelled and result.to == "npy":
        log.warning(
            "%d samples have no label, and none in dataset.json: REPA's reader raises KeyError "
            "there; export a split that is labelled, or join labels (`dataset.labels`)",
            n_unlabelled,
        )
    if result.to != "safetensors":
        return
    if n_unlabelled:
        log.warning("%d samples have no label, and -1 in `labels`", n_unlabelled)
    if not has_flip:
        log.warning(
            "no view hflip, so no `latents_flip`: LightningDiT's reader takes that for every other "
            "item; extract with `images.views: [id, hflip]`"
        )
    flat = [tap for tap in result.taps if len(store.array(tap).shape) != 3]
    if flat:
        log.warning("%s: not [c, h, w], which LightningDiT's reader expects", ", ".join(flat))


Write = Callable[[Path, Part], None]


def _writes(
    result: ExportResult, store: FeatureStore, out: Path, number: int
) -> list[tuple[Path, Write]]:
    """Files of one part, each with what writes it."""
    if result.to == "npy":
        done = out / ".done" / f"{number:05d}"

        def tree(path: Path, part: Part) -> None:
            write_npy(out, part, result.names)
            if result.images:
                write_images(out, part, result.names)
            with whole(path) as temporary:
                temporary.touch()

        return [(done, tree)]
    if result.to == "parquet":
        return [(out / f"part-{number:05d}.parquet", write_parquet)]
    if result.to == "webdataset":
        return [(out / f"features-{number:06d}.tar", write_webdataset)]
    if result.to == "hdf5":
        return [(out / f"part-{number:05d}.h5", lambda p, x: write_hdf5(p, x, result.fingerprint))]
    name = f"latents_rank00_shard{number:03d}.safetensors"

    def shard(cell: tuple[str, str]) -> Write:
        return lambda path, part: write_safetensors(path, part, cell, result.fingerprint)

    return [(out / cell[0] / cell[1] / name, shard(cell)) for cell in _cells(result, store)]


def _cells(result: ExportResult, store: FeatureStore) -> list[tuple[str, str]]:
    """Names of (array, timestep), in order."""
    return [
        (tap, time)
        for tap in result.taps
        for time in _times(store, tap, [f"t{t:g}" for t in result.timesteps])
    ]


def _times(store: FeatureStore, tap: str, names: Sequence[str]) -> Sequence[str]:
    return names if store.array(tap).timesteps == "each" else ["all"]


def _part(
    dataset: FeatureDataset, flipped: FeatureDataset | None, places: Rows, splits: Sequence[str]
) -> Part:
    batch = dataset.read(places)
    return Part(
        rows=batch.row.numpy(),
        keys=list(batch.key),
        splits=[splits[place] for place in places.tolist()],
        labels=batch.label.numpy(),
        cells=_by_cell(dataset, batch.features),
        flipped={} if flipped is None else _by_cell(flipped, flipped.read(places).features),
        pixels=batch.pixels,
    )


def _by_cell(dataset: FeatureDataset, features: dict[str, Tensor]) -> dict[tuple[str, str], Tensor]:
    (choice,) = dataset.selection.choices
    store = choice.store
    names = [f"t{store.times[t].requested:g}" for t in choice.times.positions]
    return {
        (tap, name): x[:, i]
        for tap, x in features.items()
        for i, name in enumerate(_times(store, tap, names))
    }


def _require_unique(keys: pa.Array) -> None:
    counts = keys.value_counts()
    most = int(np.argmax(counts.field("counts").to_numpy())) if len(counts) else 0
    if len(counts) < len(keys):
        key = counts[most].as_py()["values"]
        raise SpecError(
            f"export: {len(keys) - len(counts)} samples share their key with another one, "
            f"{key!r} for example, and would share a file; use names of rows (`--names row`), or "
            "one split"
        )


def _begin(out: Path, result: ExportResult) -> None:
    """Claim the folder, or make sure that it is this export's."""
    file = out / "export.json"
    if file.exists():
        found = ExportResult.load(file)
        if found.model_copy(update={"complete": False, "store": result.store}) != result:
            raise InputError(
                f"{out} holds another export (of {found.store}, {found.to}); choose another folder"
            )
        return
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty and holds no export; choose another folder")
    _save(out, result)


def _save(out: Path, result: ExportResult) -> None:
    with whole(out / "export.json") as temporary:
        result.save(temporary)


def _write_labels(
    out: Path, result: ExportResult, store: FeatureStore, dataset: FeatureDataset
) -> None:
    """REPA's and EDM2's `dataset.json` in each folder: {"labels": [[path, label], ...]}."""
    chosen = dataset.selection
    keys, labels = chosen.keys.to_pylist(), chosen.labels.tolist()
    for array, time in _cells(result, store):
        folder = out / array / time
        lines = [
            [npy_path(folder, row, key, result.names).relative_to(folder).as_posix(), label]
            for row, key, label in zip(chosen.rows.tolist(), keys, labels, strict=True)
            if label != NO_LABEL
        ]
        with whole(folder / "dataset.json") as temporary:
            temporary.write_text(json.dumps({"labels": lines or None}), encoding="utf-8")


def _write_statistics(out: Path, result: ExportResult, store: FeatureStore) -> None:
    """`stats/latents_stats.safetensors` in each folder: mean and std [1, c, 1, 1] over the rows,
    as LightningDiT's latents_stats.pt has them, which is a pickle."""
    for tap, time in _cells(result, store):
        array = store.array(tap)
        axis = array.channel_axis
        moments: Moments | None = None
        for path in sorted((out / tap / time).glob("latents_*.safetensors")):
            x = safetensors.torch.load_file(path)["latents"].float()
            for rows in torch.split(x, 256):
                found = Moments.of(rows.movedim(axis + 1, -1).flatten(0, -2))
                moments = found if moments is None else moments.merged(found)
        assert moments is not None  # there is at least one row
        shape = [1] * (len(array.shape) + 1)
        shape[axis + 1] = array.shape[axis]
        tensors = {
            "mean": moments.mean.float().reshape(shape),
            "std": moments.variance.sqrt().float().reshape(shape),
        }
        with whole(out / tap / time / "stats" / "latents_stats.safetensors") as temporary:
            safetensors.torch.save_file(tensors, temporary)
