"""Sites that stand for another module: `resnets.1@pre_residual` is `resnets.1.conv2@out`.

Every name in `SITES` resolves, against the module tree alone, to a module, one of the places where
a hook can sit (`PLACES`), and parts of the tensor there (`taps.py` says which). A module without
such a place has no such site. Systems are those of recipes.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import nn

PLACES = ("out", "in", "attn.probs", "attn.query", "attn.key", "modulation")
"""Where a hook sits: output, input, inside an attention, or the AdaLN of an ada_norm_single."""

PREDICTIONS = ("x0", "eps", "v")
"""What the network's output can be read as (schedule.py)."""

LOSS = "loss"
"""The denoising loss of each candidate condition (Li et al. 2023)."""

MODEL_SITES = ("latent", *PREDICTIONS, LOSS)
"""Sites of the whole model, not of a module."""


class Place(NamedTuple):
    """A module path, one of `PLACES`, and the parts of the tensor there."""

    module: str
    place: str
    parts: tuple[str, ...]


Modules = Mapping[str, nn.Module]
"""Path -> module, the root being ""."""


# What each AdaLN makes of its embedding, in diffusers' order. `_mlp` is the second modulation of a
# block, before the feed-forward; `_2` the third one of SD3.5's dual attention.
_SIX = ("shift", "scale", "gate", "shift_mlp", "scale_mlp", "gate_mlp")
_MODULATIONS: Mapping[str, tuple[str, ...]] = {
    "AdaLayerNormZero": _SIX,
    "SD35AdaLayerNormZeroX": (*_SIX, "shift_2", "scale_2", "gate_2"),
    "AdaLayerNormZeroSingle": ("shift", "scale", "gate"),
    "AdaLayerNormContinuous": ("scale", "shift"),
    "LuminaRMSNormZero": ("scale", "gate", "scale_mlp", "gate_mlp"),
}
_MODULATION_LAYERS: Mapping[str, tuple[str, ...]] = {
    "img_mod.1": _SIX,  # Qwen-Image
    "adaLN_modulation.0": ("scale", "gate", "scale_mlp", "gate_mlp"),  # Z-Image, gates before tanh
}
"""The same where the block has a linear layer of its own for it, by its path in the block."""

MODULATION_PARTS = tuple(dict.fromkeys(name for names in _MODULATIONS.values() for name in names))

_PROJECTIONS: Mapping[str, tuple[str, ...]] = {
    "attn.q": ("to_q", "q_proj", "query"),
    "attn.k": ("to_k", "k_proj", "key"),
    "attn.v": ("to_v", "v_proj", "value"),
}
"""Names of an attention's projections in diffusers and in transformers."""

_TEXT_MODULES = frozenset(
    {
        *("context_embedder", "norm1_context", "norm2_context", "ff_context"),  # SD3, Flux
        *("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k", "to_add_out"),
        *("caption_projection", "caption_norm"),  # PixArt, Sana
        *("cap_embedder", "context_refiner"),  # Z-Image
        *("text_embedder", "text_proj"),  # Wan, CogVideoX
        *("txt_norm", "txt_in", "txt_mod", "txt_norm1", "txt_norm2", "txt_mlp"),  # Qwen-Image
    }
)
"""Modules that see text tokens only, by any component of their path."""

_TEXT_PATHS = ("attn2.to_k", "attn2.to_v", "attn2.norm_k")
"""Keys and values of cross-attention, which are the text's."""

_FEED_FORWARDS = ("ff", "mlp", "feed_forward", "ffn", "img_mlp")
_HEADS = ("heads", "num_heads", "num_attention_heads")


def is_text(module: str) -> bool:
    """Whether a module of a transformer, by its path, sees the text's tokens only."""
    return not _TEXT_MODULES.isdisjoint(module.split(".")) or module.endswith(_TEXT_PATHS)


def n_heads(module: nn.Module) -> int | None:
    """Number of heads of an attention module, None if it does not say."""
    for name in _HEADS:
        value = vars(module).get(name)
        if isinstance(value, int):
            return value
    return None


def expand(modules: Modules, module: str, site: str, parts: tuple[str, ...]) -> Place | None:
    """The place that a site of a module stands for; None if the module has no such site."""
    place = _EXPANSIONS[site](modules, module, parts)
    return None if place is None or place.module not in modules else place


def _pre_residual(modules: Modules, module: str, parts: tuple[str, ...]) -> Place | None:
    """The branch before it is added to the shortcut: `conv2` of a resnet (Hyperfeatures, Readout,
    SatDiFuser, RepFusion, PnP), the last of `out_layers` of an ADM block."""
    if f"{module}.conv1" in modules and f"{module}.conv2" in modules:
        return Place(f"{module}.conv2", "out", parts)
    layers = modules.get(f"{module}.out_layers")
    if isinstance(layers, nn.Sequential):
        return Place(f"{module}.out_layers.{len(layers) - 1}", "out", parts)
    return None


def _concat(modules: Modules, module: str) -> tuple[int, int] | None:
    """(channels of the hidden state, channels with the skip) of a resnet of an up block."""
    match = re.fullmatch(r"((?:.*\.)?)up_blocks\.(\d+)\.resnets\.(\d+)", module)
    if match is None:
        return None
    prefix, level, position = match[1], int(match[2]), int(match[3])
    if position:
        before = f"{prefix}up_blocks.{level}.resnets.{position - 1}"
    else:
        parent = f"{prefix}up_blocks.{level - 1}" if level else f"{prefix}mid_block"
        resnets = modules.get(f"{parent}.resnets")
        if not isinstance(resnets, nn.ModuleList):
            return None
        before = f"{parent}.resnets.{len(resnets) - 1}"
    hidden, joined = modules.get(f"{before}.conv2"), modules.get(f"{module}.conv1")
    if not isinstance(hidden, nn.Conv2d) or not isinstance(joined, nn.Conv2d):
        return None
    if hidden.out_channels >= joined.in_channels:
        return None
    return hidden.out_channels, joined.in_channels


def _pre_concat(modules: Modules, module: str, parts: tuple[str, ...]) -> Place | None:
    """The hidden state before the skip is concatenated to it (sd-dino's decoder)."""
    channels = _concat(modules, module)
    return channels and Place(module, "in", (*parts, f"channels[0:{channels[0]}]"))


def _skip(modules: Modules, module: str, parts: tuple[str, ...]) -> Place | None:
    """The skip that is concatenated (Joint Diffusion)."""
    channels = _concat(modules, module)
    return channels and Place(module, "in", (*parts, f"channels[{channels[0]}:{channels[1]}]"))


def _adaln(modules: Modules, module: str, parts: tuple[str, ...]) -> Place | None:
    """Shift, scale and gate of a block's AdaLN (DiTF); without a part all of them, [b, k c]."""
    for path in (module, f"{module}.norm1", f"{module}.norm"):
        linear = modules.get(f"{path}.linear")
        names = _MODULATIONS.get(type(modules.get(path)).__name__)
        if names is not None and isinstance(linear, nn.Linear):
            chosen = _chunk(names, parts, linear.out_features // len(names))
            return None if chosen is None else Place(f"{path}.linear", "out", chosen)
    for path, names in _MODULATION_LAYERS.items():
        linear = modules.get(f"{module}.{path}")
        if isinstance(linear, nn.Linear):
            chosen = _chunk(names, parts, linear.out_features // len(names))
            return None if chosen is None else Place(f"{module}.{path}", "out", chosen)
    table = dict(modules[module].named_parameters(recurse=False)).get("scale_shift_table")
    if table is not None and table.shape[0] == len(_SIX):
        chosen = _chunk(_SIX, parts, table.shape[1])
        return None if chosen is None else Place(module, "modulation", chosen)
    return None


def _chunk(names: Sequence[str], parts: tuple[str, ...], size: int) -> tuple[str, ...] | None:
    """The channels of one of equally large chunks called `names`."""
    if not parts or parts[0] not in MODULATION_PARTS:
        return parts
    if parts[0] not in names:
        return None
    start = names.index(parts[0]) * size
    return (f"channels[{start}:{start + size}]", *parts[1:])


def _projection(site: str) -> Callable[[Modules, str, tuple[str, ...]], Place | None]:
    def find(modules: Modules, module: str, parts: tuple[str, ...]) -> Place | None:
        """The projection's output, before the split into heads (GDF, PnP)."""
        child = _child(modules, module, _PROJECTIONS[site])
        if child is None:
            return None
        chosen = _head_channels(modules, module, child, parts)
        return None if chosen is None else Place(f"{module}.{child}", "out", chosen)

    return find


def _operand(site: str, projection: str) -> Callable[[Modules, str, tuple[str, ...]], Place | None]:
    def find(modules: Modules, module: str, parts: tuple[str, ...]) -> Place | None:
        """What the attention multiplies: the projection after its norm and its rotary embedding,
        heads side by side (DiffTrack)."""
        child = _child(modules, module, _PROJECTIONS[projection])
        if child is None:
            return None
        chosen = _head_channels(modules, module, child, parts)
        return None if chosen is None else Place(module, site, chosen)

    return find


def _head_channels(
    modules: Modules, module: str, child: str, parts: tuple[str, ...]
) -> tuple[str, ...] | None:
    """`heads[...]` as channels of a projection; None if it has no such heads."""
    linear, heads = modules[f"{module}.{child}"], n_heads(modules[module])
    chosen: list[str] = []
    for part in parts:
        if part.startswith("heads["):
            if heads is None or not isinstance(linear, nn.Linear):
                return None
            size = linear.out_features // heads
            ids = [int(i) for i in part[len("heads[") : -1].split(",")]
            if max(ids) >= heads:
                return None
            part = f"channels[{','.join(f'{i * size}:{(i + 1) * size}' for i in ids)}]"
        chosen.append(part)
    return tuple(chosen)


def _attention_out(modules: Modules, module: str, parts: tuple[str, ...]) -> Place | None:
    """What the attention module returns (DiffCut, ConceptAttention, SatDiFuser)."""
    found = _child(modules, module, _PROJECTIONS["attn.q"])
    return None if found is None else Place(module, "out", parts)


def _probabilities(modules: Modules, module: str, parts: tuple[str, ...]) -> Place | None:
    """softmax(q k^T scale + mask), [b, head, query, key] (DAAM, DiffSeg, Seg4Diff)."""
    found = _child(modules, module, _PROJECTIONS["attn.q"])
    return None if found is None else Place(module, "attn.probs", parts)


def _feed_forward_in(modules: Modules, module: str, parts: tuple[str, ...]) -> Place | None:
    """What the feed-forward takes: norm2 after its modulation (DiTF, blocks below 19)."""
    child = _child(modules, module, _FEED_FORWARDS)
    return None if child is None else Place(f"{module}.{child}", "in", parts)


def _child(modules: Modules, module: str, names: Iterable[str]) -> str | None:
    return next((name for name in names if f"{module}.{name}" in modules), None)


_EXPANSIONS: Mapping[str, Callable[[Modules, str, tuple[str, ...]], Place | None]] = {
    "out": lambda _, module, parts: Place(module, "out", parts),
    "in": lambda _, module, parts: Place(module, "in", parts),
    "modulation": lambda _, module, parts: Place(module, "modulation", parts),
    "pre_residual": _pre_residual,
    "pre_concat": _pre_concat,
    "skip": _skip,
    "adaln": _adaln,
    "attn.q": _projection("attn.q"),
    "attn.k": _projection("attn.k"),
    "attn.v": _projection("attn.v"),
    "attn.query": _operand("attn.query", "attn.q"),
    "attn.key": _operand("attn.key", "attn.k"),
    "attn.out": _attention_out,
    "attn.probs": _probabilities,
    "ff.in": _feed_forward_in,
}

SITES = tuple(_EXPANSIONS)
"""Every site of a module that a tap may name."""
