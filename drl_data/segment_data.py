"""Train pixels of labelled images, and label maps, maps and colours of the images to segment.

Shapes: n pixels, c channel, h w height and width of the images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from drl_data.errors import InputError, SpecError
from drl_data.feature_maps import MapCell
from drl_data.label_maps import LabelMaps, Labels
from drl_data.pixel_features import GatheredPixels, MapPixels, PixelFeatures, gathered
from drl_data.row_pixels import RowPixels
from drl_data.segment_spec import SegmentSpec
from drl_data.selection import Rows, select
from drl_data.splits import require_two_splits
from drl_data.store import FeatureStore

READ_BYTES = 256 << 20
"""Maps, and colours, that are in memory at once when images are read one after the other."""
PADDED = -1
"""Label of what `resize: pad` adds."""


@dataclass(frozen=True)
class SegmentRows:
    """Which rows learn, and which are predicted."""

    train: Rows
    test: Rows
    """Labelled rows of the test split."""
    more: Rows
    """Rows of the split `predict`, labelled or not, that are not in `test`."""
    n_unlabelled: dict[str, int]
    """Valid rows of the two splits without a label map."""
    labels: LabelMaps

    @classmethod
    def of(cls, store: FeatureStore, spec: SegmentSpec) -> SegmentRows:
        """Find the label maps of both splits.

        Raises:
            SpecError: no such split, a view whose labels are not known, or no label map in a split.
        """
        require_two_splits(spec.train, spec.test, "segment")
        name = (store.image_spec.view_names or ("id",))[store.view_index(spec.view)]
        if name not in ("id", "hflip"):
            raise SpecError(f"segment.view: {name!r}; label maps are fitted for id and hflip only")
        view: Literal["id", "hflip"] = "hflip" if name == "hflip" else "id"
        rows = {
            split: select(store, split=split).rows
            for split in (spec.train, spec.test, *([spec.predict] if spec.predict else []))
        }
        wanted = np.unique(np.concatenate([rows[spec.train], rows[spec.test]]))
        labels = LabelMaps.open(
            store,
            wanted,
            extension=spec.labels,
            folder=spec.label_folder,
            view=view,
            fill=PADDED,
        )
        has = {split: rows[split][np.isin(rows[split], labels.rows)] for split in rows}
        for split in (spec.train, spec.test):
            if not len(has[split]):
                where = spec.label_folder or "the tars"
                raise SpecError(
                    f"segment: no row of {split!r} has a label map KEY.{spec.labels} in {where}; "
                    "segment.labels is their extension"
                )
        train = has[spec.train]
        if spec.train_images is not None:
            train = _least_digests(store, train, spec.train_images)
        more = np.zeros(0, np.int64)
        if spec.predict is not None:
            more = np.setdiff1d(rows[spec.predict], has[spec.test])
        unlabelled = {s: len(rows[s]) - len(has[s]) for s in (spec.train, spec.test)}
        return cls(train, has[spec.test], more, unlabelled, labels)

    def validation(self, store: FeatureStore, share: float) -> Rows:
        """Train rows on which a cell is chosen: those whose keys have the least digests.

        Raises:
            SpecError: none would be left to learn.
        """
        n = max(round(len(self.train) * share), 1)
        if n >= len(self.train):
            raise SpecError(
                f"segment.linear: {len(self.train)} train images leave none for validation; want "
                "more, or `linear: null`"
            )
        return _least_digests(store, self.train, n)


def _least_digests(store: FeatureStore, rows: Rows, n: int) -> Rows:
    """At most n of the rows, chosen by their keys alone; increasing."""
    keys = store.index.table.column("key")
    digests = [hashlib.blake2b(keys[r].as_py().encode(), digest_size=8).digest() for r in rows]
    chosen = sorted(range(len(rows)), key=lambda i: digests[i])[:n]
    return np.sort(rows[chosen])


@dataclass(frozen=True)
class TrainPixels:
    """Pixels that learn: of each row of `rows` the positions, and the classes of all together."""

    rows: Rows
    positions: list[npt.NDArray[np.int64]]
    """Flat positions in [h, w]."""
    labels: Tensor
    """int64 [n], of the rows in turn."""
    n_classes: int

    @property
    def image(self) -> npt.NDArray[np.int64]:
        """Which of `rows` each pixel is of, [n]."""
        return np.repeat(np.arange(len(self.rows)), [len(p) for p in self.positions])

    @classmethod
    def of(cls, rows: SegmentRows, spec: SegmentSpec) -> TrainPixels:
        """Draw the pixels of every train image; a function of (seed, row).

        Raises:
            SpecError: a class that is beyond `n_classes`, or a single class in all images.
            InputError: a label map that is none.
        """
        positions: list[npt.NDArray[np.int64]] = []
        classes: list[Labels] = []
        for row, found in rows.labels.read(rows.train.tolist()):
            labels = without_ignored(found, spec)
            values, counts = np.unique(labels[labels >= 0], return_counts=True)
            labels = np.where(np.isin(labels, values[counts < spec.min_pixels]), PADDED, labels)
            there = np.flatnonzero(labels >= 0)
            if spec.pixels_per_image is not None and len(there) > spec.pixels_per_image:
                generator = np.random.default_rng([spec.seed, row])
                there = np.sort(generator.choice(there, spec.pixels_per_image, replace=False))
            positions.append(there)
            classes.append(labels.reshape(-1)[there])
        labels_n = np.concatenate(classes)
        if len(np.unique(labels_n)) < 2:
            raise SpecError(
                f"segment: {len(labels_n)} train pixels of {len(np.unique(labels_n))} classes; "
                "want two classes or more (segment.ignore, segment.min_pixels)"
            )
        n_classes = spec.n_classes or int(labels_n.max()) + 1
        check_classes(labels_n, n_classes, "the train images")
        return cls(rows.train, positions, torch.from_numpy(labels_n), n_classes)

    def features(
        self, cells: Sequence[MapCell], size: tuple[int, int], spec: SegmentSpec, device: str
    ) -> PixelFeatures:
        """Their vectors, gathered once if they fit `memory_bytes`, else the maps of all images.

        Raises:
            SpecError: neither fits.
        """
        n_channels = sum(cell.n_channels for cell in cells)
        n_gathered = 4 * len(self.labels) * n_channels
        n_maps = len(self.rows) * sum(cell.bytes_per_row for cell in cells)
        if min(n_gathered, n_maps) > spec.memory_bytes:
            raise SpecError(
                f"segment: {len(self.labels)} train pixels of {n_channels} channels take "
                f"{n_gathered} bytes, the maps of {len(self.rows)} images {n_maps}; want at most "
                f"memory_bytes {spec.memory_bytes}: lower pixels_per_image or train_images, or "
                "name fewer taps and timesteps"
            )
        images = zip(image_maps(cells, self.rows), self.positions, strict=True)
        if n_gathered <= spec.memory_bytes:
            x = torch.empty(len(self.labels), n_channels)
            start = 0
            for (_, maps), places in images:
                y, column = _rows_and_columns(places, size)
                x[start : start + len(places)] = gathered(maps, y, column, size)
                start += len(places)
            return GatheredPixels(x.to(device))
        held = MapPixels(device, size)
        for (_, maps), places in images:
            held.add(maps, *_rows_and_columns(places, size))
        held.finish()
        return held

    def colours(self, images: Iterator[tuple[int, Tensor]], device: str) -> PixelFeatures:
        """Colours 0..1 of the same pixels, from `image_pixels` of the rows."""
        found = [
            pixels.flatten(1).T[torch.from_numpy(places)]
            for (_, pixels), places in zip(images, self.positions, strict=True)
        ]
        return GatheredPixels(torch.cat(found).to(device))


@dataclass(frozen=True)
class SomePixels:
    """Some of the pixels, numbered anew."""

    base: PixelFeatures
    chosen: Tensor

    @property
    def n_pixels(self) -> int:
        """How many they are."""
        return len(self.chosen)

    @property
    def n_channels(self) -> int:
        """As of all."""
        return self.base.n_channels

    def take(self, pixels: Tensor) -> Tensor:
        """As `PixelFeatures.take`."""
        return self.base.take(self.chosen[pixels])


def without_ignored(labels: Labels, spec: SegmentSpec) -> Labels:
    """Labels [h, w] with -1 where a pixel does not count."""
    return np.where(np.isin(labels, spec.ignore), PADDED, labels)


def check_classes(labels: Labels, n_classes: int, where: str) -> None:
    """Raise SpecError if there is a class beyond the known ones."""
    if len(labels) and int(labels.max()) >= n_classes:
        raise SpecError(
            f"segment: class {int(labels.max())} in {where}, but there are {n_classes} classes; "
            "say segment.n_classes, or put the number into segment.ignore"
        )


def image_maps(cells: Sequence[MapCell], rows: Rows) -> Iterator[tuple[int, list[Tensor]]]:
    """(row, maps [c, h, w] of its cells) of rows in turn, several rows in one read."""
    step = max(READ_BYTES // sum(cell.bytes_per_row for cell in cells), 1)
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        maps = [cell.read(some) for cell in cells]
        for i, row in enumerate(some.tolist()):
            yield row, [one[i] for one in maps]


def image_pixels(store: FeatureStore, rows: Rows, *, flipped: bool) -> Iterator[tuple[int, Tensor]]:
    """(row, colours float32 [c, h, w], 0..1) of rows in turn, as the backbone saw them.

    Raises:
        InputError: the tars are gone or changed.
    """
    images = store.image_spec.model_copy(update={"views": ()})
    reader = RowPixels(store.index, images, store.url, include_invalid=False, n_threads=4)
    step = max(READ_BYTES // int(np.prod(images.shape)), 1)
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        try:
            pixels = torch.from_numpy(reader.read(some))
        except InputError as error:
            raise InputError(f"{error} (segment.pixels: false does without them)") from error
        for i, row in enumerate(some.tolist()):
            one = pixels[i].flip(-1) if flipped else pixels[i]
            yield row, one.float() / 255


def _rows_and_columns(
    places: npt.NDArray[np.int64], size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(places // size[1]), torch.from_numpy(places % size[1])
