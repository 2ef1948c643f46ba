"""What makes images, whatever the family: a batch of requests to a batch of images.

Each image has its own generator on the CPU, so that it depends neither on its place in the batch
nor on the device. A maker that draws from any other generator is caught.

Shape suffixes: b batch, c channel, h height, w width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from drl_data.errors import SpecError


@dataclass(frozen=True)
class ImageRequest:
    """One batch; what is given has one entry for each image."""

    generators: Sequence[torch.Generator]
    prompts: Sequence[str] | None = None
    classes: Sequence[int] | None = None
    sources: Sequence[Image.Image] | None = None
    """RGB, all of one size."""
    strength: float | None = None
    """Of image to image."""


@dataclass(frozen=True)
class DrawnImages:
    """`images_bchw` is float32 on the CPU, 0..1, or not finite where the model failed; `flagged`
    says which ones a safety checker made black."""

    images_bchw: Tensor
    flagged: tuple[bool, ...]


class ImageMaker(Protocol):
    """A model with its weights on a device."""

    def draw(self, request: ImageRequest) -> DrawnImages:
        """The images of one batch."""

    def replica(self) -> ImageMaker:
        """Another maker on the same weights, for another thread."""


@contextmanager
def own_generators_only(device: torch.device, who: str) -> Iterator[None]:
    """Refuse what draws from torch's global generators: it would depend on the order of work.

    Raises:
        SpecError: at the end, if something did.
    """
    before = _states(device)
    yield
    if any(not torch.equal(a, b) for a, b in zip(before, _states(device), strict=True)):
        raise SpecError(
            f"synthesize: {who} draws random numbers that are not of the images' own seeds, so "
            "that its images would change with the order of work; take another scheduler "
            "(DDIMScheduler, DPMSolverMultistepScheduler ... draw none)"
        )


def _states(device: torch.device) -> list[Tensor]:
    states = [torch.random.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states
