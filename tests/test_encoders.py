"""Encoders as backbones, against plain calls of transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    CLIPModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    ViTMAEModel,
)

from drl_data.backbones import Backbone, Conditioning, ModelFolder, find_model, load_backbone
from drl_data.diffusion_spec import ConditionSpec, LatentSpec, NoiseSpec, ScheduleSpec
from drl_data.errors import SpecError, TapError, WeightsError
from drl_data.features import FeatureComputer
from drl_data.resolve import resolve_features
from drl_data.spec import BackboneSpec, FeatureSpec, ImageSpec, TapSpec
from drl_data.tiny_models import TINY_ENCODERS, save_tiny_clip, save_tiny_encoder

pytestmark = pytest.mark.usefixtures("one_thread")

NO_TIME = ScheduleSpec(convention="none")
IMAGES = ImageSpec(size=16)
# where the last hidden state comes from, and how many tokens stand before the patches
LAST = {
    "dinov2": ("layernorm", 1),
    "dinov2_with_registers": ("layernorm", 3),
    "clip_vision_model": ("encoder.layers.1", 1),
    "siglip_vision_model": ("post_layernorm", 0),
    "vit": ("layernorm", 1),
    "vit_mae": ("layernorm", 1),
    "vit_msn": ("layernorm", 1),
    "convnext": ("encoder.stages.1", None),
    "resnet": ("encoder.stages.1", None),
}


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny model folder of each architecture."""
    root = tmp_path_factory.mktemp("encoders")
    return {name: save_tiny_encoder(root / name, name) for name in TINY_ENCODERS}


def load(path: Path, device: str = "cpu", **changes: object) -> Backbone:
    return load_backbone(find_model(BackboneSpec(model=str(path), **changes)), device)


def pixels(size: int = 16) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def tapped(backbone: Backbone, x: Tensor, *paths: str) -> list[Tensor]:
    (time,) = backbone.schedule.resolve(NO_TIME)
    taps = backbone.resolve([TapSpec(path=path) for path in paths])
    with torch.no_grad():
        found = backbone.tap(x, time, Conditioning(), taps, lambda _, x, dims: x.clone())
    return [found[tap.name] for tap in taps]


def plain(path: Path, kind: str, x: Tensor) -> Tensor:
    network = AutoModel.from_pretrained(path).eval()
    kwargs = {}
    if kind == "vit_mae":
        network.embeddings.config.mask_ratio = 0.0
        kwargs["noise"] = torch.arange(16.0).expand(2, -1)
    with torch.no_grad():
        hidden: Tensor = network(pixel_values=x, **kwargs).last_hidden_state
    return hidden


@pytest.mark.parametrize("kind", TINY_ENCODERS)
def test_features_equal_plain_transformers(encoders: dict[str, Path], kind: str) -> None:
    tap, n_prefix = LAST[kind]
    want = plain(encoders[kind], kind, pixels())
    (got,) = tapped(load(encoders[kind]), pixels(), tap)
    if n_prefix is None:
        assert torch.equal(got, want)
        return
    assert want.shape == (2, n_prefix + 16, 32)
    assert got.shape == (2, 32, 4, 4)
    for y in range(4):
        for x in range(4):
            assert torch.equal(got[:, :, y, x], want[:, n_prefix + 4 * y + x])


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers", "vit"])
def test_the_class_token_and_all_tokens_before_the_patches(
    encoders: dict[str, Path], kind: str
) -> None:
    tap, n_prefix = LAST[kind]
    assert n_prefix
    want = plain(encoders[kind], kind, pixels())
    backbone = load(encoders[kind])
    cls, prefix, patches, whole = tapped(
        backbone, pixels(), f"{tap}@out.cls", f"{tap}@out.prefix", f"{tap}@out.patches", tap
    )
    assert torch.equal(cls, want[:, 0])
    assert torch.equal(prefix, want[:, :n_prefix])
    assert torch.equal(patches, whole)
    meta = load(encoders[kind], "meta")
    taps = meta.resolve([TapSpec(path=f"{tap}@out.cls"), TapSpec(path=tap)])
    (time,) = meta.schedule.resolve(NO_TIME)
    arrays = meta.arrays(taps, IMAGES, ConditionSpec(), time, "float16")
    assert [a.dims for a in arrays] == [("channel",), ("channel", "height", "width")]
    assert [a.name for a in arrays] == [f"{tap}-cls", tap]
    assert [a.tap for a in arrays] == [f"{tap}@out.cls", f"{tap}@out"]


def test_a_part_that_is_not_there_is_refused(encoders: dict[str, Path]) -> None:
    with pytest.raises(TapError, match="no token before its patches"):
        tapped(load(encoders["siglip_vision_model"]), pixels(), "post_layernorm@out.cls")
    with pytest.raises(TapError, match="no tokens named 'cls'"):
        tapped(load(encoders["resnet"]), pixels(), "encoder.stages.1@out.cls")
    with pytest.raises(TapError, match="no patches of this image"):
        tapped(load(encoders["siglip_vision_model"]), pixels(), "head@out.patches")


@torch.no_grad()
def test_the_class_token_attends_to_patches_as_transformers_says(
    encoders: dict[str, Path],
) -> None:
    """DINO's attention maps: probabilities of one query over the patches, which do not add up to 1
    as the class token attends to itself and to registers too."""
    path = encoders["dinov2_with_registers"]
    block = "encoder.layer.1.attention"
    network = AutoModel.from_pretrained(path, attn_implementation="eager").eval()
    (whole,) = network(pixel_values=pixels(), output_attentions=True).attentions[1:]
    parts = ("cls.patches", "patches", "prefix.cls")
    got = tapped(load(path), pixels(), *(f"{block}@attn.probs.{p}.heads[0,1]" for p in parts))
    cls, patches, registers = got
    torch.testing.assert_close(cls, whole[:, :, :1, 3:])
    maps = whole[:, :, 3:].unflatten(2, (4, 4)).permute(0, 1, 4, 2, 3)
    torch.testing.assert_close(patches, maps)  # all keys, of each patch's query
    torch.testing.assert_close(registers, whole[:, :, :3, :1])
    assert float(cls.sum(-1).max()) < 1


@pytest.mark.parametrize("kind", ["dinov2", "vit", "clip_vision_model", "siglip_vision_model"])
def test_positions_are_interpolated_to_other_sizes(encoders: dict[str, Path], kind: str) -> None:
    tap, n_prefix = LAST[kind]
    assert n_prefix is not None
    network = AutoModel.from_pretrained(encoders[kind]).eval()
    options = {} if kind == "dinov2" else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        want = network(pixel_values=pixels(24), **options).last_hidden_state
    (got,) = tapped(load(encoders[kind]), pixels(24), tap)
    assert got.shape == (2, 32, 6, 6)
    assert torch.equal(got.flatten(2).transpose(1, 2), want[:, n_prefix:])


def test_mae_sees_every_patch_in_its_place(encoders: dict[str, Path]) -> None:
    """Against MAE's own shuffled tokens, put back by its `ids_restore`; sums of another order."""
    network = ViTMAEModel.from_pretrained(encoders["vit_mae"]).eval()
    network.embeddings.config.mask_ratio = 0.0
    with torch.no_grad():
        out = network(pixel_values=pixels())
    index = out.ids_restore[..., None].expand(-1, -1, 32)
    want = out.last_hidden_state[:, 1:].gather(1, index)
    (got,) = tapped(load(encoders["vit_mae"]), pixels(), "layernorm")
    torch.testing.assert_close(got.flatten(2).transpose(1, 2), want, atol=1e-5, rtol=1e-5)


def test_the_vision_tower_of_a_clip_model(tmp_path: Path) -> None:
    clip = CLIPModel.from_pretrained(save_tiny_clip(tmp_path / "clip")).eval()
    with torch.no_grad():
        want = clip.vision_model(pixel_values=pixels())
    cls, pooled = tapped(
        load(tmp_path / "clip"), pixels(), "encoder.layers.1@out.cls", "post_layernorm"
    )
    assert torch.equal(cls, want.last_hidden_state[:, 0])
    assert torch.equal(pooled, want.pooler_output)


def test_the_image_embedding_of_clip(tmp_path: Path) -> None:
    """Of a whole CLIP, and of a vision tower that was saved with its projection."""
    clip = CLIPModel.from_pretrained(save_tiny_clip(tmp_path / "clip")).eval()
    vision = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "clip").eval()
    vision.save_pretrained(tmp_path / "vision")
    with torch.no_grad():
        want = clip.get_image_features(pixel_values=pixels()).pooler_output
        assert torch.equal(vision(pixel_values=pixels()).image_embeds, want)
    assert want.shape == (2, 24)
    for name in ("clip", "vision"):
        (got,) = tapped(load(tmp_path / name), pixels(), "visual_projection")
        assert torch.equal(got, want)
        meta = load(tmp_path / name, "meta")
        (time,) = meta.schedule.resolve(NO_TIME)
        taps = meta.resolve([TapSpec(path="visual_projection")])
        (array,) = meta.arrays(taps, IMAGES, ConditionSpec(), time, "float16")
        assert (array.dims, array.shape) == (("channel",), (24,))


def test_a_projection_changes_nothing_else(encoders: dict[str, Path], tmp_path: Path) -> None:
    """The tower's random weights, and the digest, are what they were without it."""
    folder = save_tiny_clip(tmp_path / "clip")
    tower = CLIPVisionModel.from_pretrained(folder)
    (tmp_path / "tower").mkdir()
    tower.config.save_pretrained(tmp_path / "tower")
    with_it, without = (
        dict(load(path, init="random", init_seed=3).network.named_parameters())
        for path in (folder, tmp_path / "tower")
    )
    assert with_it.keys() - without.keys() == {"visual_projection.weight"}
    assert all(torch.equal(with_it[name], without[name]) for name in without)
    with pytest.raises(TapError, match="matches no module"):
        load(encoders["clip_vision_model"]).resolve([TapSpec(path="visual_projection")])
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"lacks visual_projection\.weight"):
        load(folder)


@pytest.mark.parametrize("kind", TINY_ENCODERS)
def test_cut_forward_equals_uncut_and_meta_shapes_are_real(
    encoders: dict[str, Path], kind: str
) -> None:
    tap = LAST[kind][0].replace(".1", ".0")
    backbone = load(encoders[kind])
    (time,) = backbone.schedule.resolve(NO_TIME)
    taps = backbone.resolve([TapSpec(path=tap)])

    def run(*, stop_early: bool) -> Tensor:
        with torch.no_grad():
            (found,) = backbone.tap(
                pixels(), time, Conditioning(), taps, lambda _, x, d: x.clone(),
                stop_early=stop_early,
            ).values()  # fmt: skip
        return found

    cut = run(stop_early=True)
    assert torch.equal(cut, run(stop_early=False))
    meta = load(encoders[kind], "meta")
    (array,) = meta.arrays(taps, IMAGES, ConditionSpec(), time, "float16")
    assert array.shape == tuple(cut.shape[1:])


def feature_spec(**changes: object) -> FeatureSpec:
    values: dict[str, object] = {
        "dataset": "d", "n_samples": 2, "weights": "w", "backbone_dtype": "float32",
        "images": ImageSpec(size=16, range=(0, 1), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)),
        "latents": LatentSpec(), "condition": ConditionSpec(), "schedule": NO_TIME,
        "noise": NoiseSpec(kind="none"), "taps": (TapSpec(path="layernorm@out.cls"),),
        "dtype": "float32", "batch_size": 2, "rows_per_unit": 2, "overflow": "error",
    }  # fmt: skip
    return FeatureSpec.model_validate({**values, **changes})


def test_pixels_are_normalised_as_the_spec_says(encoders: dict[str, Path]) -> None:
    spec = feature_spec()
    backbone = load(encoders["dinov2"])
    (time,) = backbone.schedule.resolve(spec.schedule)
    computer = FeatureComputer(backbone, backbone.resolve(spec.taps), Conditioning(), [time], spec)
    raw = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16), dtype=np.uint8)
    ((_, got),) = computer.compute(raw, ["a", "b"])
    x = torch.from_numpy(raw).float() / 255
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    network = AutoModel.from_pretrained(encoders["dinov2"]).eval()
    with torch.no_grad():
        want = network(pixel_values=(x - mean) / std).pooler_output
    assert torch.equal(got["layernorm-cls"], want)


def test_an_encoder_takes_no_noise_and_no_time(encoders: dict[str, Path]) -> None:
    model = find_model(BackboneSpec(model=str(encoders["dinov2"])))
    arrays, times = resolve_features(model, feature_spec(), [ConditionSpec()])
    assert [a.shape for a in arrays] == [(32,)]
    assert [(t.requested, t.convention, t.alpha, t.sigma) for t in times] == [(0, "none", 1, 0)]
    with pytest.raises(SpecError, match=r"write `noise: \{kind: none\}`"):
        resolve_features(model, feature_spec(noise=NoiseSpec()), [ConditionSpec()])
    with pytest.raises(SpecError, match="ddpm_index: this model has no noise schedule; want none"):
        resolve_features(
            model, feature_spec(schedule=ScheduleSpec(timesteps=(0,))), [ConditionSpec()]
        )
    with pytest.raises(ValidationError, match="convention none has no time"):
        ScheduleSpec(convention="none", timesteps=(0, 5))
    with pytest.raises(SpecError, match="an encoder takes no text"):
        load(encoders["dinov2"], "meta").conditioning(ConditionSpec(prompt="a cat"))
    with pytest.raises(SpecError, match="class_label 3: an encoder takes none"):
        load(encoders["dinov2"], "meta").conditioning(ConditionSpec(class_label=3))
    with pytest.raises(SpecError, match="needs multiples of 4"):
        load(encoders["dinov2"], "meta").input_shape(ImageSpec(size=18))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": (0.5,) * 3}, "mean and std belong together"),
        ({"mean": (0.5,), "std": (1.0,)}, "1 numbers for 3 channels"),
        ({"mean": (0.5,) * 3, "std": (1.0, 0.0, 1.0)}, "want positive numbers"),
    ],
)
def test_a_wrong_normalisation_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageSpec(size=16, **changes)


def test_missing_weights_are_an_error_and_not_random(
    encoders: dict[str, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(encoders["vit"], tmp_path / "copy"))
    weights = load_file(copy / "model.safetensors")
    headless = {k: v for k, v in weights.items() if not k.startswith("pooler")}
    save_file(headless, copy / "model.safetensors", {"format": "pt"})
    backbone = load(copy)  # the pooler is a head that many checkpoints lack; nothing taps it
    with pytest.raises(TapError, match="matches no module"):
        backbone.resolve([TapSpec(path="pooler")])
    kept = {k: v for k, v in headless.items() if "layer.1." not in k}
    assert len(kept) < len(headless)
    save_file(kept, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"lacks \d+ weights of ViTModel: .*layers\.1"):
        load(copy)


def test_random_weights_are_a_function_of_the_seed(encoders: dict[str, Path]) -> None:
    def first(seed: int) -> Tensor:
        backbone = load(encoders["dinov2"], init="random", init_seed=seed)
        return next(p for p in backbone.network.parameters() if p.ndim > 1 and p.std() > 0)

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_digest_sees_weights_and_configuration(encoders: dict[str, Path], tmp_path: Path) -> None:
    def digest(path: Path) -> str:
        return ModelFolder.find(BackboneSpec(model=str(path))).digest()

    copy = Path(shutil.copytree(encoders["dinov2"], tmp_path / "copy"))
    assert digest(copy) == digest(encoders["dinov2"])
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-3}))
    changed = digest(copy)
    assert changed != digest(encoders["dinov2"])
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert digest(copy) != changed


def test_a_text_model_is_refused(tmp_path: Path) -> None:
    from transformers import CLIPTextConfig

    CLIPTextConfig(hidden_size=32, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="takes input_ids and no images"):
        load(tmp_path, "meta")


def test_half_precision(encoders: dict[str, Path]) -> None:
    for kind, path in encoders.items():
        assert load(path, dtype="bfloat16").dtype == torch.bfloat16, kind
