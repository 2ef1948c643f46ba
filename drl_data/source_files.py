"""What is in somebody's files of features: samples with key, label, and the places of their values.

    webdataset    members KEY.PLACE.npy, or arrays in KEY.npz
    npy           a folder PLACE below a root, a file of each sample in it, at any depth
    parquet       columns of lists
    safetensors   shards of tensors, a row of each sample

Nothing but headers, footers, labels and keys is read.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import JsonValue

from drl_data.catalogue import Place, nowhere
from drl_data.errors import InputError, ObjectNotFoundError, redacted, visible
from drl_data.import_spec import SourceSpec
from drl_data.index import TarInfo, list_files
from drl_data.objects import Folder, open_folder, open_parent
from drl_data.progress import SILENT, Progress
from drl_data.ranged_file import RangedFile
from drl_data.shards import crc32c
from drl_data.tar import GzipSource, open_source
from drl_data.tar_samples import Sample, caption_text, field_of, label_text, read_samples
from drl_data.urls import missing

N_THREADS = 16
MAX_HEADER_BYTES = 100 << 20
"""Of a safetensors file; the library's own limit."""

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
}  # fmt: skip
"""Types of safetensors that are read as numbers."""


@dataclass
class Found:
    """Samples of some files, in their order; `places` has one for each place of the source."""

    places: list[list[Place]]
    keys: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    captions: list[str | None] = field(default_factory=list)
    layouts: dict[str, JsonValue] = field(default_factory=dict)

    def add(
        self,
        key: str,
        split: str,
        label: str | None,
        caption: str | None,
        places: Iterable[Place],
    ) -> None:
        """One more sample."""
        self.keys.append(key)
        self.splits.append(split)
        self.labels.append(label)
        self.captions.append(caption)
        for column, place in zip(self.places, places, strict=True):
            column.append(place)

    def extend(self, other: Found) -> None:
        """The samples of more files."""
        self.keys += other.keys
        self.splits += other.splits
        self.labels += other.labels
        self.captions += other.captions
        self.layouts |= other.layouts
        for mine, theirs in zip(self.places, other.places, strict=True):
            mine += theirs


def wanted_places(source: SourceSpec) -> list[str]:
    """Names of the places of all arrays, in order."""
    return [place for array in source.arrays for place in array.where]


def survey(source: SourceSpec, progress: Progress = SILENT) -> tuple[Found, tuple[TarInfo, ...]]:
    """Every sample of the files of a source; and the files.

    Raises:
        InputError: files that are missing, damaged, of another format, or without what is asked
            for; no sample at all.
    """
    read = {
        "webdataset": _tar, "npy": _tree, "parquet": _parquet, "safetensors": _safetensors
    }[source.format]  # fmt: skip
    urls = list_files(source.files, "source.files")
    files = tuple(_info(split, url, is_tree=source.format == "npy") for split, url in urls)
    found = Found([[] for _ in wanted_places(source)])
    numbered = list(enumerate(files))
    pool = ThreadPoolExecutor(N_THREADS, thread_name_prefix="drl-survey")
    try:
        with progress.bar("survey", len(files), "files") as bar:
            for one in pool.map(lambda item: read(source, *item), numbered):
                found.extend(one)
                bar.advance(1, samples=len(found.keys))
    finally:
        pool.shutdown(cancel_futures=True)
    if not found.keys:
        raise InputError(
            f"no samples in {len(files)} files ({redacted(files[0].url)}, ...) with "
            f"{', '.join(wanted_places(source))}; see `source.arrays`"
        )
    return found, files


def _info(split: str, url: str, *, is_tree: bool) -> TarInfo:
    if is_tree:
        return TarInfo(url, split, 0, "", "none")
    folder, name = open_parent(url)
    try:
        info = folder.head(name)
    except ObjectNotFoundError as error:
        raise missing(url, folder, name) from error
    return TarInfo(url, split, info.size, info.etag, "none")


# --- webdataset ---------------------------------------------------------------------------------


def npz_of(place: str) -> tuple[str, str] | None:
    """(extension, name inside) of a place `FILE.npz:NAME`; None of any other."""
    member, colon, name = place.partition(":")
    return (member.lower(), name) if colon else None


def _member_of(place: str) -> str:
    npz = npz_of(place)
    if npz is not None:
        return npz[0]
    name = place.lower()
    return name if name == "npy" or name.endswith(".npy") else f"{name}.npy"


def _tar(source: SourceSpec, number: int, file: TarInfo) -> Found:
    folder, name = open_parent(file.url)
    tar = open_source(folder, name, file.size)
    if isinstance(tar, GzipSource):
        raise InputError(
            f"{file.url}: a gzip tar, whose members cannot be read by themselves; unpack it "
            "(`gunzip`) and import again"
        )
    label, caption = source.label or "cls", source.caption or "txt"
    members = [_member_of(place) for place in wanted_places(source)]
    found = Found([[] for _ in members])
    for sample in read_samples(tar, (label, caption, source.key, source.split)):
        if not any(member in sample.members for member in members):
            continue  # of another kind: images, or features that are not asked for
        found.add(
            _text_of(sample, source.key, sample.key, file.url),
            _text_of(sample, source.split, file.split, file.url),
            label_text(field_of(sample.texts, label)),
            caption_text(field_of(sample.texts, caption)),
            [_member_place(sample, member, number) for member in members],
        )
    return found


def _text_of(sample: Sample, place: str | None, default: str, url: str) -> str:
    if place is None:
        return default
    value = field_of(sample.texts, place)
    if not isinstance(value, str) or not value:
        raise InputError(f"{url}: sample {visible(sample.key)!r} has no text at {place!r}")
    return value


def _member_place(sample: Sample, extension: str, number: int) -> Place:
    member = sample.members.get(extension)
    if member is None:
        has = visible(", ".join(sample.members))[:200]
        return nowhere(f"no {extension}: the sample has {has}")
    if sample.repeated == extension:
        return nowhere(f"two members {visible(member.name)}: which one is meant is unknown")
    if member.sparse:
        return nowhere(f"{visible(member.name)} is a sparse member; pack it without --sparse")
    return Place(number, member.name, member.offset, member.size, member.checksum, member.mtime)


# --- trees of .npy ------------------------------------------------------------------------------


def _tree(source: SourceSpec, number: int, file: TarInfo) -> Found:
    names = wanted_places(source)
    columns: list[dict[str, Place]] = []
    labels: dict[str, str | None] = {}
    for name in names:
        below = "" if name == "." else name.strip("/")
        root = open_folder(file.url.rstrip("/") + (f"/{below}" if below else ""))
        column: dict[str, Place] = {}
        infos = sorted(root.list(), key=lambda info: info.path)
        listed = _listed_labels(root) if any(i.path == "dataset.json" for i in infos) else {}
        for info in infos:
            if not info.path.endswith(".npy"):
                continue
            key = _tree_key(info.path, source.key or "name", root.url)
            path = f"{below}/{info.path}" if below else info.path
            twice = key in column
            column[key] = Place(number, path, 0, info.size)
            if twice:
                column[key] = nowhere(f"two files of this key, the last is {visible(path)}")
            if info.path in listed:
                labels.setdefault(key, label_text(listed[info.path]))
        if not column:
            raise InputError(f"{root.url}: no .npy files; want a tree of them for place {name!r}")
        columns.append(column)
    found = Found([[] for _ in names])
    for key in dict.fromkeys(key for column in columns for key in column):
        places = [
            column.get(key, nowhere(f"no file in {name}"))
            for name, column in zip(names, columns, strict=True)
        ]
        found.add(key, file.split, labels.get(key), None, places)
    return found


def _tree_key(path: str, rule: str, url: str) -> str:
    stem = path.removesuffix(".npy")
    if rule == "path":
        return stem
    name = stem.rpartition("/")[2]
    if rule == "name":
        return name
    if rule != "row":
        raise InputError(f"source.key {rule!r} of a tree: want name, path or row")
    digits = name[len(name.rstrip("0123456789")) :]
    if not digits:
        raise InputError(f"{url}/{path}: source.key row, and the name does not end in a number")
    return str(int(digits))


def own_key(key: str, source: SourceSpec) -> str:
    """What a key of the files is called where they make the rows: names of files are unquoted."""
    by_name = source.format == "npy" and (source.key or "name") == "name"
    return unquote(key) if by_name else key


def _listed_labels(root: Folder) -> dict[str, JsonValue]:
    """`dataset.json` of REPA and EDM2: {"labels": [[path, label], ...]}."""
    try:
        value = json.loads(bytes(root.get("dataset.json")))
        return dict(value["labels"] or {})
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f'{root.url}/dataset.json: {error!r}; want {{"labels": [[path, label], ...]}}, or no '
            "such file"
        ) from error


# --- parquet ------------------------------------------------------------------------------------


def open_parquet(file: TarInfo) -> pq.ParquetFile:
    """A Parquet file at a path or URL.

    Raises:
        InputError: it is none.
    """
    folder, name = open_parent(file.url)
    try:
        return pq.ParquetFile(pa.PythonFile(RangedFile(folder, name, file.size), mode="r"))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file.url}: not a Parquet file ({error})") from error


def _parquet(source: SourceSpec, number: int, file: TarInfo) -> Found:
    parquet = open_parquet(file)
    schema: pa.Schema = parquet.schema_arrow
    names = wanted_places(source)

    def column(given: str | None, default: str | None) -> str | None:
        if given is None and default not in schema.names:
            return None
        if given is not None and given not in schema.names:
            raise InputError(
                f"{file.url}: no column {given!r}; it has {', '.join(schema.names[:20])}"
            )
        return given or default

    for name in names:
        kind = schema.field(str(column(name, None))).type
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        value = kind.value_type if is_list or pa.types.is_fixed_size_list(kind) else None
        if value is None or not (pa.types.is_floating(value) or pa.types.is_integer(value)):
            raise InputError(f"{file.url}: column {name!r} is of {kind}; want lists of numbers")
    key = column(source.key or "key", None)
    wanted = [key, column(source.label, "label"), column(source.caption, "caption"),
              column(source.split, None)]  # fmt: skip
    table = parquet.read(columns=[one for one in wanted if one is not None])

    def values(name: str | None) -> list[Any]:
        return [None] * table.num_rows if name is None else table.column(name).to_pylist()

    found = Found([[] for _ in names])
    for row, (own, label, caption, split) in enumerate(zip(*map(values, wanted), strict=True)):
        places = [Place(number, name, row, 0) for name in names]
        if own is None:
            raise InputError(f"{file.url}: row {row} has no {key}; every sample needs a key")
        text = caption if isinstance(caption, str) else None
        found.add(str(own), split or file.split, label_text(label), text, places)
    found.layouts[str(number)] = {
        "footer": _footer_crc(file),
        "shapes": {name: _shape_of(schema.field(name)) for name in names},
    }
    return found


def _footer_crc(file: TarInfo) -> int:
    """CRC-32C of the footer, which has offsets, sizes and statistics of all columns."""
    folder, name = open_parent(file.url)
    (length,) = struct.unpack("<I", folder.get_range(name, file.size - 8, file.size - 4))
    return crc32c([folder.get_range(name, max(file.size - 8 - length, 0), file.size)])


def _shape_of(column: pa.Field[Any]) -> JsonValue:
    """As `drl export` writes it into the metadata of the field; None elsewhere."""
    try:
        shape = json.loads((column.metadata or {}).get(b"shape", b"null"))
    except ValueError:
        return None
    return shape if isinstance(shape, list) else None


# --- safetensors --------------------------------------------------------------------------------


def safetensors_header(file: TarInfo) -> tuple[dict[str, Any], int]:
    """Tensors and metadata of a safetensors file, and where its values begin.

    Raises:
        InputError: it is none, or claims bytes that it does not have.
    """
    folder, name = open_parent(file.url)
    try:
        if file.size < 8:
            raise ValueError(f"{file.size} bytes")
        (length,) = struct.unpack("<Q", folder.get_range(name, 0, 8))
        if length > min(MAX_HEADER_BYTES, file.size - 8):
            raise ValueError(f"a header of {length} bytes in a file of {file.size}")
        header = json.loads(bytes(folder.get_range(name, 8, 8 + length)))
        for tensor, about in header.items():
            if tensor == "__metadata__":
                continue
            start, stop = about["data_offsets"]
            if not all(type(n) is int and n >= 0 for n in (start, stop, *about["shape"])):
                raise ValueError(f"tensor {tensor!r} of shape {about['shape']}")
            size = ITEM_BYTES.get(about["dtype"])
            n_bytes = None if size is None else size * math.prod(about["shape"])
            if not 0 <= start <= stop <= file.size - 8 - length or n_bytes not in (
                None, stop - start
            ):  # fmt: skip
                raise ValueError(f"tensor {tensor!r} lies at {start} to {stop}, {about['shape']}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{file.url}: not a safetensors file ({error})") from error
    return header, 8 + length


def _safetensors(source: SourceSpec, number: int, file: TarInfo) -> Found:
    header, begin = safetensors_header(file)
    names = wanted_places(source)
    about = header.pop("__metadata__", None) or {}
    for name in names:
        if name not in header:
            raise InputError(f"{file.url}: no tensor {name!r}; it has {', '.join(header)}")
        if header[name]["dtype"] not in ITEM_BYTES:
            raise InputError(f"{file.url}: tensor {name!r} is of {header[name]['dtype']}")
    sizes = {name: header[name]["shape"][0] if header[name]["shape"] else -1 for name in names}
    n = sizes[names[0]]
    if n < 0 or set(sizes.values()) != {n}:
        raise InputError(f"{file.url}: tensors of {sizes} rows; want as many of each")
    keys = _shard_keys(about, n, file)
    labels = _shard_labels(source, header, begin, n, file)
    found = Found([[] for _ in names])
    for row in range(n):
        places = []
        for name in names:
            start, stop = header[name]["data_offsets"]
            size = (stop - start) // n
            places.append(Place(number, name, begin + start + row * size, size))
        found.add(keys[row], file.split, labels[row], None, places)
    found.layouts[str(number)] = {
        name: [header[name]["dtype"], header[name]["shape"][1:]] for name in names
    }
    return found


def _shard_keys(about: dict[str, str], n: int, file: TarInfo) -> list[str]:
    """Those that `drl export` writes into the metadata; else the name of the shard and the row."""
    try:
        keys = json.loads(about.get("drl_data", "{}")).get("keys")
    except (ValueError, AttributeError):
        keys = None
    if isinstance(keys, list) and len(keys) == n and all(isinstance(key, str) for key in keys):
        return keys
    stem = open_parent(file.url)[1].removesuffix(".safetensors")
    return [f"{stem}-{row:08d}" for row in range(n)]


def _shard_labels(
    source: SourceSpec, header: dict[str, Any], begin: int, n: int, file: TarInfo
) -> Sequence[str | None]:
    """Of a tensor of n integers; negative ones are none."""
    name = source.label or "labels"
    if name not in header:
        if source.label is not None:
            raise InputError(f"{file.url}: no tensor {name!r}; it has {', '.join(header)}")
        return [None] * n
    kind, (start, stop) = header[name]["dtype"], header[name]["data_offsets"]
    if header[name]["shape"] != [n] or kind not in ("I64", "I32", "I16", "U8"):
        raise InputError(
            f"{file.url}: labels {name!r} are {kind} of {header[name]['shape']}; want [{n}] "
            "integers"
        )
    folder, path = open_parent(file.url)
    data = folder.get_range(path, begin + start, begin + stop)
    dtype = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "U8": "u1"}[kind]
    return [str(label) if label >= 0 else None for label in np.frombuffer(data, dtype).tolist()]
