"""Diffusion transformers: DiT (Peebles and Xie 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from drl_data.backbones.backbone import Backbone, Conditioning, Posterior, refuse_text
from drl_data.backbones.loader import ModelFolder, load_network, load_schedule
from drl_data.backbones.vae import decode_latents, encode_latents, latent_shape, load_vae
from drl_data.errors import SpecError
from drl_data.schedule import NoiseSchedule
from drl_data.spec import ConditionSpec, ImageSpec

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiTTransformer2DModel


class DiTBackbone(Backbone):
    """DiTTransformer2DModel and its AutoencoderKL; class-conditional, with a null class."""

    network: DiTTransformer2DModel
    vae: AutoencoderKL

    def __init__(
        self,
        network: DiTTransformer2DModel,
        schedule: NoiseSchedule,
        device: torch.device,
        vae: AutoencoderKL,
    ) -> None:
        super().__init__(network, schedule, device)
        self.vae = vae

    @classmethod
    def load(cls, folder: ModelFolder, device: torch.device) -> DiTBackbone:
        """Weights on `device`, or structure only on meta."""
        from diffusers import DiTTransformer2DModel

        return cls(
            load_network(folder, DiTTransformer2DModel, device),
            load_schedule(folder),
            device,
            load_vae(folder, device),
        )

    def input_shape(self, images: ImageSpec) -> tuple[int, int, int]:
        shape = latent_shape(images, self.vae, 0)
        side = self.network.config.sample_size
        if shape[1:] != (side, side):
            raise SpecError(
                f"images.size {list(images.size)}: latents of {shape[1]}x{shape[2]}; the positions "
                f"of this DiT are for {side}x{side}"
            )
        return shape

    def encode(self, pixels: Tensor) -> Posterior:
        return encode_latents(self.vae, pixels, self.dtype)

    def decode(self, latents: Tensor, *, scaled: bool) -> object:
        return decode_latents(self.vae, latents, scaled=scaled)

    def conditioning(self, spec: ConditionSpec) -> Conditioning:
        refuse_text(spec, "DiT")
        n_classes = self.network.config.num_embeds_ada_norm
        label = n_classes if spec.class_label == "null" else spec.class_label
        if not 0 <= label <= n_classes:
            raise SpecError(f"condition.class_label {label}: want 0..{n_classes} or null")
        return Conditioning({"class_labels": torch.tensor([label], device=self.device)})

    def forward(self, x: Tensor, model_time: Tensor, kwargs: Mapping[str, Tensor]) -> object:
        return self.network(x, timestep=model_time, **kwargs, return_dict=False)
