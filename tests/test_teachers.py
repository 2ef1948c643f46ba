"""Several targets and teachers: what is read, joined, whitened, weighed, and what it trains."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from rich.console import Console

from drl_data.distill_losses import LOSSES
from drl_data.distill_spec import DistillSpec, RegressorSpec, StudentSpec
from drl_data.distillation import Distillation
from drl_data.errors import InputError, SpecError, TapError, UserError
from drl_data.index import SampleIndex
from drl_data.optimisation import optimizer_of, step
from drl_data.pipeline import Pipeline
from drl_data.report import write_report
from drl_data.shards import Array
from drl_data.store import FeatureStore
from drl_data.tasks.distill import DistillResult, format_table, run_distill
from drl_data.tasks.few_labels import Budget, FewLabelTask
from drl_data.teachers import TEACHER_DRAW, Teachers
from tests.task_stores import digits_index, noise, pipeline_of, store_of

OWN = StudentSpec(model_type="python:tests.student_modules:patches")


pytestmark = pytest.mark.usefixtures("module_on_one_thread")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    return digits_index(tmp_path_factory.mktemp("digits") / "tars")


@pytest.fixture(scope="module")
def labels(index: SampleIndex) -> Array:
    return index.table["label"].to_numpy()


@pytest.fixture(scope="module")
def known(labels: Array) -> dict[str, Array]:
    """Features of the own store: `map` at two timesteps, `vector`; both tell the class."""
    one_hot = np.eye(4, dtype=np.float32)[labels]
    maps = np.tile(one_hot[:, :, None, None], (1, 1, 2, 2))
    return {
        "map": np.stack([maps, 5 - 2 * maps]) + 0.1 * noise(2, *maps.shape),
        "vector": np.stack([one_hot, 3 * one_hot]) + 0.1 * noise(2, *one_hot.shape, seed=1),
    }


@pytest.fixture(scope="module")
def own(
    index: SampleIndex, known: dict[str, Array], tmp_path_factory: pytest.TempPathFactory
) -> FeatureStore:
    return store_of(tmp_path_factory.mktemp("own") / "s", known, index)


def reordered(index: SampleIndex, order: Array, **columns: pa.Array) -> SampleIndex:
    table = index.table.take(pa.array(order))
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, values)
    return SampleIndex(table, index.tars, None, index.dataset)


@pytest.fixture(scope="module")
def order(index: SampleIndex) -> Array:
    return np.random.default_rng(3).permutation(index.n_samples)


@pytest.fixture(scope="module")
def tokens(index: SampleIndex) -> Array:
    """Another teacher's features, [n, 4, 6]: a large scale, and the row in it."""
    x = 1000 + 50 * noise(index.n_samples, 4, 6, seed=5)
    x[:, :, 0] = np.arange(index.n_samples)[:, None]
    return x


@pytest.fixture(scope="module")
def other(
    index: SampleIndex, order: Array, tokens: Array, tmp_path_factory: pytest.TempPathFactory
) -> FeatureStore:
    """The same images in another order."""
    url = tmp_path_factory.mktemp("other") / "s"
    return store_of(url, {"tokens": tokens[None, order]}, reordered(index, order), dataset="e" * 64)


def spec_of(*targets: dict[str, object], **changes: object) -> DistillSpec:
    return DistillSpec.model_validate(
        {
            "targets": targets,
            "student": OWN.model_dump(),
            "batch_size": 32,
            "learning_rate": 3e-3,
            **changes,
        }
    )


TWO = (
    {"tap": "map", "timestep": 11, "stage": "patches"},
    {"tap": "vector", "timestep": 10},
    {"tap": "tokens", "teacher": "encoder", "weight": 2, "loss": "cosine"},
)


def test_rows_of_teachers_are_joined_by_key(
    own: FeatureStore,
    other: FeatureStore,
    known: dict[str, Array],
    tokens: Array,
    index: SampleIndex,
    tmp_path: Path,
) -> None:
    spec = spec_of(*TWO, teachers={"encoder": other.url})
    teachers = Teachers(own, spec, tmp_path / "t", {"encoder": other})
    names = ["map@11 -> patches", "vector@10", "encoder/tokens@10"]
    assert [target.name for target in teachers.targets] == names
    rows = []
    for x, targets in teachers.batches(0):
        row = targets["encoder/tokens@10"][:, 0, 0].long().numpy()
        assert np.array_equal(targets["map@11 -> patches"].numpy(), known["map"][1, row])
        assert np.array_equal(targets["vector@10"].numpy(), known["vector"][0, row])
        assert torch.equal(x, teachers.pixels(np.sort(row))[np.argsort(np.argsort(row))])
        rows.extend(row.tolist())
    splits = np.array(index.table["split"].to_pylist())
    assert set(splits[rows]) == {"train"}
    assert len(set(rows)) == len(rows) == teachers.n_batches * 32


def test_each_target_reads_its_own_timesteps(own: FeatureStore, tmp_path: Path) -> None:
    """Not every tap at every timestep that some tap is wanted at."""
    spec = spec_of(TWO[0], TWO[1])
    teachers = Teachers(own, spec, tmp_path / "t")
    assert teachers.selection.bytes_per_row == 4 * (4 * 2 * 2) + 4 * 4


def test_statistics_of_each_teacher_are_numpys(
    own: FeatureStore,
    other: FeatureStore,
    known: dict[str, Array],
    tokens: Array,
    index: SampleIndex,
    tmp_path: Path,
) -> None:
    train = np.array(index.table["split"].to_pylist()) == "train"
    targets = (*TWO[1:], {"tap": "map", "choose": "uniform"})
    spec = spec_of(*targets, teachers={"encoder": other.url})
    teachers = Teachers(own, spec, tmp_path / "t", {"encoder": other})
    found = teachers.statistics
    want = {
        "vector@10": known["vector"][:1, train][..., None],
        "encoder/tokens@10": tokens[None, train].transpose(0, 1, 3, 2),
        "map@10,11": known["map"][:, train].reshape(2, train.sum(), 4, 4),
    }
    assert found.mean.keys() == want.keys()
    for name, x in want.items():
        exact = x.astype(np.float64)
        assert found.mean[name].numpy() == pytest.approx(exact.mean((1, 3)), rel=1e-9)
        n = x.shape[1] * x.shape[3]
        variance = exact.var((1, 3)) * n / (n - 1)
        assert found.variance[name].numpy() == pytest.approx(variance, rel=1e-7)
    _, batch = next(teachers.batches(0))
    for name, white in Distillation(spec, teachers).whitened(batch).items():
        assert white.mean().abs() < 0.5, name  # teachers of any scale weigh alike
        assert white.std() == pytest.approx(1, abs=0.3), name


def test_the_loss_is_the_weighted_mean_of_the_targets(
    own: FeatureStore, other: FeatureStore, tmp_path: Path
) -> None:
    spec = spec_of(*TWO, teachers={"encoder": other.url})
    teachers = Teachers(own, spec, tmp_path / "t", {"encoder": other})
    model = Distillation(spec, teachers).eval()
    pixels, targets = next(teachers.batches(0))
    losses = model(pixels, targets)
    map_, vector, encoder = (losses[target.name] for target in teachers.targets)
    assert torch.allclose(losses["loss"], (map_ + vector + 2 * encoder) / 4)
    predicted = model.regressor(model.student(pixels))[2]
    wanted = model.whitened(targets)["encoder/tokens@10"]
    cosine = torch.nn.functional.cosine_similarity(predicted, wanted, dim=1)
    assert torch.allclose(encoder, 1 - cosine.mean())
    assert wanted.shape == (32, 6, 2, 2)  # token 2 * i + j is the place (i, j)
    stored = targets["encoder/tokens@10"]
    statistics = teachers.statistics
    white = (stored[:, 3, 1] - statistics.mean["encoder/tokens@10"][0, 1]) / statistics.variance[
        "encoder/tokens@10"
    ][0, 1].sqrt()
    assert torch.allclose(wanted[:, 1, 1, 1], white.float(), atol=1e-4)


def test_dropped_teachers_do_not_train(
    own: FeatureStore, other: FeatureStore, tmp_path: Path
) -> None:
    spec = spec_of(*TWO[1:], teachers={"encoder": other.url}, drop_teachers=0.5)
    teachers = Teachers(own, spec, tmp_path / "t", {"encoder": other})
    model = Distillation(spec, teachers).eval()
    pixels, targets = next(teachers.batches(0))
    assert targets[TEACHER_DRAW].shape == (32, 2)
    again = dict(next(teachers.batches(0))[1])
    assert torch.equal(again[TEACHER_DRAW], targets[TEACHER_DRAW])
    whole = model(pixels, targets | {TEACHER_DRAW: torch.ones(32, 2)})
    vector, encoder = whole["vector@10"], whole["encoder/tokens@10"]
    assert torch.allclose(whole["loss"], (vector + 2 * encoder) / 3)
    alone = model(pixels[:1], {k: v[:1] for k, v in targets.items()})
    half = {TEACHER_DRAW: torch.zeros(1, 2)}  # all are left out, but the worst
    worst = model(pixels[:1], {k: v[:1] for k, v in targets.items()} | half)
    assert torch.allclose(
        worst["loss"], torch.maximum(alone["vector@10"], alone["encoder/tokens@10"])
    )


def test_weights_change_only_where_they_should(own: FeatureStore, tmp_path: Path) -> None:
    """A target of the first stage trains nothing deeper; statistics are no weights."""
    spec = spec_of({**TWO[0], "loss": {"mse": 1, "attention": 10}}, weight_decay=0.1)
    teachers = Teachers(own, spec, tmp_path / "t")
    model = Distillation(spec, teachers)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    optimizer = optimizer_of(model, spec)
    for pixels, targets in teachers.batches(0):
        step(optimizer, model(pixels, targets)["loss"])
    changed = {n for n, x in model.state_dict().items() if not torch.equal(x, before[n])}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    counters = {n for n in before if "running" in n or "num_batches" in n}
    assert changed == trained | counters
    assert not any("deep" in name or "unused" in name for name in trained)
    assert any(name.startswith("regressor.") for name in trained)


def test_dreamteacher_with_stages_and_pyramid(
    own: FeatureStore, known: dict[str, Array], tmp_path: Path
) -> None:
    """Levels from stages of an AutoBackbone, LayerNorm, squared error and attention transfer."""
    student = {
        "config": {
            "embedding_size": 8,
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "layer_type": "basic",
        },
        "stages": ["stage1", "stage2"],
    }
    level = {"loss": {"mse": 1, "attention": 10}, "whiten": "layer_norm"}
    spec = spec_of(
        {"tap": "map", "timestep": 10, "stage": "stage1", **level},
        {"tap": "map", "timestep": 11, "stage": "stage2", **level},
        student=student,
        regressor=RegressorSpec(kind="fpn", channels=16, pools=(1, 2)).model_dump(),
        epochs=10,
        finetune_epochs=5,
        labels_per_class=[],
        label_fractions=[0.02, 0.1],
        seeds=[0, 1],
    )
    result = run_distill(pipeline_of(own, tmp_path / "results", distill=spec))
    assert result.targets == ("map@10 -> stage1", "map@11 -> stage2")
    assert result.loss[-1] < 0.5 * result.loss[0]
    assert [few.fraction for few in result.few] == [0.02, 0.1]
    two, ten = result.few
    assert (two.n_labels, ten.n_labels) == (11, 54)
    assert np.mean(ten.distilled) > np.mean(ten.scratch)
    assert result.verdict.startswith("2 % of the labels (11): distilled")
    assert DistillResult.load(tmp_path / "results" / "distill.json") == result


def test_the_verdict_says_that_the_policy_saw_labels(own: FeatureStore, tmp_path: Path) -> None:
    spec = spec_of(
        {"tap": "map", "choose": "policy"},
        epochs=1,
        finetune_epochs=1,
        labels_per_class=[1],
        seeds=[0, 1],
    )
    result = run_distill(pipeline_of(own, tmp_path, distill=spec))
    assert "the rival did not have: this is no comparison with few labels" in result.verdict
    assert result.policy is not None
    assert result.policy.timesteps == (10, 11)
    assert sum(result.policy.chances) == pytest.approx(1)


def test_without_a_test_split_the_student_is_only_trained(
    own: FeatureStore, tmp_path: Path
) -> None:
    spec = spec_of(TWO[1], epochs=2, test=None)
    pipeline = pipeline_of(own, tmp_path, distill=spec)
    result = run_distill(pipeline)
    assert (result.few, result.n_test, len(result.loss)) == ((), 0, 2)
    assert result.verdict == "No test split was named: the student was not compared."
    assert (Path(result.student) / "model.safetensors").is_file()
    console = Console(file=io.StringIO(), width=120)
    console.print(format_table(result))
    assert "last loss" in console.file.getvalue()  # type: ignore[attr-defined]
    page = write_report(pipeline).read_text(encoding="utf-8")
    assert "The student" in page
    assert "fine-tuned" not in page
    assert "With few labels" not in page


def test_a_teacher_of_other_images_is_refused(
    own: FeatureStore,
    other: FeatureStore,
    index: SampleIndex,
    order: Array,
    tokens: Array,
    tmp_path: Path,
) -> None:
    def refused(match: str, other_index: SampleIndex, name: str) -> None:
        features = {"tokens": tokens[None, : other_index.n_samples]}
        store = store_of(tmp_path / name, features, other_index, dataset="f" * 64)
        spec = spec_of(TWO[2], teachers={"encoder": store.url})
        with pytest.raises(InputError, match=match):
            Teachers(own, spec, tmp_path / "t", {"encoder": store})

    refused("lacks 100 of the", reordered(index, order[:-100]), "fewer")
    n = index.n_samples
    strange = pa.array([f"x{i}" for i in range(n)])
    refused("these are other data sets", reordered(index, order, key=strange), "strange")
    sizes = pa.array(np.full(n, 7), pa.int64())
    refused("equal keys but images of other sizes", reordered(index, order, size=sizes), "sizes")


def test_refused(own: FeatureStore, other: FeatureStore, tmp_path: Path) -> None:
    def refused(match: str, *targets: dict[str, object], **changes: object) -> None:
        with pytest.raises((SpecError, TapError, UserError, ValueError), match=match):
            run_distill(pipeline_of(own, tmp_path, distill=spec_of(*targets, **changes)))

    refused(r"has stage 'stage9'; the student's are patches, deep", {**TWO[0], "stage": "stage9"})
    refused("timestep: missing; 'map' has 10, 11", {"tap": "map"})
    refused("no timestep 3", {"tap": "map", "timestep": 3})
    refused("map@11 twice", {"tap": "map", "timestep": 11}, {"tap": "map", "timestep": 11})
    refused("no store at", TWO[2], teachers={"encoder": str(tmp_path / "nothing")})
    refused(r"targets of \['encoder'\]; the teachers are \['store'\]", TWO[2])
    refused("no target is theirs", TWO[1], teachers={"encoder": other.url})
    refused("want other names than 'store'", TWO[1], teachers={"store": other.url})
    refused("drop_teachers with one teacher", TWO[1], drop_teachers=0.5)
    refused("want tap .*, or targets")
    refused("want tap .*, or targets", TWO[1], tap="map", timestep=11)
    refused("want labels_per_class or label_fractions", TWO[1], labels_per_class=[])
    refused("mean .* want as many", TWO[1], student={"mean": [0.5]})


def test_the_sections_of_the_docs_are_valid() -> None:
    text = (Path(__file__).parents[1] / "docs" / "distillation.md").read_text(encoding="utf-8")
    found = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(found) == 2
    for section in found:
        spec = DistillSpec.model_validate(yaml.safe_load(section)["distill"])
        assert {name for cell in spec.cells for name in cell.loss} <= LOSSES.keys()


def test_paths_of_teachers_and_weights_are_relative_to_the_file(tmp_path: Path) -> None:
    spec = spec_of(
        {"tap": "a", "timestep": 1, "teacher": "x"},
        {"tap": "a", "timestep": 1, "teacher": "y"},
        teachers={"x": "x.zarr", "y": "s3://bucket/y.zarr"},
        student={"weights": "student"},
    )
    pipeline = Pipeline.model_validate(
        {
            "name": "p",
            "dataset": {"tars": "a.tar"},
            "images": {"size": 8},
            "distill": spec.model_dump(),
        }
    ).relative_to(Path("/here"))
    assert pipeline.distill is not None
    assert pipeline.distill.teachers == {"x": "/here/x.zarr", "y": "s3://bucket/y.zarr"}
    assert pipeline.distill.student.weights == "/here/student"


def test_shares_of_labels_are_stratified(own: FeatureStore, labels: Array, tmp_path: Path) -> None:
    few = FewLabelTask.of(Teachers(own, spec_of(TWO[1]), tmp_path / "t"))
    available = np.bincount(few.train.labels)
    for share in (0.001, 0.01, 0.05, 0.2, 1.0):
        for seed in range(3):
            rows = few.draw(Budget(fraction=share), seed)
            counts = np.bincount(labels[rows], minlength=4)
            assert len(set(rows.tolist())) == len(rows)
            assert set(rows) <= set(few.train.rows)
            assert np.abs(counts - np.maximum(share * available, 1)).max() < 1 + 1e-9
            assert len(rows) == max(round(share * available.sum()), 4)


def test_counts_of_unequal_classes() -> None:
    available = np.array([1000, 10, 1, 55])
    assert Budget(fraction=0.1).counts(available).tolist() == [100, 1, 1, 6]
    assert Budget(fraction=0.01).counts(available).tolist() == [10, 1, 1, 1]
    assert Budget(fraction=1.0).counts(available).tolist() == available.tolist()
    assert Budget(per_class=3).counts(available).tolist() == [3, 3, 3, 3]
