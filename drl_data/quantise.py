"""The cast to storage, its inverse, and what it costs. STORE.md, section 7.

    float32 float16 bfloat16    the values
    float8_e4m3fn, float8_e5m2  the values; stored as the bits, uint8
    int8    q scale             scale = max |x| / 127, per sample and channel
    uint8   q scale + offset    offset = min x, scale = (max x - min x) / 255, likewise

Scales and offsets are float32 arrays of their own beside the quantised one. A vector has one scale
for all its channels: one for each would be larger than the values.

Shapes: b batch, ... the axes of a row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from drl_data.spec import ArraySpec
from drl_data.spec_base import StorageDType

STORAGE_DTYPES: Mapping[StorageDType, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "int8": torch.int8,
    "uint8": torch.uint8,
}

COMPANIONS: Mapping[StorageDType, tuple[str, ...]] = {
    "int8": ("scale",),
    "uint8": ("scale", "offset"),
}
"""Arrays beside a quantised array `name`, called `name__scale` and `name__offset`."""


def companions(array: ArraySpec) -> tuple[ArraySpec, ...]:
    """The arrays of scales and offsets that a quantised array needs; none for the others."""
    keeps_channel = len(array.shape) > 1
    return tuple(
        array.model_copy(
            update={
                "name": f"{array.name}__{what}",
                "dims": ("channel",) if keeps_channel else (),
                "shape": (array.shape[array.dims.index("channel")],) if keeps_channel else (),
                "dtype": "float32",
                "quantises": array.name,
            }
        )
        for what in COMPANIONS.get(array.dtype, ())
    )


def to_storage(x: Tensor, array: ArraySpec, *, clip: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Cast x [b, ...] to an array's type; returns ({array: what is stored}, overflows).

    Overflows are the finite values that the type cannot hold: they become infinite or NaN, or with
    `clip` the largest finite value of their sign. Their number is a 0-d int64 tensor on the device,
    so that counting does not synchronise. NaN and infinite inputs stay what they are.
    """
    if array.dtype in COMPANIONS:
        return _quantise(x, array), torch.zeros((), dtype=torch.int64, device=x.device)
    target = STORAGE_DTYPES[array.dtype]
    if target == x.dtype:
        return {array.name: x}, torch.zeros((), dtype=torch.int64, device=x.device)
    largest = torch.finfo(target).max
    if target.itemsize == 1:
        # Whether such a cast saturates differs between devices and versions of torch.
        overflowed = torch.isfinite(x) & (x.abs() > largest)
        x = torch.where(torch.isfinite(x), x, torch.nan)
        x = x.clamp(-largest, largest) if clip else torch.where(overflowed, torch.nan, x)
        return {array.name: x.to(target).view(torch.uint8)}, overflowed.sum()
    cast = x.to(target)
    overflowed = torch.isfinite(x) & torch.isinf(cast)
    if clip:
        cast = torch.where(overflowed, cast.clamp(-largest, largest), cast)
    return {array.name: cast}, overflowed.sum()


def _quantise(x: Tensor, array: ArraySpec) -> dict[str, Tensor]:
    x = x.float()
    channel = array.dims.index("channel") + 1
    axes = [i for i in range(1, x.ndim) if i != channel or x.ndim == 2]
    names = {what: f"{array.name}__{what}" for what in COMPANIONS[array.dtype]}
    if array.dtype == "int8":
        scale = x.abs().amax(axes, keepdim=True) / 127
        scale = torch.where(scale == 0, 1.0, scale)
        q = (x / scale).round().clamp(-127, 127).to(torch.int8)
        return {array.name: q, names["scale"]: scale.squeeze(axes)}
    low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, 1.0, scale)
    q = ((x - low) / scale).round().clamp(0, 255).to(torch.uint8)
    return {
        array.name: q,
        names["scale"]: scale.squeeze(axes),
        names["offset"]: low.squeeze(axes),
    }


def from_storage(stored: Mapping[str, Tensor], array: ArraySpec) -> Tensor:
    """The features [*lead, ...] of what `to_storage` made, with any axes before the row's.

    float32 for quantised arrays, else the stored values in their own type.
    """
    x = stored[array.name]
    if array.dtype not in COMPANIONS:
        target = STORAGE_DTYPES[array.dtype]
        return x if x.dtype == target else x.view(target)
    lead = x.shape[: x.ndim - len(array.shape)]
    kept = [1] * len(array.shape)
    if len(array.shape) > 1:
        channel = array.dims.index("channel")
        kept[channel] = array.shape[channel]

    def spread(what: str) -> Tensor:
        return stored[f"{array.name}__{what}"].reshape(*lead, *kept)

    x = x.float() * spread("scale")
    return x + spread("offset") if "offset" in COMPANIONS[array.dtype] else x


def storage_buffer(array: ArraySpec, lead: tuple[int, ...], *, pinned: bool) -> Tensor:
    """Host memory [*lead, ...] for what `to_storage` gives of an array."""
    dtype = STORAGE_DTYPES[array.dtype]
    bits = torch.uint8 if dtype.is_floating_point and dtype.itemsize == 1 else dtype
    return torch.empty((*lead, *array.shape), dtype=bits, pin_memory=pinned)


class DamageMeter:
    """What storage costs features: sums over batches, on their device, without synchronising."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, exact: Tensor, stored: Tensor) -> None:
        """Features [b, ...] as computed, and as they read."""
        for x, y in zip(exact.flatten(1), stored.flatten(1), strict=True):
            # float64 of one row at a time: features of a whole batch are large
            a, b = x.double(), y.double()
            square, other = a @ a, b @ b
            cosine = (a @ b) / (square * other).sqrt().clamp(min=torch.finfo(a.dtype).tiny)
            sums = torch.stack([(a - b) @ (a - b), square, cosine, torch.ones_like(cosine)])
            self._sums = sums if self._sums is None else self._sums + sums

    def result(self) -> tuple[float, float] | None:
        """(|x - y| / |x| over all values, mean cosine of rows); None if that is not finite."""
        if self._sums is None:
            return None
        error, norm, cosine, n_rows = self._sums.tolist()
        found = math.sqrt(error / norm if norm else error), cosine / n_rows
        return found if all(map(math.isfinite, found)) else None
