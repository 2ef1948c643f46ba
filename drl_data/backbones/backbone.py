"""What every family must say, and what they all share: features of a batch, shapes on meta.

An adapter says only how an image becomes what the network takes (`encode`), what the network is
told besides (`conditioning`), and how it is called (`forward`). Taps, cut, noise and time are the
same for all.

Shapes: b batch, c channel, h w height and width of the denoiser's input, n token. Where images are
[b, c, h, w], windows of videos are [b, c, f, h, w], f frames.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drl_data.capture import Streams, capture, image_output
from drl_data.diffusion_spec import ConditionSpec
from drl_data.errors import SpecError, TapError
from drl_data.flops import FeatureFlops, count_flops, trace
from drl_data.reduce import MAP, TOKENS, VECTOR, VIDEO
from drl_data.schedule import Schedule
from drl_data.spec import ArraySpec, ImageSpec, ResolvedTime, TapSpec
from drl_data.spec_base import StorageDType
from drl_data.tap_reducer import TapReducer, timesteps_of
from drl_data.tap_sites import LOSS, PREDICTIONS
from drl_data.taps import VAE, ResolvedTap, expand_aliases, resolve

if TYPE_CHECKING:
    from drl_data.backbones.text import TextEncoders

Transform = Callable[[ResolvedTap, Tensor, tuple[str, ...]], Tensor]

CLEAN = ResolvedTime(requested=0, convention="none", model_time=0, alpha=1.0, sigma=0.0)
"""Time 0, for what does not depend on the time: shapes and FLOPs."""


@dataclass(frozen=True)
class Posterior:
    """The VAE's Gaussian over latents [b, c, h, w], of a video [b, c, f, h, w].

    `std` is None for a deterministic encoder, and without a VAE, where the latents are the pixels
    and nothing scales them. `scaling_factor` is None for a VAE that has statistics instead.
    """

    mean: Tensor
    std: Tensor | None = None
    scaling_factor: float | None = 1.0
    shift_factor: float = 0.0
    channel_mean: Tensor | None = None
    """Statistics of the latents [c, 1, 1], of a video [c, 1, 1, 1], where the VAE's configuration
    has them."""
    channel_std: Tensor | None = None

    def latents(
        self, noise: Tensor | None, *, scale: bool | Literal["per_channel"] = True
    ) -> Tensor:
        """z = mean + std * noise, or the mean if `noise` is None; then scaled.

        `scale` is (z - shift) * factor, `per_channel` (z - channel mean) * factor / channel std as
        in diffusers' pipelines of such VAEs; of a VAE without a factor both are (z - channel mean)
        * (1 / channel std), rounded as its pipelines round.

        Raises:
            SpecError: for `per_channel` without statistics.
        """
        z = self.mean if self.std is None or noise is None else self.mean + self.std * noise
        is_pixels = self.std is None and (self.shift_factor, self.scaling_factor) == (0.0, 1.0)
        if is_pixels or not scale:
            return z
        if scale != "per_channel" and self.scaling_factor is not None:
            return (z - self.shift_factor) * self.scaling_factor
        if self.channel_mean is None or self.channel_std is None:
            raise SpecError(
                "latents.scale per_channel: the configuration of this VAE has no latents_mean and "
                "latents_std; use scale: true"
            )
        if self.scaling_factor is None:
            return (z - self.channel_mean) * (1 / self.channel_std)
        return (z - self.channel_mean) * self.scaling_factor / self.channel_std


@dataclass(frozen=True)
class Conditioning:
    """Keyword arguments of the network's forward: tensors [b, ...], a row for each sample of a
    batch, or [1, ...], the same for all."""

    kwargs: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def stack(cls, rows: Sequence[Conditioning]) -> Conditioning:
        """The conditioning of a batch from that of each of its samples; shorter texts are padded
        behind with zeros, as is the mask that hides them."""
        told = {k: [row.kwargs[k] for row in rows] for k in rows[0].kwargs}
        return cls({k: torch.cat(_equally_long(tensors)) for k, tensors in told.items()})

    def to(self, device: torch.device) -> Conditioning:
        """The same on another device."""
        return Conditioning({k: v.to(device) for k, v in self.kwargs.items()})

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(v.nbytes for v in self.kwargs.values())

    def rows(self, start: int, stop: int) -> Conditioning:
        """That of samples `start` to `stop` (exclusive) of the batch; texts keep their padding."""
        return Conditioning(
            {k: v if len(v) == 1 else v[start:stop] for k, v in self.kwargs.items()}
        )

    def take(self, samples: Tensor) -> Conditioning:
        """That of the samples at these positions int64 [n], in this order, again and again."""
        return Conditioning({k: v[samples.to(v.device)] for k, v in self.kwargs.items()})

    def expand(self, n: int) -> dict[str, Tensor]:
        """Arguments for `n` samples; one conditioning for all is not copied."""
        return {k: v.expand(n, *v.shape[1:]) for k, v in self.kwargs.items()}


@dataclass(frozen=True)
class TappableModule:
    """A module that can be tapped: its output's axes for one image, and the share of the forward's
    FLOPs (0..1) that is done when it ends."""

    path: str
    kind: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    share: float


class Backbone(ABC):
    """A frozen network with a schedule; weights on `device`, or structure only on meta."""

    text: TextEncoders | None = None
    """The text encoders that `conditioning` loads, where the model takes text."""

    vae: nn.Module | None = None
    """The VAE before a latent denoiser, whose modules can be tapped as `vae.PATH`."""

    def __init__(self, network: nn.Module, schedule: Schedule, device: torch.device) -> None:
        self.network = network.eval().requires_grad_(False)
        self.schedule = schedule
        self.device = device
        self.dtype = next(network.parameters()).dtype

    @abstractmethod
    def input_shape(self, images: ImageSpec) -> tuple[int, ...]:
        """(c, h, w) that the denoiser takes for images of this size; (c, f, h, w) if it is of
        videos.

        Raises:
            SpecError: if the model cannot take such images; the message says which it can.
        """

    def schedule_for(self, images: ImageSpec) -> Schedule:
        """The schedule of images of this size; the same for all but where a scheduler shifts its
        steps by their number of tokens."""
        return self.schedule

    @abstractmethod
    def encode(self, pixels: Tensor) -> Posterior:
        """From pixels [b, c, H, W] in the range of the image spec to the denoiser's input."""

    @abstractmethod
    def conditioning(self, spec: ConditionSpec) -> Conditioning:
        """What the network is told besides the time, for one sample: [1, ...].

        `spec` is the same for all samples, or has been resolved for one (conditions.py).

        Raises:
            SpecError: if the model cannot be conditioned so.
        """

    @abstractmethod
    def forward(self, x: Tensor, model_time: Tensor, kwargs: Mapping[str, Tensor]) -> object:
        """One whole denoiser forward of x [b, c, h, w] at model_time [b]."""

    def decode(self, latents: Tensor, *, scaled: bool | Literal["per_channel"]) -> object:
        """One forward of the VAE's decoder, for the taps in it; `scaled` as `LatentSpec.scale`.

        Raises:
            TapError: this model has no decoder.
        """
        raise TapError("this model has no VAE decoder; leave out taps of vae.dec")

    def streams(self, x: Tensor, kwargs: Mapping[str, Tensor]) -> Streams | None:
        """How the image's tokens lie among others inside the network, for its input x [b, c, h, w]
        and what it is told; None where no tensor holds other tokens."""
        return None

    def is_ragged(self, tap: ResolvedTap) -> bool:
        """Whether a tap has as many tokens as the prompt, in a model that pads none to a length."""
        return False

    def resolve(self, taps: Sequence[TapSpec]) -> tuple[ResolvedTap, ...]:
        """The taps of a spec against the modules of this model and of its VAE, under whichever of
        their names.

        Raises:
            TapError: see `taps.resolve`.
        """
        return resolve(self.network, expand_aliases(taps, self.aliases()), self.vae)

    def aliases(self) -> Mapping[str, tuple[str, str]]:
        """Other names of modules: {name: (module whose output it is, module whose input it is)}."""
        return {}

    def arrange(
        self, tap: ResolvedTap, x: Tensor, size: tuple[int, ...]
    ) -> tuple[Tensor, tuple[str, ...]]:
        """A tap's tensor with the names of its axes; `size` is height and width of the denoiser's
        input, of a video frames, height and width."""
        return arrange(x, size)

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
        return self._forward(x, time, conditioning, taps, transform, stop_early)[0]

    def denoise(
        self,
        x: Tensor,
        time: ResolvedTime,
        conditioning: Conditioning,
        taps: Sequence[ResolvedTap],
        transform: Transform,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One whole forward of x: the network's output [b, c, h, w], and what `tap` returns.

        Where the network also predicts a variance, in as many channels again, that is left out.
        """
        captured, output = self._forward(x, time, conditioning, taps, transform, False)
        return self.image_of(output, x), captured

    def _forward(
        self,
        x: Tensor,
        time: ResolvedTime,
        conditioning: Conditioning,
        taps: Sequence[ResolvedTap],
        transform: Transform,
        stop_early: bool,
    ) -> tuple[dict[str, Tensor], object]:
        """The taps, and what the network returned: nothing if it was cut."""
        model_time = torch.full((len(x),), time.model_time, device=x.device)
        if time.model_time == int(time.model_time):
            model_time = model_time.long()
        size, dims = tuple(x.shape[2:]), map_dims(x)
        kwargs = conditioning.expand(len(x))
        output: object = None

        def run() -> None:
            nonlocal output
            output = self.forward(x, model_time, kwargs)

        captured = {tap.name: transform(tap, x, dims) for tap in taps if tap.site == "latent"}
        predictions = [tap for tap in taps if tap.site in PREDICTIONS]
        inside = [tap for tap in taps if tap.site != "latent" and tap not in predictions]
        whole = bool(predictions) or not stop_early
        if inside or whole:
            captured |= capture(
                self.network,
                inside,
                run,
                lambda tap, tensor: transform(tap, *self._arranged(tap, tensor, size)),
                stop_early=not whole,
                streams=self.streams(x, kwargs),
            )
        for tap in predictions:
            predicted = self.schedule.predicted(tap.site, self.image_of(output, x), x, time)
            captured[tap.name] = transform(tap, predicted, dims)
        return captured, output

    def image_of(self, output: object, x: Tensor) -> Tensor:
        """The network's output [b, c, h, w] for x, without a variance that it predicts in as many
        channels again."""
        prediction = output[0] if isinstance(output, tuple) else output
        assert isinstance(prediction, Tensor), "a denoiser puts out an image"
        return prediction[:, : x.shape[1]]

    def _arranged(
        self, tap: ResolvedTap, x: Tensor, size: tuple[int, ...]
    ) -> tuple[Tensor, tuple[str, ...]]:
        """`arrange`, which also knows attention probabilities [b, head, query, key]."""
        if tap.site != "attn.probs" or x.ndim != 4:
            return self.arrange(tap, x, size)
        arranged, dims = self.arrange(tap, x.flatten(0, 1), size)
        return arranged.reshape(*x.shape[:2], *arranged.shape[1:]), ("head", *dims)

    def encode_and_tap(
        self,
        pixels: Tensor,
        taps: Sequence[ResolvedTap],
        transform: Transform,
        *,
        frame_latents: Literal["video", "each"] = "video",
    ) -> Posterior:
        """`encode`, with the taps in the VAE's encoder and of the posterior taken on the way.

        `frame_latents` as `ImageSpec` has it.
        """
        found: list[Posterior] = []
        inside = [tap for tap in taps if tap.module]

        def encode() -> None:
            encode = self._encode_each if frame_latents == "each" else self.encode
            found.append(encode(pixels))

        if inside:
            self._tap_vae(inside, encode, transform)
        else:
            encode()
        (posterior,) = found
        for tap in taps:
            if not tap.module:
                if posterior.std is None:
                    raise TapError(
                        f"tap {tap.address}: this model has no VAE with a posterior, so no moments"
                    )
                moments = torch.cat([posterior.mean, posterior.std], dim=1)
                transform(tap, moments, map_dims(moments))
        return posterior

    def _encode_each(self, pixels: Tensor) -> Posterior:
        """`encode` of each frame of pixels [b, c, f, H, W] for itself: latents [b, c, f, h, w]."""
        n_frames = pixels.shape[2]
        one = self.encode(pixels.transpose(1, 2).flatten(0, 1)[:, :, None])

        def together(x: Tensor) -> Tensor:
            return x.squeeze(2).reshape(-1, n_frames, *x.shape[1:2], *x.shape[3:]).transpose(1, 2)

        std = None if one.std is None else together(one.std)
        return replace(one, mean=together(one.mean), std=std)

    def decode_and_tap(
        self,
        latents: Tensor,
        taps: Sequence[ResolvedTap],
        transform: Transform,
        *,
        scaled: bool | Literal["per_channel"],
    ) -> None:
        """The clean latents, and the taps in the VAE's decoder when it decodes them."""
        for tap in taps:
            if not tap.module:
                transform(tap, latents, map_dims(latents))
        inside = [tap for tap in taps if tap.module]
        if inside:
            decode = partial(self.decode, latents, scaled=scaled)
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
        pixels = torch.empty((1, *images.shape), device=self.device)
        reducer = TapReducer(taps)
        reducer.start(0, 1)
        with torch.no_grad():
            if reducer.encoder:
                self.encode_and_tap(
                    pixels.to(self.dtype),
                    reducer.encoder,
                    reducer.take,
                    frame_latents=images.frame_latents,
                )
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

    def modules(self, images: ImageSpec, condition: ConditionSpec) -> tuple[TappableModule, ...]:
        """Every module that puts out a tensor, from one forward; meant for the meta device."""
        x = self._blank(images)
        told = self.conditioning(condition).expand(1)
        time = torch.zeros(1, dtype=torch.long, device=self.device)
        streams = self.streams(x, told)
        with torch.no_grad():
            calls, total = trace(
                self.network,
                lambda: self.forward(x, time, told),
                select=lambda path, output: image_output(self.network, path, output, streams),
            )
        size = tuple(x.shape[2:])

        def described(path: str, kind: str, output: Tensor, through: int) -> TappableModule:
            if output.ndim > 1 and len(output) == 1:
                output, dims = self.arrange(ResolvedTap(path, path, "out"), output, size)
                return TappableModule(path, kind, dims, tuple(output.shape[1:]), through / total)
            return TappableModule(path, kind, (), tuple(output.shape), through / total)

        return tuple(described(c.path, c.kind, c.output, c.flops_through) for c in calls)

    def flops(
        self, taps: Sequence[ResolvedTap], images: ImageSpec, condition: ConditionSpec
    ) -> FeatureFlops:
        """FLOPs for one image; meant for the meta device."""
        x, told = self._blank(images), self.conditioning(condition)
        pixels = torch.empty((1, *images.shape), dtype=self.dtype, device=self.device)

        reducer = TapReducer(taps)
        scores = any(tap.site == LOSS for tap in taps)

        def ignored(_tap: ResolvedTap, tensor: Tensor, _dims: tuple[str, ...]) -> Tensor:
            return tensor

        def forward(*, stop_early: bool) -> Callable[[], object]:
            return lambda: self.tap(
                x, CLEAN, told, reducer.denoiser, ignored, stop_early=stop_early
            )

        def encode() -> None:
            self.encode_and_tap(pixels, (), ignored, frame_latents=images.frame_latents)
            self.decode_and_tap(x, reducer.decoder, ignored, scaled=True)

        with torch.no_grad():
            return FeatureFlops(
                whole=count_flops(forward(stop_early=False)),
                cut=count_flops(forward(stop_early=not scores)),
                encode=count_flops(encode),
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
            lambda tap, x: transform(whole[tap.name], *arrange(x, (0, 0))),
            stop_early=stop_early,
        )

    def _blank(self, images: ImageSpec) -> Tensor:
        """One input of the denoiser, without content."""
        return torch.empty((1, *self.input_shape(images)), dtype=self.dtype, device=self.device)


def _replica(module: nn.Module) -> nn.Module:
    shared = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in shared})


def map_dims(x: Tensor) -> tuple[str, ...]:
    """Names of the axes of images [b, c, h, w] or videos [b, c, f, h, w]."""
    return VIDEO if x.ndim == 5 else MAP


def arrange(x: Tensor, size: tuple[int, ...]) -> tuple[Tensor, tuple[str, ...]]:
    """Give a tap's tensor its axes: map [b, c, h, w] or [b, c, f, h, w], tokens [b, n, c], or
    vector [b, c].

    Tokens [b, n, c] become a map if n is the number of patches of `size` (height and width of the
    denoiser's input) for some square patch; row-major, as every patchifying transformer does.
    """
    if x.ndim == 5 and x.shape[2] == 1:  # one frame of a video's VAE
        x = x[:, :, 0]
    if x.ndim in (4, 5):
        return x, map_dims(x)
    if x.ndim == 2:
        return x, VECTOR
    if x.ndim != 3:
        x = x.flatten(1)
        return x, VECTOR
    if len(size) != 2:
        return x, TOKENS
    height, width = size
    for patch in range(1, min(size) + 1):
        if height % patch == 0 == width % patch and x.shape[1] == height * width // patch**2:
            side = (height // patch, width // patch)
            return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *side), MAP
    return x, TOKENS


def _equally_long(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors [1, n, ...], n the largest of theirs; vectors [1] stay."""
    if tensors[0].ndim < 2:
        return list(tensors)
    n = max(x.shape[1] for x in tensors)
    return [F.pad(x, (0, 0) * (x.ndim - 2) + (0, n - x.shape[1])) for x in tensors]


def check_images(images: ImageSpec, n_channels: int, multiple: int) -> None:
    """Refuse images that a model cannot take.

    Raises:
        SpecError: for windows of videos, another number of channels, or a size that is no multiple
            of `multiple`.
    """
    if images.frames > 1:
        raise SpecError(f"images.frames {images.frames}: the model takes images, not videos")
    check_pixels(images, n_channels, multiple)


def check_pixels(images: ImageSpec, n_channels: int, multiple: int) -> None:
    """As `check_images`, for a model that takes videos too."""
    if images.n_channels != n_channels:
        raise SpecError(
            f"images.mode {images.mode}: {images.n_channels} channels; the model takes {n_channels}"
        )
    if any(side % multiple for side in images.size):
        raise SpecError(f"images.size {list(images.size)}: the model needs multiples of {multiple}")


def refuse_extras(spec: ConditionSpec, family: str, takes: Collection[str] = ()) -> None:
    """Raise SpecError if a model is told something that it has no place for."""
    strange = [name for name in spec.extras if name not in takes]
    if strange:
        raise SpecError(f"condition.{strange[0]}: {family} takes none; leave it out")


def refuse_text(spec: ConditionSpec, family: str) -> None:
    """Raise SpecError if a model without text input is given a prompt, or what goes with one."""
    refuse_extras(spec, family)
    if spec.prompt or spec.prompt_embeddings or spec.template or spec.caption:
        raise SpecError(f"condition.prompt: {family} takes no text; leave it out")
