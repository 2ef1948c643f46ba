"""Staged pruning of candidates: which timesteps each stage adds, and who is left after it.

After Li et al. 2023 (`eval_prob_adaptive.py` of their code): all candidates see the first few
timesteps, the best ones see more, and so on; timesteps are evenly spread in every stage, nothing is
computed twice, and each candidate of an image sees the same noise. It differs in three things: a
number of timesteps that does not divide the schedule's is spread evenly, too (their step is rounded
down, which leaves out one end); noise belongs to its timestep, whatever the order in which they are
seen; and of equal candidates the first is taken.

Shape suffixes: b image, c candidate, n pair of an image and a candidate, k timestep in the order in
which they are seen, m member of the noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from scipy import stats

from drl_data.errors import SpecError
from drl_data.score_spec import StageSpec

Floats = npt.NDArray[np.float64]
Losses = npt.NDArray[np.float32]
Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Stage:
    """What a stage adds: places of timesteps in the schedule; and what is left after it."""

    places: tuple[int, ...]
    keep: int | None = None
    p_value: float | None = None


class LossSource(Protocol):
    """What computes losses of pairs, of one batch of images."""

    def __call__(self, places: Sequence[int], images: Places, candidates: Places) -> Losses:
        """Losses [n, k, m] of the pairs (images[n], candidates[n]) at these timesteps."""


@dataclass(frozen=True)
class StagedLosses:
    """Losses of a batch as far as they were computed."""

    losses_bckm: Losses
    """NaN where a candidate was dropped before."""
    stage_bc: npt.NDArray[np.int16]
    """The last stage that a candidate was in, from 1; 0 of images that are not asked for."""
    stages: tuple[Stage, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """Places of the timesteps along k."""
        return order_of(self.stages)


def order_of(stages: Sequence[Stage]) -> tuple[int, ...]:
    """Places of all timesteps in the order in which they are seen."""
    return tuple(place for stage in stages for place in stage.places)


def even_places(total: int, n: int) -> list[int]:
    """`n` of the places 0 .. total-1, in the middles of n equal parts."""
    return [(2 * i + 1) * total // (2 * n) for i in range(n)]


def plan_stages(specs: Sequence[StageSpec], n_times: int) -> tuple[Stage, ...]:
    """The timesteps that each stage adds to a schedule of `n_times`.

    A stage may have more than it asks for, where its even spread does not contain that of those
    before.

    Raises:
        SpecError: the schedule has too few timesteps.
    """
    seen: set[int] = set()
    planned = []
    for spec in specs:
        if spec.timesteps > n_times:
            raise SpecError(
                f"score.stages: {spec.timesteps} timesteps, schedule.timesteps has {n_times}; "
                "name more, for example `timesteps: {even: 500, of: 1000}`"
            )
        new = [place for place in even_places(n_times, spec.timesteps) if place not in seen]
        seen.update(new)
        planned.append(Stage(tuple(new), spec.keep, spec.p_value))
    return tuple(planned)


def evaluate(
    losses: LossSource,
    asked_b: npt.NDArray[np.bool_],
    n_candidates: int,
    n_members: int,
    stages: Sequence[Stage],
    weights: Floats,
) -> StagedLosses:
    """Run the stages over one batch; `weights` are of the timesteps, by their places."""
    n_seen = len(order_of(stages))
    shape = (len(asked_b), n_candidates, n_seen, n_members)
    found = StagedLosses(
        np.full(shape, np.nan, np.float32), np.zeros(shape[:2], np.int16), tuple(stages)
    )
    left_bc = np.repeat(asked_b[:, None], n_candidates, axis=1)
    start = 0
    for number, stage in enumerate(stages, start=1):
        # Candidate by candidate, so that images in order are the batches of a whole table.
        candidates, images = np.nonzero(left_bc.T)
        stop = start + len(stage.places)
        if len(images) and stage.places:
            found.losses_bckm[images, candidates, start:stop] = losses(
                stage.places, images, candidates
            )
        found.stage_bc[left_bc] = number
        start = stop
        w_k = weights[list(found.order[:stop])]
        left_bc = survivors(found.losses_bckm[:, :, :stop], left_bc, w_k, stage)
    return found


def survivors(
    losses_bckm: Losses, left_bc: npt.NDArray[np.bool_], weights_k: Floats, stage: Stage
) -> npt.NDArray[np.bool_]:
    """Which of the candidates that are left go on; an image whose last one is left is done, and
    has none. Losses that are not finite are worse than others."""
    scores_bc = np.where(left_bc, mean_loss(losses_bckm, weights_k), np.inf)
    on_bc = left_bc & np.isfinite(scores_bc)
    if stage.keep is not None:
        rank_bc = np.argsort(np.argsort(scores_bc, axis=1, kind="stable"), axis=1, kind="stable")
        on_bc &= rank_bc < stage.keep
    if stage.p_value is not None:
        for b in np.flatnonzero(on_bc.any(1)):
            on_bc[b] &= ~_is_worse(losses_bckm[b], scores_bc[b], weights_k, stage.p_value)
    on_bc[on_bc.sum(1) <= 1] = False
    return on_bc


def mean_loss(losses_bckm: Losses, weights_k: Floats) -> Floats:
    """The weighted mean [b, c] over timesteps and members, in float64; NaN if any loss is."""
    if not weights_k.sum():  # timesteps without weight alone: all candidates are equal
        return np.zeros(losses_bckm.shape[:2])
    mean_bck = losses_bckm.mean(3, dtype=np.float64)
    scores: Floats = mean_bck @ (weights_k / weights_k.sum())
    return scores


def _is_worse(
    losses_ckm: Losses, scores_c: Floats, weights_k: Floats, p_value: float
) -> npt.NDArray[np.bool_]:
    """Whether each candidate is worse than the best by a paired t-test over (timestep, member),
    two-sided as scipy's `ttest_rel` is."""
    best = int(np.argmin(scores_c))
    weighted_cn = (losses_ckm.astype(np.float64) * weights_k[:, None]).reshape(len(losses_ckm), -1)
    difference_cn = weighted_cn - weighted_cn[best]
    worse = np.zeros(len(losses_ckm), np.bool_)
    n = difference_cn.shape[1]
    if n < 2:
        return worse
    finite = np.isfinite(scores_c)
    mean_c, std_c = difference_cn[finite].mean(1), difference_cn[finite].std(1, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        p_c = 2 * stats.t.sf(np.abs(mean_c) / (std_c / np.sqrt(n)), n - 1)
    worse[finite] = np.nan_to_num(p_c, nan=1.0) < p_value  # 0 / 0 is no difference
    worse[best] = False
    return worse
