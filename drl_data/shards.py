"""The bytes of one shard (STORE.md, section 3).

An uncompressed shard is its rows in order, then an index of (offset, size) for each inner chunk,
then the index's CRC-32C. All but the rows is known from the shape alone, so a shard is written as
[the array's memory, a footer] and read as a view. Nothing here does I/O or imports zarr.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import google_crc32c
import numpy as np
import numpy.typing as npt

from drl_data.objects import Buffer
from drl_data.spec_base import ITEMSIZE, StorageDType

Array = npt.NDArray[np.generic]

CHUNK_BYTES = 64 << 10
"""Size that an inner chunk of small rows aims at."""

LARGE_ROW_BYTES = 16 << 10
"""Rows of at least this size are an inner chunk each."""

STORED: Mapping[StorageDType, str] = {
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "uint16",
    "float8_e4m3fn": "uint8",
    "float8_e5m2": "uint8",
    "int8": "int8",
    "uint8": "uint8",
}
"""Zarr and NumPy name of the type that holds each feature type; no Zarr reader knows bfloat16 or
8-bit floating point."""

_INVALID_BITS: Mapping[StorageDType, int] = {
    "float32": 0x7FC00000,
    "float16": 0x7E00,
    "bfloat16": 0x7FC0,
    "float8_e4m3fn": 0x7F,
    "float8_e5m2": 0x7E,
    "int8": 0,
    "uint8": 0,
}
"""What invalid rows hold: a quiet NaN; in integers 0, and NaN is in their scales."""

_NON_FINITE_MASK: Mapping[StorageDType, int] = {
    "float32": 0x7F800000,
    "float16": 0x7C00,
    "bfloat16": 0x7F80,
    "float8_e4m3fn": 0x7F,  # has no infinity, and one NaN of each sign
    "float8_e5m2": 0x7C,
}
"""Bits that are all ones in an Inf or a NaN, and only there."""

_MISSING = 2**64 - 1


@dataclass(frozen=True)
class ShardLayout:
    """Where the rows of one array lie inside a shard of `rows_per_unit` rows."""

    rows_per_unit: int
    row_shape: tuple[int, ...]
    dtype: StorageDType
    n_times: int = 1
    has_views: bool = False

    @property
    def stored(self) -> np.dtype[np.generic]:
        """Little-endian NumPy type of the stored values."""
        return np.dtype(STORED[self.dtype]).newbyteorder("<")

    @property
    def row_bytes(self) -> int:
        """Bytes of one row at one timestep."""
        return math.prod(self.row_shape) * self.stored.itemsize

    @cached_property
    def rows_per_chunk(self) -> int:
        """Rows of an inner chunk: 1 from 16 KiB a row; else the divisor of `rows_per_unit` that
        makes a chunk nearest to 64 KiB (by ratio; the smaller of two equally near)."""
        if self.row_bytes >= LARGE_ROW_BYTES:
            return 1
        target = CHUNK_BYTES / self.row_bytes
        divisors = (k for k in range(1, self.rows_per_unit + 1) if self.rows_per_unit % k == 0)
        return min(divisors, key=lambda k: (max(k / target, target / k), k))

    @property
    def n_chunks(self) -> int:
        """Inner chunks of a shard, present or missing."""
        return self.rows_per_unit // self.rows_per_chunk

    def place(self, cell: int) -> tuple[int, ...]:
        """Position of a cell on the axes between the sample and the row: (time) or (view, time)."""
        return divmod(cell, self.n_times) if self.has_views else (cell,)

    def path(self, name: str, cell: int, unit_id: int) -> str:
        """Path of the object: Zarr's default key of this chunk of the array `name`."""
        key = (unit_id, *self.place(cell), *[0] * len(self.row_shape))
        return f"{name}/c/" + "/".join(map(str, key))

    @property
    def footer_bytes(self) -> int:
        """Bytes of the shard index and its checksum."""
        return 16 * self.n_chunks + 4

    def data_bytes(self, n_rows: int) -> int:
        """Bytes before the footer of a shard of `n_rows` rows: whole inner chunks."""
        return math.ceil(n_rows / self.rows_per_chunk) * self.rows_per_chunk * self.row_bytes

    def shard_bytes(self, n_rows: int) -> int:
        """Size of the object that holds `n_rows` rows."""
        return self.data_bytes(n_rows) + self.footer_bytes

    def footer(self, n_rows: int) -> bytes:
        """The shard index (offset, size as u64 little-endian per inner chunk), then its CRC-32C."""
        size = self.rows_per_chunk * self.row_bytes
        index = np.full((self.n_chunks, 2), _MISSING, "<u8")
        n_present = self.data_bytes(n_rows) // size
        index[:n_present, 0] = np.arange(n_present, dtype="<u8") * size
        index[:n_present, 1] = size
        data = index.tobytes()
        return data + struct.pack("<I", crc32c([data]))

    def parts(self, rows: Array, invalid: Sequence[int]) -> list[Buffer]:
        """The shard of `rows` [n_rows, *row_shape], without copying them.

        `invalid` are positions in `rows` that are written as NaN instead, in increasing order. The
        concatenation of the parts is the object.
        """
        flat = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
        nan_row = self.nan_rows(1).reshape(-1).view(np.uint8)
        pieces: list[Array] = []
        start = 0
        for row in (*invalid, len(rows)):
            pieces.append(flat[start * self.row_bytes : row * self.row_bytes])
            if row < len(rows):
                pieces.append(nan_row)
            start = row + 1
        padding = (self.data_bytes(len(rows)) - flat.nbytes) // self.row_bytes
        pieces.append(self.nan_rows(padding).reshape(-1).view(np.uint8))
        return [*(piece.data for piece in pieces if piece.size), self.footer(len(rows))]

    def nan_rows(self, n_rows: int) -> Array:
        """Rows as invalid ones are stored, [n_rows, *row_shape]: quiet NaN, or 0 in integers."""
        bits = np.full((n_rows, *self.row_shape), _INVALID_BITS[self.dtype], _bits_type(self.dtype))
        return bits.view(self.stored)

    def rows(self, shard: Array, n_rows: int) -> Array | None:
        """View of the rows in a shard's bytes (uint8); None if it is laid out otherwise."""
        if len(shard) != self.shard_bytes(n_rows):
            return None
        if shard[self.data_bytes(n_rows) :].tobytes() != self.footer(n_rows):
            return None
        data = shard[: n_rows * self.row_bytes]
        return data.view(self.stored).reshape(n_rows, *self.row_shape)


def _bits_type(dtype: StorageDType) -> np.dtype[np.generic]:
    return np.dtype(f"<u{ITEMSIZE[dtype]}")


def crc32c(parts: Iterable[Buffer]) -> int:
    """CRC-32C (Castagnoli) of the concatenation of `parts`."""
    value = 0
    for part in parts:
        # google_crc32c refuses memoryviews but takes the same memory as an array.
        value = google_crc32c.extend(value, np.frombuffer(part, np.uint8))
    return value


def non_finite_rows(rows: Array, dtype: StorageDType) -> npt.NDArray[np.int64]:
    """Positions of the rows of `rows` [n, *shape] that hold an Inf or a NaN."""
    if dtype not in _NON_FINITE_MASK:
        return np.empty(0, np.int64)
    mask = _bits_type(dtype).type(_NON_FINITE_MASK[dtype])
    bits = np.ascontiguousarray(rows).reshape(len(rows), -1).view(_bits_type(dtype))
    # In blocks, so that the temporary stays in the cache.
    step = max((1 << 20) // (bits.shape[1] * bits.itemsize), 1)
    blocks = [
        start + np.flatnonzero((bits[start : start + step] & mask).max(axis=1) == mask)
        for start in range(0, len(bits), step)
    ]
    return np.concatenate(blocks)


_LARGEST_BITS: Mapping[StorageDType, int] = {
    "float32": 0x7F7FFFFF,
    "float16": 0x7BFF,
    "bfloat16": 0x7F7F,
    "float8_e4m3fn": 0x7E,
    "float8_e5m2": 0x7B,
}
"""Bits of the largest finite value of each type."""


def at_limit(rows: Array, dtype: StorageDType) -> npt.NDArray[np.int64]:
    """Values of each row of `rows` [n, *shape] that are the largest finite one of either sign."""
    if dtype not in _LARGEST_BITS:
        return np.zeros(len(rows), np.int64)
    kind = _bits_type(dtype)
    bits = np.ascontiguousarray(rows).reshape(len(rows), -1).view(kind)
    largest = _LARGEST_BITS[dtype]
    either = np.array([largest, largest | 1 << (8 * kind.itemsize - 1)], kind)
    found: npt.NDArray[np.int64] = np.isin(bits, either).sum(axis=1, dtype=np.int64)
    return found
