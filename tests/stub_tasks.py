"""Stub tasks for executors, in a module that children import in no time."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from drl_data.errors import StoppedError, UserError
from drl_data.plan import Lease
from drl_data.stopping import Stop

Square = Callable[[Lease, Stop], int]


def make_square() -> Square:
    """A task whose result names its unit."""
    return lambda lease, stop: lease.unit.start**2


def make_users_mistake() -> Square:
    raise UserError("the weights are not there")


def make_broken() -> Square:
    raise RuntimeError("this machine has no such device")


def make_recorded(folder: Path) -> Square:
    """Leaves a file for each task that is made, named by the process."""
    (folder / f"made-{os.getpid()}").touch()
    return make_square()


def make_rows() -> Callable[[Lease, Stop], tuple[tuple[int, str], ...]]:
    """A task whose result is the rows that it was told to leave out."""
    return lambda lease, stop: lease.poison


def make_gone(folder: Path, error: type[Exception]) -> Square:
    """The first task of all finds its GPU broken with unit 0; those after it do not."""

    def task(lease: Lease, stop: Stop) -> int:
        if lease.unit.id == 0 and not (folder / "broken").exists():
            (folder / "broken").touch()
            raise error("CUDA error: an illegal memory access was encountered")
        return lease.unit.start**2

    return task


def make_waiting(folder: Path) -> Square:
    """Computes until it is told to stop; unit 0 finishes then, the others are given back."""

    def task(lease: Lease, stop: Stop) -> int:
        (folder / f"began-{lease.unit.id}").touch()
        while not stop.requested:
            time.sleep(0.01)
        if lease.unit.id:
            raise StoppedError("no time")
        return lease.unit.start**2

    return task


def make_deaf(folder: Path) -> Square:
    """Never comes back, whatever it is told."""

    def task(lease: Lease, stop: Stop) -> int:
        (folder / f"began-{os.getpid()}").touch()
        while True:
            time.sleep(1)

    return task


def make_seen(folder: Path, n_workers: int) -> Square:
    """Leaves the GPUs that the process sees, and waits until so many workers have done so."""
    path = folder / uuid.uuid4().hex
    path.with_suffix(".new").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "unset"))
    path.with_suffix(".new").rename(path)

    def task(lease: Lease, stop: Stop) -> int:
        while len([path for path in folder.iterdir() if not path.suffix]) < n_workers:
            time.sleep(0.01)
        return lease.unit.start**2

    return task


def make_logged(folder: Path, seconds: float, writes: bool = False) -> Square:
    """Each unit takes so long, and leaves a mark named by the raylet; told to stop, it is
    given back, with another mark, unless it `writes`: that is finished."""
    node = os.environ["RAY_RAYLET_PID"]

    def task(lease: Lease, stop: Stop) -> int:
        (folder / f"{lease.unit.id}-{uuid.uuid4().hex}-{node}").touch()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if stop.requested and not writes:
                (folder / f"stopped-{lease.unit.id}").touch()
                raise StoppedError("its node will be taken away")
            time.sleep(0.01)
        return lease.unit.start**2

    return task
