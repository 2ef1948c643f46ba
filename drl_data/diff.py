"""Two stores side by side: what only one has, and how far what both have is apart.

Rows are the same by number where the stores are of one dataset, else by key; arrays are the same if
their specs are; timesteps and views by name. Where both receipts sign equal bytes nothing is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from drl_data.compare import Comparison, compare_rows, tolerance
from drl_data.import_spec import IMPORTED, ImportSpec
from drl_data.plan import Unit
from drl_data.receipts import Receipt
from drl_data.shard_reader import in_threads
from drl_data.spec import ArraySpec, ResolvedTime
from drl_data.spec_base import DType
from drl_data.store import FeatureStore

T = TypeVar("T")
Rows = npt.NDArray[np.int64]

Verdict = Literal["equal", "equal within tolerance", "different"]

MAX_LISTED = 20
"""Rows that are named one by one."""


@dataclass(frozen=True)
class ArrayDiff:
    """One array at one timestep of one view, in both stores."""

    array: str
    timestep: str
    view: str
    tolerance: float
    found: Comparison
    n_signed_equal: int
    """Rows of units whose checksums are equal in both receipts: not read."""


@dataclass(frozen=True)
class StoreDiff:
    """What two stores, `a` and `b`, differ in; all empty for equal ones."""

    spec: tuple[str, ...]
    """Leaves of the specs that differ: `path: a != b`."""
    arrays: tuple[tuple[str, ...], tuple[str, ...]]
    """Arrays only in a, only in b; one of another shape or type is in both lists."""
    timesteps: tuple[tuple[float, ...], tuple[float, ...]]
    noise_levels: tuple[float, ...]
    """Timesteps of both that are other noise levels."""
    views: tuple[tuple[str, ...], tuple[str, ...]]
    rows: tuple[tuple[str, ...], tuple[str, ...]]
    """Keys of rows only in a, only in b."""
    pending: tuple[tuple[int, ...], tuple[int, ...]]
    """Units without a receipt; their rows are not compared."""
    validity: tuple[str, ...]
    """Keys of rows that are valid in one only."""
    n_rows: int
    """Rows that are in both and done in both."""
    common: tuple[ArrayDiff, ...]

    @property
    def verdict(self) -> Verdict:
        """`different` unless both hold the same, complete or not, but for rounding."""
        sides = (*self.arrays, *self.timesteps, *self.views, *self.rows)
        if self.spec or any(sides) or self.noise_levels or self.validity:
            return "different"
        if self.pending[0] != self.pending[1] or any(not one.found.within for one in self.common):
            return "different"
        exact = all(one.found.equal for one in self.common)
        return "equal" if exact else "equal within tolerance"


def diff_stores(a: FeatureStore, b: FeatureStore) -> StoreDiff:
    """Compare two stores; bytes of equal checksums are not read.

    Raises:
        StoreError: a receipt or a shard that is damaged.
    """
    receipts = a.receipts(), b.receipts()
    rows_a, rows_b, only = _common_rows(a, b)
    done = _done(a, receipts[0])[rows_a] & _done(b, receipts[1])[rows_b]
    rows_a, rows_b = rows_a[done], rows_b[done]
    differing = a.valid_rows()[rows_a] != b.valid_rows()[rows_b]
    keys = a.index.table["key"].take(rows_a[differing]).to_pylist()
    requested = [[time.requested for time in store.times] for store in (a, b)]
    both_times = [t for t in requested[0] if t in requested[1]]
    names = [store.spec.view_names or ("id",) for store in (a, b)]
    specs = [{array.name: array for array in store.features} for store in (a, b)]
    same = [x for name, x in specs[0].items() if _same_array(a, b, x, specs[1].get(name))]
    kept = {array.name for array in same}
    pairs = _Pairs(a, b, receipts[0], receipts[1], rows_a, rows_b)
    places = [
        (array, t, view)
        for array in same
        for view in (names[0] if array.views else ("id",))
        if not array.views or view in names[1]
        for t in (both_times if array.timesteps == "each" else both_times[:1])
    ]
    return StoreDiff(
        spec=tuple(a.spec.differences(b.spec)),
        arrays=_sides(*([name for name in side if name not in kept] for side in specs)),
        timesteps=_sides(*([t for t in side if t not in both_times] for side in requested)),
        noise_levels=tuple(
            t
            for t in both_times
            if _other_level(a.times[requested[0].index(t)], b.times[requested[1].index(t)])
        ),
        views=_sides(
            *([v for v in mine if v not in other] for mine, other in (names, names[::-1]))
        ),
        rows=only,
        pending=_sides(
            *(
                [unit.id for unit in store.units if unit.id not in found]
                for store, found in zip((a, b), receipts, strict=True)
            )
        ),
        validity=tuple(keys),
        n_rows=len(rows_a),
        common=tuple(pairs.compare(*place) for place in places),
    )


def _sides(mine: Sequence[T], theirs: Sequence[T]) -> tuple[tuple[T, ...], tuple[T, ...]]:
    return tuple(mine), tuple(theirs)


def _other_level(mine: ResolvedTime, theirs: ResolvedTime) -> bool:
    """Whether one timestep is two levels of noise, as far as they are known."""
    return mine != theirs and IMPORTED not in (mine.convention, theirs.convention)


def _unsourced(array: ArraySpec) -> ArraySpec:
    timesteps = "each" if array.timesteps == "each" else "none"
    return array.model_copy(update={"tap": "", "timesteps": timesteps})


def _same_array(
    a: FeatureStore, b: FeatureStore, mine: ArraySpec, theirs: ArraySpec | None
) -> bool:
    """Whether both stores have the array; means over other timesteps are other arrays. Of imported
    features nobody knows the tap, nor what one entry for all timesteps is of."""
    if isinstance(a.spec, ImportSpec) or isinstance(b.spec, ImportSpec):
        return theirs is not None and _unsourced(mine) == _unsourced(theirs)
    if mine != theirs:
        return False
    return mine.timesteps != "mean" or a.times == b.times


def _done(store: FeatureStore, receipts: Mapping[int, Receipt]) -> npt.NDArray[np.bool_]:
    done = np.zeros(store.spec.n_samples, np.bool_)
    for receipt in receipts.values():
        done[receipt.start : receipt.stop] = True
    return done


def _common_rows(
    a: FeatureStore, b: FeatureStore
) -> tuple[Rows, Rows, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Rows of both stores that are the same samples, and the keys of the others."""
    if a.spec.dataset == b.spec.dataset:
        rows = np.arange(a.spec.n_samples)
        return rows, rows, ((), ())
    ours, theirs = list(_numbered(a)), list(_numbered(b))
    place = {key: row for row, key in enumerate(theirs)}
    pairs = [(row, place[key]) for row, key in enumerate(ours) if key in place]
    both = np.array(pairs, np.int64).reshape(-1, 2)
    mine = set(ours)
    return (
        both[:, 0],
        both[:, 1],
        (
            tuple(key for key, n in ours if (key, n) not in place),
            tuple(key for key, n in theirs if (key, n) not in mine),
        ),
    )


def _numbered(store: FeatureStore) -> Iterator[tuple[str, int]]:
    """Each row's key, and which of the rows with that key it is."""
    seen: Counter[str] = Counter()
    for key in store.index.table["key"].to_pylist():
        yield key, seen[key]
        seen[key] += 1


class _Pairs:
    """Rows of one store beside those of another."""

    def __init__(
        self,
        a: FeatureStore,
        b: FeatureStore,
        receipts_a: Mapping[int, Receipt],
        receipts_b: Mapping[int, Receipt],
        rows_a: Rows,
        rows_b: Rows,
    ) -> None:
        self._a, self._b = a, b
        self._rows_a, self._rows_b = rows_a, rows_b
        self._signed = tuple(
            {r.path: (r.n_bytes, r.crc32c) for x in receipts.values() for r in x.objects}
            for receipts in (receipts_a, receipts_b)
        )
        self._dtype: DType = max(
            (a.spec.backbone_dtype, b.spec.backbone_dtype), key=lambda d: tolerance(d, "float32")
        )

    def compare(self, array: ArraySpec, timestep: float, view: str) -> ArrayDiff:
        """The rows of an array at a timestep of a view."""
        limit = tolerance(self._dtype, array.dtype)
        places = [
            (store.time_index(timestep), store.view_index(view) if array.views else 0)
            for store in (self._a, self._b)
        ]
        found = in_threads(partial(self._compare_unit, array, places, limit), self._a.units)
        whole = Comparison()
        for one, _ in found:
            whole = whole.merged(one)
        return ArrayDiff(
            array=array.name,
            timestep="any" if array.timesteps != "each" else f"{timestep:g}",
            view=view,
            tolerance=limit,
            found=whole,
            n_signed_equal=sum(one.n_rows for one, signed in found if signed),
        )

    def _compare_unit(
        self, array: ArraySpec, places: list[tuple[int, int]], limit: float, unit: Unit
    ) -> tuple[Comparison, bool]:
        """The rows of one unit of `a`, and whether their checksums were enough."""
        first, last = np.searchsorted(self._rows_a, [unit.start, unit.stop])
        if first == last:
            return Comparison(), False
        mine, theirs = self._rows_a[first:last], self._rows_b[first:last]
        names = self._a.parts(array.name)
        if self._same_unit(unit, mine, theirs) and all(
            self._checksum(0, name, places[0], unit) == self._checksum(1, name, places[1], unit)
            for name in names
        ):
            return Comparison(n_rows=len(mine)), True
        x, y = (
            {name: store.read_rows(name, place[0], rows, place[1]) for name in names}
            for store, place, rows in zip((self._a, self._b), places, (mine, theirs), strict=True)
        )
        found = compare_rows(array, x, y, limit)
        if found.first is None:
            return found, False
        return replace(found, first=int(mine[found.first])), False

    def _same_unit(self, unit: Unit, mine: Rows, theirs: Rows) -> bool:
        """Whether it is a unit of `b` too, with the same rows."""
        other = self._b.units[unit.id] if unit.id < len(self._b.units) else None
        same = self._a.spec.rows_per_unit == self._b.spec.rows_per_unit
        return same and other == unit and len(mine) == unit.n_rows and bool((mine == theirs).all())

    def _checksum(
        self, side: int, name: str, place: tuple[int, int], unit: Unit
    ) -> tuple[int, int] | None:
        store = (self._a, self._b)[side]
        cell = store.array(name).cell(*place, len(store.times))
        return self._signed[side].get(store.layouts[name].path(name, cell, unit.id))


def format_diff(diff: StoreDiff) -> list[str]:
    """Lines that say everything but the numbers of `common`."""
    lines = [f"spec: {line}" for line in diff.spec]
    for what, sides in (
        ("arrays", diff.arrays),
        ("timesteps", diff.timesteps),
        ("views", diff.views),
        ("rows", diff.rows),
    ):
        for name, side in zip("AB", sides, strict=True):
            if side:
                lines.append(f"{what} only in {name}: {_listed(side)}")
    if diff.noise_levels:
        lines.append(f"timesteps of other noise levels: {_listed(diff.noise_levels)}")
    for name, units in zip("AB", diff.pending, strict=True):
        if units:
            lines.append(f"units pending in {name}, not compared: {_listed(units)}")
    if diff.validity:
        lines.append(f"rows that are valid in one only: {_listed(diff.validity)}")
    return lines


def _listed(items: Sequence[object]) -> str:
    shown = ", ".join(f"{x:g}" if isinstance(x, float) else str(x) for x in items[:MAX_LISTED])
    more = len(items) - MAX_LISTED
    return f"{shown} and {more} more" if more > 0 else shown
