"""The run of a diffusion classifier with staged pruning: its job, and the units on an executor."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from drl_data.backbones import load_backbone
from drl_data.errors import SpecError, StoreError
from drl_data.index import SampleIndex
from drl_data.pipeline import Pipeline, StoreSpec
from drl_data.plan import MAX_ROWS_PER_UNIT, Unit, asked_units
from drl_data.progress import SILENT, Progress
from drl_data.runs import Prepared, cpus_of_worker, hand_out, prepare
from drl_data.score_spec import LearnedWeights, ScoreSpec
from drl_data.score_tables import Classes, classes_of
from drl_data.score_units import INDEX, ScoreContent, StageRecord, make_score_task
from drl_data.score_weights import rule_weights
from drl_data.spec import TapSpec
from drl_data.stages import Floats, Stage, plan_stages
from drl_data.stopping import Stop
from drl_data.store import FeatureStore
from drl_data.threads import one_thread
from drl_data.unit_jobs import JobSpec, UnitJob

EVALUATIONS_PER_UNIT = 1 << 14
"""What `rows_per_unit: auto` aims at: some minutes of a large network, so that little is lost with
a worker, and files are not too small."""


@dataclass
class StagedRun:
    """A job whose units were computed as far as they were."""

    job: UnitJob
    content: ScoreContent
    index: SampleIndex
    classes: Classes
    n_units: int
    n_pending: int
    """Units of those asked for that had no losses when it began."""
    n_left: int
    failed: list[tuple[Unit, str]] = field(default_factory=list)


def run_stages(
    pipeline: Pipeline,
    spec: ScoreSpec,
    url: str,
    *,
    device: str | None = None,
    limit: int | None = None,
    part: tuple[int, int] | None = None,
    progress: Progress = SILENT,
    stop: Stop | None = None,
) -> StagedRun:
    """Compute the losses that the stages of `spec` ask for, unit by unit, under `url`.

    Raises:
        UserError: whatever is wrong with the pipeline, its tars, its model, or the folder.
        ExecutionError: as the executors do.
    """
    stop = stop or Stop()
    prepared = _prepared(pipeline, spec, url)
    index = prepared.index
    classes = classes_of(prepared.spec.condition.candidates, spec.labels, index.label_names)
    job_spec, content = _job_spec(prepared, spec, pipeline.features.rows_per_unit == "auto")
    prepared.model.check_weights()
    job = UnitJob.create(url, job_spec)
    saved = _saved_index(job, index)
    units = asked_units(job.units, limit, part)
    pending = job.pending(units)
    run = StagedRun(job, content, index, classes, len(units), len(pending), len(pending))
    if not pending or stop.requested:
        return run
    assert pipeline.backbone is not None, "prepare demands it"
    task = partial(
        make_score_task,
        url,
        pipeline.backbone,
        pipeline.condition,
        pipeline.run,
        cpus_of_worker(pipeline.run),
        device=device,
        noise_file=pipeline.noise.file,
        tars=None if index.tars == saved.tars else index.tars,
    )
    outcomes = hand_out(pipeline.run, task, pending, stop)
    bar_of_rows = progress.bar("score", sum(unit.n_rows for unit in pending), "images")
    with one_thread(), stop.heeded(), bar_of_rows as bar, closing(outcomes):
        for outcome in outcomes:
            run.n_left -= 1
            if outcome.error is not None:
                run.failed.append((outcome.unit, outcome.error))
            bar.advance(outcome.unit.n_rows, failed=len(run.failed))
    return run


def _prepared(pipeline: Pipeline, spec: ScoreSpec, url: str) -> Prepared:
    """The pipeline resolved, as if the whole table were to be stored under `url`."""
    if FeatureStore.exists(url):
        raise SpecError(f"score.url: {url} is a feature store; the losses need a folder of theirs")
    if pipeline.image_spec.n_views:
        raise SpecError("score.stages: images are scored as they are; leave out images.views")
    if pipeline.features.non_finite == "clip":
        raise SpecError(
            "features.non_finite clip: a loss that is not finite would become a number, and win; "
            "want error or invalid"
        )
    taps = pipeline.taps or (TapSpec(path="loss"),)
    changes = {
        "store": StoreSpec(url=url),
        "taps": taps,
        "features": pipeline.features.model_copy(update={"dtype": "float32", "overflow": "error"}),
    }
    return prepare(pipeline.model_copy(update=changes))


def _job_spec(prepared: Prepared, spec: ScoreSpec, automatic: bool) -> tuple[JobSpec, ScoreContent]:
    """What is made, from what; in units of some thousand evaluations if that is left to us."""
    names = [array.name for array in prepared.arrays]
    tap = [array for array in prepared.arrays if spec.tap in (None, array.name)]
    if len(tap) != 1:
        raise SpecError(f"score.tap: {spec.tap!r}, the pipeline has {names}; want one of them")
    stages = plan_stages(spec.stages, len(prepared.times))
    features = prepared.spec
    if automatic:
        rows = rows_per_unit(stages, tap[0].shape, features.batch_size)
        features = features.model_copy(update={"rows_per_unit": rows})
    first, n_rows = _rows(prepared.index, spec.split)
    content = ScoreContent(
        features=features,
        arrays=prepared.arrays,
        times=prepared.times,
        tap=tap[0].name,
        stages=tuple(StageRecord(places=s.places, keep=s.keep, p_value=s.p_value) for s in stages),
        weights=tuple(_weights(prepared, spec, tap[0].tap).tolist()),
        first_row=first,
    )
    job = JobSpec(
        kind="score",
        content=content.to_json(),
        n_rows=n_rows,
        rows_per_unit=features.rows_per_unit,
    )
    return job, content


def rows_per_unit(stages: Sequence[Stage], table: Sequence[int], batch_size: int) -> int:
    """Rows of about `EVALUATIONS_PER_UNIT`, a multiple of `batch_size`; `table` is (candidates,
    members)."""
    left, evaluations = table[0], 0
    for stage in stages:
        evaluations += left * len(stage.places) * table[1]
        left = min(left, stage.keep or left)
    rows = min(EVALUATIONS_PER_UNIT // max(evaluations, 1), MAX_ROWS_PER_UNIT)
    return max(rows // batch_size, 1) * batch_size


def _rows(index: SampleIndex, split: str | None) -> tuple[int, int]:
    """(first row, number of rows) of a split; rows of one split are consecutive."""
    if split is None:
        return 0, index.n_samples
    splits = np.array(index.table.column("split").to_pylist())
    rows = np.flatnonzero(splits == split)
    if not len(rows):
        raise SpecError(
            f"score.split: no samples in {split!r}; splits: {', '.join(sorted(set(splits)))}"
        )
    return int(rows[0]), len(rows)


def _weights(prepared: Prepared, spec: ScoreSpec, tap: str) -> Floats:
    n_times = len(prepared.times)
    assert not isinstance(spec.weights, LearnedWeights), "the spec refuses it"
    if isinstance(spec.weights, tuple):
        return given_weights(spec.weights, n_times)
    if spec.weights == "uniform":
        return np.ones(n_times)
    schedule = load_backbone(prepared.model, "meta").schedule_for(prepared.spec.images)
    return rule_weights(spec.weights, prepared.times, schedule, tap)


def given_weights(weights: Sequence[float], n_times: int) -> Floats:
    """Weights that are numbers.

    Raises:
        SpecError: not one for each timestep.
    """
    if len(weights) != n_times:
        raise SpecError(f"score.weights: {len(weights)} for {n_times} timesteps; want one for each")
    return np.array(weights, np.float64)


def _saved_index(job: UnitJob, index: SampleIndex) -> SampleIndex:
    """The index as the job's folder has it; put there if it has none.

    Raises:
        StoreError: it has that of other samples.
    """
    job.folder.put_if_absent(INDEX, [index.to_parquet()])
    place = f"{job.folder.url}/{INDEX}"
    saved = SampleIndex.from_parquet(job.folder.get(INDEX), place)
    if saved.digest() != index.digest():
        raise StoreError(f"{place}: not the index of this job; delete it")
    return saved
