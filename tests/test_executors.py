"""Executors: every unit comes back once, whatever fails on the way. The tasks are stubs."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drl_data import executors
from drl_data.errors import (
    DeviceLostError,
    ExecutionError,
    StorageUnusableError,
    UserError,
)
from drl_data.executors import Workers, run_local, run_process, run_ray
from drl_data.leases import Limits, Outcome
from drl_data.plan import Lease, Unit, plan_units
from drl_data.pools import gpus_of_slot
from drl_data.stopping import Stop
from drl_data.testing import KillingRows, Schedule
from tests.stub_tasks import (
    Square,
    make_broken,
    make_deaf,
    make_gone,
    make_recorded,
    make_rows,
    make_seen,
    make_square,
    make_users_mistake,
    make_waiting,
)

Run = Callable[..., Iterator[Outcome[int]]]
TWO = Workers(2, cpus=0.5)


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
        run_local(Schedule(make_square, table), units, limits=Limits(leases, cap))
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

    assert len(list(run_local(make, plan_units(9, 1), limits=Limits(3)))) == 9
    assert peak[0] == 3


def test_nothing_to_do_makes_no_task() -> None:
    def never() -> Square:
        raise AssertionError("made a task")

    assert list(run_local(never, [])) == []
    assert list(run_process(never, [])) == []
    assert list(run_ray(never, [])) == []


def test_closing_early_lets_units_in_flight_finish() -> None:
    seen: list[int] = []

    def make() -> Square:
        def task(lease: Lease, stop: Stop) -> int:
            seen.append(lease.unit.id)
            return lease.unit.id

        return task

    outcomes = run_local(make, plan_units(100, 1), limits=Limits(2))
    next(outcomes)
    outcomes.close()
    assert len(seen) < 100


@pytest.fixture(params=["process", pytest.param("ray", marks=pytest.mark.ray)])
def run(request: pytest.FixtureRequest) -> Run:
    """Each executor whose workers may die: both keep the same book."""
    if request.param == "process":
        return run_process
    request.getfixturevalue("local_ray")
    return run_ray


def test_workers_give_the_same_and_make_each_task_once(run: Run, tmp_path: Path) -> None:
    units = plan_units(40, 1)
    done, failed = results(run(partial(make_recorded, tmp_path), units, workers=TWO))
    assert (done, failed) == (ok(units), {})
    assert len(list(tmp_path.iterdir())) in (1, 2)  # one may do it all before the other is there
    pids = [int(path.name.removeprefix("made-")) for path in tmp_path.iterdir()]
    wait_until(lambda: not any(map(is_running, pids)))


def is_running(pid: int) -> bool:
    """Whether there is such a process, and it is no zombie that waits for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_try_again_what_may_work_and_list_the_rest(run: Run) -> None:
    table = {(1, 1): "fail", (2, 1): "fail", (2, 2): "fail", (2, 3): "fail", (4, 1): "error"}
    units = plan_units(6, 1)
    done, failed = results(run(Schedule(make_square, table), units, workers=TWO))
    assert {k: o.attempts for k, o in failed.items()} == expected(units, table, 3)
    assert done == {k: v for k, v in ok(units).items() if k not in failed}
    assert "scheduled error" in (failed[4].error or "")


@pytest.mark.parametrize("leases", [1, 3])
def test_workers_that_die_are_replaced(run: Run, leases: int) -> None:
    """Unit 3 kills its worker twice and unit 8 once; the other leases of a dead worker come back,
    and everything is done in the end."""
    table = {(3, 1): "die", (3, 2): "die", (8, 1): "die"}
    units = plan_units(12, 1)
    limits = Limits(leases, max_attempts=5)
    done, failed = results(run(Schedule(make_square, table), units, workers=TWO, limits=limits))
    assert (done, failed) == (ok(units), {})


@pytest.mark.parametrize("how", ["SIGSEGV", "memory", "exit"])
def test_a_row_that_kills_is_found_and_the_rest_is_computed(run: Run, how: str) -> None:
    """Row 21 of units of 16 rows; the reason is the same whichever executor finds it."""
    task = KillingRows(make_rows, (21,), how)
    done, failed = results(run(task, plan_units(48, 16), workers=TWO))
    cause = {"SIGSEGV": "SIGSEGV", "memory": "out of memory", "exit": "exit status 1"}[how]
    assert failed == {}
    assert done[0] == done[2] == ()
    assert done[1] == ((21, f"killed its worker: {cause} (2 of 2 times)"),)


def test_a_users_mistake_in_a_worker_is_raised_as_one(run: Run) -> None:
    with pytest.raises(UserError, match="the weights are not there"):
        list(run(make_users_mistake, plan_units(4, 1), workers=TWO))


def test_workers_that_cannot_start_end_the_run_with_the_cause(run: Run) -> None:
    with pytest.raises(ExecutionError, match="this machine has no such device"):
        list(run(make_broken, plan_units(4, 1), workers=Workers(1, cpus=0.5)))


def test_a_worker_whose_gpu_is_lost_is_replaced(run: Run, tmp_path: Path) -> None:
    units = plan_units(6, 1)
    task = partial(make_gone, tmp_path, DeviceLostError)
    assert results(run(task, units, workers=Workers(1, cpus=0.5))) == (ok(units), {})


def test_a_lost_gpu_ends_a_run_of_one_process_and_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DeviceLostError, match="--executor process"):
        list(run_local(partial(make_gone, tmp_path, DeviceLostError), plan_units(4, 1)))


def test_unusable_storage_ends_the_run_at_once(run: Run, tmp_path: Path) -> None:
    with pytest.raises(StorageUnusableError, match="illegal memory access"):
        list(run(partial(make_gone, tmp_path, StorageUnusableError), plan_units(4, 1), workers=TWO))


def test_a_stop_ends_the_run_early_and_fails_no_unit(run: Run, tmp_path: Path) -> None:
    stop = Stop()
    outcomes = run(
        partial(make_waiting, tmp_path), plan_units(30, 1), workers=TWO, limits=Limits(2), stop=stop
    )
    watch = threading.Thread(target=request_when, args=(stop, tmp_path, 4), daemon=True)
    watch.start()
    assert results(outcomes) == ({0: 0}, {})
    assert len(list(tmp_path.iterdir())) == 4


def request_when(stop: Stop, folder: Path, n_begun: int, grace_s: float = 60.0) -> None:
    while len(list(folder.glob("began-*"))) < n_begun:
        time.sleep(0.01)
    stop.request(grace_s)


def test_a_worker_that_is_deaf_to_a_stop_is_killed(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "KILL_AFTER_S", 0.1)
    stop = Stop()
    stop_it = threading.Thread(target=request_when, args=(stop, tmp_path, 1, 0.0), daemon=True)
    outcomes = run(partial(make_deaf, tmp_path), plan_units(3, 1), workers=TWO, stop=stop)
    stop_it.start()
    assert list(outcomes) == []


def test_an_exception_in_the_consumer_leaves_no_child(run: Run, tmp_path: Path) -> None:
    outcomes = run(partial(make_recorded, tmp_path), plan_units(200, 1), workers=TWO)
    next(outcomes)
    outcomes.close()  # type: ignore[attr-defined]
    pids = [int(path.name.removeprefix("made-")) for path in tmp_path.iterdir()]
    assert pids
    wait_until(lambda: not any(map(is_running, pids)))


def wait_until(fact: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Return as soon as it is so."""
    deadline = time.monotonic() + timeout_s
    while not fact():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


def test_each_child_sees_its_gpus_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    list(run_process(partial(make_seen, tmp_path, 2), plan_units(4, 1), workers=Workers(2)))
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == ["4", "7"]


@pytest.mark.parametrize(
    ("each", "want"),
    [
        (1.0, ["a", "b", "a", "b"]),
        (0.5, ["a", "a", "b", "b"]),
        (2.0, ["ab", "ab", "ab", "ab"]),
        (1 / 3, ["a", "a", "a", "b"]),
        (0.0, ["", "", "", ""]),
    ],
)
def test_gpus_are_dealt_out_in_turn(each: float, want: list[str]) -> None:
    assert ["".join(gpus_of_slot(slot, ["a", "b"], each)) for slot in range(4)] == want
