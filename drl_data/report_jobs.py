"""What the report shows of the jobs on vectors: clusters, neighbours."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from drl_data.pictures import row_uri
from drl_data.store import FeatureStore
from drl_data.tasks.cluster import ClusterResult
from drl_data.tasks.retrieve import RetrieveResult


@dataclass(frozen=True)
class Clusters:
    """The clustering's result; for each large cluster of the first k its size and pictures."""

    result: ClusterResult
    splits: list[str]
    """Splits with labels."""
    k: int
    pictures: list[tuple[int, list[str]]]


def clusters(path: Path, store: FeatureStore) -> Clusters | None:
    """None if `drl cluster` was not run on this store."""
    if not path.exists():
        return None
    result = ClusterResult.load(path)
    if result.fingerprint != store.fingerprint:
        return None
    first = result.found[0]
    sizes = sorted(first.sizes, reverse=True)
    uris = pictures_of(store, (row for rows in first.nearest for row in rows))
    shown = [
        (size, [uris[row] for row in rows if row in uris])
        for size, rows in zip(sizes, first.nearest, strict=False)
    ]
    splits = list(dict.fromkeys(a.split for found in result.found for a in found.agreement))
    return Clusters(result, splits, first.k, shown if uris else [])


@dataclass(frozen=True)
class Retrieved:
    """The neighbours' result, and pictures of some queries and of the neighbours of each."""

    result: RetrieveResult
    pictures: list[tuple[str, list[str]]]


def retrieved(path: Path, store: FeatureStore) -> Retrieved | None:
    """None if `drl retrieve` was not run on this store."""
    if not path.exists():
        return None
    result = RetrieveResult.load(path)
    if result.fingerprint != store.fingerprint:
        return None
    uris = pictures_of(store, (r for e in result.examples for r in (e.row, *e.neighbours)))
    shown = [
        (uris[example.row], [uris[row] for row in example.neighbours if row in uris])
        for example in result.examples
        if example.row in uris
    ]
    return Retrieved(result, shown)


def pictures_of(store: FeatureStore, rows: Iterable[int]) -> dict[int, str]:
    """PNG in data URIs of those rows whose tars are there."""
    found = {row: row_uri(store, row) for row in dict.fromkeys(rows)}
    return {row: uri for row, uri in found.items() if uri is not None}
