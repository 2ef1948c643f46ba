"""One linear classifier for every (tap, timestep) cell of a store, trained together in one pass.

The best cell of a source (this store, other stores, raw pixels) is chosen on a validation part of
the train split; its accuracy on the test split is reported, which is used for nothing else.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor

from drl_data.errors import SpecError, redacted
from drl_data.intervals import t_interval, wilson_interval
from drl_data.job_specs import ProbeSpec
from drl_data.linear_probes import (
    PIXELS_KEY,
    TOP,
    LinearProbes,
    PooledFeatures,
    ProbeSplit,
    Scores,
    settings,
)
from drl_data.pipeline import Pipeline
from drl_data.progress import SILENT, Progress
from drl_data.results import TaskResult
from drl_data.spec_base import Spec
from drl_data.splits import finished_store
from drl_data.store import FeatureStore
from drl_data.tasks.attentive import AttentiveFound, run_attentive
from drl_data.tasks.knn_probe import KnnCell, knn_cells
from drl_data.threads import one_thread

PIXELS = "pixels"
"""Name of the source that has no backbone at all."""

DIVERGED = 1e9
"""Stands for a loss that is not finite: of a learning rate that was too high."""


# --- results ------------------------------------------------------------------------------------


class ProbeCell(Spec):
    """Accuracies 0..1 of one (tap, timestep), one number for each seed."""

    tap: str
    timestep: float | None
    """None for pixels."""
    validation: tuple[float, ...]
    validation_loss: tuple[float, ...]
    """Cross-entropy in nats; decides between cells of equal validation accuracy."""
    test: tuple[float, ...]
    test_top5: tuple[float, ...] = ()
    """Empty where there are no more than five classes."""
    learning_rate: float | None = None
    weight_decay: float | None = None
    """The pair of the spec that is best on validation, of several."""
    high_frequency: float | None = None
    """Of a sweep: the mean High-Frequency Ratio of the train split's maps (frequency.py)."""

    @property
    def mean_validation(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.validation)

    @property
    def mean_test(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.test)

    def rank(self) -> tuple[float, float]:
        """Better cells have greater ranks; the test split has no say."""
        return self.mean_validation, -statistics.fmean(self.validation_loss)


class ProbeSource(Spec):
    """All cells of one store, or the raw pixels."""

    label: str
    store: str | None
    fingerprint: str | None
    cells: tuple[ProbeCell, ...]
    n_train: int
    n_validation: int
    n_test: int
    knn: tuple[KnnCell, ...] = ()
    attentive: AttentiveFound | None = None

    @property
    def best_knn(self) -> KnnCell | None:
        """The cell whose neighbours vote best on validation, if they were asked."""
        return max(self.knn, key=lambda cell: cell.validation, default=None)

    @property
    def knn_interval(self) -> tuple[float, float]:
        """95 % interval that the size of the test split leaves open (Wilson 1927)."""
        assert self.best_knn is not None
        return wilson_interval(self.best_knn.test, self.n_test)

    @property
    def best(self) -> ProbeCell:
        """The cell with the best mean validation accuracy; the test split has no say."""
        return max(self.cells, key=ProbeCell.rank)

    @property
    def frequency_correlation(self) -> float | None:
        """Spearman's rank correlation of High-Frequency Ratio and validation accuracy over the
        cells that have one; None of fewer than three, or where one of both is the same in all."""
        return _frequency_correlation(self.cells)

    @property
    def frequency_correlation_of_taps(self) -> float | None:
        """The mean of the same within each tap, where it says which timestep to take."""
        taps = dict.fromkeys(cell.tap for cell in self.cells)
        each = [_frequency_correlation([c for c in self.cells if c.tap == tap]) for tap in taps]
        known = [rho for rho in each if rho is not None]
        return statistics.fmean(known) if known else None

    def by_frequency(self, tap: str) -> ProbeCell | None:
        """The cell of a tap that A-SelecT takes: that of the greatest High-Frequency Ratio."""
        known = [c for c in self.cells if c.tap == tap and c.high_frequency is not None]
        return max(known, key=lambda cell: cell.high_frequency or 0.0, default=None)

    @property
    def seed_interval(self) -> tuple[float, float]:
        """95 % interval of the best cell's mean test accuracy over seeds (Student's t),
        within 0..1."""
        low, high = t_interval(self.best.test)
        return max(low, 0.0), min(high, 1.0)

    @property
    def sampling_interval(self) -> tuple[float, float]:
        """95 % interval that the size of the test split leaves open, at the mean (Wilson 1927)."""
        return wilson_interval(self.best.mean_test, self.n_test)


def _frequency_correlation(cells: Sequence[ProbeCell]) -> float | None:
    known = [cell for cell in cells if cell.high_frequency is not None]
    ratios = [cell.high_frequency for cell in known]
    accuracies = [cell.mean_validation for cell in known]
    if len(known) < 3 or len(set(ratios)) < 2 or len(set(accuracies)) < 2:
        return None
    return float(spearmanr(ratios, accuracies).statistic)


class ProbeResult(TaskResult):
    """What `run_probe` found; JSON on disk."""

    task = "probe"

    pipeline: str
    spec: ProbeSpec
    n_classes: int
    chance: float
    """1 / classes."""
    majority: float
    """Test accuracy of always answering the commonest class of the train split."""
    sources: tuple[ProbeSource, ...]
    device: str
    seconds: float


def format_table(result: ProbeResult) -> Table:
    """For the terminal: the best cell of each source, chosen on validation."""
    first = result.sources[0]
    table = Table(
        title=f"Linear probes, {result.n_classes} classes, {len(result.spec.seeds)} seeds, "
        f"{first.n_train} / {first.n_validation} / {first.n_test} train / validation / test",
        caption=f"chance {result.chance:.1%}, majority class {result.majority:.1%}; best cell by "
        "validation. Intervals are 95 %: over seeds (t), and of the test split's size (Wilson)",
        title_justify="left",
        caption_justify="left",
        box=None,
    )
    for name in ("source", "best tap", "timestep"):
        table.add_column(name, no_wrap=True)
    for name in ("validation", "test", "over seeds", "test split"):
        table.add_column(name, justify="right", no_wrap=True)
    for source in result.sources:
        best = source.best
        table.add_row(
            source.label,
            "" if best.timestep is None else best.tap,
            "" if best.timestep is None else f"{best.timestep:g}",
            f"{best.mean_validation:.1%}",
            f"{best.mean_test:.1%}",
            _span(source.seed_interval),
            _span(source.sampling_interval),
        )
        if (knn := source.best_knn) is not None:
            table.add_row(
                f"{source.label}, {knn.k} neighbours",
                knn.tap,
                "" if knn.timestep is None else f"{knn.timestep:g}",
                f"{knn.validation:.1%}",
                f"{knn.test:.1%}",
                "",
                _span(source.knn_interval),
            )
        if (fused := source.attentive) is not None:
            table.add_row(
                f"{source.label}, attentive",
                f"{fused.n_cells} cells fused",
                "",
                f"{fused.mean_validation:.1%}",
                f"{fused.mean_test:.1%}",
                _span(fused.seed_interval),
                _span(fused.sampling_interval),
            )
    return table


def format_ranking(result: ProbeResult, n: int = 30) -> Table:
    """For the terminal: the cells of the first source, best by validation first.

    Beside them the High-Frequency Ratio, with a star where it is the greatest of its tap: the
    timestep that A-SelecT takes.
    """
    source = result.sources[0]
    cells = sorted(source.cells, key=ProbeCell.rank, reverse=True)
    table = Table("rank", "tap", "timestep", "validation", "test", "HFR", box=None)
    for place, cell in enumerate(cells[:n], 1):
        when = "" if cell.timestep is None else f"{cell.timestep:g}"
        shown = (f"{cell.mean_validation:.1%}", f"{cell.mean_test:.1%}")
        ratio = "" if cell.high_frequency is None else f"{cell.high_frequency:.3f}"
        star = (
            "*" if cell.high_frequency is not None and cell == source.by_frequency(cell.tap) else ""
        )
        table.add_row(str(place), cell.tap, when, *shown, ratio + star)
    overall, within = source.frequency_correlation, source.frequency_correlation_of_taps
    if overall is not None:
        inside = "" if within is None else f", {within:+.2f} on average within a tap"
        table.caption = (
            "HFR: share of high frequencies, * the greatest of a tap (A-SelecT); its rank "
            f"correlation with validation accuracy is {overall:+.2f} over all cells{inside}"
        )
        table.caption_justify = "left"
    return table


def _span(interval: tuple[float, float]) -> str:
    return "{:.1%}..{:.1%}".format(*interval)


# --- the task -----------------------------------------------------------------------------------


def run_probe(
    pipeline: Pipeline, *, device: str | None = None, progress: Progress = SILENT
) -> ProbeResult:
    """Probe the pipeline's store, the stores of `probe.compare`, and raw pixels.

    Writes `<results>/probe.json`. `device` defaults to the first visible GPU, else the CPU.

    Raises:
        SpecError: no `probe` section, an unknown split, a store of another dataset.
        UserError: a store that is not there or not complete.
    """
    spec = pipeline.probe
    if spec is None:
        raise SpecError(f"pipeline {pipeline.name!r} lacks probe; `probe: {{}}` takes the defaults")
    started = time.perf_counter()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if taken := {pipeline.name, PIXELS} & spec.compare.keys():
        raise SpecError(f"probe.compare: {min(taken)!r} names another source; choose another label")
    own = finished_store(pipeline, "probe")
    split = ProbeSplit.of(own, spec)
    stores = {pipeline.name: own} | {
        label: _compared_store(label, path, own) for label, path in spec.compare.items()
    }
    sources: list[ProbeSource] = []
    pixels: list[ProbeSource] = []
    n_epochs = spec.epochs + (spec.attentive.epochs if spec.attentive else 0)
    with progress.bar("probe", len(stores) * n_epochs, "epochs") as bar:
        for label, store in stores.items():
            part = split if store is own else ProbeSplit.of(store, spec)
            data = PooledFeatures(store, spec, part, pixels=spec.pixels and store is own)
            n_settings = len(settings(spec))
            probes = LinearProbes(data.shapes, split.n_classes, spec.seeds, device, n_settings)
            with one_thread(probes.small):
                probes.standardise(data)
                for loss in probes.train(data, spec):
                    bar.advance(loss=loss)
                found = _sources(label, store, probes, data, spec)
            if spec.knn is not None:
                cells = knn_cells(store, spec, spec.knn, part, device)
                found[0] = found[0].model_copy(update={"knn": cells})
            if spec.attentive is not None:
                fused = run_attentive(store, spec, spec.attentive, part, device, bar)
                found[0] = found[0].model_copy(update={"attentive": fused})
            sources.append(found[0])
            pixels.extend(found[1:])
    result = ProbeResult(
        pipeline=pipeline.name,
        spec=spec,
        n_classes=split.n_classes,
        chance=1 / split.n_classes,
        majority=split.majority(),
        sources=(*sources, *pixels),
        device=device,
        seconds=time.perf_counter() - started,
    )
    result.save(Path(pipeline.results) / "probe.json")
    return result


def _compared_store(label: str, path: str, own: FeatureStore) -> FeatureStore:
    """The store of another pipeline file, over the same samples."""
    store = finished_store(Pipeline.load(path), f"probe.compare.{label}")
    if store.spec.dataset != own.spec.dataset:
        raise SpecError(
            f"probe.compare.{label}: {store.url} holds another dataset than {own.url} "
            f"({store.spec.dataset[:12]}..., want {own.spec.dataset[:12]}...); accuracies on "
            "different images do not compare"
        )
    return store


def _sources(
    label: str,
    store: FeatureStore,
    probes: LinearProbes,
    data: PooledFeatures,
    spec: ProbeSpec,
) -> list[ProbeSource]:
    """The store's cells and, if they were probed, the pixels'."""
    validation = probes.score(data, data.split.validation, data.train_split)
    test = probes.score(data, data.split.test, data.test_split)

    def source(label: str, of: FeatureStore | None, cells: Sequence[ProbeCell]) -> ProbeSource:
        return ProbeSource(
            label=label,
            store=None if of is None else redacted(of.url),
            fingerprint=None if of is None else of.fingerprint,
            cells=tuple(cells),
            n_train=len(data.split.train),
            n_validation=len(data.split.validation),
            n_test=len(data.split.test),
        )

    def cells(name: str, times: Sequence[float | None]) -> list[ProbeCell]:
        return [
            _cell(PIXELS if name == PIXELS_KEY else name, timestep, t, validation[name], test[name],
                  spec, data.split.n_classes)
            for t, timestep in enumerate(times)
        ]  # fmt: skip

    times = [when.requested for when in store.times]
    own = source(label, store, [cell for a in store.features for cell in cells(a.name, times)])
    if PIXELS_KEY not in data.shapes:
        return [own]
    return [own, source(PIXELS, None, cells(PIXELS_KEY, [None]))]


def _cell(
    tap: str,
    timestep: float | None,
    t: int,
    validation: Scores,
    test: Scores,
    spec: ProbeSpec,
    n_classes: int,
) -> ProbeCell:
    """The cell with the setting that is best on validation, the first of equals."""
    pairs, n_seeds = settings(spec), len(spec.seeds)

    def seeds_of(scores: Tensor, setting: int) -> tuple[float, ...]:
        heads = scores[t, setting * n_seeds : (setting + 1) * n_seeds]
        return tuple(heads.nan_to_num(DIVERGED, DIVERGED).tolist())

    def cell(setting: int) -> ProbeCell:
        rate, decay = pairs[setting]
        return ProbeCell(
            tap=tap,
            timestep=timestep,
            validation=seeds_of(validation.accuracy, setting),
            validation_loss=seeds_of(validation.loss, setting),
            test=seeds_of(test.accuracy, setting),
            test_top5=seeds_of(test.top5, setting) if n_classes > TOP else (),
            learning_rate=rate if len(pairs) > 1 else None,
            weight_decay=decay if len(pairs) > 1 else None,
        )

    return max((cell(i) for i in range(len(pairs))), key=ProbeCell.rank)
