"""UNets: in pixel space (DDPM, Ho et al. 2020) and in latent space with text (Stable Diffusion)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor

from drl_data.backbones.backbone import (
    Backbone,
    Conditioning,
    Posterior,
    check_images,
    refuse_text,
)
from drl_data.backbones.loader import ModelFolder, load_component, load_network, load_schedule
from drl_data.backbones.vae import decode_latents, encode_latents, latent_shape, load_vae
from drl_data.errors import SpecError, WeightsError
from drl_data.schedule import NoiseSchedule
from drl_data.spec import ConditionSpec, ImageSpec

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel

PROMPT_TENSOR = "prompt_embeds"


class PixelUNetBackbone(Backbone):
    """diffusers' UNet2DModel: the image itself is noised."""

    network: UNet2DModel

    @classmethod
    def load(cls, folder: ModelFolder, device: torch.device) -> PixelUNetBackbone:
        """Weights on `device`, or structure only on meta."""
        from diffusers import UNet2DModel

        return cls(load_network(folder, UNet2DModel, device), load_schedule(folder), device)

    def input_shape(self, images: ImageSpec) -> tuple[int, int, int]:
        config = self.network.config
        n_halvings = len(config.block_out_channels) - 1
        check_images(images, config.in_channels, 2**n_halvings)
        return (images.n_channels, *images.size)

    def encode(self, pixels: Tensor) -> Posterior:
        return Posterior(pixels)

    def conditioning(self, spec: ConditionSpec) -> Conditioning:
        refuse_text(spec, "UNet2DModel")
        if self.network.class_embedding is None:
            if spec.class_label != "null":
                raise SpecError(f"condition.class_label {spec.class_label}: the model has none")
            return Conditioning()
        if spec.class_label == "null":
            raise SpecError("condition.class_label: this model is class-conditional without a "
                            "null class; give a number")  # fmt: skip
        return Conditioning({"class_labels": torch.tensor([spec.class_label], device=self.device)})

    def forward(self, x: Tensor, model_time: Tensor, kwargs: Mapping[str, Tensor]) -> object:
        return self.network(x, model_time, **kwargs, return_dict=False)


class LatentUNetBackbone(Backbone):
    """diffusers' UNet2DConditionModel with its AutoencoderKL: Stable Diffusion 1.x and 2.x."""

    network: UNet2DConditionModel
    vae: AutoencoderKL

    def __init__(
        self,
        network: UNet2DConditionModel,
        schedule: NoiseSchedule,
        device: torch.device,
        vae: AutoencoderKL,
        folder: ModelFolder,
    ) -> None:
        super().__init__(network, schedule, device)
        self.vae = vae
        self.folder = folder

    @classmethod
    def load(cls, folder: ModelFolder, device: torch.device) -> LatentUNetBackbone:
        """Weights on `device`, or structure only on meta; the text encoder waits for a prompt."""
        from diffusers import UNet2DConditionModel

        return cls(
            load_network(folder, UNet2DConditionModel, device),
            load_schedule(folder),
            device,
            load_vae(folder, device),
            folder,
        )

    def input_shape(self, images: ImageSpec) -> tuple[int, int, int]:
        return latent_shape(images, self.vae, len(self.network.config.block_out_channels) - 1)

    def encode(self, pixels: Tensor) -> Posterior:
        return encode_latents(self.vae, pixels, self.dtype)

    def decode(self, latents: Tensor, *, scaled: bool) -> object:
        return decode_latents(self.vae, latents, scaled=scaled)

    def conditioning(self, spec: ConditionSpec) -> Conditioning:
        if spec.class_label != "null":
            raise SpecError("condition.class_label: this model takes a prompt, not a class")
        if spec.prompt_embeddings is not None:
            embeds = self._read_embeddings(spec.prompt_embeddings)
        else:
            embeds = self._encode_prompt(spec.prompt)
        width = self.network.config.cross_attention_dim
        if embeds.shape[-1] != width:
            raise SpecError(
                f"condition: prompt embeddings {list(embeds.shape)}; want [token, {width}]"
            )
        embeds = embeds.to(device=self.device, dtype=self.dtype)
        return Conditioning({"encoder_hidden_states": embeds[None]})

    def _read_embeddings(self, path: str) -> Tensor:
        """[token, channel] from a safetensors file."""
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(PROMPT_TENSOR)
        except (OSError, ValueError, RuntimeError) as error:
            raise SpecError(
                f"condition.prompt_embeddings {path!r}: {error}; want a safetensors file with one "
                f"tensor {PROMPT_TENSOR!r} [token, channel]"
            ) from error
        return tensor

    def _encode_prompt(self, prompt: str) -> Tensor:
        """[token, channel]: CLIP's last hidden state, padded to the tokenizer's length."""
        text_encoder, tokenizer = (self.folder.component(n) for n in ("text_encoder", "tokenizer"))
        if text_encoder is None or tokenizer is None:
            raise WeightsError(
                f"model {self.folder.spec.model!r} has no text_encoder/ and tokenizer/ for the "
                f"prompt {prompt!r}; add them, or give condition.prompt_embeddings"
            )
        if self.device.type == "meta":
            config = json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
            shape = (int(config["model_max_length"]), self.network.config.cross_attention_dim)
            return torch.empty(shape, device="meta")
        from transformers import CLIPTextModel, CLIPTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # of loading one small file
        tokens = CLIPTokenizer.from_pretrained(tokenizer, local_files_only=True)(
            prompt, padding="max_length", truncation=True, return_tensors="pt"
        )
        encoder = load_component(self.folder, text_encoder, CLIPTextModel).eval()
        with torch.no_grad():
            hidden: Tensor = encoder(tokens.input_ids).last_hidden_state
        return hidden[0]

    def forward(self, x: Tensor, model_time: Tensor, kwargs: Mapping[str, Tensor]) -> object:
        return self.network(x, model_time, **kwargs, return_dict=False)
