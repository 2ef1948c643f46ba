"""Units of a store that is partly there already, in older stores: copy that, compute the rest.

A `ReuseTask` is what an executor runs in place of an `ExtractTask`. It makes one, and so loads
weights, only when a unit has something to compute.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch

from drl_data.backbones import find_model, load_backbone
from drl_data.copying import DamagedError
from drl_data.errors import (
    ConflictError,
    ObjectNotFoundError,
    StoreError,
    StoreMismatchError,
    UserError,
    redacted,
)
from drl_data.extract import ExtractTask, UnitResult, run_identity
from drl_data.metering import ByteBudget
from drl_data.objects import open_folder
from drl_data.pipeline import StoreSpec
from drl_data.plan import Lease
from drl_data.receipts import fit_path
from drl_data.reuse import Matches, match, unlike
from drl_data.reuse_plan import Source, UnitPlan, plan_unit
from drl_data.reuse_unit import UnitWork
from drl_data.shards import crc32c
from drl_data.spec import BackboneSpec, FeatureSpec
from drl_data.stopping import Stop
from drl_data.store import FeatureStore

log = logging.getLogger(__name__)


def make_reuse_task(
    extracting: Callable[[], ExtractTask],
    store_spec: StoreSpec,
    backbone: BackboneSpec,
    memory_bytes: int,
) -> ReuseTask:
    """What an executor runs once in each worker: opens the stores, and loads no weights.

    `extracting` makes the task that computes (`make_task` with its arguments).

    Raises:
        as `open_reusable`.
    """
    store = FeatureStore.open(store_spec.url)
    noise = store.computed_spec.noise
    input_shape = None
    if noise.is_table and not noise.moves:
        meta = load_backbone(find_model(backbone), "meta")
        input_shape = meta.input_shape(store.image_spec)
    sources = open_sources(store, store_spec.reuse, input_shape)
    return ReuseTask(store, sources, extracting, memory_bytes)


def open_reusable(url: str, new_url: str, spec: FeatureSpec) -> FeatureStore:
    """The old store at `url`, if it can have anything of a new one of a spec.

    Raises:
        InputError: there is no store.
        StoreMismatchError: a store whose features all differ from those of the new one.
        UserError: the new store itself.
    """
    old = FeatureStore.open(url)
    if old.url == open_folder(new_url).url:
        raise UserError(f"{new_url}: a store cannot reuse itself; leave it out of --reuse")
    differences = unlike(spec, old.computed_spec)
    if differences:
        lines = "".join(f"\n  {line}" for line in differences)
        raise StoreMismatchError(
            f"{url} has nothing that {new_url} could reuse, because all its features differ "
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
        old = open_reusable(url, store.url, store.computed_spec)
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
        self._identity = run_identity(torch.device("cpu"))

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
            before = len(self._occupied)
            try:
                return self._attempt(lease, stop)
            except ConflictError as error:
                if len(self._occupied) == before:
                    raise
                log.warning("%s; rewriting it", error)
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
            work = UnitWork(self._store, plan, extractor, self._identity, self._occupied)
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


def _missing(store: FeatureStore, sources: Sequence[Source], plan: UnitPlan) -> str:
    """What no source has of a unit, for people."""
    lines = []
    for (name, entry), mask in plan.missing.items():
        rows = np.flatnonzero(mask) + plan.unit.start
        array = store.array(name)
        at = f" at timestep {store.times[entry].requested:g}" if array.timesteps == "each" else ""
        lines.append(f"  {name}{at}: {len(rows)} rows, the first is row {rows[0]}")
    shown = "\n".join(lines[:10]) + ("\n  ..." if len(lines) > 10 else "")
    names = ", ".join(redacted(source.store.url) for source in sources)
    return (
        f"{store.url}, unit {plan.unit.id}: not in {names}:\n{shown}\n"
        "finish those stores with `drl extract`, or compute the rest with `drl extract --reuse`"
    )
