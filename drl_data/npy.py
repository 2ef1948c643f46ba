"""Values of `.npy` and `.npz` bytes, without pickle and without trust in what a header claims."""

from __future__ import annotations

import ast
import io
import lzma
import math
import re
import struct
import zipfile
import zlib
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from drl_data.objects import Buffer

MAGIC = b"\x93NUMPY"
MAX_HEADER_BYTES = 10_000
"""Of an array with its header; NumPy's own limit for files that are not trusted."""


def parse_npy(data: Buffer) -> npt.NDArray[np.generic]:
    """The array that the bytes of a `.npy` hold: a view of them, or a copy in native order.

    Raises:
        ValueError: it is none, holds Python objects, or has more or fewer bytes than it says.
    """
    start = bytes(memoryview(data)[:12])
    version = tuple(start[6:8])
    if start[:6] != MAGIC or version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"no .npy of version 1 to 3: it begins with {start[:8]!r}")
    before = 10 if version == (1, 0) else 12  # a length of two bytes, or four
    n_header = before + int.from_bytes(start[8:before], "little")
    if n_header > min(len(data), MAX_HEADER_BYTES):
        raise ValueError(f"a header of {n_header} bytes in {len(data)} bytes")
    shape, fortran_order, dtype = _header(bytes(memoryview(data)[before:n_header]))
    body = memoryview(data)[n_header:]
    n_bytes = math.prod(shape) * dtype.itemsize
    if len(body) != n_bytes:
        raise ValueError(f"{len(body)} bytes of values, its header says {n_bytes}")
    values: npt.NDArray[np.generic] = np.frombuffer(body, dtype)
    values = values.reshape(shape, order="F" if fortran_order else "C")
    return values.astype(dtype.newbyteorder("="), copy=False)


@lru_cache(maxsize=256)
def _header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    """Shape, order and type of a header; a data set has few of them, each many times.

    NumPy's own reader raises errors of Python's tokenizer on a damaged one, and warns.
    """
    try:
        header = ast.literal_eval(data.decode("utf-8").strip())
        descr, order, shape = (header[name] for name in ("descr", "fortran_order", "shape"))
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError) as error:
        raise ValueError(f"an unreadable header ({type(error).__name__})") from error
    sound = isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
    if not sound or not isinstance(order, bool):
        raise ValueError(f"a header of shape {shape!r} and order {order!r}")
    if "O" in str(descr):
        raise ValueError("a pickled array of Python objects, which is never loaded")
    if not isinstance(descr, str) or not re.fullmatch(r"[<>=|]?[fiu](1|2|4|8|16)", descr):
        raise ValueError(f"an array of {str(descr)[:40]!r}, want numbers")
    try:
        return shape, order, np.dtype(descr)
    except TypeError as error:
        raise ValueError(f"an array of {descr!r}, want numbers") from error


_BAD_ARCHIVE = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, OSError, EOFError,
    NotImplementedError, RuntimeError, KeyError, IndexError,
)  # fmt: skip
"""What `zipfile` raises on bytes that are damaged, encrypted, or packed in ways unknown to it."""


def parse_npz(data: Buffer, name: str) -> npt.NDArray[np.generic]:
    """The array called `name` inside the bytes of a `.npz`.

    Raises:
        ValueError: it is none, lacks that array, or as `parse_npy`.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = [entry.removesuffix(".npy") for entry in archive.namelist()]
            if name not in names:
                raise ValueError(f"no array {name!r} in the npz; it has {', '.join(names[:10])}")
            entry = archive.getinfo(f"{name}.npy")
            if entry.file_size > MAX_INFLATION * len(data):
                raise ValueError(f"{name} inflates to {entry.file_size} bytes of {len(data)}")
            return parse_npy(archive.read(entry))
    except _BAD_ARCHIVE as error:
        raise ValueError(f"not a readable npz ({error})") from error


MAX_INFLATION = 1032
"""Deflate does no more; an entry that claims to is a bomb or corrupt."""
