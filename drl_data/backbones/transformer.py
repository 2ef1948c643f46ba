"""Diffusion transformers: DiT (Peebles and Xie 2023) by class; PixArt and Sana by text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from drl_data.backbones.backbone import Backbone, Conditioning, Posterior, refuse_text
from drl_data.backbones.latent import LatentTextBackbone
from drl_data.backbones.loader import (
    ModelFolder,
    load_flow_schedule,
    load_network,
    load_schedule,
)
from drl_data.backbones.text import MASK, PROMPT, TextEncoders
from drl_data.backbones.tokens import TokenLayout
from drl_data.backbones.vae import (
    decode_latents,
    encode_latents,
    latent_shape,
    load_vae,
    vae_factor,
)
from drl_data.diffusion_spec import ConditionSpec
from drl_data.errors import SpecError, WeightsError
from drl_data.schedule import Schedule
from drl_data.spec import ImageSpec
from drl_data.tap_sites import is_text
from drl_data.taps import ResolvedTap

if TYPE_CHECKING:
    from diffusers import (
        AutoencoderKL,
        DiTTransformer2DModel,
        PixArtTransformer2DModel,
        SanaTransformer2DModel,
    )

PIXART_T5_TOKENS = {"alpha": 120, "sigma": 300}
SANA_GEMMA_TOKENS = 300


def shift_dit_time(network: nn.Module, shift: int) -> None:
    """Give the sinusoids of the time their `downscale_freq_shift`."""
    from diffusers.models.embeddings import Timesteps

    for module in network.modules():
        if isinstance(module, Timesteps):  # one in each block; diffusers hard-codes its shift
            module.downscale_freq_shift = shift


class DiTBackbone(Backbone):
    """DiTTransformer2DModel and its AutoencoderKL; class-conditional, with a null class."""

    network: DiTTransformer2DModel
    vae: AutoencoderKL

    def __init__(
        self,
        network: DiTTransformer2DModel,
        schedule: Schedule,
        device: torch.device,
        vae: AutoencoderKL,
    ) -> None:
        super().__init__(network, schedule, device)
        self.vae = vae

    @classmethod
    def load(cls, folder: ModelFolder, device: torch.device) -> DiTBackbone:
        """Weights on `device`, or structure only on meta."""
        from diffusers import DiTTransformer2DModel

        network = load_network(folder, DiTTransformer2DModel, device)
        shift_dit_time(network, folder.spec.dit_time_shift)
        return cls(
            network,
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

    def decode(self, latents: Tensor, *, scaled: bool | Literal["per_channel"]) -> object:
        return decode_latents(self.vae, latents, scaled=scaled)

    def conditioning(self, spec: ConditionSpec) -> Conditioning:
        assert spec.class_label != "label"
        refuse_text(spec, "DiT")
        n_classes = self.network.config.num_embeds_ada_norm
        label = n_classes if spec.class_label == "null" else spec.class_label
        if not 0 <= label <= n_classes:
            raise SpecError(f"condition.class_label {label}: want 0..{n_classes} or null")
        return Conditioning({"class_labels": torch.tensor([label], device=self.device)})

    def forward(self, x: Tensor, model_time: Tensor, kwargs: Mapping[str, Tensor]) -> object:
        return self.network(x, timestep=model_time, **kwargs, return_dict=False)


class CrossAttentionTransformer(LatentTextBackbone):
    """Transformers over image tokens that attend to masked text tokens: PixArt, Sana."""

    network: PixArtTransformer2DModel | SanaTransformer2DModel

    TOLD: ClassVar[Mapping[str, str]] = {
        PROMPT: "encoder_hidden_states",
        MASK: "encoder_attention_mask",
    }

    def input_shape(self, images: ImageSpec) -> tuple[int, int, int]:
        patch: int = self.network.config.patch_size
        return latent_shape(images, self.vae, patch.bit_length() - 1)

    def arrange(
        self, tap: ResolvedTap, x: Tensor, size: tuple[int, ...]
    ) -> tuple[Tensor, tuple[str, ...]]:
        patch = self.network.config.patch_size
        layout = TokenLayout(size[0] // patch, size[1] // patch)
        return layout.arrange(tap, x, text=is_text(tap.module))

    def text_shapes(self, n_tokens: int) -> dict[str, tuple[int, ...]]:
        return {PROMPT: (n_tokens, self.network.config.caption_channels), MASK: (n_tokens,)}


class PixArtBackbone(CrossAttentionTransformer):
    """PixArtTransformer2DModel (Chen et al. 2023, 2024), alpha and Sigma, with T5.

    Prompts are stripped and in lower case, as its pipelines make them. Models trained at many
    aspects are told the image's size and aspect.
    """

    network: PixArtTransformer2DModel

    @classmethod
    def load(cls, folder: ModelFolder, device: torch.device) -> PixArtBackbone:
        """Weights on `device`, or structure only on meta; the text encoder waits for a prompt."""
        from diffusers import PixArtTransformer2DModel

        network = load_network(folder, PixArtTransformer2DModel, device)
        vae = load_vae(folder, device)
        return cls(network, load_schedule(folder), device, vae, TextEncoders(folder))

    def n_prompt_tokens(self, spec: ConditionSpec) -> int:
        self.text.paths("")
        return self._n_tokens()

    def encode_prompt(self, spec: ConditionSpec) -> dict[str, Tensor]:
        states, mask = self.text.t5("", spec.prompt.lower().strip(), self._n_tokens(), masked=True)
        return {PROMPT: states, MASK: mask}

    def _n_tokens(self) -> int:
        """Sigma's VAE is SDXL's, and its text is longer: that is what tells them apart."""
        is_sigma = abs(self.vae.config.scaling_factor - 0.13025) < 1e-6
        return PIXART_T5_TOKENS["sigma" if is_sigma else "alpha"]

    def forward(self, x: Tensor, model_time: Tensor, kwargs: Mapping[str, Tensor]) -> object:
        told: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.network.use_additional_conditions:
            factor = vae_factor(self.vae)
            sides = torch.tensor([factor * side for side in x.shape[-2:]], device=x.device)
            told["resolution"] = sides.to(x.dtype).expand(len(x), 2)
            told["aspect_ratio"] = (sides[:1] / sides[1:]).to(x.dtype).expand(len(x), 1)
        return self.network(
            x, timestep=model_time, added_cond_kwargs=told, **kwargs, return_dict=False
        )


class SanaBackbone(CrossAttentionTransformer):
    """SanaTransformer2DModel (Xie et al. 2024): 32-fold autoencoder, Gemma 2, linear attention.

    Prompts are stripped and in lower case, as its pipeline makes them, without the instruction
    that the pipeline may put before them.
    """

    network: SanaTransformer2DModel

    @classmethod
    def load(cls, folder: ModelFolder, device: torch.device) -> SanaBackbone:
        """Weights on `device`, or structure only on meta; the text encoder waits for a prompt.

        Raises:
            WeightsError: for Sana-Sprint, whose path from image to noise is another.
        """
        from diffusers import SanaTransformer2DModel

        config = folder.config(folder.network)
        if config.get("guidance_embeds"):
            raise WeightsError(
                f"model {folder.spec.model!r}: Sana-Sprint is trained on TrigFlow, for which there "
                "is no schedule; take the Sana that it is distilled from"
            )
        network: SanaTransformer2DModel = load_network(folder, SanaTransformer2DModel, device)
        scale = network.config.timestep_scale
        vae = load_vae(folder, device)
        schedule = load_flow_schedule(folder, time_scale=1000.0 * scale)
        return cls(network, schedule, device, vae, TextEncoders(folder))

    def n_prompt_tokens(self, spec: ConditionSpec) -> int:
        self.text.paths("")
        return SANA_GEMMA_TOKENS

    def encode_prompt(self, spec: ConditionSpec) -> dict[str, Tensor]:
        states, mask = self.text.gemma("", spec.prompt.lower().strip(), SANA_GEMMA_TOKENS)
        return {PROMPT: states, MASK: mask}

    def forward(self, x: Tensor, model_time: Tensor, kwargs: Mapping[str, Tensor]) -> object:
        return self.network(x, timestep=model_time, **kwargs, return_dict=False)
