"""From the tensors that taps take to the features of the arrays.

Mean over members of raw tensors in float32, then the reductions, then the mean over timesteps where
a tap asks for it. A tap is reduced inside its hook where nothing has to come first, so that whole
tensors of many taps are never in memory at once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from torch import Tensor

from drl_data.reduce import TIME_MEAN, Context, Pca, pca_of, reduce
from drl_data.tap_sites import LOSS
from drl_data.taps import VAE, ResolvedTap

Fits = Mapping[str, Sequence[Pca]]
"""Array -> fitted components at each timestep, or one for all."""

TapTimes = Mapping[str, Collection[int]]
"""Array -> positions of the timesteps at which it is wanted."""


class TapReducer:
    """The taps of one computer; used by one thread at a time.

    For each timestep: `start`, forwards that call `take`, `finish`.
    """

    def __init__(
        self,
        taps: Sequence[ResolvedTap],
        *,
        n_times: int = 1,
        fits: Fits | None = None,
        wanted: TapTimes | None = None,
    ) -> None:
        """Of every tap at all `n_times` timesteps, or of those that are `wanted`, when they are."""
        self.taps = tuple(taps)
        self._wanted = wanted
        self._fits = fits or {}
        self._n_times = n_times
        self._n_members = 1
        self._time = 0
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._reduced: dict[str, Tensor] = {}
        self._over_time: dict[str, tuple[Tensor | float, int]] = {}
        self._taken_dims: dict[str, tuple[str, ...]] = {}
        self.dims: dict[str, tuple[str, ...]] = {}
        """Names of the axes of each array's rows, once it is finished."""
        self.start(0, 1)

    @property
    def encoder(self) -> list[ResolvedTap]:
        """Taps that encoding an image reaches."""
        return [tap for tap in self._timeless if _is_encoder(tap)]

    @property
    def decoder(self) -> list[ResolvedTap]:
        """Taps of the clean latents, and those that decoding them reaches."""
        return [tap for tap in self._timeless if not _is_encoder(tap)]

    @property
    def _timeless(self) -> list[ResolvedTap]:
        return [
            tap
            for tap in self.taps
            if tap.is_timeless and (self._wanted is None or self._wanted.get(tap.name))
        ]

    @property
    def denoiser(self) -> list[ResolvedTap]:
        """Taps that differ between timesteps, of the timestep that was started, and the modulations
        that their reductions need."""
        inside = [tap for tap in self._here if tap.site != LOSS]
        return [*inside, *self._helpers.values()]

    @property
    def losses(self) -> list[ResolvedTap]:
        """Taps of the prediction's error, of the timestep that was started."""
        return [tap for tap in self._here if tap.site == LOSS]

    def start(self, time_index: int, n_members: int) -> None:
        """Begin a timestep, of which `n_members` forwards follow."""
        self._time, self._n_members = time_index, n_members
        self._here = [
            tap
            for tap in self.taps
            if not tap.is_timeless
            and (self._wanted is None or time_index in self._wanted.get(tap.name, ()))
        ]
        self._helpers = {m.name: m for tap in self._here for m in tap.modulation}
        self._sums.clear()
        self._counts.clear()
        self._reduced.clear()

    def take(self, tap: ResolvedTap, x: Tensor, dims: tuple[str, ...]) -> Tensor:
        """What a tap's hook calls with x [b, *dims]; returns what is kept of it."""
        name = tap.name
        if self._n_members > 1 or tap.modulation or name in self._helpers:
            self._taken_dims[name] = dims
            self._counts[name] = self._counts.get(name, 0) + 1
            sums = self._sums.get(name)
            self._sums[name] = x.float().clone() if sums is None else sums + x
            return x
        y = self._reduce(tap, x, dims, Context())
        # A copy where nothing reduces: the model may go on to change x in place.
        self._reduced[name] = y.clone() if y is x else y
        return self._reduced[name]

    def finish(self) -> dict[str, Tensor]:
        """{array: features [b, *shape]} of what was taken since `start`.

        An array with the mean over timesteps comes with the last one only.
        """
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        out: dict[str, Tensor] = {}
        for tap in self.taps:
            if tap.name in means:
                context = Context()
                if tap.modulation:
                    shift, scale = (means[m.name] for m in tap.modulation)
                    context = Context(shift, scale)
                y = self._reduce(tap, means[tap.name], self._taken_dims[tap.name], context)
            elif tap.name in self._reduced:
                y = self._reduced[tap.name]
            else:
                continue
            if TIME_MEAN not in tap.reduce:
                out[tap.name] = y
            elif (mean := self._mean_over_time(tap, y)) is not None:
                out[tap.name] = mean
        return out

    def _reduce(
        self, tap: ResolvedTap, x: Tensor, dims: tuple[str, ...], context: Context
    ) -> Tensor:
        """The reductions up to the mean over timesteps."""
        before = tap.later
        if TIME_MEAN in before:
            before = before[: before.index(TIME_MEAN)]
        y, self.dims[tap.name] = reduce(x, dims, before, self._fitted(tap, context))
        return y

    def _mean_over_time(self, tap: ResolvedTap, y: Tensor) -> Tensor | None:
        """The mean over timesteps and the reductions after it; None before the last timestep,
        whichever that is."""
        before, n_before = self._over_time.get(tap.name, (0.0, 0))
        total, n = y.float() + before, n_before + 1
        self._over_time[tap.name] = (total, n)
        if n < self._n_times:
            return None
        after = tap.later[tap.later.index(TIME_MEAN) + 1 :]
        context = self._fitted(tap, Context())
        y, self.dims[tap.name] = reduce(total / self._n_times, self.dims[tap.name], after, context)
        return y

    def _fitted(self, tap: ResolvedTap, context: Context) -> Context:
        fits = self._fits.get(tap.name)
        if not fits or pca_of(tap.reduce) is None:
            return context
        return Context(context.shift, context.scale, fits[min(self._time, len(fits) - 1)])


def _is_encoder(tap: ResolvedTap) -> bool:
    if not tap.module:
        return tap.parts == ("moments",)
    return tap.module.startswith((f"{VAE}encoder", f"{VAE}quant_conv"))


def timesteps_of(tap: ResolvedTap) -> Literal["each", "mean", "none"]:
    """Whether the array has an entry for `each` timestep, their `mean`, or `none` differs."""
    if tap.is_timeless:
        return "none"
    return "mean" if TIME_MEAN in tap.reduce else "each"
