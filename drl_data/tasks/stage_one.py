"""Stage 1 of distillation: the student learns features, on one process, torchrun or Ray Train.

`<results>/distill-training` has its checkpoints. A run of the same settings goes on from the newest
one, wherever the one before it ran and on however many processes.
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

import numpy as np
from pydantic import JsonValue

from drl_data.distill_spec import OWN, DistillSpec
from drl_data.distillation import Distillation
from drl_data.errors import ExecutionError, SpecError
from drl_data.pipeline import Pipeline
from drl_data.progress import Progress
from drl_data.ranks import Ranks
from drl_data.spec_base import file_digest
from drl_data.stopping import Stop
from drl_data.student_bodies import WEIGHTS
from drl_data.teachers import Teachers
from drl_data.threads import one_thread
from drl_data.train_checkpoints import Checkpoints, Curve
from drl_data.training import Settings, Venue, put_average, restore, train

ELSEWHERE = {
    "run", "test", "finetune_epochs", "labels_per_class", "label_fractions", "seeds", "teachers",
    "student",
}  # fmt: skip
"""Settings of `distill` that do not touch the weights that stage 1 ends with, or that are said by
content: stores and weights by their digests."""


def learn_features(
    pipeline: Pipeline, teachers: Teachers, ranks: Ranks, stop: Stop, progress: Progress
) -> tuple[Distillation, Curve]:
    """Train the student, its heads and losses; the trained module and its loss curve.

    Every process that `torchrun` started calls this and gets the same; with `executor: ray` one
    process does, and the workers are Ray Train's.

    Raises:
        SpecError: the checkpoints are of another training, or the student does not fit the ranks.
        StoppedError: the run was told to stop; the next one continues.
        ExecutionError: the loss is not finite, or workers died too often.
    """
    spec = teachers.spec
    root = training_folder(pipeline)
    if spec.run.executor == "local":
        venue = Venue(ranks, Checkpoints(root, keep=spec.run.keep), stop)
        if ranks.leads:
            venue.progress = progress
        return train_here(teachers, venue)
    if ranks.world_size > 1:
        raise SpecError(
            f"distill.run.executor: ray, in each of {ranks.world_size} processes of torchrun; want "
            "one of the two: start the command by itself, or with --executor local"
        )
    identity, checkpoints = identity_of(teachers), Checkpoints(root)
    n_steps = spec.epochs * teachers.n_batches
    state = checkpoints.state(identity)
    if state is None or state.step < n_steps:
        from drl_data.ray_train import train_on_ray

        # Workers have another current directory.
        work = partial(_on_rank, pipeline.relative_to(Path.cwd()))
        train_on_ray(work, root, spec.run, stop=stop, progress=progress)
    found = checkpoints.load(identity)
    if found is None or found.state.step < n_steps:
        raise ExecutionError(
            f"{root}: the workers of Ray Train ended without the checkpoint at step {n_steps}; "
            "`results` must be a folder that all machines share"
        )
    model = Distillation(spec, teachers).to(ranks.device)
    restore(model, found)
    put_average(model, found.tensors["average"])
    return model.eval(), Curve.of(found.tensors["curve"])


def train_here(teachers: Teachers, venue: Venue) -> tuple[Distillation, Curve]:
    """Train as one of the venue's ranks, all of which call this."""
    spec, ranks = teachers.spec, venue.ranks
    if ranks.leads:  # writes the statistics, which the others read
        model = Distillation(spec, teachers)
    ranks.sum([0.0])
    if not ranks.leads:
        model = Distillation(spec, teachers)
    compares = whole_batch_losses(spec)
    if compares and (ranks.world_size > 1 or spec.run.micro_batch is not None):
        raise SpecError(
            f"distill: {compares} compares the images of a batch with each other, and would see "
            f"only a part of it ({ranks.world_size} processes, run.micro_batch "
            f"{spec.run.micro_batch}); want one process and no micro_batch, or another loss"
        )
    settings = Settings(
        epochs=spec.epochs,
        learning_rate=spec.learning_rate,
        weight_decay=spec.weight_decay,
        seed=spec.seeds[0],
        optimizer=spec.optimizer,
        micro_batch=spec.run.micro_batch,
        checkpoint_every=spec.run.checkpoint_every,
    )
    with one_thread(model.student.small):
        return model, train(model, teachers, settings, identity_of(teachers), venue)


def training_folder(pipeline: Pipeline) -> Path:
    """Where checkpoints are."""
    return Path(pipeline.results) / "distill-training"


def identity_of(teachers: Teachers) -> dict[str, JsonValue]:
    """Everything that decides what the student learns in stage 1."""
    spec, selection = teachers.spec, teachers.selection
    decides = [selection.rows, *([selection.labels] if spec.asks_labels else [])]
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in decides))
    stores: dict[str, JsonValue] = {OWN: teachers.store.fingerprint}
    for name, store in teachers.others.items():
        stores[name] = store.fingerprint
    found: dict[str, JsonValue] = {
        "distill": spec.model_dump(mode="json", exclude=ELSEWHERE),
        "student": spec.student.model_dump(mode="json", exclude={"weights"}),
        "seed": spec.seeds[0],
        "stores": stores,
        "rows": digest.hexdigest(),
    }
    if spec.student.weights is not None:
        found["weights"] = file_digest(Path(spec.student.weights) / WEIGHTS)
    return found


def whole_batch_losses(spec: DistillSpec) -> str:
    """What of the losses compares the images of a batch with each other, in words; or nothing."""
    names = {name for cell in spec.cells for name in cell.loss} & {"rkd_distance", "rkd_angle"}
    found = [f"loss {name}" for name in sorted(names)]
    if spec.policy.baseline == "mean" and any(c.choose == "policy" for c in spec.cells):
        found.append("policy.baseline: mean")
    return " and ".join(found)


def _on_rank(pipeline: Pipeline, venue: Venue) -> None:
    """What a worker of Ray Train does."""
    assert isinstance(pipeline.distill, DistillSpec)  # checked by who starts it
    train_here(Teachers.of(pipeline, pipeline.distill), venue)
