"""Features of one unit, or of a part of it: the batches through the computer, into host memory.

The part may be some rows (the others keep their places in the batches, as zeros) and, of each
array, some timesteps. What is computed does not depend on the part, bit for bit.

Shapes: b batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
from torch import Tensor

from drl_data.backbones import Conditioning
from drl_data.conditions import SampleConditions
from drl_data.device_memory import MicroBatches, is_out_of_memory
from drl_data.errors import HostMemoryError
from drl_data.features import FeatureComputer
from drl_data.images import ImageBatch
from drl_data.metering import Clock
from drl_data.numerics import NumericCounts
from drl_data.plan import InvalidRow, Unit
from drl_data.quantise import DamageMeter, from_storage, storage_buffer, to_storage
from drl_data.receipts import Damage, NonFinite
from drl_data.spec import ImageSpec
from drl_data.store import FeatureStore
from drl_data.tap_reducer import TapTimes


@dataclass(frozen=True)
class Selection:
    """The part of a unit that is computed."""

    rows: npt.NDArray[np.bool_] | None = None
    """[unit.n_rows]; None for all."""
    times: TapTimes | None = None
    """Positions of the timesteps of each feature array (not of scales and offsets, which come with
    theirs); None for all. As `FeatureComputer.compute` has it."""


WHOLE = Selection()


@dataclass
class UnitFeatures:
    """What computing a unit leaves for the writer."""

    features: dict[str, Tensor]
    """Array -> [n_cells, unit.n_rows, *shape] of the stored type, on the host. Entries that were
    not asked for, and those of invalid rows, mean nothing."""
    invalid: list[InvalidRow] = field(default_factory=list)
    """Rows without features, of those that were asked for, in increasing order."""
    input_bytes: int = 0
    clipped: dict[str, dict[str, int]] = field(default_factory=dict)
    non_finite: dict[str, dict[str, NonFinite]] = field(default_factory=dict)
    """Both as `UnitCounts` has them; of the rows that were computed."""
    damage: dict[str, Damage] = field(default_factory=dict)
    micro_batch: int | None = None


def empty_features(store: FeatureStore, unit: Unit, *, pinned: bool = False) -> dict[str, Tensor]:
    """Host memory for the features of a unit, as `UnitFeatures.features` has them.

    Raises:
        HostMemoryError: there is not so much that the GPU can write to.
    """
    cells = {array.name: store.n_cells(array.name) for array in store.arrays}
    try:
        return {
            array.name: storage_buffer(array, (cells[array.name], unit.n_rows), pinned=pinned)
            for array in store.arrays
        }
    except RuntimeError as error:
        if not (pinned and is_out_of_memory(error)):
            raise
        n_bytes = unit.n_rows * sum(a.bytes_per_row * cells[a.name] for a in store.arrays)
        raise HostMemoryError(
            f"{store.url}, unit {unit.id}: the host cannot pin {n_bytes} bytes of memory for its "
            "features; set a smaller `run.leases` or `features.rows_per_unit`"
        ) from error


class UnitPass:
    """One pass over the batches of a unit, by one computer in one thread."""

    def __init__(
        self,
        store: FeatureStore,
        unit: Unit,
        computer: FeatureComputer,
        conditions: SampleConditions,
        selection: Selection = WHOLE,
        *,
        clock: Clock,
        micro_batches: MicroBatches,
        ask: Callable[[], None],
        into: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`ask` is called before each forward, and may raise to end the pass. `into` has the memory
        that is filled, if there is any."""
        self._store, self._unit, self._spec = store, unit, store.computed_spec
        _check_times(store, selection.times or {})
        self._computer, self._conditions, self._selection = computer, conditions, selection
        self._clock, self._ask, self._micro_batches = clock, ask, micro_batches
        pinned = computer.backbone.device.type == "cuda"
        made = empty_features(store, unit, pinned=pinned) if into is None else dict(into)
        self._out = UnitFeatures(made)
        self._counts = NumericCounts(store, unit, pinned=pinned)
        self._meters: dict[str, dict[tuple[int, int, int], DamageMeter]] = defaultdict(dict)

    def run(self, batches: Iterator[ImageBatch]) -> UnitFeatures:
        """Compute what was asked for of all batches.

        Raises:
            FeatureError: features not finite, or past the range of their type, where the spec says
                that this is an error.
        """
        for batch in self._clock.waiting(batches):
            self._ask()
            self._take(batch)
        self._clock.synchronize()
        settled = self._counts.settle()
        self._out.clipped, self._out.non_finite = settled.clipped, settled.non_finite
        self._out.invalid = _merged(self._out.invalid, settled.invalid)
        self._out.damage = {
            name: Damage(relative_rmse=found[0], cosine=found[1])
            for name, meters in self._meters.items()
            if (found := DamageMeter.sum(meters.values()).result()) is not None
        }
        self._out.micro_batch = self._micro_batches.size
        return self._out

    def _take(self, batch: ImageBatch) -> None:
        clock, out = self._clock, self._out
        clock.add("read", batch.read_s)
        clock.add("decode", batch.decode_s)
        out.input_bytes += batch.n_bytes
        chosen = self._chosen(batch)
        with clock.stage("condition"):
            told = self._conditions.batch(batch.start, batch.n_rows, len(batch.pixels))
        lacking = [row for row in told.invalid if chosen[row.row - batch.start]]
        invalid = _merged(batch.invalid, lacking)
        out.invalid.extend(invalid)
        for row in invalid:
            chosen[row.row - batch.start] = False
        runs = _runs(chosen)
        if not runs:
            return
        for view, keys in enumerate(noise_keys(batch, self._spec.images)):
            self._micro_batches.run(
                len(batch.pixels),
                partial(self._compute, batch, runs, view, keys, told.conditioning),
            )

    def _compute(
        self,
        batch: ImageBatch,
        runs: Sequence[tuple[int, int]],
        view: int,
        keys: Sequence[str],
        told: Conditioning,
        start: int,
        stop: int,
    ) -> None:
        """Rows `start` to `stop` of a batch in one view, at all timesteps; done twice is done once,
        where memory did not suffice the first time."""
        inside = [(max(a, start), min(b, stop)) for a, b in runs if a < stop and b > start]
        if not inside:
            return
        for t, captured in self._computer.compute(
            batch.of_view(view)[start:stop],
            keys[start:stop],
            self._clock,
            told.rows(start, stop),
            self._selection.times,
        ):
            with self._clock.stage("copy"):
                self._keep(batch, inside, t, view, captured, start)
            self._ask()

    def _chosen(self, batch: ImageBatch) -> npt.NDArray[np.bool_]:
        """Whether each row of a batch is asked for, [batch.n_rows]."""
        at = batch.start - self._unit.start
        if self._selection.rows is None:
            return np.ones(batch.n_rows, np.bool_)
        return self._selection.rows[at : at + batch.n_rows].copy()

    def _keep(
        self,
        batch: ImageBatch,
        runs: Sequence[tuple[int, int]],
        t: int,
        view: int,
        captured: Mapping[str, Tensor],
        first: int,
    ) -> None:
        """Cast features [b, *shape] of a timestep, of the batch's rows from `first`, and copy the
        runs of rows to the host."""
        at = batch.start - self._unit.start
        metered = self._unit.id == 0 and at == 0
        clip, fill = (x == "clip" for x in (self._spec.overflow, self._spec.non_finite))
        for name, x in captured.items():
            array = self._store.array(name)
            cell = array.cell(t, view, len(self._store.times))
            for start, stop in runs:
                exact = x[start - first : stop - first]
                stored, counts = to_storage(exact, array, clip=clip, fill=fill)
                self._counts.keep(name, cell, at + start, counts)
                for part, cast in stored.items():
                    host = self._out.features[part][cell]
                    host[at + start : at + stop].copy_(cast, non_blocking=True)
                if metered:
                    meter = self._meters[name][t, view, start] = DamageMeter()
                    meter.add(exact, from_storage(stored, array))


def _check_times(store: FeatureStore, times: TapTimes) -> None:
    for name, wanted in times.items():
        array = store.array(name)
        assert array.quantises is None, f"{name!r} comes with {array.quantises!r}"
        averaged = array.timesteps == "mean" and wanted
        assert not averaged or len(set(wanted)) == len(store.times), f"{name!r}: a mean over all"


def noise_keys(batch: ImageBatch, images: ImageSpec) -> Iterator[list[str]]:
    """What the noise of each row is seeded by, for each view: the sample's key, and for views but
    the image itself also the view's name. Rows past the end have the key ""."""
    rest = [""] * (len(batch.pixels) - batch.n_rows)
    for name in images.view_names or ("id",):
        suffix = "" if name == "id" else f"\x1f{name}"
        yield [*(f"{key}{suffix}" for key in batch.keys), *rest]


def _merged(first: Sequence[InvalidRow], second: Sequence[InvalidRow]) -> list[InvalidRow]:
    """Each invalid row once, in order of rows; the first reason counts."""
    rows = {row.row: row for row in (*second, *first)}
    return [rows[row] for row in sorted(rows)]


def _runs(chosen: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """(start, stop) of each run of chosen rows: slices travel without waiting for the device."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
