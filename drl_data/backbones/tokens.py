"""Where the image's tokens of a transformer lie on it.

Shapes: b batch, n token, c channel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from drl_data.backbones.backbone import arrange, map_dims
from drl_data.errors import TapError
from drl_data.reduce import TOKENS
from drl_data.taps import ResolvedTap


@dataclass(frozen=True)
class TokenLayout:
    """The grid of patches, row-major; of a video frame after frame."""

    height: int
    width: int
    frames: int | None = None

    def arrange(
        self, tap: ResolvedTap, x: Tensor, *, text: bool, only_image: bool = False
    ) -> tuple[Tensor, tuple[str, ...]]:
        """Tokens [b, n, c] of the image to a map; text stays tokens.

        Raises:
            TapError: if `only_image` and there are other tokens: the library's layout changed.
        """
        if x.ndim != 3:
            return arrange(x, (0, 0))
        frames = () if self.frames is None else (self.frames,)
        grid = (*frames, self.height, self.width)
        n_image = math.prod(grid)
        text = text or (tap.site == "attn.key" and tap.module.endswith("attn2"))
        if not text and x.shape[1] == n_image:
            maps = x.transpose(1, 2).reshape(len(x), -1, *grid)
            return maps, map_dims(maps)
        if only_image and not text:
            raise TapError(
                f"tap {tap.address}: {x.shape[1]} tokens, want the image's {n_image}; the "
                "library's layout is not the one that this adapter knows: choose an entry with "
                "@out.N"
            )
        return x, TOKENS
