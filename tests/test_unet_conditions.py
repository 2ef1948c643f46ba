"""What UNets are told beside text and time: SDXL's sizes, LCM's guidance; as the pipelines do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from drl_data.backbones import Backbone, Conditioning, ModelFolder, load_backbone
from drl_data.backbones.unet import guidance_embedding
from drl_data.diffusion_spec import ConditionSpec
from drl_data.errors import SpecError
from drl_data.pipeline import Pipeline
from drl_data.schedule import NoiseSchedule
from drl_data.spec import BackboneSpec, ImageSpec, ResolvedTime, TapSpec
from drl_data.tiny_models import (
    save_tiny_ddpm,
    save_tiny_dit,
    save_tiny_encoder,
    save_tiny_flux,
    save_tiny_pixart,
    save_tiny_sana,
    save_tiny_sd3,
    save_tiny_sdxl,
    save_tiny_stable_diffusion,
)

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "a small cat"
SIZE = (16, 24)
SIZES: dict[str, tuple[int, int]] = {
    "original_size": (480, 640), "crops_coords_top_left": (3, 70), "target_size": (1024, 768)
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny SD and SDXL, and the same with a place for LCM's guidance."""
    root = tmp_path_factory.mktemp("models")
    makers = {"sd": save_tiny_stable_diffusion, "sdxl": save_tiny_sdxl}
    found = {name: make(root / name) for name, make in makers.items()}
    for name, make in makers.items():
        path = make(root / f"lcm-{name}")
        config = UNet2DConditionModel.load_config(path / "unet")
        torch.manual_seed(5)
        network = UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": 10})
        nn.init.normal_(network.time_embedding.cond_proj.weight, std=0.5)
        network.save_pretrained(path / "unet")
        found[f"lcm-{name}"] = path
    return found


def load(path: Path, device: str = "cpu") -> Backbone:
    return load_backbone(ModelFolder.find(BackboneSpec(model=str(path))), device)


class Call:
    """The first call of a pipeline's UNet: what it was given, and what it gave."""

    def __init__(self, pipeline: DiffusionPipeline, **arguments: object) -> None:
        given: list[tuple[tuple[Tensor, ...], dict[str, object]]] = []
        outputs: list[Tensor] = []
        hooks = [
            pipeline.unet.register_forward_pre_hook(
                lambda _, args, kwargs: given.append((args, kwargs)), with_kwargs=True
            ),
            pipeline.unet.register_forward_hook(lambda _, args, out: outputs.append(out[0])),
        ]
        pipeline.set_progress_bar_config(disable=True)
        pipeline(
            prompt=PROMPT,
            height=SIZE[0],
            width=SIZE[1],
            num_inference_steps=4,
            output_type="latent",
            generator=torch.Generator().manual_seed(2),
            **arguments,
        )
        for hook in hooks:
            hook.remove()
        (self.x, self.time), self.kwargs = given[0]
        self.output = outputs[0]


def sdxl(path: Path) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        AutoencoderKL.from_pretrained(path / "vae"),
        CLIPTextModel.from_pretrained(path / "text_encoder").eval(),
        CLIPTextModelWithProjection.from_pretrained(path / "text_encoder_2").eval(),
        CLIPTokenizer.from_pretrained(path / "tokenizer"),
        CLIPTokenizer.from_pretrained(path / "tokenizer_2"),
        UNet2DConditionModel.from_pretrained(path / "unet").eval(),
        EulerDiscreteScheduler.from_pretrained(path / "scheduler"),
        add_watermarker=False,
    )


def lcm(path: Path) -> LatentConsistencyModelPipeline:
    return LatentConsistencyModelPipeline(
        AutoencoderKL.from_pretrained(path / "vae"),
        CLIPTextModel.from_pretrained(path / "text_encoder").eval(),
        CLIPTokenizer.from_pretrained(path / "tokenizer"),
        UNet2DConditionModel.from_pretrained(path / "unet").eval(),
        LCMScheduler(),
        None,
        None,
        requires_safety_checker=False,
    )


def ours(
    backbone: Backbone, call: Call, spec: ConditionSpec
) -> tuple[Tensor, Mapping[str, object]]:
    """Our output for the same input, and what the network was given."""
    given: list[dict[str, object]] = []
    hook = backbone.network.register_forward_pre_hook(
        lambda _, args, kwargs: given.append(kwargs), with_kwargs=True
    )
    told = backbone.conditioning(spec).expand(len(call.x))
    with torch.no_grad():
        output = backbone.forward(call.x, call.time.expand(len(call.x)), told)
    hook.remove()
    assert isinstance(output, tuple)
    return output[0], given[0]


@pytest.mark.parametrize("given", [{}, SIZES, *({k: v} for k, v in SIZES.items())])
@torch.no_grad()
def test_sizes_are_told_as_sdxls_pipeline_does(
    models: dict[str, Path], given: dict[str, tuple[int, int]]
) -> None:
    call = Call(sdxl(models["sdxl"]), guidance_scale=1.0, **given)
    output, kwargs = ours(load(models["sdxl"]), call, ConditionSpec(prompt=PROMPT, **given))
    added, want = kwargs["added_cond_kwargs"], call.kwargs["added_cond_kwargs"]
    assert isinstance(added, dict)
    assert isinstance(want, dict)
    assert added["time_ids"].tolist() == want["time_ids"].tolist()
    assert torch.equal(output, call.output)


@torch.no_grad()
def test_sizes_matter(models: dict[str, Path]) -> None:
    call = Call(sdxl(models["sdxl"]), guidance_scale=1.0)
    backbone = load(models["sdxl"])
    specs = [ConditionSpec(prompt=PROMPT, **{k: v}) for k, v in SIZES.items()]
    for spec in specs:
        assert not torch.equal(ours(backbone, call, spec)[0], call.output)


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize(("family", "pipeline"), [("lcm-sd", lcm), ("lcm-sdxl", sdxl)])
@torch.no_grad()
def test_guidance_is_told_as_lcms_pipelines_do(
    models: dict[str, Path],
    family: str,
    pipeline: Callable[[Path], DiffusionPipeline],
    guidance: float,
) -> None:
    call = Call(pipeline(models[family]), guidance_scale=guidance)
    backbone = load(models[family])
    spec = ConditionSpec(prompt=PROMPT, lcm_guidance=guidance)
    output, kwargs = ours(backbone, call, spec)
    told, want = kwargs["timestep_cond"], call.kwargs["timestep_cond"]
    assert isinstance(told, Tensor)
    assert isinstance(want, Tensor)
    assert torch.equal(told, want)
    assert torch.equal(output, call.output)
    silent, kwargs = ours(backbone, call, ConditionSpec(prompt=PROMPT))
    assert kwargs.get("timestep_cond") is None
    assert not torch.equal(silent, call.output)


@pytest.mark.parametrize("width", [256, 512, 7])
def test_the_embedding_of_guidance_is_diffusers_own(width: int) -> None:
    embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    for guidance in (0.0, 1.0, 3.7, 8.5, 14):
        w = torch.tensor(guidance - 1).repeat(1)
        want = embed(None, w, embedding_dim=width)  # type: ignore[arg-type]  # it uses no self
        assert torch.equal(guidance_embedding(guidance, width), want)


@torch.no_grad()
def test_sizes_and_guidance_reach_a_batch_and_the_meta_device(models: dict[str, Path]) -> None:
    spec = ConditionSpec(prompt=PROMPT, lcm_guidance=4, original_size=(64, 32))
    backbone, meta = load(models["lcm-sdxl"]), load(models["lcm-sdxl"], "meta")
    one = backbone.conditioning(spec)
    other = backbone.conditioning(spec.model_copy(update={"original_size": (8, 8)}))
    both = Conditioning.stack([one, other])
    assert both.kwargs["time_ids"].tolist() == [[64, 32, 0, 0, -1, -1], [8, 8, 0, 0, -1, -1]]
    assert {k: v.shape for k, v in meta.conditioning(spec).kwargs.items()} == {
        k: v.shape for k, v in one.kwargs.items()
    }
    images = ImageSpec(size=SIZE)
    time = ResolvedTime(requested=9, convention="x", model_time=9, alpha=1, sigma=0)
    assert isinstance(backbone.schedule, NoiseSchedule)
    taps = meta.resolve([TapSpec(path="mid_block")])
    (array,) = meta.arrays(taps, images, spec, time, "float32")
    x = torch.randn(2, *backbone.input_shape(images), generator=torch.Generator().manual_seed(0))
    taps = backbone.resolve([TapSpec(path="mid_block")])

    def mid(rows: slice, told: Conditioning) -> Tensor:
        got = backbone.tap(x[rows], time, told, taps, lambda _, x, __: x.clone())
        return got["mid_block"]

    batch = mid(slice(0, 2), both)
    assert batch.shape[1:] == array.shape
    torch.testing.assert_close(batch[:1], mid(slice(0, 1), one), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(batch[1:], mid(slice(1, 2), other), rtol=1e-5, atol=1e-5)


MAKERS: dict[str, Callable[[Path], Path]] = {
    "UNet2DModel": save_tiny_ddpm,
    "DiT": save_tiny_dit,
    "encoder": save_tiny_encoder,
    "UNet2DConditionModel": save_tiny_stable_diffusion,
    "PixArt": save_tiny_pixart,
    "Sana": save_tiny_sana,
    "SD3": save_tiny_sd3,
    "Flux": save_tiny_flux,
}


@pytest.mark.parametrize("family", MAKERS)
def test_models_without_a_place_for_them_refuse_them(tmp_path: Path, family: str) -> None:
    backbone = load(MAKERS[family](tmp_path / "model"), "meta")
    said: dict[str, object] = {**SIZES, "lcm_guidance": 3.5}
    for name, value in said.items():
        with pytest.raises(SpecError, match=rf"condition\.{name}: .*{family}.* takes none"):
            backbone.conditioning(ConditionSpec.model_validate({name: value}))


def test_an_sdxl_without_a_place_for_guidance_refuses_it(models: dict[str, Path]) -> None:
    with pytest.raises(SpecError, match=r"condition\.lcm_guidance: this UNet2DConditionModel take"):
        load(models["sdxl"], "meta").conditioning(ConditionSpec(lcm_guidance=8))


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (
            {"original_size": [0, 8]},
            r"original_size\.0: Input should be greater than or equal",
        ),
        ({"crops_coords_top_left": [-1, 8]}, r"top_left\.0: Input should be greater than or equal"),
    ],
)
def test_sizes_are_pixels(condition: dict[str, object], message: str) -> None:
    data = {"name": "x", "dataset": {"tars": "a"}, "images": {"size": 8}, "condition": condition}
    with pytest.raises(SpecError, match=message):
        Pipeline.parse(data)


def test_one_number_is_a_square() -> None:
    spec = ConditionSpec.model_validate({"original_size": 512, "target_size": [8, 9]})
    assert (spec.original_size, spec.target_size) == ((512, 512), (8, 9))
    assert spec.extras == ("original_size", "target_size")
    assert ConditionSpec.model_validate_json(spec.model_dump_json()) == spec
