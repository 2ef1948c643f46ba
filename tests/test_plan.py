"""Units: every row in exactly one, whatever the numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drl_data.errors import SpecError
from drl_data.plan import (
    MAX_ROWS_PER_UNIT,
    TARGET_SHARD_BYTES,
    auto_rows_per_unit,
    estimate,
    plan_units,
    select_units,
)
from drl_data.spec import ArraySpec

N = st.integers(1, 5000)


def array(channels: int, side: int) -> ArraySpec:
    return ArraySpec(
        name=f"c{channels}s{side}",
        tap="t@out",
        dims=("channel", "height", "width"),
        shape=(channels, side, side),
        dtype="float16",
    )


@given(N, N)
def test_every_row_is_in_exactly_one_unit(n_samples: int, rows_per_unit: int) -> None:
    units = plan_units(n_samples, rows_per_unit)
    assert [row for u in units for row in range(u.start, u.stop)] == list(range(n_samples))
    assert [u.id for u in units] == list(range(len(units)))
    assert all(u.start == u.id * rows_per_unit for u in units)
    assert all(u.n_rows == rows_per_unit for u in units[:-1])


@given(N, st.integers(1, 300))
def test_parts_are_disjoint_and_complete(n_samples: int, n_parts: int) -> None:
    units = plan_units(n_samples, 7)
    parts = [select_units(units, i, n_parts) for i in range(n_parts)]
    assert [u for part in parts for u in part] == units
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 2048), st.integers(1, 64), N, st.integers(1, 256))
def test_auto_units_are_whole_batches_near_the_target(
    channels: int, side: int, n_samples: int, batch_size: int
) -> None:
    arrays = [array(channels, side), array(1, 1)]
    rows = auto_rows_per_unit(arrays, n_samples, batch_size)
    assert rows % batch_size == 0
    assert rows == batch_size or rows <= min(n_samples, MAX_ROWS_PER_UNIT)
    assert rows == batch_size or rows * arrays[0].bytes_per_row <= TARGET_SHARD_BYTES


@given(N, st.integers(1, 9), N)
def test_estimate_counts_what_is_written(n: int, n_timesteps: int, rows: int) -> None:
    arrays = [array(4, 2), array(8, 1)]
    cost = estimate(arrays, n, n_timesteps, rows)
    assert cost.bytes_total == n * n_timesteps * (4 * 4 * 2 + 8 * 2)
    n_units = len(plan_units(n, rows))
    assert cost.n_objects == n_units * (2 * n_timesteps + 2)


@pytest.mark.parametrize(("n", "rows"), [(0, 1), (1, 0), (-1, 1)])
def test_nothing_cannot_be_planned(n: int, rows: int) -> None:
    with pytest.raises(SpecError, match="want both at least 1"):
        plan_units(n, rows)


@pytest.mark.parametrize(("part", "n_parts"), [(1, 1), (-1, 2), (5, 3), (0, 0)])
def test_a_part_outside_is_refused(part: int, n_parts: int) -> None:
    with pytest.raises(SpecError, match="want 0 <= part < number of parts"):
        select_units(plan_units(10, 2), part, n_parts)
