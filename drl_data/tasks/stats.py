"""Mean, variance and covariance of every (tap, timestep) of a store, in one pass, in float64.

What recipes need that normalise by the data set: DiffAE's `z_sem`, RAE's latents per channel and
position, LightningDiT's `latents_stats.pt`.

Shapes: n vectors, c channel.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import safetensors.torch
import torch
from rich.table import Table
from torch import Tensor

from drl_data.datasets import read_features
from drl_data.errors import redacted
from drl_data.moments import Moments
from drl_data.pipeline import Pipeline, StatsSpec
from drl_data.plan import Unit
from drl_data.progress import SILENT, Progress
from drl_data.results import TaskResult
from drl_data.selection import Rows, select
from drl_data.spec import ArraySpec
from drl_data.spec_base import Spec
from drl_data.splits import finished_store
from drl_data.store import FeatureStore

BLOCK_BYTES = 256 << 20
"""Features that are in memory at once, in float64 some times that."""


class StatsCell(Spec):
    """One (tap, timestep); tensors `KEY.mean`, `KEY.variance`, `KEY.covariance` are beside it."""

    tap: str
    timestep: float | None
    """None for an array that has one entry for all timesteps."""
    key: str
    """Beginning of the names of its tensors: `TAP.T`, T the position on the time axis."""
    count: int
    """Vectors that were counted: samples, or samples times positions."""
    mean: float
    """Mean of all entries."""
    std: float
    """Root of the mean variance of the channels (or entries) about their own means."""
    massive_channel: int
    """The channel whose mean square is largest: zero it before a norm if it towers (DiTF)."""
    massive_ratio: float
    """Its mean square over the median channel's."""


class StatsResult(TaskResult):
    """What `run_stats` found; JSON, and safetensors of the same name."""

    task: ClassVar[str] = "stats"

    pipeline: str
    spec: StatsSpec
    store: str
    fingerprint: str
    n_samples: int
    cells: tuple[StatsCell, ...]
    tensors: str
    """Name of the safetensors file, float64, in the folder of this one."""
    seconds: float


def format_table(result: StatsResult) -> Table:
    """One line for each cell."""
    table = Table("tap", "timestep", "vectors", "mean", "std", "largest channel", box=None)
    for cell in result.cells:
        table.add_row(
            cell.tap,
            "all" if cell.timestep is None else f"{cell.timestep:g}",
            str(cell.count),
            f"{cell.mean:.4g}",
            f"{cell.std:.4g}",
            f"{cell.massive_channel} (x{cell.massive_ratio:.3g})",
        )
    return table


def run_stats(
    pipeline: Pipeline, *, device: str | None = None, progress: Progress = SILENT
) -> StatsResult:
    """Statistics of the pipeline's store over its valid rows.

    Writes `<results>/stats.json` and `<results>/stats.safetensors`. `device` defaults to the first
    visible GPU, else the CPU. Rows are added up unit by unit in their order.

    Raises:
        SpecError: an unknown split.
        UserError: a store that is not there or not complete.
    """
    started = time.perf_counter()
    spec = pipeline.stats or StatsSpec()
    store = finished_store(pipeline, "stats")
    rows = select(store, split=spec.split).rows
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    places = [(array, t) for array in store.features for t in range(store.n_times(array.name))]
    cells: list[StatsCell] = []
    tensors: dict[str, Tensor] = {}
    with progress.bar("stats", len(places) * len(rows), "rows") as bar:
        for array, t in places:
            moments: Moments | None = None
            for block in _blocks(store, array, rows):
                features = read_features(store, array.name, t, block).to(chosen)
                found = Moments.of(vectors(features, array, spec), covariance=spec.covariance)
                moments = found if moments is None else moments.merged(found)
                bar.advance(len(block))
            assert moments is not None  # `select` gives at least one row
            cell, found_tensors = _described(store, array, t, spec, moments)
            cells.append(cell)
            tensors |= found_tensors
    folder = Path(pipeline.results)
    result = StatsResult(
        pipeline=pipeline.name,
        spec=spec,
        store=redacted(store.url),
        fingerprint=store.fingerprint,
        n_samples=len(rows),
        cells=tuple(cells),
        tensors="stats.safetensors",
        seconds=time.perf_counter() - started,
    )
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, folder / result.tensors)
    result.save(folder / "stats.json")
    return result


def vectors(features: Tensor, array: ArraySpec, spec: StatsSpec) -> Tensor:
    """Features [b, *shape] as what is averaged: [b positions, c], or whole rows [b, entries]."""
    if spec.over == "samples":
        return features.flatten(1)
    return features.movedim(array.channel_axis + 1, -1).flatten(0, -2)


def _blocks(store: FeatureStore, array: ArraySpec, rows: Rows) -> list[Rows]:
    """Rows of one unit each, in order, and no more of them than BLOCK_BYTES."""
    units: list[Unit] = store.units
    cuts = np.searchsorted(rows, [unit.start for unit in units[1:]])
    step = max(BLOCK_BYTES // array.bytes_per_row, 1)
    return [part[i : i + step] for part in np.split(rows, cuts) for i in range(0, len(part), step)]


def _described(
    store: FeatureStore, array: ArraySpec, t: int, spec: StatsSpec, moments: Moments
) -> tuple[StatsCell, dict[str, Tensor]]:
    """The cell, and its tensors: [c], or the shape of a row; covariance [c, c]."""
    key = f"{array.name}.{t}"
    own = array.shape if spec.over == "samples" else moments.mean.shape
    variance = moments.variance
    tensors = {f"{key}.mean": moments.mean.reshape(own), f"{key}.variance": variance.reshape(own)}
    if spec.covariance:
        tensors[f"{key}.covariance"] = moments.covariance
    square = moments.mean.square() + variance
    if spec.over == "samples":
        axis = array.channel_axis
        square = square.reshape(own).movedim(axis, 0).reshape(own[axis], -1).mean(1)
    median = float(square.median())
    cell = StatsCell(
        tap=array.name,
        timestep=store.times[t].requested if array.timesteps == "each" else None,
        key=key,
        count=moments.count,
        mean=float(moments.mean.mean()),
        std=float(variance.mean().sqrt()),
        massive_channel=int(square.argmax()),
        massive_ratio=float(square.max()) / median if median else 1.0,
    )
    return cell, {name: value.cpu().contiguous() for name, value in tensors.items()}
