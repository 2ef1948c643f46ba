"""The queue of leases against a simulated world: no processes, all orders of events."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drl_data.answers import Answer
from drl_data.bisection import MAX_POISON_ROWS, Search
from drl_data.errors import ExecutionError, StorageUnusableError
from drl_data.leases import LeaseBook, Limits, Outcome
from drl_data.plan import Lease, Unit, plan_units


def rows_of(lease: Lease) -> set[int]:
    """Rows that a lease computes."""
    start, stop = lease.probe or (lease.unit.start, lease.unit.stop)
    return set(range(start, stop)) - {row for row, _ in lease.poison}


@dataclass
class World:
    """Workers that compute leases, and what goes wrong with them."""

    units: list[Unit]
    poison: set[int]
    limits: Limits
    n_slots: int
    choose: st.DataObject
    transient: dict[int, int] = field(default_factory=dict)
    """Storage errors that each unit will meet, at most one an attempt."""
    n_preemptions: int = 0
    n_crashes: int = 0
    """Deaths that are nobody's fault but are not announced either."""
    outcomes: list[Outcome[set[int]]] = field(default_factory=list)
    deaths: Counter[int] = field(default_factory=Counter)
    own_deaths: Counter[int] = field(default_factory=Counter)
    probes: Counter[int] = field(default_factory=Counter)

    def run(self, max_steps: int = 20_000) -> LeaseBook[set[int]]:
        book: LeaseBook[set[int]] = LeaseBook(self.units, self.limits, self.n_slots)
        out: list[tuple[int, Lease]] = []
        for _ in range(max_steps):
            if book.done:
                return book
            for slot in book.vacant():
                book.ready(book.hire(slot))
            for worker in book.workers():
                while (lease := book.take(worker)) is not None:
                    out.append((worker, lease))
                    held = [x for w, x in out if w == worker]
                    assert len(held) <= self.limits.leases
                    if lease.probe is not None:
                        self.probes[lease.unit.id] += 1
                        assert held == [lease], "a probe shares its worker"
            worker, lease = self.choose.draw(st.sampled_from(out))
            out = self._step(book, out, worker, lease)
            self.outcomes += book.outcomes()
        raise AssertionError("the book does not come to an end")

    def _step(
        self, book: LeaseBook[set[int]], out: list[tuple[int, Lease]], worker: int, lease: Lease
    ) -> list[tuple[int, Lease]]:
        """One lease of one worker meets its fate; the leases that are out after it."""
        held = [x for w, x in out if w == worker]
        rest = [(w, x) for w, x in out if w != worker]
        what = self.choose.draw(st.sampled_from(["compute", "preempt", "crash"]))
        if what == "preempt" and self.n_preemptions:
            self.n_preemptions -= 1
            book.died(worker, "preempted", charged=False)
            return rest
        if what == "crash" and self.n_crashes:
            self.n_crashes -= 1
            self._charge(held)
            book.died(worker, "SIGKILL")
            return rest
        unit = lease.unit.id
        if self.transient.get(unit):
            self.transient[unit] -= 1
            book.answered(worker, lease, Answer("transient", None, "slow down"))
        elif rows_of(lease) & self.poison:
            self.own_deaths[unit] += lease.probe is None
            self._charge(held)
            book.died(worker, "SIGSEGV")
            return rest
        else:
            book.answered(worker, lease, Answer("ok", rows_of(lease)))
        return [(w, x) for w, x in out if (w, x) != (worker, lease)]

    def _charge(self, held: list[Lease]) -> None:
        for lease in held:
            self.deaths[lease.unit.id] += lease.probe is None


SIZES = st.tuples(st.integers(1, 60), st.integers(1, 16))


@given(st.data(), SIZES, st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_every_unit_comes_back_once_with_all_rows_but_the_poison(
    data: st.DataObject, sizes: tuple[int, int], n_slots: int, leases: int, attempts: int
) -> None:
    n, rows = sizes
    units = plan_units(n, rows)
    poison = data.draw(st.sets(st.integers(0, n - 1), max_size=6))
    transient = data.draw(
        st.dictionaries(st.integers(0, len(units) - 1), st.integers(0, attempts - 1), max_size=4)
    )
    limits = Limits(leases, attempts, max_deaths_per_worker=100, max_failed_in_a_row=100)
    world = World(units, poison, limits, n_slots, data, dict(transient), n_preemptions=3)
    world.run()
    assert sorted(o.unit.id for o in world.outcomes) == [unit.id for unit in units]
    for outcome in world.outcomes:
        unit = outcome.unit
        mine = {row for row in poison if unit.start <= row < unit.stop}
        assert outcome.error is None
        assert outcome.result == set(range(unit.start, unit.stop)) - mine
        others = world.deaths[unit.id] - world.own_deaths[unit.id]
        assert others <= 1, "charged more than once for what another unit did"
        assert world.own_deaths[unit.id] <= max(attempts, 2)
        depth = math.ceil(math.log2(max(unit.n_rows, 2)))
        give_backs = 3 + transient.get(unit.id, 0)
        assert world.probes[unit.id] <= (2 * depth + 2) * len(mine) + give_backs


@given(st.data(), SIZES, st.integers(1, 3), st.integers(1, 4), st.integers(0, 6))
def test_deaths_out_of_the_blue_lose_no_unit_and_poison_no_row(
    data: st.DataObject, sizes: tuple[int, int], n_slots: int, leases: int, n_crashes: int
) -> None:
    n, rows = sizes
    units = plan_units(n, rows)
    poison = data.draw(st.sets(st.integers(0, n - 1), max_size=2))
    limits = Limits(leases, 3, max_deaths_per_worker=100, max_failed_in_a_row=100)
    world = World(units, poison, limits, n_slots, data, n_crashes=n_crashes)
    world.run()
    assert sorted(o.unit.id for o in world.outcomes) == [unit.id for unit in units]
    for outcome in world.outcomes:
        unit = outcome.unit
        mine = {row for row in poison if unit.start <= row < unit.stop}
        if outcome.error is not None:  # the sky fell on it again and again
            assert n_crashes >= 2
            continue
        lost = set(range(unit.start, unit.stop)) - (outcome.result or set())
        # A row is called poison when it killed twice alone: two crashes may look the same.
        assert mine <= lost
        assert len(lost - mine) <= n_crashes // 2


@given(st.data(), st.integers(1, 300))
def test_a_search_finds_exactly_the_rows_that_kill(data: st.DataObject, n: int) -> None:
    poison = data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=MAX_POISON_ROWS))
    search = Search((0, n), "SIGSEGV")
    out: list[tuple[int, int]] = []
    while not search.done:
        if search.has_probe and (not out or data.draw(st.booleans())):
            out.append(search.take())
            continue
        rows = out.pop(data.draw(st.integers(0, len(out) - 1)))
        if poison & set(range(*rows)):
            search.died(rows, "SIGSEGV")
        else:
            search.survived(rows)
    assert search.failure is None
    assert search.poison == dict.fromkeys(poison, "killed its worker: SIGSEGV (2 of 2 times)")
    assert search.n_probes <= (2 * math.ceil(math.log2(max(n, 2))) + 2) * len(poison)


def drain(search: Search, kills: object) -> None:
    while not search.done:
        rows = search.take()
        if kills(set(range(*rows))):  # type: ignore[operator]
            search.died(rows, "SIGKILL")
        else:
            search.survived(rows)


def test_rows_that_kill_only_together_are_said_to() -> None:
    search = Search((0, 32), "SIGKILL")
    drain(search, lambda rows: len(rows) >= 8)
    assert search.poison == {}
    assert "together kill their worker: SIGKILL" in (search.failure or "")
    assert "either half of them alone does not" in (search.failure or "")


def test_a_unit_of_which_every_row_kills_is_given_up_soon() -> None:
    search = Search((0, 4096), "SIGSEGV")
    drain(search, lambda rows: True)
    assert "more than 8 of its rows kill" in (search.failure or "")
    assert search.n_probes <= 40


def test_a_row_that_killed_once_and_not_again_is_cleared() -> None:
    died = []

    def kills(rows: set[int]) -> bool:
        if 5 in rows and len(rows) < 3 and not died:
            died.append(rows)
            return True
        return False

    search = Search((0, 8), "SIGKILL")
    drain(search, kills)
    assert (search.poison, search.failure) == ({}, None)


def two_workers(n_units: int = 3, **limits: int) -> tuple[LeaseBook[int], int]:
    book: LeaseBook[int] = LeaseBook(plan_units(n_units * 4, 4), Limits(**limits), 1)
    worker = book.hire(0)
    book.ready(worker)
    return book, worker


def test_unusable_storage_ends_the_run() -> None:
    book, worker = two_workers()
    lease = book.take(worker)
    assert lease is not None
    with pytest.raises(StorageUnusableError, match="access denied"):
        book.answered(worker, lease, Answer("unusable", None, "access denied"))


def test_too_many_failures_in_a_row_end_the_run_with_what_they_share() -> None:
    book, worker = two_workers(9, leases=1, max_failed_in_a_row=4)
    for i in range(3):
        lease = book.take(worker)
        assert lease is not None
        book.answered(worker, lease, Answer("failed", None, f"unit {i}: no such array"))
    lease = book.take(worker)
    assert lease is not None
    with pytest.raises(ExecutionError, match=r"4 units failed .* 3 of them: unit 0: no such array"):
        book.answered(worker, lease, Answer("failed", None, "something else"))


def test_a_success_between_failures_lets_the_run_go_on() -> None:
    book, worker = two_workers(9, leases=1, max_failed_in_a_row=2)
    for kind in ("failed", "ok", "failed", "ok", "failed"):
        lease = book.take(worker)
        assert lease is not None
        book.answered(worker, lease, Answer(kind, 1))
    assert len(book.outcomes()) == 5


def test_a_slot_whose_workers_die_at_once_is_given_up_and_the_cause_is_said() -> None:
    book: LeaseBook[int] = LeaseBook(plan_units(40, 1), Limits(), 2)
    good = book.hire(0)
    book.ready(good)
    for _ in range(4):
        assert book.vacant() == [1]
        book.died(book.hire(1), "it could not start: no memory for the model")
    assert book.vacant() == []
    for _ in range(3):
        book.died(good, "SIGSEGV")
        good = book.hire(book.vacant()[0])
    book.died(good, "SIGSEGV")
    with pytest.raises(ExecutionError, match="the last death: SIGSEGV"):
        book.vacant()


def test_after_a_death_its_units_wait_until_fresh_ones_are_done_and_are_alone() -> None:
    book, worker = two_workers(4, leases=2)
    first = [book.take(worker), book.take(worker)]
    assert [lease.unit.id for lease in first if lease] == [0, 1]
    assert book.take(worker) is None
    book.died(worker, "SIGSEGV")
    worker = book.hire(book.vacant()[0])
    book.ready(worker)
    fresh = [book.take(worker), book.take(worker)]
    assert [lease.unit.id for lease in fresh if lease] == [2, 3]
    for lease in fresh:
        assert lease is not None
        book.answered(worker, lease, Answer("ok", 1))
    alone = book.take(worker)
    assert alone is not None
    assert (alone.unit.id, alone.attempt) == (0, 2)
    assert book.take(worker) is None


def test_a_stop_gives_back_and_charges_nobody() -> None:
    book, worker = two_workers(3, leases=2)
    leases = [book.take(worker), book.take(worker)]
    book.close()
    for lease in leases:
        assert lease is not None
        book.answered(worker, lease, Answer("returned"))
    assert book.is_idle
    assert book.take(worker) is None
    assert book.outcomes() == []
    assert book.vacant() == []


def test_a_worker_that_leaves_gets_no_lease_and_its_slot_is_vacant() -> None:
    book, worker = two_workers(4, leases=1)
    lease = book.take(worker)
    assert lease is not None
    book.leave(worker)
    assert not book.may_leave(worker)
    assert book.vacant() == [0]
    book.answered(worker, lease, Answer("returned"))
    assert book.may_leave(worker)
    other = book.hire(0)
    book.ready(other)
    again = book.take(other)
    assert again == lease  # the same attempt: nobody is charged


def test_a_unit_that_kills_but_whose_rows_do_not_is_given_up() -> None:
    """As one that dies when it writes: probes write nothing."""
    book: LeaseBook[int] = LeaseBook(plan_units(8, 8), Limits(1, 2, 100), 1)
    n_whole = 0
    while not book.done:
        worker = book.hire(book.vacant()[0])
        book.ready(worker)
        while (lease := book.take(worker)) is not None and lease.probe is not None:
            book.answered(worker, lease, Answer("ok"))
        if lease is not None:
            n_whole += 1
            assert n_whole < 20
            book.died(worker, "SIGKILL")
    (outcome,) = book.outcomes()
    assert outcome.error == (
        "it kills its worker (SIGKILL), but no rows of it do so when they are computed alone"
    )
    assert (outcome.attempts, n_whole) == (4, 4)


def test_a_row_of_a_unit_that_died_beside_another_is_not_searched() -> None:
    """With one attempt allowed too, a unit is computed alone before its rows are suspected."""
    book, worker = two_workers(2, leases=2, max_attempts=1)
    assert book.take(worker) is not None
    assert book.take(worker) is not None
    book.died(worker, "SIGSEGV")
    worker = book.hire(0)
    book.ready(worker)
    alone = book.take(worker)
    assert alone is not None
    assert alone.probe is None


def test_an_unannounced_death_of_a_node_does_not_count_against_the_slot() -> None:
    book: LeaseBook[int] = LeaseBook(plan_units(40, 1), Limits(), 1)
    for _ in range(10):
        book.died(book.hire(book.vacant()[0]), "its node died", counts=False)
    assert book.vacant() == [0]


def test_the_search_for_rows_that_kill_costs_no_slot() -> None:
    """One slot, one unit with three such rows, which die far more often than a slot may."""
    unit = Unit(0, 0, 64)
    book: LeaseBook[set[int]] = LeaseBook([unit], Limits(1, 3, 4), 1)
    poison, n_deaths = {5, 6, 40}, 0
    while not book.done:
        worker = book.hire(book.vacant()[0])
        book.ready(worker)
        while (lease := book.take(worker)) is not None and not rows_of(lease) & poison:
            book.answered(worker, lease, Answer("ok", rows_of(lease)))
        if lease is not None:
            book.died(worker, "SIGSEGV")
            n_deaths += 1
    (outcome,) = book.outcomes()
    assert outcome.result == set(range(64)) - poison
    assert n_deaths > 12
