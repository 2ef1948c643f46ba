"""Bytes that want to hurt who decodes them: small files that promise, or inflate to, a great deal.

`HOSTILE` maps a name to the bytes and to what becomes of them: a pattern of the reason, or None for
an image that is as good as any other. `damaged` makes endless others, of real files with bytes that
changed, went or came.
"""

from __future__ import annotations

import functools
import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

MIB = 1 << 20
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def photo(side: int = 40) -> Image.Image:
    return Image.merge("RGB", [Image.radial_gradient("L").resize((side, side))] * 3)


@functools.cache
def zeros(n_bytes: int) -> bytes:
    """zlib data of `n_bytes` zeros, a thousandth of the size."""
    packer = zlib.compressobj(9)
    parts = [packer.compress(bytes(MIB)) for _ in range(n_bytes // MIB)]
    return b"".join([*parts, packer.compress(bytes(n_bytes % MIB)), packer.flush()])


def chunk(name: bytes, data: bytes) -> bytes:
    crc = zlib.crc32(name + data).to_bytes(4, "big")
    return len(data).to_bytes(4, "big") + name + data + crc


def png_of(*before: bytes, idat: bytes | None = None, side: int = 8) -> bytes:
    """An 8-bit RGB PNG with more chunks before its pixels, or with other pixels."""
    header = struct.pack(">II", side, side) + b"\x08\x02\0\0\0"
    pixels = zlib.compress(bytes(8 * (3 * 8 + 1))) if idat is None else idat
    parts = [chunk(b"IHDR", header), *before, chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def jpeg_of_size(width: int, height: int) -> bytes:
    """A JPEG whose header says another size than its data have."""
    data = bytearray(encode(photo(), "JPEG"))
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def jpeg_of_scans(n: int) -> bytes:
    """A progressive JPEG whose last scan comes `n` times more."""
    data = encode(photo(), "JPEG", progressive=True)
    last = data[data.rfind(b"\xff\xda") : -2]
    return data[:-2] + last * n + b"\xff\xd9"


def webp_of_canvas(width: int, height: int) -> bytes:
    """An animated WebP with a large canvas and one small frame."""
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    data = bytearray(encode(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    start = data.index(b"VP8X") + 12
    data[start : start + 6] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(data)


def tiff(entries: list[tuple[int, int, int, int]], pixels: bytes, n_pages: int = 1) -> bytes:
    """A little-endian TIFF of pages with these (tag, type, count, value), sharing their pixels."""
    parts, at = [b"II*\0" + struct.pack("<I", 8 + len(pixels)), pixels], 8 + len(pixels)
    for page in range(n_pages):
        size = 2 + 12 * len(entries) + 4
        following = at + size if page < n_pages - 1 else 0
        body = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
        parts.append(struct.pack("<H", len(entries)) + body + struct.pack("<I", following))
        at += size
    return b"".join(parts)


def grey_tiff(side: int, n_pages: int = 1) -> bytes:
    entries = [
        (256, 3, 1, side), (257, 3, 1, side), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1),
        (273, 4, 1, 8), (277, 3, 1, 1), (278, 3, 1, side), (279, 4, 1, side * side),
    ]  # fmt: skip
    return tiff(entries, bytes(side * side), n_pages)


def tiled_tiff(side: int, tile: int) -> bytes:
    """A small image in one large compressed tile."""
    pixels = zeros(4 * MIB)
    entries = [
        (256, 3, 1, side), (257, 3, 1, side), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1),
        (277, 3, 1, 1), (322, 4, 1, tile), (323, 4, 1, tile), (324, 4, 1, 8),
        (325, 4, 1, len(pixels)),
    ]  # fmt: skip
    return tiff(entries, pixels)


def _text_png(n: int) -> bytes:
    """Many compressed texts, each below the limit of one."""
    return png_of(*[chunk(b"zTXt", b"k%d\0\0" % i + zeros(MIB - 1)) for i in range(n)])


def _many_frames(format: str, n: int) -> bytes:
    frames = [Image.new("RGB", (8, 8), (i % 250, i // 250, 0)) for i in range(n)]
    return encode(frames[0], format, save_all=True, append_images=frames[1:], duration=10)


def _bmp_of_size(width: int, height: int) -> bytes:
    data = bytearray(encode(photo(), "BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


HOSTILE: dict[str, tuple[bytes, str | None]] = {
    "0 bytes": (b"", "0 bytes"),
    "text": (b"<html>404 not found</html>", "none of JPEG"),
    "a tar": (bytes(1024), "none of JPEG"),
    "a pickle": (b"\x80\x04\x95\x00.", "none of JPEG"),
    "png of 2 million squared": (png_of(side=2_000_000), "max_pixels"),
    "png, pixels inflate to 128 MiB": (png_of(idat=zeros(128 * MIB)), None),
    "png, text inflates to 128 MiB": (
        png_of(chunk(b"zTXt", b"k\0\0" + zeros(128 * MIB))), "too large"),
    "png, international text inflates": (
        png_of(chunk(b"iTXt", b"k\0\x01\0\0\0" + zeros(128 * MIB))), "too large"),
    "png, 100 texts of 1 MiB": (_text_png(100), "(?i)text memory|too much memory|MAX_TEXT_MEMORY"),
    "png, ICC profile inflates to 128 MiB": (
        png_of(chunk(b"iCCP", b"k\0\0" + zeros(128 * MIB))), "too large"),
    "png, chunk longer than the file": (
        png_of(struct.pack(">I", 2**31 - 1) + b"tEXt"), "."),
    "jpeg of 65500 squared": (jpeg_of_size(65500, 65500), "max_pixels"),
    "jpeg of no height": (jpeg_of_size(40, 0), "."),
    "jpeg of 10,000 scans": (jpeg_of_scans(10_000), r"1\d{4} scans, want at most 500"),
    "webp canvas of 16000 squared": (webp_of_canvas(16_000, 16_000), "."),
    "bmp of 100,000 squared": (_bmp_of_size(100_000, 100_000), "max_pixels"),
    "bmp of negative size": (_bmp_of_size(-40, 40), "."),
    "tiff of one huge tile": (tiled_tiff(8, 60_000), "60000 x 60000"),
    "tiff of 10,000 pages": (grey_tiff(8, 10_000), None),
    "gif of 2,000 frames": (_many_frames("GIF", 2_000), None),
    "png of one pixel": (encode(Image.new("RGB", (1, 1), "red"), "PNG"), None),
    "png of 300:1": (encode(photo(300).resize((300, 1)), "PNG"), None),
    "png of 1:300": (encode(photo(300).resize((1, 300)), "PNG"), None),
    "truncated jpeg": (encode(photo(), "JPEG")[:-200], "."),
}  # fmt: skip


def damaged(seed: int) -> Iterator[bytes]:
    """Endless real files with 1 to 4 changes: bytes replaced, cut out, put in, the end cut off."""
    rng = np.random.default_rng(seed)
    frames = [photo(), photo().rotate(90), photo().rotate(45)]
    exif = Image.Exif()
    exif[0x0112] = 6
    originals = [encode(photo(), format) for format in FORMATS]
    originals += [encode(photo().convert("RGBA"), format) for format in ("PNG", "WEBP", "TIFF")]
    originals += [encode(photo().quantize(16), format) for format in ("PNG", "GIF", "TIFF")]
    originals += [
        encode(frames[0], format, save_all=True, append_images=frames[1:])
        for format in ("PNG", "WEBP", "TIFF", "GIF")
    ]
    originals += [encode(photo(), "TIFF", compression=c)
                  for c in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")]  # fmt: skip
    originals += [
        encode(photo(), "JPEG", progressive=True, exif=exif, comment=b"x" * 50),
        encode(photo().convert("CMYK"), "JPEG"),
        encode(photo(), "PNG", exif=exif),
        encode(Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40)), "PNG"),
    ]
    while True:
        data = bytearray(originals[rng.integers(len(originals))])
        # Half of the changes are near the front, where the structure of a file is.
        for _ in range(rng.integers(1, 5)):
            reach = min(len(data), 200) if rng.random() < 0.5 else len(data)
            at = int(rng.integers(max(reach, 1)))
            kind = rng.integers(10)
            if kind < 8:
                data[at : at + 1] = bytes([rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.integers(256)])])
            elif kind == 8:
                del data[at : at + int(rng.integers(1, 9))]
            else:
                data[at:at] = rng.bytes(int(rng.integers(1, 9)))
        yield bytes(data[: rng.integers(len(data) + 1)] if rng.random() < 0.1 else data)
