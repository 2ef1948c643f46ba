"""Settings of a training: how weights are learnt (content), and where and how fast (logistics)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from drl_data.spec_base import NonNegative, Positive, Spec


class OptimizerSpec(Spec):
    """AdamW's surroundings: warm-up and cosine of the learning rate, clipping, moving average."""

    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of all steps in which the learning rate rises; afterwards it falls as a cosine to 0."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are scaled to at most this norm over all weights; `null`: never."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The result is the moving average of the weights, with this decay; `null`: the last ones."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the forward pass: `bfloat16` is autocast, weights stay float32; `auto` takes it on GPUs
    that have it and nowhere else."""


class TrainRunSpec(Spec):
    """Where and how fast a training runs; it changes the result by no more than rounding."""

    executor: Literal["local", "ray"] = "local"
    """`local`: this process, or those that `torchrun` started; `ray`: workers of Ray Train."""
    workers: Positive = 1
    """Processes of `ray` that train together; each takes its share of every batch."""
    gpus_per_worker: Annotated[int, Field(ge=0, le=1)] = 1
    """1 or 0; ignored where the cluster has no GPUs."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    address: str | None = None
    """Address of an existing Ray cluster; default: start one on this machine."""
    max_failures: NonNegative = 3
    """Times that the workers are started again after one of them died; preempted nodes are not
    counted."""
    checkpoint_every: Positive = 500
    """Steps between checkpoints; there is also one at the end, and one when the run is stopped."""
    keep: Positive = 2
    """Checkpoints that stay: the last ones."""
    micro_batch: Positive | None = None
    """Images that one process computes at a time, if its share of a batch needs too much memory;
    the gradients of the parts are added up."""
    grace_s: Annotated[float, Field(ge=0)] = 60.0
    """Seconds that the workers have to write a checkpoint after SIGTERM or SIGINT."""

    @model_validator(mode="after")
    def _workers_of_ray(self) -> TrainRunSpec:
        if self.executor == "local" and self.workers > 1:
            raise ValueError(
                f"workers {self.workers} with executor local: want executor: ray, or start the "
                f"command with `torchrun --nproc-per-node {self.workers} -m drl_data ...`"
            )
        return self
