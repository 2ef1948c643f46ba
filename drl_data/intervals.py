"""95 % intervals for what tasks report."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from scipy import stats


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t; 0 for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, 0.0
    quantile = stats.t.ppf(0.975, len(values) - 1)
    return mean, float(quantile) * statistics.stdev(values) / math.sqrt(len(values))


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """`mean_and_half` as (low, high)."""
    mean, half = mean_and_half(values)
    return mean - half, mean + half


def wilson_interval(p: float, n: int) -> tuple[float, float]:
    """95 % score interval of a proportion `p` seen in `n` independent trials (Wilson 1927)."""
    z2 = 1.959964**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2) / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return centre - half, centre + half
