"""Reading features for training, against what the disk and NumPy can do with the same bytes.

    python -m benchmarks.reading [--folder DIR] [--mib 512] [--rounds 5]

Two stores of random float16 features: maps (1280, 16, 16) of 655 kB a row and pooled (1280,) of
2.6 kB. In each round, in turn:

    raw       every shard by one read(), in order: what the disk or the page cache gives
    memmap    rows in random order, batches of 256, gathered from one memory-mapped .npy file
    stream    FeatureStream, shuffled, batches of 256, as tensors
    dataset   FeatureDataset by a random batch sampler, batches of 256

What is timed is getting the batches; nothing looks into them. Medians over the rounds; ratios are
of one run, absolute figures are this machine's.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from drl_data.datasets import FeatureDataset, FeatureStream
from drl_data.diffusion_spec import ConditionSpec, LatentSpec, NoiseSpec, ScheduleSpec
from drl_data.index import SampleIndex, TarInfo
from drl_data.spec import ArraySpec, DatasetSpec, FeatureSpec, ImageSpec, ResolvedTime, TapSpec
from drl_data.store import FeatureStore, RunRecord

BATCH = 256
KINDS = {
    "map": ((1280, 16, 16), ("channel", "height", "width"), 128),
    "pooled": ((1280,), ("channel",), 8192),
}


def make_store(
    folder: Path, kind: str, n_bytes: int, rows_per_unit: int | None = None
) -> FeatureStore:
    """A sealed store of about `n_bytes` bytes of random features, and the same as one .npy file."""
    shape, dims, usual = KINDS[kind]
    rows_per_unit = rows_per_unit or usual
    row_bytes = int(np.prod(shape)) * 2
    n = max(n_bytes // row_bytes // rows_per_unit, 2) * rows_per_unit
    array = ArraySpec(name=kind, tap=kind, dims=dims, shape=shape, dtype="float16")
    moment = ResolvedTime(
        requested=50, convention="ddpm_index", model_time=50, alpha=0.8, sigma=0.6
    )
    store = FeatureStore.create(
        str(folder / f"{kind}.zarr"), _spec(n, rows_per_unit), [array], [moment], _index(n)
    )
    flat = np.lib.format.open_memmap(folder / f"{kind}.npy", "w+", np.float16, (n, *shape))
    generator = np.random.default_rng(0)
    for unit in store.units:
        values = generator.standard_normal((unit.n_rows, *shape), np.float32).astype(np.float16)
        flat[unit.start : unit.stop] = values
        store.write(unit, {kind: values[None]}, [], RunRecord())
    flat.flush()
    store.seal()
    return store


def _spec(n: int, rows_per_unit: int) -> FeatureSpec:
    return FeatureSpec(
        dataset="0" * 64,
        n_samples=n,
        images=ImageSpec(size=256),
        weights="0" * 64,
        backbone_dtype="float32",
        latents=LatentSpec(),
        condition=ConditionSpec(),
        schedule=ScheduleSpec(timesteps=(50,)),
        noise=NoiseSpec(),
        taps=(TapSpec(path="mid_block"),),
        dtype="float16",
        batch_size=1,
        rows_per_unit=rows_per_unit,
        overflow="error",
    )


def _index(n: int) -> SampleIndex:
    names = [f"{row:08d}" for row in range(n)]
    numbers = pa.array(np.arange(n))
    table = pa.table(
        {
            "key": names,
            "split": ["train"] * n,
            "tar": pa.array(np.zeros(n, np.int32)),
            "member": [f"{name}.jpg" for name in names],
            "offset": numbers,
            "size": numbers,
            "label": pa.array(np.arange(n) % 1000),
            "caption": pa.array([None] * n, pa.string()),
            "reason": pa.array([None] * n, pa.string()),
            "checksum": numbers,
            "mtime": pa.array(np.zeros(n)),
        }
    )
    tars = (TarInfo("/a.tar", "train", 1, "", "none"),)
    return SampleIndex(table, tars, None, DatasetSpec(tars="/a.tar"))


# --- ways to read: each yields the number of rows that it got -------------------------------------


def raw(store: FeatureStore, kind: str) -> Iterator[int]:
    """Whole shards in order, into one buffer."""
    buffer = bytearray(store.layouts[kind].shard_bytes(store.spec.rows_per_unit))
    for unit in store.units:
        (path,) = (path for _, _, path in store.shards(unit))
        with open(Path(store.url, path), "rb", buffering=0) as file:
            assert file.readinto(buffer) == len(buffer)
        yield unit.n_rows


def memmap(store: FeatureStore, kind: str) -> Iterator[int]:
    """What a user writes without a library."""
    values = np.load(f"{store.url.removesuffix('.zarr')}.npy", mmap_mode="r")
    order = np.random.default_rng(1).permutation(len(values))
    for start in range(0, len(order), BATCH):
        yield len(values[order[start : start + BATCH]])


def stream(store: FeatureStore, kind: str) -> Iterator[int]:
    """The shuffled stream, in the training process."""
    for batch in FeatureStream(store, batch_size=BATCH):
        yield len(batch.row)


def dataset(store: FeatureStore, kind: str) -> Iterator[int]:
    """Random access, a whole batch at a time."""
    rows = FeatureDataset(store)
    sampler = BatchSampler(RandomSampler(rows), BATCH, False)
    for batch in DataLoader(rows, sampler=sampler, batch_size=None):
        yield len(batch.row)


WAYS = (raw, memmap, stream, dataset)


def measure(store: FeatureStore, kind: str, rounds: int) -> dict[str, float]:
    """Way -> median of rows per second; the ways take turns, after one round that is not counted.

    Opening (the sample table, the first plan) is timed too: an epoch has it.
    """
    seconds: dict[str, list[float]] = {way.__name__: [] for way in WAYS}
    for number in range(rounds + 1):
        for way in WAYS:
            taken = _seconds(way, store, kind)
            if number:
                seconds[way.__name__].append(taken)
    return {way: store.spec.n_samples / statistics.median(s) for way, s in seconds.items()}


def _seconds(
    way: Callable[[FeatureStore, str], Iterator[int]], store: FeatureStore, kind: str
) -> float:
    started = time.perf_counter()
    n = sum(way(store, kind))
    taken = time.perf_counter() - started
    assert n == store.spec.n_samples, f"{way.__name__}: {n} rows of {store.spec.n_samples}"
    return taken


def main() -> None:
    """Print one line for each store and way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where the stores are made and removed again")
    parser.add_argument("--mib", type=int, default=512, help="size of each store")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="reading-", dir=asked.folder))
    try:
        print(f"{'features':9}{'way':9}{'rows/s':>10}{'MB/s':>8}{'of raw':>8}{'of memmap':>11}")
        for kind in KINDS:
            store = make_store(folder, kind, asked.mib << 20)
            rates = measure(store, kind, asked.rounds)
            row_bytes = store.array(kind).bytes_per_row
            for way, rate in rates.items():
                print(
                    f"{kind:9}{way:9}{rate:10.0f}{rate * row_bytes / 1e6:8.0f}"
                    f"{rate / rates['raw']:8.2f}{rate / rates['memmap']:11.2f}"
                )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
