"""The vote of the nearest neighbours on every (tap, timestep) of a store: no training at all.

Shapes: n train rows, m asked rows, c channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from drl_data.job_specs import CellSpec, KnnSpec, ProbeSpec
from drl_data.linear_probes import TOP, ProbeSplit
from drl_data.pooling import read_vectors
from drl_data.spec_base import Spec
from drl_data.store import FeatureStore

KNN_BLOCK = 1024


class KnnCell(Spec):
    """Accuracies 0..1 of the nearest neighbours' vote on one (tap, timestep)."""

    tap: str
    timestep: float | None
    """None for a tap that has one entry for all timesteps."""
    k: int
    """The number of neighbours that is best on validation."""
    validation: float
    test: float
    test_top5: float | None
    """None where there are no more than five classes."""


def knn_cells(
    store: FeatureStore, spec: ProbeSpec, knn: KnnSpec, split: ProbeSplit, device: str
) -> tuple[KnnCell, ...]:
    """The vote of the nearest train rows on every (tap, timestep)."""
    cells = []
    for array in store.features:
        times: list[float | None] = [when.requested for when in store.times]
        for timestep in times if array.timesteps == "each" else [None]:
            at = CellSpec(tap=array.name, timestep=timestep, pool=spec.pool)
            x = {
                name: read_vectors(store, at, "probe", normalise=True, rows=rows).x.to(device)
                for name, rows in (
                    ("train", split.train), ("validation", split.validation), ("test", split.test)
                )
            }  # fmt: skip
            y = {
                "train": torch.from_numpy(split.target[split.train]).to(device),
                "validation": torch.from_numpy(split.target[split.validation]).to(device),
                "test": torch.from_numpy(split.target[split.test]).to(device),
            }
            found = {
                name: knn_accuracy(x["train"], y["train"], x[name], y[name], knn, split.n_classes)
                for name in ("validation", "test")
            }
            best = max(range(len(knn.k)), key=lambda i: found["validation"][i][0])
            top1, top5 = found["test"][best]
            cells.append(
                KnnCell(
                    tap=array.name,
                    timestep=timestep,
                    k=knn.k[best],
                    validation=found["validation"][best][0],
                    test=top1,
                    test_top5=top5 if split.n_classes > TOP else None,
                )
            )
    return tuple(cells)


def knn_accuracy(
    train_nc: Tensor,
    train_y: Tensor,
    asked_mc: Tensor,
    asked_y: Tensor,
    knn: KnnSpec,
    n_classes: int,
) -> list[tuple[float, float]]:
    """(top-1, top-5) accuracy of unit vectors for every k of the spec."""
    right = torch.zeros(len(knn.k), 2, dtype=torch.float64)
    for x, y in zip(torch.split(asked_mc, KNN_BLOCK), torch.split(asked_y, KNN_BLOCK), strict=True):
        nearest = (x @ train_nc.T).topk(min(max(knn.k), len(train_nc)), dim=1)
        weights = ((nearest.values - 1) / knn.temperature).exp()  # at most 1: nothing overflows
        for i, k in enumerate(knn.k):
            votes = x.new_zeros(len(x), n_classes)
            votes.scatter_add_(1, train_y[nearest.indices[:, :k]], weights[:, :k])
            best = votes.topk(min(TOP, n_classes), dim=1).indices == y[:, None]
            right[i] += torch.stack([best[:, 0].sum(), best.any(1).sum()]).cpu()
    return [(float(one), float(five)) for one, five in right / len(asked_y)]
