"""Units to workers: threads of this process, child processes, or Ray actors. Same results.

An executor takes a callable that makes a task and never a spec. The driver owns the queue
(leases.py), a pool has the workers (pools.py, ray_pool.py), and this is the loop between them.
State is in the receipts, so a driver that dies loses nothing. Results are a few hundred bytes.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from drl_data.answers import Made, Task
from drl_data.errors import UserError
from drl_data.leases import DEFAULTS, LeaseBook, Limits, Outcome
from drl_data.plan import Unit
from drl_data.pools import (
    Answered,
    Died,
    Draining,
    Event,
    Pool,
    ProcessPool,
    Started,
    ThreadPool,
    visible_gpus,
)
from drl_data.stopping import Stop

log = logging.getLogger(__name__)

R = TypeVar("R")

POLL_S = 0.25
"""The driver looks this often whether it was told to stop; a signal does not wake it by itself."""

KILL_AFTER_S = 5.0
"""Workers that have not come back so long after the deadline of a stop are killed."""

WARN_AFTER_S = 30.0
"""With no worker ready for so long the driver says that it waits, and for what."""


@dataclass(frozen=True)
class Workers:
    """How many workers there are, and what each of them has."""

    n: int = 1
    gpus: float = 1.0
    """GPUs of one worker; fractions allowed."""
    cpus: float = 1.0


def run_local(
    make_task: Callable[[], Task[R]],
    units: Sequence[Unit],
    *,
    limits: Limits = DEFAULTS,
    stop: Stop | None = None,
) -> Generator[Outcome[R], None, None]:
    """Run every unit in threads of this process; outcomes as they come.

    Closing the iterator lets the units in flight finish and drops the rest. After a stop the
    iterator ends early: units without an outcome are pending still.

    Raises:
        DrlDataError: what `make_task` raises.
        StorageUnusableError: if storage can be of no use, whatever is tried again.
        ExecutionError: if `limits.max_failed_in_a_row` units failed one after the other.
        DeviceLostError: if the GPU's context broke, which only another process can mend.
    """
    if not units:
        return
    stop = stop or Stop()
    pool: ThreadPool[R] = ThreadPool(make_task, limits.leases, stop)
    yield from drive(pool, LeaseBook(units, limits, 1), stop)


def run_process(
    make_task: Callable[[], Task[R]],
    units: Sequence[Unit],
    *,
    workers: Workers = Workers(),
    limits: Limits = DEFAULTS,
    stop: Stop | None = None,
    grace_s: float = 20.0,
) -> Generator[Outcome[R], None, None]:
    """Run every unit in child processes of this machine, each with its share of a GPU.

    `make_task` must be importable (a function of a module, or a `partial` of one); it runs once in
    each child. A child that dies is replaced, and what it died of is found (leases.py). Children
    end with this process, whatever ends it.

    Raises:
        UserError: what `make_task` raises.
        StorageUnusableError: if storage can be of no use, whatever is tried again.
        ExecutionError: if every worker slot was given up, or too many units failed.
    """
    if not units:
        return
    pool: ProcessPool[R] = ProcessPool(
        make_task,
        limits.leases,
        gpus=visible_gpus(),
        gpus_per_worker=workers.gpus,
        cpus_per_worker=workers.cpus,
    )
    book: LeaseBook[R] = LeaseBook(units, limits, min(workers.n, len(units)))
    yield from drive(pool, book, stop or Stop(), grace_s)


def run_ray(
    make_task: Callable[[], Task[R]],
    units: Sequence[Unit],
    *,
    workers: Workers = Workers(),
    address: str | None = None,
    limits: Limits = DEFAULTS,
    stop: Stop | None = None,
    grace_s: float = 20.0,
) -> Generator[Outcome[R], None, None]:
    """Run every unit on Ray actors, each with its share of a GPU; outcomes as they come.

    As `run_process`, on the nodes of a cluster. Without GPUs in the cluster `workers.gpus` is
    ignored. Ray is started on this machine unless `address` names a cluster or one is connected
    already. Nodes may come and go: actors wait for a place, and one on a node that will be taken
    away is told so and replaced elsewhere.

    Raises:
        UserError: what `make_task` raises.
        StorageUnusableError: if storage can be of no use, whatever is tried again.
        ExecutionError: if every worker slot was given up, or too many units failed.
    """
    if not units:
        return
    import ray

    from drl_data.ray_pool import RayPool

    with connected_ray(address):
        gpus = workers.gpus if ray.cluster_resources().get("GPU", 0) else 0
        pool: RayPool[R] = RayPool(make_task, limits.leases, gpus=gpus, cpus=workers.cpus)
        book: LeaseBook[R] = LeaseBook(units, limits, min(workers.n, len(units)))
        yield from drive(pool, book, stop or Stop(), grace_s)


@contextmanager
def connected_ray(address: str | None) -> Iterator[None]:
    """Ray, started or joined if that was not done yet; what was started here ends here."""
    import ray

    if ray.is_initialized():
        yield
        return
    # Ray warns until one says which of its two behaviours for num_gpus=0 is meant.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    before = signal.getsignal(signal.SIGTERM)
    ray.init(
        address=address,
        log_to_driver=False,
        include_dashboard=False,
        logging_level=logging.WARNING,
    )
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)  # Ray's own would end the process at once
    try:
        yield
    finally:
        if address is None:
            ray.shutdown()


def drive(
    pool: Pool[R], book: LeaseBook[R], stop: Stop, grace_s: float = 20.0
) -> Generator[Outcome[R], None, None]:
    """The loop between a pool and its book, until every unit has an outcome or the run is stopped.

    Raises:
        UserError: if a worker could not make its task by a user's mistake.
        StorageUnusableError: as the book does.
        ExecutionError: as the book does.
    """
    told, patience = False, _Patience()
    try:
        while not book.done:
            if stop.requested and not told:
                told = True
                book.close()
                for worker in book.workers():
                    pool.stop(worker, stop.remaining_s)
            if told and (book.is_idle or stop.overdue_s > KILL_AFTER_S):
                break
            for slot in book.vacant():
                pool.start(book.hire(slot), slot)
            _hand_out(pool, book)
            for event in pool.wait(POLL_S):
                _tell(pool, book, event, grace_s)
                yield from book.outcomes()
            patience.look(pool, book)
    finally:
        pool.close()


def _hand_out(pool: Pool[R], book: LeaseBook[R]) -> None:
    for worker in book.workers():
        while (lease := book.take(worker)) is not None:
            pool.lease(worker, lease)
        if book.may_leave(worker):
            book.gone(worker)
            pool.kill(worker)


def _tell(pool: Pool[R], book: LeaseBook[R], event: Event[R], grace_s: float) -> None:
    """Tell the book what happened, and the pool what follows at once."""
    match event:
        case Started(worker, Made(None)):
            book.ready(worker)
        case Started(_, Made(error, True)):
            raise UserError(error)
        case Started(worker, Made(error)):  # of this machine, perhaps: another may do
            pool.kill(worker)
            book.died(worker, f"it could not start: {error}")
        case Answered(worker, _, found) if found.kind == "lost":
            pool.kill(worker)
            book.died(worker, found.message)
        case Answered(worker, lease, found):
            book.answered(worker, lease, found)
        case Died(worker, cause, charged, counts):
            book.died(worker, cause, charged=charged, counts=counts)
        case Draining(worker, told_s):
            seconds = grace_s if told_s is None else min(told_s, grace_s)
            log.warning("a worker's node will be taken away; it has %.0f s to finish", seconds)
            book.leave(worker)
            pool.stop(worker, seconds)


class _Patience:
    """Says once, and again each time it becomes true, that no worker is there to compute."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._said = False

    def look(self, pool: Pool[R], book: LeaseBook[R]) -> None:
        """Look whether a worker is ready."""
        if book.n_ready:
            if self._said:
                log.warning("a worker is ready; the run goes on")
            self._since, self._said = time.monotonic(), False
        elif not self._said and time.monotonic() - self._since > WARN_AFTER_S:
            self._said = True
            log.warning("no worker is ready; the run waits for one. There is %s", pool.state())
