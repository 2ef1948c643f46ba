"""Ensembles of small networks on single pixels, as DDPM-Seg trains them, all members in one pass.

Members share no numbers: each has its own first weights and its own order of the pixels, and the
gradients do not mix, so that a member learns what it would learn alone.

Shapes: m member, b batch, n pixels, c channel, k class, h w height and width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from drl_data.bilinear import on_grid, upsampled
from drl_data.pixel_features import PixelFeatures
from drl_data.segment_spec import PixelMlpSpec

WEIGHT_STD = 0.02
MOMENTUM, EPSILON = 0.1, 1e-5
"""Of BatchNorm, torch's defaults."""
FEW_CLASSES = 30
"""With fewer classes the published networks are the smaller ones."""
BLOCK_BYTES = 256 << 20
"""Values of pixels that are predicted at once."""


class PixelMlps:
    """`members` networks: (linear, ReLU, BatchNorm) for each hidden layer, then a linear one."""

    def __init__(
        self, spec: PixelMlpSpec, n_channels: int, n_classes: int, seed: int, device: str
    ) -> None:
        self.spec, self.n_classes, self.seed = spec, n_classes, seed
        hidden = spec.hidden or ((128, 32) if n_classes < FEW_CLASSES else (256, 128))
        self.sizes = (n_channels, *hidden, n_classes)
        self.mean = torch.zeros(n_channels, device=device)
        self.scale = torch.ones(n_channels, device=device)
        self.n_epochs = [0] * spec.members
        """Epochs that each member has seen, the last one perhaps in part."""
        draws = [first_weights(self.sizes, seed + m) for m in range(spec.members)]
        self.weights = [torch.stack(one).to(device) for one in zip(*draws, strict=True)]
        m = spec.members
        self.biases = [torch.zeros(m, 1, size, device=device) for size in self.sizes[1:]]
        self.gains = [torch.ones(m, 1, size, device=device) for size in hidden]
        self.shifts = [torch.zeros(m, 1, size, device=device) for size in hidden]
        self.means = [torch.zeros(m, 1, size, device=device) for size in hidden]
        self.variances = [torch.ones(m, 1, size, device=device) for size in hidden]

    @property
    def parameters(self) -> list[Tensor]:
        """What is learnt, each [m, ...]."""
        return [*self.weights, *self.biases, *self.gains, *self.shifts]

    @property
    def state(self) -> list[Tensor]:
        """All of a member: parameters and running statistics, each [m, ...]."""
        return [*self.parameters, *self.means, *self.variances]

    # --- training -------------------------------------------------------------------------------

    def train(self, features: PixelFeatures, labels: Tensor) -> Iterator[float]:
        """Cross-entropy with Adam until every member has ended; yields the mean loss after each
        epoch. `labels` is int64 [n]."""
        spec, m = self.spec, self.spec.members
        size = min(spec.batch_size, features.n_pixels)
        n_batches = features.n_pixels // size  # the rest of an epoch is dropped, as published
        if spec.standardise:
            self._standardise(features)
        for parameter in self.parameters:
            parameter.requires_grad_()
        optimizer = torch.optim.Adam(self.parameters, lr=spec.learning_rate)
        orders = [torch.Generator().manual_seed(self.seed + i) for i in range(m)]
        device = self.mean.device
        labels = labels.to(device)
        patience = Patience(m, spec)
        kept = [x.detach().clone() for x in self.state]
        running = set(range(m))
        for epoch in range(spec.epochs):
            order = torch.stack([torch.randperm(features.n_pixels, generator=g) for g in orders])
            total = torch.zeros(m, device=device)
            for start in range(0, n_batches * size, size):
                pixels = order[:, start : start + size]
                losses = self._step(optimizer, features, labels, pixels)
                total += losses
                if epoch < spec.least_epochs:
                    continue
                for i in patience.ended(losses.tolist()) & running:
                    running.remove(i)
                    self._keep(kept, i)
                    self.n_epochs[i] = epoch + 1
                if not running:
                    break
            yield float(total.mean()) / n_batches
            if not running:
                break
        for i in running:
            self._keep(kept, i)
            self.n_epochs[i] = spec.epochs
        with torch.no_grad():
            for mine, theirs in zip(self.state, kept, strict=True):
                mine.copy_(theirs)
        for parameter in self.parameters:
            parameter.requires_grad_(False)

    def _step(
        self,
        optimizer: torch.optim.Optimizer,
        features: PixelFeatures,
        labels: Tensor,
        pixels: Tensor,
    ) -> Tensor:
        """One batch of each member; its losses [m]."""
        x = (features.take(pixels).to(self.mean.device) - self.mean) * self.scale
        logits = self._forward_train(x)
        y = labels[pixels.to(labels.device)]
        losses = F.cross_entropy(logits.movedim(2, 1), y, reduction="none").mean(1)
        optimizer.zero_grad()
        torch.autograd.backward(losses.sum())
        optimizer.step()
        return losses.detach()

    def _forward_train(self, x_mbc: Tensor) -> Tensor:
        """Logits [m, b, k]; moves the running statistics."""
        x = x_mbc
        for i in range(len(self.gains)):
            x = torch.baddbmm(self.biases[i], x, self.weights[i]).relu()
            mean = x.mean(1, keepdim=True)
            variance = x.var(1, unbiased=False, keepdim=True)
            with torch.no_grad():
                self.means[i].lerp_(mean, MOMENTUM)
                n = x.shape[1]
                self.variances[i].lerp_(variance * (n / (n - 1)), MOMENTUM)
            x = (x - mean) * (variance + EPSILON).rsqrt() * self.gains[i] + self.shifts[i]
        return torch.baddbmm(self.biases[-1], x, self.weights[-1])

    def _standardise(self, features: PixelFeatures) -> None:
        step = max(BLOCK_BYTES // (8 * features.n_channels), 1)
        total = torch.zeros(2, features.n_channels, dtype=torch.float64, device=self.mean.device)
        for start in range(0, features.n_pixels, step):
            some = torch.arange(start, min(start + step, features.n_pixels))
            x = features.take(some).to(self.mean.device).double()
            total += torch.stack([x.sum(0), x.square().sum(0)])
        mean, squares = total / features.n_pixels
        std = (squares - mean.square()).clamp_min(0).sqrt()
        varies = std > 1e-6 * mean.abs() + 1e-12
        self.mean = mean.float()
        self.scale = torch.where(varies, 1 / std, 0.0).float()

    @torch.no_grad()
    def _keep(self, kept: list[Tensor], member: int) -> None:
        for mine, theirs in zip(self.state, kept, strict=True):
            theirs[member] = mine[member]

    # --- prediction -----------------------------------------------------------------------------

    @torch.no_grad()
    def on_image(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Iterator[Tensor]:
        """Logits [m, rows * w, k] of the pixels of an image of `size`, some rows at a time.

        The first layer is linear and so is upsampling: it is applied to the maps [c, h, w], and
        what it gives is upsampled, which is the same and far less.
        """
        first = self._first_layer(maps)
        m, width = self.spec.members, self.sizes[1]
        step = max(BLOCK_BYTES // (4 * size[1] * sum(self.sizes[1:]) * m), 1)
        for start in range(0, size[0], step):
            stop = min(start + step, size[0])
            x: Tensor | None = None
            for one in first:
                ys = upsampled(size[0], one.shape[1])[start:stop]
                part = on_grid(one, ys, upsampled(size[1], one.shape[2]))
                x = part if x is None else x + part
            assert x is not None  # there is at least one map
            flat = x.reshape(m, width, -1).transpose(1, 2)
            yield self._after_first(flat + self._first_bias())

    def _first_layer(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """[m * width, h, w] of each map, without bias."""
        found, start = [], 0
        for one in maps:
            stop = start + one.shape[0]
            weight = self.weights[0][:, start:stop] * self.scale[start:stop, None]
            x = weight.transpose(1, 2).flatten(0, 1) @ one.to(weight.device).float().flatten(1)
            found.append(x.reshape(-1, *one.shape[1:]))
            start = stop
        return found

    def _first_bias(self) -> Tensor:
        return self.biases[0] - (self.mean * self.scale)[None] @ self.weights[0]

    @torch.no_grad()
    def logits(self, x_nc: Tensor) -> Tensor:
        """[m, n, k] of vectors."""
        x = ((x_nc.to(self.mean.device) - self.mean) * self.scale).expand(self.spec.members, -1, -1)
        return self._after_first(torch.baddbmm(self.biases[0], x, self.weights[0]))

    def _after_first(self, x: Tensor) -> Tensor:
        """What follows the first linear layer, with the running statistics."""
        for i in range(len(self.gains)):
            scale = (self.variances[i] + EPSILON).rsqrt() * self.gains[i]
            x = (x.relu() - self.means[i]) * scale + self.shifts[i]
            x = torch.baddbmm(self.biases[i + 1], x, self.weights[i + 1])
        return x


class Patience:
    """When a member ends: its loss was not below the least for `patience` batches in a row."""

    def __init__(self, members: int, spec: PixelMlpSpec) -> None:
        self._least = [math.inf] * members
        self._since = [0] * members
        self._patience = spec.patience

    def ended(self, losses: Sequence[float]) -> set[int]:
        """Members that end with these losses of a batch."""
        for i, loss in enumerate(losses):
            better = loss < self._least[i]
            self._least[i] = min(loss, self._least[i])
            self._since[i] = 0 if better else self._since[i] + 1
        return {i for i, n in enumerate(self._since) if n >= self._patience}


def first_weights(sizes: Sequence[int], seed: int) -> list[Tensor]:
    """Weights [in, out] of each layer of a member, from N(0, 0.02)."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(a, b, generator=generator) * WEIGHT_STD for a, b in itertools.pairwise(sizes)
    ]


def votes(logits_mnk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of an ensemble's logits: the class that most members choose (the smallest of several) int64
    [n], the share of members that choose another one, float32 [n], and the Jensen-Shannon
    divergence of their probabilities in nats, float32 [n] (DDPM-Seg's uncertainty)."""
    m, _, k = logits_mnk.shape
    counts = F.one_hot(logits_mnk.argmax(2), k).sum(0)
    most, chosen = counts.max(1)
    chosen = (counts == most[:, None]).int().argmax(1)
    log_p = logits_mnk.float().log_softmax(2)
    own = -(log_p.exp() * log_p).sum(2).mean(0)
    mean = log_p.exp().mean(0)
    divergence = -torch.special.xlogy(mean, mean).sum(1) - own
    return chosen, 1 - most.float() / m, divergence.clamp_min(0)
