"""Do stored features come out again? Random rows are extracted anew and compared with the store.

Checksums say that a store is what was written; this says that what was written is what the spec
says: it finds other weights, other noise, other images, and a broken GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
from torch import Tensor

from drl_data.compare import compare_rows, relative_difference, tolerance
from drl_data.errors import InputError, SpecError
from drl_data.extract import ExtractTask, as_numpy, make_task
from drl_data.pipeline import Pipeline
from drl_data.plan import Unit
from drl_data.receipts import Receipt
from drl_data.shards import Array
from drl_data.spec import ArraySpec
from drl_data.stopping import Stop
from drl_data.store import FeatureStore
from drl_data.unit_features import Selection


@dataclass(frozen=True)
class Difference:
    """A row that came out otherwise."""

    row: int
    key: str
    unit: int
    what: str

    def __str__(self) -> str:
        return f"row {self.row} (key {self.key!r}, unit {self.unit}): {self.what}"


@dataclass
class SpotCheck:
    """What came of a check."""

    n_rows: int = 0
    """Rows with features that were compared: those drawn, and the others of their batches."""
    n_invalid: int = 0
    """Rows without features that were tried again."""
    n_equal: int = 0
    """Of `n_rows`, equal bit for bit in every array."""
    largest: dict[str, float] = field(default_factory=dict)
    """Array -> largest |a - b| / |b| of a row, at one timestep of one view, b being stored."""
    differences: list[Difference] = field(default_factory=list)


def spot_check(
    store: FeatureStore,
    pipeline: Pipeline,
    n_rows: int,
    *,
    seed: int = 0,
    device: str | None = None,
) -> SpotCheck:
    """Extract `n_rows` random rows with features, and as many without, and compare.

    Whole batches are computed, as they were for the store, and compared row by row. Rows must be
    within `compare.tolerance`, and equal bit for bit where the unit was computed on this machine's
    CPU by the same versions. Rows that killed their workers are not touched. The pipeline says
    where the model is; nothing is written.

    Raises:
        StoreMismatchError: the pipeline's model or files are not those of the store.
        InputError: no unit is done; a tar that is gone or has changed.
        SpecError: a pipeline without a backbone.
    """
    if pipeline.backbone is None:
        raise SpecError(f"pipeline {pipeline.name!r} lacks backbone; extracting again needs it")
    chosen = _chosen_rows(store, n_rows, seed)
    task = make_task(
        store.url,
        pipeline.backbone,
        pipeline.condition,
        pipeline.run,
        n_cpus=1,
        device=device,
        noise_file=pipeline.noise.file,
        read_only=True,
    )
    result = SpotCheck(largest={array.name: 0.0 for array in store.features})
    for unit in store.units:
        rows = chosen[unit.start : unit.stop]
        receipt = store.receipt(unit) if rows.any() else None
        if receipt is not None:
            _check_unit(store, task, receipt, rows, result)
    return result


def _chosen_rows(store: FeatureStore, n_rows: int, seed: int) -> npt.NDArray[np.bool_]:
    """Random rows of the units that are done, of each status, [n_samples]."""
    status = store.samples()["status"]
    chosen = np.zeros(store.spec.n_samples, np.bool_)
    generator = np.random.default_rng(seed)
    for wanted in ("ok", "invalid"):
        rows = np.flatnonzero(pc.equal(status, wanted).to_numpy(zero_copy_only=False))
        chosen[generator.choice(rows, min(n_rows, len(rows)), replace=False)] = True
    if not chosen.any():
        raise InputError(f"{store.url}: no unit is done, so there is nothing to check")
    return chosen


def _check_unit(
    store: FeatureStore,
    task: ExtractTask,
    receipt: Receipt,
    rows: npt.NDArray[np.bool_],
    result: SpotCheck,
) -> None:
    unit = store.units[receipt.unit]
    size = store.computed_spec.batch_size
    batches = np.repeat([rows[at : at + size].any() for at in range(0, unit.n_rows, size)], size)
    selection = Selection(rows=batches[: unit.n_rows])
    poison = [(row.row, row.reason) for row in receipt.invalid if row.stage == "worker"]
    with task.room(unit, Stop()):
        computed = task.compute(unit, selection, poison=poison)
        listed = {row.row: f"{row.stage}: {row.reason}" for row in receipt.invalid}
        found = {row.row: f"{row.stage}: {row.reason}" for row in computed.invalid}
        computed_rows = (np.flatnonzero(batches[: unit.n_rows]) + unit.start).tolist()
        keys = store.index.slice(unit.start, unit.stop)["key"]

        def differs(row: int, what: str) -> None:
            key = keys[row - unit.start].as_py()
            result.differences.append(Difference(row, key, unit.id, what))

        for row in computed_rows:
            if row in listed and row not in found:
                differs(row, f"listed as invalid ({listed[row]}), and now it has features")
            if row in found and row not in listed:
                differs(row, f"has features, and now it is invalid ({found[row]})")
        both = np.array([r for r in computed_rows if r not in listed and r not in found], np.int64)
        result.n_rows += len(both)
        result.n_invalid += sum(row in listed for row in computed_rows)
        unequal: set[int] = set()
        for row, where, relative, limit in _compared(
            store, unit, both, computed.features, _is_exact(task, receipt), result, unequal
        ):
            differs(
                row,
                f"{where}: relative difference {relative:.3g} of the row, want at most {limit:.3g}",
            )
        result.n_equal += len(both) - len(unequal)


def _is_exact(task: ExtractTask, receipt: Receipt) -> bool:
    """Whether a unit was computed by this machine's CPU, by the same versions."""
    then, now = receipt.run, task.identity
    same = (then.device, then.host, then.versions) == (now.device, now.host, now.versions)
    return now.device == "cpu" and same


def _compared(
    store: FeatureStore,
    unit: Unit,
    rows: npt.NDArray[np.int64],
    features: Mapping[str, Tensor],
    exact: bool,
    result: SpotCheck,
    unequal: set[int],
) -> Iterator[tuple[int, str, float, float]]:
    """(row, place, relative difference, limit) of each row of an array that is beyond its limit."""
    if not len(rows):
        return
    for array in store.features:
        limit = 0.0 if exact else tolerance(store.spec.backbone_dtype, array.dtype)
        for cell in range(store.n_cells(array.name)):
            view, t = divmod(cell, store.n_times(array.name))
            parts = store.parts(array.name)
            stored = {part: store.read_rows(part, t, rows, view) for part in parts}
            mine = {part: as_numpy(features[part][cell])[rows - unit.start] for part in parts}
            if compare_rows(array, mine, stored, limit).equal:
                continue
            relative = relative_difference(array, mine, stored)
            result.largest[array.name] = max(result.largest[array.name], float(relative.max()))
            differing = _differing(mine, stored)
            unequal.update(rows[differing].tolist())
            for i in np.flatnonzero(differing if exact else relative > limit):
                yield int(rows[i]), _place(store, array, t, view), float(relative[i]), limit


def _differing(mine: Mapping[str, Array], stored: Mapping[str, Array]) -> npt.NDArray[np.bool_]:
    """Whether each row has other bits, [n]."""
    n = len(next(iter(mine.values())))
    differing = np.zeros(n, np.bool_)
    for part, x in mine.items():
        a, b = (np.ascontiguousarray(v).reshape(n, -1).view(np.uint8) for v in (x, stored[part]))
        differing |= (a != b).any(axis=1)
    return differing


def _place(store: FeatureStore, array: ArraySpec, t: int, view: int) -> str:
    place = array.name
    if array.timesteps == "each":
        place += f", timestep {store.times[t].requested:g}"
    names = store.spec.view_names
    return f"{place}, view {names[view]}" if names else place
