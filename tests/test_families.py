"""The families with text against diffusers' own pipelines and plain calls of its modules.

Every comparison is exact: both sides run the same modules in float32 on the CPU.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Model,
    T5EncoderModel,
    T5Tokenizer,
)

from drl_data.backbones import Backbone, ModelFolder, load_backbone
from drl_data.backbones.joint import pack, position_ids
from drl_data.backbones.tokens import TokenLayout
from drl_data.diffusion_spec import ConditionSpec, ScheduleSpec
from drl_data.errors import SpecError, TapError, WeightsError
from drl_data.noise import draw_normal
from drl_data.pipeline import Pipeline
from drl_data.runs import extract
from drl_data.schedule import corrupt
from drl_data.schedule_flow import FlowSchedule
from drl_data.spec import BackboneSpec, ImageSpec, TapSpec
from drl_data.taps import ResolvedTap, resolve
from drl_data.testing import write_photo_tars
from drl_data.tiny_models import (
    save_tiny_dit,
    save_tiny_flux,
    save_tiny_pixart,
    save_tiny_qwen_image,
    save_tiny_sana,
    save_tiny_sd3,
    save_tiny_sdxl,
    save_tiny_z_image,
)

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = ImageSpec(size=(16, 24))
"""Not square, so that no test passes with rows and columns exchanged. Latents are 8 x 12."""
PROMPT = "A small cat"
CAT = ConditionSpec(prompt=PROMPT)
MAKERS: dict[str, Callable[..., Path]] = {
    "sdxl": save_tiny_sdxl,
    "pixart": save_tiny_pixart,
    "sana": save_tiny_sana,
    "sd3": save_tiny_sd3,
    "flux": save_tiny_flux,
    "z_image": save_tiny_z_image,
    "qwen_image": save_tiny_qwen_image,
}
TAPS = {
    "sdxl": ["mid_block", "up_blocks.0", "up_blocks.0.attentions.0.**.attn2.to_q"],
    "pixart": ["transformer_blocks.0", "transformer_blocks.1.attn2.to_k"],
    "sana": ["transformer_blocks.0", "transformer_blocks.1.ff@in"],
    "sd3": ["transformer_blocks.0", "transformer_blocks.1.attn@out.1", "transformer_blocks.2@in"],
    "flux": ["transformer_blocks.0", "single_transformer_blocks.0", "**.proj_mlp"],
    "qwen_image": [
        "transformer_blocks.0",
        "transformer_blocks.1.txt_mlp",
        "transformer_blocks.1@ff.in",
    ],
    "z_image": ["noise_refiner.0", "context_refiner.0", "layers.0", "layers.1.attention.to_k"],
}
PAST_THE_TAPS = dict.fromkeys(MAKERS, "proj_out") | {
    "sdxl": "conv_out",
    "z_image": "all_final_layer.2-1",
}
FLOW = ("sana", "sd3", "flux", "z_image", "qwen_image")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny model folder of each family."""
    root = tmp_path_factory.mktemp("families")
    return {name: make(root / name) for name, make in MAKERS.items()}


@pytest.fixture(scope="session")
def backbones(models: dict[str, Path]) -> dict[str, Backbone]:
    return {name: load_backbone(find(path), "cpu") for name, path in models.items()}


def find(path: Path, **changes: object) -> ModelFolder:
    return ModelFolder.find(BackboneSpec(model=str(path), **changes))


def schedule_of(family: str) -> ScheduleSpec:
    if family in FLOW:
        return ScheduleSpec(convention="flow", timesteps=(0.26,))
    return ScheduleSpec(timesteps=(120,))


def latents_of(backbone: Backbone, n: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, *backbone.input_shape(IMAGES), generator=generator)


def denoise(
    backbone: Backbone,
    family: str,
    taps: list[str],
    condition: ConditionSpec = CAT,
    *,
    stop_early: bool = True,
) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
    (time,) = backbone.schedule.resolve(schedule_of(family))
    axes: dict[str, tuple[str, ...]] = {}

    def keep(tap: ResolvedTap, x: Tensor, dims: tuple[str, ...]) -> Tensor:
        axes[tap.name] = dims
        return x.clone()

    with torch.no_grad():
        got = backbone.tap(
            latents_of(backbone),
            time,
            backbone.conditioning(condition),
            resolve(backbone.network, [TapSpec(path=path) for path in taps]),
            keep,
            stop_early=stop_early,
        )
    return {name: (x, axes[name]) for name, x in got.items()}


@pytest.mark.parametrize("family", MAKERS)
def test_cut_forward_equals_uncut_bit_for_bit(backbones: dict[str, Backbone], family: str) -> None:
    backbone = backbones[family]
    calls = []
    late = backbone.network.get_submodule(PAST_THE_TAPS[family])
    handle = late.register_forward_hook(lambda *_: calls.append(1))
    cut = denoise(backbone, family, TAPS[family])
    assert not calls
    uncut = denoise(backbone, family, TAPS[family], stop_early=False)
    handle.remove()
    assert len(calls) == 1
    assert cut.keys() == uncut.keys()
    assert all(torch.equal(cut[name][0], uncut[name][0]) for name in cut)


@pytest.mark.parametrize("family", MAKERS)
def test_shapes_on_the_meta_device_are_the_real_ones(
    models: dict[str, Path], backbones: dict[str, Backbone], family: str
) -> None:
    meta = load_backbone(find(models[family]), "meta")
    (time,) = meta.schedule.resolve(schedule_of(family))
    taps = resolve(meta.network, [TapSpec(path=path) for path in TAPS[family]])
    arrays = meta.arrays(taps, IMAGES, ConditionSpec(), time, "float16")
    real = denoise(backbones[family], family, TAPS[family], ConditionSpec())
    want = {name: (tuple(x.shape[1:]), dims) for name, (x, dims) in real.items()}
    assert {array.name: (array.shape, array.dims) for array in arrays} == want


@pytest.mark.parametrize("family", MAKERS)
def test_every_precision_runs(models: dict[str, Path], family: str) -> None:
    backbone = load_backbone(find(models[family], dtype="bfloat16"), "cpu")
    (time,) = backbone.schedule.resolve(schedule_of(family))
    x = latents_of(backbone).bfloat16()
    taps = resolve(backbone.network, [TapSpec(path=TAPS[family][0])])
    with torch.no_grad():
        told = backbone.conditioning(CAT)
        (got,) = backbone.tap(x, time, told, taps, lambda _, x, __: x).values()
    assert got.dtype == torch.bfloat16
    assert got.isfinite().all()


# --- text: what diffusers' own pipelines tell the network ---------------------------------------


def clip(path: Path, suffix: str, *, projected: bool = False) -> tuple[CLIPTokenizer, nn.Module]:
    encoder = CLIPTextModelWithProjection if projected else CLIPTextModel
    return (
        CLIPTokenizer.from_pretrained(path / f"tokenizer{suffix}"),
        encoder.from_pretrained(path / f"text_encoder{suffix}").eval(),
    )


def t5(path: Path, suffix: str) -> tuple[T5Tokenizer, T5EncoderModel]:
    return (
        T5Tokenizer.from_pretrained(path / f"tokenizer{suffix}"),
        T5EncoderModel.from_pretrained(path / f"text_encoder{suffix}").eval(),
    )


def told_by_sdxl(path: Path) -> dict[str, Tensor]:
    (tokenizer, encoder), (tokenizer_2, encoder_2) = (
        clip(path, ""),
        clip(path, "_2", projected=True),
    )
    pipeline = StableDiffusionXLPipeline(
        None, encoder, encoder_2, tokenizer, tokenizer_2, None, None, add_watermarker=False
    )
    embeds, _, pooled, _ = pipeline.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": embeds, "text_embeds": pooled}


def told_by_pixart(path: Path) -> dict[str, Tensor]:
    pipeline = PixArtAlphaPipeline(*t5(path, ""), None, None, None)
    embeds, mask, *_ = pipeline.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}


def told_by_sana(path: Path) -> dict[str, Tensor]:
    tokenizer = GemmaTokenizer.from_pretrained(path / "tokenizer")
    encoder = Gemma2Model.from_pretrained(path / "text_encoder").eval()
    pipeline = SanaPipeline(tokenizer, encoder, None, None, None)
    embeds, mask, *_ = pipeline.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}


def told_by_sd3(path: Path, *, with_t5: bool = True) -> dict[str, Tensor]:
    (tokenizer, encoder), (tokenizer_2, encoder_2) = (
        clip(path, suffix, projected=True) for suffix in ("", "_2")
    )
    tokenizer_3, encoder_3 = t5(path, "_3") if with_t5 else (None, None)
    transformer = SD3Transformer2DModel.from_pretrained(path / "transformer")
    pipeline = StableDiffusion3Pipeline(
        transformer, None, None, encoder, tokenizer, encoder_2, tokenizer_2, encoder_3, tokenizer_3
    )
    embeds, _, pooled, _ = pipeline.encode_prompt(
        PROMPT, None, None, do_classifier_free_guidance=False
    )
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}


def told_by_flux(path: Path) -> dict[str, Tensor]:
    (tokenizer, encoder), (tokenizer_2, encoder_2) = clip(path, ""), t5(path, "_2")
    pipeline = FluxPipeline(None, None, encoder, tokenizer, encoder_2, tokenizer_2, None)
    embeds, pooled, _ = pipeline.encode_prompt(PROMPT)
    return {
        "encoder_hidden_states": embeds,
        "pooled_projections": pooled,
        "guidance": torch.tensor([3.5]),
    }


def told_by_z_image(path: Path) -> dict[str, Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(path / "tokenizer")
    encoder = Qwen3Model.from_pretrained(path / "text_encoder").eval()
    vae = AutoencoderKL.from_pretrained(path / "vae")
    pipeline = ZImagePipeline(None, vae, encoder, tokenizer, None)
    (embeds,), _ = pipeline.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    return {
        "encoder_hidden_states": embeds[None],
        "encoder_attention_mask": torch.ones(1, len(embeds), dtype=torch.int64),
    }


def told_by_qwen_image(path: Path) -> dict[str, Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(path / "tokenizer")
    encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(path / "text_encoder").eval()
    pipeline = QwenImagePipeline(None, None, encoder, tokenizer, None)
    embeds, mask = pipeline.encode_prompt(PROMPT)
    assert mask is None
    shown = torch.ones(embeds.shape[:2], dtype=torch.int64)
    return {"encoder_hidden_states": embeds, "encoder_hidden_states_mask": shown}


TOLD: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    "sdxl": told_by_sdxl,
    "pixart": told_by_pixart,
    "sana": told_by_sana,
    "sd3": told_by_sd3,
    "flux": told_by_flux,
    "z_image": told_by_z_image,
    "qwen_image": told_by_qwen_image,
}


def assert_told(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("family", MAKERS)
@torch.no_grad()
def test_prompts_are_encoded_as_the_pipelines_do(
    models: dict[str, Path], backbones: dict[str, Backbone], family: str
) -> None:
    got = backbones[family].conditioning(CAT).kwargs
    assert_told(dict(got), TOLD[family](models[family]))
    other = backbones[family].conditioning(ConditionSpec()).kwargs
    assert not torch.equal(other["encoder_hidden_states"], got["encoder_hidden_states"])


@torch.no_grad()
def test_sd3_without_t5_is_told_zeros(models: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(models["sd3"], tmp_path / "copy"))
    shutil.rmtree(copy / "text_encoder_3")
    got = load_backbone(find(copy), "cpu").conditioning(CAT).kwargs
    assert_told(dict(got), told_by_sd3(models["sd3"], with_t5=False))


@torch.no_grad()
def test_how_many_tokens_t5_has_and_whether_it_speaks(
    models: dict[str, Path], backbones: dict[str, Backbone]
) -> None:
    """Seg4Diff's SD3 has 77 zeros for T5; the authors' own Flux-schnell has 256 tokens."""
    of_77 = ConditionSpec(prompt=PROMPT, t5=False, t5_tokens=77)
    got = dict(backbones["sd3"].conditioning(of_77).kwargs)
    (tokenizer, encoder), (tokenizer_2, encoder_2) = (
        clip(models["sd3"], suffix, projected=True) for suffix in ("", "_2")
    )
    transformer = SD3Transformer2DModel.from_pretrained(models["sd3"] / "transformer")
    pipeline = StableDiffusion3Pipeline(
        transformer, None, None, encoder, tokenizer, encoder_2, tokenizer_2, None, None
    )
    embeds, _, pooled, _ = pipeline.encode_prompt(
        PROMPT, None, None, do_classifier_free_guidance=False, max_sequence_length=77
    )
    assert embeds.shape[1] == 154
    assert_told(got, {"encoder_hidden_states": embeds, "pooled_projections": pooled})

    short = ConditionSpec(prompt=PROMPT, t5_tokens=256)
    got = dict(backbones["flux"].conditioning(short).kwargs)
    (tokenizer, encoder), (tokenizer_2, encoder_2) = (
        clip(models["flux"], ""),
        t5(models["flux"], "_2"),
    )
    flux = FluxPipeline(None, None, encoder, tokenizer, encoder_2, tokenizer_2, None)
    embeds, _, _ = flux.encode_prompt(PROMPT, max_sequence_length=256)
    assert torch.equal(got["encoder_hidden_states"], embeds)
    for family, spec in (("sd3", of_77), ("flux", short)):
        meta = load_backbone(find(models[family]), "meta").conditioning(spec).kwargs
        want = backbones[family].conditioning(spec).kwargs
        assert {k: v.shape for k, v in meta.items()} == {k: v.shape for k, v in want.items()}


@pytest.mark.parametrize("changes", [{"t5": False}, {"t5_tokens": 77}])
def test_text_that_has_one_form_is_not_asked_for_another(
    models: dict[str, Path], backbones: dict[str, Backbone], changes: dict[str, object]
) -> None:
    with pytest.raises(SpecError, match=r"condition\.t5.*: this UNet2DConditionModel takes none"):
        backbones["sdxl"].conditioning(ConditionSpec(**changes))
    with pytest.raises(ValidationError, match="no meaning with prompt_embeddings"):
        ConditionSpec(prompt_embeddings="e.safetensors", **changes)


def test_flux_cannot_do_without_t5(backbones: dict[str, Backbone]) -> None:
    with pytest.raises(SpecError, match="Flux has no other text tokens"):
        backbones["flux"].conditioning(ConditionSpec(t5=False))


def test_guidance_is_told_to_models_that_take_it(backbones: dict[str, Backbone]) -> None:
    got = backbones["flux"].conditioning(ConditionSpec(guidance=1.0)).kwargs["guidance"]
    assert got.tolist() == [1.0]
    assert "guidance" not in backbones["sd3"].conditioning(ConditionSpec(guidance=1.0)).kwargs


FILE_NAMES = {
    "encoder_hidden_states": "prompt_embeds",
    "text_embeds": "pooled_prompt_embeds",
    "pooled_projections": "pooled_prompt_embeds",
    "encoder_attention_mask": "prompt_attention_mask",
    "encoder_hidden_states_mask": "prompt_attention_mask",
}


@pytest.mark.parametrize("family", MAKERS)
def test_precomputed_embeddings_replace_the_text_encoders(
    models: dict[str, Path], backbones: dict[str, Backbone], tmp_path: Path, family: str
) -> None:
    want = dict(backbones[family].conditioning(CAT).kwargs)
    named = {FILE_NAMES[k]: v[0].contiguous() for k, v in want.items() if k in FILE_NAMES}
    path = str(tmp_path / "prompt.safetensors")
    save_file(named, path)
    copy = Path(shutil.copytree(models[family], tmp_path / "copy"))
    for folder in copy.glob("t*e*n*"):
        if folder.name.startswith(("text_encoder", "tokenizer")):
            shutil.rmtree(folder)
    for device in ("cpu", "meta"):
        without = load_backbone(find(copy), device)
        got = dict(without.conditioning(ConditionSpec(prompt_embeddings=path)).kwargs)
        assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in want.items()}
        if device == "cpu":
            assert_told(got, want)
        with pytest.raises(WeightsError, match=r"no text_encoder.*or give condition\.prompt_emb"):
            without.conditioning(ConditionSpec())


def test_embeddings_that_do_not_fit_are_refused(
    backbones: dict[str, Backbone], tmp_path: Path
) -> None:
    path = str(tmp_path / "e.safetensors")
    spec = ConditionSpec(prompt_embeddings=path)
    save_file({"prompt_embeds": torch.zeros(5, 48)}, path)
    with pytest.raises(SpecError, match=r"pooled_prompt_embeds is missing; want prompt_embeds \["):
        backbones["sd3"].conditioning(spec)
    save_file({"prompt_embeds": torch.zeros(5, 7)}, path)
    with pytest.raises(SpecError, match=r"prompt_embeds \[5, 7\]; want .*\[token, 24\].*mask \[to"):
        backbones["pixart"].conditioning(spec)
    save_file({"prompt_embeds": torch.zeros(5, 24)}, path)
    mask = backbones["pixart"].conditioning(spec).kwargs["encoder_attention_mask"]
    assert mask.tolist() == [[1, 1, 1, 1, 1]]
    (tmp_path / "e.safetensors").write_bytes(b"x")
    with pytest.raises(SpecError, match="want a safetensors file with prompt_embeds"):
        backbones["sana"].conditioning(spec)


# --- the forward: plain diffusers calls ---------------------------------------------------------


def hooked(network: nn.Module, *paths: str) -> dict[str, object]:
    kept: dict[str, object] = {}
    network.eval()
    for path in paths:
        network.get_submodule(path).register_forward_hook(
            lambda m, args, out, path=path: kept.update({path: out})
        )
    return kept


def as_map(tokens: object, height: int, width: int) -> Tensor:
    assert isinstance(tokens, Tensor)
    rows = [
        torch.stack([tokens[:, y * width + x] for x in range(width)], -1) for y in range(height)
    ]
    return torch.stack(rows, -2)


@torch.no_grad()
def test_sdxl_equals_plain_diffusers(
    models: dict[str, Path], backbones: dict[str, Backbone]
) -> None:
    got = denoise(backbones["sdxl"], "sdxl", ["mid_block", "up_blocks.0"])
    network = UNet2DConditionModel.from_pretrained(models["sdxl"] / "unet")
    kept = hooked(network, "mid_block", "up_blocks.0")
    told = told_by_sdxl(models["sdxl"])
    time_ids = torch.tensor([[16.0, 24.0, 0.0, 0.0, 16.0, 24.0]] * 2)
    network(
        latents_of(backbones["sdxl"]),
        120,
        encoder_hidden_states=told["encoder_hidden_states"].expand(2, -1, -1),
        added_cond_kwargs={"text_embeds": told["text_embeds"].expand(2, -1), "time_ids": time_ids},
    )
    for name, want in kept.items():
        assert torch.equal(got[name][0], want), name


@torch.no_grad()
def test_pixart_equals_plain_diffusers(
    models: dict[str, Path], backbones: dict[str, Backbone]
) -> None:
    block, key = "transformer_blocks.1", "transformer_blocks.1.attn2.to_k"
    got = denoise(backbones["pixart"], "pixart", [block, key])
    network = PixArtTransformer2DModel.from_pretrained(models["pixart"] / "transformer")
    kept = hooked(network, block, key)
    told = told_by_pixart(models["pixart"])
    network(
        latents_of(backbones["pixart"]),
        encoder_hidden_states=told["encoder_hidden_states"].expand(2, -1, -1),
        encoder_attention_mask=told["encoder_attention_mask"].expand(2, -1),
        timestep=torch.tensor([120, 120]),
        added_cond_kwargs={
            "resolution": torch.tensor([[16.0, 24.0]] * 2),
            "aspect_ratio": torch.tensor([[16 / 24]] * 2),
        },
    )
    assert torch.equal(got[block][0], as_map(kept[block], 4, 6))
    assert torch.equal(got[key][0], kept[key])
    assert got[key][1] == ("token", "channel")


@torch.no_grad()
def test_sana_equals_plain_diffusers(
    models: dict[str, Path], backbones: dict[str, Backbone]
) -> None:
    got = denoise(backbones["sana"], "sana", ["transformer_blocks.1"])
    network = SanaTransformer2DModel.from_pretrained(models["sana"] / "transformer")
    kept = hooked(network, "transformer_blocks.1")
    told = told_by_sana(models["sana"])
    network(
        latents_of(backbones["sana"]),
        encoder_hidden_states=told["encoder_hidden_states"].expand(2, -1, -1),
        encoder_attention_mask=told["encoder_attention_mask"].expand(2, -1),
        timestep=torch.tensor([260.0, 260.0]),
    )
    want = as_map(kept["transformer_blocks.1"], 8, 12)
    assert torch.equal(got["transformer_blocks.1"][0], want)


@torch.no_grad()
def test_sd3_equals_plain_diffusers_and_image_tokens_are_told_from_text(
    models: dict[str, Path], backbones: dict[str, Backbone]
) -> None:
    names = ["transformer_blocks.0", "transformer_blocks.1.attn", "transformer_blocks.2"]
    got = denoise(backbones["sd3"], "sd3", [*names, f"{names[0]}@out.0", f"{names[1]}@out.1"])
    network = SD3Transformer2DModel.from_pretrained(models["sd3"] / "transformer")
    kept = hooked(network, *names)
    told = told_by_sd3(models["sd3"])
    network(
        latents_of(backbones["sd3"]),
        encoder_hidden_states=told["encoder_hidden_states"].expand(2, -1, -1),
        pooled_projections=told["pooled_projections"].expand(2, -1),
        timestep=torch.tensor([260.0, 260.0]),
    )
    block, attention, last = (kept[name] for name in names)
    assert isinstance(block, tuple)
    assert isinstance(attention, tuple)
    assert isinstance(last, tuple)
    text, image = block
    n_text = 77 + 256
    assert (image.shape[1], text.shape[1]) == (4 * 6, n_text)
    assert torch.equal(got[names[0]][0], as_map(image, 4, 6))
    assert torch.equal(got[f"{names[0]}-0"][0], text)
    assert torch.equal(got[names[1]][0], as_map(attention[0], 4, 6))
    assert torch.equal(got[f"{names[1]}-1"][0], attention[1])
    assert last[0] is None  # the last block has no text stream left
    assert torch.equal(got[names[2]][0], as_map(last[1], 4, 6))


@torch.no_grad()
def test_flux_equals_plain_diffusers_and_image_tokens_are_told_from_text(
    models: dict[str, Path], backbones: dict[str, Backbone]
) -> None:
    double, single = "transformer_blocks.1", "single_transformer_blocks.1"
    inner = f"{single}.proj_mlp"
    got = denoise(
        backbones["flux"], "flux", [double, single, inner, f"{single}@in", f"{double}@out.0"]
    )
    network = FluxTransformer2DModel.from_pretrained(models["flux"] / "transformer")
    kept = hooked(network, double, single, inner, "single_transformer_blocks.0")
    told = told_by_flux(models["flux"])
    x = latents_of(backbones["flux"])
    network(
        FluxPipeline._pack_latents(x, 2, 16, 8, 12),
        encoder_hidden_states=told["encoder_hidden_states"].expand(2, -1, -1),
        pooled_projections=told["pooled_projections"].expand(2, -1),
        timestep=torch.tensor([0.26, 0.26]),
        guidance=torch.tensor([3.5, 3.5]),
        img_ids=FluxPipeline._prepare_latent_image_ids(2, 4, 6, "cpu", torch.float32),
        txt_ids=torch.zeros(512, 3),
    )
    (text, image), (_, after), (_, before) = (
        kept[name] for name in (double, single, "single_transformer_blocks.0")
    )  # type: ignore[misc]
    joint = kept[inner]
    assert isinstance(joint, Tensor)
    assert joint.shape[1] == 512 + 24
    assert torch.equal(got[double][0], as_map(image, 4, 6))
    assert torch.equal(got[f"{double}-0"][0], text)
    assert torch.equal(got[single][0], as_map(after, 4, 6))
    assert torch.equal(got[f"{single}-in"][0], as_map(before, 4, 6))
    assert torch.equal(got[inner][0], as_map(joint[:, 512:], 4, 6))


@torch.no_grad()
def test_z_image_equals_plain_diffusers_and_image_tokens_are_told_from_text(
    models: dict[str, Path], backbones: dict[str, Backbone]
) -> None:
    """Image and text are 24 and 30 tokens, each padded to 32."""
    refiner, context, layer = "noise_refiner.0", "context_refiner.0", "layers.1"
    got = denoise(
        backbones["z_image"],
        "z_image",
        [refiner, context, layer, f"{layer}@out.text", f"{layer}.attention@in", "v"],
    )
    network = ZImageTransformer2DModel.from_pretrained(models["z_image"] / "transformer")
    kept = hooked(network, refiner, context, layer, f"{layer}.attention_norm1")
    network.get_submodule(f"{layer}.attention").register_forward_pre_hook(
        lambda m, args: kept.update(attended=args[0])
    )
    (prompt,) = told_by_z_image(models["z_image"])["encoder_hidden_states"]
    timestep = (1000 - torch.tensor([260.0, 260.0])) / 1000
    x = latents_of(backbones["z_image"]).unsqueeze(2)
    (output,) = network(list(x), timestep, [prompt, prompt], return_dict=False)
    assert len(prompt) == 30
    assert kept[refiner].shape[1] == kept[context].shape[1] == 32  # type: ignore[attr-defined]
    joint = kept[layer]
    assert isinstance(joint, Tensor)
    assert joint.shape[1] == 64
    assert torch.equal(got[refiner][0], as_map(kept[refiner], 4, 6))
    assert torch.equal(got[context][0], kept[context][:, :30])  # type: ignore[index]
    assert got[context][1] == ("token", "channel")
    assert torch.equal(got[layer][0], as_map(joint, 4, 6))
    assert torch.equal(got[f"{layer}-text"][0], joint[:, 32:62])
    assert got[f"{layer}-text"][1] == ("token", "channel")
    assert torch.equal(got[f"{layer}.attention-in"][0], as_map(kept["attended"], 4, 6))
    assert torch.equal(got["v"][0], -torch.stack(output).squeeze(2))


@torch.no_grad()
def test_qwen_image_equals_plain_diffusers_and_image_tokens_are_told_from_text(
    models: dict[str, Path], backbones: dict[str, Backbone]
) -> None:
    block, attention = "transformer_blocks.1", "transformer_blocks.1.attn"
    taps = [block, f"{block}@out.text", f"{block}@in", attention, f"{attention}@out.text"]
    taps += [f"{block}.txt_mlp", f"{block}@ff.in", "v"]
    got = denoise(backbones["qwen_image"], "qwen_image", taps)
    network = QwenImageTransformer2DModel.from_pretrained(models["qwen_image"] / "transformer")
    kept = hooked(network, "transformer_blocks.0", block, attention, f"{block}.txt_mlp")
    network.get_submodule(f"{block}.img_mlp").register_forward_pre_hook(
        lambda m, args: kept.update(modulated=args[0])
    )
    told = told_by_qwen_image(models["qwen_image"])
    (tokens,) = network(
        QwenImagePipeline._pack_latents(latents_of(backbones["qwen_image"]), 2, 16, 8, 12),
        encoder_hidden_states=told["encoder_hidden_states"].expand(2, -1, -1),
        timestep=torch.tensor([260.0, 260.0]) / 1000,
        img_shapes=[[(1, 4, 6)]] * 2,
        return_dict=False,
    )
    (text, image), (attended, attended_text), (_, before) = (
        kept[name] for name in (block, attention, "transformer_blocks.0")
    )  # type: ignore[misc]
    assert torch.equal(got[block][0], as_map(image, 4, 6))
    assert torch.equal(got[f"{block}-text"][0], text)
    assert torch.equal(got[f"{block}-in"][0], as_map(before, 4, 6))
    assert torch.equal(got[attention][0], as_map(attended, 4, 6))
    assert torch.equal(got[f"{attention}-text"][0], attended_text)
    assert torch.equal(got[f"{block}.txt_mlp"][0], kept[f"{block}.txt_mlp"])
    assert got[f"{block}.txt_mlp"][1] == ("token", "channel")
    assert torch.equal(got[f"{block}-ff.in"][0], as_map(kept["modulated"], 4, 6))
    unpacked = QwenImagePipeline._unpack_latents(tokens, 16, 24, 2)
    assert torch.equal(got["v"][0], unpacked.squeeze(2))


@torch.no_grad()
def test_predictions_of_flow_models_are_latents(backbones: dict[str, Backbone]) -> None:
    """Flux puts out packed tokens; x0 and eps are where the straight path begins and ends."""
    for family in FLOW:
        got = denoise(backbones[family], family, ["v", "x0", "eps"])
        x, (v, dims) = latents_of(backbones[family]), got["v"]
        (time,) = backbones[family].schedule.resolve(schedule_of(family))
        told = backbones[family].conditioning(CAT).expand(2)
        model_time = torch.full((2,), time.model_time)
        assert dims == ("channel", "height", "width")
        output = backbones[family].forward(x, model_time, told)
        assert torch.equal(v, output[0] if isinstance(output, tuple) else output)
        assert torch.equal(got["x0"][0], x - time.sigma * v)
        assert torch.equal(got["eps"][0], x + time.alpha * v)


@torch.no_grad()
def test_norms_of_each_head_give_tokens(
    models: dict[str, Path], backbones: dict[str, Backbone]
) -> None:
    """Their heads come before the tokens in SD3 and after them in Flux; neither is a map."""
    attn = "transformer_blocks.1.attn"
    got = denoise(backbones["sd3"], "sd3", [f"{attn}.norm_q", f"{attn}@attn.query"])
    query, dims = got[f"{attn}-attn.query"]  # SD3 does not rotate them
    assert dims == ("channel", "height", "width")
    assert got[f"{attn}.norm_q"][1] == dims
    assert torch.equal(got[f"{attn}.norm_q"][0], query)
    single = "single_transformer_blocks.1.attn"
    norms = [f"{single}.norm_q", f"{single}.norm_q@in", f"{attn}.norm_added_k"]
    found = denoise(backbones["flux"], "flux", norms)
    x = latents_of(backbones["flux"])
    other = load_backbone(find(models["flux"]), "cpu")  # its hooks stay
    kept = hooked(other.network, f"{single}.norm_q", f"{single}.to_q")
    other.forward(x, torch.full((2,), 0.26), other.conditioning(CAT).expand(2))
    normed, projected = kept[f"{single}.norm_q"], kept[f"{single}.to_q"]
    assert isinstance(normed, Tensor)
    assert isinstance(projected, Tensor)
    assert normed.shape == (2, 512 + 24, 2, 16)
    assert torch.equal(found[f"{single}.norm_q"][0], as_map(normed.flatten(2)[:, 512:], 4, 6))
    assert torch.equal(found[f"{single}.norm_q-in"][0], as_map(projected[:, 512:], 4, 6))
    assert found[f"{attn}.norm_added_k"][1] == ("token", "channel")
    listed = {m.path: m for m in backbones["flux"].modules(IMAGES, CAT)}
    assert listed[f"{single}.norm_q"].shape == (32, 4, 6)


def test_packing_is_that_of_the_pipeline() -> None:
    x = torch.randn(2, 16, 8, 12)
    assert torch.equal(pack(x), FluxPipeline._pack_latents(x, 2, 16, 8, 12))
    want = FluxPipeline._prepare_latent_image_ids(2, 4, 6, "cpu", torch.float32)
    assert torch.equal(position_ids(4, 6, torch.device("cpu")), want)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_text_stays_tokens_where_it_has_as_many_as_the_image(
    backbones: dict[str, Backbone], tmp_path: Path, family: str
) -> None:
    backbone = backbones[family]
    path = str(tmp_path / "e.safetensors")
    config = backbone.network.config
    n_image = 4 * 6
    save_file(
        {
            "prompt_embeds": torch.randn(n_image, config.joint_attention_dim),
            "pooled_prompt_embeds": torch.randn(config.pooled_projection_dim),
        },
        path,
    )
    block = "transformer_blocks.0"
    text = ["context_embedder", f"{block}.ff_context", f"{block}.attn.add_q_proj"]
    text += [f"{block}@out.0", f"{block}@in.1", f"{block}.attn@out.1", f"{block}.attn@in.1"]
    image = [block, f"{block}.ff", f"{block}.attn.to_q", f"{block}.attn", f"{block}@in"]
    image += [f"{block}@out.1", f"{block}@in.0"]
    got = denoise(backbone, family, text + image, ConditionSpec(prompt_embeddings=path))
    names = [tap.name for tap in resolve(backbone.network, [TapSpec(path=p) for p in text + image])]
    axes = [got[name][1] for name in names]
    assert axes == [("token", "channel")] * len(text) + [("channel", "height", "width")] * len(
        image
    )


def test_a_tuple_layout_that_nobody_knows_is_refused() -> None:
    """What a block gives by default is the image's tokens; anything else must not pass as them."""
    tap = ResolvedTap("block", "block", "out")
    layout = TokenLayout(2, 3)
    tokens = torch.arange(6.0).reshape(1, 6, 1)
    x, dims = layout.arrange(tap, tokens, text=False, only_image=True)
    assert dims == ("channel", "height", "width")
    assert x.flatten().tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(TapError, match=r"5 tokens, want the image's 6"):
        layout.arrange(tap, tokens[:, :5], text=False, only_image=True)
    assert layout.arrange(tap, tokens[:, :5], text=False)[1] == ("token", "channel")


@pytest.mark.parametrize(
    ("family", "factor"), [("sd3", 1.5305), ("flux", 0.3611), ("z_image", 0.3611)]
)
def test_latents_of_16_channels_are_shifted_and_scaled(
    models: dict[str, Path], backbones: dict[str, Backbone], family: str, factor: float
) -> None:
    vae = AutoencoderKL.from_pretrained(models[family] / "vae")
    pixels = torch.rand(2, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        got = backbones[family].encode(pixels).latents(None)
        want = vae.encode(pixels).latent_dist.mean
    shift = {"sd3": 0.0609, "flux": 0.1159, "z_image": 0.1159}[family]
    assert got.shape == (2, 16, 8, 12)
    assert torch.equal(got, (want - shift) * factor)


def test_a_deterministic_autoencoder_is_scaled_and_has_no_posterior(
    models: dict[str, Path], backbones: dict[str, Backbone]
) -> None:
    vae = AutoencoderDC.from_pretrained(models["sana"] / "vae")
    pixels = torch.rand(2, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        posterior = backbones["sana"].encode(pixels)
        want = vae.encode(pixels).latent
    noise = torch.randn(2, 4, 8, 12)
    assert torch.equal(posterior.latents(noise), want * 0.41407)
    assert torch.equal(posterior.latents(noise, scale=False), want)


# --- flow time ----------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.0, 0.09, 0.26, 0.515, 1.0])
def test_flow_corruption_is_diffusers_scale_noise_bit_for_bit(t: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.sigmas = torch.tensor([t])
    scheduler.timesteps = torch.tensor([1000 * t])
    x, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    (time,) = FlowSchedule().resolve(ScheduleSpec(convention="flow", timesteps=(t,)))
    want = scheduler.scale_noise(x, scheduler.timesteps.expand(2), noise)
    assert torch.equal(corrupt(x, noise, time), want)
    assert time.model_time == pytest.approx(1000 * t, abs=1e-4)


@pytest.mark.parametrize(
    ("t", "shift", "scale", "want"),
    [
        (0.26, None, 1000.0, (260, 0.26)),  # DiTF
        (0.09, None, 1.0, (0.09, 0.09)),  # DiTF on DAVIS; Flux multiplies by itself
        (0.26148, 3.0, 1000.0, (515, 0.515)),  # Seg4Diff: 28 steps of SD3, [-8]
    ],
)
def test_flow_times_are_golden(
    t: float, shift: float | None, scale: float, want: tuple[float, float]
) -> None:
    spec = ScheduleSpec(convention="flow", timesteps=(t,), shift=shift)
    (time,) = FlowSchedule(scale).resolve(spec)
    assert (time.model_time, time.sigma) == pytest.approx(want, rel=1e-3)
    assert time.requested == t
    assert time.convention == "flow"
    assert time.alpha == pytest.approx(1 - time.sigma, abs=1e-7)


def test_shift_is_that_of_diffusers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    plain = FlowMatchEulerDiscreteScheduler()
    requested = tuple(plain.sigmas.tolist()[::100])
    spec = ScheduleSpec(convention="flow", timesteps=requested, shift=3.0)
    got = [time.sigma for time in FlowSchedule().resolve(spec)]
    assert got == pytest.approx(scheduler.sigmas.tolist()[::100], rel=1e-6)


def test_a_convention_that_the_model_has_not_is_refused(backbones: dict[str, Backbone]) -> None:
    with pytest.raises(SpecError, match=r"has a flow from 0 \(clean\) to 1 .*; want flow"):
        backbones["flux"].schedule.resolve(ScheduleSpec(timesteps=(100,)))
    with pytest.raises(SpecError, match=r"timesteps \[260\]: want 0 .* is divided by 1000"):
        backbones["sd3"].schedule.resolve(ScheduleSpec(convention="flow", timesteps=(0.5, 260)))
    with pytest.raises(SpecError, match=r"convention flow: .*want ddpm_index"):
        backbones["sdxl"].schedule.resolve(ScheduleSpec(convention="flow", timesteps=(0.5,)))


@torch.no_grad()
def test_a_store_of_a_flow_model_equals_a_straight_loop(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """Noise is drawn anew for each timestep, and 0.26 and 0.52 are not both 0."""
    write_photo_tars(tmp_path, n_samples=2, n_tars=1, size=24)
    block = "single_transformer_blocks.0"
    store = extract(
        Pipeline.parse(
            {
                "name": "flow",
                "dataset": {"tars": str(tmp_path / "*.tar")},
                "images": {"size": [16, 24], "resize": "stretch"},
                "backbone": {"model": str(models["flux"])},
                "condition": {"prompt": PROMPT},
                "latents": {"posterior": "mean"},
                "schedule": {"convention": "flow", "timesteps": [0.26, 0.52]},
                "noise": {"per_timestep": True},
                "taps": [block],
                "features": {"dtype": "float32", "batch_size": 2, "rows_per_unit": 2},
                "store": {"url": str(tmp_path / "s.zarr")},
            }
        )
    ).store
    keys, images = read_photos(tmp_path / "photos-000000.tar")
    vae = AutoencoderKL.from_pretrained(models["flux"] / "vae").eval()
    network = FluxTransformer2DModel.from_pretrained(models["flux"] / "transformer")
    kept = hooked(network, block)
    told = told_by_flux(models["flux"])
    clean = (vae.encode(images).latent_dist.mean - 0.1159) * 0.3611
    for i, t in enumerate((0.26, 0.52)):
        noise = torch.stack(
            [
                torch.from_numpy(draw_normal((16, 8, 12), "noise", 0, "key", key, 0, t))
                for key in keys
            ]
        )
        sigma = torch.tensor(t)
        network(
            FluxPipeline._pack_latents((1 - sigma) * clean + sigma * noise, 2, 16, 8, 12),
            encoder_hidden_states=told["encoder_hidden_states"].expand(2, -1, -1),
            pooled_projections=told["pooled_projections"].expand(2, -1),
            timestep=torch.tensor([t, t]),
            guidance=torch.tensor([3.5, 3.5]),
            img_ids=FluxPipeline._prepare_latent_image_ids(2, 4, 6, "cpu", torch.float32),
            txt_ids=torch.zeros(512, 3),
        )
        (_, image) = kept[block]  # type: ignore[misc]
        got = torch.tensor(store.read_unit(block, i, store.units[0]))
        assert torch.equal(got, as_map(image, 4, 6))
        assert store.time_index(t) == i


def read_photos(path: Path) -> tuple[list[str], Tensor]:
    """Keys and pixels -1..1 of a tar, stretched to 16 x 24."""
    keys, images = [], []
    with tarfile.open(path) as tar:
        for name in sorted(n for n in tar.getnames() if n.endswith(".jpg")):
            image = Image.open(tar.extractfile(name)).convert("RGB")
            image = image.resize((24, 16), Image.Resampling.BICUBIC)
            keys.append(name.removesuffix(".jpg"))
            images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 * 2 - 1)
    return keys, torch.stack(images)


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "images", "message"),
    [
        ("sdxl", ImageSpec(size=18), "needs multiples of 4"),
        ("pixart", ImageSpec(size=18), "needs multiples of 4"),
        ("sana", ImageSpec(size=17), "needs multiples of 2"),
        ("sd3", ImageSpec(size=36), "9x9 patches; the positions of this SD3 are for at most 8x8"),
        ("flux", ImageSpec(size=18), "needs multiples of 4"),
        ("flux", ImageSpec(size=16, mode="L"), "1 channels; the model takes 3"),
        ("z_image", ImageSpec(size=18), "needs multiples of 4"),
        ("qwen_image", ImageSpec(size=18), "needs multiples of 4"),
        ("qwen_image", ImageSpec(size=16, mode="L"), "1 channels; the model takes 3"),
        ("z_image", ImageSpec(size=68), "17x17 patches; the positions of this Z-Image are for at "),
    ],
)
def test_images_that_a_model_cannot_take_are_refused(
    backbones: dict[str, Backbone], family: str, images: ImageSpec, message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        backbones[family].input_shape(images)


@pytest.mark.parametrize("family", MAKERS)
def test_a_class_is_refused_by_models_that_take_text(
    backbones: dict[str, Backbone], family: str
) -> None:
    with pytest.raises(SpecError, match="takes a prompt, not a class"):
        backbones[family].conditioning(ConditionSpec(class_label=3))


@pytest.mark.parametrize("family", MAKERS)
def test_digest_sees_every_text_encoder(
    models: dict[str, Path], tmp_path: Path, family: str
) -> None:
    copy = Path(shutil.copytree(models[family], tmp_path / "copy"))
    assert find(copy).digest() == find(models[family]).digest()
    for file in sorted(copy.glob("text_encoder*/model.safetensors")):
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert find(copy).digest() != find(models[family]).digest(), file.parent.name
        file.write_bytes(whole)


def edit_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def test_what_no_adapter_knows_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(models["sdxl"], tmp_path / "sdxl"))
    edit_config(copy / "unet", addition_embed_type="image")
    with pytest.raises(WeightsError, match="addition_embed_type 'image'; there are adapters for"):
        load_backbone(find(copy), "meta")
    copy = Path(shutil.copytree(models["qwen_image"], tmp_path / "qwen_image"))
    edit_config(copy / "transformer", zero_cond_t=True, use_layer3d_rope=True)
    with pytest.raises(WeightsError, match="with zero_cond_t and use_layer3d_rope, which is told"):
        load_backbone(find(copy), "meta")
    copy = Path(shutil.copytree(models["z_image"], tmp_path / "z_image"))
    edit_config(copy / "transformer", all_patch_size=[4])
    with pytest.raises(WeightsError, match=r"patches of \[4\]; want one with 2 x 2 latents"):
        load_backbone(find(copy), "meta")
    edit_config(copy / "transformer", siglip_feat_dim=8)
    with pytest.raises(WeightsError, match="Z-Image-Omni is told images beside the text"):
        load_backbone(find(copy), "meta")
    copy = Path(shutil.copytree(models["sana"], tmp_path / "sana"))
    edit_config(copy / "transformer", guidance_embeds=True)
    with pytest.raises(WeightsError, match="Sana-Sprint is trained on TrigFlow"):
        load_backbone(find(copy), "meta")
    edit_config(copy / "transformer", guidance_embeds=False)
    edit_config(copy / "vae", _class_name="VQModel")
    with pytest.raises(WeightsError, match="vae is a VQModel; want AutoencoderKL or AutoencoderDC"):
        load_backbone(find(copy), "meta")


@pytest.mark.parametrize(
    ("make", "cls"),
    [(save_tiny_dit, DiTTransformer2DModel), (save_tiny_pixart, PixArtTransformer2DModel)],
)
def test_class_names_of_old_repositories_are_understood(
    tmp_path: Path, make: Callable[[Path], Path], cls: type
) -> None:
    path = make(tmp_path / "old")
    edit_config(path / "transformer", _class_name="Transformer2DModel")
    for device in ("meta", "cpu"):
        assert type(load_backbone(find(path), device).network) is cls
