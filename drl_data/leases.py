"""The queue of units and the leases on it: who computes what, and what follows from what happens.

A pure value: no process, no thread, no clock. A driver tells it what happens to workers and leases,
and asks it what a worker should do next. The rules:

- an error that may be gone the next time (storage) is tried again, up to `max_attempts` times; any
  other error fails the unit at once;
- when a worker dies, each unit that it held is charged one death, and from then on is computed
  alone on its worker: so a unit is charged at most once for what another one did;
- a unit that was charged `max_attempts` deaths, one of them alone, is searched for the rows that
  kill (bisection.py), and then computed without them;
- a stop and a preempted node charge nobody;
- a worker slot whose workers die `max_deaths_per_worker` times in a row is given up. Only the first
  death of a unit counts: later ones are the unit's, not the slot's;
- storage that no retry can help, and too many failed units in a row, end the run.
"""

from __future__ import annotations

import logging
import re
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from drl_data.answers import Answer
from drl_data.bisection import Search
from drl_data.errors import ExecutionError, StorageUnusableError
from drl_data.plan import Lease, Unit

log = logging.getLogger(__name__)

R = TypeVar("R")

MAX_SEARCHES = 2
"""Searches of one unit for rows that kill; after them it is failed."""


@dataclass(frozen=True)
class Outcome(Generic[R]):
    """What became of a unit: a result, or the error that is left after the last attempt."""

    unit: Unit
    result: R | None
    error: str | None
    attempts: int


@dataclass(frozen=True)
class Limits:
    """How often things may go wrong; see `RunSpec`."""

    leases: int = 3
    max_attempts: int = 3
    max_deaths_per_worker: int = 4
    max_failed_in_a_row: int = 20


DEFAULTS = Limits()


@dataclass
class _Unit:
    """A unit that has no outcome yet, and its history."""

    unit: Unit
    failures: int = 0
    deaths: int = 0
    died_alone: bool = False
    n_searches: int = 0
    search: Search | None = None
    poison: tuple[tuple[int, str], ...] = ()

    @property
    def attempt(self) -> int:
        """Of the next lease, from 1."""
        return self.failures + self.deaths + 1


@dataclass
class _Worker:
    """A worker that lives, and what it holds."""

    slot: int
    ready: bool = False
    leaving: bool = False
    held: list[Lease] = field(default_factory=list)
    alone: bool = False
    """Whether what it holds must be computed with nothing beside it."""


class LeaseBook(Generic[R]):
    """Units that wait, leases that are out, workers and their slots, outcomes that came."""

    def __init__(self, units: Sequence[Unit], limits: Limits, n_slots: int) -> None:
        self._limits = limits
        self._units = {unit.id: _Unit(unit) for unit in units}
        self._fresh = deque(unit.id for unit in units)
        self._alone: deque[int] = deque()
        self._workers: dict[int, _Worker] = {}
        self._deaths = dict.fromkeys(range(n_slots), 0)
        self._n_hired = 0
        self._last_death = ""
        self._outcomes: deque[Outcome[R]] = deque()
        self._closed = False
        self._failed_in_a_row: list[str] = []

    # -- what a driver asks

    @property
    def done(self) -> bool:
        """Whether every unit has its outcome."""
        return not self._units

    @property
    def is_idle(self) -> bool:
        """Whether no lease is out."""
        return not any(worker.held for worker in self._workers.values())

    @property
    def n_ready(self) -> int:
        """Workers that take leases."""
        return sum(w.ready and not w.leaving for w in self._workers.values())

    def workers(self) -> list[int]:
        """Every worker that was hired and neither died nor left."""
        return list(self._workers)

    def vacant(self) -> list[int]:
        """Slots that want a worker: not given up, none there but one that leaves, units waiting.

        Raises:
            ExecutionError: if every slot was given up and units are left.
        """
        if not self._deaths and self._units:
            raise ExecutionError(
                f"{len(self._units)} units left and no worker: each died "
                f"{self._limits.max_deaths_per_worker} times in a row; the last death: "
                f"{self._last_death}"
            )
        if self._closed or not (self._fresh or self._alone):
            return []
        taken = {worker.slot for worker in self._workers.values() if not worker.leaving}
        return [slot for slot in self._deaths if slot not in taken]

    def outcomes(self) -> list[Outcome[R]]:
        """Outcomes that came since the last call."""
        found = list(self._outcomes)
        self._outcomes.clear()
        return found

    def take(self, worker: int) -> Lease | None:
        """The next lease for a worker, or None if it should hold no more now."""
        me = self._workers[worker]
        if self._closed or not me.ready or me.leaving or me.alone:
            return None
        if self._fresh:
            if len(me.held) >= self._limits.leases:
                return None
            state = self._units[self._fresh.popleft()]
            lease = Lease(state.unit, state.attempt, state.poison)
        elif self._alone and not me.held:
            lease = self._take_alone()
            me.alone = True
        else:
            return None
        me.held.append(lease)
        return lease

    def may_leave(self, worker: int) -> bool:
        """Whether a worker that was told to go holds nothing any more."""
        return self._workers[worker].leaving and not self._workers[worker].held

    # -- what a driver tells

    def close(self) -> None:
        """The run ends: no lease is given any more."""
        self._closed = True

    def hire(self, slot: int) -> int:
        """A worker was started for a slot; its number."""
        self._n_hired += 1
        self._workers[self._n_hired] = _Worker(slot)
        return self._n_hired

    def ready(self, worker: int) -> None:
        """It has made its task."""
        self._workers[worker].ready = True

    def leave(self, worker: int) -> None:
        """Its node goes away: no more leases for it, and its slot is vacant."""
        self._workers[worker].leaving = True

    def gone(self, worker: int) -> None:
        """A worker that may leave was ended."""
        del self._workers[worker]

    def answered(self, worker: int, lease: Lease, answer: Answer[R]) -> None:
        """A lease came back.

        Raises:
            StorageUnusableError: if storage is; the run is over.
            ExecutionError: if too many units failed one after the other.
        """
        me = self._workers[worker]
        me.held.remove(lease)
        me.alone = me.alone and bool(me.held)
        state = self._units[lease.unit.id]
        if answer.kind == "unusable":
            raise StorageUnusableError(answer.message)
        if answer.kind == "returned":
            self._give_back(state, lease)
        elif answer.kind == "transient":
            self._try_again(state, lease, answer.message)
        else:  # it ran to an end, good or bad, and its worker lives
            self._forgive(me.slot)
            if lease.probe is not None:
                self._searched(state).survived(lease.probe)
                self._go_on(state)
            elif answer.kind == "ok":
                self._settle(state, Outcome(state.unit, answer.result, None, lease.attempt))
            else:
                self._fail(state, answer.message)

    def died(self, worker: int, cause: str, *, charged: bool = True, counts: bool = True) -> None:
        """A worker is gone, with what it held. Not `charged`: its node was taken away, as was
        announced. Not `counts`: it is not its slot's fault either, its node has died.

        Raises:
            ExecutionError: if too many units failed one after the other.
        """
        me = self._workers.pop(worker)
        states = [self._units[lease.unit.id] for lease in me.held]
        first = not states or any(state.deaths == 0 for state in states)
        alone = len(me.held) == 1
        log.warning("a worker died (%s); it held %d leases", cause, len(states))
        for state, lease in zip(states, me.held, strict=True):
            if not charged:
                self._give_back(state, lease)
            elif lease.probe is not None:
                self._searched(state).died(lease.probe, cause)
                self._go_on(state)
            else:
                self._charge(state, cause, alone=alone)
        if charged and counts and first:
            self._last_death = cause
            self._deaths_of(me.slot)

    # -- what follows

    def _take_alone(self) -> Lease:
        unit_id = min(self._alone, key=lambda i: self._units[i].deaths)
        state = self._units[unit_id]
        probe = None if state.search is None else state.search.take()
        if state.search is None or not state.search.has_probe:
            self._alone.remove(unit_id)
        return Lease(state.unit, state.attempt, state.poison, probe)

    def _wait_alone(self, state: _Unit) -> None:
        if state.unit.id not in self._alone:
            self._alone.append(state.unit.id)

    def _give_back(self, state: _Unit, lease: Lease) -> None:
        if lease.probe is not None:
            self._searched(state).give_back(lease.probe)
            self._go_on(state)
        elif state.deaths:
            self._wait_alone(state)
        else:
            self._fresh.appendleft(state.unit.id)

    def _try_again(self, state: _Unit, lease: Lease, message: str) -> None:
        log.warning("unit %d, attempt %d: %s", state.unit.id, lease.attempt, message)
        state.failures += 1
        if lease.probe is not None:
            self._searched(state).give_back(lease.probe)
        if state.failures >= self._limits.max_attempts:
            self._fail(state, message, attempts=state.failures + state.deaths)
        elif lease.probe is not None:
            self._go_on(state)
        elif state.deaths:
            self._wait_alone(state)
        else:
            self._fresh.append(state.unit.id)

    def _charge(self, state: _Unit, cause: str, *, alone: bool) -> None:
        state.deaths += 1
        state.died_alone = state.died_alone or alone
        if state.deaths < self._limits.max_attempts or not state.died_alone:
            self._wait_alone(state)
        elif state.n_searches == MAX_SEARCHES:
            self._fail(
                state,
                f"it kills its worker ({cause}), but no rows of it do so when they are computed "
                "alone",
                attempts=state.deaths + state.failures,
            )
        else:
            log.warning("unit %d killed its worker: looking for the rows that do", state.unit.id)
            state.n_searches += 1
            state.search = Search((state.unit.start, state.unit.stop), cause)
            self._go_on(state)

    def _searched(self, state: _Unit) -> Search:
        assert state.search is not None
        return state.search

    def _go_on(self, state: _Unit) -> None:
        """A search has more to ask, or is at its end."""
        search = self._searched(state)
        if search.has_probe:
            self._wait_alone(state)
            return
        if state.unit.id in self._alone:
            self._alone.remove(state.unit.id)
        if not search.done:
            return
        if search.failure is not None:
            self._fail(state, search.failure, attempts=state.failures + state.deaths)
            return
        for row, reason in sorted(search.poison.items()):
            log.warning("unit %d: row %d %s", state.unit.id, row, reason)
        state.poison = tuple(sorted({**dict(state.poison), **search.poison}.items()))
        state.search = None
        self._wait_alone(state)

    def _fail(self, state: _Unit, message: str, *, attempts: int | None = None) -> None:
        if state.search is not None and not state.search.done:
            state.search.abandon(message)
            self._go_on(state)  # its other probes are still out; the last one settles it
            return
        made = state.attempt if attempts is None else attempts
        self._settle(state, Outcome(state.unit, None, message, made))

    def _settle(self, state: _Unit, outcome: Outcome[R]) -> None:
        del self._units[state.unit.id]
        if state.unit.id in self._alone:
            self._alone.remove(state.unit.id)
        self._outcomes.append(outcome)
        if outcome.error is None:
            self._failed_in_a_row.clear()
            return
        self._failed_in_a_row.append(outcome.error)
        n = len(self._failed_in_a_row)
        if n >= self._limits.max_failed_in_a_row:
            raise ExecutionError(
                f"{n} units failed one after the other, so it is not the units' fault; "
                f"{_most_common(self._failed_in_a_row)}"
            )

    def _forgive(self, slot: int) -> None:
        if slot in self._deaths:
            self._deaths[slot] = 0

    def _deaths_of(self, slot: int) -> None:
        if slot not in self._deaths:
            return
        self._deaths[slot] += 1
        if self._deaths[slot] >= self._limits.max_deaths_per_worker:
            del self._deaths[slot]
            log.warning(
                "worker slot %d is given up: its workers died %d times in a row, the last time: %s",
                slot,
                self._limits.max_deaths_per_worker,
                self._last_death,
            )


def _most_common(errors: Sequence[str]) -> str:
    """One of the messages that differ in nothing but numbers, of the largest such group."""
    shape = Counter(re.sub(r"\d+", "0", error) for error in errors).most_common(1)[0]
    example = next(error for error in errors if re.sub(r"\d+", "0", error) == shape[0])
    return f"{shape[1]} of them: {example}"
