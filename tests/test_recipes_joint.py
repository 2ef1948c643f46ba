"""Recipes on models that also classify, and on encoders of diffusion autoencoders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from drl_data.backbones import find_model, load_backbone
from drl_data.backbones.backbone import CLEAN
from drl_data.recipes import find_recipe
from drl_data.spec import Pipeline
from tests.guided_diffusion import GuidedDiffusion
from tests.references import rehearse

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_same(got: Tensor, want: Tensor) -> None:
    """To 1e-4 of their size: the same sums in another order."""
    assert got.shape == want.shape
    assert float((got - want).abs().max() / want.abs().max()) < 1e-4


@torch.no_grad()
def test_jdm_cifar10(tmp_path: Path) -> None:
    run = rehearse("jdm_cifar10", tmp_path)
    network = GuidedDiffusion.load(run.model)
    network(run.pixels(), torch.zeros(4))
    names = [*(f"input_blocks.{i}" for i in range(16)), "middle_block"]
    assert [array.name for array in run.store.arrays] == names
    clean = {name: network.outputs[name].mean((2, 3)) for name in names}
    for name, want in clean.items():
        assert_same(run.features(name), want)
    assert sum(v.shape[1] for v in clean.values()) == 29 * 32
    network(run.pixels(), torch.full((4,), 50))
    told = network.outputs["middle_block"].mean((2, 3))
    assert (run.features("middle_block") - told).abs().max() > 1e-2


def planned(name: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a recipe's arrays with its real model, without weights."""
    recipe = Pipeline.load(find_recipe(name))
    assert recipe.backbone is not None
    backbone = load_backbone(find_model(recipe.backbone, structure_only=True), "meta")
    taps = backbone.resolve(recipe.taps)
    arrays = backbone.arrays(taps, recipe.images, recipe.condition, CLEAN, recipe.features.dtype)
    return {array.name: array.shape for array in arrays}


def test_joint_diffusion_has_its_29_times_the_width() -> None:
    shapes = planned("jdm_cifar10")
    assert sum(channels for (channels,) in shapes.values()) == 29 * 128
    assert len(shapes) == 17
