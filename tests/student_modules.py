"""Students of one's own, as a user would write them."""

from __future__ import annotations

from pydantic import JsonValue
from torch import Tensor, nn

from drl_data.spec import ImageSpec


class Patches(nn.Module):
    """Two stages: patches, and a map of half their grid; some weights that nothing uses."""

    def __init__(self, n_channels: int, width: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(n_channels, width, 8, stride=8)
        self.norm = nn.BatchNorm2d(width)
        self.deep = nn.Conv2d(width, 2 * width, 2, stride=2)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        patches = self.norm(self.patch(x)).relu()
        return {"patches": patches, "deep": self.deep(patches)}


def patches(images: ImageSpec, config: dict[str, JsonValue]) -> nn.Module:
    """`config.width` channels."""
    width = config.get("width", 8)
    assert isinstance(width, int)
    return Patches(images.n_channels, width)


def one_map(images: ImageSpec, config: dict[str, JsonValue]) -> nn.Module:
    """A module with one stage."""
    return nn.Conv2d(images.n_channels, 4, 8, stride=8)


def vectors(images: ImageSpec, config: dict[str, JsonValue]) -> nn.Module:
    """What is no student: it gives vectors."""
    return nn.Sequential(nn.Flatten(), nn.Linear(32 * 32, 4))


def no_module(images: ImageSpec, config: dict[str, JsonValue]) -> str:
    """What is no module."""
    return "a student"
