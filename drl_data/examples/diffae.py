"""The semantic encoder of Diffusion Autoencoders (Preechakul et al. 2022): an image to z_sem.

Half of an ADM UNet without time: blocks of norm, SiLU and convolution with a shortcut, attention at
16 x 16, then the average over space and a projection to 512 (`BeatGANsEncoderModel` in the authors'
code, with `adaptivenonzero` pooling). Tap `out` for z_sem; `input_blocks.*` and `middle_block` are
the maps before.

`backbone.weights` is the state dict of the authors' last.ckpt, of which `ema_model.encoder.*` is
read, for example by

    python -c "import torch, safetensors.torch as s; s.save_file({k: v.contiguous() for k, v in
    torch.load('last.ckpt', map_location='cpu', weights_only=True)['state_dict'].items()
    if k.startswith('ema_model.encoder.')}, 'diffae.safetensors')"

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

PREFIX = "ema_model.encoder."
BLOCKS_PER_LEVEL = 2
ATTENTION_SIDE = 16
"""Side of the maps that attend."""


def _norm(n_channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, n_channels), n_channels)


class Block(nn.Module):
    """[b, c, h, w] to [b, n_out, h, w], or to half the sides with `down`."""

    def __init__(self, n_in: int, n_out: int, *, down: bool = False) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(_norm(n_in), nn.SiLU(), nn.Conv2d(n_in, n_out, 3, padding=1))
        self.skip_connection = nn.Identity() if n_in == n_out else nn.Conv2d(n_in, n_out, 1)
        self.down = down

    def forward(self, x: Tensor) -> Tensor:
        norm, activation, convolve = self.in_layers
        h = activation(norm(x))
        if self.down:
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        out: Tensor = self.skip_connection(x) + convolve(h)
        return out


class Attention(nn.Module):
    """One head over all positions, added to its input."""

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        self.norm = _norm(n_channels)
        self.qkv = nn.Conv1d(n_channels, 3 * n_channels, 1)
        self.proj_out = nn.Conv1d(n_channels, n_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x_bcn = x.flatten(2)
        q, k, v = self.qkv(self.norm(x_bcn)).transpose(1, 2).chunk(3, dim=2)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        out: Tensor = x_bcn + self.proj_out(attended)
        return out.reshape(x.shape)


class SemanticEncoder(nn.Module):
    """[b, 3, h, w] in -1..1 to z_sem [b, n_out]; images of the side `image_size`."""

    def __init__(
        self, image_size: int, width: int, multipliers: Sequence[int], n_out: int = 512
    ) -> None:
        super().__init__()
        n, side = width * multipliers[0], image_size
        self.input_blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(3, n, 3, padding=1))])
        for level, multiplier in enumerate(multipliers):
            for _ in range(BLOCKS_PER_LEVEL):
                layers: list[nn.Module] = [Block(n, width * multiplier)]
                n = width * multiplier
                if side == ATTENTION_SIDE:
                    layers.append(Attention(n))
                self.input_blocks.append(nn.Sequential(*layers))
            if level < len(multipliers) - 1:
                self.input_blocks.append(nn.Sequential(Block(n, n, down=True)))
                side //= 2
        self.middle_block = nn.Sequential(Block(n, n), Attention(n), Block(n, n))
        self.out = nn.Sequential(
            _norm(n), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(n, n_out, 1), nn.Flatten()
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.input_blocks:
            x = block(x)
        z: Tensor = self.out(self.middle_block(x))
        return z


class SemanticEncoderBackbone(CheckpointBackbone):
    """No noise and no time: `schedule: {convention: none}`, `noise: {kind: none}`."""

    def forward(self, x: Tensor, model_time: Tensor, kwargs: Mapping[str, Tensor]) -> object:
        return self.network(x)


def _encoder(
    spec: BackboneSpec,
    device: torch.device,
    image_size: int,
    width: int,
    multipliers: Sequence[int],
    n_out: int = 512,
) -> SemanticEncoderBackbone:
    make = partial(SemanticEncoder, image_size, width, multipliers, n_out)
    multiple = 2 ** (len(multipliers) - 1)
    return SemanticEncoderBackbone(
        make, NoSchedule(), spec, device, prefix=PREFIX, multiple=multiple
    )


def ffhq256(spec: BackboneSpec, device: torch.device) -> SemanticEncoderBackbone:
    """ffhq256_autoenc, for images of 256 px."""
    return _encoder(spec, device, 256, 128, (1, 1, 2, 2, 4, 4, 4))


def ffhq128(spec: BackboneSpec, device: torch.device) -> SemanticEncoderBackbone:
    """ffhq128_autoenc, horse128_autoenc and bedroom128_autoenc, for images of 128 px."""
    return _encoder(spec, device, 128, 128, (1, 1, 2, 3, 4, 4))


def celeba64(spec: BackboneSpec, device: torch.device) -> SemanticEncoderBackbone:
    """celeba64d2c_autoenc and ffhq64_autoenc, for images of 64 px."""
    return _encoder(spec, device, 64, 64, (1, 2, 4, 8, 8))


def tiny(spec: BackboneSpec, device: torch.device) -> SemanticEncoderBackbone:
    """The same for images of 32 px and z_sem of 16, for rehearsals."""
    return _encoder(spec, device, 32, 32, (1, 1, 2), n_out=16)
