"""The section `distill` of a pipeline file."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, JsonValue

from drl_data.spec_base import Spec, Timestep
from drl_data.train_spec import OptimizerSpec, TrainRunSpec


class StudentSpec(Spec):
    """A student from `transformers`, built from its configuration (no weights are downloaded)."""

    model_type: str = "resnet"
    config: dict[str, JsonValue] = {}


class DistillSpec(Spec):
    """A student learns the stored features of the same images, then a linear head on few labels.

    Compared with the same student trained from scratch on those labels.
    """

    tap: str
    timestep: Timestep
    train: str = "train"
    test: str = "test"
    student: StudentSpec = StudentSpec()
    epochs: Annotated[int, Field(ge=1)] = 30
    finetune_epochs: Annotated[int, Field(ge=1)] = 40
    batch_size: Annotated[int, Field(ge=1)] = 128
    """Images of a step, of all ranks together."""
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    optimizer: OptimizerSpec = OptimizerSpec()
    run: TrainRunSpec = TrainRunSpec()
    labels_per_class: tuple[int, ...] = (1, 5, 20)
    seeds: tuple[int, ...] = (0, 1, 2)
