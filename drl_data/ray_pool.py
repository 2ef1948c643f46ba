"""Workers on a Ray cluster: an actor for each, which only minds a child process that computes.

The child is the same as on one machine (worker_process.py), so what it died of is known exactly
(Ray says of any crash that a connection ended), and a store lists the same reasons whichever
executor made it. Ray places the actor and its GPUs; features never travel through Ray's object
store.

Ray's own retries are off (`max_restarts=0, max_task_retries=0`): the book decides.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayError

from drl_data.answers import Answer, Made, Task
from drl_data.plan import Lease
from drl_data.pools import Answered, Died, Draining, Event, Started
from drl_data.worker_process import WorkerProcess, packed

log = logging.getLogger(__name__)

R = TypeVar("R")

NOTICE_EVERY_S = 2.0
"""The driver looks this often for nodes that will be taken away."""


class _Minder(Generic[R]):
    """The actor: starts the child, passes leases on, and says what the child died of."""

    def __init__(self, task: bytes, leases: int) -> None:
        self._child: WorkerProcess[R] = WorkerProcess(task, leases, {})
        self._made: queue.SimpleQueue[Made | str] = queue.SimpleQueue()
        self._waiting: dict[Lease, queue.SimpleQueue[Answer[R] | str]] = {}
        self._lock = threading.Lock()
        self._death: str | None = None
        threading.Thread(target=self._listen, name="drl-listen", daemon=True).start()

    def _listen(self) -> None:
        while (said := self._child.receive()) is not None:
            if isinstance(said, Made):
                self._made.put(said)
                continue
            lease, found = said
            with self._lock:
                self._waiting.pop(lease).put(found)
        with self._lock:
            self._death = self._child.cause_of_death()
            for waiting in self._waiting.values():
                waiting.put(self._death)
        self._made.put(self._death)

    def ready(self) -> tuple[str, Made | str]:
        """(node, whether the task was made, or what the child died of)."""
        return ray.get_runtime_context().get_node_id(), self._made.get()

    def compute(self, lease: Lease) -> Answer[R] | str:
        """The answer, or what the child died of."""
        answer: queue.SimpleQueue[Answer[R] | str] = queue.SimpleQueue()
        with self._lock:
            if self._death is not None:
                return self._death
            self._waiting[lease] = answer
        self._child.lease(lease)
        return answer.get()

    @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]
    def stop(self, grace_s: float) -> None:
        """Pass the wish on, while units compute."""
        self._child.stop(grace_s)


@dataclass
class _Actor:
    """An actor, the calls that are out, and where it is once that is known."""

    handle: ray.actor.ActorHandle
    calls: dict[ray.ObjectRef, Lease | None] = field(default_factory=dict)
    node: str | None = None
    is_warned: bool = False


class RayPool(Generic[R]):
    """Actors of the Ray that this process is connected to; they wait where there is no place."""

    def __init__(
        self, make_task: Callable[[], Task[R]], leases: int, *, gpus: float, cpus: float
    ) -> None:
        self._make = (packed(make_task), leases)
        self._remote = ray.remote(concurrency_groups={"control": 1})(_Minder).options(
            num_cpus=cpus,
            num_gpus=gpus,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=leases + 1,
        )
        self._actors: dict[int, _Actor] = {}
        self._next_notice_s = 0.0

    def start(self, worker: int, slot: int) -> None:
        """Ask Ray for an actor; it may wait for a place for ever."""
        actor = _Actor(self._remote.remote(*self._make))
        actor.calls[actor.handle.ready.remote()] = None
        self._actors[worker] = actor

    def lease(self, worker: int, lease: Lease) -> None:
        """Call the actor."""
        actor = self._actors[worker]
        actor.calls[actor.handle.compute.remote(lease)] = lease

    def stop(self, worker: int, grace_s: float) -> None:
        """Tell the actor; whether it heard shows in what comes back."""
        actor = self._actors[worker]
        if actor.node is not None:
            actor.handle.stop.remote(grace_s)

    def kill(self, worker: int) -> None:
        """Kill the actor, and the child with it."""
        ray.kill(self._actors.pop(worker).handle)

    def wait(self, timeout_s: float) -> list[Event[R]]:
        """What the calls brought that have come back, and notices of nodes."""
        owners = {ref: worker for worker, actor in self._actors.items() for ref in actor.calls}
        done: list[ray.ObjectRef] = []
        if owners:
            done, _ = ray.wait(list(owners), num_returns=len(owners), timeout=0)
            if not done:
                done, _ = ray.wait(list(owners), num_returns=1, timeout=timeout_s)
        else:
            time.sleep(timeout_s)
        events: list[Event[R]] = []
        for ref in done:
            if owners[ref] in self._actors:  # not of an actor whose death was told just now
                events.append(self._said(owners[ref], ref))
        return events + self._notices()

    def _said(self, worker: int, ref: ray.ObjectRef) -> Event[R]:
        """What one call brought; the actor is gone if that is bad news."""
        actor = self._actors[worker]
        lease = actor.calls.pop(ref)
        try:
            value = ray.get(ref)
        except RayError as error:
            return self._lost(worker, error)
        if lease is None:
            actor.node, value = value
        if isinstance(value, str):
            self.kill(worker)
            return Died(worker, value)
        return Started(worker, value) if lease is None else Answered(worker, lease, value)

    def _lost(self, worker: int, error: RayError) -> Died:
        """An actor failed, or cannot be reached: then it may compute still, and is killed."""
        actor = self._actors[worker]
        self.kill(worker)
        preempted = isinstance(error, RayActorError) and error.preempted
        announced = preempted or actor.is_warned
        return Died(worker, _cause(error), not announced, counts=not _is_of_node(error))

    def _notices(self) -> list[Event[R]]:
        """Workers on nodes that will be taken away, each once."""
        now = time.monotonic()
        if now < self._next_notice_s:
            return []
        self._next_notice_s = now + NOTICE_EVERY_S
        # Ray 2.60 has no public name for this; its own Train and Data read it here.
        draining: dict[str, int] = ray._private.state.state.get_draining_nodes()
        events: list[Event[R]] = []
        for worker, actor in self._actors.items():
            if actor.node in draining and not actor.is_warned:
                actor.is_warned = True
                deadline_ms = draining[actor.node]
                left_s = deadline_ms / 1000 - time.time() if deadline_ms else None
                events.append(Draining(worker, left_s if left_s is None else max(left_s, 0.0)))
        return events

    def state(self) -> str:
        """Nodes and what they have."""
        nodes = sum(bool(node["Alive"]) for node in ray.nodes())
        total, free = ray.cluster_resources(), ray.available_resources()
        counts = ", ".join(
            f"{free.get(name, 0):g} of {total.get(name, 0):g} {name}s free"
            for name in ("CPU", "GPU")
        )
        return f"a cluster of {nodes} nodes, {counts}; {len(self._actors)} actors wait"

    def close(self) -> None:
        """Kill every actor."""
        for worker in list(self._actors):
            self.kill(worker)


def _cause(error: RayError) -> str:
    """What became of an actor, in words that are the same each time."""
    text = str(error)
    if isinstance(error, OutOfMemoryError) or "memory monitor" in text or "OOM killer to" in text:
        return "out of memory, by Ray's memory monitor"
    if _is_of_node(error):
        return "its node died"
    return f"its actor was lost ({type(error).__name__})"


def _is_of_node(error: RayError) -> bool:
    """Whether a node has died, which Ray says in one of two ways."""
    return isinstance(error, NodeDiedError) or "its node has died" in str(error)
