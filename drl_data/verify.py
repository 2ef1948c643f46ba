"""Is a store as STORE.md says? Metadata, index, receipts, sizes, seal; deep: every byte."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pyarrow as pa
from pydantic import JsonValue

from drl_data.catalogue import Catalogue
from drl_data.checksums import parse_json
from drl_data.errors import InputError, ObjectNotFoundError, StoreError
from drl_data.import_spec import ImportSpec
from drl_data.index import SampleIndex
from drl_data.ledger import Ledger
from drl_data.objects import Buffer
from drl_data.receipts import fit_path, receipt_path
from drl_data.sealing import require_accounted, same_table, seal_content
from drl_data.shards import crc32c
from drl_data.spec import FORMAT_VERSION
from drl_data.spec_base import canonical_json
from drl_data.unit_checks import REPAIR, Problem, Sizes, check_units

if TYPE_CHECKING:
    from drl_data.store import FeatureStore


IMPORT_REPAIR = "`drl import --repair` with the store's pipeline restores it"


def verify(store: FeatureStore, *, deep: bool) -> list[Problem]:
    """Problems of the store's own objects first, then of each unit in order."""
    sizes = {info.path: info.size for info in store.folder.list()}
    own, index = check_own(store, sizes)
    ledger, problems = Ledger(), own
    for report in check_units(store, sizes, index, deep=deep):
        problems.extend(report.problems)
        if report.receipt is not None:
            ledger.add(report.receipt)
    return [*problems, *check_seal(store, sizes, ledger, index, deep=deep)]


def foreign_objects(store: FeatureStore) -> list[str]:
    """Paths of objects that are not the store's; they may lie there, and are not read."""
    known = {*store.metadata(), "index.parquet", "index.json", "samples.parquet", "sealed.json"}
    if isinstance(store.spec, ImportSpec):
        known.update(("source.parquet", "source.json"))
    known.update(fit_path(array.name) for array in store.features)
    for unit in store.units:
        known.update(path for _, _, path in store.shards(unit))
        known.update((f"valid/c/{unit.id}", receipt_path(unit)))
    return sorted(info.path for info in store.folder.list() if info.path not in known)


def index_record(data: Buffer) -> bytes:
    """`index.json`: size and checksum of `index.parquet`, which says where the tars lie, too."""
    record: dict[str, JsonValue] = {
        "format": FORMAT_VERSION,
        "n_bytes": memoryview(data).nbytes,
        "crc32c": crc32c([data]),
    }
    return canonical_json(record)


def same_index(data: Buffer, index: SampleIndex) -> bool:
    """Whether a Parquet file holds this index; another library writes other bytes of it."""
    try:
        return SampleIndex.from_parquet(data, "index").to_parquet() == index.to_parquet()
    except InputError:
        return False


def check_own(store: FeatureStore, sizes: Sizes) -> tuple[list[Problem], SampleIndex | None]:
    """What is wrong with the objects that are no unit's, and the index unless it is damaged."""
    problems = []
    for path, want in store.metadata().items():
        if path not in sizes:
            problems.append(Problem(None, path, "missing", REPAIR))
        elif bytes(store.folder.get(path)) != want:
            what = "not what the store's spec implies; damaged, or edited"
            problems.append(Problem(None, path, what, REPAIR))
    wrong, index = check_index(store, sizes)
    return [*problems, *wrong, *check_catalogue(store, sizes)], index


def check_catalogue(store: FeatureStore, sizes: Sizes) -> list[Problem]:
    """What is wrong with the catalogue of imported features."""
    if not isinstance(store.spec, ImportSpec):
        return []
    for path in ("source.parquet", "source.json"):
        if path not in sizes:
            return [Problem(None, path, "missing", IMPORT_REPAIR)]
    data, record = store.folder.get("source.parquet"), store.folder.get("source.json")
    what = None
    if bytes(record) != index_record(data):
        what = f"not as source.json says: {bytes(record)[:99]!r}, want {index_record(data)!r}"
    else:
        try:
            found = Catalogue.from_parquet(data, f"{store.url}/source.parquet").digest()
            if found != store.spec.files:
                what = f"of files {found}, the store's spec says {store.spec.files}"
        except StoreError as error:
            what = str(error)
    return [] if what is None else [Problem(None, "source.parquet", what, IMPORT_REPAIR)]


def check_index(store: FeatureStore, sizes: Sizes) -> tuple[list[Problem], SampleIndex | None]:
    """What is wrong with the index, and the index if nothing is."""
    missing = [path for path in ("index.parquet", "index.json") if path not in sizes]
    if missing:
        return [Problem(None, path, "missing", REPAIR) for path in missing], None
    data, record = store.folder.get("index.parquet"), store.folder.get("index.json")
    if bytes(record) != index_record(data):
        what = f"not as index.json says: {bytes(record)[:99]!r}, want {index_record(data)!r}"
        return [Problem(None, "index.parquet", what, REPAIR)], None
    try:
        index = SampleIndex.from_parquet(data, f"{store.url}/index.parquet")
    except InputError as error:
        return [Problem(None, "index.parquet", str(error), REPAIR)], None
    if index.digest() != store.spec.dataset:
        what = f"of dataset {index.digest()}, the store's spec says {store.spec.dataset}"
        return [Problem(None, "index.parquet", what, REPAIR)], None
    return [], index


def check_seal(
    store: FeatureStore,
    sizes: Sizes,
    ledger: Ledger,
    index: SampleIndex | None,
    *,
    deep: bool,
) -> Iterator[Problem]:
    """What is wrong with the seal, where there is one; `ledger` has all sound receipts."""
    if "sealed.json" not in sizes:
        return
    try:
        samples = store.folder.get("samples.parquet")
    except ObjectNotFoundError:
        what = "missing, though the store is sealed"
        yield Problem(None, "samples.parquet", what, REPAIR)
        return
    want = seal_content(ledger, samples)
    sealed = store.folder.get("sealed.json")
    if ledger.n_units < len(store.units):  # the seal's digest is of all receipts
        same = _samples_of(sealed) == want["samples"]
    else:
        same = bytes(sealed) == canonical_json(want)
    if not same:
        what = "does not match the receipts or samples.parquet"
        yield Problem(None, "sealed.json", what, REPAIR)
    elif deep and index is not None and ledger.n_units == len(store.units):
        yield from _check_samples(store, ledger, index, samples)


def _samples_of(sealed: Buffer) -> JsonValue:
    try:
        value = parse_json(sealed)
    except ValueError:
        return None
    return value.get("samples") if isinstance(value, dict) else None


def _check_samples(
    store: FeatureStore, ledger: Ledger, index: SampleIndex, samples: Buffer
) -> Iterator[Problem]:
    table: pa.Table = ledger.sample_table(index)
    if not same_table(samples, table):
        what = "not the statuses that the receipts say"
        yield Problem(None, "samples.parquet", what, REPAIR)
    try:
        require_accounted(store, ledger, table)
    except StoreError as error:
        yield Problem(None, "sealed.json", str(error), REPAIR)
