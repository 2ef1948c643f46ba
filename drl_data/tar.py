"""Members of a tar, from its headers alone.

`walk_files` reads headers through a `Source`: `RangedSource` fetches windows of a plain tar and
jumps over bodies that are larger than its window, `GzipSource` inflates a compressed one from front
to back. Formats: ustar, PAX (local and global records), GNU long names and base-256 numbers.

Names follow Python's `tarfile`, which is what the `webdataset` library reads with. Unlike it, a tar
that ends early, or goes on after its end marker, is an error: both would lose samples silently.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from drl_data.errors import InputError
from drl_data.objects import Folder, join_url

BLOCK_BYTES = 512
GZIP_MAGIC = b"\x1f\x8b"

_LOCAL_WINDOW = 32 << 10
"""A read of a local file costs microseconds, so read little."""
_REMOTE_WINDOW = 1 << 20
"""A request costs about as much as this many bytes, so bodies up to this size are read through."""
_JUMP_WINDOW = 64 << 10
"""After a larger body: enough for the small members (labels, captions) beside large ones."""
_GZIP_CHUNK = 8 << 20
_MAX_EXTENSION_BYTES = 16 << 20
"""A PAX header or long name beyond this is a corrupt size field."""

_OTHER_COMPRESSIONS = {
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
}
_USED_RECORDS = frozenset([b"path", b"size", b"mtime", b"GNU.sparse.name"])
_WITHOUT_DATA = frozenset(b"123456")
"""Links, devices, directories, pipes: their size field does not count bytes that follow."""
_REGULAR = frozenset(b"0\x007S")


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar; `offset` and `size` are of its data in the uncompressed tar."""

    name: str
    offset: int
    size: int
    mtime: float
    """Seconds since the epoch."""
    checksum: int
    """The header's own checksum field."""
    sparse: bool
    """The data are a map of holes and the rest, not the file."""


class Source(Protocol):
    """The uncompressed bytes of a tar, read from front to back."""

    name: str

    def read(self, start: int, n_bytes: int) -> bytes:
        """Bytes from `start`, which never decreases; fewer than asked for only at the end."""


class RangedSource:
    """A plain tar: a window of it at a time."""

    def __init__(self, folder: Folder, path: str, size: int) -> None:
        self.name = join_url(folder.url, path)
        self._folder, self._path, self._size = folder, path, size
        local = folder.local_path(path) is not None
        self._ahead = _LOCAL_WINDOW if local else _REMOTE_WINDOW
        self._start = 0
        self._window = memoryview(b"")

    def read(self, start: int, n_bytes: int) -> bytes:
        stop = min(start + n_bytes, self._size)
        window_stop = self._start + len(self._window)
        if start >= stop:
            return b""
        if start < self._start or stop > window_stop:
            jumped = start - window_stop > self._ahead
            ahead = min(_JUMP_WINDOW, self._ahead) if jumped else self._ahead
            window_stop = min(start + max(n_bytes, ahead), self._size)
            self._window = self._folder.get_range(self._path, start, window_stop)
            self._start = start
        return bytes(self._window[start - self._start : stop - self._start])


class GzipSource:
    """A gzip tar, inflated as it is read; several gzip members in a row are one stream.

    Raises:
        InputError: if the compressed data are corrupt or end early.
    """

    def __init__(self, folder: Folder, path: str, size: int) -> None:
        self.name = join_url(folder.url, path)
        self._folder, self._path, self._size = folder, path, size
        self._fetched = 0
        self._compressed: bytes | memoryview = b""
        self._inflater = zlib.decompressobj(wbits=31)
        self._start = 0
        self._buffer = bytearray()
        self._ended = False

    def read(self, start: int, n_bytes: int) -> bytes:
        assert start >= self._start, "a gzip stream cannot go back"
        while not self._ended and self._start + len(self._buffer) < start + n_bytes:
            self._drop(start)
            self._buffer += self._inflate()
        self._drop(start)
        return bytes(self._buffer[:n_bytes]) if self._start == start else b""

    def _drop(self, start: int) -> None:
        n_bytes = min(start - self._start, len(self._buffer))
        del self._buffer[:n_bytes]
        self._start += n_bytes

    def _inflate(self) -> bytes:
        """At most 1 MiB more; sets `_ended` at the end of the last gzip member."""
        if not self._compressed:
            self._fetch()
        if self._inflater.eof:
            self._next_member()
            return b""
        if not self._compressed:
            raise InputError(
                f"{self.name}: the gzip data end early, at byte {self._size}; copy or write the "
                "tar again"
            )
        try:
            data = self._inflater.decompress(self._compressed, 1 << 20)
        except zlib.error as error:
            raise InputError(
                f"{self.name}: corrupt gzip data before byte {self._fetched}: {error}; copy or "
                "write the tar again"
            ) from error
        done = self._inflater.eof
        self._compressed = self._inflater.unused_data if done else self._inflater.unconsumed_tail
        return data

    def _fetch(self) -> None:
        stop = min(self._fetched + _GZIP_CHUNK, self._size)
        if stop > self._fetched:
            self._compressed = self._folder.get_range(self._path, self._fetched, stop)
            self._fetched = stop

    def _next_member(self) -> None:
        self._compressed = bytes(self._compressed).lstrip(b"\x00")
        if self._compressed:
            self._inflater = zlib.decompressobj(wbits=31)
        elif self._fetched == self._size:
            self._ended = True


def open_source(folder: Folder, path: str, size: int) -> RangedSource | GzipSource:
    """The tar's bytes, inflated if they begin as gzip does, whatever its name.

    Raises:
        InputError: if it is empty or compressed in another way.
    """
    plain = RangedSource(folder, path, size)
    start = plain.read(0, 8)
    if not start:
        raise InputError(f"{plain.name}: empty file, want a tar; copy or write it again")
    for magic, kind in _OTHER_COMPRESSIONS.items():
        if start.startswith(magic):
            raise InputError(
                f"{plain.name}: a {kind} file, want a plain or gzip tar; unpack it and pack it "
                "again without compression (images are compressed already)"
            )
    return GzipSource(folder, path, size) if start.startswith(GZIP_MAGIC) else plain


def walk_files(source: Source) -> Iterator[Member]:
    """Every regular file, in order; directories, links, devices and pipes are passed over.

    Raises:
        InputError: naming the tar and the byte, if it is truncated, corrupt, or goes on after its
            end marker.
    """
    position = 0
    global_pax: dict[str, str] = {}
    pax: dict[str, str] = {}
    long_name: str | None = None
    while True:
        block = source.read(position, BLOCK_BYTES)
        if len(block) < BLOCK_BYTES:
            raise _truncated(source, position)
        if not any(block):
            _check_end(source, position)
            return
        header = _parse(block, source, position)
        data = position + BLOCK_BYTES
        if header.kind in b"xXgLK":
            payload = _extension(source, header, data)
            if header.kind in b"xX":
                pax = _pax_records(payload, source, position)
            elif header.kind == ord("g"):
                global_pax |= _pax_records(payload, source, position)
            elif header.kind == ord("L"):
                long_name = _text(payload)
            position = data + _padded(header.size)
            continue
        if header.kind == ord("S"):
            data = _skip_sparse_maps(source, block, data)
        records = global_pax | pax
        size = _number(records, "size", header.size, source, position)
        name = long_name if long_name is not None else header.name
        name = records.get("GNU.sparse.name", records.get("path", name))
        if "path" in records:
            name = name.rstrip("/")
        is_folder = header.kind == 0 and header.name.endswith("/")
        if header.kind in _REGULAR and not is_folder:
            sparse = header.kind == ord("S") or any(k.startswith("GNU.sparse.") for k in records)
            mtime = _number(records, "mtime", header.mtime, source, position)
            yield Member(name, data, int(size), mtime, header.checksum, sparse)
        has_data = header.kind not in _WITHOUT_DATA and not is_folder
        position = data + (_padded(int(size)) if has_data else 0)
        pax, long_name = {}, None


@dataclass(frozen=True, slots=True)
class _Header:
    name: str
    kind: int
    size: int
    mtime: float
    checksum: int


def _parse(block: bytes, source: Source, position: int) -> _Header:
    try:
        checksum = _integer(block[148:156])
        unsigned = sum(block) - sum(block[148:156]) + 8 * 32
        if checksum != unsigned and checksum != _signed_checksum(block):
            raise ValueError(f"checksum {checksum}, want {unsigned}")
        size = _integer(block[124:136])
        if size < 0:
            raise ValueError(f"size {size}")
        mtime = float(_integer(block[136:148]))
    except ValueError as error:
        what = "a corrupt header" if position else "not a tar, or a corrupt one"
        raise InputError(
            f"{source.name}: {what} at byte {position}: {error}; copy or write the tar again"
        ) from error
    name, prefix = _text(block[:100]), _text(block[345:500])
    if prefix and block[156:157] not in (b"L", b"K", b"S"):
        name = f"{prefix}/{name}"
    return _Header(name, block[156], size, mtime, checksum)


def _signed_checksum(block: bytes) -> int:
    """Some old tars summed signed bytes."""
    rest = block[:148] + block[156:]
    return sum(rest) - 256 * sum(byte > 127 for byte in rest) + 8 * 32


def _integer(field: bytes) -> int:
    """A number field: base-256 if its top bit is set (GNU), octal text otherwise."""
    if field[0] == 0o200:
        return int.from_bytes(field[1:], "big")
    if field[0] == 0o377:
        return int.from_bytes(field, "big", signed=True)
    text = field.partition(b"\x00")[0].strip()
    return int(text, 8) if text else 0


def _text(field: bytes) -> str:
    """A NUL-terminated name; bytes that are not UTF-8 become backslash escapes."""
    return field.partition(b"\x00")[0].decode("utf-8", "backslashreplace")


def _number(
    records: dict[str, str], key: str, default: float, source: Source, position: int
) -> float:
    try:
        value = type(default)(records.get(key, default))
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or (key == "size" and value < 0):
        raise InputError(
            f"{source.name}: PAX {key} {records[key][:40]!r} at byte {position}, want a number "
            "(of bytes, or seconds); write the tar again"
        )
    return value


def _padded(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def _extension(source: Source, header: _Header, data: int) -> bytes:
    payload = source.read(data, min(header.size, _MAX_EXTENSION_BYTES))
    if len(payload) < header.size:
        if header.size > _MAX_EXTENSION_BYTES:
            raise InputError(
                f"{source.name}: an extended header of {header.size} bytes at byte "
                f"{data - BLOCK_BYTES}, want at most {_MAX_EXTENSION_BYTES}; the tar is corrupt"
            )
        raise _truncated(source, data)
    return payload


def _pax_records(payload: bytes, source: Source, position: int) -> dict[str, str]:
    """Records `LENGTH KEY=VALUE newline`; the length counts the whole record."""
    records: dict[str, str] = {}
    start = 0
    while start < len(payload) and payload[start]:
        digits = payload[start : start + 20].partition(b" ")[0]
        stop = start + int(digits) if digits.isdigit() else 0
        key, equals, value = payload[start + len(digits) + 1 : stop - 1].partition(b"=")
        if not (start < stop <= len(payload) and payload[stop - 1] == ord("\n") and key and equals):
            raise InputError(
                f"{source.name}: a corrupt PAX record in the header at byte {position}; copy or "
                "write the tar again"
            )
        # Others are left out: global ones hold for every member, and a tar may have millions.
        if key in _USED_RECORDS:
            records[key.decode()] = value.decode("utf-8", "backslashreplace")
        elif key.startswith(b"GNU.sparse."):
            records["GNU.sparse."] = ""
        start = stop
    return records


def _skip_sparse_maps(source: Source, block: bytes, data: int) -> int:
    """Where the data begin after the extra map blocks of an old GNU sparse member."""
    more = block[482]
    while more:
        extra = source.read(data, BLOCK_BYTES)
        if len(extra) < BLOCK_BYTES:
            raise _truncated(source, data)
        more = extra[504]
        data += BLOCK_BYTES
    return data


def _truncated(source: Source, position: int) -> InputError:
    return InputError(
        f"{source.name}: the tar ends before byte {position + BLOCK_BYTES}, where a header or the "
        "end marker should be; copy it again, or, if it is whole and only lacks the marker: "
        "`truncate -s +1024 TAR`"
    )


def _check_end(source: Source, position: int) -> None:
    """The rest after the end marker must be padding; in concatenated tars it is not."""
    rest = source.read(position, _JUMP_WINDOW)
    if any(rest):
        first = len(rest) - len(rest.lstrip(b"\x00"))
        raise InputError(
            f"{source.name}: data at byte {position + first}, after the end marker at byte "
            f"{position}; tars joined by `cat` must be listed one by one, or joined by "
            "`tar --concatenate`"
        )
