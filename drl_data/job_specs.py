"""Sections of a pipeline file for the jobs on vectors: probe, cluster, retrieve.

The last two take one cell of a store, a (tap, timestep, view), as one vector for
each image.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from drl_data.spec_base import Positive, Spec, Timestep, as_tuple

PositiveTuple = Annotated[tuple[Positive, ...], BeforeValidator(as_tuple), Field(min_length=1)]


FloatTuple = Annotated[tuple[float, ...], BeforeValidator(as_tuple)]


class KnnSpec(Spec):
    """A weighted vote of the k nearest train rows by cosine, as DINO evaluates (Caron et al. 2021):
    a neighbour's weight is exp(cosine / temperature)."""

    k: PositiveTuple = (10, 20, 100, 200)
    """The best on the validation part is taken; more than there are train rows means all."""
    temperature: Annotated[float, Field(gt=0)] = 0.07


class AttentiveSpec(Spec):
    """A small transformer over the features of several taps and timesteps together (DifFormer)."""

    taps: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = ()
    timesteps: Annotated[tuple[Timestep, ...], BeforeValidator(as_tuple)] = ()
    """Default: all of the store."""
    pool: Positive = 4
    """Side of the grid that maps are averaged to; DifFormer has 16 on maps of 16 and more."""
    width: Positive = 128
    heads: Positive = 4
    depth: Positive = 1
    epochs: Positive = 30
    batch_size: Positive = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.05

    @model_validator(mode="after")
    def _whole_heads(self) -> AttentiveSpec:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} of {self.heads} heads: want a multiple")
        return self


class ProbeSpec(Spec):
    """Linear probes for every (tap, timestep) cell, trained together in one pass.

    The best cell is chosen on a validation part of the train split (rows whose key hashes below
    `validation`), its accuracy is reported on the test split, which is used for nothing else.
    """

    train: str = "train"
    test: str = "test"
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.15
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: Annotated[int, Field(ge=1)] = 60
    batch_size: Annotated[int, Field(ge=1)] = 256
    learning_rate: Annotated[FloatTuple, Field(min_length=1)] = (1e-2,)
    weight_decay: Annotated[FloatTuple, Field(min_length=1)] = (1e-3,)
    """One value or several: all pairs are trained at once, and each cell has that which is best
    on its validation part."""
    pool: Annotated[int, Field(ge=1)] = 1
    """Side of the grid that maps are averaged to before the classifier: 1 is the mean over space,
    2 is what "Diffusion models beat GANs on image classification" uses. A smaller map stays."""
    knn: KnnSpec | None = None
    """Also ask the nearest neighbours of each cell: `knn: {}` takes the defaults."""
    attentive: AttentiveSpec | None = None
    """Also fuse all cells: `attentive: {}` takes the defaults."""
    pixels: bool = True
    """Also probe the raw pixels, the floor that features must beat."""
    compare: dict[str, str] = {}
    """Other pipeline files whose stores are probed beside this one: {label: path}."""


class CellSpec(Spec):
    """One cell of a store as vectors: maps and tokens are averaged, or kept as a small grid."""

    tap: str
    timestep: Timestep | None = None
    """Not needed where the tap does not depend on it, or the store has one timestep."""
    view: str | None = None
    """One of the store's views; default: the first."""
    pool: Positive = 1
    """Side of the grid that maps are averaged to; 1 is the mean over space. Tokens are averaged."""


class ClusterSpec(CellSpec):
    """k-means on the vectors of one cell; the clusters are pseudo-labels.

    Self-guided diffusion (Hu et al. 2023) has `normalise: l2`, `k: 5000`, `iterations: 30`,
    `min_points: 200`.
    """

    k: PositiveTuple = (10,)
    """Numbers of clusters; each is a clustering of its own."""
    split: str | None = None
    """Rows that make the centroids; all valid rows are then assigned. Default: all of them."""
    normalise: Literal["l2", "none"] = "l2"
    """`l2`: vectors of unit length, so that distances are those of directions."""
    init: Literal["k-means++", "random"] = "k-means++"
    n_init: Positive = 1
    """Runs from different beginnings; the one of the least inertia is kept."""
    iterations: Positive = 30
    tolerance: Annotated[float, Field(ge=0)] = 1e-4
    """Ends when the centroids move less: squared, of the mean variance of a channel."""
    min_points: Positive = 1
    """Rows for each centroid that there must be at least, on the average (faiss's
    `min_points_per_centroid`)."""
    seed: int = 0

    @model_validator(mode="after")
    def _k_once(self) -> ClusterSpec:
        if len(set(self.k)) < len(self.k):
            raise ValueError(f"k {list(self.k)}: want each number once")
        return self


class IndexSpec(Spec):
    """How neighbours are found: exactly, or faster by an index of faiss."""

    kind: Literal["exact", "ivf", "hnsw"] = "exact"
    lists: Positive | None = None
    """ivf: cells of the space; default: 4 times the root of the number of vectors."""
    probes: Positive = 16
    """ivf: cells that a query looks into."""
    links: Positive = 32
    """hnsw: neighbours of a node in the graph."""
    ef_construction: Positive = 200
    ef_search: Positive = 64
    """hnsw: breadth of the search when building, and when asking."""


def _as_index(value: object) -> object:
    return {"kind": value} if isinstance(value, str) else value


class RetrieveSpec(CellSpec):
    """The k nearest neighbours of every row by one cell (kNN-Diffusion, RDM: k = 20)."""

    k: Positive = 20
    metric: Literal["cosine", "l2"] = "cosine"
    """Distances are 1 - cosine, or Euclidean."""
    split: str | None = None
    """Rows that are retrieved; default: all valid ones."""
    queries: str | None = None
    """Split whose rows ask; default: the rows that are retrieved, each without itself."""
    index: Annotated[IndexSpec, BeforeValidator(_as_index)] = IndexSpec()
    """`exact`, `ivf` or `hnsw`, or its settings."""
    recall_queries: Positive = 1000
    """Queries, evenly spaced, on which an approximate index is held against the exact answer."""
    seed: int = 0
