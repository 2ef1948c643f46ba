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
from drl_data.schedule import corrupt
from drl_data.spec import FeatureSpec, NoiseSpec, ResolvedTime
from drl_data.tap_reducer import Fits, TapReducer
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
        fits: Fits | None = None,
    ) -> None:
        self.backbone = backbone
        self.taps = tuple(taps)
        self._fits = fits
        self.dims: dict[str, tuple[str, ...]] = {}
        """Names of the axes of each array that `compute` has given."""
        self._conditioning = conditioning
        self._times = tuple(times)
        self._spec = spec

    def replica(self) -> FeatureComputer:
        """Another computer on the same weights, for another thread: hooks are not shared."""
        other = copy.copy(self)
        other.backbone, other.dims = self.backbone.replica(), {}
        return other

    def with_taps(self, taps: Sequence[ResolvedTap], fits: Fits | None = None) -> FeatureComputer:
        """The same computer for other taps, or with fitted reductions; for the same thread."""
        other = copy.copy(self)
        other.taps, other._fits, other.dims = tuple(taps), fits, {}
        return other

    @torch.no_grad()
    def compute(
        self, pixels: npt.NDArray[np.uint8], keys: Sequence[str], clock: StageClock = NO_CLOCK
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """(position of the timestep, {array: features [b, *shape]}) for each timestep in turn.

        `pixels` is uint8 [b, c, H, W], `keys` names its samples; the features are on the backbone's
        device in its dtype, or float32 (averages over members, some reductions). The image is
        encoded once, whatever the number of timesteps and members. What is the same at every
        timestep comes with the first one, what is averaged over them with the last.
        """
        spec = self._spec
        reducer = TapReducer(self.taps, n_times=len(self._times), fits=self._fits)
        with clock.stage("encode"):
            reducer.start(0, spec.noise.members)
            posterior = self.backbone.encode_and_tap(
                self._scaled(pixels), reducer.encoder, reducer.take
            )
            latents = [
                posterior.latents(
                    self._posterior_noise(keys, member, posterior.mean), scale=spec.latents.scale
                )
                for member in range(spec.noise.members)
            ]
            for x in latents:
                self.backbone.decode_and_tap(
                    x, reducer.decoder, reducer.take, scaled=spec.latents.scale
                )
            timeless = reducer.finish()
            noise = self._noise(keys, latents, None)
        for t, when in enumerate(self._times):
            with clock.stage("denoise"):
                if spec.noise.per_timestep:
                    noise = self._noise(keys, latents, int(when.requested))
                noisy = [corrupt(x, eps, when) for x, eps in zip(latents, noise, strict=True)]
                features = self._features_at(t, noisy, reducer)
            self.dims.update(reducer.dims)
            yield t, features | timeless
            timeless = {}

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
        self, keys: Sequence[str], latents: Sequence[Tensor], timestep: int | None
    ) -> list[Tensor | None]:
        """The diffusion's noise of each member, like its latents."""
        drawn = [
            batch_noise(self._spec.noise, keys, x.shape[1:], member=member, timestep=timestep)
            for member, x in enumerate(latents)
        ]
        return [None if e is None else e.to(x) for e, x in zip(drawn, latents, strict=True)]

    def _features_at(
        self, t: int, noisy: Sequence[Tensor], reducer: TapReducer
    ) -> dict[str, Tensor]:
        """Features of one timestep: the mean over members in float32, then the reductions."""
        reducer.start(t, len(noisy))
        for x in noisy:
            self.backbone.tap(x, self._times[t], self._conditioning, reducer.denoiser, reducer.take)
        return reducer.finish()
