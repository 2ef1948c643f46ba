"""Kills at random moments: of the driver, of a worker's process, of its actor, of a Ray node.

    python -m benchmarks.kills [N] [SEED]

Each trial starts `drl extract` on a tiny pipeline, kills something after a random delay, lets the
run end, resumes it where it was the driver, and compares the store with an undisturbed one.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import yaml

from drl_data.pipeline import Pipeline
from drl_data.runs import extract
from drl_data.store import FeatureStore
from drl_data.testing import write_photo_tars
from drl_data.tiny_models import save_tiny_ddpm

ROOT = Path(__file__).parents[1]
KINDS = ("driver local", "driver process", "child", "driver ray", "actor", "node")
N_SAMPLES = 240
TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Trial:
    """What one kill did. `struck` is False if the run was over before the moment came."""

    kind: str
    delay_s: float
    struck: bool
    n_signed: int
    """Units that were signed when it was struck."""
    n_rows_lost: int
    """Rows that the undisturbed store has and this one has not."""
    n_rows_wrong: int
    n_rows_again: int
    """Rows that were computed again, at most: of units with a second attempt; for a driver, of the
    units that it may have held."""
    recovery_s: float
    """From the kill until the next unit was signed; a killed driver is resumed in this process, so
    without the seconds that a new one takes to start."""


@dataclass(frozen=True)
class World:
    """Photographs, a model, and the store that an undisturbed run makes of them."""

    folder: Path
    reference: FeatureStore

    @classmethod
    def make(cls, folder: Path) -> World:
        """In an empty folder."""
        write_photo_tars(folder / "photos", n_samples=N_SAMPLES)
        save_tiny_ddpm(folder / "model")
        path = write_pipeline(folder, folder / "reference.zarr")
        return cls(folder, extract(Pipeline.load(path)).store)


def write_pipeline(folder: Path, store: Path, **run: object) -> Path:
    """A pipeline file beside its store."""
    data = {
        "name": "kills",
        "dataset": {"tars": str(folder / "photos" / "*.tar")},
        "images": {"size": 32},
        "backbone": {"model": str(folder / "model")},
        "schedule": {"timesteps": [0, 100, 200, 300]},
        "taps": ["mid_block"],
        "features": {"dtype": "float32", "batch_size": 4, "rows_per_unit": 8},
        "store": {"url": str(store)},
        "run": run,
    }
    path = store.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(data))
    return path


def random_kills(
    world: World, n: int, seed: int = 0, kinds: Sequence[str] = KINDS
) -> Iterator[Trial]:
    """`n` trials, of each kind in turn."""
    generator = random.Random(seed)
    for i in range(n):
        store = world.folder / f"trial-{seed}-{i}.zarr"
        yield one_kill(world, store, kinds[i % len(kinds)], generator)
        shutil.rmtree(store)


def one_kill(world: World, store: Path, kind: str, generator: random.Random) -> Trial:
    """Run, kill at a random moment, resume, compare."""
    executor = kind.split()[-1] if kind.startswith("driver") else "process"
    executor = "ray" if kind in ("actor", "node") else executor
    with cluster(kind == "node") as (address, kill_node):
        settings: dict[str, object] = {"executor": executor, "workers": 2, "leases": 2}
        if address:
            settings["address"] = address
        path = write_pipeline(world.folder, store, **settings)
        process = start(path, trial := str(store))
        try:
            delay = generator.uniform(0, 3.0)
            wait_for(store / "zarr.json", process)
            if generator.random() < 0.75:  # else while its workers start
                wait_for(store / "receipts" / "00000000.json", process, any_of=True)
            time.sleep(delay)
            before = signed(store)
            struck = strike(kind, process, trial, kill_node, generator)
            at = time.time()
            killed = kind.startswith("driver")
            status = process.wait(TIMEOUT_S)
        finally:
            process.kill()
    if not killed and status != 0:
        raise AssertionError(f"{kind}: exit status {status} after {delay:.2f} s")
    found = extract(Pipeline.load(path)).store
    if not found.sealed or found.verify(deep=True):
        raise AssertionError(f"{kind}: {found.verify(deep=True)}")
    times = (path.stat().st_mtime for path in receipts(store) if path.name not in before)
    after = sorted(s for s in times if s > at)
    lost, wrong = difference(world.reference, found)
    again = sum(r.stop - r.start for r in found.receipts().values() if r.run.attempt > 1)
    n_leases = 2 if executor == "local" else 4
    held = n_leases * found.spec.rows_per_unit if killed and struck and after else 0
    return Trial(
        kind,
        round(delay, 2),
        struck,
        len(before),
        lost,
        wrong,
        again + held,
        round(after[0] - at, 2) if struck and after else 0.0,
    )


def start(path: Path, trial: str) -> subprocess.Popen[bytes]:
    """`drl extract`, quietly; its processes, but Ray's own, know the trial by their environment."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "DRL_TRIAL": trial,
    }
    return subprocess.Popen(
        [sys.executable, "-m", "drl_data", "extract", str(path)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def strike(
    kind: str,
    process: subprocess.Popen[bytes],
    trial: str,
    kill_node: Callable[[], None],
    generator: random.Random,
) -> bool:
    """Kill it; False if there was nothing to kill any more."""
    if process.poll() is not None:
        return False
    if kind.startswith("driver"):
        process.kill()
        return True
    if kind == "node":
        kill_node()
        return True
    found = sorted(children(trial))
    if not found:
        return False
    child, parent = generator.choice(found)
    os.kill(parent if kind == "actor" else child, signal.SIGKILL)
    return True


def children(trial: str) -> Iterator[tuple[int, int]]:
    """(number, number of the parent) of the processes that compute for a trial."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            told = (path / "environ").read_bytes().split(b"\0")
            words = (path / "cmdline").read_bytes()
            status = (path / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended meanwhile
        if b"worker_process" in words and f"DRL_TRIAL={trial}".encode() in told:
            yield int(path.name), int(status[1])


@contextmanager
def cluster(wanted: bool) -> Iterator[tuple[str | None, Callable[[], None]]]:
    """(address, how to kill one of its two worker nodes) of a Ray cluster, if it is wanted."""
    if not wanted:
        yield None, lambda: None
        return
    from ray.cluster_utils import Cluster

    nodes = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    try:
        lost, _ = nodes.add_node(num_cpus=1), nodes.add_node(num_cpus=1)
        yield nodes.address, lambda: nodes.remove_node(lost, allow_graceful=False)
    finally:
        nodes.shutdown()


def wait_for(path: Path, process: subprocess.Popen[bytes], *, any_of: bool = False) -> None:
    """Until the file is there, or any beside it, or the process has ended."""
    deadline = time.monotonic() + TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() or (any_of and path.parent.exists() and any(path.parent.iterdir())):
            return
        time.sleep(0.01)


def receipts(store: Path) -> list[Path]:
    """Files of the receipts that are there."""
    return list((store / "receipts").glob("*.json"))


def signed(store: Path) -> set[str]:
    """Names of the receipts that are there."""
    return {path.name for path in receipts(store)}


def difference(reference: FeatureStore, found: FeatureStore) -> tuple[int, int]:
    """(rows lost, rows wrong) of a store."""
    lost, wrong = 0, 0
    mine, theirs = found.receipts(), reference.receipts()
    for unit in reference.units:
        if unit.id not in mine:
            lost += unit.n_rows
            continue
        lost += mine[unit.id].n_invalid
        bad = np.zeros(unit.n_rows, bool)
        for array in reference.arrays:
            for t in range(len(reference.times)):
                a, b = (s.read_unit(array.name, t, unit) for s in (reference, found))
                bad |= (a != b).reshape(unit.n_rows, -1).any(axis=1)
        told_otherwise = mine[unit.id].content() != theirs[unit.id].content()
        wrong += int(bad.sum()) or unit.n_rows * told_otherwise
    return lost, wrong


def main() -> None:
    """Print a line for each trial, and the sums."""
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 54
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with tempfile.TemporaryDirectory() as folder:
        world = World.make(Path(folder))
        trials = []
        for trial in random_kills(world, n, seed):
            print(json.dumps(asdict(trial)), flush=True)
            trials.append(trial)
    print("kind, tried, struck, rows lost, rows wrong, rows computed again, longest recovery in s")
    for kind in KINDS:
        mine = [trial for trial in trials if trial.kind == kind]
        print(
            kind,
            len(mine),
            sum(trial.struck for trial in mine),
            sum(trial.n_rows_lost for trial in mine),
            sum(trial.n_rows_wrong for trial in mine),
            sum(trial.n_rows_again for trial in mine),
            max((trial.recovery_s for trial in mine), default=0.0),
            sep=", ",
        )


if __name__ == "__main__":
    main()
