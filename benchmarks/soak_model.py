"""The soak's backbone: a tiny DDPM that leaves a mark for every image that it encodes.

`python:benchmarks.soak_model:counted_ddpm`, with the project's folder on PYTHONPATH. The folder
`DRL_SOAK_FOLDER` has the weights, `ddpm` as `save_tiny_ddpm` writes them, and `marks`, which gets
one byte for each image; `DRL_SOAK_SLEEP` is the seconds that a batch takes at least, so that faults
meet units that compute. Images of the colours `KILLS` and `EATS` are poison, unless
`DRL_SOAK_TAME` is set.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor

from drl_data.backbones import Conditioning, CustomBackbone, Posterior
from drl_data.diffusion_spec import ConditionSpec
from drl_data.schedule import NoiseSchedule
from drl_data.spec import BackboneSpec, ImageSpec
from drl_data.spec_base import file_digest

HOARD_BYTES = 1 << 30
KILLS, EATS = (250, 0, 250), (0, 250, 0)
"""Colours of a whole image that ends the process that encodes it, or uses up its memory."""


class CountedDdpm(CustomBackbone):
    """A pixel-space UNet2DModel."""

    def input_shape(self, images: ImageSpec) -> tuple[int, int, int]:
        """The image as it is."""
        return (images.n_channels, *images.size)

    def encode(self, pixels: Tensor) -> Posterior:
        """The pixels; one mark for each image that is none of the padding."""
        images = ((pixels.float() + 1) * 127.5).round().flatten(2)
        blank = (pixels == -1).flatten(1).all(1)
        with open(_folder() / "marks", "ab", buffering=0) as marks:
            marks.write(b"." * int((~blank).sum()))
        time.sleep(float(os.environ.get("DRL_SOAK_SLEEP", "0")))
        if "DRL_SOAK_TAME" in os.environ:
            return Posterior(pixels)
        if _has(images, KILLS):
            os.kill(os.getpid(), signal.SIGSEGV)
        if _has(images, EATS):
            hoard = []
            limit = psutil.Process().memory_info().rss + HOARD_BYTES
            while psutil.Process().memory_info().rss < limit:
                hoard.append(bytearray(64 << 20))
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does with who has the most
        return Posterior(pixels)

    def conditioning(self, spec: ConditionSpec) -> Conditioning:
        """Nothing is told."""
        return Conditioning()

    def forward(self, x: Tensor, model_time: Tensor, kwargs: Mapping[str, Tensor]) -> object:
        """The noise that the network sees."""
        return self.network(x, model_time).sample

    def weights_digest(self) -> str:
        """Digest of the one file."""
        return file_digest(str(_folder() / "ddpm" / "unet" / "diffusion_pytorch_model.safetensors"))


def _has(images: Tensor, colour: tuple[int, int, int]) -> bool:
    """Whether one of the images [b, 3, h * w] is of one colour, more or less."""
    distance = (images - torch.tensor(colour).reshape(1, 3, 1)).abs().amax((1, 2))
    return bool((distance < 8).any())


def _folder() -> Path:
    return Path(os.environ["DRL_SOAK_FOLDER"])


def counted_ddpm(spec: BackboneSpec, device: torch.device) -> CountedDdpm:
    """The backbone; on meta without weights."""
    scheduler = DDPMScheduler.from_pretrained(_folder() / "ddpm" / "scheduler")
    schedule = NoiseSchedule(scheduler.alphas_cumprod)
    if device.type == "meta":
        with device:
            network = UNet2DModel.from_config(UNet2DModel.load_config(_folder() / "ddpm" / "unet"))
    else:
        network = UNet2DModel.from_pretrained(_folder() / "ddpm" / "unet", use_safetensors=True)
    return CountedDdpm(network, schedule, device)
