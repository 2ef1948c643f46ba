"""The zero-shot diffusion classifier: from a store's table of losses, or with staged pruning.

Li et al. 2023 (arXiv:2303.16203), Clark and Jaini 2023 (arXiv:2303.15233).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from drl_data.backbones import find_model, load_backbone
from drl_data.errors import SpecError, redacted
from drl_data.feature_dataset import FeatureDataset
from drl_data.index import SampleIndex
from drl_data.pipeline import Pipeline
from drl_data.plan import InvalidRow, Unit
from drl_data.progress import SILENT, Progress
from drl_data.schedule import Schedule
from drl_data.score_run import StagedRun, given_weights, run_stages
from drl_data.score_spec import LearnedWeights, ScoreSpec
from drl_data.score_tables import Tally, classes_of, curve_samples
from drl_data.score_units import losses_path, read_losses
from drl_data.score_weights import learn_weights, rule_weights
from drl_data.selection import NO_LABEL
from drl_data.spec import ArraySpec
from drl_data.splits import finished_store
from drl_data.stages import Floats, Losses, Stage, StagedLosses
from drl_data.stopping import Stop
from drl_data.store import FeatureStore
from drl_data.tasks.score_result import Conclusion, Cost, ScoreResult, conclude, write_predictions

READ_BYTES = 64 << 20
"""Of losses that are held at a time."""


@dataclass
class ScoreRun:
    """What `drl score` did; `result` is None while units are pending."""

    result: ScoreResult | None = None
    n_units: int = 0
    n_pending: int = 0
    """Units that had no losses when it began."""
    n_left: int = 0
    failed: list[tuple[Unit, str]] = field(default_factory=list)
    invalid: list[InvalidRow] = field(default_factory=list)
    """Rows of the index that have no losses."""


def run_score(
    pipeline: Pipeline,
    *,
    device: str | None = None,
    limit: int | None = None,
    part: tuple[int, int] | None = None,
    progress: Progress = SILENT,
    stop: Stop | None = None,
) -> ScoreRun:
    """Classify every image of the pipeline by the losses of its candidates.

    Without `score.stages` from the table of the pipeline's store; with them by computing what the
    stages leave, on the executor that `run` names, resumable: `limit` (the first images) and `part`
    (i of n parts of the units) are of that, and `device` is where a store's weights are learned or
    the local executor computes. Writes `score.json` and `score.parquet` in the results folder once
    everything is there.

    Raises:
        SpecError: no `score` section, or what it asks for cannot be had.
        UserError: a store that is not there or not complete; whatever is wrong with the pipeline.
        ExecutionError: as the executors do.
    """
    spec = pipeline.score
    if spec is None:
        raise SpecError(f"pipeline {pipeline.name!r} lacks score; `score: {{}}` is the least")
    if spec.stages:
        return _of_stages(pipeline, spec, device, limit, part, progress, stop)
    if limit is not None or part is not None:
        raise SpecError(
            "drl score: --limit and --units are for score.stages; a store is read whole"
        )
    return _of_store(pipeline, spec, progress)


# --- from a store -------------------------------------------------------------------------------


def _of_store(pipeline: Pipeline, spec: ScoreSpec, progress: Progress) -> ScoreRun:
    started = time.perf_counter()
    store = finished_store(pipeline, "score")
    array = _loss_array(store, spec)
    classes = classes_of(
        store.computed_spec.condition.candidates, spec.labels, store.index.label_names
    )
    n_times, n_members = len(store.times), array.shape[1]
    weights = _weights_of_store(pipeline, spec, store, array)
    splits = _splits(store, spec)
    tally = Tally(classes, curve_samples(n_times, n_members))
    stage = Stage(tuple(range(n_times)))
    n_rows = 0
    for split in splits:
        data = FeatureDataset(store, [array.name], split=split, view=spec.view)
        n_rows += len(data)
        with progress.bar(f"score {split or ''}".strip(), len(data), "images") as bar:
            for start, stop in _parts(len(data), array.bytes_per_row * n_times):
                losses, rows, labels = _read(data, array.name, start, stop)
                stage_bc = np.ones(losses.shape[:2], np.int16)
                tally.add(rows, labels, StagedLosses(losses, stage_bc, (stage,)), weights)
                bar.advance(stop - start)
    n_full = n_rows * len(classes.of_candidates) * n_times * n_members
    result = conclude(
        Conclusion(
            pipeline=pipeline.name,
            spec=spec,
            source="store",
            url=redacted(store.url),
            fingerprint=store.fingerprint,
            candidates=tuple(map(str, store.computed_spec.condition.candidates)),
            times=store.times,
            dataset=store.spec.dataset,
            order=stage.places,
            weights=weights,
            cost=Cost(n_evaluations=n_full, n_full=n_full, n_encoded=n_rows),
        ),
        tally,
        store.index.table["split"].to_pylist(),
        started,
    )
    _save(pipeline, result, tally, store.index)
    invalid = [row for receipt in store.iter_receipts() for row in receipt.invalid]
    return ScoreRun(result, len(store.units), invalid=invalid)


def _loss_array(store: FeatureStore, spec: ScoreSpec) -> ArraySpec:
    found = [a for a in store.features if a.dims == ("candidate", "member")]
    names = [a.name for a in found]
    chosen = [a for a in found if spec.tap in (None, a.name)]
    if len(chosen) != 1:
        raise SpecError(
            f"score.tap: {spec.tap!r}, {store.url} has the tables {names}; want one of them"
            + ("" if names else "; extract it with the tap `loss` and condition.candidates")
        )
    counted = [r for r in store.iter_receipts() if r.counts.non_finite.get(chosen[0].name)]
    if counted and store.spec.non_finite == "clip":
        raise SpecError(
            f"score: {store.url}: unit {counted[0].unit} has losses that were not finite and were "
            "stored as numbers (features.non_finite: clip), which would win; want error or invalid"
        )
    return chosen[0]


def _splits(store: FeatureStore, spec: ScoreSpec) -> list[str | None]:
    """The splits that are scored, each with at least one valid row."""
    if spec.split is not None:
        if isinstance(spec.weights, LearnedWeights) and spec.weights.split == spec.split:
            raise SpecError(
                f"score: weights learned on split {spec.split!r} are no test of it; name another"
            )
        return [spec.split]
    samples = store.samples()
    rows = samples.filter(np.array(samples["status"].to_pylist()) == "ok")
    found: list[str | None] = list(dict.fromkeys(rows["split"].to_pylist()))
    if isinstance(spec.weights, LearnedWeights):
        found = [split for split in found if split != spec.weights.split]
    if not found:
        raise SpecError(f"score: {store.url} has no valid rows to score")
    return found


def _weights_of_store(
    pipeline: Pipeline, spec: ScoreSpec, store: FeatureStore, array: ArraySpec
) -> Floats:
    """Weights of the store's timesteps."""
    if isinstance(spec.weights, LearnedWeights):
        return _learned(spec, spec.weights, store, array)
    if isinstance(spec.weights, tuple):
        return given_weights(spec.weights, len(store.times))
    if spec.weights == "uniform":
        return np.ones(len(store.times))
    return rule_weights(spec.weights, store.times, _schedule(pipeline), array.tap)


def _schedule(pipeline: Pipeline) -> Schedule:
    """The noise schedule of the pipeline's model, from its structure."""
    if pipeline.backbone is None:
        raise SpecError("score.weights: a rule needs the model's schedule; name the backbone")
    model = find_model(pipeline.backbone, structure_only=True)
    return load_backbone(model, "meta").schedule_for(pipeline.image_spec)


def _learned(
    spec: ScoreSpec, learn: LearnedWeights, store: FeatureStore, array: ArraySpec
) -> Floats:
    data = FeatureDataset(store, [array.name], split=learn.split, view=spec.view, labelled=True)
    classes = classes_of(
        store.computed_spec.condition.candidates, spec.labels, store.index.label_names
    )
    known = np.flatnonzero(classes.of(data.selection.labels) >= 0)
    if not len(known):
        raise SpecError(
            f"score.weights: split {learn.split!r} has no rows whose label a candidate has"
        )
    n = min(learn.rows, len(known))
    places = known[(2 * np.arange(n) + 1) * len(known) // (2 * n)]
    means, labels = [], []
    for start, stop in _parts(n, array.bytes_per_row * len(store.times)):
        batch = data.read(places[start:stop])
        means.append(batch.features[array.name].float().mean(3).numpy())  # [b, t, c]
        labels.append(batch.label.numpy())
    losses_nct = np.concatenate(means).transpose(0, 2, 1)
    return learn_weights(losses_nct, classes.of_candidates, classes.of(np.concatenate(labels)))


def _parts(n: int, bytes_per_row: int) -> list[tuple[int, int]]:
    size = max(READ_BYTES // max(bytes_per_row, 1), 1)
    return [(start, min(start + size, n)) for start in range(0, n, size)]


def _read(
    data: FeatureDataset, name: str, start: int, stop: int
) -> tuple[Losses, np.ndarray, np.ndarray]:
    """Losses [b, c, t, m], rows and labels of some selected rows."""
    batch = data.read(np.arange(start, stop))
    losses_btcm = batch.features[name].float().numpy()
    return losses_btcm.transpose(0, 2, 1, 3), batch.row.numpy(), batch.label.numpy()


# --- with stages --------------------------------------------------------------------------------


def _of_stages(
    pipeline: Pipeline,
    spec: ScoreSpec,
    device: str | None,
    limit: int | None,
    part: tuple[int, int] | None,
    progress: Progress,
    stop: Stop | None,
) -> ScoreRun:
    started = time.perf_counter()
    url = spec.url or str(Path(pipeline.results) / "score")
    done = run_stages(
        pipeline, spec, url, device=device, limit=limit, part=part, progress=progress, stop=stop
    )
    run = ScoreRun(None, done.n_units, done.n_pending, done.n_left, done.failed)
    first = done.content.first_row
    run.invalid = [
        InvalidRow(row.row + first, row.key, row.stage, row.reason)
        for receipt in done.job.receipts()
        for row in receipt.invalid
    ]
    wanted = [unit for unit in done.job.units if limit is None or unit.start < limit]
    if not run.failed and not done.job.pending(wanted):
        run.result = _concluded(pipeline, spec, done, wanted, started)
    return run


def _concluded(
    pipeline: Pipeline, spec: ScoreSpec, done: StagedRun, units: Sequence[Unit], started: float
) -> ScoreResult | None:
    """The result of these units, all of which are done; None if no image has losses."""
    content, job = done.content, done.job
    features, plan = content.features, content.plan
    candidates = features.condition.candidates
    n_members = features.noise.members
    ends = np.cumsum([len(stage.places) for stage in plan]) * n_members
    whole = len(plan) == 1
    n_seen = len(plan[0].places)
    samples = curve_samples(n_seen, n_members) if whole else ends.tolist()
    tally = Tally(done.classes, samples)
    labels = done.index.table["label"].fill_null(NO_LABEL).to_numpy()
    order = [place for stage in plan for place in stage.places]
    weights_k = np.array(content.weights)[order]
    for unit in units:
        data = job.folder.get(losses_path(unit))
        for rows, found in read_losses(data, plan, len(candidates), n_members, READ_BYTES):
            tally.add(rows, labels[rows], found, weights_k)
    if not tally.rows:
        return None
    n_images = sum(map(len, tally.rows))
    result = conclude(
        Conclusion(
            pipeline=pipeline.name,
            spec=spec,
            source="stages",
            url=redacted(job.folder.url),
            fingerprint=job.spec.fingerprint(),
            dataset=features.dataset,
            candidates=tuple(map(str, candidates)),
            times=content.times,
            order=plan[0].places,
            weights=np.array(content.weights),
            cost=Cost(
                n_evaluations=int(sum(part.sum() for part in tally.evaluations)),
                n_full=n_images * len(candidates) * len(order) * n_members,
                n_encoded=n_images,
            ),
        ),
        tally,
        done.index.table["split"].to_pylist(),
        started,
    )
    _save(pipeline, result, tally, done.index)
    return result


def _save(pipeline: Pipeline, result: ScoreResult, tally: Tally, index: SampleIndex) -> None:
    folder = Path(pipeline.results)
    write_predictions(folder / result.table, result, tally, index.table)
    result.save(folder / "score.json")
