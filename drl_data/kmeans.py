"""k-means (Lloyd 1982) with k-means++ (Arthur and Vassilvitskii 2007) on a CPU or a GPU.

A function of its arguments: random numbers come from the seed on the CPU, and sums do not depend on
the order in which threads finish. Distances are squared Euclidean.

Shapes: n rows, c channel, k cluster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from drl_data.errors import SpecError

BLOCK_DISTANCES = 1 << 22
"""Distances that are in memory at once."""
MIN_BLOCK, MAX_BLOCK = 256, 1 << 14
"""Rows of a block; few enough that float32 sums over a block lose nothing to speak of."""

SEEDED_ROWS = 1 << 14
"""k-means++ reads all rows once for each cluster, so beginnings are drawn from so many of them,
or from four for each cluster, if there are more."""

Init = Literal["k-means++", "random"]


@dataclass(frozen=True)
class Clustering:
    """k centroids, and which of them is nearest to each row."""

    centroids: Tensor
    """float32 [k, c]"""
    assignment: Tensor
    """int64 [n]"""
    distance: Tensor
    """float32 [n], Euclidean, to the own centroid."""
    inertia: float
    """Sum of the squared distances."""
    iterations: int
    converged: bool
    """Whether it ended by itself."""
    n_relocated: int
    """Times that a cluster had lost all its rows and was begun anew at a far row."""

    @property
    def sizes(self) -> Tensor:
        """Rows of each cluster, int64 [k]."""
        return torch.bincount(self.assignment, minlength=len(self.centroids))


def kmeans(
    x_nc: Tensor,
    k: int,
    *,
    seed: int = 0,
    init: Init = "k-means++",
    n_init: int = 1,
    iterations: int = 30,
    tolerance: float = 1e-4,
    advance: Callable[[int], None] | None = None,
) -> Clustering:
    """Cluster float32 rows [n, c] on their device; the best of `n_init` runs.

    `advance` is told after each iteration how many of the `n_init * iterations` that may come are
    through.

    Raises:
        SpecError: there are fewer rows than clusters, or values that are not finite.
    """
    if not 1 <= k <= len(x_nc):
        raise SpecError(f"k-means: k = {k} clusters of {len(x_nc)} rows; want 1 <= k <= rows")
    mean = x_nc.double().mean(0).float()
    x = x_nc.float() - mean  # distances by expansion lose digits far from the origin
    if not bool(torch.isfinite(x).all()):
        raise SpecError("k-means: rows with values that are not finite; leave them out")
    best: Clustering | None = None
    for run in range(n_init):
        generator = torch.Generator().manual_seed(seed + 7919 * run)
        centroids = _beginning(x, k, init, generator)
        found = _lloyd(x, centroids, iterations, tolerance, advance)
        if best is None or found.inertia < best.inertia:
            best = found
    assert best is not None
    return Clustering(
        best.centroids + mean,
        best.assignment,
        best.distance,
        best.inertia,
        best.iterations,
        best.converged,
        best.n_relocated,
    )


def assign(x_nc: Tensor, centroids_kc: Tensor) -> tuple[Tensor, Tensor]:
    """(nearest centroid int64 [n], Euclidean distance to it float32 [n]) of rows [n, c]."""
    mean = centroids_kc.double().mean(0).float()
    x, centroids = x_nc.float() - mean, centroids_kc.float() - mean
    found = [_nearest(block, centroids)[0] for block in _blocks(x, len(centroids))]
    assignment = torch.cat(found) if found else torch.zeros(0, dtype=torch.int64, device=x.device)
    return assignment, _distances(x, centroids, assignment)


def _blocks(x: Tensor, k: int) -> Iterator[Tensor]:
    """Cuts that depend on k alone."""
    return iter(torch.split(x, min(max(BLOCK_DISTANCES // k, MIN_BLOCK), MAX_BLOCK)))


def _nearest(block: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """(assignment, squared distance less the row's own square) of some rows."""
    scores = block @ centroids.T
    scores.mul_(-2).add_(centroids.square().sum(1))
    nearest = scores.min(1)
    return nearest.indices, nearest.values


def _distances(x: Tensor, centroids: Tensor, assignment: Tensor) -> Tensor:
    """Euclidean distances by their differences, exact where expansion is not."""
    parts = zip(torch.split(x, MAX_BLOCK), torch.split(assignment, MAX_BLOCK), strict=True)
    found = [(rows - centroids[own]).square().sum(1).sqrt() for rows, own in parts]
    return torch.cat(found) if found else x.new_zeros(0)


# --- beginnings ---------------------------------------------------------------------------------


def _beginning(x: Tensor, k: int, init: Init, generator: torch.Generator) -> Tensor:
    order = torch.randperm(len(x), generator=generator)
    if init == "random":
        return x[order[:k].to(x.device)].clone()
    some = x[order[: max(4 * k, SEEDED_ROWS)].to(x.device)]
    return some[_plus_plus(some, k, generator).to(x.device)].clone()


def _plus_plus(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Rows, each drawn by its squared distance to those before; the best of some candidates, as
    scikit-learn does (greedy k-means++)."""
    n_candidates = 2 + int(math.log(k))
    square = x.square().sum(1)
    chosen = torch.randint(len(x), (1,), generator=generator)
    closest = _to(x, square, chosen)[:, 0]
    for _ in range(1, k):
        # Drawn on the CPU, in float64: a scan on a GPU does not always add in one order.
        cumulative = closest.double().cpu().cumsum(0)
        drawn = torch.rand(n_candidates, generator=generator, dtype=torch.float64) * cumulative[-1]
        candidates = torch.searchsorted(cumulative, drawn, right=True).clamp_max(len(x) - 1)
        closer = torch.minimum(closest[:, None], _to(x, square, candidates))
        best = int(closer.double().sum(0).argmin())
        closest = closer[:, best]
        chosen = torch.cat([chosen, candidates[best : best + 1]])
    return chosen


def _to(x: Tensor, square: Tensor, rows: Tensor) -> Tensor:
    """Squared distances [n, len(rows)] to some rows; 0 to themselves."""
    own = rows.to(x.device)
    distances = (square[:, None] + square[own] - 2 * (x @ x[own].T)).clamp_min(0)
    distances[own, torch.arange(len(own), device=x.device)] = 0
    return distances


# --- iterations ---------------------------------------------------------------------------------


def _lloyd(
    x: Tensor,
    centroids: Tensor,
    iterations: int,
    tolerance: float,
    advance: Callable[[int], None] | None,
) -> Clustering:
    enough = tolerance * float(x.double().var(0, unbiased=False).mean())
    square = x.square().sum(1)
    before: Tensor | None = None
    done, converged, n_relocated = 0, False, 0
    while done < iterations and not converged:
        assignment, closeness, sums, counts = _pass(x, centroids)
        if int((counts == 0).sum()):
            n_relocated += _relocate(x, assignment, square + closeness, sums, counts)
        moved = torch.where(
            counts[:, None] > 0, (sums / counts.clamp_min(1)[:, None]).float(), centroids
        )
        shift = float((moved - centroids).double().square().sum())
        same = before is not None and torch.equal(assignment, before)
        centroids, before = moved, assignment
        done += 1
        converged = same or shift <= enough
        if advance is not None:
            advance(1)
    if advance is not None:
        advance(iterations - done)
    assignment, distance = assign(x, centroids)
    inertia = float(distance.double().square().sum())
    return Clustering(centroids, assignment, distance, inertia, done, converged, n_relocated)


def _pass(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(assignment [n], closeness [n], sums float64 [k, c], counts [k]) in one pass over the rows.

    Sums go over rows sorted by cluster, so that no two threads add to one place.
    """
    k = len(centroids)
    sums = torch.zeros(centroids.shape, dtype=torch.float64, device=x.device)
    counts = torch.zeros(k, dtype=torch.int64, device=x.device)
    assignments, closenesses = [], []
    for block in _blocks(x, k):
        assignment, closeness = _nearest(block, centroids)
        n_each = torch.bincount(assignment, minlength=k)
        order = torch.argsort(assignment, stable=True)
        sums += torch.segment_reduce(block[order], "sum", lengths=n_each, unsafe=True)
        counts += n_each
        assignments.append(assignment)
        closenesses.append(closeness)
    return torch.cat(assignments), torch.cat(closenesses), sums, counts


def _relocate(x: Tensor, assignment: Tensor, distance: Tensor, sums: Tensor, counts: Tensor) -> int:
    """Begin empty clusters at the rows farthest from their centroids; returns how many there were.

    A cluster that would be emptied in its turn keeps its row, and rows that lie on their centroid
    are no beginning: with fewer distinct rows than clusters some stay empty.
    """
    empty = torch.nonzero(counts == 0)[:, 0].tolist()
    order = torch.argsort(distance, descending=True, stable=True)
    n_done = 0
    for row in order.tolist():
        old = int(assignment[row])
        if n_done == len(empty) or float(distance[row]) <= 0:
            break
        if counts[old] < 2:
            continue
        new = empty[n_done]
        sums[old] -= x[row]
        counts[old] -= 1
        sums[new], counts[new] = x[row].double(), 1
        assignment[row] = new
        n_done += 1
    return n_done
