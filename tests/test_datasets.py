"""Features to PyTorch: the right values, every row exactly once, the same order again."""

from __future__ import annotations

import itertools
import json
import pickle
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from drl_data.datasets import FeatureBatch, FeatureDataset, FeatureSample, FeatureStream, as_tensor
from drl_data.decode import decode_image
from drl_data.errors import InputError, SpecError, StoreError, TapError
from drl_data.index import SampleIndex, build_index
from drl_data.selection import NO_LABEL
from drl_data.shard_reader import ShardReader
from drl_data.shards import STORED
from drl_data.spec import DatasetSpec, ImageSpec
from drl_data.spec_base import StorageDType
from drl_data.store import FeatureStore

from .loader_helpers import rows_of, with_workers
from .stores import (
    ARRAYS,
    RUN,
    TIMES,
    expected,
    fill,
    make_array,
    make_index,
    make_spec,
    make_store,
    unit_features,
)
from .toy_tars import png, write_tar

INVALID = (2, 9, 17, 18, 19)
SPLITS = {"train": 21, "test": 10}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """31 rows in units of 4, five of them invalid, one unit (16..20) with one valid row."""
    made = make_store(str(tmp_path_factory.mktemp("s")), 31, 4, splits=SPLITS)
    fill(made, INVALID)
    return made


def valid(start: int = 0, stop: int = 31) -> list[int]:
    return [row for row in range(start, stop) if row not in INVALID]


def check_batch(store: FeatureStore, batch: FeatureBatch) -> None:
    """Every value of a batch belongs to the row that the batch says."""
    rows = batch.row.tolist()
    assert list(batch.key) == [f"key-{row:05d}" for row in rows]
    assert batch.label.tolist() == [NO_LABEL if row % 5 == 4 else row % 3 for row in rows]
    assert batch.label.dtype == batch.row.dtype == torch.int64
    for name, values in batch.features.items():
        want = expected(store, name, INVALID)[:, rows].swapaxes(0, 1)
        dtype = store.array(name).dtype
        assert values.dtype == getattr(torch, dtype)
        assert values.shape == want.shape
        bits = torch.int32 if dtype == "float32" else torch.int16
        got = values.contiguous().view(bits).numpy()
        assert got.tobytes() == np.ascontiguousarray(want).tobytes()


# --- the stream ----------------------------------------------------------------------------------


def test_the_order_depends_on_seed_and_epoch_only(store: FeatureStore) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        stream = FeatureStream(store, ["up.1"], batch_size=4, seed=seed, buffer_rows=8)
        stream.set_epoch(epoch)
        return stream.plan().order.tolist()

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert order(0, 1) != sorted(order(0, 1))


@with_workers
@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_stream_gives_each_valid_row_once_with_its_values(
    store: FeatureStore, n_workers: int
) -> None:
    stream = FeatureStream(store, batch_size=5, buffer_rows=6)
    batches = list(DataLoader(stream, batch_size=None, num_workers=n_workers))
    assert [len(batch.row) for batch in batches] == [5, 5, 5, 5, 5, 1]
    assert len(stream) == 6
    assert sorted(rows_of(batches)) == valid()
    for batch in batches:
        assert batch.pixels is None
        check_batch(store, batch)
    assert rows_of(batches) == stream.plan().order.tolist()


def test_taps_timesteps_split_and_labels_are_chosen(store: FeatureStore) -> None:
    stream = FeatureStream(
        store, ["tokens", "up.1"], [200], batch_size=4, split="train", labelled=True, shuffle=False
    )
    batches = list(stream)
    assert rows_of(batches) == [row for row in valid(0, 21) if row % 5 != 4]
    assert list(batches[0].features) == ["tokens", "up.1"]
    want = expected(store, "tokens", INVALID)[1, batches[0].row]
    assert np.array_equal(batches[0].features["tokens"][:, 0].numpy(), want)
    assert NO_LABEL not in [int(label) for batch in batches for label in batch.label]
    swapped = FeatureStream(store, ["tokens"], [200, 10], batch_size=26, shuffle=False)
    (batch,) = swapped
    want = expected(store, "tokens")[::-1, batch.row].swapaxes(0, 1)
    assert np.array_equal(batch.features["tokens"].numpy(), want)


def test_invalid_rows_are_nan_if_asked_for(store: FeatureStore) -> None:
    batches = list(FeatureStream(store, batch_size=7, shuffle=False, include_invalid=True))
    assert rows_of(batches) == list(range(31))
    for batch in batches:
        check_batch(store, batch)
    together = torch.cat([batch.features["up.1"].float() for batch in batches])
    assert torch.isnan(together).all(dim=(1, 2)).nonzero().flatten().tolist() == list(INVALID)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_rows(store: FeatureStore, world_size: int) -> None:
    got = []
    for rank in range(world_size):
        stream = FeatureStream(store, batch_size=4, rank=rank, world_size=world_size)
        batches = list(stream)
        for batch in batches:
            check_batch(store, batch)
        got.extend(rows_of(batches))
    assert sorted(got) == valid()


@with_workers
@pytest.mark.parametrize("n_workers", [0, 2, 3])
@pytest.mark.parametrize("n_taken", [0, 1, 4, 6])
def test_a_stopped_epoch_continues(store: FeatureStore, n_workers: int, n_taken: int) -> None:
    """With any number of workers before and after."""
    whole = FeatureStream(store, ["up.1"], batch_size=5, seed=3, buffer_rows=6)
    whole.set_epoch(2)
    want = rows_of(list(whole))
    first = FeatureStream(store, ["up.1"], batch_size=5, seed=3, buffer_rows=6)
    first.set_epoch(2)
    taken = list(itertools.islice(first, n_taken))
    state = json.loads(json.dumps(first.state_dict()))
    assert state["batch"] == n_taken
    again = FeatureStream(store, ["up.1"], batch_size=5, seed=3, buffer_rows=6)
    again.load_state_dict(state)
    rest = list(DataLoader(again, batch_size=None, num_workers=n_workers))
    assert rows_of(taken) + rows_of(rest) == want
    assert again.state_dict(len(rest))["batch"] == 6
    if not n_workers:
        assert again.state_dict() == again.state_dict(len(rest))
    again.set_epoch(2)
    assert rows_of(list(again)) == want


def test_a_state_of_another_stream_is_refused(store: FeatureStore) -> None:
    state = FeatureStream(store, batch_size=5, seed=3).state_dict()
    other = FeatureStream(store, batch_size=4, seed=4, split="test")
    with pytest.raises(SpecError) as error:
        other.load_state_dict(state)
    assert "seed: 3 saved, 4 now" in str(error.value)
    assert "rows: " in str(error.value)
    assert "batch_size" not in str(error.value)
    mine = other.state_dict()
    for change in ({"batch": None}, {"epoch": "1"}, {"segments": 3}, {"dealing": None}):
        with pytest.raises(SpecError, match="not a state that state_dict gave"):
            other.load_state_dict({**mine, **change})


@with_workers
def test_persistent_workers_see_the_epoch(store: FeatureStore) -> None:
    stream = FeatureStream(store, ["up.1"], batch_size=5, buffer_rows=6)
    loader = DataLoader(stream, batch_size=None, num_workers=2, persistent_workers=True)
    for epoch in range(3):
        stream.set_epoch(epoch)
        assert rows_of(list(loader)) == stream.plan().order.tolist()


def test_a_stream_may_be_left_early(store: FeatureStore) -> None:
    def readers() -> list[str]:
        return [t.name for t in threading.enumerate() if t.name.startswith("feature-stream")]

    iterator = iter(FeatureStream(store, batch_size=2, buffer_rows=4))
    next(iterator)
    assert readers()
    iterator.close()  # type: ignore[attr-defined]
    assert not readers()


def test_memory_is_bounded_by_three_windows(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Units are read whole, once, and not before the window ahead is wanted."""
    read: list[int] = []
    real = ShardReader.read_unit

    def counted(self: ShardReader, name: str, time_index: int, unit: object) -> object:
        read.append(unit.id)  # type: ignore[attr-defined]
        return real(self, name, time_index, unit)  # type: ignore[arg-type]

    monkeypatch.setattr(ShardReader, "read_unit", counted)
    stream = FeatureStream(store, ["up.1"], [10], batch_size=2, buffer_rows=4, shuffle=False)
    iterator = iter(stream)
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    assert set(read) <= {0, 1, 2, 3}
    read.clear()
    list(stream)
    assert sorted(read) == [0, 1, 2, 3, 5, 6, 7]  # unit 4 has one row, read by range


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"buffer_rows": 0}, "buffer_rows=0"),
        ({"seed": -1}, "seed=-1"),
        ({"rank": 2, "world_size": 2}, "rank=2 of 2"),
    ],
)
def test_wrong_numbers_are_refused(
    store: FeatureStore, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        FeatureStream(store, **{"batch_size": 4, **changes})  # type: ignore[arg-type]


def test_wrong_choices_are_refused(store: FeatureStore) -> None:
    with pytest.raises(TapError, match="no array 'up'"):
        FeatureDataset(store, ["up"])
    with pytest.raises(TapError, match="no timestep 11"):
        FeatureDataset(store, timesteps=[11])
    with pytest.raises(SpecError, match=r"taps \[\]; want some"):
        FeatureDataset(store, [])
    with pytest.raises(SpecError, match=r"split='val'.*splits are \['test', 'train'\], 26 rows"):
        FeatureDataset(store, split="val")
    with pytest.raises(SpecError, match="epoch -1"):
        FeatureStream(store, batch_size=1).set_epoch(-1)


def test_pending_rows_are_never_left_out_in_silence(tmp_path: Path) -> None:
    partial = make_store(str(tmp_path))
    unit = partial.units[1]
    partial.write(unit, unit_features(partial, unit), [], RUN)
    with pytest.raises(StoreError, match="7 of 11 rows are not computed yet"):
        FeatureDataset(partial)
    for include_invalid in (False, True):
        dataset = FeatureDataset(partial, partial=True, include_invalid=include_invalid)
        assert dataset.selection.rows.tolist() == [4, 5, 6, 7]


# --- the map-style dataset -----------------------------------------------------------------------


def test_items_are_the_selected_rows(store: FeatureStore) -> None:
    dataset = FeatureDataset(store, split="test")
    assert len(dataset) == 10
    items = list(dataset)
    assert [item.row for item in items] == list(range(21, 31))
    assert isinstance(items[0], FeatureSample)
    assert items[3].key == "key-00024"
    assert items[3].label == NO_LABEL
    assert dataset[-1].row == 30
    for bad in (10, -11):
        with pytest.raises(IndexError):
            dataset[bad]


@with_workers
@pytest.mark.parametrize("n_workers", [0, 1])
def test_a_loader_collates_items(store: FeatureStore, n_workers: int) -> None:
    dataset = FeatureDataset(store)
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(
        dataset, batch_size=7, shuffle=True, generator=generator, num_workers=n_workers
    )
    rows = []
    for batch in loader:
        check_batch(store, batch)
        rows.extend(batch.row.tolist())
    assert sorted(rows) == valid()
    assert rows != valid()


def test_a_batch_is_read_at_once(store: FeatureStore) -> None:
    dataset = FeatureDataset(store)
    batch = dataset.read(np.array([25, 0, 0, 7]))
    assert batch.row.tolist() == [30, 0, 0, 8]
    check_batch(store, batch)
    one = FeatureDataset(store, timesteps=[200]).read([3, 1])
    assert np.array_equal(
        one.features["tokens"][:, 0].numpy(), expected(store, "tokens")[1][[4, 1]]
    )


ONE = {"bfloat16": 0x3F80, "float8_e4m3fn": 0x38, "float8_e5m2": 0x3C}
"""The bits of 1.0 where NumPy has no such type."""


@pytest.mark.parametrize("dtype", ["float32", "float16", *ONE])
def test_tensors_share_memory(dtype: StorageDType) -> None:
    values = np.array([ONE.get(dtype, 1)], STORED[dtype])
    tensor = as_tensor({"a": values}, make_array("a", (1,), dtype))
    assert tensor.dtype == getattr(torch, dtype)
    assert tensor.item() == 1.0
    assert tensor.data_ptr() == values.ctypes.data


# --- pixels of the same rows ---------------------------------------------------------------------


def image_store(folder: Path, n: int, mode: str = "w") -> tuple[FeatureStore, SampleIndex]:
    suffix = ".tar.gz" if mode == "w:gz" else ".tar"
    tars = [folder / f"{name}{suffix}" for name in ("a", "b")]
    half = n // 2
    for tar, rows in zip(tars, (range(half), range(half, n)), strict=True):
        write_tar(tar, [(f"key-{row:05d}.png", png(row)) for row in rows], mode=mode)
    index = build_index(DatasetSpec(tars=[str(tar) for tar in tars]))
    url = str(folder / "store")
    store = FeatureStore.create(url, make_spec(n, 4), ARRAYS, TIMES, index)
    fill(store, [3])
    return store, index


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_pixels_belong_to_their_rows(tmp_path: Path, mode: str) -> None:
    store, index = image_store(tmp_path, 13, mode)
    spec = ImageSpec(size=(6, 5))
    stream = FeatureStream(store, ["up.1"], batch_size=4, buffer_rows=6, images=(index, spec))
    batches = list(stream)
    assert sorted(rows_of(batches)) == [row for row in range(13) if row != 3]
    for batch in batches:
        assert batch.pixels is not None
        assert batch.pixels.dtype == torch.uint8
        for row, pixels in zip(batch.row.tolist(), batch.pixels.numpy(), strict=True):
            assert np.array_equal(pixels, decode_image(png(row), spec))


def test_images_that_no_longer_decode_are_an_error(tmp_path: Path) -> None:
    store, index = image_store(tmp_path, 8)
    spec = ImageSpec(size=7, resize="none")
    stream = FeatureStream(store, ["up.1"], batch_size=4, images=(index, spec))
    with pytest.raises(
        InputError, match=r"\(key 'key-0000\d'\): .* has its features; use the tars"
    ):
        list(stream)
    with pytest.raises(InputError, match="has 9 samples, the store"):
        FeatureStream(store, batch_size=4, images=(make_index(9), spec))
    turned = replace(index, table=index.table.take(list(range(7, -1, -1))))
    with pytest.raises(InputError, match="other samples, or in another order"):
        FeatureStream(store, batch_size=4, images=(turned, spec))


# --- object storage ------------------------------------------------------------------------------


def test_a_stream_from_object_storage(folder_url: str) -> None:
    store = make_store(folder_url, 31, 4, splits=SPLITS)
    fill(store, INVALID)
    store.seal()
    stream = FeatureStream(FeatureStore.open(folder_url), batch_size=5, buffer_rows=6)
    batches = list(DataLoader(stream, batch_size=None))
    assert sorted(rows_of(batches)) == valid()
    for batch in batches:
        check_batch(store, batch)


def test_a_dataset_pickles_small(store: FeatureStore) -> None:
    dataset = FeatureDataset(store)
    again = pickle.loads(pickle.dumps(dataset))
    assert again[3].row == dataset[3].row
    assert len(pickle.dumps(dataset)) < 4000


def test_large_default_buffers_follow_the_row_size(tmp_path: Path) -> None:
    store = make_store(str(tmp_path), arrays=(make_array("a", (64, 64, 64), "float32"),))
    fill(store)
    stream = FeatureStream(store, batch_size=2)
    assert stream.dealing.buffer_rows == ((256 << 20) // (2 * 4 * 64**3),)
    assert FeatureStream(store, batch_size=100).dealing.buffer_rows == (400,)
    small = FeatureStream(store, batch_size=2, buffer_bytes=16 * 2 * 4 * 64**3)
    assert small.dealing.buffer_rows == (16,)
