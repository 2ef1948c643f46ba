"""Matches whose truth is known: images of a store against themselves, warped.

Shapes: k points, c channel, h w cells of a map.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from drl_data.correspond_data import (
    Column,
    Columns,
    MapReader,
    image_side,
    input_side,
    inside,
    original_sizes,
    searched,
    view_of,
)
from drl_data.correspond_spec import CorrespondSpec, WarpCheckSpec
from drl_data.errors import SpecError
from drl_data.feature_maps import MapCell
from drl_data.fitting import PixelMap, pixel_map
from drl_data.image_features import features_of_images
from drl_data.matching import Side, match
from drl_data.pck import Distances, PckScore
from drl_data.pipeline import Pipeline
from drl_data.progress import Progress
from drl_data.row_pixels import RowPixels
from drl_data.selection import Rows, select
from drl_data.spec_base import Spec
from drl_data.store import FeatureStore
from drl_data.warps import EXACT, Warp, computed_warps, view_warp

SAME = PixelMap((1.0, 1.0), (0.0, 0.0))
"""Points are in the pixels of the input already."""


class WarpPck(Spec):
    """One warp, matched by one column."""

    warp: str
    """`identity`, `mirrored map`, `turned map`: of the map itself; `view NAME`: a view that the
    store has; `computed NAME`: a warped image through the backbone."""
    cell: str
    score: PckScore
    """Relative to the longer side of the warped image."""
    median_px: float
    """Of the distances, in pixels of the input."""


@dataclass(frozen=True)
class _Warped:
    """One image and its warped self."""

    name: str
    warp: Warp
    target: Side


def check_warps(
    pipeline: Pipeline,
    store: FeatureStore,
    columns: Columns,
    spec: CorrespondSpec,
    check: WarpCheckSpec,
    device: str,
    progress: Progress,
) -> tuple[WarpPck, ...]:
    """PCK and cycles of every warp and column, in the pixels of the backbone's input.

    Raises:
        SpecError: no valid row; warps of a view that is not the image itself.
        UserError: `computed` needs more than images, or the pipeline is not the store's any more.
    """
    own, wanted = _of_this_store(columns)
    size = store.image_spec.size
    rows = _rows(store, check)
    reader = MapReader(store, own, device)
    points = _points(check, size, own)
    found: dict[tuple[str, str], list[Distances]] = {}
    pixels: dict[tuple[str, str], list[np.ndarray]] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        progress.bar("warps", len(rows), "images") as bar,
    ):
        made = _Computed.of(pipeline, store, own, rows, check, Path(folder))
        for row in rows.tolist():
            source = input_side(size, own, reader.maps(row))
            for one in _warped(store, own, source, row, spec, made, device):
                truth = one.warp(points)
                there = inside(one.target, truth)
                if not there.any():
                    continue
                for column in wanted:
                    key = (one.name, column.name)
                    distances = _distances(source, one, points[there], column, spec)
                    longer = max(one.target.size)
                    pixels.setdefault(key, []).append(distances.match * longer)
                    found.setdefault(key, []).append(distances)
            bar.advance(1)
    return tuple(
        WarpPck(
            warp=warp,
            cell=cell,
            score=PckScore.of(pairs, spec.alphas),
            median_px=float(np.median(np.concatenate(pixels[warp, cell]))),
        )
        for (warp, cell), pairs in found.items()
    )


def _of_this_store(columns: Columns) -> tuple[list[MapCell], list[Column]]:
    """Cells of the first store, and the columns that need no other."""
    places = {i: n for n, i in enumerate(i for i, c in enumerate(columns.cells) if not c.prefix)}
    wanted = [
        replace(column, parts=tuple((places[i], weight) for i, weight in column.parts))
        for column in columns.columns
        if all(i in places for i, _ in column.parts)
    ]
    return [columns.cells[i] for i in places], wanted


def _rows(store: FeatureStore, check: WarpCheckSpec) -> Rows:
    rows = select(store, split=check.split).rows
    n = min(check.images, len(rows))
    return rows[(2 * np.arange(n) + 1) * len(rows) // (2 * n)]


def _points(check: WarpCheckSpec, size: tuple[int, int], cells: Sequence[MapCell]) -> Tensor:
    """Middles of pixels on a regular grid, float64 [k, 2]; half a cell from the border, where
    positions between cells begin to differ."""
    along = []
    for axis in (0, 1):
        margin = max(size[axis] / cell.grid[axis] for cell in cells) / 2
        share = (torch.arange(check.points, dtype=torch.float64) + 0.5) / check.points
        at = margin + share * (size[axis] - 2 * margin)
        along.append(torch.unique(at.floor() + 0.5))
    y, x = torch.meshgrid(along[0], along[1], indexing="ij")
    return torch.stack([y.flatten(), x.flatten()], 1)


def _distances(
    source: Side, one: _Warped, points: Tensor, column: Column, spec: CorrespondSpec
) -> Distances:
    target = searched(one.target, column, spec.search, SAME, one.target.size)
    matches = match(source, target, points, column.parts)
    distance = (matches.points - one.warp(points)).norm(dim=1) / max(one.target.size)
    if not spec.cycle:
        return Distances(distance.numpy(), None)
    origin = searched(source, column, spec.search, SAME, source.size)
    back = match(one.target, origin, matches.points, column.parts)
    returned = (back.points - points).norm(dim=1) / max(source.size)
    return Distances(distance.numpy(), returned.numpy())


# --- warped images ------------------------------------------------------------------------------


def _warped(
    store: FeatureStore,
    cells: Sequence[MapCell],
    source: Side,
    row: int,
    spec: CorrespondSpec,
    made: _Computed | None,
    device: str,
) -> Iterator[_Warped]:
    size = source.size
    for name, (warp, move) in EXACT.items():
        moved = warp(size)
        maps = [move(one) for one in source.maps]
        yield _Warped(name, moved, input_side(moved.size, cells, maps))
    images = store.image_spec
    if images.views and view_of(store, spec.view) == "id":
        yield from _views(store, cells, source, row, device)
    if made is not None:
        yield from made.warped(row, device)


def _views(
    store: FeatureStore, cells: Sequence[MapCell], source: Side, row: int, device: str
) -> Iterator[_Warped]:
    """The image against each other view of it that the store has."""
    images = store.image_spec
    key = store.index.table.column("key")[row].as_py()
    original = images.size
    if any(name.startswith("crop-") for name in images.view_names):
        original = original_sizes(store, [row])[row]
    place = pixel_map(original, images)
    fitted = np.array(
        [[place.scale[0], 0, place.offset[0]], [0, place.scale[1], place.offset[1]]], np.float64
    )
    for position, name in enumerate(images.view_names):
        if name == "id":
            continue
        maps = [replace(cell, view=position).read([row])[0].to(device) for cell in cells]
        warp = view_warp(images, name, key, original, Warp(fitted, images.size))
        yield _Warped(f"view {name}", warp, input_side(images.size, cells, maps))


@dataclass
class _Computed:
    """Warped images, and a store of their features."""

    warps: dict[str, Warp]
    rows: Rows
    store: FeatureStore
    cells: Sequence[MapCell]

    @classmethod
    def of(
        cls,
        pipeline: Pipeline,
        store: FeatureStore,
        cells: Sequence[MapCell],
        rows: Rows,
        check: WarpCheckSpec,
        folder: Path,
    ) -> _Computed | None:
        """Warp the images of the rows and send them through the backbone; `folder` is empty."""
        if not check.computed:
            return None
        if any(cell.view for cell in cells):
            raise SpecError("correspond.check.computed: warps are of the image itself (view id)")
        images = store.image_spec.model_copy(update={"views": ()})
        reader = RowPixels(store.index, images, store.url, include_invalid=False, n_threads=4)
        warps = computed_warps(check, images.size)
        files = []
        for row, pixels in zip(rows.tolist(), reader.read(rows), strict=True):
            shown = pixels.transpose(1, 2, 0)
            image = Image.fromarray(shown[..., 0] if images.mode == "L" else shown)
            for name, warp in warps.items():
                files.append(folder / f"row{row}-{name}.png")
                warp.image(image).save(files[-1])
        (folder / "store").mkdir()
        made = features_of_images(pipeline, store, files, folder / "store")
        own = [replace(cell, store=made) for cell in cells]
        return cls(warps, rows, made, own)

    def warped(self, row: int, device: str) -> Iterator[_Warped]:
        """The image of a row, in each warp."""
        at = int(np.searchsorted(self.rows, row)) * len(self.warps)
        size = self.store.image_spec.size
        for i, (name, warp) in enumerate(self.warps.items()):
            maps = [cell.read([at + i])[0].to(device) for cell in self.cells]
            yield _Warped(f"computed {name}", warp, image_side(size, self.cells, maps, None))
