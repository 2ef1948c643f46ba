"""Students: bodies of transformers and of one's own, stages, weights from a folder, saved again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pydantic import JsonValue
from torch import Tensor

from drl_data.distill_spec import StudentSpec
from drl_data.errors import SpecError
from drl_data.spec import ImageSpec
from drl_data.student import Classifier, Student

IMAGES = ImageSpec(size=8, mode="L")
OWN = "python:tests.student_modules"
RESNET: dict[str, JsonValue] = {
    "embedding_size": 8,
    "hidden_sizes": [8, 12, 16],
    "depths": [1, 1, 1],
    "layer_type": "basic",
}
CONVNEXT: dict[str, JsonValue] = {
    "patch_size": 2,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "num_stages": 2,
}
VIT: dict[str, JsonValue] = {
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def pixels(n: int = 2, n_channels: int = 1, side: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(
        0, 256, (n, n_channels, side, side), dtype=torch.uint8, generator=generator
    )


def student(seed: int = 0, images: ImageSpec = IMAGES, **spec: object) -> Student:
    return Student(StudentSpec.model_validate(spec), images, seed).eval()


@pytest.mark.parametrize(
    ("model_type", "config", "stages", "shapes"),
    [
        ("resnet", RESNET, ["stage1", "stage3"], {"stage1": (8, 8, 8), "stage3": (16, 2, 2)}),
        ("resnet", RESNET, [1, 2], {"stage1": (8, 8, 8), "stage2": (12, 4, 4)}),
        ("convnext", CONVNEXT, ["stage1", "stage2"], {"stage1": (8, 16, 16), "stage2": (16, 8, 8)}),
        ("dinov2", VIT, ["stage1", "stage2"], {"stage1": (16, 8, 8), "stage2": (16, 8, 8)}),
    ],
)
def test_stages_of_backbones(
    model_type: str,
    config: dict[str, JsonValue],
    stages: list[str | int],
    shapes: dict[str, tuple[int, ...]],
    tmp_path: Path,
) -> None:
    """Their names and shapes; and the saved student, read by transformers, gives equal features."""
    from transformers import AutoBackbone, AutoConfig

    one = student(model_type=model_type, config=config, stages=stages)
    maps = one(pixels())
    assert {stage: tuple(x.shape[1:]) for stage, x in maps.items()} == shapes
    assert one.channels == {stage: shape[0] for stage, shape in shapes.items()}
    assert one.last == list(shapes)[-1]
    one.save(tmp_path)
    read = AutoBackbone.from_config(AutoConfig.from_pretrained(tmp_path))
    read = type(read).from_pretrained(tmp_path).eval()
    assert read.out_features == list(shapes)
    for got, want in zip(read(one.normalised(pixels())).feature_maps, maps.values(), strict=True):
        assert torch.allclose(got, want, atol=1e-6)
    again = student(1, weights=str(tmp_path), stages=stages)(pixels())
    for stage in shapes:
        assert torch.allclose(again[stage], maps[stage], atol=1e-6)


def test_the_normalisation_is_the_images_or_the_weights() -> None:
    small = ImageSpec(size=32)
    own = student(images=small, mean=[0.5, 0.4, 0.3], std=[0.2, 0.25, 0.3])
    big = pixels(2, 3, 32)
    want = (big / 255 - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor(
        [0.2, 0.25, 0.3]
    )[:, None, None]
    assert torch.allclose(own.normalised(big), want)
    low, high = small.range
    assert torch.allclose(
        student(images=small).normalised(big), big / 255 * (high - low) + low, atol=1e-6
    )
    with pytest.raises(SpecError, match="mean of 2 channels; images have 3"):
        student(images=small, mean=[0.5, 0.4], std=[1, 1])


def test_weights_of_a_folder_begin_the_student(tmp_path: Path) -> None:
    from transformers import AutoModel

    one = student(3, model_type="resnet", config=RESNET)
    one.save(tmp_path)
    about = json.loads((tmp_path / "student.json").read_text())
    assert about["enlarge"] == 4
    assert about["stages"] == {"last": 16}
    assert about["images"]["mode"] == "L"
    direct = AutoModel.from_pretrained(tmp_path).eval()(one.normalised(pixels()))
    want = one(pixels())["last"]
    assert torch.allclose(direct.last_hidden_state, want, atol=1e-6)
    again = student(9, weights=str(tmp_path))
    assert torch.equal(again(pixels())["last"], want)
    assert not torch.equal(student(9, config=RESNET)(pixels())["last"], want)


def test_your_own_module(tmp_path: Path) -> None:
    spec = {"model_type": f"{OWN}:patches", "config": {"width": 6}}
    one, same, other = (student(seed, **spec) for seed in (0, 0, 1))
    assert one.channels == {"patches": 6, "deep": 12}
    assert torch.equal(one(pixels())["deep"], same(pixels())["deep"])
    assert not torch.equal(one(pixels())["deep"], other(pixels())["deep"])
    one.save(tmp_path)
    assert not list(tmp_path.glob("*.bin")) + list(tmp_path.glob("*.pt"))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {"factory": spec["model_type"], "config": {"width": 6}}
    again = student(5, **spec, weights=str(tmp_path))
    for stage, want in one(pixels()).items():
        assert torch.equal(again(pixels())[stage], want)
    assert student(model_type=f"{OWN}:one_map").channels == {"last": 4}


def test_what_no_stage_uses_is_frozen_and_trained_again_with_labels() -> None:
    one = student(model_type=f"{OWN}:patches")
    one.keep_used({"patches"}, IMAGES)
    trained = {name.split(".")[2] for name, p in one.named_parameters() if p.requires_grad}
    assert trained == {"patch", "norm"}
    assert all(p.requires_grad for p in Classifier(one, 3, 0).parameters())
    vit = student(model_type="vit", config=VIT)
    vit.keep_used({"last"}, IMAGES)
    frozen = [name for name, p in vit.named_parameters() if not p.requires_grad]
    assert frozen
    assert all("pooler" in name for name in frozen)


def test_building_leaves_batch_norm_and_the_generator_alone() -> None:
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    one = student(model_type=f"{OWN}:patches")
    one.keep_used({"deep"}, IMAGES)
    assert torch.equal(torch.rand(2), want)
    norm = one.body.get_submodule("model.norm")
    assert int(norm.num_batches_tracked) == 0  # type: ignore[call-overload]


def test_refused(tmp_path: Path) -> None:
    def refused(match: str, **spec: object) -> None:
        with pytest.raises(SpecError, match=match):
            student(**spec)

    refused("cannot build 'resnett' as AutoModel", model_type="resnett")
    refused("cannot build 'vit' as AutoBackbone", model_type="vit", stages=["stage1"])
    refused("stage9", model_type="resnet", config=RESNET, stages=["stage9"])
    refused("No module named 'nowhere'", model_type="python:nowhere:f")
    refused("want python:package.module:factory", model_type="python:nowhere")
    refused("gave a str; want a torch.nn.Module", model_type=f"{OWN}:no_module")
    refused(r"stage 'last' is \[1, 4\]; want maps", model_type=f"{OWN}:vectors")
    refused("says itself which stages", model_type=f"{OWN}:patches", stages=["deep"])

    student(config=RESNET).save(tmp_path / "resnet")
    folder = str(tmp_path / "resnet")
    refused("brings its own; leave it out", weights=folder, config=RESNET)
    refused("is a 'resnet'", weights=folder, model_type="vit")
    with pytest.raises(SpecError, match=r"takes 1 channels, images\.mode 'RGB' gives 3"):
        student(images=ImageSpec(size=8), weights=folder)
    refused("no model.safetensors in it", weights=str(tmp_path), model_type=f"{OWN}:patches")
    refused("not those of", weights=folder, model_type=f"{OWN}:patches")

    config = json.loads((tmp_path / "resnet" / "config.json").read_text())
    config["hidden_sizes"] = [8, 12, 16, 16]
    config["depths"] = [1, 1, 1, 1]
    (tmp_path / "resnet" / "config.json").write_text(json.dumps(config))
    refused("not those of ResNetModel; .* tensors lack", weights=folder)
    (tmp_path / "resnet" / "model.safetensors").rename(tmp_path / "resnet" / "weights.bin")
    refused("no model.safetensors in it", weights=folder)
