"""Nearest neighbours by cosine between the feature maps of two images, at any resolution.

DIFT upsamples the target's map to the image and takes the pixel whose vector has the largest
cosine, the first one of several in reading order. Here the upsampled map is never made: the product
with a vector is linear, so products of the cells are upsampled; the length of a vector between
cells follows from products of neighbouring cells. The cosines are the same up to rounding.

Shapes: k points, c channel, h w cells of a map, H W candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from drl_data.bilinear import Neighbours, at_points, neighbours_of, on_grid
from drl_data.fitting import PixelMap

BLOCK_BYTES = 128 << 20
"""Cosines that are in memory at once."""


@dataclass(frozen=True)
class Side:
    """One image of a pair: its maps, where its points are in them, and where matches may lie.

    Points are continuous positions (y, x) in the pixels of `size`: pixel i covers [i, i + 1).
    """

    size: tuple[int, int]
    maps: Sequence[Tensor]
    """[c, h, w] of each cell, on one device."""
    places: Sequence[PixelMap]
    """From points to positions in each map."""
    ys: Tensor
    xs: Tensor
    """float64: candidates are all pairs of them."""

    def vectors(self, cell: int, points: Tensor) -> Tensor:
        """Unit vectors float32 [k, c] at points float64 [k, 2]."""
        y, x = (_along(self.places[cell], axis, points[:, axis]) for axis in (0, 1))
        return F.normalize(at_points(self.maps[cell], y, x), dim=1)


class Matches(NamedTuple):
    """Where the points are found, float64 [k, 2] (y, x), and their cosines, float32 [k]."""

    points: Tensor
    cosine: Tensor


Parts = Sequence[tuple[int, float]]
"""(cell, weight) of what is concatenated after normalising; one cell alone has the weight 1."""


def match(source: Side, target: Side, points: Tensor, parts: Parts) -> Matches:
    """For each point of the source the candidate of the target with the largest cosine, the first
    in reading order if there are several.

    The cosine of concatenated unit vectors w_i u_i is the mean of their cosines by weights w_i².
    """
    vectors = [source.vectors(cell, points) for cell, _ in parts]
    total = sum(weight**2 for _, weight in parts)
    n, width = len(points), len(target.xs)
    step = max(BLOCK_BYTES // (16 * n * width), 1)
    best = torch.full((n,), -torch.inf)
    where = torch.zeros(n, dtype=torch.int64)
    scenes = [_Searched.of(target.maps[cell]) for cell, _ in parts]
    for start in range(0, len(target.ys), step):
        ys = target.ys[start : start + step]
        cosines: Tensor | None = None
        for vector, scene, (cell, weight) in zip(vectors, scenes, parts, strict=True):
            y = _along(target.places[cell], 0, ys)
            x = _along(target.places[cell], 1, target.xs)
            part = scene.cosines(vector, y, x) * (weight**2 / total)
            cosines = part if cosines is None else cosines + part
        assert cosines is not None  # there is at least one part
        flat = cosines.flatten(1)
        # torch says that argmax gives the first of equal values; so does `>` between blocks.
        at = flat.argmax(1)
        value = flat.gather(1, at[:, None])[:, 0].cpu()
        at = at.cpu() + start * width
        better = value > best
        best, where = torch.where(better, value, best), torch.where(better, at, where)
    found = torch.stack([target.ys[where // width], target.xs[where % width]], 1)
    return Matches(found, best)


@dataclass(frozen=True)
class _Searched:
    """A map with the products of its cells with themselves and their neighbours, each [h, w] or one
    less along an axis."""

    map_chw: Tensor
    own: Tensor
    right: Tensor
    down: Tensor
    diagonal: Tensor
    other: Tensor

    @classmethod
    def of(cls, map_chw: Tensor) -> _Searched:
        x = map_chw.float()
        _, h, w = x.shape
        x = x[:, list(range(h)) + [h - 1] * (h == 1)][:, :, list(range(w)) + [w - 1] * (w == 1)]
        return cls(
            map_chw,
            (x * x).sum(0),
            (x[:, :, :-1] * x[:, :, 1:]).sum(0),
            (x[:, :-1] * x[:, 1:]).sum(0),
            (x[:, :-1, :-1] * x[:, 1:, 1:]).sum(0),
            (x[:, :-1, 1:] * x[:, 1:, :-1]).sum(0),
        )

    def cosines(self, vectors_kc: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """[k, H, W] of unit vectors at positions in cells."""
        dots = (vectors_kc @ self.map_chw.float().flatten(1)).reshape(-1, *self.map_chw.shape[1:])
        return on_grid(dots, y, x) / self._lengths(y, x)

    def _lengths(self, y: Tensor, x: Tensor) -> Tensor:
        """[H, W]: of the vectors between cells."""
        h, w = self.map_chw.shape[1:]
        device = self.own.device
        rows = Neighbours(*(v.to(device) for v in neighbours_of(y, h)))
        columns = Neighbours(*(v.to(device) for v in neighbours_of(x, w)))
        down, across = rows.share[:, None], columns.share[None]
        up, left = 1 - down, 1 - across
        low_y, low_x = rows.low[:, None], columns.low[None]
        high_y, high_x = rows.high[:, None], columns.high[None]
        squares = (
            (up * left) ** 2 * self.own[low_y, low_x]
            + (up * across) ** 2 * self.own[low_y, high_x]
            + (down * left) ** 2 * self.own[high_y, low_x]
            + (down * across) ** 2 * self.own[high_y, high_x]
            + 2 * left * across * up**2 * self.right[low_y, low_x]
            + 2 * left * across * down**2 * self.right[high_y, low_x]
            + 2 * up * down * left**2 * self.down[low_y, low_x]
            + 2 * up * down * across**2 * self.down[low_y, high_x]
            + 2 * up * down * left * across * self.diagonal[low_y, low_x]
            + 2 * up * down * left * across * self.other[low_y, low_x]
        )
        return squares.clamp_min(0).sqrt().clamp_min(1e-12)  # as F.normalize


def middles(place: PixelMap, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Points (ys, xs) that are the middles of the cells of a grid."""
    found = []
    for axis in (0, 1):
        at = torch.arange(grid[axis], dtype=torch.float64) + 0.5
        found.append((at - place.offset[axis]) / place.scale[axis])
    return found[0], found[1]


def covered_along(
    axis: int, at: Tensor, places: Sequence[PixelMap], grids: Sequence[tuple[int, int]]
) -> Tensor:
    """bool [k]: coordinates along an axis that lie in all of the maps."""
    inside = torch.ones(len(at), dtype=torch.bool)
    for place, grid in zip(places, grids, strict=True):
        there = _along(place, axis, at)
        inside &= (there >= 0) & (there < grid[axis])
    return inside


def _along(place: PixelMap, axis: int, at: Tensor) -> Tensor:
    return at * place.scale[axis] + place.offset[axis]
