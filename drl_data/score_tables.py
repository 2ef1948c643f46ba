"""From losses to classes: predictions, and how right they are.

Shape suffixes: b image of a batch, n image in all, c candidate, g class (of one or more
candidates), k timestep in the order in which they are seen, m member of the noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from drl_data.errors import SpecError
from drl_data.stages import Floats, Losses, StagedLosses, even_places, mean_loss

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

UNKNOWN = -1
"""Class of an image whose label no candidate has, or that has none."""

N_TOP = 5


@dataclass(frozen=True)
class Classes:
    """The classes that candidates stand for, in the order of the candidates."""

    names: tuple[str, ...]
    of_candidates: Ints
    """Class of each candidate, [c]."""
    of_labels: Mapping[int, int]
    """Label in the index -> class."""

    def of(self, labels: Ints) -> Ints:
        """Class of each label; UNKNOWN where no candidate has it."""
        return np.array([self.of_labels.get(int(label), UNKNOWN) for label in labels], np.int64)


def classes_of(
    candidates: Sequence[str | int],
    labels: Sequence[str | int],
    label_names: Sequence[str] | None,
) -> Classes:
    """Which label each candidate stands for; `labels` as in `ScoreSpec`, `label_names` the index's.

    Raises:
        SpecError: the labels are not one for each candidate, or names that cannot be told.
    """
    given: list[str | int] = list(labels)
    if labels and len(labels) != len(candidates):
        raise SpecError(
            f"score.labels: {len(labels)} for {len(candidates)} candidates; want one for each"
        )
    if not labels:
        given = list(candidates)
        if isinstance(candidates[0], str) and label_names is None:
            given = list(range(len(candidates)))
        elif isinstance(candidates[0], str) and not set(candidates) & set(label_names or ()):
            raise SpecError(
                "score.labels: no candidate is the name of a label (candidates begin with "
                f"{candidates[0]!r}, labels with {next(iter(label_names or ()), None)!r}); say "
                "which label each one stands for"
            )
    if label_names is None and any(isinstance(label, str) for label in given):
        raise SpecError("score.labels: the labels of this dataset are numbers; want numbers")
    numbers = {name: i for i, name in enumerate(label_names or ())}
    distinct = list(dict.fromkeys(given))
    places = {label: i for i, label in enumerate(distinct)}
    named = [
        label_names[x] if isinstance(x, int) and label_names and 0 <= x < len(label_names) else x
        for x in distinct
    ]
    return Classes(
        names=tuple(map(str, named)),
        of_candidates=np.array([places[label] for label in given], np.int64),
        of_labels={
            (x if isinstance(x, int) else numbers[x]): places[x]
            for x in distinct
            if isinstance(x, int) or x in numbers
        },
    )


@dataclass
class Tally:
    """What is counted over all images, batch by batch; read the fields when all are added."""

    classes: Classes
    samples: Sequence[int]
    """Numbers of samples of which the curve has a point: of a whole table any, of stages theirs."""
    rows: list[Ints] = field(default_factory=list)
    truths: list[Ints] = field(default_factory=list)
    """Class of each image's label."""
    top: list[Ints] = field(default_factory=list)
    """Best candidates of each image, best first, [n, N_TOP or fewer]."""
    top_scores: list[Floats] = field(default_factory=list)
    hits: list[Bools] = field(default_factory=list)
    """Whether the class is the first, and among the first N_TOP, [n, 2]."""
    timestep_hits: list[Bools] = field(default_factory=list)
    """Whether each timestep alone is right, [n, k] of those that all candidates see."""
    point_hits: list[Bools] = field(default_factory=list)
    """The same for each point of the curve."""
    point_evaluations: list[Ints] = field(default_factory=list)
    evaluations: list[Ints] = field(default_factory=list)

    def add(self, rows: Ints, labels: Ints, found: StagedLosses, weights_k: Floats) -> None:
        """Count a batch of images, of all of which `found` has losses."""
        truth_b = self.classes.of(labels)
        score_bc = final_scores(found, weights_k)
        order_bc = np.lexsort((score_bc, -found.stage_bc), axis=1)
        n_top = min(N_TOP, order_bc.shape[1])
        self.rows.append(rows)
        self.truths.append(truth_b)
        self.top.append(order_bc[:, :n_top])
        self.top_scores.append(np.take_along_axis(score_bc, order_bc[:, :n_top], 1))
        self.hits.append(self._hits(order_bc, truth_b))
        self.evaluations.append(_n_evaluations(found, len(found.stages)))
        whole = len(found.stages[0].places)
        mean_bck = found.losses_bckm[:, :, :whole].mean(3, dtype=np.float64)
        own_c = self.classes.of_candidates
        self.timestep_hits.append(own_c[mean_bck.argmin(1)] == truth_b[:, None])
        points, evaluations = self._points(found, weights_k)
        self.point_hits.append(own_c[points] == truth_b[:, None])
        self.point_evaluations.append(evaluations)

    def _hits(self, order_bc: Ints, truth_b: Ints) -> Bools:
        """Whether the class is the first of the distinct classes, and one of the first N_TOP."""
        classes_bc = self.classes.of_candidates[order_bc]
        if len(self.classes.names) == classes_bc.shape[1]:
            right = classes_bc[:, :N_TOP] == truth_b[:, None]
            return np.stack([right[:, 0], right.any(1)], axis=1)
        firsts = [list(dict.fromkeys(line))[:N_TOP] for line in classes_bc.tolist()]
        return np.array(
            [(f[0] == t, t in f) for f, t in zip(firsts, truth_b.tolist(), strict=True)], np.bool_
        ).reshape(-1, 2)

    def _points(self, found: StagedLosses, weights_k: Floats) -> tuple[Ints, Ints]:
        """The best candidate at each point of the curve, [b, point], and what it took."""
        if len(found.stages) > 1:
            return _after_stages(found, weights_k)
        n_candidates = found.losses_bckm.shape[1]
        best, cost = [], []
        for n in self.samples:
            part, weights = sample_part(found.losses_bckm, weights_k, n)
            best.append(mean_loss(part, weights).argmin(1))
            cost.append(np.full(len(part), n * n_candidates))
        return np.stack(best, 1), np.stack(cost, 1)


def final_scores(found: StagedLosses, weights_k: Floats) -> Floats:
    """The weighted mean loss [b, c] over all that each candidate has seen."""
    score_bc = np.full(found.stage_bc.shape, np.nan)
    stop = 0
    for number, stage in enumerate(found.stages, start=1):
        stop += len(stage.places)
        here = found.stage_bc == number
        if here.any():
            score_bc[here] = mean_loss(found.losses_bckm[:, :, :stop], weights_k[:stop])[here]
    return score_bc


def _after_stages(found: StagedLosses, weights_k: Floats) -> tuple[Ints, Ints]:
    """The best candidate after each stage, as if it were the last; and the evaluations up to it."""
    best: list[Ints] = []
    cost: list[Ints] = []
    stop = 0
    for number, stage in enumerate(found.stages, start=1):
        stop += len(stage.places)
        scores = mean_loss(found.losses_bckm[:, :, :stop], weights_k[:stop])
        inside = found.stage_bc >= number
        here = np.where(inside, scores, np.inf).argmin(1)
        best.append(np.where(inside.any(1), here, best[-1] if best else 0))
        cost.append(_n_evaluations(found, number))
    return np.stack(best, 1), np.stack(cost, 1)


def _n_evaluations(found: StagedLosses, n_stages: int) -> Ints:
    """Network evaluations [b] of each image in the first stages."""
    ends = np.cumsum([0, *(len(stage.places) for stage in found.stages)])
    seen_bc = ends[np.minimum(found.stage_bc, n_stages)]
    total: Ints = seen_bc.sum(1) * found.losses_bckm.shape[3]
    return total


def curve_samples(n_times: int, n_members: int) -> list[int]:
    """Numbers of samples for the curve: powers of two, then whole rounds over all timesteps."""
    powers = [2**i for i in range(n_times.bit_length()) if 2**i < n_times]
    rounds = [m * n_times for m in dict.fromkeys([2**i for i in range(12) if 2**i < n_members])]
    return [*powers, *rounds, n_times * n_members]


def sample_part(losses_bckm: Losses, weights_k: Floats, n: int) -> tuple[Losses, Floats]:
    """The losses of `n` samples of a whole table in the order of the schedule: evenly spread
    timesteps with the first member of the noise, or all timesteps with some members."""
    n_times = losses_bckm.shape[2]
    if n >= n_times:
        return losses_bckm[..., : n // n_times], weights_k
    places = even_places(n_times, n)
    return losses_bckm[:, :, places, :1], weights_k[places]
