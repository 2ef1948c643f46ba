"""What a folder of objects is, and the one on the local disk."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from drl_data.errors import (
    ObjectError,
    ObjectNotFoundError,
    StorageUnusableError,
)
from drl_data.exclusive import place_if_absent

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class ObjectInfo:
    """Name relative to the folder, size in bytes, and a tag that changes when the object does."""

    path: str
    size: int
    etag: str


class Folder(Protocol):
    """A place that holds objects by relative path.

    Every method raises `ObjectNotFoundError` (the object is missing), `StorageUnusableError`
    (access denied, bucket missing, disk full: no later call will fare better), `TransientError` (a
    later call may), or another `ObjectError`.
    """

    url: str

    def get(self, path: str) -> memoryview:
        """The whole object."""

    def get_range(self, path: str, start: int, stop: int) -> memoryview:
        """Bytes `start` to `stop` (exclusive); fewer bytes than asked for are an `ObjectError`."""

    def put(self, path: str, parts: Sequence[Buffer]) -> None:
        """Write the concatenation of `parts` as one object, whole or not at all."""

    def put_if_absent(self, path: str, parts: Sequence[Buffer]) -> bool:
        """As `put` unless the object exists, atomically; False if it does."""

    def head(self, path: str) -> ObjectInfo:
        """Size and tag of one object."""

    def list(self, prefix: str = "", after: str = "") -> Iterator[ObjectInfo]:
        """Every object below `prefix` (a folder, or "" for all), in no promised order.

        `after`: go on behind the last name that a listing gave before it failed.
        """

    def delete(self, path: str) -> None:
        """Remove one object; one that is not there is no error."""

    def copy(self, path: str, to: str) -> bool:
        """Copy an object inside the server; False where its bytes would pass through here."""

    def local_path(self, path: str) -> Path | None:
        """Where the object lies on the local disk, for memory maps; None if it does not."""


class LocalFolder:
    """Files on the local disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def get(self, path: str) -> memoryview:
        with local_errors(self.root / path):
            return memoryview((self.root / path).read_bytes())

    def get_range(self, path: str, start: int, stop: int) -> memoryview:
        with local_errors(self.root / path), open(self.root / path, "rb", buffering=0) as file:
            buffer = bytearray(stop - start)
            view, n_read = memoryview(buffer), 0
            while n_read < len(buffer):
                n = os.preadv(file.fileno(), [view[n_read:]], start + n_read)
                if n == 0:
                    break
                n_read += n
        if n_read < len(buffer):
            raise shorter(str(self.root / path), start, stop, n_read)
        return view

    def put(self, path: str, parts: Sequence[Buffer]) -> None:
        target = self.root / path
        with local_errors(target), self._temporary(target, parts) as name:
            os.replace(name, target)

    def put_if_absent(self, path: str, parts: Sequence[Buffer]) -> bool:
        target = self.root / path
        with local_errors(target), self._temporary(target, parts) as name:
            return place_if_absent(name, target)

    @contextlib.contextmanager
    def _temporary(self, target: Path, parts: Sequence[Buffer]) -> Iterator[str]:
        """A file beside the target, written and synced; removed at the end if still there."""
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".tmp-", dir=target.parent)
        try:
            with os.fdopen(handle, "wb", buffering=0) as file:
                for part in parts:
                    view, n_written = memoryview(part).cast("B"), 0
                    while n_written < len(view):
                        n_written += file.write(view[n_written:])
                os.fchmod(file.fileno(), 0o644)
                os.fsync(file.fileno())
            yield name
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)

    def head(self, path: str) -> ObjectInfo:
        with local_errors(self.root / path):
            stat = (self.root / path).stat()
        return ObjectInfo(path, stat.st_size, f"{stat.st_mtime_ns:x}-{stat.st_size:x}")

    def list(self, prefix: str = "", after: str = "") -> Iterator[ObjectInfo]:
        top = self.root / prefix
        with local_errors(top):
            for folder, _, names in os.walk(top, onerror=_raise_unless_missing):
                for name in names:
                    if not name.startswith(".tmp-"):
                        with contextlib.suppress(ObjectNotFoundError):
                            yield self.head(str((Path(folder) / name).relative_to(self.root)))

    def delete(self, path: str) -> None:
        with contextlib.suppress(ObjectNotFoundError), local_errors(self.root / path):
            (self.root / path).unlink()

    def copy(self, path: str, to: str) -> bool:
        return False

    def local_path(self, path: str) -> Path | None:
        return self.root / path


def _raise_unless_missing(error: OSError) -> None:
    """os.walk would leave out a folder that it cannot read, and with it what is signed there."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


_REMEDIES = {
    errno.ENOSPC: "the disk is full; make room",
    errno.EDQUOT: "the quota of this user is used up; make room",
    errno.EROFS: "the file system is read-only; mount it for writing",
    errno.EFBIG: "a file of this size is not allowed; raise the limit (ulimit -f)",
    errno.EACCES: "access is denied; give this user the right",
    errno.EPERM: "access is denied; give this user the right",
}


def unusable(place: str, error: OSError) -> StorageUnusableError | None:
    """The error that ends a run, if this one does."""
    remedy = _REMEDIES.get(error.errno or 0)
    if remedy is None:
        return None
    return StorageUnusableError(
        f"{place}: {error.strerror or error}: {remedy}, then run the same command again"
    )


@contextlib.contextmanager
def local_errors(path: Path) -> Iterator[None]:
    """Errors of the system as ours."""
    try:
        yield
    except FileNotFoundError as error:
        raise ObjectNotFoundError(f"{path}: no such file") from error
    except OSError as error:
        raise unusable(str(path), error) or ObjectError(
            f"{path}: {error.strerror or error}"
        ) from error


def joined(parts: Sequence[Buffer]) -> Buffer:
    """One buffer of unsigned bytes, without a copy where there is one part."""
    # obstore takes unsigned bytes only; Arrow's buffers, for one, are signed.
    return memoryview(parts[0]).cast("B") if len(parts) == 1 else b"".join(parts)


def shorter(place: str, start: int, stop: int, n_bytes: int) -> ObjectError:
    """The error of a range that the object does not have (any more)."""
    return ObjectError(
        f"{place}: bytes {start}..{stop} asked for, {n_bytes} of {stop - start} came; the object "
        "is shorter than it was"
    )
