"""The order of rows in an epoch, as a value: who gets which row, when, out of which window.

    units, shuffled  ->  one sequence of rows, unit by unit  ->  a contiguous share for each rank
    -> windows of whole units, rows shuffled in each  ->  batches

Several stores (buckets of one shape each) are lanes: each has its own order, and a batch is of one
lane. All ranks take the same lane at the same step, and all have the same number of steps: a rank
with fewer would leave the others waiting in their first collective call without it.

Pure functions of their arguments; what reads the rows is in feature_stream.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from drl_data.errors import SpecError

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Dealing:
    """How rows are dealt to ranks and batches; `buffer_rows` has one number for each lane.

    What does not fill a batch on every rank: with neither `drop_last` nor `pad` each row comes
    exactly once and the last batches are smaller; `drop_last` leaves the rest out, all batches are
    whole; `pad` gives ranks that have a row less than others one of their own rows once more.
    """

    batch_size: int
    world_size: int
    buffer_rows: tuple[int, ...]
    shuffle: bool
    seed: int
    drop_last: bool = False
    pad: bool = False
    split_batches: bool = False
    """`batch_size` is that of all ranks together, and each step's rows are those of one process."""


@dataclass(frozen=True)
class Segment:
    """A part of an epoch that was dealt in one way: so many batches of every rank."""

    dealing: Dealing
    n_batches: int


@dataclass(frozen=True)
class EpochPlan:
    """Rows of one rank and lane in the order that they are given out.

    `order[window_starts[i] : window_starts[i + 1]]` are the rows of window i; no unit is in two
    windows of one rank. `n_batches` is that of every rank: one that has too few rows for it takes
    one off the batch before the last. The last `n_repeats` rows (0 or 1) came before.
    """

    order: Rows
    window_starts: Rows
    batch_size: int
    n_batches: int
    n_repeats: int = 0

    @property
    def n_windows(self) -> int:
        """Groups of units that are read together."""
        return len(self.window_starts) - 1

    def batch_slice(self, batch: int) -> slice:
        """Where in `order` a batch lies."""
        n, last = len(self.order), self.n_batches - 1
        start_of_last = min(last * self.batch_size, n - 1)
        start = min(batch * self.batch_size, start_of_last)
        return slice(start, n if batch == last else min(start + self.batch_size, start_of_last))

    def window_slice(self, window: int) -> slice:
        """Where in `order` a window lies."""
        return slice(int(self.window_starts[window]), int(self.window_starts[window + 1]))

    def windows_of(self, batch: int) -> range:
        """Windows that a batch has rows of."""
        where = self.batch_slice(batch)
        first = int(np.searchsorted(self.window_starts, where.start, side="right")) - 1
        stop = int(np.searchsorted(self.window_starts, where.stop, side="left"))
        return range(first, stop)


@dataclass(frozen=True)
class RankPlan:
    """One rank's epoch: at step i it gives batch `batch_of[i]` of lane `lane_of[i]`."""

    lanes: tuple[EpochPlan, ...]
    lane_of: Rows
    batch_of: Rows

    @property
    def n_batches(self) -> int:
        """Steps of the epoch, the same on every rank."""
        return len(self.lane_of)

    def of_worker(self, first: int, worker: int, n_workers: int) -> range:
        """Steps from `first` on that one of the DataLoader's workers makes.

        The DataLoader takes one batch of each worker in turn, so strides keep the order whatever
        the number of workers.
        """
        return range(first + worker, self.n_batches, n_workers)

    def rows_of(self, step: int) -> Rows:
        """Rows of the batch at a step, in its lane's store."""
        plan = self.lanes[int(self.lane_of[step])]
        return plan.order[plan.batch_slice(int(self.batch_of[step]))]

    @property
    def order(self) -> Rows:
        """Rows of all batches in turn."""
        return np.concatenate([*map(self.rows_of, range(self.n_batches)), np.empty(0, np.int64)])


def plan_rank(
    lanes: Sequence[Rows],
    rows_per_unit: Sequence[int],
    dealing: Dealing,
    *,
    epoch: int,
    rank: int,
    part: int = 0,
) -> RankPlan:
    """One rank's share of the rows (increasing) of every lane, and the lanes' turns.

    `part` counts the segments of the epoch that lie behind.

    Raises:
        SpecError: the ranks cannot all have the same number of batches.
    """
    plans = tuple(
        plan_epoch(rows, units, dealing, lane=lane, epoch=epoch, rank=rank, part=part)
        for lane, (rows, units) in enumerate(zip(lanes, rows_per_unit, strict=True))
    )
    counts = [plan.n_batches for plan in plans]
    lane_of = np.repeat(np.arange(len(plans)), counts)
    if dealing.shuffle and len(plans) > 1:
        # The same on every rank, so that ranks work on batches of one shape at a time.
        lane_of = np.random.default_rng([dealing.seed, epoch, part, 1]).permutation(lane_of)
    batch_of = np.empty_like(lane_of)
    for lane, count in enumerate(counts):
        batch_of[lane_of == lane] = np.arange(count)
    return RankPlan(plans, lane_of, batch_of)


def plan_epoch(
    rows: Rows,
    rows_per_unit: int,
    dealing: Dealing,
    *,
    lane: int = 0,
    epoch: int,
    rank: int,
    part: int = 0,
) -> EpochPlan:
    """The order of one rank's share of one lane's `rows` (increasing) in one epoch.

    Raises:
        SpecError: each row shall come exactly once, but then a rank would have fewer batches; or
            batches that cannot be split evenly.
    """
    if dealing.split_batches:
        alone = replace(dealing, world_size=1, split_batches=False)
        whole = plan_epoch(rows, rows_per_unit, alone, lane=lane, epoch=epoch, rank=0, part=part)
        return _split(whole, rank, dealing.world_size)
    sequence = _unit_by_unit(rows, rows_per_unit, dealing, [dealing.seed, epoch, part, 2, lane])
    n, world_size, size = len(rows), dealing.world_size, dealing.batch_size
    if dealing.drop_last:
        n_batches = n // world_size // size
        start = rank * (n // world_size)
        stop = start + n_batches * size
    else:
        n_most = -(-n // world_size)
        n_batches = -(-n_most // size)
        start, stop = rank * n // world_size, (rank + 1) * n // world_size
        if not dealing.pad and n_batches > n // world_size:
            raise SpecError(
                f"{n} rows over {world_size} ranks in batches of {size}: some ranks would have "
                f"fewer than {n_batches} batches, and the others would wait for them for ever; say "
                "drop_last=True or pad=True"
            )
    share = sequence[start:stop]
    repeats = share[:0]
    if dealing.pad and len(share) < n_most:
        # Of the last unit that is read anyway; a rank without rows takes anyone's.
        repeats = share[-1:] if len(share) else sequence[rank % n :][:1]
    starts = _window_starts(share // rows_per_unit, dealing.buffer_rows[lane])
    if dealing.shuffle:
        rng = np.random.default_rng([dealing.seed, epoch, part, 3, lane, rank])
        windows = [share[a:b] for a, b in itertools.pairwise(starts)]
        share = np.concatenate([rng.permutation(w) for w in windows] or [share])
    if len(repeats):
        share = np.concatenate([share, repeats])
        starts = np.array([*starts[:-1], len(share)] if len(starts) > 1 else [0, 1])
    return EpochPlan(share, starts, size, n_batches, len(repeats))


def _split(whole: EpochPlan, rank: int, world_size: int) -> EpochPlan:
    """One rank's equal part of every batch.

    A batch is cut where its rows lie in their window, in order. Rank r has then rows of about the
    r-th part of each window, so that all ranks together read little more than one process does.
    """
    sizes = [len(whole.order[whole.batch_slice(b)]) for b in range(whole.n_batches)]
    if any(size % world_size for size in sizes):
        raise SpecError(
            f"batches of {' and '.join(map(str, sorted(set(sizes))))} rows over {world_size} "
            "ranks: want multiples; choose another batch_size, or drop_last=True if only the last "
            "batch has another size"
        )
    window_of = np.repeat(np.arange(whole.n_windows), np.diff(whole.window_starts))
    taken = [np.empty(0, np.int64)]
    for where in map(whole.batch_slice, range(whole.n_batches)):
        by_place = np.lexsort((whole.order[where], window_of[where]))
        size = len(by_place) // world_size
        taken.append(where.start + np.sort(by_place[rank * size : (rank + 1) * size]))
    own = np.concatenate(taken)
    return replace(
        whole,
        order=whole.order[own],
        window_starts=np.searchsorted(own, whole.window_starts),
        batch_size=whole.batch_size // world_size,
    )


def undealt(
    lanes: Sequence[Rows],
    rows_per_unit: Sequence[int],
    segments: Sequence[Segment],
    *,
    epoch: int,
) -> list[Rows]:
    """Rows of each lane (increasing) that no rank was given in these parts of an epoch.

    Every rank has given the same number of batches of each part, as ranks that train together do.
    """
    left = [np.asarray(rows) for rows in lanes]
    for part, segment in enumerate(segments):
        dealt: list[list[Rows]] = [[] for _ in left]
        for rank in range(segment.dealing.world_size):
            plan = plan_rank(
                left, rows_per_unit, segment.dealing, epoch=epoch, rank=rank, part=part
            )
            for step in range(min(segment.n_batches, plan.n_batches)):
                dealt[int(plan.lane_of[step])].append(plan.rows_of(step))
        left = [
            np.setdiff1d(rows, np.concatenate([*given, rows[:0]]), assume_unique=False)
            for rows, given in zip(left, dealt, strict=True)
        ]
    return left


def resumed(segments: Sequence[Segment], saved: Segment, now: Dealing) -> tuple[Segment, ...]:
    """The parts of an epoch that lie behind if it goes on with another dealing."""
    same = replace(saved.dealing, buffer_rows=now.buffer_rows) == now
    if (same and saved.dealing.buffer_rows == now.buffer_rows) or not saved.n_batches:
        return tuple(segments)
    return (*segments, saved)


def _unit_by_unit(rows: Rows, rows_per_unit: int, dealing: Dealing, seed: Sequence[int]) -> Rows:
    if not dealing.shuffle or not len(rows):
        return rows
    units = np.split(rows, np.flatnonzero(np.diff(rows // rows_per_unit)) + 1)
    order = np.random.default_rng(seed).permutation(len(units))
    return np.concatenate([units[i] for i in order])


def _window_starts(unit_ids: Rows, buffer_rows: int) -> Rows:
    """Cut where the unit changes and the window has at least `buffer_rows` rows."""
    edges = [*(np.flatnonzero(np.diff(unit_ids)) + 1).tolist(), len(unit_ids)]
    starts = [0]
    for edge in edges:
        if edge - starts[-1] >= buffer_rows or edge == len(unit_ids) > starts[-1]:
            starts.append(edge)
    return np.array(starts, np.int64)
