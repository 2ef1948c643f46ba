"""Mirroring and cropping an image and its feature maps alike (iREPA, dense distillation, RCDM).

What is exact: the same geometric operation on both. A crop starts and ends on the borders of cells
of every map, so a cell goes on meaning the pixels that it lay over. What is not: the map of a
mirrored image is near to the mirrored map and not equal to it, and a cell of a cropped map has seen
what was cropped away. Where that matters store views (`images.views`) and draw one of them.

Shapes: b rows, h w height and width of a map, c channel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from drl_data.draws import uniform
from drl_data.errors import SpecError
from drl_data.spec import ArraySpec


@dataclass(frozen=True)
class Augment:
    """Random mirroring and cropping, functions of (seed, epoch, row); the same for all views.

    `flip`: probability of mirroring left to right. `crop`: height and width in pixels of the part
    that is kept, at a random place on the grid. `grids` gives height and width of arrays whose rows
    are tokens (of the image only, in reading order): `{"layernorm@out": (16, 16)}`. Arrays without
    space, such as pooled ones, stay as they are.
    """

    flip: float = 0.5
    crop: tuple[int, int] | None = None
    grids: Mapping[str, tuple[int, int]] = field(default_factory=dict)


class Moves(NamedTuple):
    """What was done to each row: mirrored after the crop, bool [b]; corner (top, left) of the crop
    in pixels, int64 [b, 2]."""

    flipped: torch.Tensor
    corner: torch.Tensor


class Geometry:
    """An augmentation for arrays of known shapes."""

    def __init__(
        self, augment: Augment, arrays: Mapping[str, ArraySpec], size: tuple[int, int], seed: int
    ) -> None:
        """`size`: height and width of the pixels that the maps cover.

        Raises:
            SpecError: tokens without a grid; a crop that is not on the grid.
        """
        if not 0 <= augment.flip <= 1:
            raise SpecError(f"Augment: flip={augment.flip}; want a probability")
        unknown = sorted(augment.grids.keys() - arrays.keys())
        if unknown:
            raise SpecError(f"Augment: grids of {unknown}; the taps are {list(arrays)}")
        self._flip, self._seed, self._size = augment.flip, seed, size
        self._grids = {
            name: grid
            for name, array in arrays.items()
            if (grid := _grid(name, array, augment.grids)) is not None
        }
        self._arrays = arrays
        self._step = tuple(
            size[axis] // math.gcd(size[axis], *(grid[axis] for grid in self._grids.values()))
            for axis in (0, 1)
        )
        self._crop = augment.crop if augment.crop is not None else size
        for crop, whole, step in zip(self._crop, size, self._step, strict=True):
            if not 0 < crop <= whole or crop % step:
                raise SpecError(
                    f"Augment: crop {list(self._crop)} of {list(size)} pixels; want multiples of "
                    f"{list(self._step)}, where cells of all maps {self._grids} have borders"
                )

    def moves(self, rows: npt.NDArray[np.int64], epoch: int) -> Moves:
        """What is done to these rows in an epoch."""
        corner = []
        for axis, purpose in ((0, "top"), (1, "left")):
            step = self._step[axis]
            n_places = (self._size[axis] - self._crop[axis]) // step + 1
            u = uniform(self._seed, epoch, rows, "top" if purpose == "top" else "left")
            corner.append((u * n_places).astype(np.int64) * step)
        flipped = uniform(self._seed, epoch, rows, "flip") < self._flip
        return Moves(torch.from_numpy(flipped), torch.from_numpy(np.stack(corner, axis=1)))

    def pixels(self, x: torch.Tensor, moves: Moves) -> torch.Tensor:
        """Pixels [b, ..., h, w]."""
        return self._moved(x, x.ndim - 2, self._size, moves)

    def features(self, name: str, x: torch.Tensor, moves: Moves) -> torch.Tensor:
        """Features [b, ..., *shape] of a tap; the same tensor if it has no space."""
        grid = self._grids.get(name)
        if grid is None:
            return x
        array = self._arrays[name]
        lead = x.ndim - len(array.shape)
        if "token" not in array.dims:
            return self._moved(x, lead + array.dims.index("height"), grid, moves)
        axis = lead + array.dims.index("token")
        map_ = x.reshape(*x.shape[:axis], *grid, *x.shape[axis + 1 :])
        return self._moved(map_, axis, grid, moves).flatten(axis, axis + 1)

    def _moved(
        self, x: torch.Tensor, axis: int, grid: tuple[int, ...], moves: Moves
    ) -> torch.Tensor:
        """Each row's part of a grid whose height is at `axis` and whose width comes after."""
        scale = [(grid[i], self._size[i]) for i in (0, 1)]
        height, width = (self._crop[i] * cells // pixels for i, (cells, pixels) in enumerate(scale))
        shape = list(x.shape)
        shape[axis : axis + 2] = [height, width]
        out = x.new_empty(shape)
        corners = moves.corner.tolist()
        for i, (corner, flipped) in enumerate(zip(corners, moves.flipped.tolist(), strict=True)):
            top, left = (corner[j] * cells // pixels for j, (cells, pixels) in enumerate(scale))
            part = x[i].narrow(axis - 1, top, height).narrow(axis, left, width)
            out[i] = part.flip(axis) if flipped else part
        return out


def _grid(
    name: str, array: ArraySpec, grids: Mapping[str, tuple[int, int]]
) -> tuple[int, int] | None:
    """Height and width of the array's maps; None if it has no space."""
    if "height" in array.dims and "width" in array.dims:
        at = array.dims.index("height")
        if array.dims[at + 1 : at + 2] != ("width",):
            raise SpecError(
                f"Augment: {name!r} has the axes {array.dims}; want height before width"
            )
        return array.shape[at], array.shape[at + 1]
    if "token" not in array.dims:
        return None
    n_tokens = array.shape[array.dims.index("token")]
    if name not in grids or math.prod(grids[name]) != n_tokens:
        raise SpecError(
            f"Augment: {name!r} has {n_tokens} tokens and the grid {grids.get(name)}; want "
            f"grids={{{name!r}: (height, width)}} whose product is {n_tokens} (store an encoder's "
            "tokens without its class token)"
        )
    return grids[name]
