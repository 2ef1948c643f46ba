"""Pictures of several digits whose segmentation is known: real digits, put side by side."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import webdataset
from PIL import Image
from sklearn.datasets import load_digits

from drl_data.pipeline import Pipeline

SIDE = 32
"""Of a picture, which has room for four digits."""
INK = 8
"""A digit's pixel (0 to 16) from this on is of its class."""
CLASSES = (0, 1, 4, 6)
"""Digits that appear; the classes of pixels are 1 and on in this order, 0 is the background."""

Picture = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.uint8]


def scene(
    generator: np.random.Generator, digits: npt.NDArray[np.float64], labels: Sequence[int]
) -> tuple[Picture, Labels]:
    """Up to four digits, each somewhere in its quarter, and the class of every pixel."""
    picture = np.zeros((SIDE, SIDE), np.uint8)
    truth = np.zeros((SIDE, SIDE), np.uint8)
    for quarter in range(4):
        if generator.random() < 0.2:
            continue
        i = int(generator.integers(len(digits)))
        top, left = 16 * (quarter // 2), 16 * (quarter % 2)
        grey = np.rint(digits[i] * (255 / 16)).astype(np.uint8)
        large = np.asarray(Image.fromarray(grey).resize((16, 16), Image.Resampling.BICUBIC))
        picture[top : top + 16, left : left + 16] = large
        ink = np.kron(digits[i] >= INK, np.ones((2, 2), bool))
        truth[top : top + 16, left : left + 16][ink] = 1 + CLASSES.index(labels[i])
    return picture, truth


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_scenes(
    folder: Path, n_train: int, n_test: int, *, shuffled: bool = False, without: int = 0
) -> dict[str, str]:
    """Tars of scenes with their label maps: {split: path}. Digits of the two splits differ, and so
    do those of the backbone's own train split from the test scenes. `shuffled`: the label maps are
    another picture's. The last `without` of the test scenes have none."""
    folder.mkdir(parents=True, exist_ok=True)
    x, y = load_digits(return_X_y=True)
    from drl_data.digits import split_digits

    is_test = split_digits(y)
    tars = {}
    for split, n in (("train", n_train), ("test", n_test)):
        chosen = np.flatnonzero(np.isin(y, CLASSES) & (is_test == (split == "test")))
        generator = np.random.default_rng(0 if split == "train" else 1)
        digits, labels = x[chosen].reshape(-1, 8, 8), y[chosen].tolist()
        scenes = [scene(generator, digits, labels) for _ in range(n)]
        tars[split] = str(folder / f"{split}.tar")
        with webdataset.TarWriter(tars[split], mtime=0) as writer:
            for i, (picture, _) in enumerate(scenes):
                truth = scenes[(i + 1) % n if shuffled else i][1]
                sample = {"__key__": f"{split}/{i:03d}", "png": png(picture)}
                if split == "train" or i < n - without:
                    sample["seg.png"] = png(truth)
                writer.write(sample)
    return tars


def scenes_pipeline(folder: Path, tars: dict[str, str], **more: object) -> Pipeline:
    """Features of the backbone that comes with the package, on scenes."""
    return Pipeline.parse(
        {
            "name": "scenes",
            "dataset": {"tars": tars},
            "images": {"size": SIDE, "mode": "L"},
            "backbone": {"model": "bundled:digits-ddpm"},
            "schedule": {"timesteps": [10, 50]},
            "taps": ["up_blocks.0", "up_blocks.1", "mid_block"],
            "features": {"dtype": "float16", "batch_size": 32, "rows_per_unit": 32},
            "store": {"url": str(folder / "features.zarr")},
            "results": str(folder / "results"),
            **more,
        }
    )
