"""Features that somebody has already: where they are (`source:` of a pipeline file), and the spec
of the store that they become.

Nothing here imports torch, zarr or ray.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from drl_data.spec import ContentSpec, FeatureSpec, ImageSpec, as_splits
from drl_data.spec_base import DType, Positive, Spec, StorageDType, StrTuple, Timestep

SourceFormat = Literal["webdataset", "npy", "parquet", "safetensors"]

IMPORTED = "imported"
"""Convention of timesteps of which nothing is known but their number."""

DIMS: dict[int, tuple[str, ...]] = {
    1: ("channel",),
    2: ("token", "channel"),
    3: ("channel", "height", "width"),
    4: ("channel", "frame", "height", "width"),
}
"""Names of the axes of a row, by their number, if nothing else is said."""


class SourceArray(Spec):
    """One array of the store, and where its values are in the source."""

    name: str
    """Of the array in the store."""
    places: Annotated[StrTuple, Field(min_length=1)] | None = None
    """What it is called in the source: the extension of a member of a tar, without `.npy`
    (`FILE.npz:NAME` for an array inside of an npz), a folder below the root of a tree, a column, a
    tensor. One, or one for each timestep; with views all of the first view, then of the next.
    Default: the name."""
    time_axis: bool = False
    """The first axis of the values is the timesteps, in the order of `timesteps`."""
    dims: tuple[str, ...] | None = None
    """Names of the axes of a row. Default: channel; token, channel; channel, height, width;
    channel, frame, height, width."""
    shape: tuple[Positive, ...] | None = None
    """Of a row, without the axis of time; default: that of the first sample that has the array.
    Flat values of another shape (a column of lists) are reshaped."""

    @property
    def where(self) -> tuple[str, ...]:
        """The places, or the name as the only one."""
        return self.places or (self.name,)


class SourceContent(Spec):
    """What of a source decides about the content of a store: what is taken, not where it lies."""

    format: SourceFormat
    arrays: Annotated[tuple[SourceArray, ...], Field(min_length=1)]
    timesteps: tuple[Timestep, ...] = ()
    """Of arrays that depend on one; without any, none does."""
    views: tuple[Literal["id", "hflip"], ...] = ()
    """Views of the images that there are features of, as LightningDiT has `latents` and
    `latents_flip`; without any, the store has no axis of views."""
    match: Literal["key", "position"] = "key"
    """How the rows of `dataset` find their features: by key, or in the order of both."""
    key: str | None = None
    """Where a sample's key is. webdataset: `EXT:FIELD` of a JSON member, default: the key in the
    tar. npy: `name` of the file (the default), its `path` below the folder, or `row`, a number at
    the end of the name. parquet: a column, default `key`. safetensors: only as `drl export` writes
    keys; without them shard and position make one."""
    about: str = ""
    """What the features are: the model, layer and settings that they were computed by. Nothing
    here can check it; it tells two imports of files of the same names and sizes apart."""

    @model_validator(mode="after")
    def _distinct(self) -> SourceContent:
        for what, names in (
            ("arrays", [array.name for array in self.arrays]),
            ("timesteps", list(self.timesteps)),
            ("views", list(self.views)),
        ):
            if len({*map(str, names)}) < len(names):
                raise ValueError(f"{what} {names}: want each once")
        return self

    @model_validator(mode="after")
    def _places_of_cells(self) -> SourceContent:
        for array in self.arrays:
            n_views, n = max(len(self.views), 1), len(array.where)
            if array.time_axis and not self.timesteps:
                raise ValueError(f"array {array.name!r} has a time_axis: give its `timesteps:`")
            wanted = {n_views}
            if not array.time_axis and self.timesteps:
                wanted.add(n_views * len(self.timesteps))
            if n not in wanted:
                raise ValueError(
                    f"array {array.name!r}: {n} places for {len(self.timesteps)} timesteps and "
                    f"{n_views} views; want {' or '.join(map(str, sorted(wanted)))}"
                )
        return self

    def has_time(self, array: SourceArray) -> bool:
        """Whether an array has an entry for each timestep."""
        n_views = max(len(self.views), 1)
        apart = bool(self.timesteps) and len(array.where) == n_views * len(self.timesteps)
        return array.time_axis or apart


class SourceSpec(SourceContent):
    """The section `source:`: files of features that become a store (`drl import`).

    With `dataset:` its rows are those of the images, else those of the files; then `label`,
    `caption` and `split` say where those are.
    """

    files: Annotated[dict[str, StrTuple], BeforeValidator(as_splits)]
    """Tars, Parquet files or safetensors shards, or the root folders of trees of `.npy`, with
    braces and globs; by split, as `dataset.tars`."""
    label: str | None = None
    """webdataset: extension or `EXT:FIELD`, default `cls`. parquet: a column, default `label`.
    safetensors: a tensor, default `labels`. Trees have theirs in `dataset.json`, as REPA's."""
    caption: str | None = None
    """webdataset: extension or `EXT:FIELD`, default `txt`. parquet: a column, default
    `caption`."""
    split: str | None = None
    """webdataset: `EXT:FIELD`; parquet: a column. Default: as `files` says."""
    dtype: StorageDType | None = None
    """Type to store as; default: that of the files, which must be one of STORE.md."""
    rows_per_unit: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    overflow: Literal["error", "clip", "invalid"] = "error"
    non_finite: Literal["error", "clip", "invalid"] = "error"
    """Both as in `features:`."""

    def content(self) -> SourceContent:
        """The part that is content."""
        names = SourceContent.model_fields
        return SourceContent.model_validate({name: getattr(self, name) for name in names})


class ImportSpec(ContentSpec):
    """The identity of imported features.

    `files` is the digest of the catalogue (catalogue.py): names, sizes and, in tars, checksums and
    times of what was taken. The values themselves are in the checksums of the receipts.
    """

    source: SourceContent
    files: str
    images: ImageSpec | None = None
    """How the images that the features are of are decoded, for who reads their pixels too."""
    dtype: StorageDType | None = None

    @property
    def view_names(self) -> tuple[str, ...]:
        """One for each entry of the axis `view`; none without one."""
        return self.source.views

    @property
    def backbone_dtype(self) -> DType:
        """Nothing is computed but a cast, which is exact on every machine."""
        return "float32"


StoreContent = FeatureSpec | ImportSpec
"""What the spec of a store may be; only the second has `source`."""
