"""Stores with features that are known, over few samples: what tasks are tested on."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import webdataset
from PIL import Image
from sklearn.datasets import load_digits

from drl_data.index import SampleIndex, TarInfo, build_index
from drl_data.pipeline import Pipeline
from drl_data.plan import InvalidRow
from drl_data.shards import Array
from drl_data.spec import DatasetSpec, ImageSpec
from drl_data.spec_base import Spec
from drl_data.store import FeatureStore
from tests.stores import RUN, make_array, make_spec, make_times

N_CLASSES = 4


def toy_index(labels: Sequence[int | None], splits: Sequence[str]) -> SampleIndex:
    n = len(labels)
    table = pa.table(
        {
            "key": [f"key-{row:05d}" for row in range(n)],
            "split": list(splits),
            "tar": pa.array([0] * n, pa.int32()),
            "member": [f"key-{row:05d}.png" for row in range(n)],
            "offset": pa.array([0] * n, pa.int64()),
            "size": pa.array([1] * n, pa.int64()),
            "label": pa.array(labels, pa.int64()),
            "caption": pa.array([None] * n, pa.string()),
            "reason": pa.array([None] * n, pa.string()),
            "checksum": pa.array([0] * n, pa.int64()),
            "mtime": pa.array([0.0] * n, pa.float64()),
        }
    )
    return SampleIndex(
        table, (TarInfo("/a.tar", "all", 1, "", "none"),), None, DatasetSpec(tars="/a.tar")
    )


def store_of(
    url: Path,
    features: Mapping[str, Array],
    index: SampleIndex,
    *,
    invalid: Sequence[int] = (),
    n_units: int | None = None,
    dataset: str = "d" * 64,
) -> FeatureStore:
    """A store with the given float32 features [n_timesteps, n, *shape]."""
    arrays = [make_array(name, x.shape[2:], "float32") for name, x in features.items()]
    n_times = len(next(iter(features.values())))
    spec = make_spec(
        index.n_samples, 128, dtype="float32", dataset=dataset, images=ImageSpec(size=8, mode="L")
    )
    store = FeatureStore.create(str(url), spec, arrays, make_times(*range(10, 10 + n_times)), index)
    keys = index.table["key"].to_pylist()
    for unit in store.units[:n_units]:
        store.write(
            unit,
            {
                name: np.ascontiguousarray(x[:, unit.start : unit.stop], np.float32)
                for name, x in features.items()
            },
            [
                InvalidRow(r, keys[r], "decode", "bad")
                for r in invalid
                if unit.start <= r < unit.stop
            ],
            RUN,
        )
    return store


def pipeline_of(store: FeatureStore, results: Path, **tasks: Spec) -> Pipeline:
    return Pipeline.model_validate(
        {
            "name": "toy",
            "dataset": {"tars": "/a.tar"},
            "images": {"size": 8, "mode": "L"},
            "store": {"url": store.url},
            "results": str(results),
            **{name: spec.model_dump() for name, spec in tasks.items()},
        }
    )


def noise(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def digits_index(folder: Path) -> SampleIndex:
    """Some 700 real digits of four classes as PNG in two tars."""
    images, labels = load_digits(n_class=N_CLASSES, return_X_y=True)
    folder.mkdir()
    for split in range(2):
        name = ("train", "test")[split]
        with webdataset.TarWriter(str(folder / f"{name}.tar"), mtime=0) as writer:
            for i in np.flatnonzero((np.arange(len(labels)) % 4 == 0) == bool(split)):
                buffer = io.BytesIO()
                Image.fromarray((images[i].reshape(8, 8) * 15).astype(np.uint8)).save(buffer, "PNG")
                label = str(labels[i]).encode()
                writer.write({"__key__": f"d{i}", "png": buffer.getvalue(), "cls": label})
    tars = {name: str(folder / f"{name}.tar") for name in ("train", "test")}
    return build_index(DatasetSpec.model_validate({"tars": tars}))
