"""Recipes of Stable Diffusion fused with DINOv2 (sd-dino, GeoAware-SC, Diff3F), and ODISE."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModel

from tests.references import Rehearsed, hooked, hooked_inputs, rehearse
from tests.references_sd import PlainSd, shared_noise

pytestmark = pytest.mark.usefixtures("one_thread")


def padded(run: Rehearsed, *, mirrored: bool = False) -> Tensor:
    """As sd-dino pads: the longer side by LANCZOS, on black, uint8 [4, 3, h, w] (the photographs
    are square, so that the shorter side of the target is what they are resized to)."""
    height, width = run.pipeline.images.size
    side = min(height, width)
    canvas = np.zeros((len(run.photos), height, width, 3), np.uint8)
    top, left = (height - side) // 2, (width - side) // 2
    for i, photo in enumerate(run.photos):
        small = photo.image.resize((side, side), Image.Resampling.LANCZOS)
        canvas[i, top : top + side, left : left + side] = np.array(small)
    if mirrored:
        canvas = canvas[:, :, ::-1].copy()
    return torch.from_numpy(canvas).permute(0, 3, 1, 2).contiguous()


def sd_dino(name: str, folder: Path, t: int, views: tuple[bool, ...]) -> None:
    """What the modules before each concatenation put out is what enters it as hidden state."""
    run = rehearse(name, folder)
    sd = PlainSd(run)
    before = {
        "s5": "up_blocks.0.resnets.1",  # the coarsest level has no attention
        "s4": "up_blocks.1.attentions.1",
        "s3": "up_blocks.2.attentions.1",
    }
    kept = hooked(sd.unet, *before.values())
    joined = hooked_inputs(sd.unet, *(f"up_blocks.{i}.resnets.2" for i in range(3)))
    for view, mirrored in enumerate(views):
        pixels = padded(run, mirrored=mirrored).float() / 255 * 2 - 1
        latents = sd.mean(pixels)
        sd.forward(latents, shared_noise(latents, seed=42, base=64), t)
        for i, (array, path) in enumerate(before.items()):
            got = torch.tensor(run.store.read_unit(array, 0, run.store.units[0], view))
            found = kept[path]
            want = found[0] if isinstance(found, tuple) else found
            assert isinstance(want, Tensor)
            assert torch.equal(got, want)
            # ODISE's tap of the same block, with the skip, is another tensor.
            whole = joined[f"up_blocks.{i}.resnets.2"][0]
            assert isinstance(whole, Tensor)
            assert whole.shape[1] > got.shape[1]
            assert torch.equal(whole[:, : got.shape[1]], got)


@torch.no_grad()
def test_sd_dino_sd15(tmp_path: Path) -> None:
    sd_dino("sd_dino_sd15", tmp_path, 100, (False,))


@torch.no_grad()
def test_geoaware_sd15(tmp_path: Path) -> None:
    sd_dino("geoaware_sd15", tmp_path, 50, (False, True))


IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]


def dinov2(run: Rehearsed, pixels: Tensor, *, normed: bool) -> Tensor:
    """Patch tokens of the last block as a map, of uint8 pixels [4, 3, h, w]."""
    network = AutoModel.from_pretrained(run.model).eval()
    x = (pixels.float() / 255 - IMAGENET[0]) / IMAGENET[1]
    out = network(pixel_values=x, output_hidden_states=True)
    tokens = out.last_hidden_state if normed else out.hidden_states[-1]
    patch = network.config.patch_size
    h, w = pixels.shape[2] // patch, pixels.shape[3] // patch
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (h, w))


@torch.no_grad()
def test_sd_dino_dinov2(tmp_path: Path) -> None:
    run = rehearse("sd_dino_dinov2", tmp_path)
    assert torch.equal(run.features("tokens"), dinov2(run, padded(run), normed=False))
    assert not torch.allclose(run.features("tokens"), dinov2(run, padded(run), normed=True))


@torch.no_grad()
def test_geoaware_dinov2(tmp_path: Path) -> None:
    run = rehearse("geoaware_dinov2", tmp_path)
    for view, mirrored in enumerate((False, True)):
        got = torch.tensor(run.store.read_unit("tokens", 0, run.store.units[0], view))
        assert torch.equal(got, dinov2(run, padded(run, mirrored=mirrored), normed=False))


@torch.no_grad()
def test_diff3f_dinov2(tmp_path: Path) -> None:
    run = rehearse("diff3f_dinov2", tmp_path)
    side = run.pipeline.images.size[0]
    sized = [p.image.resize((side, side), Image.Resampling.BILINEAR) for p in run.photos]
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in sized])
    pixels = pixels.permute(0, 3, 1, 2).contiguous()
    assert torch.equal(run.features("tokens"), dinov2(run, pixels, normed=True))


@torch.no_grad()
def test_odise_sd13(tmp_path: Path) -> None:
    run = rehearse("odise_sd13", tmp_path)
    sd = PlainSd(run)
    # ODISE counts the resnets of the VAE: two a level going down, three a level going up.
    down = [r for block in sd.vae.encoder.down_blocks for r in block.resnets]
    up = [r for block in sd.vae.decoder.up_blocks for r in block.resnets]
    wanted = {"encoder5": down[5], "encoder7": down[7], "decoder2": up[2], "decoder5": up[5]}
    inputs: dict[str, Tensor] = {}
    for array, module in wanted.items():
        module.register_forward_pre_hook(
            lambda _m, args, array=array: inputs.update({array: args[0].clone()})
        )
    joined = hooked_inputs(sd.unet, *(f"up_blocks.{i}.resnets.2" for i in range(4)))
    before = hooked(sd.unet, "up_blocks.0.resnets.1")
    latents = sd.mean(run.pixels())
    sd.forward(latents, shared_noise(latents, seed=42, base=64), 0)
    sd.vae.decode(latents / sd.vae.config.scaling_factor)
    for array, want in inputs.items():
        assert torch.equal(run.features(array), want)
    for i, array in enumerate(("unet2", "unet5", "unet8", "unet11")):
        assert torch.equal(run.features(array), joined[f"up_blocks.{i}.resnets.2"][0])
    # sd-dino's tap of the same block, without the skip, is another tensor.
    hidden = before["up_blocks.0.resnets.1"]
    assert isinstance(hidden, Tensor)
    assert run.features("unet2").shape[1] == 2 * hidden.shape[1]
    assert torch.equal(run.features("unet2")[:, : hidden.shape[1]], hidden)
