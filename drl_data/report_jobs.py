"""What the report shows of jobs: clusters, neighbours, synthetic images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from drl_data.errors import DrlDataError
from drl_data.images import read_batches
from drl_data.index import build_index
from drl_data.objects import join_url
from drl_data.pictures import THUMBNAIL_SIDE, png_uri, row_uri
from drl_data.plan import Unit
from drl_data.spec import DatasetSpec, ImageSpec
from drl_data.store import FeatureStore
from drl_data.synthesis_tar import tar_name
from drl_data.tasks.cluster import ClusterResult
from drl_data.tasks.retrieve import RetrieveResult
from drl_data.tasks.synthesize import SynthesizeResult
from drl_data.unit_jobs import UnitJob

N_SYNTHETIC = 24
N_SYNTHETIC_TARS = 6
"""Synthetic images that are shown, and tars that they are of, at most."""


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


@dataclass(frozen=True)
class SyntheticImage:
    """One image: its data URI and what it was made from."""

    uri: str
    text: str
    key: str


@dataclass(frozen=True)
class Synthetic:
    """The synthesis' result, and some of its images."""

    result: SynthesizeResult
    pictures: list[SyntheticImage]


def synthetic(path: Path, url: str | None) -> Synthetic | None:
    """None if `drl synthesize` was not run. `url` is where the tars are, with its secrets."""
    if not path.exists():
        return None
    result = SynthesizeResult.load(path)
    if url is None:
        return Synthetic(result, [])
    try:
        return Synthetic(result, _synthetic_images(result, url))
    except DrlDataError:  # the tars may be gone, and the numbers still be worth showing
        return Synthetic(result, [])


def _synthetic_images(result: SynthesizeResult, url: str) -> list[SyntheticImage]:
    """N_SYNTHETIC images at random (of classes in turn, evenly spaced ones would be of few), of
    tars that are evenly spaced over those made.

    Raises:
        DrlDataError: tars that cannot be read, or that are of another job.
    """
    job = UnitJob.open(url)
    if job.spec.fingerprint() != result.fingerprint:
        return []
    made = [r.unit for r in job.receipts() if r.n_ok]
    units = _evenly(made, N_SYNTHETIC_TARS)
    names = tuple(join_url(url, tar_name(result.spec.name, unit)) for unit in units)
    if not names:
        return []
    index = build_index(DatasetSpec(tars={"all": names}))
    sizes = ImageSpec(size=(THUMBNAIL_SIDE, THUMBNAIL_SIDE), resize="pad", filter="box", mode="RGB")
    texts = index.table.select(["key", "label", "caption"]).to_pylist()
    shown = []
    n = index.n_samples
    chosen = np.random.default_rng(0).choice(n, min(n, N_SYNTHETIC), replace=False)
    for row in np.sort(chosen).tolist():
        (batch,) = read_batches(
            Unit(0, row, row + 1), index, sizes, batch_size=1, n_threads=1, prefetch_bytes=1 << 20
        )
        about = texts[row]
        label = about["label"]
        if label is not None and index.label_names is not None:
            label = index.label_names[label]
        text = about["caption"] or ("" if label is None else f"class {label}")
        shown.append(
            SyntheticImage(png_uri(batch.pixels[0].transpose(1, 2, 0)), text, about["key"])
        )
    return shown


def _evenly(items: Sequence[int], n: int) -> list[int]:
    """At most `n` of the items, evenly spaced."""
    n = min(n, len(items))
    return [items[(2 * i + 1) * len(items) // (2 * n)] for i in range(n)]


def pictures_of(store: FeatureStore, rows: Iterable[int]) -> dict[int, str]:
    """PNG in data URIs of those rows whose tars are there."""
    found = {row: row_uri(store, row) for row in dict.fromkeys(rows)}
    return {row: uri for row, uri in found.items() if uri is not None}
