"""A probe that attends over taps, timesteps and places at once, after DifFormer ("Diffusion Models
Beat GANs on Image Classification", Mukhopadhyay et al. 2023): the features of all cells are tokens
of one small transformer, whose class token is classified.

Shapes: b batch, n tokens, c channel, d width, k class.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drl_data.datasets import FeatureStream
from drl_data.intervals import t_interval, wilson_interval
from drl_data.job_specs import AttentiveSpec, ProbeSpec
from drl_data.linear_probes import TOP, ProbeSplit
from drl_data.progress import Bar
from drl_data.selection import Rows
from drl_data.spec import ArraySpec
from drl_data.spec_base import Spec
from drl_data.store import FeatureStore


class AttentiveFound(Spec):
    """Accuracies 0..1 of the fusion of all its cells, one number for each seed."""

    taps: tuple[str, ...]
    timesteps: tuple[float, ...]
    n_cells: int
    """(tap, timestep) pairs that are fused."""
    n_tokens: int
    n_parameters: int
    loss: tuple[float, ...]
    """Mean cross-entropy of each epoch, over seeds."""
    validation: tuple[float, ...]
    test: tuple[float, ...]
    test_top5: tuple[float, ...] = ()
    """Empty where there are no more than five classes."""
    n_test: int

    @property
    def mean_validation(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.validation)

    @property
    def mean_test(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.test)

    @property
    def seed_interval(self) -> tuple[float, float]:
        """95 % interval of the mean over seeds (Student's t), within 0..1."""
        low, high = t_interval(self.test)
        return max(low, 0.0), min(high, 1.0)

    @property
    def sampling_interval(self) -> tuple[float, float]:
        """95 % interval that the size of the test split leaves open (Wilson 1927)."""
        return wilson_interval(self.mean_test, self.n_test)


class AttentiveProbe(nn.Module):
    """Tokens of several cells -> logits [b, k]."""

    def __init__(
        self, shapes: Sequence[tuple[int, int]], n_classes: int, spec: AttentiveSpec, seed: int
    ) -> None:
        """`shapes`: (tokens, channels) of each cell. The seed decides the first weights."""
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            width = spec.width
            self.projections = nn.ModuleList(nn.Linear(c, width) for _, c in shapes)
            self.places = nn.ParameterList(
                nn.Parameter(0.5 * torch.randn(n, width)) for n, _ in shapes
            )
            self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
            self.blocks = nn.ModuleList(
                nn.TransformerEncoderLayer(
                    width,
                    spec.heads,
                    4 * width,
                    dropout=0.0,
                    activation="gelu",
                    batch_first=True,
                    norm_first=True,
                )
                for _ in range(spec.depth)
            )
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, n_classes)

    def forward(self, cells: Sequence[Tensor]) -> Tensor:
        """Logits [b, k] of tokens [b, n, c] of each cell."""
        parts = [self.class_token.expand(len(cells[0]), -1, -1)]
        for x, projection, place in zip(cells, self.projections, self.places, strict=True):
            # Cells differ in scale by orders of magnitude: each token is standardised.
            parts.append(projection(F.layer_norm(x, x.shape[-1:])) + place)
        x = torch.cat(parts, 1)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x[:, 0]))
        return logits


def as_tokens(x: Tensor, array: ArraySpec, pool: int) -> Tensor:
    """[b, *shape] to float32 [b, n, c]: maps are averaged to a grid, tokens to as many means of
    neighbours, of a video's frames the mean is taken."""
    x, dims = x.float(), list(array.dims)
    if "frame" in dims:
        x = x.mean(dims.index("frame") + 1)
        dims.remove("frame")
    if dims[-2:] == ["height", "width"]:
        height, width = (min(side, pool) for side in x.shape[-2:])
        return F.adaptive_avg_pool2d(x, (height, width)).flatten(2).transpose(1, 2)
    if "token" in dims:
        x = x.movedim(dims.index("channel") + 1, 1).flatten(2)
        return F.adaptive_avg_pool1d(x, min(x.shape[2], pool * pool)).transpose(1, 2)
    return x.flatten(1)[:, None]


def run_attentive(
    store: FeatureStore,
    probe: ProbeSpec,
    spec: AttentiveSpec,
    split: ProbeSplit,
    device: str,
    bar: Bar,
) -> AttentiveFound:
    """Train one fusion for each seed, all on the same batches, and measure them.

    Raises:
        TapError: the store has no such tap or timestep.
    """
    taps = spec.taps or tuple(a.name for a in store.features)
    times = spec.timesteps or tuple(time.requested for time in store.times)
    batches = _Batches(store, taps, times, spec, split, device)
    first, _ = next(batches.of(probe.train, split.train, None))
    shapes = [(x.shape[1], x.shape[2]) for x in first]
    models = [AttentiveProbe(shapes, split.n_classes, spec, seed) for seed in probe.seeds]
    losses = _train(models, batches, probe, spec, split, device, bar)
    validation = _scores(models, batches.of(probe.train, split.validation, None))
    test = _scores(models, batches.of(probe.test, split.test, None))
    return AttentiveFound(
        taps=taps,
        timesteps=times,
        n_cells=len(shapes),
        n_tokens=sum(n for n, _ in shapes),
        n_parameters=sum(p.numel() for p in models[0].parameters()),
        loss=tuple(losses),
        validation=tuple(one for one, _ in validation),
        test=tuple(one for one, _ in test),
        test_top5=tuple(five for _, five in test) if split.n_classes > TOP else (),
        n_test=len(split.test),
    )


Batch = tuple[list[Tensor], Tensor]
"""Tokens of each cell, and targets [b]."""


class _Batches:
    """Rows of a split as tokens of every cell."""

    def __init__(
        self,
        store: FeatureStore,
        taps: Sequence[str],
        times: Sequence[float],
        spec: AttentiveSpec,
        split: ProbeSplit,
        device: str,
    ) -> None:
        self._store, self._taps, self._times = store, taps, times
        self._spec, self._device = spec, device
        self._target = torch.from_numpy(split.target)

    def of(self, split: str, rows: Rows, epoch: int | None) -> Iterator[Batch]:
        """Those of `rows`, in row order or shuffled anew for each epoch."""
        stream = FeatureStream(
            self._store,
            self._taps,
            self._times,
            split=split,
            labelled=True,
            batch_size=self._spec.batch_size,
            shuffle=epoch is not None,
        )
        stream.set_epoch(epoch or 0)
        for batch in stream:
            chosen = torch.from_numpy(np.flatnonzero(np.isin(batch.row.numpy(), rows)))
            if len(chosen):
                cells = [
                    as_tokens(
                        batch.features[tap][chosen, t], self._store.array(tap), self._spec.pool
                    ).to(self._device)
                    for tap in self._taps
                    for t in range(self._n_times(tap))
                ]
                yield cells, self._target[batch.row[chosen]].to(self._device)

    def _n_times(self, tap: str) -> int:
        return len(self._times) if self._store.array(tap).timesteps == "each" else 1


def _train(
    models: Sequence[AttentiveProbe],
    batches: _Batches,
    probe: ProbeSpec,
    spec: AttentiveSpec,
    split: ProbeSplit,
    device: str,
    bar: Bar,
) -> list[float]:
    """AdamW with a cosine schedule; the mean loss of each epoch."""
    optimizers = [
        torch.optim.AdamW(
            model.to(device).parameters(), lr=spec.learning_rate, weight_decay=spec.weight_decay
        )
        for model in models
    ]
    losses = []
    for epoch in range(spec.epochs):
        n_done, total = 0, 0.0
        for cells, y in batches.of(probe.train, split.train, epoch):
            done = (epoch + n_done / len(split.train)) / spec.epochs
            for model, optimizer in zip(models, optimizers, strict=True):
                optimizer.param_groups[0]["lr"] = (
                    spec.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
                )
                loss = F.cross_entropy(model(cells), y)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                total += float(loss.detach()) * len(y) / len(models)
            n_done += len(y)
        losses.append(total / n_done)
        bar.advance(loss=losses[-1])
    return losses


@torch.no_grad()
def _scores(
    models: Sequence[AttentiveProbe], batches: Iterator[Batch]
) -> list[tuple[float, float]]:
    """(top-1, top-5) accuracy of each model."""
    right, n = torch.zeros(len(models), 2, dtype=torch.float64), 0
    for cells, y in batches:
        for i, model in enumerate(models):
            model.eval()
            logits = model(cells)
            best = logits.topk(min(TOP, logits.shape[1]), dim=1).indices == y[:, None]
            right[i] += torch.stack([best[:, 0].sum(), best.any(1).sum()]).cpu()
        n += len(y)
    return [(float(one), float(five)) for one, five in right / n]
