"""One unit of an import: read, check, cast, write; what an executor runs in each worker.

Shapes: n rows of the unit, t timestep.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
import torch

from drl_data.catalogue import Place
from drl_data.errors import redacted
from drl_data.extract import UnitResult, as_numpy, is_of, run_identity, unit_record
from drl_data.import_spec import ImportSpec, SourceArray
from drl_data.index import TarInfo
from drl_data.metering import ByteBudget, Clock
from drl_data.numerics import COUNTS_BYTES, NumericCounts
from drl_data.plan import InvalidRow, Lease
from drl_data.quantise import DamageMeter, from_storage, to_storage
from drl_data.receipts import Damage, TarRecord, UnitCounts
from drl_data.source_reader import Found, SourceReader, Value
from drl_data.spec import ArraySpec
from drl_data.stopping import Stop
from drl_data.store import FeatureStore
from drl_data.unit_features import UnitFeatures, empty_features

CAST_BYTES = 16 << 20
"""Of values that are cast at once."""

METERED_ROWS = 32
"""Of unit 0, whose damage by the cast is measured."""

CPU = torch.device("cpu")


def make_import_task(
    store_url: str, files: Sequence[TarInfo] | None, memory_bytes: int
) -> ImportTask:
    """Open the store and its catalogue: what an executor runs once in each worker.

    `files` says where the files are, if the catalogue's URLs have lost their secrets.

    Raises:
        StoreError: the catalogue is missing or damaged.
        InputError: URLs without their secrets.
    """
    store = FeatureStore.open(store_url)
    catalogue = store.catalogue()
    if files is not None:
        catalogue = catalogue.with_files(files)
    assert isinstance(store.spec, ImportSpec)
    return ImportTask(store, SourceReader(catalogue, store.spec.source), memory_bytes)


def row_shape(array: SourceArray, value: Value, n_times: int) -> tuple[int, ...] | str:
    """Shape of a row, without the axis of time; or why the value cannot be one."""
    shape = value.values.shape
    lead = (n_times,) if array.time_axis else ()
    if array.shape is not None:
        full = (*lead, *array.shape)
        is_flat = len(shape) == 1 and shape[0] == math.prod(full)
        return array.shape if shape == full or is_flat else f"shape {shape}, want {full}"
    if shape[: len(lead)] != lead:
        return f"shape {shape}: its first axis should be the {n_times} timesteps"
    return shape[len(lead) :]


class ImportTask:
    """Imports units of one store; safe to call from several threads."""

    def __init__(self, store: FeatureStore, reader: SourceReader, memory_bytes: int) -> None:
        assert isinstance(store.spec, ImportSpec)
        self._store, self._spec, self._reader = store, store.spec, reader
        self._identity = run_identity(CPU)
        self._budget = ByteBudget(memory_bytes)

    def __call__(self, lease: Lease, stop: Stop | None = None) -> UnitResult | None:
        """Read and write one unit; None if the lease only probes some rows.

        Raises:
            StoppedError: the run was told to stop.
            FeatureError: values that the spec does not allow.
            InputError: a file that changed since it was catalogued.
            ObjectError: storage that failed.
        """
        unit, stop = lease.unit, stop or Stop()
        stop.check_begin()
        if lease.probe is None:
            signed = self._store.receipt(unit)
            if signed is not None:
                return UnitResult(signed, computed=False)
        n_times = len(self._store.times)
        per_row = sum(
            a.n_cells(n_times) * (2 * a.bytes_per_row + COUNTS_BYTES) for a in self._store.arrays
        )
        with self._budget.reserve(unit.n_rows * per_row, stop.check_begin):
            work = _UnitImport(self._store, self._spec, self._reader, lease)
            work.read(stop)
            return None if lease.probe is not None else self._write(work)

    def _write(self, work: _UnitImport) -> UnitResult:
        unit, computed = work.unit, work.settled()
        run = unit_record(
            self._identity, self._store.index, unit, work.clock, work.lease.attempt, [computed], CPU
        ).model_copy(update={"tars": work.files})
        counts = UnitCounts(
            input_bytes=computed.input_bytes,
            clipped=computed.clipped,
            non_finite=computed.non_finite,
        )
        features = {name: as_numpy(x) for name, x in computed.features.items()}
        receipt = self._store.write(unit, features, computed.invalid, run, counts)
        return UnitResult(receipt, computed=is_of(receipt, run))


class _UnitImport:
    """The rows of one unit, on their way."""

    def __init__(
        self, store: FeatureStore, spec: ImportSpec, reader: SourceReader, lease: Lease
    ) -> None:
        self.unit, self.lease = lease.unit, lease
        self.clock = Clock(CPU)
        self.files: tuple[TarRecord, ...] = ()
        self._store, self._spec, self._reader = store, spec, reader
        self._out = UnitFeatures(empty_features(store, lease.unit))
        self._counts = NumericCounts(store, lease.unit, pinned=False)
        self._reasons: dict[int, tuple[str, str]] = {
            row: ("worker", reason) for row, reason in lease.poison
        }
        """Row -> stage and why it has no features."""
        self._meters: dict[str, list[DamageMeter]] = defaultdict(list)

    def read(self, stop: Stop) -> None:
        """Read and cast every array, place by place.

        Raises:
            as `ImportTask`.
        """
        unit, clock = self.unit, self.clock
        start, end = self.lease.probe or (unit.start, unit.stop)
        start, end = max(start, unit.start), min(end, unit.stop)
        numbers = self._reader.files_of(start, end)
        infos = [self._reader.catalogue.files[number] for number in numbers]
        self.files = tuple(
            TarRecord(url=redacted(info.url), size=info.size, etag=info.etag) for info in infos
        )
        self._reader.check(numbers, clock.retries)
        number = 0
        for source in self._spec.source.arrays:
            for at, name in enumerate(source.where):
                stop.check()
                places = {
                    row: place
                    for row, place in enumerate(
                        self._reader.catalogue.places(number, start, end), start
                    )
                    if row not in self._reasons or self._reasons[row][0] != "worker"
                }
                for row, place in places.items():
                    if place.reason is not None:
                        self._refuse(row, f"{name}: {place.reason}")
                with clock.stage("read"):
                    found = self._reader.read(number, places, clock.retries)
                with clock.stage("copy"):
                    self._keep(source, at, name, found)
                self._out.input_bytes += sum(self._n_bytes(p, found) for p in places.items())
                number += 1
        self._reader.check(numbers, clock.retries)

    def settled(self) -> UnitFeatures:
        """What was read, with counts and invalid rows.

        Raises:
            FeatureError: values that the spec does not allow.
        """
        out, keys = self._out, self._store.index.slice(self.unit.start, self.unit.stop)["key"]
        for row in self._reasons:
            self._counts.forget(row - self.unit.start)
        settled = self._counts.settle()
        out.clipped, out.non_finite = settled.clipped, settled.non_finite
        invalid = {row.row: row for row in settled.invalid}
        for row, (stage, reason) in self._reasons.items():
            key = keys[row - self.unit.start].as_py()
            invalid[row] = InvalidRow(row, key, stage, reason)
        out.invalid = [invalid[row] for row in sorted(invalid)]
        out.damage = {
            name: Damage(relative_rmse=measured[0], cosine=measured[1])
            for name, meters in self._meters.items()
            if (measured := DamageMeter.sum(meters).result()) is not None
        }
        return out

    def _refuse(self, row: int, reason: str) -> None:
        """The first reason counts."""
        self._reasons.setdefault(row, ("source", reason))

    def _n_bytes(self, item: tuple[int, Place], found: Found) -> int:
        row, place = item
        value = found.get(row)
        if place.size or not isinstance(value, Value):
            return place.size or 0
        return value.values.nbytes  # of Parquet, whose bytes are of many rows together

    def _keep(self, source: SourceArray, at: int, name: str, found: Found) -> None:
        """Values of one place into the cells that they are of."""
        spec, store = self._spec.source, self._store
        array = store.array(source.name)
        n_times = len(store.times) if source.time_axis else 1
        view, time = divmod(at, 1 if source.time_axis else store.n_times(source.name))
        good: dict[int, Value] = {}
        wanted = source.model_copy(update={"shape": array.shape})
        for row, value in found.items():
            reason = value if isinstance(value, str) else None
            if isinstance(value, Value):
                shape = row_shape(wanted, value, len(spec.timesteps))
                reason = shape if isinstance(shape, str) else self._other_type(value, array)
                good[row - self.unit.start] = value
            if reason is not None:
                self._refuse(row, f"{name}: {reason}")
                good.pop(row - self.unit.start, None)
        dtype = np.result_type(np.float16, *(value.values.dtype for value in good.values()))
        values = np.zeros((self.unit.n_rows, n_times, *array.shape), dtype)
        for i, value in good.items():
            values[i] = value.values.reshape(values.shape[1:])
        for t in range(n_times):
            cell = array.cell(t if source.time_axis else time, view, len(store.times))
            self._cast(array, cell, values[:, t], good)

    def _other_type(self, value: Value, array: ArraySpec) -> str | None:
        """Why a value cannot be in a store that keeps the types of the files."""
        if self._spec.dtype is not None or value.dtype == array.dtype:
            return None
        return f"{value.dtype}, the first sample has {array.dtype}; say `source.dtype`"

    def _cast(
        self,
        array: ArraySpec,
        cell: int,
        values: npt.NDArray[np.generic],
        good: Collection[int],
    ) -> None:
        """Rows [n, *shape] of one cell to the type that they are stored in."""
        clip, fill = (x == "clip" for x in (self._spec.overflow, self._spec.non_finite))
        step = max(CAST_BYTES // max(values[:1].nbytes, 1), 1)
        exact = torch.from_numpy(np.ascontiguousarray(values))
        for start in range(0, len(exact), step):
            x = exact[start : start + step]
            stored, counts = to_storage(x, array, clip=clip, fill=fill)
            self._counts.keep(array.name, cell, start, counts)
            for part, cast in stored.items():
                self._out.features[part][cell][start : start + len(x)] = cast
            first = [i for i in range(min(len(x), METERED_ROWS - start)) if start + i in good]
            if self.unit.id == 0 and first:
                meter = DamageMeter()
                kept = {name: cast[first] for name, cast in stored.items()}
                meter.add(x[first], from_storage(kept, array))
                self._meters[array.name].append(meter)
