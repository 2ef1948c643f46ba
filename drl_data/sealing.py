"""A complete store says so: every row accounted for, every object there, the final sample table."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import JsonValue

from drl_data.errors import StoreError
from drl_data.objects import Buffer
from drl_data.receipts import Receipt, sample_table
from drl_data.shards import crc32c
from drl_data.spec import FORMAT_VERSION
from drl_data.spec_base import canonical_json
from drl_data.unit_checks import check_units

if TYPE_CHECKING:
    from drl_data.store import FeatureStore

MAX_NAMED = 3
"""Problems that a message spells out."""


def seal_content(receipts: Mapping[int, Receipt], samples: Buffer) -> dict[str, JsonValue]:
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
        "samples": {"n_bytes": memoryview(samples).nbytes, "crc32c": crc32c([samples])},
    }


def seal(store: FeatureStore) -> None:
    """Check receipts, sizes and counts, then write the sample table and the seal.

    Raises:
        StoreError: units are pending, an object is not there or has another size, a receipt is of
            other samples, or rows are not accounted for exactly once.
    """
    sizes = {info.path: info.size for info in store.folder.list()}
    reports = check_units(store, sizes, store.index, deep=False)
    receipts = {r.receipt.unit: r.receipt for r in reports if r.receipt is not None}
    pending = [unit.id for unit in store.pending()]
    if pending:
        raise StoreError(
            f"{store.url}: {len(pending)} of {len(store.units)} units have no receipt, the first "
            f"is unit {pending[0]}; run `drl extract` again before sealing"
        )
    problems = [problem for report in reports for problem in report.problems]
    if problems:
        named = "".join(f"\n  {problem}" for problem in problems[:MAX_NAMED])
        raise StoreError(
            f"{store.url}: not sealed, because {len(problems)} things are not as the receipts "
            f"say:{named}"
        )
    table = sample_table(store.index, receipts)
    require_accounted(store, receipts, table)
    samples = _put_samples(store, table)
    store.folder.put_if_absent("sealed.json", [canonical_json(seal_content(receipts, samples))])


def require_accounted(
    store: FeatureStore, receipts: Mapping[int, Receipt], table: pa.Table
) -> None:
    """n_in = n_ok + n_invalid: over all receipts, and in the sample table.

    Raises:
        StoreError: naming both sides.
    """
    n_ok = sum(receipt.n_ok for receipt in receipts.values())
    n_invalid = sum(receipt.n_invalid for receipt in receipts.values())
    n_in = store.spec.n_samples
    covered = 0
    for unit in store.units:
        receipt = receipts[unit.id]
        if receipt.start != covered:
            raise StoreError(
                f"{store.url}: the receipt of unit {unit.id} has rows {receipt.start}.."
                f"{receipt.stop}, want them to begin at row {covered}: each row exactly once"
            )
        covered = receipt.stop
    status = table.column("status")
    in_table = [int(pc.sum(pc.equal(status, name)).as_py() or 0) for name in ("ok", "invalid")]
    if covered != n_in or n_ok + n_invalid != n_in or in_table != [n_ok, n_invalid]:
        raise StoreError(
            f"{store.url}: {n_in} samples went in; receipts have {n_ok} ok + {n_invalid} invalid "
            f"of {covered} rows, the sample table {in_table[0]} ok + {in_table[1]} invalid"
        )


def _put_samples(store: FeatureStore, table: pa.Table) -> memoryview:
    """Put the sample table, over what a sealer that died may have left; its bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    mine = memoryview(sink.getvalue())
    if store.folder.put_if_absent("samples.parquet", [mine]):
        return mine
    if store.folder.get("samples.parquet") != mine:
        store.folder.put("samples.parquet", [mine])  # before sealed.json nothing refers to it
    return mine


def same_table(data: Buffer, table: pa.Table) -> bool:
    """Whether a Parquet file holds this table; another library writes other bytes of it."""
    try:
        return bool(pq.read_table(pa.BufferReader(data)).equals(table))
    except (pa.ArrowException, OSError, ValueError):
        return False
