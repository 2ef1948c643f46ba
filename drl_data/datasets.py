"""Features from a store to PyTorch: random access, or a shuffled stream of ready batches.

    FeatureDataset   map-style: any order, any sampler; batches by coalesced reads
    FeatureStream    iterable of batches: whole units in shuffled order, read ahead in a thread,
                     sharded by rank and DataLoader worker, resumable

Shapes: b rows of a batch, t timesteps.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from drl_data.epochs import EpochPlan, plan_epoch
from drl_data.errors import InputError, SpecError
from drl_data.images import read_batches
from drl_data.index import SampleIndex
from drl_data.plan import Unit
from drl_data.quantise import from_storage
from drl_data.selection import Rows, select
from drl_data.shard_reader import gather, in_threads
from drl_data.shards import Array
from drl_data.spec import ArraySpec, ImageSpec
from drl_data.store import FeatureStore

BUFFER_BYTES = 256 << 20
"""Features that the default shuffle buffer holds; a second buffer is read ahead."""


class FeatureSample(NamedTuple):
    """One row: features {tap: [t, *shape]}, its label, key and row number."""

    features: dict[str, torch.Tensor]
    label: int
    key: str
    row: int


class FeatureBatch(NamedTuple):
    """Rows together: features {tap: [b, t, *shape]} as stored, label and row int64 [b], b keys.

    `pixels` is uint8 [b, c, h, w] if images were asked for. A label of -1 means that there is none.
    """

    features: dict[str, torch.Tensor]
    label: torch.Tensor
    key: list[str]
    row: torch.Tensor
    pixels: torch.Tensor | None


def as_tensor(stored: Mapping[str, Array], array: ArraySpec) -> torch.Tensor:
    """Features [..., *shape] from what the store holds of an array and of its scales.

    The same memory as a tensor of the true type where nothing is quantised (bfloat16 comes as
    uint16, 8-bit floating point as uint8), else float32.
    """
    return from_storage({name: _tensor(values) for name, values in stored.items()}, array)


def read_features(
    store: FeatureStore, tap: str, time_index: int, rows: npt.ArrayLike, view: int = 0
) -> torch.Tensor:
    """Features [b, *shape] of any rows of one tap, timestep and view, as `as_tensor` gives them."""
    stored = {name: store.read_rows(name, time_index, rows, view) for name in store.parts(tap)}
    return as_tensor(stored, store.array(tap))


def _tensor(values: Array) -> torch.Tensor:
    # torch has few operations on uint16, and makes none of it from NumPy in older versions.
    return torch.from_numpy(values.view(np.int16) if values.dtype == np.uint16 else values)


class FeatureDataset(Dataset[FeatureSample]):
    """Random access to rows; item i is the i-th selected row.

    A DataLoader fetches whole batches through `__getitems__`: one coalesced read for each (tap,
    timestep). Choices are those of `select`. Forked workers need a store on a local disk.
    """

    def __init__(
        self,
        store: FeatureStore,
        taps: Sequence[str] | None = None,
        timesteps: Sequence[float] | None = None,
        *,
        split: str | None = None,
        labelled: bool = False,
        include_invalid: bool = False,
        partial: bool = False,
        view: str | None = None,
    ) -> None:
        self.store = store
        self.selection = select(
            store,
            taps,
            timesteps,
            split=split,
            labelled=labelled,
            include_invalid=include_invalid,
            partial=partial,
            view=view,
        )

    def __len__(self) -> int:
        return len(self.selection.rows)

    def __getitem__(self, item: int) -> FeatureSample:
        if not -len(self) <= item < len(self):
            raise IndexError(f"item {item} of {len(self)}")  # ends Python's own iteration
        return self.__getitems__([item % len(self)])[0]

    def __getitems__(self, items: Sequence[int]) -> list[FeatureSample]:
        """The samples at several positions, read together."""
        batch = self.read(items)
        return [
            FeatureSample(
                {tap: values[i] for tap, values in batch.features.items()},
                int(batch.label[i]),
                batch.key[i],
                int(batch.row[i]),
            )
            for i in range(len(items))
        ]

    def read(self, items: Sequence[int] | npt.NDArray[np.int64]) -> FeatureBatch:
        """The samples at several positions as one batch, without a collate step."""
        chosen, places = self.selection, np.asarray(items, np.int64)
        rows = chosen.rows[places]
        features = {}
        for tap in chosen.taps:
            stored = {}
            for name in self.store.parts(tap):
                values = [self.store.read_rows(name, t, rows, chosen.view) for t in chosen.times]
                stored[name] = values[0][:, None] if len(values) == 1 else np.stack(values, axis=1)
            features[tap] = as_tensor(stored, self.store.array(tap))
        return FeatureBatch(
            features,
            torch.from_numpy(chosen.labels[places]),
            chosen.keys_at(places),
            torch.from_numpy(rows),
            None,
        )


@dataclass(frozen=True)
class _Block:
    """Rows of one unit in memory (or mapped): `arrays[tap, t][positions[i]]` is row `rows[i]`."""

    rows: Rows
    positions: Rows
    arrays: Mapping[tuple[str, int], Array]
    pixels: npt.NDArray[np.uint8] | None


class FeatureStream(IterableDataset[FeatureBatch]):
    """Ready batches of one rank, for `DataLoader(stream, batch_size=None, num_workers=n)`.

    An epoch's order is a function of (seed, epoch, rank, world_size) and of what is selected; the
    number of workers does not change it. Each selected row comes exactly once in an epoch over all
    ranks; with `drop_last` all ranks give the same number of whole batches, and the rest is left
    out. Units come in shuffled order; rows are mixed within windows of at least `buffer_rows` rows.
    While one window is given out, the next is read in a thread, so `num_workers=0` is the fast way
    for features, and the only one for object storage with forked workers (`ForkError`).

    `images`: an index of the same samples, and how to decode them, joins pixels to the features.
    """

    def __init__(
        self,
        store: FeatureStore,
        taps: Sequence[str] | None = None,
        timesteps: Sequence[float] | None = None,
        *,
        batch_size: int,
        split: str | None = None,
        labelled: bool = False,
        include_invalid: bool = False,
        partial: bool = False,
        view: str | None = None,
        shuffle: bool = True,
        seed: int = 0,
        buffer_rows: int | None = None,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        images: tuple[SampleIndex, ImageSpec] | None = None,
        decode_threads: int = 4,
    ) -> None:
        positive = batch_size >= 1 and (buffer_rows is None or buffer_rows >= 1)
        if not positive or seed < 0 or not 0 <= rank < world_size:
            raise SpecError(
                f"FeatureStream: batch_size={batch_size}, buffer_rows={buffer_rows}, seed={seed}, "
                f"rank={rank} of {world_size}; want batch_size and buffer_rows >= 1, seed >= 0, "
                "0 <= rank < world_size"
            )
        if images is not None and images[0].n_samples != store.spec.n_samples:
            raise InputError(
                f"FeatureStream: the index of the images has {images[0].n_samples} samples, the "
                f"store {store.url} {store.spec.n_samples}; index the tars that it was made from"
            )
        self.store = store
        self.selection = select(
            store,
            taps,
            timesteps,
            split=split,
            labelled=labelled,
            include_invalid=include_invalid,
            partial=partial,
            view=view,
        )
        self.batch_size, self.seed, self.shuffle, self.drop_last = (
            batch_size,
            seed,
            shuffle,
            drop_last,
        )
        self.rank, self.world_size = rank, world_size
        self.buffer_rows = buffer_rows if buffer_rows is not None else self._default_buffer()
        self._images = images
        self._include_invalid = include_invalid
        self._decode_threads = decode_threads
        # Epoch and first batch; in shared memory so that persistent workers see `set_epoch`.
        self._position = torch.zeros(2, dtype=torch.int64)
        self._position.share_memory_()  # type: ignore[no-untyped-call]  # not typed in torch
        self._n_given = 0

    def _default_buffer(self) -> int:
        chosen = self.selection
        row_bytes = sum(self.store.array(tap).bytes_per_row for tap in chosen.taps)
        return max(BUFFER_BYTES // (row_bytes * len(chosen.times)), 4 * self.batch_size)

    # --- position -------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration gives."""
        return int(self._position[0])

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration, from its first batch."""
        if epoch < 0:
            raise SpecError(f"FeatureStream: epoch {epoch}; want at least 0")
        self._position.copy_(torch.tensor([epoch, 0]))
        self._n_given = 0

    def __len__(self) -> int:
        """Batches of this rank in a whole epoch."""
        return self.plan().n_batches

    def state_dict(self, n_batches: int | None = None) -> dict[str, object]:
        """Where this rank is: plain values, for JSON.

        With DataLoader workers the stream cannot see how many batches the loader has given (workers
        run ahead): say it with `n_batches`, counted since `set_epoch` or `load_state_dict`.
        """
        first = int(self._position[1])
        given = self._n_given if n_batches is None else n_batches
        return {"epoch": self.epoch, "batch": first + given, **self._identity()}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue after the last batch of `state`, until `set_epoch` starts another epoch.

        Raises:
            SpecError: the state is of a stream with another order, with what differs.
        """
        identity = self._identity()
        differing = [
            f"{name}: {state.get(name)!r} saved, {value!r} now"
            for name, value in identity.items()
            if state.get(name) != value
        ]
        epoch, batch = state.get("epoch"), state.get("batch")
        if differing or not isinstance(epoch, int) or not isinstance(batch, int):
            raise SpecError(
                "FeatureStream: this state is of another stream, its batches would repeat or skip "
                f"rows ({'; '.join(differing) or 'no epoch and batch'}); make the stream as before"
            )
        self._position.copy_(torch.tensor([epoch, batch]))
        self._n_given = 0

    def _identity(self) -> dict[str, object]:
        """What the order of batches depends on."""
        return {
            "store": self.store.fingerprint,
            "rows": zlib.crc32(self.selection.rows.tobytes()),
            "view": self.selection.view,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "buffer_rows": self.buffer_rows,
            "batch_size": self.batch_size,
            "drop_last": self.drop_last,
            "world_size": self.world_size,
        }

    def plan(self) -> EpochPlan:
        """The order of this rank's rows in the current epoch."""
        return plan_epoch(
            self.selection.rows,
            self.store.spec.rows_per_unit,
            batch_size=self.batch_size,
            shuffle=self.shuffle,
            seed=self.seed,
            epoch=self.epoch,
            buffer_rows=self.buffer_rows,
            drop_last=self.drop_last,
            rank=self.rank,
            world_size=self.world_size,
        )

    # --- batches --------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[FeatureBatch]:
        info = get_worker_info()
        worker, n_workers = (0, 1) if info is None else (info.id, info.num_workers)
        plan = self.plan()
        mine = plan.of_worker(int(self._position[1]), worker, n_workers)
        self._n_given = 0
        needed = np.zeros(len(plan.order), np.bool_)
        for batch in mine:
            needed[plan.batch_slice(batch)] = True
        ahead: dict[int, Future[dict[int, _Block]]] = {}
        pool = ThreadPoolExecutor(1, thread_name_prefix="feature-stream")
        try:
            for batch in mine:
                windows = plan.windows_of(batch)
                for window in range(windows.start, min(windows.stop + 1, plan.n_windows)):
                    if window not in ahead:
                        where = plan.window_slice(window)
                        rows = np.sort(plan.order[where][needed[where]])
                        ahead[window] = pool.submit(self._load, rows)
                for window in [w for w in ahead if w < windows.start]:
                    del ahead[window]
                blocks: dict[int, _Block] = {}
                for window in windows:
                    blocks.update(ahead[window].result())
                self._n_given += 1
                yield self._batch(plan.order[plan.batch_slice(batch)], blocks)
        finally:
            pool.shutdown(cancel_futures=True)

    def _load(self, rows: Rows) -> dict[int, _Block]:
        """Unit id -> the given rows (increasing) of that unit."""
        ids = rows // self.store.spec.rows_per_unit
        by_unit = {int(u): rows[ids == u] for u in np.unique(ids)}
        names = [name for tap in self.selection.taps for name in self.store.parts(tap)]
        cells = [(name, t) for name in names for t in self.selection.times]
        jobs = [(unit, tap, t) for unit in by_unit for tap, t in cells]

        def read(job: tuple[int, str, int]) -> Array:
            unit, wanted = self.store.units[job[0]], by_unit[job[0]]
            if _most(unit, wanted):
                return self.store.read_unit(job[1], job[2], unit, self.selection.view)
            return self.store.read_rows(job[1], job[2], wanted, self.selection.view)

        arrays = dict(zip(jobs, in_threads(read, jobs), strict=True))
        blocks = {}
        for unit_id, wanted in by_unit.items():
            unit = self.store.units[unit_id]
            most = _most(unit, wanted)
            blocks[unit_id] = _Block(
                rows=wanted,
                positions=wanted - unit.start if most else np.arange(len(wanted)),
                arrays={(tap, t): arrays[unit_id, tap, t] for tap, t in cells},
                pixels=None if self._images is None else self._read_pixels(*self._images, wanted),
            )
        return blocks

    def _read_pixels(
        self, index: SampleIndex, spec: ImageSpec, rows: Rows
    ) -> npt.NDArray[np.uint8]:
        """Pixels [len(rows), c, h, w] of rows (increasing), decoded anew from the tars."""
        pixels = np.zeros((len(rows), *spec.shape), np.uint8)
        cuts = np.flatnonzero(np.diff(rows) != 1) + 1
        done = 0
        for run in np.split(rows, cuts):
            unit = Unit(0, int(run[0]), int(run[-1]) + 1)
            batches = read_batches(
                unit,
                index,
                spec,
                batch_size=min(len(run), 64),
                n_threads=self._decode_threads,
                prefetch_bytes=64 << 20,
            )
            for batch in batches:
                if batch.invalid and not self._include_invalid:
                    bad = batch.invalid[0]
                    raise InputError(
                        f"row {bad.row} (key {bad.key!r}): {bad.stage}: {bad.reason}, but "
                        f"{self.store.url} has its features; use the tars that it was made from"
                    )
                pixels[done : done + batch.n_rows] = batch.pixels[: batch.n_rows]
                done += batch.n_rows
        return pixels

    def _batch(self, rows: Rows, blocks: Mapping[int, _Block]) -> FeatureBatch:
        chosen = self.selection
        ids = rows // self.store.spec.rows_per_unit
        parts = []
        for unit_id in np.unique(ids).tolist():
            places = np.flatnonzero(ids == unit_id)
            block = blocks[unit_id]
            parts.append((places, block, np.searchsorted(block.rows, rows[places])))
        features = {}
        for tap in chosen.taps:
            stored = {name: self._joined(name, rows, parts) for name in self.store.parts(tap)}
            features[tap] = as_tensor(stored, self.store.array(tap))
        pixels = None
        if self._images is not None:
            spec = self._images[1]
            joined = np.empty((len(rows), *spec.shape), np.uint8)
            for places, block, found in parts:
                assert block.pixels is not None
                joined[places] = block.pixels[found]
            pixels = torch.from_numpy(joined)
        places = np.searchsorted(chosen.rows, rows)
        return FeatureBatch(
            features,
            torch.from_numpy(chosen.labels[places]),
            chosen.keys_at(places),
            torch.from_numpy(rows.copy()),
            pixels,
        )

    def _joined(self, name: str, rows: Rows, parts: Sequence[tuple[Rows, _Block, Rows]]) -> Array:
        """Stored values [b, t, *shape] of one array from the blocks of several units."""
        times = self.selection.times
        first = parts[0][1].arrays[name, times[0]]
        out = np.empty((len(rows), len(times), *self.store.array(name).shape), first.dtype)
        for column, t in enumerate(times):
            for places, block, found in parts:
                gather(out[:, column], places, block.arrays[name, t], block.positions[found])
        return out


def _most(unit: Unit, rows: Rows) -> bool:
    """Whether so many rows of a unit are wanted that it is better read whole."""
    return 2 * len(rows) >= unit.n_rows
