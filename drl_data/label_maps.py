"""Label maps of the rows of a store: read, checked, and fitted to the images as pixels are.

Shapes: h w height and width of the images that the backbone saw.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from drl_data.errors import ImageError, InputError, ObjectNotFoundError, visible
from drl_data.fitting import place
from drl_data.index import SampleIndex, build_index
from drl_data.objects import Buffer, Folder, open_folder
from drl_data.row_bytes import row_bytes
from drl_data.spec import DatasetSpec, ImageSpec
from drl_data.store import FeatureStore

Rows = npt.NDArray[np.int64]
Labels = npt.NDArray[np.int64]

_PNG_MODES = ("1", "L", "P", "I", "I;16", "I;16B")
"""Pillow's modes whose values are numbers of classes."""


@dataclass(frozen=True)
class LabelMaps:
    """Label maps by row: members of the tars, or files of a folder named by key."""

    store: FeatureStore
    extension: str
    view: Literal["id", "hflip"]
    fill: int
    """What `resize: pad` adds."""
    rows: Rows
    """Rows that have one, increasing."""
    _places: Rows
    """Where in `_index` each of them is."""
    _index: SampleIndex | None
    _folder: Folder | None

    @classmethod
    def open(
        cls,
        store: FeatureStore,
        rows: Rows,
        *,
        extension: str,
        folder: str | None = None,
        view: Literal["id", "hflip"] = "id",
        fill: int = 255,
    ) -> LabelMaps:
        """Find the label maps of some rows (increasing): one pass over the headers of their tars,
        or over the names in the folder.

        Raises:
            InputError: tars that are gone or changed, keys that are not unique, two members that
                could be meant.
        """
        if folder is not None:
            found, there = _in_folder(store, rows, extension, open_folder(folder))
            return cls(store, extension, view, fill, found, found, None, there)
        found, places, index = _in_tars(store, rows, extension)
        return cls(store, extension, view, fill, found, places, index, None)

    def read(self, rows: Sequence[int]) -> Iterator[tuple[int, Labels]]:
        """(row, labels int64 [h, w]) of rows that have a label map, in order.

        Raises:
            InputError: a label map that is none, or that cannot be fitted.
        """
        keys = self.store.index.table.column("key")
        for row, data in self._bytes(np.asarray(rows, np.int64)):
            where = f"row {row} (key {visible(keys[row].as_py())}), {self.extension}"
            labels = decode_labels(data, self.extension, where)
            try:
                fitted = fit_labels(labels, self.store.image_spec, self.fill)
            except ImageError as error:
                raise InputError(f"{where}: {error.reason}") from error
            yield row, fitted[:, ::-1] if self.view == "hflip" else fitted

    def _bytes(self, rows: Rows) -> Iterator[tuple[int, Buffer]]:
        if self._index is not None:
            places = self._places[np.searchsorted(self.rows, rows)]
            own = dict(zip(places.tolist(), rows.tolist(), strict=True))
            for place_, data in row_bytes(self._index, places.tolist()):
                yield own[place_], data
            return
        assert self._folder is not None
        keys = self.store.index.table.column("key")
        for row in rows.tolist():
            yield row, self._folder.get(_path(keys[row].as_py(), self.extension))


def decode_labels(data: Buffer, extension: str, where: str) -> Labels:
    """Whole numbers int64 [h, w] of a PNG (grey, palette or 16 bits: its values as they are) or a
    .npy file.

    Raises:
        InputError: anything else, colours for example.
    """
    try:
        if extension.lower().endswith("npy"):
            values = np.load(io.BytesIO(data), allow_pickle=False)
        else:
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                if image.mode not in _PNG_MODES:
                    raise InputError(
                        f"{where}: a PNG of mode {image.mode}; want numbers of classes, grey or "
                        "with a palette, not colours"
                    )
                values = np.asarray(image)
    except (ValueError, OSError, EOFError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{where}: no label map: {error}") from error
    if values.ndim != 2 or values.dtype.kind not in "iub" or not values.size:
        raise InputError(
            f"{where}: {values.dtype} of shape {values.shape}; want whole numbers [height, width]"
        )
    if int(values.min()) < 0 or int(values.max()) > np.iinfo(np.int32).max:
        raise InputError(f"{where}: values {values.min()}..{values.max()}; want 0 and more")
    labels: Labels = values.astype(np.int64)
    return labels


def fit_labels(labels: Labels, images: ImageSpec, fill: int) -> Labels:
    """Resized by nearest neighbour and cropped as an image of this size is; `fill` where it is
    padded.

    Raises:
        ImageError: as `fitting.place`.
    """
    placed = place((labels.shape[0], labels.shape[1]), images)
    height, width = images.size
    if labels.shape != placed.size:
        image = Image.fromarray(labels.astype(np.int32))  # Pillow's mode I
        resized = image.resize(placed.size[::-1], Image.Resampling.NEAREST)
        labels = np.asarray(resized).astype(np.int64)
    top, left = placed.corner
    cut = labels[max(-top, 0) : max(-top, 0) + height, max(-left, 0) : max(-left, 0) + width]
    out = np.full((height, width), fill, np.int64)
    top, left = max(top, 0), max(left, 0)
    out[top : top + cut.shape[0], left : left + cut.shape[1]] = cut
    return out


# --- where they are -----------------------------------------------------------------------------


def _in_tars(
    store: FeatureStore, rows: Rows, extension: str
) -> tuple[Rows, Rows, SampleIndex | None]:
    """Rows with a label map, where they are in an index of label maps, and that index."""
    index = store.index
    chosen = index.table.take(pa.array(rows))
    used = np.unique(chosen["tar"].to_numpy())
    if not len(used):
        return rows[:0], rows[:0], None
    tars: dict[str, tuple[str, ...]] = {}
    for tar in used.tolist():
        info = index.tars[tar]
        tars[info.split] = (*tars.get(info.split, ()), info.url)
    dataset = DatasetSpec(tars=tars, image=(extension,), label=None, caption=None)
    labels = build_index(dataset)
    if labels.table["key"].equals(index.table.filter(_is_of(index, used))["key"]):
        # The same samples in the same order: repeated keys do no harm.
        before = np.flatnonzero(_is_of(index, used).to_numpy(zero_copy_only=False))
        places = np.searchsorted(before, rows)
    else:
        places = _by_key(labels, chosen["key"])
    members = labels.table.take(pa.array(places))
    for key, reason, member in zip(
        members["key"].to_pylist(),
        members["reason"].to_pylist(),
        members["member"].to_pylist(),
        strict=True,
    ):
        if reason is not None and member:
            raise InputError(f"label map of {visible(key)}: {reason}")
    has = np.asarray(members["reason"].is_null())
    return rows[has], places[has], labels


def _is_of(index: SampleIndex, tars: npt.NDArray[np.int32]) -> pa.ChunkedArray:
    return pc.is_in(index.table["tar"], value_set=pa.array(tars, pa.int32()))


def _by_key(labels: SampleIndex, keys: pa.ChunkedArray) -> Rows:
    """Rows of an index by key, of a store that has a part of the samples."""
    names = labels.table["key"].combine_chunks()
    if pc.count_distinct(names).as_py() < len(names):
        raise InputError(
            "label maps: keys that several samples of the tars have; give them their own, or use "
            "a store of all samples of the tars"
        )
    found = pc.index_in(keys.combine_chunks(), value_set=names)
    if found.null_count:
        raise InputError("label maps: the tars have not the samples of the store any more")
    places: Rows = found.to_numpy().astype(np.int64)
    return places


def _path(key: str, extension: str) -> str:
    return f"{key}.{extension}"


def _in_folder(
    store: FeatureStore, rows: Rows, extension: str, folder: Folder
) -> tuple[Rows, Folder]:
    """Rows whose file is in the folder; a key never leads out of it."""
    keys = store.index.table.column("key").take(pa.array(rows)).to_pylist()
    names = set()
    for key in keys:
        path = PurePosixPath(key)
        if path.is_absolute() or ".." in path.parts or "\\" in key:
            raise InputError(f"label_folder: the key {visible(key)} leads out of {folder.url}")
        if _path(key, extension) in names:
            raise InputError(f"label_folder: two samples are called {visible(key)}")
        names.add(_path(key, extension))
    try:
        there = {info.path for info in folder.list() if info.path.endswith(f".{extension}")}
    except ObjectNotFoundError as error:
        raise InputError(f"label_folder: {folder.url} is not there") from error
    has = np.array([_path(key, extension) in there for key in keys], bool)
    return rows[has], folder
