"""Epochs as values: every row exactly once over ranks, batches, workers and interruptions."""

from __future__ import annotations

import itertools
from dataclasses import replace
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drl_data.epochs import (
    Dealing,
    EpochPlan,
    RankPlan,
    Segment,
    plan_epoch,
    plan_rank,
    resumed,
    undealt,
)
from drl_data.errors import SpecError

MODES = ("once", "drop_last", "pad")


def dealing(mode: str, n_lanes: int, **numbers: int) -> Dealing:
    buffer_rows = (numbers.pop("buffer_rows", 7),) * n_lanes
    shuffle = bool(numbers.pop("shuffle", 1))
    return Dealing(
        numbers["batch_size"],
        numbers["world_size"],
        buffer_rows,
        shuffle,
        seed=7,
        drop_last=mode == "drop_last",
        pad=mode == "pad",
    )


lanes_of_rows = st.lists(
    st.lists(st.integers(0, 200), min_size=1, max_size=60, unique=True).map(sorted),
    min_size=1,
    max_size=3,
)
dealings = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 20),
        "world_size": st.integers(1, 5),
        "buffer_rows": st.integers(1, 60),
        "shuffle": st.integers(0, 1),
    }
)


def possible(lanes: list[np.ndarray], how: Dealing) -> bool:
    """Whether all ranks can have the same number of batches."""
    if how.drop_last or how.pad:
        return True
    ranks, size = how.world_size, how.batch_size
    return all(ceil(ceil(len(x) / ranks) / size) <= len(x) // ranks for x in lanes)


@settings(deadline=None, max_examples=150)
@given(
    lanes=lanes_of_rows,
    units=st.integers(1, 30),
    numbers=dealings,
    mode=st.sampled_from(MODES),
    n_workers=st.integers(1, 4),
    epoch=st.integers(0, 3),
    first=st.integers(0, 4),
)
def test_every_row_exactly_once(
    lanes: list[list[int]],
    units: int,
    numbers: dict[str, int],
    mode: str,
    n_workers: int,
    epoch: int,
    first: int,
) -> None:
    """Over ranks and workers; and no rank waits for another."""
    rows, how = [np.array(lane) for lane in lanes], dealing(mode, len(lanes), **numbers)
    per_unit = [units + i for i in range(len(lanes))]
    if not possible(rows, how):
        with pytest.raises(SpecError, match="wait for them for ever; say drop_last=True or pad"):
            [plan_rank(rows, per_unit, how, epoch=epoch, rank=r) for r in range(how.world_size)]
        return
    plans = [plan_rank(rows, per_unit, how, epoch=epoch, rank=r) for r in range(how.world_size)]
    assert len({tuple(plan.lane_of.tolist()) for plan in plans}) == 1
    for lane, own in enumerate(lanes):
        check_lane([plan.lanes[lane] for plan in plans], own, how)
        for plan in plans:
            check_plan(plan.lanes[lane], per_unit[lane], how.buffer_rows[lane])
    for plan in plans:
        check_turns(plan, n_workers, first)
        if not how.shuffle:
            assert plan.lane_of.tolist() == sorted(plan.lane_of.tolist())


def test_every_small_case() -> None:
    """Of rows, ranks and batch sizes: also the rare one of a rank that has a row too few."""
    n_short = 0
    for n, ranks, size, mode in itertools.product(range(1, 20), range(1, 5), range(1, 6), MODES):
        how = dealing(mode, 1, batch_size=size, world_size=ranks)
        rows = np.arange(n)
        if possible([rows], how):
            plans = [plan_epoch(rows, 3, how, epoch=0, rank=rank) for rank in range(ranks)]
            check_lane(plans, rows.tolist(), how)
            n_short += any(len(p.order) == (p.n_batches - 1) * size > 0 for p in plans)
    assert n_short > 10


def check_lane(plans: list[EpochPlan], rows: list[int], how: Dealing) -> None:
    """Each row once, as many batches on every rank, sizes as promised."""
    assert len({plan.n_batches for plan in plans}) == 1
    sizes = [
        [len(plan.order[plan.batch_slice(b)]) for b in range(plan.n_batches)] for plan in plans
    ]
    first_time = [row for p in plans for row in p.order[: len(p.order) - p.n_repeats].tolist()]
    assert len(set(first_time)) == len(first_time)
    assert set(first_time) <= set(rows)
    assert {row for plan in plans for row in plan.order.tolist()} <= set(rows)
    if how.drop_last:
        assert sizes == [[how.batch_size] * plans[0].n_batches] * len(plans)
        assert len(rows) - len(first_time) < how.world_size * how.batch_size + how.world_size
        return
    assert sorted(first_time) == rows
    assert all(1 <= size <= how.batch_size for of_rank in sizes for size in of_rank)
    if how.pad:
        assert all(of_rank == sizes[0] for of_rank in sizes)
        assert all(plan.n_repeats <= 1 for plan in plans)
    else:
        assert all(plan.n_repeats == 0 for plan in plans)
        assert max(map(sum, sizes)) - min(map(sum, sizes)) <= 1
    assert all(size >= how.batch_size - 1 for of_rank in sizes for size in of_rank[:-1])
    if not how.shuffle:
        assert first_time == sorted(first_time)


def check_plan(plan: EpochPlan, rows_per_unit: int, buffer_rows: int) -> None:
    """Batches and windows tile the order; windows hold whole units and enough rows."""
    places = np.arange(len(plan.order))
    batches = [places[plan.batch_slice(batch)] for batch in range(plan.n_batches)]
    windows = [places[plan.window_slice(window)] for window in range(plan.n_windows)]
    for tiles in (batches, windows):
        assert np.array_equal(np.concatenate([*tiles, places[:0]]), places)
        assert all(len(tile) for tile in tiles)
    units = [set((plan.order[window] // rows_per_unit).tolist()) for window in windows]
    assert len(set().union(*units)) == sum(len(u) for u in units)
    assert all(len(window) >= buffer_rows for window in windows[:-1])
    for batch, where in enumerate(batches):
        touched = [i for i, window in enumerate(windows) if set(where) & set(window)]
        assert list(plan.windows_of(batch)) == touched


def check_turns(plan: RankPlan, n_workers: int, first: int) -> None:
    """Each lane's batches in order; workers in turn give all of them in order."""
    for lane, of_lane in enumerate(plan.lanes):
        assert plan.batch_of[plan.lane_of == lane].tolist() == list(range(of_lane.n_batches))
    in_turn = itertools.zip_longest(
        *(plan.of_worker(first, worker, n_workers) for worker in range(n_workers))
    )
    steps = [step for turn in in_turn for step in turn if step is not None]
    assert steps == list(range(first, plan.n_batches))


@settings(deadline=None, max_examples=150)
@given(
    lanes=lanes_of_rows,
    units=st.integers(1, 30),
    parts=st.lists(
        st.tuples(dealings, st.sampled_from(MODES), st.integers(0, 6)), min_size=1, max_size=3
    ),
    last=dealings,
    epoch=st.integers(0, 2),
)
def test_an_epoch_survives_other_numbers_of_ranks_and_batch_sizes(
    lanes: list[list[int]],
    units: int,
    parts: list[tuple[dict[str, int], str, int]],
    last: dict[str, int],
    epoch: int,
) -> None:
    """Some batches on some ranks, then others on others: every row exactly once in the end."""
    rows = [np.array(lane) for lane in lanes]
    per_unit = [units] * len(lanes)
    segments: tuple[Segment, ...] = ()
    seen: list[list[int]] = [[] for _ in lanes]
    shuffle = last["shuffle"]
    for numbers, mode, n_batches in [*parts, (last, "pad", 10**6)]:
        how = dealing(mode, len(lanes), **{**numbers, "shuffle": shuffle})
        left = undealt(rows, per_unit, segments, epoch=epoch)
        if not possible(left, how):
            how = replace(how, pad=True)
        n_done = 0
        for rank in range(how.world_size):
            plan = plan_rank(left, per_unit, how, epoch=epoch, rank=rank, part=len(segments))
            n_done = min(n_batches, plan.n_batches)
            for step in range(n_done):
                lane = int(plan.lane_of[step])
                new = plan.rows_of(step).tolist()
                of_lane = plan.lanes[lane]
                ends = plan.batch_of[step] == of_lane.n_batches - 1
                seen[lane] += new[: len(new) - (of_lane.n_repeats if ends else 0)]
        segments = resumed(segments, Segment(how, n_done), replace(how, batch_size=99))
    assert [sorted(of_lane) for of_lane in seen] == lanes


def test_only_a_part_that_gave_batches_is_kept() -> None:
    how = dealing("once", 1, batch_size=4, world_size=2)
    more = replace(how, world_size=3)
    assert resumed((), Segment(how, 5), how) == ()
    assert resumed((), Segment(how, 0), more) == ()
    assert resumed((), Segment(how, 5), more) == (Segment(how, 5),)
    assert resumed((), Segment(how, 5), replace(how, buffer_rows=(8,))) == (Segment(how, 5),)


def test_lanes_take_turns_at_random_and_the_same_on_every_rank() -> None:
    rows = [np.arange(40), np.arange(80)]
    how = dealing("once", 2, batch_size=2, world_size=2)
    orders = {
        (epoch, rank): plan_rank(rows, [4, 4], how, epoch=epoch, rank=rank).lane_of.tolist()
        for epoch in (0, 1)
        for rank in (0, 1)
    }
    assert orders[0, 0] == orders[0, 1] != orders[1, 0] == orders[1, 1]
    assert orders[0, 0] != sorted(orders[0, 0])
    assert sorted(orders[0, 0]) == [0] * 10 + [1] * 20


@settings(deadline=None, max_examples=100)
@given(
    rows=st.lists(st.integers(0, 400), min_size=1, max_size=200, unique=True).map(sorted),
    units=st.integers(1, 30),
    size=st.integers(1, 6),
    ranks=st.integers(1, 5),
    buffer_rows=st.integers(1, 60),
    shuffle=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_split_batches_are_those_of_one_process(
    rows: list[int],
    units: int,
    size: int,
    ranks: int,
    buffer_rows: int,
    shuffle: bool,
    epoch: int,
) -> None:
    alone = Dealing(size * ranks, 1, (buffer_rows,), shuffle, seed=7, drop_last=True)
    lanes = [np.array(rows)]
    together = replace(alone, world_size=ranks, split_batches=True)
    whole = plan_rank(lanes, [units], alone, epoch=epoch, rank=0)
    parts = [plan_rank(lanes, [units], together, epoch=epoch, rank=r) for r in range(ranks)]
    for part in parts:
        assert part.n_batches == whole.n_batches
        (lane,) = part.lanes
        for window in range(lane.n_windows):  # what is read ahead of a batch holds its rows
            mine = lane.order[lane.window_slice(window)]
            (of_all,) = whole.lanes
            assert set(mine) <= set(of_all.order[of_all.window_slice(window)])
    for step in range(whole.n_batches):
        of_ranks = [part.rows_of(step) for part in parts]
        assert {len(mine) for mine in of_ranks} == {size}
        assert sorted(np.concatenate(of_ranks)) == sorted(whole.rows_of(step))
    dealt = undealt(lanes, [units], [Segment(together, 1)], epoch=epoch)
    assert np.array_equal(dealt[0], undealt(lanes, [units], [Segment(alone, 1)], epoch=epoch)[0])


def test_ranks_of_split_batches_read_parts_of_the_windows() -> None:
    """Of 100 units in windows of 25, four ranks read less than twice what one alone does."""
    rows = np.arange(6400)
    together = Dealing(64, 4, (1600,), True, seed=1, drop_last=True, split_batches=True)
    n_read = 0
    for rank in range(4):
        plan = plan_epoch(rows, 64, together, epoch=0, rank=rank)
        units = [np.unique(plan.order[plan.window_slice(w)] // 64) for w in range(plan.n_windows)]
        n_read += sum(map(len, units))
    assert n_read < 180  # 400 if each rank touched every unit


def test_batches_that_do_not_split_are_refused() -> None:
    odd = Dealing(4, 2, (8,), True, seed=1, split_batches=True)
    with pytest.raises(SpecError, match="batches of 3 and 4 rows over 2 ranks: want multiples"):
        plan_epoch(np.arange(7), 4, odd, epoch=0, rank=0)
