"""Units of work whose product is one file each, outside a feature store: tars, tables.

    job.json                what is made, from what: claims the folder
    <name of a unit>        its product, put if absent
    receipts/00000000.json  a unit is done when its receipt exists (receipts.py)

The rules are those of a store: objects are write-once, the receipt comes last, and to resume is to
run the same command again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from pydantic import JsonValue, ValidationError

from drl_data.checksums import checked_json, parse_json, signed_json
from drl_data.errors import (
    ConflictError,
    InputError,
    ObjectNotFoundError,
    StoreError,
    StoreMismatchError,
    redacted,
)
from drl_data.objects import Buffer, Folder, RetryCount, counted, open_folder
from drl_data.plan import InvalidRow, Unit, plan_units
from drl_data.receipts import ObjectRecord, Receipt, RunRecord, UnitCounts, receipt_path
from drl_data.shard_reader import in_turn
from drl_data.shards import crc32c
from drl_data.spec_base import Positive, Spec, canonical_json, differences

JOB = "job.json"

NO_COUNTS = UnitCounts()


class JobSpec(Spec):
    """The identity of a job's products: everything that changes a byte of them."""

    format: int = 1
    kind: str
    """Verb of the command line that makes them."""
    content: dict[str, JsonValue]
    """What is made, from what: sections of the pipeline, digests of data and weights."""
    n_rows: Positive
    """Things that are made, one for each row of the plan."""
    rows_per_unit: Positive

    def fingerprint(self) -> str:
        """32 hexadecimal digits of the SHA-256 of the canonical JSON."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json"))).hexdigest()[:32]


@dataclass(frozen=True)
class UnitJob:
    """A folder of products, one for each unit, with their receipts."""

    folder: Folder
    spec: JobSpec

    @classmethod
    def create(cls, url: str, spec: JobSpec) -> UnitJob:
        """Claim the folder, or open it where it holds this very job.

        Raises:
            StoreMismatchError: it holds another job; what differs is listed.
            StoreError: something else is there under the name of `job.json`.
        """
        folder = open_folder(url)
        if not folder.put_if_absent(
            JOB, [canonical_json(signed_json(spec.model_dump(mode="json")))]
        ):
            lines = differences(
                cls.open(url).spec.model_dump(mode="json"), spec.model_dump(mode="json")
            )
            if lines:
                listed = "".join(f"\n  {line}" for line in lines)
                raise StoreMismatchError(
                    f"{redacted(url)} has the products of another job (there != asked for):"
                    f"{listed}\nname another folder, or change the pipeline back"
                )
        return cls(folder, spec)

    @classmethod
    def open(cls, url: str) -> UnitJob:
        """The job of a folder.

        Raises:
            InputError: there is none.
            StoreError: its `job.json` is none, or damaged.
        """
        folder = open_folder(url)
        try:
            data = folder.get(JOB)
        except ObjectNotFoundError as error:
            raise InputError(f"{redacted(url)}: no products of a job here (no {JOB})") from error
        try:
            return cls(folder, JobSpec.model_validate(checked_json(parse_json(data))))
        except (ValueError, ValidationError) as error:
            raise StoreError(
                f"{redacted(url)}/{JOB}: not a job of this version ({error})"
            ) from error

    @cached_property
    def units(self) -> list[Unit]:
        """The plan: units of consecutive rows."""
        return plan_units(self.spec.n_rows, self.spec.rows_per_unit)

    def pending(self, units: Iterable[Unit] | None = None) -> list[Unit]:
        """Units without a receipt, of `units` or of all, in their order; one listing."""
        signed = {info.path for info in self.folder.list("receipts")}
        return [
            u for u in (self.units if units is None else units) if receipt_path(u) not in signed
        ]

    def receipt(self, unit: Unit) -> Receipt | None:
        """The receipt of a unit, None if it is not done.

        Raises:
            StoreError: it is no receipt, or that of another job.
        """
        path = receipt_path(unit)
        place = f"{redacted(self.folder.url)}/{path}"
        try:
            found = Receipt.from_json(self.folder.get(path), place)
        except ObjectNotFoundError:
            return None
        if found.fingerprint != self.spec.fingerprint() or found.unit != unit.id:
            raise StoreError(f"{place}: the receipt of another job or unit; delete it")
        return found

    def receipts(self) -> Iterator[Receipt]:
        """Receipts of the units that are done, in order; some hundred are held at a time."""
        pending = {unit.id for unit in self.pending()}
        done = [unit for unit in self.units if unit.id not in pending]
        return (receipt for receipt in in_turn(self.receipt, done) if receipt is not None)

    def commit(
        self,
        unit: Unit,
        path: str,
        product: Sequence[Buffer],
        invalid: Sequence[InvalidRow],
        run: RunRecord,
        rows_in: Callable[[Buffer], Sequence[int]],
        counts: UnitCounts = NO_COUNTS,
    ) -> Receipt:
        """Put the product of a unit (the concatenation of the parts) and sign it; the first wins.

        `rows_in` reads the rows that a product has. A product that is there already is kept if it
        has the rows that this one has: an attempt that another process or GPU made may differ in
        the last bits, and one of them is enough.

        Raises:
            ConflictError: what is there has other rows than this product has.
        """
        retries = RetryCount()
        folder = counted(self.folder, retries)
        place = f"{redacted(self.folder.url)}/{path}"
        lost = {row.row for row in invalid}
        ok = [row for row in range(unit.start, unit.stop) if row not in lost]
        adopted: tuple[str, ...] = ()
        parts: Sequence[Buffer] = product
        if not folder.put_if_absent(path, parts):
            parts, adopted = [folder.get(path)], (path,)
            there = sorted(rows_in(parts[0]))
            if there != ok:
                raise ConflictError(
                    f"{place}: there already with {len(there)} rows, this attempt has {len(ok)}; "
                    "nothing was overwritten. Delete that object and run the same command again"
                )
        n_bytes = sum(memoryview(part).nbytes for part in parts)
        receipt = Receipt(
            fingerprint=self.spec.fingerprint(),
            unit=unit.id,
            start=unit.start,
            stop=unit.stop,
            n_ok=len(ok),
            n_invalid=len(lost),
            invalid=tuple(sorted(invalid, key=lambda row: row.row)),
            counts=counts,
            objects=(ObjectRecord(path=path, n_bytes=n_bytes, crc32c=crc32c(list(parts))),),
            run=run.model_copy(update={"adopted": adopted, "retries": run.retries + retries.value}),
        )
        if folder.put_if_absent(receipt_path(unit), [receipt.to_json()]):
            return receipt
        signed = self.receipt(unit)
        if signed is None or signed.content() != receipt.content():
            raise ConflictError(
                f"{place}: another attempt signed this unit with other rows or counts; delete "
                "its receipt and product, and run the same command again"
            )
        return signed

    def problems(self) -> list[str]:
        """What is not as the receipts say: pending, missing or changed; reads every product."""
        lines = [f"unit {unit.id}: pending" for unit in self.pending()]
        for receipt in self.receipts():
            for record in receipt.objects:
                try:
                    data = self.folder.get(record.path)
                except ObjectNotFoundError:
                    lines.append(f"unit {receipt.unit}: {record.path} is missing")
                    continue
                if len(data) != record.n_bytes or crc32c([data]) != record.crc32c:
                    lines.append(f"unit {receipt.unit}: {record.path} is not what was signed")
        return lines
