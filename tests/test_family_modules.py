"""What every family shares, of the families with text: modules, outputs, names of tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from drl_data.backbones import Backbone, ModelFolder, find_model, load_backbone
from drl_data.backbones.bundles import bundle_names
from drl_data.backbones.inventory import tappable_modules
from drl_data.backbones.joint import pack, position_ids, unpack
from drl_data.diffusion_spec import ConditionSpec, ScheduleSpec
from drl_data.errors import SpecError, TapError
from drl_data.pipeline import Pipeline
from drl_data.runs import extract, prepare
from drl_data.spec import BackboneSpec, ImageSpec, TapSpec
from drl_data.testing import write_photo_tars
from drl_data.tiny_models import (
    save_tiny_flux,
    save_tiny_pixart,
    save_tiny_qwen_image,
    save_tiny_sana,
    save_tiny_sd3,
    save_tiny_sdxl,
    save_tiny_stable_diffusion,
    save_tiny_z_image,
)

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = ImageSpec(size=(16, 24))
MAKERS: dict[str, Callable[..., Path]] = {
    "sdxl": save_tiny_sdxl,
    "pixart": save_tiny_pixart,
    "sana": save_tiny_sana,
    "sd3": save_tiny_sd3,
    "flux": save_tiny_flux,
    "z_image": save_tiny_z_image,
    "qwen_image": save_tiny_qwen_image,
}
BLOCKS = dict.fromkeys(MAKERS, "transformer_blocks") | {"z_image": "layers"}
WITH_TEXT = (
    "FLUX.1-dev",
    "PixArt-XL-2-1024-MS",
    "SSD-1B",
    "stable-diffusion-3-medium",
    "stable-diffusion-xl-base-1.0",
)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny model folder of each family."""
    root = tmp_path_factory.mktemp("modules")
    return {name: make(root / name) for name, make in MAKERS.items()}


def load(path: Path, device: str) -> Backbone:
    return load_backbone(ModelFolder.find(BackboneSpec(model=str(path))), device)


def time_of(backbone: Backbone, t: float) -> ScheduleSpec:
    return ScheduleSpec(convention="flow", timesteps=(t,))


@pytest.mark.parametrize("family", ["sana", "sd3", "flux", "z_image", "qwen_image"])
def test_the_inventory_shows_what_a_tap_gives(models: dict[str, Path], family: str) -> None:
    meta = load(models[family], "meta")
    modules = {m.path: m for m in meta.modules(IMAGES, ConditionSpec())}
    taps = meta.resolve([TapSpec(path=f"{BLOCKS[family]}.*")])
    (time,) = meta.schedule.resolve(time_of(meta, 0.5))
    arrays = meta.arrays(taps, IMAGES, ConditionSpec(), time, "float32")
    for array in arrays:
        module = modules[array.name]
        assert (module.dims, module.shape) == (array.dims, array.shape)
        assert module.dims == ("channel", "height", "width")


@pytest.mark.parametrize("family", MAKERS)
def test_tokens_by_name_are_refused_where_they_have_none(
    models: dict[str, Path], family: str
) -> None:
    meta = load(models[family], "meta")
    block = "mid_block" if family == "sdxl" else f"{BLOCKS[family]}.0"
    taps = meta.resolve([TapSpec(path=f"{block}@out.cls")])
    convention = "ddpm_index" if family in ("sdxl", "pixart") else "flow"
    (time,) = meta.schedule.resolve(ScheduleSpec(convention=convention, timesteps=(0,)))
    with pytest.raises(TapError, match="no tokens named 'cls'"):
        meta.arrays(taps, IMAGES, ConditionSpec(), time, "float32")


def test_unpack_is_diffusers_and_the_inverse_of_pack() -> None:
    x = torch.randn(2, 16, 8, 12)
    tokens = pack(x)
    assert torch.equal(unpack(tokens, 4, 6), x)
    assert torch.equal(FluxPipeline._unpack_latents(tokens, 64, 96, 8), x)


@torch.no_grad()
def test_fluxs_output_is_an_image(models: dict[str, Path]) -> None:
    backbone = load(models["flux"], "cpu")
    x = torch.randn(2, 16, 8, 12, generator=torch.Generator().manual_seed(1))
    (time,) = backbone.schedule.resolve(time_of(backbone, 0.26))
    told = backbone.conditioning(ConditionSpec())
    got, captured = backbone.denoise(x, time, told, (), lambda _tap, value, _dims: value)
    network = FluxTransformer2DModel.from_pretrained(models["flux"] / "transformer").eval()
    kwargs = told.expand(2)
    (tokens,) = network(
        pack(x),
        timestep=torch.full((2,), time.model_time),
        img_ids=position_ids(4, 6, torch.device("cpu")),
        txt_ids=torch.zeros(kwargs["encoder_hidden_states"].shape[1], 3),
        **kwargs,
        return_dict=False,
    )
    assert got.shape == x.shape
    assert not captured
    assert torch.equal(got, FluxPipeline._unpack_latents(tokens, 64, 96, 8))


@pytest.mark.parametrize("name", WITH_TEXT)
def test_bundled_configurations_have_an_adapter(name: str) -> None:
    assert name in bundle_names()
    inventory = tappable_modules(BackboneSpec(model=f"bundled:{name}"))
    assert inventory.n_parameters > 5e8
    assert inventory.flops > 1e11
    paths = {module.path for module in inventory.modules}
    assert paths & {"mid_block", "transformer_blocks.0"}


EIGHTFOLD = {"block_out_channels": [8] * 4, "down_block_types": ["DownEncoderBlock2D"] * 4,
             "up_block_types": ["UpDecoderBlock2D"] * 4}  # fmt: skip
FULL_SIZE = {
    # "6B" in the title of Z-Image's model card, "20B" in that of Qwen-Image
    "z_image": ("ZImageTransformer2DModel", EIGHTFOLD, 6.15e9, (3840, 32, 64)),
    "qwen_image": (
        "QwenImageTransformer2DModel",
        {"dim_mult": [1, 2, 4, 4], "temperal_downsample": [False, True, True]},
        20.43e9,
        (3072, 32, 64),
    ),
}


@pytest.mark.parametrize("family", FULL_SIZE)
def test_families_without_a_bundle_at_their_full_size(
    models: dict[str, Path], tmp_path: Path, family: str
) -> None:
    """diffusers' defaults are the published networks; only the text encoder stays tiny."""
    class_name, vae, n_parameters, shape = FULL_SIZE[family]
    copy = Path(shutil.copytree(models[family], tmp_path / family))
    config = json.dumps({"_class_name": class_name})
    (copy / "transformer" / "config.json").write_text(config)
    path = copy / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | vae))
    meta = load(copy, "meta")
    assert sum(p.numel() for p in meta.network.parameters()) == pytest.approx(n_parameters, 1e-3)
    (time,) = meta.schedule.resolve(time_of(meta, 0.5))
    taps = meta.resolve([TapSpec(path=f"{BLOCKS[family]}.20"), TapSpec(path="v")])
    block, v = meta.arrays(taps, ImageSpec(size=(512, 1024)), ConditionSpec(), time, "float16")
    assert (block.dims, block.shape) == (("channel", "height", "width"), shape)
    assert v.shape == (16, 64, 128)


def test_other_weights_for_a_model_of_python_code_are_refused() -> None:
    model = "python:tests.custom_backbones:joint_model"
    for changes in ({"weights": "w.safetensors"}, {"lora": "l.safetensors"}):
        spec = BackboneSpec.model_validate({"model": model, **changes})
        with pytest.raises(SpecError, match=r"joint_model' loads its weights itself"):
            find_model(spec).digest()


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six samples, whose captions are `a temple` and `a flower` in turn."""
    return write_photo_tars(tmp_path_factory.mktemp("photos"), n_samples=6, n_tars=1, size=16)


def inversion(photos: Path, model: Path, store: Path, **condition: object) -> Pipeline:
    return Pipeline.parse(
        {
            "name": "inversion",
            "dataset": {"tars": str(photos / "*.tar")},
            "images": {"size": 16},
            "backbone": {"model": str(model)},
            "condition": condition,
            "schedule": {
                "convention": "generation_label",
                "timesteps": [1, 3],
                "n_steps": 4,
                "scheduler": "DDIMScheduler",
            },
            "noise": {"kind": "inversion"},
            "taps": ["**.attn1.to_q"],
            "features": {"dtype": "float32", "batch_size": 4, "rows_per_unit": 4},
            "store": {"url": str(store)},
        }
    )


def test_an_inversion_tells_each_sample_its_own_text(photos: Path, tmp_path: Path) -> None:
    model = save_tiny_stable_diffusion(tmp_path / "sd")

    def rows(name: str, **condition: object) -> np.ndarray:
        store = extract(inversion(photos, model, tmp_path / name, **condition)).store
        units, array = store.units, store.arrays[-1].name
        return np.stack(
            [np.concatenate([store.read_unit(array, t, u) for u in units]) for t in range(2)], 1
        )

    mixed = rows("mixed", caption=True)
    for label, prompt in enumerate(["a temple", "a flower"]):
        alone = rows(f"only{label}", prompt=prompt)
        np.testing.assert_array_equal(mixed[label::2], alone[label::2])
        assert not np.array_equal(mixed[1 - label :: 2], alone[1 - label :: 2])


def test_flops_of_conditions_that_differ_are_those_of_one(photos: Path, tmp_path: Path) -> None:
    model = save_tiny_stable_diffusion(tmp_path / "sd")
    one, other = (
        prepare(inversion(photos, model, tmp_path / "s", **told)).flops()
        for told in ({"template": "a {label}"}, {"prompt": "a cat"})
    )
    assert one == other
    assert one.whole > one.cut > 0
