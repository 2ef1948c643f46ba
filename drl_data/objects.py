"""Bytes at a URL: one small interface over the local disk, object storage and fsspec.

    LocalFolder     file paths: positioned reads, atomic writes (rename; exclusive.py for create)
    ObstoreFolder   s3:// gs:// az:// http(s)://: obstore carries the bytes
    FsspecFolder    every other URL that fsspec knows (memory://, hdfs://, sftp:// ...)

S3 takes its settings from the usual places: `AWS_ENDPOINT_URL[_S3]`, `AWS_REGION`, and credentials
as botocore finds them (environment, profile, instance role).

obstore owns threads that do not survive fork(): a handle made before a fork raises `ForkError` in
the child instead of hanging.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, NotFoundError, PreconditionError
from obstore.store import HTTPStore, S3Store, from_url

from drl_data.errors import ForkError, ObjectError, ObjectNotFoundError
from drl_data.exclusive import place_if_absent

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, S3Config, S3Credential

Buffer = bytes | bytearray | memoryview

_obstore_pid: int | None = None
"""Process in which obstore's threads run; a forked child has the number, not the threads."""


@dataclass(frozen=True)
class ObjectInfo:
    """Name relative to the folder, size in bytes, and a tag that changes when the object does."""

    path: str
    size: int
    etag: str


class Folder(Protocol):
    """A place that holds objects by relative path. Errors: `ObjectNotFoundError`, `ObjectError`."""

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

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object below `prefix` (a folder, or "" for all), in no promised order."""

    def delete(self, path: str) -> None:
        """Remove one object; one that is not there is no error."""

    def copy(self, path: str, to: str) -> bool:
        """Copy an object inside the server; False where its bytes would pass through here."""

    def local_path(self, path: str) -> Path | None:
        """Where the object lies on the local disk, for memory maps; None if it does not."""


def open_folder(url: str) -> Folder:
    """The folder at a path or URL; nothing is created or contacted yet."""
    scheme = urlsplit(url).scheme
    if scheme in ("", "file"):
        return LocalFolder(Path(urlsplit(url).path if scheme else url))
    if scheme in ("s3", "s3a", "gs", "az", "abfs", "abfss", "http", "https"):
        return ObstoreFolder(url)
    return FsspecFolder(url)


def open_parent(url: str) -> tuple[Folder, str]:
    """The folder that holds the object at `url`, and the object's name in it."""
    parent, _, name = url.rpartition("/")
    if not name:
        raise ObjectError(f"{url!r} names no object")
    return open_folder(parent or ("/" if url.startswith("/") else ".")), name


class LocalFolder:
    """Files on the local disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def get(self, path: str) -> memoryview:
        with _local_errors(self.root / path):
            return memoryview((self.root / path).read_bytes())

    def get_range(self, path: str, start: int, stop: int) -> memoryview:
        with _local_errors(self.root / path), open(self.root / path, "rb", buffering=0) as file:
            buffer = bytearray(stop - start)
            view, n_read = memoryview(buffer), 0
            while n_read < len(buffer):
                n = os.preadv(file.fileno(), [view[n_read:]], start + n_read)
                if n == 0:
                    break
                n_read += n
        return _whole(view[:n_read], stop - start, str(self.root / path), start)

    def put(self, path: str, parts: Sequence[Buffer]) -> None:
        target = self.root / path
        with _local_errors(target), self._temporary(target, parts) as name:
            os.replace(name, target)

    def put_if_absent(self, path: str, parts: Sequence[Buffer]) -> bool:
        target = self.root / path
        with _local_errors(target), self._temporary(target, parts) as name:
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
        with _local_errors(self.root / path):
            stat = (self.root / path).stat()
        return ObjectInfo(path, stat.st_size, f"{stat.st_mtime_ns:x}-{stat.st_size:x}")

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        for folder, _, names in os.walk(self.root / prefix):
            for name in names:
                if not name.startswith(".tmp-"):
                    with contextlib.suppress(ObjectNotFoundError):
                        yield self.head(str((Path(folder) / name).relative_to(self.root)))

    def delete(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self.root / path).unlink()

    def copy(self, path: str, to: str) -> bool:
        return False

    def local_path(self, path: str) -> Path | None:
        return self.root / path


class ObstoreFolder:
    """S3, GCS, Azure and HTTP through obstore; pickles by URL."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._store: ObjectStore | None = None

    def __getstate__(self) -> str:
        return self.url

    def __setstate__(self, url: str) -> None:
        self.__init__(url)  # type: ignore[misc]  # a handle is its URL, connected again

    @property
    def store(self) -> ObjectStore:
        """obstore's own handle, made at first use in this process."""
        global _obstore_pid
        if _obstore_pid is None:
            _obstore_pid = os.getpid()
        if _obstore_pid != os.getpid():
            raise ForkError(
                f"{self.url}: object storage was used before this process was forked, and its "
                "threads did not survive the fork; use threads, or start workers by 'spawn' or "
                "'forkserver' (torch: DataLoader(..., multiprocessing_context='forkserver'))"
            )
        if self._store is None:
            self._store = _connect(self.url)
        return self._store

    def get(self, path: str) -> memoryview:
        with _remote_errors(self.url, path):
            return memoryview(obstore.get(self.store, path).bytes())

    def get_range(self, path: str, start: int, stop: int) -> memoryview:
        if start == stop:
            return memoryview(b"")
        with _remote_errors(self.url, path):
            data = memoryview(obstore.get_range(self.store, path, start=start, end=stop))
        return _whole(data, stop - start, f"{self.url}/{path}", start)

    def put(self, path: str, parts: Sequence[Buffer]) -> None:
        with _remote_errors(self.url, path):
            obstore.put(self.store, path, _joined(parts), use_multipart=False)

    def put_if_absent(self, path: str, parts: Sequence[Buffer]) -> bool:
        with _remote_errors(self.url, path):
            try:
                obstore.put(self.store, path, _joined(parts), mode="create", use_multipart=False)
            except (AlreadyExistsError, PreconditionError):
                return False
        return True

    def head(self, path: str) -> ObjectInfo:
        with _remote_errors(self.url, path):
            meta = obstore.head(self.store, path)
        return ObjectInfo(path, meta["size"], (meta["e_tag"] or "").strip('"'))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        with _remote_errors(self.url, prefix):
            for chunk in obstore.list(self.store, prefix or None, chunk_size=1000):
                for meta in chunk:
                    etag = (meta["e_tag"] or "").strip('"')
                    yield ObjectInfo(meta["path"], meta["size"], etag)

    def delete(self, path: str) -> None:
        with contextlib.suppress(ObjectNotFoundError), _remote_errors(self.url, path):
            obstore.delete(self.store, path)

    def copy(self, path: str, to: str) -> bool:
        if self.url.startswith("http"):
            return False
        with _remote_errors(self.url, path):
            obstore.copy(self.store, path, to)
        return True

    def local_path(self, path: str) -> Path | None:
        return None


class FsspecFolder:
    """Any other fsspec URL.

    `put_if_absent` is atomic among the threads of one process; among processes it is as atomic as
    the file system's exclusive creation.
    """

    _creating = threading.Lock()

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        self._fs, self._root = fsspec.core.url_to_fs(self.url)

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}" if path else str(self._root)

    def get(self, path: str) -> memoryview:
        with _remote_errors(self.url, path):
            return memoryview(self._fs.cat_file(self._full(path)))

    def get_range(self, path: str, start: int, stop: int) -> memoryview:
        with _remote_errors(self.url, path):
            data = memoryview(self._fs.cat_file(self._full(path), start=start, end=stop))
        return _whole(data, stop - start, f"{self.url}/{path}", start)

    def put(self, path: str, parts: Sequence[Buffer]) -> None:
        with _remote_errors(self.url, path):
            self._fs.makedirs(self._full(path).rpartition("/")[0], exist_ok=True)
            self._fs.pipe_file(self._full(path), bytes(_joined(parts)))

    def put_if_absent(self, path: str, parts: Sequence[Buffer]) -> bool:
        with _remote_errors(self.url, path):
            self._fs.makedirs(self._full(path).rpartition("/")[0], exist_ok=True)
            try:
                with self._creating:
                    self._fs.pipe_file(self._full(path), bytes(_joined(parts)), mode="create")
            except FileExistsError:
                return False
        return True

    def head(self, path: str) -> ObjectInfo:
        with _remote_errors(self.url, path):
            info = self._fs.info(self._full(path))
        tag = next((str(info[k]) for k in ("ETag", "etag", "mtime", "created") if k in info), "")
        return ObjectInfo(path, int(info["size"]), tag)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        with _remote_errors(self.url, prefix):
            names = sorted(self._fs.find(self._full(prefix)))
        for name in names:
            yield self.head(str(name).removeprefix(f"{self._root}/"))

    def delete(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._full(path))

    def copy(self, path: str, to: str) -> bool:
        return False

    def local_path(self, path: str) -> Path | None:
        return None


def _joined(parts: Sequence[Buffer]) -> Buffer:
    # obstore takes unsigned bytes only; Arrow's buffers, for one, are signed.
    return memoryview(parts[0]).cast("B") if len(parts) == 1 else b"".join(parts)


def _whole(data: memoryview, n_bytes: int, name: str, start: int) -> memoryview:
    if len(data) != n_bytes:
        raise ObjectError(
            f"{name}: bytes {start}..{start + n_bytes} asked for, {len(data)} of {n_bytes} came; "
            "the object is shorter than it was"
        )
    return data


def _connect(url: str) -> ObjectStore:
    scheme = urlsplit(url).scheme
    if scheme in ("http", "https"):
        return HTTPStore.from_url(url, client_options={"allow_http": True})
    if scheme in ("s3", "s3a"):
        return _connect_s3(url)
    return from_url(url)


def _connect_s3(url: str) -> S3Store:
    """Endpoint, region and credentials as the AWS tools find them."""
    import botocore.session

    session = botocore.session.get_session()
    config: S3Config = {"region": session.get_config_variable("region") or "us-east-1"}
    client: ClientConfig = {"timeout": "120s"}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        config["endpoint"] = endpoint
        config["virtual_hosted_style_request"] = False
        client["allow_http"] = endpoint.startswith("http:")
    credentials = session.get_credentials()
    if credentials is None:
        config["skip_signature"] = True
        return S3Store.from_url(url, config=config, client_options=client)

    def provide() -> S3Credential:
        frozen = credentials.get_frozen_credentials()
        expiry = getattr(credentials, "_expiry_time", None)
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": expiry.astimezone(UTC) if isinstance(expiry, datetime) else None,
        }

    return S3Store.from_url(url, config=config, client_options=client, credential_provider=provide)


@contextlib.contextmanager
def _local_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ObjectNotFoundError(f"{path}: no such file") from error
    except OSError as error:
        raise ObjectError(f"{path}: {error.strerror or error}") from error


@contextlib.contextmanager
def _remote_errors(url: str, path: str) -> Iterator[None]:
    try:
        yield
    except (NotFoundError, FileNotFoundError) as error:
        raise ObjectNotFoundError(f"{url}/{path}: no such object") from error
    except (obstore.exceptions.BaseError, OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ObjectError(f"{url}/{path}: {first_line}") from error
