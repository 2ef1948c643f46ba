"""A worker in a process of its own: the handle for who started it, and what runs in the child.

The child is a plain `python -c`, told over a socket what to do, so that it starts the same from a
script, a notebook or a Ray actor, and never runs the parent's main module again. It ends when the
socket does: whatever ends its parent, `kill -9` too, leaves no child computing for nobody.

    parent -> child    what makes the task; leases; the wish to stop
    child -> parent    `Made`; (lease, `Answer`) for each lease
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Generic, TypeVar

from drl_data.answers import Answer, Made, Task, answer, make
from drl_data.errors import UserError
from drl_data.plan import Lease
from drl_data.stopping import Stop

R = TypeVar("R")

_CHILD = "from drl_data.worker_process import main; main()"
_FD = "DRL_WORKER_FD"


def packed(make_task: Callable[[], Task[R]]) -> bytes:
    """What makes the task, for the way to a child, which must be able to import it.

    Raises:
        UserError: if it is defined in the script that runs, which children do not import.
    """
    data = bytes(ForkingPickler.dumps(make_task))
    if b"__main__" in data:
        raise UserError(
            f"{make_task!r} is defined in the script that runs, which child processes and actors "
            "do not import; move it to a module"
        )
    return data


class WorkerProcess(Generic[R]):
    """A child process with its task; it ends with `kill`, or when this process does."""

    def __init__(self, task: bytes, leases: int, environment: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
            given = {"PYTHONPATH": path, _FD: str(theirs.fileno()), **environment}
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _CHILD],
                env={**os.environ, **given},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self.connection = Connection(ours.detach())
        self._send_lock = threading.Lock()
        self._send((task, leases))

    @property
    def pid(self) -> int:
        """Of the child."""
        return self._process.pid

    def lease(self, lease: Lease) -> None:
        """Ask for a unit."""
        self._send(lease)

    def stop(self, grace_s: float) -> None:
        """Ask for the end: what computes has `grace_s` seconds more."""
        self._send(grace_s)

    def receive(self) -> Made | tuple[Lease, Answer[R]] | None:
        """The next thing that the child says; None when it has died."""
        try:
            said: Made | tuple[Lease, Answer[R]] = self.connection.recv()
        except (EOFError, OSError):
            return None
        return said

    def kill(self) -> None:
        """End the child at once; nothing is left of it afterwards."""
        self._process.kill()
        self._process.wait()
        self.connection.close()

    def cause_of_death(self) -> str:
        """Why a child ended that has died by itself."""
        return exit_cause(self._process.wait())

    def _send(self, message: object) -> None:
        try:
            with self._send_lock:
                self.connection.send(message)
        except OSError:
            return  # it died; `receive` will say so


def exit_cause(status: int) -> str:
    """What ended a process, from its exit status: the same words for the same fault."""
    if status >= 0:
        return f"exit status {status}"
    name = signal.Signals(-status).name
    return f"{name}, probably out of memory" if -status == signal.SIGKILL else name


def main() -> None:
    """What the child does, from its start to its end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent hears them too, and says what to do
    connection = Connection(int(os.environ.pop(_FD)))
    with contextlib.suppress(EOFError, OSError):  # the parent has gone
        _serve(connection)
    os._exit(0)  # whatever its threads are at


def _serve(connection: Connection) -> None:
    """Make the task and compute leases until the parent closes the connection.

    The task is made beside the reading thread, so that a parent that dies meanwhile is noticed.

    Raises:
        EOFError: once the parent has gone.
    """
    packed_task, leases = connection.recv()
    stop, send_lock = Stop(), threading.Lock()
    made: list[Task[object]] = []

    def say(message: object) -> None:
        with send_lock:
            connection.send(message)

    def unpacked() -> Task[object]:
        make_task: Callable[[], Task[object]] = ForkingPickler.loads(packed_task)
        return make_task()

    def begin() -> None:
        task, told = make(unpacked)
        if task is not None:
            made.append(task)
        say(told)

    def compute(lease: Lease) -> None:
        say((lease, answer(made[0], lease, stop)))

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException:  # the parent has gone, or something that no answer can hold
            os._exit(1)

    threads = ThreadPoolExecutor(leases, "drl-unit")
    threads.submit(guarded, begin)
    while True:
        message = connection.recv()
        if isinstance(message, Lease):
            threads.submit(guarded, partial(compute, message))
        else:
            stop.request(message)
