"""Where workers live: threads of this process, child processes, or (ray_pool.py) actors.

A pool starts workers, hands them leases, and says what happens to them. It decides nothing: that is
leases.py.
"""

from __future__ import annotations

import math
import os
import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Generic, Protocol, TypeVar

from drl_data.answers import Answer, Made, Task, answer
from drl_data.errors import DeviceLostError
from drl_data.plan import Lease
from drl_data.stopping import Stop
from drl_data.worker_process import WorkerProcess, packed

R = TypeVar("R")


@dataclass(frozen=True)
class Started:
    """A worker has made its task, or could not."""

    worker: int
    made: Made


@dataclass(frozen=True)
class Answered(Generic[R]):
    """A lease came back."""

    worker: int
    lease: Lease
    answer: Answer[R]


@dataclass(frozen=True)
class Died:
    """A worker is gone."""

    worker: int
    cause: str
    charged: bool = True
    """Perhaps for what it held; not where its node was taken away with a notice."""
    counts: bool = True
    """Against its slot; not where its node has died."""


@dataclass(frozen=True)
class Draining:
    """A worker's node will be taken away in `grace_s` seconds, or when it must (None)."""

    worker: int
    grace_s: float | None = None


Event = Started | Answered[R] | Died | Draining


class Pool(Protocol[R]):
    """Workers by number; every worker that is started is killed in the end, or dies."""

    def start(self, worker: int, slot: int) -> None:
        """Begin to start a worker; `Started` or `Died` follows."""

    def lease(self, worker: int, lease: Lease) -> None:
        """Ask a worker for a unit; `Answered` or `Died` follows."""

    def stop(self, worker: int, grace_s: float) -> None:
        """Tell a worker that it must end: its leases come back within `grace_s` seconds."""

    def kill(self, worker: int) -> None:
        """End a worker now; nothing more is heard of it."""

    def wait(self, timeout_s: float) -> list[Event[R]]:
        """What happened, as soon as something does, or nothing after `timeout_s` seconds."""

    def state(self) -> str:
        """What there is to run workers on, for a message that nothing runs."""

    def close(self) -> None:
        """End every worker."""


class ThreadPool(Generic[R]):
    """One worker, in threads of this process: what kills it kills the run."""

    def __init__(self, make_task: Callable[[], Task[R]], leases: int, stop: Stop) -> None:
        self._make_task = make_task
        self._stop = stop
        self._threads = ThreadPoolExecutor(leases, thread_name_prefix="drl-unit")
        self._events: queue.SimpleQueue[Event[R] | BaseException] = queue.SimpleQueue()

    def start(self, worker: int, slot: int) -> None:
        """Make the task, in this thread; its errors are raised as they are."""
        self._task = self._make_task()
        self._events.put(Started(worker, Made()))

    def lease(self, worker: int, lease: Lease) -> None:
        """Compute it in a thread."""
        self._threads.submit(self._compute, worker, lease)

    def _compute(self, worker: int, lease: Lease) -> None:
        try:
            found = answer(self._task, lease, self._stop)
        except BaseException as error:  # what must not pass for an answer: the driver raises it
            self._events.put(error)
            return
        self._events.put(Answered(worker, lease, found))

    def stop(self, worker: int, grace_s: float) -> None:
        """Its threads know already: they share the driver's `Stop`."""

    def kill(self, worker: int) -> None:
        """Threads cannot be killed; those that still compute end with the process."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def wait(self, timeout_s: float) -> list[Event[R]]:
        """The next event, if one comes in time."""
        try:
            event = self._events.get(timeout=timeout_s)
        except queue.Empty:
            return []
        if isinstance(event, BaseException):
            raise event
        if isinstance(event, Answered) and event.answer.kind == "lost":
            if event.answer.is_device:
                raise DeviceLostError(
                    f"{event.answer.message}; this process cannot use the GPU again. Run the same "
                    "command again, or with `--executor process`, which replaces the worker"
                )
            event = Answered(
                event.worker, event.lease, Answer("failed", None, event.answer.message)
            )
        return [event]

    def state(self) -> str:
        """This process."""
        return "this process"

    def close(self) -> None:
        """Let the units in flight finish, and drop the rest."""
        self._threads.shutdown(wait=not self._stop.requested, cancel_futures=True)


class ProcessPool(Generic[R]):
    """Child processes of this machine; GPUs are dealt out to slots in turn."""

    def __init__(
        self,
        make_task: Callable[[], Task[R]],
        leases: int,
        *,
        gpus: list[str],
        gpus_per_worker: float,
        cpus_per_worker: float,
    ) -> None:
        self._task = packed(make_task)
        self._leases = leases
        self._gpus = gpus
        self._gpus_per_worker = gpus_per_worker
        self._threads = str(max(int(cpus_per_worker), 1))
        self._workers: dict[int, WorkerProcess[R]] = {}

    def start(self, worker: int, slot: int) -> None:
        """Start a child that sees its GPUs alone."""
        environment = {"OMP_NUM_THREADS": self._threads}
        if self._gpus:
            share = gpus_of_slot(slot, self._gpus, self._gpus_per_worker)
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(share)
        self._workers[worker] = WorkerProcess(self._task, self._leases, environment)

    def lease(self, worker: int, lease: Lease) -> None:
        """Send it to the child."""
        self._workers[worker].lease(lease)

    def stop(self, worker: int, grace_s: float) -> None:
        """Tell the child."""
        self._workers[worker].stop(grace_s)

    def kill(self, worker: int) -> None:
        """Kill the child."""
        self._workers.pop(worker).kill()

    def wait(self, timeout_s: float) -> list[Event[R]]:
        """One thing that each child said that said something."""
        speakers = {process.connection: worker for worker, process in self._workers.items()}
        events: list[Event[R]] = []
        for connection in wait(list(speakers), timeout_s):
            worker = speakers[connection]  # type: ignore[index]
            said = self._workers[worker].receive()
            if said is None:
                process = self._workers.pop(worker)
                events.append(Died(worker, process.cause_of_death()))
                process.kill()
            elif isinstance(said, Made):
                events.append(Started(worker, said))
            else:
                events.append(Answered(worker, *said))
        return events

    def state(self) -> str:
        """This machine."""
        gpus = f"GPUs {', '.join(self._gpus)}" if self._gpus else "no GPU"
        return f"{len(self._workers)} child processes, {gpus}"

    def close(self) -> None:
        """Kill every child."""
        for worker in list(self._workers):
            self.kill(worker)


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        return [name for name in told.split(",") if name.strip() not in ("", "-1")]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def gpus_of_slot(slot: int, gpus: list[str], each: float) -> list[str]:
    """The GPUs of one worker slot: whole ones in turn, or a share of one for several slots.

    0.5 each: slots 0 and 1 have the first GPU. More slots than GPUs: they begin again. 0: none.
    """
    first = int(slot * each + 1e-9)
    return [gpus[(first + i) % len(gpus)] for i in range(min(math.ceil(each), len(gpus)))]
