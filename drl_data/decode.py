"""One image's bytes to pixels: decode, orient, composite, resize, crop; hostile bytes cost one row.

Shape suffixes: h height, w width, c channel, f frame; pixels are uint8 [c, h, w], of a window of a
video [c, f, h, w].
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from types import ModuleType

import numpy as np
from PIL import GifImagePlugin, Image, ImageFile, PngImagePlugin, TiffImagePlugin

from drl_data.errors import ImageError, InputError
from drl_data.fitting import FILTERS, check_n_pixels, fitted
from drl_data.objects import Buffer
from drl_data.spec import CropViews, ImageSpec, PaddedCropViews
from drl_data.views import padded_crop, seeded_crop

MAX_SCANS = 500
"""Scans of a progressive JPEG (encoders write about ten): each costs a pass over all pixels."""

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
_ORIENTATION_TAG = 0x0112
_TILE_TAGS = 322, 323
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: Buffer, spec: ImageSpec) -> np.ndarray:
    """Pixels uint8 [c, h, w], C-contiguous, of one JPEG, PNG, WebP, BMP, TIFF or GIF.

    In this order: EXIF orientation, 16 bits to 8 (65535 to 255, rounded), `background` under
    transparent pixels, RGB or L, resize, centre crop or padding. Of an animation the first frame;
    if the spec wants several, the first ones, [c, f, h, w].

    Raises:
        ImageError: at stage `decode`, whatever is wrong with these bytes.
    """
    (pixels,) = _decode(data, spec, lambda image: [_as_chw(fitted(image, spec), spec)])
    return np.ascontiguousarray(pixels)


def displayed_size(data: Buffer) -> tuple[int, int]:
    """Height and width of an image as it is shown, from its first bytes; no pixel is decoded.

    Raises:
        ImageError: at stage `decode`, if these bytes do not say it.
    """
    _check_pillow()
    try:
        image = _open(data)
        sideways = image.getexif().get(_ORIENTATION_TAG, 1) in range(5, 9)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # a decoder may raise anything on hostile or cut bytes
        raise ImageError("decode", _one_line(error)) from error
    return (image.width, image.height) if sideways else (image.height, image.width)


def decode_views(data: Buffer, spec: ImageSpec, key: str) -> np.ndarray:
    """Pixels uint8 [view, *spec.shape] of the views that the spec names, of one decoded image.

    Raises:
        ImageError: as `decode_image`.
    """
    return _decode(data, spec, lambda image: list(_views(image, spec, key)))


def _decode(
    data: Buffer, spec: ImageSpec, finish: Callable[[Image.Image], list[np.ndarray]]
) -> np.ndarray:
    """What `finish` makes of each frame, [*, c, h, w], joined to [*, *spec.shape]."""
    _check_pillow()
    try:
        image = _open(data)
        check_n_pixels((image.height, image.width), spec)
        frames = [np.stack(finish(frame)) for frame in _frames(image, spec)]
        return frames[0] if spec.frames == 1 else np.stack(frames, axis=2)
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        if Image.MAX_IMAGE_PIXELS == _MAX_IMAGE_PIXELS and spec.max_pixels <= 2 * _MAX_IMAGE_PIXELS:
            raise ImageError("decode", _one_line(error)) from error
        raise InputError(
            f"PIL.Image.MAX_IMAGE_PIXELS is {Image.MAX_IMAGE_PIXELS} in this process, which "
            f"refuses an image that images.max_pixels {spec.max_pixels} may allow; set it to None"
        ) from error
    except Warning as error:
        raise InputError(
            f"{_one_line(error)}: warnings are errors in this process (-W error, PYTHONWARNINGS), "
            "which refuses images that are valid elsewhere; let them be warnings"
        ) from error
    except Exception as error:  # a decoder may raise anything on hostile bytes: this row's fault
        raise ImageError("decode", _one_line(error)) from error


_MAX_IMAGE_PIXELS = 89_478_485
_PILLOW: tuple[tuple[ModuleType, str, object], ...] = (
    (ImageFile, "LOAD_TRUNCATED_IMAGES", False),
    (PngImagePlugin, "MAX_TEXT_CHUNK", 1 << 20),
    (PngImagePlugin, "MAX_TEXT_MEMORY", 64 << 20),
    (GifImagePlugin, "LOADING_STRATEGY", GifImagePlugin.LoadingStrategy.RGB_AFTER_FIRST),
)
"""Settings of a process that decide which bytes are an image, with their values of Pillow's."""


def _check_pillow() -> None:
    """Pixels depend on bytes and spec alone, so settings that change them are refused.

    Raises:
        InputError: naming the setting.
    """
    for module, name, want in _PILLOW:
        if getattr(module, name) != want:
            raise InputError(
                f"{module.__name__}.{name} is {getattr(module, name)!r} in this process, want "
                f"{want!r}: other images would be valid than in other processes; set it back"
            )


def _frames(image: Image.Image, spec: ImageSpec) -> Iterator[Image.Image]:
    """The first frames of an image, upright and in the mode of the spec; later ones are not even
    counted."""
    for number in range(spec.frames):
        if spec.frames > 1:
            try:
                image.seek(number)
            except EOFError as error:
                raise ImageError(
                    "decode", f"{number} frames, want {spec.frames} or more (images.frames)"
                ) from error
            # pages of a TIFF have their own sizes
            check_n_pixels((image.height, image.width), spec)
        _check_tiles(image, spec)
        image.load()
        yield _flattened(_upright(image), spec)


def _check_tiles(image: Image.Image, spec: ImageSpec) -> None:
    """A TIFF's decoder makes room for a whole tile, which may be larger than the image."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        width, height = (image.tag_v2.get(tag, 1) for tag in _TILE_TAGS)
        check_n_pixels((int(height), int(width)), spec)


def _as_chw(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    pixels_hwc = np.asarray(image).reshape(*spec.size, spec.n_channels)
    return np.ascontiguousarray(pixels_hwc.transpose(2, 0, 1))


def _views(image: Image.Image, spec: ImageSpec, key: str) -> Iterator[np.ndarray]:
    whole: Image.Image | None = None
    for view in spec.views:
        if isinstance(view, CropViews):
            for number in range(view.n):
                crop = seeded_crop(image, spec.size, FILTERS[spec.filter], view, number, key)
                yield _as_chw(crop, spec)
            continue
        whole = fitted(image, spec) if whole is None else whole
        if isinstance(view, PaddedCropViews):
            for number in range(view.n):
                yield _as_chw(padded_crop(whole, view, number, key), spec)
        else:
            pixels = _as_chw(whole, spec)
            yield pixels if view == "id" else pixels[..., ::-1]


def _one_line(error: Exception) -> str:
    """The same for the same bytes: receipts hold it, so no addresses of objects."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return re.sub(r" at 0x[0-9a-f]+", "", text)[:300]


def _open(data: Buffer) -> Image.Image:
    """As `Image.open`, but without its process-wide limit of pixels, and no other formats."""
    if not len(data):
        raise ImageError("decode", "0 bytes; want an image")
    Image.preinit()
    if not all(name in Image.OPEN for name in _FORMATS):
        Image.init()
    prefix = bytes(data[:16])
    for name in _FORMATS:
        factory, accept = Image.OPEN[name]
        if accept is not None and accept(prefix) is True:
            if name == "JPEG":
                _check_scans(data)
            return factory(io.BytesIO(data), "")
    raise ImageError(
        "decode", f"begins with {prefix!r}, which is none of {', '.join(_FORMATS)}; convert it"
    )


def _check_scans(data: Buffer) -> None:
    # Pixels never hold this marker; metadata may, so a picture inside of it counts too.
    n_scans = bytes(data).count(b"\xff\xda")
    if n_scans > MAX_SCANS:
        raise ImageError("decode", f"a JPEG of {n_scans} scans, want at most {MAX_SCANS}")


def _upright(image: Image.Image) -> Image.Image:
    """EXIF orientation applied; EXIF that cannot be read says nothing, as in every viewer."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # Pillow's parser raises many kinds; the pixels are still good
        return image
    method = _TRANSPOSES.get(orientation)
    return image if method is None else image.transpose(method)


def _flattened(image: Image.Image, spec: ImageSpec) -> Image.Image:
    """Opaque, 8 bits, in the mode of the spec."""
    if image.mode.startswith("I;16"):
        image = _eight_bits(image)
    elif image.mode in ("I", "F"):
        raise ImageError(
            "decode",
            f"32-bit pixels (mode {image.mode}) have no defined range; convert to 8 or 16 bits",
        )
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (*spec.background, 255))
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    return image.convert(spec.mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey to L, or to LA if one value is declared transparent."""
    values = np.asarray(image).astype(np.uint32)
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return grey
    alpha = Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
    return Image.merge("LA", (grey, alpha))
