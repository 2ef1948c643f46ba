"""Which tap and timestep? Probes on a few images, before everything is extracted: `probe --sweep`.

A-SelecT and others choose a timestep and a layer for each data set; a full extraction of all
candidates to find that one was wanted is what this spares.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from drl_data.errors import ExecutionError, SpecError
from drl_data.index import SampleIndex, build_index
from drl_data.pipeline import Pipeline, StoreSpec
from drl_data.progress import SILENT, Progress
from drl_data.runs import extract
from drl_data.selection import select
from drl_data.store import FeatureStore
from drl_data.tasks.frequency import mean_ratio
from drl_data.tasks.probe import ProbeResult, run_probe


def run_sweep(
    pipeline: Pipeline, n: int, *, device: str | None = None, progress: Progress = SILENT
) -> ProbeResult:
    """Extract about `n` labelled images of the probe's two splits into `<results>/sweep-N.zarr`,
    and probe every (tap, timestep) on them.

    Beside the accuracies, cells have the High-Frequency Ratio by which A-SelecT chooses.
    Writes `<results>/sweep-N/probe.json`. Which images is a function of their keys alone, so that
    a greater `n` adds to them. The pipeline's own store is neither read nor written.

    Raises:
        SpecError: no `probe` section; buckets; too few labelled images.
        UserError: whatever is wrong with the pipeline, its tars or its model.
        ExecutionError: an image or a unit failed.
    """
    spec = pipeline.probe
    if spec is None:
        raise SpecError(f"pipeline {pipeline.name!r} lacks probe; `probe: {{}}` takes the defaults")
    index = some_samples(build_index(pipeline.dataset), (spec.train, spec.test), n)
    results = Path(pipeline.results)
    own = pipeline.model_copy(
        update={
            "store": StoreSpec(url=str(results / f"sweep-{n}.zarr")),
            "features": pipeline.features.model_copy(update={"rows_per_unit": "auto"}),
            "results": str(results / f"sweep-{n}"),
            "probe": spec.model_copy(update={"compare": {}}),
        }
    )
    summary = extract(own, index=index, progress=progress)
    if summary.failed:
        unit, message = summary.failed[0]
        n_failed = len(summary.failed)
        raise ExecutionError(f"sweep: {n_failed} units failed, the first is {unit.id}: {message}")
    result = with_frequencies(run_probe(own, device=device, progress=progress), summary.store)
    result.save(Path(own.results) / "probe.json")
    return result


def with_frequencies(result: ProbeResult, store: FeatureStore) -> ProbeResult:
    """The result with the High-Frequency Ratio of each cell of its first source, `store`, over the
    valid rows of the train split: a number that needs no labels (A-SelecT)."""
    rows = select(store, split=result.spec.train).rows
    first, *rest = result.sources
    cells = tuple(
        cell.model_copy(
            update={
                "high_frequency": None
                if cell.timestep is None
                else mean_ratio(store, cell.tap, store.time_index(cell.timestep), rows)
            }
        )
        for cell in first.cells
    )
    return result.model_copy(update={"sources": (first.model_copy(update={"cells": cells}), *rest)})


def some_samples(index: SampleIndex, splits: tuple[str, str], n: int) -> SampleIndex:
    """About `n` labelled rows of the splits, of each its share; those whose keys have the smallest
    digests.

    Raises:
        SpecError: fewer than one row of a split.
    """
    table = index.table
    usable = pc.and_(pc.is_valid(table["label"]), pc.is_null(table["reason"]))
    names = np.asarray(table["split"].to_pylist())
    labelled = usable.to_numpy(zero_copy_only=False)
    of_each = [np.flatnonzero(labelled & (names == split)) for split in splits]
    n_usable = sum(len(rows) for rows in of_each)
    chosen = []
    for split, rows in zip(splits, of_each, strict=True):
        share = min(round(n * len(rows) / max(n_usable, 1)), len(rows))
        if share < 1:
            raise SpecError(
                f"sweep of {n}: {share} of {len(rows)} labelled samples of split {split!r}; want "
                "some of each, so more in all"
            )
        keys = table["key"].take(pa.array(rows)).to_pylist()
        order = sorted(range(len(rows)), key=lambda i: _digest(keys[i]))  # used here
        chosen.append(rows[order[:share]])
    return replace(index, table=table.take(pa.array(np.sort(np.concatenate(chosen)))))


def _digest(key: str) -> bytes:
    # Not that of `is_validation`, whose small digests are one part of the rows.
    return hashlib.blake2b(key.encode(), digest_size=8, person=b"sweep").digest()
