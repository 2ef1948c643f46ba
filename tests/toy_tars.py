"""Small tars for tests, written with Python's tarfile."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def write_tar(
    path: Path,
    members: Iterable[tuple[str, bytes]],
    *,
    format: int = tarfile.PAX_FORMAT,
    mode: str = "w",
) -> Path:
    """A tar of (name, data); `mode` is tarfile's, for example `w:gz`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=format) as tar:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def png(seed: int, height: int = 6, width: int = 5) -> bytes:
    """A PNG of RGB noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()
