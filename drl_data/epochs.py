"""The order of rows in an epoch, as a value: who gets which row, when, out of which window.

    units, shuffled  ->  one sequence of rows, unit by unit  ->  a contiguous share for each rank
    -> windows of whole units, rows shuffled in each  ->  batches

A pure function of its arguments; what reads the rows is in datasets.py.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EpochPlan:
    """Rows of one rank in the order that they are given out.

    `order[window_starts[i] : window_starts[i + 1]]` are the rows of window i; no unit is in two
    windows of one rank.
    """

    order: Rows
    window_starts: Rows
    batch_size: int

    @property
    def n_batches(self) -> int:
        """Batches, of which the last may be short."""
        return -(-len(self.order) // self.batch_size)

    @property
    def n_windows(self) -> int:
        """Groups of units that are read together."""
        return len(self.window_starts) - 1

    def batch_slice(self, batch: int) -> slice:
        """Where in `order` a batch lies."""
        start = batch * self.batch_size
        return slice(start, min(start + self.batch_size, len(self.order)))

    def of_worker(self, first: int, worker: int, n_workers: int) -> range:
        """Batches from `first` on that one of the DataLoader's workers makes.

        The DataLoader takes one batch of each worker in turn, so strides keep the order whatever
        the number of workers.
        """
        return range(first + worker, self.n_batches, n_workers)

    def window_slice(self, window: int) -> slice:
        """Where in `order` a window lies."""
        return slice(int(self.window_starts[window]), int(self.window_starts[window + 1]))

    def windows_of(self, batch: int) -> range:
        """Windows that a batch has rows of."""
        where = self.batch_slice(batch)
        first = int(np.searchsorted(self.window_starts, where.start, side="right")) - 1
        stop = int(np.searchsorted(self.window_starts, where.stop, side="left"))
        return range(first, stop)


def plan_epoch(
    rows: Rows,
    rows_per_unit: int,
    *,
    batch_size: int,
    shuffle: bool,
    seed: int,
    epoch: int,
    buffer_rows: int,
    drop_last: bool,
    rank: int,
    world_size: int,
) -> EpochPlan:
    """The order of one rank's share of `rows` (increasing) in one epoch.

    Over all ranks each row comes once. With `drop_last` every rank has the same number of whole
    batches, and up to `batch_size * world_size + world_size` rows are left out.
    """
    units = _by_unit(rows, rows_per_unit)
    if shuffle:
        order = np.random.default_rng([seed, epoch]).permutation(len(units))
        units = [units[i] for i in order]
    sequence = np.concatenate(units)
    if drop_last:
        n_rows = len(rows) // world_size
        start = rank * n_rows
        stop = start + n_rows // batch_size * batch_size
    else:
        start = rank * len(rows) // world_size
        stop = (rank + 1) * len(rows) // world_size
    share = sequence[start:stop]
    starts = _window_starts(share // rows_per_unit, buffer_rows)
    if shuffle:
        rng = np.random.default_rng([seed, epoch, rank + 1])
        windows = [share[a:b] for a, b in itertools.pairwise(starts)]
        share = np.concatenate([rng.permutation(w) for w in windows] or [share])
    return EpochPlan(share, starts, batch_size)


def _by_unit(rows: Rows, rows_per_unit: int) -> list[Rows]:
    return np.split(rows, np.flatnonzero(np.diff(rows // rows_per_unit)) + 1)


def _window_starts(unit_ids: Rows, buffer_rows: int) -> Rows:
    """Cut where the unit changes and the window has at least `buffer_rows` rows."""
    edges = [*(np.flatnonzero(np.diff(unit_ids)) + 1).tolist(), len(unit_ids)]
    starts = [0]
    for edge in edges:
        if edge - starts[-1] >= buffer_rows or edge == len(unit_ids) > starts[-1]:
            starts.append(edge)
    return np.array(starts, np.int64)
