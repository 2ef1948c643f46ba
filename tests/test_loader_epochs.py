"""Streams over buckets, ranks, workers and interruptions: every row once, no rank waits."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from drl_data.datasets import FeatureStream
from drl_data.errors import SpecError
from drl_data.spec import ImageSpec
from drl_data.store import FeatureStore

from .loader_helpers import VALID, rows_of, small_and_large, with_workers
from .stores import (
    expected,
    fill,
    make_array,
    make_index,
    make_store,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return small_and_large(str(tmp_path_factory.mktemp("s")))


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
    assert sorted(seen) == VALID


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
            assert sorted(new) == VALID
    with pytest.raises(SpecError, match=r"28 rows over 3 ranks in batches of 1: .*pad=True"):
        FeatureStream(store, batch_size=1, world_size=3)
    with pytest.raises(SpecError, match="drop_last and pad; want not both"):
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
