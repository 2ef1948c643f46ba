"""The section `distill` of a pipeline file: student, targets, losses, labels."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, JsonValue, model_validator

from drl_data.spec_base import Positive, Spec, Timestep, as_tuple
from drl_data.train_spec import OptimizerSpec, TrainRunSpec

OWN = "store"
"""Name of the pipeline's own store among the teachers."""

Fraction = Annotated[float, Field(gt=0, le=1)]

LossName = Literal["mse", "smooth_l1", "cosine", "attention", "rkd_distance", "rkd_angle"]


class StudentSpec(Spec):
    """A student from `transformers` or of your own. No weights are downloaded.

    With `stages` it is an `AutoBackbone` and gives those maps; without, an `AutoModel`, whose last
    hidden state is the one stage `last`.
    """

    model_type: str | None = None
    """A model type of `transformers` (default: a small ResNet), or your own module,
    `python:package.module:factory` (student.py says what it is called with)."""
    config: dict[str, JsonValue] = {}
    stages: Annotated[tuple[str | int, ...], BeforeValidator(as_tuple)] = ()
    """Names (`out_features`) or positions (`out_indices`) of the stages that are given."""
    weights: str | None = None
    """A folder with `config.json` and `model.safetensors` to begin with; the rival in the
    comparison of few labels then begins with them too."""
    mean: Annotated[tuple[float, ...], BeforeValidator(as_tuple)] = ()
    std: Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(as_tuple)] = ()
    """What the student's pixels, 0..1, are normalised by: weights expect what they were trained
    with. Default: `images.range`."""

    @model_validator(mode="after")
    def _consistent(self) -> StudentSpec:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean {list(self.mean)} and std {list(self.std)}: want as many")
        if len({type(stage) for stage in self.stages}) > 1:
            raise ValueError(f"stages {list(self.stages)}: want names or positions, not both")
        if len(set(self.stages)) < len(self.stages):
            raise ValueError(f"stages {list(self.stages)}: want each once")
        return self


def _as_losses(value: object) -> object:
    return {value: 1.0} if isinstance(value, str) else value


class TargetSpec(Spec):
    """One cell of a teacher's store, and how the student learns it."""

    tap: str
    timestep: Annotated[tuple[Timestep, ...], BeforeValidator(as_tuple)] = ()
    """Not needed where the tap does not depend on it, or the store has one; several with `choose`
    (default: all of the store)."""
    teacher: str = OWN
    """One of `teachers`; default: the pipeline's own store."""
    stage: str | None = None
    """Of the student; default: the last."""
    loss: Annotated[
        dict[LossName, Annotated[float, Field(gt=0)]],
        BeforeValidator(_as_losses),
        Field(min_length=1),
    ] = {"mse": 1.0}
    """One by name, or several with their weights: `{mse: 1, attention: 10}` is DreamTeacher's."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Of this target beside the others."""
    whiten: Literal["statistics", "layer_norm", "none"] = "statistics"
    """`statistics`: every channel has mean 0 and variance 1 over the train split, so that teachers
    weigh alike; `layer_norm`: the channels of every place have, as DreamTeacher's W."""
    choose: Literal["fixed", "uniform", "policy"] = "fixed"
    """Of several timesteps: for each image any with equal chance, anew in every epoch; or the one
    that a policy chooses, which is trained with the student (RepFusion)."""

    @model_validator(mode="after")
    def _one_timestep_or_a_choice(self) -> TargetSpec:
        if self.choose == "fixed" and len(self.timestep) > 1:
            raise ValueError(
                f"timestep {list(self.timestep)} of {self.tap!r}: want one, or choose: uniform or "
                "policy"
            )
        if self.choose != "fixed" and len(self.timestep) == 1:
            raise ValueError(f"choose: {self.choose} of one timestep of {self.tap!r}: want several")
        if len(set(self.timestep)) < len(self.timestep):
            raise ValueError(f"timestep {list(self.timestep)} of {self.tap!r}: want each once")
        return self


class RegressorSpec(Spec):
    """What leads from the student's stages to the teachers' features."""

    kind: Literal["linear", "fpn"] = "linear"
    """`linear`: a linear map per place from each target's stage; `fpn`: DreamTeacher's, a feature
    pyramid from the deepest stage down, with pyramid pooling on top."""
    channels: Positive = 256
    """fpn: width of the pyramid."""
    pools: Annotated[tuple[Positive, ...], BeforeValidator(as_tuple), Field(min_length=1)] = (
        1,
        2,
        3,
        6,
    )
    """fpn: sides of the grids that the deepest stage is averaged to."""


class PolicySpec(Spec):
    """RepFusion's choice of the timestep by REINFORCE (Yang and Wang 2023)."""

    reward: Literal["task", "distill"] = "task"
    """`task`: minus the loss of a classifier of the teacher's features, as published. It learns
    from the labels of the train split, which the rival with few labels does not see: the verdict
    says so. `distill`: minus the student's own loss, without labels."""
    entropy: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the policy's entropy, which keeps it from settling too soon."""
    baseline: Literal["none", "mean"] = "none"
    """`mean`: rewards are counted from their mean over the batch, with less variance than the
    published `none`."""


class DistillSpec(Spec):
    """A student learns the stored features of the same images, then a linear head on few labels.

    Compared with the same student trained from scratch on those labels. `tap` and `timestep` are
    short for one target.
    """

    tap: str | None = None
    timestep: Timestep | None = None
    targets: tuple[TargetSpec, ...] = ()
    teachers: dict[str, str] = {}
    """Other stores of the same images: {name: URL}; rows are joined by key."""
    train: str = "train"
    test: str | None = "test"
    """`null` trains the student only: without labels there is no comparison."""
    student: StudentSpec = StudentSpec()
    regressor: RegressorSpec = RegressorSpec()
    policy: PolicySpec = PolicySpec()
    """For targets with `choose: policy`."""
    drop_teachers: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Chance that a teacher is left out for an image, unless it is the one that the student is
    worst at (UNIC, Sariyildiz et al. 2024: 0.5)."""
    epochs: Annotated[int, Field(ge=1)] = 30
    finetune_epochs: Annotated[int, Field(ge=1)] = 40
    batch_size: Annotated[int, Field(ge=1)] = 128
    """Images of a step, of all ranks together."""
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    optimizer: OptimizerSpec = OptimizerSpec()
    run: TrainRunSpec = TrainRunSpec()
    labels_per_class: Annotated[tuple[Positive, ...], BeforeValidator(as_tuple)] = (1, 5, 20)
    label_fractions: Annotated[tuple[Fraction, ...], BeforeValidator(as_tuple)] = ()
    """Shares of the train split's labels, every class by its share and with one at least."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2)

    @model_validator(mode="after")
    def _consistent(self) -> DistillSpec:
        if (self.tap is None) == (not self.targets):
            raise ValueError("want tap (and timestep), or targets")
        if self.targets and self.timestep is not None:
            raise ValueError(f"timestep {self.timestep}: with targets, say it in each of them")
        bad = [name for name in self.teachers if name == OWN or not name or "/" in name]
        if bad:
            raise ValueError(f"teachers {bad}: want other names than {OWN!r}, without '/'")
        known = {OWN, *self.teachers}
        strange = [t.teacher for t in self.targets if t.teacher not in known]
        if strange:
            raise ValueError(f"targets of {strange}; the teachers are {sorted(known)}")
        unused = sorted(self.teachers.keys() - {t.teacher for t in self.targets})
        if unused:
            raise ValueError(f"teachers {unused}: no target is theirs")
        if self.drop_teachers and len({t.teacher for t in self.targets}) < 2:
            raise ValueError("drop_teachers with one teacher: want several")
        if not self.labels_per_class and not self.label_fractions:
            raise ValueError("want labels_per_class or label_fractions")
        return self

    @property
    def cells(self) -> tuple[TargetSpec, ...]:
        """The targets, also of the short form."""
        if self.tap is None:
            return self.targets
        times = () if self.timestep is None else (self.timestep,)
        return (TargetSpec(tap=self.tap, timestep=times),)

    @property
    def asks_labels(self) -> bool:
        """Whether stage 1 learns from labels."""
        return self.policy.reward == "task" and any(c.choose == "policy" for c in self.cells)
