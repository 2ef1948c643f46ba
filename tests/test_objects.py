"""Bytes at a URL: the same facts for every kind of folder."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pytest

from drl_data.errors import ForkError, ObjectError, ObjectNotFoundError
from drl_data.objects import (
    FsspecFolder,
    LocalFolder,
    ObstoreFolder,
    RetryingFolder,
    open_folder,
    open_parent,
)

if TYPE_CHECKING:
    from multiprocessing.connection import Connection


def test_kinds_of_folders(tmp_path: Path) -> None:
    assert isinstance(open_folder(str(tmp_path)), LocalFolder)
    assert isinstance(open_folder(f"file://{tmp_path}"), LocalFolder)
    assert open_folder(f"file://{tmp_path}").url == str(tmp_path)
    for url, kind in (("s3://bucket/folder", ObstoreFolder), ("memory://folder", FsspecFolder)):
        remote = open_folder(url)
        assert isinstance(remote, RetryingFolder)
        assert isinstance(remote.inner, kind)


@pytest.mark.parametrize(
    ("url", "folder", "name"),
    [
        ("a/b/c.tar", "a/b", "c.tar"),
        ("c.tar", ".", "c.tar"),
        ("/c.tar", "/", "c.tar"),
        ("s3://bucket/a/c.tar", "s3://bucket/a", "c.tar"),
        ("s3://bucket/c.tar", "s3://bucket", "c.tar"),
    ],
)
def test_parents(url: str, folder: str, name: str) -> None:
    parent, got = open_parent(url)
    assert (parent.url, got) == (folder, name)


def test_a_folder_is_no_object() -> None:
    with pytest.raises(ObjectError, match="'s3://bucket/' names no object"):
        open_parent("s3://bucket/")


def test_put_get_head_list_delete(folder_url: str) -> None:
    folder = open_folder(folder_url)
    assert list(folder.list()) == []
    values = np.arange(10, dtype="<u2")
    folder.put("a/b/c", [b"head", values.data, bytearray(b"tail")])
    folder.put("a/d", [b""])
    folder.put("top", [pa.py_buffer(b"arrow")])
    want = b"head" + values.tobytes() + b"tail"
    assert folder.get("a/b/c") == want
    assert folder.get("a/d") == b""
    assert folder.get("top") == b"arrow"
    assert folder.get_range("a/b/c", 3, 7) == want[3:7]
    assert folder.get_range("a/b/c", 5, 5) == b""
    assert folder.head("a/b/c").size == len(want)
    assert {info.path: info.size for info in folder.list()} == {
        "a/b/c": len(want),
        "a/d": 0,
        "top": 5,
    }
    assert [info.path for info in folder.list("a/b")] == ["a/b/c"]
    assert list(folder.list("nowhere")) == []
    folder.delete("a/b/c")
    folder.delete("a/b/c")
    assert sorted(info.path for info in folder.list()) == ["a/d", "top"]


def test_overwriting_changes_the_tag(folder_url: str) -> None:
    folder = open_folder(folder_url)
    folder.put("x", [b"one"])
    before = folder.head("x")
    assert next(iter(folder.list())).etag == before.etag
    folder.put("x", [b"other"])
    assert folder.get("x") == b"other"
    assert folder.head("x").etag != before.etag


def test_what_is_not_there(folder_url: str) -> None:
    folder = open_folder(folder_url)
    folder.put("there", [b"x"])
    for call in (
        lambda: folder.get("not/there"),
        lambda: folder.get_range("not/there", 0, 1),
        lambda: folder.head("not/there"),
    ):
        with pytest.raises(ObjectNotFoundError, match="not/there: no such"):
            call()


@pytest.mark.parametrize(("start", "stop"), [(0, 6), (4, 6), (5, 6), (7, 9)])
def test_short_reads_are_errors(folder_url: str, start: int, stop: int) -> None:
    folder = open_folder(folder_url)
    folder.put("x", [b"12345"])
    with pytest.raises(ObjectError, match="x: "):
        folder.get_range("x", start, stop)
    assert folder.get_range("x", 1, 5) == b"2345"


def test_put_if_absent(folder_url: str) -> None:
    folder = open_folder(folder_url)
    assert folder.put_if_absent("a/x", [b"fi", b"rst"])
    assert not folder.put_if_absent("a/x", [b"second"])
    assert folder.get("a/x") == b"first"


@pytest.fixture
def eager_switches() -> Iterator[None]:
    """Threads change over as often as they can, so that races happen."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("eager_switches")
def test_sixteen_threads_and_one_winner(folder_url: str, request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("s3"):
        pytest.skip("moto looks for the object and puts it in two steps; Ceph's gateway in one")
    folder = open_folder(folder_url)
    for trial in range(3 if "s3:" in folder_url else 40):
        barrier = Barrier(16)

        def put(member: int, trial: int = trial, barrier: Barrier = barrier) -> bool:
            barrier.wait()
            return folder.put_if_absent(f"x/{trial}", [str(member).encode()])

        with ThreadPoolExecutor(16) as pool:
            won = list(pool.map(put, range(16)))
        assert won.count(True) == 1
        assert bytes(folder.get(f"x/{trial}")) == str(won.index(True)).encode()


def test_local_writes_leave_nothing_behind(tmp_path: Path) -> None:
    folder = LocalFolder(tmp_path)
    folder.put_if_absent("x", [b"first"])
    folder.put_if_absent("x", [b"second"])
    folder.put("x", [b"third"])
    assert os.listdir(tmp_path) == ["x"]
    assert folder.local_path("x") == tmp_path / "x"
    (tmp_path / ".tmp-left").write_bytes(b"by a killed writer")
    assert [info.path for info in folder.list()] == ["x"]


def test_local_errors_say_what_the_system_says(tmp_path: Path) -> None:
    folder = LocalFolder(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ObjectError, match="file/x: Not a directory"):
        folder.get("file/x")
    with pytest.raises(ObjectError):
        folder.put("file/x", [b"x"])


@pytest.mark.s3
def test_remote_errors_are_one_line(s3_url: str) -> None:
    folder = open_folder(f"{s3_url}-missing")
    with pytest.raises(ObjectError) as error:
        folder.put("x", [b"x"])
    assert "\n" not in str(error.value)
    assert f"{s3_url}-missing/x: " in str(error.value)


@pytest.mark.s3
def test_a_handle_pickles_by_url(s3_url: str) -> None:
    folder = open_folder(f"{s3_url}/folder")
    folder.put("x", [b"x"])
    assert pickle.loads(pickle.dumps(folder)).get("x") == b"x"


def _get_in_child(folder: ObstoreFolder | FsspecFolder, pipe: Connection) -> None:
    try:
        pipe.send(bytes(folder.get("x")))
    except ForkError as error:
        pipe.send(str(error))


@pytest.mark.s3
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("opened", ["before", "anew"])
def test_a_forked_child_gets_an_error_and_does_not_hang(s3_url: str, opened: str) -> None:
    folder = open_folder(s3_url)
    folder.put("x", [b"x"])
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    handle = folder if opened == "before" else open_folder(s3_url)
    child = context.Process(target=_get_in_child, args=(handle, theirs))
    child.start()
    assert mine.poll(20)
    message = mine.recv()
    child.join(20)
    assert child.exitcode == 0
    assert "did not survive the fork" in message
    assert "forkserver" in message
    mine.close()
    theirs.close()
