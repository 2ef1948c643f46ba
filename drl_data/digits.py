"""The embedded data set: 1,797 real handwritten digits, packed as WebDataset tars.

They are the test part of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, UCI
1998), which scikit-learn ships: 8 x 8 pixels with values 0 to 16, written by 13 people.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from webdataset import ShardWriter

N_TEST = 360
SAMPLES_PER_TAR = 400
MAX_VALUE = 16
"""scikit-learn's largest pixel value; stored as round(value * 255 / 16), which is invertible."""


def write_digits(folder: str | Path) -> dict[str, str]:
    """Write train-000000.tar .. train-000003.tar and test-000000.tar; returns {split: pattern}.

    1,437 and 360 samples `digit-NNNN` (NNNN is scikit-learn's index) of an 8-bit grey PNG and a
    label; classes in equal proportion. The same bytes every time, for one version of Pillow.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    is_test = split_digits(digits.target)
    patterns = {}
    for split, rows in (("train", np.flatnonzero(~is_test)), ("test", np.flatnonzero(is_test))):
        with ShardWriter(
            str(folder / f"{split}-%06d.tar"),
            maxcount=SAMPLES_PER_TAR,
            verbose=0,
            encoder=False,
            mtime=0,
        ) as writer:
            for row in rows:
                writer.write(
                    {
                        "__key__": f"digit-{row:04d}",
                        "png": _png(digits.images[row]),
                        "cls": str(digits.target[row]).encode(),
                    }
                )
        patterns[split] = str(folder / f"{split}-*.tar")
    return patterns


def split_digits(labels: np.ndarray) -> np.ndarray:
    """True for the 360 test rows: of each class its share, evenly spaced in scikit-learn's order.

    Shares are rounded by largest remainder (ties to the smaller class), so that they add up.
    """
    counts = np.bincount(labels)
    quota = counts * N_TEST / len(labels)
    share = np.floor(quota).astype(int)
    largest = np.argsort(share - quota, kind="stable")[: N_TEST - share.sum()]
    share[largest] += 1
    is_test = np.zeros(len(labels), bool)
    for label, n_test in enumerate(share):
        rows = np.flatnonzero(labels == label)
        is_test[rows[(np.arange(n_test) * 2 + 1) * len(rows) // (2 * n_test)]] = True
    return is_test


def _png(image: np.ndarray) -> bytes:
    pixels = np.rint(image * (255 / MAX_VALUE)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()
