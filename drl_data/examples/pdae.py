"""The encoder of PDAE (Zhang et al. 2022), which fills the gap that a frozen DDPM leaves: an image
of 128 px to z, 512 numbers.

Five convolutions of stride 2 with norms and SiLU between them, four heads of attention at 16 x 16,
a projection of what is left. Tap `encoder.17` for z. `backbone.weights` is what the authors' code
keeps as `ema_encoder`, as safetensors (its keys are `encoder.0.weight` ...).

Shapes: b batch, c channel, h w height and width, n position.
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

HEADS = 4


class HeadsOfChannels(nn.Module):
    """Attention over all positions whose channels are heads of (q, k, v), added to its input; as
    guided-diffusion's."""

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, n_channels)
        self.qkv = nn.Conv1d(n_channels, 3 * n_channels, 1)
        self.proj_out = nn.Conv1d(n_channels, n_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x_bcn = x.flatten(2)
        heads = self.qkv(self.norm(x_bcn)).unflatten(1, (HEADS, -1)).transpose(2, 3)
        attended = F.scaled_dot_product_attention(*heads.chunk(3, dim=3))
        out: Tensor = x_bcn + self.proj_out(attended.transpose(2, 3).flatten(1, 2))
        return out.reshape(x.shape)


class Encoder(nn.Module):
    """[b, 3, h, w] in -1..1 to z [b, n_out]; sides of `image_size`."""

    def __init__(self, image_size: int, widths: Sequence[int], n_out: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for i, width in enumerate(widths):
            layers.append(nn.Conv2d(before, width, 3, stride=2, padding=1))
            if i == 2:
                layers.append(HeadsOfChannels(width))
            layers += [nn.GroupNorm(32, width), nn.SiLU()]
            before = width
        n = before * (image_size // 2 ** len(widths)) ** 2
        self.encoder = nn.Sequential(*layers, nn.Flatten(), nn.Linear(n, n_out))

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.encoder(x)
        return z


class EncoderBackbone(CheckpointBackbone):
    """No noise and no time: `schedule: {convention: none}`, `noise: {kind: none}`."""

    def forward(self, x: Tensor, model_time: Tensor, kwargs: Mapping[str, Tensor]) -> object:
        return self.network(x)


def _encoder(
    spec: BackboneSpec, device: torch.device, image_size: int, widths: Sequence[int], n_out: int
) -> EncoderBackbone:
    make = partial(Encoder, image_size, widths, n_out)
    return EncoderBackbone(make, NoSchedule(), spec, device, multiple=image_size)


def ffhq128(spec: BackboneSpec, device: torch.device) -> EncoderBackbone:
    """FFHQ and CelebA-HQ, for images of 128 px."""
    return _encoder(spec, device, 128, (64, 128, 256, 256, 256), 512)


def tiny(spec: BackboneSpec, device: torch.device) -> EncoderBackbone:
    """The same for images of 32 px and z of 16, for rehearsals."""
    return _encoder(spec, device, 32, (32, 32, 64, 64, 64), 16)
