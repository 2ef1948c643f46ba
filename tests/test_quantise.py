"""The cast to storage and back: exact where it can be, measured where it cannot."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from drl_data.quantise import DamageMeter, companions, from_storage, storage_buffer, to_storage
from drl_data.reduce import TORCH_DTYPES
from drl_data.spec import ArraySpec
from drl_data.spec_base import DType, StorageDType


def array(dtype: StorageDType, *shape: int) -> ArraySpec:
    dims = {1: ("channel",), 2: ("token", "channel"), 3: ("channel", "height", "width")}
    return ArraySpec(name="a", tap="net.a@out", dims=dims[len(shape)], shape=shape, dtype=dtype)


def round_trip(x: Tensor, dtype: StorageDType) -> Tensor:
    spec = array(dtype, *x.shape[1:])
    stored, counts = to_storage(x, spec, clip=False)
    assert counts.tolist() == [[0, 0, 0]] * len(x)
    assert set(stored) == {"a", *(c.name for c in companions(spec))}
    for part in (spec, *companions(spec)):
        buffer = storage_buffer(part, (len(x),), pinned=False)
        assert (stored[part.name].shape, stored[part.name].dtype) == (buffer.shape, buffer.dtype)
    return from_storage(stored, spec)


def activations() -> Tensor:
    """Smooth maps whose channels differ in scale and mean, as those of a UNet do."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(4, 64, 8, 8, generator=generator)
    scale = torch.randn(64, generator=generator).exp()[:, None, None]
    shift = torch.randn(64, generator=generator)[:, None, None]
    return functional.interpolate(coarse, 32, mode="bicubic") * scale + shift


# storage.md section 5: measured on maps of a real UNet
MEASURED = {
    "float16": 0.0002,
    "bfloat16": 0.0017,
    "uint8": 0.0048,
    "int8": 0.0066,
    "float8_e4m3fn": 0.0265,
    "float8_e5m2": 0.053,
}


@pytest.mark.parametrize("dtype", MEASURED)
def test_damage_is_what_was_measured(dtype: StorageDType) -> None:
    x = activations()
    y = round_trip(x, dtype).float()
    meter = DamageMeter()
    meter.add(x[:3], y[:3])
    meter.add(x[3:], y[3:])
    error, cosine = meter.result()
    assert MEASURED[dtype] / 2 < error < MEASURED[dtype] * 2
    flat, stored = x.flatten(1).double().numpy(), y.flatten(1).double().numpy()
    assert error == pytest.approx(np.linalg.norm(flat - stored) / np.linalg.norm(flat), rel=1e-9)
    norms = np.linalg.norm(flat, axis=1) * np.linalg.norm(stored, axis=1)
    assert cosine == pytest.approx(((flat * stored).sum(1) / norms).mean(), abs=1e-6)


def test_damage_that_is_no_number_is_none() -> None:
    meter = DamageMeter()
    assert meter.result() is None
    meter.add(torch.tensor([[1.0, float("nan")]]), torch.ones(1, 2))
    assert meter.result() is None


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("shape", [(6,), (5, 6), (6, 4, 3)])
def test_integers_are_within_half_a_step(dtype: StorageDType, shape: tuple[int, ...]) -> None:
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1)) + 1
    spec = array(dtype, *shape)
    stored, _ = to_storage(x, spec, clip=False)
    scale = stored["a__scale"]
    assert scale.shape == ((3, 6) if len(shape) > 1 else (3,))
    axis = spec.dims.index("channel") + 1
    spread = [3, *[1] * len(shape)]
    if len(shape) > 1:
        spread[axis] = 6
    error = (from_storage(stored, spec) - x).abs()
    assert (error <= scale.reshape(spread) * 0.5001 + 1e-6).all()
    values = x.numpy()
    axes = tuple(i for i in range(1, x.ndim) if i != axis or x.ndim == 2)
    if dtype == "int8":
        want = np.abs(values).max(axes) / 127
    else:
        want = (values.max(axes) - values.min(axes)) / 255
        np.testing.assert_array_equal(stored["a__offset"], values.min(axes))
    np.testing.assert_allclose(scale, want, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_constant_and_zero_channels(dtype: StorageDType) -> None:
    x = torch.zeros(1, 2, 2, 2)
    x[0, 1] = 3.0
    np.testing.assert_allclose(round_trip(x, dtype), x, rtol=1e-6)
    stored, _ = to_storage(x, array(dtype, 2, 2, 2), clip=False)
    assert stored["a__scale"][0, 0] == 1  # 0 / 0 would be cast to an integer


def test_axes_before_the_row_stay() -> None:
    x = activations().reshape(2, 2, 64, 32, 32)
    spec = array("uint8", 64, 32, 32)
    stored, _ = to_storage(x.flatten(0, 1), spec, clip=False)
    lead = {name: value.unflatten(0, (2, 2)) for name, value in stored.items()}
    want = from_storage(stored, spec).reshape(x.shape)
    assert torch.equal(from_storage(lead, spec), want)


def test_quantised_rows_that_are_not_finite_have_scales_that_are_not() -> None:
    x = torch.ones(1, 2, 2, 2)
    x[0, 0, 0, 0] = float("nan")
    for dtype in ("int8", "uint8"):
        stored, _ = to_storage(x, array(dtype, 2, 2, 2), clip=False)
        assert torch.isnan(stored["a__scale"][0, 0])


@pytest.mark.parametrize(
    ("dtype", "largest"), [("float16", 65504.0), ("float8_e4m3fn", 448.0), ("float8_e5m2", 57344.0)]
)
def test_overflow_is_counted_and_clipped_on_request(dtype: StorageDType, largest: float) -> None:
    x = torch.tensor([[1.0, largest, largest * 1.2, -1e9, float("inf"), float("nan")]])
    spec = array(dtype, 6)
    stored, counts = to_storage(x, spec, clip=False)
    assert counts.tolist() == [[1, 1, 2]]
    values = from_storage(stored, spec)[0].float()
    assert torch.isfinite(values).tolist() == [True, True, False, False, False, False]
    stored, counts = to_storage(x, spec, clip=True)
    assert counts.tolist() == [[1, 1, 2]]
    values = from_storage(stored, spec)[0].float()
    assert values[:4].tolist() == [1.0, largest, largest, -largest]
    assert not torch.isfinite(values[4:]).any()


LARGEST = {
    "float32": torch.finfo(torch.float32).max,
    "bfloat16": torch.finfo(torch.bfloat16).max,
    "float16": 65504.0,
    "float8_e4m3fn": 448.0,
    "float8_e5m2": 57344.0,
}
FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)
SPECIAL = st.sampled_from([float("nan"), float("inf"), float("-inf")])


@given(
    st.sampled_from(["float32", "bfloat16", "float16"]),
    st.sampled_from([*LARGEST, "int8", "uint8"]),
    st.lists(st.one_of(FINITE, st.floats(-3, 3, width=16), SPECIAL),
             min_size=12, max_size=12),
    st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_what_is_stored_is_finite_or_counted(
    computed: DType, dtype: StorageDType, values: list[float], clip: bool, fill: bool
) -> None:
    """Any values in any type: each is kept, replaced by what the rules say, or counted."""
    x = torch.tensor(values).reshape(2, 2, 3).to(TORCH_DTYPES[computed])
    spec = array(dtype, 2, 3)
    stored, counts = to_storage(x, spec, clip=clip, fill=fill)
    read = from_storage(stored, spec).double().flatten(1)
    exact = x.double().flatten(1)
    assert counts[:, 0].tolist() == torch.isnan(exact).sum(1).tolist()
    assert counts[:, 1].tolist() == torch.isinf(exact).sum(1).tolist()
    if (clip or not counts[:, 2].any()) and (fill or not counts[:, :2].any()):
        assert torch.isfinite(read).all()
    for row in range(2):
        if not counts[row].any():
            assert torch.isfinite(read[row]).all()
    if dtype not in LARGEST:
        return
    largest = LARGEST[dtype]
    nan, inf = torch.isnan(exact), torch.isinf(exact)
    if fill:
        assert (read[nan] == 0).all()
        assert (read[inf] == exact[inf].sign() * largest).all()
    else:
        assert not torch.isfinite(read[nan | inf]).any()
    inside = torch.isfinite(exact) & (exact.abs() <= largest)
    error = (read - exact)[inside].abs()
    assert (error <= exact[inside].abs() / 4 + 0.01).all()
    past = ~nan & ~inf & (exact.abs() > largest * 1.1)
    assert not past.any() or counts[:, 2].sum() >= past.sum()
    assert (read[past] == exact[past].sign() * largest).all() or not clip


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_quantised_groups_take_their_scale_from_finite_values(dtype: StorageDType) -> None:
    """An infinity is stored as the largest value of its group, and ruins no other."""
    x = torch.tensor([[[4.0, 1.0], [float("inf"), 2.0], [float("nan"), -float("inf")]]])
    stored, counts = to_storage(x, array(dtype, 3, 2), clip=False, fill=True)
    assert counts.tolist() == [[1, 2, 0]]
    read = from_storage(stored, array(dtype, 3, 2))[0]
    lowest = -2.0 if dtype == "int8" else 1.0
    torch.testing.assert_close(
        read, torch.tensor([[4.0, 1.0], [4.0, 2.0], [0.0, lowest]]), atol=0.02, rtol=0.01
    )
    alone = torch.full((1, 3, 2), float("inf"))
    stored, _ = to_storage(alone, array(dtype, 3, 2), clip=False, fill=True)
    assert torch.isfinite(from_storage(stored, array(dtype, 3, 2))).all()


def test_the_same_type_is_not_touched() -> None:
    x = torch.tensor([[1.0, float("inf")]])
    stored, counts = to_storage(x, array("float32", 2), clip=True)
    assert stored["a"] is x
    assert counts.tolist() == [[0, 1, 0]]


def test_companions_are_arrays_of_their_own() -> None:
    assert companions(array("float16", 4)) == ()
    scale, offset = companions(array("uint8", 4, 2, 2))
    assert (scale.name, scale.shape, scale.dims, scale.dtype) == (
        "a__scale", (4,), ("channel",), "float32",
    )  # fmt: skip
    assert (offset.name, offset.quantises, offset.tap) == ("a__offset", "a", "net.a@out")
    assert companions(array("int8", 4))[0].shape == ()
