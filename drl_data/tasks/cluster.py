"""k-means on one cell of a store: clusters as pseudo-labels, for several k at once.

Self-guided diffusion (Hu et al. 2023) conditions a diffusion model on such clusters.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from rich.table import Table
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch import Tensor

from drl_data.errors import InputError, SpecError
from drl_data.job_specs import ClusterSpec
from drl_data.kmeans import Clustering, assign, kmeans
from drl_data.pipeline import Pipeline
from drl_data.pooling import Vectors, read_vectors
from drl_data.progress import SILENT, Progress
from drl_data.results import TaskResult
from drl_data.selection import NO_LABEL, Rows
from drl_data.spec_base import Spec
from drl_data.splits import finished_store

N_SHOWN_CLUSTERS, N_SHOWN_ROWS = 12, 10
"""Clusters, and rows nearest to their centroids, that the report shows."""


class Agreement(Spec):
    """How clusters and labels agree on the labelled rows of a split."""

    split: str
    n: int
    nmi: float
    """Normalised mutual information, 0..1 (arithmetic mean of the entropies)."""
    ari: float
    """Adjusted Rand index: 0 by chance, 1 for the same partition."""
    purity: float
    """Share of rows whose label is the commonest of their cluster; grows with k."""


class KMeansFound(Spec):
    """One clustering."""

    k: int
    inertia: float
    """Sum of squared distances of the rows that made the centroids."""
    iterations: int
    converged: bool
    n_relocated: int
    sizes: tuple[int, ...]
    """Rows of each cluster, of all that are assigned."""
    agreement: tuple[Agreement, ...]
    nearest: tuple[tuple[int, ...], ...]
    """Rows nearest to the centroids of the largest clusters, for the report."""


class ClusterResult(TaskResult):
    """What `run_cluster` found; JSON, and Parquet and safetensors of the same name.

    `assignments` has a line for each valid row: row, key, split, label, and for each k
    `cluster_K` int32 and `distance_K` float32. `centroids` has `centroids.K` float32 [k, c].
    """

    task: ClassVar[str] = "cluster"

    pipeline: str
    spec: ClusterSpec
    store: str
    fingerprint: str
    n_fitted: int
    n_assigned: int
    n_channels: int
    found: tuple[KMeansFound, ...]
    assignments: str
    centroids: str
    """Names of the two files, in the folder of this one."""
    device: str
    seconds: float


def format_table(result: ClusterResult) -> Table:
    """One line for each k."""
    table = Table(
        title=f"k-means of {result.spec.tap}: {result.n_fitted} rows x {result.n_channels} made "
        f"the centroids, {result.n_assigned} are assigned",
        title_justify="left",
        box=None,
    )
    for name in ("k", "inertia", "iterations", "smallest", "median", "largest", "NMI", "ARI"):
        table.add_column(name, justify="right", no_wrap=True)
    for found in result.found:
        sizes = sorted(found.sizes)
        known = ", ".join(f"{a.split} {a.nmi:.3f}" for a in found.agreement)
        table.add_row(
            str(found.k),
            f"{found.inertia:.6g}",
            f"{found.iterations}{'' if found.converged else ' (not converged)'}",
            str(sizes[0]),
            str(sizes[len(sizes) // 2]),
            str(sizes[-1]),
            known,
            ", ".join(f"{a.split} {a.ari:.3f}" for a in found.agreement),
        )
    return table


def run_cluster(
    pipeline: Pipeline, *, device: str | None = None, progress: Progress = SILENT
) -> ClusterResult:
    """Cluster one cell of the pipeline's store for every k of the spec.

    Writes `cluster.json`, `cluster.parquet` and `cluster.safetensors` in the results folder.
    `device` defaults to the first visible GPU, else the CPU.

    Raises:
        SpecError: no `cluster` section, an unknown split, fewer rows than k needs.
        TapError: the store has no such tap, timestep or view.
        UserError: a store that is not there or not complete.
    """
    spec = pipeline.cluster
    if spec is None:
        raise SpecError(
            f"pipeline {pipeline.name!r} lacks cluster; `cluster: {{tap: ...}}` is the least"
        )
    started = time.perf_counter()
    store = finished_store(pipeline, "cluster")
    vectors = read_vectors(store, spec, "cluster", normalise=spec.normalise == "l2")
    fitted = _fitted(vectors, spec)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    x = vectors.x.to(device)
    x_fitted = x if len(fitted) == len(x) else x[torch.from_numpy(fitted).to(device)]
    found: list[KMeansFound] = []
    columns: dict[str, pa.Array] = {}
    centroids: dict[str, Tensor] = {}
    with progress.bar("cluster", len(spec.k) * spec.n_init * spec.iterations, "passes") as bar:
        for k in spec.k:
            one = kmeans(
                x_fitted,
                k,
                seed=spec.seed,
                init=spec.init,
                n_init=spec.n_init,
                iterations=spec.iterations,
                tolerance=spec.tolerance,
                advance=bar.advance,
            )
            cluster, distance = (v.cpu().numpy() for v in assign(x, one.centroids))
            columns[f"cluster_{k}"] = pa.array(cluster, pa.int32())
            columns[f"distance_{k}"] = pa.array(distance, pa.float32())
            centroids[f"centroids.{k}"] = one.centroids.cpu().contiguous()
            found.append(_found(one, cluster, distance, vectors))
    result = ClusterResult(
        pipeline=pipeline.name,
        spec=spec,
        store=store.url,
        fingerprint=store.fingerprint,
        n_fitted=len(fitted),
        n_assigned=len(vectors.rows),
        n_channels=vectors.x.shape[1],
        found=tuple(found),
        assignments="cluster.parquet",
        centroids="cluster.safetensors",
        device=device,
        seconds=time.perf_counter() - started,
    )
    folder = Path(pipeline.results)
    folder.mkdir(parents=True, exist_ok=True)
    about = {b"fingerprint": store.fingerprint.encode(), b"spec": spec.model_dump_json().encode()}
    table = _table(vectors, columns).replace_schema_metadata(about)
    pq.write_table(table, folder / result.assignments, compression="zstd")
    safetensors.torch.save_file(centroids, folder / result.centroids)
    result.save(folder / "cluster.json")
    return result


def pseudo_labels(assignments: str | Path, k: int, n_samples: int) -> Rows:
    """Clusters as labels by row, int64 [n_samples]; -1 for rows that have none.

    `labels[batch.row]` are then the pseudo-labels of a batch of this store, or of any store over
    the same samples.

    Raises:
        InputError: no such file, or it has no clustering with this k, or other rows.
    """
    try:
        table = pq.read_table(assignments)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"{assignments}: no assignments of `drl cluster` ({error})") from error
    name = f"cluster_{k}"
    if name not in table.column_names or "row" not in table.column_names:
        have = [c.removeprefix("cluster_") for c in table.column_names if c.startswith("cluster_")]
        raise InputError(f"{assignments}: no clusters with k = {k}; it has {', '.join(have)}")
    rows = table["row"].to_numpy()
    if len(rows) and rows.max() >= n_samples:
        raise InputError(
            f"{assignments}: row {rows.max()}, but there are {n_samples} samples; it is of "
            "another store"
        )
    labels = np.full(n_samples, NO_LABEL, np.int64)
    labels[rows] = table[name].to_numpy()
    return labels


def _fitted(vectors: Vectors, spec: ClusterSpec) -> Rows:
    """Positions of the rows that make the centroids."""
    places = np.arange(len(vectors.rows))
    if spec.split is not None:
        splits = np.asarray(vectors.splits.to_pylist())
        places = np.flatnonzero(splits == spec.split)
        if not len(places):
            raise SpecError(
                f"cluster.split: no valid rows in {spec.split!r}; splits with features are "
                f"{sorted(set(splits.tolist()))}"
            )
    k = max(spec.k)
    if len(places) < k * spec.min_points:
        raise SpecError(
            f"cluster: k = {k} with min_points {spec.min_points} needs {k * spec.min_points} "
            f"rows, there are {len(places)}; want k <= {len(places) // spec.min_points}"
        )
    return places


def _found(one: Clustering, cluster: Rows, distance: np.ndarray, vectors: Vectors) -> KMeansFound:
    k = len(one.centroids)
    sizes = np.bincount(cluster, minlength=k)
    largest = np.argsort(-sizes, kind="stable")[:N_SHOWN_CLUSTERS]
    nearest = []
    for number in largest[sizes[largest] > 0].tolist():
        places = np.flatnonzero(cluster == number)
        order = np.argsort(distance[places], kind="stable")[:N_SHOWN_ROWS]
        nearest.append(tuple(vectors.rows[places[order]].tolist()))
    return KMeansFound(
        k=k,
        inertia=one.inertia,
        iterations=one.iterations,
        converged=one.converged,
        n_relocated=one.n_relocated,
        sizes=tuple(sizes.tolist()),
        agreement=tuple(_agreements(cluster, vectors)),
        nearest=tuple(nearest),
    )


def _agreements(cluster: Rows, vectors: Vectors) -> list[Agreement]:
    splits = np.asarray(vectors.splits.to_pylist())
    labelled = vectors.labels != NO_LABEL
    found = []
    for split in dict.fromkeys(splits[labelled].tolist()):
        chosen = labelled & (splits == split)
        label, own = vectors.labels[chosen], cluster[chosen]
        pairs = np.stack([own, label], 1)
        values, counts = np.unique(pairs, axis=0, return_counts=True)
        commonest: dict[int, int] = {}
        for (number, _), count in zip(values.tolist(), counts.tolist(), strict=True):
            commonest[number] = max(commonest.get(number, 0), count)
        found.append(
            Agreement(
                split=split,
                n=len(label),
                nmi=float(normalized_mutual_info_score(label, own)),
                ari=float(adjusted_rand_score(label, own)),
                purity=sum(commonest.values()) / len(label),
            )
        )
    return found


def _table(vectors: Vectors, columns: Mapping[str, pa.Array]) -> pa.Table:
    labels = pa.array(vectors.labels, mask=vectors.labels == NO_LABEL)
    return pa.table(
        {
            "row": vectors.rows,
            "key": vectors.keys,
            "split": vectors.splits,
            "label": labels,
            **columns,
        }
    )
