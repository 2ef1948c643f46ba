"""Classes of every pixel of the images that are predicted, image by image, and their counts.

Shapes: m network of an ensemble, h w height and width of the images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from drl_data.feature_maps import MapCell
from drl_data.iou import ClassCounts
from drl_data.pipeline import Pipeline
from drl_data.pixel_linear import PixelLinear
from drl_data.pixel_mlps import PixelMlps, votes
from drl_data.progress import Progress
from drl_data.segment_data import (
    SegmentRows,
    check_classes,
    image_maps,
    image_pixels,
    without_ignored,
)
from drl_data.segment_files import label_image, png_path, write_image
from drl_data.segment_spec import SegmentSpec
from drl_data.store import FeatureStore

N_EXAMPLES = 6
"""Test images whose truth is kept too, for the report."""
FEATURES, COLOURS = "features", "raw pixels"
FOLDER = "segment"

Classes = npt.NDArray[np.int64]


@dataclass
class Trained:
    """What has learnt, and the validation counts of the linear cells."""

    ensembles: dict[str, PixelMlps]
    linear: PixelLinear | None
    validation: list[ClassCounts]


@dataclass
class Predictions:
    """Counts of every classifier by image, and lines of the table."""

    voted: dict[str, list[ClassCounts]] = field(default_factory=dict)
    members: dict[str, list[list[ClassCounts]]] = field(default_factory=dict)
    linear: list[list[ClassCounts]] = field(default_factory=list)
    table: list[dict[str, object]] = field(default_factory=list)


def predict(
    store: FeatureStore,
    cells: Sequence[MapCell],
    rows: SegmentRows,
    trained: Trained,
    k: int,
    spec: SegmentSpec,
    pipeline: Pipeline,
    progress: Progress,
) -> Predictions:
    """Image by image: classes of every pixel, compared where there is a truth, and written."""
    size = store.image_spec.size
    wanted = np.concatenate([rows.test, rows.more])
    flipped = rows.labels.view == "hflip"
    colours = image_pixels(store, wanted, flipped=flipped) if spec.pixels else None
    truths = rows.labels.read(rows.test.tolist())
    examples = set(rows.test[spread(len(rows.test), N_EXAMPLES)].tolist())
    table = store.samples().select(["row", "key", "split"]).take(pa.array(wanted))
    found = Predictions(linear=[[] for _ in cells] if trained.linear else [])
    folder = Path(pipeline.results) / FOLDER
    with progress.bar("predict", len(wanted), "images") as bar:
        for i, (row, maps) in enumerate(image_maps(cells, wanted)):
            truth = None
            if i < len(rows.test):
                truth = without_ignored(next(truths)[1], spec)
                check_classes(truth.reshape(-1), k, f"the label map of row {row}")
            line = table.slice(i, 1).to_pylist()[0]
            sources = {FEATURES: maps}
            if colours is not None:
                sources[COLOURS] = [next(colours)[1]]
            for name, ensemble in trained.ensembles.items():
                voted = _vote(ensemble, sources[name], size)
                _count(found, name, voted, truth, k)
                if name == FEATURES:
                    line |= _line(voted, truth, k)
                    keep = spec.save_predictions or row in examples
                    line["prediction"] = _write(folder, line["key"], voted, keep)
            for j, predicted in enumerate(
                trained.linear.classes(maps, size) if trained.linear and truth is not None else ()
            ):
                found.linear[j].append(counts_of(predicted.cpu().numpy(), truth, k))
            if row in examples and truth is not None:
                write_image(png_path(folder / "truth", str(line["key"])), label_image(truth))
            found.table.append(line)
            bar.advance(1)
    return found


@dataclass(frozen=True)
class Voted:
    """What an ensemble says of an image, each [h, w]; `members` [m, h, w]."""

    classes: Classes
    members: Classes
    disagreement: npt.NDArray[np.float32]
    divergence: npt.NDArray[np.float32]


def _vote(ensemble: PixelMlps, maps: Sequence[Tensor], size: tuple[int, int]) -> Voted:
    parts: list[tuple[Tensor, ...]] = []
    for logits in ensemble.on_image(maps, size):
        parts.append((*(x.cpu() for x in votes(logits)), logits.argmax(2).cpu()))
    classes, disagreement, divergence = (
        torch.cat([part[i] for part in parts]).reshape(size).numpy() for i in range(3)
    )
    members = torch.cat([part[3] for part in parts], 1).reshape(-1, *size).numpy()
    return Voted(classes, members, disagreement, divergence)


def _count(found: Predictions, name: str, voted: Voted, truth: Classes | None, k: int) -> None:
    if truth is None:
        return
    found.voted.setdefault(name, []).append(counts_of(voted.classes, truth, k))
    members = found.members.setdefault(name, [[] for _ in voted.members])
    for counts, classes in zip(members, voted.members, strict=True):
        counts.append(counts_of(classes, truth, k))


def counts_of(classes: Classes, truth: Classes | None, k: int) -> ClassCounts:
    assert truth is not None
    there = truth >= 0
    return ClassCounts.of(classes[there], truth[there], k)


def _line(voted: Voted, truth: Classes | None, k: int) -> dict[str, object]:
    """Columns of the table for one image."""
    most = np.sort(voted.divergence.reshape(-1))[-max(voted.divergence.size // 10, 1) :]
    line: dict[str, object] = {
        "pixels": 0,
        "right": None,
        "miou": None,
        "disagreement": float(voted.disagreement.mean()),
        # DDPM-Seg's measure of an image: the mean over its tenth of the least certain pixels.
        "uncertainty": float(most.mean()),
    }
    if truth is not None and (truth >= 0).any():
        counts = counts_of(voted.classes, truth, k)
        line["pixels"] = int(counts.true.sum())
        line["right"] = counts.pixel_accuracy()
        line["miou"] = counts.mean_iou()
    return line


def _write(folder: Path, key: object, voted: Voted, keep: bool) -> str | None:
    """Prediction and disagreement (0 all agree, 255 all differ) as PNG; the former's place."""
    if not keep:
        return None
    path = png_path(folder / "predictions", str(key))
    write_image(path, label_image(voted.classes))
    grey = Image.fromarray(np.rint(voted.disagreement * 255).astype(np.uint8))
    write_image(png_path(folder / "disagreement", str(key)), grey)
    return f"{FOLDER}/predictions/{path.name}"


def spread(n: int, wanted: int) -> npt.NDArray[np.int64]:
    """At most `wanted` of n positions, evenly spaced."""
    if n <= wanted:
        return np.arange(n)
    return (2 * np.arange(wanted) + 1) * n // (2 * wanted)
