"""Bytes at a URL: one small interface over the local disk, object storage and fsspec.

LocalFolder      file paths: positioned reads, atomic writes (rename; exclusive.py for create)
ObstoreFolder    s3:// gs:// az:// http(s)://: obstore carries the bytes
FsspecFolder     every other URL that fsspec knows (memory://, hdfs://, sftp:// ...)
RetryingFolder   around the last two: requests that fail for the moment are made again
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from drl_data.errors import ObjectError
from drl_data.folders import Buffer, Folder, LocalFolder, ObjectInfo
from drl_data.remote_folders import FsspecFolder, ObstoreFolder, join_url, split_url
from drl_data.retries import RetryCount, RetryingFolder, RetryPolicy, counted

__all__ = [
    "Buffer",
    "Folder",
    "FsspecFolder",
    "LocalFolder",
    "ObjectInfo",
    "ObstoreFolder",
    "RetryCount",
    "RetryPolicy",
    "RetryingFolder",
    "counted",
    "join_url",
    "open_folder",
    "open_parent",
    "split_url",
]


def open_folder(url: str) -> Folder:
    """The folder at a path or URL; nothing is created or contacted yet."""
    scheme = urlsplit(url).scheme
    if scheme in ("", "file"):
        return LocalFolder(Path(urlsplit(url).path if scheme else url))
    if scheme in ("s3", "s3a", "gs", "az", "abfs", "abfss", "http", "https"):
        return RetryingFolder(ObstoreFolder(url))
    return RetryingFolder(FsspecFolder(url))


def open_parent(url: str) -> tuple[Folder, str]:
    """The folder that holds the object at `url`, and the object's name in it."""
    parent, name = split_url(url)
    if not name:
        raise ObjectError(f"{url!r} names no object")
    return open_folder(parent), name
