"""What a store says about itself before any unit: Zarr v3 metadata, spec, arrays, timesteps.

STORE.md, section 2. Pure functions from a spec to bytes and back; equal specs give equal bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from pydantic import JsonValue, ValidationError

from drl_data.checksums import checked_json, signed_json
from drl_data.errors import SpecError, StoreError, StoreMismatchError, TapError
from drl_data.import_spec import ImportSpec, StoreContent
from drl_data.shards import STORED, Array, ShardLayout
from drl_data.spec import FORMAT_VERSION, ArraySpec, ContentSpec, FeatureSpec, ResolvedTime
from drl_data.spec_base import canonical_json

TIME_DIMS = {"each": "timestep", "mean": "timestep_mean", "none": "timeless"}
"""Name of the time axis: arrays with one entry for all timesteps have one of length 1."""

_RESERVED = (
    *("sample", "view", *TIME_DIMS.values(), "valid", "receipts", "fits", "zarr.json", "spec.json"),
    *(
        "index.parquet",
        "index.json",
        "samples.parquet",
        "sealed.json",
        "source.parquet",
        "source.json",
    ),
)


class Described(NamedTuple):
    """What a store holds: the spec, and what its taps and timesteps resolved to."""

    spec: StoreContent
    arrays: tuple[ArraySpec, ...]
    times: tuple[ResolvedTime, ...]

    @property
    def computed(self) -> FeatureSpec:
        """The spec of features that are known to be computed (`FeatureStore.computed_spec`)."""
        assert isinstance(self.spec, FeatureSpec), "imported features were let through"
        return self.spec


def store_metadata(store: Described) -> dict[str, bytes]:
    """Path -> bytes of every object but the index that is known before any unit."""
    spec, arrays, times = store
    dims = dimension_names(arrays)
    values = timestep_values(times)
    nodes: dict[str, JsonValue] = {
        a.name: array_metadata(a, dims[a.name], spec, len(times)) for a in arrays
    }
    nodes["timestep"] = _array_node(
        [len(times)], [len(times)], values.dtype.name, 0, _BYTES, ["timestep"]
    )
    nodes["valid"] = _array_node(
        [spec.n_samples], [spec.rows_per_unit], "bool", False, {"name": "bytes"}, ["sample"]
    )
    dumped = spec.model_dump(mode="json")
    root: JsonValue = {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {
            "drl_data": signed_json(
                {
                    "format": FORMAT_VERSION,
                    "fingerprint": spec.fingerprint(),
                    "spec": dumped,
                    "arrays": [a.model_dump(mode="json", exclude_defaults=True) for a in arrays],
                    "times": [t.model_dump(mode="json") for t in times],
                }
            )
        },
        "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": nodes},
    }
    objects = {f"{name}/zarr.json": canonical_json(node) for name, node in nodes.items()}
    objects["timestep/c/0"] = values.tobytes()
    objects["spec.json"] = canonical_json(dumped)
    objects["zarr.json"] = canonical_json(root)
    return objects


def parse_root(data: bytes, url: str) -> Described:
    """What the group's `zarr.json` says that the store at `url` holds.

    Raises:
        StoreError: it is not a store's, of another format, or was edited.
    """
    try:
        meta = json.loads(data)["attributes"]["drl_data"]
        found = meta["format"]
        if found != FORMAT_VERSION:
            raise StoreError(
                f"{url}: store format {found}; this drl_data reads format {FORMAT_VERSION}; "
                "install the version that wrote it"
            )
        described = Described(
            _parse_spec(meta["spec"]),
            tuple(ArraySpec.model_validate(a) for a in meta["arrays"]),
            tuple(ResolvedTime.model_validate(t) for t in meta["times"]),
        )
        recorded = meta["fingerprint"]
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise StoreError(
            f"{url}/zarr.json: not a drl_data store ({type(error).__name__}: {error}); give "
            "another URL, or if it was one, `drl extract --repair` with its pipeline restores it"
        ) from error
    remedy = "`drl extract --repair` with the store's pipeline restores it"
    if described.spec.fingerprint() != recorded:
        raise StoreError(
            f"{url}/zarr.json: the spec in it has fingerprint {described.spec.fingerprint()}, the "
            f"store says {recorded}; it was edited. {remedy}"
        )
    try:
        checked_json(meta)
    except ValueError as error:
        raise StoreError(f"{url}/zarr.json: {error}. {remedy}") from error
    return described


def _parse_spec(data: dict[str, JsonValue]) -> StoreContent:
    """Only imported features have a source."""
    return (ImportSpec if "source" in data else FeatureSpec).model_validate(data)


def require_same(url: str, stored: Described, wanted: Described) -> None:
    """Refuse to write into a store of another spec, or of the same spec resolved differently.

    Raises:
        StoreMismatchError: other specs, leaf by leaf; or other timesteps, both listed.
        TapError: other arrays, both listed.
    """
    if stored.spec.fingerprint() != wanted.spec.fingerprint():
        lines = "".join(f"\n  {line}" for line in stored.spec.differences(wanted.spec))
        raise StoreMismatchError(
            f"{url} holds other features (stored != asked for):{lines}\n"
            "give another store URL, or change the pipeline back"
        )
    if stored.arrays != wanted.arrays:
        raise TapError(
            f"{url}: the taps resolve to other arrays than when the store was made.\n"
            f"  stored: {_listed(stored.arrays)}\n  now:    {_listed(wanted.arrays)}\n"
            "use the library versions that its receipts name, or give another store URL"
        )
    if stored.times != wanted.times:
        raise StoreMismatchError(
            f"{url}: the timesteps resolve to other noise levels than when the store was made.\n"
            f"  stored: {list(stored.times)}\n  now:    {list(wanted.times)}\n"
            "use the library versions that its receipts name, or give another store URL"
        )


def _listed(arrays: Sequence[ArraySpec]) -> str:
    return ", ".join(f"{a.name} = {a.tap} {a.dtype}{list(a.shape)}" for a in arrays)


def dimension_names(arrays: Sequence[ArraySpec]) -> dict[str, tuple[str, ...]]:
    """Names of the axes of each array's rows, such that a name has one size in the whole store.

    xarray demands that. A name with several sizes gets the size appended: `channel_640`.
    """
    sizes: dict[str, set[int]] = {}
    for array in arrays:
        for dim, size in zip(array.dims, array.shape, strict=True):
            sizes.setdefault(dim, set()).add(size)
    return {
        array.name: tuple(
            dim if len(sizes[dim]) == 1 else f"{dim}_{size}"
            for dim, size in zip(array.dims, array.shape, strict=True)
        )
        for array in arrays
    }


def check_arrays(arrays: Sequence[ArraySpec]) -> None:
    """Refuse arrays that a Zarr v3 group, or xarray on it, cannot hold.

    Raises:
        SpecError: naming the array, what is wrong, and what is wanted.
    """
    if not arrays:
        raise SpecError("store: no arrays; want at least one tap")
    for array in arrays:
        place = f"store, array {array.name!r}"
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", array.name) or not array.name.strip("."):
            raise SpecError(
                f"{place}: the name may hold letters, digits, '_', '-' and '.', and not only dots; "
                "give the tap a `name:`"
            )
        if array.name.startswith("__") or array.name in _RESERVED:
            raise SpecError(f"{place}: the name is reserved; give the tap another `name:`")
        if len(array.dims) != len(array.shape) or min(array.shape, default=1) < 1:
            raise SpecError(
                f"{place}: dims {list(array.dims)} and shape {list(array.shape)}; want one "
                "positive size for each dimension"
            )
        if len({*array.dims, "sample", "view", *TIME_DIMS.values()}) != len(array.dims) + 5:
            raise SpecError(f"{place}: dims {list(array.dims)}: want distinct names")
    names = [array.name for array in arrays]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SpecError(f"store: arrays named twice: {twice}; give their taps a `name:`")
    dims = {dim for all_dims in dimension_names(arrays).values() for dim in all_dims}
    if dims & set(names):
        raise SpecError(f"store: {sorted(dims & set(names))} name both an array and a dimension")


def array_layout(array: ArraySpec, spec: ContentSpec, n_timesteps: int) -> ShardLayout:
    """Where the rows of an array lie in its shards, and where those are."""
    return ShardLayout(
        spec.rows_per_unit,
        array.shape,
        array.dtype,
        n_times=array.n_times(n_timesteps),
        has_views=array.views > 0,
    )


def array_metadata(
    array: ArraySpec, dims: Sequence[str], spec: ContentSpec, n_times: int
) -> dict[str, JsonValue]:
    """`zarr.json` of a feature array."""
    layout = array_layout(array, spec, n_times)
    views = [array.views] if array.views else []
    ones = [1] * (len(views) + 1)
    ends = [*array.shape]
    sharding: dict[str, JsonValue] = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": [layout.rows_per_chunk, *ones, *ends],
            "codecs": [_BYTES],
            "index_codecs": [_BYTES, {"name": "crc32c"}],
            "index_location": "end",
        },
    }
    attributes: dict[str, JsonValue] = {"tap": array.tap, "dtype": array.dtype}
    if array.timesteps != "each":
        attributes["timesteps"] = array.timesteps
    if array.quantises is not None:
        attributes["quantises"] = array.quantises
    return _array_node(
        shape=[spec.n_samples, *views, array.n_times(n_times), *ends],
        chunk=[spec.rows_per_unit, *ones, *ends],
        data_type=STORED[array.dtype],
        fill_value="NaN" if array.dtype in ("float32", "float16") else 0,
        codec=sharding,
        dims=["sample", *(["view"] if views else []), TIME_DIMS[array.timesteps], *dims],
        attributes={"drl_data": attributes},
    )


def timestep_values(times: Sequence[ResolvedTime]) -> Array:
    """The requested timesteps, int64 if all are integers, else float64."""
    values = np.array([time.requested for time in times], "<f8")
    return values.astype("<i8") if np.array_equal(values, np.rint(values)) else values


_BYTES: JsonValue = {"name": "bytes", "configuration": {"endian": "little"}}


def _array_node(
    shape: Sequence[int],
    chunk: Sequence[int],
    data_type: str,
    fill_value: JsonValue,
    codec: JsonValue,
    dims: Sequence[str],
    attributes: Mapping[str, JsonValue] | None = None,
) -> dict[str, JsonValue]:
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [*shape],
        "data_type": data_type,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [*chunk]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill_value,
        "codecs": [codec],
        "attributes": dict(attributes or {}),
        "dimension_names": [*dims],
        "storage_transformers": [],
    }
