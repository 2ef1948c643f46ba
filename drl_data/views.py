"""Seeded random crops of an image: views of it that are the same wherever they are computed."""

from __future__ import annotations

import hashlib
import math
import random

from PIL import Image, ImageOps

from drl_data.spec import CropViews, PaddedCropViews

_TRIES = 10


def seeded_crop(
    image: Image.Image,
    size: tuple[int, int],
    resample: Image.Resampling,
    view: CropViews,
    number: int,
    key: str,
) -> Image.Image:
    """A random part of the image, resized to `size` (height, width) and perhaps mirrored.

    A function of the image and of (view.seed, number, key): the generator is Python's, which is
    specified, seeded by a BLAKE2b digest.
    """
    box, flip = seeded_box(image.size, view, number, key)
    cropped = image.resize((size[1], size[0]), resample, box=box)
    return cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else cropped


def seeded_box(
    size: tuple[int, int], view: CropViews, number: int, key: str
) -> tuple[tuple[int, int, int, int], bool]:
    """What `seeded_crop` cuts of an image of `size` (width, height): (left, top, right, bottom),
    and whether it is mirrored then."""
    generator = _generator("crop", view.seed, number, key)
    box = crop_box(size, view, generator)
    return box, view.flip and generator.random() < 0.5


def padded_crop(image: Image.Image, view: PaddedCropViews, number: int, key: str) -> Image.Image:
    """The image moved by up to `view.padding` pixels each way over black, and perhaps mirrored.

    A function of the image and of (view.seed, number, key), as `seeded_crop`.
    """
    left, top, flip = padded_corner(view, number, key)
    padded = ImageOps.expand(image, view.padding)
    cropped = padded.crop((left, top, left + image.width, top + image.height))
    return cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else cropped


def padded_corner(view: PaddedCropViews, number: int, key: str) -> tuple[int, int, bool]:
    """Left and top of what `padded_crop` cuts of the padded image, and whether it is mirrored."""
    generator = _generator("padded", view.seed, number, key)
    left, top = (generator.randint(0, 2 * view.padding) for _ in range(2))
    return left, top, view.flip and generator.random() < 0.5


def _generator(kind: str, seed: int, number: int, key: str) -> random.Random:
    name = f"{kind}\x1f{seed}\x1f{number}\x1f{key}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(name, digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "little"))


def crop_box(
    size: tuple[int, int], view: CropViews, generator: random.Random
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) within `size` (width, height): ten tries of area and aspect, then
    the largest centred part of an allowed aspect (torchvision's RandomResizedCrop.get_params)."""
    width, height = size
    low, high = view.aspect
    for _ in range(_TRIES):
        area = generator.uniform(*view.area) * width * height
        aspect = math.exp(generator.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = generator.randint(0, width - w), generator.randint(0, height - h)
            return left, top, left + w, top + h
    w = max(min(width, round(height * high)), 1)
    h = max(min(height, round(width / low)), 1)
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
