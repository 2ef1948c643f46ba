"""Rows of a selection in memory, and batches gathered from them.

    load    -> RowBlock: the features of a window's rows. They stay where they were read (a memory
               map, the memory of a GET); only many little shards are packed next to each other
    gather  -> FeatureBatch from one or more blocks: one copy, no sample in between to collate
    read    -> FeatureBatch of any rows at once

Shapes: n rows of a block, b rows of a batch, k columns: (view, timestep) pairs of a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from drl_data.augment import Augment, Geometry
from drl_data.feature_batch import FeatureBatch, Keys, as_tensor
from drl_data.plan import Unit
from drl_data.row_pixels import RowPixels
from drl_data.selection import Choice, Rows, Selection
from drl_data.shard_reader import gather, in_threads
from drl_data.shards import LARGE_ROW_BYTES, Array

MAP_BYTES = 4 << 20
"""Smaller shards are copied, not mapped: a map holds a file descriptor."""

PIECE_BYTES = 1 << 20
"""What is read of a shard is packed with others if it is less than this on average: a batch is then
gathered from one array and not from hundreds."""

Parts = dict[tuple[str, str], "Held"]
"""(tap in the batch, array in the store) -> its values."""


@dataclass(frozen=True)
class _Group:
    """Rows of a block that lie in one shard of every array: where in the block, and which."""

    column: int
    places: Rows
    unit: Unit
    view: int
    time: int
    rows: Rows


class Held(Protocol):
    """Values of one array for the rows of a block."""

    def fill(self, choice: Choice, part: str, number: int, group: _Group) -> None:
        """Read the rows of one group."""

    def take(self, places: Rows, out: Array) -> None:
        """out [len(places), k, *shape] = the rows at these places of the block."""


@dataclass(frozen=True)
class Packed:
    """Rows of many little shards: one array [n, k, *shape]."""

    values: Array

    def fill(self, choice: Choice, part: str, number: int, group: _Group) -> None:
        """Copy the rows to their places."""
        rows, positions = _read(choice, part, group)
        self.values[_index(group.places), group.column] = rows[_index(positions)]

    def take(self, places: Rows, out: Array) -> None:
        """One gather; `clip` because `raise` would copy through a buffer."""
        np.take(self.values, places, axis=0, out=out, mode="clip")


@dataclass(frozen=True)
class Pieces:
    """Rows where they were read: column j of row i is `blocks[piece[i, j]][position[i, j]]`."""

    piece: Rows
    position: Rows
    blocks: list[Array]

    def fill(self, choice: Choice, part: str, number: int, group: _Group) -> None:
        """Keep what was read, and note where its rows are."""
        rows, positions = _read(choice, part, group)
        local = choice.store.folder.local_path("") is not None
        self.blocks[number] = rows.copy() if local and rows.nbytes < MAP_BYTES else rows
        self.piece[group.places, group.column] = number
        self.position[group.places, group.column] = positions

    def take(self, places: Rows, out: Array) -> None:
        """Rows of one block at a time; large ones one by one, without a temporary."""
        pieces, positions = self.piece[places], self.position[places]
        for column in range(out.shape[1]):
            piece, position = pieces[:, column], positions[:, column]
            order = np.argsort(piece, kind="stable")
            cuts = (np.flatnonzero(np.diff(piece[order])) + 1).tolist()
            for first, stop in itertools.pairwise([0, *cuts, len(order)]):
                to = order[first:stop]
                gather(out[:, column], to, self.blocks[piece[to[0]]], position[to])


@dataclass(frozen=True)
class RowBlock:
    """Rows (increasing), where in the selection they are, their features, and their pixels if
    images were asked for."""

    rows: Rows
    selected: Rows
    parts: Parts
    pixels: npt.NDArray[np.uint8] | None


@dataclass(frozen=True)
class _Columns:
    """Positions on the axes of views [n, v] and timesteps [n, t] of each row."""

    views: Rows
    times: Rows

    @property
    def pairs(self) -> list[tuple[Rows, Rows]]:
        """(view, timestep) [n] of each column."""
        return [
            (self.views[:, v], self.times[:, t])
            for v in range(self.views.shape[1])
            for t in range(self.times.shape[1])
        ]


class RowReader:
    """Reads what a selection selects; draws are functions of (seed, epoch, row)."""

    def __init__(
        self,
        selection: Selection,
        *,
        seed: int,
        pixels: RowPixels | None = None,
        augment: Augment | None = None,
        pin_memory: bool = False,
    ) -> None:
        self.selection = selection
        self._seed, self._pixels, self._pinned = seed, pixels, pin_memory
        self._requested = {
            choice.name: np.array([time.requested for time in choice.store.times], np.float64)
            for choice in selection.choices
        }
        self._geometry: Geometry | None = None
        if augment is not None:
            size = (pixels.spec if pixels else selection.source.first.image_spec).size
            self._geometry = Geometry(augment, selection.arrays, size, seed)

    @property
    def bytes_per_row(self) -> int:
        """What a row of a block takes: features and pixels."""
        pixels = int(np.prod(self._pixels.shape)) if self._pixels else 0
        return self.selection.bytes_per_row + pixels

    def _columns(self, choice: Choice, rows: Rows, epoch: int) -> _Columns:
        return _Columns(
            choice.views.of_rows(rows, self._seed, epoch, "view"),
            choice.times.of_rows(rows, self._seed, epoch, "timestep"),
        )

    # --- blocks ---------------------------------------------------------------------------------

    def load(self, rows: Rows, epoch: int) -> RowBlock:
        """The features of rows (increasing, each once)."""
        parts: Parts = {}
        jobs: list[Callable[[], None]] = []
        for choice in self.selection.choices:
            pairs = self._columns(choice, rows, epoch).pairs
            groups = _groups(choice, choice.rows(rows), pairs)
            for tap in choice.taps:
                for part in choice.store.parts(tap):
                    held = _held(choice, part, len(rows), len(pairs), len(groups))
                    parts[choice.batch_name(tap), part] = held
                    jobs.extend(partial(held.fill, choice, part, *g) for g in enumerate(groups))
        in_threads(lambda job: job(), jobs)
        pixels = self._pixels.read(rows) if self._pixels else None
        return RowBlock(rows, self.selection.places(rows), parts, pixels)

    def gather(
        self,
        blocks: Sequence[tuple[RowBlock, Rows]],
        epoch: int,
        *,
        n_repeats: int = 0,
        bucket: int = 0,
    ) -> FeatureBatch:
        """One batch: of each block the rows at the given places, in the order given."""
        selected = np.concatenate([block.selected[wanted] for block, wanted in blocks])
        rows = self.selection.rows[selected]
        places = [wanted for _, wanted in blocks]
        ends = np.cumsum([len(p) for p in places]).tolist()
        slices = [slice(end - len(p), end) for end, p in zip(ends, places, strict=True)]

        def joined(choice: Choice, tap: str, part: str) -> Array:
            layout = choice.store.layouts[part]
            k = len(choice.views) * len(choice.times)
            out = self._empty((len(rows), k, *layout.row_shape), layout.stored)
            for (block, _), where, to in zip(blocks, places, slices, strict=True):
                block.parts[choice.batch_name(tap), part].take(where, out[to])
            return out.reshape(len(rows), *choice.lead, *layout.row_shape)

        stored = {
            (choice.batch_name(tap), part): joined(choice, tap, part)
            for choice in self.selection.choices
            for tap in choice.taps
            for part in choice.store.parts(tap)
        }
        pixels: npt.NDArray[np.uint8] | None = None
        if self._pixels is not None:
            pixels = np.empty((len(rows), *self._pixels.shape), np.uint8)
            for (block, _), where, to in zip(blocks, places, slices, strict=True):
                assert block.pixels is not None
                pixels[to] = block.pixels[where]
        return self._finished(rows, selected, stored, pixels, epoch, n_repeats, bucket)

    def read(self, selected: Rows, epoch: int) -> FeatureBatch:
        """One batch of the rows at any places of the selection, in any order, with repeats:
        coalesced reads, straight into it."""
        rows = self.selection.rows[selected]
        stored: dict[tuple[str, str], Array] = {}
        for choice in self.selection.choices:
            own = choice.rows(rows)
            pairs = self._columns(choice, rows, epoch).pairs
            for tap in choice.taps:
                for part in choice.store.parts(tap):
                    values = self._read_part(choice, part, own, pairs)
                    shape = (len(rows), *choice.lead, *values.shape[2:])
                    stored[choice.batch_name(tap), part] = values.reshape(shape)
        pixels = None
        if self._pixels is not None:
            distinct, back = np.unique(rows, return_inverse=True)
            pixels = self._pixels.read(distinct)[back]
        return self._finished(rows, selected, stored, pixels, epoch, 0, 0)

    def _read_part(
        self, choice: Choice, part: str, own: Rows, pairs: Sequence[tuple[Rows, Rows]]
    ) -> Array:
        """[b, k, *shape] of any rows of a store."""
        layout = choice.store.layouts[part]
        if len(pairs) == 1 and not self._pinned and _constant(*pairs[0]):
            view, time = int(pairs[0][0][0]), int(pairs[0][1][0])
            return choice.store.read_rows(part, time, own, view)[:, None]
        out = self._empty((len(own), len(pairs), *layout.row_shape), layout.stored)
        for column, (views, times) in enumerate(pairs):
            for view, time in set(zip(views.tolist(), times.tolist(), strict=True)):
                at = np.flatnonzero((views == view) & (times == time))
                out[_index(at), column] = choice.store.read_rows(part, time, own[at], view)
        return out

    # --- batches --------------------------------------------------------------------------------

    def _finished(
        self,
        rows: Rows,
        selected: Rows,
        stored: Mapping[tuple[str, str], Array],
        pixels: npt.NDArray[np.uint8] | None,
        epoch: int,
        n_repeats: int,
        bucket: int,
    ) -> FeatureBatch:
        features, timestep, view = {}, {}, {}
        axes: npt.NDArray[np.int64] | None = None
        for choice in self.selection.choices:
            columns = self._columns(choice, rows, epoch)
            requested = self._requested[choice.name]
            times = torch.from_numpy(requested[columns.times])
            views = torch.from_numpy(np.array(columns.views))
            if choice.store is self.selection.source.first:
                axes = columns.views
            for tap, array in choice.arrays.items():
                parts = {part: x for (name, part), x in stored.items() if name == tap}
                features[tap] = as_tensor(parts, array)
                timestep[tap], view[tap] = times, views
        joined = None if pixels is None else torch.from_numpy(self._of_views(pixels, axes))
        moves = None
        if self._geometry is not None:
            moves = self._geometry.moves(rows, epoch)
            features = {tap: self._geometry.features(tap, x, moves) for tap, x in features.items()}
            joined = None if joined is None else self._geometry.pixels(joined, moves)
        if self._pinned:
            features = {tap: _pinned(x) for tap, x in features.items()}
            joined = None if joined is None else _pinned(joined)
        repeated = torch.zeros(len(rows), dtype=torch.bool)
        repeated[len(rows) - n_repeats :] = True
        return FeatureBatch(
            features=features,
            label=torch.from_numpy(self.selection.labels[selected]),
            key=Keys(self.selection.keys_at(selected)),
            row=torch.from_numpy(rows),
            pixels=joined,
            timestep=timestep,
            view=view,
            repeated=repeated,
            bucket=bucket,
            moves=moves,
        )

    def _of_views(
        self, pixels: npt.NDArray[np.uint8], views: npt.NDArray[np.int64] | None
    ) -> npt.NDArray[np.uint8]:
        """Of pixels [b, view, ...] those of the views that the features are of."""
        assert self._pixels is not None
        if not self._pixels.spec.views or views is None:
            return pixels
        chosen = pixels[np.arange(len(pixels))[:, None], views]
        return chosen if self.selection.choices[0].view_axis else chosen[:, 0]

    def _empty(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Array:
        if not self._pinned:
            return np.empty(shape, dtype)
        n_bytes = int(np.prod(shape)) * dtype.itemsize
        memory = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
        values: Array = memory.numpy().view(dtype).reshape(shape)
        return values


def _pinned(x: torch.Tensor) -> torch.Tensor:
    return x if x.is_pinned() else x.pin_memory()


def _constant(*positions: Rows) -> bool:
    return all(len(p) > 0 and p.min() == p.max() for p in positions)


def _groups(choice: Choice, own: Rows, pairs: Sequence[tuple[Rows, Rows]]) -> list[_Group]:
    """Rows by (column, unit, view, timestep)."""
    n_views = max(len(choice.store.spec.view_names), 1)
    n_times = len(choice.store.times)
    found = []
    for column, (views, times) in enumerate(pairs):
        shard = (own // choice.store.spec.rows_per_unit * n_views + views) * n_times + times
        order = np.argsort(shard, kind="stable")
        cuts = np.flatnonzero(np.diff(shard[order])) + 1
        for places in np.split(order, cuts) if len(order) else []:
            at = int(places[0])
            unit = choice.store.units[int(own[at]) // choice.store.spec.rows_per_unit]
            found.append(_Group(column, places, unit, int(views[at]), int(times[at]), own[places]))
    return found


def _held(choice: Choice, part: str, n: int, k: int, n_groups: int) -> Packed | Pieces:
    """Room for the values of one array of n rows, to be read by groups."""
    layout = choice.store.layouts[part]
    if layout.row_bytes < LARGE_ROW_BYTES and n * k * layout.row_bytes < n_groups * PIECE_BYTES:
        return Packed(np.empty((n, k, *layout.row_shape), layout.stored))
    nothing = np.empty((0, *layout.row_shape), layout.stored)
    return Pieces(np.empty((n, k), np.int64), np.empty((n, k), np.int64), [nothing] * n_groups)


def _read(choice: Choice, part: str, group: _Group) -> tuple[Array, Rows]:
    """Rows of one shard, and where in them those of the group are."""
    if 2 * len(group.rows) < group.unit.n_rows:
        rows = choice.store.read_rows(part, group.time, group.rows, group.view)
        return rows, np.arange(len(rows))
    unit = choice.store.read_unit(part, group.time, group.unit, group.view)
    return unit, group.rows - group.unit.start


def _index(positions: Rows) -> slice | Rows:
    """The same positions as a slice, which NumPy copies in one piece, if they are one."""
    first, last = int(positions[0]), int(positions[-1])
    if last - first + 1 == len(positions) and bool((np.diff(positions) == 1).all()):
        return slice(first, last + 1)
    return positions
