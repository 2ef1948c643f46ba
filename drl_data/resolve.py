"""A spec against the structure of its model, on the meta device: arrays, timesteps, FLOPs, and what
does not go together, before any worker starts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drl_data.backbones import Backbone, Model, load_backbone
from drl_data.diffusion_spec import ConditionSpec
from drl_data.errors import SpecError, TapError
from drl_data.flops import FeatureFlops
from drl_data.noise import noise_shape, noise_table
from drl_data.quantise import (
    COMPANIONS,
    companions,
)
from drl_data.schedule import NoSchedule, resolve_times
from drl_data.spec import ArraySpec, FeatureSpec, ResolvedTime
from drl_data.tap_sites import LOSS
from drl_data.taps import ResolvedTap


def resolve_features(
    model: Model,
    spec: FeatureSpec,
    conditions: Sequence[ConditionSpec],
    bank: Tensor | None = None,
) -> tuple[tuple[ArraySpec, ...], tuple[ResolvedTime, ...]]:
    """Arrays and timesteps of a spec from the structure of its model alone, on the meta device.

    `conditions` are those that the model must be able to take; shapes are the first one's. `bank`
    is what the file that `spec.noise` names holds.

    Raises:
        SpecError, TapError: if the model cannot do what the spec asks for.
    """
    backbone = load_backbone(model, "meta")
    taps = backbone.resolve(spec.taps)
    times = resolve_times(backbone.schedule_for(spec.images), spec.schedule, spec.noise)
    _check_corruption(backbone, spec, bank)
    for condition in conditions[1:]:
        backbone.conditioning(condition)
    check_losses(taps, spec)
    _check_lengths(backbone, taps, spec)
    inside = [tap for tap in taps if tap.site != LOSS]
    made = {
        array.name: array
        for array in backbone.arrays(inside, spec.images, conditions[0], times[0], spec.dtype)
    }
    found = [made.get(tap.name) or loss_array(tap, spec) for tap in taps]
    arrays = [array.model_copy(update={"views": spec.images.n_views}) for array in found]
    return tuple(part for array in arrays for part in (array, *companions(array))), times


def check_losses(taps: Sequence[ResolvedTap], spec: FeatureSpec) -> None:
    """Raise SpecError unless the taps `loss` and the candidates go together, and with the noise."""
    losses = [tap for tap in taps if tap.site == LOSS]
    if not losses and spec.condition.candidates:
        raise SpecError(
            "condition.candidates: they are for the tap `loss`; add it, or tell a prompt"
        )
    if not losses:
        return
    if not spec.condition.candidates:
        raise SpecError("tap loss: it scores images against condition.candidates; name them")
    if len(losses) < len(taps):
        raise SpecError(
            "tap loss: other taps are told one condition, and this has several; give them a "
            "pipeline of their own"
        )
    if spec.noise.kind in ("none", "patch_mask", "inversion"):
        raise SpecError(f"tap loss: noise.kind {spec.noise.kind} adds no noise to be predicted")
    if spec.dtype in COMPANIONS:
        raise SpecError(f"tap loss: features.dtype {spec.dtype} is for channels; want float32")
    if any(tap.reduce for tap in losses):
        raise SpecError("tap loss: it has no reductions; reduce the table when it is read")


def _check_lengths(backbone: Backbone, taps: Sequence[ResolvedTap], spec: FeatureSpec) -> None:
    """Raise TapError for text tokens whose number each sample's own prompt decides."""
    ragged = [tap for tap in taps if spec.condition.per_sample and backbone.is_ragged(tap)]
    if ragged:
        raise TapError(
            f"tap {ragged[0].address}: this model does not pad prompts to one length, so that text "
            "tokens of samples with prompts of their own make no array; tap image tokens, or tell "
            "all samples one prompt"
        )


def loss_array(tap: ResolvedTap, spec: FeatureSpec) -> ArraySpec:
    """The table of a tap `loss`: [candidate, member] for each row and timestep."""
    return ArraySpec(
        name=tap.name,
        tap=tap.address,
        dims=("candidate", "member"),
        shape=(len(spec.condition.candidates), spec.noise.members),
        dtype=spec.dtype,
    )


def count_feature_flops(model: Model, spec: FeatureSpec, condition: ConditionSpec) -> FeatureFlops:
    """FLOPs for one image and one forward of a spec, from the model's structure alone."""
    backbone = load_backbone(model, "meta")
    return backbone.flops(backbone.resolve(spec.taps), spec.images, condition)


def _check_corruption(backbone: Backbone, spec: FeatureSpec, bank: Tensor | None) -> None:
    """Raise SpecError, before any worker starts, for noise or latents that cannot be had."""
    if isinstance(backbone.schedule, NoSchedule) and spec.noise.kind != "none":
        raise SpecError(
            f"noise.kind {spec.noise.kind}: this model knows no noise (schedule.convention none); "
            "write `noise: {kind: none}`"
        )
    shape = backbone.input_shape(spec.images)
    noise_shape(spec.noise, shape)
    if bank is not None:
        noise_table(spec.noise, shape, len(spec.schedule.timesteps), bank)
    if spec.latents.scale == "per_channel":
        frame = (1, spec.images.n_channels, *spec.images.size)
        pixels = torch.empty(frame, dtype=backbone.dtype, device=backbone.device)
        with torch.no_grad():
            backbone.encode(pixels).latents(None, scale=spec.latents.scale)
