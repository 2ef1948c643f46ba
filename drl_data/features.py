"""Features of one batch: encode once, corrupt, denoise up to the last tap, reduce. Tensors only.

Shapes: b batch, c channel, h w height and width, t timestep.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from drl_data.backbones import Backbone, Conditioning
from drl_data.diffusion_spec import NoiseSpec
from drl_data.noise import batch_noise, noise_table
from drl_data.schedule import NoiseSchedule, corrupt, ddim_step, inversion_times, mask_patches
from drl_data.spec import FeatureSpec, ResolvedTime
from drl_data.tap_reducer import Fits, TapReducer, TapTimes
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
        bank: Tensor | None = None,
        candidates: Sequence[Conditioning] = (),
    ) -> None:
        """`bank` is what the file that `spec.noise` names holds."""
        self.backbone = backbone
        self.taps = tuple(taps)
        self._fits = fits
        self._candidates = tuple(candidates)
        self.dims: dict[str, tuple[str, ...]] = {}
        """Names of the axes of each array that `compute` has given."""
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
        other.backbone, other.dims = self.backbone.replica(), {}
        return other

    def with_taps(self, taps: Sequence[ResolvedTap], fits: Fits | None = None) -> FeatureComputer:
        """The same computer for other taps, or with fitted reductions; for the same thread."""
        other = copy.copy(self)
        other.taps, other._fits, other.dims = tuple(taps), fits, {}
        return other

    @torch.no_grad()
    def compute(
        self,
        pixels: npt.NDArray[np.uint8],
        keys: Sequence[str],
        clock: StageClock = NO_CLOCK,
        conditioning: Conditioning | None = None,
        wanted: TapTimes | None = None,
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """(position of the timestep, {array: features [b, *shape]}) for each timestep in turn.

        `pixels` is uint8 [b, c, H, W], of windows of videos [b, c, f, H, W]; `keys` names its
        samples, `conditioning` is theirs if it differs between samples (default: what the computer
        was made with). The features are on the backbone's device in its dtype, or float32
        (averages over members, some reductions). The image is encoded once, whatever the number of
        timesteps and members. The timesteps come in the order of the spec, but of an inversion in
        the order in which it meets them. What is the same at every timestep comes with the first
        of them, what is averaged over them with the last.

        With `wanted` only these arrays at these timesteps: the forwards of others are left out, and
        what is computed is the same, bit for bit. An array averaged over timesteps is wanted at all
        of them or at none, one that is the same at all of them at any.
        """
        told = self._conditioning if conditioning is None else conditioning
        reducer = TapReducer(self.taps, n_times=len(self._times), fits=self._fits, wanted=wanted)
        times = sorted(range(len(self._times)) if wanted is None else set().union(*wanted.values()))
        with clock.stage("encode"):
            latents, timeless = self._latents(pixels, keys, reducer)
        along = (
            self._inverted(latents[0], told, reducer, clock, times)
            if self._path
            else self._corrupted(latents, keys, told, reducer, clock, times)
        )
        for t, features in along:
            self.dims.update(reducer.dims)
            yield t, features | timeless
            timeless = {}

    @property
    def times(self) -> tuple[ResolvedTime, ...]:
        """The timesteps, by their places."""
        return self._times

    @torch.no_grad()
    def encode(self, pixels: npt.NDArray[np.uint8], keys: Sequence[str]) -> list[Tensor]:
        """The latents [b, c, h, w] of each member, of images as `compute` takes them."""
        return self._latents(pixels, keys, TapReducer(()))[0]

    @torch.no_grad()
    def noised(
        self, place: int, latents: Sequence[Tensor], keys: Sequence[str]
    ) -> list[tuple[Tensor, Tensor]]:
        """(x_t, what the network should put out for it in float32), both [b, c, h, w], of each
        member at the timestep in `place`."""
        when = self._times[place]
        noise = self._noise(keys, latents, place)
        targets = self._targets(when, latents, noise)
        return [
            (corrupt(x, eps, when), target)
            for x, eps, target in zip(latents, noise, targets, strict=True)
            if eps is not None
        ]

    def _targets(
        self, when: ResolvedTime, latents: Sequence[Tensor], noise: Sequence[Tensor | None]
    ) -> list[Tensor]:
        targets = []
        for clean, eps in zip(latents, noise, strict=True):
            assert eps is not None, "a loss needs noise, `check_losses` demands it"
            targets.append(self.backbone.schedule.target(clean, eps, when).float())
        return targets

    def _corrupted(
        self,
        latents: Sequence[Tensor],
        keys: Sequence[str],
        told: Conditioning,
        reducer: TapReducer,
        clock: StageClock,
        times: Sequence[int],
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Features of the latents of each member, with noise or a mask, at each timestep."""
        spec = self._spec.noise
        degrade = mask_patches if spec.kind == "patch_mask" else corrupt
        with clock.stage("encode"):
            noise = self._noise(keys, latents)
        for t in times:
            when = self._times[t]
            with clock.stage("denoise"):
                if not spec.moves:
                    noise = self._noise(keys, latents, t)
                noisy = [
                    x if eps is None else degrade(x, eps, when)
                    for x, eps in zip(latents, noise, strict=True)
                ]
                features = self._features_at(t, noisy, told, reducer)
                features |= self._errors_at(when, latents, noise, noisy, reducer.losses)
            yield t, features

    def _inverted(
        self,
        latents: Tensor,
        told: Conditioning,
        reducer: TapReducer,
        clock: StageClock,
        times: Sequence[int],
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Features along the DDIM inversion of the latents (Song et al. 2021, section 4.3).

        One pass through the steps for all timesteps, the deepest of which is the last one and may
        stop at the last tap. The latents stay in float32, whatever the backbone computes in.
        """
        wanted = {self._times[t].requested: t for t in times}
        if not wanted:
            return
        deepest = min(wanted)
        schedule = self.backbone.schedule
        assert isinstance(schedule, NoiseSchedule), "inversion_times demands it"
        x = latents.float()
        for here, there in pairwise(self._path):
            t = wanted.get(here.requested)
            with clock.stage("denoise"):
                given = x.to(latents.dtype)
                if here.requested == deepest:
                    assert t is not None
                    features = self._features_at(t, [given], told, reducer)
                else:
                    if t is not None:
                        reducer.start(t, 1)
                    taps = [] if t is None else reducer.denoiser
                    output, _ = self.backbone.denoise(given, here, told, taps, reducer.take)
                    features = {} if t is None else reducer.finish()
                    x = ddim_step(output.float(), x, here, there, schedule.prediction)
            if t is not None:
                yield t, features
            if here.requested == deepest:
                return

    def _latents(
        self, pixels: npt.NDArray[np.uint8], keys: Sequence[str], reducer: TapReducer
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The latents of each member, a draw each or one that all share; and the features that are
        the same at every timestep."""
        spec = self._spec.latents
        n_members = self._spec.noise.members
        draws = spec.posterior == "sample" and spec.per_member
        n_latents = n_members if draws else 1
        reducer.start(0, n_latents)
        posterior = self.backbone.encode_and_tap(
            self._scaled(pixels),
            reducer.encoder,
            reducer.take,
            frame_latents=self._spec.images.frame_latents,
        )
        latents = [
            posterior.latents(self._posterior_noise(keys, member, posterior.mean), scale=spec.scale)
            for member in range(n_latents)
        ]
        for x in latents:
            self.backbone.decode_and_tap(x, reducer.decoder, reducer.take, scaled=spec.scale)
        return latents if draws else latents * n_members, reducer.finish()

    def _scaled(self, pixels: npt.NDArray[np.uint8]) -> Tensor:
        """uint8 0..255 mapped onto the range of the image spec, in the backbone's dtype."""
        images = self._spec.images
        low, high = images.range
        x = torch.from_numpy(pixels).to(self.backbone.device, non_blocking=True).float()
        x = x / 255 * (high - low) + low
        if images.mean is not None and images.std is not None:
            shape = (-1, *[1] * (x.ndim - 2))
            mean, std = (
                torch.tensor(v, device=x.device).reshape(shape) for v in (images.mean, images.std)
            )
            x = (x - mean) / std
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
        self, t: int, noisy: Sequence[Tensor], told: Conditioning, reducer: TapReducer
    ) -> dict[str, Tensor]:
        """Features of one timestep: the mean over members in float32, then the reductions."""
        reducer.start(t, len(noisy))
        if not reducer.denoiser:
            return {}
        for x in noisy:
            self.backbone.tap(x, self._times[t], told, reducer.denoiser, reducer.take)
        return reducer.finish()

    def _errors_at(
        self,
        when: ResolvedTime,
        latents: Sequence[Tensor],
        noise: Sequence[Tensor | None],
        noisy: Sequence[Tensor],
        taps: Sequence[ResolvedTap],
    ) -> dict[str, Tensor]:
        """{array of a tap `loss`: error of the prediction [b, candidate, member]}, float32, its
        mean over the image (Li et al. 2023, eq. 5, without the mean over noise)."""
        if not taps:
            return {}
        targets = self._targets(when, latents, noise)
        found: dict[str, list[Tensor]] = {tap.name: [] for tap in taps}
        for candidate in self._candidates:
            told = candidate.to(self.backbone.device)
            for target, x in zip(targets, noisy, strict=True):
                output = denoised(self.backbone, x, when, told)
                for tap in taps:
                    found[tap.name].append(error_of(tap, output, target))
        shape = (len(self._candidates), len(latents))
        return {name: torch.stack(x, dim=1).reshape(-1, *shape) for name, x in found.items()}


LOSSES: Mapping[tuple[str, ...], Callable[..., Tensor]] = {
    (): F.mse_loss,
    ("l1",): F.l1_loss,
    ("huber",): F.huber_loss,
}
"""By the parts of a tap `loss`; Huber's has delta 1."""


def denoised(backbone: Backbone, x: Tensor, when: ResolvedTime, told: Conditioning) -> Tensor:
    """What the network puts out for x [b, c, h, w], in float32."""
    return backbone.denoise(x, when, told, (), _nothing)[0].float()


def error_of(tap: ResolvedTap, output: Tensor, target: Tensor) -> Tensor:
    """The error [b] that a tap `loss` is: its mean over the image."""
    errors: Tensor = LOSSES[tap.parts](output, target, reduction="none")
    return errors.flatten(1).mean(1)


def _nothing(_tap: ResolvedTap, x: Tensor, _dims: tuple[str, ...]) -> Tensor:
    return x
