"""What one unit of a new store can take from old ones, and what is left to compute.

Exact to the receipt: values are reused only where also what was counted of them is known, so that
the receipt of a unit says the same as if it had been computed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from drl_data.copying import DamagedError, checked_bytes
from drl_data.errors import StoreError, redacted
from drl_data.plan import InvalidRow, Unit
from drl_data.receipts import NonFinite, ObjectRecord, Receipt
from drl_data.reuse import Matches, Rows
from drl_data.shards import Array, at_limit
from drl_data.spec import ArraySpec
from drl_data.store import FeatureStore

log = logging.getLogger(__name__)

NONE = NonFinite()

Mask = npt.NDArray[np.bool_]
"""Which rows of a unit, [unit.n_rows]."""

Place = tuple[str, int]
"""A feature array and an entry of its time axis: all views of it are computed together."""

LASTING_STAGES = ("index", "read", "decode", "condition", "worker")
"""What is wrong with a sample itself, whatever is computed of it; of a sample that killed its
worker nobody wants to know again. Others (features that cannot be stored) depend on the taps."""


class Source:
    """An old store, and what it has of a new one; used by several threads."""

    def __init__(
        self, store: FeatureStore, matches: Matches, fits: Mapping[str, int] | None = None
    ) -> None:
        """`fits`: fitted array of the old store -> CRC-32C of the fit that it is reused with."""
        self.store = store
        self.matches = matches
        self.fits = dict(fits or {})
        self.damaged: set[str] = set()
        """Paths of objects that are not what their receipts say."""
        self._checked: set[str] = set()
        self._lock = threading.Lock()
        self.receipt = lru_cache(64)(self._receipt)
        self._at_limit = lru_cache(64)(self._count_at_limit)

    def _receipt(self, unit: Unit) -> Receipt | None:
        """The receipt of a unit that is done, and of the rows that the index says."""
        try:
            receipt = self.store.receipt(unit)
        except StoreError as error:
            log.warning("%s: not reused", error)
            return None
        if receipt is None:
            return None
        samples = self.store.index.digest_rows(unit.start, unit.stop)
        signed = receipt.fingerprint, receipt.unit, receipt.counts.samples
        if signed == (self.store.fingerprint, unit.id, samples):
            return receipt
        log.warning(
            "%s, unit %d: not reused: its receipt is of other samples than the store's index",
            redacted(self.store.url),
            unit.id,
        )
        return None

    def record(self, unit: Unit, name: str, cell: int) -> ObjectRecord:
        """What the receipt of a unit says of one shard.

        Raises:
            DamagedError: nothing.
        """
        path = self.store.layouts[name].path(name, cell, unit.id)
        receipt = self.receipt(unit)
        found = [r for r in (receipt.objects if receipt else ()) if r.path == path]
        if not found:
            raise DamagedError(self.store.url, path, "its receipt does not list it")
        return found[0]

    def rows(self, unit: Unit, name: str, cell: int, positions: Rows) -> Array:
        """Features [len(positions), *shape] of rows of one unit, checked once against its receipt.

        Raises:
            DamagedError: the shard is not what was signed.
        """
        record = self.record(unit, name, cell)
        with self._lock:
            checked = record.path in self._checked
        if checked:
            return self.store.read_cell(name, cell, unit.start + positions)
        data = checked_bytes(self.store.folder, record)
        rows = self.store.layouts[name].rows(np.frombuffer(data, np.uint8), unit.n_rows)
        if rows is None:
            raise DamagedError(self.store.url, record.path, "laid out otherwise than STORE.md says")
        with self._lock:
            self._checked.add(record.path)
        return rows[positions]

    def at_limit(self, unit: Unit, place: Place) -> npt.NDArray[np.int64]:
        """Values of each row of a unit [n_rows], over all views, that are the largest that their
        type holds: clipped ones are among them.

        Raises:
            DamagedError: a shard is not what was signed.
        """
        return self._at_limit(unit, place)

    def _count_at_limit(self, unit: Unit, place: Place) -> npt.NDArray[np.int64]:
        array = self.store.array(place[0])
        every = np.arange(unit.n_rows)
        found = np.zeros(unit.n_rows, np.int64)
        for cell in cells_of(array, place[1], len(self.store.times)):
            found += at_limit(self.rows(unit, array.name, cell, every), array.dtype)
        return found


def cells_of(array: ArraySpec, entry: int, n_timesteps: int) -> list[int]:
    """The cells of an entry of an array's time axis, one for each view."""
    n = array.n_times(n_timesteps)
    return [view * n + entry for view in range(max(array.views, 1))]


@dataclass(frozen=True, eq=False)
class Share:
    """The rows of a unit that one unit of an old store has."""

    source: Source
    unit: Unit
    """Of the old store."""
    receipt: Receipt
    mask: Mask
    """Rows of the new unit whose features are here."""
    old: Rows
    """[n_rows of the new unit]: their positions in the old unit; -1 elsewhere."""
    aligned: bool
    """Whether the two units hold the same samples in the same order, in shards of one shape."""
    whole: bool
    """Whether everything that was counted in the old unit is about rows that are reused."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows of a place that are taken from one share."""

    share: Share
    place: Place
    from_place: Place
    mask: Mask
    clipped: int = 0
    non_finite: NonFinite = NONE


@dataclass(frozen=True)
class UnitPlan:
    """A unit of the new store: what is invalid, what is taken, what is computed."""

    unit: Unit
    invalid: tuple[InvalidRow, ...]
    pieces: tuple[Piece, ...]
    missing: Mapping[Place, Mask]
    """Rows of each place that are left to compute; places without any are left out."""

    def groups(self) -> list[tuple[Mask, set[Place]]]:
        """Rows that lack the same places, and those places: nothing else need be computed."""
        if not self.missing:
            return []
        places = list(self.missing)
        lacking = np.stack([self.missing[place] for place in places])
        kinds, kind_of = np.unique(lacking, axis=1, return_inverse=True)
        return [
            (kind_of.reshape(-1) == i, {p for p, is_lacking in zip(places, kind, strict=True)
                                        if is_lacking})
            for i, kind in enumerate(kinds.T)
            if kind.any()
        ]  # fmt: skip


def plan_unit(
    store: FeatureStore, sources: Sequence[Source], unit: Unit, *, keep_invalid: bool = False
) -> UnitPlan:
    """What the sources have of a unit, the first one that has it, and what none has.

    With `keep_invalid` rows without features in one source have none in the new store, whatever the
    reason; else those whose reason depends on the taps are computed again.

    Raises:
        DamagedError: a shard that had to be looked into is not what was signed.
    """
    shares: list[Share] = []
    invalid: dict[int, InvalidRow] = {}
    for source in sources:
        found, bad = shares_of_unit(store, source, unit, keep_invalid)
        shares += found
        invalid = {**bad, **invalid}
    open_rows = np.ones(unit.n_rows, np.bool_)
    open_rows[[row - unit.start for row in invalid]] = False
    pieces: list[Piece] = []
    missing: dict[Place, Mask] = {}
    for array in store.features:
        for entry in range(store.n_times(array.name)):
            left = open_rows.copy()
            for share in shares:
                piece = _piece(store, share, (array.name, entry), left, keep_invalid)
                if piece is not None:
                    pieces.append(piece)
                    left &= ~piece.mask
            if left.any():
                missing[array.name, entry] = left
    ordered = tuple(invalid[row] for row in sorted(invalid))
    return UnitPlan(unit, ordered, tuple(pieces), missing)


def shares_of_unit(
    store: FeatureStore, source: Source, unit: Unit, keep_invalid: bool
) -> tuple[list[Share], dict[int, InvalidRow]]:
    """The units of one source that have rows of a unit, and the rows that have no features."""
    old_store, rows = source.store, source.matches.rows[unit.start : unit.stop]
    n_old = old_store.spec.rows_per_unit
    shares: list[Share] = []
    invalid: dict[int, InvalidRow] = {}
    for number in np.unique(rows[rows >= 0] // n_old).tolist():
        old = old_store.units[number]
        receipt = source.receipt(old)
        if receipt is None:
            continue
        mask = (rows >= old.start) & (rows < old.stop)
        positions = np.where(mask, rows - old.start, -1)
        aligned = (
            n_old == store.spec.rows_per_unit
            and old.n_rows == unit.n_rows
            and bool((positions == np.arange(unit.n_rows)).all())
        )
        keep = keep_invalid or (aligned and source.matches.all_cells)
        n_elsewhere = 0
        for bad in receipt.invalid:
            lasts = bad.stage in LASTING_STAGES
            places = np.flatnonzero(positions == bad.row - old.start).tolist()
            n_elsewhere += not lasts and not (keep and places)
            for at in places:
                mask[at] = False
                if keep or lasts:
                    row = unit.start + at
                    invalid[row] = InvalidRow(row, bad.key, bad.stage, bad.reason)
        n_used = len(np.unique(positions[mask]))
        whole = n_used == receipt.n_ok and n_used == int(mask.sum()) and not n_elsewhere
        shares.append(Share(source, old, receipt, mask, positions, aligned, whole))
    return shares, invalid


def _piece(
    store: FeatureStore, share: Share, place: Place, left: Mask, keep_invalid: bool
) -> Piece | None:
    """What a share has of the rows that are left of a place; None for nothing."""
    array, old_store = store.array(place[0]), share.source.store
    cells = share.source.matches.cells
    cell = cells_of(array, place[1], len(store.times))[0]
    mask = left & share.mask
    if (array.name, cell) not in cells or not mask.any():
        return None
    old_name, old_cell = cells[array.name, cell]
    old_array = old_store.array(old_name)
    from_place = (old_name, old_cell)  # of the first view, whose cells are the entries
    for name in old_store.parts(old_name):
        for at in cells_of(old_array, old_cell, len(old_store.times)):
            if old_store.layouts[name].path(name, at, share.unit.id) in share.source.damaged:
                return None
    counts = share.receipt.counts
    if old_name in share.source.fits and counts.fits.get(old_name) != share.source.fits[old_name]:
        return None
    of_old = old_store.time_of(old_name, old_cell)
    clipped = counts.clipped.get(old_name, {}).get(of_old, 0)
    non_finite = counts.non_finite.get(old_name, {}).get(of_old, NONE)
    is_whole = share.whole and bool((mask == share.mask).all())
    if is_whole or (not clipped and non_finite == NONE):
        return Piece(share, place, from_place, mask, clipped, non_finite)
    if clipped and store.spec.overflow == "clip" and non_finite == NONE:
        per_row = share.source.at_limit(share.unit, from_place)
        mine = np.where(mask, per_row[share.old], 0)
        if int(per_row.sum()) == clipped:
            return Piece(share, place, from_place, mask, int(mine.sum()))
        if not keep_invalid:  # others may have been clipped, or be that large themselves
            mask &= mine == 0
            return Piece(share, place, from_place, mask) if mask.any() else None
    if keep_invalid:  # nothing may be computed: at least the sum over the store stays
        counted = bool((share.old == 0).any())
        here = (clipped, non_finite) if counted else (0, NONE)
        return Piece(share, place, from_place, mask, *here)
    if non_finite != NONE and store.spec.non_finite == "clip":
        return None  # a zero that was NaN looks like any other
    return Piece(share, place, from_place, mask)  # what was counted is of rows that are invalid
