"""Probabilities against the fused attention itself: its values are the identity."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from drl_data.attention import AttentionWatch, probabilities

BATCH, HEADS, QUERIES, KEYS, WIDTH = 3, 4, 5, 5, 6


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fused(q: Tensor, k: Tensor, **kwargs: object) -> Tensor:
    """softmax(q k^T scale + mask) I, by F.scaled_dot_product_attention."""
    identity = torch.eye(KEYS).expand(BATCH, k.shape[1], KEYS, KEYS)
    return functional.scaled_dot_product_attention(q, k, identity, **kwargs)


def masks() -> dict[str, Tensor | None]:
    allowed = randn(BATCH, 1, QUERIES, KEYS, seed=2) > -0.5
    allowed[..., 0] = True
    return {
        "none": None,
        "bool": allowed,
        "added": randn(BATCH, HEADS, QUERIES, KEYS, seed=3),
        "one for all": allowed[:1],
        "keys": randn(QUERIES, KEYS, seed=4),
    }


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("scale", [None, 0.3])
def test_masks_and_scales(name: str, scale: float | None) -> None:
    q, k = randn(BATCH, HEADS, QUERIES, WIDTH, seed=0), randn(BATCH, HEADS, KEYS, WIDTH, seed=1)
    mask = masks()[name]
    got = probabilities(q, k, mask, scale=scale, is_causal=False)
    torch.testing.assert_close(got, fused(q, k, attn_mask=mask, scale=scale), atol=1e-6, rtol=1e-5)


def test_causal() -> None:
    q, k = randn(BATCH, HEADS, QUERIES, WIDTH, seed=0), randn(BATCH, HEADS, KEYS, WIDTH, seed=1)
    got = probabilities(q, k, None, scale=None, is_causal=True)
    torch.testing.assert_close(got, fused(q, k, is_causal=True), atol=1e-6, rtol=1e-5)


def test_grouped_queries() -> None:
    q, k = randn(BATCH, HEADS, QUERIES, WIDTH, seed=0), randn(BATCH, 2, KEYS, WIDTH, seed=1)
    got = probabilities(q, k, None, scale=None, is_causal=False)
    torch.testing.assert_close(got, fused(q, k, enable_gqa=True), atol=1e-6, rtol=1e-5)


class Masked(nn.Module):
    """Calls the fused attention as libraries do."""

    def forward(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        return functional.scaled_dot_product_attention(
            q, k, k, attn_mask=mask, is_causal=False, scale=0.3
        )


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 30])
def test_the_watch_sees_the_call_as_it_is_made(
    name: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("drl_data.attention.CHUNK_BYTES", chunk_bytes)
    q, k = randn(BATCH, HEADS, QUERIES, WIDTH, seed=0), randn(BATCH, HEADS, KEYS, WIDTH, seed=1)
    mask, module = masks()[name], Masked()
    taken: list[Tensor] = []
    watch = AttentionWatch({"m": [(lambda x: x.sum(1), taken.append)]})
    with watch:
        outside = module(q, k, mask)
        watch.enter("m")
        inside = module(q, k, mask)
        watch.leave()
        module(q, k, mask)
    assert torch.equal(inside, outside)
    (got,) = taken
    want = fused(q, k, attn_mask=mask, scale=0.3).sum(1)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
