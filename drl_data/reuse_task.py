"""Units of a store that is partly there already, in older stores: copy that, compute the rest.

A `ReuseTask` is what an executor runs in place of an `ExtractTask`. It makes one, and so loads
weights, only when a unit has something to compute.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from drl_data.copying import DamagedError, How, check_size, copy_object
from drl_data.errors import (
    ConflictError,
    ObjectNotFoundError,
    StoreError,
    StoreMismatchError,
    UserError,
    redacted,
)
from drl_data.extract import ExtractTask, UnitResult, as_numpy, run_record
from drl_data.metering import ByteBudget, Clock
from drl_data.plan import InvalidRow, Lease, Unit
from drl_data.quantise import storage_buffer
from drl_data.receipts import NonFinite, ObjectRecord, Reused, UnitCounts, fit_path
from drl_data.reuse import Matches, match, unlike
from drl_data.reuse_plan import Mask, Piece, Place, Source, UnitPlan, cells_of, label, plan_unit
from drl_data.shard_reader import in_threads
from drl_data.shards import crc32c
from drl_data.stopping import Stop
from drl_data.store import FeatureStore
from drl_data.tap_reducer import TapTimes
from drl_data.unit_features import Selection, UnitFeatures

log = logging.getLogger(__name__)



def open_reusable(store: FeatureStore, url: str) -> FeatureStore:
    """The old store at a URL, if it can have anything of the new one.

    Raises:
        InputError: there is no store.
        StoreMismatchError: a store whose features all differ from those of the new one.
        UserError: the new store itself.
    """
    old = FeatureStore.open(url)
    if old.url == store.url:
        raise UserError(f"{store.url}: a store cannot reuse itself; leave it out of --reuse")
    differences = unlike(store.spec, old.spec)
    if differences:
        lines = "".join(f"\n  {line}" for line in differences)
        raise StoreMismatchError(
            f"{url} has nothing that {store.url} could reuse, because all its features differ "
            f"(theirs != asked for):{lines}\n"
            "leave it out of --reuse, or change the pipeline back; only samples, taps, timesteps "
            "and rows_per_unit may differ"
        )
    return old


def open_sources(
    store: FeatureStore, urls: Sequence[str], input_shape: Sequence[int] | None = None
) -> list[Source]:
    """The old stores at `urls`, matched with a new one; their fits are copied into it.

    `input_shape` as `match` takes it.

    Raises:
        as `open_reusable`.
    """
    sources = []
    for url in urls:
        old = open_reusable(store, url)
        matches = match(store.described, store.index, old.described, old.index, input_shape)
        for reason in matches.reasons:
            log.warning("%s: not reused: %s", redacted(old.url), reason)
        sources.append(_with_fits(store, old, matches))
    return sources


def _with_fits(store: FeatureStore, old: FeatureStore, matches: Matches) -> Source:
    """The source, without the arrays whose fits the new store cannot have."""
    fits: dict[str, int] = {}
    lost: set[str] = set()
    for name, twin in matches.fits.items():
        try:
            data = old.folder.get(fit_path(twin))
        except ObjectNotFoundError:
            lost.add(name)
            continue
        fits[twin] = crc32c([data])
        is_first = store.folder.put_if_absent(fit_path(name), [data])
        if not is_first and crc32c([store.folder.get(fit_path(name))]) != fits[twin]:
            log.warning("%s: not reused: %s is fitted by other numbers", redacted(old.url), twin)
            lost.add(name)
    gone = lost | {part for name in lost for part in store.parts(name)}
    cells = {mine: theirs for mine, theirs in matches.cells.items() if mine[0] not in gone}
    return Source(old, replace(matches, cells=cells), fits)


class ReuseTask:
    """Copies what older stores have of a unit and computes the rest; called from several threads.

    `make` loads the weights; it is called when the first unit has something to compute, and never
    if there is none. Without it every unit must be there (a merge), and rows without features in
    one store have none in the new one.
    """

    def __init__(
        self,
        store: FeatureStore,
        sources: Sequence[Source],
        make: Callable[[], ExtractTask] | None,
        memory_bytes: int,
    ) -> None:
        self._store, self._sources, self._make = store, tuple(sources), make
        self._made: ExtractTask | None = None
        self._making = threading.Lock()
        self._budget = ByteBudget(memory_bytes)
        self._occupied: set[str] = set()

    def __call__(self, lease: Lease, stop: Stop | None = None) -> UnitResult | None:
        """Copy, compute and write one unit; None if the lease only probes some rows.

        Raises:
            as `ExtractTask`, and without `make`:
            StoreError: something that is in no source, or damaged there.
        """
        unit, stop = lease.unit, stop or Stop()
        stop.check_begin()
        if lease.probe is None:
            signed = self._store.receipt(unit)
            if signed is not None:
                return UnitResult(signed, computed=False)
        while True:
            try:
                return self._attempt(lease, stop)
            except DamagedError as error:
                if self._make is None:
                    raise
                log.warning("%s; computed again", error)
                for source in self._sources:
                    if source.store.url == error.url:
                        source.damaged.add(error.path)

    def _attempt(self, lease: Lease, stop: Stop) -> UnitResult | None:
        unit, make = lease.unit, self._make
        plan = plan_unit(self._store, self._sources, unit, keep_invalid=make is None)
        if plan.missing and make is None:
            raise StoreError(_missing(self._store, self._sources, plan))
        with ExitStack() as stack:
            extractor = self._extractor() if plan.missing else None
            if extractor is not None:
                stack.enter_context(extractor.room(unit, stop))
            work = _UnitWork(self._store, plan, extractor, self._occupied)
            if extractor is None:
                stack.enter_context(self._budget.reserve(work.n_bytes, stop.check_begin))
            if lease.probe is not None:
                work.compute(lease, stop)
                return None
            return work.run(lease, stop)

    def _extractor(self) -> ExtractTask:
        with self._making:
            if self._made is None:
                assert self._make is not None
                self._made = self._make()
            return self._made
