"""The UNets of Denoising Diffusion Autoencoders (Xiang et al. 2023) on CIFAR-10, DDPM and EDM.

`out_K` is the K-th residual block of the decoder with its attention, before any upsampling, as the
authors number them: taps `out_1` .. `out_12` (DDPM), `out_1` .. `out_15` (DDPM++).

`backbone.weights` is the entry EMA of the authors' model_EPOCH.pth, of which
`ema_model.nn_model.*` is read, for example by

    python -c "import torch, safetensors.torch as s; s.save_file({k: v.contiguous() for k, v in
    torch.load('model_1999.pth', map_location='cpu', weights_only=True)['EMA'].items()
    if k.startswith('ema_model.nn_model.')}, 'ddae.safetensors')"

without `time_emb.aug_emb.weight`, which augmented EDMs have and features do not need.

Shapes: b batch, c channel, h w height and width, n position.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drl_data.backbones import CheckpointBackbone
from drl_data.schedule import NoiseSchedule, Schedule
from drl_data.schedule_edm import EDMSchedule
from drl_data.spec import BackboneSpec

PREFIX = "ema_model.nn_model."


class TimeEmbedding(nn.Module):
    """Times [b] to [b, n]: sines, then cosines, of t 10000^(-i / (n/8 - 1)), and two layers."""

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        self.n_frequencies = n_channels // 8
        self.lin1 = nn.Linear(n_channels // 4, n_channels)
        self.lin2 = nn.Linear(n_channels, n_channels)

    def forward(self, t: Tensor) -> Tensor:
        n = self.n_frequencies
        frequencies = torch.exp(torch.arange(n, device=t.device) * (-math.log(10_000) / (n - 1)))
        angles = t.float()[:, None] * frequencies
        waves = torch.cat([angles.sin(), angles.cos()], dim=1).to(self.lin1.weight.dtype)
        embedded: Tensor = self.lin2(F.silu(self.lin1(waves)))
        return embedded


class ResidualBlock(nn.Module):
    """Two convolutions around the time, with a shortcut; `resample` halves or doubles the sides."""

    def __init__(self, n_in: int, n_out: int, n_time: int, resample: str | None = None) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(32, n_in)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(32, n_out)
        self.conv2 = nn.Sequential(nn.Dropout(0.1), nn.Conv2d(n_out, n_out, 3, padding=1))
        self.shortcut = nn.Identity() if n_in == n_out else nn.Conv2d(n_in, n_out, 1)
        self.time_emb = nn.Sequential(nn.SiLU(), nn.Linear(n_time, n_out))
        self.resample = resample

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = F.silu(self.norm1(x))
        if self.resample == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        elif self.resample == "up":
            h, x = (F.interpolate(y, scale_factor=2.0, mode="nearest") for y in (h, x))
        h = self.conv1(h) + self.time_emb(t)[:, :, None, None]
        out: Tensor = self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))
        return out


class AttentionBlock(nn.Module):
    """One head over all positions, added to its input."""

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, n_channels)
        self.projection = nn.Linear(n_channels, 3 * n_channels)
        self.output = nn.Linear(n_channels, n_channels)

    def forward(self, x: Tensor) -> Tensor:
        x_bnc = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.projection(x_bnc).chunk(3, dim=2)
        attended: Tensor = self.output(F.scaled_dot_product_attention(q, k, v))
        return x + attended.transpose(1, 2).reshape(x.shape)


class ResAttBlock(nn.Module):
    """A residual block, and attention where its level has it."""

    def __init__(self, n_in: int, n_out: int, n_time: int, *, attends: bool) -> None:
        super().__init__()
        self.res = ResidualBlock(n_in, n_out, n_time)
        self.attn = AttentionBlock(n_out) if attends else nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.attn(self.res(x, t))
        return out


class Resample(nn.Module):
    """Half or twice the sides, by a convolution (`conv`) or, with `residual`, by a block (`op`)."""

    def __init__(self, n_channels: int, n_time: int, way: str, *, residual: bool) -> None:
        super().__init__()
        self.way = way
        if residual:
            self.op = ResidualBlock(n_channels, n_channels, n_time, way)
        else:
            stride = 2 if way == "down" else 1
            self.conv = nn.Conv2d(n_channels, n_channels, 3, stride=stride, padding=1)
        self.residual = residual

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if not self.residual and self.way == "up":
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        out: Tensor = self.op(x, t) if self.residual else self.conv(x)
        return out


class Middle(nn.Module):
    """Block, attention, block."""

    def __init__(self, n_channels: int, n_time: int) -> None:
        super().__init__()
        self.res1 = ResidualBlock(n_channels, n_channels, n_time)
        self.attn = AttentionBlock(n_channels)
        self.res2 = ResidualBlock(n_channels, n_channels, n_time)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.res2(self.attn(self.res1(x, t)), t)
        return out


class UNet(nn.Module):
    """[b, 3, h, w] and times [b] to [b, 3, h, w]; `attends` says which levels have attention."""

    def __init__(
        self,
        width: int,
        multipliers: Sequence[int],
        attends: Sequence[bool],
        n_blocks: int,
        *,
        residual_resampling: bool,
    ) -> None:
        super().__init__()
        n_time, n = 4 * width, width
        levels = list(zip([width * m for m in multipliers], attends, strict=True))
        skips = [n]
        self.image_proj = nn.Conv2d(3, n, 3, padding=1)
        self.time_emb = TimeEmbedding(n_time)
        down: list[nn.Module] = []
        for level, (n_out, attention) in enumerate(levels):
            for _ in range(n_blocks):
                down.append(ResAttBlock(n, n_out, n_time, attends=attention))
                n = n_out
                skips.append(n)
            if level < len(levels) - 1:
                down.append(Resample(n, n_time, "down", residual=residual_resampling))
                skips.append(n)
        self.down = nn.ModuleList(down)
        self.middle = Middle(n, n_time)
        up: list[nn.Module] = []
        for level, (n_out, attention) in reversed(list(enumerate(levels))):
            for _ in range(n_blocks + 1):
                up.append(ResAttBlock(n + skips.pop(), n_out, n_time, attends=attention))
                n = n_out
            if level:
                up.append(Resample(n, n_time, "up", residual=residual_resampling))
        self.up = nn.ModuleList(up)
        self.norm = nn.GroupNorm(8, n)
        self.final = nn.Conv2d(n, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        told = self.time_emb(t)
        x = self.image_proj(x)
        skips = [x]
        for module in self.down:
            x = module(x, told)
            skips.append(x)
        x = self.middle(x, told)
        for module in self.up:
            if isinstance(module, ResAttBlock):
                x = torch.cat([x, skips.pop()], dim=1)
            x = module(x, told)
        out: Tensor = self.final(F.silu(self.norm(x)))
        return out


class DdaeBackbone(CheckpointBackbone):
    """A DDAE, whose taps may use the authors' names."""

    def aliases(self) -> Mapping[str, tuple[str, str]]:
        up = self.network.get_submodule("up")
        blocks = [i for i, module in up.named_children() if isinstance(module, ResAttBlock)]
        return {f"out_{k}": (f"up.{i}", f"up.{i}") for k, i in enumerate(blocks, 1)}


_DDPM = partial(UNet, 128, (1, 2, 2, 2), (False, True, False, False), 2, residual_resampling=False)
_DDPMPP = partial(UNet, 128, (2, 2, 2), (False, True, False), 4, residual_resampling=True)
_TINY = partial(UNet, 32, (1, 2, 2, 2), (False, True, False, False), 2, residual_resampling=False)
_TINYPP = partial(UNet, 32, (2, 2, 2), (False, True, False), 4, residual_resampling=True)


def _linear() -> NoiseSchedule:
    betas = torch.linspace(1e-4, 0.02, 1000)
    return NoiseSchedule(torch.cumprod(1 - betas, dim=0))


def _ddae(
    make: partial[UNet], schedule: Schedule, spec: BackboneSpec, device: torch.device
) -> DdaeBackbone:
    return DdaeBackbone(make, schedule, spec, device, prefix=PREFIX, multiple=8)


def cifar10_ddpm(spec: BackboneSpec, device: torch.device) -> DdaeBackbone:
    """DDPM_ddpm, 35.7 million parameters."""
    return _ddae(_DDPM, _linear(), spec, device)


def cifar10_ddpmpp(spec: BackboneSpec, device: torch.device) -> DdaeBackbone:
    """DDPM_ddpmpp, 56.5 million parameters."""
    return _ddae(_DDPMPP, _linear(), spec, device)


def cifar10_edm(spec: BackboneSpec, device: torch.device) -> DdaeBackbone:
    """EDM_ddpm: the network of `cifar10_ddpm`, preconditioned."""
    return _ddae(_DDPM, EDMSchedule(), spec, device)


def cifar10_edm_ddpmpp(spec: BackboneSpec, device: torch.device) -> DdaeBackbone:
    """EDM_ddpmpp and EDM_ddpmpp_aug: the network of `cifar10_ddpmpp`, preconditioned."""
    return _ddae(_DDPMPP, EDMSchedule(), spec, device)


def tiny_ddpm(spec: BackboneSpec, device: torch.device) -> DdaeBackbone:
    """`cifar10_ddpm` with a quarter of the channels, for rehearsals."""
    return _ddae(_TINY, _linear(), spec, device)


def tiny_ddpmpp(spec: BackboneSpec, device: torch.device) -> DdaeBackbone:
    """`cifar10_ddpmpp` with a quarter of the channels, for rehearsals."""
    return _ddae(_TINYPP, _linear(), spec, device)


def tiny_edm(spec: BackboneSpec, device: torch.device) -> DdaeBackbone:
    """`cifar10_edm` with a quarter of the channels, for rehearsals."""
    return _ddae(_TINY, EDMSchedule(), spec, device)


def tiny_edm_ddpmpp(spec: BackboneSpec, device: torch.device) -> DdaeBackbone:
    """`cifar10_edm_ddpmpp` with a quarter of the channels, for rehearsals."""
    return _ddae(_TINYPP, EDMSchedule(), spec, device)
