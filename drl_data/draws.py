"""Random numbers of a row: a function of (seed, epoch, row, purpose), whoever asks and whenever.

Loaders draw timesteps, views and augmentations with them, so that ranks, workers, batch sizes and
resumed epochs change nothing.
"""

from __future__ import annotations

import zlib
from typing import Literal

import numpy as np
import numpy.typing as npt

Purpose = Literal["timestep", "view", "flip", "top", "left", "policy", "drop"]

_STEP = np.uint64(0x9E3779B97F4A7C15)


def uniform(
    seed: int, epoch: int, rows: npt.NDArray[np.int64], purpose: Purpose
) -> npt.NDArray[np.float64]:
    """Numbers of [0, 1), one for each row, independent between rows, epochs, seeds, purposes."""
    state = np.zeros(1, np.uint64)
    for word in (seed, epoch, zlib.crc32(purpose.encode())):
        state = _mix(state + _STEP + np.array([word % 2**64], np.uint64))
    mixed = _mix(state + (rows.astype(np.uint64) + np.uint64(1)) * _STEP)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def choose(u: npt.NDArray[np.float64], weights: tuple[float, ...]) -> npt.NDArray[np.int64]:
    """Positions 0 .. len(weights) - 1 with these probabilities, from numbers of [0, 1)."""
    edges = np.cumsum(weights)
    return np.searchsorted(edges[:-1] / edges[-1], u, side="right").astype(np.int64)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): every bit depends on every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
