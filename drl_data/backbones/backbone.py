"""What every family must say, and what they all share: features of a batch, shapes on meta.

An adapter says only how an image becomes what the network takes (`encode`), what the network is
told besides (`conditioning`), and how it is called (`forward`). Taps, cut, noise and time are the
same for all.

Shapes: b batch, c channel, h w height and width of the denoiser's input, n token.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Self

import torch
from torch import Tensor, nn

from drl_data.errors import SpecError
from drl_data.flops import FeatureFlops, count_flops, trace
from drl_data.reduce import MAP, TOKENS, VECTOR, reduce
from drl_data.schedule import Schedule
from drl_data.spec import ArraySpec, ConditionSpec, DType, ImageSpec, ResolvedTime, TapSpec
from drl_data.taps import ResolvedTap, capture, expand_aliases, refuse_token_names, resolve

if TYPE_CHECKING:
    from drl_data.backbones.text import TextEncoders

Transform = Callable[[ResolvedTap, Tensor, tuple[str, ...]], Tensor]

CLEAN = ResolvedTime(requested=0, convention="none", model_time=0, alpha=1.0, sigma=0.0)
"""Time 0, for what does not depend on the time: shapes and FLOPs."""


@dataclass(frozen=True)
class Posterior:
    """The VAE's Gaussian over latents [b, c, h, w]; `std` is None for a deterministic encoder, and
    without a VAE, where the latents are the pixels and nothing scales them."""

    mean: Tensor
    std: Tensor | None = None
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    channel_mean: Tensor | None = None
    """Statistics of the latents [c, 1, 1], where the VAE's configuration has them."""
    channel_std: Tensor | None = None

    def latents(
        self, noise: Tensor | None, *, scale: bool | Literal["per_channel"] = True
    ) -> Tensor:
        """z = mean + std * noise, or the mean if `noise` is None; then scaled.

        `scale` is (z - shift) * factor, `per_channel` (z - channel mean) * factor / channel std as
        in diffusers' pipelines of such VAEs.

        Raises:
            SpecError: for `per_channel` without statistics.
        """
        z = self.mean if self.std is None or noise is None else self.mean + self.std * noise
        is_pixels = self.std is None and (self.shift_factor, self.scaling_factor) == (0.0, 1.0)
        if is_pixels or not scale:
            return z
        if scale != "per_channel":
            return (z - self.shift_factor) * self.scaling_factor
        if self.channel_mean is None or self.channel_std is None:
            raise SpecError(
                "latents.scale per_channel: the configuration of this VAE has no latents_mean and "
                "latents_std; use scale: true"
            )
        return (z - self.channel_mean) * self.scaling_factor / self.channel_std


@dataclass(frozen=True)
class Conditioning:
    """Keyword arguments of the network's forward: tensors [b, ...], a row for each sample of a
    batch, or [1, ...], the same for all."""

    kwargs: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def stack(cls, rows: Sequence[Conditioning]) -> Conditioning:
        """The conditioning of a batch from that of each of its samples."""
        return cls({k: torch.cat([row.kwargs[k] for row in rows]) for k in rows[0].kwargs})

    def to(self, device: torch.device) -> Conditioning:
        """The same on another device."""
        return Conditioning({k: v.to(device) for k, v in self.kwargs.items()})

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(v.nbytes for v in self.kwargs.values())

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

    def __init__(self, network: nn.Module, schedule: Schedule, device: torch.device) -> None:
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

    def resolve(self, taps: Sequence[TapSpec]) -> tuple[ResolvedTap, ...]:
        """The taps resolved against the network's modules, under whichever of their names.

        Raises:
            TapError: if a tap matches nothing, or two arrays would have one name.
        """
        return resolve(self.network, expand_aliases(taps, self.aliases()))

    def aliases(self) -> Mapping[str, tuple[str, str]]:
        """Other names of modules: {name: (module whose output it is, module whose input it is)}."""
        return {}

    def image_part(self, tap: ResolvedTap, value: object) -> object:
        """What a tap without a part means where a module gives several streams: the image's."""
        return value

    def arrange(
        self, tap: ResolvedTap, x: Tensor, size: tuple[int, int], kwargs: Mapping[str, Tensor]
    ) -> tuple[Tensor, tuple[str, ...]]:
        """A tap's tensor with the names of its axes.

        `size` is the height and width of the denoiser's input, `kwargs` what it is told.
        """
        refuse_token_names(tap)
        return arrange(x, size)

    def replica(self) -> Self:
        """The same weights behind other modules, so that hooks of two threads do not meet."""
        shared = [*self.network.parameters(), *self.network.buffers()]
        other = copy.copy(self)
        other.network = copy.deepcopy(self.network, {id(tensor): tensor for tensor in shared})
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

        The forward ends at the last tap unless `stop_early` is false.
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
        prediction = output[0] if isinstance(output, tuple) else output
        assert isinstance(prediction, Tensor), "a denoiser puts out an image"
        return prediction[:, : x.shape[1]], captured

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
        size = (x.shape[-2], x.shape[-1])
        kwargs = conditioning.expand(len(x))
        output: object = None

        def arrange_and_transform(tap: ResolvedTap, tensor: Tensor) -> Tensor:
            return transform(tap, *self.arrange(tap, tensor, size, kwargs))

        def run() -> None:
            nonlocal output
            output = self.forward(x, model_time, kwargs)

        captured = capture(
            self.network,
            taps,
            run,
            arrange_and_transform,
            select=self.image_part,
            stop_early=stop_early,
        )
        return captured, output

    def arrays(
        self,
        taps: Sequence[ResolvedTap],
        images: ImageSpec,
        condition: ConditionSpec,
        time: ResolvedTime,
        dtype: DType,
    ) -> tuple[ArraySpec, ...]:
        """Name, axes and shape of each tap's array, from one forward; meant for the meta device."""
        found: dict[str, ArraySpec] = {}

        def note(tap: ResolvedTap, tensor: Tensor, dims: tuple[str, ...]) -> Tensor:
            reduced, reduced_dims = reduce(tensor, dims, tap.reduce)
            found[tap.name] = ArraySpec(
                name=tap.name,
                tap=tap.address,
                dims=reduced_dims,
                shape=tuple(reduced.shape[1:]),
                dtype=dtype,
            )
            return reduced

        with torch.no_grad():
            self.tap(self._blank(images), time, self.conditioning(condition), taps, note)
        return tuple(found[tap.name] for tap in taps)

    def modules(self, images: ImageSpec, condition: ConditionSpec) -> tuple[TappableModule, ...]:
        """Every module that puts out a tensor, from one forward; meant for the meta device."""
        x = self._blank(images)
        told = self.conditioning(condition).expand(1)
        time = torch.zeros(1, dtype=torch.long, device=self.device)
        with torch.no_grad():
            calls, total = trace(
                self.network,
                lambda: self.forward(x, time, told),
                select=lambda path, output: self.image_part(_whole(path), output),
            )
        size = (x.shape[-2], x.shape[-1])

        def described(path: str, kind: str, output: Tensor, through: int) -> TappableModule:
            if output.ndim > 1 and len(output) == 1:
                output, dims = self.arrange(_whole(path), output, size, told)
                return TappableModule(path, kind, dims, tuple(output.shape[1:]), through / total)
            return TappableModule(path, kind, (), tuple(output.shape), through / total)

        return tuple(described(c.path, c.kind, c.output, c.flops_through) for c in calls)

    def flops(
        self, taps: Sequence[ResolvedTap], images: ImageSpec, condition: ConditionSpec
    ) -> FeatureFlops:
        """FLOPs for one image; meant for the meta device."""
        x, told = self._blank(images), self.conditioning(condition)
        pixels = torch.empty(
            (1, images.n_channels, *images.size), dtype=self.dtype, device=self.device
        )

        def forward(*, stop_early: bool) -> Callable[[], object]:
            return lambda: self.tap(
                x, CLEAN, told, taps, lambda _tap, tensor, _dims: tensor, stop_early=stop_early
            )

        with torch.no_grad():
            return FeatureFlops(
                whole=count_flops(forward(stop_early=False)),
                cut=count_flops(forward(stop_early=True)),
                encode=count_flops(lambda: self.encode(pixels)),
            )

    def _blank(self, images: ImageSpec) -> Tensor:
        """One input of the denoiser, without content."""
        return torch.empty((1, *self.input_shape(images)), dtype=self.dtype, device=self.device)


def _whole(path: str) -> ResolvedTap:
    """The tap of what a module puts out."""
    return ResolvedTap(path, path, "out", None)


def arrange(x: Tensor, size: tuple[int, int]) -> tuple[Tensor, tuple[str, ...]]:
    """Give a tap's tensor its axes: map [b, c, h, w], tokens [b, n, c], or vector [b, c].

    Tokens [b, n, c] become a map if n is the number of patches of `size` (height and width of the
    denoiser's input) for some square patch; row-major, as every patchifying transformer does.
    """
    if x.ndim == 4:
        return x, MAP
    if x.ndim == 2:
        return x, VECTOR
    if x.ndim != 3:
        x = x.flatten(1)
        return x, VECTOR
    height, width = size
    for patch in range(1, min(size) + 1):
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


def refuse_extras(spec: ConditionSpec, family: str, takes: Collection[str] = ()) -> None:
    """Raise SpecError if a model is told of sizes or guidance that it has no place for."""
    strange = [name for name in spec.extras if name not in takes]
    if strange:
        raise SpecError(f"condition.{strange[0]}: {family} takes none; leave it out")


def refuse_text(spec: ConditionSpec, family: str) -> None:
    """Raise SpecError if a model without text input is given a prompt, or what goes with one."""
    refuse_extras(spec, family)
    if spec.prompt or spec.prompt_embeddings or spec.template or spec.caption:
        raise SpecError(f"condition.prompt: {family} takes no text; leave it out")
