"""A complete store says so: every row accounted for, every object there, the final sample table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import JsonValue

from drl_data.errors import StoreError
from drl_data.ledger import Ledger
from drl_data.objects import Buffer
from drl_data.shards import crc32c
from drl_data.spec import FORMAT_VERSION
from drl_data.spec_base import canonical_json
from drl_data.unit_checks import check_units

if TYPE_CHECKING:
    from drl_data.store import FeatureStore

MAX_NAMED = 3
"""Problems that a message spells out."""


def seal_content(ledger: Ledger, samples: Buffer) -> dict[str, JsonValue]:
    """What `sealed.json` holds: counts, the sample table's checksum, a digest of all receipts.

    `content` is equal for two stores with the same features, however they were computed.
    """
    return {
        "format": FORMAT_VERSION,
        "n_units": ledger.n_units,
        "n_ok": ledger.n_ok,
        "n_invalid": ledger.n_invalid,
        "content": ledger.content,
        "samples": {"n_bytes": memoryview(samples).nbytes, "crc32c": crc32c([samples])},
    }


def seal(store: FeatureStore) -> None:
    """Check receipts, sizes and counts, then write the sample table and the seal.

    Raises:
        StoreError: units are pending, an object is not there or has another size, a receipt is of
            other samples, or rows are not accounted for exactly once.
    """
    sizes = {info.path: info.size for info in store.folder.list()}
    ledger, named, n_problems = Ledger(), "", 0
    for report in check_units(store, sizes, store.index, deep=False):
        if report.receipt is not None:
            ledger.add(report.receipt)
        for problem in report.problems:
            n_problems += 1
            named += f"\n  {problem}" if n_problems <= MAX_NAMED else ""
    pending = [unit.id for unit in store.pending()]
    if pending:
        raise StoreError(
            f"{store.url}: {len(pending)} of {len(store.units)} units have no receipt, the first "
            f"is unit {pending[0]}; run `drl extract` again before sealing"
        )
    if n_problems:
        raise StoreError(
            f"{store.url}: not sealed, because {n_problems} things are not as the receipts "
            f"say:{named}"
        )
    table = ledger.sample_table(store.index)
    require_accounted(store, ledger, table)
    samples = _put_samples(store, table)
    store.folder.put_if_absent("sealed.json", [canonical_json(seal_content(ledger, samples))])


def require_accounted(store: FeatureStore, ledger: Ledger, table: pa.Table) -> None:
    """n_in = n_ok + n_invalid: over all receipts, and in the sample table.

    Raises:
        StoreError: naming both sides.
    """
    n_in = store.spec.n_samples
    if ledger.spans != [(0, n_in)]:
        raise StoreError(
            f"{store.url}: the receipts have rows {ledger.spans[:MAX_NAMED]}, want 0..{n_in}: each "
            "row exactly once"
        )
    status = table.column("status")
    in_table = [int(pc.sum(pc.equal(status, name)).as_py() or 0) for name in ("ok", "invalid")]
    counted = [ledger.n_ok, ledger.n_invalid]
    if sum(counted) != n_in or in_table != counted:
        raise StoreError(
            f"{store.url}: {n_in} samples went in; receipts have {counted[0]} ok + {counted[1]} "
            f"invalid, the sample table {in_table[0]} ok + {in_table[1]} invalid"
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
