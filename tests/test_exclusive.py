"""Creation under a name that may be taken, on file systems with hard links and without."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from drl_data import exclusive
from drl_data.errors import ObjectError
from drl_data.objects import LocalFolder


@pytest.fixture(params=["link", "renameat2", "rename"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The disk as it is; without hard links; and without the flag of renameat2 either."""
    if request.param != "link":
        monkeypatch.setattr(os, "link", refusing)
    if request.param == "rename":
        monkeypatch.setattr(exclusive, "_renameat2", lambda: None)
    return str(request.param)


def refusing(source: str, target: Path, *, code: int = errno.EPERM) -> None:
    raise OSError(code, os.strerror(code), str(target))


def test_the_first_stays(file_system: str, tmp_path: Path) -> None:
    folder = LocalFolder(tmp_path)
    assert folder.put_if_absent("a/b", [b"first", b" one"])
    assert not folder.put_if_absent("a/b", [b"second"])
    assert folder.get("a/b") == b"first one"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]  # nothing stays behind


@pytest.mark.parametrize("file_system", ["link", "renameat2"], indirect=True)
def test_one_of_sixteen_wins(file_system: str, tmp_path: Path) -> None:
    """Not where the name is looked at first: there, of two in one instant the later one wins."""
    folder, barrier = LocalFolder(tmp_path), Barrier(16)

    def create(member: int) -> bool:
        barrier.wait()
        return folder.put_if_absent("name", [f"{member:04d}".encode() * 1000])

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(create, range(16)))
    assert sum(won) == 1
    assert folder.get("name") == f"{won.index(True):04d}".encode() * 1000


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK])
def test_every_way_of_having_no_links(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", lambda a, b: refusing(a, b, code=code))
    folder = LocalFolder(tmp_path)
    assert folder.put_if_absent("name", [b"x"])
    assert not folder.put_if_absent("name", [b"y"])


def test_a_full_disk_is_no_missing_feature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", lambda a, b: refusing(a, b, code=errno.ENOSPC))
    with pytest.raises(ObjectError, match="No space left"):
        LocalFolder(tmp_path).put_if_absent("name", [b"x"])
