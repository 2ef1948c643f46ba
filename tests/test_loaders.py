"""What loaders choose: predicates, drawn timesteps, views, buckets, ranks, resuming, memory."""

from __future__ import annotations

import os
import resource
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from benchmarks import reading
from drl_data import row_blocks
from drl_data.datasets import Draw, FeatureBatch, FeatureDataset, FeatureStream
from drl_data.decode import decode_views
from drl_data.draws import choose, uniform
from drl_data.errors import SpecError, TapError
from drl_data.index import build_index
from drl_data.spec import ArraySpec, DatasetSpec, ImageSpec
from drl_data.store import FeatureStore

from .loader_helpers import INVALID, VALID, rows_of, small_and_large
from .stores import (
    RUN,
    TIMES,
    expected,
    fill,
    make_array,
    make_index,
    make_spec,
    make_store,
    make_times,
    reference,
)
from .toy_tars import png, write_tar

VIEWS = ("id", "hflip")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return small_and_large(str(tmp_path_factory.mktemp("s")))


def with_views(url: str, n: int = 12) -> FeatureStore:
    """Two views of each image; entries of the array are (view, timestep)."""
    images = ImageSpec(size=(6, 5), views=VIEWS)
    array = make_array("pooled", (3,), "float32").model_copy(update={"views": 2})
    spec = make_spec(n, 4, images=images)
    made = FeatureStore.create(url, spec, [array], TIMES, make_index(n))
    fill_views(made, array)
    return made


def fill_views(made: FeatureStore, array: ArraySpec) -> None:
    values = reference(array, 4, made.spec.n_samples)
    for unit in made.units:
        made.write(unit, {array.name: values[:, unit.start : unit.stop]}, [], RUN)


# --- rows ----------------------------------------------------------------------------------------


def test_a_predicate_chooses_rows(store: FeatureStore) -> None:
    for where, want in (
        (pc.field("label") == 1, [r for r in range(31) if r % 5 != 4 and r % 3 == 1]),
        (pc.field("key") >= "key-00025", range(25, 31)),
        (pc.field("label").isin([0, 2]) & (pc.field("row") > 20), [21, 23, 26, 27, 30]),
    ):
        got = FeatureDataset(store, ["pooled"], where=where).selection.rows.tolist()
        assert got == [row for row in want if row not in INVALID]
    both = FeatureStream(
        store, ["pooled"], where=pc.field("label") == 1, labelled=True, batch_size=3
    )
    assert {int(y) for batch in both for y in batch.label} == {1}


@pytest.mark.parametrize(
    "where", [pc.field("lable") == 3, pc.field("row"), pc.field("key") == 3, 3]
)
def test_what_is_no_predicate_is_refused(store: FeatureStore, where: pc.Expression) -> None:
    with pytest.raises(SpecError, match="columns are row, key, split, tar, label"):
        FeatureDataset(store, where=where)


def test_a_predicate_that_no_row_satisfies_is_named(store: FeatureStore) -> None:
    with pytest.raises(SpecError, match=r"no rows with .* where=\(label == 7\)"):
        FeatureDataset(store, where=pc.field("label") == 7)


# --- one timestep for each item ------------------------------------------------------------------


def check_drawn(store: FeatureStore, batch: FeatureBatch, taps: Sequence[str]) -> None:
    """Each row's features are those of the timestep that the batch says."""
    steps = [time.requested for time in store.times]
    for tap in taps:
        values = expected(store, tap, INVALID)
        for i, row in enumerate(batch.row.tolist()):
            (step,) = batch.timestep[tap][i].tolist()
            assert np.array_equal(batch.features[tap][i, 0].numpy(), values[steps.index(step), row])


@pytest.mark.parametrize("batch_size", [1, 5, 28])
def test_a_drawn_timestep_is_a_function_of_seed_epoch_and_row(
    store: FeatureStore, batch_size: int
) -> None:
    taps = ["pooled", "map"]

    def drawn(epoch: int, seed: int = 3) -> dict[int, float]:
        stream = FeatureStream(store, taps, "sample", batch_size=batch_size, seed=seed)
        stream.set_epoch(epoch)
        batches = list(stream)
        for batch in batches:
            check_drawn(store, batch, taps)
        return {
            int(r): float(t) for b in batches for r, t in zip(b.row, b.timestep["map"], strict=True)
        }

    dataset = FeatureDataset(store, taps, "sample", seed=3)
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        whole = dataset.read(range(len(dataset)))
        check_drawn(store, whole, taps)
        found = dict(zip(whole.row.tolist(), whole.timestep["map"][:, 0].tolist(), strict=True))
        assert found == drawn(epoch)
    assert len({tuple(sorted(drawn(e, s).items())) for e in (0, 1) for s in (0, 1)}) == 4


def test_a_distribution_is_kept(store: FeatureStore) -> None:
    chosen = Draw([200, 10], weights=[3, 1])
    stream = FeatureStream(store, ["pooled"], chosen, batch_size=28, shuffle=False)
    counts: Counter[float] = Counter()
    for epoch in range(100):
        stream.set_epoch(epoch)
        (batch,) = stream
        check_drawn(store, batch, ["pooled"])
        counts.update(batch.timestep["pooled"].flatten().tolist())
    assert counts.keys() == {200.0, 10.0}
    # 2800 draws: 3 standard deviations are 69
    assert abs(counts[200.0] - 2100) < 69


def test_draws_are_uniform_and_independent() -> None:
    rows = np.arange(20_000)
    a, b = uniform(0, 0, rows, "timestep"), uniform(0, 0, rows, "view")
    others = [uniform(0, 1, rows, "timestep"), uniform(1, 0, rows, "timestep"), np.roll(a, 1), b]
    for u in (a, b):
        assert 0 <= u.min() < 0.001 < 0.999 < u.max() < 1
        assert abs(u.mean() - 0.5) < 4 * np.sqrt(1 / 12 / len(u))
        counts = np.bincount((u * 50).astype(int), minlength=50)
        assert ((counts - 400) ** 2 / 400).sum() < 49 + 5 * np.sqrt(2 * 49)
    for other in others:
        assert abs(np.corrcoef(a, other)[0, 1]) < 4 / np.sqrt(len(a))
    assert np.array_equal(uniform(0, 0, rows[7:9], "timestep"), a[7:9])


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(sum))
def test_what_has_no_weight_is_never_drawn(weights: list[int]) -> None:
    u = np.array([0.0, 0.25, 0.5, 1 - 2.0**-53])
    assert all(weights[i] for i in choose(u, tuple(map(float, weights))).tolist())


@pytest.mark.parametrize(
    ("timesteps", "error", "message"),
    [
        ("all", SpecError, "want a list, a Draw or 'sample'"),
        ([], SpecError, "want some numbers"),
        (Draw(["id"]), SpecError, "want some numbers"),
        (Draw([11]), TapError, "no timestep 11"),
        (Draw([10, 50], weights=[1]), SpecError, "want one for each"),
        (Draw([10, 50], weights=[1, -1]), SpecError, "none negative"),
        (Draw([10, 50], weights=[0, 0]), SpecError, "not all 0"),
    ],
)
def test_wrong_timesteps_are_refused(
    store: FeatureStore, timesteps: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        FeatureDataset(store, timesteps=timesteps)  # type: ignore[arg-type]


# --- views ---------------------------------------------------------------------------------------


def test_several_views_are_an_axis(tmp_path: Path) -> None:
    store = with_views(str(tmp_path / "s"))
    values = reference(store.arrays[0], 4, 12).reshape(2, 2, 12, 3)
    for batch in (
        FeatureDataset(store, view=["hflip", "id"]).read(range(12)),
        *FeatureStream(store, view=["hflip", "id"], batch_size=12),
    ):
        assert batch.features["pooled"].shape == (12, 2, 2, 3)
        want = values[::-1][:, :, batch.row].transpose(2, 0, 1, 3)
        assert np.array_equal(batch.features["pooled"].numpy(), want)
        assert batch.view["pooled"].tolist() == [[1, 0]] * 12
    with pytest.raises(SpecError, match=r"view \[\]; want some names"):
        FeatureDataset(store, view=[])


@pytest.mark.parametrize("timesteps", [None, "sample"])
def test_one_view_is_drawn_with_its_pixels(tmp_path: Path, timesteps: None) -> None:
    tar = write_tar(tmp_path / "a.tar", [(f"key-{row:05d}.png", png(row)) for row in range(12)])
    index = build_index(DatasetSpec(tars=str(tar)))
    images = ImageSpec(size=(6, 5), views=VIEWS)
    array = make_array("pooled", (3,), "float32").model_copy(update={"views": 2})
    spec = make_spec(12, 4, images=images, dataset=index.digest())
    store = FeatureStore.create(str(tmp_path / "s"), spec, [array], TIMES, index)
    fill_views(store, array)
    values = reference(array, 4, 12).reshape(2, 2, 12, 3)
    seen = set()
    dataset = FeatureDataset(store, None, timesteps, view="sample", images=True)
    for batch in (
        *FeatureStream(store, None, timesteps, view="sample", images=True, batch_size=5),
        dataset[list(range(12))],
        dataset[[3, 1, 3]],
    ):
        assert batch.pixels is not None
        for i, row in enumerate(batch.row.tolist()):
            (view,) = batch.view["pooled"][i].tolist()
            times = [[t.requested for t in TIMES].index(t) for t in batch.timestep["pooled"][i]]
            seen.add((view, *times))
            assert np.array_equal(batch.features["pooled"][i], values[view, times, row])
            assert np.array_equal(batch.pixels[i], decode_views(png(row), images, "")[view])
    assert len(seen) == (2 if timesteps is None else 4)
    both = next(iter(FeatureStream(store, view=["id", "hflip"], images=True, batch_size=12)))
    assert both.pixels is not None
    assert both.pixels.shape == (12, 2, 3, 6, 5)
    assert torch.equal(both.pixels[:, 0], both.pixels[:, 1].flip(-1))
    with pytest.raises(SpecError, match="images with views"):
        FeatureStream(store, batch_size=4, images=ImageSpec(size=6, views=("hflip", "id")))


# --- batches without samples ---------------------------------------------------------------------


def test_a_batch_sampler_gives_ready_batches(store: FeatureStore) -> None:
    dataset = FeatureDataset(store)
    sampler = BatchSampler(RandomSampler(dataset), 7, False)
    batches = list(DataLoader(dataset, sampler=sampler, batch_size=None))
    assert [len(batch.row) for batch in batches] == [7] * 4
    assert sorted(rows_of(batches)) == VALID
    for batch in batches:
        assert isinstance(batch, FeatureBatch)
        for tap in ("pooled", "map"):
            want = expected(store, tap, INVALID)[:, batch.row.tolist()].swapaxes(0, 1)
            assert np.array_equal(batch.features[tap].numpy(), want)
    assert batches[0].to("cpu").features.keys() == batches[0].features.keys()
    assert batches[0].to("meta").label.device.type == "meta"


@pytest.mark.parametrize("kind", ["map", "pooled"])
def test_the_benchmark_reads_every_row_in_every_way(tmp_path: Path, kind: str) -> None:
    """`measure` checks the numbers of rows."""
    made = reading.make_store(tmp_path, kind, 0, rows_per_unit=9)
    assert made.spec.n_samples == 18
    assert reading.measure(made, kind, 1).keys() == {"raw", "memmap", "stream", "dataset"}


@pytest.mark.parametrize("timesteps", [None, "sample"])
def test_values_are_the_same_where_they_were_read_and_packed(
    store: FeatureStore, timesteps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Little shards are packed, larger ones stay; these are little, so the limit is moved."""
    packed = list(FeatureStream(store, None, timesteps, batch_size=9))
    monkeypatch.setattr(row_blocks, "PIECE_BYTES", 0)
    for batch, want in zip(
        FeatureStream(store, None, timesteps, batch_size=9), packed, strict=True
    ):
        assert torch.equal(batch.row, want.row)
        for tap, values in batch.features.items():
            assert torch.equal(values, want.features[tap])


def test_pinned_memory_needs_an_accelerator(store: FeatureStore) -> None:
    if torch.accelerator.is_available():
        stream = FeatureStream(store, batch_size=7, pin_memory=True, shuffle=False)
        plain = FeatureStream(store, batch_size=7, shuffle=False)
        for a, b in zip(stream, plain, strict=True):
            for tap, x in a.features.items():
                assert x.is_pinned()
                assert torch.equal(x, b.features[tap])
        return
    with pytest.raises(SpecError, match="torch sees no accelerator"):
        FeatureStream(store, batch_size=7, pin_memory=True)


def test_small_shards_do_not_use_up_file_descriptors(tmp_path: Path) -> None:
    """A buffer over 80 shards of small and of large rows, with 30 more descriptors allowed."""
    arrays = [make_array("small", (2,), "float32"), make_array("large", (4096,), "float32")]
    made = make_store(str(tmp_path), 40, 1, arrays=arrays, times=make_times(10))
    fill(made)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 30, limit[1]))
    try:
        assert sorted(rows_of(list(FeatureStream(made, batch_size=10)))) == list(range(40))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
