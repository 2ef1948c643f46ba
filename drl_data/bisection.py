"""The rows of a unit that kill their worker, found by halves. A pure value: no process, no clock.

The whole unit is known to kill. Each half is computed alone; a half that survives is cleared, a
half that kills is halved again, and a single row that kills is computed once more to be sure. For
k such rows among n that is about 2 k log2(n) probes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

MAX_POISON_ROWS = 8
"""Rows of one unit that may be found to kill; with more it is no longer the rows' fault."""

CONFIRMATIONS = 2
"""Times that a single row must kill its worker, alone, before it is called poison."""

Range = tuple[int, int]


@dataclass
class _Node:
    """A run of rows that killed: what became of its halves."""

    rows: Range
    causes: list[str]
    again: bool = False
    """Its halves survived, each alone, and it is computed once more as a whole."""
    survivors: int = 0


@dataclass
class Search:
    """The search through one unit's rows `rows`, which killed their worker for `cause`.

    Take probes with `take` (several may be out at a time), and tell what became of each; `done`
    when no probe is left or out.
    """

    rows: Range
    cause: str
    max_poison: int = MAX_POISON_ROWS
    poison: dict[int, str] = field(default_factory=dict)
    """Row -> why, of rows that killed their worker alone, every time."""
    failure: str | None = None
    """Why the unit cannot be saved: too many such rows, or rows that kill only together."""
    n_probes: int = 0
    _ready: deque[Range] = field(default_factory=deque)
    _out: set[Range] = field(default_factory=set)
    _killers: dict[Range, _Node] = field(default_factory=dict)
    _parents: dict[Range, _Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rows[1] - self.rows[0] == 1:
            self._ready.append(self.rows)
        else:
            self._split(_Node(self.rows, [self.cause]))

    @property
    def has_probe(self) -> bool:
        """Whether `take` has rows to give."""
        return bool(self._ready)

    @property
    def done(self) -> bool:
        """Whether no rows are left to compute, and none are being computed."""
        return not self._ready and not self._out

    def take(self) -> Range:
        """Rows `start` to `stop` to compute next, alone on their worker."""
        rows = self._ready.popleft()
        self._out.add(rows)
        self.n_probes += 1
        return rows

    def give_back(self, rows: Range) -> None:
        """These were not computed, through no fault of theirs."""
        self._out.remove(rows)
        self.n_probes -= 1
        if self.failure is None:
            self._ready.appendleft(rows)

    def survived(self, rows: Range) -> None:
        """Their worker lives: cleared, whatever they did before."""
        self._out.remove(rows)
        self._killers.pop(rows, None)
        parent = self._parents.pop(rows, None)
        if parent is None:
            return
        parent.survivors += 1
        if parent.survivors == 2 and self.failure is None:
            parent.again = True
            self._ready.appendleft(parent.rows)

    def died(self, rows: Range, cause: str) -> None:
        """Their worker died while it computed these rows and nothing else."""
        self._out.remove(rows)
        node = self._killers.setdefault(rows, _Node(rows, []))
        node.causes.append(cause)
        if node.again:
            self.abandon(
                f"rows {rows[0]} to {rows[1] - 1} together kill their worker: {_joined(node)}; "
                "either half of them alone does not. Give workers more memory, or make units or "
                "batches smaller"
            )
        elif rows[1] - rows[0] > 1:
            self._split(node)
        elif len(node.causes) < CONFIRMATIONS:
            self._ready.appendleft(rows)
        else:
            n = len(node.causes)
            self.poison[rows[0]] = f"killed its worker: {_joined(node)} ({n} of {n} times)"
            del self._killers[rows]
            self._parents.pop(rows, None)
        self._check_number()

    def abandon(self, why: str) -> None:
        """Look no further: the unit cannot be saved; the first reason counts."""
        if self.failure is None:
            self.failure = why
        self._ready.clear()

    def _split(self, node: _Node) -> None:
        start, stop = node.rows
        middle = (start + stop) // 2
        self._killers[node.rows] = node
        for half in ((start, middle), (middle, stop)):
            self._parents[half] = node
            self._ready.append(half)

    def _check_number(self) -> None:
        """Disjoint runs of rows that kill have at least one such row each."""
        found = [(row, row + 1) for row in self.poison]
        runs = sorted({*self._killers, *found}, key=lambda r: (r[1] - r[0], r))
        disjoint: list[Range] = []
        for run in runs:
            if all(run[1] <= other[0] or other[1] <= run[0] for other in disjoint):
                disjoint.append(run)
        if len(disjoint) > self.max_poison:
            self.abandon(
                f"more than {self.max_poison} of its rows kill their worker, one of them for: "
                f"{self.cause}"
            )


def _joined(node: _Node) -> str:
    """Different causes in order of their names, each once, so that the text is always the same."""
    return ", ".join(sorted(set(node.causes)))
