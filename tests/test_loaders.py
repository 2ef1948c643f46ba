"""What loaders choose: predicates, drawn timesteps, views, buckets, ranks, resuming, memory."""

from __future__ import annotations

import itertools
import json
import os
import resource
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from benchmarks import reading
from drl_data.datasets import Draw, FeatureBatch, FeatureDataset, FeatureStream
from drl_data.draws import choose, uniform
from drl_data.errors import SpecError, TapError
from drl_data.images import decode_views
from drl_data.index import build_index
from drl_data.shards import LARGE_ROW_BYTES
from drl_data.spec import ArraySpec, DatasetSpec, ImageSpec
from drl_data.store import FeatureStore

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

INVALID = (2, 9, 17)
VIEWS = ("id", "hflip")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """31 rows, three timesteps, small rows and large ones (a shard of them is mapped or copied)."""
    arrays = (
        make_array("pooled", (6,), "float16"),
        make_array("map", (LARGE_ROW_BYTES // 64, 4, 4), "float32"),
    )
    folder = str(tmp_path_factory.mktemp("s"))
    made = make_store(folder, 31, 4, arrays=arrays, times=make_times(10, 50, 200))
    fill(made, INVALID)
    return made


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


def with_workers(test: Callable[..., None]) -> Callable[..., None]:
    """Torch warns about forks beside threads, and about more workers than cores."""
    for message in (
        "ignore:.*multi-threaded, use of fork:DeprecationWarning",
        "ignore:This DataLoader will create:UserWarning",
    ):
        test = pytest.mark.filterwarnings(message)(test)
    return test


def rows_of(batches: Sequence[FeatureBatch]) -> list[int]:
    return [int(row) for batch in batches for row in batch.row]


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


# --- buckets -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def buckets(tmp_path_factory: pytest.TempPathFactory) -> list[FeatureStore]:
    """Three stores of maps of different shapes."""
    folder = tmp_path_factory.mktemp("buckets")
    stores = []
    for n, shape in ((13, (2, 3, 5)), (6, (2, 5, 3)), (22, (2, 4, 4))):
        made = make_store(str(folder / str(n)), n, 4, arrays=[make_array("map", shape, "float32")])
        fill(made, [1])
        stores.append(made)
    return stores


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("n_workers", [0, 2])
@with_workers
def test_a_batch_is_of_one_bucket(
    buckets: list[FeatureStore], world_size: int, n_workers: int
) -> None:
    got: list[list[int]] = [[] for _ in buckets]
    turns = set()
    for rank in range(world_size):
        stream = FeatureStream(
            buckets, batch_size=3, buffer_rows=4, rank=rank, world_size=world_size, seed=1
        )
        batches = list(DataLoader(stream, batch_size=None, num_workers=n_workers))
        assert len(batches) == len(stream)
        turns.add(tuple(batch.bucket for batch in batches))
        for batch in batches:
            store = buckets[batch.bucket]
            want = expected(store, "map", [1])[:, batch.row.tolist()].swapaxes(0, 1)
            assert np.array_equal(batch.features["map"].numpy(), want)
            got[batch.bucket] += batch.row.tolist()
    assert [sorted(rows) for rows in got] == [
        [row for row in range(s.spec.n_samples) if row != 1] for s in buckets
    ]
    (turn,) = turns
    assert list(turn) != sorted(turn)


def test_buckets_resume_on_other_ranks(buckets: list[FeatureStore]) -> None:
    got: list[list[int]] = [[] for _ in buckets]

    def take(world_size: int, batch_size: int, n: int | None, state: object) -> object:
        for rank in range(world_size):
            stream = FeatureStream(
                buckets, batch_size=batch_size, rank=rank, world_size=world_size, pad=True
            )
            if state is not None:
                stream.load_state_dict(state)  # type: ignore[arg-type]
            for batch in itertools.islice(stream, n):
                got[batch.bucket] += batch.row[~batch.repeated].tolist()
            saved = json.loads(json.dumps(stream.state_dict()))
        return saved

    state = take(2, 3, 4, None)
    state = take(3, 2, 2, state)
    take(1, 4, None, state)
    assert [sorted(rows) for rows in got] == [
        [row for row in range(s.spec.n_samples) if row != 1] for s in buckets
    ]


def test_several_stores_need_images_of_their_own(buckets: list[FeatureStore]) -> None:
    with pytest.raises(SpecError, match="images=True or an ImageSpec for several"):
        FeatureStream(buckets, batch_size=2, images=(make_index(13), ImageSpec(size=8)))
    with pytest.raises(SpecError, match="0 stores"):
        FeatureStream([], batch_size=2)


# --- ranks, workers, interruptions ---------------------------------------------------------------

valid = [row for row in range(31) if row not in INVALID]


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_streams_give_every_row_once_however_they_are_interrupted(
    store: FeatureStore, data: st.DataObject
) -> None:
    """Ranks that train in step, saved and loaded as JSON, with other numbers each time."""
    seen: list[int] = []
    state: dict[str, object] | None = None
    shuffle = data.draw(st.booleans())
    for last in (False, False, True):
        world_size = data.draw(st.integers(1, 4))
        batch_size = data.draw(st.integers(1, 9))
        n = None if last else data.draw(st.integers(0, 4))
        buffer_rows = data.draw(st.integers(1, 20))
        streams = [
            FeatureStream(
                store,
                ["pooled"],
                [10],
                batch_size=batch_size,
                buffer_rows=buffer_rows,
                rank=rank,
                world_size=world_size,
                pad=True,
                shuffle=shuffle,
                seed=5,
            )
            for rank in range(world_size)
        ]
        lengths, states = set(), []
        for stream in streams:
            if state is not None:
                stream.load_state_dict(state)
            batches = list(itertools.islice(stream, n))
            lengths.add(len(batches))
            seen += [r for b in batches for r in b.row[~b.repeated].tolist()]
            states.append(json.loads(json.dumps(stream.state_dict())))
        assert len(lengths) == 1
        assert all(other == states[0] for other in states)
        state = states[0]
    assert sorted(seen) == valid


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_every_rank_has_as_many_batches(store: FeatureStore, world_size: int) -> None:
    """28 rows in batches of 4: over 3 and 5 ranks they do not divide."""
    for mode in ({}, {"drop_last": True}, {"pad": True}):
        streams = [
            FeatureStream(store, ["pooled"], batch_size=4, rank=rank, world_size=world_size, **mode)
            for rank in range(world_size)
        ]
        batches = [list(stream) for stream in streams]
        assert {len(b) for b in batches} == {len(streams[0])}
        new = [r for of_rank in batches for b in of_rank for r in b.row[~b.repeated].tolist()]
        assert len(new) == len(set(new))
        n_repeated = sum(int(b.repeated.sum()) for of_rank in batches for b in of_rank)
        assert n_repeated == (-28 % world_size if mode == {"pad": True} else 0)
        if "drop_last" not in mode:
            assert sorted(new) == valid
    with pytest.raises(SpecError, match=r"28 rows over 3 ranks in batches of 1: .*pad=True"):
        FeatureStream(store, batch_size=1, world_size=3)
    with pytest.raises(SpecError, match="not both of drop_last and pad"):
        FeatureStream(store, batch_size=1, drop_last=True, pad=True)


@with_workers
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
def test_torchdata_resumes_in_its_workers(store: FeatureStore) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    for n_workers in (0, 2):

        def loader(n_workers: int = n_workers) -> object:
            stream = FeatureStream(store, ["pooled"], batch_size=3, seed=1)
            stream.set_epoch(2)
            return stateful.StatefulDataLoader(stream, batch_size=None, num_workers=n_workers)

        whole = rows_of(list(loader()))
        for n_taken in (0, 1, 4):
            first = loader()
            taken = list(itertools.islice(first, n_taken)) if n_taken else []
            state = first.state_dict() if n_taken else loader().state_dict()
            again = loader()
            again.load_state_dict(state)
            assert rows_of(taken) + rows_of(list(again)) == whole


# --- batches without samples ---------------------------------------------------------------------


def test_a_batch_sampler_gives_ready_batches(store: FeatureStore) -> None:
    dataset = FeatureDataset(store)
    sampler = BatchSampler(RandomSampler(dataset), 7, False)
    batches = list(DataLoader(dataset, sampler=sampler, batch_size=None))
    assert [len(batch.row) for batch in batches] == [7] * 4
    assert sorted(rows_of(batches)) == valid
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
