"""AdamW with a cosine schedule, the same in both stages of distillation."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from drl_data.distill_spec import DistillSpec


def optimizer_of(module: nn.Module, spec: DistillSpec) -> torch.optim.Optimizer:
    """AdamW over all parameters of a module that are trained."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=spec.learning_rate, weight_decay=spec.weight_decay)


def anneal(optimizer: torch.optim.Optimizer, spec: DistillSpec, done: float) -> None:
    """Cosine schedule; `done` is the share of the training that lies behind."""
    for group in optimizer.param_groups:
        group["lr"] = spec.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step down the loss."""
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()
