"""Values of feature maps between their cells, at any positions: `F.interpolate`'s bilinear.

Positions are continuous, in cells: cell i covers [i, i + 1). At `upsampled` positions the values
are those of `F.interpolate(mode="bilinear", align_corners=False)`, which DDPM-Seg and DIFT call,
without making the upsampled map.

Shapes: c channel, h w cells of a map, n positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Neighbours(NamedTuple):
    """Of each position along one axis: the cells on both sides, int64 [n], and the share of the
    second, float32 [n]."""

    low: Tensor
    high: Tensor
    share: Tensor


def upsampled(n_out: int, n_in: int) -> Tensor:
    """Positions float64 [n_out], in cells, of the middles of `n_out` pixels over `n_in` cells."""
    return (torch.arange(n_out, dtype=torch.float64) + 0.5) * (n_in / n_out)


def neighbours_of(at: Tensor, size: int) -> Neighbours:
    """The cells around positions; outside of the outermost middles their values go on."""
    source = (at.double() - 0.5).clamp(0, size - 1)
    low = source.floor().long().clamp(max=max(size - 2, 0))
    return Neighbours(low, (low + 1).clamp(max=size - 1), (source - low).float())


def corners(y: Tensor, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Four cells of each position (y, x), int64 [n, 4] in the flat map, and their weights, float32
    [n, 4], which add to 1."""
    rows, columns = neighbours_of(y, size[0]), neighbours_of(x, size[1])
    index, weight = [], []
    for row, down in ((rows.low, 1 - rows.share), (rows.high, rows.share)):
        for column, across in ((columns.low, 1 - columns.share), (columns.high, columns.share)):
            index.append(row * size[1] + column)
            weight.append(down * across)
    return torch.stack(index, 1), torch.stack(weight, 1)


def at_points(map_chw: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """float32 [n, c] at the positions (y, x)."""
    index, weight = corners(y, x, (map_chw.shape[1], map_chw.shape[2]))
    values = map_chw.flatten(1).float()[:, index.to(map_chw.device)]
    return (values * weight.to(map_chw.device)).sum(2).T


def on_grid(map_chw: Tensor, ys: Tensor, xs: Tensor) -> Tensor:
    """float32 [c, len(ys), len(xs)] at every pair of positions."""
    device = map_chw.device
    rows = neighbours_of(ys, map_chw.shape[1])
    columns = neighbours_of(xs, map_chw.shape[2])
    share = rows.share.to(device)[:, None]
    x = map_chw.float()
    lines = x[:, rows.low.to(device)] * (1 - share) + x[:, rows.high.to(device)] * share
    share = columns.share.to(device)
    low, high = columns.low.to(device), columns.high.to(device)
    return lines[:, :, low] * (1 - share) + lines[:, :, high] * share
