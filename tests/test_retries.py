"""Requests that are made again: how often, after what, and what is told when none of them worked.

A fault-injecting proxy stands in front of a real S3 server.
"""

from __future__ import annotations

import os
import pickle
import resource
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import botocore.session
import pytest
from hypothesis import given
from hypothesis import strategies as st
from obstore.exceptions import GenericError

from drl_data.errors import (
    InputError,
    ObjectError,
    ObjectNotFoundError,
    StorageUnusableError,
    TransientError,
    UserError,
)
from drl_data.faulty_s3 import PASSING, Fault, FaultyS3, Kind, RandomFaults
from drl_data.folders import Buffer, Folder, ObjectInfo
from drl_data.objects import (
    FsspecFolder,
    LocalFolder,
    ObstoreFolder,
    RetryCount,
    RetryingFolder,
    RetryPolicy,
    counted,
    open_folder,
)
from drl_data.storage_errors import obstore_error

DATA = bytes(range(256)) * 8
POLICY = RetryPolicy(attempts=4)


@pytest.fixture(
    params=[
        pytest.param("moto", marks=pytest.mark.s3),
        pytest.param("ceph", marks=pytest.mark.ceph),
    ]
)
def server(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Endpoint of a real S3 server, and a new bucket of it."""
    endpoint = request.getfixturevalue(f"{request.param}_endpoint")
    return endpoint, request.getfixturevalue("s3_url" if request.param == "moto" else "ceph_url")


@pytest.fixture
def bucket(server: tuple[str, str]) -> str:
    return server[1]


@pytest.fixture
def proxy(server: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """A proxy in front of the server; the environment names the proxy."""
    with FaultyS3(server[0]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


def patient(url: str, policy: RetryPolicy = POLICY) -> RetryingFolder:
    """A folder that does not really wait between attempts."""
    return RetryingFolder(ObstoreFolder(url), policy, sleep=lambda _: None)


OPERATIONS: dict[str, Callable[[RetryingFolder], object]] = {
    "get": lambda f: bytes(f.get("a/x")) == DATA,
    "get_range": lambda f: bytes(f.get_range("a/x", 5, 500)) == DATA[5:500],
    "put": lambda f: f.put("a/new", [DATA, DATA]) is None and bytes(f.get("a/new")) == DATA * 2,
    "put_if_absent": lambda f: f.put_if_absent("a/new", [DATA]) and bytes(f.get("a/new")) == DATA,
    "head": lambda f: f.head("a/x").size == len(DATA),
    "list": lambda f: [i.path for i in f.list()] == ["a/x", "y"],
    "delete": lambda f: f.delete("y") is None and [i.path for i in f.list()] == ["a/x"],
}
REQUESTS = {"get_range": "get", "put_if_absent": "put"}
BODIES: dict[Kind, tuple[str, ...]] = {
    "cut answer": ("get", "get_range", "list"),
    "short answer": ("get", "get_range", "list"),
    "cut upload": ("put", "put_if_absent"),
    "lost answer": ("put", "put_if_absent", "delete"),
    "409": ("put_if_absent",),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_passes_is_tried_again_and_counted(
    proxy: FaultyS3, bucket: str, operation: str
) -> None:
    for kind in (*PASSING, "409"):
        if operation not in BODIES.get(kind, OPERATIONS):
            continue
        folder = patient(f"{bucket}/{kind}")
        folder.put("a/x", [DATA])
        folder.put("y", [b"y"])
        proxy.faults = [Fault(kind, on=REQUESTS.get(operation, operation), times=2)]
        assert OPERATIONS[operation](folder), kind
        assert folder.count.value == 2 == proxy.struck()[kind], kind


def test_what_takes_time_is_tried_again(
    proxy: FaultyS3, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRL_STORAGE_TIMEOUT_S", "1")
    folder = open_folder(f"{bucket}/f")
    assert isinstance(folder, RetryingFolder)
    folder.put("a/x", [DATA])
    for kind in ("hang", "refused"):
        proxy.faults = [Fault(kind, key=".*/a/x")]
        before = folder.count.value
        assert folder.get("a/x") == DATA
        assert folder.count.value > before
        assert proxy.struck()[kind] == 1


@pytest.mark.parametrize("operation", OPERATIONS)
def test_attempts_are_bounded_and_nothing_below_tries_too(
    proxy: FaultyS3, bucket: str, operation: str
) -> None:
    folder = patient(f"{bucket}/f")
    proxy.faults = [Fault("503", times=None)]
    with pytest.raises(TransientError, match=r"503 Service Unavailable.*tried 4 times") as error:
        OPERATIONS[operation](folder)
    assert "Run the same command again" in str(error.value)
    assert len(proxy.requests) == 4
    assert folder.count.value == 3


PERMANENT: list[tuple[Kind, str]] = [
    ("403", "give these credentials the rights"),
    ("expired", "expired ones must be renewed"),
    ("bucket", "make the bucket, or mend its name"),
    ("full", "make room"),
]


@pytest.mark.parametrize(("kind", "remedy"), PERMANENT)
def test_what_no_retry_helps_ends_at_once(
    proxy: FaultyS3, bucket: str, kind: Kind, remedy: str
) -> None:
    folder = patient(f"{bucket}/f")
    proxy.faults = [Fault(kind, times=None)]
    for operation, call in OPERATIONS.items():
        proxy.requests.clear()
        with pytest.raises(StorageUnusableError, match=remedy) as error:
            call(folder)
        assert str(error.value).startswith(f"{bucket}/f/")
        assert "run the same command again" in str(error.value)
        # Whoever asks by HEAD asks once more by GET, because a HEAD does not say why.
        assert len(proxy.requests) == (2 if operation == "head" and kind != "full" else 1)
    assert folder.count.value == 0


def test_a_missing_object_is_missing_at_once(proxy: FaultyS3, bucket: str) -> None:
    folder = patient(f"{bucket}/f")
    folder.put("x", [DATA])
    proxy.requests.clear()
    for missing in (
        lambda: folder.get("y"),
        lambda: folder.get_range("y", 0, 1),
        lambda: folder.head("y"),
    ):
        with pytest.raises(ObjectNotFoundError):
            missing()
    assert folder.count.value == 0
    assert len(proxy.requests) == 4


def test_a_missing_bucket_is_no_missing_object(proxy: FaultyS3, bucket: str) -> None:
    folder = patient(f"{bucket}-none/f")
    for operation, call in OPERATIONS.items():
        with pytest.raises(StorageUnusableError, match="NoSuchBucket"):
            call(folder)
        assert folder.count.value == 0, operation


@pytest.mark.ceph
def test_a_wrong_key_is_denied_and_not_shown(
    ceph_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("ACCESS_KEY_ID", "SECRETID"), ("SECRET_ACCESS_KEY", "SECRETKEY")):
        with monkeypatch.context() as change:
            change.setenv(f"AWS_{name}", value)
            for operation, call in OPERATIONS.items():
                with pytest.raises(StorageUnusableError, match="403 Forbidden") as error:
                    call(patient(f"{ceph_url}/f"))
                shown = str(error.value)
                assert not any(x in shown for x in ("SECRET", "cephkey")), operation


# --- bytes that do not come ---------------------------------------------------------------------


def test_a_body_that_stays_short_is_never_taken_for_the_object(
    proxy: FaultyS3, bucket: str
) -> None:
    folder = patient(f"{bucket}/f")
    folder.put("x", [DATA])
    folder.put("empty", [b""])
    proxy.faults = [Fault("short answer", on="get", times=None)]
    for read in (lambda: folder.get("x"), lambda: folder.get_range("x", 10, 90)):
        with pytest.raises(TransientError, match="bytes came of"):
            read()
    assert folder.get("empty") == b""


def test_a_range_past_the_end_is_no_fault_that_passes(proxy: FaultyS3, bucket: str) -> None:
    folder = patient(f"{bucket}/f")
    folder.put("x", [b"12345"])
    for start, stop in ((0, 6), (7, 9)):
        with pytest.raises(ObjectError, match="shorter than it was") as error:
            folder.get_range("x", start, stop)
        assert not isinstance(error.value, TransientError)
    assert folder.count.value == 0


@pytest.mark.parametrize("kind", ["500", "cut answer", "short answer"])
def test_plain_http_and_fsspec_notice_it_too(proxy: FaultyS3, bucket: str, kind: Kind) -> None:
    """Of an object that anyone may read; fsspec reads the same address by aiohttp."""
    name = bucket.removeprefix("s3://")
    client = botocore.session.get_session().create_client("s3")
    client.put_object(Bucket=name, Key="f/x", Body=DATA, ACL="public-read")
    client.close()
    address = f"{proxy.endpoint}/{name}/f"
    for inner in (ObstoreFolder(address), FsspecFolder(address)):
        proxy.faults = [Fault(kind, on="get", times=2)]
        folder = RetryingFolder(inner, POLICY, sleep=lambda _: None)
        assert folder.get("x") == DATA
        assert folder.get_range("x", 5, 50) == DATA[5:50]
        assert folder.count.value == 2
        proxy.faults = [Fault(kind, on="get", times=None)]
        for read in (lambda: folder.get("x"), lambda: folder.get_range("x", 5, 50)):  # noqa: B023
            with pytest.raises(TransientError, match="tried 4 times"):
                read()


def test_fsspec_errors() -> None:
    folder = open_folder(f"memory://{uuid.uuid4().hex}")
    with pytest.raises(ObjectNotFoundError):
        folder.get("x")
    with pytest.raises(InputError, match=r"nowhere://x: .*want a path"):
        open_folder("nowhere://x").get("y")


# --- writing once -------------------------------------------------------------------------------


class Rival:
    """Puts an object by itself just before the first attempt, whose answer is then lost."""

    def __init__(self, inner: Folder, theirs: bytes) -> None:
        self.inner, self.theirs, self.url = inner, theirs, inner.url
        self.n_attempts = 0

    def put_if_absent(self, path: str, parts: list[Buffer]) -> bool:
        self.n_attempts += 1
        if self.n_attempts == 1:
            self.inner.put_if_absent(path, [self.theirs])
            raise TransientError("the answer is lost")
        return self.inner.put_if_absent(path, parts)

    def get(self, path: str) -> memoryview:
        return self.inner.get(path)


@pytest.mark.parametrize(
    ("theirs", "won"),
    [(b"abcdef", True), (b"abcdeX", False), (b"abcde", False), (b"abcdefg", False), (b"", False)],
)
def test_after_a_lost_answer_the_bytes_decide_who_won(
    tmp_path: Path, theirs: bytes, won: bool
) -> None:
    rival = Rival(LocalFolder(tmp_path), theirs)
    folder = RetryingFolder(rival, sleep=lambda _: None)  # type: ignore[arg-type]
    assert folder.put_if_absent("x", [b"abc", b"", b"def"]) is won
    assert rival.n_attempts == 2


def test_without_a_failure_equal_bytes_are_of_another_writer(proxy: FaultyS3, bucket: str) -> None:
    folder = patient(bucket)
    assert folder.put_if_absent("x", [DATA])
    assert not folder.put_if_absent("x", [DATA])
    assert [r.operation for r in proxy.requests] == ["put", "put"]


def test_one_winner_whatever_is_lost(proxy: FaultyS3, bucket: str) -> None:
    """Eight writers race for each object while half of all requests fail."""
    folder = patient(bucket, RetryPolicy(attempts=40))
    proxy.random = RandomFaults(0.5, seed=3, kinds=(*PASSING, "409"))

    def put(trial: int, member: int) -> bool:
        return folder.put_if_absent(f"x/{trial}", [b"%d of " % trial, b"%d" % member])

    with ThreadPoolExecutor(8) as pool:
        for trial in range(6):
            won = list(pool.map(put, [trial] * 8, range(8)))
            assert won.count(True) == 1
            assert bytes(folder.get(f"x/{trial}")) == b"%d of %d" % (trial, won.index(True))
    assert proxy.struck()["lost answer"]


# --- listings -----------------------------------------------------------------------------------


def test_a_listing_goes_on_where_it_broke_off(proxy: FaultyS3, bucket: str) -> None:
    folder = patient(f"{bucket}/a folder")
    names = [f"ä/{i:04d} +%" for i in range(1001)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: folder.put(name, [b"x"]), names))
    proxy.requests.clear()
    proxy.faults = [
        Fault("503", on="list"),
        Fault("cut answer", on="list", nth=3),
        Fault("short answer", on="list", nth=4),
    ]
    assert [info.path for info in folder.list()] == names
    assert folder.count.value == 3
    assert len(proxy.requests) <= 6  # Ceph asks for one page more
    assert [info.path for info in folder.list("ä")] == names


# --- how long -----------------------------------------------------------------------------------


class Broken:
    """A folder that always fails, at the cost of some seconds."""

    url = "s3://broken"

    def __init__(self, now: list[float], cost_s: float) -> None:
        self.now, self.cost_s = now, cost_s

    def head(self, path: str) -> ObjectInfo:
        self.now[0] += self.cost_s
        raise TransientError(f"{self.url}/{path}: busy")


@given(
    st.integers(1, 12),
    st.floats(0.001, 2),
    st.floats(0.001, 30),
    st.floats(0, 100),
    st.floats(0, 50),
    st.floats(0, 1),
)
def test_pauses_grow_to_a_cap_and_the_whole_is_bounded(
    attempts: int, base_s: float, cap_s: float, deadline_s: float, cost_s: float, chance: float
) -> None:
    policy = RetryPolicy(attempts, base_s, cap_s, deadline_s)
    now, pauses = [0.0], []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        now[0] += seconds

    folder = RetryingFolder(
        Broken(now, cost_s),  # type: ignore[arg-type]
        policy,
        sleep=sleep,
        chance=lambda: chance,
        clock=lambda: now[0],
    )
    with pytest.raises(TransientError) as error:
        folder.head("x")
    assert f"tried {len(pauses) + 1} times" in str(error.value)
    assert len(pauses) < attempts
    assert now[0] <= deadline_s + cost_s + 1e-6
    assert all(0 <= p <= cap_s for p in pauses)
    assert all(b == pytest.approx(min(2 * a, chance * cap_s)) for a, b in pairwise(pauses))
    assert folder.count.value == len(pauses)


def test_the_environment_says_how_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRL_STORAGE_ATTEMPTS", "3")
    folder = open_folder("s3://bucket")
    assert isinstance(folder, RetryingFolder)
    assert folder.policy.attempts == 3
    for name, value in (("ATTEMPTS", "0"), ("ATTEMPTS", "many"), ("TIMEOUT_S", "-1")):
        with monkeypatch.context() as change:
            change.setenv(f"DRL_STORAGE_{name}", value)
            with pytest.raises(UserError, match=f"DRL_STORAGE_{name} is '{value}'; want"):
                open_folder("http://127.0.0.1:1/x").get("y")


def test_a_view_counts_for_itself_and_shares_the_connection(tmp_path: Path) -> None:
    folder = open_folder("s3://bucket")
    count = RetryCount()
    view = counted(folder, count)
    assert isinstance(folder, RetryingFolder)
    assert isinstance(view, RetryingFolder)
    assert view.inner is folder.inner
    assert view.count is count is not folder.count
    local = LocalFolder(tmp_path)
    assert counted(local, count) is local
    assert pickle.loads(pickle.dumps(view)).count.value == 0


@pytest.mark.s3
def test_folders_of_one_url_share_a_connection_while_settings_last(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ObstoreFolder(s3_url).store
    assert ObstoreFolder(s3_url).store is first
    assert ObstoreFolder(f"{s3_url}/x").store is not first
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    assert ObstoreFolder(s3_url).store is not first


# --- what is said -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["403", "503", "reset", "short answer"])
def test_errors_hold_no_secret_of_the_url(proxy: FaultyS3, bucket: str, kind: Kind) -> None:
    open_folder(f"{bucket}/f").put("x", [DATA])
    proxy.faults = [Fault(kind, on="get", times=None)]
    address = f"{proxy.endpoint}/{bucket.removeprefix('s3://')}/f".replace("//", "//me:PASS@", 1)
    folder = patient(f"{address}?X-Amz-Signature=SECRET&X-Amz-Credential=KEYID")
    for read in (
        lambda: folder.get("x"),
        lambda: folder.get_range("x", 5, 50),
        lambda: folder.get("x?token=SECRET"),
    ):
        with pytest.raises(ObjectError) as error:
            read()
        assert not any(secret in str(error.value) for secret in ("SECRET", "KEYID", "PASS"))
        assert str(error.value).startswith("http://***@")


def test_no_more_of_an_answer_is_shown_than_its_code_and_message() -> None:
    text = (
        "Generic S3 error: Error performing GET http://h/b/k?X-Amz-Signature=SECRET in 1ms - "
        "Server returned non-2xx status code: 403 Forbidden: <Error><Code>SignatureDoesNotMatch"
        "</Code><Message>it does not match</Message><AWSAccessKeyId>SECRET</AWSAccessKeyId>"
        "<StringToSign>SECRET</StringToSign></Error>\n\nDebug source:\nSECRET"
    )
    error = obstore_error("s3://b/k", GenericError(text))
    assert isinstance(error, StorageUnusableError)
    assert "403 Forbidden, SignatureDoesNotMatch, it does not match: give these" in str(error)
    assert "SECRET" not in str(error)


# --- the local disk -----------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root and the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_the_run_and_leaves_no_part(small_disk: Path) -> None:
    folder = LocalFolder(small_disk)
    folder.put("x", [DATA])
    large = bytes(2 << 20)
    for write in (lambda: folder.put("x", [large]), lambda: folder.put_if_absent("y", [large])):
        with pytest.raises(StorageUnusableError, match="the disk is full; make room, then run"):
            write()
    assert os.listdir(small_disk) == ["x"]
    assert folder.get("x") == DATA


def test_a_read_only_disk_is_said_to_be_one(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StorageUnusableError, match="read-only; mount it for writing"):
        LocalFolder(small_disk).put("x", [DATA])


def test_a_limit_on_the_size_of_files_is_said_to_be_one(tmp_path: Path) -> None:
    folder, before = LocalFolder(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(DATA) - 1, before[1]))
    try:
        with pytest.raises(StorageUnusableError, match="raise the limit"):
            folder.put_if_absent("x", [DATA])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []
    assert folder.put_if_absent("x", [DATA])


def test_a_folder_that_may_not_be_read_is_not_empty() -> None:
    before = os.geteuid()
    with tempfile.TemporaryDirectory(dir="/tmp") as root:
        os.chmod(root, 0o755)
        LocalFolder(Path(root)).put("receipts/0.json", [b"{}"])
        os.chmod(f"{root}/receipts", 0)
        if before == 0:  # nothing is denied to root
            os.seteuid(65534)
        try:
            with pytest.raises(StorageUnusableError, match="access is denied"):
                list(LocalFolder(Path(root)).list("receipts"))
        finally:
            os.seteuid(before)
            os.chmod(f"{root}/receipts", 0o755)
