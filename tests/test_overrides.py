"""Other weights by spec: a whole state dict, and LoRA in the names that its makers write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from drl_data.backbones import ModelFolder, load_backbone
from drl_data.errors import SpecError, WeightsError
from drl_data.pipeline import Pipeline
from drl_data.spec import BackboneSpec, LoraSpec
from drl_data.tiny_models import save_tiny_adm, save_tiny_encoder, save_tiny_stable_diffusion

pytestmark = pytest.mark.usefixtures("one_thread")

LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONVOLUTION = "mid_block.resnets.0.conv1"
PROJECTION = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_stable_diffusion(tmp_path_factory.mktemp("sd"))


def weights(sd: Path, **changes: object) -> dict[str, Tensor]:
    folder = ModelFolder.find(BackboneSpec(model=str(sd), **changes))
    return load_backbone(folder, "cpu").network.state_dict()


def factors(shape: tuple[int, ...], rank: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tail = (1,) * (len(shape) - 2)
    down = torch.randn(rank, *shape[1:], generator=generator)
    return down, torch.randn(shape[0], rank, *tail, generator=generator)


def test_weights_replace_every_tensor_of_the_denoiser(sd: Path, tmp_path: Path) -> None:
    other = save_tiny_stable_diffusion(tmp_path / "other", seed=1)
    file = other / "unet" / "diffusion_pytorch_model.safetensors"
    got = weights(sd, weights=str(file))
    want = UNet2DConditionModel.from_pretrained(other / "unet").state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert not torch.equal(got["conv_in.weight"], weights(sd)["conv_in.weight"])


def test_weights_that_do_not_fit_are_listed(sd: Path, tmp_path: Path) -> None:
    state = load_file(sd / "unet" / "diffusion_pytorch_model.safetensors")
    state["strange"] = state.pop("conv_in.weight")
    state["conv_out.bias"] = torch.zeros(9)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(
        WeightsError,
        match=r"does not fit UNet2DConditionModel: missing: conv_in\.weight; unexpected: strange; "
        r"of another shape: conv_out\.bias \[9\], want \[4\]",
    ):
        weights(sd, weights=str(tmp_path / "w.safetensors"))
    (tmp_path / "w.safetensors").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="want a safetensors file"):
        weights(sd, weights=str(tmp_path / "w.safetensors"))


KEYS = {
    "peft": ("unet.{m}.lora_A.weight", "unet.{m}.lora_B.weight"),
    "peft with an adapter": (
        "base_model.model.{m}.lora_A.default.weight",
        "base_model.model.{m}.lora_B.default.weight",
    ),
    "diffusers": ("unet.{m}.lora.down.weight", "unet.{m}.lora.up.weight"),
    "kohya": ("lora_unet_{u}.lora_down.weight", "lora_unet_{u}.lora_up.weight"),
}


@pytest.mark.parametrize("names", KEYS)
@pytest.mark.parametrize("module", [LINEAR, CONVOLUTION, PROJECTION])
def test_lora_is_added_to_the_weight(sd: Path, tmp_path: Path, names: str, module: str) -> None:
    before = weights(sd)
    down, up = factors(tuple(before[f"{module}.weight"].shape))
    keys = [key.format(m=module, u=module.replace(".", "_")) for key in KEYS[names]]
    path = str(tmp_path / "lora.safetensors")
    save_file(dict(zip(keys, (down, up), strict=True)), path)
    after = weights(sd, lora=[{"path": path, "scale": 0.5}])
    want = torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1))
    moved = (after[f"{module}.weight"] - before[f"{module}.weight"]).flatten(1)
    torch.testing.assert_close(moved, 0.5 * want, rtol=1e-5, atol=1e-6)  # W + d - W rounds
    others = before.keys() - {f"{module}.weight"}
    assert all(torch.equal(after[name], before[name]) for name in others)


def test_lora_of_diffusers_first_format(sd: Path, tmp_path: Path) -> None:
    """`attn1.processor.to_q_lora.down.weight`, as the attention processors of 2023 wrote it."""
    down, up = factors(tuple(weights(sd)[f"{LINEAR}.weight"].shape))
    stem = LINEAR.replace("to_q", "processor.to_q_lora")
    path = str(tmp_path / "lora.safetensors")
    save_file({f"unet.{stem}.down.weight": down, f"unet.{stem}.up.weight": up}, path)
    want = weights(sd)[f"{LINEAR}.weight"] + up @ down
    assert torch.equal(weights(sd, lora=path)[f"{LINEAR}.weight"], want)


def test_alpha_over_rank_scales_and_several_loras_add(sd: Path, tmp_path: Path) -> None:
    before = weights(sd)[f"{LINEAR}.weight"]
    down, up = factors(tuple(before.shape), rank=4)
    flat = f"lora_unet_{LINEAR.replace('.', '_')}"
    path = str(tmp_path / "lora.safetensors")
    alpha = torch.tensor(1.0)
    save_file(
        {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": alpha},
        path,
    )
    assert torch.equal(weights(sd, lora=path)[f"{LINEAR}.weight"], before + 0.25 * (up @ down))
    twice = weights(sd, lora=[path, {"path": path, "scale": -1}])[f"{LINEAR}.weight"]
    torch.testing.assert_close(twice, before, rtol=1e-5, atol=1e-6)  # (W + d) - d rounds


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["lora_te_text_model_q.lora_down.weight"], "1 tensors belong to no linear or convolution"),
        (
            ["unet.nowhere.lora_A.weight"],
            "belong to no .*: unet.nowhere.lora_A.weight; want MODULE",
        ),
        ([f"unet.{LINEAR}.dora_scale"], "dora_scale; want"),
        ([f"unet.{LINEAR}.lora_A.weight"], "to_q has only down"),
        ([], "0 tensors belong"),
    ],
)
def test_lora_that_would_be_half_applied_is_refused(
    sd: Path, tmp_path: Path, keys: list[str], message: str
) -> None:
    path = str(tmp_path / "lora.safetensors")
    save_file({key: torch.zeros(2, 32) for key in keys}, path)
    with pytest.raises(WeightsError, match=message):
        weights(sd, lora=path)


# --- families whose files are not diffusers' -----------------------------------------------------

OTHERS: dict[str, tuple[Callable[..., Path], str]] = {
    "adm": (save_tiny_adm, "mid_block.attentions.0.to_q"),
    "dinov2": (save_tiny_encoder, "encoder.layer.0.attention.q_proj"),
    "clip_vision_model": (save_tiny_encoder, "encoder.layers.0.self_attn.q_proj"),
    "vit": (save_tiny_encoder, "layers.0.attention.q_proj"),
    "resnet": (save_tiny_encoder, "encoder.stages.0.layers.0.layer.0.convolution"),
}
"""Of each: who makes it, and a linear or a convolution of its network."""


def make(family: str, folder: Path, seed: int = 0) -> Path:
    maker, _ = OTHERS[family]
    return maker(folder, seed=seed) if family == "adm" else maker(folder, family, seed=seed)


@torch.no_grad()
def output(model: Path, **changes: object) -> Tensor:
    backbone = load_backbone(ModelFolder.find(BackboneSpec(model=str(model), **changes)), "cpu")
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    out = backbone.forward(x, torch.tensor([5]), {})
    found = out[0]  # type: ignore[index]  # a tuple or a ModelOutput
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("family", OTHERS)
def test_weights_of_other_families_are_replaced_by_the_networks_own_names(
    tmp_path: Path, family: str
) -> None:
    first, second = (make(family, tmp_path / str(seed), seed) for seed in (0, 1))
    file = str(tmp_path / "w.safetensors")
    save_file({k: v.clone() for k, v in weights(second).items()}, file)
    got = weights(first, weights=file)
    assert all(torch.equal(got[name], tensor) for name, tensor in weights(second).items())
    assert torch.equal(output(first, weights=file), output(second))
    assert not torch.equal(output(first), output(second))


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("adm", r"does not fit UNet2DModel: missing: .*unexpected: input_blocks\.0\.0"),
        ("dinov2", r"does not fit Dinov2Model: missing: .*unexpected: encoder\.layer\.0\."),
    ],
)
def test_a_checkpoint_in_other_names_than_the_networks_is_no_override(
    tmp_path: Path, family: str, message: str
) -> None:
    """guided-diffusion's and transformers' files are renamed when they are loaded as a model."""
    first, second = (make(family, tmp_path / str(seed), seed) for seed in (0, 1))
    with pytest.raises(WeightsError, match=f"{message}.*or the whole other checkpoint as backbone"):
        weights(first, weights=str(second / "model.safetensors"))


@pytest.mark.parametrize("family", OTHERS)
def test_lora_is_added_to_other_families(tmp_path: Path, family: str) -> None:
    model, module = make(family, tmp_path / "m"), OTHERS[family][1]
    before = weights(model)
    down, up = factors(tuple(before[f"{module}.weight"].shape))
    keys = [f"base_model.model.{module}.lora_{letter}.weight" for letter in "AB"]
    path = str(tmp_path / "lora.safetensors")
    save_file(dict(zip(keys, (down, up), strict=True)), path)
    after = weights(model, lora=path)
    want = before[f"{module}.weight"] + (up.flatten(1) @ down.flatten(1)).reshape(
        before[f"{module}.weight"].shape
    )
    assert torch.equal(after[f"{module}.weight"], want)
    others = before.keys() - {f"{module}.weight"}
    assert all(torch.equal(after[name], before[name]) for name in others)
    assert not torch.equal(output(model, lora=path), output(model))


@pytest.mark.parametrize(
    ("family", "module", "network"),
    [
        ("adm", "middle_block.1.qkv", "UNet2DModel"),
        ("dinov2", LINEAR, "Dinov2Model"),
        ("dinov2", "vision_model.encoder.layer.0.attention.attention.query", "Dinov2Model"),
    ],
)
def test_lora_in_other_names_than_the_networks_is_refused(
    tmp_path: Path, family: str, module: str, network: str
) -> None:
    model = make(family, tmp_path / "m")
    path = str(tmp_path / "lora.safetensors")
    known = OTHERS[family][1]  # beside tensors that it could take
    keys = [f"{name}.lora_{letter}.weight" for name in (module, known) for letter in "AB"]
    save_file({key: torch.zeros(2, 2) for key in keys}, path)
    with pytest.raises(WeightsError, match=f"2 tensors belong to no linear .* of {network}: "):
        weights(model, lora=path)


@pytest.mark.parametrize("family", OTHERS)
def test_overrides_of_other_families_are_in_the_digest(tmp_path: Path, family: str) -> None:
    model = make(family, tmp_path / "m")
    file = str(tmp_path / "w.safetensors")
    save_file({"x": torch.zeros(1)}, file)
    digests = {
        ModelFolder.find(BackboneSpec(model=str(model), **changes)).digest()
        for changes in ({}, {"weights": file}, {"lora": [file]})
    }
    assert len(digests) == 3


def test_lora_of_another_shape_is_refused(sd: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "lora.safetensors")
    keys = f"unet.{LINEAR}.lora_A.weight", f"unet.{LINEAR}.lora_B.weight"
    save_file({keys[0]: torch.zeros(2, 31), keys[1]: torch.zeros(32, 2)}, path)
    with pytest.raises(
        WeightsError, match=r"up \[32, 2\] and down \[2, 31\], the weight is \[32, 32"
    ):
        weights(sd, lora=path)


def test_overrides_are_in_the_digest_by_content(sd: Path, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.safetensors", "b.safetensors", "a2.safetensors")]
    for file, value in zip(files, (1.0, 2.0, 1.0), strict=True):
        save_file({"x": torch.full((2,), value)}, file)
    a, b, same_as_a = map(str, files)

    def digest(**changes: object) -> str:
        return ModelFolder.find(BackboneSpec(model=str(sd), **changes)).digest()

    different = [
        digest(),
        digest(weights=a),
        digest(weights=b),
        digest(lora=[a]),
        digest(lora=[b]),
        digest(lora=[{"path": a, "scale": 0.5}]),
        digest(lora=[a, b]),
        digest(lora=[b, a]),
    ]
    assert len(set(different)) == len(different)
    assert digest(weights=same_as_a) == digest(weights=a)
    assert digest(lora=[same_as_a]) == digest(lora=[a])
    with pytest.raises(SpecError, match="No such file"):
        digest(lora=[str(tmp_path / "none")])


def test_overrides_in_a_pipeline_file(tmp_path: Path) -> None:
    data = {
        "name": "x",
        "dataset": {"tars": "a.tar"},
        "images": {"size": 8},
        "backbone": {
            "model": "owner/name",
            "weights": "w.safetensors",
            "lora": ["l.safetensors", {"path": "/abs/m.safetensors", "scale": 0.8}],
        },
    }
    backbone = Pipeline.parse(data).relative_to(tmp_path).backbone
    assert backbone is not None
    assert backbone.model == "owner/name"
    assert backbone.weights == f"{tmp_path}/w.safetensors"
    assert backbone.lora == (
        LoraSpec(path=f"{tmp_path}/l.safetensors"),
        LoraSpec(path="/abs/m.safetensors", scale=0.8),
    )
    with pytest.raises(SpecError, match="weights and lora have no meaning with init: random"):
        Pipeline.parse({**data, "backbone": {"model": "m", "init": "random", "lora": "l"}})
