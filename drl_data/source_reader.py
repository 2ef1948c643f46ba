"""Values of features out of somebody's files, at the places that a catalogue names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from drl_data.catalogue import Catalogue, Place
from drl_data.errors import InputError, ObjectNotFoundError
from drl_data.import_spec import SourceContent, SourceFormat
from drl_data.npy import parse_npy, parse_npz
from drl_data.objects import Buffer, RetryCount, counted, open_folder, open_parent
from drl_data.shard_reader import in_threads
from drl_data.source_files import npz_of, open_parquet
from drl_data.spans import MAX_SPAN_BYTES, Span, SpanPlace, cut_spans

Values = npt.NDArray[np.generic]


@dataclass(frozen=True)
class Value:
    """What is at one place: numbers, float16, float32 or float64, and the type they had there."""

    values: Values
    dtype: str
    """A type that features are stored in, `float64`, or `integers`."""


Found = dict[int, Value | str]
"""Row -> value, or why there is none."""


class SourceReader:
    """Reads the files of one catalogue; called from several threads."""

    def __init__(self, catalogue: Catalogue, source: SourceContent) -> None:
        """
        Raises:
            InputError: URLs without their secrets.
        """
        catalogue.require_readable()
        self.catalogue = catalogue
        self.format: SourceFormat = source.format
        self.names = [place for array in source.arrays for place in array.where]

    def files_of(self, start: int, stop: int) -> list[int]:
        """Files that rows `start` to `stop` (exclusive) have values in."""
        return sorted(
            {
                place.file
                for number in range(len(self.names))
                for place in self.catalogue.places(number, start, stop)
                if place.file is not None
            }
        )

    def check(self, files: Sequence[int], retries: RetryCount) -> None:
        """Compare files with what was catalogued; trees file by file, when they are read.

        Raises:
            InputError: one is gone or has changed.
        """
        if self.format != "npy":
            in_threads(partial(self._check, retries), files)

    def _check(self, retries: RetryCount, number: int) -> None:
        file = self.catalogue.files[number]
        folder, name = open_parent(file.url)
        try:
            now = counted(folder, retries).head(name)
        except ObjectNotFoundError as error:
            raise InputError(f"{file.url}: gone since the import began; put it back") from error
        if (now.size, now.etag) != (file.size, file.etag):
            raise InputError(
                f"{file.url}: changed since the import began: {now.size} bytes, tag {now.etag}; "
                f"was {file.size} bytes, tag {file.etag}; import into another store"
            )

    def read(self, number: int, rows: dict[int, Place], retries: RetryCount) -> Found:
        """The values of rows at one place of the source; places that are nowhere are left out.

        Raises:
            InputError: a file is not what it was.
            ObjectError: storage that failed.
        """
        there = {row: place for row, place in rows.items() if place.file is not None}
        if self.format == "npy":
            found = in_threads(partial(self._read_file, retries), list(there.items()))
            return dict(found)
        by_file: dict[int, dict[int, Place]] = defaultdict(dict)
        for row, place in there.items():
            assert place.file is not None
            by_file[place.file][row] = place
        if self.format == "parquet":
            done = [self._read_column(file, number, own) for file, own in by_file.items()]
            return {row: value for part in done for row, value in part.items()}
        spans = [
            span
            for file, own in by_file.items()
            for span in cut_spans(_in_order(file, own), MAX_SPAN_BYTES)
        ]
        parts = in_threads(partial(self._read_span, retries, number), spans)
        return {row: value for part in parts for row, value in part.items()}

    # --- one request -----------------------------------------------------------------------------

    def _read_file(self, retries: RetryCount, item: tuple[int, Place]) -> tuple[int, Value | str]:
        row, place = item
        assert place.file is not None
        assert place.member is not None
        root = self.catalogue.files[place.file].url
        try:
            data = counted(open_folder(root), retries).get(place.member)
        except ObjectNotFoundError as error:
            raise InputError(f"{root}/{place.member}: gone since the import began") from error
        if len(data) != place.size:
            raise InputError(
                f"{root}/{place.member}: changed since the import began: {len(data)} bytes, were "
                f"{place.size}; import into another store"
            )
        return row, _of_npy(data)

    def _read_span(self, retries: RetryCount, number: int, span: Span) -> Found:
        file = self.catalogue.files[span.tar]
        folder, name = open_parent(file.url)
        data = counted(folder, retries).get_range(name, span.start, span.stop)
        pieces = {
            place.row: data[place.offset - span.start : place.offset - span.start + place.size]
            for place in span.places
        }
        if self.format == "safetensors":
            dtype, shape = self.catalogue.layout(span.tar)[self.names[number]]
            return {row: _of_tensor(piece, dtype, shape) for row, piece in pieces.items()}
        npz = npz_of(self.names[number])
        inside = None if npz is None else npz[1]
        return {row: _of_npy(piece, inside) for row, piece in pieces.items()}

    def _read_column(self, number: int, place: int, rows: dict[int, Place]) -> Found:
        """Rows of one Parquet file; of each group of rows that has some, the column is read."""
        file = self.catalogue.files[number]
        name = self.names[place]
        parquet = open_parquet(file)
        metadata = parquet.metadata
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        wanted: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for row, at in rows.items():
            assert at.offset is not None
            group = int(np.searchsorted(starts, at.offset, side="right")) - 1
            wanted[group].append((row, at.offset - int(starts[group])))
        shape = self.catalogue.layout(number)["shapes"][name]
        found: Found = {}
        for group, own in sorted(wanted.items()):
            try:
                table = parquet.read_row_group(group, columns=[name])
            except (pa.ArrowException, OSError) as error:
                raise InputError(
                    f"{file.url}: column {name!r} cannot be read ({error}); write the file again"
                ) from error
            column = table.column(name).combine_chunks()
            for row, i in own:
                found[row] = _of_list(column, i, shape)
        return found


def _in_order(file: int, rows: dict[int, Place]) -> list[tuple[int, SpanPlace]]:
    """Places of one file by their offset."""
    places = []
    for row, place in rows.items():
        assert place.offset is not None
        assert place.size is not None
        places.append((file, SpanPlace(row, place.offset, place.size)))
    return sorted(places, key=lambda item: item[1].offset)


# --- one value -----------------------------------------------------------------------------------


def _of_npy(data: Buffer, inside: str | None = None) -> Value | str:
    try:
        return _numbers(parse_npy(data) if inside is None else parse_npz(data, inside))
    except ValueError as error:
        return str(error)


def _numbers(values: Values) -> Value:
    """Floats as they are; integers as float64, which has those up to 2^53."""
    if values.dtype.kind != "f":
        return Value(values.astype(np.float64), "integers")
    if values.dtype.itemsize > 8:
        return Value(values.astype(np.float64), "float64")
    return Value(values, values.dtype.name)


_TORCH = {
    "BF16": (torch.bfloat16, "bfloat16"),
    "F8_E4M3": (torch.float8_e4m3fn, "float8_e4m3fn"),
    "F8_E5M2": (torch.float8_e5m2, "float8_e5m2"),
}
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2",
          "I8": "i1", "U8": "u1"}  # fmt: skip


def _of_tensor(data: Buffer, dtype: str, shape: Sequence[int]) -> Value:
    if dtype in _NUMPY:
        values = np.frombuffer(data, _NUMPY[dtype]).reshape(shape)
        return _numbers(values.astype(values.dtype.newbyteorder("="), copy=False))
    kind, name = _TORCH[dtype]
    bits = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return Value(bits.view(kind).float().numpy().reshape(shape), name)


def _of_list(column: pa.Array, row: int, shape: Sequence[int] | None) -> Value | str:
    item = column[row]
    if not item.is_valid:
        return "null in its column"
    values = item.values
    if values.null_count:
        return f"{values.null_count} nulls among its values"
    numbers = np.asarray(values.to_numpy(zero_copy_only=False))
    if shape is not None and numbers.size == int(np.prod(shape, dtype=np.int64)):
        numbers = numbers.reshape(shape)
    return _numbers(numbers)
