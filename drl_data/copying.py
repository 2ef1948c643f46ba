"""One object of a store into another store, by whatever moves the fewest bytes.

    a hard link                on one local disk: objects are written once, so both names stay right
    a copy inside the server   within a bucket
    the bytes                  else; their checksum is compared on the way

What is there already is kept if it has the same bytes.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal
from urllib.parse import urlsplit

from drl_data.errors import ConflictError, ObjectNotFoundError, StoreError
from drl_data.objects import Buffer, Folder, open_folder
from drl_data.receipts import ObjectRecord
from drl_data.shards import crc32c

How = Literal["linked", "copied", "rewritten"]
"""A hard link; a copy inside the server; the bytes themselves."""

_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES)
"""Two disks, a file system without hard links, or a file that has as many as it may have."""

_PLAIN_KEY = re.compile(r"[A-Za-z0-9_.=/-]*")
"""Keys that are the same in a URL and in a request."""


class DamagedError(StoreError):
    """An object of a store that is not what its receipt says."""

    def __init__(self, url: str, path: str, what: str) -> None:
        super().__init__(f"{url}/{path}: {what}; `drl verify --deep {url}` lists what else is")
        self.url, self.path = url, path


def check_size(source: Folder, record: ObjectRecord) -> None:
    """Raise DamagedError if an object is not there, or of another size than its record says."""
    try:
        size = source.head(record.path).size
    except ObjectNotFoundError as error:
        raise DamagedError(source.url, record.path, "missing") from error
    if size != record.n_bytes:
        raise DamagedError(
            source.url, record.path, f"{size} bytes, its receipt says {record.n_bytes}"
        )


def checked_bytes(source: Folder, record: ObjectRecord) -> memoryview:
    """The bytes of an object.

    Raises:
        DamagedError: it is missing, or has another checksum than its record.
    """
    try:
        data = source.get(record.path)
    except ObjectNotFoundError as error:
        raise DamagedError(source.url, record.path, "missing") from error
    _check(source.url, record, [data])
    return data


def _check(url: str, record: ObjectRecord, parts: Sequence[Buffer]) -> None:
    found = crc32c(parts)
    if found != record.crc32c:
        raise DamagedError(
            url, record.path, f"CRC-32C {found:08x}, its receipt says {record.crc32c:08x}"
        )


def copy_object(source: Folder, record: ObjectRecord, target: Folder, path: str) -> How:
    """Put the object that `record` names at `path` of the target, unless it is there.

    Raises:
        DamagedError: the source is missing or of another size, or its bytes, where they pass
            through here, have another checksum.
        ConflictError: another object is at `path`.
    """
    check_size(source, record)
    how = _link(source, record.path, target, path) or _copy_inside(source, record, target, path)
    if how is not None:
        return how
    data = checked_bytes(source, record)
    if not target.put_if_absent(path, [data]):
        _require_same(target, path, record)
    return "rewritten"


def _link(source: Folder, name: str, target: Folder, path: str) -> How | None:
    """A hard link; None where there can be none, or something is at the path already."""
    there, made = source.local_path(name), target.local_path(path)
    if there is None or made is None:
        return None
    made.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(there, made)
    except FileExistsError:
        return "linked" if os.path.samefile(there, made) else None
    except OSError as error:
        if error.errno in _NO_LINK:
            return None
        raise
    return "linked"


def _copy_inside(source: Folder, record: ObjectRecord, target: Folder, path: str) -> How | None:
    """A copy by the server; None where there can be none, or something is at the path already."""
    (root, old), (other_root, new) = (_root_and_key(f.url) for f in (source, target))
    if root != other_root or source.local_path("") is not None:
        return None
    if not _PLAIN_KEY.fullmatch(old) or not _PLAIN_KEY.fullmatch(new):
        return None
    try:
        target.head(path)
    except ObjectNotFoundError:
        names = (f"{old}/{record.path}".lstrip("/"), f"{new}/{path}".lstrip("/"))
        return "copied" if _bucket(root).copy(*names) else None
    return None


def _root_and_key(url: str) -> tuple[str, str]:
    """Bucket and key of a URL: ("s3://bucket", "stores/a")."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}", parts.path.strip("/")


@lru_cache(16)
def _bucket(root: str) -> Folder:
    return open_folder(root)


def _require_same(target: Folder, path: str, record: ObjectRecord) -> None:
    found = crc32c([target.get(path)])
    if found != record.crc32c:
        raise ConflictError(
            f"{target.url}/{path}: holds other bytes (CRC-32C {found:08x}) than the ones to be "
            f"copied there ({record.crc32c:08x}); run `drl extract --repair`, or copy into an "
            "empty folder"
        )
