"""Transformers over the tokens of videos: Wan 2.1, CogVideoX.

A window of f frames becomes 1 + (f - 1) / 4 frames of latents; an image is a window of one.

Shapes: b batch, c channel, f frame, h w height and width, n token.
"""

from __future__ import annotations

import html
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from drl_data.backbones.backbone import Posterior, check_pixels
from drl_data.backbones.latent import LatentTextBackbone
from drl_data.backbones.loader import (
    ModelFolder,
    load_flow_schedule,
    load_network,
    load_schedule,
)
from drl_data.backbones.text import PROMPT, TextEncoders
from drl_data.backbones.tokens import TokenLayout
from drl_data.backbones.vae import load_autoencoder
from drl_data.capture import Streams
from drl_data.diffusion_spec import ConditionSpec
from drl_data.errors import SpecError, TapError, WeightsError
from drl_data.spec import ImageSpec, TapSpec
from drl_data.tap_sites import is_text
from drl_data.taps import VAE, ResolvedTap

if TYPE_CHECKING:
    from diffusers import (
        AutoencoderKLCogVideoX,
        AutoencoderKLWan,
        CogVideoXTransformer3DModel,
        WanTransformer3DModel,
    )

WAN_T5_TOKENS = 512


class VideoTransformer(LatentTextBackbone):
    """Latents [b, c, f, h, w] before a transformer over patches of single frames of latents."""

    network: WanTransformer3DModel | CogVideoXTransformer3DModel
    vae: AutoencoderKLWan | AutoencoderKLCogVideoX

    TOLD: ClassVar[Mapping[str, str]] = {PROMPT: "encoder_hidden_states"}

    @property
    @abstractmethod
    def patch(self) -> int:
        """Latents along a side of one token."""

    @property
    @abstractmethod
    def factors(self) -> tuple[int, int]:
        """Frames, and pixels along a side, of one latent."""

    def input_shape(self, images: ImageSpec) -> tuple[int, ...]:
        frames, factor = self.factors
        check_pixels(images, self.vae.config.in_channels, factor * self.patch)
        if images.frame_latents == "video" and (images.frames - 1) % frames:
            raise SpecError(
                f"images.frames {images.frames}: this model's VAE takes 1 frame and then multiples "
                f"of {frames}; want {images.frames - (images.frames - 1) % frames}, or "
                "frame_latents: each"
            )
        each = images.frame_latents == "each"
        n_frames = images.frames if each else 1 + (images.frames - 1) // frames
        height, width = images.size
        n_channels: int = self.network.config.in_channels
        return (n_channels, n_frames, height // factor, width // factor)

    def resolve(self, taps: Sequence[TapSpec]) -> tuple[ResolvedTap, ...]:
        resolved = super().resolve(taps)
        for tap in resolved:
            if tap.module.startswith(VAE):
                raise TapError(
                    f"tap {tap.address}: a video's VAE sees it piece by piece, and no tensor "
                    "inside is of the whole; tap latent or latent.moments"
                )
        return resolved

    def arrange(
        self, tap: ResolvedTap, x: Tensor, size: tuple[int, ...]
    ) -> tuple[Tensor, tuple[str, ...]]:
        frames, height, width = size
        layout = TokenLayout(height // self.patch, width // self.patch, frames)
        return layout.arrange(tap, x, text=is_text(tap.module) or "text" in tap.parts)

    def decode(self, latents: Tensor, *, scaled: bool | Literal["per_channel"]) -> object:
        raise AssertionError("no tap is inside this VAE")


def _check_channels(folder: ModelFolder, n_channels: int, n_latents: int) -> None:
    """Raise WeightsError for a transformer that wants more beside the noisy latents."""
    if n_channels != n_latents:
        raise WeightsError(
            f"model {folder.spec.model!r}: {n_channels} channels into the transformer, {n_latents} "
            "of latents: an image-to-video model, which is told an image besides; take the "
            "text-to-video one"
        )


class WanBackbone(VideoTransformer):
    """WanTransformer3DModel (Wan team 2025), text to video, with UMT5; a flow.

    Prompts are cleaned as its pipelines do, but for mended mojibake, and padded by zeros, which
    cross-attention sees.
    """

    network: WanTransformer3DModel
    vae: AutoencoderKLWan

    @classmethod
    def load(cls, folder: ModelFolder, device: torch.device) -> WanBackbone:
        """Weights on `device`, or structure only on meta; the text encoder waits for a prompt.

        Raises:
            WeightsError: for image-to-video models.
        """
        from diffusers import AutoencoderKLWan, WanTransformer3DModel

        network: WanTransformer3DModel = load_network(folder, WanTransformer3DModel, device)
        vae: AutoencoderKLWan = load_autoencoder(folder, device, (AutoencoderKLWan,))
        _check_channels(folder, network.config.in_channels, vae.config.z_dim)
        backbone = cls(network, load_flow_schedule(folder), device, vae, TextEncoders(folder))
        # Norms and the time's embedding stay in float32 where the rest is in half precision.
        backbone.dtype = network.get_parameter("patch_embedding.weight").dtype
        return backbone

    @property
    def patch(self) -> int:
        side: int = self.network.config.patch_size[1]
        return side

    @property
    def factors(self) -> tuple[int, int]:
        config = self.vae.config
        return config.scale_factor_temporal, config.scale_factor_spatial

    def encode(self, pixels: Tensor) -> Posterior:
        video = pixels if pixels.ndim == 5 else pixels[:, :, None]
        distribution = self.vae.encode(video.to(self.vae.dtype)).latent_dist
        mean, std = (
            torch.tensor(values, dtype=self.dtype, device=video.device)[:, None, None, None]
            for values in (self.vae.config.latents_mean, self.vae.config.latents_std)
        )
        return Posterior(
            distribution.mean.to(self.dtype),
            distribution.std.to(self.dtype),
            scaling_factor=None,
            channel_mean=mean,
            channel_std=std,
        )

    def text_shapes(self, n_tokens: int) -> dict[str, tuple[int, ...]]:
        return {PROMPT: (n_tokens, self.network.config.text_dim)}

    def extras(self) -> tuple[str, ...]:
        return ("t5_tokens",)

    def n_prompt_tokens(self, spec: ConditionSpec) -> int:
        self.text.paths("")
        return spec.t5_tokens or WAN_T5_TOKENS

    def encode_prompt(self, spec: ConditionSpec) -> dict[str, Tensor]:
        cleaned = " ".join(html.unescape(html.unescape(spec.prompt)).split())
        states, mask = self.text.umt5("", cleaned, spec.t5_tokens or WAN_T5_TOKENS)
        return {PROMPT: states * mask[:, None]}

    def forward(self, x: Tensor, model_time: Tensor, kwargs: Mapping[str, Tensor]) -> object:
        return self.network(x, timestep=model_time, **kwargs, return_dict=False)


class CogVideoXBackbone(VideoTransformer):
    """CogVideoXTransformer3DModel (Yang et al. 2024), text to video, with T5; predicts v.

    Text and image tokens attend together, the text's come first.
    """

    network: CogVideoXTransformer3DModel
    vae: AutoencoderKLCogVideoX

    @classmethod
    def load(cls, folder: ModelFolder, device: torch.device) -> CogVideoXBackbone:
        """Weights on `device`, or structure only on meta; the text encoder waits for a prompt.

        Raises:
            WeightsError: for image-to-video models, and for CogVideoX 1.5.
        """
        from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

        network: CogVideoXTransformer3DModel
        network = load_network(folder, CogVideoXTransformer3DModel, device)
        vae: AutoencoderKLCogVideoX = load_autoencoder(folder, device, (AutoencoderKLCogVideoX,))
        _check_channels(folder, network.config.in_channels, vae.config.latent_channels)
        if network.config.patch_size_t is not None:
            raise WeightsError(
                f"model {folder.spec.model!r}: CogVideoX 1.5, whose tokens are of several frames, "
                "has no adapter; take CogVideoX-2b or CogVideoX-5b"
            )
        return cls(network, load_schedule(folder), device, vae, TextEncoders(folder))

    @property
    def patch(self) -> int:
        side: int = self.network.config.patch_size
        return side

    @property
    def factors(self) -> tuple[int, int]:
        config = self.vae.config
        return int(config.temporal_compression_ratio), 2 ** (len(config.block_out_channels) - 1)

    def streams(self, x: Tensor, kwargs: Mapping[str, Tensor]) -> Streams:
        n_image = x.shape[2] * (x.shape[3] // self.patch) * (x.shape[4] // self.patch)
        return Streams(n_image, kwargs["encoder_hidden_states"].shape[1], text_first=True)

    def encode(self, pixels: Tensor) -> Posterior:
        video = pixels if pixels.ndim == 5 else pixels[:, :, None]
        distribution = self.vae.encode(video.to(self.vae.dtype)).latent_dist
        factor = self.vae.config.scaling_factor
        return Posterior(
            distribution.mean.to(self.dtype),
            distribution.std.to(self.dtype),
            scaling_factor=1 / factor if self.vae.config.invert_scale_latents else factor,
        )

    def text_shapes(self, n_tokens: int) -> dict[str, tuple[int, ...]]:
        return {PROMPT: (n_tokens, self.network.config.text_embed_dim)}

    def n_prompt_tokens(self, spec: ConditionSpec) -> int:
        self.text.paths("")
        n_tokens: int = self.network.config.max_text_seq_length
        return n_tokens

    def encode_prompt(self, spec: ConditionSpec) -> dict[str, Tensor]:
        n_tokens = self.n_prompt_tokens(spec)
        return {PROMPT: self.text.t5("", spec.prompt, n_tokens, masked=False)[0]}

    def forward(self, x: Tensor, model_time: Tensor, kwargs: Mapping[str, Tensor]) -> object:
        (output,) = self.network(
            x.transpose(1, 2),
            timestep=model_time,
            image_rotary_emb=self._rotary(x),
            **kwargs,
            return_dict=False,
        )
        return output.transpose(1, 2)

    def _rotary(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Rotary embeddings of the grid, as CogVideoXPipeline makes them; None for CogVideoX-2b,
        whose positions are added to the tokens."""
        config = self.network.config
        if not config.use_rotary_positional_embeddings:
            return None
        from diffusers.models.embeddings import get_3d_rotary_pos_embed
        from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

        grid = (x.shape[3] // self.patch, x.shape[4] // self.patch)
        crop = get_resize_crop_region_for_grid(
            grid, config.sample_width // self.patch, config.sample_height // self.patch
        )
        cosines, sines = get_3d_rotary_pos_embed(
            embed_dim=config.attention_head_dim,
            crops_coords=crop,
            grid_size=grid,
            temporal_size=x.shape[2],
            device=x.device,
        )
        return cosines, sines
