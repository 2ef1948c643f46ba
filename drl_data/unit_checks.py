"""Is a unit as its receipt says? Sizes by one listing; deep: every byte."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from drl_data.errors import ObjectError, ObjectNotFoundError, StoreError
from drl_data.index import SampleIndex
from drl_data.plan import Unit
from drl_data.receipts import Receipt, fit_path, receipt_path
from drl_data.shard_reader import in_turn
from drl_data.shards import crc32c, non_finite_rows

if TYPE_CHECKING:
    from drl_data.store import FeatureStore

EXTRACT = "run `drl extract` again"
REPAIR = "run `drl extract --repair`"

Sizes = Mapping[str, int]
"""Path -> bytes of every object, from one listing."""


@dataclass(frozen=True)
class Problem:
    """Something in a store that is not as STORE.md says."""

    unit: int | None
    """Id of the unit, None for the store's own objects."""
    object: str
    what: str
    remedy: str

    def __str__(self) -> str:
        place = "" if self.unit is None else f"unit {self.unit}, "
        return f"{place}{self.object}: {self.what}; {self.remedy}"


@dataclass(frozen=True)
class UnitReport:
    """What was found in one unit: problems, and its receipt if that is one of this store's."""

    problems: list[Problem]
    receipt: Receipt | None


def check_units(
    store: FeatureStore, sizes: Sizes, index: SampleIndex | None, *, deep: bool
) -> Iterator[UnitReport]:
    """What is wrong with each unit, in order; without `index` samples are not compared."""
    fits = {path: crc32c([store.folder.get(path)]) for path in sizes if path.startswith("fits/")}
    return in_turn(partial(_check_unit, store, sizes, index, fits, deep), store.units)


def _check_unit(
    store: FeatureStore,
    sizes: Sizes,
    index: SampleIndex | None,
    fits: Mapping[str, int],
    deep: bool,
    unit: Unit,
) -> UnitReport:
    path = receipt_path(unit)

    def problem(what: str, remedy: str) -> UnitReport:
        return UnitReport([Problem(unit.id, path, what, remedy)], None)

    if path not in sizes:
        return problem("no receipt: the unit is not computed", EXTRACT)
    try:
        receipt = store.receipt(unit)
    except (StoreError, ObjectError) as error:
        return problem(str(error), REPAIR)
    if receipt is None:
        return problem("deleted while it was verified", EXTRACT)
    identity = (receipt.fingerprint, receipt.unit, receipt.start, receipt.stop)
    if identity != (store.fingerprint, unit.id, unit.start, unit.stop):
        return problem(f"is of spec, unit and rows {identity}, not of this store's unit", REPAIR)
    if index is not None and receipt.counts.samples not in (
        "",  # of an earlier version
        index.digest_rows(unit.start, unit.stop),
    ):
        return problem("is of other samples than the index has in its rows", REPAIR)
    found = [
        *_check_fits(unit, receipt, sizes, fits),
        *_check_objects(store, sizes, deep, unit, receipt),
    ]
    return UnitReport(found, receipt)


def _check_fits(
    unit: Unit, receipt: Receipt, sizes: Sizes, fits: Mapping[str, int]
) -> Iterator[Problem]:
    for name, crc in receipt.counts.fits.items():
        path = fit_path(name)
        if path not in sizes:
            yield Problem(unit.id, path, "missing, though the receipt names it", REPAIR)
        elif fits[path] != crc:
            yield Problem(unit.id, path, "not the fit that the unit was reduced by", REPAIR)


def _check_objects(
    store: FeatureStore, sizes: Sizes, deep: bool, unit: Unit, receipt: Receipt
) -> Iterator[Problem]:
    want = {
        path: store.layouts[name].shard_bytes(unit.n_rows) for name, _, path in store.shards(unit)
    }
    want[f"valid/c/{unit.id}"] = store.spec.rows_per_unit
    signed = {record.path: record for record in receipt.objects}
    if signed.keys() != want.keys():
        paths = sorted(signed.keys() ^ want.keys())
        yield Problem(unit.id, receipt_path(unit), f"lists too many or too few: {paths}", REPAIR)
        return
    whole = set()
    for path, n_bytes in want.items():
        if path not in sizes:
            yield Problem(unit.id, path, "missing, though the receipt lists it", REPAIR)
        elif not sizes[path] == signed[path].n_bytes == n_bytes:
            what = f"{sizes[path]} bytes, receipt {signed[path].n_bytes}, layout {n_bytes}"
            yield Problem(unit.id, path, what, REPAIR)
        else:
            whole.add(path)
    if deep:
        valid = store.valid_chunk(unit, receipt.invalid)
        for path in sorted(whole):
            damage = _damage(store, unit, path, signed[path].crc32c, valid)
            if damage:
                yield Problem(unit.id, path, damage, REPAIR)


def _damage(store: FeatureStore, unit: Unit, path: str, crc: int, valid: bytes) -> str | None:
    """What is wrong with the bytes of one object, None if nothing."""
    try:
        data = store.folder.get(path)
    except ObjectNotFoundError:
        return "deleted while it was verified"
    except ObjectError as error:
        return f"cannot be read: {error}"
    found = crc32c([data])
    if found != crc:
        return (
            f"CRC-32C {found:08x}, receipt {crc:08x}: the bytes changed after the unit was signed"
        )
    name = path.partition("/")[0]
    if name == "valid":
        return None if data == valid else "does not match the receipt's invalid rows"
    layout = store.layouts[name]
    rows = layout.rows(np.frombuffer(data, np.uint8), unit.n_rows)
    if rows is None:
        return "the shard index is not the one of this layout"
    is_valid = np.frombuffer(valid, np.bool_)[: unit.n_rows]
    bad = [row for row in non_finite_rows(rows, layout.dtype).tolist() if is_valid[row]]
    return f"valid row {unit.start + bad[0]} is not finite" if bad else None
