"""Warps whose truth is known: of points, of images, and those that a map can bear exactly.

Points are continuous (y, x) in pixels: pixel i covers [i, i + 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from drl_data.correspond_spec import WarpCheckSpec
from drl_data.spec import CropViews, ImageSpec, PaddedCropViews
from drl_data.views import padded_corner, seeded_box

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Warp:
    """target = matrix @ (y, x, 1), into an image of `size` (height, width)."""

    matrix: Matrix
    """[2, 3]."""
    size: tuple[int, int]

    def __call__(self, points: Tensor) -> Tensor:
        """Where points float64 [k, 2] come to lie."""
        matrix = torch.from_numpy(self.matrix)
        return points @ matrix[:, :2].T + matrix[:, 2]

    def then(self, other: Warp) -> Warp:
        """This one first, then the other."""
        both = np.vstack([other.matrix, [0, 0, 1]]) @ np.vstack([self.matrix, [0, 0, 1]])
        return Warp(both[:2], other.size)

    def image(self, image: Image.Image) -> Image.Image:
        """The warped image, bicubic, black where nothing of it is."""
        back = np.linalg.inv(np.vstack([self.matrix, [0, 0, 1]]))
        # Pillow wants (x, y) of the source from (x, y) of the target.
        (d, e, f), (a, b, c) = back[0, [1, 0, 2]], back[1, [1, 0, 2]]
        return image.transform(
            self.size[::-1],
            Image.Transform.AFFINE,
            (a, b, c, d, e, f),
            resample=Image.Resampling.BICUBIC,
        )


def affine(
    matrix: list[list[float]], size: tuple[int, int], target: tuple[int, int] | None = None
) -> Warp:
    """A warp about the middle of an image of `size`, to that of one of `target` (the same)."""
    target = target or size
    linear = np.array(matrix, np.float64)
    middle, goal = (np.array(s, np.float64) / 2 for s in (size, target))
    return Warp(np.column_stack([linear, goal - linear @ middle]), target)


def identity(size: tuple[int, int]) -> Warp:
    """Nothing moves."""
    return affine([[1, 0], [0, 1]], size)


def mirrored(size: tuple[int, int]) -> Warp:
    """Left to right."""
    return affine([[1, 0], [0, -1]], size)


def turned(size: tuple[int, int]) -> Warp:
    """A quarter turn, counter-clockwise, as torch.rot90."""
    return affine([[0, -1], [1, 0]], size, (size[1], size[0]))


EXACT: dict[str, tuple[Callable[[tuple[int, int]], Warp], Callable[[Tensor], Tensor]]] = {
    "identity": (identity, lambda x: x),
    "mirrored map": (mirrored, lambda x: x.flip(2)),
    "turned map": (turned, lambda x: x.rot90(1, (1, 2))),
}
"""Warps that are exact on a map [c, h, w] too, however coarse it is."""


def computed_warps(spec: WarpCheckSpec, size: tuple[int, int]) -> dict[str, Warp]:
    """Warps of images, whose features the backbone has to compute."""
    angle = math.radians(spec.degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    moved = identity(size)
    shift = np.rint(np.array(size) * spec.shift)[:, None]
    warps = {
        "shift": Warp(moved.matrix + np.hstack([np.zeros((2, 2)), shift]), size),
        "rotate": affine([[cos, -sin], [sin, cos]], size),
        "rotate90": affine([[0, -1], [1, 0]], size),
        "zoom": affine([[spec.scale, 0], [0, spec.scale]], size),
    }
    return {name: warps[name] for name in spec.computed}


def view_warp(
    images: ImageSpec, view: str, key: str, original: tuple[int, int], fitted: Warp
) -> Warp:
    """From the backbone's input to its view of that name: mirrored, or a seeded crop.

    `original` is height and width of the original image, `fitted` where its points are in the
    input.
    """
    if view == "id":
        return identity(images.size)
    if view == "hflip":
        return mirrored(images.size)
    height, width = images.size
    for one in images.views:
        if isinstance(one, str):
            continue
        kind = "crop" if isinstance(one, CropViews) else "padded"
        for number in range(one.n):
            if view != f"{kind}-{one.seed}-{number}":
                continue
            if isinstance(one, PaddedCropViews):
                left, top, flip = padded_corner(one, number, key)
                shift = [[1, 0, one.padding - top], [0, 1, one.padding - left]]
                moved = Warp(np.array(shift, np.float64), images.size)
            else:
                (left, top, right, bottom), flip = seeded_box(original[::-1], one, number, key)
                scale = height / (bottom - top), width / (right - left)
                crop = [[scale[0], 0, -top * scale[0]], [0, scale[1], -left * scale[1]]]
                moved = _inverse(fitted, original).then(
                    Warp(np.array(crop, np.float64), images.size)
                )
            return moved.then(mirrored(images.size)) if flip else moved
    raise AssertionError(f"a view that the spec does not name: {view}")


def _inverse(warp: Warp, size: tuple[int, int]) -> Warp:
    back = np.linalg.inv(np.vstack([warp.matrix, [0, 0, 1]]))
    return Warp(back[:2], size)
