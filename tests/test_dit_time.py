"""The sinusoids that tell DiT the time: diffusers' shift of 1, and the original's of 0."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from drl_data.backbones import find_model, load_backbone
from drl_data.diffusion_spec import ConditionSpec, ScheduleSpec
from drl_data.errors import SpecError
from drl_data.spec import BackboneSpec, TapSpec
from drl_data.tiny_models import save_tiny_ddpm, save_tiny_dit

TIME_EMBEDDING = "transformer_blocks.*.norm1.emb.time_proj"


def original_embedding(t: float) -> Tensor:
    """[256]: cosines, then sines, of t exp(-ln(10000) i / 128), in double precision; DiT,
    models.py, `TimestepEmbedder` (Peebles and Xie 2023)."""
    angles = [t * math.exp(-math.log(10000) * i / 128) for i in range(128)]
    return torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles])


def features(model: Path, shift: int) -> dict[str, Tensor]:
    spec = BackboneSpec(model=str(model), dit_time_shift=shift)
    backbone = load_backbone(find_model(spec), "cpu")
    (time,) = backbone.schedule.resolve(ScheduleSpec(timesteps=(121,)))
    taps = backbone.resolve([TapSpec(path=TIME_EMBEDDING), TapSpec(path="transformer_blocks.2")])
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return backbone.tap(
            x, time, backbone.conditioning(ConditionSpec()), taps, lambda _, x, dims: x.clone()
        )


def test_with_shift_0_every_block_is_told_the_time_as_the_original_says(tmp_path: Path) -> None:
    model = save_tiny_dit(tmp_path / "dit")
    diffusers_own, original = features(model, 1), features(model, 0)
    want = original_embedding(121).expand(2, -1)
    embeddings = [name for name in original if "time_proj" in name]
    assert len(embeddings) == 3
    for name in embeddings:
        torch.testing.assert_close(original[name], want, atol=3e-5, rtol=0)
        assert (diffusers_own[name] - want).abs().max() > 0.1
    difference = original["transformer_blocks.2"] - diffusers_own["transformer_blocks.2"]
    assert difference.abs().max() > 1e-3


def test_the_switch_is_content_and_its_default_is_diffusers_own(tmp_path: Path) -> None:
    model = save_tiny_dit(tmp_path / "dit")

    def digest(**changes: object) -> str:
        return find_model(BackboneSpec(model=str(model), **changes)).digest()

    assert digest() == digest(dit_time_shift=1) != digest(dit_time_shift=0)


def test_another_family_has_no_such_switch(tmp_path: Path) -> None:
    model = save_tiny_ddpm(tmp_path / "ddpm")
    with pytest.raises(SpecError, match="UNet2DModel is no DiT; leave it out"):
        load_backbone(find_model(BackboneSpec(model=str(model), dit_time_shift=0)), "meta")
