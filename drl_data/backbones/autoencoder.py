"""A VAE alone, for latents and their moments without a denoiser: AutoencoderKL, AutoencoderDC.

Taps are `latent`, `latent.moments` and modules as `vae.PATH`. There is no noise and no time:
`schedule: {convention: none}` and `noise: {kind: none}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from drl_data.backbones.backbone import (
    Backbone,
    Conditioning,
    Posterior,
    TappableModule,
    arrange,
    refuse_text,
)
from drl_data.backbones.loader import ModelFolder, load_network
from drl_data.backbones.vae import decode_latents, encode_latents, latent_shape
from drl_data.capture import image_output
from drl_data.diffusion_spec import ConditionSpec
from drl_data.errors import SpecError
from drl_data.flops import trace
from drl_data.schedule import NoSchedule
from drl_data.spec import ImageSpec, TapSpec
from drl_data.taps import VAE, ResolvedTap, resolve

if TYPE_CHECKING:
    from diffusers import AutoencoderDC, AutoencoderKL


class AutoencoderBackbone(Backbone):
    """Encodes images, and decodes their latents where a tap asks for it."""

    vae: AutoencoderKL | AutoencoderDC

    def __init__(self, vae: AutoencoderKL | AutoencoderDC, device: torch.device) -> None:
        super().__init__(vae, NoSchedule(), device)
        self.vae = vae

    @classmethod
    def load(cls, folder: ModelFolder, device: torch.device) -> AutoencoderBackbone:
        """Weights on `device`, or structure only on meta."""
        from diffusers import AutoencoderDC, AutoencoderKL

        classes = {"AutoencoderKL": AutoencoderKL, "AutoencoderDC": AutoencoderDC}
        return cls(load_network(folder, classes[folder.class_name], device), device)

    def resolve(self, taps: Sequence[TapSpec]) -> tuple[ResolvedTap, ...]:
        return resolve(nn.Module(), taps, self.vae)

    def input_shape(self, images: ImageSpec) -> tuple[int, int, int]:
        return latent_shape(images, self.vae, 0)

    def encode(self, pixels: Tensor) -> Posterior:
        return encode_latents(self.vae, pixels, self.dtype)

    def decode(self, latents: Tensor, *, scaled: bool | Literal["per_channel"]) -> object:
        return decode_latents(self.vae, latents, scaled=scaled)

    def conditioning(self, spec: ConditionSpec) -> Conditioning:
        refuse_text(spec, "an autoencoder")
        if spec.class_label != "null":
            raise SpecError(f"condition.class_label {spec.class_label}: an autoencoder takes none")
        return Conditioning()

    def forward(self, x: Tensor, model_time: Tensor, kwargs: Mapping[str, Tensor]) -> object:
        return x  # there is nothing after the latents

    def modules(self, images: ImageSpec, condition: ConditionSpec) -> tuple[TappableModule, ...]:
        pixels = torch.empty(
            (1, images.n_channels, *images.size), dtype=self.dtype, device=self.device
        )
        with torch.no_grad():
            calls, total = trace(
                self.vae,
                lambda: self.encode(pixels),
                select=lambda path, output: image_output(self.vae, path, output, None),
            )

        def described(path: str, kind: str, output: Tensor, through: int) -> TappableModule:
            x, dims = arrange(output, (0, 0))
            return TappableModule(f"{VAE}{path}", kind, dims, tuple(x.shape[1:]), through / total)

        return tuple(described(c.path, c.kind, c.output, c.flops_through) for c in calls)
