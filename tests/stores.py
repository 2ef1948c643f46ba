"""Small stores for tests: indices, specs and features made from a few numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import torch

from drl_data.diffusion_spec import ConditionSpec, LatentSpec, NoiseSpec, ScheduleSpec
from drl_data.index import SampleIndex, TarInfo
from drl_data.plan import InvalidRow, Unit
from drl_data.quantise import companions, to_storage
from drl_data.shards import STORED, Array
from drl_data.spec import ArraySpec, DatasetSpec, FeatureSpec, ImageSpec, ResolvedTime, TapSpec
from drl_data.spec_base import StorageDType
from drl_data.store import FeatureStore, RunRecord

INVALID = {"bfloat16": 0x7FC0, "float8_e4m3fn": 0x7F, "float8_e5m2": 0x7E, "int8": 0, "uint8": 0}
"""What invalid rows hold where it is not NaN."""
RUN = RunRecord(seconds={"denoise": 1.5}, host="here", device="cpu", versions={"torch": "2"})
DIMS = {0: (), 1: ("channel",), 2: ("token", "channel"), 3: ("channel", "height", "width")}


def make_index(n: int, splits: Mapping[str, int] | None = None) -> SampleIndex:
    """`n` samples in one tar per split; every fifth has no label, labels are row % 3."""
    sizes = dict(splits or {"all": n})
    assert sum(sizes.values()) == n
    names = [split for split, size in sizes.items() for _ in range(size)]
    table = pa.table(
        {
            "key": [f"key-{row:05d}" for row in range(n)],
            "split": names,
            "tar": pa.array([list(sizes).index(name) for name in names], pa.int32()),
            "member": [f"key-{row:05d}.png" for row in range(n)],
            "offset": pa.array([512 + 1024 * row for row in range(n)], pa.int64()),
            "size": pa.array([100] * n, pa.int64()),
            "label": pa.array([None if row % 5 == 4 else row % 3 for row in range(n)], pa.int64()),
            "caption": pa.array([None] * n, pa.string()),
            "reason": pa.array([None] * n, pa.string()),
            "checksum": pa.array([7] * n, pa.int64()),
            "mtime": pa.array([0.0] * n, pa.float64()),
        }
    )
    tars = tuple(TarInfo(f"/tars/{name}.tar", name, 1 << 20, "tag", "none") for name in sizes)
    return SampleIndex(table, tars, None, DatasetSpec(tars="/tars/{a,b}.tar"))


def make_spec(n: int, rows_per_unit: int, **changes: object) -> FeatureSpec:
    """A spec of `n` samples; nothing in it but the numbers matters to a store."""
    spec = FeatureSpec(
        dataset="d" * 64,
        n_samples=n,
        images=ImageSpec(size=8),
        weights="w" * 64,
        backbone_dtype="float32",
        latents=LatentSpec(),
        condition=ConditionSpec(),
        schedule=ScheduleSpec(timesteps=(10, 200)),
        noise=NoiseSpec(),
        taps=(TapSpec(path="mid_block"),),
        dtype="float16",
        batch_size=1,
        rows_per_unit=rows_per_unit,
        overflow="error",
    )
    return spec.model_copy(update=changes)


def make_times(*requested: float) -> tuple[ResolvedTime, ...]:
    return tuple(
        ResolvedTime(requested=t, convention="ddpm_index", model_time=t, alpha=0.8, sigma=0.6)
        for t in requested
    )


def make_array(name: str, shape: Sequence[int], dtype: StorageDType) -> ArraySpec:
    return ArraySpec(
        name=name, tap=f"net.{name}", dims=DIMS[len(shape)], shape=tuple(shape), dtype=dtype
    )


ARRAYS = (
    make_array("mid_block", (4, 2, 2), "float16"),
    make_array("up.1", (6,), "bfloat16"),
    make_array("tokens", (3, 5), "float32"),
)
TIMES = make_times(10, 200)


def quantised(name: str, shape: Sequence[int], dtype: StorageDType) -> tuple[ArraySpec, ...]:
    """An integer array and those of its scales and offsets."""
    array = make_array(name, shape, dtype)
    return (array, *companions(array))


EVERY_DTYPE = (
    make_array("half", (4, 2, 2), "float16"),
    make_array("brain", (6,), "bfloat16"),
    make_array("full", (3, 5), "float32"),
    make_array("eight", (3, 5), "float8_e4m3fn"),
    *quantised("signed", (4, 2, 2), "int8"),
    *quantised("unsigned", (3, 5), "uint8"),
)


def make_store(
    url: str,
    n: int = 11,
    rows_per_unit: int = 4,
    *,
    arrays: Sequence[ArraySpec] = ARRAYS,
    times: Sequence[ResolvedTime] = TIMES,
    splits: Mapping[str, int] | None = None,
) -> FeatureStore:
    index = make_index(n, splits)
    spec = make_spec(n, rows_per_unit, dataset=index.digest())
    return FeatureStore.create(url, spec, arrays, times, index)


def reference(array: ArraySpec, n_times: int, n: int, seed: int = 0) -> Array:
    """Finite values [n_times, n, *shape] of the whole array, as stored."""
    rng = np.random.default_rng([seed, *array.name.encode()])
    values = rng.standard_normal((n_times, n, *array.shape)).astype(np.float32)
    if array.dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    if array.dtype.startswith("float8"):
        bits = torch.from_numpy(values).to(getattr(torch, array.dtype)).view(torch.uint8)
        return bits.numpy()
    if array.dtype in ("int8", "uint8"):
        return (values * 30 + 100 * (array.dtype == "uint8")).astype(array.dtype)
    return values.astype(STORED[array.dtype])


def unit_features(store: FeatureStore, unit: Unit, seed: int = 0) -> dict[str, Array]:
    n, n_times = store.spec.n_samples, len(store.times)
    return {a.name: reference(a, n_times, n, seed)[:, unit.start : unit.stop] for a in store.arrays}


def computed_features(
    store: FeatureStore, unit: Unit, attempt: int = 0, noise: float = 1e-6
) -> dict[str, Array]:
    """Features of a unit as one attempt computes them: noise, relative to the values, makes the
    last bits differ between attempts; 0 has none."""
    features: dict[str, Array] = {}
    for array in store.features:
        lead = (store.n_cells(array.name), unit.n_rows)
        seeds = [unit.id, *array.name.encode()]
        x = np.random.default_rng(seeds).standard_normal((*lead, *array.shape))
        if attempt:
            x = x * (1 + noise * np.random.default_rng([*seeds, attempt]).standard_normal(x.shape))
        flat = torch.from_numpy(x.astype(np.float32)).flatten(0, 1)
        parts, _ = to_storage(flat, array, clip=True)
        for name, part in parts.items():
            bits = part.view(torch.uint16) if part.dtype == torch.bfloat16 else part
            features[name] = bits.numpy().reshape(*lead, *bits.shape[1:])
    return features


def invalid_row(row: int) -> InvalidRow:
    return InvalidRow(row, f"key-{row:05d}", "decode", "truncated file")


def fill(store: FeatureStore, invalid: Sequence[int] = (), seed: int = 0) -> None:
    """Write every unit; `invalid` rows are listed as invalid."""
    for unit in store.units:
        bad = [invalid_row(row) for row in invalid if unit.start <= row < unit.stop]
        store.write(unit, unit_features(store, unit, seed), bad, RUN)


def expected(store: FeatureStore, name: str, invalid: Sequence[int] = (), seed: int = 0) -> Array:
    """What every reader must find: [n_times, n, *shape], NaN in invalid rows."""
    array = store.array(name)
    values = reference(array, len(store.times), store.spec.n_samples, seed)
    values[:, list(invalid)] = INVALID.get(array.dtype, np.nan)
    return values
