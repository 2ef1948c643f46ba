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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, Self

import torch
from torch import Tensor, nn

from drl_data.errors import SpecError
from drl_data.reduce import MAP, TOKENS, VECTOR, reduce
from drl_data.spec import ArraySpec, ConditionSpec, DType, ImageSpec, ResolvedTime, ScheduleSpec
from drl_data.taps import ResolvedTap, capture

if TYPE_CHECKING:
    from drl_data.backbones.text import TextEncoders

Transform = Callable[[ResolvedTap, Tensor, tuple[str, ...]], Tensor]


class Schedule(Protocol):
    """Turns requested timesteps into what the network is told and how much noise is added."""

    def resolve(self, spec: ScheduleSpec) -> tuple[ResolvedTime, ...]:
        """Every requested timestep, in order."""


@dataclass(frozen=True)
class Posterior:
    """The VAE's Gaussian over latents [b, c, h, w]; `std` is None for a deterministic encoder, and
    without a VAE, where the latents are the pixels."""

    mean: Tensor
    std: Tensor | None = None
    scaling_factor: float = 1.0
    shift_factor: float = 0.0

    def latents(self, noise: Tensor | None, *, scale: bool = True) -> Tensor:
        """mean + std * noise, or the mean if `noise` is None; then (z - shift) * scaling factor."""
        z = self.mean if self.std is None or noise is None else self.mean + self.std * noise
        if not scale or (self.shift_factor, self.scaling_factor) == (0.0, 1.0):
            return z
        return (z - self.shift_factor) * self.scaling_factor


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


class Backbone(ABC):
    """A frozen network with a noise schedule; weights on `device`, or structure only on meta."""

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

    def image_part(self, tap: ResolvedTap, value: object) -> object:
        """What a tap without a part means where a module gives several streams: the image's."""
        return value

    def arrange(
        self, tap: ResolvedTap, x: Tensor, size: tuple[int, int], kwargs: Mapping[str, Tensor]
    ) -> tuple[Tensor, tuple[str, ...]]:
        """A tap's tensor with the names of its axes after the batch.

        `size` is the height and width of the denoiser's input, `kwargs` what it is told.
        """
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
        model_time = torch.full((len(x),), time.model_time, device=x.device)
        if time.model_time == int(time.model_time):
            model_time = model_time.long()
        size = (x.shape[-2], x.shape[-1])
        kwargs = conditioning.expand(len(x))

        def arrange_and_transform(tap: ResolvedTap, tensor: Tensor) -> Tensor:
            return transform(tap, *self.arrange(tap, tensor, size, kwargs))

        return capture(
            self.network,
            taps,
            lambda: self.forward(x, model_time, kwargs),
            arrange_and_transform,
            select=self.image_part,
            stop_early=stop_early,
        )

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

        x = torch.empty((1, *self.input_shape(images)), dtype=self.dtype, device=self.device)
        with torch.no_grad():
            self.tap(x, time, self.conditioning(condition), taps, note)
        return tuple(found[tap.name] for tap in taps)


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
    if spec.prompt or spec.prompt_embeddings or spec.template or spec.caption:
        raise SpecError(f"condition.prompt: {family} takes no text; leave it out")
