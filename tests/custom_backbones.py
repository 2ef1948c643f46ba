"""Two worked examples of backbones of one's own, as a user would write them.

`semantic_encoder`: an encoder-bottleneck model. Of DiffAE (Preechakul et al. 2022) only the encoder
runs: the clean image in, one vector z_sem out, no diffusion forward.

`joint_model`: a diffusion U-Net that also classifies (Joint Diffusion, Deja et al. 2023) from the
average over space of every skip and of the middle: tap `skip_of.*` and `middle`, `reduce: mean`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from drl_data.backbones import Conditioning, CustomBackbone, Posterior
from drl_data.diffusion_spec import ConditionSpec
from drl_data.schedule import NoiseSchedule, NoSchedule
from drl_data.spec import BackboneSpec, ImageSpec
from drl_data.spec_base import file_digest

WEIGHTS = "TEST_SEMANTIC_ENCODER"
"""Environment variable that says where the encoder's weights are; where is no content."""


class SemanticEncoder(nn.Module):
    """[b, 3, h, w] in -1..1 to z_sem [b, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.SiLU(), nn.Conv2d(8, 16, 3, padding=1)
        )
        self.bottleneck = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bottleneck(self.trunk(x).mean((2, 3)))


class SemanticEncoderBackbone(CustomBackbone):
    """No noise, no time, no condition."""

    def input_shape(self, images: ImageSpec) -> tuple[int, int, int]:
        return (images.n_channels, *images.size)

    def encode(self, pixels: Tensor) -> Posterior:
        return Posterior(pixels)

    def conditioning(self, spec: ConditionSpec) -> Conditioning:
        return Conditioning()

    def forward(self, x: Tensor, model_time: Tensor, kwargs: Mapping[str, Tensor]) -> object:
        return self.network(x)

    def weights_digest(self) -> str:
        return file_digest(os.environ[WEIGHTS])


def semantic_encoder(spec: BackboneSpec, device: torch.device) -> SemanticEncoderBackbone:
    """Weights from the file that the environment names; on meta none."""
    with torch.device(device):
        network = SemanticEncoder()
    if device.type != "meta":
        network.load_state_dict(load_file(os.environ[WEIGHTS]))
    return SemanticEncoderBackbone(network, NoSchedule(), device)


def semantic_encoder_again(spec: BackboneSpec, device: torch.device) -> SemanticEncoderBackbone:
    """Another factory of the same weights."""
    return semantic_encoder(spec, device)


class JointModel(nn.Module):
    """A U-Net of three levels; `skip_of.I` is what level I hands over to the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 16)
        self.skip_of = nn.ModuleList(
            nn.Conv2d(n_in, n_out, 3, padding=1) for n_in, n_out in ((3, 8), (8, 16), (16, 16))
        )
        self.middle = nn.Conv2d(16, 16, 3, padding=1)
        self.decode = nn.ModuleList(
            nn.Conv2d(n_in, n_out, 3, padding=1) for n_in, n_out in ((32, 16), (32, 8), (16, 8))
        )
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        skips = []
        for level in self.skip_of:
            x = F.silu(level(x))
            skips.append(x)
            x = F.avg_pool2d(x, 2)
        x = F.silu(self.middle(x) + self.time(t[:, None].float() / 1000)[:, :, None, None])
        for level, skip in zip(self.decode, reversed(skips), strict=True):
            x = F.silu(level(torch.cat([F.interpolate(x, scale_factor=2.0), skip], 1)))
        return self.out(x)


class JointBackbone(SemanticEncoderBackbone):
    """Noised as DDPM does and told the time; random weights, whose digest is the seed."""

    def __init__(self, seed: int, device: torch.device) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = JointModel().to(device)
        betas = torch.linspace(1e-4, 0.02, 1000)
        super().__init__(network, NoiseSchedule(torch.cumprod(1 - betas, 0)), device)
        self.seed = seed

    def forward(self, x: Tensor, model_time: Tensor, kwargs: Mapping[str, Tensor]) -> object:
        return self.network(x, model_time)

    def weights_digest(self) -> str:
        return hashlib.sha256(f"joint model, seed {self.seed}".encode()).hexdigest()


def joint_model(spec: BackboneSpec, device: torch.device) -> JointBackbone:
    """Weights of the seed of the spec."""
    return JointBackbone(spec.init_seed, device)


def not_a_backbone(spec: BackboneSpec, device: torch.device) -> nn.Module:
    """What a factory must not give."""
    return JointModel()
