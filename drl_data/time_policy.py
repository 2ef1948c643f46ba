"""RepFusion's choice of the timestep whose features a student learns, for each image (Yang and Wang
2023, "Diffusion Model as Representation Learner").

A small network sees the image and gives chances to the timesteps; one is drawn; a classifier of the
teacher's features at this timestep is trained beside it, and minus its loss is the reward. The
networks and weights are those of the published code.

Shapes: b batch, c channel, h height, w width, t timestep, k class.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drl_data.distill_spec import PolicySpec

GRID = 5
"""Side of what the published network has before its linear layers, from images of 32 px."""


@dataclass(frozen=True)
class Drawn:
    """Timesteps of a batch: positions [b], log of their chances [b], entropies [b]."""

    position: Tensor
    log_chance: Tensor
    entropy: Tensor


class TimePolicy(nn.Module):
    """The published network (LeNet's): pixels to chances of the timesteps.

    Larger images are averaged to its grid after the convolutions.
    """

    def __init__(self, n_channels: int, n_times: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_channels, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.linear1 = nn.Linear(16 * GRID * GRID, 120)
        self.linear2 = nn.Linear(120, 84)
        self.linear3 = nn.Linear(84, n_times)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised pixels [b, c, h, w] of at least 32 px a side to log chances [b, t]."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.adaptive_avg_pool2d(x, GRID).flatten(1)
        x = F.relu(self.linear2(F.relu(self.linear1(x))))
        return F.log_softmax(self.linear3(x), dim=1)

    def draw(self, x: Tensor, uniform: Tensor) -> Drawn:
        """One timestep for each image, by numbers of [0, 1), [b]: the same for any batching."""
        log_chance = self(x)
        chance = log_chance.exp()
        edges = chance.detach().double().cumsum(1)[:, :-1].contiguous()
        position = torch.searchsorted(edges, uniform.double()[:, None], right=True)
        return Drawn(
            position[:, 0],
            log_chance.gather(1, position)[:, 0],
            -(chance * log_chance).sum(1),
        )


class TaskHead(nn.Module):
    """The classifier whose loss is the reward: three linear layers, as wide as the features."""

    def __init__(self, n_channels: int, n_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(n_channels, n_channels),
            nn.ReLU(),
            nn.Linear(n_channels, n_channels),
            nn.ReLU(),
            nn.Linear(n_channels, n_classes),
        )

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """[b, c] and classes int64 [b] (-1: none) to cross-entropy [b], 0 without a label."""
        return F.cross_entropy(self.layers(features), labels, reduction="none", ignore_index=-1)


def policy_losses(drawn: Drawn, loss: Tensor, spec: PolicySpec) -> dict[str, Tensor]:
    """REINFORCE (Williams 1992): -mean of log chance times reward, and minus the entropy.

    `loss` [b] is that of each image at the drawn timestep; the reward is minus it.
    """
    reward = -loss.detach()
    if spec.baseline == "mean":
        reward = reward - reward.mean()
    return {
        "policy": -(drawn.log_chance * reward).mean(),
        "entropy": -spec.entropy * drawn.entropy.mean(),
    }
