"""Noise schedules: timestep conventions to (model time, alpha, sigma), and the corruption itself.

x_t = alpha x_0 + sigma eps,    alpha = sqrt(abar_t),  sigma = sqrt(1 - abar_t)
                                (Ho et al. 2020, eq. 4: variance-preserving diffusion)

Every foreign parametrisation becomes this one here: a scheduler that adds sigma eps and then scales
the network's input by c (Euler and its kin) has alpha = c and sigma = c sigma.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from drl_data.diffusion_spec import STEPPED, NoiseSpec, ScheduleSpec
from drl_data.errors import SpecError, TapError
from drl_data.spec import ResolvedTime

Prediction = Literal["epsilon", "sample", "v_prediction", "flow_prediction"]
"""What a network's output means: eps, x_0, alpha eps - sigma x_0, or eps - x_0."""


@dataclass(frozen=True)
class Step:
    """A place on a schedule: what the network is told there, and the noise."""

    time: float
    alpha: float
    sigma: float


CLEAN = Step(time=-1, alpha=1, sigma=0)
"""Where an inversion starts: the clean input, of which the network is told the time -1."""


class Sampler(Protocol):
    """A scheduler with its own steps, from noise to clean; diffusers' are in backbones."""

    @property
    def name(self) -> str:
        """What it is called in messages."""

    @property
    def n_timesteps(self) -> int:
        """Timesteps that the model was trained with."""

    @property
    def order(self) -> int:
        """Entries of `times` for one step of the solver (Heun has 2)."""

    def times(self, n_steps: int) -> tuple[float, ...]:
        """What the network is told at each of `n_steps` steps, from noise to clean."""

    def step(self, n_steps: int, position: int) -> Step:
        """The entry of `times(n_steps)` at `position`, with its noise."""


class Schedule(Protocol):
    """What a backbone knows of time: it resolves requested timesteps in its own conventions."""

    def resolve(self, spec: ScheduleSpec) -> tuple[ResolvedTime, ...]:
        """Every requested timestep with what the network is told and how much noise is added.

        Raises:
            SpecError: for a convention that is not its own, or a timestep outside of it.
        """

    def predicted(self, what: str, output: Tensor, x: Tensor, time: ResolvedTime) -> Tensor:
        """The network's `output` for the noisy x as x0, eps or v; all [b, c, h, w].

        Raises:
            TapError: this model predicts nothing.
        """

    def target(self, clean: Tensor, noise: Tensor, time: ResolvedTime) -> Tensor:
        """What the network was trained to put out for alpha clean + sigma noise.

        Raises:
            TapError: this model predicts nothing.
        """


def require_convention(spec: ScheduleSpec, kind: str, *conventions: str) -> None:
    """Raise SpecError if a schedule is asked in a convention that is not its own."""
    if spec.convention not in conventions:
        raise SpecError(
            f"schedule.convention {spec.convention}: this model has {kind}; want "
            f"{' or '.join(conventions)}"
        )


class NoSchedule:
    """No noise and no time: encoders see the clean image."""

    def resolve(self, spec: ScheduleSpec) -> tuple[ResolvedTime, ...]:
        """One pseudo-timestep, 0.

        Raises:
            SpecError: for a convention that knows time.
        """
        require_convention(spec, "no noise schedule", "none")
        return (ResolvedTime(requested=0, convention="none", model_time=0, alpha=1.0, sigma=0.0),)

    def predicted(self, what: str, output: Tensor, x: Tensor, time: ResolvedTime) -> Tensor:
        """Refused: there is no noise to predict."""
        raise TapError(f"tap {what}: this model is no denoiser, it predicts nothing")

    def target(self, clean: Tensor, noise: Tensor, time: ResolvedTime) -> Tensor:
        """Refused: there is no noise to predict."""
        raise TapError("tap loss: this model is no denoiser, it predicts nothing")


@dataclass(frozen=True)
class NoiseSchedule:
    """A variance-preserving schedule: abar_0 .. abar_{n-1}, float32, from clean to noise."""

    alphas_cumprod: Tensor
    prediction: Prediction = "epsilon"
    make_sampler: Callable[[ScheduleSpec], Sampler] | None = None
    """The scheduler that a spec counts the steps of."""
    read_learned_time: Callable[[], float] | None = None
    """The scalar that the checkpoint carries for the convention `learned`."""

    @property
    def n_timesteps(self) -> int:
        """Timesteps that the model was trained with."""
        return len(self.alphas_cumprod)

    def resolve(self, spec: ScheduleSpec) -> tuple[ResolvedTime, ...]:
        """Every requested timestep with what the network is told and how much noise is added.

        Raises:
            SpecError: if a timestep lies outside the schedule, or the convention asks for what
                this model does not have.
        """

        def steps(field: str, values: Sequence[float]) -> list[Step]:
            return [
                Step(self.told(spec, step.time), step.alpha, step.sigma)
                for step in self._steps(spec, field, values)
            ]

        return resolve_steps(spec, steps)

    def predicted(self, what: str, output: Tensor, x: Tensor, time: ResolvedTime) -> Tensor:
        """The network's `output` for x_t as x0, eps or v; all [b, c, h, w]."""
        return convert(what, output, x, time, self.prediction)

    def target(self, clean: Tensor, noise: Tensor, time: ResolvedTime) -> Tensor:
        """The noise, the clean input, or v, as `prediction` says."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return clean
        return time.alpha * noise - time.sigma * clean

    def sampler(self, spec: ScheduleSpec) -> Sampler:
        """The scheduler whose steps the spec counts.

        Raises:
            SpecError: if this model has none, or the spec's does not exist.
        """
        return require_sampler(self.make_sampler, spec)

    def _steps(self, spec: ScheduleSpec, field: str, values: Sequence[float]) -> list[Step]:
        if spec.convention in ("edm_sigma", "edm_index", "flow"):
            raise SpecError(
                f"schedule.convention {spec.convention}: this model has a schedule of discrete "
                "timesteps; want ddpm_index, or sigma for a noise level"
            )
        if spec.convention in STEPPED:
            sampler = self.sampler(spec)
            return [sampler_step(sampler, spec, value) for value in values]
        if spec.convention == "learned" and field == "condition_at":
            raise SpecError(
                "schedule.condition_at: convention learned tells the network the time of its "
                "checkpoint; for another say ddpm_index"
            )
        if spec.convention == "none":
            return [Step(time=0, alpha=1, sigma=0) for _ in values]
        if spec.convention == "sigma":
            return [self._at_noise_level(value) for value in values]
        first = 1 if spec.convention == "ddpm_1based" else 0
        last = self.n_timesteps - 1 + first
        bad = [t for t in values if t != int(t) or not first <= t <= last]
        if bad:
            raise SpecError(
                f"schedule.{field} {bad}: this model has {self.n_timesteps} timesteps; want whole "
                f"numbers {first}..{last} ({spec.convention})"
            )
        steps = [self._at_index(int(t) - first) for t in values]
        if spec.convention == "learned":
            return [Step(self._learned_time(), step.alpha, step.sigma) for step in steps]
        return steps

    def _at_index(self, t: int) -> Step:
        # The square roots are taken in float32, as diffusers' `add_noise` does, to be bit-equal.
        abar = self.alphas_cumprod[t]
        return Step(time=t, alpha=float(abar**0.5), sigma=float((1 - abar) ** 0.5))

    def _at_noise_level(self, level: float) -> Step:
        """The fractional index of a noise level, linear in its logarithm as in k-diffusion."""
        abar = self.alphas_cumprod.double().numpy()
        with np.errstate(divide="ignore"):  # the last level of a zero-SNR schedule is infinite
            levels = np.sqrt((1 - abar) / abar)
        if not levels[0] <= level <= levels[-1]:
            raise SpecError(
                f"schedule.timesteps {level}: this model knows the noise levels "
                f"{levels[0]:.4g}..{levels[-1]:.4g} (sigma)"
            )
        time = np.interp(np.log(level), np.log(levels), np.arange(len(levels)))
        scale = (1 + level**2) ** 0.5
        return Step(time=float(time), alpha=1 / scale, sigma=level / scale)

    def _learned_time(self) -> float:
        if self.read_learned_time is None:
            raise SpecError("schedule.convention learned: this model carries no learned timestep")
        return self.read_learned_time()

    def told(self, spec: ScheduleSpec, time: float) -> float:
        """The model time of an index, in the units that the spec says the network wants."""
        if spec.model_time == "index":
            return time
        return (time + (spec.convention == "ddpm_1based")) / self.n_timesteps


def resolve_steps(
    spec: ScheduleSpec, steps: Callable[[str, Sequence[float]], Sequence[Step]]
) -> tuple[ResolvedTime, ...]:
    """Every requested timestep, with the noise of `timesteps` and told the time of `condition_at`.

    `steps` is the schedule's own: (field of the spec, its values) to their places, with the time in
    the network's units.
    """
    noised = told = steps("timesteps", spec.timesteps)
    if spec.condition_at != "same":
        told = steps("condition_at", spec.condition_at)
        told = told if len(told) == len(noised) else [told[0]] * len(noised)
    return tuple(
        ResolvedTime(
            requested=requested,
            convention=spec.convention,
            model_time=condition.time,
            alpha=noise.alpha,
            sigma=noise.sigma,
        )
        for requested, noise, condition in zip(spec.timesteps, noised, told, strict=True)
    )


# --- the steps of a scheduler -------------------------------------------------------------------


def require_sampler(
    make_sampler: Callable[[ScheduleSpec], Sampler] | None, spec: ScheduleSpec
) -> Sampler:
    """The scheduler whose steps the spec counts; for schedules of any kind.

    Raises:
        SpecError: if the model has none, or the spec's does not exist.
    """
    if make_sampler is None:
        raise SpecError(
            f"schedule.convention {spec.convention} counts the steps of a scheduler; this model "
            "comes without one: use ddpm_index, or flow for a flow model"
        )
    return make_sampler(spec)


def sampler_step(sampler: Sampler, spec: ScheduleSpec, value: float) -> Step:
    """The step that `value` names in one of the conventions `STEPPED`; for schedules of any kind.

    Raises:
        SpecError: if there is no such step.
    """
    if value != int(value):
        raise SpecError(f"schedule: {value} is no whole number ({spec.convention})")
    count = int(value)
    if spec.convention == "generation_label":
        path = inversion_path(sampler, spec)[:-1]
        if not 0 <= count < len(path):
            raise _no_such_step(sampler, spec, count, f"0..{len(path) - 1}")
        return path[len(path) - 1 - count]
    n_steps = sampler.n_timesteps if spec.n_steps is None else spec.n_steps
    n_times = len(sampler.times(n_steps))
    if spec.convention == "img2img_strength":
        position = _img2img_start(sampler, n_steps, count)
        if not (0 <= count <= sampler.n_timesteps and position < n_times):
            raise _no_such_step(sampler, spec, count, f"1..{sampler.n_timesteps}")
        return sampler.step(n_steps, position)
    first = -n_times if spec.convention == "scheduler_position" else 0
    if not first <= count < n_times:
        raise _no_such_step(sampler, spec, count, f"{first}..{n_times - 1}")
    return sampler.step(n_steps, count % n_times)


def inversion_path(sampler: Sampler, spec: ScheduleSpec) -> tuple[Step, ...]:
    """The n + 1 steps from clean to noise that an inversion of n steps visits, CLEAN first.

    The label k of Hyperfeatures and SatDiFuser is the entry n - 1 - k; the last entry is where the
    last step arrives, and has no label.

    Raises:
        SpecError: if the scheduler has not one time a step.
    """
    assert spec.n_steps is not None, "the spec demands it"
    n_times = len(sampler.times(spec.n_steps))
    if n_times != spec.n_steps:
        raise SpecError(
            f"schedule: {sampler.name} makes {n_times} times of {spec.n_steps} steps, so that "
            "labels would be ambiguous; set schedule.scheduler: DDIMScheduler"
        )
    ascending = (sampler.step(spec.n_steps, n_times - 1 - i) for i in range(n_times))
    return (CLEAN, *ascending)


def _img2img_start(sampler: Sampler, n_steps: int, t: int) -> int:
    """Where diffusers' image-to-image pipelines begin with strength t/n (their `get_timesteps`,
    with its truncation)."""
    n_left = min(int(n_steps * (t / sampler.n_timesteps)), n_steps)
    return max(n_steps - n_left, 0) * sampler.order


def _no_such_step(sampler: Sampler, spec: ScheduleSpec, got: int, want: str) -> SpecError:
    return SpecError(f"schedule: {sampler.name} has no step {got}; want {want} ({spec.convention})")


# --- schedule and noise together ----------------------------------------------------------------


def resolve_times(
    schedule: Schedule, spec: ScheduleSpec, noise: NoiseSpec
) -> tuple[ResolvedTime, ...]:
    """The timesteps with the corruption that really happens: none, a mask, or an inversion.

    Raises:
        SpecError: if the kind of noise does not go with the convention.
    """
    if noise.kind == "inversion":
        labelled = {time.requested: time for time in inversion_times(schedule, spec, noise)}
        bad = [t for t in spec.timesteps if t < 0 or t not in labelled]
        if bad:
            raise SpecError(
                f"schedule.timesteps {bad}: an inversion of {spec.n_steps} steps has the labels "
                f"0..{len(labelled) - 2}"
            )
        return tuple(labelled[t] for t in spec.timesteps)
    times = schedule.resolve(spec)
    if noise.kind == "none":
        return tuple(time.model_copy(update={"alpha": 1.0, "sigma": 0.0}) for time in times)
    if noise.kind == "patch_mask":
        if not isinstance(schedule, NoiseSchedule):
            raise _needs_timesteps(noise)
        if spec.convention != "ddpm_index":
            raise SpecError(
                f"noise.kind patch_mask: the share t/n that is masked needs schedule.convention "
                f"ddpm_index, got {spec.convention}"
            )
        return tuple(_masked(time, schedule.n_timesteps) for time in times)
    return times


def inversion_times(
    schedule: Schedule, spec: ScheduleSpec, noise: NoiseSpec
) -> tuple[ResolvedTime, ...]:
    """Every place of an inversion, from clean to noise, requested by its label n-1, n-2 .. 0, -1.

    Raises:
        SpecError: if labels are not what the spec counts in, or the network cannot be inverted.
    """
    if not isinstance(schedule, NoiseSchedule):
        raise _needs_timesteps(noise)
    if spec.convention != "generation_label" or spec.condition_at != "same":
        raise SpecError(
            "noise.kind inversion: needs schedule.convention generation_label and no condition_at, "
            f"got {spec.convention}, condition_at: {spec.condition_at}"
        )
    if schedule.prediction == "sample":
        raise SpecError(
            "noise.kind inversion: this network predicts x_0, which says nothing of the noise in a "
            "clean input; an inversion needs one that predicts epsilon or v"
        )
    path = inversion_path(schedule.sampler(spec), spec)
    n = len(path) - 1
    told = [*(after for _, after in pairwise(path)), path[-1]] if noise.told == "next" else path
    return tuple(
        ResolvedTime(
            requested=n - 1 - i,
            convention=spec.convention,
            model_time=schedule.told(spec, told[i].time),
            alpha=step.alpha,
            sigma=step.sigma,
        )
        for i, step in enumerate(path)
    )


def _needs_timesteps(noise: NoiseSpec) -> SpecError:
    return SpecError(f"noise.kind {noise.kind}: needs a model with a schedule of timesteps")


def _masked(time: ResolvedTime, n: int) -> ResolvedTime:
    share = time.requested / n
    return time.model_copy(update={"alpha": 1 - share, "sigma": share})


# --- corruption ---------------------------------------------------------------------------------


def corrupt(clean: Tensor, noise: Tensor | None, time: ResolvedTime) -> Tensor:
    """x_t = alpha x_0 + sigma eps for [b, c, h, w]; without noise, x_0 as it is."""
    return clean if noise is None else time.alpha * clean + time.sigma * noise


def mask_patches(clean: Tensor, order: Tensor, time: ResolvedTime) -> Tensor:
    """Zero the patches of [b, c, h, w] that come last in `order` [b, 1, rows, columns].

    Of n patches int(n alpha) stay (MDM, `random_masking`), those whose numbers are smallest.
    """
    n_kept = int(order[0].numel() * time.alpha)
    ranks = order.flatten(1).argsort(dim=1, stable=True).argsort(1).reshape(order.shape)
    side = clean.shape[-2] // order.shape[-2]
    stays = (ranks < n_kept).repeat_interleave(side, -2).repeat_interleave(side, -1)
    return torch.where(stays, clean, clean.new_zeros(()))


# --- what a network's output means (k-diffusion: denoisers differ at the edge only) ---------------


def convert(
    what: str, output: Tensor, x: Tensor, time: ResolvedTime, prediction: Prediction
) -> Tensor:
    """The network's `output` for x_t as `what`: x0, eps or v; all [b, c, h, w]."""
    return {"x0": to_x0, "eps": to_eps, "v": to_v}[what](output, x, time, prediction)


def to_x0(output: Tensor, x: Tensor, time: ResolvedTime, prediction: Prediction) -> Tensor:
    """The clean image that the network's `output` for x_t means; all [b, c, h, w]."""
    if prediction == "epsilon":
        return (x - time.sigma * output) / time.alpha
    if prediction == "sample":
        return output
    if prediction == "v_prediction":  # Salimans and Ho 2022, appendix D
        return time.alpha * x - time.sigma * output
    return x - time.sigma * output


def to_eps(output: Tensor, x: Tensor, time: ResolvedTime, prediction: Prediction) -> Tensor:
    """The noise that the network's `output` for x_t means; all [b, c, h, w]."""
    if prediction == "epsilon":
        return output
    if prediction == "sample":
        return (x - time.alpha * output) / time.sigma
    if prediction == "v_prediction":
        return time.alpha * output + time.sigma * x
    return x + time.alpha * output


def to_v(output: Tensor, x: Tensor, time: ResolvedTime, prediction: Prediction) -> Tensor:
    """v = alpha eps - sigma x_0 (Salimans and Ho 2022) that the network's `output` means."""
    if prediction == "v_prediction":
        return output
    eps, x0 = (to(output, x, time, prediction) for to in (to_eps, to_x0))
    return time.alpha * eps - time.sigma * x0


def ddim_step(
    output: Tensor, x: Tensor, here: ResolvedTime, there: ResolvedTime, prediction: Prediction
) -> Tensor:
    """x at `there` from the network's output for x at `here` (Song et al. 2021, eq. 12, eta 0)."""
    x0 = to_x0(output, x, here, prediction)
    return there.alpha * x0 + there.sigma * to_eps(output, x, here, prediction)
