"""guided-diffusion's checkpoints in UNet2DModel, against an independent network.

That one is `tests/guided_diffusion.py`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from drl_data.backbones import Conditioning, find_model, load_backbone
from drl_data.diffusion_spec import ConditionSpec, ScheduleSpec
from drl_data.errors import SpecError, TapError, WeightsError
from drl_data.spec import BackboneSpec, ImageSpec, TapSpec
from drl_data.tiny_models import TINY_ADM, save_tiny_adm
from tests.guided_diffusion import GuidedDiffusion

pytestmark = pytest.mark.usefixtures("one_thread")

VARIANTS: dict[str, dict[str, object]] = {
    "as ADM-256": {},
    "convolutions up and down": {"resblock_updown": False},
    "new attention order": {"use_new_attention_order": True},
    "class-conditional": {"class_cond": True, "learn_sigma": False},
    "without scale and shift": {"use_scale_shift_norm": False},
}
TAPS = [
    *(f"input_blocks.{i}" for i in range(4)),
    "middle_block",
    *(f"output_blocks.{i}" for i in range(4)),
    "middle_block.0",
    "middle_block.2.out_layers.3",
    "output_blocks.1.0",
]


def inputs() -> tuple[Tensor, Tensor]:
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([150, 150])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_block_equals_an_independent_network(variant: str, tmp_path: Path) -> None:
    """To 2e-5: the same sums in another order, by fused attention and linear for 1x1 kernels."""
    flags = {**TINY_ADM, **VARIANTS[variant]}
    root = save_tiny_adm(tmp_path / "adm", **VARIANTS[variant])
    original = load_file(root / "model.safetensors")
    assert original["middle_block.1.qkv.weight"].shape == (192, 64, 1)
    reference = GuidedDiffusion(original, flags)
    x, t = inputs()
    label = torch.tensor([7, 7]) if flags["class_cond"] else None
    with torch.no_grad():
        want_out = reference(x, t, label)

    backbone = load_backbone(find_model(BackboneSpec(model=str(root))), "cpu")
    told = ConditionSpec(class_label="null" if label is None else 7)
    (time,) = backbone.schedule.resolve(ScheduleSpec(timesteps=(150,)))
    taps = backbone.resolve([TapSpec(path=path) for path in [*TAPS, "output_blocks.3@in"]])
    with torch.no_grad():
        got = backbone.tap(x, time, backbone.conditioning(told), taps, lambda _, x, dims: x.clone())
        (out,) = backbone.forward(x, t, backbone.conditioning(told).expand(2))
    assert out.shape[1] == (6 if flags["learn_sigma"] else 3)
    torch.testing.assert_close(out, want_out, atol=2e-5, rtol=1e-4)
    for path in TAPS:
        torch.testing.assert_close(got[path], reference.outputs[path], atol=2e-5, rtol=1e-4)
    want_in = reference.inputs["output_blocks.3"]
    torch.testing.assert_close(got["output_blocks.3-in"], want_in, atol=2e-5, rtol=1e-4)


def test_the_wrong_attention_order_is_another_function(tmp_path: Path) -> None:
    root = save_tiny_adm(tmp_path / "adm")
    flags = {**TINY_ADM, "use_new_attention_order": True}
    x, t = inputs()
    right = GuidedDiffusion(load_file(root / "model.safetensors"), dict(TINY_ADM))
    wrong = GuidedDiffusion(load_file(root / "model.safetensors"), flags)
    with torch.no_grad():
        assert (right(x, t) - wrong(x, t)).abs().max() > 1e-3


def test_aliases_are_recorded_as_the_modules_that_they_are() -> None:
    backbone = load_backbone(find_model(BackboneSpec(model="bundled:adm-256-uncond")), "meta")

    def addresses(*paths: str) -> list[tuple[str, str]]:
        return [(t.name, t.address) for t in backbone.resolve([TapSpec(path=p) for p in paths])]

    assert addresses("output_blocks.4", "up_blocks.1.attentions.1") == [
        ("output_blocks.4", "up_blocks.1.attentions.1@out"),
        ("up_blocks.1.attentions.1", "up_blocks.1.attentions.1@out"),
    ]
    assert addresses("output_blocks.5", "output_blocks.6@in", "middle_block.2.out_layers.3") == [
        ("output_blocks.5", "up_blocks.1.upsamplers.0@out"),
        ("output_blocks.6-in", "up_blocks.2.resnets.0@in"),
        ("middle_block.2.out_layers.3", "mid_block.resnets.1.conv2@out"),
    ]
    assert addresses("middle_block@in", "input_blocks.3") == [
        ("middle_block-in", "mid_block.resnets.0@in"),
        ("input_blocks.3", "down_blocks.0.downsamplers.0@out"),
    ]
    assert addresses("output_blocks.4@pre_residual", "output_blocks.5@pre_concat") == [
        ("output_blocks.4-pre_residual", "up_blocks.1.resnets.1.conv2@out"),
        ("output_blocks.5-pre_concat", "up_blocks.1.resnets.2@in.channels[0:1024]"),
    ]
    names = [name for name, _ in addresses("output_blocks.*")]
    assert names == [f"output_blocks.{i}" for i in range(18)]
    (tap,) = backbone.resolve([TapSpec(path="output_blocks.4", name="gd", reduce=("mean",))])
    assert (tap.name, tap.reduce) == ("gd", ("mean",))
    with pytest.raises(TapError, match=r"'output_blocks\.18' matches no .*output_blocks\.1"):
        backbone.resolve([TapSpec(path="output_blocks.18")])
    with pytest.raises(TapError, match="'x' but matches 18"):
        backbone.resolve([TapSpec(path="output_blocks.*", name="x")])


def test_the_schedule_is_that_of_the_flags(tmp_path: Path) -> None:
    def sigma(t: int, **flags: object) -> float:
        root = save_tiny_adm(tmp_path / f"adm-{len(list(tmp_path.iterdir()))}", **flags)
        backbone = load_backbone(find_model(BackboneSpec(model=str(root))), "meta")
        (time,) = backbone.schedule.resolve(ScheduleSpec(timesteps=(t,)))
        return time.sigma / time.alpha

    assert sigma(50) == pytest.approx(0.176, abs=6e-4)
    assert sigma(150) == pytest.approx(0.522, abs=6e-4)
    # cosine (Nichol and Dhariwal 2021, eq. 17): abar(t) = f(t) / f(0)
    f = [math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2 for u in (0.0, 0.501)]
    abar = f[1] / f[0]
    assert sigma(500, noise_schedule="cosine") == pytest.approx(
        math.sqrt((1 - abar) / abar), rel=1e-3
    )


def test_random_weights_and_half_precision(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY_ADM))  # flags alone are enough

    def weight(seed: int) -> Tensor:
        spec = BackboneSpec(model=str(tmp_path), init="random", init_seed=seed, dtype="bfloat16")
        return load_backbone(find_model(spec), "cpu").network.get_parameter("conv_in.weight")

    assert weight(1).dtype == torch.bfloat16
    assert torch.equal(weight(1), weight(1))
    assert not torch.equal(weight(1), weight(2))


def test_broken_checkpoints_say_what_is_wrong(tmp_path: Path) -> None:
    def load(path: Path, device: str = "cpu") -> nn.Module:
        return load_backbone(find_model(BackboneSpec(model=str(path))), device).network

    with pytest.raises(WeightsError, match=r"is a pickle.*torch\.load.*weights_only=True"):
        load(tmp_path / "256x256_diffusion_uncond.pt")
    root = save_tiny_adm(tmp_path / "adm")
    weights = load_file(root / "model.safetensors")
    save_file({**weights, "output_blocks.9.0.in_layers.0.bias": torch.zeros(4)},
              root / "model.safetensors")  # fmt: skip
    with pytest.raises(WeightsError, match=r"1 tensors have no place .*output_blocks\.9"):
        load(root)
    save_file({k: v for k, v in weights.items() if k != "out.2.bias"}, root / "model.safetensors")
    with pytest.raises(WeightsError, match=r"Missing key.*conv_out\.bias"):
        load(root)
    (root / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="does not load"):
        load(root)
    config = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps({**config, "num_head_channels": -1}))
    with pytest.raises(WeightsError, match="heads are wider"):
        load(root, "meta")


def test_a_class_conditional_network_needs_a_class(tmp_path: Path) -> None:
    root = save_tiny_adm(tmp_path / "adm", class_cond=True)
    backbone = load_backbone(find_model(BackboneSpec(model=str(root))), "meta")
    with pytest.raises(SpecError, match="without a null class"):
        backbone.conditioning(ConditionSpec())
    assert backbone.input_shape(ImageSpec(size=16)) == (3, 16, 16)
    assert isinstance(backbone.conditioning(ConditionSpec(class_label=3)), Conditioning)
