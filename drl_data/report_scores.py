"""What the report shows of the diffusion classifier."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from drl_data.charts import Chart, Series, heat_colour, line_chart
from drl_data.report_jobs import pictures_of
from drl_data.store import FeatureStore
from drl_data.tasks.score_result import CurvePoint, Interval, ScoreResult

MAX_SHOWN_CLASSES = 20
"""Classes of the largest confusion matrix that is drawn; of more the pairs are listed."""

MAX_PAIRS = 8


@dataclass(frozen=True)
class Cell:
    """A cell of the confusion matrix: images, and its colours."""

    n: int
    background: str
    ink: str


@dataclass(frozen=True)
class Shown:
    """An image with its best candidates and their mean losses."""

    uri: str
    label: str
    is_right: bool
    candidates: list[tuple[str, str]]


@dataclass(frozen=True)
class Scored:
    """The classifier's result, its charts, the matrix by rows, and pictures."""

    result: ScoreResult
    share: float
    """Evaluations, of those of the whole table."""
    by_timestep: Chart | None
    by_samples: Chart | None
    matrix: list[tuple[str, list[Cell]]]
    pairs: list[tuple[str, str, int]]
    examples: list[Shown]


def scored(path: Path, store: FeatureStore) -> Scored | None:
    """None if `drl score` was not run on the samples of this store."""
    if not path.exists():
        return None
    result = ScoreResult.load(path)
    if result.dataset != store.spec.dataset:
        return None
    uris = pictures_of(store, (example.row for example in result.examples))
    matrix = _matrix(result)
    return Scored(
        result,
        result.cost.n_evaluations / max(result.cost.n_full, 1),
        _by_timestep(result),
        _by_samples(result),
        matrix,
        [] if matrix else [(c.label, c.predicted, c.n) for c in result.confused[:MAX_PAIRS]],
        [
            Shown(
                uris[one.row],
                one.label,
                one.is_right,
                [(name, f"{x:.4f}") for name, x in zip(one.candidates, one.losses, strict=True)],
            )
            for one in result.examples
            if one.row in uris
        ],
    )


def _half(interval: Interval) -> float:
    return (interval[1] - interval[0]) / 2


def _by_timestep(result: ScoreResult) -> Chart | None:
    if len(result.timesteps) < 2:
        return None
    return line_chart(
        [f"{one.timestep:g}" for one in result.timesteps],
        [
            Series(
                "one timestep",
                [one.top1 for one in result.timesteps],
                [_half(one.interval) for one in result.timesteps],
            ),
            Series("chance", [1 / result.n_classes] * len(result.timesteps)),
        ],
        x_label="timestep",
        y_label="accuracy by one timestep alone",
        y_max=1.0,
        percent=True,
    )


def _by_samples(result: ScoreResult) -> Chart | None:
    points: tuple[CurvePoint, ...] = result.curve
    if len(points) < 2:
        return None
    return line_chart(
        [f"{point.n_samples}" for point in points],
        [
            Series(
                "accuracy",
                [point.top1 for point in points],
                [_half(point.interval) for point in points],
            )
        ],
        x_label="samples (timestep, noise) of a candidate",
        y_label="accuracy with so many samples, on the same images",
        y_max=1.0,
        percent=True,
    )


def _matrix(result: ScoreResult) -> list[tuple[str, list[Cell]]]:
    """Rows are labels; colours are shares of the row."""
    if result.confusion is None or len(result.classes) > MAX_SHOWN_CLASSES:
        return []
    rows = []
    for name, line in zip(result.classes, result.confusion, strict=True):
        total = max(sum(line), 1)
        rows.append((name, [Cell(n, *heat_colour(n / total)) for n in line]))
    return rows
