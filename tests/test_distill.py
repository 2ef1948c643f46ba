"""Distillation: what the student learns, what decides the comparison, how it is reported."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from drl_data import teachers as teachers_module
from drl_data.distill_spec import DistillSpec, RegressorSpec, StudentSpec
from drl_data.errors import InputError, SpecError, TapError, UserError
from drl_data.images import read_batches
from drl_data.index import SampleIndex
from drl_data.pipeline import Pipeline
from drl_data.plan import Unit
from drl_data.progress import SILENT
from drl_data.regressors import Head, Whitening, as_map, build_regressor
from drl_data.shards import Array
from drl_data.spec import ImageSpec
from drl_data.store import FeatureStore
from drl_data.student import Student
from drl_data.tasks.distill import DistillResult, format_table, run_distill
from drl_data.tasks.few_labels import Budget, FewLabels, FewLabelTask, compare, random_shift
from drl_data.teachers import Teachers
from tests.stores import make_array
from tests.task_stores import digits_index, noise, pipeline_of, store_of

IMAGES = ImageSpec(size=8, mode="L")
TINY = StudentSpec(
    config={
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "layer_type": "basic",
    }
)
QUICK = DistillSpec(
    tap="map",
    timestep=11,
    student=TINY,
    epochs=6,
    finetune_epochs=10,
    batch_size=64,
    learning_rate=3e-3,
    labels_per_class=(1, 4),
    seeds=(0, 1, 2),
)


pytestmark = pytest.mark.usefixtures("module_on_one_thread")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    """Real digits of four classes, 8 x 8, splits train and test."""
    return digits_index(tmp_path_factory.mktemp("digits") / "tars")


@pytest.fixture(scope="module")
def pixels(index: SampleIndex) -> Array:
    """Their pixels 0..1, [n, 8, 8]."""
    unit = Unit(0, 0, index.n_samples)
    (batch,) = read_batches(
        unit, index, IMAGES, batch_size=unit.n_rows, n_threads=1, prefetch_bytes=1 << 20
    )
    return batch.pixels[:, 0].astype(np.float32) / 255


def labels_of(index: SampleIndex) -> Array:
    return index.table["label"].to_numpy()


def quadrants(pixels: Array) -> Array:
    """Brightness of the four quadrants and their complement, [n, 2, 2, 2]: easy to see."""
    means = pixels.reshape(-1, 2, 4, 2, 4).mean((2, 4))
    return np.stack([means, 3 - 10 * means], axis=1)


def class_map(labels: Array) -> Array:
    """A teacher that knows the classes, [n, 4, 2, 2]."""
    return np.tile(np.eye(4, dtype=np.float32)[labels][:, :, None, None], (1, 1, 2, 2))


def store_with(url: Path, index: SampleIndex, features: Array) -> FeatureStore:
    """Features at timestep 11 of tap `map`; noise at timestep 10."""
    return store_of(url, {"map": np.stack([noise(*features.shape), features])}, index)


def pipeline(store: FeatureStore, results: Path, **changes: object) -> Pipeline:
    return pipeline_of(store, results, distill=QUICK.model_copy(update=changes))


@pytest.fixture(scope="module")
def done(
    index: SampleIndex, tmp_path_factory: pytest.TempPathFactory
) -> tuple[FeatureStore, DistillResult, Path]:
    """A teacher that knows the classes, and what came of it."""
    folder = tmp_path_factory.mktemp("distill")
    store = store_with(folder / "store", index, class_map(labels_of(index)))
    return store, run_distill(pipeline(store, folder / "results", epochs=12)), folder


def test_a_teacher_that_knows_the_classes_helps(
    done: tuple[FeatureStore, DistillResult, Path],
) -> None:
    _, result, _ = done
    one, four = result.few
    assert (one.labels_per_class, four.labels_per_class) == (1, 4)
    assert np.mean(one.distilled) > np.mean(one.scratch) + 0.05
    assert min(four.distilled) > max(four.scratch)
    assert min(one.scratch_train) == 1.0  # scratch had steps enough to learn its own labels
    assert "1 label per class: distilled" in result.verdict
    assert "distilled beats scratch by" in four.verdict()
    assert result.loss[-1] < 0.3 < result.loss[0]
    assert result.n_classes == 4


def test_features_and_pixels_are_joined_by_row(
    index: SampleIndex, pixels: Array, tmp_path: Path
) -> None:
    seen = quadrants(pixels)
    few = {"labels_per_class": (1,), "finetune_epochs": 1, "seeds": (0,), "epochs": 15}
    right = run_distill(pipeline(store_with(tmp_path / "a", index, seen), tmp_path / "x", **few))
    shuffled = seen[np.random.default_rng(0).permutation(len(seen))]
    wrong = run_distill(
        pipeline(store_with(tmp_path / "b", index, shuffled), tmp_path / "y", **few)
    )
    assert right.loss[-1] < 0.25
    assert wrong.loss[-1] > 0.8
    assert "one seed says nothing" in right.verdict


def test_equal_starts_end_equal(index: SampleIndex, tmp_path: Path) -> None:
    """An untrained student of the same seed as scratch is the same arm: all else is shared."""
    store = store_with(tmp_path / "store", index, noise(index.n_samples, 4, 2, 2))
    spec = QUICK.model_copy(update={"seeds": (5,)})
    teachers = Teachers(store, spec, tmp_path / "statistics")
    few = FewLabelTask.of(teachers)
    student = Student(QUICK.student, IMAGES, 5)
    for one in compare(student, teachers, few, "cpu", SILENT):
        assert one.distilled == one.scratch
        assert one.distilled_train == one.scratch_train


def test_labels_and_test_images_have_no_part_in_stage_one(
    done: tuple[FeatureStore, DistillResult, Path], index: SampleIndex, tmp_path: Path
) -> None:
    _, result, _ = done
    features = class_map(labels_of(index))
    table = index.table
    test_rows = np.flatnonzero(np.array(table["split"].to_pylist()) == "test")
    features[test_rows] = 1e4
    column = table.column_names.index("label")
    shuffled = table.set_column(
        column, "label", table["label"].take(np.roll(np.arange(len(table)), 7))
    )
    other = SampleIndex(shuffled, index.tars, None, index.dataset)
    again = run_distill(pipeline(store_with(tmp_path / "s", other, features), tmp_path, epochs=12))
    assert again.loss == result.loss
    assert again.few != result.few


def test_the_draw_is_balanced_nested_and_repeatable(
    done: tuple[FeatureStore, DistillResult, Path], index: SampleIndex
) -> None:
    store, _, _ = done
    few = FewLabelTask.of(Teachers(store, QUICK, Path("unused")))
    labels = labels_of(index)
    splits = np.array(index.table["split"].to_pylist())
    for seed in range(3):
        for n in (1, 4, 9):
            rows = few.draw(Budget(n), seed)
            assert np.bincount(labels[rows]).tolist() == [n] * 4
            assert set(splits[rows]) == {"train"}
            assert set(rows) <= set(few.draw(Budget(n + 3), seed))
            assert np.array_equal(rows, few.draw(Budget(n), seed))
    assert set(few.draw(Budget(4), 0)) != set(few.draw(Budget(4), 1))


def test_streaming_gives_what_memory_holds(
    index: SampleIndex, pixels: Array, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = quadrants(pixels)
    teachers = Teachers(store_with(tmp_path / "s", index, seen), QUICK, tmp_path / "t")

    def rows(epoch: int, start: int = 0) -> list[bytes]:
        return [
            x.numpy().tobytes() + y.numpy().tobytes()
            for xs, targets in teachers.batches(epoch, start=start)
            for x, y in zip(xs, targets["map@11"], strict=True)
        ]

    held = rows(0)
    assert teachers._held is not None
    monkeypatch.setattr(teachers_module, "CACHE_BYTES", 0)
    assert rows(0) == held
    assert rows(0, start=2) == held[2 * QUICK.batch_size :]
    assert rows(1) != held
    everything = {
        x.tobytes() + y.tobytes()
        for x, y in zip((pixels[:, None] * 255).round().astype(np.uint8), seen, strict=True)
    }
    assert len(held) == teachers.n_rows // QUICK.batch_size * QUICK.batch_size
    assert len(held) == teachers.n_batches * QUICK.batch_size
    assert set(held) <= everything


@pytest.mark.parametrize("cache", [True, False])
def test_ranks_share_the_batches_of_one_process(
    index: SampleIndex, pixels: Array, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: bool
) -> None:
    if not cache:
        monkeypatch.setattr(teachers_module, "CACHE_BYTES", 0)
    store = store_with(tmp_path / "s", index, quadrants(pixels))
    teachers = Teachers(store, QUICK, tmp_path / "t")
    for epoch in range(2):
        whole = list(teachers.batches(epoch))
        parts = [list(teachers.batches(epoch, rank=r, world_size=4)) for r in range(4)]
        for step, (x, y) in enumerate(whole):
            xs = [part[step][0] for part in parts]
            assert {len(own) for own in xs} == {QUICK.batch_size // 4}
            ys = [part[step][1]["map@11"] for part in parts]
            want = torch.cat([x.flatten(1), y["map@11"].flatten(1)], 1).tolist()
            got = torch.cat([torch.cat(xs).flatten(1), torch.cat(ys).flatten(1)], 1).tolist()
            assert sorted(got) == sorted(want)
    with pytest.raises(SpecError, match="batches of 64 rows over 3 ranks: want multiples"):
        next(teachers.batches(0, rank=0, world_size=3))


def test_statistics_are_those_of_numpy_and_are_kept(
    index: SampleIndex, pixels: Array, tmp_path: Path
) -> None:
    features = quadrants(pixels) * 1000 + 5000
    features[:, 1] = 7.0  # does not vary
    store = store_with(tmp_path / "s", index, features)
    spec = QUICK.model_copy(update={"batch_size": 7})
    file = tmp_path / "results" / "statistics.safetensors"
    found = Teachers(store, spec, file).statistics
    train = np.array(index.table["split"].to_pylist()) == "train"
    of_channel = features[train].astype(np.float64).transpose(1, 0, 2, 3).reshape(2, -1)
    assert found.mean["map@11"][0].numpy() == pytest.approx(of_channel.mean(1), rel=1e-12)
    assert found.variance["map@11"][0].numpy() == pytest.approx(of_channel.var(1, ddof=1), rel=1e-9)
    white = Whitening(found.mean["map@11"], found.variance["map@11"])(
        torch.from_numpy(features[train])
    )
    assert white[:, 0].mean().abs() < 1e-4
    assert white[:, 0].std() == pytest.approx(1, abs=1e-3)
    assert torch.equal(white[:, 1], torch.zeros_like(white[:, 1]))

    written = file.stat().st_mtime_ns
    again = Teachers(store, spec, file)
    assert torch.equal(again.statistics.mean["map@11"], found.mean["map@11"])
    assert again._held is None  # nothing was read
    assert file.stat().st_mtime_ns == written
    other = Teachers(store, spec.model_copy(update={"timestep": 10}), file).statistics
    assert "map@10" in other.mean


def test_the_saved_student_is_the_one_that_was_trained(
    done: tuple[FeatureStore, DistillResult, Path],
) -> None:
    from transformers import AutoModel

    _, result, folder = done
    assert Path(result.student) == folder / "results" / "student"
    assert not list(Path(result.student).glob("*.bin"))
    body = AutoModel.from_pretrained(result.student)
    untrained = Student(QUICK.student, IMAGES, 0)
    x = torch.rand(2, 1, 32, 32)
    got = body(x).last_hidden_state
    assert got.shape == (2, 16, 4, 4)
    assert not torch.allclose(got, untrained.body.eval()(x)["last"], atol=1e-3)
    assert result.enlarge == 4
    assert result.n_parameters == sum(p.numel() for p in body.parameters())


def test_result_survives_its_file(done: tuple[FeatureStore, DistillResult, Path]) -> None:
    _, result, folder = done
    assert DistillResult.load(folder / "results" / "distill.json") == result
    with pytest.raises(InputError, match="not a result of `drl distill`"):
        DistillResult.load(folder / "nothing.json")
    console = Console(file=io.StringIO(), width=120)
    console.print(format_table(result))
    assert " ± " in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("model_type", "config", "shape"),
    [
        ("resnet", {}, (64, 4, 4)),
        (
            "vit",
            {
                "patch_size": 4,
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 8,
            },
            (16, 8, 8),
        ),
        (
            "convnext",
            {"patch_size": 2, "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
            (16, 8, 8),
        ),
    ],
)
def test_students_of_several_families(
    model_type: str, config: dict[str, object], shape: tuple[int, ...]
) -> None:
    spec = StudentSpec.model_validate({"model_type": model_type, "config": config})
    images = ImageSpec(size=16, mode="L")
    student, same, other = (Student(spec, images, seed) for seed in (0, 0, 1))
    student.eval()
    x = torch.randint(0, 256, (2, 1, 16, 16), dtype=torch.uint8)
    got = student(x)["last"]
    assert got.shape == (2, *shape)
    assert torch.equal(got, same.eval()(x)["last"])
    assert not torch.equal(got, other.eval()(x)["last"])


def test_seeds_leave_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    Student(TINY, IMAGES, 9)
    build_regressor(RegressorSpec(), {"a": 4}, ["a"], [make_array("a", (3, 2, 2), "float32")], 9)
    assert torch.equal(torch.rand(2), want)


@pytest.mark.parametrize("shape", [(6, 3, 2), (6,), (9, 6)])
def test_heads_for_maps_vectors_and_tokens(shape: tuple[int, ...]) -> None:
    array = make_array("x", shape, "float16")
    head = Head(5, array)
    stored = torch.randn(4, *shape).half()
    target = as_map(stored, array)
    assert target.dtype == torch.float32
    assert head(torch.randn(4, 5, 2, 2)).shape == target.shape
    if len(shape) == 2:  # token 3 * i + j is the place (i, j)
        assert torch.equal(target[:, :, 1, 2], stored[:, 5].float())


def test_random_shift_moves_every_image_and_repeats_edges() -> None:
    x = torch.arange(2 * 1 * 8 * 16, dtype=torch.uint8).reshape(2, 1, 8, 16)

    def moved(image: Tensor, dy: int, dx: int) -> Tensor:
        rows = [min(max(i + dy, 0), 7) for i in range(8)]
        columns = [min(max(j + dx, 0), 15) for j in range(16)]
        return image[:, rows][:, :, columns]

    seen = set()
    for seed in range(60):
        got = random_shift(x, torch.Generator().manual_seed(seed))
        for image, result in zip(x, got, strict=True):
            (shift,) = [
                (dy, dx)
                for dy in range(-1, 2)
                for dx in range(-2, 3)
                if torch.equal(moved(image, dy, dx), result)
            ]
            seen.add(shift)
    assert len(seen) == 15


def test_verdicts() -> None:
    def verdict(distilled: tuple[float, ...], scratch: tuple[float, ...]) -> str:
        return FewLabels(
            labels_per_class=5,
            n_labels=20,
            distilled=distilled,
            scratch=scratch,
            distilled_train=distilled,
            scratch_train=scratch,
        ).verdict()

    assert verdict((0.80, 0.82, 0.81), (0.70, 0.71, 0.70)).endswith(
        "5 labels per class: distilled 81.0%, from scratch 70.3%; "
        "distilled beats scratch by 10.7 ± 1.4 points over 3 seeds"
    )
    assert verdict((0.5, 0.5, 0.5), (0.6, 0.6, 0.6)).endswith(
        "distilled loses to scratch by 10.0 ± 0.0 points over 3 seeds"
    )
    assert verdict((0.9, 0.5, 0.7), (0.6, 0.6, 0.6)).endswith(
        "+10.0 ± 49.7 points are within the noise of 3 seeds"
    )


def test_errors(
    done: tuple[FeatureStore, DistillResult, Path], index: SampleIndex, tmp_path: Path
) -> None:
    store, _, _ = done
    with pytest.raises(TapError, match="no array 'up'; it has map"):
        run_distill(pipeline(store, tmp_path, tap="up"))
    with pytest.raises(TapError, match="no timestep 3; it has"):
        run_distill(pipeline(store, tmp_path, timestep=3))
    with pytest.raises(SpecError, match="no rows with split='val'"):
        run_distill(pipeline(store, tmp_path, test="val"))
    with pytest.raises(SpecError, match="both 'train'"):
        run_distill(pipeline(store, tmp_path, test="train"))
    with pytest.raises(SpecError, match=r"class \d has only \d+ labelled rows in 'train'"):
        run_distill(pipeline(store, tmp_path, labels_per_class=(1, 500)))
    with pytest.raises(SpecError, match="cannot build 'resnett'"):
        run_distill(pipeline(store, tmp_path, student=StudentSpec(model_type="resnett")))
    bad = StudentSpec(config={"layer_type": "round"})
    with pytest.raises(SpecError, match=r"layer_type=round is not one of"):
        run_distill(pipeline(store, tmp_path, student=bad))
    with pytest.raises(SpecError, match="lacks distill"):
        run_distill(pipeline_of(store, tmp_path))
    part = store_of(
        tmp_path / "part", {"map": noise(2, index.n_samples, 1, 2, 2)}, index, n_units=1
    )
    with pytest.raises(UserError, match="not computed yet"):
        run_distill(pipeline(part, tmp_path))
    tokens = store_of(tmp_path / "t", {"map": noise(2, index.n_samples, 5, 2)}, index)
    with pytest.raises(SpecError, match="5 tokens are no square grid"):
        run_distill(pipeline(tokens, tmp_path))
