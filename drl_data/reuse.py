"""What older stores already have of a new one: the same samples, tensors and timesteps.

A changed pipeline (another tap, another timestep, more tars) is another spec and another store.
What an old store holds of it is copied, the rest is computed. Features of a sample at a timestep
depend on nothing but what `unlike` compares, the sample (`match_rows`), the tensor and its
reductions (`match_cells`), and the resolved timestep with its noise: so they are the same, bit for
bit, wherever the sample lies in either store and whatever else is computed beside them.

Pure functions of two descriptions and two indices; reuse_task.py copies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from drl_data.diffusion_spec import NoiseSpec
from drl_data.index import SampleIndex
from drl_data.noise import noise_table
from drl_data.reduce import pca_of
from drl_data.spec import ArraySpec, FeatureSpec, TapSpec
from drl_data.store_metadata import Described
from drl_data.tap_names import translated
from drl_data.tap_sites import MODEL_SITES
from drl_data.taps import array_suffix, glob_to_regex, parse

Cell = tuple[str, int]
"""An array and one of its shards of a unit: a timestep of a view."""

_BETWEEN = pa.scalar("\n", pa.large_string())

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Matches:
    """What an old store has of a new one."""

    cells: Mapping[Cell, Cell]
    """Cell of the new store -> of the old one."""
    fits: Mapping[str, str]
    """Fitted array of the new store -> of the old one: they are reduced by the same numbers."""
    rows: Rows
    """[n_samples] of the new store: the row of the same sample in the old one, -1 without one."""
    all_cells: bool
    """Whether the two stores have the same arrays and timesteps in the same order."""
    reasons: tuple[str, ...] = field(default=())
    """Why some arrays of the new store that the old one seems to have are not in `cells`."""


def match(
    new: Described,
    new_index: SampleIndex,
    old: Described,
    old_index: SampleIndex,
    input_shape: Sequence[int] | None = None,
) -> Matches:
    """What the old store has of the new one; `unlike` must have found nothing.

    `input_shape` is that of the denoiser's input for one sample, if it is known: some tables of
    noise can be told to be equal by it only.
    """
    rows = match_rows(new.computed, new_index, old_index)
    same_rows = len(rows) == old_index.n_samples and np.array_equal(rows, np.arange(len(rows)))
    cells, fits, reasons = match_cells(new, old, same_rows=same_rows, input_shape=input_shape)
    all_cells = (new.arrays, new.times) == (old.arrays, old.times)
    whole = sum(array.n_cells(len(new.times)) for array in new.arrays)
    return Matches(cells, fits, rows, all_cells and len(cells) == whole, tuple(reasons))


def unlike(new: FeatureSpec, old: FeatureSpec) -> list[str]:
    """Lines `path: old != new` of what makes all features of two specs differ; empty if nothing.

    Left out is what may differ: samples, units, timesteps, taps.
    """
    return _without_additions(old).differences(_without_additions(new))


def _without_additions(spec: FeatureSpec) -> FeatureSpec:
    """What is left of a spec without what additive work changes."""
    # condition_at has an entry for each timestep: it acts on the resolved timesteps alone.
    schedule = spec.schedule.model_copy(update={"timesteps": (0,), "condition_at": "same"})
    return spec.model_copy(
        update={
            "dataset": "",
            "n_samples": 1,
            "rows_per_unit": 1,
            "schedule": schedule,
            "taps": (),
        }
    )


# --- samples ------------------------------------------------------------------------------------


def match_rows(spec: FeatureSpec, new: SampleIndex, old: SampleIndex) -> Rows:
    """For each row of `new` the row of the same sample in `old`, -1 without one; int64.

    A sample is known by its key, and by name, size, header checksum and time of its image, and by
    its label or caption where the spec tells them to the network; not by its tar, place or split.
    Where several samples of one store agree in that, they must also lie at the same place of an
    unchanged tar.
    """
    mine, theirs = (_identities(index, spec) for index in (new, old))
    repeated = pa.chunked_array([_repeated(mine), _repeated(theirs)]).unique()
    mine, theirs = (
        pc.if_else(
            pc.is_in(names, value_set=repeated),
            pc.binary_join_element_wise(names, _places(index), _BETWEEN),
            names,
        )
        for names, index in ((mine, new), (theirs, old))
    )
    found = pc.index_in(mine, value_set=theirs).fill_null(-1)
    return np.asarray(found, np.int64)


def _identities(index: SampleIndex, spec: FeatureSpec) -> pa.Array:
    """One string for each row, equal exactly for samples with equal features."""
    told = spec.condition
    names = ["key", "member", "size", "reason", "checksum", "mtime"]
    names += ["caption"] if told.caption else []
    names += ["label"] if told.class_label == "label" else []
    columns = [index.table.column(name) for name in names]
    if told.template is not None:
        columns.append(_label_names(index))
    # Each string with its length before it, so that no two rows are told alike by chance.
    texts = [
        text
        for column in columns
        for whole in [column.cast(pa.large_string())]
        for text in (pc.binary_length(whole).cast(pa.large_string()).fill_null("-"), whole)
    ]
    joined = pc.binary_join_element_wise(*(text.fill_null("") for text in texts), _BETWEEN)
    return _one_chunk(joined)


def _label_names(index: SampleIndex) -> pa.ChunkedArray:
    """What a template calls each row's label."""
    labels = index.table.column("label")
    if index.label_names is None:
        return labels
    return pc.take(pa.array(index.label_names, pa.string()), labels)


def _places(index: SampleIndex) -> pa.Array:
    """One string for each row: its offset, and size and tag of its tar."""
    tars = pa.array([f"{tar.size}/{tar.etag}" for tar in index.tars], pa.large_string())
    of_rows = _one_chunk(pc.take(tars, index.table.column("tar")))
    offsets = _one_chunk(index.table.column("offset").cast(pa.large_string()))
    return pc.binary_join_element_wise(of_rows, offsets, _BETWEEN)


def _repeated(names: pa.Array) -> pa.Array:
    """Those that occur more than once."""
    counts = pc.value_counts(names)
    return counts.field("values").filter(pc.greater(counts.field("counts"), 1))


def _one_chunk(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


# --- arrays and timesteps -----------------------------------------------------------------------


def match_cells(
    new: Described,
    old: Described,
    *,
    same_rows: bool,
    input_shape: Sequence[int] | None = None,
) -> tuple[dict[Cell, Cell], dict[str, str], list[str]]:
    """Which shards of a unit hold the same features; which arrays are reduced by the same fit; and
    why others with the same tensor are of no use.

    `same_rows` says that the samples are the same in the same order, as a fit demands.
    """
    times = _match_times(new, old, input_shape)
    same_times = new.times == old.times and all(times.get(t) == t for t in range(len(new.times)))
    mine, theirs = (reductions(d.computed, d.arrays) for d in (new, old))
    cells: dict[Cell, Cell] = {}
    fits: dict[str, str] = {}
    reasons: list[str] = []
    for array in new.arrays:
        if array.quantises is not None:
            continue
        twin = _twin(array, mine[array.name], old, theirs)
        if twin is None:
            continue
        if pca_of(mine[array.name] or ()) is not None:
            if not (same_rows and same_times and _spread(mine) == _spread(theirs)):
                reasons.append(
                    f"{array.name}: principal components are fitted on other samples or timesteps"
                )
                continue
            fits[array.name] = twin.name
        if array.timesteps == "mean" and not same_times:
            reasons.append(f"{array.name}: a mean over other timesteps")
            continue
        for name, other in _with_companions(array, new, twin, old):
            cells.update(_cells(name, other, times, len(new.times), len(old.times)))
    return cells, fits, reasons


def _twin(
    array: ArraySpec,
    reduce: tuple[str, ...] | None,
    old: Described,
    theirs: Mapping[str, tuple[str, ...] | None],
) -> ArraySpec | None:
    """The array of the old store with the same tensor, reduced and stored alike."""
    if reduce is None:
        return None
    return next(
        (
            other
            for other in old.arrays
            if other.quantises is None
            and theirs[other.name] == reduce
            and other.model_copy(update={"name": array.name}) == array
        ),
        None,
    )


def _with_companions(
    array: ArraySpec, new: Described, twin: ArraySpec, old: Described
) -> list[tuple[ArraySpec, ArraySpec]]:
    """The pair, and those of their scales and offsets."""
    pairs = [(array, twin)]
    for mine, theirs in zip(
        (a for a in new.arrays if a.quantises == array.name),
        (a for a in old.arrays if a.quantises == twin.name),
        strict=True,
    ):
        pairs.append((mine, theirs))
    return pairs


def _cells(
    array: ArraySpec, twin: ArraySpec, times: Mapping[int, int], n_new: int, n_old: int
) -> dict[Cell, Cell]:
    pairs = times.items() if array.timesteps == "each" else [(0, 0)]
    return {
        (array.name, array.cell(t, view, n_new)): (twin.name, twin.cell(at, view, n_old))
        for view in range(max(array.views, 1))
        for t, at in pairs
    }


def _match_times(
    new: Described, old: Described, input_shape: Sequence[int] | None
) -> dict[int, int]:
    """Position of a timestep in the new store -> in the old one: the same level, the same noise."""
    places = {time: at for at, time in enumerate(old.times)}
    return {
        t: places[time]
        for t, time in enumerate(new.times)
        if time in places
        and same_noise(
            new.computed.noise, (t, len(new.times)), (places[time], len(old.times)), input_shape
        )
    }


def same_noise(
    spec: NoiseSpec,
    new: tuple[int, int],
    old: tuple[int, int],
    input_shape: Sequence[int] | None = None,
) -> bool:
    """Whether a timestep has the same noise in two stores; (its place, number of timesteps) each.

    Noise that is drawn by key and timestep has no place. A row of a table does; how many rows
    torch's generator is asked for at once may change the last ones of them, so those are drawn and
    compared, which takes the `input_shape` of a sample.
    """
    if not spec.is_table or spec.moves:
        return True
    if new[0] != old[0]:
        return False
    if spec.file is not None or new[1] == old[1]:
        return True
    if input_shape is None:
        return False
    rows = slice(new[0] * spec.members, (new[0] + 1) * spec.members)
    mine, theirs = (noise_table(spec, input_shape, n) for n in (new[1], old[1]))
    assert mine is not None
    assert theirs is not None
    return torch.equal(mine[rows], theirs[rows])


def reductions(spec: FeatureSpec, arrays: Sequence[ArraySpec]) -> dict[str, tuple[str, ...] | None]:
    """What is done to the tensor of each feature array; None where several taps may be meant."""
    found = taps_of(spec, arrays)
    return {
        name: taps[0].reduce if len({tap.reduce for tap in taps}) == 1 else None
        for name, taps in found.items()
    }


def taps_of(spec: FeatureSpec, arrays: Sequence[ArraySpec]) -> dict[str, list[TapSpec]]:
    """The tap that gives each feature array, or those of which it may be any.

    Known by the names of the arrays: those that their taps say, or those of the modules that match.
    """
    taps = [(tap, translated(tap)) for tap in spec.taps]
    named = {own.name: tap for tap, own in taps if own.name is not None}
    unnamed = [(tap, *_naming(own)) for tap, own in taps if own.name is None]
    found: dict[str, list[TapSpec]] = {}
    for array in arrays:
        if array.quantises is not None:
            continue
        if array.name in named:
            found[array.name] = [named[array.name]]
            continue
        fitting = [
            (tap, suffix)
            for tap, module, suffix in unnamed
            if array.name.endswith(suffix) and module.fullmatch(array.name.removesuffix(suffix))
        ]
        # The name of a module may end like the suffix of a site; hardly the other way round.
        longest = max((len(suffix) for _, suffix in fitting), default=0)
        found[array.name] = [tap for tap, suffix in fitting if len(suffix) == longest]
    return found


def _naming(tap: TapSpec) -> tuple[re.Pattern[str], str]:
    """What the modules of a tap without a name are called, and what its arrays' names add."""
    pattern, site, parts = parse(tap.path)
    if site in MODEL_SITES:
        return re.compile(re.escape(".".join((site, *parts)))), ""
    return re.compile(glob_to_regex(pattern)), array_suffix(site, parts)


def _spread(reduce: Mapping[str, tuple[str, ...] | None]) -> int:
    """Samples that the fits of a store are made on: as many as the tap that wants most."""
    found = (pca_of(texts or ()) for texts in reduce.values())
    return max((n for _, _, n in filter(None, found)), default=0)
