"""One unit of which older stores have a part: what is copied, computed, counted and signed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from drl_data.copying import How, check_size, copy_object
from drl_data.errors import (
    ConflictError,
    redacted,
)
from drl_data.extract import ExtractTask, UnitResult, as_numpy, is_of, unit_record
from drl_data.metering import Clock
from drl_data.plan import InvalidRow, Lease, Unit
from drl_data.quantise import storage_buffer
from drl_data.receipts import NonFinite, ObjectRecord, Reused, RunRecord, UnitCounts
from drl_data.reuse_plan import Piece, Place, UnitPlan, cells_of
from drl_data.shard_reader import in_threads
from drl_data.stopping import Stop
from drl_data.store import FeatureStore
from drl_data.tap_reducer import TapTimes
from drl_data.unit_features import Selection, UnitFeatures

T = TypeVar("T")


class UnitWork:
    """One unit: what is planned, done."""

    def __init__(
        self,
        store: FeatureStore,
        plan: UnitPlan,
        extractor: ExtractTask | None,
        identity: RunRecord,
        occupied: set[str],
    ) -> None:
        """`identity` is recorded where there is no extractor; `occupied` are objects of the store
        that were found to be others than the copies."""
        self._store, self._plan, self._extractor = store, plan, extractor
        self._unit, self._occupied = plan.unit, occupied
        self._device = torch.device("cpu") if extractor is None else extractor.device
        self._identity = identity if extractor is None else extractor.identity
        self._clock = Clock(self._device)
        self._buffers: dict[str, Tensor] = {}
        self._how: dict[int, Counter[How]] = {}
        self._whole = [piece for piece in plan.pieces if self._is_whole(piece, plan.invalid)]

    @property
    def n_bytes(self) -> int:
        """Bytes of what is read into memory."""
        store = self._store
        names = {p.place[0] for p in self._plan.pieces if p not in self._whole}
        arrays = [store.array(part) for name in names for part in store.parts(name)]
        per_row = sum(a.n_cells(len(store.times)) * a.bytes_per_row for a in arrays)
        return per_row * self._unit.n_rows

    def run(self, lease: Lease, stop: Stop) -> UnitResult:
        """Read what is in parts, compute what is missing, copy what is whole, sign."""
        parts = [piece for piece in self._plan.pieces if piece not in self._whole]
        with self._clock.stage("reuse"):
            for piece in self._whole:
                self._check(piece)
            self._fill(parts)
        computed = self.compute(lease, stop)
        invalid = _merged(self._plan.invalid, [row for one in computed for row in one.invalid])
        with self._clock.stage("reuse"):
            # A row that became invalid is so in every array: no old object is right then.
            whole = [piece for piece in self._whole if self._is_whole(piece, invalid)]
            self._fill([piece for piece in self._whole if piece not in whole])
            present = self._copy(whole)
        return self._sign(lease, invalid, computed, present)

    # --- whole objects --------------------------------------------------------------------------

    def _is_whole(self, piece: Piece, invalid: Sequence[InvalidRow]) -> bool:
        """Whether the old objects are, byte for byte, those that the new store must have."""
        holes = [row.row - self._unit.start for row in invalid]
        share = piece.share
        theirs = [row.row - share.unit.start for row in share.receipt.invalid]
        n_valid = self._unit.n_rows - len(holes)
        paths = {mine for mine, _ in self._objects(piece)}
        return (
            share.aligned
            and holes == theirs
            and int(piece.mask.sum()) == n_valid
            and not paths & self._occupied
        )

    def _objects(self, piece: Piece) -> list[tuple[str, tuple[str, int]]]:
        """(path in the new store, array and cell of the old one) of each object of a place."""
        store, cells = self._store, piece.share.source.matches.cells
        name, entry = piece.place
        return [
            (store.layouts[part].path(part, cell, self._unit.id), cells[part, cell])
            for part in store.parts(name)
            for cell in cells_of(store.array(part), entry, len(store.times))
        ]

    def _check(self, piece: Piece) -> None:
        """Raise DamagedError before anything is computed that a copy would have to be thrown away
        for."""
        source, unit = piece.share.source, piece.share.unit
        in_threads(
            lambda item: check_size(source.store.folder, source.record(unit, *item[1])),
            self._objects(piece),
        )

    def _copy(self, pieces: Sequence[Piece]) -> list[ObjectRecord]:
        """Copy whole objects into the store; what is then there."""

        def copy(item: tuple[Piece, str, tuple[str, int]]) -> tuple[int, How, ObjectRecord]:
            piece, path, cell = item
            source = piece.share.source
            record = source.record(piece.share.unit, *cell)
            try:
                how = copy_object(source.store.folder, record, self._store.folder, path)
            except ConflictError:
                self._occupied.add(path)
                raise
            return id(source), how, record.model_copy(update={"path": path})

        items = [(piece, path, cell) for piece in pieces for path, cell in self._objects(piece)]
        done = in_threads(copy, items)
        for source, how, _ in done:
            self._how.setdefault(source, Counter())[how] += 1
        return [record for _, _, record in done]

    # --- rows -----------------------------------------------------------------------------------

    def _buffer(self, name: str) -> Tensor:
        """Host memory of one array, made at first use."""
        if name not in self._buffers:
            lead = (self._store.n_cells(name), self._unit.n_rows)
            pinned = self._device.type == "cuda"
            self._buffers[name] = storage_buffer(self._store.array(name), lead, pinned=pinned)
        return self._buffers[name]

    def _fill(self, pieces: Sequence[Piece]) -> None:
        """Read rows of old stores into their places."""
        work = [
            (piece, part, cell, as_numpy(self._buffer(part)))
            for piece in pieces
            for part in self._store.parts(piece.place[0])
            for cell in cells_of(self._store.array(part), piece.place[1], len(self._store.times))
        ]

        def fill(item: tuple[Piece, str, int, npt.NDArray[np.generic]]) -> None:
            piece, part, cell, memory = item
            share = piece.share
            old = share.source.matches.cells[part, cell]
            memory[cell][piece.mask] = share.source.rows(share.unit, *old, share.old[piece.mask])

        in_threads(fill, work)

    def compute(self, lease: Lease, stop: Stop) -> list[UnitFeatures]:
        """Compute what no old store has, each row what it lacks and no more."""
        rows = np.arange(self._unit.start, self._unit.stop)
        wanted = np.ones(len(rows), np.bool_)
        if lease.probe is not None:
            wanted = (rows >= lease.probe[0]) & (rows < lease.probe[1])
        made = []
        for mask, places in self._plan.groups():
            if not (mask & wanted).any():
                continue
            assert self._extractor is not None
            for name, _ in places:
                for part in self._store.parts(name):
                    self._buffer(part)
            made.append(
                self._extractor.compute(
                    self._unit,
                    Selection(rows=mask & wanted, times=_times(self._store, places)),
                    poison=lease.poison,
                    clock=self._clock,
                    stop=stop,
                    into=self._buffers,
                )
            )
        return made

    # --- the receipt ----------------------------------------------------------------------------

    def _sign(
        self,
        lease: Lease,
        invalid: Sequence[InvalidRow],
        computed: Sequence[UnitFeatures],
        present: Sequence[ObjectRecord],
    ) -> UnitResult:
        store, unit = self._store, self._unit
        run = unit_record(
            self._identity, store.index, unit, self._clock, lease.attempt, computed, self._device
        ).model_copy(update={"reused": self._reused()})
        receipt = store.write(
            unit,
            {name: as_numpy(x) for name, x in self._buffers.items()},
            invalid,
            run,
            self._counts(invalid, computed),
            present,
        )
        return UnitResult(receipt, computed=is_of(receipt, run))

    def _counts(
        self, invalid: Sequence[InvalidRow], computed: Sequence[UnitFeatures]
    ) -> UnitCounts:
        """As if everything had been computed here and now."""
        store, unit = self._store, self._unit
        clipped: dict[tuple[str, str], int] = Counter()
        non_finite: dict[tuple[str, str], NonFinite] = {}
        for one in computed:
            for name, of_times in one.clipped.items():
                for time, n in of_times.items():
                    clipped[name, time] += n
            for name, found in one.non_finite.items():
                for time, more in found.items():
                    _add(non_finite, (name, time), more)
        for piece in self._plan.pieces:
            name, entry = piece.place
            time = store.time_of(name, entry)
            clipped[name, time] += piece.clipped
            _add(non_finite, (name, time), piece.non_finite)
        fits = {
            name: crc
            for source in {id(p.share.source): p.share.source for p in self._plan.pieces}.values()
            for name, theirs in source.matches.fits.items()
            if (crc := source.fits.get(theirs)) is not None
        }
        return UnitCounts(
            input_bytes=_input_bytes(store, unit, invalid),
            clipped=_nested({place: n for place, n in clipped.items() if n}),
            non_finite=_nested({p: n for p, n in non_finite.items() if n != NonFinite()}),
            fits=fits if self._extractor is None else self._extractor.fits,
        )

    def _reused(self) -> tuple[Reused, ...]:
        """What came from each old store."""
        found = []
        for source in {id(p.share.source): p.share.source for p in self._plan.pieces}.values():
            pieces = [piece for piece in self._plan.pieces if piece.share.source is source]
            rows = np.logical_or.reduce([piece.mask for piece in pieces])
            how = self._how.get(id(source), Counter())
            n_views = max(len(self._store.spec.view_names), 1)
            found.append(
                Reused(
                    store=redacted(source.store.url),
                    rows=int(rows.sum()),
                    features=sum(int(piece.mask.sum()) for piece in pieces) * n_views,
                    linked=how["linked"],
                    copied=how["copied"],
                    rewritten=how["rewritten"],
                )
            )
        return tuple(found)


def _times(store: FeatureStore, places: set[Place]) -> TapTimes:
    """What a computer is asked for: positions of the timesteps of each array."""
    every = range(len(store.times))
    each = {t for name, t in places if store.array(name).timesteps == "each"}
    along = store.computed_spec.noise.kind == "inversion"  # which meets the largest label first
    first = max(every, key=lambda t: store.times[t].requested) if along else 0
    times: dict[str, set[int]] = {}
    for name, entry in places:
        kind = store.array(name).timesteps
        if kind == "each":
            times.setdefault(name, set()).add(entry)
        elif kind == "mean":
            times[name] = set(every)
        else:
            times[name] = {min(each) if each else first}
    return times


def _input_bytes(store: FeatureStore, unit: Unit, invalid: Sequence[InvalidRow]) -> int:
    """Bytes of the images that computing a unit reads: of all but those known to be of no use."""
    rows = store.index.slice(unit.start, unit.stop)
    sizes = np.asarray(rows.column("size"), np.int64)
    is_read = np.asarray(rows.column("reason").is_null())
    is_read[[row.row - unit.start for row in invalid if row.stage == "worker"]] = False
    return int(sizes[is_read].sum())


def _merged(first: Sequence[InvalidRow], second: Sequence[InvalidRow]) -> list[InvalidRow]:
    """Each invalid row once, in order of rows; the first reason counts."""
    rows = {row.row: row for row in (*second, *first)}
    return [rows[row] for row in sorted(rows)]


def _add(totals: dict[tuple[str, str], NonFinite], place: tuple[str, str], more: NonFinite) -> None:
    found = totals.get(place, NonFinite())
    totals[place] = NonFinite(nan=found.nan + more.nan, inf=found.inf + more.inf)


def _nested(counts: Mapping[tuple[str, str], T]) -> dict[str, dict[str, T]]:
    nested: dict[str, dict[str, T]] = {}
    for (name, time), n in counts.items():
        nested.setdefault(name, {})[time] = n
    return nested
