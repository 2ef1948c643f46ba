"""Backbones of every family, loaded from the real layout, against plain diffusers calls."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiTTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from drl_data.backbones import Backbone, ModelFolder, load_backbone
from drl_data.backbones.backbone import arrange
from drl_data.diffusion_spec import ConditionSpec, ScheduleSpec
from drl_data.errors import SpecError, WeightsError
from drl_data.spec import BackboneSpec, ImageSpec, TapSpec
from drl_data.taps import ResolvedTap, resolve
from drl_data.tiny_models import save_tiny_ddpm, save_tiny_dit, save_tiny_stable_diffusion

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = ImageSpec(size=16)
MAKERS: dict[str, Callable[..., Path]] = {
    "ddpm": save_tiny_ddpm,
    "sd": save_tiny_stable_diffusion,
    "dit": save_tiny_dit,
}
TAPS = {
    "ddpm": ["down_blocks.1.resnets.0", "mid_block", "up_blocks.0", "up_blocks.1.resnets.0@in"],
    "sd": ["mid_block", "up_blocks.0", "down_blocks.0@out.0", "**.attn2.to_k"],
    "dit": ["transformer_blocks.0", "transformer_blocks.1.ff@in"],
}
PAST_THE_TAPS = {"ddpm": "conv_out", "sd": "conv_out", "dit": "proj_out_2"}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny model folder of each family."""
    root = tmp_path_factory.mktemp("models")
    return {name: make(root / name) for name, make in MAKERS.items()}


def find(path: Path, **changes: object) -> ModelFolder:
    return ModelFolder.find(BackboneSpec(model=str(path), **changes))


def taps_of(backbone: Backbone, family: str) -> tuple[ResolvedTap, ...]:
    return resolve(backbone.network, [TapSpec(path=path) for path in TAPS[family]])


def denoise(backbone: Backbone, family: str, *, stop_early: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, *backbone.input_shape(IMAGES), generator=generator)
    (time,) = backbone.schedule.resolve(ScheduleSpec(timesteps=(120,)))
    with torch.no_grad():
        return backbone.tap(
            x,
            time,
            backbone.conditioning(ConditionSpec()),
            taps_of(backbone, family),
            lambda _, x, dims: x.clone(),
            stop_early=stop_early,
        )


@pytest.mark.parametrize("family", MAKERS)
def test_cut_forward_equals_uncut_bit_for_bit(models: dict[str, Path], family: str) -> None:
    backbone = load_backbone(find(models[family]), "cpu")
    late = backbone.network.get_submodule(PAST_THE_TAPS[family])
    calls = []
    late.register_forward_hook(lambda *_: calls.append(1))
    cut = denoise(backbone, family, stop_early=True)
    assert not calls
    uncut = denoise(backbone, family, stop_early=False)
    assert len(calls) == 1
    assert cut.keys() == uncut.keys()
    assert all(torch.equal(cut[name], uncut[name]) for name in cut)


@pytest.mark.parametrize("family", MAKERS)
def test_shapes_on_the_meta_device_are_the_real_ones(models: dict[str, Path], family: str) -> None:
    folder = find(models[family])
    meta = load_backbone(folder, "meta")
    (time,) = meta.schedule.resolve(ScheduleSpec(timesteps=(0,)))
    arrays = meta.arrays(taps_of(meta, family), IMAGES, ConditionSpec(), time, "float16")
    real = denoise(load_backbone(folder, "cpu"), family, stop_early=True)
    assert {a.name: a.shape for a in arrays} == {k: tuple(v.shape[1:]) for k, v in real.items()}
    assert [a.tap for a in arrays] == [t.address for t in taps_of(meta, family)]


def test_pixel_unet_equals_plain_diffusers(models: dict[str, Path]) -> None:
    got = denoise(load_backbone(find(models["ddpm"]), "cpu"), "ddpm", stop_early=True)
    network = UNet2DModel.from_pretrained(models["ddpm"] / "unet")
    kept: dict[str, Tensor] = {}
    network.mid_block.register_forward_hook(lambda m, a, out: kept.update(mid_block=out))
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        network(x, torch.tensor([120, 120, 120]))
    assert torch.equal(got["mid_block"], kept["mid_block"])


def test_latent_unet_equals_plain_diffusers(models: dict[str, Path]) -> None:
    root = models["sd"]
    backbone = load_backbone(find(root), "cpu")
    got = denoise(backbone, "sd", stop_early=True)
    network = UNet2DConditionModel.from_pretrained(root / "unet")
    tokenizer = CLIPTokenizer.from_pretrained(root / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(root / "text_encoder")
    tokens = tokenizer("", padding="max_length", max_length=77, return_tensors="pt").input_ids
    kept: dict[str, Tensor] = {}
    network.up_blocks[0].register_forward_hook(lambda m, a, out: kept.update(up=out))
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        text = encoder(tokens).last_hidden_state.expand(3, -1, -1)
        network(x, 120, encoder_hidden_states=text)
    assert tokens.shape == (1, 77)
    assert torch.equal(got["up_blocks.0"], kept["up"])


def test_dit_equals_plain_diffusers_and_tokens_become_a_row_major_map(
    models: dict[str, Path],
) -> None:
    got = denoise(load_backbone(find(models["dit"]), "cpu"), "dit", stop_early=True)
    network = DiTTransformer2DModel.from_pretrained(models["dit"] / "transformer").eval()
    kept: dict[str, Tensor] = {}
    network.transformer_blocks[0].register_forward_hook(lambda m, a, out: kept.update(b=out))
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        network(x, timestep=torch.full((3,), 120), class_labels=torch.full((3,), 10))
    tokens = kept["b"]
    assert tokens.shape == (3, 16, 32)
    for y in range(4):
        for x_ in range(4):
            assert torch.equal(got["transformer_blocks.0"][:, :, y, x_], tokens[:, y * 4 + x_])


def test_encoding_equals_the_vae(models: dict[str, Path]) -> None:
    backbone = load_backbone(find(models["sd"]), "cpu")
    vae = AutoencoderKL.from_pretrained(models["sd"] / "vae")
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    noise = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        posterior = backbone.encode(pixels)
        want = vae.encode(pixels).latent_dist
    factor = vae.config.scaling_factor
    assert factor == pytest.approx(0.18215)
    assert torch.equal(posterior.latents(None), want.mean * factor)
    assert torch.equal(posterior.latents(None, scale=False), want.mean)
    assert torch.equal(posterior.latents(noise), (want.mean + want.std * noise) * factor)


def test_a_token_count_without_a_grid_stays_tokens() -> None:
    assert arrange(torch.zeros(1, 77, 8), (64, 64))[1] == ("token", "channel")
    x, dims = arrange(torch.arange(32.0).reshape(1, 8, 4), (8, 4))
    assert dims == ("channel", "height", "width")
    assert x.shape == (1, 4, 4, 2)
    assert x[0, 0].tolist() == [[0, 4], [8, 12], [16, 20], [24, 28]]


def test_random_weights_are_a_function_of_the_seed(models: dict[str, Path]) -> None:
    def weights(**changes: object) -> dict[str, Tensor]:
        backbone = load_backbone(find(models["ddpm"], **changes), "cpu")
        return {k: v.clone() for k, v in backbone.network.state_dict().items()}

    def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
        return all(torch.equal(a[k], b[k]) for k in a)

    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = weights(init="random", init_seed=1)
    assert torch.equal(state, torch.get_rng_state())  # nobody else's random numbers change
    assert equal(first, weights(init="random", init_seed=1))
    assert not equal(first, weights(init="random", init_seed=2))
    assert not equal(first, weights())


def test_digest_names_content_not_place(models: dict[str, Path], tmp_path: Path) -> None:
    first = find(models["sd"]).digest()
    copy = Path(shutil.copytree(models["sd"], tmp_path / "elsewhere"))
    config = json.loads((copy / "unet" / "config.json").read_text())
    config["_diffusers_version"] = "0.0"
    (copy / "unet" / "config.json").write_text(json.dumps(config))
    assert find(copy).digest() == first


@pytest.mark.parametrize(
    "file",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "scheduler/scheduler_config.json",
        "unet/config.json",
    ],
)
def test_digest_sees_every_component(models: dict[str, Path], tmp_path: Path, file: str) -> None:
    copy = Path(shutil.copytree(models["sd"], tmp_path / "copy"))
    path = copy / file
    if path.suffix == ".json":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_end": 0.5}))
    else:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    assert find(copy).digest() != find(models["sd"]).digest()


def test_digest_of_random_weights_is_of_architecture_and_seed(models: dict[str, Path]) -> None:
    random = [find(models["ddpm"], init="random", init_seed=s).digest() for s in (0, 0, 1)]
    assert random[0] == random[1]
    assert len({*random, find(models["ddpm"]).digest()}) == 3


def test_precomputed_embeddings_replace_the_text_encoder(
    models: dict[str, Path], tmp_path: Path
) -> None:
    backbone = load_backbone(find(models["sd"]), "cpu")
    embeds = backbone.conditioning(ConditionSpec(prompt="a cat")).kwargs["encoder_hidden_states"]
    path = str(tmp_path / "prompt.safetensors")
    save_file({"prompt_embeds": embeds[0].contiguous()}, path)
    copy = Path(shutil.copytree(models["sd"], tmp_path / "copy"))
    shutil.rmtree(copy / "text_encoder")
    without = load_backbone(find(copy), "cpu")
    got = without.conditioning(ConditionSpec(prompt_embeddings=path))
    assert torch.equal(got.kwargs["encoder_hidden_states"], embeds)
    other = backbone.conditioning(ConditionSpec()).kwargs["encoder_hidden_states"]
    assert not torch.equal(other, embeds)
    with pytest.raises(WeightsError, match=r"no text_encoder/ .* or give condition\.prompt_emb"):
        without.conditioning(ConditionSpec())


@pytest.mark.parametrize(
    ("family", "images", "condition", "message"),
    [
        ("ddpm", ImageSpec(size=16, mode="L"), ConditionSpec(), "1 channels; the model takes 3"),
        ("ddpm", ImageSpec(size=17), ConditionSpec(), "needs multiples of 2"),
        ("sd", ImageSpec(size=18), ConditionSpec(), "needs multiples of 4"),
        ("dit", ImageSpec(size=32), ConditionSpec(), "latents of 16x16.*are for 8x8"),
        ("ddpm", IMAGES, ConditionSpec(prompt="a cat"), "takes no text"),
        ("ddpm", IMAGES, ConditionSpec(class_label=1), "the model has none"),
        ("sd", IMAGES, ConditionSpec(class_label=1), "takes a prompt, not a class"),
        ("dit", IMAGES, ConditionSpec(class_label=11), r"want 0\.\.10 or null"),
    ],
)
def test_what_a_model_cannot_take_is_refused(
    models: dict[str, Path],
    family: str,
    images: ImageSpec,
    condition: ConditionSpec,
    message: str,
) -> None:
    backbone = load_backbone(find(models[family]), "meta")

    def ask() -> None:
        backbone.input_shape(images)
        backbone.conditioning(condition)

    with pytest.raises(SpecError, match=message):
        ask()


def test_a_class_conditional_pixel_unet(models: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(models["ddpm"], tmp_path / "copy"))
    config = json.loads((copy / "unet" / "config.json").read_text()) | {"num_class_embeds": 3}
    UNet2DModel.from_config(config).save_pretrained(copy / "unet")
    backbone = load_backbone(find(copy), "cpu")
    told = backbone.conditioning(ConditionSpec(class_label=2)).kwargs
    assert told["class_labels"].tolist() == [2]
    with pytest.raises(SpecError, match=r"class_label 3: want 0\.\.2"):
        backbone.conditioning(ConditionSpec(class_label=3))
    with pytest.raises(SpecError, match="without a null class; give a number"):
        backbone.conditioning(ConditionSpec())


def test_a_hub_id_needs_a_revision() -> None:
    with pytest.raises(SpecError, match=r"'owner/name' is a hub id and needs backbone\.revision"):
        ModelFolder.find(BackboneSpec(model="owner/name"))


def test_a_model_that_is_nowhere_names_what_was_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        WeightsError, match="'owner/name' at revision 'abc' is neither in the local"
    ):
        ModelFolder.find(BackboneSpec(model="owner/name", revision="abc"))
    with pytest.raises(WeightsError, match="no folder"):
        find(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="not in diffusers' layout"):
        find(tmp_path / "empty")


def test_broken_weights_name_the_folder(models: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(models["ddpm"], tmp_path / "copy"))
    next(copy.glob("unet/*.safetensors")).write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="unet does not load as UNet2DModel"):
        load_backbone(find(copy), "cpu")
    config = json.loads((copy / "unet" / "config.json").read_text())
    (copy / "unet" / "config.json").write_text(json.dumps(config | {"_class_name": "Other"}))
    with pytest.raises(WeightsError, match="is a Other; families with an adapter: UNet2DModel"):
        load_backbone(find(copy), "cpu")


def test_half_precision_weights(models: dict[str, Path]) -> None:
    for family, path in models.items():
        backbone = load_backbone(find(path, dtype="bfloat16"), "cpu")
        assert backbone.dtype == torch.bfloat16, family
