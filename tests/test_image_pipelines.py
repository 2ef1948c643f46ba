"""Images of every family, against a plain call of its pipeline with the same generators."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    UNet2DModel,
)
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image
from torch import Tensor

from drl_data.backbones.image_maker import ImageMaker, ImageRequest
from drl_data.backbones.image_pipelines import load_images, resolve_call
from drl_data.backbones.loader import ModelFolder
from drl_data.errors import SpecError, WeightsError
from drl_data.spec import BackboneSpec
from drl_data.synthesize_spec import ImageCall, SynthesizeSpec
from drl_data.tiny_models import save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ("a temple", "a flower in the sun", "b")
CLASSES = (3, 999, 3)
MODELS: dict[str, dict[str, object]] = {
    "dit": {"num_embeds_ada_norm": 1000},
    "pixart": {"use_additional_conditions": False},  # told of the 1024 px model only
}

Make = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    yield
    diffusers_logging.set_verbosity(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Folders of tiny random models, one for each family, made once."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family) / family
            save_tiny(family, folder, **MODELS.get(family, {}))
            if family == "stable_diffusion":  # as the hub's; 0 is refused by newer code
                change(folder / "scheduler" / "scheduler_config.json", steps_offset=1)
            made[family] = folder
        return made[family]

    return make


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def generators(n: int = 3) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + i) for i in range(n)]


def section(**fields: object) -> SynthesizeSpec:
    return SynthesizeSpec.model_validate({"url": "/nowhere", **fields})


def made_of(folder: Path, spec: SynthesizeSpec, **backbone: object) -> tuple[ImageMaker, ImageCall]:
    found = ModelFolder.find(
        BackboneSpec.model_validate({"model": str(folder), **backbone}), whole=True
    )
    call = resolve_call(found, spec)
    return load_images(found, call, "cpu"), call


def plain_pipeline(folder: Path, loader: type = DiffusionPipeline) -> DiffusionPipeline:
    """As a user loads it; frozen, as torch has other kernels for weights that want gradients."""
    pipeline = loader.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    return pipeline


def photographs(n: int = 3, side: int = 32) -> list[Image.Image]:
    photo = load_sample_image("flower.jpg")
    return [Image.fromarray(photo[40 * i : 40 * i + side, 200 : 200 + side]) for i in range(n)]


# --- against plain calls --------------------------------------------------------------------------

FAMILIES: dict[str, dict[str, object]] = {
    "stable_diffusion": {"negative_prompt": "c"},
    "sdxl": {},
    "sd3": {"negative_prompt": "c", "arguments": {"max_sequence_length": 16}},
    "flux": {"arguments": {"max_sequence_length": 16}},
    "pixart": {"arguments": {"use_resolution_binning": False}},
    "sana": {"arguments": {"use_resolution_binning": False, "complex_human_instruction": None}},
    "z_image": {"negative_prompt": "c"},
    "qwen_image": {"negative_prompt": "c"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_images_of_prompts_are_the_pipelines(family: str, model: Make) -> None:
    height, width = size = (32, 64) if family == "sana" else (16, 24)
    spec = section(prompts=PROMPTS, steps=3, size=size, guidance_scale=3, **FAMILIES[family])
    folder = model(family)
    maker, call = made_of(folder, spec)
    plain = plain_pipeline(folder)
    negative = {} if spec.negative_prompt is None else {"negative_prompt": ["c"] * 3}
    cleaned = {"clean_caption": False} if "clean_caption" in call.arguments else {}
    want = plain(
        prompt=list(PROMPTS),
        height=height,
        width=width,
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=generators(),
        output_type="pt",
        **negative,
        **cleaned,
        **spec.arguments,
    ).images
    for one in (maker, maker.replica()):
        drawn = one.draw(ImageRequest(generators(), prompts=PROMPTS))
        assert drawn.images_bchw.shape == (3, 3, *size)
        assert torch.equal(drawn.images_bchw, want)
    assert drawn.flagged == (False,) * 3
    assert float(want.std()) > 0
    assert not torch.equal(want[0], want[1])


@pytest.mark.parametrize("family", ["stable_diffusion", "sdxl", "sd3", "flux"])
def test_image_to_image_is_the_pipelines(family: str, model: Make) -> None:
    more = {k: v for k, v in FAMILIES[family].items() if k == "arguments"}
    spec = section(prompts=PROMPTS, steps=4, source={"strength": 0.5}, **more)
    folder = model(family)
    maker, call = made_of(folder, spec)
    plain = plain_pipeline(folder, AutoPipelineForImage2Image)
    assert call.pipeline == type(plain).__name__
    size = {"height": 32, "width": 32} if family in ("sd3", "flux") else {}
    want = plain(
        prompt=list(PROMPTS),
        image=photographs(),
        strength=0.5,
        num_inference_steps=4,
        generator=generators(),
        output_type="pt",
        **size,
        **spec.arguments,
    ).images
    request = ImageRequest(generators(), prompts=PROMPTS, sources=photographs(), strength=0.5)
    found = maker.draw(request).images_bchw
    assert torch.equal(found, want)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_images_of_classes_are_the_pipelines(guidance: float, model: Make) -> None:
    spec = section(classes=[3, 999], steps=3, guidance_scale=guidance)
    maker, _ = made_of(model("dit"), spec)
    plain = plain_pipeline(model("dit"))
    want = plain(
        class_labels=list(CLASSES),
        guidance_scale=guidance,
        num_inference_steps=3,
        generator=generators(),
        output_type="pt",
    ).images
    assert torch.equal(maker.draw(ImageRequest(generators(), classes=CLASSES)).images_bchw, want)


def test_the_time_of_a_dit_is_shifted_as_for_its_features(model: Make) -> None:
    spec = section(classes=[3], steps=2, guidance_scale=1)
    drawn = [
        made_of(model("dit"), spec, dit_time_shift=shift)[0]
        .draw(ImageRequest(generators(1), classes=(3,)))
        .images_bchw
        for shift in (1, 0)
    ]
    assert not torch.equal(*drawn)
    with pytest.raises(SpecError, match="dit_time_shift: UNet2DModel is no DiT"):
        made_of(model("ddpm"), section(steps=2), dit_time_shift=0)


@pytest.mark.parametrize(
    ("scheduler", "arguments"),
    [("DDPMScheduler", {}), ("DDIMScheduler", {}), ("DDIMScheduler", {"eta": 1.0})],
)
def test_images_of_a_pixel_network_are_the_pipelines(
    scheduler: str, arguments: dict[str, float], model: Make
) -> None:
    spec = section(steps=5, scheduler=scheduler, arguments=arguments)
    maker, _ = made_of(model("ddpm"), spec)
    cls = DDPMPipeline if scheduler == "DDPMScheduler" else DDIMPipeline
    plain = plain_pipeline(model("ddpm"), cls)
    want = plain(
        batch_size=3, num_inference_steps=5, generator=generators(), output_type="pt", **arguments
    ).images
    for one in (maker, maker.replica()):
        assert torch.equal(one.draw(ImageRequest(generators())).images_bchw, want)


def test_any_scheduler_gives_a_pixel_network_the_noise_that_it_wants() -> None:
    """Solvers of the same equation from the same noise give nearly the same digit, also those in
    sigmas, for which diffusers' DDPMPipeline scales nothing."""
    folder = ModelFolder.find(BackboneSpec(model="bundled:digits-ddpm"))

    def drawn(scheduler: str, **options: object) -> Tensor:
        settings = {"name": scheduler, "options": options}
        call = resolve_call(folder, section(steps=30, scheduler=settings))
        maker = load_images(folder, call, "cpu")
        return maker.draw(ImageRequest(generators(4))).images_bchw

    want = drawn("DDIMScheduler", clip_sample=False, timestep_spacing="trailing")
    for name in ("EulerDiscreteScheduler", "UniPCMultistepScheduler"):
        difference = (drawn(name, timestep_spacing="trailing") - want).abs().mean()
        assert float(difference) < 0.03, name
    assert float(want.std()) > 0.2  # ink and paper


def test_a_network_of_edm_is_sampled(model: Make) -> None:
    """Its scheduler scales input and output; against the equations of Karras et al. 2022."""
    maker, call = made_of(model("edm"), section(steps=4))
    assert call.scheduler == "EDMEulerScheduler"
    found = maker.draw(ImageRequest(generators(1))).images_bchw
    network = (
        UNet2DModel.from_pretrained(model("edm"), subfolder="unet").eval().requires_grad_(False)
    )
    scheduler = diffusers.EDMEulerScheduler.from_pretrained(model("edm"), subfolder="scheduler")
    scheduler.set_timesteps(4)
    sigmas = scheduler.sigmas
    x = torch.randn((1, 3, 16, 16), generator=generators(1)[0]) * (sigmas[0] ** 2 + 1) ** 0.5
    with torch.no_grad():
        for now, after in itertools.pairwise(sigmas):
            scale = (now**2 + 0.25) ** 0.5
            out = network(x / scale, 0.25 * torch.log(now)).sample
            clean = 0.25 / scale**2 * x + 0.5 * now / scale * out
            x = x + (after - now) * (x - clean) / now
    torch.testing.assert_close(found, (x / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)


# --- classes in pixel space -----------------------------------------------------------------------

N_CLASSES = 4


@pytest.fixture(scope="module")
def by_class(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pixel network that is told one of four classes, or the null class."""
    folder = tmp_path_factory.mktemp("by_class") / "model"
    save_tiny("ddpm", folder, num_class_embeds=N_CLASSES + 1)
    change(folder / "unet" / "config.json", _null_class=N_CLASSES)
    return folder


@pytest.mark.parametrize("guidance", [None, 1, 3.0])
def test_classes_in_pixel_space_against_a_straight_line(
    guidance: float | None, by_class: Path
) -> None:
    spec = section(classes="all", steps=4, guidance_scale=guidance, scheduler="DDIMScheduler")
    maker, call = made_of(by_class, spec)
    assert (call.n_classes, call.takes) == (N_CLASSES, "class")
    found = maker.draw(ImageRequest(generators(), classes=(0, 3, 3))).images_bchw
    network = UNet2DModel.from_pretrained(by_class, subfolder="unet").eval().requires_grad_(False)
    scheduler = DDIMScheduler.from_pretrained(by_class, subfolder="scheduler")
    scheduler.set_timesteps(4)
    x = torch.cat([torch.randn((1, 3, 16, 16), generator=g) for g in generators()])
    with torch.no_grad():
        for t in scheduler.timesteps:
            eps = network(x, t, class_labels=torch.tensor([0, 3, 3])).sample
            if guidance == 3.0:
                null = network(x, t, class_labels=torch.tensor([4, 4, 4])).sample
                eps = null + 3.0 * (eps - null)
            x = scheduler.step(eps, t, x).prev_sample
    assert torch.equal(found, (x / 2 + 0.5).clamp(0, 1))
    assert not torch.equal(found[1], found[2])  # same class, other noise


def test_an_image_does_not_depend_on_its_place_in_a_batch(by_class: Path) -> None:
    maker, _ = made_of(by_class, section(classes="all", steps=3))  # DDPM: noise at every step
    together = maker.draw(ImageRequest(generators(), classes=(0, 1, 2))).images_bchw
    turned = ImageRequest(generators()[::-1], classes=(2, 1, 0))
    torch.testing.assert_close(maker.draw(turned).images_bchw.flip(0), together)
    alone = ImageRequest(generators()[1:2], classes=(1,))
    torch.testing.assert_close(maker.draw(alone).images_bchw, together[1:2])


# --- schedulers, weights --------------------------------------------------------------------------


def test_another_scheduler_with_options(model: Make) -> None:
    options = {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"}
    scheduler = {"name": "DPMSolverMultistepScheduler", "options": options}
    spec = section(prompts=PROMPTS, steps=4, size=16, scheduler=scheduler)
    maker, call = made_of(model("stable_diffusion"), spec)
    plain = plain_pipeline(model("stable_diffusion"))
    plain.scheduler = DPMSolverMultistepScheduler.from_config(plain.scheduler.config, **options)
    want = plain(list(PROMPTS), 16, 16, 4, generator=generators(), output_type="pt").images
    assert (call.scheduler, call.guidance_scale) == ("DPMSolverMultistepScheduler", 7.5)
    assert torch.equal(maker.draw(ImageRequest(generators(), prompts=PROMPTS)).images_bchw, want)


def test_lora_and_precision_are_the_backbones(model: Make, tmp_path: Path) -> None:
    folder = model("stable_diffusion")
    spec = section(prompts=PROMPTS, steps=2, size=16)
    plain = made_of(folder, spec)[0].draw(ImageRequest(generators(), prompts=PROMPTS)).images_bchw
    lora = tmp_path / "lora.safetensors"
    down, up = torch.ones(2, 16, 3, 3), torch.randn((4, 2, 1, 1), generator=generators(1)[0])
    save_file({"unet.conv_out.lora_A.weight": down, "unet.conv_out.lora_B.weight": up}, lora)
    changed = made_of(folder, spec, lora=[{"path": str(lora), "scale": 2.0}])[0]
    found = changed.draw(ImageRequest(generators(), prompts=PROMPTS)).images_bchw
    assert float((found - plain).abs().max()) > 1e-3
    digests = {
        ModelFolder.find(BackboneSpec.model_validate({"model": str(folder), **more})).whole_digest()
        for more in ({}, {"lora": str(lora)})
    }
    assert len(digests) == 2
    half = made_of(folder, spec, dtype="bfloat16")[0]
    found = half.draw(ImageRequest(generators(), prompts=PROMPTS)).images_bchw
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain, rtol=0, atol=0.2)
    assert not torch.equal(found, plain)


def test_a_safety_checkers_verdict_is_told(model: Make, tmp_path: Path) -> None:
    folder = with_safety_checker(model("stable_diffusion"), tmp_path / "checked")
    spec = section(prompts=PROMPTS, steps=2, size=16)
    found = made_of(folder, spec)[0].draw(ImageRequest(generators(), prompts=PROMPTS))
    assert found.flagged == (True,) * 3
    assert not found.images_bchw.any()
    folders = (folder, model("stable_diffusion"))
    with_it, without = (ModelFolder.find(BackboneSpec(model=str(path))) for path in folders)
    assert with_it.digest() == without.digest()  # that of its features
    assert with_it.whole_digest() != without.whole_digest()


def with_safety_checker(folder: Path, target: Path) -> Path:
    """The same Stable Diffusion with a checker that finds everything unsafe."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    tower = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**tower, "image_size": 16, "patch_size": 8, "intermediate_size": 16}
    config = CLIPConfig(vision_config=vision, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config)
    checker.concept_embeds_weights.fill_(-2)  # a cosine above this is unsafe
    crop = {"height": 16, "width": 16}
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=crop)
    shutil.copytree(folder, target)
    checker.save_pretrained(target / "safety_checker")
    processor.save_pretrained(target / "feature_extractor")
    change(
        target / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
    )
    return target


# --- what is refused ------------------------------------------------------------------------------

REFUSED: list[tuple[str, dict[str, object], str]] = [
    ("ddpm", {"prompts": ["a"]}, "UNet2DModel is told neither prompts nor classes; .* has prompts"),
    ("ddpm", {"guidance_scale": 2}, "guidance_scale: model .* is told no class"),
    ("ddpm", {"negative_prompt": "b"}, "negative_prompt: a UNet2DModel in pixel space has none"),
    ("ddpm", {"arguments": {"eta": 1}}, "eta: DDPMScheduler takes none"),
    ("ddpm", {"size": 15}, r"size \[15, 15\]: want multiples of 2"),
    ("ddpm", {"scheduler": "FlowMatchEulerDiscreteScheduler"}, "configuration is for .*DDIMSched"),
    ("ddpm", {"scheduler": {"options": {"beta_strat": 1}}}, "no 'beta_strat'; nearest: beta_start"),
    ("dit", {"prompts": ["a"]}, "DiTPipeline is told classes; the section has prompts"),
    ("dit", {"classes": [1], "size": 32}, "size: DiTPipeline has one size, the model's"),
    ("dit", {"classes": [1], "scheduler": "EulerDiscreteScheduler"}, "begins with noise of varia"),
    ("stable_diffusion", {}, "is told prompts; the section has neither prompts nor classes"),
    ("stable_diffusion", {"prompts": ["a"], "arguments": {"x": 1}}, "takes no x; it takes clip_sk"),
    ("stable_diffusion", {"prompts": ["a"], "arguments": {"latents": 1}}, "takes no latents"),
    ("dit", {"prompts": ["a"], "source": {}}, "no image to image for DiTPipeline"),
    (
        "stable_diffusion",
        {"prompts": ["a"], "source": {"strength": 0.01}},
        "strength 0.01: less than one of the 50 steps",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("family", "fields", "message"), REFUSED)
def test_what_a_model_cannot_do_is_refused_before_its_weights_are_read(
    family: str, fields: dict[str, object], message: str, model: Make
) -> None:
    folder = ModelFolder.find(BackboneSpec(model=str(model(family))))
    with pytest.raises(SpecError, match=message):
        resolve_call(folder, section(**fields))


def test_the_null_class_of_another_dit_is_refused(tmp_path: Path) -> None:
    folder = ModelFolder.find(BackboneSpec(model=str(save_tiny("dit", tmp_path / "dit"))))
    with pytest.raises(SpecError, match=r"takes 1000 for the null class, but .* has 10 classes"):
        resolve_call(folder, section(classes=[1]))
    resolve_call(folder, section(classes=[1], guidance_scale=1))


def test_guidance_without_a_null_class_is_refused(tmp_path: Path) -> None:
    save_tiny("ddpm", tmp_path / "m", num_class_embeds=4)
    with pytest.raises(SpecError, match="trained without a null class"):
        made_of(tmp_path / "m", section(classes=[1], guidance_scale=2))


def test_numbers_of_nobodys_generator_are_refused(model: Make) -> None:
    """DiTPipeline gives its scheduler no generator; one that draws noise takes torch's own."""
    spec = section(classes=[1], steps=3, scheduler="DDPMScheduler")
    maker, _ = made_of(model("dit"), spec)
    with pytest.raises(SpecError, match="DiTPipeline with DDPMScheduler draws random numbers"):
        maker.draw(ImageRequest(generators(), classes=CLASSES))


def test_only_whole_pipelines_without_code_or_pickles(model: Make, tmp_path: Path) -> None:
    spec = section(prompts=["a"], size=16)
    shutil.copytree(model("stable_diffusion"), tmp_path / "m")
    weights = tmp_path / "m" / "text_encoder" / "model.safetensors"
    torch.save({"x": torch.ones(1)}, weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(WeightsError, match="safetensors"):
        made_of(tmp_path / "m", spec)
    change(tmp_path / "m" / "model_index.json", _class_name="MyPipeline")
    with pytest.raises(WeightsError, match="'MyPipeline' is no pipeline of diffusers"):
        made_of(tmp_path / "m", spec)
    (tmp_path / "m" / "model_index.json").unlink()
    with pytest.raises(WeightsError, match=r"no model_index\.json"):
        made_of(tmp_path / "m", spec)
    with pytest.raises(SpecError, match="init random has no images"):
        made_of(model("ddpm"), section(), init="random")
