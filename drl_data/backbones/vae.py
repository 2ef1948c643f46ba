"""The autoencoder that stands before every latent denoiser: AutoencoderKL, Sana's AutoencoderDC,
Qwen-Image's AutoencoderKLQwenImage, which takes an image as a video of one frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor, nn

from drl_data.backbones.backbone import Posterior, check_images
from drl_data.backbones.bundles import is_config_only
from drl_data.backbones.loader import ModelFolder, build, build_random, load_component, placed
from drl_data.errors import WeightsError
from drl_data.reduce import TORCH_DTYPES
from drl_data.spec import ImageSpec

if TYPE_CHECKING:
    from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLQwenImage

    VAE: TypeAlias = AutoencoderKL | AutoencoderDC | AutoencoderKLQwenImage


def load_vae(folder: ModelFolder, device: torch.device) -> VAE:
    """The autoencoder beside the denoiser, on meta structure only.

    Raises:
        WeightsError: if the folder has none, or one of another class.
    """
    from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLQwenImage

    return load_autoencoder(folder, device, (AutoencoderKL, AutoencoderDC, AutoencoderKLQwenImage))


def load_autoencoder(folder: ModelFolder, device: torch.device, kinds: Sequence[type]) -> nn.Module:
    """An autoencoder of one of these classes beside the denoiser, on meta structure only.

    Raises:
        WeightsError: if the folder has none, or one of another class.
    """
    path = folder.component("vae")
    if path is None:
        raise WeightsError(
            f"model {folder.spec.model!r}: {folder.class_name} needs a VAE, and {folder.root} has "
            "no vae/; give the folder of the whole pipeline"
        )
    config = folder.config(path)
    classes = {kind.__name__: kind for kind in kinds}
    cls = classes.get(str(config.get("_class_name")))
    if cls is None:
        raise WeightsError(f"{path} is a {config.get('_class_name')}; want {' or '.join(classes)}")
    dtype = TORCH_DTYPES[folder.spec.dtype]
    if config.get("force_upcast") and dtype == torch.float16:
        dtype = torch.float32  # the model's own word that its VAE overflows in float16
    if device.type == "meta":
        return build(cls, config, "meta", dtype)
    if folder.spec.init == "random" and is_config_only(folder.root):
        return placed(build_random(folder, path, cls, dtype), device)
    return placed(load_component(folder, path, cls, dtype), device)


def vae_factor(vae: VAE) -> int:
    """Pixels along a side of one latent."""
    config = vae.config
    if is_of_videos(vae):
        return int(2 ** len(config.temperal_downsample))
    sides = config["encoder_block_out_channels" if is_deterministic(vae) else "block_out_channels"]
    return int(2 ** (len(sides) - 1))


def is_deterministic(vae: VAE) -> bool:
    """Whether it is an AutoencoderDC, which has no posterior."""
    from diffusers import AutoencoderDC

    return isinstance(vae, AutoencoderDC)


def is_of_videos(vae: VAE) -> bool:
    """Whether it is an AutoencoderKLQwenImage, which takes [b, c, frame, h, w]."""
    from diffusers import AutoencoderKLQwenImage

    return isinstance(vae, AutoencoderKLQwenImage)


def latent_shape(images: ImageSpec, vae: VAE, n_halvings: int) -> tuple[int, int, int]:
    """(c, h, w) of the latents of a denoiser that halves its input `n_halvings` times.

    Raises:
        SpecError: if the VAE or the denoiser cannot take such images.
    """
    factor = vae_factor(vae)
    n_channels, n_latent = (
        (vae.config.input_channels, vae.config.z_dim)
        if is_of_videos(vae)
        else (vae.config.in_channels, vae.config.latent_channels)
    )
    check_images(images, n_channels, factor * 2**n_halvings)
    height, width = images.size
    return (n_latent, height // factor, width // factor)


def encode_latents(vae: VAE, pixels: Tensor, dtype: torch.dtype) -> Posterior:
    """The VAE's posterior for pixels [b, c, H, W]: mean and std [b, c, h, w] in `dtype`; without a
    std for the deterministic AutoencoderDC (Chen et al. 2024)."""
    if is_deterministic(vae):
        latent = vae.encode(pixels.to(vae.dtype)).latent
        return Posterior(latent.to(dtype), scaling_factor=vae.config.scaling_factor)
    if is_of_videos(vae):
        video = vae.encode(pixels.to(vae.dtype).unsqueeze(2)).latent_dist
        mean = video.mean[:, :, 0].to(dtype)
        return Posterior(
            mean,
            video.std[:, :, 0].to(dtype),
            scaling_factor=None,
            channel_mean=_per_channel(vae.config.latents_mean, mean, dtype),
            channel_std=_per_channel(vae.config.latents_std, mean, dtype),
        )
    distribution = vae.encode(pixels.to(vae.dtype)).latent_dist
    return Posterior(
        distribution.mean.to(dtype),
        distribution.std.to(dtype),
        scaling_factor=vae.config.scaling_factor,
        shift_factor=vae.config.shift_factor or 0.0,
        channel_mean=_per_channel(vae.config.latents_mean, distribution.mean, dtype),
        channel_std=_per_channel(vae.config.latents_std, distribution.mean, dtype),
    )


def _per_channel(values: Sequence[float] | None, like: Tensor, dtype: torch.dtype) -> Tensor | None:
    """[c, 1, 1] on the device of `like`; None where the configuration has none."""
    if values is None:
        return None
    return torch.tensor(values, dtype=dtype, device=like.device)[:, None, None]


def decode_latents(
    vae: VAE,
    latents: Tensor,
    *,
    scaled: bool | Literal["per_channel"],
) -> object:
    """One forward of the decoder of latents [b, c, h, w] as the denoiser takes them; `scaled` says
    how `LatentSpec.scale` had scaled them."""
    config, z = vae.config, latents
    if is_of_videos(vae):
        if scaled:
            mean = _per_channel(config.latents_mean, z, z.dtype)
            std = _per_channel(config.latents_std, z, z.dtype)
            assert mean is not None
            assert std is not None
            z = z / (1 / std) + mean
        return vae.decode(z.to(vae.dtype).unsqueeze(2), return_dict=False)
    if scaled == "per_channel":
        mean = _per_channel(config.latents_mean, z, z.dtype)
        std = _per_channel(config.latents_std, z, z.dtype)
        assert mean is not None, "they could not be scaled so"
        assert std is not None
        z = z / config.scaling_factor * std + mean
    elif scaled:
        z = z / config.scaling_factor
        z = z if is_deterministic(vae) else z + (config.shift_factor or 0.0)
    return vae.decode(z.to(vae.dtype), return_dict=False)
