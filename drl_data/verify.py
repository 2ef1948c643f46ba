"""Is a store as STORE.md says? Receipts, metadata, sizes; deep: every byte."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from pydantic import JsonValue

from drl_data.errors import ObjectError, ObjectNotFoundError, StoreError
from drl_data.plan import Unit
from drl_data.receipts import Receipt, fit_path, receipt_path
from drl_data.shard_reader import in_threads
from drl_data.shards import crc32c, non_finite_rows
from drl_data.spec import FORMAT_VERSION
from drl_data.spec_base import canonical_json

if TYPE_CHECKING:
    from drl_data.store import FeatureStore

_EXTRACT = "run `drl extract` again"
_ANEW = "delete the unit's receipt and run `drl extract` again"
_RESTORE = "copy it from a backup, or extract into another store"
_RESEAL = "delete sealed.json, run `drl extract` again"


@dataclass(frozen=True)
class Problem:
    """Something in a store that is not as STORE.md says."""

    unit: int | None
    """Id of the unit, None for the store's own objects."""
    object: str
    what: str
    remedy: str


def verify(store: FeatureStore, *, deep: bool) -> list[Problem]:
    """Problems of the store's own objects first, then of each unit in order."""
    sizes = {info.path: info.size for info in store.folder.list()}
    problems = list(_check_metadata(store, sizes))
    check = partial(_check_unit, store, sizes, deep)
    found = in_threads(check, store.units)
    for unit_problems, _ in found:
        problems.extend(unit_problems)
    receipts = {receipt.unit: receipt for _, receipt in found if receipt is not None}
    if "sealed.json" in sizes:
        problems.extend(_check_seal(store, receipts))
    return problems


def seal_content(receipts: Mapping[int, Receipt], samples: memoryview) -> dict[str, JsonValue]:
    """What `sealed.json` holds: counts, the sample table's checksum, a digest of all receipts.

    `content` is equal for two stores with the same features, however they were computed.
    """
    digest = hashlib.sha256()
    for unit in sorted(receipts):
        digest.update(canonical_json(receipts[unit].content()))
    return {
        "format": FORMAT_VERSION,
        "n_units": len(receipts),
        "n_ok": sum(receipt.n_ok for receipt in receipts.values()),
        "n_invalid": sum(receipt.n_invalid for receipt in receipts.values()),
        "content": digest.hexdigest(),
        "samples": {"n_bytes": samples.nbytes, "crc32c": crc32c([samples])},
    }


def _check_metadata(store: FeatureStore, sizes: Mapping[str, int]) -> Iterator[Problem]:
    for path, want in store.metadata().items():
        if path not in sizes:
            yield Problem(None, path, "missing", _EXTRACT)
        elif bytes(store.folder.get(path)) != want:
            yield Problem(None, path, "not what the store's spec implies; it was edited", _RESTORE)
    if "index.parquet" not in sizes:
        yield Problem(None, "index.parquet", "missing", _EXTRACT)


def _check_seal(store: FeatureStore, receipts: Mapping[int, Receipt]) -> Iterator[Problem]:
    try:
        samples = store.folder.get("samples.parquet")
    except ObjectNotFoundError:
        yield Problem(None, "samples.parquet", "missing, though the store is sealed", _RESEAL)
        return
    want = seal_content(receipts, samples)
    try:
        got = json.loads(bytes(store.folder.get("sealed.json")))
    except ValueError:
        got = None
    if got != want:
        yield Problem(
            None, "sealed.json", "does not match the receipts or samples.parquet", _RESEAL
        )


def _check_unit(
    store: FeatureStore, sizes: Mapping[str, int], deep: bool, unit: Unit
) -> tuple[list[Problem], Receipt | None]:
    path = receipt_path(unit)
    if path not in sizes:
        return [Problem(unit.id, path, "no receipt: the unit is not computed", _EXTRACT)], None
    try:
        receipt = store.receipt(unit)
    except StoreError as error:
        return [Problem(unit.id, path, str(error), _ANEW)], None
    if receipt is None:
        return [Problem(unit.id, path, "deleted while it was verified", _EXTRACT)], None
    identity = (receipt.fingerprint, receipt.unit, receipt.start, receipt.stop)
    if identity != (store.fingerprint, unit.id, unit.start, unit.stop):
        what = f"is of spec, unit and rows {identity}, not of this store's unit"
        return [Problem(unit.id, path, what, _ANEW)], None
    return list(_check_objects(store, sizes, deep, unit, receipt)), receipt


def _check_objects(
    store: FeatureStore, sizes: Mapping[str, int], deep: bool, unit: Unit, receipt: Receipt
) -> Iterator[Problem]:
    want = {
        path: store.layouts[name].shard_bytes(unit.n_rows) for name, _, path in store.shards(unit)
    }
    want[f"valid/c/{unit.id}"] = store.spec.rows_per_unit
    signed = {record.path: record for record in receipt.objects}
    if signed.keys() != want.keys():
        paths = sorted(signed.keys() ^ want.keys())
        yield Problem(unit.id, receipt_path(unit), f"lists too many or too few: {paths}", _ANEW)
        return
    for name, crc in receipt.counts.fits.items():
        path = fit_path(name)
        if path not in sizes:
            yield Problem(unit.id, path, "missing, though the receipt names it", _RESTORE)
        elif deep and crc32c([store.folder.get(path)]) != crc:
            yield Problem(unit.id, path, "not the fit that the unit was reduced by", _RESTORE)
    whole = set()
    for path, n_bytes in want.items():
        if path not in sizes:
            yield Problem(unit.id, path, "missing, though the receipt lists it", _ANEW)
        elif not sizes[path] == signed[path].n_bytes == n_bytes:
            what = f"{sizes[path]} bytes, receipt {signed[path].n_bytes}, layout {n_bytes}"
            yield Problem(unit.id, path, what, _ANEW)
        else:
            whole.add(path)
    if deep:
        valid = store.valid_chunk(unit, receipt.invalid)
        for path in sorted(whole):
            damage = _damage(store, unit, path, signed[path].crc32c, valid)
            if damage:
                yield Problem(unit.id, path, damage, _ANEW)


def _damage(store: FeatureStore, unit: Unit, path: str, crc: int, valid: bytes) -> str | None:
    """What is wrong with the bytes of one object, None if nothing."""
    try:
        data = store.folder.get(path)
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
