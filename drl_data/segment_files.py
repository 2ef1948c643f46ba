"""Predicted label maps as PNG files: numbers of classes, with colours to look at them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from drl_data.errors import SpecError
from drl_data.export_formats import whole
from drl_data.key_names import file_name


def palette() -> list[int]:
    """256 colours that differ, PASCAL VOC's: 0 is black, 255 a light grey."""
    colours = []
    for number in range(256):
        red = green = blue = 0
        rest = number
        for bit in range(7, -1, -1):
            red |= (rest & 1) << bit
            green |= (rest >> 1 & 1) << bit
            blue |= (rest >> 2 & 1) << bit
            rest >>= 3
        colours += [red, green, blue]
    return colours


def label_image(classes: npt.NDArray[np.int64]) -> Image.Image:
    """Classes [h, w] as an image whose values are they: with a palette, or 16 bits beyond 256; -1
    is 255 in the former."""
    if classes.max() > 255:
        return Image.fromarray(np.where(classes < 0, 65535, classes).astype(np.uint16))
    image = Image.fromarray(np.where(classes < 0, 255, classes).astype(np.uint8))
    image.putpalette(palette())
    return image


def png_path(folder: Path, key: str) -> Path:
    """Of one sample; the key is one name in the folder, whatever is in it."""
    return folder / f"{file_name(key)}.png"


def write_image(path: Path, image: Image.Image) -> None:
    """Written whole or not at all."""
    with whole(path) as temporary:
        image.save(temporary, "PNG", optimize=False)


def require_unique_keys(keys: list[str]) -> None:
    """Raise SpecError if two predictions would have one name."""
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise SpecError(
            f"segment: two samples are called {twice!r}, and their predictions would be one file; "
            "want keys that differ, or save_predictions: false"
        )
