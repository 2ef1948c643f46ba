"""Cells of a store as maps: (tap, timestep) of an image, [c, h, w], also where its rows are tokens.

Shapes: b images, c channel, h w height and width of a map.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from drl_data.datasets import read_features
from drl_data.errors import SpecError
from drl_data.spec import ArraySpec
from drl_data.store import FeatureStore

Grids = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class MapCell:
    """One tap at one timestep, in one view; `timestep` is None where the tap has none."""

    store: FeatureStore
    tap: str
    timestep: float | None
    time_index: int
    view: int
    grid: tuple[int, int]
    """Height and width."""
    n_channels: int
    prefix: str = ""
    """Name of the store, where there are several."""

    @property
    def name(self) -> str:
        """`TAP at TIMESTEP`."""
        tap = f"{self.prefix}/{self.tap}" if self.prefix else self.tap
        return tap if self.timestep is None else f"{tap} at {self.timestep:g}"

    @property
    def bytes_per_row(self) -> int:
        """Bytes of a map as it is stored."""
        return self.store.array(self.tap).bytes_per_row

    def read(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> Tensor:
        """Maps [b, c, h, w] of valid rows, in the type that they are stored in (quantised ones in
        float32)."""
        array = self.store.array(self.tap)
        x = read_features(self.store, self.tap, self.time_index, rows, self.view)
        if "token" in array.dims:
            x = x.movedim(1 + array.dims.index("token"), -1)
        return x.reshape(len(x), self.n_channels, *self.grid)


def map_cells(
    store: FeatureStore,
    task: str,
    *,
    taps: Sequence[str] = (),
    timesteps: Sequence[float] = (),
    grids: Grids | None = None,
    view: str | None = None,
    prefix: str = "",
) -> list[MapCell]:
    """The cells asked for, by timestep and within it by tap, as DDPM-Seg concatenates them; without
    `taps` all that have a grid, without `timesteps` all of the store. Those of taps that have one
    entry for all timesteps come first.

    Raises:
        TapError: the store has no such tap, timestep or view.
        SpecError: a tap without a grid, or no tap with one.
    """
    grids = dict(grids or {})
    for name in grids:
        store.array(name)
    named = [store.array(tap) for tap in taps]
    arrays = named or [a for a in store.features if _grid(a, grids) is not None]
    if not arrays:
        have = ", ".join(f"{a.name} ({', '.join(a.dims)})" for a in store.features)
        raise SpecError(f"{task}: no tap of {store.url} is a map; it has {have}")
    times = [store.time_index(t) for t in timesteps] or list(range(len(store.times)))
    position = store.view_index(view)
    cells: list[MapCell] = []
    for array in arrays:
        if array.timesteps != "each":
            cells.append(_cell(store, array, None, position, grids, task, prefix))
    for t in times:
        for array in arrays:
            if array.timesteps == "each":
                cells.append(_cell(store, array, t, position, grids, task, prefix))
    return cells


def _cell(
    store: FeatureStore,
    array: ArraySpec,
    t: int | None,
    view: int,
    grids: Grids,
    task: str,
    prefix: str,
) -> MapCell:
    grid = _grid(array, grids)
    if grid is None:
        raise SpecError(
            f"{task}: {array.name!r} has the axes {', '.join(array.dims)} of "
            f"{'x'.join(map(str, array.shape))}; want a map (channel, height, width), or tokens "
            f"that are a grid: {task}.grids: {{{array.name}: [height, width]}}, stored without "
            "class token and not of a video"
        )
    n_channels = math.prod(array.shape) // math.prod(grid)
    requested = None if t is None else store.times[t].requested
    return MapCell(store, array.name, requested, t or 0, view, grid, n_channels, prefix)


def _grid(array: ArraySpec, grids: Grids) -> tuple[int, int] | None:
    """Height and width of a tap's maps; None if it has none."""
    if "frame" in array.dims or "channel" not in array.dims:
        return None
    if array.dims[-2:] == ("height", "width"):
        return array.shape[-2], array.shape[-1]
    if "token" not in array.dims:
        return None
    n_tokens = array.shape[array.dims.index("token")]
    if array.name in grids:
        grid = grids[array.name]
        return grid if math.prod(grid) == n_tokens else None
    side = math.isqrt(n_tokens)
    return (side, side) if side * side == n_tokens and side > 1 else None
