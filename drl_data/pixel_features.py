"""Features of single pixels: gathered between the cells of maps, never whole upsampled maps.

What the published DDPM-Seg holds in memory is every pixel of every train image upsampled (2.2 GB an
image); here it is the pixels that were drawn, or the maps as stored, whichever is smaller.

Shapes: n pixels, c channel, h w cells of a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from drl_data.bilinear import at_points, corners, upsampled


class PixelFeatures(Protocol):
    """Features of numbered pixels."""

    @property
    def n_pixels(self) -> int:
        """How many there are."""

    @property
    def n_channels(self) -> int:
        """Numbers of one of them."""

    def take(self, pixels: Tensor) -> Tensor:
        """float32 [*pixels.shape, c] of these pixels (int64, of any shape), on the device."""


@dataclass(frozen=True)
class GatheredPixels:
    """The vectors of all pixels, in memory."""

    x_nc: Tensor

    @property
    def n_pixels(self) -> int:
        """Rows of the matrix."""
        return len(self.x_nc)

    @property
    def n_channels(self) -> int:
        """Its columns."""
        return self.x_nc.shape[1]

    def take(self, pixels: Tensor) -> Tensor:
        """As `PixelFeatures.take`."""
        return self.x_nc[pixels.to(self.x_nc.device)]


class MapPixels:
    """The maps of all images, in memory as they are stored; a pixel is gathered when it is asked
    for."""

    def __init__(self, device: str | torch.device, size: tuple[int, int]) -> None:
        """`size`: height and width of the images whose pixels these are."""
        self._device, self._size = device, size
        self._maps: list[list[Tensor]] = []
        self._flat: list[Tensor] = []
        self._grids: list[tuple[int, int]] = []
        self._image: list[Tensor] = []
        self._y: list[Tensor] = []
        self._x: list[Tensor] = []
        self._where = torch.zeros(3, 0, dtype=torch.int64)

    def add(self, maps: Sequence[Tensor], y: Tensor, x: Tensor) -> None:
        """One image: its maps [c, h, w], and rows and columns int64 [n] of its pixels."""
        if not self._grids:
            self._grids = [(one.shape[1], one.shape[2]) for one in maps]
            self._maps = [[] for _ in maps]
        for held, one in zip(self._maps, maps, strict=True):
            held.append(one.flatten(1).T.contiguous().to(self._device))
        self._image.append(torch.full_like(y, len(self._y)))
        self._y.append(y)
        self._x.append(x)

    def finish(self) -> None:
        """No more images come."""
        self._flat = [torch.cat(held) for held in self._maps]
        self._maps = []
        self._where = torch.stack([torch.cat(v) for v in (self._image, self._y, self._x)])

    @property
    def n_pixels(self) -> int:
        """Of all images."""
        return self._where.shape[1]

    @property
    def n_channels(self) -> int:
        """Of all maps."""
        return sum(flat.shape[1] for flat in self._flat)

    def take(self, pixels: Tensor) -> Tensor:
        """As `PixelFeatures.take`."""
        image, y, x = self._where[:, pixels.flatten().cpu()]
        found = []
        for flat, grid in zip(self._flat, self._grids, strict=True):
            index, weight = corners(
                upsampled(self._size[0], grid[0])[y], upsampled(self._size[1], grid[1])[x], grid
            )
            index = (index + image[:, None] * (grid[0] * grid[1])).to(flat.device)
            values = flat[index].float() * weight.to(flat.device)[..., None]
            found.append(values.sum(1))
        return torch.cat(found, 1).reshape(*pixels.shape, self.n_channels)


def gathered(maps: Sequence[Tensor], y: Tensor, x: Tensor, size: tuple[int, int]) -> Tensor:
    """float32 [n, c] of pixels (rows `y`, columns `x`) of one image of `size`, its maps upsampled
    to it and concatenated."""
    return torch.cat(
        [
            at_points(one, upsampled(size[0], one.shape[1])[y], upsampled(size[1], one.shape[2])[x])
            for one in maps
        ],
        1,
    )
