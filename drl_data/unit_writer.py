"""One unit into a store: check everything, put what is absent, sign what is there (STORE.md, 5).

Objects are write-once: the first writer of an object wins, and nothing is ever overwritten. So an
attempt that was presumed dead and wakes up cannot change what a receipt has signed. Who finds an
object there compares it with its own: equal bytes are a retry; rounding differences of another
device or attempt are adopted, and the receipt signs what is there; anything else is a conflict.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from drl_data.compare import Comparison, compare_rows, tolerance
from drl_data.errors import (
    AlignmentError,
    ConflictError,
    FeatureError,
    ObjectError,
    ObjectNotFoundError,
    StoreError,
)
from drl_data.objects import Buffer, RetryCount, counted
from drl_data.plan import InvalidRow, Unit
from drl_data.receipts import ObjectRecord, Receipt, RunRecord, UnitCounts, receipt_path
from drl_data.shard_reader import in_threads
from drl_data.shards import Array, crc32c, non_finite_rows
from drl_data.spec import ArraySpec

if TYPE_CHECKING:
    from drl_data.store import FeatureStore

Parts = Sequence[Buffer]

MAX_PUTS = 10
"""Times that an object is put which is there, and gone when it is read."""


@dataclass(frozen=True)
class Group:
    """Shards that mean something only together: features, and the scales that they decode with."""

    array: ArraySpec
    cell: int
    paths: Mapping[str, str]
    """Array name -> path."""


def groups(store: FeatureStore, unit: Unit) -> list[Group]:
    """The feature shards of a unit, each with those of its scales and offsets."""
    return [
        Group(
            array,
            cell,
            {
                name: store.layouts[name].path(name, cell, unit.id)
                for name in store.parts(array.name)
            },
        )
        for array in store.features
        for cell in range(store.n_cells(array.name))
    ]


@dataclass(frozen=True)
class _Attempt:
    """What this writer has of a unit."""

    unit: Unit
    holes: list[int]
    """Positions of the invalid rows in the unit."""
    objects: Mapping[str, Parts]
    """Path -> bytes, of those that were not there already as copies."""
    receipt: Receipt


@dataclass(frozen=True)
class _Found:
    """What is in the store now of some objects of a unit, and what is wrong with it."""

    records: tuple[ObjectRecord, ...]
    adopted: tuple[str, ...] = ()
    conflict: str | None = None


class UnitWriter:
    """Writes one unit of a store: see `FeatureStore.write`."""

    def __init__(self, store: FeatureStore) -> None:
        self._store = store
        self._retries = RetryCount()
        self._folder = counted(store.folder, self._retries)

    def write(
        self,
        unit: Unit,
        features: Mapping[str, Array],
        invalid: Sequence[InvalidRow],
        run: RunRecord,
        counts: UnitCounts,
        present: Sequence[ObjectRecord] = (),
    ) -> Receipt:
        """Write one unit and sign it, or agree with who has."""
        started = time.perf_counter()
        store = self._store
        check_unit(store, unit)
        invalid = sorted(invalid, key=lambda row: row.row)
        holes = self._check_invalid(unit, invalid)
        records = {record.path: record for record in present}
        self._check_features(unit, features, holes, records.keys())
        objects: dict[str, Parts] = {
            path: store.layouts[name].parts(features[name][cell], holes)
            for name, cell, path in store.shards(unit)
            if path not in records
        }
        valid_path = f"valid/c/{unit.id}"
        objects[valid_path] = [store.valid_chunk(unit, invalid)]
        records |= {path: record_of(path, parts) for path, parts in objects.items()}
        mine = Receipt(
            fingerprint=store.fingerprint,
            unit=unit.id,
            start=unit.start,
            stop=unit.stop,
            n_ok=unit.n_rows - len(holes),
            n_invalid=len(holes),
            invalid=tuple(invalid),
            counts=self._with_digest(unit, counts),
            objects=tuple(
                records[path] for path in (*(p for _, _, p in store.shards(unit)), valid_path)
            ),
            run=run,
        )
        attempt = _Attempt(unit, holes, objects, mine)
        signed = store.receipt(unit)
        if signed is not None:
            return self._agreed(attempt, signed)
        receipt = _signing(mine, self._put_all(attempt))
        changes = {
            "seconds": {**run.seconds, "write": time.perf_counter() - started},
            "retries": run.retries + self._retries.value,
        }
        receipt = receipt.model_copy(update={"run": receipt.run.model_copy(update=changes)})
        if self._folder.put_if_absent(receipt_path(unit), [receipt.to_json()]):
            return receipt
        signed = store.receipt(unit)
        if signed is None:
            raise StoreError(f"{self._place(unit)}: its receipt was deleted while it was written")
        return self._agreed(replace(attempt, receipt=receipt), signed)

    def _place(self, unit: Unit) -> str:
        return f"{self._store.url}, unit {unit.id}"

    # --- checks, before the first byte ----------------------------------------------------------

    def _with_digest(self, unit: Unit, counts: UnitCounts) -> UnitCounts:
        """The counts with the digest of the unit's samples.

        Raises:
            FeatureError: they have another, so the features are of other samples.
        """
        samples = self._store.index.digest_rows(unit.start, unit.stop)
        if counts.samples not in ("", samples):
            raise FeatureError(
                f"{self._place(unit)}: features of samples with the digest {counts.samples}; the "
                f"store's index has {samples} in rows {unit.start}..{unit.stop}"
            )
        return counts.model_copy(update={"samples": samples})

    def _check_invalid(self, unit: Unit, invalid: Sequence[InvalidRow]) -> list[int]:
        """Positions of the invalid rows in the unit."""
        holes = [row.row - unit.start for row in invalid]
        if len(set(holes)) != len(holes) or any(not 0 <= h < unit.n_rows for h in holes):
            raise FeatureError(
                f"{self._place(unit)}: invalid rows {[row.row for row in invalid]}; want distinct "
                f"rows of {unit.start}..{unit.stop}"
            )
        return holes

    def _check_features(
        self,
        unit: Unit,
        features: Mapping[str, Array],
        holes: Sequence[int],
        present: Collection[str],
    ) -> None:
        store = self._store
        names = [a.name for a in store.arrays]
        wanted = {name for name, _, path in store.shards(unit) if path not in present}
        if not wanted <= features.keys() <= set(names):
            missing = sorted(wanted - features.keys())
            unknown = sorted(features.keys() - set(names))
            raise FeatureError(
                f"{self._place(unit)}: arrays missing {missing}, unknown {unknown}; want exactly "
                f"{names}"
            )
        for name, array in features.items():
            layout = store.layouts[name]
            want = (store.n_cells(name), unit.n_rows, *layout.row_shape)
            if array.shape != want or array.dtype != layout.stored:
                raise FeatureError(
                    f"{self._place(unit)}, tap {name!r}: {array.dtype.name} {array.shape}, want "
                    f"{layout.stored.name} {want} (timestep, row, ...)"
                )
        for name, cell, path in store.shards(unit):
            if path in present:
                continue
            rows = features[name][cell]
            bad = np.setdiff1d(non_finite_rows(rows, store.layouts[name].dtype), holes)
            if bad.size:
                row = unit.start + int(bad[0])
                raise FeatureError(
                    f"{self._place(unit)}, tap {name!r}, timestep {store.time_of(name, cell)}: "
                    f"{bad.size} rows are not finite, the first is row {row} (key "
                    f"{store.index.table['key'][row].as_py()!r}); want finite values. Store "
                    "as bfloat16 or float32, or set `overflow: clip`"
                )

    # --- putting, once --------------------------------------------------------------------------

    def _put_all(self, mine: _Attempt) -> list[_Found]:
        """Put what is absent; what is in the store then, for each group and for `valid`.

        Raises:
            ConflictError: something else is there already.
        """
        unit, objects = mine.unit, mine.objects
        records = {record.path: record for record in mine.receipt.objects}

        def put_group(group: Group) -> _Found:
            stored = {
                name: self._put(path, objects[path], records[path])
                for name, path in group.paths.items()
                if path in objects
            }
            kept = {name: data for name, data in stored.items() if data is not None}
            found = tuple(
                record_of(path, [kept[name]]) if name in kept else records[path]
                for name, path in group.paths.items()
            )
            if not kept:
                return _Found(found)
            # What will be read is the group as it is now, whoever wrote which part of it.
            conflict = self._conflict_in(mine, group, kept)
            adopted = tuple(group.paths[name] for name in kept)
            return _Found(found, adopted, conflict)

        found = in_threads(put_group, groups(self._store, unit))
        path = f"valid/c/{unit.id}"  # after the shards: until then the rows are not there
        there = self._put(path, objects[path], records[path])
        others = None if there is None else _other_rows(mine, there)
        found.append(_Found((records[path],), conflict=others))
        conflicts = [one.conflict for one in found if one.conflict is not None]
        if conflicts:
            raise ConflictError(
                f"{self._place(unit)}: an unfinished attempt left other content: "
                f"{'; '.join(conflicts)}. Nothing of it was overwritten, and nothing signed; "
                "`drl extract --repair` removes what it left and computes the unit anew"
            )
        return found

    def _put(self, path: str, parts: Parts, mine: ObjectRecord) -> memoryview | None:
        """Put an object unless it is there; the bytes that are, if they are not mine."""
        for _ in range(MAX_PUTS):
            if self._folder.put_if_absent(path, parts):
                return None
            try:
                data = self._folder.get(path)
            except ObjectNotFoundError:
                continue  # a repair took it away
            if len(data) == mine.n_bytes:
                return None if _equal(data, parts) else data
            # Not of the layout's size, so no writer's: torn, where a put is not whole or nothing.
            self._folder.delete(path)
        raise ObjectError(
            f"{self._store.url}/{path}: there when it is put and gone when it is read, {MAX_PUTS} "
            "times; does another `drl extract --repair` run on this store?"
        )

    def _conflict_in(self, mine: _Attempt, group: Group, there: Mapping[str, Buffer]) -> str | None:
        """What keeps the objects of a group that are in the store, by array, from being mine but
        for rounding; those that are not in `there` are mine."""
        stored: dict[str, Array] = {}
        own: dict[str, Array] = {}
        for name, path in group.paths.items():
            layout = self._store.layouts[name]
            shard = np.frombuffer(b"".join(mine.objects[path]), np.uint8)
            other = np.frombuffer(there[name], np.uint8) if name in there else shard
            end = mine.unit.n_rows * layout.row_bytes
            if len(other) != len(shard) or not np.array_equal(other[end:], shard[end:]):
                return f"{path} is no shard of this layout ({len(other)} bytes)"
            for parts, data in ((own, shard), (stored, other)):
                rows = layout.rows(data, mine.unit.n_rows)
                assert rows is not None
                parts[name] = rows
            for row in mine.holes:
                if own[name][row].tobytes() != stored[name][row].tobytes():
                    return f"{path}: row {mine.unit.start + row} is invalid here, and not there"
        limit = tolerance(self._store.spec.backbone_dtype, group.array.dtype)
        found = compare_rows(group.array, stored, own, limit, start=mine.unit.start)
        return None if found.within else self._described(group, found, limit)

    def _described(self, group: Group, found: Comparison, limit: float) -> str:
        what = f"{found.n_beyond} of {found.n_rows} rows differ by more than {limit:.2g}"
        if found.n_validity:
            what += f" ({found.n_validity} are invalid there, and not here)"
        return (
            f"{group.array.name} at timestep {self._store.time_of(group.array.name, group.cell)}: "
            f"{what}, the most by {found.largest:.3g}, the first is row {found.first}"
        )

    # --- agreeing with a receipt ----------------------------------------------------------------

    def _agreed(self, mine: _Attempt, signed: Receipt) -> Receipt:
        """The receipt in the store, if it says the same as mine.

        Counts of values may differ where features do in the last bits, and reasons in their words;
        other rows, samples, fits or objects are a conflict. Nothing is read where checksums agree.
        """
        conflicts = self._conflicts(mine, signed)
        if not conflicts:
            return signed
        then, now = signed.run, mine.receipt.run
        raise ConflictError(
            f"{self._place(mine.unit)}: signed before with other content: {'; '.join(conflicts)}. "
            f"Nothing of it was overwritten. Signed by attempt {then.attempt} on {then.host} "
            f"({then.device}, {then.versions}); this is attempt {now.attempt} on {now.host} "
            f"({now.device}, {now.versions}). If `drl verify --deep` finds the store's bytes "
            "damaged, `drl extract --repair` computes them anew; if it does not, find out what "
            "differs between the two runs"
        )

    def _conflicts(self, mine: _Attempt, signed: Receipt) -> list[str]:
        receipt = mine.receipt
        if signed.fingerprint != receipt.fingerprint or signed.unit != receipt.unit:
            return [f"the receipt is of unit {signed.unit} of fingerprint {signed.fingerprint}"]
        theirs, ours = (tuple(row.row for row in one.invalid) for one in (signed, receipt))
        if theirs != ours:
            return [f"invalid rows {list(theirs)} there, {list(ours)} here"]
        conflicts = []
        if signed.counts.samples not in ("", receipt.counts.samples):
            conflicts.append("other samples (counts.samples)")
        if signed.counts.fits != receipt.counts.fits:
            conflicts.append(f"fits {signed.counts.fits} there, {receipt.counts.fits} here")
        records = {record.path: record for record in signed.objects}
        paths = {one.path for one in receipt.objects}
        if records.keys() != paths:
            return [*conflicts, f"objects {sorted(records.keys() ^ paths)} in one only"]
        differing = {one.path for one in receipt.objects if records[one.path] != one}
        doubtful = [
            group
            for group in groups(self._store, mine.unit)
            if not differing.isdisjoint(group.paths.values())
        ]

        def judge(group: Group) -> str | None:
            if not mine.objects.keys() & group.paths.values():
                return f"{group.array.name} is a copy of another store here, and not there"
            try:
                there = {name: self._folder.get(path) for name, path in group.paths.items()}
            except ObjectNotFoundError as error:
                return f"{error}, though the receipt lists it"
            return self._conflict_in(mine, group, there)

        conflicts += [line for line in in_threads(judge, doubtful) if line is not None]
        if f"valid/c/{mine.unit.id}" in differing:
            conflicts.append(f"valid/c/{mine.unit.id} has another checksum")
        return conflicts


def _signing(mine: Receipt, found: Sequence[_Found]) -> Receipt:
    """The receipt of what is in the store: with the checksums of objects that were kept."""
    records = {record.path: record for one in found for record in one.records}
    adopted = tuple(sorted(path for one in found for path in one.adopted))
    return mine.model_copy(
        update={
            "objects": tuple(records[record.path] for record in mine.objects),
            "run": mine.run.model_copy(update={"adopted": adopted}),
        }
    )


def _other_rows(mine: _Attempt, valid: Buffer) -> str:
    there = np.flatnonzero(np.frombuffer(valid, np.uint8)[: mine.unit.n_rows] != 1)
    rows = [[mine.unit.start + row for row in holes] for holes in (there.tolist(), mine.holes)]
    return f"invalid rows {rows[0]} there, {rows[1]} here"


def check_unit(store: FeatureStore, unit: Unit) -> None:
    """Refuse rows that are not one whole unit.

    Raises:
        AlignmentError: it is not one of `store.units`.
    """
    if not 0 <= unit.id < len(store.units) or store.units[unit.id] != unit:
        raise AlignmentError(
            f"{store.url}: rows {unit.start}..{unit.stop} as unit {unit.id} are not one whole "
            f"unit of {store.spec.rows_per_unit} rows; two writers of one shard lose rows. "
            "Take units from `store.units` or `store.pending()`"
        )


def record_of(path: str, parts: Parts) -> ObjectRecord:
    """Size and checksum of an object."""
    n_bytes = sum(memoryview(part).nbytes for part in parts)
    return ObjectRecord(path=path, n_bytes=n_bytes, crc32c=crc32c(parts))


def _equal(data: memoryview, parts: Parts) -> bool:
    """Whether the bytes are the concatenation of `parts`, of the same length."""
    start = 0
    for part in parts:
        view = memoryview(part).cast("B")
        if data[start : start + len(view)] != view:
            return False
        start += len(view)
    return True
