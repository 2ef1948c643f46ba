"""Stores joined to one: of the same samples other taps or timesteps, or of other samples the same.

The merged store is the one that `drl extract` makes of the joined pipeline, bit for bit: `--reuse`
with nothing to compute. It resumes like any extraction, and ends sealed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations

import numpy as np

from drl_data.compare import compare_rows, tolerance
from drl_data.diffusion_spec import ScheduleSpec
from drl_data.errors import ConflictError, InputError, SpecError, StoreMismatchError, redacted
from drl_data.executors import run_local
from drl_data.extract import UnitResult
from drl_data.index import SampleIndex, joined_index
from drl_data.leases import Limits
from drl_data.objects import open_folder
from drl_data.plan import Lease, Unit
from drl_data.progress import SILENT, Progress
from drl_data.receipts import Reused
from drl_data.reuse import match_rows, taps_of, unlike
from drl_data.reuse_plan import Place, Share, Source, cells_of, shares_of_unit
from drl_data.reuse_task import ReuseTask, open_sources
from drl_data.spec import ArraySpec, ResolvedTime, TapSpec
from drl_data.stopping import Stop
from drl_data.store import FeatureStore
from drl_data.store_metadata import Described

MEMORY_BYTES = 4 << 30
"""Budget for rows that are read and written anew."""

LEASES = 4
"""Units that are merged at a time."""

MAX_NAMED = 5
"""Samples that an error names."""


@dataclass
class MergeSummary:
    """What a merge did."""

    store: FeatureStore
    n_units: int
    n_pending: int
    n_left: int
    """Pending units without an outcome, because the merge was told to stop."""
    reused: dict[str, Reused] = field(default_factory=dict)
    """URL of a store -> what was copied from it."""
    failed: list[tuple[Unit, str]] = field(default_factory=list)


def merge(
    urls: Sequence[str], out: str, *, progress: Progress = SILENT, stop: Stop | None = None
) -> MergeSummary:
    """Join finished stores to a new one at `out`; the same call resumes, after a stop too.

    Units and splits are those of the first store. A row that is invalid in one store is invalid in
    the new one, with the first store's reason.

    Raises:
        UserError: stores that do not fit together, or are not finished: which, and why.
    """
    stores = _opened(urls, out)
    described, index = joined(stores)
    store = FeatureStore.create(out, described.spec, described.arrays, described.times, index)
    stop = stop or Stop()
    sources = open_sources(store, urls)
    _check_cells(store, sources)
    pending = store.pending()
    summary = MergeSummary(store, len(store.units), len(pending), len(pending))
    task = partial(_MergeTask, store, sources)
    outcomes = run_local(task, pending, limits=Limits(leases=LEASES), stop=stop)
    n_rows = sum(unit.n_rows for unit in pending)
    with stop.heeded(), progress.bar("merge", n_rows, "rows") as bar, closing(outcomes):
        for outcome in outcomes:
            summary.n_left -= 1
            if outcome.result is None:
                summary.failed.append((outcome.unit, outcome.error or "unknown"))
            else:
                for more in outcome.result.receipt.run.reused:
                    before = summary.reused.get(more.store)
                    summary.reused[more.store] = more.added_to(before)
            bar.advance(outcome.unit.n_rows, failed=len(summary.failed))
    if not store.sealed and not store.pending():
        store.seal()
    return summary


def _opened(urls: Sequence[str], out: str) -> list[FeatureStore]:
    """The stores, each once, all finished, none of them the new one."""
    if len(urls) < 2:
        raise InputError(f"merge: {len(urls)} store; want two or more")
    stores = [FeatureStore.open(url) for url in urls]
    names = [store.url for store in stores]
    if len(set(names)) < len(names) or open_folder(out).url in names:
        raise InputError(f"merge: {', '.join(names)} into {out}: a store is named twice")
    for store in stores:
        pending = [] if store.sealed else store.pending()
        if pending:
            raise InputError(
                f"{store.url}: {len(pending)} of {len(store.units)} units are pending, the first "
                f"is unit {pending[0].id}; finish it with `drl extract` before merging"
            )
    return stores


# --- what the merged store is -------------------------------------------------------------------


def joined(stores: Sequence[FeatureStore]) -> tuple[Described, SampleIndex]:
    """Spec, arrays, timesteps and samples of the stores together.

    Raises:
        StoreMismatchError: features that have nothing in common.
        UserError: stores that differ in both samples and taps, overlap in part, or whose union no
            pipeline could name.
    """
    first = stores[0]
    for other in stores[1:]:
        differences = unlike(first.computed_spec, other.computed_spec)
        if differences:
            lines = "".join(f"\n  {line}" for line in differences)
            raise StoreMismatchError(
                f"{other.url} cannot be merged with {first.url}, because all their features differ "
                f"({redacted(other.url)} != {redacted(first.url)}):{lines}"
            )
    same_rows = [_same_rows(first, other) for other in stores[1:]]
    if all(same_rows):
        return _with_taps(stores), first.index
    if any(same_rows):
        raise InputError(
            f"merge: some stores have the samples of {first.url}, some have not; merge the former "
            "first, then the results"
        )
    return _with_rows(stores)


def _same_rows(a: FeatureStore, b: FeatureStore) -> bool:
    """Whether two stores hold the same samples in the same order."""
    if a.spec.n_samples != b.spec.n_samples:
        return False
    rows = match_rows(a.computed_spec, a.index, b.index)
    return np.array_equal(rows, np.arange(len(rows)))


def _with_rows(stores: Sequence[FeatureStore]) -> tuple[Described, SampleIndex]:
    first = stores[0]
    for other in stores[1:]:
        if (other.arrays, other.times) != (first.arrays, first.times):
            raise StoreMismatchError(
                f"{other.url} has other samples than {first.url}, and other taps or timesteps; "
                "want one or the other: extract what is missing with `drl extract --reuse`"
            )
    for a, b in combinations(stores, 2):
        rows = match_rows(a.computed_spec, a.index, b.index)
        twice = np.flatnonzero(rows >= 0)
        if twice.size:
            names = [a.index.table["key"][row].as_py() for row in twice[:MAX_NAMED].tolist()]
            more = f" and {twice.size - len(names)} more" if twice.size > len(names) else ""
            raise InputError(
                f"{a.url} and {b.url} both have {', '.join(map(repr, names))}{more}: samples would "
                "count twice; extract one of them without these, or all with `drl extract --reuse`"
            )
    index = joined_index([store.index for store in stores])
    changes = {"dataset": index.digest(), "n_samples": index.n_samples}
    return Described(first.spec.model_copy(update=changes), first.arrays, first.times), index


def _with_taps(stores: Sequence[FeatureStore]) -> Described:
    first = stores[0]
    taps: dict[TapSpec, list[ArraySpec]] = {}
    for store in stores:
        for tap, arrays in _by_tap(store).items():
            if [a.name for a in taps.setdefault(tap, arrays)] != [a.name for a in arrays]:
                raise SpecError(
                    f"{store.url}: tap {tap.path!r} resolves to other arrays than in another store"
                )
    arrays = [array for group in taps.values() for array in group]
    names = [array.name for array in arrays]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SpecError(
            f"merge: arrays {twice} come from different taps of the stores; no pipeline can name "
            "both. Extract one of the stores with another `name:`, or the same reductions"
        )
    times, schedule = _joined_times(stores)
    spec = first.spec.model_copy(update={"taps": tuple(taps), "schedule": schedule})
    return Described(spec, tuple(arrays), times)


def _by_tap(store: FeatureStore) -> dict[TapSpec, list[ArraySpec]]:
    """The arrays of each tap, in order; scales and offsets with theirs."""
    found: dict[TapSpec, list[ArraySpec]] = {}
    for name, taps in taps_of(store.computed_spec, store.arrays).items():
        if len(taps) != 1:
            raise SpecError(
                f"{store.url}: array {name!r} may be of any of the taps "
                f"{', '.join(repr(tap.path) for tap in taps) or 'of its spec'}; give them names"
            )
        found.setdefault(taps[0], []).extend(store.array(part) for part in store.parts(name))
    return found


def _joined_times(
    stores: Sequence[FeatureStore],
) -> tuple[tuple[ResolvedTime, ...], ScheduleSpec]:
    """All timesteps in order of first appearance, and the schedule that asks for them."""
    times: dict[float, ResolvedTime] = {}
    told: dict[float, int | float] = {}
    """Only where it is not the timestep itself."""
    for store in stores:
        schedule = store.computed_spec.schedule
        at = schedule.condition_at
        for i, time in enumerate(store.times):
            if times.setdefault(time.requested, time) != time:
                raise StoreMismatchError(
                    f"{store.url}: timestep {time.requested:g} is {time}, in another store it is "
                    f"{times[time.requested]}"
                )
            if at != "same":
                told[time.requested] = at[min(i, len(at) - 1)]
    asked = {float(t): t for store in stores for t in store.computed_spec.schedule.timesteps}
    changes: dict[str, object] = {"timesteps": tuple(asked[t] for t in times)}
    is_one_for_all = len({store.computed_spec.schedule.condition_at for store in stores}) == 1
    is_one_for_all &= (
        len(set(told.values())) == 1 and len(stores[0].computed_spec.schedule.condition_at) == 1
    )
    if told and not is_one_for_all:
        changes["condition_at"] = tuple(told.get(t, asked[t]) for t in times)
    return tuple(times.values()), stores[0].computed_spec.schedule.model_copy(update=changes)


def _check_cells(store: FeatureStore, sources: Sequence[Source]) -> None:
    """Refuse, before anything is copied, what no store has for any sample."""
    missing: dict[str, list[str]] = {}
    for array in store.features:
        for entry in range(store.n_times(array.name)):
            cell = (array.name, entry)
            if not any(cell in source.matches.cells for source in sources):
                missing.setdefault(array.name, []).append(store.time_of(array.name, entry))
    if missing:
        lines = "".join(f"\n  {name} at {', '.join(at)}" for name, at in missing.items())
        reasons = "".join(
            f"\n  {redacted(source.store.url)}, {reason}"
            for source in sources
            for reason in source.matches.reasons
        )
        raise StoreMismatchError(
            f"merge: the stores together lack{lines}{reasons}\n"
            "compute it with `drl extract --reuse`, which copies the rest"
        )


# --- one unit -----------------------------------------------------------------------------------


class _MergeTask:
    """Compares what several stores have of a unit, then copies it."""

    def __init__(self, store: FeatureStore, sources: Sequence[Source]) -> None:
        self._store, self._sources = store, sources
        self._copy = ReuseTask(store, sources, None, MEMORY_BYTES)

    def __call__(self, lease: Lease, stop: Stop) -> UnitResult | None:
        conflicts = list(self._conflicts(lease.unit))
        if conflicts:
            raise ConflictError(
                f"{self._store.url}, unit {lease.unit.id}: the stores have different features of "
                f"the same samples: {'; '.join(conflicts[:MAX_NAMED])}; `drl diff` compares stores"
            )
        return self._copy(lease, stop)

    def _conflicts(self, unit: Unit) -> Iterator[str]:
        """What differs beyond rounding."""
        shares = [
            share
            for source in self._sources
            for share in shares_of_unit(self._store, source, unit, keep_invalid=True)[0]
        ]
        for array in self._store.features:
            for entry in range(self._store.n_times(array.name)):
                cell = (array.name, entry)
                having = [s for s in shares if cell in s.source.matches.cells]
                for a, b in combinations(having, 2):
                    found = self._conflict(cell, a, b)
                    if found:
                        yield found

    def _conflict(self, place: Place, a: Share, b: Share) -> str | None:
        store = self._store
        array, common = store.array(place[0]), a.mask & b.mask
        if a.source is b.source or not common.any():
            return None
        limit = tolerance(store.spec.backbone_dtype, array.dtype)
        for cell in cells_of(array, place[1], len(store.times)):
            if _equal_by_receipts(store, array, cell, a, b):
                continue
            x, y = (
                {
                    part: share.source.rows(
                        share.unit, *share.source.matches.cells[part, cell], share.old[common]
                    )
                    for part in store.parts(array.name)
                }
                for share in (a, b)
            )
            found = compare_rows(array, x, y, limit)
            if not found.within:
                row = a.receipt.start + int(a.old[common][found.first or 0])
                return (
                    f"{array.name} at timestep {store.time_of(*place)}: {found.n_beyond} rows of "
                    f"{redacted(a.source.store.url)} and {redacted(b.source.store.url)} differ by "
                    f"more than {limit:.2g}, the most by {found.largest:.3g}, the first is row "
                    f"{row} of the former"
                )
        return None


def _equal_by_receipts(
    store: FeatureStore, array: ArraySpec, cell: int, a: Share, b: Share
) -> bool:
    """Whether the checksums say already that two stores have the same bytes."""
    if not (a.aligned and b.aligned):
        return False
    x, y = (
        [
            (record.n_bytes, record.crc32c)
            for part in store.parts(array.name)
            for record in [share.source.record(share.unit, *share.source.matches.cells[part, cell])]
        ]
        for share in (a, b)
    )
    return x == y
