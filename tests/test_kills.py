"""Real processes killed while they extract: the store is that of an undisturbed run in the end."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml

from drl_data.pipeline import Pipeline
from drl_data.runs import extract
from drl_data.store import FeatureStore
from drl_data.testing import Fault, Phase, PoisonImage, write_photo_tars
from drl_data.tiny_models import save_tiny_ddpm
from tests.faulty_extract import extract_with
from tests.test_executors import is_running, wait_until
from tests.test_extract import arrays_of, assert_same_store

ROOT = Path(__file__).parents[1]
DEATHS = {"SIGSEGV": "SIGSEGV", "SIGKILL": "SIGKILL, probably out of memory"}
PHASES: tuple[Phase, ...] = ("read", "compute", "write", "sign", "signed")


@dataclasses.dataclass(frozen=True)
class World:
    """Photographs, a model, and the store that an undisturbed run makes of them."""

    folder: Path
    reference: FeatureStore

    def pipeline(self, store: Path, **run: object) -> Pipeline:
        return Pipeline.parse(self.data(store, **run))

    def data(self, store: Path, **run: object) -> dict[str, object]:
        return {
            "name": "kills",
            "dataset": {"tars": str(self.folder / "photos" / "*.tar")},
            "images": {"size": 16},
            "backbone": {"model": str(self.folder / "model")},
            "schedule": {"timesteps": [0, 300]},
            "taps": ["mid_block"],
            "features": {"dtype": "float32", "batch_size": 2, "rows_per_unit": 4},
            "store": {"url": str(store)},
            "run": run,
        }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    write_photo_tars(folder / "photos", n_samples=22)
    save_tiny_ddpm(folder / "model")
    plain = World(folder, None)  # type: ignore[arg-type]
    reference = extract(plain.pipeline(folder / "reference.zarr")).store
    return World(folder, reference)


def start(command: Sequence[object], **streams: int) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
    }
    return subprocess.Popen(
        [sys.executable, *map(str, command)], env=environment, text=True, **streams
    )


def start_faulty(
    world: World, folder: Path, faults: Sequence[dict[str, object]], **run: object
) -> subprocess.Popen[str]:
    (folder / "p.yaml").write_text(yaml.safe_dump(world.data(folder / "s.zarr", **run)))
    (folder / "faults.json").write_text(json.dumps(list(faults)))
    return start(["-m", "tests.faulty_extract", folder / "p.yaml", folder / "faults.json"])


def assert_whole(world: World, store: Path) -> None:
    """Resume, and compare."""
    found = extract(world.pipeline(store)).store
    assert_same_store(world.reference, found)
    assert found.verify(deep=True) == []


@pytest.mark.parametrize("phase", PHASES)
def test_a_driver_that_is_killed_loses_nothing(world: World, tmp_path: Path, phase: Phase) -> None:
    """By `kill -9` of itself, in its second unit or so: what was signed before stays."""
    fault = {
        "phase": phase,
        "nth": 5 if phase == "write" else 3,
        "mark": str(tmp_path / "mark"),
        "victim": "driver",
    }
    process = start_faulty(world, tmp_path, [fault], leases=2)
    assert process.wait(timeout=120) == -signal.SIGKILL
    n_done = len(FeatureStore.open(str(tmp_path / "s.zarr")).receipts())
    assert n_done < len(world.reference.units)
    assert_whole(world, tmp_path / "s.zarr")


@pytest.mark.parametrize(
    "executor", ["process", pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.soak])]
)
def test_a_driver_that_is_killed_leaves_no_worker(
    world: World, tmp_path: Path, executor: str
) -> None:
    fault = {"phase": "write", "nth": 2, "mark": str(tmp_path / "mark"), "victim": "driver"}
    process = start_faulty(world, tmp_path, [fault], executor=executor, workers=1)
    assert process.wait(timeout=120) == -signal.SIGKILL
    worker = int((tmp_path / "mark").read_text())
    wait_until(lambda: not is_running(worker))
    assert_whole(world, tmp_path / "s.zarr")


def test_children_that_are_killed_are_replaced(world: World, tmp_path: Path) -> None:
    """One child after another, in each phase once, in one run."""
    faults = [
        Fault(phase, 2 if phase in ("read", "compute") else 1, str(tmp_path / f"mark-{phase}"))
        for phase in PHASES
    ]
    settings = {"executor": "process", "workers": 1, "max_deaths_per_worker": 9, "max_attempts": 9}
    summary = extract_with(world.pipeline(tmp_path / "s.zarr", **settings), faults)
    assert not summary.failed
    assert len(list(tmp_path.glob("mark-*"))) == len(PHASES)
    assert_same_store(world.reference, summary.store)


@pytest.mark.ray
@pytest.mark.parametrize("victim", ["self", "parent"])
def test_actors_and_their_children_that_are_killed_are_replaced(
    world: World, tmp_path: Path, local_ray: None, victim: str
) -> None:
    fault = Fault("sign", 1, str(tmp_path / "mark"), victim)  # type: ignore[arg-type]
    settings = {"executor": "ray", "workers": 1}
    summary = extract_with(world.pipeline(tmp_path / "s.zarr", **settings), [fault])
    assert not summary.failed
    assert (tmp_path / "mark").exists()
    assert_same_store(world.reference, summary.store)


def image_bytes(world: World) -> list[bytes]:
    """Of each row, as they lie in the tars."""
    found = []
    for path in sorted((world.folder / "photos").glob("*.tar")):
        with tarfile.open(path) as tar:
            for name in sorted(n for n in tar.getnames() if n.endswith(".jpg")):
                member = tar.extractfile(name)
                assert member is not None
                found.append(member.read())
    return found


@pytest.mark.parametrize(
    ("executor", "how"),
    [
        ("process", "SIGSEGV"),
        pytest.param("ray", "SIGKILL", marks=[pytest.mark.ray, pytest.mark.soak]),
    ],
)
def test_images_that_kill_are_listed_and_the_rest_of_their_unit_is_computed(
    world: World, tmp_path: Path, request: pytest.FixtureRequest, executor: str, how: str
) -> None:
    """Row 9 ends its worker; for row 10 of the same unit there is not enough memory."""
    if executor == "ray":
        request.getfixturevalue("local_ray")
    images = image_bytes(world)
    assert len(images) == 22
    digests = [hashlib.sha256(image).hexdigest() for image in images]
    poison = [PoisonImage(digests[9], how), PoisonImage(digests[10], "memory")]
    settings = {"executor": executor, "workers": 2, "max_attempts": 1}
    summary = extract_with(world.pipeline(tmp_path / "s.zarr", **settings), poison)
    assert not summary.failed
    store = summary.store
    assert store.sealed
    assert store.verify(deep=True) == []
    invalid = [row for receipt in store.receipts().values() for row in receipt.invalid]
    assert [(row.row, row.key, row.stage, row.reason) for row in invalid] == [
        (9, "crop-0009", "worker", f"killed its worker: {DEATHS[how]} (2 of 2 times)"),
        (10, "crop-0010", "decode", "not enough memory to decode 40x40 pixels"),
    ]
    good = [row for row in range(22) if row not in (9, 10)]
    mine, theirs = arrays_of(store), arrays_of(world.reference)
    for name in theirs:
        np.testing.assert_array_equal(mine[name][:, good], theirs[name][:, good], name)
        assert np.isnan(mine[name][:, [9, 10]]).all()
    assert summary.n_ok == 20
