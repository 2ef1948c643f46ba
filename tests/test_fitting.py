"""Where the pixels of an image end up: what keypoint and mask heads read features by."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from drl_data.decode import decode_views
from drl_data.errors import ImageError, SpecError
from drl_data.fitting import PixelMap, fitted, pixel_map, place
from drl_data.pipeline import Pipeline
from drl_data.spec import ImageSpec

SIDES = st.integers(1, 60)
SIZES = st.tuples(SIDES, SIDES)
RESIZES = st.sampled_from(["shortest", "stretch", "pad"])


def images_of(size: tuple[int, int], resize: str, **fields: object) -> ImageSpec:
    return ImageSpec.model_validate({"size": size, "resize": resize, **fields})


@given(st.tuples(st.integers(8, 60), st.integers(8, 60)), st.integers(24, 60), RESIZES, st.data())
@settings(deadline=None, max_examples=100)
def test_a_spot_ends_up_where_the_map_says(
    size: tuple[int, int], side: int, resize: str, data: st.DataObject
) -> None:
    """The middle of mass of a bright spot, which symmetric filters leave in place."""
    height, width = size
    y, x = data.draw(st.integers(2, height - 3)), data.draw(st.integers(2, width - 3))
    pixels = np.zeros((height, width), np.uint8)
    pixels[y - 1 : y + 2, x - 1 : x + 2] = 255
    spec = images_of((side, side), resize, filter="bilinear")
    found = np.asarray(fitted(Image.fromarray(pixels).convert("RGB"), spec))[..., 0].astype(float)
    want = pixel_map(size, spec)(y + 0.5, x + 0.5)
    margins = [2.5 * scale for scale in pixel_map(size, spec).scale]
    inside = all(m < at < side - m for at, m in zip(want, margins, strict=True))
    if not inside or found.sum() < 255:
        return  # cropped, or nothing of it left
    weights = found / found.sum()
    got = [(weights.sum(axis) * (np.arange(side) + 0.5)).sum() for axis in (1, 0)]
    assert np.abs(np.subtract(got, want)).max() < 0.1


@given(SIZES, SIZES, RESIZES, SIZES, st.sampled_from(["id", "hflip"]))
@settings(deadline=None, max_examples=200)
def test_the_map_of_a_grid(
    size: tuple[int, int], target: tuple[int, int], resize: str, grid: tuple[int, int], view: str
) -> None:
    spec = images_of(target, resize)
    there = pixel_map(size, spec, grid, view=view)
    for point in ((0.0, 0.0), (0.5, 0.5), (float(size[0]), float(size[1]))):
        assert there.inverse(*there(*point)) == pytest.approx(point, abs=1e-6)
    # The middle of the image is that of the grid, but for half a pixel where the rest is odd.
    middle = there(size[0] / 2, size[1] / 2)
    half = [0.5 * g / t + 1e-9 for g, t in zip(grid, target, strict=True)]
    assert all(abs(m - g / 2) <= h for m, g, h in zip(middle, grid, half, strict=True))
    pixels = pixel_map(size, spec)
    ratio = [g / t for g, t in zip(grid, target, strict=True)]
    if view == "id":
        want = [r * p for r, p in zip(ratio, pixels(1, 2), strict=True)]
        assert there(1, 2) == pytest.approx(want)
    else:
        mirrored = pixel_map(size, spec, grid)(1, 2)
        assert there(1, 2) == pytest.approx((mirrored[0], grid[1] - mirrored[1]))


@given(SIZES, SIZES)
@settings(deadline=None, max_examples=200)
def test_padding_keeps_the_whole_image_and_its_aspect(
    size: tuple[int, int], target: tuple[int, int]
) -> None:
    placed = place(size, images_of(target, "pad"))
    scale = min(target[0] / size[0], target[1] / size[1])
    for axis in (0, 1):
        top, length = placed.corner[axis], placed.size[axis]
        assert 0 <= top <= top + length <= target[axis]
        assert length == max(round(size[axis] * scale), 1)
    assert any(p == t for p, t in zip(placed.size, target, strict=True))


def test_known_maps() -> None:
    """SPair's photographs of 375 x 500 for SD at 960 (sd-dino) and its 60 x 60 features."""
    spec = images_of((960, 960), "pad", filter="lanczos")
    assert pixel_map((375, 500), spec) == PixelMap((1.92, 1.92), (120.0, 0.0))
    assert pixel_map((375, 500), spec, (60, 60)) == PixelMap((0.12, 0.12), (7.5, 0.0))
    assert pixel_map((375, 500), spec, (60, 60), view="hflip") == PixelMap(
        (0.12, -0.12), (7.5, 60.0)
    )
    assert pixel_map((300, 600), images_of((150, 150), "shortest")) == PixelMap(
        (0.5, 0.5), (0.0, -75.0)
    )
    with pytest.raises(ImageError, match="400 x 500 pixels, want 64 x 80"):
        pixel_map((400, 500), images_of((64, 80), "none"))


@pytest.mark.parametrize(
    ("size", "resized", "corner"),
    [
        # Resize(256) makes the longer side int(256 * long / short); CenterCrop(224) begins at
        # round((side - 224) / 2), which Python rounds to even
        ((480, 640), (256, 341), (-16, -58)),
        ((640, 480), (341, 256), (-58, -16)),
        ((333, 500), (256, 384), (-16, -80)),
        ((224, 224), (256, 256), (-16, -16)),
        ((100, 101), (256, 258), (-16, -17)),
    ],
)
def test_a_shorter_side_is_torchvisions(
    size: tuple[int, int], resized: tuple[int, int], corner: tuple[int, int]
) -> None:
    spec = ImageSpec(size=224, shorter_side=256)
    placed = place(size, spec)
    assert (placed.size, placed.corner) == (resized, corner)
    height, width = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    top, left = -corner[0], -corner[1]
    want = image.resize(resized[::-1], Image.Resampling.BICUBIC)
    want = want.crop((left, top, left + 224, top + 224))
    assert np.array_equal(np.asarray(fitted(image, spec)), np.asarray(want))


def test_a_shorter_side_must_cover_the_size() -> None:
    with pytest.raises(ValueError, match="shorter_side 200: less than size"):
        ImageSpec(size=224, shorter_side=200)
    with pytest.raises(ValueError, match="shorter_side belongs to resize: shortest"):
        ImageSpec(size=224, shorter_side=256, resize="stretch")


def test_a_mirrored_view_has_the_mirrored_map() -> None:
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[4:8, 8:12] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    spec = images_of((40, 40), "pad", views=["id", "hflip"], filter="box")
    views = decode_views(buffer.getvalue(), spec, "key")
    for view, name in zip(views, ("id", "hflip"), strict=True):
        y, x = pixel_map((20, 40), spec, view=name)(6, 10)
        rows, columns = np.nonzero(view[0])
        assert (rows.mean() + 0.5, columns.mean() + 0.5) == (y, x)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({"size": 8, "fill": "edge"}, "fill has a meaning with resize: pad only, not shortest"),
        ({"size": 8, "resize": "pad", "fill": (0, 0, 300)}, "less than or equal to 255"),
        ({"size": 8, "resize": "pad", "fill": "zero"}, "fill"),
    ],
)
def test_fills_that_mean_nothing(images: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Pipeline.parse({"name": "x", "dataset": {"tars": "a.tar"}, "images": images})
