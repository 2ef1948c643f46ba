"""The soak's backbone: a tiny DDPM that leaves a mark for every image that it encodes.

`python:soak_model:counted_ddpm` with this folder on PYTHONPATH. `DRL_SOAK_WEIGHTS` is a folder that
`save_tiny_ddpm` wrote, `DRL_SOAK_MARKS` a file that gets one byte for each image, and
`DRL_SOAK_SLEEP` the seconds that a batch takes at least, so that faults meet units that compute.
A poisonous image is one whose first pixel has the colour `POISON`.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor

from drl_data.backbones import Conditioning, CustomBackbone, Posterior
from drl_data.diffusion_spec import ConditionSpec
from drl_data.schedule import NoiseSchedule
from drl_data.spec import BackboneSpec, ImageSpec
from drl_data.spec_base import file_digest

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
        with open(os.environ["DRL_SOAK_MARKS"], "ab", buffering=0) as marks:
            marks.write(b"." * int((~blank).sum()))
        time.sleep(float(os.environ.get("DRL_SOAK_SLEEP", "0")))
        if _has(images, KILLS):
            os.kill(os.getpid(), signal.SIGSEGV)
        if _has(images, EATS):
            hoard = []
            while True:
                hoard.append(bytearray(64 << 20))
        return Posterior(pixels)

    def conditioning(self, spec: ConditionSpec) -> Conditioning:
        """Nothing is told."""
        return Conditioning()

    def forward(self, x: Tensor, model_time: Tensor, kwargs: Mapping[str, Tensor]) -> object:
        """The noise that the network sees."""
        return self.network(x, model_time).sample

    def weights_digest(self) -> str:
        """Digest of the one file."""
        return file_digest(str(_folder() / "unet" / "diffusion_pytorch_model.safetensors"))


def _has(images: Tensor, colour: tuple[int, int, int]) -> bool:
    """Whether one of the images [b, 3, h * w] is of one colour, more or less."""
    distance = (images - torch.tensor(colour).reshape(1, 3, 1)).abs().amax((1, 2))
    return bool((distance < 8).any())


def _folder() -> Path:
    return Path(os.environ["DRL_SOAK_WEIGHTS"])


def counted_ddpm(spec: BackboneSpec, device: torch.device) -> CountedDdpm:
    """The backbone; on meta without weights."""
    scheduler = DDPMScheduler.from_pretrained(_folder() / "scheduler")
    schedule = NoiseSchedule(scheduler.alphas_cumprod)
    if device.type == "meta":
        with device:
            network = UNet2DModel.from_config(UNet2DModel.load_config(_folder() / "unet"))
    else:
        network = UNet2DModel.from_pretrained(_folder() / "unet", use_safetensors=True)
    return CountedDdpm(network, schedule, device)
