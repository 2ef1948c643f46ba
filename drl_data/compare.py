"""Are two sets of stored features the same computation? Rows, decoded, by |a - b| / |b|.

One machine and one batch give equal bits; another GPU, or another attempt on the same one, may add
in another order. What differs by rounding is told from what differs by content: by noise, image or
weights, where the relative difference is some tenths and more.

Pure NumPy: `stored` values are as store.py reads them (bfloat16 as uint16, fp8 as uint8).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from drl_data.errors import StoreError
from drl_data.shards import Array
from drl_data.spec import ArraySpec
from drl_data.spec_base import DType, StorageDType

FloatRows = npt.NDArray[np.float32]
Norms = npt.NDArray[np.float64]

COMPUTE_TOLERANCE: Mapping[DType, float] = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 5e-2}
"""What the order of additions may change, relative to a row. float32 without TF32 on another
device: 1e-6 in the median of all bundled models and 2.6e-4 at most; half precision: 1e-2 and more,
as the roundings (2^-8 each) of all layers add up."""

STORAGE_TOLERANCE: Mapping[StorageDType, float] = {
    "float32": 2.0**-23,
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
    "float8_e4m3fn": 2.0**-3,
    "float8_e5m2": 2.0**-2,
    "int8": 4 / 127,
    "uint8": 8 / 255,
}
"""One step of the storage type, relative to a row: where a value lies at the edge of two stored
ones, rounding makes a whole step of the smallest difference. Integers: the step is max |x| / 127,
and max |x| is some 4 times the root mean square."""

SMALLEST_NORMAL: Mapping[StorageDType, float] = {
    "float32": 2.0**-126,
    "float16": 2.0**-14,
    "bfloat16": 2.0**-126,
    "float8_e4m3fn": 2.0**-6,
    "float8_e5m2": 2.0**-14,
    "int8": 0.0,
    "uint8": 0.0,
}
"""Below it the steps of a type are absolute, so rows are not called smaller than that."""

SMALL_ROW = 1e-3
"""Rows smaller than this share of the typical row are compared on that scale: rounding errors are
relative to what goes through the network, not to a row that happens to cancel or to be all zero."""

BLOCK_BYTES = 4 << 20
"""Rows are decoded in blocks of about this size; a whole shard in float64 would be large."""


def tolerance(backbone_dtype: DType, storage_dtype: StorageDType) -> float:
    """Largest relative difference of a row of two runs of one spec, on any devices."""
    return COMPUTE_TOLERANCE[backbone_dtype] + STORAGE_TOLERANCE[storage_dtype]


@dataclass(frozen=True)
class Comparison:
    """How rows of one array differ, at one timestep or over several."""

    n_rows: int = 0
    n_differing: int = 0
    """Rows that are not equal bit for bit."""
    n_beyond: int = 0
    """Rows whose relative difference exceeds the tolerance, or that are NaN in one only."""
    n_validity: int = 0
    """Rows that are NaN in one only."""
    largest: float = 0.0
    """Largest relative difference of a row; infinite where a row is NaN in one only."""
    first: int | None = None
    """First row beyond the tolerance; if there is none, the first that differs."""

    @property
    def equal(self) -> bool:
        """Whether all rows are equal bit for bit."""
        return not self.n_differing

    @property
    def within(self) -> bool:
        """Whether no row is beyond the tolerance."""
        return not self.n_beyond

    def merged(self, other: Comparison) -> Comparison:
        """Both together."""
        beyond = [c.first for c in (self, other) if c.n_beyond and c.first is not None]
        differing = [c.first for c in (self, other) if c.first is not None]
        return Comparison(
            self.n_rows + other.n_rows,
            self.n_differing + other.n_differing,
            self.n_beyond + other.n_beyond,
            self.n_validity + other.n_validity,
            max(self.largest, other.largest),
            min(beyond or differing, default=None),
        )


def decode(array: ArraySpec, stored: Mapping[str, Array]) -> FloatRows:
    """Features [n, *shape] float32 of what the store holds of some rows.

    `stored`: rows [n, ...] of the array and of each of its scales and offsets, by name.

    Raises:
        StoreError: a quantised array without its scales.
    """
    rows = stored[array.name]
    if array.dtype in ("float32", "float16"):
        return rows.astype(np.float32)
    if array.dtype == "bfloat16":
        return (rows.astype(np.uint32) << 16).view(np.float32)
    if array.dtype == "float8_e5m2":  # the upper half of a float16
        return (rows.astype(np.uint16) << 8).view(np.float16).astype(np.float32)
    if array.dtype == "float8_e4m3fn":
        return _e4m3_values()[rows.astype(np.uint8)]
    names = ("scale",) if array.dtype == "int8" else ("scale", "offset")
    parts = []
    for name in (f"{array.name}__{what}" for what in names):
        if name not in stored:
            raise StoreError(f"array {array.name!r}: no rows of {name!r} to decode it with")
        parts.append(stored[name].astype(np.float32))
    axes = [1] * len(array.shape)
    if len(array.shape) > 1:
        axes[array.dims.index("channel")] = -1
    spread = [part.reshape(len(rows), *axes) for part in parts]
    values = rows.astype(np.float32) * spread[0]
    return values + spread[1] if len(spread) == 2 else values


@cache
def _e4m3_values() -> FloatRows:
    """Value of each bit pattern of float8_e4m3fn: bias 7, no infinity, NaN where all bits are 1."""
    bits = np.arange(256)
    exponent, fraction = (bits >> 3) & 15, bits & 7
    size = np.where(
        exponent == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * 2.0 ** (exponent - 7.0)
    )
    values = np.where(bits & 128, -size, size).astype(np.float32)
    values[[127, 255]] = np.nan
    return values


def relative_difference(array: ArraySpec, a: Mapping[str, Array], b: Mapping[str, Array]) -> Norms:
    """|a - b| / |b| of each row, [n]: 0 where both are zero or both NaN, infinite where one is NaN.

    |b| is at least `SMALL_ROW` of the root mean square of all rows' norms in `b`, and at least that
    of a row of the type's smallest normal numbers; 0 / 0 is 0.
    """
    n = len(b[array.name])
    errors, norms = np.zeros(n), np.zeros(n)
    step = max(BLOCK_BYTES // max(4 * int(np.prod(array.shape, dtype=int)), 1), 1)
    for start in range(0, n, step):
        block = slice(start, start + step)
        x, y = (
            decode(array, {name: rows[block] for name, rows in stored.items()})
            .astype(np.float64)
            .reshape(len(errors[block]), -1)
            for stored in (a, b)
        )
        x_nan, y_nan = (~np.isfinite(z).all(axis=1) for z in (x, y))
        both, one = x_nan & y_nan, x_nan ^ y_nan
        x[both | one], y[both | one] = 0, 0
        delta = x - y
        errors[block] = np.sqrt(np.einsum("nv,nv->n", delta, delta))
        norms[block] = np.sqrt(np.einsum("nv,nv->n", y, y))
        errors[block][one] = np.inf
    present = norms[norms > 0]
    typical = float(np.sqrt(np.mean(present**2))) if present.size else 0.0
    size = float(np.sqrt(np.prod(array.shape, dtype=float)))
    scale = np.maximum(norms, max(SMALL_ROW * typical, size * SMALLEST_NORMAL[array.dtype]))
    return np.divide(errors, scale, out=np.where(errors > 0, np.inf, 0.0), where=scale > 0)


def compare_rows(
    array: ArraySpec,
    a: Mapping[str, Array],
    b: Mapping[str, Array],
    limit: float,
    *,
    start: int = 0,
) -> Comparison:
    """Compare rows [n, ...] of an array with its scales and offsets, by name; `start` is the first
    row's number. `limit` is the largest relative difference that is still the same computation."""
    n = len(b[array.name])
    differing = np.zeros(n, np.bool_)
    for name, rows in b.items():
        x, y = (np.ascontiguousarray(z).reshape(n, -1).view(np.uint8) for z in (a[name], rows))
        differing |= (x != y).any(axis=1)
    if not differing.any():
        return Comparison(n_rows=n)
    relative = relative_difference(array, a, b)
    beyond = relative > limit
    return Comparison(
        n_rows=n,
        n_differing=int(differing.sum()),
        n_beyond=int(beyond.sum()),
        n_validity=int(np.isinf(relative).sum()),
        largest=float(relative.max()),
        first=start + int(np.flatnonzero(beyond if beyond.any() else differing)[0]),
    )
