"""Features of any shape as one vector for each image, and all vectors of a cell in memory.

Shapes: b batch, n rows, t timestep, c channel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from drl_data.datasets import read_features
from drl_data.errors import SpecError
from drl_data.job_specs import CellSpec
from drl_data.selection import Rows, Selection, select
from drl_data.spec import ArraySpec
from drl_data.store import FeatureStore

SPACE = ("height", "width")

BLOCK_BYTES = 64 << 20
"""Features before pooling that are in memory at once."""


def n_pooled(array: ArraySpec, pool: int) -> int:
    """Numbers that are left of one row."""
    n_channels = array.shape[array.channel_axis]
    sides = [side for side, name in zip(array.shape, array.dims, strict=True) if name in SPACE]
    return n_channels * math.prod(min(side, pool) for side in sides)


def pooled(x: Tensor, dims: Sequence[str], pool: int) -> Tensor:
    """[b, t, *dims] to float32 [b, t, c]; of a map [b, t, c * pool * pool], the mean of a video's
    frames."""
    if "frame" in dims:
        x, dims = x.float().mean(dims.index("frame") + 2), [d for d in dims if d != "frame"]
    if "token" in dims:
        return x.float().mean(dims.index("token") + 2)
    if tuple(dims[-2:]) != SPACE:
        return x.float()
    height, width = (min(side, pool) for side in x.shape[-2:])
    grid = F.adaptive_avg_pool2d(x.flatten(0, 1).float(), (height, width))
    return grid.reshape(*x.shape[:2], -1)


@dataclass(frozen=True)
class Vectors:
    """One cell of some rows, which increase: `x` is float32 [n, c]."""

    rows: Rows
    keys: pa.Array
    splits: pa.Array
    labels: Rows
    """-1 where there is none."""
    x: Tensor


def cell_index(store: FeatureStore, cell: CellSpec, task: str) -> int:
    """Position of the cell's timestep; 0 of a tap that has one entry for all of them.

    Raises:
        TapError: the store has no such tap or timestep.
        SpecError: a timestep must be named.
    """
    array = store.array(cell.tap)
    if array.timesteps != "each":
        return 0
    if cell.timestep is not None:
        return store.time_index(cell.timestep)
    if len(store.times) > 1:
        times = ", ".join(f"{time.requested:g}" for time in store.times)
        raise SpecError(f"{task}.timestep: missing; {cell.tap!r} has {times}")
    return 0


def read_vectors(
    store: FeatureStore,
    cell: CellSpec,
    task: str,
    *,
    split: str | None = None,
    normalise: bool = False,
    rows: Rows | None = None,
) -> Vectors:
    """The vectors of a cell's valid rows, of unit length with `normalise` (zero stays zero).

    `rows` are some of them, increasing; others are left out.

    Raises:
        TapError: the store has no such tap, timestep or view.
        SpecError: no row is left, or a timestep must be named.
    """
    chosen: Selection = select(store, [cell.tap], split=split, view=cell.view)
    array, t = store.array(cell.tap), cell_index(store, cell, task)
    view = store.view_index(cell.view)
    places = np.arange(len(chosen.rows))
    if rows is not None:
        places = np.flatnonzero(np.isin(chosen.rows, rows))
    wanted = chosen.rows[places]
    n_channels = n_pooled(array, cell.pool)
    x = torch.empty(len(wanted), n_channels)
    step = max(BLOCK_BYTES // array.bytes_per_row, 1)
    for start in range(0, len(wanted), step):
        some = wanted[start : start + step]
        features = read_features(store, cell.tap, t, some, view)
        found = pooled(features[:, None], array.dims, cell.pool)[:, 0]
        x[start : start + len(some)] = F.normalize(found, dim=1) if normalise else found
    splits = store.samples()["split"].combine_chunks().take(pa.array(wanted))
    return Vectors(wanted, chosen.keys.take(pa.array(places)), splits, chosen.labels[places], x)
