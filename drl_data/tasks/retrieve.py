"""Nearest neighbours by one cell of a store: a table for every row, and answers to single queries.

kNN-Diffusion and RDM condition a diffusion model on such neighbours.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.table import Table
from torch import Tensor

from drl_data.errors import InputError, SpecError
from drl_data.image_features import features_of_images
from drl_data.job_specs import RetrieveSpec
from drl_data.neighbours import ApproximateIndex, Neighbours, exact_neighbours, rank
from drl_data.pipeline import Pipeline
from drl_data.pooling import Vectors, read_vectors
from drl_data.progress import SILENT, Progress
from drl_data.results import TaskResult
from drl_data.selection import NO_LABEL, Rows, select
from drl_data.spec_base import Spec
from drl_data.splits import finished_store
from drl_data.store import FeatureStore

N_EXAMPLES, N_SHOWN = 10, 9
"""Queries, and neighbours of each, that the report shows."""


class Example(Spec):
    """A query and its first neighbours."""

    row: int
    neighbours: tuple[int, ...]


class RetrieveResult(TaskResult):
    """What `run_retrieve` found; JSON, and Parquet of the same name.

    `table` has a line for each query: row, key, split, `neighbours` (k rows, int64, nearest first;
    -1 where an approximate index found no more) and `distances` (float32, then NaN).
    """

    task: ClassVar[str] = "retrieve"

    pipeline: str
    spec: RetrieveSpec
    store: str
    fingerprint: str
    n_base: int
    n_queries: int
    n_channels: int
    recall: float | None
    """Share of the exact neighbours that the index found; None of an exact search."""
    n_recall_queries: int
    n_missing: int
    """Places in the table that hold -1."""
    same_label: float | None
    """Share of neighbours with the label of the query; None without labels."""
    same_label_chance: float | None
    """The same of rows drawn at random."""
    examples: tuple[Example, ...]
    table: str
    index: str | None
    """Names of the files in the folder of this one."""
    device: str
    seconds: float


@dataclass(frozen=True)
class Answer:
    """Neighbours of one query, nearest first."""

    query: str
    rows: list[int]
    keys: list[str]
    labels: list[int]
    distances: list[float]


def format_table(result: RetrieveResult) -> Table:
    """One line for each fact."""
    table = Table(show_header=False, box=None)
    spec = result.spec
    table.add_row("neighbours", f"{spec.k} of {result.n_base} rows by {spec.tap}, {spec.metric}")
    table.add_row("queries", str(result.n_queries))
    if result.recall is not None:
        how = f"{spec.index.kind}, on {result.n_recall_queries} queries against the exact answer"
        table.add_row("recall", f"{result.recall:.2%} ({how})")
    if result.n_missing:
        table.add_row("not found", f"{result.n_missing} places; raise retrieve.index.probes")
    if result.same_label is not None:
        chance = f"by chance {result.same_label_chance:.1%}"
        table.add_row("same label", f"{result.same_label:.1%} of neighbours ({chance})")
    table.add_row("table", result.table)
    return table


def format_answers(answers: Sequence[Answer]) -> Table:
    """One line for each neighbour."""
    table = Table("query", "row", "key", "label", "distance", box=None)
    for answer in answers:
        for i, row in enumerate(answer.rows):
            label = "" if answer.labels[i] == NO_LABEL else str(answer.labels[i])
            name = answer.query if i == 0 else ""
            table.add_row(name, str(row), answer.keys[i], label, f"{answer.distances[i]:.5f}")
    return table


def run_retrieve(
    pipeline: Pipeline, *, device: str | None = None, progress: Progress = SILENT
) -> RetrieveResult:
    """The neighbours of every query row, exactly or by an index.

    Writes `retrieve.json`, `retrieve.parquet` and, of an approximate index, `retrieve.faiss` in the
    results folder. `device` (of exact search) defaults to the first visible GPU, else the CPU.

    Raises:
        SpecError: no `retrieve` section, an unknown split, fewer rows than k, faiss is missing.
        TapError: the store has no such tap, timestep or view.
        UserError: a store that is not there or not complete.
    """
    spec = _section(pipeline)
    started = time.perf_counter()
    store = finished_store(pipeline, "retrieve")
    base = _vectors(store, spec, spec.split)
    queries = base if spec.queries is None else _vectors(store, spec, spec.queries)
    own = torch.from_numpy(_positions(queries.rows, base.rows))
    _check_k(spec, len(base.rows) - int(bool((own >= 0).any())))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(pipeline.results)
    folder.mkdir(parents=True, exist_ok=True)
    recall, n_tried = None, 0
    with progress.bar("retrieve", len(queries.rows), "queries") as bar:
        if spec.index.kind == "exact":
            x = base.x.to(device)
            asked = x if queries is base else queries.x.to(device)
            found = exact_neighbours(asked, x, spec.k, own=own.to(device), advance=bar.advance)
        else:
            index = ApproximateIndex.build(base.x, spec.index, spec.seed)
            found = _approximate(index, queries.x, base.x, spec.k, own)
            bar.advance(len(queries.rows))
            recall, n_tried = _recall(found, queries.x, base.x, own, spec, device)
            index.save(folder / "retrieve.faiss")
    rows = _rows(found, base)
    same, chance = _same_label(rows, queries, base)
    result = RetrieveResult(
        pipeline=pipeline.name,
        spec=spec,
        store=store.url,
        fingerprint=store.fingerprint,
        n_base=len(base.rows),
        n_queries=len(queries.rows),
        n_channels=base.x.shape[1],
        recall=recall,
        n_recall_queries=n_tried,
        n_missing=int((rows < 0).sum()),
        same_label=same,
        same_label_chance=chance,
        examples=_examples(rows, queries),
        table="retrieve.parquet",
        index=None if recall is None else "retrieve.faiss",
        device=device,
        seconds=time.perf_counter() - started,
    )
    _write(folder / result.table, rows, _distances(found, spec), queries, result)
    result.save(folder / "retrieve.json")
    return result


def query(
    pipeline: Pipeline,
    *,
    images: Sequence[Path] = (),
    rows: Sequence[int] = (),
    k: int | None = None,
    device: str | None = None,
) -> list[Answer]:
    """The nearest rows to image files, whose features are computed first, and to rows of the store.

    An approximate index is the one that `run_retrieve` saved.

    Raises:
        SpecError: no `retrieve` section, or a row that has no features.
        InputError: an image that is not there or does not decode; no saved index.
        UserError: whatever is wrong with the store or the pipeline.
    """
    spec = _section(pipeline)
    if k is not None:
        spec = spec.model_copy(update={"k": k})
    store = finished_store(pipeline, "retrieve")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    wanted = np.asarray(sorted(set(rows)), np.int64)
    if len(wanted):
        valid = select(store, [spec.tap], view=spec.view).rows
        if bad := sorted(set(wanted.tolist()) - set(valid.tolist())):
            raise SpecError(f"retrieve: row {bad[0]} has no features in {store.url}")
    names, parts = [str(image) for image in images], []
    if images:
        with tempfile.TemporaryDirectory() as folder:
            asked = features_of_images(pipeline, store, images, Path(folder))
            parts.append(_vectors(asked, spec, None).x)
    if len(wanted):
        stored = read_vectors(
            store, spec, "retrieve", normalise=spec.metric == "cosine", rows=wanted
        )
        parts.append(stored.x[torch.from_numpy(np.searchsorted(wanted, np.asarray(rows)))])
        names += [f"row {row}" for row in rows]
    if not parts:
        raise SpecError("retrieve: nothing is asked; name images or rows")
    own = np.concatenate([np.full(len(images), -1), np.asarray(rows, np.int64)])
    return _answers(pipeline, store, spec, names, torch.cat(parts), own, device)


def _answers(
    pipeline: Pipeline,
    store: FeatureStore,
    spec: RetrieveSpec,
    names: Sequence[str],
    asked: Tensor,
    own_rows: Rows,
    device: str,
) -> list[Answer]:
    base = _vectors(store, spec, spec.split)
    own = torch.from_numpy(_positions(own_rows, base.rows))
    _check_k(spec, len(base.rows) - int(bool((own >= 0).any())))
    if spec.index.kind == "exact":
        found = exact_neighbours(asked.to(device), base.x.to(device), spec.k, own=own.to(device))
    else:
        index = _saved_index(pipeline, store, spec, base)
        found = _approximate(index, asked, base.x, spec.k, own)
    distances = _distances(found, spec)
    answers = []
    for i, name in enumerate(names):
        places = [p for p in found.positions[i].tolist() if p >= 0]
        answers.append(
            Answer(
                name,
                base.rows[places].tolist(),
                [str(base.keys[p]) for p in places],
                base.labels[places].tolist(),
                distances[i, : len(places)].tolist(),
            )
        )
    return answers


def _saved_index(
    pipeline: Pipeline, store: FeatureStore, spec: RetrieveSpec, base: Vectors
) -> ApproximateIndex:
    """The index in the results folder, if it is of these vectors."""
    folder = Path(pipeline.results)
    result = RetrieveResult.load(folder / "retrieve.json")
    index = ApproximateIndex.load(folder / (result.index or "retrieve.faiss"))
    same = result.spec.model_copy(update={"k": spec.k}) == spec
    if not same or result.fingerprint != store.fingerprint or len(index) != len(base.rows):
        raise InputError(
            f"{folder / 'retrieve.faiss'}: an index of another store or other settings; run "
            "`drl retrieve` again"
        )
    return index


# --- parts --------------------------------------------------------------------------------------


def _section(pipeline: Pipeline) -> RetrieveSpec:
    if pipeline.retrieve is None:
        raise SpecError(
            f"pipeline {pipeline.name!r} lacks retrieve; `retrieve: {{tap: ...}}` is the least"
        )
    return pipeline.retrieve


def _vectors(store: FeatureStore, spec: RetrieveSpec, split: str | None) -> Vectors:
    return read_vectors(store, spec, "retrieve", split=split, normalise=spec.metric == "cosine")


def _positions(rows: Rows, base: Rows) -> Rows:
    """Where each row is in the base (increasing); -1 where it is not."""
    places = np.searchsorted(base, rows).clip(max=len(base) - 1)
    return np.where(base[places] == rows, places, -1)


def _check_k(spec: RetrieveSpec, available: int) -> None:
    if spec.k > available:
        raise SpecError(f"retrieve.k: {spec.k} neighbours of {available}; want at most {available}")


def _approximate(
    index: ApproximateIndex, queries: Tensor, base: Tensor, k: int, own: Tensor
) -> Neighbours:
    return rank(queries, base, index.candidates(queries, k, own))


def _recall(
    found: Neighbours, queries: Tensor, base: Tensor, own: Tensor, spec: RetrieveSpec, device: str
) -> tuple[float, int]:
    """Share of the exact neighbours of some queries among those found."""
    n = min(spec.recall_queries, len(queries))
    tried = torch.arange(n) * len(queries) // n
    exact = exact_neighbours(
        queries[tried].to(device), base.to(device), spec.k, own=own[tried].to(device)
    )
    hits = (exact.positions.cpu()[:, :, None] == found.positions[tried][:, None]).any(2)
    return float(hits.double().mean()), n


def _rows(found: Neighbours, base: Vectors) -> Rows:
    positions = found.positions.cpu().numpy()
    return np.where(positions < 0, -1, base.rows[positions])


def _distances(found: Neighbours, spec: RetrieveSpec) -> np.ndarray:
    """float32; of unit vectors 1 - cosine is half the squared distance."""
    distances = found.distances.cpu().numpy()
    if spec.metric == "cosine":
        distances = distances**2 / 2
    return distances.astype(np.float32)


def _same_label(rows: Rows, queries: Vectors, base: Vectors) -> tuple[float | None, float | None]:
    """Share of labelled neighbours with the query's label, and that of random rows."""
    known = base.labels != NO_LABEL
    labelled = queries.labels != NO_LABEL
    if not known.any() or not labelled.any():
        return None, None
    places = np.searchsorted(base.rows, np.where(rows < 0, base.rows[0], rows))
    counted = known[places] & (rows >= 0) & labelled[:, None]
    if not counted.any():
        return None, None
    same = base.labels[places] == queries.labels[:, None]
    values, counts = np.unique(base.labels[known], return_counts=True)
    share = dict(zip(values.tolist(), (counts / counts.sum()).tolist(), strict=True))
    chance = np.mean([share.get(label, 0.0) for label in queries.labels[labelled].tolist()])
    return float(same[counted].mean()), float(chance)


def _examples(rows: Rows, queries: Vectors) -> tuple[Example, ...]:
    n = min(N_EXAMPLES, len(rows))
    places = (2 * np.arange(n) + 1) * len(rows) // (2 * n)
    return tuple(
        Example(
            row=int(queries.rows[place]),
            neighbours=tuple(row for row in rows[place, :N_SHOWN].tolist() if row >= 0),
        )
        for place in places.tolist()
    )


def _write(
    path: Path, rows: Rows, distances: np.ndarray, queries: Vectors, result: RetrieveResult
) -> None:
    k = result.spec.k
    table = pa.table(
        {
            "row": queries.rows,
            "key": queries.keys,
            "split": queries.splits,
            "neighbours": pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), k),
            "distances": pa.FixedSizeListArray.from_arrays(pa.array(distances.reshape(-1)), k),
        }
    )
    about = {
        b"fingerprint": result.fingerprint.encode(),
        b"spec": result.spec.model_dump_json().encode(),
    }
    pq.write_table(table.replace_schema_metadata(about), path, compression="zstd")
