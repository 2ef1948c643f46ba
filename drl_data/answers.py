"""What a worker says to a lease: a result, or an error and what follows from its kind.

Answers cross processes, so an error is text and a kind, never the exception itself, whose class may
not survive the way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

from drl_data.errors import (
    DeviceLostError,
    DrlDataError,
    HostMemoryError,
    ObjectError,
    StoppedError,
    StorageUnusableError,
    UserError,
    redacted,
)
from drl_data.plan import Lease
from drl_data.stopping import Stop

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

Kind = Literal["ok", "transient", "failed", "returned", "lost", "unusable"]
"""`transient`: may work the next time; `failed`: the same again would give the same; `returned`:
not computed, because the worker was told to stop; `lost`: the worker itself is no longer fit (its
GPU's context or its memory is gone); `unusable`: no unit can work, the run ends."""


class Task(Protocol[R_co]):
    """Computes one unit; called from several threads at once."""

    def __call__(self, lease: Lease, stop: Stop) -> R_co:
        """Compute what the lease names, unless told to stop."""


@dataclass(frozen=True)
class Answer(Generic[R]):
    """What became of one lease."""

    kind: Kind
    result: R | None = None
    message: str = ""
    is_device: bool = False
    """Of a worker that is lost: whether its GPU is, and not its memory."""


@dataclass(frozen=True)
class Made:
    """Whether a worker could make its task: the error that kept it, or None."""

    error: str | None = None
    is_users_mistake: bool = False


def answer(task: Task[R], lease: Lease, stop: Stop) -> Answer[R]:
    """Compute a lease; whatever goes wrong becomes an answer."""
    try:
        stop.check_begin()
        return Answer("ok", task(lease, stop))
    except Exception as error:
        return Answer(kind_of(error), None, describe(error), isinstance(error, DeviceLostError))


def make(make_task: Callable[[], Task[R]]) -> tuple[Task[R] | None, Made]:
    """Make a task; whatever goes wrong is told."""
    try:
        return make_task(), Made()
    except Exception as error:
        return None, Made(describe(error), isinstance(error, UserError))


def kind_of(error: Exception) -> Kind:
    """What follows from an error of a task."""
    if isinstance(error, StoppedError):
        return "returned"
    if isinstance(error, StorageUnusableError):
        return "unusable"
    if isinstance(error, DeviceLostError) or _is_out_of_memory(error):
        return "lost"
    if isinstance(error, ObjectError | OSError) and not isinstance(error, UserError):
        return "transient"
    return "failed"


def describe(error: BaseException) -> str:
    """One line for a receipt or a table; our own errors speak for themselves."""
    if _is_out_of_memory(error):
        return "out of memory"
    text = str(error).strip() or repr(error)
    return text if isinstance(error, DrlDataError) else redacted(f"{type(error).__name__}: {text}")


def _is_out_of_memory(error: BaseException) -> bool:
    """Of the host: ours, Python's, or that of PyTorch's allocator, which has no class."""
    return isinstance(error, MemoryError | HostMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate" in str(error)
    )
