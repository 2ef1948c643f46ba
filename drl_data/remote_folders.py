"""Folders on the other side of a network: obstore for object storage, fsspec for the rest.

S3 takes its settings from the usual places: `AWS_ENDPOINT_URL[_S3]`, `AWS_REGION`, and credentials
as botocore finds them (environment, profile, instance role). A request that takes longer than
`DRL_STORAGE_TIMEOUT_S` (120) has failed; raise it where 64 MiB take longer than that.

Nothing here tries again: obstore's own retries are off, and `retries.RetryingFolder` has them. (The
libraries below fsspec keep theirs: they have no common switch.)

obstore owns threads that do not survive fork(): a handle made before a fork raises `ForkError` in
the child instead of hanging.
"""

from __future__ import annotations

import base64
import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes, urlsplit, urlunsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import HTTPStore, S3Store, from_url

from drl_data.errors import (
    ForkError,
    InputError,
    ObjectError,
    ObjectNotFoundError,
    TransientError,
    UserError,
)
from drl_data.folders import Buffer, ObjectInfo, joined, shorter
from drl_data.storage_errors import Answer, fsspec_error, obstore_error

if TYPE_CHECKING:
    from obstore import GetResult
    from obstore.store import ClientConfig, ObjectStore, RetryConfig, S3Config, S3Credential

_obstore_pid: int | None = None
"""Process in which obstore's threads run; a forked child has the number, not the threads."""

_NO_RETRIES: RetryConfig = {"max_retries": 0, "retry_timeout": timedelta(0)}


def split_url(url: str) -> tuple[str, str]:
    """The URL of the folder, and the object's name in it; the query of a web address (which may be
    the signature of this very object) stays with the folder."""
    place, mark, query = url.partition("?") if _is_web(url) else (url, "", "")
    parent, _, name = place.rpartition("/")
    return (parent or ("/" if url.startswith("/") else ".")) + mark + query, name


def join_url(folder: str, path: str) -> str:
    """URL of an object in a folder, with the query of the folder at its end."""
    place, mark, query = folder.partition("?") if _is_web(folder) else (folder, "", "")
    return f"{place}/{path}{mark}{query}"


def _is_web(url: str) -> bool:
    return url.startswith(("http:", "https:"))


class ObstoreFolder:
    """S3, GCS, Azure and HTTP through obstore; pickles by URL."""

    def __init__(self, url: str) -> None:
        self._signed = _is_web(url) and "?" in url
        self.url = url if self._signed else url.rstrip("/")
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
            self._store = _connected(self.url, _settings())
        return self._store

    def get(self, path: str) -> memoryview:
        with self._errors(path):
            found = self._found(path)
            data = memoryview(found.bytes())
        if len(data) != found.meta["size"]:
            raise TransientError(
                f"{join_url(self.url, path)}: {len(data)} bytes came of an object of "
                f"{found.meta['size']} bytes"
            )
        return data

    def _found(self, path: str) -> GetResult:
        """Ask for all bytes as a range where that works: a whole answer does not say how large the
        object is, so one that was cut on its way and given a new length would pass."""
        try:
            return obstore.get(self.store, path, options={"range": {"offset": 0}})
        except BaseError as error:
            answer = Answer.of(error)
            if answer.status != 416 and not answer.without_ranges:  # 416: it is empty
                raise
        return obstore.get(self.store, path)

    def get_range(self, path: str, start: int, stop: int) -> memoryview:
        if start == stop:
            return memoryview(b"")
        try:
            with self._errors(path):
                data = memoryview(obstore.get_range(self.store, path, start=start, end=stop))
        except ObjectError as error:
            if isinstance(error.__cause__, BaseError) and Answer.of(error.__cause__).status == 416:
                raise shorter(join_url(self.url, path), start, stop, 0) from error
            raise
        if len(data) == stop - start:
            return data
        if self.head(path).size < stop:
            raise shorter(join_url(self.url, path), start, stop, len(data))
        raise TransientError(
            f"{join_url(self.url, path)}: {len(data)} bytes came of the {stop - start} bytes "
            f"{start}..{stop}, which the object has"
        )

    def put(self, path: str, parts: Sequence[Buffer]) -> None:
        with self._errors(path, writing=True):
            obstore.put(self.store, path, joined(parts), use_multipart=False)

    def put_if_absent(self, path: str, parts: Sequence[Buffer]) -> bool:
        with self._errors(path, writing=True):
            try:
                obstore.put(self.store, path, joined(parts), mode="create", use_multipart=False)
            except (AlreadyExistsError, PreconditionError) as error:
                # S3 also answers 409 to all of several writers at once: then nobody wrote yet.
                if Answer.of(error).is_transient:
                    raise
                return False
        return True

    def head(self, path: str) -> ObjectInfo:
        with self._errors(path):
            if self._signed:
                # A URL that is signed for GET does not allow HEAD; one byte says the same.
                meta = obstore.get(self.store, path, options={"range": (0, 1)}).meta
            else:
                meta = self._head(path)
        return ObjectInfo(path, meta["size"], (meta["e_tag"] or "").strip('"'))

    def _head(self, path: str) -> obstore.ObjectMeta:
        try:
            return obstore.head(self.store, path)
        except (BaseError, FileNotFoundError) as error:
            answer = Answer.of(error)
            if answer.is_transient or answer.status not in range(400, 500):
                raise
            # The answer to HEAD has no body, so it does not say why: is it the object that is
            # missing, or the bucket? The answer to GET does.
            return obstore.get(self.store, path, options={"range": {"offset": 0}}).meta

    def list(self, prefix: str = "", after: str = "") -> Iterator[ObjectInfo]:
        with self._errors(prefix):
            pages = obstore.list(self.store, prefix or None, offset=after or None, chunk_size=1000)
            for page in pages if self._lists_in_order else list(pages):
                for meta in page:
                    etag = (meta["e_tag"] or "").strip('"')
                    yield ObjectInfo(meta["path"], meta["size"], etag)

    @property
    def _lists_in_order(self) -> bool:
        """Whether a listing can go on behind a name; WebDAV and S3 Express promise no order, so
        theirs are whole before the first name is given out."""
        return not _is_web(self.url) and not urlsplit(self.url).netloc.endswith("--x-s3")

    def delete(self, path: str) -> None:
        with contextlib.suppress(ObjectNotFoundError), self._errors(path):
            obstore.delete(self.store, path)

    def copy(self, path: str, to: str) -> bool:
        if _is_web(self.url):
            return False
        with self._errors(path):
            obstore.copy(self.store, path, to)
        return True

    def local_path(self, path: str) -> Path | None:
        return None

    @contextlib.contextmanager
    def _errors(self, path: str, *, writing: bool = False) -> Iterator[None]:
        try:
            yield
        except (BaseError, OSError, ValueError) as error:
            raise obstore_error(join_url(self.url, path), error, writing=writing) from error


class FsspecFolder:
    """Any other fsspec URL; pickles by URL.

    `put_if_absent` is atomic among the threads of one process; among processes it is as atomic as
    the file system's exclusive creation.
    """

    _creating = threading.Lock()

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._connected: tuple[Any, str] | None = None

    def __getstate__(self) -> str:
        return self.url

    def __setstate__(self, url: str) -> None:
        self.__init__(url)  # type: ignore[misc]  # as that of ObstoreFolder

    @property
    def _fs(self) -> Any:  # noqa: ANN401  # fsspec has no types
        return self._connect()[0]

    def _connect(self) -> tuple[Any, str]:
        import fsspec

        if self._connected is None:
            try:
                self._connected = fsspec.core.url_to_fs(self.url)
            except (ValueError, ImportError) as error:
                raise InputError(
                    f"{self.url}: {error}; want a path, or a URL of s3, gs, az, http or of a file "
                    "system that fsspec knows"
                ) from error
        return self._connected

    def _full(self, path: str) -> str:
        root = self._connect()[1]
        return f"{root}/{path}" if path else str(root)

    def get(self, path: str) -> memoryview:
        with self._errors(path):
            data = memoryview(self._fs.cat_file(self._full(path)))
            size = self._fs.info(self._full(path))["size"]
        if size is not None and len(data) != size:
            raise TransientError(
                f"{self.url}/{path}: {len(data)} bytes came of an object of {size} bytes"
            )
        return data

    def get_range(self, path: str, start: int, stop: int) -> memoryview:
        with self._errors(path):
            data = memoryview(self._fs.cat_file(self._full(path), start=start, end=stop))
        if len(data) == stop - start:
            return data
        if self.head(path).size < stop:
            raise shorter(f"{self.url}/{path}", start, stop, len(data))
        raise TransientError(
            f"{self.url}/{path}: {len(data)} bytes came of the {stop - start} bytes "
            f"{start}..{stop}, which the object has"
        )

    def put(self, path: str, parts: Sequence[Buffer]) -> None:
        with self._errors(path):
            self._fs.makedirs(self._full(path).rpartition("/")[0], exist_ok=True)
            self._fs.pipe_file(self._full(path), bytes(joined(parts)))

    def put_if_absent(self, path: str, parts: Sequence[Buffer]) -> bool:
        with self._errors(path):
            self._fs.makedirs(self._full(path).rpartition("/")[0], exist_ok=True)
            try:
                with self._creating:
                    self._fs.pipe_file(self._full(path), bytes(joined(parts)), mode="create")
            except FileExistsError:
                return False
        return True

    def head(self, path: str) -> ObjectInfo:
        with self._errors(path):
            info = self._fs.info(self._full(path))
        tag = next((str(info[k]) for k in ("ETag", "etag", "mtime", "created") if k in info), "")
        return ObjectInfo(path, int(info["size"]), tag)

    def list(self, prefix: str = "", after: str = "") -> Iterator[ObjectInfo]:
        with self._errors(prefix):
            found = self._fs.find(self._full(prefix))
        root = self._full("")
        for name in sorted(str(full).removeprefix(f"{root}/") for full in found):
            if name > after:
                # One by one: details in a listing have other tags than `info` in some systems.
                with contextlib.suppress(ObjectNotFoundError):
                    yield self.head(name)

    def delete(self, path: str) -> None:
        with contextlib.suppress(ObjectNotFoundError), self._errors(path):
            self._fs.rm_file(self._full(path))

    def copy(self, path: str, to: str) -> bool:
        return False

    def local_path(self, path: str) -> Path | None:
        return None

    @contextlib.contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        try:
            yield
        except (ObjectError, UserError):
            raise
        except Exception as error:  # each file system raises what the library below it raises
            raise fsspec_error(f"{self.url}/{path}", error) from error


def _client() -> ClientConfig:
    text = os.environ.get("DRL_STORAGE_TIMEOUT_S", "120")
    try:
        timeout = timedelta(seconds=float(text))
    except (ValueError, OverflowError):
        timeout = timedelta(0)
    if timeout <= timedelta(0):
        raise UserError(f"DRL_STORAGE_TIMEOUT_S is {text!r}; want a number of seconds above 0")
    return {"timeout": timeout, "connect_timeout": min(timeout, timedelta(seconds=10))}


_SETTINGS = ("AWS_", "AZURE_", "DRL_STORAGE_", "GOOGLE_")


def _settings() -> tuple[tuple[str, str], ...]:
    """What the environment says about storage."""
    return tuple(sorted(item for item in os.environ.items() if item[0].startswith(_SETTINGS)))


@lru_cache(64)
def _connected(url: str, settings: tuple[tuple[str, str], ...]) -> ObjectStore:
    """The handle for a URL, shared by all folders of this process: finding the credentials of S3
    costs 90 ms, and each unit opens the folders of its tars. Other settings, another handle."""
    del settings
    return _connect(url)


def _connect(url: str) -> ObjectStore:
    scheme = urlsplit(url).scheme
    if scheme in ("http", "https"):
        return _connect_web(url)
    if scheme in ("s3", "s3a"):
        return _connect_s3(url)
    return from_url(url, client_options=_client(), retry_config=_NO_RETRIES)


def _connect_web(url: str) -> HTTPStore:
    """User and password go into a header: obstore would not send them, but print them in errors."""
    parts = urlsplit(url)
    user_info, at, place = parts.netloc.rpartition("@")
    client: ClientConfig = {**_client(), "allow_http": True}
    if at:
        token = base64.b64encode(unquote_to_bytes(user_info)).decode()
        client["default_headers"] = {"Authorization": f"Basic {token}"}
    place = urlunsplit(parts._replace(netloc=place))
    return HTTPStore.from_url(place, client_options=client, retry_config=_NO_RETRIES)


def _connect_s3(url: str) -> S3Store:
    """Endpoint, region and credentials as the AWS tools find them."""
    import botocore.session

    session = botocore.session.get_session()
    config: S3Config = {"region": session.get_config_variable("region") or "us-east-1"}
    client = _client()
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        config["endpoint"] = endpoint
        config["virtual_hosted_style_request"] = False
        client["allow_http"] = endpoint.startswith("http:")
    credentials = session.get_credentials()
    if credentials is None:
        config["skip_signature"] = True
        return S3Store.from_url(url, config=config, client_options=client, retry_config=_NO_RETRIES)

    def provide() -> S3Credential:
        frozen = credentials.get_frozen_credentials()
        expiry = getattr(credentials, "_expiry_time", None)
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": expiry.astimezone(UTC) if isinstance(expiry, datetime) else None,
        }

    return S3Store.from_url(
        url,
        config=config,
        client_options=client,
        retry_config=_NO_RETRIES,
        credential_provider=provide,
    )
