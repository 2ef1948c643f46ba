"""What the soak's trials stand on: tars, a backbone that counts, an undisturbed store, `drl`.

Every trial runs the real command line in processes of its own, on a store of its own, and ends when
the store is complete again; then every array and every receipt is compared with the undisturbed.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from drl_data.store import FeatureStore
from drl_data.testing import write_photo_tars
from drl_data.tiny_models import save_tiny_ddpm

ROOT = Path(__file__).resolve().parent.parent
N_SAMPLES, ROWS_PER_UNIT, BATCH = 96, 8, 4
BATCH_S = 0.05
"""Seconds that a batch takes at least; a run computes for some seconds, besides its imports."""
PATIENCE_S = 240
"""After so long a command that should have ended is a failure of the trial."""
MAX_RUNS = 12
"""Runs of `drl extract` after which a store that is still not complete is a failure."""


@dataclass
class Trial:
    """What one injected fault cost."""

    lost: int = 0
    """Rows without features or without a reason in the end."""
    wrong: int = 0
    """Rows whose features, or receipts whose content, differ from the undisturbed store."""
    recomputed: int = 0
    """Images encoded more often than once."""
    recover_s: float = 0.0
    """From the fault to the complete store, less what the same work takes undisturbed."""
    met: bool = True
    """Whether the fault met a run that was at work."""
    note: str = ""


@dataclass
class World:
    """Tars, weights and an undisturbed store in `folder`."""

    folder: Path
    n_stores: int = 0

    @classmethod
    def make(cls, folder: Path) -> World:
        """Write the tars and the weights, and compute the undisturbed store."""
        write_photo_tars(folder / "tars", n_samples=N_SAMPLES, n_tars=3)
        save_tiny_ddpm(folder / "ddpm")
        # Of this process, so that what it starts, Ray's nodes too, finds the backbone.
        os.environ.update(
            PYTHONPATH=str(ROOT),
            OMP_NUM_THREADS="1",
            RAY_AUTH_MODE="disabled",  # everything is on loopback
            DRL_SOAK_FOLDER=str(folder),
            DRL_SOAK_SLEEP=str(BATCH_S),
        )
        world = cls(folder)
        store = world.new_store()
        assert world.finish(store, {}) == 1, "the undisturbed run is one run"
        return world

    @property
    def reference(self) -> FeatureStore:
        """The undisturbed store."""
        return FeatureStore.open(str(self.folder / "store-0"))

    def new_store(self, url: str | None = None) -> str:
        """URL of a store that is not there yet; local unless `url` says where."""
        number, self.n_stores = self.n_stores, self.n_stores + 1
        (self.folder / "marks").write_bytes(b"")
        return f"{url}/store-{number}" if url else str(self.folder / f"store-{number}")

    def pipeline(self, store: str, tars: str | None = None) -> Path:
        """A pipeline file for a store."""
        name = store.rpartition("/")[2]
        path = self.folder / f"{name}.yaml"
        content = {
            "name": name,
            "dataset": {"tars": tars or str(self.folder / "tars" / "*.tar")},
            "images": {"size": 16},
            "backbone": {"model": "python:benchmarks.soak_model:counted_ddpm"},
            "schedule": {"timesteps": [0, 300]},
            "taps": ["mid_block", {"path": "up_blocks.*", "reduce": "avg_pool(4)"}],
            "features": {
                "dtype": "float32", "batch_size": BATCH, "rows_per_unit": ROWS_PER_UNIT,
                "non_finite": "invalid",
            },
            "store": {"url": store},
            "run": {"leases": 2, "decode_threads": 1, "grace_s": 2},
        }  # fmt: skip
        path.write_text(yaml.safe_dump(content))
        return path

    def start(self, store: str, options: Sequence[str] = (), **how: str | None) -> Run:
        """Begin `drl extract` on a store; `how`: `tars`, and settings of the environment."""
        path = self.pipeline(store, how.pop("tars", None))
        return self.command(store, "extract", str(path), *options, **how)

    def command(self, store: str, verb: str, *arguments: str, **settings: str | None) -> Run:
        """Begin a command of `drl`."""
        environment = os.environ | {k: v for k, v in settings.items() if v is not None}
        with open(self.folder / f"{store.rpartition('/')[2]}.log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "drl_data", verb, *arguments],
                env=environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        return Run(process, store)

    def finish(self, store: str, settings: Mapping[str, str | None], *options: str) -> int:
        """Run `drl extract` until the store is complete; how many runs it took."""
        for n_runs in range(1, MAX_RUNS + 1):
            self.start(store, options, **settings).wait()
            opened = FeatureStore.open(store)
            if opened.sealed:
                return n_runs
        raise AssertionError(f"{store}: not complete after {MAX_RUNS} runs: {self.log(store)}")

    def log(self, store: str) -> str:
        """The end of what the store's commands printed."""
        return (self.folder / f"{store.rpartition('/')[2]}.log").read_text()[-2000:]

    @property
    def n_encoded(self) -> int:
        """Images that were encoded since the last new store."""
        return (self.folder / "marks").stat().st_size

    def poisoned_tars(self, rows: Sequence[int], colour: tuple[int, int, int]) -> str:
        """Pattern of a copy of the tars in which the images of some rows have one colour."""
        folder = self.folder / f"tars-{self.n_stores}"
        folder.mkdir()
        poison = io.BytesIO()
        Image.new("RGB", (16, 16), colour).save(poison, "PNG")
        row = 0
        for path in sorted((self.folder / "tars").glob("*.tar")):
            with tarfile.open(path) as source, tarfile.open(folder / path.name, "w") as copy:
                for member in source:
                    file = source.extractfile(member)
                    data = file.read() if file is not None else b""
                    if member.name.endswith(".jpg"):
                        if row in rows:
                            data = poison.getvalue()
                        row += 1
                    member.size = len(data)
                    copy.addfile(member, io.BytesIO(data))
        return str(folder / "*.tar")

    def tame_reference(self, tars: str) -> FeatureStore:
        """The undisturbed store of some tars, with a backbone to which nothing is poison."""
        store = self.new_store()
        self.finish(store, {"tars": tars, "DRL_SOAK_TAME": "1"})
        return FeatureStore.open(store)

    def judge(
        self,
        url: str,
        *,
        reference: FeatureStore | None = None,
        invalid: Mapping[int, str] | None = None,
    ) -> Trial:
        """Compare a store with the undisturbed one; `invalid` rows must be listed for a reason that
        has this in it, and nothing is asked of their features."""
        store, invalid = FeatureStore.open(url), invalid or {}
        reference = reference or self.reference
        receipts = store.receipts()
        accounted = np.zeros(store.spec.n_samples, np.int64)
        for receipt in receipts.values():
            accounted[receipt.start : receipt.stop] += 1
        listed = {row.row: row.reason for r in receipts.values() for row in r.invalid}
        trial = Trial(lost=int((accounted != 1).sum()))
        trial.lost += len(listed.keys() ^ invalid.keys())
        trial.wrong += sum(why not in listed.get(row, "") for row, why in invalid.items())
        wrong = np.zeros(store.spec.n_samples, np.bool_)
        rows = np.array([r for r in range(store.spec.n_samples) if r not in invalid])
        for array in reference.arrays:
            for t in range(reference.n_times(array.name)):
                mine, want = (s.read_rows(array.name, t, rows) for s in (store, reference))
                bits = [x.reshape(len(rows), -1).view(np.uint8) for x in (mine, want)]
                wrong[rows] |= (bits[0] != bits[1]).any(1)
        trial.wrong += int(wrong.sum())
        if not invalid:
            theirs = reference.receipts()
            trial.wrong += sum(r.content() != theirs[u].content() for u, r in receipts.items())
        problems = store.verify(deep=True)
        trial.wrong += len(problems)
        trial.note = "; ".join(str(problem) for problem in problems[:2])
        trial.recomputed = max(self.n_encoded - store.spec.n_samples, 0)
        return trial


@dataclass
class Run:
    """A command of `drl` that runs in a session of its own."""

    process: subprocess.Popen[bytes]
    store: str

    def wait(self) -> int:
        """Its exit status, negative for a signal."""
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise

    def send(self, number: signal.Signals) -> bool:
        """Send a signal to the command itself; whether it was still there."""
        if self.process.poll() is not None:
            return False
        self.process.send_signal(number)
        return True

    def kill_all(self) -> None:
        """End the whole session."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def until_encoded(self, world: World, n_images: int) -> bool:
        """Wait until all runs of the store have encoded so many images; False if it ended."""
        deadline = time.monotonic() + PATIENCE_S
        while world.n_encoded < n_images:
            if self.process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise AssertionError(f"{self.store}: not at work after {PATIENCE_S} s")
            time.sleep(0.005)
        return True


def descendants(pid: int) -> list[int]:
    """Process ids of all processes below one."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:
            continue  # it ended meanwhile
        parents[int(text.split()[0])] = int(text.rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - {pid})


@contextmanager
def ended(run: Run) -> Iterator[Run]:
    """Nothing of a run is left after it."""
    try:
        yield run
    finally:
        if run.process.poll() is None:
            run.kill_all()
