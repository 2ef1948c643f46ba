"""The student: an image model of `transformers`, or your own, as maps of features by stage.

Your own is `student.model_type: python:package.module:factory`, a function of an importable module:

    def factory(images: ImageSpec, config: dict[str, JsonValue]) -> torch.nn.Module

The module takes pixels, float32 [b, c, h, w], normalised, at least 32 px a side, and gives one map
[b, c, h, w] (the stage `last`), or a mapping of them by stage, the deepest last.

Shapes: b batch, c channel, h height, w width, k class.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drl_data.distill_spec import StudentSpec
from drl_data.errors import SpecError
from drl_data.spec import ImageSpec
from drl_data.student_bodies import Body, build_body

MIN_SIDE = 32
"""Smaller images are enlarged by a whole factor: a ResNet's stem alone shrinks them four times."""


class Student(nn.Module):
    """Pixels to maps of features by stage, whatever the model puts out."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: StudentSpec, images: ImageSpec, seed: int) -> None:
        """Random weights, decided by `seed`, or those of `spec.weights`.

        Raises:
            SpecError: there is no such model, not with this configuration, or not these weights.
        """
        super().__init__()
        if images.frames > 1:
            raise SpecError(f"images.frames {images.frames}: students take images, not videos")
        self.enlarge = max(1, math.ceil(MIN_SIDE / min(images.size)))
        self.n_pixels = math.prod(images.size) * self.enlarge**2
        low, high = images.range
        mean, std = spec.mean or (low / (low - high),), spec.std or (1 / (high - low),)
        if len(mean) not in (1, images.n_channels):
            raise SpecError(
                f"distill.student.mean of {len(mean)} channels; images have {images.n_channels}"
            )
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)
        self.body: Body = build_body(spec, images, self.enlarge, seed)
        self.body.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster
        self._about = {"images": images.model_dump(mode="json"), "mean": mean, "std": std}
        with torch.no_grad():
            self.eval()
            probe = torch.zeros(1, images.n_channels, *images.size, dtype=torch.uint8)
            self.channels = {stage: x.shape[1] for stage, x in self(probe).items()}
            self.train()
        self.last = list(self.channels)[-1]
        """The deepest stage."""

    @property
    def n_parameters(self) -> int:
        """Weights of the body."""
        return sum(parameter.numel() for parameter in self.body.parameters())

    @property
    def small(self) -> bool:
        """Whether one CPU thread is enough."""
        return self.n_parameters < 1 << 20 and self.n_pixels <= 64 * 64

    def normalised(self, pixels: Tensor) -> Tensor:
        """uint8 (or float 0..255) [b, c, h, w] to what the body takes."""
        x = (pixels.float() / 255 - self.mean) / self.std
        if self.enlarge > 1:
            x = F.interpolate(x, scale_factor=self.enlarge, mode="bilinear")
        return x

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """uint8 (or float 0..255) [b, c, h, w] to features [b, c, h, w] by stage."""
        return self.body(self.normalised(pixels))  # type: ignore[no-any-return]

    def keep_used(self, stages: set[str], images: ImageSpec) -> None:
        """Freeze weights that nothing of these stages depends on (a pooler, deeper stages).

        Ranks that train together would wait for their gradients.
        """
        self.eval()
        probe = torch.zeros(1, images.n_channels, *images.size, dtype=torch.uint8)
        maps = self(probe.to(self.mean.device))
        parameters = list(self.parameters())
        total = torch.stack([maps[stage].float().sum() for stage in sorted(stages)]).sum()
        found = torch.autograd.grad(total, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.requires_grad_(gradient is not None)
        self.train()

    def save(self, folder: Path) -> None:
        """Write the body as `AutoModel.from_pretrained` of `transformers` reads it.

        One of your own is written as `config.json` and `model.safetensors`, its state dict. Both
        are read again by `student.weights`. `student.json` says what pixels it takes.
        """
        self.body.save(folder)
        about = {**self._about, "enlarge": self.enlarge, "stages": self.channels}
        (folder / "student.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


class Classifier(nn.Module):
    """A student and a linear head on the mean of its last map."""

    def __init__(self, student: Student, n_classes: int, seed: int) -> None:
        super().__init__()
        self.student = student.requires_grad_(True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = nn.Linear(student.channels[student.last], n_classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """[b, c, h, w] to logits [b, k]."""
        maps: Mapping[str, Tensor] = self.student(pixels)
        logits: Tensor = self.head(maps[self.student.last].mean((2, 3)))
        return logits
