"""Samples to the bytes of a tar that depend on the samples alone."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from drl_data.errors import SpecError
from drl_data.objects import Buffer
from drl_data.synthesize_spec import ImageFileSpec

DEFAULT_JPG_QUALITY = 95


def encode_image(pixels_hwc: npt.NDArray[np.uint8], spec: ImageFileSpec) -> bytes:
    """A file of an image [h, w, 1] or [h, w, 3].

    Raises:
        SpecError: another number of channels.
    """
    channels = pixels_hwc.shape[2]
    if channels not in (1, 3):
        raise SpecError(f"synthesize: images of {channels} channels, want 1 (grey) or 3 (RGB)")
    image = Image.fromarray(pixels_hwc[..., 0] if channels == 1 else pixels_hwc)
    buffer = io.BytesIO()
    if spec.kind == "png":
        image.save(buffer, "PNG")
    elif spec.kind == "webp":
        image.save(buffer, "WEBP", lossless=True)
    else:
        image.save(buffer, "JPEG", quality=spec.quality or DEFAULT_JPG_QUALITY)
    return buffer.getvalue()


def key_of(name: str, number: int) -> str:
    """Key of image `number` of a job."""
    return f"{name}-{number:09d}"


def tar_name(name: str, unit: int) -> str:
    """Name of the tar of a unit; all of them are `NAME-{000000..}.tar`."""
    return f"{name}-{unit:06d}.tar"


def tar_bytes(samples: Sequence[tuple[str, Mapping[str, bytes]]]) -> bytes:
    """A tar (ustar) of samples (key, {extension: content}), in their order, extensions sorted.

    Equal samples give equal bytes: no times, no owners.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            for extension in sorted(members):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(members[extension])
                tar.addfile(member, io.BytesIO(members[extension]))
    return buffer.getvalue()


def numbers_in(data: Buffer) -> list[int]:
    """Numbers of the images that a tar of `tar_bytes` has."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        keys = {member.name.split(".")[0] for member in tar}
    return sorted(int(re.sub(r".*-", "", key)) for key in keys)
