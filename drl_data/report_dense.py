"""What the report shows of the jobs on maps: segmentation, correspondence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from drl_data.pictures import THUMBNAIL_SIDE, png_uri, row_uri
from drl_data.segment_files import palette, png_path
from drl_data.store import FeatureStore
from drl_data.tasks.segment import SegmentResult, SegmentScore

N_SHOWN_CLASSES = 40


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
