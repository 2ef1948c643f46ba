"""Pictures for the report: PNG in data URIs of samples, and of features as colours.

Shapes: n images, c channel, h height, w width.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import linalg

from drl_data.datasets import read_features
from drl_data.errors import InputError, ObjectError
from drl_data.images import read_batches
from drl_data.plan import Unit
from drl_data.spec import ArraySpec
from drl_data.store import FeatureStore

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

N_THUMBNAILS = 24
N_FEATURE_IMAGES = 5
THUMBNAIL_SIDE = 64
MAP_SIDE = 40
"""Pictures are shrunk to this many pixels a side, so that the page stays under 3 MB."""
MAX_SHEET_BYTES = 500_000
SHEET_SIDE = 512
MAX_TAPS = 8
MAX_TIMESTEPS = 6
PCA_ROWS = 256
PCA_BYTES = 16 << 20
"""Rows, and bytes of them, that the components of one (tap, timestep) are fitted on."""

_N_PIXELS_FITTED = 20_000
"""Places that principal components are fitted on."""


def png_uri(pixels: Pixels) -> str:
    """A PNG of [h, w], [h, w, 1] or [h, w, 3] as a data URI."""
    buffer = io.BytesIO()
    squeezed = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    Image.fromarray(squeezed).save(buffer, "PNG", optimize=True)
    return file_uri(buffer.getvalue())


def file_uri(png: bytes) -> str:
    """The bytes of a PNG file as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def sheet_uri(path: Path) -> str:
    """An image file as a data URI; shrunk if it is large.

    Raises:
        InputError: if there is no such image.
    """
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            if image.format == "PNG" and len(data) <= MAX_SHEET_BYTES:
                return file_uri(data)
            return png_uri(shrunk(np.asarray(image.convert("RGB")), SHEET_SIDE))
    except OSError as error:
        raise InputError(f"{path}: no image to put into the report ({error})") from error


def shrunk(pixels: Pixels, side: int) -> Pixels:
    """[h, w, ...] with its longer side at most `side`; smaller images stay as they are."""
    h, w = pixels.shape[:2]
    if max(h, w) <= side:
        return pixels
    scale = side / max(h, w)
    size = (max(1, round(w * scale)), max(1, round(h * scale)))
    image = Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)
    return np.asarray(image.resize(size, Image.Resampling.BOX))


def pca_colours(features_nchw: Floats) -> Pixels:
    """The first three principal components of all places as red, green, blue: uint8 [n, h, w, 3].

    Fitted on these images together. The sign of a component is that of its largest loading, each is
    stretched from its 1st to its 99th percentile. Missing components (c < 3) are mid-grey.
    """
    n, c, h, w = features_nchw.shape
    places = features_nchw.transpose(0, 2, 3, 1).reshape(-1, c).astype(np.float64)
    fitted = places[:: max(1, len(places) // _N_PIXELS_FITTED)]
    mean = fitted.mean(0)
    k = min(3, c)
    centred = fitted - mean
    covariance = centred.T @ centred / len(fitted)
    _, axes = linalg.eigh(covariance, subset_by_index=(c - k, c - 1))
    axes = axes[:, ::-1]  # eigh sorts upwards
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(k)])
    low, high = np.percentile(centred @ axes, [1, 99], axis=0)
    spread = np.where(high > low, high - low, 1.0)
    colours = np.full((len(places), 3), 0.5)
    colours[:, :k] = ((places - mean) @ axes - low) / spread
    colours[:, :k][:, high <= low] = 0.5
    return (colours.clip(0, 1) * 255).round().astype(np.uint8).reshape(n, h, w, 3)


# --- images -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """One sample of the input; `uri` is None if its image could not be read now."""

    row: int
    key: str
    split: str
    label: str
    uri: str | None


def _spread(rows: npt.NDArray[np.int64], n: int) -> npt.NDArray[np.int64]:
    """At most `n` of the rows, evenly spaced."""
    if len(rows) <= n:
        return rows
    places = (2 * np.arange(n) + 1) * len(rows) // (2 * n)
    return rows[places]


def thumbnails(store: FeatureStore) -> list[Shown]:
    """N_THUMBNAILS valid rows, evenly spaced, with their images as the backbone saw them."""
    table = store.samples()
    names = store.index.label_names
    shown = []
    for row in _spread(np.flatnonzero(store.valid_rows()), N_THUMBNAILS).tolist():
        (sample,) = table.slice(row, 1).select(["key", "split", "label"]).to_pylist()
        label = sample["label"]
        text = "" if label is None else str(label) if names is None else names[label]
        shown.append(Shown(row, sample["key"], sample["split"], text, row_uri(store, row)))
    return shown


def row_uri(store: FeatureStore, row: int, side: int = THUMBNAIL_SIDE) -> str | None:
    """The image of one row as the backbone saw it; None if it cannot be read now."""
    pixels = _pixels(store, row)
    return None if pixels is None else png_uri(shrunk(pixels, side))


def _pixels(store: FeatureStore, row: int) -> Pixels | None:
    """[h, w, c] of one row, of a video its first frame; None if its tar is not there any more, or
    features were imported without images."""
    if store.spec.images is None:
        return None
    batches = read_batches(
        Unit(0, row, row + 1),
        store.index,
        store.image_spec.model_copy(update={"frames": 1}),
        batch_size=1,
        n_threads=1,
        prefetch_bytes=64 << 20,
    )
    try:
        (batch,) = batches
    except (InputError, ObjectError):
        return None
    return None if batch.invalid else batch.pixels[0].transpose(1, 2, 0)


# --- features as colours ------------------------------------------------------------------------


@dataclass(frozen=True)
class FeaturePictures:
    """Of one tap: for each timestep, one picture for each shown image."""

    tap: str
    shape: str
    timesteps: list[str]
    pictures: list[list[str]]
    """[image][timestep] data URIs."""


@dataclass(frozen=True)
class Features:
    """Pictures of every tap that is a map; `left_out` says what is not shown."""

    shown: list[Shown]
    taps: list[FeaturePictures]
    left_out: str


def feature_pictures(store: FeatureStore, candidates: Sequence[Shown]) -> Features | None:
    """Colours of some taps and timesteps on some of the candidates; None without maps or images."""
    arrays = [a for a in store.features if _grid(a) is not None]
    if not arrays or not candidates:
        return None
    # One image of each label first, so that the pictures differ.
    by_label = {shown.label: shown for shown in reversed(candidates)}
    order = [*sorted(by_label.values(), key=lambda shown: shown.row), *candidates]
    shown = list(dict.fromkeys(order))[:N_FEATURE_IMAGES]
    chosen = _spread(np.arange(len(arrays)), MAX_TAPS).tolist()
    times = _spread(np.arange(len(store.times)), MAX_TIMESTEPS).tolist()
    taps = [_tap_pictures(store, arrays[i], times, shown) for i in chosen]
    left_out = []
    if len(chosen) < len(arrays):
        left_out.append(f"{len(chosen)} of {len(arrays)} taps")
    if len(times) < len(store.times):
        left_out.append(f"{len(times)} of {len(store.times)} timesteps")
    return Features(shown, taps, " and ".join(left_out))


def _grid(array: ArraySpec) -> tuple[int, int] | None:
    """Height and width of a tap that is a map, or tokens that are a square grid."""
    if array.dims == ("channel", "height", "width"):
        return array.shape[1], array.shape[2]
    if array.dims == ("token", "channel"):
        side = math.isqrt(array.shape[0])
        return (side, side) if side * side == array.shape[0] and side > 1 else None
    return None


def _tap_pictures(
    store: FeatureStore, array: ArraySpec, times: Sequence[int], shown: Sequence[Shown]
) -> FeaturePictures:
    rows = np.array([one.row for one in shown])
    n_fitted = min(PCA_ROWS, PCA_BYTES // array.bytes_per_row)
    valid = np.setdiff1d(np.flatnonzero(store.valid_rows()), rows)
    wanted = np.concatenate([rows, _spread(valid, n_fitted)]) if n_fitted else rows
    columns = []
    for t in times:
        features = _as_maps(read_features(store, array.name, t, wanted).float().numpy(), array)
        pictures = pca_colours(features)[: len(rows)]
        columns.append([png_uri(shrunk(picture, MAP_SIDE)) for picture in pictures])
    return FeaturePictures(
        tap=array.name,
        shape=_shape(array),
        timesteps=[f"{store.times[t].requested:g}" for t in times],
        pictures=[list(row) for row in zip(*columns, strict=True)],
    )


def _as_maps(values: npt.NDArray[np.float32], array: ArraySpec) -> npt.NDArray[np.float32]:
    """Rows [n, *shape] as [n, c, h, w]."""
    grid = _grid(array)
    assert grid is not None
    if array.dims == ("token", "channel"):
        values = values.transpose(0, 2, 1)
    return values.reshape(len(values), -1, *grid)


def _shape(array: ArraySpec) -> str:
    return " × ".join(str(side) for side in array.shape)
