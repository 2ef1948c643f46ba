"""Reading shards: memory maps on a local disk, ranged reads elsewhere, zarr-python as a fallback.

A shard that was written by `FeatureStore.write` needs no decoding: its footer is compared, once,
with the one that its shape implies, and its rows are a view. A store that another tool has
rewritten (other chunk order, a compressor) is read through zarr-python instead.
"""

from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from drl_data.errors import ObjectError, ObjectNotFoundError, StoreError
from drl_data.objects import Folder
from drl_data.plan import Unit
from drl_data.shards import Array, ShardLayout

N_THREADS = 16
"""Requests in flight at once."""

MAX_GAP_BYTES = 256 << 10
"""Wanted rows of one shard that lie closer than this are read in one request, gap included."""

MAX_MAPS = 256
"""Memory maps that random access keeps open; each holds a file descriptor."""

Rows = npt.NDArray[np.int64]
T = TypeVar("T")
R = TypeVar("R")


def in_threads(task: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Results of `task` on each item, in order; the first error is raised after all have ended.

    Threads live as long as the call, so that a forked child never waits for its parent's.
    """
    if not items:
        return []
    with ThreadPoolExecutor(min(N_THREADS, len(items))) as pool:
        return list(pool.map(task, items))


def in_turn(task: Callable[[T], R], items: Sequence[T], block: int = 256) -> Iterator[R]:
    """As `in_threads`, but a block of items at a time, so that results need not all be held."""
    for start in range(0, len(items), block):
        yield from in_threads(task, items[start : start + block])


class ShardReader:
    """Reads the arrays of one store; arguments are checked by `FeatureStore`."""

    def __init__(
        self, folder: Folder, layouts: Mapping[str, ShardLayout], units: Sequence[Unit]
    ) -> None:
        self._folder = folder
        self._layouts = layouts
        self._units = units
        self._rows_per_unit = units[0].n_rows
        self._local = folder.local_path("") is not None
        self._mapped = lru_cache(MAX_MAPS)(self._map)
        self._regular: dict[str, bool] = {}

    def read_unit(self, name: str, cell: int, unit: Unit) -> Array:
        """Features [unit.n_rows, *shape]: see `FeatureStore.read_unit`."""
        if self._local:
            mapped = self._map(name, cell, unit, whole=True)
            if mapped is not None:
                return mapped
        path = self._path(name, cell, unit)
        with _Pending(self._folder, path, unit):
            data = self._folder.get(path)
        rows = self._layouts[name].rows(np.frombuffer(data, np.uint8), unit.n_rows)
        return self._decode(data, name, cell, unit) if rows is None else rows

    def read_rows(self, name: str, cell: int, rows: Rows) -> Array:
        """Features [len(rows), *shape]: see `FeatureStore.read_rows`."""
        layout = self._layouts[name]
        out = np.empty((len(rows), *layout.row_shape), layout.stored)
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        if self._local:
            for run in self._runs(ordered, max_gap_rows=self._rows_per_unit):
                unit = self._unit_of(ordered[run.start])
                shard = self._mapped(name, cell, unit)
                if shard is None:
                    shard = self.read_unit(name, cell, unit)
                gather(out, order[run], shard, ordered[run] - unit.start)
            return out
        units = [self._units[i] for i in np.unique(ordered // self._rows_per_unit).tolist()]
        in_threads(lambda unit: self._check(name, cell, unit), units)

        def read(run: slice) -> None:
            first, last = int(ordered[run.start]), int(ordered[run.stop - 1])
            unit = self._unit_of(first)
            block = self._read_range(name, cell, unit, first, last + 1)
            gather(out, order[run], block, ordered[run] - first)

        in_threads(read, self._runs(ordered, max_gap_rows=MAX_GAP_BYTES // layout.row_bytes))
        return out

    def _unit_of(self, row: int | np.int64) -> Unit:
        return self._units[int(row) // self._rows_per_unit]

    def _path(self, name: str, cell: int, unit: Unit) -> str:
        return self._layouts[name].path(name, cell, unit.id)

    def _runs(self, ordered: Rows, max_gap_rows: int) -> list[slice]:
        """Cut increasing rows where the unit changes or more than `max_gap_rows` are skipped."""
        if not len(ordered):
            return []
        new_unit = np.diff(ordered // self._rows_per_unit) != 0
        cuts = np.flatnonzero(new_unit | (np.diff(ordered) > max_gap_rows + 1)) + 1
        return [slice(a, b) for a, b in itertools.pairwise([0, *cuts.tolist(), len(ordered)])]

    def _map(self, name: str, cell: int, unit: Unit, *, whole: bool = False) -> Array | None:
        """A read-only memory map of the rows; None if the shard is laid out otherwise. With `whole`
        the bytes are read now, in order, and not page by page when they are looked at."""
        path = self._path(name, cell, unit)
        local = self._folder.local_path(path)
        assert local is not None
        layout = self._layouts[name]
        with _Pending(self._folder, path, unit):
            data = _map_file(local, layout.shard_bytes(unit.n_rows), whole=whole)
        return None if data is None else layout.rows(data, unit.n_rows)

    def _check(self, name: str, cell: int, unit: Unit) -> None:
        """Learn, once, whether ranges of a remote shard are its rows."""
        path = self._path(name, cell, unit)
        if path in self._regular:
            return
        layout = self._layouts[name]
        start, stop = layout.data_bytes(unit.n_rows), layout.shard_bytes(unit.n_rows)
        with _Pending(self._folder, path, unit):
            if self._folder.head(path).size != stop:
                self._regular[path] = False
                return
            footer = self._folder.get_range(path, start, stop)
        self._regular[path] = bytes(footer) == layout.footer(unit.n_rows)

    def _read_range(self, name: str, cell: int, unit: Unit, first: int, stop: int) -> Array:
        """Rows `first` to `stop` (exclusive), all in one remote shard."""
        path = self._path(name, cell, unit)
        if not self._regular[path]:
            return self.read_unit(name, cell, unit)[first - unit.start : stop - unit.start]
        layout, size = self._layouts[name], self._layouts[name].row_bytes
        with _Pending(self._folder, path, unit):
            data = self._folder.get_range(
                path, (first - unit.start) * size, (stop - unit.start) * size
            )
        return np.frombuffer(data, layout.stored).reshape(-1, *layout.row_shape)

    def _decode(self, shard: memoryview, name: str, cell: int, unit: Unit) -> Array:
        """The rows of one shard by zarr-python, whatever the array's own `zarr.json` says."""
        import zarr  # only stores that another tool rewrote need it
        from zarr.core.buffer import default_buffer_prototype
        from zarr.storage import MemoryStore

        make = default_buffer_prototype().buffer.from_bytes
        path = self._path(name, cell, unit)
        where = f"{self._folder.url}/{path}"
        inside: tuple[int | slice, ...] = (
            slice(unit.start, unit.stop),
            *self._layouts[name].place(cell),
        )
        meta = self._folder.get(f"{name}/zarr.json")
        key = path.removeprefix(f"{name}/")
        memory = MemoryStore({"zarr.json": make(bytes(meta)), key: make(bytes(shard))})
        try:
            if not shard:  # zarr-python would take it for a shard of nothing but fill values
                raise ValueError("the object is empty")
            array = zarr.open_array(memory, mode="r")
            rows = np.asarray(array[inside])
        except (ValueError, KeyError, RuntimeError, TypeError, IndexError) as error:
            raise StoreError(
                f"{where}: damaged shard ({len(shard)} bytes, {type(error).__name__}: {error}); "
                "`drl extract --repair` computes the unit again"
            ) from error
        layout = self._layouts[name]
        if rows.shape != (unit.n_rows, *layout.row_shape) or rows.dtype != layout.stored:
            raise StoreError(
                f"{where}: {rows.dtype.name} {rows.shape}, want {layout.stored.name} "
                f"{(unit.n_rows, *layout.row_shape)}; the array was replaced"
            )
        return rows


class _Pending:
    """Turns a missing shard into the fact that its unit is not written."""

    def __init__(self, folder: Folder, path: str, unit: Unit) -> None:
        self._place = f"{folder.url}, unit {unit.id} (rows {unit.start}..{unit.stop})"
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if isinstance(error, ObjectNotFoundError):
            raise StoreError(
                f"{self._place}: {self._path} is not written; run `drl extract` again"
            ) from error


_POPULATE: int = getattr(mmap, "MAP_POPULATE", 0)  # Linux has it


def _map_file(path: Path, n_bytes: int, *, whole: bool) -> Array | None:
    """The file as read-only uint8; None if it does not have `n_bytes` bytes."""
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size != n_bytes:
                return None
            flags = mmap.MAP_SHARED | (_POPULATE if whole else 0)
            return np.frombuffer(
                mmap.mmap(file.fileno(), n_bytes, flags=flags, prot=mmap.PROT_READ), np.uint8
            )
    except FileNotFoundError as error:
        raise ObjectNotFoundError(f"{path}: no such file") from error
    except OSError as error:
        raise ObjectError(f"{path}: {error.strerror or error}") from error


def gather(out: Array, places: Rows, shard: Array, positions: Rows) -> None:
    """out[places] = shard[positions]; large rows one by one, without a temporary."""
    if out[:1].nbytes < 4096:
        out[places] = shard[positions]
        return
    for place, position in zip(places.tolist(), positions.tolist(), strict=True):
        out[place] = shard[position]
