"""Features of one batch: encode once, corrupt, denoise up to the last tap, reduce. Tensors only.

Shapes: b batch, c channel, h w height and width, t timestep.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from drl_data.backbones import Backbone, Conditioning
from drl_data.noise import batch_noise
from drl_data.reduce import reduce
from drl_data.schedule import corrupt
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
    ) -> None:
        self.backbone = backbone
        self._taps = tuple(taps)
        self._conditioning = conditioning
        self._times = tuple(times)
        self._spec = spec

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
        once, whatever the number of timesteps and members.
        """
        spec = self._spec
        with clock.stage("encode"):
            posterior = self.backbone.encode(self._scaled(pixels))
            latents = [
                posterior.latents(
                    self._posterior_noise(keys, member, posterior.mean), scale=spec.latents.scale
                )
                for member in range(spec.noise.members)
            ]
            noise = self._noise(keys, latents, None)
        for t, when in enumerate(self._times):
            with clock.stage("denoise"):
                if spec.noise.per_timestep:
                    noise = self._noise(keys, latents, _name_of(when))
                noisy = [corrupt(x, eps, when) for x, eps in zip(latents, noise, strict=True)]
                features = self._features_at(noisy, when, conditioning or self._conditioning)
            yield t, features

    def _scaled(self, pixels: npt.NDArray[np.uint8]) -> Tensor:
        """uint8 0..255 mapped onto the range of the image spec, in the backbone's dtype."""
        low, high = self._spec.images.range
        x = torch.from_numpy(pixels).to(self.backbone.device, non_blocking=True).float()
        return (x / 255 * (high - low) + low).to(self.backbone.dtype)

    def _posterior_noise(self, keys: Sequence[str], member: int, like: Tensor) -> Tensor | None:
        """Noise for the draw from the VAE's posterior; None to take its mean."""
        if self._spec.latents.posterior == "mean":
            return None
        per_sample = NoiseSpec(seed=self._spec.noise.seed)
        noise = batch_noise(per_sample, keys, like.shape[1:], member=member, role="posterior")
        return None if noise is None else noise.to(like)

    def _noise(
        self, keys: Sequence[str], latents: Sequence[Tensor], timestep: int | str | None
    ) -> list[Tensor | None]:
        """The diffusion's noise of each member, like its latents."""
        drawn = [
            batch_noise(self._spec.noise, keys, x.shape[1:], member=member, timestep=timestep)
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
                # A copy where nothing reduces: the model may go on to change x in place.
                return reduce(x, dims, tap.reduce)[0] if tap.reduce else x.clone()
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


def _name_of(when: ResolvedTime) -> int | str:
    """A timestep as the seed of its noise: whole numbers as such, others in full."""
    return int(when.requested) if when.requested.is_integer() else repr(when.requested)
