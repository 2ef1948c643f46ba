"""Losses between a student's features and a teacher's, one number for each image.

All take float maps p (of the student) and t (of the teacher), [b, c, h, w], and give [b]; their
mean over the batch is the loss. Vectors are maps of one place.

Shapes: b batch, c channel, h height, w width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from drl_data.distill_spec import LossName


def mse(p: Tensor, t: Tensor) -> Tensor:
    """mean over c, h, w of (p - t)^2.

    On whitened t: DreamTeacher (Li et al. 2023) eq. 1, ||p - W(t)||_2^2, as a mean over entries; 1
    is the loss of always answering the mean.
    """
    return (p - t).square().mean((1, 2, 3))


def smooth_l1(p: Tensor, t: Tensor) -> Tensor:
    """mean over c, h, w of d^2 / 2 where d = |p - t| < 1, else d - 1/2 (Girshick 2015, eq. 3)."""
    return F.smooth_l1_loss(p, t, reduction="none").mean((1, 2, 3))


def cosine(p: Tensor, t: Tensor) -> Tensor:
    """mean over places of 1 - <p, t> / (||p|| ||t||), over channels: 0 for equal directions."""
    return 1 - F.cosine_similarity(p, t, dim=1).mean((1, 2))


def attention(p: Tensor, t: Tensor) -> Tensor:
    """||Q(p) / ||Q(p)|| - Q(t) / ||Q(t)|| ||_2^2 with Q(x) = sum over c of x^2, over places.

    Attention transfer (Zagoruyko and Komodakis 2017, eq. 2), with p = 2 as DreamTeacher's eq. 2;
    squared, as the code of attention transfer has it, since the norm itself has no gradient at 0.
    A vector has one place, and so nothing to attend to: 0. Between 0 and 2.
    """
    q_p, q_t = (F.normalize(x.square().sum(1).flatten(1), dim=1) for x in (p, t))
    return (q_p - q_t).square().sum(1)


def rkd_distance(p: Tensor, t: Tensor) -> Tensor:
    """For each image i, mean over images j of l(d_p(i, j) / mu_p, d_t(i, j) / mu_t).

    Relational knowledge distillation (Park et al. 2019, eq. 5-7) of the features' means over space:
    d Euclidean, mu its mean over pairs of different images, l smooth L1. Pairs are those of a
    rank's own share of the batch.
    """
    d_p, d_t = (_distances(x.mean((2, 3))) for x in (p, t))
    return F.smooth_l1_loss(d_p, d_t, reduction="none").mean(1)


def rkd_angle(p: Tensor, t: Tensor) -> Tensor:
    """For each image j, mean over i, k of l(cos_p(i, j, k), cos_t(i, j, k)), the angle at j.

    Park et al. 2019, eq. 8-9, of the features' means over space, l smooth L1; memory grows with
    the cube of a rank's share of the batch.
    """
    a_p, a_t = (_angles(x.mean((2, 3))) for x in (p, t))
    return F.smooth_l1_loss(a_p, a_t, reduction="none").mean((1, 2))


LOSSES: Mapping[LossName, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": mse,
    "smooth_l1": smooth_l1,
    "cosine": cosine,
    "attention": attention,
    "rkd_distance": rkd_distance,
    "rkd_angle": rkd_angle,
}


def weighted(losses: Mapping[LossName, float], p: Tensor, t: Tensor) -> Tensor:
    """[b]: the sum of several losses with their weights."""
    return torch.stack([weight * LOSSES[name](p, t) for name, weight in losses.items()]).sum(0)


def _distances(x: Tensor) -> Tensor:
    """[b, c] to Euclidean distances [b, b], divided by their mean over different rows."""
    n = len(x)
    square = (x[:, None] - x[None]).square().sum(2)
    same = torch.eye(n, dtype=torch.bool, device=x.device)
    # The root has no gradient at 0: equal rows are kept away from it.
    distance = torch.where(same, 0.0, square.clamp_min(1e-12).sqrt())
    return distance / (distance.sum() / max(n * (n - 1), 1)).clamp_min(1e-12)


def _angles(x: Tensor) -> Tensor:
    """[b, c] to cosines [j, i, k] of the angle between x_i - x_j and x_k - x_j."""
    e = F.normalize(x[None] - x[:, None], dim=2)
    return e @ e.transpose(1, 2)
