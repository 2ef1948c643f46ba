"""Cells and fusions of cells to match by, their maps by row, and both sides of a pair."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from drl_data.buckets import read_sizes
from drl_data.correspond_spec import CorrespondSpec, FusedTap
from drl_data.errors import ImageError, InputError, SpecError
from drl_data.feature_maps import MapCell, map_cells
from drl_data.fitting import PixelMap, pixel_map
from drl_data.matching import Parts, Side, covered_along, middles
from drl_data.pairs import KeyRows
from drl_data.pipeline import Pipeline
from drl_data.splits import finished_store
from drl_data.store import FeatureStore

CACHE_BYTES = 1 << 30
"""Maps of images that are kept, for pairs that share an image."""


@dataclass(frozen=True)
class Column:
    """What is matched by: one cell, or several together."""

    name: str
    parts: Parts
    """(position among the cells, weight)."""
    tap: str | None = None
    timestep: float | None = None


@dataclass(frozen=True)
class Columns:
    """All cells that are read, and what is matched by them."""

    cells: tuple[MapCell, ...]
    columns: tuple[Column, ...]

    @classmethod
    def of(cls, store: FeatureStore, spec: CorrespondSpec) -> Columns:
        """Cells of the store by themselves, then the fusions.

        Raises:
            SpecError: a tap that is no map, a fusion that names what is not there.
            TapError: no such tap, timestep or view.
            UserError: another store that is not there or not complete.
        """
        own = map_cells(
            store,
            "correspond",
            taps=spec.taps,
            timesteps=spec.timesteps,
            grids={n: g for n, g in spec.grids.items() if n in [a.name for a in store.features]},
            view=spec.view,
        )
        columns = [
            Column(cell.name, ((i, 1.0),), cell.tap, cell.timestep) for i, cell in enumerate(own)
        ]
        stores = {"": store}
        for name, path in spec.stores.items():
            stores[name] = finished_store(Pipeline.load(Path(path)), "correspond")
        cells = list(own)
        for name, taps in spec.fuse.items():
            parts = []
            for tap in taps:
                cell = _fused_cell(stores, tap, spec)
                if cell not in cells:
                    cells.append(cell)
                parts.append((cells.index(cell), tap.weight))
            columns.append(Column(name, tuple(parts)))
        return cls(tuple(cells), tuple(columns))


def _fused_cell(
    stores: Mapping[str, FeatureStore], fused: FusedTap, spec: CorrespondSpec
) -> MapCell:
    prefix, _, rest = fused.tap.partition("/")
    name, tap = (prefix, rest) if rest and prefix in stores else ("", fused.tap)
    store = stores[name]
    each = store.array(tap).timesteps == "each"
    if each and fused.timestep is None and len(store.times) > 1:
        times = ", ".join(f"{time.requested:g}" for time in store.times)
        raise SpecError(f"correspond.fuse: {fused.tap!r} has the timesteps {times}; name one")
    (cell,) = map_cells(
        store,
        "correspond",
        taps=[tap],
        timesteps=[] if fused.timestep is None else [fused.timestep],
        grids={tap: spec.grids[fused.tap]} if fused.tap in spec.grids else {},
        view=spec.view if not name else None,
        prefix=name,
    )
    return cell


class MapReader:
    """Maps of all cells by row of the first store, on a device, the last ones kept."""

    def __init__(self, store: FeatureStore, cells: Sequence[MapCell], device: str) -> None:
        self._keys = store.index.table.column("key")
        self.cells, self._device = tuple(cells), device
        self._valid: dict[str, Sequence[bool]] = {}
        self._rows: dict[str, KeyRows] = {}
        for cell in cells:
            self._valid.setdefault(cell.store.url, cell.store.valid_rows().tolist())
            if cell.prefix and cell.prefix not in self._rows:
                keys = cell.store.index.table.column("key").to_pylist()
                self._rows[cell.prefix] = KeyRows(keys, cell.store.url)
        self._kept: OrderedDict[int, list[Tensor]] = OrderedDict()
        self._limit = max(CACHE_BYTES // sum(cell.bytes_per_row for cell in cells), 2)

    def valid(self, row: int) -> bool:
        """Whether every store has features of a row."""
        return all(self._valid[cell.store.url][self.row_of(cell, row)] for cell in self.cells)

    def row_of(self, cell: MapCell, row: int) -> int:
        """The row in the cell's own store.

        Raises:
            InputError: it has no sample of that key.
        """
        if not cell.prefix:
            return row
        return self._rows[cell.prefix].row([self._keys[row].as_py()])

    def maps(self, row: int) -> list[Tensor]:
        """[c, h, w] of each cell, in the type that they are stored in."""
        if row in self._kept:
            self._kept.move_to_end(row)
            return self._kept[row]
        found = [cell.read([self.row_of(cell, row)])[0].to(self._device) for cell in self.cells]
        self._kept[row] = found
        while len(self._kept) > self._limit:
            self._kept.popitem(last=False)
        return found


def view_of(store: FeatureStore, view: str | None) -> Literal["id", "hflip"]:
    """The view that is matched, whose geometry is known.

    Raises:
        SpecError: it is a crop.
    """
    name = (store.image_spec.view_names or ("id",))[store.view_index(view)]
    if name not in ("id", "hflip"):
        raise SpecError(f"correspond.view: {name!r}; want id or hflip, as keypoints are placed")
    return "hflip" if name == "hflip" else "id"


def image_side(
    size: tuple[int, int], cells: Sequence[MapCell], maps: Sequence[Tensor], view: str | None
) -> Side:
    """An original image of `size`: its points are in its own pixels; no candidates yet.

    Raises:
        SpecError: an image of this size is refused by the pipeline.
    """
    try:
        places = [
            pixel_map(
                size,
                cell.store.image_spec,
                cell.grid,
                view=view_of(cell.store, None if cell.prefix else view),
            )
            for cell in cells
        ]
    except ImageError as error:
        raise SpecError(f"correspond: an image of {size}: {error.reason}") from error
    nothing = torch.zeros(0, dtype=torch.float64)
    return Side(size, maps, places, nothing, nothing)


def input_side(size: tuple[int, int], cells: Sequence[MapCell], maps: Sequence[Tensor]) -> Side:
    """An image as the backbone saw it, of `size`, which the maps cover."""
    places = [
        PixelMap((one.shape[1] / size[0], one.shape[2] / size[1]), (0.0, 0.0)) for one in maps
    ]
    nothing = torch.zeros(0, dtype=torch.float64)
    return Side(size, maps, places, nothing, nothing)


def inside(side: Side, points: Tensor) -> Tensor:
    """bool [k]: points (y, x) that all of the maps cover."""
    grids = _grids(side, range(len(side.maps)))
    down, across = (covered_along(axis, points[:, axis], side.places, grids) for axis in (0, 1))
    return down & across


def searched(
    side: Side,
    column: Column,
    search: Literal["image", "input", "map"],
    input_: PixelMap,
    input_size: tuple[int, int],
) -> Side:
    """The side with the candidates of a column: those that all of its maps cover. `input_` is from
    its points to the pixels of the backbone's input, of `input_size`."""
    chosen = [cell for cell, _ in column.parts]
    places, grids = [side.places[i] for i in chosen], _grids(side, chosen)
    if search == "image":
        ys, xs = middles(PixelMap((1.0, 1.0), (0.0, 0.0)), side.size)
    elif search == "input":
        ys, xs = middles(input_, input_size)
    else:
        finest = max(range(len(chosen)), key=lambda i: grids[i][0] * grids[i][1])
        ys, xs = middles(places[finest], grids[finest])
    found = []
    for axis, at in ((0, ys), (1, xs)):
        there = covered_along(axis, at, places, grids) & (at >= 0) & (at < side.size[axis])
        found.append(at[there])
    return replace(side, ys=found[0], xs=found[1])


def _grids(side: Side, chosen: Sequence[int] | range) -> list[tuple[int, int]]:
    return [(side.maps[i].shape[1], side.maps[i].shape[2]) for i in chosen]


def original_sizes(store: FeatureStore, rows: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Height and width of the images of rows, upright, from their first bytes in the tars.

    Raises:
        InputError: an image that does not say its size; tars that are gone or changed.
    """
    chosen = replace(store.index, table=store.index.table.take(list(rows)))
    found = {}
    for row, size in zip(rows, read_sizes(chosen), strict=True):
        if size is None:
            raise InputError(f"row {row} of {store.url}: its image does not say its size")
        found[row] = size
    return found
