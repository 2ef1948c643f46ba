"""Units of work: runs of consecutive rows, each exactly one Zarr shard of every array.

The plan is a value. It is made before any GPU is asked for, from shapes given as a value, and it
names work by its rows, so that it does not change with the number of workers, their order, or the
executor (design, invariant 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from drl_data.errors import SpecError
from drl_data.spec import ArraySpec

TARGET_SHARD_BYTES = 64 << 20
"""Size that `rows_per_unit: auto` aims at for the largest array (one PUT, one GET)."""

MAX_ROWS_PER_UNIT = 16384


@dataclass(frozen=True, order=True)
class Unit:
    """Rows `start` (inclusive) to `stop` (exclusive) of the index; `id` counts from 0."""

    id: int
    start: int
    stop: int

    @property
    def n_rows(self) -> int:
        """Number of rows in the unit."""
        return self.stop - self.start


@dataclass(frozen=True)
class Lease:
    """What a worker is asked for: a unit, with what earlier attempts taught."""

    unit: Unit
    attempt: int = 1
    """Counts from 1."""
    poison: tuple[tuple[int, str], ...] = ()
    """(row, why) of rows that killed their worker: invalid without being read."""
    probe: tuple[int, int] | None = None
    """Compute rows `start` to `stop` of the unit alone and write nothing: the search for poison."""


@dataclass(frozen=True)
class InvalidRow:
    """A row without features: where it failed and why. Nothing is ever dropped without one."""

    row: int
    key: str
    stage: str
    reason: str


@dataclass(frozen=True)
class ArrayCost:
    """Size of one array of the store: bytes per sample and in all, and the number of objects."""

    name: str
    bytes_per_sample: int
    bytes_total: int
    n_objects: int


@dataclass(frozen=True)
class Estimate:
    """What a run will write, known from shapes alone."""

    n_samples: int
    n_units: int
    n_timesteps: int
    arrays: tuple[ArrayCost, ...]

    @property
    def bytes_total(self) -> int:
        """Bytes of all feature arrays together."""
        return sum(a.bytes_total for a in self.arrays)

    @property
    def n_objects(self) -> int:
        """Feature objects, one validity object and one receipt per unit."""
        return sum(a.n_objects for a in self.arrays) + 2 * self.n_units


def plan_units(n_samples: int, rows_per_unit: int) -> list[Unit]:
    """Cut rows 0..n_samples-1 into units of `rows_per_unit` rows; the last one may be shorter.

    Raises:
        SpecError: if either number is not positive.
    """
    if n_samples < 1 or rows_per_unit < 1:
        raise SpecError(
            f"plan: n_samples={n_samples}, rows_per_unit={rows_per_unit}; want both at least 1"
        )
    return [
        Unit(i, start, min(start + rows_per_unit, n_samples))
        for i, start in enumerate(range(0, n_samples, rows_per_unit))
    ]


def select_units(units: Sequence[Unit], part: int, n_parts: int) -> list[Unit]:
    """Part `part` of `n_parts` (both from 0): contiguous units, sizes differing by at most one.

    The parts are disjoint and together are all units, so independent jobs (`--units i/n`) share one
    plan and one store.

    Raises:
        SpecError: if `part` is not in 0 .. n_parts-1.
    """
    if not 0 <= part < n_parts:
        raise SpecError(f"part {part} of {n_parts}: want 0 <= part < number of parts")
    begin = part * len(units) // n_parts
    end = (part + 1) * len(units) // n_parts
    return list(units[begin:end])


def asked_units(
    units: Sequence[Unit], limit: int | None, part: tuple[int, int] | None
) -> list[Unit]:
    """The units that a run is asked for: those that hold the first `limit` rows, and of these the
    i-th of n parts (i, n); None for all.

    Raises:
        SpecError: as `select_units`.
    """
    asked = [unit for unit in units if limit is None or unit.start < limit]
    return asked if part is None else select_units(asked, *part)


def auto_rows_per_unit(arrays: Sequence[ArraySpec], n_samples: int, batch_size: int) -> int:
    """Rows that make the largest array's shard about 64 MiB: a multiple of `batch_size`.

    A function of shapes, dataset and batch size only, so every machine finds the same number.
    """
    largest = max(a.bytes_per_row for a in arrays)
    rows = min(TARGET_SHARD_BYTES // largest, MAX_ROWS_PER_UNIT, n_samples)
    return max(rows // batch_size, 1) * batch_size


def estimate(
    arrays: Sequence[ArraySpec], n_samples: int, n_timesteps: int, rows_per_unit: int
) -> Estimate:
    """Bytes and objects of a store, from shapes alone."""
    n_units = len(plan_units(n_samples, rows_per_unit))
    return Estimate(
        n_samples=n_samples,
        n_units=n_units,
        n_timesteps=n_timesteps,
        arrays=tuple(
            ArrayCost(
                name=a.name,
                bytes_per_sample=a.bytes_per_row * a.n_cells(n_timesteps),
                bytes_total=a.bytes_per_row * a.n_cells(n_timesteps) * n_samples,
                n_objects=n_units * a.n_cells(n_timesteps),
            )
            for a in arrays
        ),
    )
