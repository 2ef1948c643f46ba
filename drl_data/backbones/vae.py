"""The AutoencoderKL that stands before every latent denoiser."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from drl_data.backbones.backbone import Posterior, check_images
from drl_data.backbones.loader import ModelFolder, build, load_component, placed
from drl_data.errors import WeightsError
from drl_data.reduce import TORCH_DTYPES
from drl_data.spec import ImageSpec

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def load_vae(folder: ModelFolder, device: torch.device) -> AutoencoderKL:
    """The AutoencoderKL beside the denoiser, on meta structure only.

    Raises:
        WeightsError: if the folder has none.
    """
    from diffusers import AutoencoderKL

    path = folder.component("vae")
    if path is None:
        raise WeightsError(
            f"model {folder.spec.model!r}: {folder.class_name} needs a VAE, and {folder.root} has "
            "no vae/; give the folder of the whole pipeline"
        )
    config = folder.config(path)
    dtype = TORCH_DTYPES[folder.spec.dtype]
    if config.get("force_upcast") and dtype == torch.float16:
        dtype = torch.float32  # the model's own word that its VAE overflows in float16
    if device.type == "meta":
        return build(AutoencoderKL, config, "meta", dtype)
    return placed(load_component(folder, path, AutoencoderKL, dtype), device)


def latent_shape(images: ImageSpec, vae: AutoencoderKL, n_halvings: int) -> tuple[int, int, int]:
    """(c, h, w) of the latents of a denoiser that halves its input `n_halvings` times.

    Raises:
        SpecError: if the VAE or the denoiser cannot take such images.
    """
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    check_images(images, vae.config.in_channels, factor * 2**n_halvings)
    height, width = images.size
    return (vae.config.latent_channels, height // factor, width // factor)


def encode_latents(vae: AutoencoderKL, pixels: Tensor, dtype: torch.dtype) -> Posterior:
    """The VAE's posterior for pixels [b, c, H, W]: mean and std [b, c, h, w] in `dtype`."""
    distribution = vae.encode(pixels.to(vae.dtype)).latent_dist
    return Posterior(
        distribution.mean.to(dtype),
        distribution.std.to(dtype),
        scaling_factor=vae.config.scaling_factor,
        shift_factor=vae.config.shift_factor or 0.0,
    )


def decode_latents(vae: AutoencoderKL, latents: Tensor, *, scaled: bool) -> object:
    """One forward of the decoder of latents [b, c, h, w] as the denoiser takes them; `scaled` says
    whether they were scaled by the VAE's factors (`LatentSpec.scale`)."""
    z = latents
    if scaled:
        z = z / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    return vae.decode(z.to(vae.dtype), return_dict=False)
