"""From the student's stages to the teachers' features: linear maps, or DreamTeacher's pyramid.

Shapes: b batch, c channel, h height, w width, t timestep.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drl_data.distill_spec import RegressorSpec
from drl_data.errors import SpecError
from drl_data.spec import ArraySpec


class Regressor(nn.Module):
    """Maps [b, c, h, w] by stage to predictions [b, c, h, w], one for each target."""

    @abstractmethod
    def forward(self, maps: Mapping[str, Tensor]) -> list[Tensor]:
        """Each of its target's channels and grid."""


def build_regressor(
    spec: RegressorSpec,
    channels: Mapping[str, int],
    stages: Sequence[str],
    arrays: Sequence[ArraySpec],
    seed: int,
) -> Regressor:
    """For targets that are `arrays`, each from its stage; `channels` are those of all stages.

    Raises:
        SpecError: an array that is no map.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if spec.kind == "linear":
            return Linear(channels, stages, arrays)
        return Pyramid(spec, channels, stages, arrays)


class Linear(Regressor):
    """A linear map per place from each target's stage, then resized."""

    def __init__(
        self, channels: Mapping[str, int], stages: Sequence[str], arrays: Sequence[ArraySpec]
    ) -> None:
        super().__init__()
        self._stages = tuple(stages)
        self.heads = nn.ModuleList(
            Head(channels[stage], array) for stage, array in zip(stages, arrays, strict=True)
        )

    def forward(self, maps: Mapping[str, Tensor]) -> list[Tensor]:
        """See `Regressor`."""
        return [head(maps[s]) for head, s in zip(self.heads, self._stages, strict=True)]


class Pyramid(Regressor):
    """DreamTeacher's feature regressor (Li et al. 2023, section 3.1): FPN and PPM.

    A feature pyramid (Lin et al. 2017): each stage by a 1 x 1 convolution, plus the level below it
    (deeper) enlarged, then a 3 x 3 convolution. On top of it pyramid pooling (Zhao et al. 2017) of
    the deepest stage. There is no code of the authors; what the paper leaves open is as in these.
    """

    def __init__(
        self,
        spec: RegressorSpec,
        channels: Mapping[str, int],
        stages: Sequence[str],
        arrays: Sequence[ArraySpec],
    ) -> None:
        super().__init__()
        width, order = spec.channels, list(channels)
        first = min(order.index(stage) for stage in stages)
        self._order, self._stages = order[first:], tuple(stages)
        *shallow, deepest = self._order
        self.pooling = PyramidPooling(channels[deepest], width, spec.pools)
        self.lateral = nn.ModuleList(nn.Conv2d(channels[stage], width, 1) for stage in shallow)
        self._smoothed = [stage for stage in self._order if stage in stages]
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in self._smoothed)
        self.heads = nn.ModuleList(Head(width, array) for array in arrays)

    def forward(self, maps: Mapping[str, Tensor]) -> list[Tensor]:
        """See `Regressor`."""
        *shallow, deepest = self._order
        level = self.pooling(maps[deepest])
        levels = {deepest: level}
        for stage, lateral in reversed(list(zip(shallow, self.lateral, strict=True))):
            own = lateral(maps[stage])
            level = own + F.interpolate(level, own.shape[2:], mode="bilinear")
            levels[stage] = level
        smooth = {
            stage: conv(levels[stage])
            for stage, conv in zip(self._smoothed, self.smooth, strict=True)
        }
        return [head(smooth[s]) for head, s in zip(self.heads, self._stages, strict=True)]


class PyramidPooling(nn.Module):
    """The map beside its averages over coarser grids, mixed by a 3 x 3 convolution (PSPNet)."""

    def __init__(self, n_channels: int, width: int, pools: Sequence[int]) -> None:
        super().__init__()
        narrow = max(n_channels // len(pools), 1)
        self._pools = tuple(pools)
        self.convs = nn.ModuleList(nn.Conv2d(n_channels, narrow, 1) for _ in pools)
        self.mix = nn.Conv2d(n_channels + narrow * len(pools), width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, h, w] to [b, width, h, w]."""
        parts = [x]
        for side, conv in zip(self._pools, self.convs, strict=True):
            coarse = F.relu(conv(F.adaptive_avg_pool2d(x, side)))
            parts.append(F.interpolate(coarse, x.shape[2:], mode="bilinear"))
        out: Tensor = self.mix(torch.cat(parts, 1))
        return out


class Head(nn.Module):
    """A linear map per place to a target's channels, resized to its grid."""

    def __init__(self, n_channels: int, array: ArraySpec) -> None:
        """Raises `SpecError` for tokens that are no square grid."""
        super().__init__()
        self._grid = grid_of(array)
        self.linear = nn.Conv2d(n_channels, array.shape[array.channel_axis], 1)

    def forward(self, features: Tensor) -> Tensor:
        """[b, c, h, w] to the teacher's [b, c, h, w]; h = w = 1 for a vector."""
        if features.shape[2:] == self._grid:
            return self.linear(features)  # type: ignore[no-any-return]
        height, width = features.shape[2:]
        if height >= self._grid[0] and width >= self._grid[1]:
            features = F.adaptive_avg_pool2d(features, self._grid)
        return F.interpolate(self.linear(features), self._grid, mode="bilinear")


class Whitening(nn.Module):
    """A teacher's maps as what is regressed.

    `statistics`: each channel has mean 0 and variance 1 over the train split; one that does not
    vary becomes 0, and so asks nothing of the student. `layer_norm`: the channels of each place
    have (Wei et al. 2022, DreamTeacher's W).
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        mean: Tensor,
        variance: Tensor,
        how: Literal["statistics", "layer_norm", "none"] = "statistics",
    ) -> None:
        """Of float64 [t, c]."""
        super().__init__()
        std = variance.sqrt()
        scale = torch.where(std > 1e-6 * mean.abs() + 1e-12, 1 / std, 0.0)
        self._how = how
        self.register_buffer("mean", mean.float()[..., None, None])
        self.register_buffer("scale", scale.float()[..., None, None])

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """[b, c, h, w] to the same shape; `time` [b] says which timestep each is of."""
        if self._how == "none":
            return x
        if self._how == "layer_norm":
            return F.layer_norm(x.movedim(1, -1), x.shape[1:2]).movedim(-1, 1)
        which = 0 if time is None else time
        return (x - self.mean[which]) * self.scale[which]


def as_map(features: Tensor, array: ArraySpec) -> Tensor:
    """Stored features [b, *shape] as [b, c, h, w], float32."""
    x = features.float()
    if x.ndim == 3:  # [b, token, c]
        x = x.transpose(1, 2)
    return x.reshape(x.shape[0], x.shape[1], *grid_of(array))


def grid_of(array: ArraySpec) -> tuple[int, int]:
    """Height and width of a teacher's map.

    Raises:
        SpecError: frames, or tokens that are no square grid.
    """
    if array.dims == ("channel", "height", "width"):
        return array.shape[1], array.shape[2]
    if array.dims == ("channel",):
        return 1, 1
    if "frame" in array.dims:
        raise SpecError(
            f"distill.tap {array.name!r} has frames; average them with `reduce: [frame_mean]` in "
            "the pipeline's taps"
        )
    if array.dims != ("token", "channel"):
        raise SpecError(
            f"distill.tap {array.name!r} has the axes {', '.join(array.dims)}; want a map, tokens "
            "or a vector"
        )
    n_tokens = array.shape[0]
    side = math.isqrt(n_tokens)
    if side * side != n_tokens:
        raise SpecError(
            f"distill.tap {array.name!r}: {n_tokens} tokens are no square grid; pool them with "
            "`reduce` in the pipeline's taps"
        )
    return side, side
