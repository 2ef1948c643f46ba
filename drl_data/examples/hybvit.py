"""HybViT (Yang et al. 2022): one ViT that predicts noise from its patches and classes from its CLS.

The classifier sees the clean image and no time (the denoiser scales and shifts every token by the
time, here left out). Taps: `transformer@out.cls`, `transformer@out.patches`, and `mlp_head.0`, the
normalised class token that the classifier takes.

`backbone.weights` is the authors' checkpoint of the diffusion model, of which `denoise_fn.*` is
read, for example by

    python -c "import torch, safetensors.torch as s; s.save_file({k: v.contiguous() for k, v in
    torch.load('checkpoint.pth', map_location='cpu', weights_only=True)['model_state_dict'].items()
    if k.startswith('denoise_fn.')}, 'hybvit.safetensors')"

Shapes: b batch, c channel, h w height and width, n token.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drl_data.backbones import CheckpointBackbone
from drl_data.capture import Streams
from drl_data.schedule import NoSchedule
from drl_data.spec import BackboneSpec

PREFIX = "denoise_fn."
PATCH = 4
"""Side of a patch in pixels, for images of 32 px."""
MLP_RATIO = 2


class PreNorm(nn.Module):
    """`fn` of the normalised tokens."""

    def __init__(self, n_channels: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(n_channels)
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fn(self.norm(x))
        return out


class Attention(nn.Module):
    """Self-attention of tokens [b, n, c]."""

    def __init__(self, n_channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(n_channels, 3 * n_channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(n_channels, n_channels), nn.Dropout(0.0))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*qkv.unbind(0))
        out: Tensor = self.to_out(attended.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """Two layers."""

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        n_hidden = MLP_RATIO * n_channels
        self.net = nn.Sequential(
            nn.Linear(n_channels, n_hidden),
            nn.GELU(),
            nn.Dropout(0.0),
            nn.Linear(n_hidden, n_channels),
            nn.Dropout(0.0),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class Transformer(nn.Module):
    """Blocks of attention and feed-forward; `time_layers` are the denoiser's, not used here."""

    def __init__(self, n_channels: int, n_tokens: int, depth: int, heads: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PreNorm(n_channels, Attention(n_channels, heads)),
                    PreNorm(n_channels, FeedForward(n_channels)),
                ]
            )
            for _ in range(depth)
        )
        self.time_layers = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Linear(4 * n_tokens, 2 * n_tokens)) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleList)
            attention, feed_forward = layer
            x = attention(x) + x
            x = feed_forward(x) + x
        return x


class HybViT(nn.Module):
    """[b, 3, h, w] to logits [b, class] of the clean image; square images of `image_size`."""

    def __init__(
        self, image_size: int, n_channels: int, depth: int, heads: int, n_classes: int
    ) -> None:
        super().__init__()
        n_patches, n_pixels = (image_size // PATCH) ** 2, 3 * PATCH**2
        n_time = 4 * (n_patches + 1)
        self.to_patch_embedding = nn.Sequential(nn.Identity(), nn.Linear(n_pixels, n_channels))
        self.pos_embedding = nn.Parameter(torch.randn(1, n_patches + 1, n_channels))
        self.cls_token = nn.Parameter(torch.randn(1, 1, n_channels))
        self.transformer = Transformer(n_channels, n_patches + 1, depth, heads)
        self.mlp_head = nn.Sequential(nn.LayerNorm(n_channels), nn.Linear(n_channels, n_classes))
        # The denoiser's: its head and its time, which the clean image does not pass.
        self.recon_head = nn.Sequential(nn.Linear(n_channels, n_pixels))
        self.time_mlp = nn.Sequential(
            nn.Identity(), nn.Linear(n_channels, n_time), nn.GELU(), nn.Linear(n_time, n_time)
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        patches = x.reshape(b, c, height // PATCH, PATCH, width // PATCH, PATCH)
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        tokens = torch.cat([self.cls_token.expand(b, -1, -1), self.to_patch_embedding(patches)], 1)
        logits: Tensor = self.mlp_head(self.transformer(tokens + self.pos_embedding)[:, 0])
        return logits


class HybViTBackbone(CheckpointBackbone):
    """No noise and no time: `schedule: {convention: none}`, `noise: {kind: none}`."""

    def forward(self, x: Tensor, model_time: Tensor, kwargs: Mapping[str, Tensor]) -> object:
        return self.network(x)

    def streams(self, x: Tensor, kwargs: Mapping[str, Tensor]) -> Streams:
        return Streams((x.shape[-2] // PATCH) * (x.shape[-1] // PATCH), n_text=None)


def cifar10(spec: BackboneSpec, device: torch.device) -> HybViTBackbone:
    """384 channels, 9 blocks of 12 heads, 10 classes, for images of 32 px."""
    make = partial(HybViT, 32, 384, 9, 12, 10)
    return HybViTBackbone(make, NoSchedule(), spec, device, prefix=PREFIX, multiple=PATCH)


def tiny(spec: BackboneSpec, device: torch.device) -> HybViTBackbone:
    """32 channels, 2 blocks of 4 heads, for rehearsals with images of 16 px."""
    make = partial(HybViT, 16, 32, 2, 4, 10)
    return HybViTBackbone(make, NoSchedule(), spec, device, prefix=PREFIX, multiple=PATCH)
