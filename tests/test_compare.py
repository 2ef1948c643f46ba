"""Comparing stored features: every type decodes as torch does; what counts as the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drl_data.compare import Comparison, compare_rows, decode, relative_difference, tolerance
from drl_data.errors import StoreError
from drl_data.quantise import companions, from_storage, to_storage
from drl_data.shards import STORED, Array
from drl_data.spec import ArraySpec
from drl_data.spec_base import DType, StorageDType

from .stores import make_array

DTYPES: list[StorageDType] = sorted(STORED)
SHAPES = [(6,), (3, 5), (4, 2, 3)]


def stored(array: ArraySpec, x: torch.Tensor) -> dict[str, Array]:
    """What the store holds of features [n, *shape]."""
    parts, _ = to_storage(x, array, clip=True)
    return {
        name: (p.view(torch.uint16) if p.dtype == torch.bfloat16 else p).numpy()
        for name, p in parts.items()
    }


def features(n: int, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn((n, *shape), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_is_the_inverse_of_storing(dtype: StorageDType, shape: tuple[int, ...]) -> None:
    array = make_array("a", shape, dtype)
    parts, _ = to_storage(features(7, shape, 0), array, clip=True)
    want = from_storage(parts, array).float().numpy()
    got = decode(array, stored(array, features(7, shape, 0)))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "bfloat16"])
def test_every_bit_pattern_decodes_as_in_torch(dtype: StorageDType) -> None:
    bits = np.arange(2**16 if dtype == "bfloat16" else 256).astype(STORED[dtype])
    want = torch.from_numpy(bits).view(getattr(torch, dtype)).float().numpy()
    got = decode(make_array("a", (), dtype), {"a": bits})
    np.testing.assert_array_equal(got, want)


def test_scales_are_asked_for() -> None:
    array = make_array("a", (3,), "int8")
    with pytest.raises(StoreError, match="'a': no rows of 'a__scale'"):
        decode(array, {"a": np.zeros((2, 3), np.int8)})
    assert [c.name for c in companions(array)] == ["a__scale"]


def float32(*rows: float) -> dict[str, Array]:
    return {"a": np.array(rows, np.float32).reshape(len(rows), 1)}


@pytest.mark.parametrize(
    ("a", "b", "want"),
    [
        (1.0, 1.0, 0.0),
        (1.1, 1.0, 0.1),
        (0.0, 0.0, 0.0),
        (np.nan, np.nan, 0.0),
        (np.nan, 1.0, np.inf),
        (1.0, np.nan, np.inf),
        (0.0, 1.0, 1.0),
    ],
)
def test_relative_difference_of_one_row(a: float, b: float, want: float) -> None:
    array = make_array("a", (1,), "float32")
    got = relative_difference(array, float32(a, 1.0), float32(b, 1.0))
    np.testing.assert_allclose(got, [want, 0], rtol=1e-6)


def test_rows_of_zeros_and_of_rounding_errors_are_alike() -> None:
    array = make_array("a", (1,), "float32")
    got = relative_difference(array, float32(1e-9, 1.0, 0.5), float32(0.0, 1.0, 0.0))
    assert got[0] < 1e-5
    assert got[2] > 100
    alone = relative_difference(array, float32(1e-9), float32(0.0))
    assert alone[0] > 1e20  # nothing says that this is small
    half = make_array("a", (1,), "float16")
    smallest = {"a": np.array([[1]], np.uint16).view(np.float16)}
    zero = {"a": np.zeros((1, 1), np.float16)}
    assert relative_difference(half, smallest, zero)[0] < tolerance("float32", "float16")


@settings(deadline=None, max_examples=60)
@given(
    dtype=st.sampled_from(DTYPES),
    backbone=st.sampled_from(["float32", "float16", "bfloat16"]),
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 99),
)
def test_rounding_is_within_the_tolerance_and_other_content_is_not(
    dtype: StorageDType, backbone: DType, shape: tuple[int, ...], seed: int
) -> None:
    """Noise of the size that devices differ by passes; of other features no row does."""
    array, limit = make_array("a", shape, dtype), tolerance(backbone, dtype)
    x, error = features(16, shape, seed), features(16, shape, seed + 100)
    size = 2.6e-4 if backbone == "float32" else 1.5e-2
    norm = x.flatten(1).norm(dim=1) / error.flatten(1).norm(dim=1)
    error = error * norm.reshape(-1, *[1] * len(shape)) * size
    found = compare_rows(array, stored(array, x + error), stored(array, x), limit)
    assert found.within, found
    # The opposite, for six random values are at times within what 8-bit floating point rounds.
    found = compare_rows(array, stored(array, -x), stored(array, x), limit)
    assert found.n_beyond == found.n_differing == found.n_rows == 16


def test_a_comparison_says_which_rows() -> None:
    array = make_array("a", (1,), "float32")
    b = float32(1, 2, 3, np.nan)
    assert compare_rows(array, b, b, 1e-3) == Comparison(n_rows=4)
    close = compare_rows(array, float32(1, 2, 3.0001, np.nan), b, 1e-3, start=8)
    assert (close.n_differing, close.n_beyond, close.first) == (1, 0, 10)
    assert close.within
    assert not close.equal
    far = compare_rows(array, float32(1.0001, np.nan, 3, np.nan), b, 1e-3, start=8)
    assert (far.n_differing, far.n_beyond, far.n_validity, far.first) == (2, 1, 1, 9)
    assert far.largest == np.inf
    both = close.merged(far)
    assert (both.n_rows, both.n_differing, both.n_beyond, both.first) == (8, 3, 1, 9)


def test_negative_zero_differs_in_bits_only() -> None:
    array = make_array("a", (1,), "float32")
    found = compare_rows(array, float32(-0.0, 1), float32(0.0, 1), 1e-3)
    assert (found.n_differing, found.largest, found.within) == (1, 0.0, True)
