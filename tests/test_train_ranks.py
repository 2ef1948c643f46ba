"""Stage 1 of distillation on Ray Train and under torchrun: the curve of one process, whatever dies.

The student is a small ViT: batch norm on several CPUs is refused.
"""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from drl_data.distill_spec import DistillSpec, StudentSpec
from drl_data.distillation import Distillation
from drl_data.index import SampleIndex
from drl_data.pipeline import Pipeline
from drl_data.progress import SILENT
from drl_data.ranks import Ranks
from drl_data.shards import Array
from drl_data.stopping import Stop
from drl_data.store import FeatureStore
from drl_data.tasks.stage_one import learn_features, training_folder
from drl_data.teachers import Teachers
from drl_data.train_spec import TrainRunSpec
from drl_data.training import Curve
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


def workers_of_ray() -> list[int]:
    """Process ids of Ray Train's workers of this session's Ray."""
    import ray

    (raylet,) = ray._private.worker._global_node.all_processes["raylet"]
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes()
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == raylet.process.pid and title.startswith(b"ray::") and b"TrainWorker" in title:
            found.append(int(folder.name))
    return sorted(found)


def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint(
    local_ray: None,
    store: FeatureStore,
    alone: tuple[Distillation, Curve],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SIGKILL in the middle of an epoch."""
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
    given = pipeline(store, tmp_path, RAY)
    with ThreadPoolExecutor(1) as behind:
        run = behind.submit(learn, given)
        wait_until(lambda: "step-0000000012" in checkpoints(given))
        first = workers_of_ray()
        assert len(first) == 2
        os.kill(first[1], signal.SIGKILL)
        found = run.result(120)
    assert_same_training(found, alone)
    assert checkpoints(given)[-1] == "step-0000000048"
