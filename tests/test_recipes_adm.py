"""Recipes on pixel-space UNets (ADM, DDPM, EDM), against networks written without drl_data.

The reference of ADM is `GuidedDiffusion`, which works on the checkpoint's own names: it says where
`output_blocks.4` is. It sums in another order than diffusers (attention, 1x1 kernels), so features
agree to 1e-4 of their size; the nearest wrong tap, time or noise is off by more than 1e-2.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image
from torch import Tensor

from drl_data.backbones import find_model, load_backbone
from drl_data.backbones.backbone import CLEAN
from drl_data.errors import WeightsError
from drl_data.noise import draw_normal, draw_uniform
from drl_data.recipes import find_recipe
from drl_data.spec import Pipeline
from tests.guided_diffusion import GuidedDiffusion
from tests.references import Rehearsed, hooked, rehearse

pytestmark = pytest.mark.usefixtures("one_thread")

LINEAR = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")


def assert_same(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert float((got - want).abs().max() / want.abs().max()) < 1e-4


def assert_other(got: Tensor, other: Tensor) -> None:
    """Far from what a wrong recipe gives; of another shape is far enough."""
    assert got.shape != other.shape or float((got - other).abs().max() / other.abs().max()) > 1e-2


def noisy(run: Rehearsed, t: int, noise: Tensor, clean: Tensor | None = None) -> Tensor:
    return LINEAR.add_noise(run.pixels() if clean is None else clean, noise, torch.tensor([t] * 4))


@torch.no_grad()
def decoded(network: GuidedDiffusion, x: Tensor, t: int) -> dict[str, Tensor]:
    """Outputs of every block for x at the told time t."""
    network(x, torch.full((4,), t))
    return dict(network.outputs)


def test_ddpm_seg(tmp_path: Path) -> None:
    run = rehearse("ddpm_seg", tmp_path)
    network = GuidedDiffusion.load(run.model)
    pixels = run.pixels(Image.Resampling.BILINEAR)
    shape = (3, 64, 64)
    one = torch.from_numpy(draw_normal(shape, "noise", 0, "shared", 0, "all"))
    for i, t in enumerate((50, 150, 250)):
        outputs = decoded(network, noisy(run, t, one.expand(4, *shape), pixels), t)
        for block in (5, 6, 7, 8, 12):
            assert_same(
                run.features(f"output_blocks.{block}", i), outputs[f"output_blocks.{block}"]
            )
        own = decoded(network, noisy(run, t, run.noise(shape), pixels), t)
        assert_other(run.features("output_blocks.5", i), own["output_blocks.5"])
    assert run.store.arrays[0].shape == (64, 8, 8)
    assert len(run.store.arrays) == 5


def mean_over_members(run: Rehearsed, t: int, block: str, n: int, pixels: Tensor) -> Tensor:
    network = GuidedDiffusion.load(run.model)
    shape = tuple(pixels.shape[1:])
    draws = [
        decoded(network, noisy(run, t, run.noise(shape, member=member), pixels), t)[block]
        for member in range(n)
    ]
    return torch.stack(draws).mean(0)


def test_dift_adm_spair(tmp_path: Path) -> None:
    run = rehearse("dift_adm_spair", tmp_path)
    want = mean_over_members(run, 101, "output_blocks.4", 8, run.pixels())
    assert_same(run.features("output_blocks.4"), want)
    assert_other(
        run.features("output_blocks.4"),
        mean_over_members(run, 101, "output_blocks.4", 1, run.pixels()),
    )


def test_dift_adm_hpatches(tmp_path: Path) -> None:
    run = rehearse("dift_adm_hpatches", tmp_path)
    want = mean_over_members(run, 41, "output_blocks.11", 4, run.pixels())
    assert_same(run.features("output_blocks.11"), want)


def test_dift_adm_davis(tmp_path: Path) -> None:
    run = rehearse("dift_adm_davis", tmp_path)
    pixels = run.pixels(Image.Resampling.BILINEAR)
    assert pixels.shape == (4, 3, 32, 64)
    want = mean_over_members(run, 51, "output_blocks.7", 4, pixels)
    assert_same(run.features("output_blocks.7"), want)


def numbered(network: GuidedDiffusion) -> list[str]:
    """The authors' numbers of blocks, from 1: input blocks, the middle, output blocks."""
    names = [f"input_blocks.{i}" for i in range(network.count("input_blocks"))]
    names += ["middle_block"]
    return ["", *names, *(f"output_blocks.{i}" for i in range(network.count("output_blocks")))]


def test_gd(tmp_path: Path) -> None:
    run = rehearse("gd", tmp_path)
    network = GuidedDiffusion.load(run.model)
    block = numbered(network)[24]
    assert len(numbered(network)) == 1 + 37
    outputs = decoded(network, noisy(run, 150, run.noise((3, 64, 64))), 150)
    assert_same(run.features("b24"), outputs[block])
    assert_same(run.features("b24_pool2"), F.adaptive_avg_pool2d(outputs[block], 2))
    assert_other(run.features("b24"), outputs["output_blocks.3"])
    assert_other(run.features("b24"), outputs["output_blocks.4.0"])  # before its attention


def test_difformer(tmp_path: Path) -> None:
    run = rehearse("difformer", tmp_path)
    network = GuidedDiffusion.load(run.model)
    names = numbered(network)
    for i, t in enumerate((90, 150, 300)):
        outputs = decoded(network, noisy(run, t, run.noise((3, 96, 96), timestep=t)), t)
        assert_same(run.features("b19", i), outputs[names[19]])
        assert_same(run.features("b24", i), outputs[names[24]])
        assert outputs[names[30]].shape[-1] == 24
        assert_same(run.features("b30", i), F.adaptive_avg_pool2d(outputs[names[30]], 16))
        moved = decoded(network, noisy(run, t, run.noise((3, 96, 96))), t)
        assert_other(run.features("b24", i), moved[names[24]])


def test_dreamteacher(tmp_path: Path) -> None:
    run = rehearse("dreamteacher", tmp_path)
    outputs = decoded(GuidedDiffusion.load(run.model), noisy(run, 50, run.noise((3, 64, 64))), 50)
    for level, block in enumerate((3, 6, 9, 12), 1):
        assert_same(run.features(f"level{level}"), outputs[f"output_blocks.{block}"])


def masked(run: Rehearsed, share: float) -> Tensor:
    """Of each photograph's 8 x 8 patches of 8 px, those of the largest numbers become 0."""
    pixels = run.pixels(Image.Resampling.BILINEAR)
    for image, key in zip(pixels, run.keys, strict=True):
        numbers = draw_uniform((1, 8, 8), "noise", 0, "key", key, 0, "all").reshape(-1)
        n_kept = int(64 * (1 - share))
        for patch in sorted(range(64), key=lambda p: numbers[p])[n_kept:]:
            top, left = 8 * (patch // 8), 8 * (patch % 8)
            image[:, top : top + 8, left : left + 8] = 0
    return pixels


def check_mdm(name: str, tmp_path: Path, blocks: range) -> None:
    run = rehearse(name, tmp_path)
    network = GuidedDiffusion.load(run.model)
    outputs = decoded(network, masked(run, 0.05), 50)
    assert [array.name for array in run.store.arrays] == [f"output_blocks.{b}" for b in blocks]
    for block in blocks:
        assert_same(run.features(f"output_blocks.{block}"), outputs[f"output_blocks.{block}"])
    unmasked = decoded(network, masked(run, 0.0), 50)
    assert_other(run.features("output_blocks.8"), unmasked["output_blocks.8"])
    untold = decoded(network, masked(run, 0.05), 0)
    assert_other(run.features("output_blocks.8"), untold["output_blocks.8"])


def test_mdm_glas(tmp_path: Path) -> None:
    check_mdm("mdm_glas", tmp_path, range(8, 13))


def test_mdm_ffhq(tmp_path: Path) -> None:
    check_mdm("mdm_ffhq", tmp_path, range(5, 13))


@torch.no_grad()
def test_repfusion(tmp_path: Path) -> None:
    """Exact: the same library computes both."""
    run = rehearse("repfusion", tmp_path)
    unet = UNet2DModel.from_pretrained(run.model / "unet").eval()
    kept = hooked(unet, "mid_block.resnets.1.conv2", "mid_block.resnets.1")
    assert [time.requested for time in run.store.times] == list(range(0, 1000, 25))
    for i, t in enumerate(range(0, 1000, 25)):
        unet(run.pixels(), torch.full((4,), t))
        assert torch.equal(run.features("mid", i), kept["mid_block.resnets.1.conv2"].mean((2, 3)))
        assert_other(run.features("mid", i), kept["mid_block.resnets.1"].mean((2, 3)))


ADM = {
    "ddpm_seg": {
        "output_blocks.5": (1024, 32, 32),
        "output_blocks.6": (512, 32, 32),
        "output_blocks.7": (512, 32, 32),
        "output_blocks.8": (512, 64, 64),
        "output_blocks.12": (256, 128, 128),
    },
    "dift_adm_spair": {"output_blocks.4": (1024, 32, 32)},
    "dift_adm_hpatches": {"output_blocks.11": (512, 384, 384)},
    "dift_adm_davis": {"output_blocks.7": (512, 60, 104)},
    "gd": {"b24": (1024, 16, 16), "b24_pool2": (1024, 2, 2)},
    "difformer": {"b19": (1024, 8, 8), "b24": (1024, 16, 16), "b30": (512, 16, 16)},
    "dreamteacher": {
        "level1": (1024, 16, 16),
        "level2": (512, 32, 32),
        "level3": (512, 64, 64),
        "level4": (256, 128, 128),
    },
    "mdm_glas": {
        "output_blocks.8": (384, 64, 64),
        "output_blocks.9": (384, 64, 64),
        "output_blocks.10": (384, 64, 64),
        "output_blocks.11": (384, 128, 128),
        "output_blocks.12": (192, 128, 128),
    },
    "repfusion": {"mid": (256,)},
}
"""Shapes of recipes.md and of the papers: 2816 channels of DDPM-Seg, 1728 of MDM, 4096 of GD."""


def planned(name: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a recipe's arrays with its real model, without weights."""
    recipe = Pipeline.load(find_recipe(name))
    assert recipe.backbone is not None
    backbone = load_backbone(find_model(recipe.backbone, structure_only=True), "meta")
    taps = backbone.resolve(recipe.taps)
    arrays = backbone.arrays(taps, recipe.images, recipe.condition, CLEAN, recipe.features.dtype)
    return {array.name: array.shape for array in arrays}


@pytest.mark.parametrize("name", ADM)
def test_shapes_of_the_real_model(name: str) -> None:
    assert planned(name) == ADM[name]


def test_channels_of_all_blocks_are_the_published_ones() -> None:
    for name, n_channels in (("ddpm_seg", 2816), ("mdm_glas", 1728), ("mdm_ffhq", 3264)):
        assert sum(shape[0] for shape in planned(name).values()) == n_channels


def test_a_folder_that_is_yet_to_be_made_is_planned_from_the_bundle_of_its_name() -> None:
    recipe = Pipeline.load(find_recipe("gd"))
    assert recipe.backbone is not None
    with pytest.raises(WeightsError, match="no folder"):
        find_model(recipe.backbone)
    nameless = recipe.backbone.model_copy(update={"model": "./models/no-bundle"})
    with pytest.raises(WeightsError, match="no folder"):
        find_model(nameless, structure_only=True)
