"""Images drawn from a pixel-space DDPM, for example one that pretrain.py trained.

Shape suffixes: b batch, c channel, h height, w width, n images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DModel

from drl_data.backbones.pixel_images import pixel_range
from drl_data.backbones.unet import NULL_CLASS
from drl_data.errors import SpecError, WeightsError


def sample(
    folder: str | Path,
    n: int,
    *,
    labels: Sequence[int] | None = None,
    guidance: float = 1.0,
    seed: int = 0,
    steps: int = 50,
    device: str = "cpu",
) -> np.ndarray:
    """Images uint8 [n, c, h, w] drawn from a pixel-space DDPM by DDIM (Song et al. 2021, eta 0).

    A class-conditional one is told `labels`, one for each image, and with `guidance` other than 1
    the null class, too: eps = eps_null + guidance (eps_label - eps_null) (Ho and Salimans 2022,
    eq. 6, whose w is guidance - 1).

    Raises:
        WeightsError: if the folder holds no such model.
        SpecError: if labels are missing or not the model's, or it has no null class for guidance.
    """
    try:
        model = UNet2DModel.from_pretrained(
            folder, subfolder="unet", use_safetensors=True, local_files_only=True
        )
        model = model.to(device).eval()
        settings = DDIMScheduler.load_config(folder, subfolder="scheduler")
    except OSError as error:
        raise WeightsError(
            f"{folder}: no diffusers folder with unet/ and scheduler/: {error}"
        ) from error
    scheduler = DDIMScheduler.from_config(settings, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    low, high = pixel_range(Path(folder))
    size, channels = model.config.sample_size, model.config.in_channels
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(seed)
    noise_bchw = torch.randn((n, channels, height, width), generator=generator)
    told_n = _told(model, n, labels, guidance)
    done = []
    for start in range(0, n, 256):
        x_bchw = noise_bchw[start : start + 256].to(device)
        told_b = None if told_n is None else told_n[start : start + 256].to(device)
        with torch.no_grad():
            for t in scheduler.timesteps:
                eps_bchw = _guided(model, x_bchw, t, told_b, guidance)
                x_bchw = scheduler.step(eps_bchw, t, x_bchw).prev_sample
        done.append(((x_bchw - low) / (high - low) * 255).round().clamp(0, 255).byte().cpu())
    return torch.cat(done).numpy() if done else noise_bchw.byte().numpy()


def _told(
    model: UNet2DModel, n: int, labels: Sequence[int] | None, guidance: float
) -> torch.Tensor | None:
    """Labels int64 [n] as the network takes them; None if it takes none."""
    n_embeddings = model.config.num_class_embeds
    if n_embeddings is None:
        if labels is not None or guidance != 1:
            raise SpecError("labels and guidance: the model is not class-conditional")
        return None
    if labels is None or len(labels) != n:
        got = "none" if labels is None else len(labels)
        raise SpecError(f"labels: {got}, want {n}, one for each image of a class-conditional model")
    if not all(0 <= label < n_embeddings for label in labels):
        raise SpecError(f"labels {min(labels)}..{max(labels)}: want 0..{n_embeddings - 1}")
    if guidance != 1 and NULL_CLASS not in model.config:
        raise SpecError(f"guidance {guidance}: the model was trained without a null class; want 1")
    return torch.tensor(labels, dtype=torch.int64)


def _guided(
    model: UNet2DModel,
    x_bchw: torch.Tensor,
    t: torch.Tensor,
    told_b: torch.Tensor | None,
    guidance: float,
) -> torch.Tensor:
    eps_bchw: torch.Tensor = model(x_bchw, t, class_labels=told_b).sample
    if guidance == 1 or told_b is None:
        return eps_bchw
    null_b = torch.full_like(told_b, model.config[NULL_CLASS])
    null_bchw: torch.Tensor = model(x_bchw, t, class_labels=null_b).sample
    return null_bchw + guidance * (eps_bchw - null_bchw)
