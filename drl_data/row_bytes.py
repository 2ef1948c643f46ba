"""Bytes of any members of the tars, by row: label maps, for example."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from drl_data.errors import InputError, ObjectNotFoundError, is_redacted, redacted
from drl_data.index import SampleIndex, TarInfo
from drl_data.objects import Buffer, Folder, open_parent
from drl_data.tar import GzipSource

N_THREADS = 8
_BLOCK = 64
"""Members that are in memory at once."""


def row_bytes(index: SampleIndex, rows: Sequence[int]) -> Iterator[tuple[int, Buffer]]:
    """(row, bytes of its member) for rows that have one, in the order given.

    Rows of one tar are read together, in threads; a gzip tar is inflated from its beginning.

    Raises:
        InputError: a tar is gone or is not what was indexed, or its URL has lost its secrets.
    """
    columns = (index.table.column(name) for name in ("tar", "offset", "size"))
    tars, offsets, sizes = columns
    for tar, run in itertools.groupby(rows, key=lambda row: tars[row].as_py()):
        info, members = index.tars[tar], list(run)
        folder, name = _open(info)
        places = [(offsets[row].as_py(), sizes[row].as_py()) for row in members]
        read = _inflated if info.compression == "gzip" else _ranges
        yield from zip(members, read(folder, name, info, places), strict=True)


def _ranges(
    folder: Folder, name: str, _info: TarInfo, places: Sequence[tuple[int, int]]
) -> Iterator[Buffer]:
    with ThreadPoolExecutor(N_THREADS, thread_name_prefix="drl-read") as pool:
        for start in range(0, len(places), _BLOCK):
            some = places[start : start + _BLOCK]
            yield from pool.map(lambda p: folder.get_range(name, p[0], p[0] + p[1]), some)


def _inflated(
    folder: Folder, name: str, info: TarInfo, places: Sequence[tuple[int, int]]
) -> Iterator[Buffer]:
    source, at = GzipSource(folder, name, info.size), 0
    for offset, size in places:
        if offset < at:  # the stream cannot go back
            source = GzipSource(folder, name, info.size)
        at = offset
        yield source.read(offset, size)


def _open(info: TarInfo) -> tuple[Folder, str]:
    if is_redacted(info.url):
        raise InputError(
            f"{info.url}: a store keeps the URLs of tars without their secrets; name the tars in "
            "the pipeline's dataset"
        )
    folder, name = open_parent(info.url)
    try:
        now = folder.head(name)
    except ObjectNotFoundError as error:
        raise InputError(
            f"{redacted(info.url)}: gone since it was indexed; put it back or index again"
        ) from error
    if (now.size, now.etag) != (info.size, info.etag):
        raise InputError(f"{redacted(info.url)}: changed since it was indexed; index again")
    return folder, name
