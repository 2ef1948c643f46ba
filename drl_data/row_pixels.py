"""Pixels of any rows of an index, decoded anew from the tars, to be joined to their features."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from drl_data.errors import InputError, SpecError
from drl_data.images import read_batches
from drl_data.index import SampleIndex
from drl_data.plan import Unit
from drl_data.selection import Selection
from drl_data.spec import ImageSpec

Rows = npt.NDArray[np.int64]

Images = ImageSpec | tuple[SampleIndex, ImageSpec] | Literal[True] | None
"""How to decode the images: as features were computed of them (True), in another size, and from
which index (the store's own, if not said)."""

_BATCH = 64
_PREFETCH_BYTES = 64 << 20


@dataclass(frozen=True)
class RowPixels:
    """Reads pixels of rows: [n, *spec.shape], with views [n, view, *spec.shape]."""

    index: SampleIndex
    spec: ImageSpec
    url: str
    include_invalid: bool
    n_threads: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the pixels of one row."""
        return (*((self.spec.n_views,) if self.spec.views else ()), *self.spec.shape)

    def read(self, rows: Rows) -> npt.NDArray[np.uint8]:
        """Pixels of rows (increasing); zeros where they do not decode and invalid rows are wanted.

        Raises:
            InputError: an image of a row that has features does not decode, or its tar changed.
        """
        pixels = np.zeros((len(rows), *self.shape), np.uint8)
        # One reader for all of them: neighbours in a tar are then fetched together.
        chosen = replace(self.index, table=self.index.table.take(pa.array(rows)))
        done = 0
        for batch in read_batches(
            Unit(0, 0, len(rows)),
            chosen,
            self.spec,
            batch_size=min(len(rows), _BATCH),
            n_threads=self.n_threads,
            prefetch_bytes=_PREFETCH_BYTES,
            views=bool(self.spec.views),
        ):
            if batch.invalid and not self.include_invalid:
                bad = batch.invalid[0]
                raise InputError(
                    f"row {rows[bad.row]} (key {bad.key!r}): {bad.stage}: {bad.reason}, but "
                    f"{self.url} has its features; use the tars that it was made from"
                )
            pixels[done : done + batch.n_rows] = batch.pixels[: batch.n_rows]
            done += batch.n_rows
        return pixels


def row_pixels(
    images: Images, selection: Selection, *, include_invalid: bool, n_threads: int
) -> RowPixels | None:
    """A reader of the selection's pixels; None if no images are asked for.

    Raises:
        InputError: an index of other samples than the store's.
        SpecError: views that are not the store's.
    """
    if images is None:
        return None
    store = selection.source.first
    if isinstance(images, tuple):
        index, spec = images
        _require_same_samples(index, selection)
    else:
        index, spec = store.index, store.image_spec if images is True else images
    if spec.views and spec.view_names != store.spec.view_names:
        raise SpecError(
            f"images with views {list(spec.view_names)}; want those of {store.url}, "
            f"{list(store.spec.view_names)}, so that pixels are of the view that the "
            "features are of; or none"
        )
    return RowPixels(index, spec, store.url, include_invalid, n_threads)


def _require_same_samples(index: SampleIndex, selection: Selection) -> None:
    store = selection.source.first
    n = store.spec.n_samples
    if index.n_samples != n:
        raise InputError(
            f"the index of the images has {index.n_samples} samples, the store {store.url} {n}; "
            "index the tars that it was made from"
        )
    if index.digest() != store.spec.dataset and index.digest_rows(0, n) != (
        store.index.digest_rows(0, n)
    ):
        raise InputError(
            f"the index of the images has other samples, or in another order, than {store.url}; "
            "index the tars that it was made from"
        )
