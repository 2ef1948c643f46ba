"""How much of a feature map is fine detail: a number for each (tap, timestep) that needs no labels.

A-SelecT (Liu et al. 2026, arXiv:2603.25758) takes the timestep whose features have the greatest
High-Frequency Ratio. There is no code of it; what is computed here is said below, and the rank
correlation with the probe says what it is worth on the data at hand.

Shapes: b batch, c channel, h height, w width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from drl_data.datasets import read_features
from drl_data.selection import Rows
from drl_data.spec import ArraySpec
from drl_data.store import FeatureStore

CUTOFF = 0.5
"""High are frequencies above this share of the highest that a grid has along an axis (half a cycle
a pixel); our choice."""

BLOCK_BYTES = 64 << 20
"""Features that are transformed at once."""

MAP = ("channel", "height", "width")


def high_frequency_ratio(x_bchw: Tensor, cutoff: float = CUTOFF) -> Tensor:
    """The share of the power of maps that lies at high frequencies: float64 [b], 0..1.

    Power is |F|^2 of the two-dimensional Fourier transform, summed over channels; of all but the
    zero frequency, which is the mean of a channel and no detail. High are frequencies whose radius
    is above `cutoff` times half a cycle a pixel. NaN of a map that is constant.
    """
    power = torch.fft.fft2(x_bchw.double()).abs().square().sum(1)
    height, width = x_bchw.shape[-2:]
    fy = torch.fft.fftfreq(height, dtype=torch.float64, device=x_bchw.device)
    fx = torch.fft.fftfreq(width, dtype=torch.float64, device=x_bchw.device)
    radius = (fy[:, None].square() + fx[None, :].square()).sqrt()
    power[:, 0, 0] = 0.0
    noise = torch.finfo(torch.float64).eps * x_bchw.double().square().sum((1, 2, 3))
    total = power.sum((1, 2))
    share = power[:, radius > cutoff / 2].sum(1) / total
    return torch.where(total > noise * height * width, share, torch.nan)


def is_map(array: ArraySpec) -> bool:
    """Whether an array has a grid with detail to speak of."""
    return array.dims == MAP and min(array.shape[1:]) > 1


def mean_ratio(store: FeatureStore, tap: str, time_index: int, rows: Rows) -> float | None:
    """The mean ratio of some rows of a tap at a timestep; None where it is no map, or constant."""
    array = store.array(tap)
    if not is_map(array):
        return None
    step = max(BLOCK_BYTES // array.bytes_per_row, 1)
    found = torch.cat(
        [
            high_frequency_ratio(read_features(store, tap, time_index, rows[at : at + step]))
            for at in range(0, len(rows), step)
        ]
    ).numpy()
    found = found[np.isfinite(found)]
    return float(found.mean()) if len(found) else None
