"""What every family must say, and what they all share: features of a batch, shapes on meta.

An adapter says only how an image becomes what the network takes (`encode`), what the network is
told besides (`conditioning`), and how it is called (`forward`). Taps, cut, noise and time are the
same for all.

Shapes: b batch, c channel, h w height and width of the denoiser's input, n token.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor, nn

from drl_data.capture import Streams, capture
from drl_data.errors import SpecError, TapError
from drl_data.reduce import MAP, TOKENS, VECTOR
from drl_data.schedule import NoiseSchedule, to_eps, to_v, to_x0
from drl_data.spec import (
    ArraySpec,
    ConditionSpec,
    ImageSpec,
    ResolvedTime,
    StorageDType,
    TapSpec,
)
from drl_data.tap_reducer import TapReducer, timesteps_of
from drl_data.taps import VAE, ResolvedTap, resolve

Transform = Callable[[ResolvedTap, Tensor, tuple[str, ...]], Tensor]

CONVERSIONS = {"x0": to_x0, "eps": to_eps, "v": to_v}
"""Sites of the network's output as a prediction."""


@dataclass(frozen=True)
class Posterior:
    """The VAE's Gaussian over latents [b, c, h, w]; without a VAE (`std` None) the pixels."""

    mean: Tensor
    std: Tensor | None = None
    scaling_factor: float = 1.0
    shift_factor: float = 0.0

    def latents(self, noise: Tensor | None, *, scale: bool = True) -> Tensor:
        """mean + std * noise, or the mean if `noise` is None; then (z - shift) * scaling factor."""
        z = self.mean if self.std is None or noise is None else self.mean + self.std * noise
        return (
            (z - self.shift_factor) * self.scaling_factor if scale and self.std is not None else z
        )


@dataclass(frozen=True)
class Conditioning:
    """Keyword arguments of the network's forward for one sample, each tensor [1, ...]."""

    kwargs: Mapping[str, Tensor] = field(default_factory=dict)

    def expand(self, n: int) -> dict[str, Tensor]:
        """The same conditioning for `n` samples, without a copy."""
        return {k: v.expand(n, *v.shape[1:]) for k, v in self.kwargs.items()}


class Backbone(ABC):
    """A frozen network with a noise schedule; weights on `device`, or structure only on meta."""

    vae: nn.Module | None = None
    """The VAE before a latent denoiser, whose modules can be tapped as `vae.PATH`."""

    def __init__(self, network: nn.Module, schedule: NoiseSchedule, device: torch.device) -> None:
        self.network = network.eval().requires_grad_(False)
        self.schedule = schedule
        self.device = device
        self.dtype = next(network.parameters()).dtype

    @abstractmethod
    def input_shape(self, images: ImageSpec) -> tuple[int, int, int]:
        """(c, h, w) that the denoiser takes for images of this size.

        Raises:
            SpecError: if the model cannot take such images; the message says which it can.
        """

    @abstractmethod
    def encode(self, pixels: Tensor) -> Posterior:
        """From pixels [b, c, H, W] in the range of the image spec to the denoiser's input."""

    @abstractmethod
    def conditioning(self, spec: ConditionSpec) -> Conditioning:
        """What the network is told besides the time; computed once a run.

        Raises:
            SpecError: if the model cannot be conditioned so.
        """

    @abstractmethod
    def forward(self, x: Tensor, model_time: Tensor, kwargs: Mapping[str, Tensor]) -> object:
        """One whole denoiser forward of x [b, c, h, w] at model_time [b]."""

    def decode(self, latents: Tensor, *, scaled: bool) -> object:
        """One forward of the VAE's decoder, for the taps in it; `scaled` as `LatentSpec.scale`.

        Raises:
            TapError: this model has no decoder.
        """
        raise TapError("this model has no VAE decoder; leave out taps of vae.dec")

    def streams(self, x: Tensor, kwargs: Mapping[str, Tensor]) -> Streams | None:
        """How image and text tokens lie together inside a joint transformer, for denoiser input x
        [b, c, h, w]; None where no tensor holds both."""
        return None

    def resolve(self, taps: Sequence[TapSpec]) -> tuple[ResolvedTap, ...]:
        """The taps of a spec against the modules of this model and of its VAE.

        Raises:
            TapError: see `taps.resolve`.
        """
        return resolve(self.network, taps, self.vae)

    def replica(self) -> Self:
        """The same weights behind other modules, so that hooks of two threads do not meet."""
        other = copy.copy(self)
        other.network = _replica(self.network)
        if self.vae is not None:
            other.vae = _replica(self.vae)
        return other

    def tap(
        self,
        x: Tensor,
        time: ResolvedTime,
        conditioning: Conditioning,
        taps: Sequence[ResolvedTap],
        transform: Transform,
        *,
        stop_early: bool = True,
    ) -> dict[str, Tensor]:
        """One forward of x [b, c, h, w]; {tap name: transform(tap, tensor, names of its axes)}.

        The forward ends at the last tap unless `stop_early` is false; without a tap of the network
        there is none. `x` itself is what `latent.noisy` takes.
        """
        model_time = torch.full((len(x),), time.model_time, device=x.device)
        if time.model_time == int(time.model_time):
            model_time = model_time.long()
        kwargs = conditioning.expand(len(x))
        grid = (x.shape[-2], x.shape[-1])

        def arrange_and_transform(tap: ResolvedTap, tensor: Tensor) -> Tensor:
            if tap.site in CONVERSIONS:
                output = tensor[:, : x.shape[1]]  # the rest is a learned variance
                convert = CONVERSIONS[tap.site]
                return transform(tap, convert(output, x, time, self.schedule.prediction), MAP)
            return transform(tap, *arrange_tap(tap, tensor, grid))

        inputs = [tap for tap in taps if tap.site == "latent"]
        captured = {tap.name: transform(tap, x, MAP) for tap in inputs}
        inside = [tap for tap in taps if tap.site != "latent"]
        if inside:
            captured |= capture(
                self.network,
                inside,
                lambda: self.forward(x, model_time, kwargs),
                arrange_and_transform,
                stop_early=stop_early,
                streams=self.streams(x, kwargs),
            )
        return captured

    def encode_and_tap(
        self, pixels: Tensor, taps: Sequence[ResolvedTap], transform: Transform
    ) -> Posterior:
        """`encode`, with the taps in the VAE's encoder and of the posterior taken on the way."""
        found: list[Posterior] = []
        inside = [tap for tap in taps if tap.module]
        if inside:
            self._tap_vae(inside, lambda: found.append(self.encode(pixels)), transform)
        posterior = found[0] if found else self.encode(pixels)
        for tap in taps:
            if not tap.module:
                if posterior.std is None:
                    raise TapError(f"tap {tap.address}: this model takes pixels, it has no moments")
                transform(tap, torch.cat([posterior.mean, posterior.std], dim=1), MAP)
        return posterior

    def decode_and_tap(
        self, latents: Tensor, taps: Sequence[ResolvedTap], transform: Transform, *, scaled: bool
    ) -> None:
        """The clean latents, and the taps in the VAE's decoder when it decodes them."""
        for tap in taps:
            if not tap.module:
                transform(tap, latents, MAP)
        inside = [tap for tap in taps if tap.module]
        if inside:
            decode = lambda: self.decode(latents, scaled=scaled)  # noqa: E731
            self._tap_vae(inside, decode, transform, stop_early=True)

    def arrays(
        self,
        taps: Sequence[ResolvedTap],
        images: ImageSpec,
        condition: ConditionSpec,
        time: ResolvedTime,
        dtype: StorageDType,
    ) -> tuple[ArraySpec, ...]:
        """Name, axes and shape of each tap's array, from one forward; meant for the meta device."""
        x = torch.empty((1, *self.input_shape(images)), dtype=self.dtype, device=self.device)
        pixels = torch.empty((1, images.n_channels, *images.size), device=self.device)
        reducer = TapReducer(taps)
        reducer.start(0, 1)
        with torch.no_grad():
            if reducer.encoder:
                self.encode_and_tap(pixels.to(self.dtype), reducer.encoder, reducer.take)
            self.decode_and_tap(x, reducer.decoder, reducer.take, scaled=True)
            self.tap(x, time, self.conditioning(condition), reducer.denoiser, reducer.take)
            found = reducer.finish()
        return tuple(
            ArraySpec(
                name=tap.name,
                tap=tap.address,
                dims=reducer.dims[tap.name],
                shape=tuple(found[tap.name].shape[1:]),
                dtype=dtype,
                timesteps=timesteps_of(tap),
            )
            for tap in taps
        )

    def _tap_vae(
        self,
        taps: Sequence[ResolvedTap],
        forward: Callable[[], object],
        transform: Transform,
        *,
        stop_early: bool = False,
    ) -> None:
        assert self.vae is not None
        whole = {tap.name: tap for tap in taps}
        local = [replace(tap, module=tap.module.removeprefix(VAE)) for tap in taps]
        capture(
            self.vae,
            local,
            forward,
            lambda tap, x: transform(whole[tap.name], *arrange_tap(tap, x, (0, 0))),
            stop_early=stop_early,
        )


def _replica(module: nn.Module) -> nn.Module:
    shared = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in shared})


def arrange_tap(
    tap: ResolvedTap, x: Tensor, grid: tuple[int, int]
) -> tuple[Tensor, tuple[str, ...]]:
    """`arrange`, which also knows attention probabilities [b, head, query, key]."""
    if tap.site != "attn.probs" or x.ndim != 4:
        return arrange(x, grid)
    arranged, dims = arrange(x.flatten(0, 1), grid)
    return arranged.reshape(*x.shape[:2], *arranged.shape[1:]), ("head", *dims)


def arrange(x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[str, ...]]:
    """Give a tap's tensor its axes: map [b, c, h, w], tokens [b, n, c], or vector [b, c].

    Tokens [b, n, c] become a map if n is the number of patches of `grid` (height and width of the
    denoiser's input) for some square patch; row-major, as every patchifying transformer does.
    """
    if x.ndim == 4:
        return x, MAP
    if x.ndim == 2:
        return x, VECTOR
    if x.ndim != 3:
        x = x.flatten(1)
        return x, VECTOR
    height, width = grid
    for patch in range(1, min(grid) + 1):
        if height % patch == 0 == width % patch and x.shape[1] == height * width // patch**2:
            side = (height // patch, width // patch)
            return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *side), MAP
    return x, TOKENS


def check_images(images: ImageSpec, n_channels: int, multiple: int) -> None:
    """Refuse images that a model cannot take.

    Raises:
        SpecError: for another number of channels, or a size that is no multiple of `multiple`.
    """
    if images.n_channels != n_channels:
        raise SpecError(
            f"images.mode {images.mode}: {images.n_channels} channels; the model takes {n_channels}"
        )
    if any(side % multiple for side in images.size):
        raise SpecError(f"images.size {list(images.size)}: the model needs multiples of {multiple}")


def refuse_text(spec: ConditionSpec, family: str) -> None:
    """Raise SpecError if a model without text input is given a prompt."""
    if spec.prompt or spec.prompt_embeddings:
        raise SpecError(f"condition.prompt: {family} takes no text; leave it out")
