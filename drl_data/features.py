"""Features of one batch: encode once, corrupt, denoise up to the last tap, reduce. Tensors only.

Shapes: b batch, c channel, h w height and width, t timestep.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from drl_data.backbones import Backbone, Conditioning
from drl_data.noise import batch_noise, noise_table
from drl_data.reduce import reduce
from drl_data.schedule import NoiseSchedule, corrupt, ddim_step, inversion_times, mask_patches
from drl_data.spec import FeatureSpec, NoiseSpec, ResolvedTime
from drl_data.taps import ResolvedTap


class StageClock(Protocol):
    """Times the stages of the work."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Time what happens inside as `name`."""


class _NoClock:
    def stage(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()


NO_CLOCK: StageClock = _NoClock()


class FeatureComputer:
    """The taps of one backbone at the timesteps of one spec; used by one thread at a time."""

    def __init__(
        self,
        backbone: Backbone,
        taps: Sequence[ResolvedTap],
        conditioning: Conditioning,
        times: Sequence[ResolvedTime],
        spec: FeatureSpec,
        bank: Tensor | None = None,
    ) -> None:
        """`bank` is what the file that `spec.noise` names holds."""
        self.backbone = backbone
        self._taps = tuple(taps)
        self._conditioning = conditioning
        self._times = tuple(times)
        self._spec = spec
        shape = backbone.input_shape(spec.images)
        self._table = noise_table(spec.noise, shape, len(times), bank)
        inverts = spec.noise.kind == "inversion"
        self._path = (
            inversion_times(backbone.schedule, spec.schedule, spec.noise) if inverts else ()
        )

    def replica(self) -> FeatureComputer:
        """Another computer on the same weights, for another thread: hooks are not shared."""
        other = copy.copy(self)
        other.backbone = self.backbone.replica()
        return other

    @torch.no_grad()
    def compute(
        self,
        pixels: npt.NDArray[np.uint8],
        keys: Sequence[str],
        clock: StageClock = NO_CLOCK,
        conditioning: Conditioning | None = None,
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """(position of the timestep, {array: features [b, *shape]}) for each timestep in turn.

        `pixels` is uint8 [b, c, H, W], `keys` names its samples, `conditioning` is theirs if it
        differs between samples (default: what the computer was made with). The features are on the
        backbone's device in its dtype (float32 if averaged over members). The image is encoded
        once, whatever the number of timesteps and members. The timesteps come in the order of the
        spec, but of an inversion in the order in which it meets them.
        """
        told = self._conditioning if conditioning is None else conditioning
        with clock.stage("encode"):
            latents = self._latents(pixels, keys)
        if self._path:
            yield from self._inverted(latents[0], told, clock)
        else:
            yield from self._corrupted(latents, keys, told, clock)

    def _corrupted(
        self, latents: Sequence[Tensor], keys: Sequence[str], told: Conditioning, clock: StageClock
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Features of the latents of each member, with noise or a mask, at each timestep."""
        spec = self._spec.noise
        degrade = mask_patches if spec.kind == "patch_mask" else corrupt
        with clock.stage("encode"):
            noise = self._noise(keys, latents)
        for t, when in enumerate(self._times):
            with clock.stage("denoise"):
                if not spec.moves:
                    noise = self._noise(keys, latents, t)
                noisy = [
                    x if eps is None else degrade(x, eps, when)
                    for x, eps in zip(latents, noise, strict=True)
                ]
                features = self._features_at(noisy, when, told)
            yield t, features

    def _inverted(
        self, latents: Tensor, told: Conditioning, clock: StageClock
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Features along the DDIM inversion of the latents (Song et al. 2021, section 4.3).

        One pass through the steps for all timesteps, the deepest of which is the last one and may
        stop at the last tap. The latents stay in float32, whatever the backbone computes in.
        """
        wanted = {when.requested: t for t, when in enumerate(self._times)}
        deepest = min(wanted)
        schedule = self.backbone.schedule
        assert isinstance(schedule, NoiseSchedule), "inversion_times demands it"
        x = latents.float()
        for here, there in pairwise(self._path):
            t = wanted.get(here.requested)
            taps = () if t is None else self._taps
            with clock.stage("denoise"):
                given = x.to(latents.dtype)
                if here.requested == deepest:
                    features = self._features_at([given], here, told)
                else:
                    output, features = self.backbone.denoise(given, here, told, taps, _reduced)
                    x = ddim_step(output.float(), x, here, there, schedule.prediction)
            if t is not None:
                yield t, features
            if here.requested == deepest:
                return

    def _latents(self, pixels: npt.NDArray[np.uint8], keys: Sequence[str]) -> list[Tensor]:
        """The latents of each member: a draw each, or one that all share."""
        spec = self._spec.latents
        n_members = self._spec.noise.members
        draws = spec.posterior == "sample" and spec.per_member
        posterior = self.backbone.encode(self._scaled(pixels))
        latents = [
            posterior.latents(self._posterior_noise(keys, member, posterior.mean), scale=spec.scale)
            for member in range(n_members if draws else 1)
        ]
        return latents if draws else latents * n_members

    def _scaled(self, pixels: npt.NDArray[np.uint8]) -> Tensor:
        """uint8 0..255 mapped onto the range of the image spec, in the backbone's dtype."""
        images = self._spec.images
        low, high = images.range
        x = torch.from_numpy(pixels).to(self.backbone.device, non_blocking=True).float()
        x = x / 255 * (high - low) + low
        if images.mean is not None and images.std is not None:
            mean, std = (torch.tensor(v, device=x.device) for v in (images.mean, images.std))
            x = (x - mean[:, None, None]) / std[:, None, None]
        return x.to(self.backbone.dtype)

    def _posterior_noise(self, keys: Sequence[str], member: int, like: Tensor) -> Tensor | None:
        """Noise for the draw from the VAE's posterior; None to take its mean."""
        if self._spec.latents.posterior == "mean":
            return None
        per_sample = NoiseSpec(seed=self._spec.noise.seed)
        noise = batch_noise(per_sample, keys, like.shape[1:], member=member, role="posterior")
        return None if noise is None else noise.to(like)

    def _noise(
        self, keys: Sequence[str], latents: Sequence[Tensor], place: int = 0
    ) -> list[Tensor | None]:
        """The diffusion's noise of each member, like its latents, at the timestep in `place`."""
        drawn = [
            batch_noise(
                self._spec.noise,
                keys,
                x.shape[1:],
                member=member,
                timestep=self._times[place].requested,
                table=self._table,
                place=place,
            )
            for member, x in enumerate(latents)
        ]
        return [None if e is None else e.to(x) for e, x in zip(drawn, latents, strict=True)]

    def _features_at(
        self, noisy: Sequence[Tensor], when: ResolvedTime, conditioning: Conditioning
    ) -> dict[str, Tensor]:
        """Features of one timestep: the mean over members in float32, then the reductions."""
        sums: dict[str, Tensor] = {}
        dims_of: dict[str, tuple[str, ...]] = {}

        def take(tap: ResolvedTap, x: Tensor, dims: tuple[str, ...]) -> Tensor:
            if len(noisy) == 1:
                return _reduced(tap, x, dims)
            dims_of[tap.name] = dims
            sums[tap.name] = sums[tap.name] + x if tap.name in sums else x.float().clone()
            return x

        captured: dict[str, Tensor] = {}
        for x in noisy:
            captured = self.backbone.tap(x, when, conditioning, self._taps, take)
        if len(noisy) == 1:
            return captured
        return {
            tap.name: reduce(sums[tap.name] / len(noisy), dims_of[tap.name], tap.reduce)[0]
            for tap in self._taps
        }


def _reduced(tap: ResolvedTap, x: Tensor, dims: tuple[str, ...]) -> Tensor:
    """The reductions of a tap; a copy where there are none, as the model may change x in place."""
    return reduce(x, dims, tap.reduce)[0] if tap.reduce else x.clone()
