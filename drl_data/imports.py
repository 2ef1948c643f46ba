"""Features that somebody has already become a store: survey, match, resolve, read what is pending.

`drl import` is to a `source:` what `drl extract` is to a backbone: the same units, receipts,
executors, and the same command resumes.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from functools import partial
from typing import get_args

from drl_data.catalogue import Catalogue
from drl_data.errors import InputError, SpecError
from drl_data.import_spec import DIMS, IMPORTED, ImportSpec, SourceArray, SourceContent, SourceSpec
from drl_data.import_task import make_import_task, row_shape
from drl_data.index import SampleIndex, build_index
from drl_data.pipeline import Pipeline, StoreSpec
from drl_data.plan import asked_units, auto_rows_per_unit
from drl_data.progress import SILENT, Progress
from drl_data.quantise import COMPANIONS, companions
from drl_data.repair import Repair, remove_damaged, restore_root
from drl_data.retries import RetryCount
from drl_data.runs import RunSummary, compute_units, hand_out
from drl_data.source_files import survey
from drl_data.source_match import match, own_index
from drl_data.source_reader import SourceReader, Value
from drl_data.spec import ArraySpec, ResolvedTime
from drl_data.spec_base import StorageDType
from drl_data.stopping import Stop
from drl_data.store import FeatureStore
from drl_data.store_metadata import Described

TRIED = 64
"""Samples that are looked at until one has an array; its type and shape are the array's."""


@dataclass(frozen=True)
class PreparedImport:
    """A source resolved against its files: all that is known before features are read."""

    index: SampleIndex
    catalogue: Catalogue
    described: Described


def prepare_import(pipeline: Pipeline, *, progress: Progress = SILENT) -> PreparedImport:
    """Survey the files, match them with the rows of the dataset, resolve types and shapes.

    Raises:
        UserError: whatever is wrong with the section, the files, or the dataset.
    """
    given, _ = import_sections(pipeline)
    source = given
    found, files = survey(source, progress)
    if pipeline.dataset.tars:
        index = build_index(pipeline.dataset, progress=progress)
    else:
        if source.match != "key":
            raise SpecError("source.match position: there is no dataset whose rows to match")
        index = own_index(found, files, source)
        source = source.model_copy(update={"match": "position"})  # rows are the samples
    catalogue = match(found, files, index, source)
    content = given.content()
    arrays = _resolved(source, content, catalogue, index.n_samples)
    rows = source.rows_per_unit
    spec = ImportSpec(
        dataset=index.digest(),
        n_samples=index.n_samples,
        rows_per_unit=auto_rows_per_unit(arrays, index.n_samples, 1) if rows == "auto" else rows,
        overflow=source.overflow,
        non_finite=source.non_finite,
        source=content,
        files=catalogue.digest(),
        images=pipeline.images,
        dtype=source.dtype,
    )
    times = tuple(
        ResolvedTime(requested=t, convention=IMPORTED, model_time=t, alpha=1.0, sigma=0.0)
        for t in source.timesteps or (0,)
    )
    return PreparedImport(index, catalogue, Described(spec, arrays, times))


def import_sections(pipeline: Pipeline) -> tuple[SourceSpec, StoreSpec]:
    """The sections that an import cannot do without.

    Raises:
        SpecError: naming what the pipeline lacks, or has that an import cannot do.
    """
    source, store = pipeline.source, pipeline.store
    if source is None or store is None:
        lacks = "source" if source is None else "store"
        raise SpecError(f"pipeline {pipeline.name!r} lacks {lacks}; importing needs it")
    if store.reuse:
        raise SpecError("store.reuse: imported features are not copied from older stores")
    if pipeline.images is not None and pipeline.images.views:
        raise SpecError("images.views: views of imported features are `source.views`")
    return source, store


def _resolved(
    source: SourceSpec, content: SourceContent, catalogue: Catalogue, n_samples: int
) -> tuple[ArraySpec, ...]:
    """The arrays of the store, with the scales and offsets of quantised ones."""
    reader = SourceReader(catalogue, content)
    arrays: list[ArraySpec] = []
    number = 0
    for array in source.arrays:
        shape, found = _first(reader, array, number, n_samples, len(source.timesteps))
        dtype = source.dtype or _stored_type(found, array.name)
        number += len(array.where)
        dims = array.dims if array.dims is not None else DIMS.get(len(shape), ())
        place = f"source.arrays, {array.name!r}"
        if len(dims) != len(shape):
            raise SpecError(
                f"{place}: rows of shape {shape}, axes {list(dims)}; say `dims:` or `shape:`"
            )
        if dtype in COMPANIONS and "channel" not in dims:
            raise SpecError(f"{place}: {dtype} has a scale for each channel, and there is none")
        one = ArraySpec(
            name=array.name,
            tap=f"{source.format}:{','.join(array.where)}",
            dims=dims,
            shape=shape,
            dtype=dtype,
            timesteps="each" if content.has_time(array) else "none",
            views=len(source.views),
        )
        arrays += [one, *companions(one)]
    return tuple(arrays)


def _first(
    reader: SourceReader, array: SourceArray, number: int, n_samples: int, n_times: int
) -> tuple[tuple[int, ...], str]:
    """Shape of a row and type of an array: those of the first sample that has it."""
    reasons: list[str] = []
    for start in range(0, n_samples, TRIED):
        if len(reasons) >= TRIED:
            break
        places = dict(enumerate(reader.catalogue.places(number, start, start + TRIED), start))
        some = {row: place for row, place in places.items() if place.file is not None}
        for row in list(some)[: TRIED - len(reasons)]:
            value = reader.read(number, {row: some[row]}, RetryCount())[row]
            shape = row_shape(array, value, n_times) if isinstance(value, Value) else value
            if isinstance(value, Value) and not isinstance(shape, str):
                return shape, value.dtype
            reasons.append(str(shape))
    why = f"the first is: {reasons[0]}" if reasons else "no row has one"
    raise InputError(
        f"source.arrays, {array.name!r}: no readable values at {array.where[0]!r}; {why}"
    )


def _stored_type(found: str, name: str) -> StorageDType:
    """The type of the files as that of the store.

    Raises:
        SpecError: the store has none like it.
    """
    known: dict[str, StorageDType] = {
        kind: kind for kind in get_args(StorageDType) if kind not in COMPANIONS
    }
    if found not in known:
        raise SpecError(
            f"source.arrays, {name!r}: {found} in the files, and a store has {', '.join(known)}; "
            "say what to store them as: `source.dtype: float32`"
        )
    return known[found]


def _require_unchanged(store: FeatureStore, catalogue: Catalogue) -> None:
    """Refuse to go on with files that were written again where they lay; copies are welcome."""
    if not store.pending():
        return
    for before, now in zip(store.catalogue().files, catalogue.files, strict=True):
        same_place = before.public_url == now.public_url
        if same_place and (before.size, before.etag) != (now.size, now.etag):
            raise InputError(
                f"{now.url}: changed since the import into {store.url} began; its units would be "
                "of two files. Import into another store"
            )


def import_features(
    pipeline: Pipeline,
    *,
    limit: int | None = None,
    part: tuple[int, int] | None = None,
    shuffle_seed: int | None = None,
    repair: bool = False,
    progress: Progress = SILENT,
    stop: Stop | None = None,
) -> RunSummary:
    """Read every pending unit of a pipeline's source into its store, and seal the store when none
    is left. Arguments are those of `runs.extract`.

    Raises:
        UserError: whatever is wrong with the section, the files, the dataset, or the store.
        StorageUnusableError: if storage can be of no use, whatever is tried again.
        ExecutionError: if no worker is left, or too many units failed one after the other.
    """
    stop = stop or Stop()
    _, store_spec = import_sections(pipeline)
    prepared = prepare_import(pipeline, progress=progress)
    repaired = restore_root(store_spec.url, prepared.described) if repair else Repair()
    store = FeatureStore.create(
        store_spec.url, *prepared.described, prepared.index, prepared.catalogue
    )
    units = asked_units(store.units, limit, part)
    if repair:
        removed = remove_damaged(store, prepared.index, units, prepared.catalogue)
        repaired = repaired.merged(removed)
    _require_unchanged(store, prepared.catalogue)
    pending = store.pending(units)
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(pending)
    summary = RunSummary(store, len(units), len(pending), n_left=len(pending))
    start = time.perf_counter()
    files = prepared.catalogue.files
    task = partial(make_import_task, store_spec.url, files, pipeline.run.memory_bytes)
    if pending and not stop.requested:
        outcomes = hand_out(pipeline.run, task, pending, stop)
        compute_units(outcomes, pending, summary, progress, stop, "import")
    summary.wall_s = time.perf_counter() - start
    summary.repaired = repaired
    if not store.sealed and not store.pending():
        store.seal()
    return summary
