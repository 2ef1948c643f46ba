"""Executors: every unit comes back once, whatever fails on the way. The tasks are stubs."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drl_data.errors import ExecutionError, UserError
from drl_data.executors import Outcome, run_local, run_ray
from drl_data.plan import Lease, Unit, plan_units
from drl_data.stopping import Stop
from drl_data.testing import Schedule

Square = Callable[[Lease, Stop], int]
RAY = {"workers": 2, "cpus_per_worker": 0.5}


def make_square() -> Square:
    """A task whose result names its unit."""
    return lambda lease, stop: lease.unit.start**2


def ok(units: list[Unit]) -> dict[int, int]:
    return {unit.id: unit.start**2 for unit in units}


def results(outcomes: Iterator[Outcome[int]]) -> tuple[dict[int, int], dict[int, Outcome[int]]]:
    """(results by unit, failed outcomes by unit); each unit at most once."""
    done: dict[int, int] = {}
    failed: dict[int, Outcome[int]] = {}
    for outcome in outcomes:
        assert outcome.unit.id not in {*done, *failed}
        if outcome.result is None:
            failed[outcome.unit.id] = outcome
        else:
            done[outcome.unit.id] = outcome.result
    return done, failed


ACTIONS = st.dictionaries(
    st.tuples(st.integers(0, 9), st.integers(1, 4)), st.sampled_from(["fail", "error"])
)


def expected(units: list[Unit], table: dict[tuple[int, int], str], cap: int) -> dict[int, int]:
    """Attempts after which each failing unit is given up; a straight reading of the rules."""
    failed = {}
    for unit in units:
        for attempt in range(1, cap + 1):
            action = table.get((unit.id, attempt))
            if action is None:
                break
            if action == "error" or attempt == cap:
                failed[unit.id] = attempt
                break
    return failed


@given(st.integers(1, 10), st.integers(1, 4), st.integers(1, 4), ACTIONS)
def test_local_tries_again_what_may_work_and_lists_the_rest(
    n: int, leases: int, cap: int, table: dict[tuple[int, int], str]
) -> None:
    units = plan_units(n, 1)
    done, failed = results(
        run_local(Schedule(make_square, table), units, leases=leases, max_attempts=cap)
    )
    want = expected(units, table, cap)
    assert {k: o.attempts for k, o in failed.items()} == want
    assert done == {k: v for k, v in ok(units).items() if k not in want}
    for outcome in failed.values():
        assert "scheduled" in (outcome.error or "")


def test_local_keeps_several_units_in_flight_and_no_more() -> None:
    barrier = threading.Barrier(3, timeout=20)  # breaks unless three units run at a time
    running, peak = Counter[str](), [0]

    def make() -> Square:
        def task(lease: Lease, stop: Stop) -> int:
            running["now"] += 1
            peak[0] = max(peak[0], running["now"])
            barrier.wait()
            running["now"] -= 1
            return lease.unit.id

        return task

    assert len(list(run_local(make, plan_units(9, 1), leases=3))) == 9
    assert peak[0] == 3


def test_nothing_to_do_makes_no_task() -> None:
    def never() -> Square:
        raise AssertionError("made a task")

    assert list(run_local(never, [])) == []
    assert list(run_ray(never, [])) == []


def test_closing_early_lets_units_in_flight_finish() -> None:
    seen: list[int] = []

    def make() -> Square:
        def task(lease: Lease, stop: Stop) -> int:
            seen.append(lease.unit.id)
            return lease.unit.id

        return task

    outcomes = run_local(make, plan_units(100, 1), leases=2)
    next(outcomes)
    outcomes.close()
    assert len(seen) < 100


def make_users_mistake() -> Square:
    raise UserError("the weights are not there")


def make_broken() -> Square:
    raise RuntimeError("this machine has no such device")


def make_recorded(folder: Path) -> Square:
    """Leaves a file for each task that is made, named by the process."""
    (folder / f"made-{os.getpid()}").touch()
    return make_square()


@pytest.mark.ray
def test_ray_gives_the_same_and_makes_each_task_once(local_ray: None, tmp_path: Path) -> None:
    units = plan_units(40, 1)
    done, failed = results(run_ray(partial(make_recorded, tmp_path), units, **RAY))
    assert (done, failed) == (ok(units), {})
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.ray
def test_ray_tries_again_what_may_work_and_lists_the_rest(local_ray: None) -> None:
    table = {(1, 1): "fail", (2, 1): "fail", (2, 2): "fail", (2, 3): "fail", (4, 1): "error"}
    units = plan_units(6, 1)
    done, failed = results(run_ray(Schedule(make_square, table), units, **RAY))
    assert {k: o.attempts for k, o in failed.items()} == expected(units, table, 3)
    assert done == {k: v for k, v in ok(units).items() if k not in failed}
    assert "scheduled error" in (failed[4].error or "")


@pytest.mark.ray
@pytest.mark.parametrize("leases", [1, 3])
def test_ray_survives_workers_that_die(local_ray: None, leases: int) -> None:
    """Unit 3 kills its worker twice and unit 8 once; the other leases of a dead worker come back,
    and everything is done in the end."""
    table = {(3, 1): "die", (3, 2): "die", (8, 1): "die"}
    units = plan_units(12, 1)
    done, failed = results(
        run_ray(Schedule(make_square, table), units, **RAY, leases=leases, max_attempts=5)
    )
    assert (done, failed) == (ok(units), {})


@pytest.mark.ray
def test_ray_lists_a_unit_that_always_kills_its_worker(local_ray: None) -> None:
    table = {(3, attempt): "die" for attempt in (1, 2, 3)}
    units = plan_units(8, 1)
    done, failed = results(
        run_ray(Schedule(make_square, table), units, **RAY, leases=1, max_attempts=3)
    )
    assert list(failed) == [3]
    assert failed[3].attempts == 3
    assert "its worker died" in (failed[3].error or "")
    assert done == {k: v for k, v in ok(units).items() if k != 3}


@pytest.mark.ray
def test_a_users_mistake_in_a_worker_is_raised_as_one(local_ray: None) -> None:
    with pytest.raises(UserError, match="the weights are not there"):
        list(run_ray(make_users_mistake, plan_units(4, 1), **RAY))


@pytest.mark.ray
def test_workers_that_cannot_start_end_the_run_with_the_cause(local_ray: None) -> None:
    with pytest.raises(ExecutionError, match="this machine has no such device"):
        list(run_ray(make_broken, plan_units(4, 1), workers=1, cpus_per_worker=0.5))
