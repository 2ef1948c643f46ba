"""Nearest neighbours: exact with torch, approximate with faiss (an optional package).

The exact ones are those of float64 arithmetic, ties by position: candidates come from float32
products, with a bound on their rounding error, and are ranked by differences in float64.

Shapes: m queries, n base, c channel, k neighbour.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from drl_data.errors import InputError, SpecError
from drl_data.job_specs import IndexSpec

SLACK = 16
"""Candidates beyond those asked for; if rounding might still hide one, all are looked at again."""
BASE_BLOCK = 1 << 15
RANKED_BYTES = 64 << 20

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Neighbours:
    """Positions int64 [m, k] in the base, nearest first, and Euclidean distances float64 [m, k].

    A position of -1 with distance NaN: an approximate index found no more.
    """

    positions: Tensor
    distances: Tensor

    def cut(self, k: int) -> Neighbours:
        """The first k."""
        return Neighbours(self.positions[:, :k], self.distances[:, :k])


def exact_neighbours(
    queries_mc: Tensor,
    base_nc: Tensor,
    k: int,
    *,
    own: Tensor | None = None,
    block: int = 256,
    advance: Callable[[int], None] | None = None,
) -> Neighbours:
    """The k nearest of the base to each query, both float32 on one device; ties by position.

    `own` int64 [m] is the position of each query itself, which is no neighbour; -1 where it is not
    in the base.

    Raises:
        SpecError: the base has fewer than k neighbours to give.
    """
    n = len(base_nc)
    available = n - int(own is not None and bool((own >= 0).any()))
    if not 1 <= k <= available:
        raise SpecError(f"{k} neighbours of {available} in the base; want 1 <= k <= {available}")
    mean = base_nc.double().mean(0).float()
    base = base_nc - mean
    square = base.square().sum(1)
    largest = float(square.max()) ** 0.5
    found = []
    for start in range(0, len(queries_mc), block):
        queries = queries_mc[start : start + block]
        mine = None if own is None else own[start : start + block]
        candidates, sure = _candidates(queries - mean, base, square, largest, k, mine)
        ranked = rank(queries, base_nc, candidates).cut(k)
        for i in torch.nonzero(~sure)[:, 0].tolist():
            one = queries[i : i + 1]
            every = _within(one - mean, base, square, largest, k, _at(mine, i))
            again = rank(one, base_nc, every).cut(k)
            ranked.positions[i], ranked.distances[i] = again.positions[0], again.distances[0]
        found.append(ranked)
        if advance is not None:
            advance(len(queries))
    return _joined(found, k, queries_mc.device)


def _at(own: Tensor | None, i: int) -> Tensor | None:
    return None if own is None else own[i : i + 1]


def _joined(found: list[Neighbours], k: int, device: torch.device) -> Neighbours:
    if not found:
        empty = torch.zeros(0, k, dtype=torch.int64, device=device)
        return Neighbours(empty, empty.double())
    return Neighbours(
        torch.cat([one.positions for one in found]), torch.cat([one.distances for one in found])
    )


def _squares(queries: Tensor, base: Tensor, square: Tensor, start: int) -> Tensor:
    """Squared distances [m, block] less the square of the query, in float32."""
    stop = start + BASE_BLOCK
    return (queries @ base[start:stop].T).mul_(-2).add_(square[start:stop])


def _without(squares: Tensor, own: Tensor | None, start: int) -> Tensor:
    if own is not None:
        inside = torch.nonzero((own >= start) & (own < start + squares.shape[1]))[:, 0]
        squares[inside, own[inside] - start] = torch.inf
    return squares


def _doubt(queries: Tensor, largest: float) -> Tensor:
    """How far float32 may be off in a squared distance [m] (Higham 2002, section 3.1), twice."""
    n_channels = queries.shape[1]
    unit = torch.finfo(torch.float32).eps / 2
    lengths = torch.linalg.vector_norm(queries, dim=1)
    doubt: Tensor = 2 * (n_channels + 8) * unit * (lengths + largest).square()
    return doubt


def _candidates(
    queries: Tensor, base: Tensor, square: Tensor, largest: float, k: int, own: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(positions [m, k + slack] by falling closeness, whether they surely hold the k nearest)."""
    wanted = min(k + SLACK, len(base))
    values = queries.new_empty(len(queries), 0)
    positions = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(base), BASE_BLOCK):
        squares = _without(_squares(queries, base, square, start), own, start)
        best = squares.topk(min(wanted, squares.shape[1]), dim=1, largest=False)
        values = torch.cat([values, best.values], 1)
        positions = torch.cat([positions, best.indices + start], 1)
        kept = values.topk(min(wanted, values.shape[1]), dim=1, largest=False)
        values, positions = kept.values, positions.gather(1, kept.indices)
    positions = torch.where(torch.isinf(values), -1, positions)
    if wanted == len(base):
        return positions, torch.ones(len(queries), dtype=torch.bool, device=queries.device)
    sure: Tensor = values[:, -1] - values[:, k - 1] > _doubt(queries, largest)
    return positions, sure


def _within(
    query: Tensor, base: Tensor, square: Tensor, largest: float, k: int, own: Tensor | None
) -> Tensor:
    """Positions [1, any] of all that may be among the k nearest of one query."""
    parts = [
        _without(_squares(query, base, square, start), own, start)[0]
        for start in range(0, len(base), BASE_BLOCK)
    ]
    squares = torch.cat(parts)
    limit = squares.kthvalue(k).values + _doubt(query, largest)[0]
    return torch.nonzero(squares <= limit)[:, 0][None]


def rank(queries_mc: Tensor, base_nc: Tensor, candidates: Tensor) -> Neighbours:
    """Candidates [m, any] by their distance in float64, then by position; -1 comes last."""
    positions = torch.where(candidates < 0, len(base_nc), candidates).sort(1).values
    missing = positions == len(base_nc)
    rows = max(RANKED_BYTES // (8 * base_nc.shape[1] * max(candidates.shape[1], 1)), 1)
    parts = []
    for start in range(0, len(queries_mc), rows):
        chosen = positions[start : start + rows].clamp_max(len(base_nc) - 1)
        differences = base_nc[chosen].double() - queries_mc[start : start + rows, None].double()
        parts.append(differences.square_().sum(2).sqrt_())
    distances = torch.cat(parts).masked_fill_(missing, torch.inf)
    order = distances.argsort(dim=1, stable=True)
    positions, distances = positions.gather(1, order), distances.gather(1, order)
    nothing = torch.isinf(distances)
    return Neighbours(positions.masked_fill(nothing, -1), distances.masked_fill(nothing, torch.nan))


# --- approximate --------------------------------------------------------------------------------


class ApproximateIndex:
    """faiss's IVF-Flat or HNSW over vectors by their positions; saved in faiss's own format."""

    def __init__(self, index: Any) -> None:  # noqa: ANN401  # faiss may be absent
        """Not for users: `build` and `load` make indices."""
        self._index = index

    @classmethod
    def build(cls, base_nc: Tensor, spec: IndexSpec, seed: int) -> ApproximateIndex:
        """Index float32 vectors [n, c] by Euclidean distance.

        Raises:
            SpecError: faiss is not installed, or there are fewer vectors than lists.
        """
        faiss = _faiss()
        n, n_channels = base_nc.shape
        x = np.ascontiguousarray(base_nc.cpu().numpy())
        if spec.kind == "hnsw":
            graph = faiss.IndexHNSWFlat(n_channels, spec.links)
            graph.hnsw.efConstruction, graph.hnsw.efSearch = spec.ef_construction, spec.ef_search
            graph.add(x)
            return cls(graph)
        n_lists = spec.lists or max(min(round(4 * n**0.5), n // 39), 1)
        if n_lists > n:
            raise SpecError(f"retrieve.index.lists: {n_lists} lists of {n} vectors; want fewer")
        lists = faiss.IndexIVFFlat(faiss.IndexFlatL2(n_channels), n_channels, n_lists)
        lists.cp.seed = seed % (1 << 31)
        lists.cp.min_points_per_centroid = 1
        lists.train(x)
        lists.add(x)
        lists.nprobe = min(spec.probes, n_lists)
        return cls(lists)

    @classmethod
    def load(cls, path: Path) -> ApproximateIndex:
        """Read what `save` wrote.

        Raises:
            InputError: there is no such file, or it is no index.
        """
        faiss = _faiss()
        try:
            return cls(faiss.read_index(str(path)))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{path}: no index ({reason}); run `drl retrieve` again") from error

    def save(self, path: Path) -> None:
        """Write the file whole or not at all."""
        temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
        _faiss().write_index(self._index, str(temporary))
        os.replace(temporary, path)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def n_channels(self) -> int:
        """Numbers of a vector."""
        return int(self._index.d)

    def candidates(self, queries_mc: Tensor, k: int, own: Tensor | None = None) -> Tensor:
        """Positions int64 [m, k] of about the nearest, without `own`; -1 where there are fewer."""
        wanted = k if own is None else k + 1
        _, found = self._index.search(np.ascontiguousarray(queries_mc.cpu().numpy()), wanted)
        positions = torch.from_numpy(found)
        if own is None:
            return positions
        positions = positions.masked_fill(positions == own.cpu()[:, None], -1)
        # The query itself, wherever it was found, goes behind the others; then the last one goes.
        order = (positions < 0).to(torch.int8).argsort(dim=1, stable=True)
        return positions.gather(1, order)[:, :k]


def _faiss() -> ModuleType:
    try:
        import faiss
    except ImportError as error:
        raise SpecError(
            "an approximate index needs faiss: pip install 'drl-data[retrieve]', or say "
            "`index: exact`"
        ) from error
    module: ModuleType = faiss
    return module
