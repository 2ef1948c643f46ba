"""Labels that lie in a table of their own, for tars without them: joined to samples by key."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.parquet as pq

from drl_data.errors import InputError, ObjectNotFoundError, visible
from drl_data.objects import open_parent
from drl_data.spec import LabelsSpec
from drl_data.tar_samples import caption_text, label_text


@dataclass(frozen=True)
class LabelTable:
    """Lines of a table by key; columns that the spec does not name are not here."""

    spec: LabelsSpec
    keys: pa.Array
    columns: dict[str, pa.Array]
    """label, caption, split: texts, null where there is none."""
    digest: str
    """SHA-256 of the file."""

    def onto(self, table: pa.Table) -> tuple[pa.Table, int]:
        """Samples with what the table has of them, and how many it has.

        Labels and captions of the tars give way where the table has such a column, also where it
        has no line of a sample; a split only where it has one.
        """
        place = pc.index_in(table.column("key"), value_set=self.keys)
        for name, values in self.columns.items():
            new = values.take(place.combine_chunks())
            if name == "split":
                new = pc.coalesce(pa.chunked_array([new]), table.column("split"))
            at = table.column_names.index(name)
            table = table.set_column(at, table.field(name), new)
        return table, int(pc.sum(pc.is_valid(place)).as_py() or 0)


def read_label_table(spec: LabelsSpec) -> LabelTable:
    """The table of labels at a path or URL: Parquet, or CSV with a line of names.

    Raises:
        InputError: it is missing, neither, lacks a column, or has two lines of one key.
    """
    folder, name = open_parent(spec.file)
    try:
        data = folder.get(name)
    except ObjectNotFoundError as error:
        raise InputError(f"{spec.file}: no such table (dataset.labels.file)") from error
    wanted = {
        what: column
        for what, column in (
            ("key", spec.key), ("label", spec.label), ("caption", spec.caption),
            ("split", spec.split),
        )
        if column is not None
    }  # fmt: skip
    read = _columns(memoryview(data), spec, list(wanted.values()))
    keys = [None if key in (None, "") else str(key) for key in read[spec.key]]
    if None in keys:
        raise InputError(f"{spec.file}: line {keys.index(None) + 1} has no {spec.key!r}")
    twice = [key for key, n in Counter(keys).items() if n > 1]
    if twice:
        raise InputError(
            f"{spec.file}: {len(twice)} keys have several lines, {visible(str(twice[0]))!r} for "
            "example; want one line for each sample"
        )
    texts = {"label": label_text, "caption": caption_text, "split": _split_text}
    columns = {
        what: pa.array([texts[what](value) for value in read[column]], pa.string())
        for what, column in wanted.items()
        if what != "key"
    }
    digest = hashlib.sha256(data).hexdigest()
    return LabelTable(spec, pa.array(keys, pa.string()), columns, digest)


def digest_of_table(spec: LabelsSpec) -> str | None:
    """SHA-256 of a table's file; None if it is not there."""
    folder, name = open_parent(spec.file)
    try:
        return hashlib.sha256(folder.get(name)).hexdigest()
    except ObjectNotFoundError:
        return None


def _columns(data: memoryview, spec: LabelsSpec, names: list[str]) -> dict[str, list[Any]]:
    is_parquet = bytes(data[:4]) == b"PAR1"
    try:
        if is_parquet:
            file = pq.ParquetFile(pa.BufferReader(data))
            there = file.schema_arrow.names
        else:
            first = io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", newline="").readline()
            delimiter = "\t" if spec.file.split("?")[0].endswith(".tsv") else ","
            there = pcsv.read_csv(
                io.BytesIO(first.rstrip("\r\n").encode() + b"\n"),
                parse_options=pcsv.ParseOptions(delimiter=delimiter),
            ).column_names
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{spec.file}: neither Parquet nor CSV ({error})") from error
    lacking = [name for name in names if name not in there]
    if lacking:
        raise InputError(
            f"{spec.file}: no column {lacking[0]!r} (dataset.labels); it has "
            f"{visible(', '.join(there))[:200]}"
        )
    try:
        if is_parquet:
            table = file.read(columns=names)
        else:
            # Keys like 0001 are texts, not numbers.
            table = pcsv.read_csv(
                io.BytesIO(bytes(data).removeprefix(b"\xef\xbb\xbf")),
                parse_options=pcsv.ParseOptions(delimiter=delimiter),
                convert_options=pcsv.ConvertOptions(
                    column_types=dict.fromkeys(names, pa.string()), include_columns=names
                ),
            )
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{spec.file}: cannot be read ({error})") from error
    return {name: table.column(name).to_pylist() for name in names}


def _split_text(value: object) -> str | None:
    return str(value) if value not in (None, "") else None
