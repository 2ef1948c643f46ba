"""Segmentation from few labelled images: pixel classifiers on upsampled features (DDPM-Seg).

Baranchuk et al. 2022, "Label-Efficient Semantic Segmentation with Diffusion Models". As in their
code: bilinear upsampling (align_corners false), concatenation, an ensemble of networks of each
pixel, early stop, majority vote, uncertainty by the Jensen-Shannon divergence. Not as there: pixels
are drawn (`pixels_per_image`) and gathered between the cells of the maps, ignored pixels count in
no union, and a class that is neither in the truth nor predicted has no IoU instead of 0.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.table import Table

from drl_data.errors import SpecError, redacted
from drl_data.feature_maps import MapCell, map_cells
from drl_data.iou import ClassCounts
from drl_data.pipeline import Pipeline
from drl_data.pixel_features import PixelFeatures
from drl_data.pixel_linear import PixelLinear
from drl_data.pixel_mlps import PixelMlps
from drl_data.progress import SILENT, Progress
from drl_data.results import TaskResult
from drl_data.segment_data import (
    SegmentRows,
    SomePixels,
    TrainPixels,
    image_maps,
    image_pixels,
    without_ignored,
)
from drl_data.segment_files import require_unique_keys
from drl_data.segment_predict import (
    COLOURS,
    FEATURES,
    N_EXAMPLES,
    Predictions,
    Trained,
    counts_of,
    predict,
    spread,
)
from drl_data.segment_spec import SegmentSpec
from drl_data.selection import Rows
from drl_data.spec_base import Spec
from drl_data.splits import finished_store
from drl_data.store import FeatureStore


class SegmentScore(Spec):
    """How one classifier does on the labelled test images."""

    name: str
    miou: float
    interval: tuple[float, float]
    """95 %, by drawing the test images anew."""
    pixel_accuracy: float
    class_accuracy: float
    iou: tuple[float | None, ...]
    """Of each class; None for one that is neither in the truth nor predicted."""
    members: tuple[float, ...] = ()
    """Mean IoU of each network of an ensemble."""
    epochs: tuple[int, ...] = ()
    """How many each of them took."""


class LinearCell(Spec):
    """A linear classifier of one cell."""

    tap: str
    timestep: float | None
    validation: float
    """Mean IoU on the train images that were held out."""
    test: SegmentScore


class SegmentResult(TaskResult):
    """What `run_segment` found; JSON, a Parquet table of the same name, and PNG files.

    The table has a line for each predicted image: row, key, split, pixels (that count), right,
    miou (of this image alone), disagreement, uncertainty, prediction (file).
    """

    task: ClassVar[str] = "segment"

    pipeline: str
    spec: SegmentSpec
    store: str
    fingerprint: str
    n_train_images: int
    n_train_pixels: int
    n_test_images: int
    n_predicted: int
    n_unlabelled: dict[str, int]
    """Rows of each split that have features but no label map."""
    n_classes: int
    n_channels: int
    cells: tuple[str, ...]
    ensembles: tuple[SegmentScore, ...]
    """On features, and on raw pixels."""
    linear: tuple[LinearCell, ...]
    best_linear: int | None
    """Which cell is best on the held-out train images."""
    examples: tuple[int, ...]
    table: str
    device: str
    seconds: float

    def class_name(self, number: int) -> str:
        """As the spec says it."""
        names = self.spec.class_names
        return names[number] if number < len(names) else str(number)


def format_table(result: SegmentResult) -> Table:
    """One line for each classifier."""
    table = Table(
        title=f"{result.n_classes} classes from {result.n_train_images} labelled images "
        f"({result.n_train_pixels} pixels x {result.n_channels} channels), "
        f"{result.n_test_images} test images",
        title_justify="left",
        box=None,
    )
    for name in ("classifier", "of", "mIoU", "95 %", "pixel accuracy", "class accuracy"):
        text = name in ("classifier", "of")
        table.add_column(name, justify="left" if text else "right", no_wrap=True)

    def add(kind: str, of: str, score: SegmentScore) -> None:
        low, high = score.interval
        numbers = (f"{score.pixel_accuracy:.1%}", f"{score.class_accuracy:.1%}")
        table.add_row(kind, of, f"{score.miou:.1%}", f"{low:.1%} - {high:.1%}", *numbers)

    for score in result.ensembles:
        add(f"{len(score.members)} networks", score.name, score)
    for i, cell in enumerate(result.linear):
        add("linear", cell.test.name + (" *" if i == result.best_linear else ""), cell.test)
    if result.best_linear is not None:
        table.caption = "* the best on held-out train images"
    return table


def run_segment(
    pipeline: Pipeline, *, device: str | None = None, progress: Progress = SILENT
) -> SegmentResult:
    """Learn from the labelled train images, predict the test images, and compare.

    Writes `segment.json`, `segment.parquet` and, in `segment/`, predictions in the results folder.
    `device` defaults to the first visible GPU, else the CPU.

    Raises:
        SpecError: no `segment` section, a split without label maps, classes that are not known, or
            more train pixels than memory is allowed for.
        TapError: the store has no such tap, timestep or view.
        InputError: a label map that is none; tars that are gone or changed.
        UserError: a store that is not there or not complete.
    """
    spec = pipeline.segment
    if spec is None:
        raise SpecError(f"pipeline {pipeline.name!r} lacks segment; `segment: {{}}` is the least")
    if spec.mlp is None and spec.linear is None:
        raise SpecError("segment: mlp and linear are both null; nothing is asked")
    started = time.perf_counter()
    store = finished_store(pipeline, "segment")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    cells = _cells(store, spec)
    rows = SegmentRows.of(store, spec)
    if spec.save_predictions:
        keys = store.index.table.column("key")
        require_unique_keys([keys[r].as_py() for r in (*rows.test, *rows.more)])
    pixels = TrainPixels.of(rows, spec)
    trained = _train(store, cells, rows, pixels, spec, device, progress)
    found = predict(store, cells, rows, trained, pixels.n_classes, spec, pipeline, progress)
    linear = _linear_cells(trained, found, cells)
    result = SegmentResult(
        pipeline=pipeline.name,
        spec=_public(spec),
        store=redacted(store.url),
        fingerprint=store.fingerprint,
        n_train_images=len(rows.train),
        n_train_pixels=len(pixels.labels),
        n_test_images=len(rows.test),
        n_predicted=len(found.table),
        n_unlabelled=rows.n_unlabelled,
        n_classes=pixels.n_classes,
        n_channels=sum(cell.n_channels for cell in cells),
        cells=tuple(cell.name for cell in cells),
        ensembles=tuple(
            _score(name, found, spec.seed, trained.ensembles[name]) for name in trained.ensembles
        ),
        linear=linear,
        best_linear=max(range(len(linear)), key=lambda i: linear[i].validation, default=None),
        examples=tuple(rows.test[spread(len(rows.test), N_EXAMPLES)].tolist()),
        table="segment.parquet",
        device=device,
        seconds=time.perf_counter() - started,
    )
    _save(result, pa.Table.from_pylist(found.table), Path(pipeline.results))
    return result


def _cells(store: FeatureStore, spec: SegmentSpec) -> list[MapCell]:
    return map_cells(
        store,
        "segment",
        taps=spec.taps,
        timesteps=spec.timesteps,
        grids=spec.grids,
        view=spec.view,
    )


def _public(spec: SegmentSpec) -> SegmentSpec:
    """What is written: without the secrets of URLs."""
    if spec.label_folder is None:
        return spec
    return spec.model_copy(update={"label_folder": redacted(spec.label_folder)})


def _save(result: SegmentResult, table: pa.Table, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        b"fingerprint": result.fingerprint.encode(),
        b"spec": result.spec.model_dump_json().encode(),
    }
    pq.write_table(table.replace_schema_metadata(about), folder / result.table, compression="zstd")
    result.save(folder / "segment.json")


# --- learning -----------------------------------------------------------------------------------


def _train(
    store: FeatureStore,
    cells: Sequence[MapCell],
    rows: SegmentRows,
    pixels: TrainPixels,
    spec: SegmentSpec,
    device: str,
    progress: Progress,
) -> Trained:
    size, k = store.image_spec.size, pixels.n_classes
    trained = Trained({}, None, [])
    features = pixels.features(cells, size, spec, device)
    sources: dict[str, PixelFeatures] = {FEATURES: features}
    if spec.pixels:
        images = image_pixels(store, rows.train, flipped=rows.labels.view == "hflip")
        sources[COLOURS] = pixels.colours(images, device)
    if spec.mlp is not None:
        for name, source in sources.items():
            ensemble = PixelMlps(spec.mlp, source.n_channels, k, spec.seed, device)
            trained.ensembles[name] = ensemble
            with progress.bar(f"ensemble of {name}", spec.mlp.epochs, "epochs") as bar:
                for loss in ensemble.train(source, pixels.labels):
                    bar.advance(1, loss=loss)
    if spec.linear is not None:
        held_out = rows.validation(store, spec.linear.validation)
        learns = ~np.isin(pixels.rows[pixels.image], held_out)
        chosen = torch.from_numpy(np.flatnonzero(learns))
        channels = [cell.n_channels for cell in cells]
        linear = PixelLinear(spec.linear, channels, k, spec.seed, device)
        with progress.bar("linear", spec.linear.epochs, "epochs") as bar:
            for loss in linear.train(SomePixels(features, chosen), pixels.labels[chosen]):
                bar.advance(1, loss=loss)
        trained.linear = linear
        trained.validation = _validated(linear, cells, rows, held_out, k, spec, size)
    return trained


def _validated(
    linear: PixelLinear,
    cells: Sequence[MapCell],
    rows: SegmentRows,
    held_out: Rows,
    k: int,
    spec: SegmentSpec,
    size: tuple[int, int],
) -> list[ClassCounts]:
    """Counts of each cell on the images that are held out."""
    found: list[list[ClassCounts]] = [[] for _ in cells]
    images = zip(image_maps(cells, held_out), rows.labels.read(held_out.tolist()), strict=True)
    for (_, maps), (_, labels) in images:
        truth = without_ignored(labels, spec)
        for counts, predicted in zip(found, linear.classes(maps, size), strict=True):
            counts.append(counts_of(predicted.cpu().numpy(), truth, k))
    return [ClassCounts.joined(counts) for counts in found]


# --- scores -------------------------------------------------------------------------------------


def _score(name: str, found: Predictions, seed: int, ensemble: PixelMlps) -> SegmentScore:
    members = tuple(ClassCounts.joined(one).mean_iou() for one in found.members[name])
    score = _score_of(name, ClassCounts.joined(found.voted[name]), seed)
    return score.model_copy(update={"members": members, "epochs": tuple(ensemble.n_epochs)})


def _score_of(name: str, counts: ClassCounts, seed: int) -> SegmentScore:
    iou: Iterator[float] = iter(counts.iou().tolist())
    return SegmentScore(
        name=name,
        miou=counts.mean_iou(),
        interval=counts.interval(seed),
        pixel_accuracy=counts.pixel_accuracy(),
        class_accuracy=counts.class_accuracy(),
        iou=tuple(None if value != value else value for value in iou),
    )


def _linear_cells(
    trained: Trained, found: Predictions, cells: Sequence[MapCell]
) -> tuple[LinearCell, ...]:
    if trained.linear is None:
        return ()
    return tuple(
        LinearCell(
            tap=cell.tap,
            timestep=cell.timestep,
            validation=validation.mean_iou(),
            test=_score_of(cell.name, ClassCounts.joined(counts), 0),
        )
        for cell, validation, counts in zip(cells, trained.validation, found.linear, strict=True)
    )
