"""What all receipts of a store say together, added one by one: counts, spans, invalid rows.

Receipts are many, so none is kept: memory grows with invalid rows and gaps, not with units.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from drl_data.index import SampleIndex
from drl_data.plan import InvalidRow
from drl_data.receipts import Receipt
from drl_data.spec_base import canonical_json


class Ledger:
    """Receipts, added in the order of their units."""

    def __init__(self, receipts: Iterable[Receipt] = ()) -> None:
        self.n_units = self.n_ok = self.n_invalid = 0
        self.spans: list[tuple[int, int]] = []
        """Rows (start, stop) that receipts account for; adjoining ones are one."""
        self.invalid: list[InvalidRow] = []
        self._digest = hashlib.sha256()
        for receipt in receipts:
            self.add(receipt)

    def add(self, receipt: Receipt) -> None:
        """Account for one more unit."""
        self.n_units += 1
        self.n_ok += receipt.n_ok
        self.n_invalid += receipt.n_invalid
        self.invalid.extend(receipt.invalid)
        self._digest.update(canonical_json(receipt.content()))
        start, stop = receipt.start, receipt.stop
        if self.spans and self.spans[-1][1] == start:
            start = self.spans.pop()[0]
        self.spans.append((start, stop))

    @property
    def content(self) -> str:
        """SHA-256 of the receipts' contents, in order: equal for stores of equal features."""
        return self._digest.copy().hexdigest()

    def sample_table(self, index: SampleIndex) -> pa.Table:
        """One line per sample, in row order: `FeatureStore.samples` names the columns."""
        n = index.n_samples
        status = np.full(n, "pending", object)
        stage, reason = np.full(n, None, object), np.full(n, None, object)
        for start, stop in self.spans:
            status[start:stop] = "ok"
        for row in self.invalid:
            status[row.row], stage[row.row], reason[row.row] = "invalid", row.stage, row.reason
        urls = np.array([tar.public_url for tar in index.tars], object)
        table = index.table.select(["key", "split", "label", "caption"])
        table = table.add_column(0, "row", pa.array(np.arange(n)))
        tars = urls[np.asarray(index.table["tar"])]
        table = table.add_column(3, "tar", pa.array(tars, pa.string()))
        for name, values in (("status", status), ("stage", stage), ("reason", reason)):
            table = table.append_column(name, pa.array(values, pa.string()))
        return table
