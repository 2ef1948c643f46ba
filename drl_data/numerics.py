"""What becomes of features that are not finite, or too large for their type, as the spec says.

    error     the unit fails
    invalid   the rows have no features, in any array, and are listed with the first place
    clip      the values are replaced (quantise.py says by what)

They are counted in each case, on the device, without waiting for it: by row, in host memory that is
read once, when the unit has been computed. Rows that are invalid anyway are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from drl_data.errors import FeatureError
from drl_data.import_spec import ImportSpec
from drl_data.plan import InvalidRow, Unit
from drl_data.receipts import NonFinite
from drl_data.spec import ArraySpec
from drl_data.store import FeatureStore

Counts = npt.NDArray[np.int64]

COUNTS_BYTES = 12
"""Host memory that the counts of one row of one cell take."""


@dataclass(frozen=True)
class Settled:
    """What a receipt says of the values of a unit."""

    clipped: dict[str, dict[str, int]] = field(default_factory=dict)
    non_finite: dict[str, dict[str, NonFinite]] = field(default_factory=dict)
    invalid: list[InvalidRow] = field(default_factory=list)


class NumericCounts:
    """NaNs, infinities and overflows of a unit, by array, cell and row."""

    def __init__(self, store: FeatureStore, unit: Unit, *, pinned: bool) -> None:
        self._store, self._unit = store, unit
        self._dtype = ", ".join(sorted({array.dtype for array in store.features}))
        self._section = "source" if isinstance(store.spec, ImportSpec) else "features"
        self._found = {
            array.name: torch.zeros(
                (store.n_cells(array.name), unit.n_rows, 3), dtype=torch.int32, pin_memory=pinned
            )
            for array in store.features
        }

    def keep(self, array: str, cell: int, start: int, counts: Tensor) -> None:
        """What `to_storage` counted in rows of the unit from `start`; replaces what was kept."""
        kept = self._found[array][cell, start : start + len(counts)]
        kept.copy_(counts, non_blocking=True)

    def forget(self, row: int) -> None:
        """Count nothing of the unit's row at this position: it has no features for another
        reason."""
        for counts in self._found.values():
            counts[:, row] = 0

    def settle(self) -> Settled:
        """Counts and invalid rows; call it when the device is done.

        Raises:
            FeatureError: values that the spec does not allow.
        """
        spec = self._store.spec
        found = {name: x.numpy().astype(np.int64) for name, x in self._found.items()}
        non_finite = {name: x[..., :2].sum(-1) for name, x in found.items()}
        over = {name: x[..., 2] for name, x in found.items()}
        refused = [
            self._refusal(found, counts, is_over)
            for counts, policy, is_over in (
                (non_finite, spec.non_finite, False),
                (over, spec.overflow, True),
            )
            if policy == "error" and any(x.any() for x in counts.values())
        ]
        if refused:
            raise FeatureError(f"{self._store.url}, unit {self._unit.id}: {'; '.join(refused)}")
        reasons: dict[int, str] = {}
        for counts, policy, what in (
            (non_finite, spec.non_finite, "non-finite"),
            (over, spec.overflow, f"too large for {self._dtype}"),
        ):
            if policy == "invalid":
                for row in _rows(counts):
                    reasons.setdefault(row, f"{what} at {self._places(found, counts, row)}")
        keys = self._store.index.table["key"]
        return Settled(
            clipped={k: {t: int(n[2]) for t, n in v.items()} for k, v in self._totals(found, 2)},
            non_finite={
                k: {t: NonFinite(nan=int(n[0]), inf=int(n[1])) for t, n in v.items()}
                for k, v in self._totals(found, 0, 1)
            },
            invalid=[
                InvalidRow(row, keys[row].as_py(), "features", reasons[at])
                for at, row in sorted((at, self._unit.start + at) for at in reasons)
            ],
        )

    def _totals(
        self, found: dict[str, Counts], *kinds: int
    ) -> Iterator[tuple[str, dict[str, Counts]]]:
        """(array, {timestep: counts [3]}), over rows and views, where there are any of these."""
        for name, counts in found.items():
            by_time: dict[str, Counts] = {}
            for cell, one in enumerate(counts.sum(1)):
                if one[list(kinds)].any():
                    label = self._time(self._store.array(name), cell)
                    by_time[label] = by_time.get(label, np.zeros(3, np.int64)) + one
            if by_time:
                yield name, by_time

    def _time(self, array: ArraySpec, cell: int) -> str:
        """The requested timestep, or `any` of an array that has one entry for all."""
        if array.timesteps != "each":
            return "any"
        return f"{self._store.times[cell % len(self._store.times)].requested:g}"

    def _places(self, found: dict[str, Counts], counts: dict[str, Counts], row: int) -> str:
        """Where a row has them first, in the order of the store, and at how many places more."""
        views = self._store.spec.view_names
        places = [
            (self._store.array(name), int(cell))
            for name, x in counts.items()
            for cell in np.flatnonzero(x[:, row])
        ]
        array, cell = places[0]
        time = self._time(array, cell)
        place = array.name if time == "any" else f"{array.name}, timestep {time}"
        if views:
            place += f", view {views[cell // array.n_times(len(self._store.times))]}"
        nan, inf, over = found[array.name][cell, row].tolist()
        what = _words(nan, inf) if counts[array.name][cell, row] == nan + inf else f"{over} values"
        rest = f"; and at {len(places) - 1} more" if len(places) > 1 else ""
        return f"{place}: {what}{rest}"

    def _refusal(self, found: dict[str, Counts], counts: dict[str, Counts], is_over: bool) -> str:
        """Arrays, timesteps, numbers, the first row, and what to do."""
        lines = [
            f"{name} at timestep {time}: "
            + (f"{n[2]} values" if is_over else _words(int(n[0]), int(n[1])))
            for name, by_time in self._totals(found, *((2,) if is_over else (0, 1)))
            for time, n in by_time.items()
        ]
        rows = _rows(counts)
        first = self._unit.start + rows[0]
        key = self._store.index.table["key"][first].as_py()
        where = f"{', '.join(lines)}, in {len(rows)} rows, the first of them {first} (key {key!r})"
        if is_over:
            return (
                f"features too large for {self._dtype}: {where}; set "
                f"`{self._section}.dtype: bfloat16` or float32, or `{self._section}.overflow: "
                "clip` or invalid"
            )
        remedy = f"set `{self._section}.non_finite: invalid` or clip"
        if self._section == "features":
            precision = "(`backbone.dtype: bfloat16` or float32)"
            remedy = f"compute in another precision {precision}, or {remedy}"
        return f"features are not finite: {where}; {remedy}"


def _rows(counts: dict[str, Counts]) -> list[int]:
    """Positions of the rows that have any, in increasing order."""
    merged: Callable[..., npt.NDArray[np.bool_]] = np.logical_or.reduce
    found: list[int] = np.flatnonzero(merged([x.any(0) for x in counts.values()])).tolist()
    return found


def _words(nan: int, inf: int) -> str:
    """3 NaN, 1 Inf"""
    return ", ".join(f"{n} {name}" for n, name in ((nan, "NaN"), (inf, "Inf")) if n)
