"""Segment and correspond on a GPU: what learns and what matches there gives what a CPU gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from drl_data.fitting import PixelMap
from drl_data.matching import Matches, Side, match
from drl_data.pixel_features import GatheredPixels, MapPixels, gathered
from drl_data.pixel_linear import PixelLinear
from drl_data.pixel_mlps import PixelMlps, votes
from drl_data.segment_spec import PixelLinearSpec, PixelMlpSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
SIZE = (24, 20)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kept", ["maps", "vectors"])
def test_pixels_are_learnt_and_predicted_alike(kept: str) -> None:
    maps = [[randn(6, 8, 10, seed=i).half(), randn(4, 12, 5, seed=9 + i).half()] for i in range(3)]
    places = torch.arange(SIZE[0] * SIZE[1])
    y, x = places // SIZE[1], places % SIZE[1]
    vectors = torch.cat([gathered(one, y, x, SIZE) for one in maps])
    labels = vectors[:, :3].argmax(1)
    found = []
    for device in ("cpu", "cuda"):
        features: MapPixels | GatheredPixels = GatheredPixels(vectors.to(device))
        if kept == "maps":
            features = MapPixels(device, SIZE)
            for one in maps:
                features.add(one, y, x)
            features.finish()
        spec = PixelMlpSpec(members=2, hidden=(8,), epochs=2, standardise=True)
        ensemble = PixelMlps(spec, 10, 3, 0, device)
        list(ensemble.train(features, labels))
        linear = PixelLinear(PixelLinearSpec(epochs=2), (6, 4), 3, 0, device)
        list(linear.train(features, labels))
        logits = torch.cat(list(ensemble.on_image(maps[0], SIZE)), 1)
        classes = [one.cpu() for one in linear.classes(maps[0], SIZE)]
        found.append((logits.cpu(), votes(logits)[0].cpu(), classes))
    torch.testing.assert_close(found[0][0], found[1][0], atol=2e-2, rtol=2e-2)
    assert (found[0][1] == found[1][1]).float().mean() > 0.98
    for one, two in zip(found[0][2], found[1][2], strict=True):
        assert (one == two).float().mean() > 0.98


def test_points_are_matched_alike() -> None:
    def matched(device: str) -> Matches:
        sides = []
        for seed, grid, size in ((5, (12, 12), (120, 100)), (6, (10, 14), (90, 130))):
            place = PixelMap((grid[0] / size[0], grid[1] / size[1]), (0.0, 0.0))
            ys, xs = (torch.arange(n, dtype=torch.float64) + 0.5 for n in size)
            map_chw = randn(32, *grid, seed=seed).half().to(device)
            sides.append(Side(size, [map_chw], [place], ys, xs))
        generator = torch.Generator().manual_seed(1)
        points = torch.rand(40, 2, dtype=torch.float64, generator=generator) * 90
        return match(sides[0], sides[1], points, [(0, 1.0)])

    one, two = matched("cpu"), matched("cuda")
    torch.testing.assert_close(one.cosine, two.cosine, atol=1e-4, rtol=0)
    assert (one.points == two.points).all(1).float().mean() > 0.95
