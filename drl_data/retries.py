"""Requests to object storage, made again when they fail: bounded, with backoff, and counted.

There is one layer of retries, this one; those of the libraries below are turned off where they can
be. Only `TransientError` is tried again. What is missing, refused, or broken for good is not.

    DRL_STORAGE_ATTEMPTS    how often a request is made before it fails (8)

Between attempts passes a random part of a time that doubles (exponential backoff, full jitter:
https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/): with eight attempts 16
seconds on average, which outlives the restart of a gateway. Above this layer executors try a whole
unit again. How often and how long is a matter of the machine and its network, not of a run, so the
environment says it, as it says where the storage is; Ray's workers need it in theirs.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from drl_data.errors import ObjectNotFoundError, TransientError, UserError

if TYPE_CHECKING:
    from pathlib import Path

    from drl_data.folders import Buffer, Folder, ObjectInfo

log = logging.getLogger(__name__)

T = TypeVar("T")


class RetryCount:
    """Requests that were made again, counted from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._value = 0

    def add(self) -> None:
        """One more."""
        with self._lock:
            self._value += 1

    @property
    def value(self) -> int:
        """How many there were so far."""
        return self._value


@dataclass(frozen=True)
class RetryPolicy:
    """How often a request is made, and what passes in between, in seconds."""

    attempts: int = 8
    base_s: float = 0.25
    """Largest pause after the first failure; doubles with each further one."""
    cap_s: float = 20.0
    """Largest pause of all."""
    deadline_s: float = 300.0
    """No attempt begins so long after the first one, so the whole is bounded by this and the
    time-out of one request."""

    @classmethod
    def from_environment(cls) -> RetryPolicy:
        """The defaults, with the attempts that the environment asks for.

        Raises:
            UserError: that is not a positive number.
        """
        text = os.environ.get("DRL_STORAGE_ATTEMPTS", str(cls.attempts))
        if not text.isdecimal() or int(text) < 1:
            raise UserError(f"DRL_STORAGE_ATTEMPTS is {text!r}; want a number of at least 1")
        return cls(attempts=int(text))

    def pause_s(self, failures: int, chance: float) -> float:
        """Seconds to wait after so many failures; `chance` is uniform in 0..1."""
        return chance * min(self.cap_s, self.base_s * 2.0 ** (failures - 1))


class RetryingFolder:
    """A folder whose requests are made again after `TransientError`; pickles without its count.

    `sleep`, `chance` (uniform in 0..1) and `clock` are for tests.
    """

    def __init__(
        self,
        inner: Folder,
        policy: RetryPolicy | None = None,
        count: RetryCount | None = None,
        *,
        sleep: Callable[[float], None] = time.sleep,
        chance: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.inner = inner
        self.url = inner.url
        self.policy = policy or RetryPolicy.from_environment()
        self.count = count or RetryCount()
        self._sleep, self._chance, self._clock = sleep, chance, clock

    def __reduce__(self) -> tuple[Callable[[Folder, RetryPolicy], Folder], tuple[object, ...]]:
        return RetryingFolder, (self.inner, self.policy)

    def counted(self, count: RetryCount) -> RetryingFolder:
        """The same folder, over the same connections, that counts its retries in `count`."""
        return RetryingFolder(
            self.inner,
            self.policy,
            count,
            sleep=self._sleep,
            chance=self._chance,
            clock=self._clock,
        )

    def get(self, path: str) -> memoryview:
        return self._again(lambda: self.inner.get(path))

    def get_range(self, path: str, start: int, stop: int) -> memoryview:
        return self._again(lambda: self.inner.get_range(path, start, stop))

    def put(self, path: str, parts: Sequence[Buffer]) -> None:
        self._again(lambda: self.inner.put(path, parts))

    def put_if_absent(self, path: str, parts: Sequence[Buffer]) -> bool:
        """As the folder's own, also where an answer was lost.

        An attempt whose answer did not come may have written the object, and the next one then
        finds it there. So after a failure an object with these very bytes counts as written by this
        call. Another writer of equal bytes cannot be told apart, and does no harm.
        """
        unsure = False

        def attempt() -> bool:
            nonlocal unsure
            try:
                created = self.inner.put_if_absent(path, parts)
            except TransientError:
                unsure = True
                raise
            return created or (unsure and self._holds(path, parts))

        return self._again(attempt)

    def _holds(self, path: str, parts: Sequence[Buffer]) -> bool:
        try:
            return _equal(self.inner.get(path), parts)
        except ObjectNotFoundError as error:
            raise TransientError(
                f"{self.url}/{path}: there when it was written, gone when it was read"
            ) from error

    def head(self, path: str) -> ObjectInfo:
        return self._again(lambda: self.inner.head(path))

    def list(self, prefix: str = "", after: str = "") -> Iterator[ObjectInfo]:
        """As the folder's own; a listing that breaks off goes on behind the last name that came."""
        failures = _Failures(self)
        while True:
            try:
                for info in self.inner.list(prefix, after):
                    after, failures = info.path, _Failures(self)
                    yield info
                return
            except TransientError as error:
                failures.add(error)

    def delete(self, path: str) -> None:
        self._again(lambda: self.inner.delete(path))

    def copy(self, path: str, to: str) -> bool:
        return self._again(lambda: self.inner.copy(path, to))

    def local_path(self, path: str) -> Path | None:
        return self.inner.local_path(path)

    def _again(self, request: Callable[[], T]) -> T:
        failures = _Failures(self)
        while True:
            try:
                return request()
            except TransientError as error:
                failures.add(error)


class _Failures:
    """The failures of one request so far."""

    def __init__(self, folder: RetryingFolder) -> None:
        self._folder, self._n, self._start = folder, 0, folder._clock()

    def add(self, error: TransientError) -> None:
        """Wait before the next attempt, or raise if there is none."""
        folder, policy = self._folder, self._folder.policy
        self._n += 1
        pause_s = policy.pause_s(self._n, folder._chance())
        passed_s = folder._clock() - self._start
        if self._n >= policy.attempts or passed_s + pause_s > policy.deadline_s:
            raise TransientError(
                f"{error}; tried {self._n} times in {passed_s:.0f} s. Run the same command again "
                "when the storage answers"
            ) from error
        log.info("%s; attempt %d of %d failed", error, self._n, policy.attempts)
        folder.count.add()
        folder._sleep(pause_s)


def counted(folder: Folder, count: RetryCount) -> Folder:
    """The folder, counting its retries in `count` where it makes any."""
    return folder.counted(count) if isinstance(folder, RetryingFolder) else folder


def _equal(data: memoryview, parts: Sequence[Buffer]) -> bool:
    at = 0
    for part in parts:
        view = memoryview(part).cast("B")
        if data[at : at + len(view)] != view:
            return False
        at += len(view)
    return at == len(data)
