"""Tars to rows: key, tar, offset, size, label, caption of every sample, from tar headers.

Samples are as WebDataset defines them: the key is the name up to the first dot after the last
slash, the rest in lower case is the extension, consecutive members with one key are one sample.
Every sample has a row; one without a usable image has a `reason`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import JsonValue

from drl_data.errors import InputError, ObjectNotFoundError, is_redacted, redacted, visible
from drl_data.label_table import LabelTable, digest_of_table, read_label_table
from drl_data.objects import Buffer, Folder, open_parent, split_url
from drl_data.progress import SILENT, Progress
from drl_data.spec import DatasetSpec
from drl_data.spec_base import StrTuple, canonical_json
from drl_data.tar import GzipSource, Member, open_source
from drl_data.tar_samples import (
    Sample,
    caption_text,
    field_of,
    label_text,
    read_samples,
    resolve_labels,
)
from drl_data.urls import expand_urls as expand_urls
from drl_data.urls import missing

log = logging.getLogger(__name__)

INDEX_FORMAT = 1

_FIELDS: list[pa.Field[Any]] = [
    pa.field("key", pa.string(), nullable=False),
    pa.field("split", pa.string(), nullable=False),
    pa.field("tar", pa.int32(), nullable=False),
    pa.field("member", pa.string(), nullable=False),
    pa.field("offset", pa.int64(), nullable=False),
    pa.field("size", pa.int64(), nullable=False),
    pa.field("label", pa.int64()),
    pa.field("caption", pa.string()),
    pa.field("reason", pa.string()),
    pa.field("checksum", pa.int64(), nullable=False),
    pa.field("mtime", pa.float64(), nullable=False),
]
_SCHEMA = pa.schema(_FIELDS)
_SCAN_FIELDS: list[pa.Field[Any]] = [
    pa.field("label", pa.string()) if column.name == "label" else column
    for column in _FIELDS
    if column.name != "tar"
]
_SCAN_SCHEMA = pa.schema(_SCAN_FIELDS)
_IDENTITY = ("key", "member", "size", "label", "caption", "reason", "checksum", "mtime")
_NO_MEMBER = Member("", 0, 0, 0.0, 0, False)


@dataclass(frozen=True)
class TarInfo:
    """One tar of the input: where it is, and its size and tag when it was indexed."""

    url: str
    """As it was given; an index that was saved and loaded has it without secrets (`public_url`)."""
    split: str
    size: int
    etag: str
    compression: Literal["none", "gzip"]

    @property
    def public_url(self) -> str:
        """The URL without user, password and query: what is written, and what names the tar."""
        return redacted(self.url)


@dataclass(frozen=True)
class SampleIndex:
    """Every sample of a dataset, in row order.

    `table` has the columns key, split, tar (position in `tars`), member (name of the image member,
    "" without one), offset and size (bytes of the image's data in the uncompressed tar), label
    (null without one), caption (null without one), reason (null, or why there is no usable image),
    checksum and mtime (of the image member's header). `label_names` is set when labels are not
    integers: a label is then a position in it.
    """

    table: pa.Table
    tars: tuple[TarInfo, ...]
    label_names: tuple[str, ...] | None
    dataset: DatasetSpec
    labels_digest: str | None = None
    """SHA-256 of the file of `dataset.labels`. What it says of the samples is in the table."""

    @property
    def n_samples(self) -> int:
        """Number of rows."""
        return int(self.table.num_rows)

    @property
    def n_unlabelled(self) -> int:
        """Rows without a label, or with one that could not be read."""
        return int(self.table.column("label").null_count)

    @property
    def n_repeated_keys(self) -> int:
        """Rows whose key an earlier row has. Both are rows, but who joins by key confuses them, and
        their noise is the same."""
        return self.n_samples - int(pc.count_distinct(self.table.column("key")).as_py())

    def with_urls(self, urls: Sequence[str]) -> SampleIndex:
        """The same index of the same tars, whose URLs may now hold other secrets.

        Raises:
            InputError: if they are not the same URLs but for their secrets.
        """
        ours, theirs = [tar.public_url for tar in self.tars], [redacted(url) for url in urls]
        if ours != theirs:
            pairs = zip_longest(ours, theirs, fillvalue="none")
            mine, given = next((a, b) for a, b in pairs if a != b)
            raise InputError(
                f"other tars than those of the index: {given!r}, want {mine!r}; give the tars that "
                "were indexed, in their order, or index again"
            )
        moved = zip(self.tars, urls, strict=True)
        return self.with_tars([replace(tar, url=url) for tar, url in moved])

    def located(self, dataset: DatasetSpec) -> SampleIndex:
        """The same index, reading where `dataset` says if its own URLs have lost their secrets.

        Raises:
            InputError: if `dataset` names other tars.
        """
        if not any(is_redacted(tar.url) for tar in self.tars):
            return self
        return self.with_urls([url for _, url in list_tars(dataset)])

    def with_tars(self, tars: Sequence[TarInfo]) -> SampleIndex:
        """The same rows in the same tars, which lie elsewhere or were written again.

        Raises:
            InputError: if they are not as many.
        """
        if len(tars) != len(self.tars):
            raise InputError(
                f"{len(tars)} tars given for the {len(self.tars)} of the index; index again"
            )
        return replace(self, tars=tuple(tars))

    def public_tars(self) -> tuple[TarInfo, ...]:
        """The tars as they are saved: without the secrets of their URLs."""
        return tuple(replace(tar, url=tar.public_url) for tar in self.tars)

    def slice(self, start: int, stop: int) -> pa.Table:
        """Rows `start` to `stop` (exclusive), without a copy."""
        return self.table.slice(start, stop - start)

    def digest(self) -> str:
        """SHA-256 of the content: rows and labels, not where the tars lie.

        The same tars copied elsewhere give the same digest. The images' bytes are represented by
        their headers (size, checksum, mtime): they are not read.
        """
        total = hashlib.sha256(canonical_json([INDEX_FORMAT, self._label_json()]))
        for name in _SCHEMA.names:
            total.update(name.encode() + column_digest(self.table.column(name)))
        return total.hexdigest()

    def digest_rows(self, start: int, stop: int) -> str:
        """SHA-256 of what rows `start` to `stop` (exclusive) are: keys, images' headers, labels,
        captions; not where they lie, nor in which split. Equal for equal samples in equal order."""
        total, rows = hashlib.sha256(), self.slice(start, stop)
        for name in _IDENTITY:
            total.update(name.encode() + column_digest(rows.column(name)))
        return total.hexdigest()

    def to_parquet(self) -> memoryview:
        """One Parquet file; tars, label names and the dataset are in its metadata.

        URLs are written without their secrets: `with_urls` and `located` give them back.
        """
        about: dict[str, JsonValue] = {
            "format": INDEX_FORMAT,
            "tars": [asdict(tar) for tar in self.public_tars()],
            "label_names": self._label_json(),
            "dataset": _without_secrets(self.dataset).model_dump(
                mode="json", exclude=None if self.dataset.labels else {"labels"}
            ),
        }
        if self.labels_digest is not None:
            about["labels_digest"] = self.labels_digest
        buffer = pa.BufferOutputStream()
        table = self.table.replace_schema_metadata({b"drl_data": canonical_json(about)})
        pq.write_table(table, buffer, compression="zstd")
        return memoryview(buffer.getvalue())

    def save(self, url: str) -> None:
        """Write `to_parquet` at a path or URL."""
        folder, name = open_parent(url)
        folder.put(name, [self.to_parquet()])

    @staticmethod
    def load(url: str) -> SampleIndex:
        """Read what `save` wrote.

        Raises:
            InputError: if there is no such file, or it is not an index of this version.
        """
        folder, name = open_parent(url)
        try:
            data = folder.get(name)
        except ObjectNotFoundError as error:
            raise InputError(f"{url}: no such index; make one with `drl index`") from error
        return SampleIndex.from_parquet(data, url)

    @staticmethod
    def from_parquet(data: Buffer, place: str) -> SampleIndex:
        """Parse `to_parquet`; `place` names it in errors.

        Raises:
            InputError: if it is not an index of this version, or damaged.
        """
        try:
            table = pq.read_table(pa.BufferReader(data))
            about = json.loads((table.schema.metadata or {}).get(b"drl_data", b"{}"))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise InputError(
                f"{place}: not a Parquet file ({error}); index the tars again"
            ) from error
        if about.get("format") != INDEX_FORMAT:
            raise InputError(
                f"{place}: index format {about.get('format')}, want {INDEX_FORMAT}; index the tars "
                "again"
            )
        try:
            names = about["label_names"]
            return SampleIndex(
                table.replace_schema_metadata(None).select(_SCHEMA.names),
                tuple(TarInfo(**tar) for tar in about["tars"]),
                None if names is None else tuple(names),
                DatasetSpec.model_validate(about["dataset"]),
                about.get("labels_digest"),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{place}: damaged index ({error!r}); index the tars again") from error

    def _label_json(self) -> JsonValue:
        return None if self.label_names is None else list(self.label_names)


def build_index(
    dataset: DatasetSpec, *, n_threads: int = 16, progress: Progress = SILENT
) -> SampleIndex:
    """Read the headers of every tar, `n_threads` tars at a time.

    Raises:
        InputError: if a tar is missing, truncated, corrupt or listed twice, a pattern matches
            nothing, or there is no sample at all.
    """
    tars = list_tars(dataset)
    labels = None if dataset.labels is None else read_label_table(dataset.labels)
    folders = {split_url(url)[0]: open_parent(url)[0] for _, url in tars}

    def scan(tar: tuple[str, str]) -> tuple[TarInfo, pa.Table]:
        return _scan(*tar, folders[split_url(tar[1])[0]], dataset)

    infos, tables, n_samples = [], [], 0
    pool = ThreadPoolExecutor(n_threads, thread_name_prefix="drl-index")
    try:
        with progress.bar("index", len(tars), "tars") as bar:
            for info, table in pool.map(scan, tars):
                infos.append(info)
                tables.append(table)
                n_samples += table.num_rows
                bar.advance(1, samples=n_samples)
    finally:
        pool.shutdown(cancel_futures=True)
    if not n_samples:
        names = ", ".join(url for _, url in tars[:3])
        raise InputError(
            f"no samples in {len(tars)} tars ({names}{', ...' if len(tars) > 3 else ''}); want "
            f"members named KEY.EXTENSION with an extension of {list(dataset.image)}"
        )
    if labels is not None:
        tables = _labelled(tables, labels, n_samples)
    table, label_names = _joined(infos, tables)
    index = SampleIndex(
        table, tuple(infos), label_names, dataset, None if labels is None else labels.digest
    )
    _warn_of_repeated_keys(index)
    return index


def _labelled(tables: Sequence[pa.Table], labels: LabelTable, n_samples: int) -> list[pa.Table]:
    """Samples with the labels of a table.

    Raises:
        InputError: it has none of them.
    """
    done = [labels.onto(table) for table in tables]
    n_found = sum(n for _, n in done)
    if not n_found:
        ours = next(table.column("key")[0].as_py() for table in tables if table.num_rows)
        raise InputError(
            f"{labels.spec.file}: has none of the {n_samples} samples; their keys are like "
            f"{visible(ours)!r}, those of its column {labels.spec.key!r} like "
            f"{visible(str(labels.keys[0])) if len(labels.keys) else 'none'!r}"
        )
    if n_found < n_samples:
        log.warning(
            "%s: no line for %d of %d samples, which are without its labels",
            redacted(labels.spec.file), n_samples - n_found, n_samples,
        )  # fmt: skip
    return [table for table, _ in done]


def _rules(dataset: DatasetSpec) -> dict[str, JsonValue]:
    """How samples are read, wherever they lie."""
    rules = {"image", "label", "caption", "labels"}
    return _without_secrets(dataset).model_dump(mode="json", include=rules)


def _warn_of_repeated_keys(index: SampleIndex) -> None:
    if not index.n_repeated_keys:
        return
    counts = pc.value_counts(index.table.column("key"))
    first = pc.filter(counts.field("values"), pc.greater(counts.field("counts"), 1))[0]
    log.warning(
        "%d of %d samples have a key that an earlier sample has, for example %s; each has its row, "
        "but the same noise, and a join by key confuses them: name members differently",
        index.n_repeated_keys, index.n_samples, visible(first.as_py()),
    )  # fmt: skip


def if_current(
    index: SampleIndex, dataset: DatasetSpec, *, n_threads: int = 16
) -> SampleIndex | None:
    """`index` with the URLs of `dataset`, if `build_index(dataset)` would find what it found then:
    the same tars (but for secrets in their URLs), with the same sizes and tags, read by the same
    rules; else None. One HEAD request a tar; no tar is read.

    Raises:
        InputError: if a pattern matches nothing or a tar is missing.
    """
    if _rules(index.dataset) != _rules(dataset):
        return None
    if dataset.labels is not None and index.labels_digest != digest_of_table(dataset.labels):
        return None
    tars = list_tars(dataset)
    if [(t.split, t.public_url) for t in index.tars] != [(s, redacted(url)) for s, url in tars]:
        return None

    def head(tar: tuple[str, str]) -> tuple[int, str]:
        folder, name = open_parent(tar[1])
        try:
            info = folder.head(name)
        except ObjectNotFoundError as error:
            raise missing(tar[1], folder, name) from error
        return info.size, info.etag

    with ThreadPoolExecutor(n_threads, thread_name_prefix="drl-index") as pool:
        found = list(pool.map(head, tars))
    same = found == [(tar.size, tar.etag) for tar in index.tars]
    return index.with_urls([url for _, url in tars]) if same else None


def joined_index(indices: Sequence[SampleIndex]) -> SampleIndex:
    """The index of all samples together, as `build_index` finds it in all tars: of each split the
    tars of the first index, then those of the next; splits in the order in which they are met.

    Raises:
        InputError: tars that were read by other rules, or one that is in several indices.
    """
    first = indices[0].dataset
    for index in indices[1:]:
        if _rules(index.dataset) != _rules(first):
            raise InputError(
                f"tars were indexed by other rules: {_rules(index.dataset)} and {_rules(first)}; "
                "index them alike"
            )
        if index.labels_digest != indices[0].labels_digest:
            raise InputError("tars were indexed with other tables of labels; index them alike")
    urls = Counter(tar.url for index in indices for tar in index.tars)
    twice = [url for url, n in urls.items() if n > 1]
    if twice:
        raise InputError(f"{twice[0]}: in several of the indices; its samples would count twice")
    splits: dict[str, StrTuple] = {}
    for index in indices:
        for split, patterns in index.dataset.tars.items():
            splits[split] = (*splits.get(split, ()), *patterns)
    order = list(splits)
    infos: list[TarInfo] = []
    tables: list[pa.Table] = []
    for split in order:
        for index in indices:
            for number, tar in enumerate(index.tars):
                if tar.split == split:
                    infos.append(tar)
                    is_here = pc.equal(index.table.column("tar"), number)
                    tables.append(_with_label_texts(index, index.table.filter(is_here)))
    table, label_names = _joined(infos, tables)
    dataset = first.model_copy(update={"tars": splits})
    return SampleIndex(table, tuple(infos), label_names, dataset, indices[0].labels_digest)


def _with_label_texts(index: SampleIndex, table: pa.Table) -> pa.Table:
    """Rows as `_scan` gives them: `_SCHEMA` without `tar`, labels as text."""
    labels = table.column("label")
    if index.label_names is None:
        texts = labels.cast(pa.string())
    else:
        texts = pc.take(pa.array(index.label_names, pa.string()), labels)
    columns = [texts if name == "label" else table.column(name) for name in _SCAN_SCHEMA.names]
    return pa.Table.from_arrays(columns, schema=_SCAN_SCHEMA)


# --- which tars ---------------------------------------------------------------------------------


def _without_secrets(dataset: DatasetSpec) -> DatasetSpec:
    tars = {split: tuple(map(redacted, urls)) for split, urls in dataset.tars.items()}
    labels = dataset.labels
    if labels is not None:
        labels = labels.model_copy(update={"file": redacted(labels.file)})
    return dataset.model_copy(update={"tars": tars, "labels": labels})


def list_tars(dataset: DatasetSpec) -> list[tuple[str, str]]:
    """(split, url) of every tar, in row order."""
    return list_files(dataset.tars, "dataset.tars")


def list_files(files: Mapping[str, Sequence[str]], place: str) -> list[tuple[str, str]]:
    """(split, url) of what the patterns of some splits stand for, in order.

    Raises:
        InputError: there is none, or one is there twice; `place` names where the patterns are.
    """
    found = [
        (split, url)
        for split, patterns in files.items()
        for pattern in patterns
        for url in expand_urls(pattern)
    ]
    if not found:
        raise InputError(f"{place} names no files; want at least one path or URL")
    seen: dict[str, str] = {}
    for split, url in found:
        if url in seen:
            raise InputError(
                f"{url}: listed twice, in split {seen[url]!r} and in split {split!r}; its samples "
                "would count twice: list it once"
            )
        seen[url] = split
    return found


# --- one tar ------------------------------------------------------------------------------------


def _scan(split: str, url: str, folder: Folder, dataset: DatasetSpec) -> tuple[TarInfo, pa.Table]:
    """One tar's rows: `_SCHEMA` without `tar`, labels still text."""
    name = split_url(url)[1]
    try:
        object_info = folder.head(name)
        source = open_source(folder, name, object_info.size)
        places = (dataset.label, dataset.caption)
        rows = [_row(split, sample, dataset) for sample in read_samples(source, places)]
    except ObjectNotFoundError as error:
        raise missing(url, folder, name) from error
    compression: Literal["none", "gzip"] = "gzip" if isinstance(source, GzipSource) else "none"
    info = TarInfo(url, split, object_info.size, object_info.etag, compression)
    columns = {name: [row[name] for row in rows] for name in _SCAN_SCHEMA.names}
    return info, pa.table(columns, schema=_SCAN_SCHEMA)


def _row(split: str, sample: Sample, dataset: DatasetSpec) -> dict[str, str | int | float | None]:
    extension = next((e.lower() for e in dataset.image if e.lower() in sample.members), None)
    member = sample.members[extension] if extension else _NO_MEMBER
    reason = None
    if extension is None:
        has = visible(", ".join(sample.members))[:200]
        reason = f"no image: the sample has {has}, want one of {', '.join(dataset.image)}"
    elif sample.repeated is not None:
        name = visible(f"{sample.key}.{sample.repeated}")
        reason = f"two members {name}: which one is meant is unknown"
    elif member.sparse:
        reason = f"{visible(member.name)} is a sparse member; pack the tar again without --sparse"
    return {
        "key": sample.key,
        "split": split,
        "member": member.name,
        "offset": member.offset,
        "size": member.size,
        "label": label_text(field_of(sample.texts, dataset.label)),
        "caption": caption_text(field_of(sample.texts, dataset.caption)),
        "reason": reason,
        "checksum": member.checksum,
        "mtime": member.mtime,
    }


# --- the table ----------------------------------------------------------------------------------


def _joined(
    infos: Sequence[TarInfo], tables: Sequence[pa.Table]
) -> tuple[pa.Table, tuple[str, ...] | None]:
    """The rows of all tars as one table of `_SCHEMA`, with integer labels."""
    table = pa.concat_tables(tables)
    labels, label_names = resolve_labels(table.column("label").to_pylist())
    positions = np.repeat(np.arange(len(infos), dtype=np.int32), [t.num_rows for t in tables])
    columns: dict[str, pa.Array[Any]] = {
        "label": pa.array(labels, pa.int64()),
        "tar": pa.array(positions, pa.int32()),
    }
    arrays: list[pa.Array[Any] | pa.ChunkedArray[Any]] = [
        columns[name] if name in columns else table.column(name) for name in _SCHEMA.names
    ]
    return pa.Table.from_arrays(arrays, schema=_SCHEMA).combine_chunks(), label_names


def index_table(columns: Mapping[str, Sequence[object]]) -> pa.Table:
    """A table as `SampleIndex` has it, of all its columns."""
    arrays = [pa.array(columns[column.name], column.type) for column in _FIELDS]
    return pa.Table.from_arrays(arrays, schema=_SCHEMA)


def column_digest(column: pa.ChunkedArray[Any]) -> bytes:
    """SHA-256 of a column's values, however it is cut into chunks; null is not an empty value."""
    lengths, values = hashlib.sha256(), hashlib.sha256()
    for chunk in column.chunks:
        if pa.types.is_string(column.type):
            sizes = pc.binary_length(chunk).cast(pa.int64()).fill_null(-1)
            lengths.update(np.asarray(sizes, "<i8").tobytes())
            filled = chunk.fill_null("")
            _, ends, data = filled.buffers()
            bounds = np.frombuffer(ends, np.int32)[filled.offset :][: len(filled) + 1]
            if data is not None:
                values.update(memoryview(data)[bounds[0] : bounds[-1]])
        else:
            lengths.update(np.asarray(chunk.is_null()).tobytes())
            kind = "<f8" if pa.types.is_floating(column.type) else "<i8"
            values.update(np.asarray(chunk.fill_null(0), kind).tobytes())
    return lengths.digest() + values.digest()
