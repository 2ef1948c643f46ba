"""Progress for people: a bar on a terminal, plain lines elsewhere, nothing by default."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichBars

PLAIN_EVERY_S = 10.0


class Bar(Protocol):
    """One thing that is being counted."""

    def advance(self, n: int = 1, **numbers: float) -> None:
        """`n` more are done; `numbers` (loss, rate ...) are shown beside the count."""


class Progress(Protocol):
    """Where progress is shown."""

    def bar(self, label: str, total: int, unit: str) -> AbstractContextManager[Bar]:
        """A bar for `total` things called `unit`, shown until the context ends."""


class _SilentBar:
    def advance(self, n: int = 1, **numbers: float) -> None:
        pass


class _Silent:
    @contextmanager
    def bar(self, label: str, total: int, unit: str) -> Iterator[Bar]:
        yield _SilentBar()


SILENT: Progress = _Silent()
"""Shows nothing: the default of every library function."""


def console_progress(stream: TextIO | None = None) -> Progress:
    """Bars if `stream` (default: standard error) is a terminal, plain lines if it is not."""
    stream = stream or sys.stderr
    return _Terminal(stream) if stream.isatty() else _Lines(stream)


def _numbers(numbers: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())


class _TerminalBar:
    def __init__(self, bars: RichBars, label: str, total: int, unit: str) -> None:
        self._bars = bars
        self._task = bars.add_task(label, total=total, unit=unit, numbers="")

    def advance(self, n: int = 1, **numbers: float) -> None:
        self._bars.update(self._task, advance=n, numbers=_numbers(numbers))


class _Terminal:
    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream)

    @contextmanager
    def bar(self, label: str, total: int, unit: str) -> Iterator[Bar]:
        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[numbers]}"),
        )
        with RichBars(*columns, console=self._console) as bars:
            yield _TerminalBar(bars, label, total, unit)


class _LinesBar:
    def __init__(self, stream: TextIO, label: str, total: int, unit: str) -> None:
        self._stream, self._label, self._total, self._unit = stream, label, total, unit
        self._n_done = 0
        self._start = self._last = time.monotonic()

    def advance(self, n: int = 1, **numbers: float) -> None:
        self._n_done += n
        now = time.monotonic()
        if now - self._last >= PLAIN_EVERY_S:
            self._last = now
            rate = self._n_done / (now - self._start)
            left_s = (self._total - self._n_done) / rate if rate else 0.0
            self._print(f"{rate:.3g}/s, {left_s:.0f} s left  {_numbers(numbers)}".rstrip())

    def finish(self) -> None:
        self._print(f"in {time.monotonic() - self._start:.1f} s")

    def _print(self, rest: str) -> None:
        line = f"{self._label}: {self._n_done}/{self._total} {self._unit}, {rest}\n"
        self._stream.write(line)
        self._stream.flush()


class _Lines:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @contextmanager
    def bar(self, label: str, total: int, unit: str) -> Iterator[Bar]:
        bar = _LinesBar(self._stream, label, total, unit)
        yield bar
        bar.finish()
