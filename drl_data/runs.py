"""One pipeline from its file to a sealed store: index, resolve, create, compute what is pending."""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from drl_data.answers import Task
from drl_data.backbones import Model, ModelFolder, find_model
from drl_data.buckets import split_into_buckets
from drl_data.computers import condition_files
from drl_data.conditions import extremes
from drl_data.diffusion_spec import ConditionSpec, ScheduleSpec
from drl_data.errors import SpecError
from drl_data.executors import Workers, run_local, run_process, run_ray
from drl_data.extract import UnitResult, make_task
from drl_data.flops import FeatureFlops
from drl_data.index import SampleIndex, TarInfo, build_index, if_current
from drl_data.leases import Limits, Outcome
from drl_data.noise_bank import by_content, read_bank
from drl_data.pipeline import Pipeline, RunSpec, StoreSpec
from drl_data.plan import Unit, asked_units, auto_rows_per_unit
from drl_data.progress import SILENT, Progress
from drl_data.receipts import Reused
from drl_data.reduce import pca_of
from drl_data.repair import (
    Repair,
    readable_store,
    remove_damaged,
    remove_stale,
    require_fits,
    restore_root,
    sound_index,
)
from drl_data.resolve import count_feature_flops, resolve_features
from drl_data.reuse_task import make_reuse_task, open_reusable
from drl_data.spec import ArraySpec, BackboneSpec, FeatureSpec, ResolvedTime
from drl_data.stopping import Stop
from drl_data.store import FeatureStore
from drl_data.store_metadata import Described
from drl_data.threads import one_thread

log = logging.getLogger(__name__)

R = TypeVar("R")


@dataclass(frozen=True)
class Prepared:
    """A pipeline resolved against its data and its model: all that is known before a GPU works."""

    index: SampleIndex
    spec: FeatureSpec
    arrays: tuple[ArraySpec, ...]
    times: tuple[ResolvedTime, ...]
    model: Model
    condition: ConditionSpec
    """With the place of its files, which the spec leaves out."""
    missing: tuple[str, ...] = ()
    """Files that the pipeline names but that are not there, where only its structure is asked."""
    tars: tuple[TarInfo, ...] | None = None
    """Where the tars are now, unless the store's own index says it: it holds no secrets of URLs,
    and the same tars may have been written again or elsewhere since it was saved."""

    @property
    def without_weights(self) -> str | None:
        """Name of the bundled configuration that stands in for the weights, or None."""
        return self.model.config_only if isinstance(self.model, ModelFolder) else None

    def flops(self) -> FeatureFlops:
        """FLOPs for one image and one forward, counted on the meta device."""
        return count_feature_flops(self.model, self.spec, extremes(self.condition, self.index)[0])


@dataclass
class RunSummary:
    """What a run did; the numbers are sums over the receipts of the units it computed."""

    store: FeatureStore
    n_units: int
    n_pending: int
    n_ok: int = 0
    n_invalid: int = 0
    n_bytes: int = 0
    n_found: int = 0
    """Units that another run signed while this one ran."""
    reused: dict[str, Reused] = field(default_factory=dict)
    """URL of an older store -> what was copied from it."""
    wall_s: float = 0.0
    stage_s: Counter[str] = field(default_factory=Counter)
    failed: list[tuple[Unit, str]] = field(default_factory=list)
    n_left: int = 0
    """Pending units without an outcome, because the run was told to stop."""
    repaired: Repair = field(default_factory=Repair)
    """What was not as it must be, and was made again."""


def prepare(
    pipeline: Pipeline,
    *,
    structure_only: bool = False,
    index: SampleIndex | None = None,
    damaged: bool = False,
) -> Prepared:
    """Index the tars, read the model's structure, resolve taps, timesteps, shapes and unit size.

    No weights are loaded. Where the store exists already its index is reused if the tars have not
    changed, and its arrays if the spec is the same. With `structure_only` a hub id that is not at
    hand is planned from its bundled configuration, and files of weights, embeddings and noise may
    be made later; the fingerprint is then not that of the run. `index` has the rows, where they are
    known already (a bucket's). With `damaged` the store is no help where it cannot be read.

    Raises:
        UserError: whatever is wrong with the pipeline, its tars or its model.
    """
    missing: tuple[str, ...] = ()
    if structure_only:
        pipeline, missing = _without_missing_files(pipeline)
    backbone, schedule, store_spec = required_sections(pipeline)
    if pipeline.buckets is not None:
        raise SpecError(
            f"pipeline {pipeline.name!r} has buckets, which are a store each; use `extract_all`, "
            "or `split_into_buckets` and take one"
        )
    if damaged:
        store = readable_store(store_spec.url)
    else:
        store = FeatureStore.open(store_spec.url) if FeatureStore.exists(store_spec.url) else None
    known = None
    if store is not None:
        known = sound_index(store) if damaged else store.index
    if index is None and known is not None:
        index = if_current(known, pipeline.dataset)
    if index is None:
        index = build_index(pipeline.dataset)
    saved = index.public_tars() if known is None else known.tars
    tars = None if index.tars == saved else index.tars
    model, told = find_model(backbone, structure_only=structure_only), pipeline.condition
    bank = None if pipeline.noise.file is None else read_bank(pipeline.noise.file)
    draft = FeatureSpec(
        dataset=index.digest(),
        n_samples=index.n_samples,
        images=pipeline.image_spec,
        weights=model.digest(),
        backbone_dtype=backbone.dtype,
        latents=pipeline.latents,
        # Where the embeddings lie is no content; their digest is.
        condition=told.model_copy(update={"prompt_embeddings": None}),
        condition_files=condition_files(told),
        schedule=schedule,
        noise=by_content(pipeline.noise, bank),
        taps=pipeline.taps,
        dtype=pipeline.features.dtype,
        batch_size=pipeline.features.batch_size,
        rows_per_unit=1,
        overflow=pipeline.features.overflow,
        non_finite=pipeline.features.non_finite,
    )
    wanted = pipeline.features.rows_per_unit
    if store is not None:
        rows = store.spec.rows_per_unit if wanted == "auto" else wanted
        spec = draft.model_copy(update={"rows_per_unit": rows})
        if spec == store.spec:
            return Prepared(index, spec, store.arrays, store.times, model, told, missing, tars)
    arrays, times = resolve_features(model, draft, extremes(told, index), bank)
    if wanted == "auto":
        wanted = auto_rows_per_unit(arrays, index.n_samples, draft.batch_size)
    spec = draft.model_copy(update={"rows_per_unit": wanted})
    return Prepared(index, spec, arrays, times, model, told, missing, tars)


def _without_missing_files(pipeline: Pipeline) -> tuple[Pipeline, tuple[str, ...]]:
    """The pipeline without the local files that it names but that are not there; their names."""
    missing: list[str] = []

    def is_missing(path: str | None) -> bool:
        absent = path is not None and "://" not in path and not Path(path).exists()
        if absent:
            missing.append(str(path))
        return absent

    backbone, condition, noise = pipeline.backbone, pipeline.condition, pipeline.noise
    if backbone is not None and is_missing(backbone.weights):
        # Made of Python code or not, the structure is the same without its weights.
        backbone = backbone.model_copy(update={"weights": None, "init": "random", "lora": ()})
    elif backbone is not None and [lora for lora in backbone.lora if is_missing(lora.path)]:
        backbone = backbone.model_copy(update={"lora": ()})
    if is_missing(condition.prompt_embeddings):
        condition = condition.model_copy(update={"prompt_embeddings": None})
    if is_missing(noise.file):
        noise = noise.model_copy(update={"file": None})
    changes = {"backbone": backbone, "condition": condition, "noise": noise}
    return pipeline.model_copy(update=changes), tuple(missing)


def prepare_all(pipeline: Pipeline, *, structure_only: bool = False) -> list[Prepared]:
    """`prepare`, for each bucket of a pipeline that has buckets.

    Raises:
        UserError: whatever is wrong with the pipeline, its tars or its model.
    """
    return [
        prepare(part, structure_only=structure_only, index=index)
        for part, index in _parts(pipeline, SILENT)
    ]


def extract_all(
    pipeline: Pipeline,
    *,
    limit: int | None = None,
    part: tuple[int, int] | None = None,
    shuffle_seed: int | None = None,
    repair: bool = False,
    progress: Progress = SILENT,
    stop: Stop | None = None,
) -> list[RunSummary]:
    """`extract`, for each bucket of a pipeline that has buckets; `limit` and `part` are of each.

    Raises:
        UserError: whatever is wrong with the pipeline, its tars, its model, or its store.
        ExecutionError: if no worker is left.
    """
    return [
        extract(
            one,
            limit=limit,
            part=part,
            shuffle_seed=shuffle_seed,
            repair=repair,
            progress=progress,
            index=index,
            stop=stop,
        )
        for one, index in _parts(pipeline, progress)
    ]


def _parts(pipeline: Pipeline, progress: Progress) -> list[tuple[Pipeline, SampleIndex | None]]:
    """The pipeline itself, or those of its buckets with their rows."""
    if pipeline.buckets is None:
        return [(pipeline, None)]
    index = build_index(pipeline.dataset)
    buckets = split_into_buckets(pipeline, index, progress=progress)
    return [(bucket.pipeline, bucket.index) for bucket in buckets]


def extract(
    pipeline: Pipeline,
    *,
    limit: int | None = None,
    part: tuple[int, int] | None = None,
    shuffle_seed: int | None = None,
    repair: bool = False,
    progress: Progress = SILENT,
    index: SampleIndex | None = None,
    stop: Stop | None = None,
) -> RunSummary:
    """Compute every pending unit of a pipeline's store, and seal the store when none is left.

    `limit` stops after the units that hold the first `limit` rows, `part` (i, n) takes the i-th of
    n parts (from 0), `shuffle_seed` changes the order of the units; none of them changes a byte.
    `index` has the rows, where they are known already (a bucket's). With `repair` the store is read
    first, and what is damaged or missing in these units is made again: see repair.py. No other run
    may work on them meanwhile. Once `stop` is requested no unit begins, and those that compute have
    the time that it gives; the rest is `n_left`.

    Raises:
        UserError: whatever is wrong with the pipeline, its tars, its model, or its store.
        StorageUnusableError: if storage can be of no use, whatever is tried again.
        ExecutionError: if no worker is left, or too many units failed one after the other.
    """
    stop = stop or Stop()
    prepared = prepare(pipeline, index=index, damaged=repair)
    prepared.model.check_weights()
    _, _, store_spec = required_sections(pipeline)
    described = Described(prepared.spec, prepared.arrays, prepared.times)
    for url in store_spec.reuse:
        open_reusable(url, store_spec.url, prepared.spec)
    repaired = restore_root(store_spec.url, described) if repair else Repair()
    store = FeatureStore.create(store_spec.url, *described, prepared.index)
    units = asked_units(store.units, limit, part)
    if repair:
        repaired = repaired.merged(remove_damaged(store, prepared.index, units))
    elif any(pca_of(tap.reduce) is not None for tap in prepared.spec.taps):
        require_fits(store)
    pending = store.pending(units)
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(pending)
    summary = RunSummary(store, len(units), len(pending), n_left=len(pending))
    start = time.perf_counter()
    _compute(pipeline, prepared, pending, summary, progress, stop)
    if repaired.fits:
        repaired = repaired.merged(remove_stale(store, units))
        again = store.pending(units)
        summary.n_pending += len(again)
        summary.n_left += len(again)
        _compute(pipeline, prepared, again, summary, progress, stop)
    summary.wall_s = time.perf_counter() - start
    summary.repaired = repaired
    if not store.sealed and not store.pending():
        store.seal()
    return summary


def _compute(
    pipeline: Pipeline,
    prepared: Prepared,
    pending: Sequence[Unit],
    summary: RunSummary,
    progress: Progress,
    stop: Stop,
) -> None:
    """Compute units, counted in `summary`, until `stop`."""
    if not pending or stop.requested:
        return
    outcomes = run(pipeline, pending, stop, tars=prepared.tars)
    compute_units(outcomes, pending, summary, progress, stop, "extract")


def compute_units(
    outcomes: Generator[Outcome[UnitResult | None], None, None],
    pending: Sequence[Unit],
    summary: RunSummary,
    progress: Progress,
    stop: Stop,
    doing: str,
) -> None:
    """Let an executor work, until `stop`; its outcomes are counted in `summary`."""
    bar_of_rows = progress.bar(doing, sum(unit.n_rows for unit in pending), "images")
    with one_thread(), stop.heeded(), bar_of_rows as bar, closing(outcomes):
        for outcome in outcomes:
            _add(summary, outcome)
            bar.advance(outcome.unit.n_rows, failed=len(summary.failed))


def run(
    pipeline: Pipeline,
    units: Sequence[Unit],
    stop: Stop | None = None,
    *,
    tars: Sequence[TarInfo] | None = None,
) -> Generator[Outcome[UnitResult | None], None, None]:
    """Hand the units to the executor that `pipeline.run` names.

    `tars` says where the tars are, if the store's index does not (`Prepared.tars`).
    """
    backbone, _, store_spec = required_sections(pipeline)
    settings = pipeline.run
    n_cpus = cpus_of_worker(settings)
    extracting = partial(
        make_task,
        store_spec.url,
        backbone,
        pipeline.condition,
        settings,
        n_cpus,
        noise_file=pipeline.noise.file,
        tars=tars,
    )
    task: Callable[[], Task[UnitResult | None]] = extracting
    if store_spec.reuse:
        task = partial(make_reuse_task, extracting, store_spec, backbone, settings.memory_bytes)
    return hand_out(settings, task, units, stop)


def cpus_of_worker(settings: RunSpec) -> int:
    """Units that one worker computes at a time."""
    if settings.executor == "local":
        return torch.get_num_threads()
    return max(int(settings.cpus_per_worker), 1)


def hand_out(
    settings: RunSpec,
    task: Callable[[], Task[R]],
    units: Sequence[Unit],
    stop: Stop | None = None,
) -> Generator[Outcome[R], None, None]:
    """Hand the units to the executor that the settings name.

    `task` is made once in each worker; unless that is a thread it must be importable.

    Raises:
        as `run_local`, `run_process` and `run_ray` of executors.py.
    """
    limits = Limits(
        settings.leases or cpus_of_worker(settings) + 2,
        settings.max_attempts,
        settings.max_deaths_per_worker,
        settings.max_failed_in_a_row,
    )
    if settings.executor == "local":
        return run_local(task, units, limits=limits, stop=stop)
    workers = Workers(settings.workers, settings.gpus_per_worker, settings.cpus_per_worker)
    if settings.executor == "process":
        return run_process(
            task, units, workers=workers, limits=limits, stop=stop, grace_s=settings.grace_s
        )
    return run_ray(
        task,
        units,
        workers=workers,
        address=settings.address,
        limits=limits,
        stop=stop,
        grace_s=settings.grace_s,
    )


def required_sections(pipeline: Pipeline) -> tuple[BackboneSpec, ScheduleSpec, StoreSpec]:
    """The sections that extraction cannot do without.

    Raises:
        SpecError: naming those that the pipeline lacks.
    """
    if pipeline.source is not None:
        raise SpecError(
            f"pipeline {pipeline.name!r} imports its features (`source:`), and has no model that "
            "could compute some; `drl import` makes its store, which every task reads"
        )
    backbone, schedule, store = pipeline.backbone, pipeline.schedule, pipeline.store
    if backbone is None or schedule is None or store is None or not pipeline.taps:
        sections = {
            "backbone": backbone, "schedule": schedule, "store": store, "taps": pipeline.taps
        }  # fmt: skip
        missing = ", ".join(name for name, section in sections.items() if not section)
        raise SpecError(f"pipeline {pipeline.name!r} lacks {missing}; extraction needs them")
    return backbone, schedule, store


def _add(summary: RunSummary, outcome: Outcome[UnitResult | None]) -> None:
    """Count one unit; the receipt itself is not kept."""
    summary.n_left -= 1
    if outcome.result is None:
        summary.failed.append((outcome.unit, outcome.error or "unknown"))
        return
    if not outcome.result.computed:
        summary.n_found += 1
        return
    receipt = outcome.result.receipt
    summary.n_ok += receipt.n_ok
    summary.n_invalid += receipt.n_invalid
    summary.n_bytes += sum(record.n_bytes for record in receipt.objects)
    summary.stage_s.update(receipt.run.seconds)
    for more in receipt.run.reused:
        summary.reused[more.store] = more.added_to(summary.reused.get(more.store))
