"""What a diffusion classifier found: accuracies with their intervals, the curve, confusions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Group
from rich.table import Table

from drl_data.intervals import mean_and_half, wilson_interval
from drl_data.results import TaskResult
from drl_data.score_spec import ScoreSpec
from drl_data.score_tables import N_TOP, UNKNOWN, Bools, Ints, Tally
from drl_data.spec import ResolvedTime
from drl_data.spec_base import Spec
from drl_data.stages import Floats

MAX_MATRIX = 50
"""Classes of the largest confusion matrix that is kept; of more the pairs."""
N_PAIRS = 20
N_EXAMPLES, N_SHOWN = 10, 3
"""Images of the report, and candidates of each."""

Interval = tuple[float, float]


class SplitAccuracy(Spec):
    """How right the classes are of one split; intervals are of 95 % over images."""

    split: str
    n_images: int
    n_judged: int
    """Images whose label a candidate has; accuracies are of these."""
    top1: float | None
    top1_interval: Interval | None
    top5: float | None
    """None with fewer than six classes."""
    top5_interval: Interval | None
    commonest: float | None
    """Accuracy of always answering the commonest class."""


class TimestepAccuracy(Spec):
    """How right the classes are by one timestep alone, all candidates and members of the noise."""

    timestep: float
    weight: float
    """In the mean over all."""
    top1: float
    interval: Interval


class CurvePoint(Spec):
    """How right the classes are with fewer samples, on the same images."""

    n_samples: int
    """(timestep, noise) that the candidate that is left has seen."""
    n_evaluations: float
    """Of the network, of an image, on the average."""
    top1: float
    interval: Interval
    behind: float
    """Accuracy of all samples minus this one, of the same images."""
    behind_half: float
    """Half of its 95 % interval, by the differences of each image."""


class Confused(Spec):
    """Images of one class that were taken to be of another."""

    label: str
    predicted: str
    n: int


class Cost(Spec):
    """Network evaluations: one image, candidate, timestep and noise each."""

    n_evaluations: int
    n_full: int
    """Those of the whole table of the same images and timesteps."""
    n_encoded: int
    """Images that were encoded, once each."""


class Example(Spec):
    """An image and its best candidates with their mean losses."""

    row: int
    label: str
    is_right: bool
    candidates: tuple[str, ...]
    losses: tuple[float, ...]


class ScoreResult(TaskResult):
    """What `run_score` found; JSON, and Parquet of the same name.

    `table` has a line for each image with losses: row, key, split, label and `predicted` (names of
    classes; null without a label), `correct` (null if no candidate has the label), `top` (numbers
    of the best candidates, at most 5), `top_losses` (their means), `n_evaluations`.
    """

    task: ClassVar[str] = "score"

    pipeline: str
    spec: ScoreSpec
    source: Literal["store", "stages"]
    url: str
    """Of the store, or of the losses."""
    fingerprint: str
    """Of the store, or of the job."""
    dataset: str
    candidates: tuple[str, ...]
    n_classes: int
    n_images: int
    splits: tuple[SplitAccuracy, ...]
    n_judged: int
    timesteps: tuple[TimestepAccuracy, ...]
    """Those that all candidates see."""
    curve: tuple[CurvePoint, ...]
    enough: int | None
    """Samples from which on the accuracy is not behind that of all: 0 is in the interval of the
    difference, at this point of the curve and all after it."""
    confusion: tuple[tuple[int, ...], ...] | None
    """[label][predicted], of at most 50 classes."""
    classes: tuple[str, ...]
    confused: tuple[Confused, ...]
    """The most frequent."""
    weights: tuple[float, ...]
    """Of the schedule's timesteps."""
    cost: Cost
    examples: tuple[Example, ...]
    table: str
    seconds: float


@dataclass(frozen=True)
class Conclusion:
    """What is known of a run besides the tally."""

    pipeline: str
    spec: ScoreSpec
    source: Literal["store", "stages"]
    url: str
    fingerprint: str
    dataset: str
    candidates: tuple[str, ...]
    times: Sequence[ResolvedTime]
    order: Sequence[int]
    """Places of the timesteps that all candidates see."""
    weights: Floats
    cost: Cost


def conclude(about: Conclusion, tally: Tally, splits: Sequence[str], started: float) -> ScoreResult:
    """The result of all images that were added; `splits` are those of the index's rows."""
    rows, truths = np.concatenate(tally.rows), np.concatenate(tally.truths)
    hits, top = np.concatenate(tally.hits), np.concatenate(tally.top)
    judged = truths != UNKNOWN
    names = tally.classes.names
    guesses = tally.classes.of_candidates[top[:, 0]]
    matrix = np.zeros((len(names), len(names)), np.int64)
    np.add.at(matrix, (truths[judged], guesses[judged]), 1)
    curve = _curve(tally, judged)
    of_rows = np.array([splits[row] for row in rows.tolist()])
    return ScoreResult(
        pipeline=about.pipeline,
        spec=about.spec,
        source=about.source,
        url=about.url,
        fingerprint=about.fingerprint,
        dataset=about.dataset,
        candidates=about.candidates,
        n_classes=len(names),
        n_images=len(rows),
        splits=tuple(
            _accuracy(split, hits[of_rows == split], truths[of_rows == split], len(names))
            for split in dict.fromkeys(of_rows.tolist())
        ),
        n_judged=int(judged.sum()),
        timesteps=_timesteps(about, np.concatenate(tally.timestep_hits)[judged]),
        curve=curve,
        enough=_enough(curve),
        confusion=(
            tuple(map(tuple, matrix.tolist())) if len(names) <= MAX_MATRIX and curve else None
        ),
        classes=names,
        confused=_confused(matrix, names),
        weights=tuple(about.weights.tolist()),
        cost=about.cost,
        examples=_examples(about, tally, rows, truths, hits[:, 0]),
        table="score.parquet",
        seconds=time.perf_counter() - started,
    )


def _share(right: Bools) -> tuple[float, Interval]:
    p = float(right.mean())
    return p, wilson_interval(p, len(right))


def _accuracy(split: str, hits: Bools, truths: Ints, n_classes: int) -> SplitAccuracy:
    judged = truths != UNKNOWN
    n_judged = int(judged.sum())
    top1 = _share(hits[judged, 0]) if n_judged else (None, None)
    top5 = _share(hits[judged, 1]) if n_judged and n_classes > N_TOP else (None, None)
    return SplitAccuracy(
        split=split,
        n_images=len(hits),
        n_judged=n_judged,
        top1=top1[0],
        top1_interval=top1[1],
        top5=top5[0],
        top5_interval=top5[1],
        commonest=float(np.bincount(truths[judged]).max() / n_judged) if n_judged else None,
    )


def _timesteps(about: Conclusion, hits: Bools) -> tuple[TimestepAccuracy, ...]:
    """By increasing place in the schedule."""
    if not len(hits):
        return ()
    found = []
    for k in np.argsort(about.order).tolist():
        place = about.order[k]
        top1, interval = _share(hits[:, k])
        found.append(
            TimestepAccuracy(
                timestep=about.times[place].requested,
                weight=float(about.weights[place]),
                top1=top1,
                interval=interval,
            )
        )
    return tuple(found)


def _curve(tally: Tally, judged: Bools) -> tuple[CurvePoint, ...]:
    hits = np.concatenate(tally.point_hits)[judged]
    if not len(hits):
        return ()
    cost = np.concatenate(tally.point_evaluations)
    points = []
    for i, n in enumerate(tally.samples):
        top1, interval = _share(hits[:, i])
        behind = hits[:, -1].astype(float) - hits[:, i]
        mean, half = mean_and_half(behind.tolist())
        points.append(
            CurvePoint(
                n_samples=n,
                n_evaluations=float(cost[:, i].mean()),
                top1=top1,
                interval=interval,
                behind=mean,
                behind_half=half,
            )
        )
    return tuple(points)


def _enough(curve: Sequence[CurvePoint]) -> int | None:
    enough = None
    for point in reversed(curve):
        if point.behind - point.behind_half > 0:
            break
        enough = point.n_samples
    return enough


def _confused(matrix: Ints, names: Sequence[str]) -> tuple[Confused, ...]:
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:N_PAIRS]
    pairs = [divmod(int(i), len(names)) for i in order if wrong.flat[i]]
    return tuple(Confused(label=names[a], predicted=names[b], n=int(wrong[a, b])) for a, b in pairs)


def _examples(
    about: Conclusion, tally: Tally, rows: Ints, truths: Ints, right: Bools
) -> tuple[Example, ...]:
    """As many right as wrong ones, if there are; evenly spaced."""
    judged = truths != UNKNOWN
    wrong = np.flatnonzero(judged & ~right)
    good = np.flatnonzero(judged & right)
    n_wrong = min(len(wrong), max(N_EXAMPLES // 2, N_EXAMPLES - len(good)))
    chosen = [*_spaced(good, N_EXAMPLES - n_wrong), *_spaced(wrong, n_wrong)]
    top, scores = np.concatenate(tally.top), np.concatenate(tally.top_scores)
    return tuple(
        Example(
            row=int(rows[i]),
            label=tally.classes.names[truths[i]],
            is_right=bool(right[i]),
            candidates=tuple(about.candidates[c] for c in top[i, :N_SHOWN].tolist()),
            losses=tuple(scores[i, :N_SHOWN].tolist()),
        )
        for i in chosen
    )


def _spaced(places: Ints, n: int) -> list[int]:
    n = min(n, len(places))
    found: list[int] = places[(2 * np.arange(n) + 1) * len(places) // max(2 * n, 1)].tolist()
    return found


def write_predictions(path: Path, result: ScoreResult, tally: Tally, samples: pa.Table) -> None:
    """The table of predictions; `samples` is that of the index."""
    rows, truths = np.concatenate(tally.rows), np.concatenate(tally.truths)
    top, scores = np.concatenate(tally.top), np.concatenate(tally.top_scores)
    names = np.array(result.classes, object)
    own = samples.take(pa.array(rows))
    n_top = top.shape[1]
    table = pa.table(
        {
            "row": rows,
            "key": own["key"],
            "split": own["split"],
            "label": pa.array(names[truths], pa.string(), mask=truths == UNKNOWN),
            "predicted": pa.array(names[tally.classes.of_candidates[top[:, 0]]], pa.string()),
            "correct": pa.array(np.concatenate(tally.hits)[:, 0], mask=truths == UNKNOWN),
            "top": pa.FixedSizeListArray.from_arrays(top.astype(np.int32).reshape(-1), n_top),
            "top_losses": pa.FixedSizeListArray.from_arrays(scores.reshape(-1), n_top),
            "n_evaluations": np.concatenate(tally.evaluations),
        }
    )
    about = {
        b"fingerprint": result.fingerprint.encode(),
        b"spec": result.spec.model_dump_json().encode(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(about), path, compression="zstd")


def format_table(result: ScoreResult) -> Group:
    """Accuracies by split; then one line for each fact."""
    table = Table("split", "images", "judged", "top-1", "95 %", "top-5", "95 %", box=None)
    for one in result.splits:
        table.add_row(
            one.split, str(one.n_images), str(one.n_judged),
            _percent(one.top1), _percents(one.top1_interval),
            _percent(one.top5), _percents(one.top5_interval),
        )  # fmt: skip
    facts = Table(show_header=False, box=None)
    facts.add_row("candidates", f"{len(result.candidates)} of {result.n_classes} classes")
    cost = result.cost
    share = cost.n_evaluations / cost.n_full if cost.n_full else 1.0
    facts.add_row(
        "evaluations", f"{cost.n_evaluations:,}, {share:.1%} of the {cost.n_full:,} of all"
    )
    if result.timesteps:
        best = max(result.timesteps, key=lambda one: one.top1)
        facts.add_row("best timestep", f"{best.timestep:g}, {best.top1:.1%} by itself")
    for point in result.curve:
        gap = f"behind by {point.behind:.1%} ± {point.behind_half:.1%}"
        facts.add_row(
            f"{point.n_samples} samples",
            f"{point.top1:.1%}, {point.n_evaluations:,.0f} evaluations an image, {gap}",
        )
    if result.enough is not None:
        facts.add_row("enough", f"{result.enough} samples of a candidate")
    facts.add_row("table", result.table)
    return Group(table, facts)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _percents(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval[0]:.1%} - {interval[1]:.1%}"
