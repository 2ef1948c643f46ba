"""Recipes on pixel-space UNets (ADM, DDPM, EDM), against networks written without drl_data.

The reference of ADM is `GuidedDiffusion`, which works on the checkpoint's own names: it says where
`output_blocks.4` is. It sums in another order than diffusers (attention, 1x1 kernels), so features
agree to 1e-4 of their size; the nearest wrong tap, time or noise is off by more than 1e-2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from drl_data.backbones import find_model, load_backbone
from drl_data.backbones.backbone import CLEAN
from drl_data.errors import WeightsError
from drl_data.examples.ddae import UNet
from drl_data.noise import draw_normal, draw_uniform
from drl_data.pipeline import Pipeline
from drl_data.recipes import find_recipe
from drl_data.spec import BackboneSpec
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


def own_network(run: Rehearsed) -> UNet:
    """The recipe's random weights."""
    assert run.pipeline.backbone is not None
    network = load_backbone(find_model(run.pipeline.backbone), "cpu").network
    assert isinstance(network, UNet)
    return network


RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2.1": "conv2",
    "shortcut": "conv_shortcut",
    "time_emb.1": "time_emb_proj",
}


def in_diffusers(network: UNet, *, width: int = 32, residual: bool = False) -> UNet2DModel:
    """DDAE's four-level network as a UNet2DModel: all blocks, but not the last norm, whose groups
    are others and which no feature has seen."""
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    down, up = plain if residual else ("DownBlock2D", "UpBlock2D")
    how = "resnet" if residual else "conv"
    theirs = UNet2DModel(
        sample_size=16,
        block_out_channels=(width, 2 * width, 2 * width, 2 * width),
        down_block_types=(down, "AttnDownBlock2D", down, down),
        up_block_types=(up, up, "AttnUpBlock2D", up),
        layers_per_block=2,
        downsample_type=how,
        upsample_type=how,
        downsample_padding=1,
        norm_eps=1e-5,
        attention_head_dim=None,
        flip_sin_to_cos=False,
        freq_shift=1,
    ).eval()
    names = {"image_proj": "conv_in", "norm": "conv_norm_out", "final": "conv_out"}
    names |= {
        "time_emb.lin1": "time_embedding.linear_1",
        "time_emb.lin2": "time_embedding.linear_2",
    }
    blocks = {f"middle.res{i + 1}": f"mid_block.resnets.{i}" for i in range(2)}
    attentions = {"middle.attn": "mid_block.attentions.0"}
    for ours, root, n in (("down", "down_blocks", 2), ("up", "up_blocks", 3)):
        for level in range(4):
            for j in range(n):
                at = f"{ours}.{level * (n + 1) + j}"
                blocks[f"{at}.res"] = f"{root}.{level}.resnets.{j}"
                attentions[f"{at}.attn"] = f"{root}.{level}.attentions.{j}"
            at, there = f"{ours}.{level * (n + 1) + n}", f"{root}.{level}.{ours}samplers.0"
            blocks[f"{at}.op"] = there
            names[f"{at}.conv"] = f"{there}.conv"
    names |= {f"{a}.{part}": f"{b}.{RESNET[part]}" for a, b in blocks.items() for part in RESNET}
    for ours, there in attentions.items():
        names |= {f"{ours}.norm": f"{there}.group_norm", f"{ours}.output": f"{there}.to_out.0"}
    state = {}
    for name, tensor in network.state_dict().items():
        module, _, kind = name.rpartition(".")
        if module.endswith(".projection"):
            for letter, rows in zip("qkv", tensor.chunk(3), strict=True):
                state[f"{attentions[module.removesuffix('.projection')]}.to_{letter}.{kind}"] = rows
        else:
            state[f"{names[module]}.{kind}"] = tensor
    theirs.load_state_dict(state)
    return theirs


OUT = {
    "out_3": "up_blocks.0.resnets.2",
    "out_6": "up_blocks.1.resnets.2",
    "out_7": "up_blocks.2.attentions.0",
}
"""Where the authors' blocks are in diffusers; out_6 is before its level's upsampling."""


@torch.no_grad()
@pytest.mark.parametrize("residual", [False, True])
def test_ddae_s_network_is_diffusers_unet(residual: bool) -> None:
    torch.manual_seed(0)
    attends = (False, True, False, False)
    network = UNet(32, (1, 2, 2, 2), attends, 2, residual_resampling=residual).eval()
    theirs = in_diffusers(network, residual=residual)
    ours = hooked(network, "up.2", "up.6", "up.8")
    kept = hooked(theirs, *OUT.values())
    x, t = torch.randn(2, 3, 16, 16), torch.full((2,), 0.011)
    network(x, t)
    theirs(x, t)
    for mine, path in zip(("up.2", "up.6", "up.8"), OUT.values(), strict=True):
        torch.testing.assert_close(ours[mine], kept[path], atol=1e-5, rtol=1e-4)


def seen(run: Rehearsed, view: str = "", timestep: object = "all") -> tuple[Tensor, Tensor]:
    """The image or its mirror image, and the noise of that view."""
    keys = [f"{key}\x1f{view}" if view else key for key in run.keys]
    draws = [draw_normal((3, 16, 16), "noise", 0, "key", key, 0, timestep) for key in keys]
    pixels = run.pixels().flip(3) if view else run.pixels()
    return pixels, torch.stack([torch.from_numpy(draw) for draw in draws])


def noisy_ddpm(run: Rehearsed, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """t = 11 of 1..1000, and what the network is told."""
    return noisy(run, 10, noise, pixels), torch.full((4,), 11 / 1000)


def noisy_edm(
    run: Rehearsed, pixels: Tensor, noise: Tensor, level: int = 4
) -> tuple[Tensor, Tensor]:
    """A level of Karras' ladder of 18 from 0.002 to 80, from clean, and c_noise."""
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    sigma = (high + (18 - level) / 17 * (low - high)) ** 7
    x = (pixels + sigma * noise) / (sigma**2 + 0.25) ** 0.5
    return x, torch.full((4,), math.log(sigma) / 4)


Make = Callable[[Rehearsed, Tensor, Tensor], tuple[Tensor, Tensor]]


@torch.no_grad()
def check_ddae(name: str, tmp_path: Path, out: str, make: Make) -> None:
    run = rehearse(name, tmp_path)
    network = in_diffusers(own_network(run))
    kept = hooked(network, *OUT.values())
    for view, name in enumerate(("", "hflip")):
        network(*make(run, *seen(run, name)))
        got = torch.tensor(run.store.read_unit(out, 0, run.store.units[0], view))
        assert_same(got, kept[OUT[out]].mean((2, 3)))
        assert_other(got, kept[OUT["out_7" if out == "out_6" else "out_6"]].mean((2, 3)))


def test_ddae_cifar10_ddpm(tmp_path: Path) -> None:
    check_ddae("ddae_cifar10_ddpm", tmp_path, "out_6", noisy_ddpm)


def test_ddae_cifar10_edm(tmp_path: Path) -> None:
    check_ddae("ddae_cifar10_edm", tmp_path, "out_7", noisy_edm)


@torch.no_grad()
def check_ddaepp(name: str, tmp_path: Path, k: int, make: Make) -> None:
    """DDPM++ has no counterpart in diffusers (its first convolution is narrower than its first
    level); the reference runs the network itself, whose modules are tested above."""
    run = rehearse(name, tmp_path)
    network = own_network(run)
    # up.0 .. up.4 have 4 x 4, up.5 is the upsampling: out_6 and out_7 are up.6 and up.7
    kept = hooked(network, f"up.{k}")
    for view, name in enumerate(("", "hflip")):
        network(*make(run, *seen(run, name)))
        got = torch.tensor(run.store.read_unit(f"out_{k}", 0, run.store.units[0], view))
        assert kept[f"up.{k}"].shape == (4, 64, 8, 8)
        assert_same(got, kept[f"up.{k}"].mean((2, 3)))


def test_ddae_cifar10_ddpmpp(tmp_path: Path) -> None:
    check_ddaepp("ddae_cifar10_ddpmpp", tmp_path, 6, noisy_ddpm)


def test_ddae_cifar10_edm_ddpmpp(tmp_path: Path) -> None:
    check_ddaepp("ddae_cifar10_edm_ddpmpp", tmp_path, 7, noisy_edm)


@torch.no_grad()
def test_noise_level_ensemble(tmp_path: Path) -> None:
    run = rehearse("noise_level_ensemble", tmp_path)
    network = in_diffusers(own_network(run))
    kept = hooked(network, OUT["out_7"])
    means = []
    for i in (3, 4, 5, 6):
        network(*noisy_edm(run, *seen(run, timestep=i), i))
        means.append(kept[OUT["out_7"]].mean((2, 3)))
    assert_same(run.features("out_7"), torch.stack(means).mean(0))
    assert_other(run.features("out_7"), means[1])


def test_ddae_loads_the_authors_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(3)
    network = UNet(32, (1, 2, 2, 2), (False, True, False, False), 2, residual_resampling=False)
    path = tmp_path / "ddae.safetensors"
    names = network.state_dict()
    save_file(
        {f"ema_model.nn_model.{k}": v for k, v in names.items()}
        | {f"online_model.nn_model.{k}": torch.zeros_like(v) for k, v in names.items()},
        path,
    )
    model = "python:drl_data.examples.ddae:tiny_ddpm"
    loaded = load_backbone(find_model(BackboneSpec(model=model, weights=str(path))), "cpu").network
    assert loaded.state_dict().keys() == names.keys()
    assert all(torch.equal(v, names[k]) for k, v in loaded.state_dict().items())
    for factory, n in (("ddpm", 35_746_307), ("edm_ddpmpp", 56_524_291)):
        spec = BackboneSpec(model=f"python:drl_data.examples.ddae:cifar10_{factory}", init="random")
        meta = load_backbone(find_model(spec), "meta").network
        assert sum(p.numel() for p in meta.parameters()) == n


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
    relative = recipe.backbone.model_copy(update={"model": "./models/adm-256-uncond"})
    moved = recipe.model_copy(update={"backbone": relative}).relative_to(Path("pipelines"))
    assert moved.backbone is not None
    assert moved.backbone.model == "./pipelines/models/adm-256-uncond"  # and so no hub id
    assert find_model(moved.backbone, structure_only=True).digest()
    nameless = recipe.backbone.model_copy(update={"model": "./models/no-bundle"})
    with pytest.raises(WeightsError, match="no folder"):
        find_model(nameless, structure_only=True)
