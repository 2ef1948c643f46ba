"""An image into the size of a spec, and where its pixels end up: for keypoints, boxes and masks.

Coordinates are continuous and pixel i covers [i, i + 1), so that the middle of the first pixel is
0.5; whoever counts middles as integers adds a half before and takes it off after.

Shapes: h w height and width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from drl_data.errors import ImageError
from drl_data.spec import ImageSpec

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class PixelMap:
    """out = scale * in + offset, each (y, x), from the pixels of an image to those of a grid.

    A point of the image that is outside of the grid has been cropped; a point of the grid that no
    point of the image has is padding.
    """

    scale: tuple[float, float]
    offset: tuple[float, float]

    def __call__(self, y: float, x: float) -> tuple[float, float]:
        """Where the point (y, x) of the image is in the grid."""
        return self.scale[0] * y + self.offset[0], self.scale[1] * x + self.offset[1]

    def inverse(self, y: float, x: float) -> tuple[float, float]:
        """Which point of the image is at (y, x) of the grid."""
        return (y - self.offset[0]) / self.scale[0], (x - self.offset[1]) / self.scale[1]


def pixel_map(
    size: tuple[int, int],
    images: ImageSpec,
    grid: tuple[int, int] | None = None,
    *,
    view: Literal["id", "hflip"] = "id",
) -> PixelMap:
    """From an image of `size` (height, width), upright, to the grid of its features.

    `grid` is height and width of a feature map, or of tokens, that covers the whole input;
    None for the input's own pixels. `view` is which of the views it is (crops draw their own
    boxes: views.py).

    Raises:
        ImageError: at stage `decode`, if such an image would be refused.
    """
    placed = place(size, images)
    grid = grid or images.size
    scale, offset = [], []
    for axis in (0, 1):
        to_grid = grid[axis] / images.size[axis]
        scale.append(placed.size[axis] / size[axis] * to_grid)
        offset.append(placed.corner[axis] * to_grid)
    if view == "hflip":
        scale[1], offset[1] = -scale[1], grid[1] - offset[1]
    return PixelMap((scale[0], scale[1]), (offset[0], offset[1]))


@dataclass(frozen=True)
class Placement:
    """Height and width that an image is resized to, and where its corner (top, left) then is in
    the input: negative where it is cropped, positive where it is padded."""

    size: tuple[int, int]
    corner: tuple[int, int]


def place(size: tuple[int, int], images: ImageSpec) -> Placement:
    """How an image of `size` (height, width) is fitted.

    Raises:
        ImageError: at stage `decode`, if `resize: none` wants another size, or the resized image
            would have more pixels than `max_pixels`.
    """
    height, width = images.size
    if images.shorter_side is not None:
        return _as_torchvision(size, images, images.shorter_side)
    if size == (height, width) or images.resize == "stretch":
        return Placement((height, width), (0, 0))
    if images.resize == "none":
        raise ImageError(
            "decode",
            f"{size[0]} x {size[1]} pixels, want {height} x {width} (images.resize: none)",
        )
    scales = height / size[0], width / size[1]
    if images.resize == "shortest":
        scaled_h, scaled_w = (round(side * max(scales)) for side in size)
    else:
        scaled_h, scaled_w = (max(round(side * min(scales)), 1) for side in size)
    check_n_pixels((scaled_h, scaled_w), images)  # one pixel by thousands grows by its aspect
    if images.resize == "shortest":
        corner = -((scaled_h - height) // 2), -((scaled_w - width) // 2)
    else:
        corner = (height - scaled_h) // 2, (width - scaled_w) // 2
    return Placement((scaled_h, scaled_w), corner)


def _as_torchvision(size: tuple[int, int], images: ImageSpec, shorter_side: int) -> Placement:
    """torchvision's Resize(shorter_side) and CenterCrop(size), to the pixel."""
    short = min(size)
    scaled_h, scaled_w = (int(shorter_side * side / short) for side in size)
    check_n_pixels((scaled_h, scaled_w), images)
    height, width = images.size
    corner = -round((scaled_h - height) / 2), -round((scaled_w - width) / 2)
    return Placement((scaled_h, scaled_w), corner)


def fitted(image: Image.Image, images: ImageSpec) -> Image.Image:
    """Resized and cropped, or padded, to exactly the size of the spec.

    Raises:
        ImageError: as `place`.
    """
    height, width = images.size
    placed = place((image.height, image.width), images)
    if image.size != placed.size[::-1]:
        image = image.resize(placed.size[::-1], FILTERS[images.filter])
    if placed.size == images.size:
        return image
    top, left = placed.corner
    if images.resize == "shortest":
        return image.crop((-left, -top, width - left, height - top))
    if images.fill == "edge":
        return _edge_padded(image, placed, images.size)
    colour = Image.new("RGB", (1, 1), images.fill).convert(images.mode)
    canvas = colour.resize((width, height))
    canvas.paste(image, (left, top))
    return canvas


def _edge_padded(image: Image.Image, placed: Placement, size: tuple[int, int]) -> Image.Image:
    rest = [
        (corner, whole - corner - side)
        for corner, whole, side in zip(placed.corner, size, placed.size, strict=True)
    ]
    pixels = np.asarray(image)
    return Image.fromarray(np.pad(pixels, [*rest, *[(0, 0)] * (pixels.ndim - 2)], mode="edge"))


def check_n_pixels(size: tuple[int, int], images: ImageSpec) -> None:
    """Raise ImageError if an image of `size` (height, width) is a bomb by the spec."""
    height, width = size
    if width * height > images.max_pixels:
        raise ImageError(
            "decode",
            f"{height} x {width} = {height * width} pixels, want at most {images.max_pixels}; "
            "raise images.max_pixels if it is no decompression bomb",
        )
