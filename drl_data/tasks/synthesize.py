"""Images of a diffusion model as WebDataset tars: generative augmentation.

StableRep and SynCLR learn from images of captions, ScribbleGen noises real images and denoises
them again. What comes out is indexed, extracted and trained on like any other tars. Filters of what
was made, ControlNets, and features kept while sampling are not here: extract the tars.
"""

from __future__ import annotations

import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

from pydantic import JsonValue
from rich.table import Table

from drl_data.backbones.image_pipelines import resolve_call
from drl_data.backbones.loader import ModelFolder
from drl_data.errors import SpecError, redacted
from drl_data.index import build_index
from drl_data.pipeline import Pipeline, is_absolute
from drl_data.plan import InvalidRow, Unit, asked_units
from drl_data.progress import SILENT, Progress
from drl_data.results import TaskResult
from drl_data.runs import cpus_of_worker, hand_out
from drl_data.spec import BackboneSpec
from drl_data.stopping import Stop
from drl_data.synthesis_plan import SynthesisPlan, make_plan, needs_dataset
from drl_data.synthesis_tar import tar_name
from drl_data.synthesis_task import ENTRIES, Sources, Synthesis, UnitMade, make_synthesis_task
from drl_data.synthesize_spec import ImageCall, SynthesizeSpec
from drl_data.threads import one_thread
from drl_data.unit_jobs import JobSpec, UnitJob

MAX_LISTED = 50
"""Images that could not be made, in the result; receipts list all of them."""


class SynthesizeResult(TaskResult):
    """What a job has made so far, over all runs: sums over its receipts."""

    task: ClassVar[str] = "synthesize"

    pipeline: str
    spec: SynthesizeSpec
    call: ImageCall
    model: str
    revision: str | None
    weights: str
    url: str
    """Without its secrets."""
    fingerprint: str
    n_items: int
    n_units: int
    n_done: int
    """Units with a receipt."""
    n_ok: int
    n_invalid: int
    n_flagged: int
    """Images that a safety checker made black."""
    n_bytes: int
    invalid: tuple[InvalidRow, ...]
    """The first ones."""
    denoise_s: float
    """Seconds that the model worked, over all workers."""


@dataclass
class SynthesisRun:
    """What one run of a job did."""

    result: SynthesizeResult
    n_pending: int
    n_made: int = 0
    """Images of this run."""
    n_left: int = 0
    """Units without an outcome, because the run was told to stop."""
    wall_s: float = 0.0
    failed: list[tuple[Unit, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Prepared:
    """A job as it is known before any weights are loaded."""

    plan: SynthesisPlan
    what: Synthesis
    job: JobSpec


def run_synthesize(
    pipeline: Pipeline,
    *,
    limit: int | None = None,
    part: tuple[int, int] | None = None,
    progress: Progress = SILENT,
    stop: Stop | None = None,
) -> SynthesisRun:
    """Make every pending tar of a pipeline's section `synthesize`; run again, it goes on.

    `limit` stops after the tars that hold the first `limit` images, `part` (i, n) takes the i-th of
    n parts (from 0); neither changes a byte. Writes `synthesize.json` in the results folder.

    Raises:
        UserError: whatever is wrong with the section, the model, the prompts, or the folder, which
            may hold another job.
        StorageUnusableError: if storage can be of no use, whatever is tried again.
        ExecutionError: if no worker is left, or too many units failed one after the other.
    """
    stop = stop or Stop()
    prepared = prepare_synthesis(pipeline)
    what = prepared.what
    job = UnitJob.create(what.spec.url, prepared.job)
    job.folder.put_if_absent(ENTRIES, [prepared.plan.to_parquet()])
    units = asked_units(job.units, limit, part)
    pending = job.pending(units)
    start = time.perf_counter()
    failed: list[tuple[Unit, str]] = []
    n_made, n_left = 0, len(pending)
    if pending and not stop.requested:
        n_cpus = cpus_of_worker(pipeline.run)
        task = partial(make_synthesis_task, what.spec.url, what, n_cpus)
        outcomes = hand_out(pipeline.run, task, pending, stop)
        bar_of_images = progress.bar("synthesize", sum(u.n_rows for u in pending), "images")
        with one_thread(), stop.heeded(), bar_of_images as bar, closing(outcomes):
            for outcome in outcomes:
                n_left -= 1
                if outcome.result is None:
                    failed.append((outcome.unit, outcome.error or "unknown"))
                else:
                    n_made += _n_made(outcome.result)
                bar.advance(outcome.unit.n_rows, failed=len(failed))
    result = _result(pipeline, prepared, job)
    result.save(Path(pipeline.results) / "synthesize.json")
    wall_s = time.perf_counter() - start
    return SynthesisRun(result, len(pending), n_made, n_left, wall_s, failed)


def prepare_synthesis(pipeline: Pipeline) -> Prepared:
    """What a section `synthesize` asks for, resolved against model, prompts and dataset.

    Raises:
        SpecError: there is no such section or no model, or what the model cannot do.
        WeightsError: the model cannot be found.
        InputError: prompts or tars that cannot be read.
    """
    spec = pipeline.synthesize
    if spec is None:
        raise SpecError(
            f"pipeline {pipeline.name!r} lacks synthesize; `synthesize: {{url: DIR, prompts: [...]"
            "}` is the least of a text-to-image model"
        )
    backbone = spec.backbone or pipeline.backbone
    if backbone is None:
        raise SpecError("synthesize: want synthesize.backbone, or backbone of the pipeline")
    if backbone.model.startswith("python:"):
        raise SpecError(f"synthesize: {backbone.model} is code of its own, and makes no images")
    folder = ModelFolder.find(backbone, whole=True)
    folder.check_weights()
    call = resolve_call(folder, spec)
    index = build_index(pipeline.dataset) if needs_dataset(spec) else None
    plan = make_plan(spec, call, index)
    sources = None
    if spec.source is not None and index is not None:
        if pipeline.image_spec.n_views or pipeline.image_spec.frames > 1:
            raise SpecError("synthesize.source: want images without views and frames")
        sources = Sources(index, pipeline.image_spec)
    weights = folder.whole_digest()
    what = Synthesis(spec, backbone, call, model_name(backbone), weights, pipeline.run, sources)
    return Prepared(plan, what, _job(what, plan))


def model_name(backbone: BackboneSpec) -> str:
    """What samples record of a model's name; where a folder lies on this machine is no content."""
    is_folder = is_absolute(backbone.model) or backbone.model.startswith(".")
    is_folder = is_folder and not backbone.model.startswith("bundled:")
    return Path(backbone.model).resolve().name if is_folder else backbone.model


def _job(what: Synthesis, plan: SynthesisPlan) -> JobSpec:
    spec = what.spec
    content: dict[str, JsonValue] = {
        "synthesize": spec.model_dump(
            mode="json", exclude={"url", "backbone", "prompts", "classes", "samples_per_tar"}
        ),
        "call": what.call.model_dump(mode="json"),
        "model": {
            "name": what.model,
            "revision": what.backbone.revision,
            "weights": what.weights,
            "dtype": what.backbone.dtype,
        },
        "entries": {"number": plan.entries.num_rows, "digest": plan.digest()},
    }
    if what.sources is not None:
        content["dataset"] = what.sources.index.digest()
        content["images"] = what.sources.images.model_dump(mode="json")
    return JobSpec(
        kind="synthesize",
        content=content,
        n_rows=plan.n_items,
        rows_per_unit=spec.samples_per_tar,
    )


def _n_made(made: UnitMade) -> int:
    return made.receipt.n_ok if made.computed else 0


def _result(pipeline: Pipeline, prepared: Prepared, job: UnitJob) -> SynthesizeResult:
    what, counts = prepared.what, Counter[str]()
    invalid: list[InvalidRow] = []
    seconds = 0.0
    for receipt in job.receipts():
        counts.update(
            done=1,
            ok=receipt.n_ok,
            invalid=receipt.n_invalid,
            flagged=receipt.counts.flagged,
            n_bytes=sum(record.n_bytes for record in receipt.objects),
        )
        invalid += receipt.invalid[: MAX_LISTED - len(invalid)]
        seconds += receipt.run.seconds.get("denoise", 0.0)
    return SynthesizeResult(
        pipeline=pipeline.name,
        spec=what.spec.model_copy(update={"url": redacted(what.spec.url)}),
        call=what.call,
        model=what.model,
        revision=what.backbone.revision,
        weights=what.weights,
        url=redacted(what.spec.url),
        fingerprint=prepared.job.fingerprint(),
        n_items=prepared.plan.n_items,
        n_units=len(job.units),
        n_done=counts["done"],
        n_ok=counts["ok"],
        n_invalid=counts["invalid"],
        n_flagged=counts["flagged"],
        n_bytes=counts["n_bytes"],
        invalid=tuple(invalid),
        denoise_s=seconds,
    )


def tars_of(spec: SynthesizeSpec, n_units: int) -> str:
    """What `dataset.tars` names to read a finished job's images."""
    last = f"..{n_units - 1:06d}" if n_units > 1 else ""
    braces = f"{{000000{last}}}" if last else "000000"
    return f"{spec.url.rstrip('/')}/{tar_name(spec.name, 0).replace('000000', braces)}"


def format_table(result: SynthesizeResult) -> Table:
    """What was made, and how."""
    call, spec = result.call, result.spec
    table = Table(
        title=f"{result.n_ok} images of {result.n_items} in {result.n_done} of {result.n_units} "
        "tars",
        title_justify="left",
        box=None,
        show_header=False,
    )
    revision = f" at {result.revision}" if result.revision else ""
    guidance = "" if call.guidance_scale is None else f", guidance {call.guidance_scale:g}"
    rows = {
        "model": f"{result.model}{revision}, weights {result.weights[:16]}",
        "made by": f"{call.pipeline}, {call.scheduler}, {call.steps} steps{guidance}",
        "seed": str(spec.seed),
        "not made": str(result.n_invalid),
        "flagged": str(result.n_flagged),
        "tars": redacted(tars_of(spec, result.n_units)),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
