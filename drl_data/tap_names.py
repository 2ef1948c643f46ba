"""Other projects' names of the tensors inside a UNet, as taps.

    cleandift:us6                                    CleanDIFT (recipes.md 3A)
    gdf:up-level1-repeat1-vit-block0-cross-q         Generic Diffusion Feature
    ldm:output_blocks.4, ldm:output_blocks.8@in      CompVis' latent-diffusion, SD 1 and 2
    ldmxl:output_blocks.4                            the same numbering of SDXL

A pipeline may write them as they are; the store records what they resolve to.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from drl_data.errors import TapError
from drl_data.spec import TapSpec

OF_THE_FIRST = ("in", "pre_concat", "skip", "pre_residual")
"""Sites of a block of another numbering that its first module has, not its last one."""

CLEANDIFT: Mapping[str, str] = {
    "mid": "mid_block",
    "us1": "up_blocks.0.resnets.0",
    "us2": "up_blocks.0.resnets.1",
    "us3": "up_blocks.0.upsamplers.0",
    "us4": "up_blocks.1.attentions.0",
    "us5": "up_blocks.1.attentions.1",
    "us6": "up_blocks.1.upsamplers.0",
    "us7": "up_blocks.2.attentions.0",
    "us8": "up_blocks.2.attentions.1",
    "us9": "up_blocks.2.upsamplers.0",
    "us10": "up_blocks.3.attentions.0",
}
"""Checked against the authors' extractor with their weights: 0.0 difference (recipes.md 8)."""


class Around(NamedTuple):
    """The modules whose output and whose input a block of another numbering has."""

    out: str
    into: str


def ldm_blocks(n_levels: int, attention_levels: frozenset[int]) -> dict[str, Around]:
    """Blocks of an `openaimodel.UNetModel` with two resnets a level, by their names there.

    Each `input_blocks` entry after the first and each `output_blocks` entry is a resnet, then an
    attention at `attention_levels` (0 is the finest), or the resampling between two levels, which
    on the way up is part of the last entry of a level.
    """
    same = {"input_blocks.0": "conv_in", "middle_block": "mid_block"}
    for i, name in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        same[f"middle_block.{i}"] = f"mid_block.{name}"
    blocks = {theirs: Around(ours, ours) for theirs, ours in same.items()}
    for level in range(n_levels):
        kind = "attentions" if level in attention_levels else "resnets"
        for i in range(2):
            at = f"down_blocks.{level}"
            blocks[f"input_blocks.{1 + 3 * level + i}"] = Around(
                f"{at}.{kind}.{i}", f"{at}.resnets.{i}"
            )
        if level < n_levels - 1:
            sampler = f"down_blocks.{level}.downsamplers.0"
            blocks[f"input_blocks.{3 + 3 * level}"] = Around(sampler, sampler)
    for up in range(n_levels):
        kind = "attentions" if n_levels - 1 - up in attention_levels else "resnets"
        for i in range(3):
            at = f"up_blocks.{up}"
            last = i == 2 and up < n_levels - 1
            out = f"{at}.upsamplers.0" if last else f"{at}.{kind}.{i}"
            blocks[f"output_blocks.{3 * up + i}"] = Around(out, f"{at}.resnets.{i}")
    return blocks


LDM = ldm_blocks(4, frozenset({0, 1, 2}))
LDM_XL = ldm_blocks(3, frozenset({1, 2}))

_GDF_PLACE = r"(?P<side>down|up)-level(?P<level>\d+)|(?P<mid>mid)(?:-level\d+)?"
_VIT, _BLOCK = r"repeat(\d+)-vit-block(\d+)", r"attentions.\1.transformer_blocks.\2"
_MID_VIT = re.compile(r"^mid-vit-")
_DIT, _DIT_BLOCK = re.compile(r"^vit-block(\d+)-"), "attentions.0.transformer_blocks"
_GDF: Mapping[str, str] = {
    r"repeat(\d+)-res-increment": r"resnets.\1@pre_residual",
    r"repeat(\d+)-res-out": r"resnets.\1",
    r"repeat(\d+)-vit-out": r"attentions.\1",
    rf"{_VIT}-out": _BLOCK,
    rf"{_VIT}-self-([qkv])": rf"{_BLOCK}.attn1@attn.\3",
    rf"{_VIT}-cross-([qkv])": rf"{_BLOCK}.attn2@attn.\3",
    rf"{_VIT}-self-map": rf"{_BLOCK}.attn1@attn.probs",
    rf"{_VIT}-cross-map": rf"{_BLOCK}.attn2@attn.probs",
    rf"{_VIT}-self-out": rf"{_BLOCK}.attn1@attn.out",
    rf"{_VIT}-cross-out": rf"{_BLOCK}.attn2@attn.out",
    rf"{_VIT}-ffn-inner": rf"{_BLOCK}.ff.net.0",
    r"(?:repeat\d+-)?upsampler-out": r"upsamplers.0",
    r"(?:repeat\d+-)?downsampler-out": r"downsamplers.0",
}


def translated(spec: TapSpec) -> TapSpec:
    """The tap with the path of this library; the array keeps the other project's name.

    Raises:
        TapError: a name that the project named before the colon does not have.
    """
    scheme, colon, name = spec.path.partition(":")
    if not colon or scheme not in _SCHEMES:
        return spec
    path = _SCHEMES[scheme](name)
    own = re.sub(r"[^A-Za-z0-9_.-]+", "_", name)
    return spec.model_copy(update={"path": path, "name": spec.name or own})


def _cleandift(name: str) -> str:
    if name not in CLEANDIFT:
        raise TapError(f"tap 'cleandift:{name}': want one of {', '.join(CLEANDIFT)}")
    return CLEANDIFT[name]


def _gdf(name: str) -> str:
    if name == "unet-in":
        return "conv_in@in"
    if _DIT.match(name):  # of a PixArt, whose blocks are those of a UNet's attention, alone
        return _gdf(f"mid-{name}").replace(f"mid_block.{_DIT_BLOCK}", "transformer_blocks")
    name = _MID_VIT.sub("mid-repeat0-vit-", name)  # the middle has one attention and counts none
    place = re.match(f"(?:{_GDF_PLACE})-", name)
    if place is not None:
        block = "mid_block" if place["mid"] else f"{place['side']}_blocks.{place['level']}"
        for pattern, path in _GDF.items():
            match = re.fullmatch(pattern, name[place.end() :])
            if match is not None:
                return f"{block}.{match.expand(path)}"
    raise TapError(
        f"tap 'gdf:{name}': want a name like up-level1-repeat1-vit-block0-cross-q, "
        "up-level1-repeat2-res-out or up-level0-upsampler-out"
    )


def _ldm(scheme: str, blocks: Mapping[str, Around]) -> Callable[[str], str]:
    def translate(name: str) -> str:
        block, _, site = name.partition("@")
        if block not in blocks:
            near = ", ".join(difflib.get_close_matches(block, blocks, n=3, cutoff=0))
            raise TapError(f"tap '{scheme}:{name}': no such block; nearest: {near}")
        found = blocks[block]
        into = site.split(".")[0] in OF_THE_FIRST
        return (found.into if into else found.out) + (f"@{site}" if site else "")

    return translate


_SCHEMES: Mapping[str, Callable[[str], str]] = {
    "cleandift": _cleandift,
    "gdf": _gdf,
    "ldm": _ldm("ldm", LDM),
    "ldmxl": _ldm("ldmxl", LDM_XL),
}
