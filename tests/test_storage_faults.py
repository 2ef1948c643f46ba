"""Runs on storage that fails: the store equals that of an undisturbed run, and nothing is hidden.

Real extraction over a proxy that injects faults, in front of a real S3 server.
"""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from drl_data.cli import main
from drl_data.datasets import FeatureStream
from drl_data.errors import ObjectError, StorageUnusableError, StoreError
from drl_data.faulty_s3 import PASSING, Fault, FaultyS3, Kind, RandomFaults
from drl_data.objects import RetryPolicy, open_folder
from drl_data.pipeline import Pipeline
from drl_data.receipts import receipt_path
from drl_data.runs import RunSummary, extract
from drl_data.store import FeatureStore
from drl_data.testing import write_photo_tars
from drl_data.tiny_models import save_tiny_ddpm
from tests.conftest import new_bucket
from tests.test_extract import arrays_of, assert_same_store

N_SAMPLES = 22
N_UNITS = 3


@dataclass(frozen=True)
class World:
    """Tars, a model, and the store that an undisturbed run makes of them."""

    tars: Path
    model: Path
    store: FeatureStore

    def settings(self, tars: str, store: str) -> dict[str, object]:
        """What a pipeline file says."""
        return {
            "name": "faults",
            "dataset": {"tars": tars},
            "images": {"size": 16},
            "backbone": {"model": str(self.model)},
            "schedule": {"timesteps": [0, 300]},
            "taps": ["mid_block", {"path": "up_blocks.*", "reduce": "avg_pool(4)"}],
            "features": {"dtype": "float32", "batch_size": 4, "rows_per_unit": 8},
            "store": {"url": store},
        }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    tars = write_photo_tars(folder / "tars", n_samples=N_SAMPLES)
    made = World(tars, save_tiny_ddpm(folder / "model"), None)  # type: ignore[arg-type]
    pipeline = Pipeline.parse(made.settings(f"{tars}/*.tar", str(folder / "store")))
    return World(tars, made.model, extract(pipeline).store)


class Remote:
    """A folder of a bucket behind the proxy; the tars are beside it."""

    def __init__(self, world: World, bucket: str, proxy: FaultyS3) -> None:
        self.world, self.bucket, self.proxy = world, bucket, proxy
        self.url = f"{bucket}/{uuid.uuid4().hex[:8]}/store"

    @property
    def settings(self) -> dict[str, object]:
        return self.world.settings(f"{self.bucket}/tars/*.tar", self.url)

    def extract(self) -> RunSummary:
        return extract(Pipeline.parse(self.settings))

    def assert_right(self) -> FeatureStore:
        """By honest reading: whole, and equal to the undisturbed store."""
        self.proxy.faults, self.proxy.random = [], None
        store = FeatureStore.open(self.url)
        assert store.verify(deep=True) == []
        assert_same_store(store, self.world.store)
        return store


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("moto", marks=pytest.mark.s3),
        pytest.param("ceph", marks=pytest.mark.ceph),
    ],
)
def server(request: pytest.FixtureRequest, world: World) -> Iterator[tuple[str, str]]:
    """Endpoint of a real S3 server, and a bucket of it with the tars."""
    endpoint = request.getfixturevalue(f"{request.param}_endpoint")
    secrets = {"moto": ("test", "test"), "ceph": ("cephkey123", "cephsecret123")}
    for bucket in new_bucket(endpoint, *secrets[request.param]):
        for path in world.tars.glob("*.tar"):
            open_folder(f"{bucket}/tars").put(path.name, [path.read_bytes()])
        yield endpoint, bucket


@pytest.fixture
def remote(
    world: World, server: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Remote]:
    quick = replace(RetryPolicy.from_environment(), base_s=0.02)
    monkeypatch.setattr(
        RetryPolicy,
        "from_environment",
        lambda: replace(quick, attempts=int(os.environ.get("DRL_STORAGE_ATTEMPTS", "8"))),
    )
    with FaultyS3(server[0]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield Remote(world, server[1], proxy)


TARS = ".*/tars/photos.*"
SHARDS, RECEIPTS = ".*/(mid_block|up_blocks[.].|valid)/c/.*", ".*/receipts/.*"


def in_units(kind: Kind) -> list[Fault]:
    """Faults of requests that are made for a unit, and that its receipt counts. (The first two
    requests for the tars are of the index.)"""
    return [
        Fault(kind, on="get", key=TARS, nth=3, times=2),
        Fault(kind, on="head", key=TARS, nth=3),
        Fault(kind, on="put", key=SHARDS, nth=3, times=3),
    ]


def around_units(kind: Kind) -> list[Fault]:
    """Faults of what comes before and after, and of the signatures themselves."""
    return [
        Fault(kind, on="get", key=TARS),
        Fault(kind, on="list", key=".*/tars/"),
        Fault(kind, on="put", key=".*/zarr.json", times=2),
        Fault(kind, on="(put|get)", key=".*/index.parquet", times=2),
        Fault(kind, on="list", key=RECEIPTS, times=2),
        Fault(kind, on="get", key=RECEIPTS, nth=3),
        Fault(kind, on="put", key=RECEIPTS, times=3),
        Fault(kind, on="(put|head)", key=".*/(sealed.json|samples.parquet)", nth=2, times=2),
    ]


@pytest.mark.parametrize(
    "kind",
    ["500", "503", "reset", "cut answer", "short answer", "cut upload", "lost answer", "409"],
)
def test_a_fault_that_passes_changes_nothing(remote: Remote, kind: Kind) -> None:
    remote.proxy.faults = [*in_units(kind), *around_units(kind)]
    assert remote.extract().failed == []
    struck = [r for r in remote.proxy.requests if r.struck == kind]
    assert len(struck) >= 3
    store = remote.assert_right()
    n_retries = sum(receipt.run.retries for receipt in store.receipts().values())
    assert n_retries >= sum("/c/" in request.key for request in struck)


@pytest.mark.parametrize("kind", ["503", "lost answer", "short answer"])
def test_receipts_count_the_retries_of_their_units(remote: Remote, kind: Kind) -> None:
    """Exactly: no other request fails, and none is counted twice."""
    remote.proxy.faults = in_units(kind)
    store = remote.extract().store
    n_retries = [receipt.run.retries for receipt in store.receipts().values()]
    assert sum(n_retries) == remote.proxy.struck()[kind] > 0
    remote.assert_right()


def test_a_server_that_restarts_is_waited_for(remote: Remote) -> None:
    remote.proxy.faults = in_units("refused")
    assert remote.extract().failed == []
    assert remote.proxy.struck()["refused"] >= 3
    remote.assert_right()


def test_requests_that_hang_are_given_up(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRL_STORAGE_TIMEOUT_S", "2")
    remote.proxy.faults = [
        Fault("hang", on="get", key=TARS, nth=3),
        Fault("hang", on="put", key=SHARDS, nth=3),
        Fault("hang", on="put", key=RECEIPTS),
    ]
    assert remote.extract().failed == []
    assert remote.proxy.struck()["hang"] == 3
    remote.assert_right()


@pytest.mark.parametrize("seed", [1, 2])
def test_a_fifth_of_all_requests_fails(remote: Remote, seed: int) -> None:
    """From the index to the seal, then verification and both ways of reading."""
    remote.proxy.random = RandomFaults(0.2, seed, (*PASSING, "409"))
    assert remote.extract().failed == []
    store = FeatureStore.open(remote.url)
    assert store.verify(deep=True) == []
    want = arrays_of(remote.world.store)
    rows = np.random.default_rng(seed).integers(0, N_SAMPLES, 40)
    for name, values in want.items():
        np.testing.assert_array_equal(store.read_rows(name, 1, rows), values[1][rows])
    seen: list[int] = []
    for batch in FeatureStream(store, taps=["mid_block"], batch_size=5, shuffle=True):
        for i, row in enumerate(batch.row.tolist()):
            np.testing.assert_array_equal(
                batch.features["mid_block"][i].numpy(), want["mid_block"][:, row]
            )
        seen += batch.row.tolist()
    assert sorted(seen) == list(range(N_SAMPLES))
    assert sum(remote.proxy.struck().values()) >= 10
    remote.assert_right()


# --- faults that do not pass --------------------------------------------------------------------


def signed_units(store: FeatureStore) -> set[int]:
    """Units with a receipt; every object that a receipt lists is there, and as it says."""
    problems = [p for p in store.verify(deep=True) if "no receipt" not in p.what]
    assert problems == []
    return set(store.receipts())


@pytest.mark.parametrize(
    ("kind", "on", "key", "nth"),
    [
        ("403", "put", SHARDS, 12),
        ("full", "put", SHARDS, 3),
        ("bucket", "get", TARS, 4),
        ("expired", "put", RECEIPTS, 2),
    ],
)
def test_storage_that_cannot_be_used_ends_the_run(
    remote: Remote, kind: Kind, on: str, key: str, nth: int
) -> None:
    remote.proxy.faults = [Fault(kind, on, key, nth, times=None)]
    with pytest.raises(StorageUnusableError, match="then run the same command again"):
        remote.extract()
    n_struck = remote.proxy.struck()[kind]
    assert n_struck <= 24, "requests that are under way may fail; none is made again"
    remote.proxy.faults = []
    store = FeatureStore.open(remote.url)
    signed = signed_units(store)
    assert len(signed) < N_UNITS
    assert not store.sealed
    assert remote.extract().n_pending == N_UNITS - len(signed)
    remote.assert_right()


def test_the_command_says_it_once(
    remote: Remote,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit status 1: nothing is wrong with the pipeline, and the same command completes the run."""
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump(remote.settings))
    monkeypatch.setattr(sys, "argv", ["drl", "extract", str(file)])
    remote.proxy.faults = [Fault("403", on="put", key=SHARDS, nth=10, times=None)]
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.count("AccessDenied") == 1
    assert "give these credentials the rights" in " ".join(said.split())
    assert "Traceback" not in said
    remote.proxy.faults = []
    with suppress(SystemExit):
        main()
    remote.assert_right()


def test_storage_that_stays_busy_costs_its_units_and_no_more(
    remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRL_STORAGE_ATTEMPTS", "2")
    remote.proxy.faults = [Fault("503", on="put", key=".*/mid_block/c/1/.*", times=None)]
    summary = remote.extract()
    ((unit, error),) = summary.failed
    assert unit.id == 1
    assert "tried 2 times" in error
    assert "503 Service Unavailable, SlowDown" in error
    remote.proxy.faults = []
    assert signed_units(summary.store) == {0, 2}
    assert remote.extract().failed == []
    remote.assert_right()


def test_readers_never_get_less_than_they_asked_for(
    remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = remote.extract().store
    monkeypatch.setenv("DRL_STORAGE_ATTEMPTS", "2")
    for kind in ("short answer", "cut answer"):
        remote.proxy.faults = [Fault(kind, on="get", key=SHARDS, times=None)]
        opened = FeatureStore.open(store.url)
        with pytest.raises(ObjectError, match="tried 2 times"):
            opened.read_unit("mid_block", 0, opened.units[0])
        with pytest.raises(ObjectError, match="tried 2 times"):
            opened.read_rows("mid_block", 0, [0, 5])
        problems = opened.verify(deep=True)
        assert len(problems) == 7 * N_UNITS
        assert all("cannot be read" in problem.what for problem in problems)


# --- listings that are not up to date -----------------------------------------------------------


def test_receipts_that_a_listing_leaves_out_do_no_harm(remote: Remote) -> None:
    """At first nobody sees that unit 1 is done, not even at the end; later everybody does."""
    hidden = ".*/" + receipt_path(remote.world.store.units[1])
    remote.proxy.faults = [Fault("stale", key=RECEIPTS, times=None, listed=hidden)]
    assert remote.extract().failed == []
    again = remote.extract()
    assert again.failed == []
    assert again.n_pending == 1
    remote.proxy.faults = []
    assert remote.extract().n_pending == 0
    remote.assert_right()


def test_receipts_that_a_listing_keeps_are_not_believed(remote: Remote) -> None:
    store = remote.extract().store
    for path in (receipt_path(store.units[1]), "sealed.json"):
        store.folder.delete(path)
    remote.proxy.faults = [Fault("ghost", key=RECEIPTS, times=None)]
    with suppress(StoreError):
        remote.extract()
    remote.proxy.faults = []
    assert not store.sealed or 1 in store.receipts()
    remote.extract()
    remote.assert_right()


# --- the local disk -----------------------------------------------------------------------------


def test_a_disk_that_fills_up_ends_the_run(world: World, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(info.size for info in world.store.folder.list())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size * 2 // 3}", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root and the right to mount")
    try:
        pipeline = Pipeline.parse(world.settings(f"{world.tars}/*.tar", str(disk / "store")))
        with pytest.raises(StorageUnusableError, match="the disk is full; make room"):
            extract(pipeline)
        signed = signed_units(FeatureStore.open(str(disk / "store")))
        assert len(signed) < N_UNITS
        subprocess.run(["mount", "-o", f"remount,size={size * 4}", str(disk)], check=True)
        summary = extract(pipeline)
        assert summary.n_pending == N_UNITS - len(signed)
        assert_same_store(summary.store, world.store)
        assert summary.store.verify(deep=True) == []
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
