"""Progress: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io

import pytest

from drl_data import progress
from drl_data.progress import SILENT, console_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def count(stream: io.StringIO, n: int) -> str:
    with console_progress(stream).bar("extract", n, "images") as bar:
        for _ in range(n):
            bar.advance(1, loss=0.5)
    return stream.getvalue()


def test_plain_lines_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.0)
    lines = count(io.StringIO(), 3).splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("extract: 1/3 images, ")
    assert lines[0].endswith("loss 0.5")
    assert lines[-1].startswith("extract: 3/3 images, in ")


def test_one_line_for_what_ends_soon() -> None:
    assert len(count(io.StringIO(), 1000).splitlines()) == 1


def test_a_bar_on_a_terminal() -> None:
    text = count(Terminal(), 7)
    assert "extract" in text
    assert "7/7" in text
    assert "loss 0.5" in text


def test_silence(capsys: pytest.CaptureFixture[str]) -> None:
    with SILENT.bar("x", 2, "things") as bar:
        bar.advance(2, loss=1.0)
    assert capsys.readouterr() == ("", "")
