from __future__ import annotations

import contextlib
import io
import tarfile
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from drl_data import images as images_module
from drl_data.decode import decode_image
from drl_data.errors import ImageError, InputError
from drl_data.images import ImageBatch, read_batches
from drl_data.index import SampleIndex, build_index
from drl_data.objects import Folder, LocalFolder, open_folder
from drl_data.plan import InvalidRow, Unit
from drl_data.spec import DatasetSpec, ImageSpec
from tests.toy_tars import png, write_tar

RNG = np.random.default_rng(0)
GREEN = (10, 200, 30)


def spec_of(size: int | tuple[int, int] = 8, **fields: object) -> ImageSpec:
    return ImageSpec.model_validate({"size": size, **fields})


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def random_image(mode: str, height: int = 8, width: int = 8) -> Image.Image:
    n = len(mode) if mode != "L" else 1
    pixels = RNG.integers(0, 256, (height, width, n), dtype=np.uint8).squeeze(-1 if n == 1 else ())
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def chw(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


# --- formats and modes ----------------------------------------------------------------------------

LOSSLESS = {
    "PNG": {},
    "WEBP": {"lossless": True, "exact": True},
    "BMP": {},
    "TIFF": {"compression": "tiff_lzw"},
}


@pytest.mark.parametrize("format", LOSSLESS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_lossless_formats_give_back_every_pixel(format: str, mode: str) -> None:
    image = random_image(mode)
    if format == "WEBP":
        image = image.convert("RGB")
    got = decode_image(encode(image, format, **LOSSLESS[format]), spec_of(mode=mode))
    assert got.dtype == np.uint8
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, chw(image.convert(mode)))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_jpeg_is_what_pillow_decodes(mode: str, subsampling: int) -> None:
    data = encode(random_image(mode, 33, 47), "JPEG", quality=90, subsampling=subsampling)
    want = Image.open(io.BytesIO(data)).convert("RGB")
    got = decode_image(data, spec_of((33, 47), resize="none"))
    np.testing.assert_array_equal(got, chw(want))


def test_an_adobe_cmyk_jpeg_is_not_inverted() -> None:
    white = Image.new("CMYK", (8, 8), (0, 0, 0, 0))
    assert decode_image(encode(white, "JPEG", quality=100), spec_of()).min() >= 253


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(format: str) -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65280, 65534, 65535]], np.uint16).repeat(8, 0)
    data = encode(Image.fromarray(values), format)
    want = np.rint(values / 257).astype(np.uint8)
    np.testing.assert_array_equal(decode_image(data, spec_of(mode="L"))[0], want)
    np.testing.assert_array_equal(decode_image(data, spec_of()), np.stack([want] * 3))


def test_8_bits_written_as_16_come_back() -> None:
    values = np.arange(256, dtype=np.uint16).reshape(16, 16)
    data = encode(Image.fromarray(values * 257), "PNG")
    np.testing.assert_array_equal(decode_image(data, spec_of(16, mode="L"))[0], values)


def composite(image: Image.Image, background: tuple[int, int, int]) -> np.ndarray:
    """Float arithmetic, independent of Pillow's."""
    rgba = np.asarray(image.convert("RGBA")).astype(np.float64)
    alpha = rgba[..., 3:] / 255
    return (rgba[..., :3] * alpha + np.array(background) * (1 - alpha)).transpose(2, 0, 1)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("background", [(255, 255, 255), GREEN])
def test_alpha_is_composited(mode: str, background: tuple[int, int, int]) -> None:
    image = random_image(mode)
    got = decode_image(encode(image, "PNG"), spec_of(background=background))
    assert np.abs(got - composite(image, background)).max() <= 1


def test_palettes() -> None:
    image = random_image("RGB").quantize(16)
    got = decode_image(encode(image, "PNG"), spec_of())
    np.testing.assert_array_equal(got, chw(image.convert("RGB")))
    alphas = bytes(RNG.integers(0, 256, 16, dtype=np.uint8))
    data = encode(image, "PNG", transparency=alphas)
    palette = np.array(image.getpalette()).reshape(-1, 3)
    indices = np.asarray(image)
    rgba = np.dstack([palette[indices], np.frombuffer(alphas, np.uint8)[indices]])
    want = composite(Image.fromarray(rgba.astype(np.uint8)), GREEN)
    assert np.abs(decode_image(data, spec_of(background=GREEN)) - want).max() <= 1


@pytest.mark.parametrize(
    ("image", "transparency"),
    [
        (Image.new("L", (8, 8), 7), 7),
        (Image.new("RGB", (8, 8), (1, 2, 3)), (1, 2, 3)),
        (Image.fromarray(np.full((8, 8), 1000, np.uint16)), 1000),
        (Image.new("1", (8, 8), 0), 0),
    ],
)
def test_a_colour_declared_transparent(image: Image.Image, transparency: object) -> None:
    data = encode(image, "PNG", transparency=transparency)
    got = decode_image(data, spec_of(background=GREEN))
    np.testing.assert_array_equal(got, np.full((3, 8, 8), np.array(GREEN)[:, None, None]))
    opaque = decode_image(encode(image, "PNG"), spec_of(background=GREEN))
    assert (opaque != got).any()


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bit_pixels_are_refused(mode: str) -> None:
    with pytest.raises(ImageError, match=r"32-bit pixels.*no defined range"):
        decode_image(encode(Image.new(mode, (8, 8)), "TIFF"), spec_of())


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF"])
def test_animations_give_their_first_frame(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), c) for c in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert decode_image(data, spec_of())[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(format: str, orientation: int) -> None:
    image = random_image("RGB", 5, 9)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(image, format, exif=exif, **options)
    want = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    got = decode_image(data, spec_of((want.height, want.width), resize="none"))
    np.testing.assert_array_equal(got, chw(want))
    assert (want.height, want.width) == ((5, 9) if orientation < 5 else (9, 5))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning")
def test_exif_that_cannot_be_read_changes_nothing() -> None:
    data = encode(random_image("RGB"), "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xff")
    assert decode_image(data, spec_of()).shape == (3, 8, 8)


# --- resize and crop ------------------------------------------------------------------------------


def reference(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """The rule of ImageSpec in plain Pillow, for opaque 8-bit images."""
    height, width = spec.size
    image = image.convert(spec.mode)
    filter = Image.Resampling[spec.filter.upper()]
    if spec.resize == "stretch":
        return chw(image.resize((width, height), filter))
    if spec.resize == "pad":
        return padded(image, spec, filter)
    scale = max(width / image.width, height / image.height)
    large = image.resize(
        (max(width, round(image.width * scale)), max(height, round(image.height * scale))), filter
    )
    left, top = (large.width - width) // 2, (large.height - height) // 2
    return chw(large)[:, top : top + height, left : left + width]


def padded(image: Image.Image, spec: ImageSpec, filter: Image.Resampling) -> np.ndarray:
    """As sd-dino and GeoAware-SC do: the longer side to the target, the image in the middle."""
    height, width = spec.size
    scale = min(width / image.width, height / image.height)
    small = chw(
        image.resize((max(round(image.width * scale), 1), max(round(image.height * scale), 1)),
                     filter)
    )  # fmt: skip
    rest = height - small.shape[1], width - small.shape[2]
    sides = [(0, 0)] + [(n // 2, n - n // 2) for n in rest]
    if spec.fill == "edge":
        return np.pad(small, sides, mode="edge")
    inside = np.pad(np.ones_like(small, bool), sides)
    colour = chw(Image.new("RGB", (1, 1), spec.fill).convert(spec.mode))
    return np.where(inside, np.pad(small, sides), colour).astype(np.uint8)


@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    size=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    resize=st.sampled_from(["shortest", "stretch", "pad"]),
    fill=st.sampled_from(["edge", (0, 0, 0), (255, 3, 40)]),
    filter=st.sampled_from(["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]),
    mode=st.sampled_from(["RGB", "L"]),
)
@settings(deadline=None, max_examples=150)
def test_resize_and_crop(
    height: int,
    width: int,
    size: tuple[int, int],
    resize: str,
    fill: object,
    filter: str,
    mode: str,
) -> None:
    image = random_image("RGB", height, width)
    rest = {"fill": fill} if resize == "pad" else {}
    spec = spec_of(size, resize=resize, filter=filter, mode=mode, **rest)
    np.testing.assert_array_equal(decode_image(encode(image, "BMP"), spec), reference(image, spec))


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (2000, 7), (7, 2000)])
@pytest.mark.parametrize("resize", ["shortest", "stretch", "pad"])
def test_odd_shapes(shape: tuple[int, int], resize: str) -> None:
    image = random_image("RGB", *shape)
    spec = spec_of((16, 24), resize=resize)
    np.testing.assert_array_equal(decode_image(encode(image, "PNG"), spec), reference(image, spec))


def test_resize_none_demands_the_size() -> None:
    data = encode(random_image("RGB", 8, 9), "PNG")
    with pytest.raises(ImageError, match=r"8 x 9 pixels, want 8 x 8 \(images.resize: none\)"):
        decode_image(data, spec_of(resize="none"))


# --- images that are refused ----------------------------------------------------------------------


def bomb_png(width: int, height: int) -> bytes:
    """A header that promises pixels which are not there."""
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"

    def chunk(name: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(name + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + name + data + crc

    pixels = zlib.compress(bytes(100))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [20_000, 50_000, 2_000_000])
def test_bombs_are_refused_before_they_are_decoded(side: int) -> None:
    with pytest.raises(ImageError, match=rf"{side} x {side} = .*max_pixels"):
        decode_image(bomb_png(side, side), spec_of())


def test_max_pixels_is_the_only_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    data = encode(random_image("RGB"), "PNG")
    assert decode_image(data, spec_of(max_pixels=64)).shape == (3, 8, 8)
    with pytest.raises(ImageError, match="64 pixels, want at most 63"):
        decode_image(data, spec_of(max_pixels=63))


def test_an_aspect_that_explodes_is_refused() -> None:
    data = encode(random_image("L", 1, 3000), "PNG")
    with pytest.raises(ImageError, match="64 x 192000 = "):
        decode_image(data, spec_of(64, max_pixels=1_000_000))


@pytest.mark.filterwarnings("ignore")  # as in every process but one of tests
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_truncated_files_are_image_errors(format: str) -> None:
    data = encode(random_image("RGB", 64, 64), format)
    for size in (*range(0, 40), len(data) // 2, len(data) * 9 // 10):
        with pytest.raises(ImageError) as caught:
            decode_image(data[:size], spec_of())
        assert caught.value.stage == "decode"


@pytest.mark.filterwarnings("ignore")
@given(st.data())
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
def test_damaged_files_are_images_or_image_errors(data: st.DataObject) -> None:
    format = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"]))
    damaged = bytearray(encode(Image.radial_gradient("L").resize((40, 40)), format))
    places = st.integers(0, len(damaged) - 1)
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=6)):
        damaged[place] = value
    with contextlib.suppress(ImageError):
        assert decode_image(bytes(damaged), spec_of(max_pixels=1_000_000)).shape == (3, 8, 8)


@pytest.mark.parametrize("data", [b"", b"<svg/>", b"%!PS-Adobe-3.0 EPSF-3.0\n", bytes(100)])
def test_other_files_are_image_errors(data: bytes) -> None:
    with pytest.raises(ImageError):
        decode_image(data, spec_of())


# --- batches --------------------------------------------------------------------------------------

SPEC = spec_of((6, 5), resize="none")


def dataset(folder: Path, *, mode: str = "w", suffix: str = ".tar") -> SampleIndex:
    """Three tars of 7 samples; row 3 has no image, row 9 does not decode, row 10 is too small."""
    row = 0
    for tar in range(3):
        members = []
        for i in range(7):
            members.append((f"{i}.cls", str(i).encode()))
            if row == 9:
                members.append((f"{i}.png", b"\x89PNG\r\n\x1a\n broken"))
            elif row == 10:
                members.append((f"{i}.png", png(row, 5, 5)))
            elif row != 3:
                members.append((f"{i}.png", png(row)))
            row += 1
        write_tar(folder / f"{tar}{suffix}", members, mode=mode)
    return build_index(DatasetSpec.model_validate({"tars": f"{folder}/*{suffix}"}))


def batches(
    index: SampleIndex,
    unit: Unit,
    *,
    batch_size: int = 4,
    n_threads: int = 2,
    prefetch_bytes: int = 1 << 20,
    spec: ImageSpec = SPEC,
) -> list[ImageBatch]:
    return list(
        read_batches(
            unit,
            index,
            spec,
            batch_size=batch_size,
            n_threads=n_threads,
            prefetch_bytes=prefetch_bytes,
        )
    )


def flat(parts: list[ImageBatch]) -> tuple[np.ndarray, list[str], list[InvalidRow]]:
    return (
        np.concatenate([part.pixels[: part.n_rows] for part in parts]),
        [key for part in parts for key in part.keys],
        [row for part in parts for row in part.invalid],
    )


def straight_loop(folder: Path) -> np.ndarray:
    """All 21 rows by tarfile and Pillow; zeros where there is no good image."""
    rows = []
    for path in sorted(folder.glob("*.tar*")):
        with tarfile.open(path) as tar:
            for i in range(7):
                pixels = np.zeros((3, 6, 5), np.uint8)
                try:
                    file = tar.extractfile(f"{i}.png")
                    assert file is not None
                    image = Image.open(io.BytesIO(file.read()))
                    if image.size == (5, 6):
                        pixels = chw(image)
                except (KeyError, OSError):
                    pass
                rows.append(pixels)
    return np.stack(rows)


@pytest.mark.parametrize(("mode", "suffix"), [("w", ".tar"), ("w:gz", ".tar.gz")])
def test_every_row_is_there(tmp_path: Path, mode: str, suffix: str) -> None:
    index = dataset(tmp_path, mode=mode, suffix=suffix)
    want = straight_loop(tmp_path)
    parts = batches(index, Unit(0, 0, 21))
    assert [(p.start, p.n_rows) for p in parts] == [
        (0, 4), (4, 4), (8, 4), (12, 4), (16, 4), (20, 1),
    ]  # fmt: skip
    assert all(p.pixels.shape == (4, 3, 6, 5) for p in parts)
    assert not parts[-1].pixels[1:].any()
    pixels, keys, invalid = flat(parts)
    np.testing.assert_array_equal(pixels, want)
    assert keys == [str(i % 7) for i in range(21)]
    assert [(bad.row, bad.key, bad.stage) for bad in invalid] == [
        (3, "3", "index"),
        (9, "2", "decode"),
        (10, "3", "decode"),
    ]
    assert "no image" in invalid[0].reason
    assert "5 x 5 pixels, want 6 x 5" in invalid[2].reason
    sizes = index.table.column("size").to_pylist()
    assert [p.n_bytes for p in parts] == [sum(sizes[s : s + 4]) for s in range(0, 21, 4)]
    assert all(p.read_s > 0 and p.decode_s > 0 for p in parts)


@given(
    bounds=st.tuples(st.integers(0, 20), st.integers(1, 21)).filter(lambda b: b[0] < b[1]),
    batch_size=st.integers(1, 9),
    n_threads=st.integers(1, 4),
    prefetch_bytes=st.sampled_from([1, 500, 2000, 1 << 20]),
    gz=st.booleans(),
)
@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_pixels_do_not_depend_on_how_they_are_read(
    both: dict[bool, tuple[SampleIndex, np.ndarray]],
    bounds: tuple[int, int],
    batch_size: int,
    n_threads: int,
    prefetch_bytes: int,
    gz: bool,
) -> None:
    index, want = both[gz]
    start, stop = bounds
    parts = batches(
        index,
        Unit(0, start, stop),
        batch_size=batch_size,
        n_threads=n_threads,
        prefetch_bytes=prefetch_bytes,
    )
    pixels, keys, invalid = flat(parts)
    np.testing.assert_array_equal(pixels, want[start:stop])
    assert keys == [str(i % 7) for i in range(start, stop)]
    assert [bad.row for bad in invalid] == [row for row in (3, 9, 10) if start <= row < stop]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[SampleIndex, np.ndarray]]:
    plain, packed = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("gz")
    want = dataset(plain), straight_loop(plain)
    return {False: want, True: (dataset(packed, mode="w:gz", suffix=".tar.gz"), want[1])}


def test_tars_anywhere_give_the_same_pixels(tmp_path: Path, folder_url: str) -> None:
    local = dataset(tmp_path)
    folder = open_folder(folder_url)
    for path in tmp_path.glob("*.tar"):
        folder.put(path.name, [path.read_bytes()])
    index = build_index(DatasetSpec.model_validate({"tars": f"{folder_url}/*.tar"}))
    assert index.digest() == local.digest()
    pixels, _, invalid = flat(batches(index, Unit(0, 0, 21)))
    np.testing.assert_array_equal(pixels, straight_loop(tmp_path))
    assert [bad.row for bad in invalid] == [3, 9, 10]


# --- what is fetched, and threads -----------------------------------------------------------------


class Recorder:
    """Opens local folders that record every ranged read."""

    def __init__(self) -> None:
        self.ranges: list[tuple[str, int, int]] = []
        self.changed = threading.Condition()

    @property
    def n_bytes(self) -> int:
        return sum(stop - start for _, start, stop in self.ranges)

    def __call__(self, url: str) -> tuple[Folder, str]:
        recorder = self

        class Recording(LocalFolder):
            def get_range(self, path: str, start: int, stop: int) -> memoryview:
                with recorder.changed:
                    recorder.ranges.append((path, start, stop))
                    recorder.changed.notify_all()
                return super().get_range(path, start, stop)

        root, _, name = url.rpartition("/")
        return Recording(Path(root)), name


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(images_module, "open_parent", recorder)
    return recorder


def test_one_request_for_each_tar(tmp_path: Path, recorder: Recorder) -> None:
    index = dataset(tmp_path)
    batches(index, Unit(1, 5, 19))
    assert sorted(path for path, _, _ in recorder.ranges) == ["0.tar", "1.tar", "2.tar"]


def test_large_gaps_are_not_fetched(tmp_path: Path, recorder: Recorder) -> None:
    members = [
        member
        for i in range(4)
        for member in ((f"{i}.mp4", bytes(3 << 20)), (f"{i}.png", png(i)), (f"{i}.txt", b"x"))
    ]
    path = write_tar(tmp_path / "t.tar", members)
    index = build_index(DatasetSpec.model_validate({"tars": str(path)}))
    pixels, _, invalid = flat(batches(index, Unit(0, 0, 4), prefetch_bytes=1 << 30))
    assert not invalid
    assert pixels.any(axis=(1, 2, 3)).all()
    assert len(recorder.ranges) == 4
    assert recorder.n_bytes < 10_000


def test_reading_ahead_is_bounded_and_needs_no_consumer(tmp_path: Path, recorder: Recorder) -> None:
    members = [(f"{i:02}.bmp", encode(random_image("RGB", 100, 100), "BMP")) for i in range(40)]
    path = write_tar(tmp_path / "t.tar", members)
    index = build_index(DatasetSpec.model_validate({"tars": str(path)}))
    budget = 10 * 30_000
    stream = read_batches(
        Unit(0, 0, 40), index, spec_of(4), batch_size=2, n_threads=2, prefetch_bytes=budget
    )
    for n_taken, _ in enumerate(stream, start=1):
        used = n_taken * 2 * 30_000
        with recorder.changed:
            ahead = min(used + budget // 2, 40 * 30_000)
            assert recorder.changed.wait_for(lambda: recorder.n_bytes >= ahead, timeout=30)  # noqa: B023
            assert recorder.n_bytes <= used * 1.1 + budget
    assert n_taken == 20
    assert len(recorder.ranges) >= 10


def worker_names() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("drl-")]


def test_no_threads_are_left(tmp_path: Path) -> None:
    index = dataset(tmp_path)
    stream = read_batches(
        Unit(0, 0, 21), index, SPEC, batch_size=2, n_threads=3, prefetch_bytes=1 << 20
    )
    next(stream)
    assert worker_names()
    stream.close()  # type: ignore[attr-defined]
    assert not worker_names()
    batches(index, Unit(0, 0, 21))
    assert not worker_names()


# --- tars that are not what was indexed -----------------------------------------------------------


def replace_with_other_size(path: Path) -> None:
    path.write_bytes(path.read_bytes() + bytes(512))


def replace_with_other_bytes(path: Path) -> None:
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)


@pytest.mark.parametrize("change", [replace_with_other_size, replace_with_other_bytes])
def test_a_changed_tar_is_refused(tmp_path: Path, change: Callable[[Path], None]) -> None:
    index = dataset(tmp_path)
    change(tmp_path / "1.tar")
    assert len(batches(index, Unit(0, 0, 7))) == 2
    with pytest.raises(InputError, match=r"1\.tar: changed since it was indexed.*index again"):
        batches(index, Unit(0, 7, 14))
    assert not worker_names()


def test_a_missing_tar_is_refused(tmp_path: Path) -> None:
    index = dataset(tmp_path)
    (tmp_path / "2.tar").unlink()
    with pytest.raises(InputError, match=r"2\.tar: gone since it was indexed"):
        batches(index, Unit(0, 0, 21))


def test_a_failed_read_ends_the_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = dataset(tmp_path, mode="w:gz", suffix=".tar.gz")
    path = tmp_path / "1.tar.gz"
    packed = bytearray(path.read_bytes())
    packed[len(packed) // 2] ^= 0xFF
    path.write_bytes(packed)
    monkeypatch.setattr(images_module._OpenTar, "check", lambda tar: None)
    with pytest.raises(InputError, match=r"1\.tar\.gz"):
        batches(index, Unit(0, 0, 21))
    assert not worker_names()
