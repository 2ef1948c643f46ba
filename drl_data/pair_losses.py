"""Losses of pairs of an image and a candidate, for the candidates that staged pruning leaves.

Images of a batch are encoded once. At each timestep the pairs that are left make forwards of
exactly `batch_size` pairs (the last one is filled up), so that a pair's loss does not depend on how
many others there are but for rounding; with all candidates of a full batch the forwards are those
of a whole table, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from drl_data.backbones import Conditioning
from drl_data.device_memory import MicroBatches
from drl_data.features import NO_CLOCK, FeatureComputer, StageClock, denoised, error_of
from drl_data.stages import Losses, Places
from drl_data.taps import ResolvedTap

TOLD_BYTES = 1 << 30
"""What all candidates are told is kept on the device if it is not larger."""


def told_to_candidates(candidates: Sequence[Conditioning], device: torch.device) -> Conditioning:
    """The conditioning of all candidates in one: tensors [candidate, ...], of which pairs take."""
    told = Conditioning.stack(candidates)
    return told.to(device) if told.n_bytes <= TOLD_BYTES else told


class PairLosses:
    """Losses of the pairs of one batch of images; a `stages.LossSource`."""

    def __init__(
        self,
        computer: FeatureComputer,
        told: Conditioning,
        tap: ResolvedTap,
        pixels: npt.NDArray[np.uint8],
        keys: Sequence[str],
        *,
        micro_batches: MicroBatches,
        clock: StageClock = NO_CLOCK,
        ask: Callable[[], None] = lambda: None,
    ) -> None:
        """`pixels` uint8 [b, c, H, W] and `keys` as `FeatureComputer.compute` takes them; `ask` is
        called before each forward, and may raise."""
        self._computer, self._told, self._tap = computer, told, tap
        self._keys, self._batch_size = keys, len(pixels)
        self._micro_batches, self._clock, self._ask = micro_batches, clock, ask
        self.n_evaluations = 0
        """Pairs whose loss was computed, at each timestep and for each member."""
        with clock.stage("encode"):
            self._latents = computer.encode(pixels, keys)

    def __call__(self, places: Sequence[int], images: Places, candidates: Places) -> Losses:
        """Losses float32 [n, k, m] of the pairs (images[n], candidates[n]) at these timesteps."""
        device = self._computer.backbone.device
        n, n_members = len(images), len(self._latents)
        images_n = torch.from_numpy(images).to(device)
        candidates_n = torch.from_numpy(candidates)
        found = torch.empty((n, len(places), n_members), device=device)
        for k, place in enumerate(places):
            with self._clock.stage("denoise"):
                for m, (noisy, target) in enumerate(
                    self._computer.noised(place, self._latents, self._keys)
                ):
                    for start in range(0, n, self._batch_size):
                        chosen = slice(start, start + self._batch_size)
                        found[chosen, k, m] = self._forward(
                            place, noisy, target, images_n[chosen], candidates_n[chosen]
                        )
        self.n_evaluations += found.numel()
        with self._clock.stage("copy"):
            return found.cpu().numpy()

    @torch.no_grad()
    def _forward(
        self, place: int, noisy: Tensor, target: Tensor, images: Tensor, candidates: Tensor
    ) -> Tensor:
        """Losses [n] of at most `batch_size` pairs, by forwards of the same shape always."""
        rest = self._batch_size - len(images)
        i = torch.cat([images, images[-1:].expand(rest)])
        told = self._told.take(torch.cat([candidates, candidates[-1:].expand(rest)]))
        told = told.to(noisy.device)
        x, wanted = noisy[i], target[i]
        losses = torch.empty(self._batch_size, device=noisy.device)
        when = self._computer.times[place]

        def work(start: int, stop: int) -> None:
            self._ask()
            output = denoised(self._computer.backbone, x[start:stop], when, told.rows(start, stop))
            losses[start:stop] = error_of(self._tap, output, wanted[start:stop])

        self._micro_batches.run(self._batch_size, work)
        return losses[: len(images)]
