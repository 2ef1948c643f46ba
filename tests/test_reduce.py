"""Reductions and the cast to storage, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from drl_data.errors import SpecError
from drl_data.reduce import MAP, TOKENS, VECTOR, reduce, to_storage

X = torch.randn(2, 6, 8, 4, generator=torch.Generator().manual_seed(0))
TOKEN_X = X.flatten(2).transpose(1, 2)


def test_mean_and_max() -> None:
    x = X.double().numpy()
    for name, want in (("mean", x.mean((2, 3))), ("max", x.max((2, 3)))):
        for value, dims in ((X, MAP), (TOKEN_X, TOKENS)):
            got, got_dims = reduce(value, dims, [name])
            assert got_dims == VECTOR
            np.testing.assert_allclose(got, want, atol=1e-6)


def test_average_pool() -> None:
    got, dims = reduce(X, MAP, ["avg_pool(4x2)"])
    assert dims == MAP
    want = X.double().numpy().reshape(2, 6, 4, 2, 2, 2).mean((3, 5))
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert reduce(X, MAP, ["avg_pool(2)"])[0].shape == (2, 6, 2, 2)


def test_reductions_apply_in_order() -> None:
    got, _ = reduce(X, MAP, ["mean", "l2"])
    np.testing.assert_allclose(np.linalg.norm(got.numpy(), axis=1), 1, atol=1e-6)
    other, _ = reduce(X, MAP, ["l2", "mean"])
    assert not np.allclose(got, other)
    norms = reduce(X, MAP, ["l2"])[0].square().sum(1)
    np.testing.assert_allclose(norms, 1, atol=1e-5)


@pytest.mark.parametrize("text", ["mean", "max", "avg_pool(2)", "l2", "avg_pool(8x4)"])
def test_the_meta_device_gives_the_same_shape(text: str) -> None:
    real, dims = reduce(X, MAP, [text])
    meta, meta_dims = reduce(X.to("meta"), MAP, [text])
    assert (real.shape, dims) == (meta.shape, meta_dims)


@pytest.mark.parametrize(
    ("text", "dims"),
    [
        ("median", MAP),
        ("mean(2)", MAP),
        ("avg_pool", MAP),
        ("avg_pool(2)", TOKENS),
        ("mean", VECTOR),
    ],
)
def test_what_does_not_fit_is_refused(text: str, dims: tuple[str, ...]) -> None:
    x = {MAP: X, TOKENS: TOKEN_X, VECTOR: X[..., 0, 0]}[dims]
    with pytest.raises(SpecError, match="want mean, max, avg_pool"):
        reduce(x, dims, [text])


def test_a_pool_never_enlarges() -> None:
    with pytest.raises(SpecError, match=r"avg_pool\(8x8\) of a map of 8x4: it would enlarge"):
        reduce(X, MAP, ["avg_pool(8)"])
    with pytest.raises(SpecError, match=r"avg_pool\(9x4\) of a map of 8x4: it would enlarge"):
        reduce(X, MAP, ["avg_pool(9x4)"])


def test_overflow_is_counted_and_clipped_on_request() -> None:
    x = torch.tensor([1.0, 65504.0, 70000.0, -1e9, float("inf"), float("nan")])
    cast, count = to_storage(x, "float16", clip=False)
    assert int(count) == 2
    assert torch.isinf(cast).tolist() == [False, False, True, True, True, False]
    clipped, count = to_storage(x, "float16", clip=True)
    assert int(count) == 2
    assert clipped[:4].tolist() == [1.0, 65504.0, 65504.0, -65504.0]
    assert torch.isinf(clipped[4])
    assert torch.isnan(clipped[5])


def test_the_same_type_is_not_touched() -> None:
    x = torch.tensor([1.0, float("inf")])
    cast, count = to_storage(x, "float32", clip=True)
    assert cast is x
    assert int(count) == 0
