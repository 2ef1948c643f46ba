"""One loop for every training on stored features: on one process or many, resumable at any step.

AdamW, warm-up and cosine, clipping, bfloat16 on GPUs, moving average, gradients added up over
parts of a batch. What one process does with a batch, several do with their shares of it, and the
mean of their gradients is that of the whole batch, also where shares are of different sizes.

Every random number of a step comes from a generator seeded by (seed, step, rank), so that a run
that was interrupted gives the weights of one that was not: bit for bit on CPUs with one process.
Other numbers of processes add up in another order, and agree within rounding.

Shapes: b batch.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from pydantic import JsonValue
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from drl_data.errors import ExecutionError, SpecError, StoppedError
from drl_data.progress import SILENT, Progress
from drl_data.ranks import Ranks
from drl_data.stopping import Stop
from drl_data.train_checkpoints import Checkpoint, Checkpoints, Curve, TrainState
from drl_data.train_spec import OptimizerSpec

Batch = tuple[Tensor, Mapping[str, Tensor]]
"""Pixels uint8 [b, c, h, w], and targets [b, ...] by name."""


class Batches(Protocol):
    """What is learnt from."""

    @property
    def n_batches(self) -> int:
        """Steps of an epoch."""

    def batches(
        self, epoch: int, *, rank: int = 0, world_size: int = 1, start: int = 0
    ) -> Iterator[Batch]:
        """This rank's share of every batch of an epoch from step `start` on; the shares of all
        ranks are the batch that one process has at this step. A function of these numbers alone."""


@dataclass(frozen=True)
class Settings:
    """How long and how fast is learnt."""

    epochs: int
    learning_rate: float
    weight_decay: float
    seed: int
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    micro_batch: int | None = None
    checkpoint_every: int = 500


@dataclass
class Venue:
    """Where a training runs, who is told of it, and who may end it."""

    ranks: Ranks
    checkpoints: Checkpoints
    stop: Stop = field(default_factory=Stop)
    progress: Progress = SILENT
    saved: Callable[[Path | None, int, float], None] = lambda folder, step, loss: None
    """Called on every rank after a checkpoint: its folder (None but on the first rank), the step,
    and the loss of the last one."""


def train(
    module: nn.Module,
    data: Batches,
    settings: Settings,
    identity: Mapping[str, JsonValue],
    venue: Venue,
) -> Curve:
    """Train all parameters of `module` that need gradients, in place; returns the loss curve.

    `module(pixels, targets)` gives scalar losses by name, each a mean over the images that it is
    given; `loss` is what is minimised. `identity` is everything that decides the weights. Continues
    from the newest checkpoint; every rank calls this with equal arguments.

    Raises:
        SpecError: the checkpoint is of another training; batch norm that would see a part of a
            batch; batches that do not fit the number of ranks.
        InputError: the checkpoint is damaged.
        StoppedError: the run was told to stop; a checkpoint has been written.
        ExecutionError: a loss that is not finite.
    """
    ranks = venue.ranks
    devices = [ranks.device] if ranks.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), venue.stop.heeded(), warnings.catch_warnings():
        # DDP says so of 1 x 1 convolutions in channels_last, whose strides mean nothing.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        training = _Training(module.to(ranks.device).train(), data, settings, identity, venue)
        training.resume()
        with venue.progress.bar("distill", settings.epochs, "epochs") as bar:
            first = training.step // data.n_batches
            if first:
                bar.advance(first)
            for epoch in range(first, settings.epochs):
                training.run_epoch(epoch)
                bar.advance(loss=training.curve.losses["loss"][-1])
        training.finish()
    return training.curve


class _Training:
    """Module, optimizer, moving average and curve; `step` steps have been done."""

    def __init__(
        self,
        module: nn.Module,
        data: Batches,
        settings: Settings,
        identity: Mapping[str, JsonValue],
        venue: Venue,
    ) -> None:
        self.step = 0
        self.curve = Curve()
        self._saved_step = -1
        self._module, self._data, self._settings, self._venue = module, data, settings, venue
        self._ranks = venue.ranks
        self._identity = dict(identity)
        self._n_steps = settings.epochs * data.n_batches
        self._wrapped = self._ranks.wrapped(module, divided=settings.micro_batch is not None)
        self._trained = (
            self._wrapped.module
            if isinstance(self._wrapped, DistributedDataParallel)
            else self._wrapped
        )
        self._parameters = {k: p for k, p in self._trained.named_parameters() if p.requires_grad}
        self._average = (
            {k: p.detach().clone() for k, p in self._parameters.items()}
            if settings.optimizer.ema_decay is not None
            else {}
        )
        self._optimizer = torch.optim.AdamW(
            list(self._parameters.values()),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        self._bfloat16 = _autocasts(settings.optimizer, self._ranks.device)
        self._pending: list[tuple[float, dict[str, Tensor]]] = []

    # --- steps ----------------------------------------------------------------------------------

    def run_epoch(self, epoch: int) -> None:
        """What is left of an epoch."""
        begun = self.step - epoch * self._data.n_batches
        ranks, every = self._ranks, self._settings.checkpoint_every
        batches = self._data.batches(
            epoch, rank=ranks.rank, world_size=ranks.world_size, start=begun
        )
        with closing(_closable(batches)) as given:
            for pixels, targets in given:
                self._train_step(pixels, targets)
                if self.step % every == 0 and self.step < self._n_steps:
                    self.save()
        if self.step != (epoch + 1) * self._data.n_batches:
            raise ExecutionError(
                f"epoch {epoch} had {self.step - epoch * self._data.n_batches} batches, want "
                f"{self._data.n_batches}; the store changed while it was read"
            )
        self._collect()

    def _train_step(self, pixels: Tensor, targets: Mapping[str, Tensor]) -> None:
        settings, world_size = self._settings, self._ranks.world_size
        n_all = self._agree(len(pixels))
        torch.manual_seed(_seed(settings.seed, self.step, self._ranks.rank))
        size = settings.micro_batch or len(pixels)
        parts = range(0, len(pixels), size)
        self._optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for start in parts:
            x = self._moved(pixels[start : start + size])
            y = {k: self._moved(v[start : start + size]) for k, v in targets.items()}
            with self._without_sync(start != parts[-1]):
                with torch.autocast(
                    self._ranks.device.type, torch.bfloat16, enabled=self._bfloat16
                ):
                    losses: dict[str, Tensor] = self._wrapped(x, y)
                # Of several processes gradients are averaged, so that what counts is the sum over
                # all images, divided by their number.
                torch.autograd.backward(losses["loss"] * (len(x) * world_size / n_all))
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0.0) + loss.detach().double() * len(x)
        self._descend()
        self._pending.append((n_all, sums))
        self.step += 1

    def _agree(self, n: int) -> float:
        """Images of this step over all ranks; ends the run if one of them was told to.

        Raises:
            StoppedError: after a checkpoint.
            SpecError: a rank has no image.
        """
        stops = float(self._venue.stop.requested)
        n_all, n_without, n_stops = self._ranks.sum([float(n), float(n == 0), stops])
        if n_stops:
            self.save()
            raise StoppedError(
                f"the training was told to stop at step {self.step} of {self._n_steps}; run the "
                "same command again to resume"
            )
        if n_without:
            raise SpecError(
                f"step {self.step}: a batch of {n_all:g} images over {self._ranks.world_size} "
                "processes leaves one without any; want a larger batch_size, or fewer processes"
            )
        return n_all

    def _descend(self) -> None:
        """One step of AdamW on the gradients that are there, and of the moving average."""
        settings = self._settings.optimizer
        if settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters.values(), settings.clip_norm)
        rate = self._settings.learning_rate * rate_factor(self.step, self._n_steps, settings.warmup)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        if settings.ema_decay is not None:
            # The usual warm-up of the average: early weights are forgotten sooner.
            decay = min(settings.ema_decay, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(
                    list(self._average.values()), list(self._parameters.values()), 1 - decay
                )

    def _moved(self, x: Tensor) -> Tensor:
        return x.to(self._ranks.device, non_blocking=True)

    def _without_sync(self, yes: bool) -> AbstractContextManager[None]:
        """Gradients of all parts of a batch but the last stay in this process."""
        if yes and isinstance(self._wrapped, DistributedDataParallel):
            found: AbstractContextManager[None] = self._wrapped.no_sync()
            return found
        return nullcontext()

    # --- the curve ------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Add up the losses of the steps since the last time over all ranks.

        Raises:
            ExecutionError: one is not finite.
        """
        if not self._pending:
            return
        names = sorted(self._pending[0][1])
        own = torch.stack([torch.stack([sums[k] for k in names]) for _, sums in self._pending])
        total = self._ranks.sum(own.cpu().flatten().tolist())
        for i, (n, _) in enumerate(self._pending):
            self.curve.n_images.append(n)
            for j, name in enumerate(names):
                loss = total[i * len(names) + j] / n
                self.curve.losses.setdefault(name, []).append(loss)
                if not math.isfinite(loss):
                    step = self.step - len(self._pending) + i
                    raise ExecutionError(
                        f"{name} is {loss} at step {step} of {self._n_steps}; try a lower "
                        "learning_rate, a longer optimizer.warmup or precision: float32"
                    )
        self._pending.clear()

    # --- checkpoints ----------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint on the first rank, and tell the venue on all of them."""
        if self._saved_step == self.step:
            return
        self._collect()
        folder = None
        if self._ranks.leads:
            epoch, batch = divmod(self.step, self._data.n_batches)
            state = TrainState(
                step=self.step,
                epoch=epoch,
                batch=batch,
                identity=self._identity,
                world_size=self._ranks.world_size,
                device=self._ranks.device.type,
                torch=torch.__version__,
            )
            folder = self._venue.checkpoints.save(Checkpoint(state, self._tensors()))
        self._saved_step = self.step
        self._ranks.sum([0.0])  # nobody goes on before it is written
        losses = self.curve.losses.get("loss", [math.nan])
        self._venue.saved(folder, self.step, losses[-1])

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        moments = {
            f"{key}:{name}": value
            for name, parameter in self._parameters.items()
            for key, value in self._optimizer.state.get(parameter, {}).items()
        }
        return {
            "model": self._trained.state_dict(),
            "optimizer": moments,
            "average": self._average,
            "curve": self.curve.tensors(),
        }

    def resume(self) -> None:
        """Continue from the newest checkpoint, if there is one."""
        if self._ranks.leads:
            self._venue.checkpoints.begin()
        self._ranks.sum([0.0])
        found = self._venue.checkpoints.load(self._identity)
        step = 0 if found is None else found.state.step
        (total,) = self._ranks.sum([float(step)])
        if total != step * self._ranks.world_size:
            raise SpecError(
                f"{self._venue.checkpoints.root}: process {self._ranks.rank} sees a checkpoint at "
                f"step {step}, others see another; `results` must be a folder that all machines "
                "share"
            )
        if found is None:
            return
        self.step = self._saved_step = step
        restore(self._trained, found)
        with torch.no_grad():
            for name, average in self._average.items():
                average.copy_(found.tensors["average"][name])
        for key_name, value in found.tensors["optimizer"].items():
            key, _, name = key_name.partition(":")
            parameter = self._parameters[name]
            device = "cpu" if key == "step" else parameter.device
            self._optimizer.state[parameter][key] = value.to(device)
        self.curve = Curve.of(found.tensors["curve"])

    def finish(self) -> None:
        """The last checkpoint; the module gets the weights that count."""
        self.save()
        if self._trained is not self._module:
            self._module.load_state_dict(self._trained.state_dict())
        put_average(self._module, self._average)
        self._module.eval()


def restore(module: nn.Module, found: Checkpoint) -> None:
    """Give a module the weights and buffers of a checkpoint.

    Raises:
        SpecError: they are of another module.
    """
    try:
        module.load_state_dict(dict(found.tensors["model"]))
    except RuntimeError as error:
        raise SpecError(
            f"the checkpoint at step {found.state.step} does not fit the student ({error}); it is "
            "of another version of this program: delete it to begin anew"
        ) from error


def put_average(module: nn.Module, average: Mapping[str, Tensor]) -> None:
    """Give a module the moving average of its weights, if there is one."""
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in average.items():
            parameters[name].copy_(value)


def rate_factor(step: int, n_steps: int, warmup: float) -> float:
    """Share of the learning rate at a step: a rising line, then half a cosine (Loshchilov and
    Hutter 2017, eq. 5, without restarts)."""
    n_warm = round(warmup * n_steps)
    if step < n_warm:
        return (step + 1) / n_warm
    return 0.5 * (1 + math.cos(math.pi * (step - n_warm) / max(n_steps - n_warm, 1)))


def _autocasts(spec: OptimizerSpec, device: torch.device) -> bool:
    if spec.precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return spec.precision == "bfloat16"


def _seed(seed: int, step: int, rank: int) -> int:
    digest = hashlib.sha256(f"{seed}/step {step}/rank {rank}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _closable(batches: Iterator[Batch]) -> Generator[Batch, None, None]:
    """A generator over the batches: closing it closes them, and what they read ahead."""
    yield from batches
