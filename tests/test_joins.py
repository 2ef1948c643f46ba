"""Several stores as one: the same sample's features side by side, or a refusal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from drl_data.datasets import Augment, Draw, FeatureBatch, FeatureDataset, FeatureStream, join
from drl_data.errors import InputError, SpecError, StoreError, TapError
from drl_data.index import SampleIndex
from drl_data.joins import JoinedStores
from drl_data.plan import InvalidRow
from drl_data.selection import select
from drl_data.spec import ArraySpec
from drl_data.store import FeatureStore

from .stores import RUN, make_array, make_index, make_spec, make_times, unit_features

A = (make_array("mid", (3,), "float32"), make_array("up", (2, 2, 2), "float16"))
B = (make_array("mid", (5,), "float32"),)


def store_of(
    url: Path,
    index: SampleIndex,
    arrays: Sequence[ArraySpec],
    times: Sequence[float] = (10, 200),
    *,
    invalid: Sequence[int] = (),
    rows_per_unit: int = 4,
    n_units: int | None = None,
) -> FeatureStore:
    """A store whose features are known by (row, array)."""
    spec = make_spec(index.n_samples, rows_per_unit, dataset=index.digest())
    made = FeatureStore.create(str(url), spec, arrays, make_times(*times), index)
    for unit in made.units[:n_units]:
        bad = [
            InvalidRow(row, index.table["key"][row].as_py(), "decode", "bad")
            for row in invalid
            if unit.start <= row < unit.stop
        ]
        made.write(unit, unit_features(made, unit), bad, RUN)
    return made


def permuted(index: SampleIndex, order: Sequence[int]) -> SampleIndex:
    return replace(index, table=index.table.take(pa.array(order)))


def column(index: SampleIndex, name: str, values: Sequence[object]) -> SampleIndex:
    at = index.table.column_names.index(name)
    field = index.table.schema.field(name)
    return replace(index, table=index.table.set_column(at, field, pa.array(values, field.type)))


def check(joined: JoinedStores, batch: FeatureBatch) -> None:
    """Every store's features are those of the sample with the batch's key."""
    assert set(batch.features) == {
        f"{name}/{array.name}" for name, s in joined.stores.items() for array in s.features
    }
    for name, store in joined.stores.items():
        keys = store.index.table["key"].to_pylist()
        own = [keys.index(key) for key in batch.key]
        for array in store.features:
            got = batch.features[f"{name}/{array.name}"].numpy()
            want = [store.read_rows(array.name, t, own) for t in range(len(store.times))]
            assert np.array_equal(got, np.stack(want, axis=1))


def both_loaders(joined: JoinedStores) -> list[FeatureBatch]:
    stream = list(FeatureStream(joined, batch_size=5, buffer_rows=8))
    dataset = FeatureDataset(joined)
    batches = [*stream, dataset.read(np.arange(len(dataset))[::-1])]
    rows = sorted(row for batch in stream for row in batch.row.tolist())
    assert rows == dataset.selection.rows.tolist()
    return batches


# --- alignment -----------------------------------------------------------------------------------


def test_stores_of_one_index_need_no_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = make_index(19)
    a = store_of(tmp_path / "a", index, A, invalid=[3])
    b = store_of(tmp_path / "b", index, B, (50,), invalid=[3, 7], rows_per_unit=6)
    a.seal()
    b.seal()
    monkeypatch.setattr(SampleIndex, "load", None)  # the indices are not even read
    joined = join({"a": FeatureStore.open(a.url), "b": FeatureStore.open(b.url)})
    assert joined.by_digest("b")
    monkeypatch.undo()
    for batch in both_loaders(joined):
        check(joined, batch)
    rows = select(joined).rows.tolist()
    assert rows == [row for row in range(19) if row not in (3, 7)]


def test_equal_samples_in_equal_order_need_no_keys(tmp_path: Path) -> None:
    """The same tars under other splits: another index, the same rows."""
    a = store_of(tmp_path / "a", make_index(11), A)
    b = store_of(tmp_path / "b", make_index(11, {"x": 5, "y": 6}), B)
    assert a.spec.dataset != b.spec.dataset
    joined = join({"a": a, "b": b})
    assert joined.by_digest("b")
    for batch in both_loaders(joined):
        check(joined, batch)


@settings(deadline=None, max_examples=15)
@given(order=st.permutations(range(13)), extra=st.integers(0, 3), seed=st.integers(0, 3))
def test_other_orders_are_joined_by_key(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], extra: int, seed: int
) -> None:
    """The other store may have more samples, in any order and units of another size."""
    folder = tmp_path_factory.mktemp("j")
    index = make_index(13 + extra)
    more = [*order, *range(13, 13 + extra)]
    a = store_of(folder / "a", permuted(index, range(13)), A, invalid=[seed])
    b = store_of(folder / "b", permuted(index, more), B, invalid=[5], rows_per_unit=3)
    joined = join({"a": a, "b": b})
    assert joined.by_digest("b") == (more == list(range(13)))
    for batch in both_loaders(joined):
        check(joined, batch)
    lost = {index.table["key"][seed].as_py(), index.table["key"][more[5]].as_py()}
    keys = [key for batch in FeatureStream(joined, batch_size=4) for key in batch.key]
    assert len(keys) == len(set(keys))
    assert set(keys) == {f"key-{row:05d}" for row in range(13)} - lost


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_joined_stores_go_to_spawned_workers(tmp_path: Path) -> None:
    index = make_index(9)
    a = store_of(tmp_path / "a", index, A)
    b = store_of(tmp_path / "b", permuted(index, range(8, -1, -1)), B)
    joined = join({"a": a, "b": b})
    stream = FeatureStream(joined, batch_size=4, augment=Augment(crop=(4, 4)))
    loader = DataLoader(stream, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    for got, want in zip(loader, stream, strict=True):
        assert got.key == want.key
        assert all(torch.equal(x, want.features[tap]) for tap, x in got.features.items())


def test_three_stores(tmp_path: Path) -> None:
    index = make_index(9)
    stores = {
        "a": store_of(tmp_path / "a", index, A),
        "b": store_of(tmp_path / "b", permuted(index, range(8, -1, -1)), B, invalid=[0]),
        "c": store_of(tmp_path / "c", index, B, (50,), invalid=[2]),
    }
    joined = join(stores)
    for batch in both_loaders(joined):
        check(joined, batch)
    assert select(joined).rows.tolist() == [0, 1, 3, 4, 5, 6, 7]


# --- refusals ------------------------------------------------------------------------------------


def test_samples_that_a_store_lacks(tmp_path: Path) -> None:
    index = make_index(10)
    a = store_of(tmp_path / "a", index, A)
    b = store_of(tmp_path / "b", permuted(index, [9, 1, 2, 5]), B)
    with pytest.raises(InputError, match=r"lacks 6 of the 10 samples.*first is 'key-00000'"):
        join({"a": a, "b": b})
    joined = join({"a": a, "b": b}, missing="drop")
    assert select(joined).rows.tolist() == [1, 2, 5, 9]
    assert select(joined, include_invalid=True).rows.tolist() == [1, 2, 5, 9]
    for batch in both_loaders(joined):
        check(joined, batch)
    other = column(index, "key", [f"x{row}" for row in range(10)])
    c = store_of(tmp_path / "c", other, B)
    with pytest.raises(InputError, match="these are other data sets"):
        join({"a": a, "c": c}, missing="drop")


def test_keys_that_come_twice(tmp_path: Path) -> None:
    """Between splits the split tells them apart, within one nothing does."""
    index = make_index(8, {"train": 4, "test": 4})
    keys = [f"k{row % 4}" for row in range(8)]
    twice = column(index, "key", keys)
    a = store_of(tmp_path / "a", twice, A)
    b = store_of(tmp_path / "b", permuted(twice, [7, 6, 5, 4, 3, 2, 1, 0]), B)
    with pytest.raises(InputError, match=r"4 names come twice.*rows \[0, 4\].*on=\('split', 'key"):
        join({"a": a, "b": b})
    joined = join({"a": a, "b": b}, on=("split", "key"))
    batch = FeatureDataset(joined).read(range(8))
    want = b.read_rows("mid", 0, [7, 6, 5, 4, 3, 2, 1, 0])
    assert np.array_equal(batch.features["b/mid"][:, 0].numpy(), want)
    worse = column(twice, "split", ["train"] * 8)
    c = store_of(tmp_path / "c", worse, B)
    with pytest.raises(InputError, match=r"'train/k0' in rows \[0, 4\]"):
        join({"c": c, "b": b}, on=("split", "key"))


def test_other_images_under_the_same_keys(tmp_path: Path) -> None:
    index = make_index(6)
    a = store_of(tmp_path / "a", index, A)
    b = store_of(tmp_path / "b", column(index, "size", [100, 100, 7, 100, 8, 100]), B)
    with pytest.raises(InputError, match=r"2 samples have equal keys but images.*'key-00002'"):
        join({"a": a, "b": b})
    joined = join({"a": a, "b": b}, same_images=False)
    check(joined, FeatureDataset(joined).read(range(6)))


def test_names_and_choices(tmp_path: Path) -> None:
    index = make_index(6)
    a = store_of(tmp_path / "a", index, A)
    b = store_of(tmp_path / "b", index, B, (10, 50), n_units=1)
    for names in ({}, {"": a}, {"a/b": a}):
        with pytest.raises(SpecError, match="want at least one, none empty or with '/'"):
            join(names)
    joined = join({"a": a, "b": b})
    with pytest.raises(StoreError, match="2 of 6 rows are not computed yet"):
        select(joined)
    assert select(joined, partial=True).rows.tolist() == [0, 1, 2, 3]
    with pytest.raises(SpecError, match=r"'a/TAP'; \['mid'\] begin with none"):
        select(joined, ["a/mid", "mid"], partial=True)
    with pytest.raises(TapError, match="no array 'low'"):
        select(joined, ["a/low"], partial=True)
    with pytest.raises(TapError, match="no timestep 200"):
        select(joined, None, [200], partial=True)
    with pytest.raises(SpecError, match=r"timesteps of \['c'\]"):
        select(joined, None, {"c": [1]}, partial=True)
    dataset = FeatureDataset(
        joined, ["b/mid", "a/mid"], {"a": [200], "b": Draw([10, 50])}, partial=True
    )
    batch = dataset.read([0, 3, 1])
    assert batch.timestep["a/mid"].tolist() == [[200.0]] * 3
    for i, row in enumerate((0, 3, 1)):
        (step,) = batch.timestep["b/mid"][i].tolist()
        want = b.read_rows("mid", (10, 50).index(step), [row])[0]
        assert np.array_equal(batch.features["b/mid"][i, 0].numpy(), want)


def test_joined_stores_draw_alike(tmp_path: Path) -> None:
    """Both teachers see a row at the same timestep."""
    index = make_index(40)
    a = store_of(tmp_path / "a", index, A[:1])
    b = store_of(tmp_path / "b", permuted(index, range(39, -1, -1)), B)
    joined = join({"a": a, "b": b})
    assert not joined.by_digest("b")
    batch = FeatureDataset(joined, timesteps="sample").read(range(40))
    assert batch.timestep["a/mid"].tolist() == batch.timestep["b/mid"].tolist()
    assert len(set(batch.timestep["a/mid"].flatten().tolist())) == 2
