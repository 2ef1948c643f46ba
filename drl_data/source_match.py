"""Samples of somebody's files and rows of an index: which is whose."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from drl_data.catalogue import Catalogue, Place, nowhere, place_columns
from drl_data.errors import InputError, redacted, visible
from drl_data.import_spec import SourceSpec
from drl_data.index import SampleIndex, TarInfo, index_table
from drl_data.key_names import file_name, member_name
from drl_data.source_files import Found, own_key
from drl_data.spec import DatasetSpec
from drl_data.tar_samples import resolve_labels

log = logging.getLogger(__name__)

Rows = npt.NDArray[np.int64]

WITHOUT_IMAGES = "features were imported without images"
"""Why a row of an index that is made of files of features has no image."""

REPEATED = -2
"""Of a row whose key several samples have, or several rows."""


def own_index(found: Found, files: tuple[TarInfo, ...], source: SourceSpec) -> SampleIndex:
    """The index whose rows are the samples of the files, without images.

    Raises:
        InputError: two samples of one key, which nobody could tell apart.
    """
    keys = [own_key(key, source) for key in found.keys]
    twice = [key for key, n in Counter(keys).items() if n > 1]
    if twice:
        raise InputError(
            f"source: {len(twice)} keys are of several samples, {visible(twice[0])!r} for example; "
            "want each once: import one split, or say where better keys are (`source.key`)"
        )
    labels, names = resolve_labels(found.labels)
    first = [
        next((place.file for place in places if place.file is not None), 0)
        for places in zip(*found.places, strict=True)
    ]
    n = len(keys)
    table = index_table(
        {
            "key": keys,
            "split": found.splits,
            "tar": first,
            "member": [""] * n,
            "offset": [0] * n,
            "size": [0] * n,
            "label": labels,
            "caption": found.captions,
            "reason": [WITHOUT_IMAGES] * n,
            "checksum": [0] * n,
            "mtime": [0.0] * n,
        }
    )
    return SampleIndex(table, files, names, DatasetSpec(tars=source.files))


def match(
    found: Found, files: tuple[TarInfo, ...], index: SampleIndex, source: SourceSpec
) -> Catalogue:
    """The places of every row of an index; rows without features are nowhere, with a reason.

    Samples of the files that are of no row are left out, and counted in a warning.

    Raises:
        InputError: no row has features; or other numbers, where positions match.
    """
    sample_of = _sample_of_row(found, index, source)
    n_found = int((sample_of >= 0).sum())
    if not n_found:
        ours, theirs = index.table.column("key")[0].as_py(), found.keys[0]
        raise InputError(
            f"source: none of {len(found.keys)} samples is one of the {index.n_samples} of "
            f"`dataset:`, whose keys are like {visible(ours)!r}, those of the files like "
            f"{visible(theirs)!r}; see `source.key` and `source.match`"
        )
    n_left = len(found.keys) - len(np.unique(sample_of[sample_of >= 0]))
    if n_left:
        log.warning(
            "%d of %d samples of %s are of no row of the dataset, and are left out",
            n_left, len(found.keys), redacted(files[0].url),
        )  # fmt: skip
    missing = nowhere("no features: its key is not in the files")
    repeated = nowhere("its key is not of one sample alone: which features are its own is unknown")
    columns: dict[str, list[Place]] = {}
    for number, places in enumerate(found.places):
        columns[f"place_{number}"] = [
            places[sample] if sample >= 0 else repeated if sample == REPEATED else missing
            for sample in sample_of.tolist()
        ]
    table = pa.table(place_columns(columns), names=list(columns))
    return Catalogue(table, files, found.layouts)


def _sample_of_row(found: Found, index: SampleIndex, source: SourceSpec) -> Rows:
    """Position of each row's sample, -1 without one, REPEATED where it is not one alone."""
    n = index.n_samples
    if source.match == "position":
        if len(found.keys) != n:
            raise InputError(
                f"source.match position: {len(found.keys)} samples in the files, {n} in the "
                "dataset; want as many, or keys that match"
            )
        return np.arange(n)
    keys = index.table.column("key").to_pylist()
    if source.format == "npy" and source.key == "row":
        names: list[Sequence[str]] = [[str(row) for row in range(n)]]
    elif source.format == "npy" and source.key in (None, "name"):
        names = [[file_name(key) for key in keys], keys]
    elif source.format == "webdataset":
        names = [keys, [member_name(key) for key in keys]]
    else:
        names = [keys]
    theirs = pa.array(found.keys, pa.string())
    several = _several(found.keys)
    sample_of = np.full(n, -1, np.int64)
    for own in names:
        here = np.asarray(pc.fill_null(pc.index_in(pa.array(own), value_set=theirs), -1), np.int64)
        sample_of = np.where(sample_of < 0, here, sample_of)
    by_row = source.format == "npy" and source.key == "row"
    ours = set() if by_row else _several(keys)
    for row in np.flatnonzero(sample_of >= 0).tolist():
        if found.keys[sample_of[row]] in several or keys[row] in ours:
            sample_of[row] = REPEATED
    return sample_of


def _several(keys: Sequence[str]) -> set[str]:
    return {key for key, n in Counter(keys).items() if n > 1}
