"""Other projects' names, against the channels and resolutions that their papers and code state."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from drl_data.capture import capture
from drl_data.errors import TapError
from drl_data.spec import TapSpec
from drl_data.tap_names import CLEANDIFT, LDM, LDM_XL, translated
from drl_data.taps import resolve


@pytest.fixture(scope="module")
def sd15() -> nn.Module:
    """Stable Diffusion 1.5's denoiser, structure only."""
    with torch.device("meta"):
        return UNet2DConditionModel(cross_attention_dim=768)


def shapes(model: nn.Module, *paths: str) -> dict[str, tuple[int, ...]]:
    """Shape of one sample of each tap at 512 pixels."""
    taps = resolve(model, [TapSpec(path=path) for path in paths])
    x = torch.empty(1, 4, 64, 64, device="meta")
    text = torch.empty(1, 77, 768, device="meta")
    time = torch.zeros(1, device="meta")
    got = capture(
        model,
        taps,
        lambda: model(x, time, encoder_hidden_states=text),
        lambda _, tensor: tensor,
    )
    return {name: tuple(tensor.shape[1:]) for name, tensor in got.items()}


def test_cleandift(sd15: nn.Module) -> None:
    got = shapes(sd15, *(f"cleandift:{name}" for name in CLEANDIFT))
    assert got["mid"] == (1280, 8, 8)
    assert got["us3"] == (1280, 16, 16)
    assert got["us6"] == (1280, 32, 32)  # recipes.md 3A: the default, DIFT's up_blocks.1
    assert got["us9"] == (640, 64, 64)
    assert got["us10"] == (320, 64, 64)
    assert got["us6"] == shapes(sd15, "up_blocks.1")["up_blocks.1"]


def test_gdf_practical(sd15: nn.Module) -> None:
    """The 'practical' set of SD 1.5 has 3520 channels (recipes.md 3A)."""
    names = (
        "up-level1-repeat1-vit-block0-cross-q",
        "up-level1-repeat2-res-out",
        "up-level2-repeat1-vit-block0-cross-q",
        "up-level3-repeat0-vit-block0-self-k",
    )
    got = shapes(sd15, *(f"gdf:{name}" for name in names))
    assert tuple(got) != ()
    tokens = {name: shape for name, shape in got.items() if len(shape) == 2}
    assert tokens == {
        names[0]: (256, 1280),
        names[2]: (1024, 640),
        names[3]: (4096, 320),
    }
    assert got[names[1]] == (1280, 16, 16)
    assert 1280 + sum(shape[1] for shape in tokens.values()) == 3520


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("gdf:up-level2-repeat0-res-increment", "up_blocks.2.resnets.0@pre_residual"),
        ("gdf:mid-repeat1-res-out", "mid_block.resnets.1"),
        ("gdf:down-level0-repeat1-vit-out", "down_blocks.0.attentions.1"),
        ("gdf:up-level0-repeat0-vit-block7-out", "up_blocks.0.attentions.0.transformer_blocks.7"),
        (
            "gdf:up-level1-repeat0-vit-block0-self-map",
            "up_blocks.1.attentions.0.transformer_blocks.0.attn1@attn.probs",
        ),
        (
            "gdf:up-level1-repeat0-vit-block0-ffn-inner",
            "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.0",
        ),
        ("gdf:up-level0-upsampler-out", "up_blocks.0.upsamplers.0"),
        ("gdf:unet-in", "conv_in@in"),
        ("gdf:mid-vit-out", "mid_block.attentions.0"),
        (
            "gdf:mid-vit-block0-self-q",
            "mid_block.attentions.0.transformer_blocks.0.attn1@attn.q",
        ),
        ("gdf:vit-block14-cross-q", "transformer_blocks.14.attn2@attn.q"),
        ("gdf:vit-block3-out", "transformer_blocks.3"),
        ("gdf:vit-block3-ffn-inner", "transformer_blocks.3.ff.net.0"),
        # recipes.md 3A: sd-dino and ODISE read the inputs of output_blocks 2, 5, 8, 11
        ("ldm:output_blocks.5@pre_concat", "up_blocks.1.resnets.2@pre_concat"),
        ("ldm:output_blocks.2@in", "up_blocks.0.resnets.2@in"),
        ("ldm:output_blocks.11@in", "up_blocks.3.resnets.2@in"),
        # VPD: output_blocks 1, 4, 7
        ("ldm:output_blocks.1", "up_blocks.0.resnets.1"),
        ("ldm:output_blocks.4", "up_blocks.1.attentions.1"),
        ("ldm:output_blocks.7", "up_blocks.2.attentions.1"),
        # PnP: output_blocks 4's out_layers
        ("ldm:output_blocks.8", "up_blocks.2.upsamplers.0"),
        ("ldm:input_blocks.3", "down_blocks.0.downsamplers.0"),
        ("ldm:input_blocks.11", "down_blocks.3.resnets.1"),
        ("ldm:middle_block.1", "mid_block.attentions.0"),
        ("ldmxl:output_blocks.2", "up_blocks.0.upsamplers.0"),
        ("ldmxl:output_blocks.8", "up_blocks.2.resnets.2"),
        ("up_blocks.1", "up_blocks.1"),
    ],
)
def test_translations(name: str, path: str) -> None:
    assert translated(TapSpec(path=name)).path == path


def test_every_ldm_block_is_there(sd15: nn.Module) -> None:
    """12 + 1 + 12 blocks, in order of execution, the last one being the last module."""
    assert len(LDM) == 12 + 4 + 12
    assert len(LDM_XL) == 9 + 4 + 9
    modules = dict(sd15.named_modules())
    assert all(around.out in modules and around.into in modules for around in LDM.values())
    got = shapes(sd15, *(f"ldm:output_blocks.{i}" for i in range(12)))
    sides = [shape[1] for shape in got.values()]
    assert sorted(sides) == sides
    assert got["output_blocks.11"] == (320, 64, 64)


def test_the_array_keeps_the_name_unless_it_has_another() -> None:
    assert translated(TapSpec(path="cleandift:us6")).name == "us6"
    assert translated(TapSpec(path="cleandift:us6", name="f", reduce=("mean",))) == TapSpec(
        path="up_blocks.1.upsamplers.0", name="f", reduce=("mean",)
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cleandift:us11", "want one of mid, us1"),
        ("gdf:up-level1-repeat1-vit-block0-cross-z", "want a name like up-level1"),
        ("ldm:output_blocks.12", r"no such block; nearest: output_blocks\.\d+"),
    ],
)
def test_names_that_do_not_exist(name: str, message: str) -> None:
    with pytest.raises(TapError, match=message):
        translated(TapSpec(path=name))
