"""Stage 1 of distillation on Ray Train and under torchrun: the curve of one process, whatever dies.

The student is a small ViT: batch norm on several CPUs is refused.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from drl_data.distill_spec import DistillSpec, StudentSpec, TargetSpec
from drl_data.distillation import Distillation
from drl_data.errors import ExecutionError, SpecError, StoppedError, UserError
from drl_data.index import SampleIndex
from drl_data.pipeline import Pipeline
from drl_data.progress import SILENT
from drl_data.ranks import Ranks
from drl_data.ray_train import train_on_ray
from drl_data.shards import Array
from drl_data.stopping import Stop
from drl_data.store import FeatureStore
from drl_data.tasks.distill import DistillResult
from drl_data.tasks.stage_one import learn_features, train_here, training_folder
from drl_data.teachers import Teachers
from drl_data.threads import one_thread
from drl_data.train_checkpoints import Checkpoints, Curve
from drl_data.train_spec import TrainRunSpec
from drl_data.training import Venue
from tests.task_stores import digits_index, pipeline_of, store_of
from tests.test_distill import quadrants
from tests.test_executors import wait_until

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

SLOW_RAY = RAY.model_copy(update={"checkpoint_every": 1})
"""Every step waits for Ray Train's controller: time enough to stop it before the end."""

TOLERANCE = 1e-4
"""Of each step's loss, relative: gradients of float32, added up in another order, over 48 steps of
AdamW. Rounding grows with them: docs/training.md."""


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
def alone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("alone")


@pytest.fixture(scope="module")
def alone(store: FeatureStore, alone_folder: Path) -> tuple[Distillation, Curve]:
    """One process."""
    return learn(pipeline(store, alone_folder, TrainRunSpec()))


@pytest.fixture
def begun(alone: tuple[Distillation, Curve], alone_folder: Path, tmp_path: Path) -> Path:
    """Results of one process, finished, to do with what one likes."""
    shutil.copytree(alone_folder, tmp_path / "begun")
    return tmp_path / "begun"


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
    rank: int,
) -> None:
    """SIGKILL in the middle of an epoch, at step 14 of 48; the last checkpoint is that of 12."""
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


class StopAfter(Stop):
    """Asks for the end as soon as there is a checkpoint of a later step."""

    def __init__(self, given: Pipeline, step: int) -> None:
        super().__init__()
        self._given, self._step = given, step

    @property
    def requested(self) -> bool:
        if not super().requested and newest_step(self._given) > self._step:
            self.request(120)
        return super().requested


@pytest.mark.soak
def test_two_workers_and_one_process_take_over_from_each_other(
    local_ray: None, store: FeatureStore, alone: tuple[Distillation, Curve], tmp_path: Path
) -> None:
    """Begun by one process, continued by two workers, finished by one process: 2 -> 1 and 1 -> 2
    in the middle of epochs, and every step is in the curve once."""
    here = pipeline(store, tmp_path, TrainRunSpec(checkpoint_every=3))
    there = pipeline(store, tmp_path, SLOW_RAY)
    with pytest.raises(StoppedError):
        learn(here, StopAfter(here, 0))
    n_before = newest_step(here)
    assert 0 < n_before < 8
    with pytest.raises(StoppedError, match="run the same command again"):
        learn(there, StopAfter(there, n_before))
    assert n_before < newest_step(there) < 48
    assert_same_training(learn(here), alone)


def newest_step(given: Pipeline) -> int:
    return max((int(name.rpartition("-")[2]) for name in checkpoints(given)), default=0)


@pytest.mark.soak
def test_a_worker_that_always_dies_ends_the_run(
    local_ray: None, store: FeatureStore, tmp_path: Path
) -> None:
    run = RAY.model_copy(update={"max_failures": 1})
    given = pipeline(store, tmp_path, run)
    with pytest.raises(ExecutionError, match=r"more often than run.max_failures \(1\) allows"):
        train_on_ray(die, training_folder(given), run)


def die(venue: Venue) -> None:
    os._exit(1)


@pytest.mark.soak
def test_what_a_worker_finds_wrong_is_said_by_the_driver(
    local_ray: None, store: FeatureStore, tmp_path: Path
) -> None:
    """Batch norm on CPUs: every worker finds it, and none is started again."""
    small = StudentSpec(
        config={"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    )
    with pytest.raises(UserError, match=r"batch norm, and each of 2 processes on CPUs .*convnext"):
        learn(pipeline(store, tmp_path, RAY, student=small))


@pytest.mark.soak
def test_what_one_worker_finds_wrong_ends_the_others(
    local_ray: None, store: FeatureStore, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="only here"):
        train_on_ray(fail_on_the_second, training_folder(pipeline(store, tmp_path, RAY)), RAY)


def fail_on_the_second(venue: Venue) -> None:
    if venue.ranks.rank == 1:
        raise UserError("only here")
    venue.ranks.sum([1.0])  # waits for the other one


def test_what_ray_train_lacks_is_said(tmp_path: Path) -> None:
    """Ray without its extra `train` cannot be imported so far."""
    script = "import sys; sys.modules['pandas'] = None; import drl_data.ray_train"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "pip install 'drl-data[train]'" in done.stderr.splitlines()[-1]


def test_losses_between_images_want_whole_batches(store: FeatureStore, tmp_path: Path) -> None:
    between = {
        "tap": None,
        "timestep": None,
        "targets": (TargetSpec(tap="map", timestep=(10,), loss={"mse": 1, "rkd_distance": 1}),),
    }
    parts = TrainRunSpec(micro_batch=8)
    with pytest.raises(SpecError, match=r"loss rkd_distance compares the images of a batch"):
        learn(pipeline(store, tmp_path, parts, **between))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 1.0}, "distill.learning_rate: 0.003 there, 1.0 wanted"),
        ({"student": StudentSpec()}, 'student.model_type: "vit" there, null wanted'),
        ({"seeds": (4, 5)}, "seed: 0 there, 4 wanted"),
    ],
)
def test_another_spec_is_refused(
    store: FeatureStore,
    alone: tuple[Distillation, Curve],
    begun: Path,
    change: dict[str, object],
    message: str,
) -> None:
    for run in (TrainRunSpec(), RAY):  # before a Ray is started
        with pytest.raises(SpecError, match=message):
            learn(pipeline(store, begun, run, **change))


def test_other_logistics_and_labels_continue(
    store: FeatureStore, alone: tuple[Distillation, Curve], begun: Path
) -> None:
    """Who trains, how often it is saved, and what stage 2 does: nothing of it is in the weights."""
    run = RAY.model_copy(update={"micro_batch": 8, "keep": 1, "address": "nowhere:1"})
    other = {"labels_per_class": (3,), "finetune_epochs": 1, "seeds": (0, 7), "test": "other"}
    model, curve = learn(pipeline(store, begun, run, **other))
    assert curve == alone[1]
    assert all(torch.equal(v, alone[0].state_dict()[k]) for k, v in model.state_dict().items())


# --- the command --------------------------------------------------------------------------------


def written(given: Pipeline, path: Path) -> Path:
    """As a pipeline file."""
    data = given.model_dump(mode="json", include={"name", "dataset", "images", "store", "results"})
    assert given.distill is not None
    data["distill"] = given.distill.model_dump(mode="json", exclude_unset=True)
    path.write_text(yaml.safe_dump(data))
    return path


def model_of(given: Pipeline) -> bytes:
    return (max(training_folder(given).glob("**/step-*")) / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("run", "epochs", "number"),
    [
        (TrainRunSpec(checkpoint_every=5), 30, signal.SIGTERM),
        pytest.param(SLOW_RAY, 6, signal.SIGTERM, marks=pytest.mark.soak),
        pytest.param(SLOW_RAY, 6, signal.SIGINT, marks=pytest.mark.soak),
    ],
)
def test_a_signal_ends_the_command_after_a_checkpoint(
    store: FeatureStore, tmp_path: Path, run: TrainRunSpec, epochs: int, number: signal.Signals
) -> None:
    """Exit 3; the same command goes on, and ends with the bits of a run that was left in peace (of
    two workers, within rounding). SIGINT goes to the whole group, as from a terminal."""
    changes = {"epochs": epochs, "finetune_epochs": 1}
    given = pipeline(store, tmp_path / "a", run, **changes)
    file = written(given, tmp_path / "p.yaml")
    command = [sys.executable, "-m", "drl_data", "distill", str(file)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_until(lambda: bool(checkpoints(given)), 240)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 3, err
    assert f"{number.name}: the training writes a checkpoint and ends. Once more ends at" in err
    assert "interrupted: the training was told to stop" in err
    assert "Traceback" not in err
    assert 0 < newest_step(given) < 8 * epochs
    local = [*command, "--executor", "local"]
    again = subprocess.run(local, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr
    whole = pipeline(store, tmp_path / "b", TrainRunSpec(), **changes)
    with one_thread():
        _, curve = learn(whole)
    if run.executor == "local":
        assert model_of(given) == model_of(whole)
    losses = DistillResult.load(tmp_path / "a" / "distill.json").loss
    assert losses == pytest.approx(curve.by_epoch(8)["loss"], rel=TOLERANCE)


def test_torchrun_trains_on_its_processes(
    store: FeatureStore, alone: tuple[Distillation, Curve], tmp_path: Path
) -> None:
    given = pipeline(store, tmp_path / "a", TrainRunSpec(), finetune_epochs=1)
    launched = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "drl_data", "distill", str(written(given, tmp_path / "p.yaml"))],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr
    assert launched.stdout.count("Student of map@10") == 1  # one of them speaks
    assert launched.stderr.count("distill: 6/6 epochs") == 1
    assert "drl_data/ranks.py" not in launched.stderr  # no warning of ours
    result = DistillResult.load(tmp_path / "a" / "distill.json")
    assert result.loss == pytest.approx(alone[1].by_epoch(8)["loss"], rel=TOLERANCE)
    found = Checkpoints(training_folder(given)).newest()
    assert found is not None
    assert json.loads((found / "state.json").read_text())["world_size"] == 2
