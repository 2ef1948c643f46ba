"""The encoder of InfoDiffusion (Wang et al. 2023): an image to its auxiliary variable `a`.

A U-Net without time whose output is one channel; a projection of its pixels is `a`, of which two
more make the mean and the log-variance of the posterior. Tap `fc_a` for `a`, `fc_mu` for the mean.
`backbone.weights` is the state dict of the authors' InfoDiff, of which `encoder.*` is read.

Shapes: b batch, c channel, h w height and width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drl_data.backbones import CheckpointBackbone
from drl_data.schedule import NoSchedule
from drl_data.spec import BackboneSpec

PREFIX = "encoder."
BLOCKS_PER_LEVEL = 2
ATTENTION_LEVEL = 2


class Attention(nn.Module):
    """One head over all positions, added to its input."""

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(32, n_channels)
        for name in ("proj_q", "proj_k", "proj_v", "proj"):
            self.add_module(name, nn.Conv2d(n_channels, n_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x)
        q, k, v = (
            self.get_submodule(f"proj_{name}")(h).flatten(2).transpose(1, 2) for name in "qkv"
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        out: Tensor = x + self.get_submodule("proj")(attended)
        return out


class Block(nn.Module):
    """[b, c, h, w] to [b, n_out, h, w]: two convolutions and a shortcut, then perhaps attention."""

    def __init__(self, n_in: int, n_out: int, *, attends: bool) -> None:
        super().__init__()
        self.block1 = nn.Sequential(
            nn.GroupNorm(32, n_in), nn.SiLU(), nn.Conv2d(n_in, n_out, 3, padding=1)
        )
        self.block2 = nn.Sequential(
            nn.GroupNorm(32, n_out),
            nn.SiLU(),
            nn.Dropout(0.1),
            nn.Conv2d(n_out, n_out, 3, padding=1),
        )
        self.shortcut = nn.Identity() if n_in == n_out else nn.Conv2d(n_in, n_out, 1)
        self.attn = Attention(n_out) if attends else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attn(self.block2(self.block1(x)) + self.shortcut(x))
        return out


class Resample(nn.Module):
    """To half the sides, or to twice with `up`."""

    def __init__(self, n_channels: int, *, up: bool = False) -> None:
        super().__init__()
        self.main = nn.Conv2d(n_channels, n_channels, 3, stride=1 if up else 2, padding=1)
        self.up = up

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.main(F.interpolate(x, scale_factor=2.0) if self.up else x)
        return out


class Encoder(nn.Module):
    """[b, 3, h, w] in -1..1 to (a, mean, log-variance), each [b, n_out]."""

    def __init__(self, image_size: int, width: int, multipliers: Sequence[int], n_out: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.downblocks, self.upblocks = nn.ModuleList(), nn.ModuleList()
        n, skips = width, [width]
        for level, multiplier in enumerate(multipliers):
            for _ in range(BLOCKS_PER_LEVEL):
                attends = level == ATTENTION_LEVEL
                self.downblocks.append(Block(n, width * multiplier, attends=attends))
                n = width * multiplier
                skips.append(n)
            if level < len(multipliers) - 1:
                self.downblocks.append(Resample(n))
                skips.append(n)
        self.middleblocks = nn.ModuleList([Block(n, n, attends=True), Block(n, n, attends=False)])
        for level in reversed(range(len(multipliers))):
            for _ in range(BLOCKS_PER_LEVEL + 1):
                n_out_block = width * multipliers[level]
                attends = level == ATTENTION_LEVEL
                self.upblocks.append(Block(n + skips.pop(), n_out_block, attends=attends))
                n = n_out_block
            if level:
                self.upblocks.append(Resample(n, up=True))
        self.tail = nn.Sequential(nn.GroupNorm(32, n), nn.SiLU(), nn.Conv2d(n, 1, 3, padding=1))
        self.fc_a = nn.Linear(image_size**2, n_out)
        self.fc_mu = nn.Linear(n_out, n_out)
        self.fc_var = nn.Linear(n_out, n_out)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.head(x)
        skips = [h]
        for layer in self.downblocks:
            h = layer(h)
            skips.append(h)
        for layer in self.middleblocks:
            h = layer(h)
        for layer in self.upblocks:
            h = layer(torch.cat([h, skips.pop()], dim=1) if isinstance(layer, Block) else h)
        a = self.fc_a(self.tail(h).flatten(1))
        return a, self.fc_mu(a), self.fc_var(a)


class EncoderBackbone(CheckpointBackbone):
    """No noise and no time: `schedule: {convention: none}`, `noise: {kind: none}`."""

    def forward(self, x: Tensor, model_time: Tensor, kwargs: Mapping[str, Tensor]) -> object:
        return self.network(x)


def _encoder(
    spec: BackboneSpec, device: torch.device, image_size: int, width: int, n_out: int
) -> EncoderBackbone:
    make = partial(Encoder, image_size, width, (1, 2, 2, 2), n_out)
    return EncoderBackbone(make, NoSchedule(), spec, device, prefix=PREFIX, multiple=image_size)


def celeba64(spec: BackboneSpec, device: torch.device) -> EncoderBackbone:
    """CelebA at 64 px, `a` of 32."""
    return _encoder(spec, device, 64, 64, 32)


def tiny(spec: BackboneSpec, device: torch.device) -> EncoderBackbone:
    """The same for images of 16 px and `a` of 8, for rehearsals."""
    return _encoder(spec, device, 16, 32, 8)
