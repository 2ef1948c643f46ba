"""Pixel classifiers: upsampling, ensembles, label maps and IoU against references; as a task."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import accuracy_score, jaccard_score
from torch import Tensor, nn
from torch.distributions import Categorical
from typer.testing import CliRunner

from drl_data.bilinear import at_points, on_grid, upsampled
from drl_data.cli import app
from drl_data.errors import SpecError
from drl_data.iou import ClassCounts
from drl_data.objects import open_folder
from drl_data.pipeline import Pipeline
from drl_data.pixel_features import GatheredPixels, MapPixels, gathered
from drl_data.pixel_linear import PixelLinear
from drl_data.pixel_mlps import PixelMlps, first_weights, votes
from drl_data.report import write_report
from drl_data.runs import extract
from drl_data.segment_files import label_image, png_path
from drl_data.segment_spec import PixelLinearSpec, PixelMlpSpec, SegmentSpec
from drl_data.store import FeatureStore
from drl_data.tasks.segment import SegmentResult, run_segment
from tests.digit_scenes import SIDE, scenes_pipeline, write_scenes

SIDES = st.integers(1, 9)


pytestmark = pytest.mark.usefixtures("module_on_one_thread")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- upsampling ---------------------------------------------------------------------------------


@given(st.tuples(SIDES, SIDES), st.tuples(st.integers(1, 30), st.integers(1, 30)))
@settings(deadline=None, max_examples=100, derandomize=True)
def test_values_between_cells_are_those_of_interpolate(
    grid: tuple[int, int], size: tuple[int, int]
) -> None:
    x = randn(3, *grid)
    want = F.interpolate(x[None], size=size, mode="bilinear", align_corners=False)[0]
    ys, xs = upsampled(size[0], grid[0]), upsampled(size[1], grid[1])
    torch.testing.assert_close(on_grid(x, ys, xs), want, atol=1e-5, rtol=0)
    y, column = torch.meshgrid(ys, xs, indexing="ij")
    points = at_points(x, y.flatten(), column.flatten())
    torch.testing.assert_close(points.T.reshape(want.shape), want, atol=1e-5, rtol=0)


def test_pixels_are_gathered_from_whole_upsampled_maps() -> None:
    """Kept as vectors or as maps in float16: what concatenated upsampled maps have there."""
    size, generator = (12, 10), torch.Generator().manual_seed(0)
    images = [[randn(4, 3, 5, seed=i).half(), randn(2, 6, 5, seed=i + 9).half()] for i in range(3)]
    held, vectors, want = MapPixels("cpu", size), [], []
    for maps in images:
        places = torch.randperm(120, generator=generator)[:17]
        y, x = places // 10, places % 10
        held.add(maps, y, x)
        vectors.append(gathered(maps, y, x, size))
        up = [F.interpolate(m[None].float(), size=size, mode="bilinear")[0] for m in maps]
        want.append(torch.cat(up)[:, y, x].T)
    held.finish()
    assert (held.n_pixels, held.n_channels) == (51, 6)
    chosen = torch.randint(51, (4, 5), generator=generator)
    torch.testing.assert_close(torch.cat(vectors), torch.cat(want), atol=1e-5, rtol=0)
    torch.testing.assert_close(held.take(chosen), torch.cat(want)[chosen], atol=1e-5, rtol=0)


# --- the ensemble -------------------------------------------------------------------------------


def classifier(sizes: tuple[int, ...], seed: int) -> nn.Sequential:
    """One network as DDPM-Seg writes it, with weights of a member."""
    layers: list[nn.Module] = []
    weights = first_weights(sizes, seed)
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        linear = nn.Linear(a, b)
        linear.weight.data, linear.bias.data = weights[i].T.clone(), torch.zeros(b)
        layers.append(linear)
        if i < len(sizes) - 2:
            layers += [nn.ReLU(), nn.BatchNorm1d(b)]
    return nn.Sequential(*layers)


def published_training(
    model: nn.Sequential, x: Tensor, y: Tensor, seed: int, spec: PixelMlpSpec
) -> int:
    """train_interpreter.py's loop, with a member's order of the pixels; epochs that it took."""
    optimizer = torch.optim.Adam(model.parameters(), lr=spec.learning_rate)
    generator = torch.Generator().manual_seed(seed)
    best_loss, break_count = 10000000.0, 0
    for epoch in range(spec.epochs):
        order = torch.randperm(len(x), generator=generator)
        for start in range(0, len(x) - spec.batch_size + 1, spec.batch_size):
            batch = order[start : start + spec.batch_size]
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
            if epoch > spec.least_epochs - 1:
                if loss.item() < best_loss:
                    best_loss, break_count = loss.item(), 0
                else:
                    break_count += 1
                if break_count > spec.patience - 1:
                    return epoch + 1
    return spec.epochs


@pytest.mark.parametrize("patience", [1, 4, 1000])
def test_members_learn_what_they_would_learn_alone(patience: int) -> None:
    x, y = randn(150, 7), (randn(150, 7)[:, :3] * 2).argmax(1)
    spec = PixelMlpSpec(members=3, hidden=(6, 5), epochs=6, patience=patience, batch_size=16,
                        least_epochs=2, learning_rate=0.01)  # fmt: skip
    ensemble = PixelMlps(spec, 7, 3, 5, "cpu")
    losses = list(ensemble.train(GatheredPixels(x), y))
    assert losses[-1] < losses[0]
    found = ensemble.logits(x)
    epochs = []
    for member in range(3):
        model = classifier((7, 6, 5, 3), 5 + member)
        epochs.append(published_training(model, x, y, 5 + member, spec))
        torch.testing.assert_close(found[member], model.eval()(x), atol=2e-4, rtol=1e-3)
    assert ensemble.n_epochs == epochs
    assert (min(epochs) < 6) == (patience < 1000)
    assert min(epochs) > 2  # none ends before the least number of epochs
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("standardise", [False, True])
def test_an_image_is_predicted_as_its_upsampled_pixels(
    standardise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first layer on maps and then upsampled, in blocks of rows: as vectors of pixels."""
    monkeypatch.setattr("drl_data.pixel_mlps.BLOCK_BYTES", 2000)
    size, maps = (10, 7), [randn(4, 3, 5).half(), randn(3, 10, 7).half() + 2]
    y, x = torch.meshgrid(torch.arange(10), torch.arange(7), indexing="ij")
    vectors = gathered(maps, y.flatten(), x.flatten(), size)
    spec = PixelMlpSpec(members=2, hidden=(6,), epochs=2, batch_size=8, standardise=standardise)
    ensemble = PixelMlps(spec, 7, 3, 0, "cpu")
    list(ensemble.train(GatheredPixels(vectors), vectors[:, :3].argmax(1)))
    blocks = list(ensemble.on_image(maps, size))
    assert len(blocks) > 1
    torch.testing.assert_close(torch.cat(blocks, 1), ensemble.logits(vectors), atol=1e-4, rtol=1e-4)


def test_votes_are_the_published_ones() -> None:
    logits = randn(7, 400, 4) * 3
    chosen, disagreement, divergence = votes(logits)
    each = logits.argmax(2)
    assert torch.equal(chosen, torch.mode(each.T, 1)[0])
    torch.testing.assert_close(disagreement, (each != chosen).float().mean(0))
    mean = logits.softmax(2).mean(0)
    want = Categorical(mean).entropy() - Categorical(logits=logits).entropy().mean(0)
    torch.testing.assert_close(divergence, want, atol=1e-5, rtol=1e-4)
    same = votes(logits[:1].expand(7, -1, -1))
    assert float(same[1].max()) == 0
    assert float(same[2].max()) < 1e-5


def test_linear_cells_learn_alone_what_they_learn_together() -> None:
    x, y = randn(300, 9), randn(300, 9)[:, :4].argmax(1)
    spec = PixelLinearSpec(epochs=3, batch_size=64)
    both = PixelLinear(spec, (5, 4), 4, 0, "cpu")
    list(both.train(GatheredPixels(x), y))
    for i, part in enumerate(x.split([5, 4], 1)):
        alone = PixelLinear(spec, (part.shape[1],), 4, 0, "cpu")
        list(alone.train(GatheredPixels(part.contiguous()), y))
        torch.testing.assert_close(both.weights[i], alone.weights[0], atol=1e-6, rtol=1e-4)
    maps = [randn(5, 4, 3), randn(4, 8, 6)]
    found = list(both.classes(maps, (8, 6)))
    start = 0
    for i, one in enumerate(maps):
        up = F.interpolate(one[None], size=(8, 6), mode="bilinear")[0].flatten(1).T
        mean, scale = both.mean[start : start + len(one)], both.scale[start : start + len(one)]
        want = (((up - mean) * scale) @ both.weights[i] + both.biases[i]).argmax(1)
        assert (found[i].flatten() == want).float().mean() == 1
        start += len(one)


# --- IoU ----------------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.integers(2, 6))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_iou_is_scikit_learns(seed: int, k: int) -> None:
    generator = np.random.default_rng(seed)
    n_there = int(generator.integers(1, k + 1))  # some classes are nowhere
    true = generator.integers(0, n_there, (3, 40))
    n_said = int(generator.integers(1, k + 1))
    said = generator.integers(0, n_said, (3, 40))
    predicted = np.where(generator.random((3, 40)) < 0.6, true, said)
    counts = ClassCounts.joined(
        [ClassCounts.of(p, t, k) for p, t in zip(predicted, true, strict=True)]
    )
    there = np.union1d(true, predicted)
    want = jaccard_score(true.ravel(), predicted.ravel(), average=None, labels=there)
    found = counts.iou()
    np.testing.assert_allclose(found[there], want)
    assert np.isnan(np.delete(found, there)).all()
    assert counts.mean_iou() == pytest.approx(want.mean())
    assert counts.pixel_accuracy() == accuracy_score(true.ravel(), predicted.ravel())
    low, high = counts.interval()
    assert 0 <= low <= high <= 1


# --- the task -----------------------------------------------------------------------------------

MLP = PixelMlpSpec(members=3, epochs=6, least_epochs=2)
SPEC = SegmentSpec(mlp=MLP, linear=PixelLinearSpec(epochs=6), pixels_per_image=384,
                   class_names=("background", "0", "1", "4", "6"))  # fmt: skip
N_TRAIN, N_TEST = 32, 24


def with_spec(pipeline: Pipeline, results: Path, spec: SegmentSpec | None) -> Pipeline:
    return pipeline.model_copy(update={"results": str(results), "segment": spec})


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """Features of pictures of digits; four of the test pictures have no label map."""
    folder = tmp_path_factory.mktemp("scenes")
    tars = write_scenes(folder / "data", N_TRAIN, N_TEST, without=4)
    pipeline = scenes_pipeline(folder, tars)
    assert extract(pipeline).n_invalid == 0
    return pipeline


@pytest.fixture(scope="module")
def run(
    scenes: Pipeline, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SegmentResult, Path, Pipeline]:
    folder = tmp_path_factory.mktemp("segmented")
    spec = SPEC.model_copy(update={"predict": "test"})
    pipeline = with_spec(scenes, folder, spec)
    return run_segment(pipeline, device="cpu"), folder, pipeline


Run = tuple[SegmentResult, Path, Pipeline]


def truths(
    pipeline: Pipeline, split: str = "test", shuffled: bool = False
) -> dict[str, np.ndarray]:
    """Label maps by key, read from the tar without drl."""
    import io
    import tarfile

    found = {}
    with tarfile.open(pipeline.dataset.tars[split][0]) as tar:
        for member in tar:
            if member.name.endswith(".seg.png"):
                file = tar.extractfile(member)
                assert file is not None
                key = member.name.removesuffix(".seg.png")
                found[key] = np.asarray(Image.open(io.BytesIO(file.read())))
    return found


def test_features_find_digits_that_colours_cannot(run: Run) -> None:
    result, folder, _ = run
    assert SegmentResult.load(folder / "segment.json") == result
    features, colours = result.ensembles
    assert (features.name, colours.name) == ("features", "raw pixels")
    assert (result.n_train_images, result.n_test_images, result.n_predicted) == (32, 20, 24)
    assert result.n_unlabelled == {"train": 0, "test": 4}
    assert (result.n_classes, result.n_channels) == (5, 384)
    assert features.miou > 0.6
    assert features.miou > colours.miou + 0.25
    assert features.interval[0] < features.miou < features.interval[1]
    assert features.miou > max(features.members)  # what an ensemble is for
    assert len(result.linear) == 6
    assert result.best_linear is not None
    best = result.linear[result.best_linear]
    assert best.validation == max(cell.validation for cell in result.linear)
    assert colours.miou < best.test.miou < features.miou


def test_shuffled_label_maps_teach_nothing(run: Run, scenes: Pipeline, tmp_path: Path) -> None:
    """The same pictures, each with the label map of another."""
    tars = write_scenes(tmp_path / "data", N_TRAIN, N_TEST, shuffled=True)
    moved = scenes_pipeline(tmp_path, tars)
    extract(moved.model_copy(update={"store": moved.store}))
    spec = SPEC.model_copy(update={"linear": None, "pixels": False})
    (score,) = run_segment(with_spec(moved, tmp_path / "r", spec), device="cpu").ensembles
    assert score.miou < 0.25
    assert score.miou < run[0].ensembles[0].miou - 0.3


def test_numbers_are_those_of_the_files(run: Run) -> None:
    """Predictions on disk against label maps of the tar, by scikit-learn."""
    result, folder, pipeline = run
    table = pq.read_table(folder / result.table).to_pylist()
    assert [line["row"] for line in table] == list(range(N_TRAIN, N_TRAIN + N_TEST))
    true, predicted = [], []
    labels = truths(pipeline)
    for line in table:
        classes = np.asarray(Image.open(folder / line["prediction"]))
        assert classes.shape == (SIDE, SIDE)
        disagreement = np.asarray(
            Image.open(png_path(folder / "segment" / "disagreement", line["key"]))
        )
        assert disagreement.mean() / 255 == pytest.approx(line["disagreement"], abs=2e-3)
        assert set(np.unique(disagreement)) <= {0, 85, 170}  # of three networks
        if line["key"] not in labels:
            assert (line["pixels"], line["right"]) == (0, None)
            continue
        true.append(labels[line["key"]])
        predicted.append(classes)
        want = accuracy_score(true[-1].ravel(), classes.ravel())
        assert line["right"] == pytest.approx(want)
    score = result.ensembles[0]
    all_true, all_predicted = np.concatenate(true).ravel(), np.concatenate(predicted).ravel()
    want = jaccard_score(all_true, all_predicted, average=None)
    np.testing.assert_allclose(score.iou, want)
    assert score.miou == pytest.approx(want.mean())
    assert score.pixel_accuracy == accuracy_score(all_true, all_predicted)


def test_uncertain_images_are_the_wrong_ones(run: Run) -> None:
    lines = [line for line in pq.read_table(run[1] / run[0].table).to_pylist() if line["pixels"]]
    wrong = np.array([1 - line["right"] for line in lines])
    for name in ("disagreement", "uncertainty"):
        assert np.corrcoef(wrong, [line[name] for line in lines])[0, 1] > 0.5


def test_maps_in_memory_or_vectors_are_the_same(scenes: Pipeline, tmp_path: Path) -> None:
    """With less memory than vectors need the maps are held, and pixels gathered in each batch."""
    spec = SPEC.model_copy(update={"linear": None, "pixels": False, "pixels_per_image": None,
                                   "train_images": 6, "mlp": MLP.model_copy(
                                       update={"epochs": 1})})  # fmt: skip
    n_gathered, n_maps = 4 * 6 * SIDE**2 * 384, 6 * 2 * 2 * (72 * 256 + 48 * 1024 + 72 * 64)
    assert n_maps < n_gathered
    found = []
    for memory in (n_gathered, n_maps, n_maps - 1):
        told = spec.model_copy(update={"memory_bytes": memory})
        pipeline = with_spec(scenes, tmp_path / str(memory), told)
        if memory < n_maps:
            with pytest.raises(SpecError, match=f"take {n_gathered} bytes, the maps of 6 images "
                               f"{n_maps}; want at most memory_bytes {memory}"):  # fmt: skip
                run_segment(pipeline, device="cpu")
            continue
        found.append(run_segment(pipeline, device="cpu").ensembles[0])
    assert found[0].iou == pytest.approx(found[1].iou, abs=5e-3)


def test_again_is_the_same(scenes: Pipeline, tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"train_images": 5, "pixels": False, "pixels_per_image": 99,
                                   "mlp": MLP.model_copy(update={"epochs": 2})})  # fmt: skip
    for name in ("one", "two"):
        run_segment(with_spec(scenes, tmp_path / name, spec), device="cpu")
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.p*"))
    assert len(files) == 1 + 20 + 20 + 6
    for path in files:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()


@pytest.mark.s3
def test_on_object_storage(scenes: Pipeline, s3_url: str, tmp_path: Path) -> None:
    """Tars and store of a bucket give what those of a folder give."""
    remote = open_folder(s3_url)
    tars = {}
    for split in ("train", "test"):
        (path,) = scenes.dataset.tars[split]
        remote.put(f"{split}.tar", [memoryview(Path(path).read_bytes())])
        tars[split] = f"{s3_url}/{split}.tar"
    local = FeatureStore.open(scenes.store.url if scenes.store else "")
    for info in local.folder.list():
        if info.path != "index.parquet":
            remote.put(f"f.zarr/{info.path}", [local.folder.get(info.path)])
    from drl_data.index import build_index

    build_index(
        scenes.dataset.model_copy(update={"tars": {k: (v,) for k, v in tars.items()}})
    ).save(f"{s3_url}/f.zarr/index.parquet")
    moved = scenes.model_copy(
        update={
            "dataset": scenes.dataset.model_copy(
                update={"tars": {k: (v,) for k, v in tars.items()}}
            ),
            "store": scenes.store.model_copy(update={"url": f"{s3_url}/f.zarr"})
            if scenes.store
            else None,
        }
    )
    spec = SPEC.model_copy(update={"train_images": 5, "linear": None,
                                   "mlp": MLP.model_copy(update={"epochs": 1})})  # fmt: skip
    one = run_segment(with_spec(scenes, tmp_path / "a", spec), device="cpu")
    two = run_segment(with_spec(moved, tmp_path / "b", spec), device="cpu")
    assert one.ensembles == two.ensembles
    assert one.n_train_images == 5


def test_label_maps_in_a_folder(run: Run, scenes: Pipeline, tmp_path: Path) -> None:
    """Files named by key, .npy here, give what members of the tars give."""
    folder = tmp_path / "labels"
    for split in ("train", "test"):
        for key, labels in truths(scenes, split).items():
            path = folder / f"{key}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, labels.astype(np.int64))
    spec = SPEC.model_copy(update={"labels": "npy", "label_folder": str(folder), "pixels": False,
                                   "linear": None})  # fmt: skip
    result = run_segment(with_spec(scenes, tmp_path / "r", spec), device="cpu")
    assert result.ensembles[0] == run[0].ensembles[0]


def test_what_cannot_be_asked(scenes: Pipeline, tmp_path: Path) -> None:
    def refused(error: type[Exception], match: str, **changes: object) -> None:
        spec = SPEC.model_copy(update=changes)
        with pytest.raises(error, match=match):
            run_segment(with_spec(scenes, tmp_path, spec), device="cpu")

    refused(SpecError, "no row of 'train' has a label map KEY.mask.png in the tars",
            labels="mask.png")  # fmt: skip
    refused(
        SpecError, "no row of 'train' has a label map KEY.seg.png in /none", label_folder="/none"
    )
    refused(SpecError, "train and test are both 'train'", test="train")
    refused(SpecError, r"class 4 in the train images, but there are 3 classes", n_classes=3)
    refused(SpecError, r"of 1 classes; want two", ignore=(1, 2, 3, 4))
    refused(SpecError, "mlp and linear are both null", mlp=None, linear=None)
    refused(SpecError, "leave none for validation", train_images=1)
    with pytest.raises(SpecError, match="lacks segment"):
        run_segment(with_spec(scenes, tmp_path, None))


def test_palette_and_many_classes() -> None:
    small = label_image(np.array([[0, 3], [255, -1]]))
    assert small.mode == "P"
    assert np.asarray(small).tolist() == [[0, 3], [255, 255]]
    assert small.getpalette()[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
    assert np.asarray(label_image(np.array([[0, 300]]))).tolist() == [[0, 300]]


def test_command_and_report(run: Run, tmp_path: Path) -> None:
    _, _, pipeline = run
    spec = SPEC.model_copy(update={"train_images": 4, "mlp": MLP.model_copy(update={"epochs": 1})})
    pipeline = with_spec(pipeline, tmp_path / "results", spec)
    file = tmp_path / "p.yaml"
    file.write_text(pipeline.model_dump_json())
    done = CliRunner().invoke(app, ["segment", str(file), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "3 networks  features" in done.output
    assert "linear" in done.output
    page = write_report(pipeline).read_text()
    shown = page.split('id="segment"')[1].split("</section>")[0]
    assert shown.count("data:image/png") == 6 * 4  # image, truth, prediction, disagreement
    assert "background" in shown
