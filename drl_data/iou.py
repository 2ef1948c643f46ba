"""Intersection over union of predicted classes, from counts that add over images.

Shapes: k class, n images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

N_RESAMPLES = 1000
"""Draws of images for an interval."""

Floats = npt.NDArray[np.float64]


@dataclass
class ClassCounts:
    """Pixels of each image by class, each int64 [n, k]: right, predicted, and true."""

    right: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    true: npt.NDArray[np.int64]

    @classmethod
    def of(
        cls, predicted: npt.NDArray[np.int64], true: npt.NDArray[np.int64], k: int
    ) -> ClassCounts:
        """One image, whose pixels that count are given."""
        counts = (true[predicted == true], predicted, true)
        return cls(*(np.bincount(x, minlength=k)[None] for x in counts))

    @classmethod
    def joined(cls, several: Sequence[ClassCounts]) -> ClassCounts:
        """All of their images."""
        return cls(
            *(
                np.concatenate([getattr(one, name) for one in several])
                for name in cls.__annotations__
            )
        )

    def iou(self) -> Floats:
        """[k], over all images together; NaN for a class that is neither there nor predicted."""
        return _iou(*(x.sum(0) for x in (self.right, self.predicted, self.true)))

    def mean_iou(self) -> float:
        """Mean over the classes that have an IoU."""
        return float(np.nanmean(self.iou()))

    def pixel_accuracy(self) -> float:
        """Share of the pixels that are right."""
        return float(self.right.sum() / self.true.sum())

    def class_accuracy(self) -> float:
        """Mean over the classes that are there of the share of their pixels that is right."""
        true = self.true.sum(0)
        return float((self.right.sum(0)[true > 0] / true[true > 0]).mean())

    def interval(self, seed: int = 0) -> tuple[float, float]:
        """95 % percentile bootstrap of the mean IoU over images."""
        generator = np.random.default_rng(seed)
        n = len(self.true)
        found = []
        for _ in range(N_RESAMPLES):
            times = np.bincount(generator.integers(0, n, n), minlength=n)
            sums = (times @ x for x in (self.right, self.predicted, self.true))
            found.append(np.nanmean(_iou(*sums)))
        low, high = np.percentile(found, [2.5, 97.5])
        return float(low), float(high)


def _iou(
    right: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64], true: npt.NDArray[np.int64]
) -> Floats:
    union = predicted + true - right
    return np.where(union > 0, right / np.maximum(union, 1), np.nan)
