"""Charts for the report: curves in SVG coordinates, and the colours of a heat map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_VIRIDIS = (
    (68, 1, 84), (72, 40, 120), (62, 73, 137), (49, 104, 142), (38, 130, 142),
    (31, 158, 137), (53, 183, 121), (110, 206, 88), (181, 222, 43), (253, 231, 37),
)  # fmt: skip
"""matplotlib's viridis at ten equal steps."""


def heat_colour(value: float) -> tuple[str, str]:
    """(background, text) of a cell: viridis at `value` 0..1, and black or white, which reads."""
    position = min(max(value, 0.0), 1.0) * (len(_VIRIDIS) - 1)
    i = min(int(position), len(_VIRIDIS) - 2)
    share = position - i
    r, g, b = (
        round(x + (y - x) * share) for x, y in zip(_VIRIDIS[i], _VIRIDIS[i + 1], strict=True)
    )
    # WCAG 2's relative luminance, with gamma 2.2; at 0.179 black and white contrast equally.
    weights = zip((r, g, b), (0.2126, 0.7152, 0.0722), strict=True)
    luminance = sum(weight * (channel / 255) ** 2.2 for channel, weight in weights)
    return f"#{r:02x}{g:02x}{b:02x}", "#000" if luminance > 0.179 else "#fff"


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: where (in SVG units) and what it says."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """One curve in SVG units; `spans` are vertical intervals (x, top, bottom)."""

    name: str
    points: tuple[tuple[float, float], ...]
    spans: tuple[tuple[float, float, float], ...] = ()

    @property
    def path(self) -> str:
        """For the attribute `points` of a polyline."""
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in self.points)


@dataclass(frozen=True)
class Chart:
    """A line chart; the plot is the box (left, top) .. (width - right, height - bottom)."""

    x_label: str
    y_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    width: int = 460
    height: int = 240
    left: int = 48
    right: int = 14
    top: int = 14
    bottom: int = 42


@dataclass(frozen=True)
class Series:
    """A curve's values; `half` is half of an interval at each point."""

    name: str
    y: Sequence[float]
    half: Sequence[float] = ()


def line_chart(
    x: Sequence[str],
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    y_max: float,
    percent: bool = False,
) -> Chart:
    """Equally spaced x with these labels (every few if there are many), y from 0 to `y_max`."""
    frame = Chart(x_label, y_label, (), (), ())
    x_span = frame.width - frame.left - frame.right
    y_span = frame.height - frame.top - frame.bottom
    # A single point, or a few categories, stand clear of the axes.
    margin = 0.5 if len(x) < 8 else 0.0
    n_steps = max(len(x) - 1 + 2 * margin, 1)

    def at_x(i: int, series_number: float = 0.0) -> float:
        # Curves over categories stand side by side, so that their intervals can be told apart.
        aside = 8 * (series_number - (len(series) - 1) / 2) if margin else 0.0
        return frame.left + x_span * (i + margin) / n_steps + aside

    def at_y(value: float) -> float:
        return frame.top + y_span * (1 - min(max(value / y_max, 0.0), 1.0))

    every = math.ceil(len(x) / 8)
    step = _round_step(y_max / 4)
    values = [step * i for i in range(math.floor(y_max / step + 1e-9) + 1)]
    return Chart(
        x_label,
        y_label,
        tuple(Tick(at_x(i, (len(series) - 1) / 2), x[i]) for i in range(0, len(x), every)),
        tuple(Tick(at_y(v), f"{v:.0%}" if percent else f"{v:g}") for v in values),
        tuple(
            Line(
                one.name,
                tuple((at_x(i, k), at_y(v)) for i, v in enumerate(one.y)),
                tuple(
                    (at_x(i, k), at_y(v + half), at_y(v - half))
                    for i, (v, half) in enumerate(zip(one.y, one.half, strict=False))
                ),
            )
            for k, one in enumerate(series)
        ),
    )


def _round_step(step: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is at least `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= step * (1 - 1e-9))
