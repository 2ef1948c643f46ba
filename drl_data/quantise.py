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
from collections.abc import Iterable, Mapping
from typing import NamedTuple

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


class Stored(NamedTuple):
    """What is stored of features [b, ...], and what was found in them."""

    parts: dict[str, Tensor]
    """Array -> values [b, ...]: the array and, if it is quantised, its scales and offsets."""
    counts: Tensor
    """int32 [b, 3], on the device: NaNs, infinities, and finite values past the type's range."""


def to_storage(x: Tensor, array: ArraySpec, *, clip: bool, fill: bool = False) -> Stored:
    """Cast features x [b, ...] to an array's type.

    Finite values past the type's range become infinite or NaN, or with `clip` the largest finite
    value of their sign. NaN and infinite inputs stay, or with `fill` become 0 and the largest
    value: of the type, or where a scale goes with the values, of the finite ones under that scale.
    Nothing waits for the device.
    """
    nan, inf = torch.isnan(x), torch.isinf(x)
    if array.dtype in COMPANIONS:
        parts, over = _quantise(x.float(), nan, inf, array, clip=clip, fill=fill)
    else:
        cast, over = _cast(x, nan, inf, STORAGE_DTYPES[array.dtype], clip=clip, fill=fill)
        parts = {array.name: cast}
    counts = [found.flatten(1).sum(1, dtype=torch.int32) for found in (nan, inf, over)]
    return Stored(parts, torch.stack(counts, dim=1))


def _cast(
    x: Tensor, nan: Tensor, inf: Tensor, target: torch.dtype, *, clip: bool, fill: bool
) -> tuple[Tensor, Tensor]:
    """Floating-point numbers, 8 bits as uint8; and which of them were past the range."""
    if target == x.dtype and not fill:
        return x, torch.zeros_like(nan)
    largest, finite = torch.finfo(target).max, ~(nan | inf)
    if target.itemsize == 1:
        # Whether such a cast saturates differs between devices and versions of torch.
        over, bounded = finite & (x.abs() > largest), x.clamp(-largest, largest)
        x = torch.where(inf, bounded if fill else torch.nan, x)
        x = torch.where(over, bounded if clip else torch.nan, x)
        x = torch.where(nan, 0.0, x) if fill else x
        return x.to(target).view(torch.uint8), over
    cast = x.to(target)
    over, bounded = finite & torch.isinf(cast), cast.clamp(-largest, largest)
    cast = torch.where(over, bounded, cast) if clip else cast
    if fill:
        cast = torch.where(inf, bounded, cast)
        cast = torch.where(nan, 0.0, cast)
    return cast, over


def _quantise(
    x: Tensor, nan: Tensor, inf: Tensor, array: ArraySpec, *, clip: bool, fill: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """Integers with scales, and offsets; and which values have no scale that is finite."""
    channel = array.dims.index("channel") + 1
    axes = [i for i in range(1, x.ndim) if i != channel or x.ndim == 2]
    limit = torch.finfo(torch.float32).max / (2 if array.dtype == "uint8" else 1)
    over = ~(nan | inf) & (x.abs() > limit)
    x = torch.where(over, x.clamp(-limit, limit), x) if clip else x
    x = torch.where(nan, 0.0, x) if fill else x
    names = {what: f"{array.name}__{what}" for what in COMPANIONS[array.dtype]}
    if array.dtype == "int8":
        known = torch.where(inf, 0.0, x) if fill else x
        scale = known.abs().amax(axes, keepdim=True) / 127
        scale = torch.where(scale == 0, 1.0, scale)
        q = (x / scale).round().clamp(-127, 127).to(torch.int8)
        return {array.name: q, names["scale"]: scale.squeeze(axes)}, over
    low = (torch.where(inf, torch.inf, x) if fill else x).amin(axes, keepdim=True)
    high = (torch.where(inf, -torch.inf, x) if fill else x).amax(axes, keepdim=True)
    if fill:  # a group of infinities has no finite value
        low, high = (torch.where(torch.isinf(bound), 0.0, bound) for bound in (low, high))
    scale = (high - low) / 255
    scale = torch.where(scale == 0, 1.0, scale)
    q = ((x - low) / scale).round().clamp(0, 255).to(torch.uint8)
    parts = {
        array.name: q,
        names["scale"]: scale.squeeze(axes),
        names["offset"]: low.squeeze(axes),
    }
    return parts, over


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

    @classmethod
    def sum(cls, meters: Iterable[DamageMeter]) -> DamageMeter:
        """All that several have seen."""
        total = cls()
        sums = [meter._sums for meter in meters if meter._sums is not None]
        total._sums = torch.stack(sums).sum(0) if sums else None
        return total

    def add(self, exact: Tensor, stored: Tensor) -> None:
        """Features [b, ...] as computed, and as they read; rows that are not finite count not."""
        for x, y in zip(exact.flatten(1), stored.flatten(1), strict=True):
            # float64 of one row at a time: features of a whole batch are large
            a, b = x.double(), y.double()
            square, other = a @ a, b @ b
            cosine = (a @ b) / (square * other).sqrt().clamp(min=torch.finfo(a.dtype).tiny)
            sums = torch.stack([(a - b) @ (a - b), square, cosine, torch.ones_like(cosine)])
            sums = torch.where(torch.isfinite(sums).all(), sums, torch.zeros_like(sums))
            self._sums = sums if self._sums is None else self._sums + sums

    def result(self) -> tuple[float, float] | None:
        """(|x - y| / |x| over all values, mean cosine of rows); None without a finite row."""
        if self._sums is None:
            return None
        error, norm, cosine, n_rows = self._sums.tolist()
        if not n_rows:
            return None
        found = math.sqrt(error / norm if norm else error), cosine / n_rows
        return found if all(map(math.isfinite, found)) else None
