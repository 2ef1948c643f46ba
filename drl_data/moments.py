"""Mean and (co)variance of vectors that come in batches, in float64, exact under any split.

Batches are merged by their counts, means and sums of squared deviations (Chan, Golub and LeVeque
1983, eq. 2.1), which loses no digits where the mean is large against the deviation.

Shapes: n vectors, c channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Count, mean [c] and sum of squared deviations: [c], or [c, c] with covariance."""

    count: int
    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, x_nc: Tensor, *, covariance: bool = False) -> Moments:
        """The moments of vectors [n, c]."""
        x = x_nc.double()
        mean = x.mean(0)
        centred = x - mean
        deviation = centred.T @ centred if covariance else centred.square().sum(0)
        return cls(len(x), mean, deviation)

    def merged(self, other: Moments) -> Moments:
        """The moments of both sets together."""
        count = self.count + other.count
        delta = other.mean - self.mean
        outer = torch.outer(delta, delta) if self.deviation.ndim == 2 else delta.square()
        return Moments(
            count,
            self.mean + delta * (other.count / count),
            self.deviation + other.deviation + outer * (self.count * other.count / count),
        )

    @property
    def variance(self) -> Tensor:
        """Unbiased variance [c], n - 1; 0 of a single vector."""
        deviation = self.deviation.diagonal() if self.deviation.ndim == 2 else self.deviation
        return deviation / max(self.count - 1, 1)

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance [c, c]; only of moments made with `covariance`."""
        return self.deviation / max(self.count - 1, 1)

    def principal(self, k: int) -> tuple[Tensor, Tensor]:
        """The first `k` principal components [k, c] by falling variance, and their variances [k].

        The largest entry of each component is positive, so that signs do not depend on the solver.
        """
        values, vectors = torch.linalg.eigh(self.covariance.cpu())
        components = vectors.T.flip(0)[:k]
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        return components * largest.sign(), values.flip(0)[:k].clamp(min=0)
