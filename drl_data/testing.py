"""Public doubles for tests: small tars of real photographs, tasks that fail on schedule.

    write_photo_tars      crops of the photographs that scikit-learn ships
    Schedule              per unit and attempt: run, fail, or die
    KillingRows           a task that some rows kill, in one of several ways
    Fault                 kills a process the n-th time that it reads, computes, writes or signs
    PoisonImage           an image that kills the process that decodes it

Tiny backbones are in tiny_models.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import itertools
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Literal, TypeVar

import numpy as np
from PIL import Image

from drl_data.errors import ObjectError
from drl_data.objects import Buffer
from drl_data.plan import Lease
from drl_data.stopping import Stop

R = TypeVar("R")
T = TypeVar("T")

PAN = 2
"""Pixels that a crop moves from one frame of a video to the next, down and to the right."""


def write_photo_tars(
    folder: Path, *, n_samples: int, n_tars: int = 2, size: int = 40, frames: int = 1
) -> Path:
    """Tars of JPEG crops of two real photographs; label 0 is the temple, 1 the flower.

    Files `photos-000000.tar` ...; members `crop-0000.jpg`, `crop-0000.cls`, `crop-0000.txt`. With
    `frames` above 1 a sample is a video, the crop in slow motion: `crop-0000.tif`, lossless, of so
    many pages. Bytes are reproducible.
    """
    import webdataset  # here, because it takes a second that children need not wait
    from sklearn.datasets import load_sample_image

    photos = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    per_tar = -(-n_samples // n_tars)
    way = PAN * (frames - 1)
    for tar in range(n_tars):
        with webdataset.TarWriter(str(folder / f"photos-{tar:06d}.tar"), mtime=0) as writer:
            for i in range(tar * per_tar, min((tar + 1) * per_tar, n_samples)):
                photo = photos[i % 2]
                top, left = (
                    int(generator.integers(0, side - size - way)) for side in photo.shape[:2]
                )
                crops = [
                    Image.fromarray(photo[top + at : top + at + size, left + at : left + at + size])
                    for at in range(0, way + 1, PAN)
                ]
                extension, data = _encoded(crops)
                writer.write(
                    {
                        "__key__": f"crop-{i:04d}",
                        extension: data,
                        "cls": str(i % 2).encode(),
                        "txt": ("a temple", "a flower")[i % 2].encode(),
                    }
                )
    return folder


def _encoded(frames: list[Image.Image]) -> tuple[str, bytes]:
    """Extension and bytes of an image or of a video."""
    buffer = io.BytesIO()
    if len(frames) == 1:
        frames[0].save(buffer, "JPEG", quality=90)
        return "jpg", buffer.getvalue()
    frames[0].save(
        buffer, "TIFF", save_all=True, append_images=frames[1:], compression="tiff_adobe_deflate"
    )
    return "tif", buffer.getvalue()


@dataclass
class Schedule(Generic[R]):
    """A task that fails as a table says: {(unit id, attempt): what to do}, and else runs `task`.

    `fail` raises ObjectError, which executors try again; `error` raises ValueError, which they do
    not; `die` ends the process without a word, as a segmentation fault or the OOM killer would.
    """

    make_task: Callable[[], Callable[[Lease, Stop], R]]
    table: Mapping[tuple[int, int], str] = field(default_factory=dict)

    def __call__(self) -> Callable[[Lease, Stop], R]:
        """Make the task, as executors expect."""
        task = self.make_task()

        def run(lease: Lease, stop: Stop) -> R:
            unit, attempt = lease.unit, lease.attempt
            action = self.table.get((unit.id, attempt), "run")
            if action == "fail":
                raise ObjectError(f"unit {unit.id}, attempt {attempt}: scheduled failure")
            if action == "error":
                raise ValueError(f"unit {unit.id}, attempt {attempt}: scheduled error")
            if action == "die":
                os._exit(1)
            return task(lease, stop)

        return run


@dataclass
class KillingRows(Generic[R]):
    """A task that dies of some rows, each time that it is to compute one of them.

    `how` it dies: `exit` ends the process without a word; `memory` asks for more memory than the
    process may have; any other is the name of a signal, `SIGSEGV` or `SIGKILL`.
    """

    make_task: Callable[[], Callable[[Lease, Stop], R]]
    rows: tuple[int, ...]
    how: str = "SIGSEGV"

    def __call__(self) -> Callable[[Lease, Stop], R]:
        """Make the task, as executors expect."""
        task = self.make_task()

        def run(lease: Lease, stop: Stop) -> R:
            start, end = lease.probe or (lease.unit.start, lease.unit.stop)
            left_out = {row for row, _ in lease.poison}
            if any(start <= row < end for row in set(self.rows) - left_out):
                die(self.how)
            return task(lease, stop)

        return run


def die(how: str) -> None:
    """End this process, as `KillingRows` says; `memory` raises MemoryError where that is all."""
    if how == "exit":
        os._exit(1)
    if how != "memory":
        os.kill(os.getpid(), signal.Signals[how])
        signal.pause()  # the signal may reach another thread first
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, hard))
    try:
        np.ones(1 << 40, np.uint8)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


Phase = Literal["read", "compute", "write", "sign", "signed"]


@dataclass(frozen=True)
class Fault:
    """Kills a process the `nth` time (from 1) that an extracting one comes to a phase.

    `read`: the pixels of a batch are there; `compute`: one forward of a batch is done; `write`: an
    object of features is about to be put; `sign`: all objects of a unit are there, its receipt is
    about to be put; `signed`: the receipt has just been put, and nobody was told.

    It strikes once over all processes: `mark` is a file that is made then, and holds the number of
    the process that came there. `victim` is that process (`self`), its parent, or a number.
    """

    phase: Phase
    nth: int
    mark: str
    victim: Literal["self", "parent"] | int = "self"
    how: str = "SIGKILL"

    def arm(self) -> None:
        """Lie in wait in this process, for its whole life."""
        count, lock = itertools.count(1), threading.Lock()

        def come() -> None:
            with lock:
                strikes = next(count) == self.nth
            if strikes:
                self._strike()

        _watch(self.phase, come)

    def _strike(self) -> None:
        try:
            with open(self.mark, "x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            return  # it has happened, in another process
        match self.victim:
            case "self":
                die(self.how)
            case "parent":
                os.kill(os.getppid(), signal.Signals[self.how])
            case int(process):
                os.kill(process, signal.Signals[self.how])


@dataclass(frozen=True)
class PoisonImage:
    """An image, known by the SHA-256 of its bytes, that kills every process that decodes it.

    `how`, as `KillingRows` has it.
    """

    sha256: str
    how: str = "SIGSEGV"

    def arm(self) -> None:
        """Lie in wait in this process, for its whole life."""
        room = vars(importlib.import_module("drl_data.decode"))
        plain = room["_decode"]

        def decode(data: Buffer, *rest: object) -> object:
            if hashlib.sha256(data).hexdigest() == self.sha256:
                die(self.how)
            return plain(data, *rest)

        room["_decode"] = decode


def make_faulty_task(
    faults: Sequence[Fault | PoisonImage], make_task: Callable[[], Callable[[Lease, Stop], R]]
) -> Callable[[Lease, Stop], R]:
    """Make a task where faults lie in wait; executors get a `partial` of this."""
    for fault in faults:
        fault.arm()
    return make_task()


def _watch(phase: Phase, come: Callable[[], None]) -> None:
    """Call `come` each time that this process comes to the phase."""
    from drl_data.features import FeatureComputer
    from drl_data.objects import LocalFolder

    def before(owner: type, name: str, is_it: Callable[[str], bool], *, after: bool) -> None:
        plain = getattr(owner, name)

        def watched(folder: LocalFolder, path: str, *rest: object) -> object:
            if is_it(path) and not after:
                come()
            result = plain(folder, path, *rest)
            if is_it(path) and after:
                come()
            return result

        setattr(owner, name, watched)

    def each(plain: Callable[..., Iterator[T]]) -> Callable[..., Iterator[T]]:
        def watched(*args: object, **kwargs: object) -> Iterator[T]:
            with contextlib.closing(plain(*args, **kwargs)) as items:  # type: ignore[type-var]
                for item in items:
                    come()
                    yield item

        return watched

    if phase == "read":
        room = importlib.import_module("drl_data.extract")  # not the function of that name
        vars(room)["read_batches"] = each(vars(room)["read_batches"])
    elif phase == "compute":
        FeatureComputer.compute = each(FeatureComputer.compute)  # type: ignore[method-assign]
    else:
        is_receipt = phase != "write"
        for name in ("put", "put_if_absent"):
            before(
                LocalFolder,
                name,
                lambda path: path.startswith("receipts/") == is_receipt,
                after=phase == "signed",
            )
