"""Linear classifiers for many features at once: pooled features in, one pass over the data.

Every cell (tap, timestep) and every seed sees the same batches; the gradients of cells do not mix,
so a cell learns exactly what it would learn alone.

Shapes: b batch, n rows, t timestep, c channel, s head (a seed of a setting), k class.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from drl_data.datasets import FeatureStream
from drl_data.errors import SpecError
from drl_data.job_specs import ProbeSpec
from drl_data.pooling import n_pooled, pooled
from drl_data.selection import Rows, select
from drl_data.splits import is_validation, require_two_splits
from drl_data.store import FeatureStore

CACHE_BYTES = 2 << 30
"""Pooled features of one store are kept in memory, and read once, if they need no more."""

MAX_PIXEL_SIDE = 32
"""Raw pixels are probed at most 32 x 32, area-averaged from larger images."""

READ_BATCH = 256

TOP = 5
"""Classes that may be named in the top-5 accuracy."""

PIXELS_KEY = "__pixels__"
"""Stands beside the names of arrays, none of which may begin so."""

Features = Mapping[str, Tensor]
"""Pooled features of a batch: {tap: float32 [b, t, c]}."""


@dataclass(frozen=True)
class ProbeSplit:
    """Rows that take part, in increasing order, and their classes as 0 .. n_classes-1."""

    train: Rows
    validation: Rows
    test: Rows
    classes: Rows
    """Labels of the train split, sorted."""
    target: Rows
    """[n_samples]: position in `classes`, -1 for a label that the train split does not have."""

    @classmethod
    def of(cls, store: FeatureStore, spec: ProbeSpec) -> ProbeSplit:
        """Labelled, valid rows; the train split falls in two by the digest of the keys.

        Raises:
            SpecError: a split that the dataset does not have, or that leaves a part empty.
        """
        require_two_splits(spec.train, spec.test, "probe")
        train = select(store, split=spec.train, labelled=True)
        test = select(store, split=spec.test, labelled=True)
        keys = train.keys.to_pylist()
        chosen = np.array([is_validation(key, spec.validation) for key in keys])
        if chosen.all() or not chosen.any():
            raise SpecError(
                f"probe: validation {spec.validation:g} of {len(keys)} rows of {spec.train!r} "
                f"gives {int(chosen.sum())} validation rows; want at least one, and one left"
            )
        classes = np.unique(train.labels)
        target = np.full(store.spec.n_samples, -1, np.int64)
        for part in (train, test):
            position = np.searchsorted(classes, part.labels).clip(max=len(classes) - 1)
            known = classes[position] == part.labels
            target[part.rows] = np.where(known, position, -1)
        return cls(train.rows[~chosen], train.rows[chosen], test.rows, classes, target)

    @property
    def n_classes(self) -> int:
        """Classes of the train split."""
        return len(self.classes)

    def majority(self) -> float:
        """Accuracy on the test rows of always answering the commonest class of the train rows."""
        commonest = np.bincount(self.target[self.train]).argmax()
        return float((self.target[self.test] == commonest).mean())


class PooledFeatures:
    """Every feature of some rows, averaged to a small grid (`probe.pool`), or over its tokens; from
    memory, or read each time."""

    def __init__(
        self, store: FeatureStore, spec: ProbeSpec, split: ProbeSplit, *, pixels: bool
    ) -> None:
        """`pixels` adds the raw pixels of the same rows as one more cell, called PIXELS_KEY."""
        self._store = store
        self._spec = spec
        self._pixels = pixels
        self.split = split
        self.train_split, self.test_split = spec.train, spec.test
        self.shapes = {a.name: (len(store.times), n_pooled(a, spec.pool)) for a in store.features}
        if pixels:
            images = store.image_spec
            sides = [min(side, MAX_PIXEL_SIDE) for side in images.size]
            self.shapes[PIXELS_KEY] = (1, images.n_channels * math.prod(sides))
        n_rows = len(split.train) + len(split.validation) + len(split.test)
        n_bytes = 4 * n_rows * sum(t * c for t, c in self.shapes.values())
        self._cache: dict[str, tuple[Rows, dict[str, Tensor]]] = {}
        if n_bytes <= CACHE_BYTES:
            for name in (spec.train, spec.test):
                self._cache[name] = _joined(self._read(name, None))

    def batches(self, rows: Rows, split: str, epoch: int | None) -> Iterator[tuple[Rows, Features]]:
        """Those of `rows`, which lie in `split`; in row order, or shuffled anew for each epoch.

        Shuffled batches have `spec.batch_size` rows from memory, and at most as many when read.
        """
        if split in self._cache:
            yield from self._cached(rows, split, epoch)
            return
        for found, x in self._read(split, epoch):
            chosen = np.flatnonzero(np.isin(found, rows))
            if len(chosen):
                yield found[chosen], {name: f[chosen] for name, f in x.items()}

    def _cached(self, rows: Rows, split: str, epoch: int | None) -> Iterator[tuple[Rows, Features]]:
        held, x = self._cache[split]
        where = torch.from_numpy(np.searchsorted(held, rows))
        size = READ_BATCH
        if epoch is not None:
            size = self._spec.batch_size
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(epoch))
            where = where[order]
        for chosen in torch.split(where, size):
            yield held[chosen.numpy()], {name: f[chosen] for name, f in x.items()}

    def _read(self, split: str, epoch: int | None) -> Iterator[tuple[Rows, dict[str, Tensor]]]:
        stream = FeatureStream(
            self._store,
            split=split,
            batch_size=READ_BATCH if epoch is None else self._spec.batch_size,
            shuffle=epoch is not None,
            labelled=True,
            images=(self._store.index, self._store.image_spec) if self._pixels else None,
        )
        if epoch is not None:
            stream.set_epoch(epoch)
        dims = {a.name: a.dims for a in self._store.features}
        for batch in stream:
            x = {name: pooled(f, dims[name], self._spec.pool) for name, f in batch.features.items()}
            if batch.pixels is not None:
                x[PIXELS_KEY] = _flat_pixels(batch.pixels)
            yield batch.row.numpy(), x


def _flat_pixels(pixels: Tensor) -> Tensor:
    """uint8 [b, c, h, w] to float32 [b, 1, c * h * w] in 0..1; of videos the mean of the frames."""
    if pixels.ndim == 5:
        pixels = pixels.float().mean(2)
    h, w = (min(side, MAX_PIXEL_SIDE) for side in pixels.shape[2:])
    x = pixels.float() / 255
    if (h, w) != pixels.shape[2:]:
        x = F.adaptive_avg_pool2d(x, (h, w))
    return x.flatten(1).unsqueeze(1)


def _joined(
    batches: Iterator[tuple[Rows, dict[str, Tensor]]],
) -> tuple[Rows, dict[str, Tensor]]:
    """All batches as one, in row order."""
    found = list(batches)
    rows = np.concatenate([rows for rows, _ in found])
    order = np.argsort(rows)
    return rows[order], {
        name: torch.cat([x[name] for _, x in found])[order] for name in found[0][1]
    }


class LinearProbes:
    """For each tap a weight [t, c, s, k] and a bias [t, s, k] on standardised features."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        n_classes: int,
        seeds: Sequence[int],
        device: str = "cpu",
        n_settings: int = 1,
    ) -> None:
        """`shapes` gives (timesteps, channels) of each tap; a seed decides the first weights, which
        are the same in all settings (of learning rate and weight decay)."""
        self.device = device
        self.weight: dict[str, Tensor] = {}
        self.bias: dict[str, Tensor] = {}
        self.mean: dict[str, Tensor] = {}
        self.scale: dict[str, Tensor] = {}
        for name, (n_times, n_channels) in shapes.items():
            starts = [_first_weights(n_channels, n_classes, seed) for seed in seeds] * n_settings
            weight = torch.stack(starts, dim=1).repeat(n_times, 1, 1, 1)
            bias = torch.zeros(n_times, len(starts), n_classes)
            self.weight[name] = weight.to(device).requires_grad_()
            self.bias[name] = bias.to(device).requires_grad_()
            self.mean[name] = torch.zeros(n_times, n_channels, device=device)
            self.scale[name] = torch.ones(n_times, n_channels, device=device)

    @property
    def small(self) -> bool:
        """Whether one CPU thread is enough for all the heads together."""
        return sum(weight.numel() for weight in self.weight.values()) < 1 << 20

    def logits(self, name: str, x_btc: Tensor) -> Tensor:
        """Logits [t, b, s, k] of one tap's features."""
        weight, bias = self.weight[name], self.bias[name]
        x_btc = (x_btc.to(self.device) - self.mean[name]) * self.scale[name]
        # The heads of all seeds are columns of one matrix: one product per tap.
        logits = torch.bmm(x_btc.transpose(0, 1), weight.flatten(2))
        return logits.reshape(*logits.shape[:2], *bias.shape[1:]) + bias.unsqueeze(1)

    def standardise(self, data: PooledFeatures) -> None:
        """Take mean and standard deviation of the train rows, in one pass, in float64.

        A channel that does not vary there is ignored.
        """
        sums = {
            name: torch.zeros(2, *m.shape, dtype=torch.float64) for name, m in self.mean.items()
        }
        for _, x in data.batches(data.split.train, data.train_split, None):
            for name, f in x.items():
                f64 = f.double()
                sums[name] += torch.stack([f64.sum(0), f64.square().sum(0)])
        for name, (total, squares) in sums.items():
            mean = total / len(data.split.train)
            std = (squares / len(data.split.train) - mean.square()).clamp_min(0).sqrt()
            varies = std > 1e-6 * mean.abs() + 1e-12
            scale = torch.where(varies, 1 / std, 0.0)
            self.mean[name] = mean.float().to(self.device)
            self.scale[name] = scale.float().to(self.device)

    def train(self, data: PooledFeatures, spec: ProbeSpec) -> Iterator[float]:
        """AdamW with a cosine schedule on the train rows; yields the mean loss of each epoch."""
        rates, decays = self._of_each_head(spec)
        optimizer = HeadwiseAdamW(
            [
                *((weight, decays) for weight in self.weight.values()),
                *((bias, torch.zeros_like(decays)) for bias in self.bias.values()),
            ],
            rates,
        )
        target = torch.from_numpy(data.split.target).to(self.device)
        n_rows = len(data.split.train)
        for epoch in range(spec.epochs):
            n_done, total = 0, 0.0
            for rows, x in data.batches(data.split.train, data.train_split, epoch):
                # By the share of rows that are done, which does not depend on how they are cut.
                done = (epoch + n_done / n_rows) / spec.epochs
                y = target[torch.from_numpy(rows)]
                losses = [_cross_entropy(self.logits(name, f), y).mean(1) for name, f in x.items()]
                # Summed over cells and seeds: each gets the gradient of its own mean loss.
                loss = torch.stack([one.sum() for one in losses]).sum()
                torch.autograd.backward(loss)
                optimizer.step(0.5 * (1 + math.cos(math.pi * done)))
                n_done += len(rows)
                total += float(loss.detach()) * len(rows)
            yield total / n_rows / sum(one.numel() for one in losses)

    def _of_each_head(self, spec: ProbeSpec) -> tuple[Tensor, Tensor]:
        """Learning rate and weight decay of every head, [s, 1]."""
        pairs = torch.tensor(settings(spec), device=self.device)
        heads = pairs.repeat_interleave(len(spec.seeds), 0)
        return heads[:, :1], heads[:, 1:]

    @torch.no_grad()
    def score(self, data: PooledFeatures, rows: Rows, split: str) -> dict[str, Scores]:
        """Accuracy and cross-entropy of every cell and seed on some rows of a split."""
        target = torch.from_numpy(data.split.target).to(self.device)
        zeros = {n: torch.zeros(b.shape[:2], dtype=torch.float64) for n, b in self.bias.items()}
        right, near, loss = ({name: zero.clone() for name, zero in zeros.items()} for _ in range(3))
        for found, x in data.batches(rows, split, None):
            y = target[torch.from_numpy(found)]
            for name, f in x.items():
                logits = self.logits(name, f)
                right[name] += (logits.argmax(-1) == y[:, None]).sum(1).cpu()
                best = logits.topk(min(TOP, logits.shape[-1]), dim=-1).indices
                near[name] += (best == y[:, None, None]).any(-1).sum(1).cpu()
                known = y >= 0
                loss[name] += _cross_entropy(logits[:, known], y[known]).sum(1).cpu()
        n = len(rows)
        return {name: Scores(right[name] / n, near[name] / n, loss[name] / n) for name in right}


@dataclass(frozen=True)
class Scores:
    """Of one tap: accuracy 0..1, that of the five best, and cross-entropy in nats, each [t, s]."""

    accuracy: Tensor
    top5: Tensor
    loss: Tensor


class HeadwiseAdamW:
    """AdamW (Loshchilov and Hutter 2019) with torch's defaults, and a learning rate and a weight
    decay of each head: the last axis but one of every parameter."""

    BETAS = (0.9, 0.999)
    EPSILON = 1e-8

    def __init__(self, parameters: Sequence[tuple[Tensor, Tensor]], rates: Tensor) -> None:
        """`parameters`: each with its weight decays [s, 1]; `rates` [s, 1]."""
        self._parameters = parameters
        self._rates = rates
        self._moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p, _ in parameters]
        self._n_steps = 0

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One step with `factor` times the learning rates; takes the gradients away."""
        self._n_steps += 1
        one, two = (1 - beta**self._n_steps for beta in self.BETAS)
        rates = self._rates * factor
        for (parameter, decay), (first, second) in zip(
            self._parameters, self._moments, strict=True
        ):
            gradient = parameter.grad
            assert gradient is not None  # every parameter has a part in the loss
            first.lerp_(gradient, 1 - self.BETAS[0])
            second.mul_(self.BETAS[1]).addcmul_(gradient, gradient, value=1 - self.BETAS[1])
            size = (second / two).sqrt_().add_(self.EPSILON)
            parameter.mul_(1 - rates * decay).sub_(rates * (first / one).div_(size))
            parameter.grad = None


def settings(spec: ProbeSpec) -> list[tuple[float, float]]:
    """Pairs of learning rate and weight decay; heads are those of the first pair's seeds, then of
    the next's."""
    return [(rate, decay) for rate in spec.learning_rate for decay in spec.weight_decay]


def _first_weights(n_channels: int, n_classes: int, seed: int) -> Tensor:
    """As `nn.Linear` draws them: uniform within 1 / sqrt(channels)."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(n_channels, n_classes, generator=generator)
    return (2 * uniform - 1) / math.sqrt(n_channels)


def _cross_entropy(logits_tbsk: Tensor, y_b: Tensor) -> Tensor:
    """[t, b, s]."""
    t, _, s, _ = logits_tbsk.shape
    target = y_b[None, :, None].expand(t, -1, s)
    return F.cross_entropy(logits_tbsk.movedim(-1, 1), target, reduction="none")
