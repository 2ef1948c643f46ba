"""Percentage of correct keypoints, by image and by point, at several tolerances.

Shapes: k points of a pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from drl_data.intervals import t_interval
from drl_data.spec_base import Spec

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Distances:
    """Of the points of one pair: how far the match is from the truth, and the point matched back
    from where it began, in units of what alpha is relative to; each [k]."""

    match: Floats
    back: Floats | None


class PckScore(Spec):
    """Shares of right matches, one for each alpha.

    DIFT prints both means: over images (pairs), each of which weighs the same, and over points.
    """

    n_pairs: int
    n_points: int
    by_image: tuple[float, ...]
    interval: tuple[tuple[float, float], ...]
    """95 % of `by_image`, by Student's t over pairs."""
    by_point: tuple[float, ...]
    cycle: tuple[float, ...] = ()
    """Share of points that, matched to the target and back, return to within alpha times the longer
    side of the source image."""

    @classmethod
    def of(cls, pairs: Sequence[Distances], alphas: Sequence[float]) -> PckScore:
        """The score of pairs with at least one point each."""
        right = [[one.match <= alpha for one in pairs] for alpha in alphas]
        shares = [[float(x.mean()) for x in of_alpha] for of_alpha in right]
        backs = [one.back for one in pairs if one.back is not None]
        back = np.concatenate(backs) if backs else None
        return cls(
            n_pairs=len(pairs),
            n_points=sum(len(one.match) for one in pairs),
            by_image=tuple(float(np.mean(x)) for x in shares),
            interval=tuple(_within_one(*t_interval(x)) for x in shares),
            by_point=tuple(float(np.concatenate(x).mean()) for x in right),
            cycle=() if back is None else tuple(float((back <= a).mean()) for a in alphas),
        )


def _within_one(low: float, high: float) -> tuple[float, float]:
    return max(low, 0.0), min(high, 1.0)
