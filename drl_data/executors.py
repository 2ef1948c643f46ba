"""Units to workers: in this process, or on Ray actors pinned to GPUs. Same signature, same result.

An executor takes a callable that makes a task and never a spec. The driver owns the queue: a unit
is leased to a worker, comes back as an `Outcome`, and is tried again if its worker died or storage
failed. State is in the receipts, so a driver that dies loses nothing.

Ray's own retries are off (`max_restarts=0, max_task_retries=0`): the driver decides. Results are a
few hundred bytes; features never travel through Ray's object store.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from drl_data.errors import (
    DrlDataError,
    ExecutionError,
    HostMemoryError,
    ObjectError,
    UserError,
)
from drl_data.plan import Lease, Unit
from drl_data.stopping import Stop

if TYPE_CHECKING:
    import ray

log = logging.getLogger(__name__)

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

MAX_DEATHS_PER_WORKER = 4
"""Deaths in a row of one worker slot before it is given up; more than the attempts of a unit, so
that one bad unit does not take a worker with it."""


class Task(Protocol[R_co]):
    """Computes one unit; called from several threads at once."""

    def __call__(self, lease: Lease, stop: Stop) -> R_co:
        """Compute what the lease names, unless told to stop."""


@dataclass(frozen=True)
class Outcome(Generic[R]):
    """What became of a unit: a result, or the error that is left after the last attempt."""

    unit: Unit
    result: R | None
    error: str | None
    attempts: int


def _is_transient(error: BaseException) -> bool:
    """Storage may work the next time, and memory be free; the same input gives the same error
    every time."""
    return isinstance(error, ObjectError | OSError | HostMemoryError) and not isinstance(
        error, UserError
    )


def run_local(
    make_task: Callable[[], Task[R]],
    units: Sequence[Unit],
    *,
    leases: int = 3,
    max_attempts: int = 3,
    stop: Stop | None = None,
) -> Iterator[Outcome[R]]:
    """Run every unit in this process, `leases` at a time in threads; outcomes as they come.

    Closing the iterator lets the units in flight finish and drops the rest.

    Raises:
        DrlDataError: what `make_task` raises.
    """
    if not units:
        return
    task, stop = make_task(), stop or Stop()
    queue = deque((unit, 1) for unit in units)
    running: dict[Future[R], tuple[Unit, int]] = {}
    with ThreadPoolExecutor(leases, thread_name_prefix="drl-unit") as pool:
        while queue or running:
            while queue and len(running) < leases:
                unit, attempt = queue.popleft()
                running[pool.submit(task, Lease(unit, attempt), stop)] = (unit, attempt)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                unit, attempt = running.pop(future)
                error = future.exception()
                if error is None:
                    yield Outcome(unit, future.result(), None, attempt)
                elif not isinstance(error, Exception):
                    raise error
                elif _is_transient(error) and attempt < max_attempts:
                    log.warning("unit %d, attempt %d: %s", unit.id, attempt, error)
                    queue.append((unit, attempt + 1))
                else:
                    yield Outcome(unit, None, describe(error), attempt)


def run_ray(
    make_task: Callable[[], Task[R]],
    units: Sequence[Unit],
    *,
    workers: int = 1,
    gpus_per_worker: float = 1.0,
    cpus_per_worker: float = 1.0,
    address: str | None = None,
    leases: int = 3,
    max_attempts: int = 3,
) -> Iterator[Outcome[R]]:
    """Run every unit on Ray actors, each with its share of a GPU; outcomes as they come.

    `make_task` runs once in each actor, so weights load once. Without GPUs in the cluster
    `gpus_per_worker` is ignored. Ray is started on this machine unless `address` names a cluster
    or one is connected already.

    Raises:
        DrlDataError: what `make_task` raises.
        ExecutionError: if every worker slot was given up.
    """
    if not units:
        return
    import ray

    started = False
    if not ray.is_initialized():
        # Ray warns until one says which of its two behaviours for num_gpus=0 is meant.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray.init(
            address=address,
            log_to_driver=False,
            include_dashboard=False,
            logging_level=logging.WARNING,
        )
        started = address is None
    gpus = gpus_per_worker if ray.cluster_resources().get("GPU", 0) else 0
    actor = ray.remote(_Worker).options(
        num_cpus=cpus_per_worker,
        num_gpus=gpus,
        max_restarts=0,
        max_task_retries=0,
        max_concurrency=leases + 1,
    )
    driver: _RayDriver[R] = _RayDriver(
        make_actor=lambda: actor.remote(make_task),
        queue=deque((unit, 1) for unit in units),
        leases=leases,
        max_attempts=max_attempts,
    )
    try:
        yield from driver.run(min(workers, len(units)))
    finally:
        driver.close()
        if started:
            ray.shutdown()


class _Worker(Generic[R]):
    """The actor: makes its task once, then computes units in threads."""

    def __init__(self, make_task: Callable[[], Task[R]]) -> None:
        self._task: Task[R] | None = None
        self._error: tuple[str, bool] | None = None
        self._stop = Stop()
        try:
            self._task = make_task()
        except Exception as error:
            self._error = describe(error), isinstance(error, UserError)

    def ready(self) -> tuple[str, bool] | None:
        """What kept the task from being made, and whether it is the user's mistake; or None."""
        return self._error

    def compute(self, unit: Unit, attempt: int) -> tuple[R | None, str | None, bool]:
        """(result, error, whether it may work the next time)."""
        assert self._task is not None
        try:
            return self._task(Lease(unit, attempt), self._stop), None, False
        except Exception as error:
            return None, describe(error), _is_transient(error)


@dataclass
class _Slot:
    """One worker slot of the pool: its actor now, and how often it died in a row."""

    actor: ray.actor.ActorHandle
    deaths: int = 0
    ready: bool = False


@dataclass
class _RayDriver(Generic[R]):
    """The queue of units and the leases on it."""

    make_actor: Callable[[], ray.actor.ActorHandle]
    queue: deque[tuple[Unit, int]]
    leases: int
    max_attempts: int
    slots: list[_Slot] = field(default_factory=list)
    pending: dict[ray.ObjectRef, tuple[_Slot, tuple[Unit, int] | None]] = field(
        default_factory=dict
    )
    last_death: str = ""

    def run(self, workers: int) -> Iterator[Outcome[R]]:
        import ray

        for _ in range(workers):
            self._start(_Slot(self.make_actor()))
        while self.pending:
            done, _ = ray.wait(list(self.pending), num_returns=1)
            for ref in done:
                yield from self._settle(ref)
            for slot in self.slots:
                self._lease(slot)
        if self.queue:
            raise ExecutionError(
                f"{len(self.queue)} units left and no worker: each died "
                f"{MAX_DEATHS_PER_WORKER} times in a row; the last death: {self.last_death}"
            )

    def _start(self, slot: _Slot) -> None:
        self.slots.append(slot)
        self.pending[slot.actor.ready.remote()] = (slot, None)

    def _lease(self, slot: _Slot) -> None:
        held = sum(1 for owner, _ in self.pending.values() if owner is slot)
        while slot.ready and self.queue and held < self.leases:
            unit, attempt = self.queue.popleft()
            ref = slot.actor.compute.remote(unit, attempt)
            self.pending[ref] = (slot, (unit, attempt))
            held += 1

    def _settle(self, ref: ray.ObjectRef) -> Iterator[Outcome[R]]:
        import ray
        from ray.exceptions import RayError

        if ref not in self.pending:
            return  # a lease of an actor whose death was settled already
        slot, lease = self.pending.pop(ref)
        try:
            value = ray.get(ref)
        except RayError as error:
            yield from self._bury(slot, lease, _first_line(error), error)
            return
        if lease is None:
            if value is None:
                slot.ready = True
            elif value[1]:
                raise UserError(value[0])
            else:  # of this machine, perhaps: another actor may start elsewhere
                ray.kill(slot.actor)
                yield from self._bury(slot, None, value[0])
            return
        slot.deaths = 0
        unit, attempt = lease
        result, message, transient = value
        if message is None:
            yield Outcome(unit, result, None, attempt)
        elif transient and attempt < self.max_attempts:
            log.warning("unit %d, attempt %d: %s", unit.id, attempt, message)
            self.queue.append((unit, attempt + 1))
        else:
            yield Outcome(unit, None, message, attempt)

    def _bury(
        self,
        slot: _Slot,
        lease: tuple[Unit, int] | None,
        cause: str,
        error: Exception | None = None,
    ) -> Iterator[Outcome[R]]:
        """An actor is gone: its leases go back to the queue, and its slot gets another actor.

        Each of its leases is charged an attempt, unless the node was preempted; which of them
        killed it is not known.
        """
        preempted = bool(getattr(error, "preempted", False))
        self.last_death = cause
        refs = [ref for ref, (owner, _) in self.pending.items() if owner is slot]
        leases = [lease, *(self.pending.pop(ref)[1] for ref in refs)]
        self.slots.remove(slot)
        log.warning(
            "a worker died (%s); %d leases return", cause, sum(x is not None for x in leases)
        )
        for held in leases:
            if held is None:
                continue
            unit, attempt = held
            if preempted:
                self.queue.appendleft((unit, attempt))
            elif attempt < self.max_attempts:
                self.queue.append((unit, attempt + 1))
            else:
                yield Outcome(unit, None, f"its worker died: {cause}", attempt)
        deaths = slot.deaths + (0 if preempted else 1)
        if deaths < MAX_DEATHS_PER_WORKER:
            self._start(_Slot(self.make_actor(), deaths))

    def close(self) -> None:
        """End every actor."""
        import ray

        for slot in self.slots:
            ray.kill(slot.actor)


def describe(error: BaseException) -> str:
    """One line for a receipt or a table; our own errors speak for themselves."""
    text = str(error).strip() or repr(error)
    return text if isinstance(error, DrlDataError) else f"{type(error).__name__}: {text}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)
