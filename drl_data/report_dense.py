"""What the report shows of the jobs on maps: segmentation, correspondence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from drl_data.pictures import THUMBNAIL_SIDE, png_uri, row_uri
from drl_data.segment_files import palette, png_path
from drl_data.store import FeatureStore
from drl_data.tasks.correspond import CorrespondResult, main_alpha
from drl_data.tasks.segment import SegmentResult, SegmentScore

N_SHOWN_CLASSES = 40
PAIR_SIDE = 160
"""Pixels of the longer side of an image of a pair."""


@dataclass(frozen=True)
class Segmented:
    """The segmentation's result, its classifiers, classes, and pictures of some test images."""

    result: SegmentResult
    scores: list[tuple[str, SegmentScore, bool]]
    """(kind, score, whether it is the linear one that is best on held-out images)."""
    classes: list[tuple[str, str, list[float | None]]]
    """(name, colour, IoU of each ensemble); none if there are too many."""
    pictures: list[tuple[str | None, ...]]
    """Image, truth, prediction and disagreement, as data URIs."""


def segmented(results: Path, store: FeatureStore) -> Segmented | None:
    """None if `drl segment` was not run on this store."""
    if not (results / "segment.json").exists():
        return None
    result = SegmentResult.load(results / "segment.json")
    if result.fingerprint != store.fingerprint:
        return None
    scores = [(f"{len(one.members)} networks", one, False) for one in result.ensembles]
    scores += [
        ("linear", cell.test, i == result.best_linear) for i, cell in enumerate(result.linear)
    ]
    colours = palette()
    classes = [
        (
            result.class_name(k),
            "rgb({}, {}, {})".format(*colours[3 * k : 3 * k + 3]),
            [score.iou[k] for score in result.ensembles],
        )
        for k in range(result.n_classes if result.n_classes <= N_SHOWN_CLASSES else 0)
    ]
    keys = store.index.table.column("key")
    pictures: list[tuple[str | None, ...]] = []
    for row in result.examples:
        folders = (results / "segment" / name for name in ("truth", "predictions", "disagreement"))
        maps = [_picture(png_path(folder, keys[row].as_py())) for folder in folders]
        if any(maps):
            pictures.append((row_uri(store, row), *maps))
    return Segmented(result, scores, classes if result.ensembles else [], pictures)


def _picture(path: Path) -> str | None:
    """A label map in its colours, or a grey image, small; None if it is not there."""
    try:
        with Image.open(path) as image:
            shown = image.convert("RGB") if image.mode in ("L", "P") else None
    except OSError:
        return None
    if shown is None:  # 16 bits: more classes than colours
        return None
    shown.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.NEAREST)
    return png_uri(np.asarray(shown))


# --- correspondence -----------------------------------------------------------------------------


@dataclass(frozen=True)
class MatchedPoint:
    """Places as shares 0..1 (y, x): in the source image, where it truly is, where it was found."""

    number: int
    point: tuple[float, float]
    truth: tuple[float, float]
    found: tuple[float, float]
    right: bool


@dataclass(frozen=True)
class MatchedPair:
    """Two images as data URIs, and the points matched between them."""

    name: str
    source: str
    target: str
    points: list[MatchedPoint]


@dataclass(frozen=True)
class Corresponded:
    """The matching's result, the alpha that is in front, and pictures of some pairs."""

    result: CorrespondResult
    alpha: int
    """Position of the alpha that pictures and categories are of."""
    aspect: float
    """Width over height of the images."""
    pairs: list[MatchedPair]


def corresponded(results: Path, store: FeatureStore) -> Corresponded | None:
    """None if `drl correspond` was not run on this store."""
    if not (results / "correspond.json").exists():
        return None
    result = CorrespondResult.load(results / "correspond.json")
    if result.fingerprint != store.fingerprint:
        return None
    at = main_alpha(result.spec)
    pairs = []
    for example in result.examples:
        source, target = (
            row_uri(store, row, PAIR_SIDE) for row in (example.source, example.target)
        )
        if source is None or target is None:
            continue
        columns = zip(example.points, example.truth, example.found, example.distances, strict=True)
        points = [
            MatchedPoint(i + 1, point, truth, found, distance <= result.spec.alphas[at])
            for i, (point, truth, found, distance) in enumerate(columns)
        ]
        pairs.append(MatchedPair(example.name, source, target, points))
    height, width = store.image_spec.size
    return Corresponded(result, at, width / height, pairs)
