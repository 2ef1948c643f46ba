"""Stage 1 of distillation on Ray Train and under torchrun: the curve of one process, whatever dies.

The student is a small ViT: batch norm on several CPUs is refused.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from drl_data.distill_spec import DistillSpec, StudentSpec
from drl_data.distillation import Distillation
from drl_data.index import SampleIndex
from drl_data.pipeline import Pipeline
from drl_data.progress import SILENT
from drl_data.ranks import Ranks
from drl_data.ray_train import train_on_ray
from drl_data.shards import Array
from drl_data.stopping import Stop
from drl_data.store import FeatureStore
from drl_data.tasks.stage_one import learn_features, train_here, training_folder
from drl_data.teachers import Teachers
from drl_data.train_spec import TrainRunSpec
from drl_data.training import Curve, Venue
from tests.task_stores import digits_index, pipeline_of, store_of
from tests.test_distill import quadrants

pytestmark = pytest.mark.ray

VIT = StudentSpec(
    model_type="vit",
    config={
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "patch_size": 8,
    },
)
SPEC = DistillSpec(
    tap="map",
    timestep=10,
    student=VIT,
    epochs=6,
    batch_size=64,
    learning_rate=3e-3,
    labels_per_class=(1,),
    seeds=(0,),
)
RAY = TrainRunSpec(executor="ray", workers=2, cpus_per_worker=1, checkpoint_every=4)

TOLERANCE = 1e-4
"""Of each step's loss, relative: gradients of float32, added up in another order, over some fifty
steps of AdamW."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """What is easy to see of real digits: the brightness of their quadrants."""
    folder = tmp_path_factory.mktemp("ranks")
    index = digits_index(folder / "tars")
    features = quadrants(pixels_of(index))
    return store_of(folder / "store", {"map": features[None]}, index)


def pixels_of(index: SampleIndex) -> Array:
    from drl_data.images import read_batches
    from drl_data.plan import Unit
    from drl_data.spec import ImageSpec

    unit = Unit(0, 0, index.n_samples)
    (batch,) = read_batches(
        unit, index, ImageSpec(size=8, mode="L"), batch_size=unit.n_rows, n_threads=1,
        prefetch_bytes=1 << 20,
    )  # fmt: skip
    return batch.pixels[:, 0].astype("float32") / 255


def pipeline(store: FeatureStore, results: Path, run: TrainRunSpec, **changes: object) -> Pipeline:
    return pipeline_of(store, results, distill=SPEC.model_copy(update={"run": run, **changes}))


def learn(given: Pipeline, stop: Stop | None = None) -> tuple[Distillation, Curve]:
    assert given.distill is not None
    return learn_features(
        given, Teachers.of(given, given.distill), Ranks(torch.device("cpu")), stop or Stop(), SILENT
    )


@pytest.fixture(scope="module")
def alone(
    store: FeatureStore, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Distillation, Curve]:
    """One process."""
    return learn(pipeline(store, tmp_path_factory.mktemp("alone"), TrainRunSpec()))


def assert_same_training(
    found: tuple[Distillation, Curve], alone: tuple[Distillation, Curve]
) -> None:
    """Each step once, with the loss that it has on one process; the same weights in the end."""
    (model, curve), (reference, wanted) = found, alone
    assert curve.n_images == wanted.n_images
    assert curve.losses["loss"] == pytest.approx(wanted.losses["loss"], rel=TOLERANCE)
    state = reference.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0.01, atol=1e-3, msg=name)


def checkpoints(given: Pipeline) -> list[str]:
    found = training_folder(given).glob("**/state.json")
    return sorted(path.parent.name for path in found)


def test_two_workers_of_ray_have_the_curve_of_one_process(
    local_ray: None, store: FeatureStore, alone: tuple[Distillation, Curve], tmp_path: Path
) -> None:
    """And what they leave is continued by one process, as its own."""
    given = pipeline(store, tmp_path, RAY)
    found = learn(given)
    assert_same_training(found, alone)
    assert found[1].losses["loss"][-1] < 0.5 * found[1].losses["loss"][0]
    assert checkpoints(given) == ["step-0000000044", "step-0000000048"]
    assert not list(training_folder(given).glob("step-*"))  # in the folder of Ray's run
    (last,) = training_folder(given).glob("ray-*/step-0000000048")
    (last / "state.json").unlink()
    local = pipeline(store, tmp_path, TrainRunSpec())
    assert_same_training(learn(local), alone)
    assert checkpoints(local) == ["step-0000000044", "step-0000000048"]


class Deadly(Teachers):
    """Logs where each epoch is taken up, and kills the process once, after some batches of one."""

    log: Path
    kills: tuple[int, int, int]
    """Rank, epoch, batch."""

    def batches(
        self, epoch: int, *, rank: int = 0, world_size: int = 1, start: int = 0
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        with self.log.open("a") as file:
            file.write(f"{rank} of {world_size}: epoch {epoch} from {start}\n")
        given = super().batches(epoch, rank=rank, world_size=world_size, start=start)
        for i, batch in enumerate(given, start):
            if (rank, epoch, i) == self.kills and not self.log.with_name("killed").exists():
                self.log.with_name("killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


def learn_and_die(given: Pipeline, log: Path, kills: tuple[int, int, int], venue: Venue) -> None:
    """What a worker does whose machine takes it away."""
    assert given.distill is not None
    teachers = Deadly.of(given, given.distill)
    teachers.log, teachers.kills = log, kills  # type: ignore[attr-defined]
    train_here(teachers, venue)


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.soak)])
def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint(
    local_ray: None,
    store: FeatureStore,
    alone: tuple[Distillation, Curve],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rank: int,
) -> None:
    """SIGKILL in the middle of an epoch, at step 14 of 48; the last checkpoint is that of 12."""
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
    given, log = pipeline(store, tmp_path, RAY), tmp_path / "log"
    work = partial(learn_and_die, given, log, (rank, 1, 6))
    train_on_ray(work, training_folder(given), RAY)
    assert (tmp_path / "killed").exists()
    assert sorted(log.read_text().splitlines()) == sorted(
        f"{r} of 2: epoch {epoch} from {start}"
        for r in range(2)
        for epoch, start in [(0, 0), (1, 0), (1, 4), (2, 0), (3, 0), (4, 0), (5, 0)]
    )
    assert_same_training(learn(given), alone)
    assert checkpoints(given) == ["step-0000000044", "step-0000000048"]
