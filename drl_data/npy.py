"""Values of `.npy` and `.npz` bytes, without pickle and without trust in what a header claims."""

from __future__ import annotations

import io
import math
import zipfile

import numpy as np
import numpy.typing as npt

from drl_data.objects import Buffer

MAX_HEADER_BYTES = 10_000
"""Of an array's header; NumPy's own limit for files that are not trusted."""


def parse_npy(data: Buffer) -> npt.NDArray[np.generic]:
    """The array that the bytes of a `.npy` hold: a view of them, or a copy in native order.

    Raises:
        ValueError: it is none, holds Python objects, or has more or fewer bytes than it says.
    """
    file = io.BytesIO(memoryview(data)[: MAX_HEADER_BYTES + 16])
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        header = np.lib.format.read_array_header_1_0(file, max_header_size=MAX_HEADER_BYTES)
    elif version == (2, 0):
        header = np.lib.format.read_array_header_2_0(file, max_header_size=MAX_HEADER_BYTES)
    else:
        raise ValueError(f".npy version {version}, want (1, 0) or (2, 0)")
    shape, fortran_order, dtype = header
    if dtype.hasobject:
        raise ValueError("a pickled array of Python objects, which is never loaded")
    if dtype.kind not in "fiu":
        raise ValueError(f"an array of {dtype}, want numbers")
    body = memoryview(data)[file.tell() :]
    n_bytes = math.prod(shape) * dtype.itemsize
    if len(body) != n_bytes:
        raise ValueError(f"{len(body)} bytes of values, its header says {n_bytes}")
    values: npt.NDArray[np.generic] = np.frombuffer(body, dtype)
    values = values.reshape(shape, order="F" if fortran_order else "C")
    return values.astype(dtype.newbyteorder("="), copy=False)


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
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, KeyError, EOFError) as error:
        raise ValueError(f"not a readable npz ({error})") from error


MAX_INFLATION = 1032
"""Deflate does no more; an entry that claims to is a bomb or corrupt."""
