"""Attention probabilities, which fused kernels never hold, and the q and k that they come from.

While an attention module runs, its call of `F.scaled_dot_product_attention` is seen by a
TorchFunctionMode, whatever processor, normalisation and rotary embedding came before it, with the
mask and the scale of the call itself: the probabilities are computed anew from the same q and k.
The call goes on unchanged.

Shapes: b batch, h head, q query, k key, d channel of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Operand = Literal["query", "key"]

CHUNK_BYTES = 1 << 30
"""Probabilities of so many samples are in memory at once, at least of one."""


def probabilities(
    q_bhqd: Tensor, k_bhkd: Tensor, mask: Tensor | None, *, scale: float | None, is_causal: bool
) -> Tensor:
    """softmax(q k^T scale + mask) [b, h, q, k] in float32, as F.scaled_dot_product_attention
    defines it; `scale` is 1 / sqrt(d) by default."""
    if scale is None:
        scale = 1 / math.sqrt(q_bhqd.shape[-1])
    n_groups = q_bhqd.shape[1] // k_bhkd.shape[1]
    if n_groups > 1:  # grouped queries
        k_bhkd = k_bhkd.repeat_interleave(n_groups, dim=1)
    scores = (q_bhqd.float() @ k_bhkd.float().transpose(-2, -1)) * scale
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, -math.inf)
    if mask is not None:
        is_bool = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -math.inf) if is_bool else scores + mask
    return scores.softmax(-1)


class AttentionWatch(TorchFunctionMode):
    """Gives the probabilities of the attention call inside a watched module to its taker.

    `takers`: module path -> what takes [b', h, q, k] of some samples and returns what is kept of
    them, and what takes all that was kept, joined along the samples. `operands`: module path ->
    what takes its queries or its keys, all heads side by side [b, n, h d].
    """

    def __init__(
        self,
        takers: Mapping[str, Sequence[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], None]]]],
        operands: Mapping[
            str, Sequence[tuple[Operand, Callable[[Tensor], None]]]
        ] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self._takers = takers
        self._operands = operands
        self._inside: list[str] = []
        self._working = False

    def enter(self, module: str) -> None:
        """A watched module begins its forward."""
        self._inside.append(module)

    def leave(self) -> None:
        """The innermost watched module has ended its forward."""
        self._inside.pop()

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        given = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and self._inside and not self._working:
            self._working = True
            try:
                self._take(*args, **given)
            finally:
                self._working = False
        return func(*args, **given)

    def _take(
        self,
        query: object = None,
        key: object = None,
        value: object = None,
        attn_mask: object = None,
        dropout_p: object = 0.0,
        is_causal: object = False,
        scale: object = None,
        enable_gqa: object = False,
    ) -> None:
        assert isinstance(query, Tensor)
        assert isinstance(key, Tensor)
        mask = attn_mask if isinstance(attn_mask, Tensor) else None
        for which, give in self._operands.get(self._inside[-1], ()):
            x = query if which == "query" else key
            give(x.transpose(1, 2).flatten(2))
        b, h, n_queries, _ = query.shape
        if mask is not None and mask.ndim == 4:
            mask = mask.expand(b, *mask.shape[1:])
        step = max(CHUNK_BYTES // max(h * n_queries * key.shape[2] * 4, 1), 1)
        for keep, give in self._takers.get(self._inside[-1], ()):
            parts = []
            for i in range(0, b, step):
                some = mask if mask is None or mask.ndim != 4 else mask[i : i + step]
                parts.append(
                    keep(
                        probabilities(
                            query[i : i + step],
                            key[i : i + step],
                            some,
                            scale=scale if isinstance(scale, float) else None,
                            is_causal=bool(is_causal),
                        )
                    )
                )
            give(torch.cat(parts))
