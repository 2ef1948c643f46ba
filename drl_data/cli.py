"""`drl`: parse, compose, print. No logic.

Exit status: 0 done; 1 some samples or units failed, and are listed; 2 the user's mistake, one clear
message; 3 interrupted, run the same command again to resume.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn, TypeVar

import typer
from pydantic import ValidationError
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

from drl_data.cli_print import (
    describe_reused,
    err,
    format_flops,
    out,
    print_invalid,
    print_plan,
    print_rows,
    print_spot_check,
    print_summary,
    print_synthesis,
)
from drl_data.errors import DrlDataError, SpecError, StoppedError, UserError, redacted
from drl_data.pipeline import Pipeline, RunSpec, StoreSpec
from drl_data.spec_base import Spec
from drl_data.stopping import Stop

if TYPE_CHECKING:
    from collections.abc import Sequence

    from drl_data.runs import RunSummary

S = TypeVar("S")
R = TypeVar("R", bound=Spec)

app = typer.Typer(
    name="drl",
    help="Precompute the inner features of diffusion models over image datasets.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
PipelineFile = Annotated[Path, typer.Argument(metavar="PIPELINE.yaml", help="Pipeline file.")]
StoreUrl = Annotated[str, typer.Argument(metavar="STORE", help="Folder or URL of a store.")]
OverrideStore = Annotated[str | None, typer.Option("--store", help="Store instead of the file's.")]
OverrideTars = Annotated[
    list[str] | None,
    typer.Option("--tars", help="Tars instead of the file's: URL, or SPLIT=URL; repeatable."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU if any.")]
Executor = Annotated[
    Literal["local", "process", "ray"] | None,
    typer.Option(help="Threads of this process, child processes, or a Ray cluster."),
]
NWorkers = Annotated[int | None, typer.Option("--workers", help="Child processes or Ray actors.")]
Gpus = Annotated[float | None, typer.Option(help="GPUs of one worker; fractions allowed.")]
Address = Annotated[str | None, typer.Option(help="Address of a Ray cluster.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first N samples.")]
Units = Annotated[str | None, typer.Option(help="Part I/N of the units, I from 0.")]
Shuffle = Annotated[int | None, typer.Option(help="Order of the units, by this seed.")]
Repaired = Annotated[
    bool, typer.Option("--repair", help="Read the store first; make what is damaged again.")
]


def main() -> None:
    """Entry point: errors become messages and exit statuses."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _SIGNALS.hear)
    try:
        app()
    except _Interrupted:
        err.print("interrupted; run the same command again to resume")
        sys.exit(3)
    except UserError as error:
        err.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)
    except DrlDataError as error:
        err.print(f"[red]failed:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)
    except Exception:  # a bug of ours: the traceback, but without what errors of others repeat
        err.print(redacted(traceback.format_exc()), soft_wrap=True, markup=False, highlight=False)
        sys.exit(1)


class _Interrupted(BaseException):
    """Somebody wants this process to end; a KeyboardInterrupt would be typer's to handle."""


class _Signals:
    """What SIGINT and SIGTERM do: end the command, or while units run ask for an end of the run."""

    def __init__(self) -> None:
        self._stop = Stop()
        self._grace_s = 0.0
        self._effect = ""

    def stop(self, grace_s: float, effect: str | None = None) -> Stop:
        """A wish that the first signal is passed on to while it is heeded; `effect` says what then
        happens."""
        self._stop, self._grace_s = Stop(), grace_s
        self._effect = effect or f"no unit begins now; those that run have {grace_s:g} s to finish"
        return self._stop

    def hear(self, number: int, _frame: FrameType | None) -> None:
        """The handler; it writes by itself, as the console may be at work on a line."""
        if not self._stop.is_heeded:
            raise _Interrupted
        name = signal.Signals(number).name
        if self._stop.requested:
            os.write(
                2, f"\n{name} again: ending at once; run the same command to resume\n".encode()
            )
            os._exit(3)  # child processes and actors end with their connection to this one
        os.write(
            2,
            f"\n{name}: {self._effect}. Once more ends at once.\n".encode(),
        )
        self._stop.request(self._grace_s)


_SIGNALS = _Signals()


class _RedactedFormatter(logging.Formatter):
    """Messages and tracebacks, also of libraries, without the secrets of URLs in them."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


@app.callback()
def _setup(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens.")] = False,
) -> None:
    handler = RichHandler(console=err, show_path=False)
    handler.setFormatter(_RedactedFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--out", help="Folder for data, store and report.")] = (
        Path("demo-out")
    ),
) -> None:
    """Real digits, a trained backbone, a store, a probe, a student, a report; offline, on a CPU."""
    from drl_data.demo import run_demo
    from drl_data.progress import console_progress

    report = run_demo(folder, console_progress(), out.print)
    out.print(f"report: {report}", soft_wrap=True)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this one.")] = None,
) -> None:
    """List the pipeline files that come with drl, or print one."""
    from drl_data.recipes import find_recipe, recipe_names

    if name is not None:
        sys.stdout.write(find_recipe(name).read_text(encoding="utf-8"))
        return
    table = Table("name", "paper", "description", box=None)
    for recipe in recipe_names():
        pipeline = Pipeline.load(find_recipe(recipe))
        table.add_row(recipe, pipeline.paper or "", pipeline.description)
    out.print(table)


@app.command()
def index(
    tars: Annotated[list[str], typer.Argument(help="Tars: paths or URLs, braces and globs.")],
    path: Annotated[str, typer.Option("--out", help="Parquet file to write.")],
) -> None:
    """Index tars: key, place, label and caption of every sample."""
    from drl_data.index import build_index
    from drl_data.progress import console_progress
    from drl_data.spec import DatasetSpec

    found = build_index(DatasetSpec(tars={"all": tuple(tars)}), progress=console_progress())
    found.save(path)
    repeated = f", {found.n_repeated_keys} with a key of another" if found.n_repeated_keys else ""
    out.print(
        f"{found.n_samples} samples{repeated} of {len(found.tars)} tars in {redacted(path)}",
        soft_wrap=True,
    )


@app.command()
def plan(file: PipelineFile, tars: OverrideTars = None, store: OverrideStore = None) -> None:
    """Shapes, bytes and objects of a run, before it starts."""
    from drl_data.runs import prepare_all

    pipeline = _load(file, tars, store)
    for prepared in prepare_all(pipeline, structure_only=True):
        print_plan(prepared)


@app.command()
def taps(
    model: Annotated[str, typer.Argument(help="Folder, hub id, bundled:NAME or python:MODULE:F.")],
    size: Annotated[int | None, typer.Option(min=1, help="Image side; default: its own.")] = None,
    depth: Annotated[int, typer.Option(min=0, help="Dotted parts shown; 0 for all.")] = 4,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub id.")] = None,
) -> None:
    """The modules that can be tapped, with axes (channel, height, width, token), shapes, and the
    share of the forward's FLOPs that is done at their end."""
    from drl_data.backbones.inventory import tappable_modules
    from drl_data.spec import BackboneSpec

    found = tappable_modules(BackboneSpec(model=model, revision=revision), size)
    table = Table("tap", "also", "module", "axes", "shape", "FLOPs", box=None)
    table.columns[0].no_wrap = True
    table.columns[0].overflow = "fold"
    for module in found.modules:
        if depth and module.path.count(".") >= depth:
            continue
        axes, shape = " ".join(d[0] for d in module.dims), "x".join(map(str, module.shape))
        also = found.aliases.get(module.path, "")
        table.add_row(module.path, also, module.kind, axes, shape, f"{module.share:.0%}")
    out.print(table)
    out.print(
        f"{model} at {found.image_size} px: {found.n_parameters / 1e6:.1f} M parameters, "
        f"{format_flops(found.flops)} a forward",
        soft_wrap=True,
    )


@app.command("try")
def try_(
    file: Annotated[Path, typer.Argument(help="Pipeline file (YAML), or the name of a recipe.")],
    folder: Annotated[
        Path | None, typer.Option("--out", help="Keep model, photographs and store here.")
    ] = None,
) -> None:
    """Run a pipeline on a tiny random model of its family and a few photographs, offline."""
    import tempfile

    from drl_data.recipes import find_recipe
    from drl_data.rehearse import rehearsal
    from drl_data.runs import extract_all

    given = Pipeline.load(file if file.exists() or file.suffix else find_recipe(str(file)))
    with tempfile.TemporaryDirectory() as temporary:
        (summary,) = extract_all(rehearsal(given, folder or Path(temporary)))
        for unit, message in summary.failed:
            err.print(f"[red]unit {unit.id} failed:[/] {escape(message)}", soft_wrap=True)
        table = Table("array", "tap", "axes", "shape", "dtype", "rms", box=None)
        store = summary.store
        for array in store.features:
            found = store.read_unit(array.name, 0, store.units[0]).astype("float32")
            axes, shape = " ".join(d[0] for d in array.dims), "x".join(map(str, array.shape))
            rms = float((found**2).mean() ** 0.5)
            table.add_row(array.name, array.tap, axes, shape, array.dtype, f"{rms:.3g}")
        out.print(table)
        out.print(
            f"{summary.n_ok} photographs x {len(store.times)} timesteps through a tiny random "
            f"{given.tiny.model if given.tiny else ''} in {summary.wall_s:.1f} s",
            soft_wrap=True,
        )
    raise typer.Exit(1 if summary.failed or summary.n_invalid else 0)


@app.command()
def extract(
    file: PipelineFile,
    tars: OverrideTars = None,
    store: OverrideStore = None,
    executor: Executor = None,
    workers: NWorkers = None,
    gpus: Gpus = None,
    address: Address = None,
    limit: Limit = None,
    units: Units = None,
    shuffle: Shuffle = None,
    repair: Repaired = False,
    reuse: Annotated[
        list[str] | None,
        typer.Option("--reuse", help="Copy what this older store has of it; repeatable."),
    ] = None,
) -> None:
    """Compute what is pending in a pipeline's store; run it again to resume."""
    from drl_data.progress import console_progress
    from drl_data.runs import extract_all

    pipeline = _load(file, tars, store)
    if reuse and pipeline.store is not None:
        changed = pipeline.store.model_copy(update={"reuse": tuple(reuse)})
        pipeline = pipeline.model_copy(update={"store": changed})
    pipeline = _with_run(pipeline, executor, workers, gpus, address)
    stop = _SIGNALS.stop(pipeline.run.grace_s)
    summaries = extract_all(
        pipeline,
        limit=limit,
        part=_parse_part(units),
        shuffle_seed=shuffle,
        repair=repair,
        progress=console_progress(),
        stop=stop,
    )
    _end_of_run(summaries)


@app.command("import")
def import_(
    file: PipelineFile,
    tars: OverrideTars = None,
    store: OverrideStore = None,
    executor: Executor = None,
    workers: NWorkers = None,
    address: Address = None,
    limit: Limit = None,
    units: Units = None,
    shuffle: Shuffle = None,
    repair: Repaired = False,
) -> None:
    """Features that are there already (`source:`) become a store; run it again to resume."""
    from drl_data.imports import import_features
    from drl_data.progress import console_progress

    pipeline = _with_run(_load(file, tars, store), executor, workers, None, address)
    stop = _SIGNALS.stop(pipeline.run.grace_s)
    summary = import_features(
        pipeline,
        limit=limit,
        part=_parse_part(units),
        shuffle_seed=shuffle,
        repair=repair,
        progress=console_progress(),
        stop=stop,
    )
    _end_of_run([summary])


def _end_of_run(summaries: Sequence[RunSummary]) -> NoReturn:
    """Say what came of a run, and exit as it deserves."""
    incomplete = [summary for summary in summaries if not print_summary(summary)]
    n_left = sum(summary.n_left for summary in summaries)
    if n_left:
        _exit_interrupted(n_left, "units")
    raise typer.Exit(1 if incomplete else 0)


def _exit_interrupted(n_left: int, what: str) -> NoReturn:
    err.print(f"interrupted, {n_left} {what} left; run the same command again to resume")
    _exit_now(3)


def _exit_now(status: int) -> NoReturn:
    """End without waiting for threads that compute still."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@app.command()
def merge(
    urls: Annotated[list[str], typer.Argument(metavar="STORE...", help="Finished stores.")],
    target: Annotated[str, typer.Option("--out", help="Folder or URL of the new store.")],
) -> None:
    """Join stores of other samples, or of other taps or timesteps of the same samples."""
    from drl_data.merge import merge as run_merge
    from drl_data.progress import console_progress

    stop = _SIGNALS.stop(RunSpec().grace_s)
    summary = run_merge(urls, target, progress=console_progress(), stop=stop)
    for old in summary.reused.values():
        out.print(f"of {escape(old.store)}: {describe_reused(old)}", soft_wrap=True)
    for unit, message in summary.failed:
        err.print(f"[red]unit {unit.id} failed:[/] {escape(message)}", soft_wrap=True)
    state = "sealed" if summary.store.sealed else "not finished"
    out.print(
        f"{target}: {state}, {summary.n_pending - summary.n_left - len(summary.failed)} of "
        f"{summary.n_units} units merged now",
        soft_wrap=True,
    )
    if summary.n_left:
        _exit_interrupted(summary.n_left, "units")
    raise typer.Exit(1 if print_invalid(summary.store) or summary.failed else 0)


@app.command()
def status(url: StoreUrl) -> None:
    """Units done and pending, samples ok and invalid, with reasons; from receipts alone."""
    from drl_data.ledger import Ledger
    from drl_data.store import FeatureStore

    store = FeatureStore.open(url)
    ledger = Ledger(store.iter_receipts())
    state = "sealed" if store.sealed else "open"
    out.print(
        f"{redacted(url)}: {state}, {ledger.n_units} of {len(store.units)} units done, "
        f"{ledger.n_ok} of {store.spec.n_samples} samples ok; fingerprint {store.fingerprint}",
        soft_wrap=True,
    )
    for array in store.arrays:
        shape = "x".join(map(str, array.shape))
        out.print(f"  {array.name}: {array.tap} {shape} {array.dtype}", soft_wrap=True)
    steps = ", ".join(f"{time.requested:g}" for time in store.times)
    out.print(f"  timesteps: {steps}", soft_wrap=True)
    raise typer.Exit(1 if print_rows(ledger.invalid) else 0)


@app.command()
def verify(
    url: StoreUrl,
    deep: Annotated[bool, typer.Option(help="Read every byte and check it.")] = False,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Extract K random rows anew and compare.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--pipeline", help="Pipeline file, for --sample: its model.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of rows.")] = 0,
    device: Device = None,
) -> None:
    """Check a store against its receipts: sizes, or with --deep checksums and values; with --sample
    also against the model."""
    from drl_data.store import FeatureStore, problems_at
    from drl_data.verify import foreign_objects

    problems = problems_at(url, deep=deep)
    for problem in problems:
        err.print(f"[red]problem:[/] {escape(str(problem))}", soft_wrap=True)
    units = sorted({problem.unit for problem in problems if problem.unit is not None})
    named = f"; units {', '.join(map(str, units))}" if units else ""
    out.print(f"{redacted(url)}: {len(problems)} problems{named}", soft_wrap=True)
    if any(problem.object == "zarr.json" for problem in problems):
        raise typer.Exit(1)
    store = FeatureStore.open(url)
    foreign = foreign_objects(store)
    if foreign:
        out.print(
            f"note: {len(foreign)} objects that are not the store's, such as {foreign[0]}",
            soft_wrap=True,
            markup=False,
        )
    agrees = True
    if sample is not None:
        from drl_data.spot_check import spot_check

        if file is None:
            raise SpecError("--sample needs --pipeline FILE, which says where the model is")
        checked = spot_check(store, Pipeline.load(file), sample, seed=seed, device=device)
        agrees = print_spot_check(checked)
    raise typer.Exit(0 if agrees and not problems else 1)


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="Folder or URL of a store.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Folder or URL of another.")],
    exact: Annotated[
        bool, typer.Option("--exact", help="Status 1 also where rows differ by rounding only.")
    ] = False,
) -> None:
    """Compare two stores: specs, arrays, rows, values; status 0 if equal but for rounding."""
    from drl_data.diff import diff_stores, format_diff
    from drl_data.store import FeatureStore

    found = diff_stores(FeatureStore.open(a), FeatureStore.open(b))
    for line in format_diff(found):
        out.print(line, soft_wrap=True, markup=False, highlight=False)
    columns = ("array", "timestep", "view", "rows", "differ", "beyond", "largest", "tolerance")
    table = Table(*columns, "first", box=None)
    for one in found.common:
        rows = one.found
        numbers = (rows.n_rows, rows.n_differing, rows.n_beyond)
        sizes = (f"{rows.largest:.2g}", f"{one.tolerance:.2g}")
        first = "" if rows.first is None else str(rows.first)
        table.add_row(one.array, one.timestep, one.view, *map(str, numbers), *sizes, first)
    out.print(table)
    out.print(f"{found.verdict}: {found.n_rows} rows of both compared", soft_wrap=True)
    wanted = ("equal",) if exact else ("equal", "equal within tolerance")
    raise typer.Exit(0 if found.verdict in wanted else 1)


@app.command()
def pretrain(file: PipelineFile, device: Device = None, tars: OverrideTars = None) -> None:
    """Train a small pixel-space DDPM on the pipeline's tars; run it again to resume."""
    from drl_data.index import build_index
    from drl_data.pretrain import pretrain as run_pretrain
    from drl_data.progress import console_progress

    pipeline = _load(file, tars, None)
    spec = _section(pipeline.pretrain, "pretrain", file)
    found = build_index(pipeline.dataset)
    folder = run_pretrain(
        spec, found, pipeline.image_spec, device=device, progress=console_progress()
    )
    out.print(f"weights: {folder}", soft_wrap=True)


@app.command()
def probe(
    file: PipelineFile,
    sweep: Annotated[
        int | None,
        typer.Option(min=2, help="Rank taps and timesteps on about N images, extracted apart."),
    ] = None,
    device: Device = None,
    store: OverrideStore = None,
) -> None:
    """Linear probes of every tap and timestep, trained together in one pass."""
    from drl_data.progress import console_progress
    from drl_data.tasks.probe import format_ranking, format_table, run_probe

    pipeline = _load(file, None, store)
    if sweep is None:
        out.print(format_table(run_probe(pipeline, device=device, progress=console_progress())))
        return
    from drl_data.tasks.sweep import run_sweep

    result = run_sweep(pipeline, sweep, device=device, progress=console_progress())
    out.print(format_ranking(result))
    out.print(format_table(result))


@app.command()
def stats(file: PipelineFile, device: Device = None, store: OverrideStore = None) -> None:
    """Mean, variance and covariance of every tap and timestep, in one pass, as safetensors."""
    from drl_data.progress import console_progress
    from drl_data.tasks.stats import format_table, run_stats

    out.print(format_table(run_stats(_load(file, None, store), device=device,
                                     progress=console_progress())))  # fmt: skip


@app.command()
def cluster(file: PipelineFile, device: Device = None, store: OverrideStore = None) -> None:
    """k-means on one tap and timestep: clusters of every row as Parquet, for several k at once."""
    from drl_data.progress import console_progress
    from drl_data.tasks.cluster import format_table, run_cluster

    out.print(format_table(run_cluster(_load(file, None, store), device=device,
                                       progress=console_progress())))  # fmt: skip


@app.command()
def retrieve(
    file: PipelineFile,
    image: Annotated[
        list[Path] | None, typer.Option(help="Ask with an image file; repeatable.")
    ] = None,
    row: Annotated[
        list[int] | None, typer.Option(min=0, help="Ask with a row of the store; repeatable.")
    ] = None,
    k: Annotated[int | None, typer.Option("-k", min=1, help="Neighbours of these.")] = None,
    device: Device = None,
    store: OverrideStore = None,
) -> None:
    """Nearest neighbours of every row as Parquet; or of some images or rows, printed."""
    from drl_data.progress import console_progress
    from drl_data.tasks.retrieve import format_answers, format_table, query, run_retrieve

    pipeline = _load(file, None, store)
    if image or row:
        out.print(format_answers(query(pipeline, images=image or (), rows=row or (), k=k,
                                       device=device)))  # fmt: skip
        return
    if k is not None:
        raise SpecError("drl retrieve: -k is for --image and --row; the table has `retrieve.k`")
    out.print(format_table(run_retrieve(pipeline, device=device, progress=console_progress())))


@app.command()
def segment(file: PipelineFile, device: Device = None, store: OverrideStore = None) -> None:
    """Pixel classifiers on a few labelled images: mean IoU, and predictions as PNG."""
    from drl_data.progress import console_progress
    from drl_data.tasks.segment import format_table, run_segment

    out.print(format_table(run_segment(_load(file, None, store), device=device,
                                       progress=console_progress())))  # fmt: skip


@app.command()
def correspond(file: PipelineFile, device: Device = None, store: OverrideStore = None) -> None:
    """Keypoints matched between images: PCK of every tap and timestep; or of known warps."""
    from drl_data.progress import console_progress
    from drl_data.tasks.correspond import format_tables, run_correspond

    result = run_correspond(_load(file, None, store), device=device, progress=console_progress())
    for table in format_tables(result):
        out.print(table)
    for name in result.named:
        out.print(f"left out: {name}", soft_wrap=True, markup=False)


@app.command()
def score(
    file: PipelineFile,
    tars: OverrideTars = None,
    store: OverrideStore = None,
    device: Device = None,
    executor: Executor = None,
    workers: NWorkers = None,
    gpus: Gpus = None,
    address: Address = None,
    limit: Limit = None,
    units: Units = None,
) -> None:
    """Classify images by their denoising losses under each candidate: of a store, or in stages."""
    from drl_data.progress import console_progress
    from drl_data.tasks.score import run_score
    from drl_data.tasks.score_result import format_table

    pipeline = _with_run(_load(file, tars, store), executor, workers, gpus, address)
    stop = _SIGNALS.stop(pipeline.run.grace_s)
    found = run_score(pipeline, device=device, limit=limit, part=_parse_part(units),
                      progress=console_progress(), stop=stop)  # fmt: skip
    n_bad = print_rows(found.invalid, "the receipts have")
    for unit, message in found.failed:
        err.print(f"[red]unit {unit.id} failed:[/] {escape(message)}", soft_wrap=True)
    if found.result is not None:
        out.print(format_table(found.result))
    elif not found.n_left:
        n_done = found.n_units - len(found.failed)
        out.print(f"{n_done} of the {found.n_units} units asked for have losses; there is no "
                  "result before all have", soft_wrap=True)  # fmt: skip
    if found.n_left:
        _exit_interrupted(found.n_left, "units")
    raise typer.Exit(1 if found.failed or n_bad else 0)


@app.command()
def distill(
    file: PipelineFile,
    device: Device = None,
    store: OverrideStore = None,
    executor: Annotated[Literal["local", "ray"] | None, typer.Option(help="Who trains.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Workers of Ray Train.")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, max=1, help="GPUs of each.")] = None,
    address: Annotated[str | None, typer.Option(help="Address of a Ray cluster.")] = None,
) -> None:
    """Train a student on stored features, then on few labels, against one from scratch; run it
    again to resume."""
    from drl_data.progress import console_progress
    from drl_data.tasks.distill import format_table, run_distill

    pipeline = _load(file, None, store)
    spec = _section(pipeline.distill, "distill", file)
    if executor == "local" and workers is None:
        workers = 1  # the file's are Ray's
    given = {
        "executor": executor, "workers": workers, "gpus_per_worker": gpus, "address": address
    }  # fmt: skip
    spec = spec.model_copy(update={"run": _changed(spec.run, given, "distill.run")})
    stop = _SIGNALS.stop(spec.run.grace_s, "the training writes a checkpoint and ends")
    try:
        found = run_distill(
            pipeline.model_copy(update={"distill": spec}),
            device=device,
            progress=console_progress(),
            stop=stop,
        )
    except StoppedError as error:
        err.print(f"interrupted: {escape(str(error))}", soft_wrap=True)
        _exit_now(3)
    if found is not None:  # not of this process, under torchrun
        out.print(format_table(found))


@app.command()
def synthesize(
    file: PipelineFile,
    executor: Executor = None,
    workers: NWorkers = None,
    gpus: Gpus = None,
    address: Address = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N images.")] = None,
    units: Annotated[str | None, typer.Option(help="Part I/N of the tars, I from 0.")] = None,
    url: Annotated[
        str | None, typer.Option("--out", help="Folder or URL for the tars, not the file's.")
    ] = None,
) -> None:
    """Images of prompts, classes or other images, as tars; run it again to resume."""
    from drl_data.progress import console_progress
    from drl_data.tasks.synthesize import format_table, run_synthesize

    pipeline = _load(file, None, None)
    section = _section(pipeline.synthesize, "synthesize", file)
    if url is not None:
        section = section.model_copy(update={"url": url})
    pipeline = _with_run(pipeline, executor, workers, gpus, address)
    stop = _SIGNALS.stop(pipeline.run.grace_s)
    done = run_synthesize(
        pipeline.model_copy(update={"synthesize": section}),
        limit=limit,
        part=_parse_part(units),
        progress=console_progress(),
        stop=stop,
    )
    print_synthesis(done, format_table(done.result))
    if done.n_left:
        _exit_interrupted(done.n_left, "tars")
    raise typer.Exit(1 if done.failed or done.result.n_invalid else 0)


@app.command("export")
def export_(
    url: StoreUrl,
    to: Annotated[
        Literal["npy", "safetensors", "parquet", "webdataset", "hdf5"],
        typer.Option(help="Format of the files."),
    ],
    folder: Annotated[Path, typer.Option("--out", help="Folder for them, empty or begun before.")],
    tap: Annotated[list[str] | None, typer.Option(help="Only this tap; repeatable.")] = None,
    timestep: Annotated[
        list[float] | None, typer.Option(help="Only this timestep; repeatable.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Only this split.")] = None,
    view: Annotated[str | None, typer.Option(help="A view of the store; default: the first.")] = (
        None
    ),
    names: Annotated[
        Literal["key", "row"], typer.Option(help="What .npy files are called by.")
    ] = "key",
    rows_per_file: Annotated[int | None, typer.Option(min=1, help="Default: 10000.")] = None,
    images: Annotated[
        bool, typer.Option("--images", help="npy: also the images, as REPA's reader wants them.")
    ] = False,
) -> None:
    """Features as .npy trees, safetensors shards, Parquet, WebDataset or HDF5; resumable."""
    from drl_data.progress import console_progress
    from drl_data.store import FeatureStore
    from drl_data.tasks.export import export

    found = export(
        FeatureStore.open(url),
        to,
        folder,
        taps=tap,
        timesteps=timestep,
        split=split,
        view=view,
        names=names,
        rows_per_file=rows_per_file,
        images=images,
        progress=console_progress(),
    )
    out.print(
        f"{found.n_samples} samples in {folder}, {found.n_invalid} without features left out",
        soft_wrap=True,
    )


@app.command()
def report(file: PipelineFile, store: OverrideStore = None) -> None:
    """Write report.html from a store and what the tasks found."""
    from drl_data.report import write_report

    out.print(f"report: {write_report(_load(file, None, store))}", soft_wrap=True)


def _load(file: Path, tars: list[str] | None, store: str | None) -> Pipeline:
    """The pipeline with what the command line may change: where, never what."""
    pipeline = Pipeline.load(file)
    if tars:
        splits: dict[str, tuple[str, ...]] = {}
        for item in tars:
            split, _, url = item.rpartition("=") if "=" in item.split("/")[0] else ("all", "", item)
            splits[split] = (*splits.get(split, ()), url)
        dataset = pipeline.dataset.model_copy(update={"tars": splits})
        pipeline = pipeline.model_copy(update={"dataset": dataset})
    if store is not None:
        reuse = () if pipeline.store is None else pipeline.store.reuse
        pipeline = pipeline.model_copy(update={"store": StoreSpec(url=store, reuse=reuse)})
    return pipeline


def _with_run(
    pipeline: Pipeline,
    executor: Literal["local", "process", "ray"] | None,
    workers: int | None,
    gpus: float | None,
    address: str | None,
) -> Pipeline:
    """The pipeline with what the command line says of where it runs."""
    given = {
        "executor": executor, "workers": workers, "gpus_per_worker": gpus, "address": address
    }  # fmt: skip
    return pipeline.model_copy(update={"run": _changed(pipeline.run, given, "run")})


def _changed(spec: R, given: Mapping[str, object], place: str) -> R:
    """Logistics with what the command line says of them."""
    changes = {key: value for key, value in given.items() if value is not None}
    try:
        return type(spec).model_validate({**spec.model_dump(), **changes})
    except ValidationError as error:
        reasons = "; ".join(str(problem["msg"]) for problem in error.errors())
        raise SpecError(f"{place}: {reasons.replace('Value error, ', '')}") from error


def _section(section: S | None, name: str, file: Path) -> S:
    if section is None:
        raise SpecError(f"{file} has no section `{name}:`")
    return section


def _parse_part(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[2]) == 0:
        raise SpecError(f"--units {text!r}: want I/N with 0 <= I < N, for example 0/4")
    return int(match[1]), int(match[2])
