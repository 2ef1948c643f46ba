"""Recipes on models that also classify, and on encoders of diffusion autoencoders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, ViTMAEModel

from drl_data.backbones import find_model, load_backbone
from drl_data.backbones.backbone import CLEAN
from drl_data.diffusion_spec import ConditionSpec
from drl_data.errors import SpecError, WeightsError
from drl_data.examples.diffae import SemanticEncoder
from drl_data.examples.hybvit import HybViT
from drl_data.pipeline import Pipeline
from drl_data.recipes import find_recipe
from drl_data.spec import BackboneSpec, ImageSpec, TapSpec
from tests.guided_diffusion import GuidedDiffusion
from tests.references import Rehearsed, rehearse

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_same(got: Tensor, want: Tensor) -> None:
    """To 1e-4 of their size: the same sums in another order."""
    assert got.shape == want.shape
    assert float((got - want).abs().max() / want.abs().max()) < 1e-4


@torch.no_grad()
def test_jdm_cifar10(tmp_path: Path) -> None:
    run = rehearse("jdm_cifar10", tmp_path)
    network = GuidedDiffusion.load(run.model)
    network(run.pixels(), torch.zeros(4))
    names = [*(f"input_blocks.{i}" for i in range(16)), "middle_block"]
    assert [array.name for array in run.store.arrays] == names
    clean = {name: network.outputs[name].mean((2, 3)) for name in names}
    for name, want in clean.items():
        assert_same(run.features(name), want)
    assert sum(v.shape[1] for v in clean.values()) == 29 * 32
    network(run.pixels(), torch.full((4,), 50))
    told = network.outputs["middle_block"].mean((2, 3))
    assert (run.features("middle_block") - told).abs().max() > 1e-2


def semantic(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """DiffAE's encoder of two blocks a level, as a function of its state dict."""

    def norm(name: str, x: Tensor) -> Tensor:
        weight = weights[f"{name}.weight"]
        return F.group_norm(x, min(32, len(weight)), weight, weights[f"{name}.bias"])

    def conv(name: str, x: Tensor) -> Tensor:
        kernel = weights[f"{name}.weight"]
        return F.conv2d(x, kernel, weights[f"{name}.bias"], padding=kernel.shape[-1] // 2)

    def block(name: str, x: Tensor, *, down: bool) -> Tensor:
        h = F.silu(norm(f"{name}.in_layers.0", x))
        if down:
            h, x = (y.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)) for y in (h, x))
        skip = f"{name}.skip_connection"
        x = conv(skip, x) if f"{skip}.weight" in weights else x
        return x + conv(f"{name}.in_layers.2", h)

    def attention(name: str, x: Tensor) -> Tensor:
        flat = norm(f"{name}.norm", x.flatten(2))
        qkv = F.conv1d(flat, weights[f"{name}.qkv.weight"], weights[f"{name}.qkv.bias"])
        q, k, v = qkv.chunk(3, 1)
        share = torch.softmax(q.transpose(1, 2) @ k / q.shape[1] ** 0.5, dim=2)
        proj = f"{name}.proj_out"
        out = F.conv1d(
            v @ share.transpose(1, 2), weights[f"{proj}.weight"], weights[f"{proj}.bias"]
        )
        return x + out.reshape(x.shape)

    n_blocks = 1 + max(int(k.split(".")[1]) for k in weights if k.startswith("input_blocks"))
    x = conv("input_blocks.0.0", x)
    for i in range(1, n_blocks):
        x = block(f"input_blocks.{i}.0", x, down=i % 3 == 0)
        if f"input_blocks.{i}.1.qkv.weight" in weights:
            x = attention(f"input_blocks.{i}.1", x)
    x = block("middle_block.0", x, down=False)
    x = block("middle_block.2", attention("middle_block.1", x), down=False)
    return conv("out.3", F.silu(norm("out.0", x)).mean((2, 3), keepdim=True)).flatten(1)


@torch.no_grad()
def test_diffae_ffhq256(tmp_path: Path) -> None:
    run = rehearse("diffae_ffhq256", tmp_path)
    assert run.pipeline.backbone is not None
    network = load_backbone(find_model(run.pipeline.backbone), "cpu").network
    pixels = run.pixels(Image.Resampling.BILINEAR)
    assert "input_blocks.4.1.qkv.weight" in network.state_dict()  # 16 x 16 attends
    assert "input_blocks.7.1.qkv.weight" not in network.state_dict()  # 8 x 8 does not
    assert_same(run.features("z_sem"), semantic(network.state_dict(), pixels))
    assert run.features("z_sem").shape == (4, 16)
    (when,) = run.store.times
    assert (when.alpha, when.sigma) == (1, 0)


@torch.no_grad()
def test_diffae_loads_the_authors_checkpoint(tmp_path: Path) -> None:
    """`ema_model.encoder.*` of a state dict that holds the whole autoencoder, twice."""
    torch.manual_seed(7)
    state = SemanticEncoder(32, 32, (1, 1, 2), n_out=16).state_dict()
    path = tmp_path / "diffae.safetensors"
    save_file(
        {f"ema_model.encoder.{k}": v for k, v in state.items()}
        | {f"model.encoder.{k}": torch.zeros_like(v) for k, v in state.items()}
        | {"ema_model.input_blocks.0.0.weight": torch.zeros(1)},
        path,
    )
    model = "python:drl_data.examples.diffae:tiny"
    run = rehearse(
        "diffae_ffhq256", tmp_path / "run", backbone=BackboneSpec(model=model, weights=str(path))
    )
    assert_same(run.features("z_sem"), semantic(state, run.pixels(Image.Resampling.BILINEAR)))


@torch.no_grad()
def test_diffmae(tmp_path: Path) -> None:
    """To 1e-5, as pixels are scaled in other steps. With mask_ratio 0 and `noise` in order, ViTMAE
    drops and moves no patch."""
    run = rehearse("diffmae", tmp_path)
    network = ViTMAEModel.from_pretrained(run.model, mask_ratio=0.0).eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (run.pixels() + 1) / 2
    pixels = (pixels - mean[:, None, None]) / std[:, None, None]
    order = torch.arange(16.0).expand(4, -1)
    tokens = network(pixel_values=pixels, noise=order).last_hidden_state
    torch.testing.assert_close(run.features("cls"), tokens[:, 0], atol=1e-5, rtol=1e-5)
    patches = tokens[:, 1:].transpose(1, 2).reshape(4, 32, 4, 4)
    torch.testing.assert_close(run.features("patches"), patches, atol=1e-5, rtol=1e-5)


def vit(weights: dict[str, Tensor], pixels: Tensor, heads: int) -> Tensor:
    """Tokens of HybViT's last block, as a function of its state dict: pre-norm blocks."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    side = pixels.shape[-1] // 4
    rows = [  # each patch row-major, its pixels row-major with the colors innermost
        pixels[:, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].permute(0, 2, 3, 1).flatten(1)
        for i in range(side)
        for j in range(side)
    ]
    x = linear("to_patch_embedding.1", torch.stack(rows, 1))
    x = torch.cat([weights["cls_token"].expand(len(x), -1, -1), x], 1) + weights["pos_embedding"]
    for i in range(2):
        at = f"transformer.layers.{i}"
        q, k, v = linear(f"{at}.0.fn.to_qkv", norm(f"{at}.0.norm", x)).chunk(3, 2)
        width = q.shape[2] // heads
        mixed = []
        for h in range(heads):
            qh, kh, vh = (y[..., h * width : (h + 1) * width] for y in (q, k, v))
            mixed.append(torch.softmax(qh @ kh.transpose(1, 2) / width**0.5, 2) @ vh)
        x = x + linear(f"{at}.0.fn.to_out.0", torch.cat(mixed, 2))
        h1 = F.gelu(linear(f"{at}.1.fn.net.0", norm(f"{at}.1.norm", x)))
        x = x + linear(f"{at}.1.fn.net.3", h1)
    return x


@torch.no_grad()
def test_hybvit_cifar10(tmp_path: Path) -> None:
    run = rehearse("hybvit_cifar10", tmp_path)
    assert run.pipeline.backbone is not None
    weights = load_backbone(find_model(run.pipeline.backbone), "cpu").network.state_dict()
    tokens = vit(weights, run.pixels(), heads=4)
    assert_same(run.features("cls"), tokens[:, 0])
    assert_same(run.features("patches"), tokens[:, 1:].transpose(1, 2).reshape(4, 32, 4, 4))


def test_hybvit_loads_a_diffusion_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(2)
    state = HybViT(16, 32, 2, 4, 10).state_dict()
    path = tmp_path / "hybvit.safetensors"
    buffers = {"betas": torch.zeros(1000)}
    save_file({f"denoise_fn.{k}": v for k, v in state.items()} | buffers, path)
    spec = BackboneSpec(model="python:drl_data.examples.hybvit:tiny", weights=str(path))
    loaded = load_backbone(find_model(spec), "cpu").network.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in loaded.items())


def test_checkpoints_say_what_is_wrong(tmp_path: Path) -> None:
    def load(**changes: object) -> None:
        model = "python:drl_data.examples.diffae:tiny"
        load_backbone(find_model(BackboneSpec.model_validate({"model": model, **changes})), "cpu")

    with pytest.raises(SpecError, match=r"reads its weights from backbone\.weights; give"):
        load()
    path = tmp_path / "other.safetensors"
    save_file({"ema_model.encoder.out.0.weight": torch.zeros(3)}, path)
    with pytest.raises(WeightsError, match=r"does not fit SemanticEncoder: missing: .*other shape"):
        load(weights=str(path))
    with pytest.raises(WeightsError, match="want a safetensors file"):
        load(weights=str(tmp_path / "none.safetensors"))
    with pytest.raises(SpecError, match="multiples of 4"):
        rehearse("diffae_ffhq256", tmp_path / "run", images=ImageSpec(size=30))


def test_z_sem_of_the_published_encoders_has_512_numbers() -> None:
    sizes = {"ffhq256": (256, 4), "ffhq128": (128, 4), "celeba64": (64, 4)}
    for factory, (side, last) in sizes.items():
        spec = BackboneSpec(model=f"python:drl_data.examples.diffae:{factory}", init="random")
        backbone = load_backbone(find_model(spec), "meta")
        taps = backbone.resolve([TapSpec(path="out"), TapSpec(path="middle_block")])
        arrays = backbone.arrays(taps, ImageSpec(size=side), ConditionSpec(), CLEAN, "float32")
        assert [array.shape for array in arrays] == [(512,), (512, last, last)]


def planned(name: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a recipe's arrays with its real model, without weights."""
    recipe = Pipeline.load(find_recipe(name))
    assert recipe.backbone is not None
    backbone = load_backbone(find_model(recipe.backbone, structure_only=True), "meta")
    taps = backbone.resolve(recipe.taps)
    arrays = backbone.arrays(taps, recipe.images, recipe.condition, CLEAN, recipe.features.dtype)
    return {array.name: array.shape for array in arrays}


def test_joint_diffusion_has_its_29_times_the_width() -> None:
    shapes = planned("jdm_cifar10")
    assert sum(channels for (channels,) in shapes.values()) == 29 * 128
    assert len(shapes) == 17


def attended(weights: dict[str, Tensor], name: str, x: Tensor, heads: int) -> Tensor:
    """guided-diffusion's attention, whose channels are heads of (q, k, v)."""
    b, c, h, w = x.shape
    flat = x.reshape(b, c, h * w)
    normed = F.group_norm(flat, 32, weights[f"{name}.norm.weight"], weights[f"{name}.norm.bias"])
    qkv = F.conv1d(normed, weights[f"{name}.qkv.weight"], weights[f"{name}.qkv.bias"])
    q, k, v = qkv.reshape(b * heads, 3 * c // heads, h * w).split(c // heads, dim=1)
    weight = (torch.einsum("bct,bcs->bts", q, k) / (c // heads) ** 0.5).softmax(-1)
    out = torch.einsum("bts,bcs->bct", weight, v).reshape(b, c, h * w)
    out = F.conv1d(out, weights[f"{name}.proj_out.weight"], weights[f"{name}.proj_out.bias"])
    return x + out.reshape(x.shape)


@torch.no_grad()
def test_pdae_ffhq128(tmp_path: Path) -> None:
    run = rehearse("pdae_ffhq128", tmp_path)
    assert run.pipeline.backbone is not None
    weights = load_backbone(find_model(run.pipeline.backbone), "cpu").network.state_dict()
    x = run.pixels()
    for i in (0, 3, 6, 10, 13):
        name = f"encoder.{i}"
        x = F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=2, padding=1)
        if i == 6:
            x = attended(weights, "encoder.7", x, 4)
        norm = f"encoder.{i + (2 if i == 6 else 1)}"
        x = F.silu(F.group_norm(x, 32, weights[f"{norm}.weight"], weights[f"{norm}.bias"]))
    z = F.linear(x.flatten(1), weights["encoder.17.weight"], weights["encoder.17.bias"])
    assert_same(run.features("z"), z)
    real = BackboneSpec(model="python:drl_data.examples.pdae:ffhq128", init="random")
    full = load_backbone(find_model(real), "meta").network.state_dict()
    assert full["encoder.17.weight"].shape == (512, 4096)
    assert full["encoder.7.qkv.weight"].shape == (768, 256, 1)


@torch.no_grad()
def test_infodiffusion_celeba64(tmp_path: Path) -> None:
    run = rehearse("infodiffusion_celeba64", tmp_path)
    assert run.pipeline.backbone is not None
    w = load_backbone(find_model(run.pipeline.backbone), "cpu").network.state_dict()

    attends = {name.split(".attn")[0] for name in w if ".attn." in name}
    assert attends == {f"downblocks.{i}" for i in (6, 7)} | {"middleblocks.0"} | {
        f"upblocks.{i}" for i in (4, 5, 6)
    }  # the third of four levels, and the middle

    def conv(name: str, x: Tensor, **options: int) -> Tensor:
        return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], **options)

    def normed(name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"])

    def block(name: str, x: Tensor) -> Tensor:
        h = conv(f"{name}.block1.2", F.silu(normed(f"{name}.block1.0", x)), padding=1)
        h = conv(f"{name}.block2.3", F.silu(normed(f"{name}.block2.0", h)), padding=1)
        x = h + (conv(f"{name}.shortcut", x) if f"{name}.shortcut.weight" in w else x)
        if f"{name}.attn.proj.weight" not in w:
            return x
        h = normed(f"{name}.attn.group_norm", x)
        q, k, v = (conv(f"{name}.attn.proj_{c}", h).flatten(2) for c in "qkv")
        share = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(-1)
        return x + conv(f"{name}.attn.proj", (v @ share.transpose(1, 2)).reshape(x.shape))

    h = conv("head", run.pixels(), padding=1)
    skips = [h]
    for i in range(11):  # 4 levels of 2 blocks, 3 changes of resolution
        name = f"downblocks.{i}"
        down = f"{name}.main.weight" in w
        h = conv(f"{name}.main", h, stride=2, padding=1) if down else block(name, h)
        skips.append(h)
    for i in range(2):
        h = block(f"middleblocks.{i}", h)
    for i in range(15):
        name = f"upblocks.{i}"
        if f"{name}.main.weight" in w:
            wide = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
            h = conv(f"{name}.main", wide, padding=1)
        else:
            h = block(name, torch.cat([h, skips.pop()], 1))
    assert not skips
    h = conv("tail.2", F.silu(normed("tail.0", h)), padding=1).flatten(1)
    a = F.linear(h, w["fc_a.weight"], w["fc_a.bias"])
    assert_same(run.features("a"), a)
    assert_same(run.features("mean"), F.linear(a, w["fc_mu.weight"], w["fc_mu.bias"]))
    real = BackboneSpec(model="python:drl_data.examples.infodiffusion:celeba64", init="random")
    full = load_backbone(find_model(real), "meta").network.state_dict()
    assert full["fc_a.weight"].shape == (32, 64 * 64)
    assert full["downblocks.0.block1.2.weight"].shape == (64, 64, 3, 3)
    assert full["middleblocks.0.block1.2.weight"].shape == (128, 128, 3, 3)


def normalised(run: Rehearsed, size: int, corner: int) -> Tensor:
    """Scaled to `size`, cut from `corner`, 0..1, then ImageNet's mean and deviation."""
    side = run.pipeline.images.size[0]
    sized = [p.image.resize((size, size), Image.Resampling.BICUBIC) for p in run.photos]
    end = corner + side
    cut = np.stack([np.asarray(image)[corner:end, corner:end] for image in sized])
    x = torch.from_numpy(cut).permute(0, 3, 1, 2).contiguous().float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (x - mean[:, None, None]) / std[:, None, None]


@torch.no_grad()
def test_soda(tmp_path: Path) -> None:
    run = rehearse("soda", tmp_path)
    network = AutoModel.from_pretrained(run.model).eval()
    pooled = network(normalised(run, 32, 0)).pooler_output.flatten(1)
    assert_same(run.features("pooled"), pooled)


def check_vit(run: Rehearsed) -> None:
    network = AutoModel.from_pretrained(run.model).eval()
    tokens = network(normalised(run, 18, 1)).last_hidden_state[:, 1:]
    assert_same(run.features("pooled"), tokens.mean(1))
    assert_same(run.features("patches"), tokens.transpose(1, 2).reshape(4, 32, 4, 4))


@torch.no_grad()
def test_addp(tmp_path: Path) -> None:
    check_vit(rehearse("addp", tmp_path))


@torch.no_grad()
def test_l_dae(tmp_path: Path) -> None:
    check_vit(rehearse("l_dae", tmp_path))
