"""RepFusion's policy: its draws, its gradients, and that it finds the timestep that is best."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from drl_data.distill_spec import DistillSpec, PolicySpec, StudentSpec, TargetSpec
from drl_data.distillation import LOSS, Distillation
from drl_data.errors import SpecError
from drl_data.index import SampleIndex
from drl_data.optimisation import optimizer_of, step
from drl_data.shards import Array
from drl_data.store import FeatureStore
from drl_data.teachers import LABEL, POLICY_DRAW, Teachers, time_key
from drl_data.time_policy import Drawn, TaskHead, TimePolicy, policy_losses
from tests.task_stores import digits_index, noise, store_of

OWN = StudentSpec(model_type="python:tests.student_modules:patches")
SPEC = DistillSpec(
    targets=(TargetSpec(tap="map", choose="policy"),),
    student=OWN,
    batch_size=32,
    learning_rate=5e-3,
    seeds=(0,),
)


pytestmark = pytest.mark.usefixtures("module_on_one_thread")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    return digits_index(tmp_path_factory.mktemp("digits") / "tars")


@pytest.fixture(scope="module")
def labels(index: SampleIndex) -> Array:
    return index.table["label"].to_numpy()


def class_vectors(labels: Array, seed: int) -> Array:
    """Vectors that tell the class, [n, 4]."""
    known = np.eye(4, dtype=np.float32)[labels]
    return known + 0.2 * noise(len(labels), 4, seed=seed)


@pytest.fixture(scope="module")
def one_is_best(
    index: SampleIndex, labels: Array, tmp_path_factory: pytest.TempPathFactory
) -> FeatureStore:
    """Timestep 12 tells the class; the others are noise."""
    n = len(labels)
    features = np.stack([noise(n, 4, seed=s) for s in range(4)])
    features[2] = class_vectors(labels, 9)
    return store_of(tmp_path_factory.mktemp("policy") / "s", {"map": features}, index)


def trained(spec: DistillSpec, store: FeatureStore, folder: Path, epochs: int) -> Distillation:
    teachers = Teachers(store, spec, folder / "statistics")
    model = Distillation(spec, teachers)
    optimizer = optimizer_of(model, spec)
    for epoch in range(epochs):
        for pixels, targets in teachers.batches(epoch):
            step(optimizer, model(pixels, targets)[LOSS])
    return model


def chances(model: Distillation, store: FeatureStore, folder: Path) -> Tensor:
    teachers = Teachers(store, model.spec, folder / "statistics")
    return model.chances(teachers.pixels(teachers.selection.rows))


BY_LOSS = PolicySpec(reward="distill", baseline="mean")


@pytest.mark.parametrize(
    ("policy", "seed"),
    [(PolicySpec(), 0), (PolicySpec(), 1), (PolicySpec(), 2), (BY_LOSS, 0), (BY_LOSS, 1)],
)
def test_the_policy_finds_the_best_timestep(
    policy: PolicySpec, seed: int, one_is_best: FeatureStore, tmp_path: Path
) -> None:
    spec = SPEC.model_copy(update={"policy": policy, "seeds": (seed,)})
    model = trained(spec, one_is_best, tmp_path, epochs=18)
    mean = chances(model, one_is_best, tmp_path).mean(0)
    assert mean.argmax() == 2
    assert mean[2] > 0.8


def test_the_choice_is_made_for_each_image(
    index: SampleIndex, labels: Array, tmp_path: Path
) -> None:
    """Digits 0 and 1 are told apart at timestep 10, 2 and 3 at timestep 11.

    With a baseline and more entropy; with the published values the policy settles on one timestep
    before the classifier has learnt the other.
    """
    early = labels < 2
    features = np.stack([noise(len(labels), 4, seed=s) for s in range(2)])
    features[0, early] = class_vectors(labels, 8)[early]
    features[1, ~early] = class_vectors(labels, 9)[~early]
    store = store_of(tmp_path / "s", {"map": 3 * features}, index)
    policy = PolicySpec(baseline="mean", entropy=0.2)
    model = trained(SPEC.model_copy(update={"policy": policy}), store, tmp_path, epochs=25)
    found = chances(model, store, tmp_path)
    train = early[Teachers(store, SPEC, tmp_path / "statistics").selection.rows]
    assert found[train, 0].mean() > 0.8
    assert found[~train, 1].mean() > 0.8


def test_entropy_keeps_the_policy_open(one_is_best: FeatureStore, tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"policy": BY_LOSS.model_copy(update={"entropy": 100.0})})
    mean = chances(trained(spec, one_is_best, tmp_path, 6), one_is_best, tmp_path).mean(0)
    assert mean.max() < 0.35


def test_losses_are_those_of_reinforce() -> None:
    """Against the formula with numbers; the gradient only reaches the policy."""
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 3.0]], requires_grad=True)
    log_chance = torch.log_softmax(logits, 1)
    chance = log_chance.exp()
    position = torch.tensor([1, 0])
    loss = torch.tensor([0.7, 2.0], requires_grad=True)
    drawn = Drawn(
        position, log_chance.gather(1, position[:, None])[:, 0], -(chance * log_chance).sum(1)
    )
    p = np.exp(logits.detach().numpy())
    p /= p.sum(1, keepdims=True)
    log_p = [math.log(p[0, 1]), math.log(p[1, 0])]
    entropies = [-sum(x * math.log(x) for x in row) for row in p]
    found = policy_losses(drawn, loss, PolicySpec(entropy=0.3))
    assert found["policy"].item() == pytest.approx(-(log_p[0] * -0.7 + log_p[1] * -2.0) / 2)
    assert found["entropy"].item() == pytest.approx(-0.3 * sum(entropies) / 2, rel=1e-5)
    centred = policy_losses(drawn, loss, PolicySpec(baseline="mean"))["policy"]
    assert centred.item() == pytest.approx(-(log_p[0] * 0.65 + log_p[1] * -0.65) / 2, rel=1e-5)
    (found["policy"] + found["entropy"]).backward()
    assert loss.grad is None
    assert logits.grad is not None


def test_draws_have_the_policys_chances_in_any_batch() -> None:
    policy = TimePolicy(1, 5)
    x = torch.randn(1, 1, 32, 32).expand(4000, -1, -1, -1)
    uniform = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        policy.linear3.bias += torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
        drawn = policy.draw(x, uniform)
        parts = [policy.draw(x[i : i + 100], uniform[i : i + 100]) for i in (0, 100)]
        chance = policy(x[:1]).exp()[0]
    share = torch.bincount(drawn.position, minlength=5) / 4000
    assert (share - chance).abs().max() < 0.03
    assert torch.equal(torch.cat([part.position for part in parts]), drawn.position[:200])
    assert torch.allclose(drawn.log_chance, chance.log()[drawn.position], atol=1e-5)
    edge = policy.draw(x[:2], torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64))
    assert edge.position.tolist() == [0, 4]


def test_images_without_a_label_teach_the_classifier_nothing() -> None:
    head = TaskHead(4, 3)
    found = head(torch.randn(2, 4), torch.tensor([-1, 2]))
    assert found[0] == 0
    assert found[1] > 0


def test_batches_have_what_the_choice_needs(one_is_best: FeatureStore, tmp_path: Path) -> None:
    teachers = Teachers(one_is_best, SPEC, tmp_path / "t")
    pixels, targets = next(teachers.batches(0))
    name = "map@10,11,12,13"
    assert targets.keys() == {name, POLICY_DRAW, LABEL}
    assert targets[name].shape == (32, 4, 4)
    assert targets[LABEL].unique().tolist() == [0, 1, 2, 3]
    model = Distillation(SPEC, teachers)
    found = model(pixels, targets)
    assert found.keys() == {name, "features", "policy", "entropy", "task", "loss"}
    parts = found["features"] + found["policy"] + found["entropy"] + found["task"]
    assert torch.allclose(found["loss"], parts)
    found["loss"].backward()
    for parameter_name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, parameter_name


def test_the_uniform_choice_is_the_same_from_memory_and_from_the_store(
    one_is_best: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn for each image and epoch; the values are those of the timestep that it names."""
    spec = SPEC.model_copy(update={"targets": (TargetSpec(tap="map", choose="uniform"),)})
    teachers = Teachers(one_is_best, spec, tmp_path / "t")
    name = teachers.targets[0].name
    held = [list(teachers.batches(epoch)) for epoch in range(2)]
    monkeypatch.setattr("drl_data.teachers.CACHE_BYTES", 0)
    streamed = list(teachers.batches(0))
    for (x, mine), (y, theirs) in zip(held[0], streamed, strict=True):
        assert torch.equal(x, y)
        assert mine.keys() == theirs.keys() == {name, time_key(name)}
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    times = torch.cat([targets[time_key(name)] for _, targets in held[0]])
    assert torch.bincount(times).min() > len(times) / 4 * 0.7
    assert not torch.equal(times, torch.cat([t[time_key(name)] for _, t in held[1]]))
    rows = teachers._in_memory()[1][name].flatten(0, 1)
    for _, targets in held[0][:2]:
        for value, time in zip(targets[name], targets[time_key(name)], strict=True):
            (found,) = (rows == value).all(1).nonzero()
            assert int(found) % 4 == int(time)
    found = Distillation(spec, teachers)(*held[0][0])
    assert found.keys() == {name, "features", "loss"}


def test_refused(one_is_best: FeatureStore, index: SampleIndex, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="want one, or choose: uniform or policy"):
        TargetSpec(tap="map", timestep=(10, 11))
    with pytest.raises(ValueError, match="choose: policy of one timestep"):
        TargetSpec(tap="map", timestep=(10,), choose="policy")
    two = (
        TargetSpec(tap="map", choose="policy"),
        TargetSpec(tap="map", timestep=(10, 11), choose="policy"),
    )
    with pytest.raises(SpecError, match="the policy chooses one timestep for all"):
        Teachers(one_is_best, SPEC.model_copy(update={"targets": two}), tmp_path / "t")
    one = store_of(tmp_path / "one", {"map": noise(1, index.n_samples, 4)}, index)
    with pytest.raises(SpecError, match=r"choose: policy, but .* has one timestep"):
        Teachers(one, SPEC, tmp_path / "t")
    column = index.table.column_names.index("label")
    bare = index.table.set_column(column, "label", pa.nulls(len(index.table), pa.int64()))
    unlabelled = SampleIndex(bare, index.tars, None, index.dataset)
    store = store_of(tmp_path / "bare", {"map": noise(2, index.n_samples, 4)}, unlabelled)
    with pytest.raises(SpecError, match="labels of 0 classes; want reward: distill"):
        Distillation(SPEC, Teachers(store, SPEC, tmp_path / "t"))
