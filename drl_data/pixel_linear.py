"""Linear classifiers of single pixels, one for each cell, all trained in one pass.

Shapes: b batch, c channel, k class, h w height and width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from drl_data.bilinear import on_grid, upsampled
from drl_data.pixel_features import PixelFeatures
from drl_data.segment_spec import PixelLinearSpec


class PixelLinear:
    """A weight [c, k] and a bias [k] of each cell on standardised features (AdamW)."""

    def __init__(
        self, spec: PixelLinearSpec, channels: Sequence[int], n_classes: int, seed: int, device: str
    ) -> None:
        """`channels` of each cell, which follow one another in the vector of a pixel."""
        self.spec, self.channels, self.seed = spec, tuple(channels), seed
        self.device = device
        self.weights = [torch.zeros(c, n_classes, device=device) for c in channels]
        self.biases = [torch.zeros(n_classes, device=device) for _ in channels]
        self.mean = torch.zeros(sum(channels), device=device)
        self.scale = torch.ones(sum(channels), device=device)

    def train(self, features: PixelFeatures, labels: Tensor) -> Iterator[float]:
        """Every cell learns from the same batches; yields the mean loss after each epoch."""
        spec, n = self.spec, features.n_pixels
        self._standardise(features)
        decayed = [w.requires_grad_() for w in self.weights]
        others = [b.requires_grad_() for b in self.biases]
        optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": spec.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=spec.learning_rate,
        )
        n_steps = spec.epochs * -(-n // spec.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
        generator = torch.Generator().manual_seed(self.seed)
        labels = labels.to(self.device)
        for _ in range(spec.epochs):
            order, total = torch.randperm(n, generator=generator), 0.0
            for pixels in torch.split(order, spec.batch_size):
                x = (features.take(pixels).to(self.device) - self.mean) * self.scale
                y = labels[pixels.to(self.device)]
                losses = [
                    F.cross_entropy(part @ weight + bias, y)
                    for part, weight, bias in zip(
                        torch.split(x, list(self.channels), 1),
                        self.weights,
                        self.biases,
                        strict=True,
                    )
                ]
                optimizer.zero_grad()
                # A sum: each cell gets the gradient of its own loss.
                loss = torch.stack(losses).sum()
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
                total += float(loss.detach()) * len(pixels)
            yield total / n / len(self.channels)
        for one in (*self.weights, *self.biases):
            one.requires_grad_(False)

    def _standardise(self, features: PixelFeatures) -> None:
        total = torch.zeros(2, features.n_channels, dtype=torch.float64, device=self.device)
        for some in torch.split(torch.arange(features.n_pixels), self.spec.batch_size):
            x = features.take(some).to(self.device).double()
            total += torch.stack([x.sum(0), x.square().sum(0)])
        mean, squares = total / features.n_pixels
        std = (squares - mean.square()).clamp_min(0).sqrt()
        varies = std > 1e-6 * mean.abs() + 1e-12
        self.mean, self.scale = mean.float(), torch.where(varies, 1 / std, 0.0).float()

    @torch.no_grad()
    def classes(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Iterator[Tensor]:
        """Of each cell in turn, the class int64 [h, w] of every pixel of an image of `size`; the
        classifier is applied to the map and its logits are upsampled, which is the same."""
        start = 0
        for one, weight, bias in zip(maps, self.weights, self.biases, strict=True):
            stop = start + len(one)
            mean, scale = self.mean[start:stop], self.scale[start:stop]
            x = one.to(self.device).float().flatten(1).T
            logits = ((x - mean) * scale @ weight + bias).T.reshape(-1, *one.shape[1:])
            ys, xs = upsampled(size[0], one.shape[1]), upsampled(size[1], one.shape[2])
            yield on_grid(logits, ys, xs).argmax(0)
            start = stop
