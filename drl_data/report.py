"""One HTML file that shows a store and what the tasks found; opens offline, holds everything.

Sections whose inputs are absent are left out. The page is report.html.j2; this file finds the
numbers and pictures for it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from drl_data.backbones import ModelFolder
from drl_data.charts import Chart, Series, heat_colour, line_chart
from drl_data.errors import UserError, redacted
from drl_data.intervals import mean_and_half
from drl_data.pictures import feature_pictures, sheet_uri, thumbnails
from drl_data.pipeline import Pipeline
from drl_data.plan import InvalidRow
from drl_data.receipts import Receipt
from drl_data.report_dense import corresponded, segmented
from drl_data.report_jobs import clusters, retrieved, synthetic
from drl_data.report_scores import scored
from drl_data.spec import ArraySpec, BackboneSpec
from drl_data.store import FeatureStore
from drl_data.tasks.distill import DistillResult
from drl_data.tasks.probe import ProbeCell, ProbeResult, ProbeSource

MAX_INVALID = 50
STAGES = ("read", "decode", "condition", "encode", "denoise", "copy", "write", "wait")


def write_report(pipeline: Pipeline, *, samples: Path | None = None) -> Path:
    """Write `<results>/report.html` from the pipeline's store and results; returns its path.

    `samples` is a PNG of images that the backbone drew.

    Raises:
        UserError: the pipeline names no store, or none is there yet.
        InputError: `samples`, or a result of a task, is not what it should be.
    """
    if pipeline.store is None or not FeatureStore.exists(pipeline.store.url):
        where = "no store" if pipeline.store is None else f"no store at {pipeline.store.url}"
        raise UserError(f"report: {where}; make it with `drl extract` first")
    store = FeatureStore.open(pipeline.store.url)
    store.locate_dataset(pipeline.dataset)
    receipts = list(store.receipts().values())
    results = Path(pipeline.results)
    shown = [] if store.spec.images is None else thumbnails(store)
    probe = _probe(results / "probe.json")
    context: dict[str, object] = {
        "pipeline": pipeline,
        "store": store,
        "n_bytes": sum(store_bytes for _, _, store_bytes in _array_bytes(store, receipts)),
        "status": _status(store, receipts),
        "training": _training(pipeline.backbone),
        "thumbnails": shown,
        "samples": None if samples is None else sheet_uri(samples),
        "features": feature_pictures(store, shown),
        "probe": probe,
        "student": _student(results / "distill.json"),
        "clusters": clusters(results / "cluster.json", store),
        "retrieved": retrieved(results / "retrieve.json", store),
        "segmented": segmented(results, store),
        "corresponded": corresponded(results, store),
        "synthetic": synthetic(
            results / "synthesize.json",
            None if pipeline.synthesize is None else pipeline.synthesize.url,
        ),
        "scored": scored(results / "score.json", store),
        "stages": _stages(receipts),
        "arrays": _array_bytes(store, receipts),
        "runs": _runs(receipts),
    }
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters.update(bytes=human_bytes, percent=_percent, redacted=redacted)
    template = resources.files("drl_data").joinpath("report.html.j2").read_text(encoding="utf-8")
    page = environment.from_string(template).render(context)
    results.mkdir(parents=True, exist_ok=True)
    path = results / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def human_bytes(n: int) -> str:
    """For people, in powers of 1000: `12.3 MB`."""
    power = 0 if n < 1000 else min(int(math.log10(n) // 3), 5)
    number = n / 1000**power
    return f"{number:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}"


def _percent(value: float) -> str:
    return f"{value:.1%}".replace("%", " %")


# --- what the store holds -----------------------------------------------------------------------


@dataclass(frozen=True)
class Status:
    """Rows by outcome; `invalid` is the head of the list."""

    n_ok: int
    n_invalid: int
    n_pending: int
    invalid: list[InvalidRow]


def _status(store: FeatureStore, receipts: Sequence[Receipt]) -> Status:
    invalid = sorted((row for r in receipts for row in r.invalid), key=lambda row: row.row)
    n_ok = sum(r.n_ok for r in receipts)
    n_pending = store.spec.n_samples - n_ok - len(invalid)
    return Status(n_ok, len(invalid), n_pending, invalid[:MAX_INVALID])


def _array_bytes(
    store: FeatureStore, receipts: Sequence[Receipt]
) -> list[tuple[ArraySpec, int, int]]:
    """(array, bytes of a sample, bytes written) of each array."""
    written: Counter[str] = Counter()
    for receipt in receipts:
        for record in receipt.objects:
            written[record.path.split("/")[0]] += record.n_bytes
    return [
        (a, a.bytes_per_row * a.n_cells(len(store.times)), written[a.name]) for a in store.arrays
    ]


@dataclass(frozen=True)
class Stages:
    """Seconds of every stage over all units, and what the run spent most on."""

    bars: list[tuple[str, float, float]]
    """(stage, seconds, share of the longest)."""
    bound_by: str


def _stages(receipts: Sequence[Receipt]) -> Stages | None:
    seconds: Counter[str] = Counter()
    for receipt in receipts:
        seconds.update(receipt.run.seconds)
    longest = max(seconds.values(), default=0.0)
    if not longest:
        return None
    names = [*STAGES, *sorted(seconds.keys() - set(STAGES))]
    groups = {
        "the network": sum(seconds[s] for s in ("condition", "encode", "denoise", "copy")),
        "waiting for images": seconds["wait"],
        "writing": seconds["write"],
    }
    return Stages(
        [(name, seconds[name], seconds[name] / longest) for name in names],
        max(groups, key=lambda name: groups[name]),
    )


@dataclass(frozen=True)
class Run:
    """Where and with what units were computed."""

    device: str
    n_units: int
    versions: str
    peak_bytes: int


def _runs(receipts: Sequence[Receipt]) -> list[Run]:
    groups: dict[tuple[str, str], list[Receipt]] = {}
    for receipt in receipts:
        versions = ", ".join(f"{k} {v}" for k, v in receipt.run.versions.items())
        groups.setdefault((receipt.run.device, versions), []).append(receipt)
    return [
        Run(device, len(group), versions, max(r.run.peak_bytes for r in group))
        for (device, versions), group in groups.items()
    ]


def _training(backbone: BackboneSpec | None) -> dict[str, object] | None:
    """What `drl pretrain` recorded beside the weights, if they are local and it made them."""
    local = backbone is not None and (
        backbone.model.startswith(("bundled:", "/", ".")) or Path(backbone.model).is_dir()
    )
    if backbone is None or not local or backbone.init == "random":
        return None
    try:
        record = json.loads((ModelFolder.find(backbone).root / "training.json").read_bytes())
    except (UserError, OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


# --- what the tasks found -----------------------------------------------------------------------


@dataclass(frozen=True)
class HeatCell:
    """A cell of a heat map: what it says, its colours, and its title on hover."""

    text: str
    background: str
    ink: str
    title: str
    best: bool


@dataclass(frozen=True)
class HeatMap:
    """One source's accuracies: rows are taps, columns timesteps."""

    label: str
    timesteps: list[str]
    rows: list[tuple[str, list[HeatCell]]]


@dataclass(frozen=True)
class Probe:
    """The probe's result, its heat maps and the ends of their common colour scale."""

    result: ProbeResult
    maps: list[HeatMap]
    low: float
    high: float
    scale: list[str]


def _probe(path: Path) -> Probe | None:
    if not path.exists():
        return None
    result = ProbeResult.load(path)
    mapped = [source for source in result.sources if len(source.cells) > 1]
    values = [cell.mean_test for source in mapped for cell in source.cells]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    return Probe(
        result,
        [_heat_map(source, low, high) for source in mapped],
        low,
        high,
        [heat_colour(i / 20)[0] for i in range(21)],
    )


def _heat_map(source: ProbeSource, low: float, high: float) -> HeatMap:
    taps = list(dict.fromkeys(cell.tap for cell in source.cells))
    times = list(dict.fromkeys(cell.timestep for cell in source.cells))
    cells = {(cell.tap, cell.timestep): cell for cell in source.cells}

    def shown(cell: ProbeCell) -> HeatCell:
        share = (cell.mean_test - low) / (high - low) if high > low else 1.0
        background, ink = heat_colour(share)
        title = (
            f"{cell.tap} at {cell.timestep:g}: test {cell.mean_test:.2%}, validation "
            f"{cell.mean_validation:.2%}"
        )
        return HeatCell(f"{100 * cell.mean_test:.1f}", background, ink, title, cell == source.best)

    return HeatMap(
        source.label,
        [f"{t:g}" for t in times],
        [(tap, [shown(cells[tap, t]) for t in times]) for tap in taps],
    )


@dataclass(frozen=True)
class StudentPart:
    """The distillation's result and its charts."""

    result: DistillResult
    verdicts: list[str]
    rival: str
    rows: list[tuple[str, str, str]]
    chances: list[tuple[float, float]]
    """Timesteps and the policy's chances of them."""
    loss: Chart
    accuracy: Chart | None
    """None if the student was not compared."""


def _student(path: Path) -> StudentPart | None:
    if not path.exists():
        return None
    result = DistillResult.load(path)
    policy = result.policy
    rival = result.few[0].rival if result.few else ""
    arms = {
        "distilled": [mean_and_half(few.distilled) for few in result.few],
        rival: [mean_and_half(few.scratch) for few in result.few],
    }
    rows = []
    for i, few in enumerate(result.few):
        one, two = (f"{100 * arm[i][0]:.1f} ± {100 * arm[i][1]:.1f} %" for arm in arms.values())
        rows.append((few.budget, one, two))
    return StudentPart(
        result,
        [few.verdict() for few in result.few],
        rival,
        rows,
        list(zip(policy.timesteps, policy.chances, strict=True)) if policy else [],
        line_chart(
            [str(i + 1) for i in range(len(result.loss))],
            [Series("loss", result.loss)],
            x_label="epoch",
            y_label="loss",
            y_max=max(1.0, *result.loss),
        ),
        line_chart(
            [few.labels for few in result.few],
            [Series(name, [m for m, _ in a], [h for _, h in a]) for name, a in arms.items()],
            x_label="labels",
            y_label="test accuracy",
            y_max=1.0,
            percent=True,
        )
        if result.few
        else None,
    )
