"""The student: any image model of `transformers` by its configuration, and a classifier on it.

Shapes: b batch, c channel, h height, w width, k class.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from pydantic import JsonValue
from torch import Tensor, nn

from drl_data.distill_spec import StudentSpec
from drl_data.errors import SpecError
from drl_data.spec import ImageSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SMALL_RESNET: dict[str, JsonValue] = {
    "embedding_size": 32,
    "hidden_sizes": [32, 64],
    "depths": [1, 1],
    "layer_type": "basic",
}
"""The student if the pipeline says nothing: a ResNet of some 90,000 weights, for small images."""

MIN_SIDE = 32
"""Smaller images are enlarged by a whole factor: a ResNet's stem alone shrinks them four times."""


class Student(nn.Module):
    """Pixels to a map of features [b, c, h, w], whatever the model puts out."""

    def __init__(self, spec: StudentSpec, images: ImageSpec, seed: int) -> None:
        """Random weights, decided by `seed`.

        Raises:
            SpecError: `transformers` has no such model, or not with this configuration.
        """
        super().__init__()
        if images.frames > 1:
            raise SpecError(f"images.frames {images.frames}: students take images, not videos")
        self.enlarge = max(1, math.ceil(MIN_SIDE / min(images.size)))
        self.range = images.range
        self.n_pixels = math.prod(images.size) * self.enlarge**2
        self.body: PreTrainedModel = _build(spec, images, self.enlarge, seed)
        self.body.to(memory_format=torch.channels_last)  # a quarter faster on CPUs
        with torch.no_grad():
            self.eval()
            probe = torch.zeros(1, images.n_channels, *images.size, dtype=torch.uint8)
            self.n_channels = self(probe).shape[1]
            self.train()

    @property
    def n_parameters(self) -> int:
        """Weights of the body."""
        return sum(parameter.numel() for parameter in self.body.parameters())

    @property
    def small(self) -> bool:
        """Whether one CPU thread is enough."""
        return self.n_parameters < 1 << 20 and self.n_pixels <= 64 * 64

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 (or float 0..255) [b, c, h, w] to features [b, c, h, w]."""
        low, high = self.range
        x = pixels.float() / 255 * (high - low) + low
        if self.enlarge > 1:
            x = F.interpolate(x, scale_factor=self.enlarge, mode="bilinear")
        features: Tensor = self.body(x).last_hidden_state
        if features.ndim == 4:
            return features
        # Tokens: the last square number of them is the grid, what comes before is no place.
        side = math.isqrt(features.shape[1])
        grid = features[:, -side * side :].transpose(1, 2)
        return grid.reshape(*grid.shape[:2], side, side)

    def save(self, folder: Path) -> None:
        """Write the body as `from_pretrained` of `transformers` reads it."""
        from transformers.utils import logging

        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            self.body.save_pretrained(folder)
        finally:
            if shown:
                logging.enable_progress_bar()


class Classifier(nn.Module):
    """A student and a linear head on the mean of its map."""

    def __init__(self, student: Student, n_classes: int, seed: int) -> None:
        super().__init__()
        self.student = student
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = nn.Linear(student.n_channels, n_classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """[b, c, h, w] to logits [b, k]."""
        logits: Tensor = self.head(self.student(pixels).mean((2, 3)))
        return logits


def _build(spec: StudentSpec, images: ImageSpec, enlarge: int, seed: int) -> PreTrainedModel:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModel

    config: dict[str, JsonValue] = {
        "num_channels": images.n_channels,
        "image_size": [side * enlarge for side in images.size],
    }
    if spec.model_type == "resnet" and not spec.config:
        config.update(SMALL_RESNET)
    config.update(spec.config)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModel.from_config(AutoConfig.for_model(spec.model_type, **config))
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        lines = [line for line in str(error).splitlines() if line]
        raise SpecError(
            f"distill.student: transformers cannot build {spec.model_type!r} from "
            f"{spec.config}: {' '.join(lines)[:300]}"
        ) from error
