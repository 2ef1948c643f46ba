"""Reductions against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from drl_data.errors import SpecError
from drl_data.moments import Moments
from drl_data.reduce import (
    MAP,
    PROBABILITIES,
    TOKENS,
    VECTOR,
    Context,
    Pca,
    at_source,
    pca_of,
    reduce,
)

X = torch.randn(2, 6, 8, 4, generator=torch.Generator().manual_seed(0))
TOKEN_X = X.flatten(2).transpose(1, 2)
VECTOR_X = X[..., 0, 0]
PROBS = torch.rand(2, 4, 6, 5, generator=torch.Generator().manual_seed(1))
TENSORS = {MAP: X, TOKENS: TOKEN_X, VECTOR: VECTOR_X, PROBABILITIES: PROBS}


def as_numpy(x: Tensor) -> np.ndarray:
    return x.double().numpy()


def test_mean_and_max() -> None:
    x = as_numpy(X)
    for name, want in (("mean", x.mean((2, 3))), ("max", x.max((2, 3)))):
        for value, dims in ((X, MAP), (TOKEN_X, TOKENS)):
            got, got_dims = reduce(value, dims, [name])
            assert got_dims == VECTOR
            np.testing.assert_allclose(got, want, atol=1e-6)


def test_average_pool() -> None:
    got, dims = reduce(X, MAP, ["avg_pool(4x2)"])
    assert dims == MAP
    want = as_numpy(X).reshape(2, 6, 4, 2, 2, 2).mean((3, 5))
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert reduce(X, MAP, ["avg_pool(2)"])[0].shape == (2, 6, 2, 2)


def test_average_pool_of_the_maps_of_heads() -> None:
    x = X.reshape(2, 2, 3, 8, 4)
    got, dims = reduce(x, ("head", *MAP), ["avg_pool(4x2)"])
    assert dims == ("head", *MAP)
    np.testing.assert_allclose(got.reshape(2, 6, 4, 2), reduce(X, MAP, ["avg_pool(4x2)"])[0])


def test_reductions_apply_in_order() -> None:
    got, _ = reduce(X, MAP, ["mean", "l2"])
    np.testing.assert_allclose(np.linalg.norm(got.numpy(), axis=1), 1, atol=1e-6)
    other, _ = reduce(X, MAP, ["l2", "mean"])
    assert not np.allclose(got, other)
    norms = reduce(X, MAP, ["l2"])[0].square().sum(1)
    np.testing.assert_allclose(norms, 1, atol=1e-5)


def test_selections() -> None:
    x, tokens = X.numpy(), TOKEN_X.numpy()
    channels = [0, 1, 2, 5]
    for text, value, dims, want in (
        ("cls", TOKEN_X, TOKENS, tokens[:, 0]),
        ("tokens(4:8,0)", TOKEN_X, TOKENS, tokens[:, [4, 5, 6, 7, 0]]),
        ("channels(0:3,5)", X, MAP, x[:, channels]),
        ("channels(0:3,5)", TOKEN_X, TOKENS, tokens[..., channels]),
        ("drop_channels(3,4)", X, MAP, x[:, channels]),
        ("heads(1,3)", PROBS, PROBABILITIES, PROBS.numpy()[:, [1, 3]]),
    ):
        np.testing.assert_array_equal(reduce(value, dims, [text])[0], want, text)
    zeroed = x.copy()
    zeroed[:, [1, 4]] = 0
    np.testing.assert_array_equal(reduce(X, MAP, ["zero_channels(1,4)"])[0], zeroed)
    np.testing.assert_array_equal(X, x)  # the input is not changed


def test_heads() -> None:
    got, dims = reduce(PROBS, PROBABILITIES, ["head_mean"])
    assert dims == TOKENS
    np.testing.assert_allclose(got, as_numpy(PROBS).mean(1), atol=1e-6)
    np.testing.assert_allclose(
        reduce(PROBS, PROBABILITIES, ["heads(0:2)", "head_sum", "channels(1:3)"])[0],
        as_numpy(PROBS)[:, :2].sum(1)[..., 1:3],
        atol=1e-6,
    )


@pytest.mark.parametrize("dims", [MAP, TOKENS, VECTOR])
def test_layer_norm_and_adaln(dims: tuple[str, ...]) -> None:
    value = TENSORS[dims]
    axis = dims.index("channel") + 1
    x = as_numpy(value)
    centred = x - x.mean(axis, keepdims=True)

    def normalised(eps: float) -> np.ndarray:
        return centred / np.sqrt((centred**2).mean(axis, keepdims=True) + eps)

    np.testing.assert_allclose(reduce(value, dims, ["layer_norm"])[0], normalised(1e-6), atol=1e-5)
    np.testing.assert_allclose(
        reduce(value, dims, ["layer_norm(0.5)"])[0], normalised(0.5), atol=1e-5
    )
    shift, scale = torch.randn(2, 6), torch.randn(2, 6)
    spread = [1] * value.ndim
    spread[0], spread[axis] = 2, 6
    want = normalised(1e-6) * (1 + as_numpy(scale).reshape(spread)) + as_numpy(shift).reshape(
        spread
    )
    got = reduce(value, dims, ["adaln"], Context(shift, scale))[0]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_per_sample_normalisations() -> None:
    x = as_numpy(VECTOR_X)  # RCG: rep -> (rep - mean) / std, torch's unbiased std
    want = (x - x.mean(1, keepdims=True)) / x.std(1, ddof=1, keepdims=True)
    np.testing.assert_allclose(reduce(VECTOR_X, VECTOR, ["standardise"])[0], want, atol=1e-5)
    m = as_numpy(X)  # iREPA: over the tokens of one image, each channel by itself
    mean, std = m.mean((2, 3), keepdims=True), m.std((2, 3), ddof=1, keepdims=True)
    for text, gamma in (("spatial_norm", 1), ("spatial_norm(0.5)", 0.5)):
        want = (m - gamma * mean) / (std + 1e-6)
        np.testing.assert_allclose(reduce(X, MAP, [text])[0], want, atol=1e-5)
        tokens = want.reshape(2, 6, -1).swapaxes(1, 2)
        np.testing.assert_allclose(reduce(TOKEN_X, TOKENS, [text])[0], tokens, atol=1e-5)


def test_a_random_projection_is_one_seeded_matrix_everywhere() -> None:
    got, dims = reduce(X, MAP, ["project(3)"])
    assert (dims, got.shape) == (MAP, (2, 3, 8, 4))
    eye = reduce(torch.eye(6), VECTOR, ["project(3)"])[0].numpy()
    np.testing.assert_allclose(got, np.einsum("bchw,ck->bkhw", X, eye), atol=1e-5)
    assert eye[0, 0] == pytest.approx(GOLDEN_PROJECTION, abs=1e-7)
    assert not np.allclose(eye, reduce(torch.eye(6), VECTOR, ["project(3, 1)"])[0])
    np.testing.assert_array_equal(eye, reduce(torch.eye(6), VECTOR, ["project(3,0)"])[0])


GOLDEN_PROJECTION = -0.5486494898796082
"""First entry of the 6 x 3 matrix of seed 0: stores depend on it."""


def test_a_random_projection_keeps_lengths() -> None:
    x = torch.randn(200, 512, generator=torch.Generator().manual_seed(2))
    y = reduce(x, VECTOR, ["project(256)"])[0]
    ratio = (y.norm(dim=1) / x.norm(dim=1)).numpy()
    # ||y||^2 / ||x||^2 is chi-square(256) / 256 (Johnson and Lindenstrauss): std of the root 0.044
    assert abs(ratio.mean() - 1) < 0.01
    assert 0.03 < ratio.std() < 0.06


def test_pca_is_numpys() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(500, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + 100
    components, variances = Moments.of(x, covariance=True).principal(2)
    fit = Pca(x.mean(0), components.float())
    got = as_numpy(reduce(x, VECTOR, ["pca(2)"], Context(pca=fit))[0])
    centred = as_numpy(x) - as_numpy(x).mean(0)
    _, singular, rows = np.linalg.svd(centred, full_matrices=False)
    for i in range(2):
        want = centred @ rows[i]
        assert min(abs(got[:, i] - want).max(), abs(got[:, i] + want).max()) < 1e-3
        assert components[i].max() == components[i].abs().max()
    np.testing.assert_allclose(variances, singular[:2] ** 2 / 499, rtol=1e-9)
    with pytest.raises(SpecError, match="not fitted; `drl extract` fits it"):
        reduce(x, VECTOR, ["pca(2)"])
    assert pca_of(["mean", "pca(2, 50)"]) == (1, 2, 50)
    assert pca_of(["mean"]) is None
    with pytest.raises(SpecError, match="pca twice"):
        pca_of(["pca(2)", "pca(2)"])


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(0, 2**31), st.booleans())
def test_moments_of_parts_are_those_of_the_whole(
    sizes: list[int], seed: int, covariance: bool
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(1e4, 1, (sum(sizes), 3))
    merged: Moments | None = None
    for part in np.split(x, np.cumsum(sizes)[:-1]):
        found = Moments.of(torch.from_numpy(part), covariance=covariance)
        merged = found if merged is None else merged.merged(found)
    assert merged is not None
    assert merged.count == len(x)
    np.testing.assert_allclose(merged.mean, x.mean(0), rtol=1e-13)
    if len(x) > 1:
        np.testing.assert_allclose(merged.variance, x.var(0, ddof=1), rtol=1e-8, atol=1e-12)
        if covariance:
            np.testing.assert_allclose(merged.covariance, np.cov(x.T), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("text", "dims"),
    [
        *((text, MAP) for text in ("mean", "max", "avg_pool(2)", "l2", "avg_pool(8x4)")),
        *((text, MAP) for text in ("channels(1)", "drop_channels(0)", "zero_channels(0)")),
        *((text, MAP) for text in ("project(3)", "pca(2)", "layer_norm", "standardise")),
        *((text, TOKENS) for text in ("cls", "tokens(0:4)", "spatial_norm", "pca(2)", "mean")),
        *((text, PROBABILITIES) for text in ("heads(0)", "head_mean", "head_sum")),
    ],
)
def test_the_meta_device_gives_the_same_shape(text: str, dims: tuple[str, ...]) -> None:
    x = TENSORS[dims]
    n_channels = x.shape[dims.index("channel") + 1]
    fit = Pca(torch.zeros(n_channels), torch.zeros(2, n_channels))
    real, real_dims = reduce(x, dims, [text], Context(pca=fit))
    meta, meta_dims = reduce(x.to("meta"), dims, [text])
    assert (real.shape, real_dims, real.dtype) == (meta.shape, meta_dims, meta.dtype)


@pytest.mark.parametrize(
    ("text", "dims", "message"),
    [
        ("median", MAP, "want one of mean, max, avg_pool"),
        ("mean(2)", MAP, "want no argument"),
        ("avg_pool", MAP, r"want a map, and avg_pool\(S\)"),
        ("avg_pool(0)", MAP, r"want avg_pool\(S\)"),
        ("avg_pool(2)", TOKENS, "want a map"),
        ("mean", VECTOR, "it needs space or tokens"),
        ("cls", MAP, "want an axis 'token'"),
        ("tokens(3:99)", TOKENS, r"positions of 0\.\.31"),
        ("channels(6)", MAP, r"positions of 0\.\.5"),
        ("channels", MAP, "positions of"),
        ("channels(1:)", MAP, "want positions like"),
        ("drop_channels(0:6)", MAP, "no channel would be left"),
        ("head_mean", MAP, "want an axis 'head'"),
        ("project", MAP, "want 1 to 2 whole numbers"),
        ("project(0)", MAP, "want at least 1"),
        ("pca(7)", MAP, "want at most 6 components"),
        ("layer_norm(x)", MAP, "want one number"),
        ("adaln", MAP, "needs the modulation of a block"),
        ("spatial_norm", VECTOR, "it needs space or tokens"),
    ],
)
def test_what_does_not_fit_is_refused(text: str, dims: tuple[str, ...], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        reduce(TENSORS[dims], dims, [text])


def test_a_pool_never_enlarges() -> None:
    with pytest.raises(SpecError, match=r"avg_pool\(8x8\) of a map of 8x4: it would enlarge"):
        reduce(X, MAP, ["avg_pool(8)"])
    with pytest.raises(SpecError, match=r"avg_pool\(9x4\) of a map of 8x4: it would enlarge"):
        reduce(X, MAP, ["avg_pool(9x4)"])


def test_another_blocks_modulation_is_refused() -> None:
    context = Context(torch.zeros(2, 5), torch.zeros(2, 5))
    with pytest.raises(SpecError, match="modulation has 5 channels"):
        reduce(X, MAP, ["adaln"], context)


def test_what_happens_at_the_source() -> None:
    assert at_source(["head_mean", "channels(1:3)", "avg_pool(4)", "channels(0)"]) == (
        "head_mean",
        "channels(1:3)",
    )
    assert at_source(["mean"]) == ()
