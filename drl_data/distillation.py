"""What stage 1 trains: a student, a head for each target, and the losses between them.

Shapes: b batch, c channel, h height, w width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drl_data.distill_spec import DistillSpec
from drl_data.errors import SpecError
from drl_data.spec import ArraySpec
from drl_data.student import Student
from drl_data.teachers import Teachers

LOSS = "loss"
"""Name of the weighted sum of all losses."""


class Distillation(nn.Module):
    """Pixels and targets to losses. Its parameters are all that stage 1 trains."""

    def __init__(self, spec: DistillSpec, teachers: Teachers) -> None:
        """Random weights, decided by the first of `spec.seeds`.

        Raises:
            SpecError: a student that cannot be built, or a target that is no map.
        """
        super().__init__()
        seed = spec.seeds[0]
        self.student = Student(spec.student, teachers.images, seed)
        self.names = tuple(target.name for target in teachers.targets)
        statistics = teachers.statistics
        self.heads = nn.ModuleList(
            TeacherHead(self.student.n_channels, target.array, seed) for target in teachers.targets
        )
        self.whiten = nn.ModuleList(
            Whitening(statistics.mean[name], statistics.variance[name]) for name in self.names
        )

    def forward(self, pixels: Tensor, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """uint8 [b, c, h, w] and stored features [b, *shape] by target to mean losses by target,
        and their weighted sum as "loss"."""
        features = self.student(pixels)
        losses: dict[str, Tensor] = {}
        for name, head, whiten in zip(self.names, self.heads, self.whiten, strict=True):
            assert isinstance(head, TeacherHead)
            losses[name] = F.mse_loss(head(features), whiten(head.target(targets[name])))
        return {**losses, LOSS: torch.stack(list(losses.values())).sum()}


class Whitening(nn.Module):
    """Teacher's maps with mean 0 and variance 1 in each channel over the train split.

    A channel that does not vary becomes 0, and so asks nothing of the student.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, variance: Tensor) -> None:
        """Of float64 [c]."""
        super().__init__()
        std = variance.sqrt()
        scale = torch.where(std > 1e-6 * mean.abs() + 1e-12, 1 / std, 0.0)
        self.register_buffer("mean", mean.float()[:, None, None])
        self.register_buffer("scale", scale.float()[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, h, w] to the same shape."""
        return (x - self.mean) * self.scale


class TeacherHead(nn.Module):
    """Student features to whitened teacher features: one linear map per place, then resized."""

    def __init__(self, n_channels: int, array: ArraySpec, seed: int) -> None:
        """Raises `SpecError` for tokens that are no square grid."""
        super().__init__()
        self._grid = _grid(array)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.linear = nn.Conv2d(n_channels, array.shape[array.channel_axis], 1)

    def forward(self, features: Tensor) -> Tensor:
        """[b, c, h, w] to the teacher's [b, c, h, w]; h = w = 1 for a vector."""
        if self._grid == (1, 1):
            features = features.mean((2, 3), keepdim=True)
        x: Tensor = self.linear(features)
        if x.shape[2:] != self._grid:
            x = F.interpolate(x, self._grid, mode="bilinear")
        return x

    def target(self, features: Tensor) -> Tensor:
        """Stored features [b, *shape] as [b, c, h, w], float32."""
        x = features.float()
        if x.ndim == 3:  # [b, token, c]
            x = x.transpose(1, 2)
        return x.reshape(x.shape[0], x.shape[1], *self._grid)


def _grid(array: ArraySpec) -> tuple[int, int]:
    """Height and width of the teacher's map."""
    if array.dims == ("channel", "height", "width"):
        return array.shape[1], array.shape[2]
    if array.dims == ("channel",):
        return 1, 1
    if "frame" in array.dims:
        raise SpecError(
            f"distill.tap {array.name!r} has frames; average them with `reduce: [frame_mean]` in "
            "the pipeline's taps"
        )
    n_tokens = array.shape[0]
    side = math.isqrt(n_tokens)
    if side * side != n_tokens:
        raise SpecError(
            f"distill.tap {array.name!r}: {n_tokens} tokens are no square grid; pool them with "
            "`reduce` in the pipeline's taps"
        )
    return side, side
