"""Damage at rest, removed such that extraction computes anew what is missing, and nothing else.

Whatever a repair is interrupted by, running it again ends in the same store. It removes objects
before the receipt that names them: a receipt without its objects is found by every check, while
objects without a receipt look like those of an attempt that was cut short. No other run may work on
the same units meanwhile.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial

from drl_data.catalogue import Catalogue
from drl_data.errors import (
    InputError,
    ObjectNotFoundError,
    StoreError,
    StoreMismatchError,
    TapError,
)
from drl_data.index import SampleIndex
from drl_data.ledger import Ledger
from drl_data.objects import open_folder
from drl_data.plan import Unit
from drl_data.receipts import Receipt, fit_path, receipt_path
from drl_data.shard_reader import in_threads
from drl_data.shards import crc32c
from drl_data.store import FeatureStore
from drl_data.store_metadata import Described, store_metadata
from drl_data.unit_checks import Sizes, UnitReport, check_units
from drl_data.unit_writer import groups
from drl_data.verify import check_index, check_own, check_seal, index_record


@dataclass(frozen=True)
class Repair:
    """What a repair did to a store, before anything was computed."""

    rewritten: tuple[str, ...] = ()
    """Objects that follow from the spec and the tars."""
    units: tuple[int, ...] = ()
    """Units that are to be computed anew."""
    removed: tuple[str, ...] = ()
    """Objects that were damaged, or that nothing vouches for."""
    fits: tuple[str, ...] = ()
    """Arrays whose fitted reduction is made anew."""
    unsealed: bool = False

    def __bool__(self) -> bool:
        return self != Repair()

    def merged(self, other: Repair) -> Repair:
        """Both, one after the other."""
        return Repair(
            (*self.rewritten, *other.rewritten),
            tuple(sorted({*self.units, *other.units})),
            (*self.removed, *other.removed),
            (*self.fits, *other.fits),
            self.unsealed or other.unsealed,
        )


def readable_store(url: str) -> FeatureStore | None:
    """The store at a folder or URL; None if there is none, or its root is damaged."""
    try:
        return FeatureStore.open(url) if FeatureStore.exists(url) else None
    except StoreError:
        return None


def sound_index(store: FeatureStore) -> SampleIndex | None:
    """The store's index; None if it is missing or damaged."""
    return check_index(store, {info.path: info.size for info in store.folder.list()})[1]


# --- the store's own objects ---------------------------------------------------------------------


def restore_root(url: str, described: Described) -> Repair:
    """Put the root `zarr.json` back where it is missing or damaged.

    Only if what is there vouches for it: receipts of this fingerprint that name these arrays'
    objects, or where there is none, the same `spec.json`.

    Raises:
        StoreMismatchError: the receipts are of another spec, or nothing says of which.
        TapError: they name other objects than these arrays have.
    """
    folder = open_folder(url)
    root = store_metadata(described)["zarr.json"]
    try:
        FeatureStore.open(url)
        return Repair()
    except StoreError:
        paths = [info.path for info in folder.list()]
    except InputError:  # there is none
        paths = [info.path for info in folder.list()]
        if "spec.json" not in paths and not any(path.startswith("receipts/") for path in paths):
            return Repair()
    store = FeatureStore(folder, described)
    receipts = [
        r for r in in_threads(partial(_readable, store), _signed(store, paths)) if r is not None
    ]
    fingerprints = {receipt.fingerprint for receipt in receipts}
    if fingerprints - {store.fingerprint}:
        raise StoreMismatchError(
            f"{url}: its receipts are of fingerprint {', '.join(sorted(fingerprints))}, the "
            f"pipeline's is {store.fingerprint}; give the pipeline that the store was made by"
        )
    if not receipts and not _same(store, "spec.json"):
        raise StoreMismatchError(
            f"{url}/zarr.json is damaged, and no receipt and no spec.json says what it was; "
            "extract into another store"
        )
    for receipt in receipts:
        unit = store.units[receipt.unit]
        want = {path for _, _, path in store.shards(unit)} | {f"valid/c/{unit.id}"}
        named = {record.path for record in receipt.objects}
        if named != want:
            raise TapError(
                f"{url}: unit {unit.id} has other objects than the pipeline's taps resolve to "
                f"now: {sorted(named ^ want)[:4]} in one only; use the library versions that its "
                f"receipt names: {receipt.run.versions}"
            )
    folder.put("zarr.json", [root])
    return Repair(rewritten=("zarr.json",))


def _signed(store: FeatureStore, paths: Sequence[str]) -> list[Unit]:
    there = set(paths)
    return [unit for unit in store.units if receipt_path(unit) in there]


def _same(store: FeatureStore, path: str) -> bool:
    try:
        return bytes(store.folder.get(path)) == store.metadata()[path]
    except ObjectNotFoundError:
        return False


def _readable(store: FeatureStore, unit: Unit) -> Receipt | None:
    """The unit's receipt; None if it is damaged."""
    try:
        return store.receipt(unit)
    except StoreError:
        return None


def _rewrite_own(
    store: FeatureStore, sizes: Sizes, index: SampleIndex, catalogue: Catalogue | None
) -> Repair:
    """Put what follows from the spec, and index and catalogue, again where they are not as they
    must be."""
    problems, sound = check_own(store, sizes)
    damaged = [problem.object for problem in problems]
    metadata = store.metadata()
    for path in damaged:
        if path in metadata:
            store.folder.put(path, [metadata[path]])
    if sound is None:
        data = index.to_parquet()
        store.folder.put("index.parquet", [data])  # until the next line they disagree, and it shows
        store.folder.put("index.json", [index_record(data)])
    if catalogue is not None and {"source.parquet", "source.json"} & set(damaged):
        store.put_catalogue(catalogue)
    return Repair(rewritten=tuple(damaged))


# --- units ---------------------------------------------------------------------------------------


def remove_damaged(
    store: FeatureStore,
    index: SampleIndex,
    units: Collection[Unit],
    catalogue: Catalogue | None = None,
) -> Repair:
    """Read everything, and remove what is damaged in these units and what they may not keep.

    A unit with a receipt loses its damaged objects (integers with their scales, and the reverse);
    one without, or with a damaged one, loses all that an attempt has left, as nothing vouches for
    it. A fit that no receipt names is damaged and is made anew; units that name another than the
    one that is there are computed anew. `index` has the rows, as the tars are now;
    `catalogue` where imported features are.
    """
    sizes = {info.path: info.size for info in store.folder.list()}
    done = _rewrite_own(store, sizes, index, catalogue)
    reports = list(check_units(store, sizes, index, deep=True))
    ledger = Ledger(r.receipt for r in reports if r.receipt is not None)
    refit = _damaged_fits(reports, sizes, store)
    chosen = {unit.id for unit in units}
    removals: dict[int, list[str]] = {}
    for unit, report in zip(store.units, reports, strict=True):
        paths = _to_remove(store, unit, report, sizes, refit)
        if paths and unit.id in chosen:
            removals[unit.id] = paths
    if refit:
        pending = [u for u in units if receipt_path(u) not in sizes or u.id in removals]
        if not pending:  # fits are made where units are computed, so that one has to be
            unit, paths = _first_naming(store, units, reports, refit)
            removals[unit.id] = paths
    seal_is_wrong = any(check_seal(store, sizes, ledger, index, deep=True))
    if removals or refit or seal_is_wrong:
        done = done.merged(_unseal(store, sizes))
    for name in refit:
        store.folder.delete(fit_path(name))
    for paths in removals.values():
        _remove(store, paths)
    return done.merged(
        Repair(
            units=tuple(removals),
            removed=tuple(path for paths in removals.values() for path in paths if path in sizes),
            fits=tuple(refit),
        )
    )


def remove_stale(store: FeatureStore, units: Collection[Unit]) -> Repair:
    """Remove units whose receipts name other fits than those that are there, after a fit was made
    anew: on a CPU it is equal and there are none."""
    sizes = {info.path: info.size for info in store.folder.list()}
    removals: dict[int, list[str]] = {}
    reports = list(check_units(store, sizes, None, deep=False))
    for unit in units:
        paths = _to_remove(store, unit, reports[unit.id], sizes, ())
        if paths and reports[unit.id].receipt is not None:
            removals[unit.id] = paths
    if not removals:
        return Repair()
    done = _unseal(store, sizes)
    for paths in removals.values():
        _remove(store, paths)
    removed = tuple(path for paths in removals.values() for path in paths)
    return replace(done, units=tuple(removals), removed=removed)


def _to_remove(
    store: FeatureStore,
    unit: Unit,
    report: UnitReport,
    sizes: Sizes,
    refit: Collection[str],
) -> list[str]:
    """Paths of a unit that must go, its receipt last; none if it is sound."""
    receipt = receipt_path(unit)
    wrong = {problem.object for problem in report.problems}
    wrong -= {fit_path(name) for name in refit}
    valid = f"valid/c/{unit.id}"
    if report.receipt is None or receipt in wrong:
        everything = [*(path for _, _, path in store.shards(unit)), valid, receipt]
        return [path for path in everything if path in sizes]
    if not wrong:
        return []
    paths = [
        path
        for group in groups(store, unit)
        if not wrong.isdisjoint({*group.paths.values(), fit_path(group.array.name)})
        for path in group.paths.values()
    ]
    return [*paths, *([valid] if valid in wrong else []), receipt]


def _damaged_fits(reports: Sequence[UnitReport], sizes: Sizes, store: FeatureStore) -> list[str]:
    """Arrays whose fit is missing, or is one that no receipt names."""
    named: dict[str, set[int]] = defaultdict(set)
    for report in reports:
        if report.receipt is not None:
            for name, crc in report.receipt.counts.fits.items():
                named[name].add(crc)
    return [
        name
        for name, sums in sorted(named.items())
        if fit_path(name) not in sizes or crc32c([store.folder.get(fit_path(name))]) not in sums
    ]


def _first_naming(
    store: FeatureStore, units: Collection[Unit], reports: Sequence[UnitReport], refit: list[str]
) -> tuple[Unit, list[str]]:
    """The first unit, and its objects that depend on these fits, its receipt last."""
    unit = min(units)
    paths = [
        path
        for group in groups(store, unit)
        if group.array.name in refit
        for path in group.paths.values()
    ]
    return unit, [*paths, receipt_path(unit)]


def _unseal(store: FeatureStore, sizes: Sizes) -> Repair:
    for path in ("sealed.json", "samples.parquet"):
        store.folder.delete(path)
    return Repair(unsealed="sealed.json" in sizes)


def _remove(store: FeatureStore, paths: Sequence[str]) -> None:
    """Delete objects, all at once, and when they are gone the receipt, which is the last."""
    *objects, last = paths
    in_threads(store.folder.delete, objects)
    store.folder.delete(last)


def require_fits(store: FeatureStore) -> None:
    """Refuse to go on with other fits than those that units which are done were reduced by.

    Raises:
        StoreError: a fit is missing or has changed.
    """
    pending = {unit.id for unit in store.pending()}
    done = next((unit for unit in store.units if unit.id not in pending), None)
    receipt = None if done is None else store.receipt(done)
    for name, crc in ({} if receipt is None else receipt.counts.fits).items():
        try:
            found: int | None = crc32c([store.folder.get(fit_path(name))])
        except ObjectNotFoundError:
            found = None
        if found != crc:
            state = "missing" if found is None else "not the one"
            raise StoreError(
                f"{store.url}/{fit_path(name)}: {state}, though unit {done.id if done else 0} was "
                "reduced by it; `drl extract --repair` makes it anew"
            )
