"""Weights of the timesteps in a diffusion classifier's mean, by a rule or learned.

Losses are squared errors of what the network predicts; the rules weigh squared errors of x_0. Both
are the same but for a factor of each timestep, as x_0 is linear in the prediction.

Shape suffixes: n image, c candidate, t timestep.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from drl_data.errors import SpecError
from drl_data.schedule import Schedule
from drl_data.score_spec import WeightRule
from drl_data.spec import ResolvedTime
from drl_data.stages import Floats

MIN_SNR = 5.0
"""gamma of min-SNR (Hang et al. 2023)."""

EXP = 7.0
"""Of exp(-7 t) (Clark and Jaini 2023)."""

PENALTY = 1e-3
"""Of the squares of the learned weights, in units of the losses' spread."""


def _exp(time: ResolvedTime) -> float:
    return math.exp(-EXP * math.atan2(time.sigma, time.alpha) * 2 / math.pi)


RULES: Mapping[WeightRule, Callable[[ResolvedTime, float], float]] = {
    "x0": lambda _time, _snr: 1.0,
    "snr": lambda _time, snr: snr,
    "truncated_snr": lambda _time, snr: max(snr, 1.0),
    "min_snr": lambda _time, snr: min(snr, MIN_SNR),
    "exp": lambda time, _snr: _exp(time),
}
"""Weights of the squared error of x_0 by the timestep and its signal to noise ratio."""


def rule_weights(
    rule: WeightRule, times: Sequence[ResolvedTime], schedule: Schedule, loss: str
) -> Floats:
    """Weights float64 [t] of the network's own squared error; `loss` is the tap's address.

    Raises:
        SpecError: a loss that is not squared, or a timestep where the weight is not finite.
    """
    if loss != "loss":
        raise SpecError(
            f"score.weights {rule}: it is of squared errors, and the tap is {loss}; want the tap "
            "`loss`, or weights as numbers"
        )
    weights = []
    for time in times:
        snr = math.inf if time.sigma == 0 else (time.alpha / time.sigma) ** 2
        weight = RULES[rule](time, snr) * x0_factor(schedule, time)
        if not math.isfinite(weight):
            raise SpecError(
                f"score.weights {rule}: not finite at timestep {time.requested:g} (signal "
                f"{time.alpha:g}, noise {time.sigma:g}); leave that timestep out"
            )
        weights.append(weight)
    return np.array(weights)


def x0_factor(schedule: Schedule, time: ResolvedTime) -> float:
    """How often the squared error of the network's output is in that of x_0: the square of the
    slope of x_0 in the output, which is the same everywhere."""
    zero, one = (torch.full((1, 1, 1, 1), v, dtype=torch.float64) for v in (0.0, 1.0))
    with np.errstate(all="ignore"):
        at_zero, at_one = (float(schedule.predicted("x0", x, zero, time)) for x in (zero, one))
    return (at_one - at_zero) ** 2


def learn_weights(
    losses_nct: npt.NDArray[np.floating], classes_c: npt.NDArray[np.int64],
    labels_n: npt.NDArray[np.int64],
) -> Floats:  # fmt: skip
    """Weights float64 [t], w_t >= 0, under which the labels of images are most likely.

    p(class) is the softmax of - sum_t w_t loss_t over candidates, summed over those of the class;
    the mean negative logarithm is minimised by L-BFGS, with a small penalty on w_t in units of the
    spread of loss_t over candidates. The result adds to 1, as only ratios matter to a prediction.
    """
    x = torch.from_numpy(np.ascontiguousarray(losses_nct, np.float64))
    x = x - x.mean(1, keepdim=True)
    spread = x.square().mean((0, 1)).sqrt().clamp_min(1e-30)
    x = x / spread
    own = torch.from_numpy(classes_c[None] == labels_n[:, None])
    # softplus(0.54) is 1: every timestep begins with the same say
    raw = torch.full((x.shape[2],), 0.5413, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([raw], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        w = F.softplus(raw)
        log_p = F.log_softmax(-(x @ w), dim=1)
        of_own = torch.logsumexp(log_p.masked_fill(~own, -math.inf), dim=1)
        value: torch.Tensor = -of_own.mean() + PENALTY * w.square().sum()
        torch.autograd.backward(value)
        return value

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    weights = (F.softplus(raw.detach()) / spread).numpy()
    total: Floats = weights / weights.sum()
    return total
