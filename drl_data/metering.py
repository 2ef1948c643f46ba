"""What is measured and bounded while units are computed: seconds of each stage, bytes in flight."""

from __future__ import annotations

import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from drl_data.retries import RetryCount

T = TypeVar("T")

ASK_S = 0.2
"""How often who waits asks whether waiting still has a point."""


def nothing() -> None:
    """What is asked by who waits for as long as it takes."""


def take(items: queue.SimpleQueue[T], ask: Callable[[], None] = nothing) -> T:
    """The next item; `ask` is called now and then while there is none, and may raise."""
    while True:
        ask()
        try:
            return items.get(timeout=ASK_S)
        except queue.Empty:
            continue


class ByteBudget:
    """A bound on bytes in flight; who asks for more than the whole budget waits to be alone."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._used = 0
        self._changed = threading.Condition()

    @contextmanager
    def reserve(self, n_bytes: int, ask: Callable[[], None] = nothing) -> Iterator[None]:
        """Hold `n_bytes` of the budget; blocks until they are free.

        `ask` is called now and then meanwhile, and may raise.
        """
        n_bytes = min(n_bytes, self._total)
        with self._changed:
            while not self._changed.wait_for(
                lambda: self._used + n_bytes <= self._total, timeout=ASK_S
            ):
                ask()
            self._used += n_bytes
        try:
            yield
        finally:
            with self._changed:
                self._used -= n_bytes
                self._changed.notify_all()


class Clock:
    """Seconds by stage; on a GPU by events, so that timing does not synchronise. And the requests
    to storage that were made again meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self.retries = RetryCount()
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def add(self, stage: str, seconds: float) -> None:
        """Add seconds that were measured elsewhere."""
        self._seconds[stage] += seconds

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what happens inside."""
        if self._cuda:
            begin, end = (
                torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                for _ in range(2)
            )
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
        else:
            start = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - start

    def waiting(self, items: Iterator[T]) -> Iterator[T]:
        """The same items; the time until each one comes is `wait`."""
        while True:
            start = time.perf_counter()
            item = next(items, None)
            self._seconds["wait"] += time.perf_counter() - start
            if item is None:
                return
            yield item

    def synchronize(self) -> None:
        """Wait for the device; the one synchronisation of a unit."""
        if self._cuda:
            torch.cuda.current_stream().synchronize()

    def seconds(self) -> dict[str, float]:
        """Totals so far."""
        for name, begin, end in self._events:
            self._seconds[name] += begin.elapsed_time(end) / 1000
        self._events.clear()
        return dict(self._seconds)
