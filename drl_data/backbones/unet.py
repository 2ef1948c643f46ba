"""UNets: in pixel space (DDPM, Ho et al. 2020) and in latent space with text (Stable Diffusion)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from drl_data.backbones.adm_names import adm_aliases
from drl_data.backbones.backbone import (
    Backbone,
    Conditioning,
    Posterior,
    check_images,
    refuse_text,
)
from drl_data.backbones.latent import LatentTextBackbone
from drl_data.backbones.loader import ModelFolder, load_network, load_schedule
from drl_data.backbones.text import POOLED, PROMPT, TextEncoders
from drl_data.backbones.vae import latent_shape, load_vae, vae_factor
from drl_data.diffusion_spec import ConditionSpec
from drl_data.errors import SpecError, WeightsError
from drl_data.spec import ImageSpec

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel, UNet2DModel


NULL_CLASS = "_null_class"
"""Key of the configuration with the number of the null class, as `drl pretrain` writes it;
diffusers passes over keys that begin with an underscore."""

OF_THE_INPUT = -1
"""Stands for a side of the input among the sizes that SDXL is told."""


class PixelUNetBackbone(Backbone):
    """diffusers' UNet2DModel: the image itself is noised. Taps may use ADM's names too."""

    network: UNet2DModel
    null_class: int | None = None
    """The class that stands for none, where the configuration says that there is one."""

    @classmethod
    def load(cls, folder: ModelFolder, device: torch.device) -> PixelUNetBackbone:
        """Weights on `device`, or structure only on meta."""
        from diffusers import UNet2DModel

        network = load_network(folder, UNet2DModel, device)
        backbone = cls(network, load_schedule(folder), device)
        null_class = folder.config(folder.network).get(NULL_CLASS)
        backbone.null_class = null_class if isinstance(null_class, int) else None
        return backbone

    def aliases(self) -> Mapping[str, tuple[str, str]]:
        return adm_aliases(self.network)

    def input_shape(self, images: ImageSpec) -> tuple[int, int, int]:
        config = self.network.config
        n_halvings = len(config.block_out_channels) - 1
        check_images(images, config.in_channels, 2**n_halvings)
        return (images.n_channels, *images.size)

    def encode(self, pixels: Tensor) -> Posterior:
        return Posterior(pixels)

    def conditioning(self, spec: ConditionSpec) -> Conditioning:
        assert spec.class_label != "label"
        refuse_text(spec, "UNet2DModel")
        if self.network.class_embedding is None:
            if spec.class_label != "null":
                raise SpecError(f"condition.class_label {spec.class_label}: the model has none")
            return Conditioning()
        if spec.class_label == "null":
            if self.null_class is None:
                raise SpecError("condition.class_label: this model is class-conditional without a "
                                "null class; give a number")  # fmt: skip
            return Conditioning(
                {"class_labels": torch.tensor([self.null_class], device=self.device)}
            )
        n_classes, or_null = self.network.config.num_class_embeds, ""
        if self.null_class is not None:
            n_classes, or_null = self.null_class, " or null"
        if n_classes is not None and not 0 <= spec.class_label < n_classes:
            raise SpecError(
                f"condition.class_label {spec.class_label}: want 0..{n_classes - 1}{or_null}"
            )
        return Conditioning({"class_labels": torch.tensor([spec.class_label], device=self.device)})

    def forward(self, x: Tensor, model_time: Tensor, kwargs: Mapping[str, Tensor]) -> object:
        return self.network(x, model_time, **kwargs, return_dict=False)


class ConditionedUNetBackbone(LatentTextBackbone):
    """diffusers' UNet2DConditionModel: what Stable Diffusion and SDXL share.

    Latent Consistency Models are told a guidance scale beside the time, if the spec says one.
    """

    network: UNet2DConditionModel

    def input_shape(self, images: ImageSpec) -> tuple[int, int, int]:
        return latent_shape(images, self.vae, len(self.network.config.block_out_channels) - 1)

    def extras(self) -> tuple[str, ...]:
        return () if self.network.config.time_cond_proj_dim is None else ("lcm_guidance",)

    def other_conditions(self, spec: ConditionSpec) -> dict[str, Tensor]:
        if spec.lcm_guidance is None:
            return {}
        embedding = guidance_embedding(spec.lcm_guidance, self.network.config.time_cond_proj_dim)
        return {"timestep_cond": embedding.to(device=self.device, dtype=self.dtype)}


def guidance_embedding(guidance: float, width: int) -> Tensor:
    """What an LCM is told of a guidance scale: float32 [1, width], sines and then cosines of
    1000 (guidance - 1) at `width // 2` frequencies from 1 to 1/10000.

    Luo et al. 2023, section 4.2; diffusers' `get_guidance_scale_embedding`, whose operations these
    are, so that the bits are too.
    """
    half = width // 2
    step = torch.log(torch.tensor(10000.0)) / (half - 1)
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -step)
    angles = (torch.tensor([guidance - 1]) * 1000.0)[:, None] * frequencies[None, :]
    return F.pad(torch.cat([torch.sin(angles), torch.cos(angles)], dim=1), (0, width % 2))


class LatentUNetBackbone(ConditionedUNetBackbone):
    """With CLIP's last states: Stable Diffusion 1.x and 2.x."""

    TOLD: ClassVar[Mapping[str, str]] = {PROMPT: "encoder_hidden_states"}

    def text_shapes(self, n_tokens: int) -> dict[str, tuple[int, ...]]:
        return {PROMPT: (n_tokens, self.network.config.cross_attention_dim)}

    def n_prompt_tokens(self, spec: ConditionSpec) -> int:
        return self.text.clip_length("")

    def encode_prompt(self, spec: ConditionSpec) -> dict[str, Tensor]:
        return {PROMPT: self.text.clip("", spec.prompt, projected=False).last}

    def forward(self, x: Tensor, model_time: Tensor, kwargs: Mapping[str, Tensor]) -> object:
        return self.network(x, model_time, **kwargs, return_dict=False)


class LatentUNetXLBackbone(ConditionedUNetBackbone):
    """With two CLIPs and the image's sizes (Podell et al. 2023): SDXL and its distilled kin,
    SSD-1B, SDXL-Turbo, LCM-SDXL.

    Unless the spec says otherwise, the network is told that the original is as large as the input,
    and not cropped.
    """

    TOLD: ClassVar[Mapping[str, str]] = {PROMPT: "encoder_hidden_states", POOLED: "text_embeds"}

    def extras(self) -> tuple[str, ...]:
        return (*super().extras(), "original_size", "crops_coords_top_left", "target_size")

    def other_conditions(self, spec: ConditionSpec) -> dict[str, Tensor]:
        told = super().other_conditions(spec)
        if set(spec.extras) - {"lcm_guidance"}:
            sizes = (
                *(spec.original_size or (OF_THE_INPUT, OF_THE_INPUT)),
                *spec.crops_coords_top_left,
                *(spec.target_size or (OF_THE_INPUT, OF_THE_INPUT)),
            )
            told["time_ids"] = torch.tensor([sizes], device=self.device)
        return told

    def text_shapes(self, n_tokens: int) -> dict[str, tuple[int, ...]]:
        config = self.network.config
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return {PROMPT: (n_tokens, config.cross_attention_dim), POOLED: (width,)}

    def n_prompt_tokens(self, spec: ConditionSpec) -> int:
        self.text.paths("_2")
        return self.text.clip_length("")

    def encode_prompt(self, spec: ConditionSpec) -> dict[str, Tensor]:
        first = self.text.clip("", spec.prompt, projected=False)
        second = self.text.clip("_2", spec.prompt, projected=True)
        return {
            PROMPT: torch.cat([first.penultimate, second.penultimate], dim=-1),
            POOLED: second.pooled,
        }

    def forward(self, x: Tensor, model_time: Tensor, kwargs: Mapping[str, Tensor]) -> object:
        factor = vae_factor(self.vae)
        height, width = factor * x.shape[-2], factor * x.shape[-1]
        sizes = torch.tensor([height, width, 0, 0, height, width], device=x.device)
        sizes = sizes.expand(len(x), 6)
        if "time_ids" in kwargs:
            sizes = torch.where(kwargs["time_ids"] == OF_THE_INPUT, sizes, kwargs["time_ids"])
        return self.network(
            x,
            model_time,
            encoder_hidden_states=kwargs["encoder_hidden_states"],
            added_cond_kwargs={
                "text_embeds": kwargs["text_embeds"],
                "time_ids": sizes,
            },
            timestep_cond=kwargs.get("timestep_cond"),
            return_dict=False,
        )


def load_latent_unet(folder: ModelFolder, device: torch.device) -> Backbone:
    """The adapter of a UNet2DConditionModel by what it is told; on meta structure only.

    The text encoders wait for a prompt.

    Raises:
        WeightsError: if it is told what no adapter knows (images, hints ...).
    """
    from diffusers import UNet2DConditionModel

    told = folder.config(folder.network).get("addition_embed_type")
    if told not in (None, "text_time"):
        raise WeightsError(
            f"model {folder.spec.model!r}: a UNet2DConditionModel with addition_embed_type "
            f"{told!r}; there are adapters for none (Stable Diffusion 1, 2) and 'text_time' (SDXL)"
        )
    return (LatentUNetBackbone if told is None else LatentUNetXLBackbone)(
        load_network(folder, UNet2DConditionModel, device),
        load_schedule(folder),
        device,
        load_vae(folder, device),
        TextEncoders(folder),
    )
