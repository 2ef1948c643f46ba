"""Where in somebody's files the features of every row are: `source.parquet` of an imported store.

STORE.md, section 11. Workers read it in place of looking through the files again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import JsonValue

from drl_data.errors import InputError, StoreError, is_redacted
from drl_data.index import TarInfo, column_digest
from drl_data.objects import Buffer
from drl_data.spec_base import canonical_json

CATALOGUE_FORMAT = 1

_PLACE: list[pa.Field[Any]] = [
    pa.field("file", pa.int32()),
    pa.field("member", pa.string()),
    pa.field("offset", pa.int64()),
    pa.field("size", pa.int64()),
    pa.field("checksum", pa.int64()),
    pa.field("mtime", pa.float64()),
    pa.field("reason", pa.string()),
]
PLACE_TYPE = pa.struct(_PLACE)


class Place(NamedTuple):
    """Where one value is, or why it is nowhere."""

    file: int | None = None
    """Position in `files`."""
    member: str | None = None
    """Name in the tar, path below the root of a tree, column, tensor."""
    offset: int | None = None
    """Bytes, in the file; in Parquet the number of the row in the file."""
    size: int | None = None
    """Bytes; 0 in Parquet."""
    checksum: int = 0
    mtime: float = 0.0
    """Both of a tar's header, else 0."""
    reason: str | None = None
    """Null, or why there is no value."""


def nowhere(reason: str) -> Place:
    """The place of a value that there is none of."""
    return Place(reason=reason)


@dataclass(frozen=True)
class Catalogue:
    """The places of every row, in the order of the store's index.

    `table` has the columns `place_0`, `place_1`, ... : arrays in order, of each its places in
    order. `layouts` says what a file is like inside: file -> its tensors or columns.
    """

    table: pa.Table
    files: tuple[TarInfo, ...]
    layouts: dict[str, JsonValue]

    def places(self, number: int, start: int, stop: int) -> list[Place]:
        """Of rows `start` to `stop` (exclusive) at one place of the source."""
        column = self.table.column(f"place_{number}").slice(start, stop - start)
        return [Place(**place) for place in column.to_pylist()]

    def layout(self, file: int) -> dict[str, Any]:
        """What a file is like inside."""
        found = self.layouts.get(str(file), {})
        assert isinstance(found, dict)
        return found

    def digest(self) -> str:
        """SHA-256 of names, places, sizes and layouts; not of where the files lie, nor of values.

        The same files copied elsewhere give the same digest.
        """
        files: JsonValue = [[file.split, file.size] for file in self.files]
        total = hashlib.sha256(canonical_json([CATALOGUE_FORMAT, files, self.layouts]))
        flat = self.table.flatten()
        for name in flat.column_names:
            total.update(name.encode() + column_digest(flat.column(name)))
        return total.hexdigest()

    def n_without(self) -> int:
        """Rows that lack at least one value."""
        flat = self.table.flatten()
        reasons = [name for name in flat.column_names if name.endswith(".reason")]
        lacks = pc.is_valid(flat.column(reasons[0]))
        for name in reasons[1:]:
            lacks = pc.or_(lacks, pc.is_valid(flat.column(name)))
        return int(pc.sum(lacks).as_py() or 0)

    def with_files(self, files: Sequence[TarInfo]) -> Catalogue:
        """The same places in the same files, whose URLs may now hold other secrets."""
        return replace(self, files=tuple(files))

    def require_readable(self) -> None:
        """Refuse URLs that have lost their secrets.

        Raises:
            InputError: naming the first.
        """
        for file in self.files:
            if is_redacted(file.url):
                raise InputError(
                    f"{file.url}: a store keeps URLs without their secrets; run `drl import` with "
                    "the pipeline that has them"
                )

    def to_parquet(self) -> memoryview:
        """One Parquet file; files and layouts are in its metadata, URLs without their secrets."""
        about: JsonValue = {
            "format": CATALOGUE_FORMAT,
            "files": [asdict(replace(file, url=file.public_url)) for file in self.files],
            "layouts": self.layouts,
        }
        buffer = pa.BufferOutputStream()
        table = self.table.replace_schema_metadata({b"drl_data": canonical_json(about)})
        pq.write_table(table, buffer, compression="zstd")
        return memoryview(buffer.getvalue())

    @staticmethod
    def from_parquet(data: Buffer, place: str) -> Catalogue:
        """Parse `to_parquet`; `place` names it in errors.

        Raises:
            StoreError: if it is none, or damaged.
        """
        try:
            table = pq.read_table(pa.BufferReader(data))
            about = json.loads((table.schema.metadata or {})[b"drl_data"])
            if about["format"] != CATALOGUE_FORMAT:
                raise ValueError(f"format {about['format']}, want {CATALOGUE_FORMAT}")
            files = tuple(TarInfo(**file) for file in about["files"])
            return Catalogue(table.replace_schema_metadata(None), files, about["layouts"])
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{place}: not the catalogue of an import ({error!r}); `drl import --repair` with "
                "the store's pipeline restores it"
            ) from error


def place_columns(rows: Mapping[str, Sequence[Place]]) -> list[pa.Array]:
    """Columns of `PLACE_TYPE`."""
    return [pa.array([place._asdict() for place in places], PLACE_TYPE) for places in rows.values()]
