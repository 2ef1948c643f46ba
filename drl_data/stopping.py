"""The wish that a run ends: no unit begins after it, those that compute have until a deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from drl_data.errors import StoppedError


class Stop:
    """Told once, asked often, from any thread of one process."""

    def __init__(self) -> None:
        self._requested = threading.Event()
        self._deadline = float("inf")
        self._n_heeding = 0

    def request(self, grace_s: float) -> None:
        """Ask for the end: what computes has `grace_s` seconds more; the earliest wish counts."""
        self._deadline = min(self._deadline, time.monotonic() + grace_s)
        self._requested.set()

    @property
    def requested(self) -> bool:
        """Whether nothing new may begin."""
        return self._requested.is_set()

    @property
    def remaining_s(self) -> float:
        """Seconds until the deadline; infinite before the wish, 0 after the deadline."""
        return max(self._deadline - time.monotonic(), 0.0)

    @property
    def overdue_s(self) -> float:
        """Seconds since the deadline; negative before it."""
        return time.monotonic() - self._deadline

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """In here somebody looks at the wish; outside, who wants the end must end it himself."""
        self._n_heeding += 1
        try:
            yield
        finally:
            self._n_heeding -= 1

    @property
    def is_heeded(self) -> bool:
        """Whether somebody looks at the wish now."""
        return self._n_heeding > 0

    def check_begin(self) -> None:
        """Raise `StoppedError` once the end is asked for."""
        if self.requested:
            raise StoppedError("the run was told to stop before the unit began")

    def check(self) -> None:
        """Raise `StoppedError` once the deadline has passed."""
        if self.remaining_s == 0:
            raise StoppedError("the run was told to stop, and the time to finish the unit is over")
