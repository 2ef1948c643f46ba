"""k-means: against scikit-learn, against the labels of real digits, on awkward rows, as a task."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.metrics import normalized_mutual_info_score
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from drl_data import kmeans as kmeans_module
from drl_data.cli import app
from drl_data.datasets import FeatureStream
from drl_data.errors import InputError, SpecError, TapError
from drl_data.job_specs import ClusterSpec
from drl_data.kmeans import assign, kmeans
from drl_data.report import write_report
from drl_data.shards import Array
from drl_data.store import FeatureStore
from drl_data.tasks.cluster import ClusterResult, pseudo_labels, run_cluster
from tests.task_stores import digits_index, noise, pipeline_of, store_of, toy_index

DIGITS, LABELS = load_digits(return_X_y=True)
N = len(DIGITS)
SPLITS = np.where(np.arange(N) % 5 == 0, "test", "train")
INVALID = (3, 500)


pytestmark = pytest.mark.usefixtures("module_on_one_thread")


def unit_length(x: Array) -> Array:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# --- the algorithm ------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "n_seeds"), [(10, 4), (100, 6)])
def test_inertia_is_scikit_learns(k: int, n_seeds: int) -> None:
    """Same data, same beginnings and iterations: the mean over seeds within 1 %."""
    x = unit_length(DIGITS).astype(np.float32)
    want = [
        KMeans(k, n_init=1, max_iter=30, random_state=s).fit(x).inertia_ for s in range(n_seeds)
    ]
    found = [kmeans(torch.from_numpy(x), k, seed=s, iterations=30) for s in range(n_seeds)]
    assert np.mean([one.inertia for one in found]) == pytest.approx(np.mean(want), rel=0.01)
    for one in found:
        assert int(one.sizes.sum()) == N
        assert int(one.sizes.min()) > 0
    best = kmeans(torch.from_numpy(x), k, n_init=n_seeds, iterations=30)
    assert best.inertia <= found[0].inertia
    assert (best.inertia < found[0].inertia) == (k == 100)  # ten have one good answer


def test_plus_plus_begins_better_than_at_random() -> None:
    """Twenty far-away pairs of blobs: random beginnings miss some, k-means++ none."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((40, 6)) * 100
    x = torch.from_numpy(np.repeat(centres, 25, 0) + rng.standard_normal((1000, 6)))
    best = float(x.reshape(40, 25, 6).var(1, unbiased=False).sum() * 25)
    found = kmeans(x.float(), 40)
    assert found.inertia == pytest.approx(best, rel=0.01)
    assert found.converged
    assert kmeans(x.float(), 40, init="random").inertia > 2 * best


def test_is_a_function_of_the_seed() -> None:
    x = torch.from_numpy(noise(600, 8))
    one, same = (kmeans(x, 12, seed=4, n_init=2) for _ in range(2))
    assert torch.equal(one.centroids, same.centroids)
    assert torch.equal(one.assignment, same.assignment)
    assert not torch.equal(one.assignment, kmeans(x, 12, seed=5).assignment)


def test_threads_change_nothing() -> None:
    x = torch.from_numpy(noise(3000, 32))
    one = kmeans(x, 50, iterations=5)
    torch.set_num_threads(2)
    two = kmeans(x, 50, iterations=5)
    torch.set_num_threads(1)
    assert torch.equal(one.centroids, two.centroids)


def test_far_from_the_origin_loses_nothing() -> None:
    x = unit_length(DIGITS).astype(np.float32)
    near = kmeans(torch.from_numpy(x), 10, n_init=3)
    far = kmeans(torch.from_numpy(x + 100), 10, n_init=3)
    assert far.inertia == pytest.approx(near.inertia, rel=0.01)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_every_row_has_its_nearest_centroid(data: st.DataObject) -> None:
    """Whatever the rows, duplicates among them, fewer distinct ones than clusters too."""
    n, c = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 4))
    k = data.draw(st.integers(1, n))
    values = data.draw(st.lists(st.integers(-3, 3), min_size=n * c, max_size=n * c))
    x = torch.tensor(values, dtype=torch.float32).reshape(n, c)
    init = data.draw(st.sampled_from(["k-means++", "random"]))
    found = kmeans(x, k, init=init, iterations=50, tolerance=0)
    distances = torch.cdist(x.double(), found.centroids.double())
    own = distances.gather(1, found.assignment[:, None])[:, 0]
    assert torch.allclose(own, distances.min(1).values, atol=1e-4)
    assert torch.allclose(own.float(), found.distance, atol=1e-4)
    assert found.inertia == pytest.approx(float(own.square().sum()), abs=1e-3)
    n_distinct = len(x.unique(dim=0))
    if found.converged and k <= n_distinct:
        assert int(found.sizes.min()) > 0
    if k == n_distinct and init == "k-means++":
        assert found.inertia == pytest.approx(0, abs=1e-3)


def test_a_cluster_that_loses_its_rows_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    x = torch.from_numpy(np.repeat(rng.standard_normal((3, 2)) * 50, 30, 0)).float()
    x += torch.from_numpy(noise(90, 2))
    far = torch.tensor([[0.0, 0.0], [1e4, 1e4], [-1e4, 1e4]])
    monkeypatch.setattr(kmeans_module, "_beginning", lambda *_: far)
    found = kmeans(x, 3)
    assert found.n_relocated >= 2
    assert int(found.sizes.min()) > 0


def test_a_row_alone_is_not_taken_from_its_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The farthest row of all is the only one of its cluster; another one begins the empty one."""
    x = torch.tensor([[0.0], [1.0], [2.5], [100.0]])
    start = torch.tensor([[1.0], [50.0], [1e6]]) - x.mean()
    monkeypatch.setattr(kmeans_module, "_beginning", lambda *_: start)
    found = kmeans(x, 3, iterations=1)
    assert found.n_relocated == 1
    assert sorted(found.sizes.tolist()) == [1, 1, 2]


def test_equal_rows_begin_no_second_cluster() -> None:
    found = kmeans(torch.ones(5, 2), 3)
    assert (found.n_relocated, found.inertia) == (0, 0)
    assert sorted(found.sizes.tolist()) == [0, 0, 5]


def test_small_blocks_change_little(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.from_numpy(unit_length(DIGITS).astype(np.float32))
    whole = kmeans(x, 10)
    monkeypatch.setattr(kmeans_module, "MAX_BLOCK", 256)
    cut = kmeans(x, 10)
    assert cut.inertia == pytest.approx(whole.inertia, rel=1e-3)
    assert torch.equal(assign(x, whole.centroids)[0], whole.assignment)


def test_what_cannot_be_clustered() -> None:
    x = torch.from_numpy(noise(5, 2))
    with pytest.raises(SpecError, match="k = 6 clusters of 5 rows"):
        kmeans(x, 6)
    x[2, 1] = float("nan")
    with pytest.raises(SpecError, match="not finite"):
        kmeans(x, 2)


# --- the task -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Pixels of real digits as a map at timestep 10; at 11 the same, shuffled among the images."""
    folder = tmp_path_factory.mktemp("cluster")
    pixels = DIGITS.astype(np.float32)
    shuffled = np.random.default_rng(0).permutation(pixels)
    both = np.stack([pixels, shuffled]).reshape(2, N, 1, 8, 8)
    index = toy_index(LABELS.tolist(), SPLITS.tolist())
    return store_of(folder / "store", {"map": both}, index, invalid=INVALID)


SPEC = ClusterSpec(tap="map", timestep=10, pool=8, k=(10, 40), n_init=3, split="train", seed=1)


@pytest.fixture(scope="module")
def run(
    digits: FeatureStore, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ClusterResult, Path]:
    folder = tmp_path_factory.mktemp("clustered")
    return run_cluster(pipeline_of(digits, folder, cluster=SPEC), device="cpu"), folder


def test_finds_the_digits(run: tuple[ClusterResult, Path]) -> None:
    result, folder = run
    assert ClusterResult.load(folder / "cluster.json") == result
    ten = result.found[0]
    assert [a.split for a in ten.agreement] == ["test", "train"]
    assert ten.agreement[0].n + ten.agreement[1].n == N - len(INVALID)
    for agreement in ten.agreement:
        assert agreement.nmi > 0.65
        assert agreement.purity > 0.65
        assert agreement.ari > 0.5
    table = pq.read_table(folder / result.assignments)
    test = table.filter(np.asarray(table["split"]) == "test")
    assert ten.agreement[0].nmi == normalized_mutual_info_score(test["label"], test["cluster_10"])


def test_shuffled_features_find_nothing(digits: FeatureStore, tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"timestep": 11, "k": (10,)})
    (found,) = run_cluster(pipeline_of(digits, tmp_path, cluster=spec), device="cpu").found
    for agreement in found.agreement:
        assert agreement.nmi < 0.1
        assert abs(agreement.ari) < 0.02


def test_files_say_the_same_as_the_store(
    digits: FeatureStore, run: tuple[ClusterResult, Path]
) -> None:
    """Every valid row has a line, and its cluster is that of the nearest centroid."""
    result, folder = run
    table = pq.read_table(folder / result.assignments)
    rows = table["row"].to_numpy()
    assert rows.tolist() == [row for row in range(N) if row not in INVALID]
    assert table["key"].to_pylist() == [f"key-{row:05d}" for row in rows]
    x = unit_length(DIGITS[rows])
    tensors = safetensors.torch.load_file(folder / result.centroids)
    for found in result.found:
        centroids = tensors[f"centroids.{found.k}"].numpy()
        assert centroids.shape == (found.k, 64)
        distances = np.linalg.norm(x[:, None] - centroids[None], axis=2)
        own = distances[np.arange(len(x)), table[f"cluster_{found.k}"].to_numpy()]
        np.testing.assert_allclose(own, distances.min(1), atol=1e-5)
        np.testing.assert_allclose(own, table[f"distance_{found.k}"].to_numpy(), atol=1e-5)
        train = np.asarray(table["split"]) == "train"
        assert result.n_fitted == train.sum()
        assert found.inertia == pytest.approx((own[train] ** 2).sum(), rel=1e-4)
        assert sum(found.sizes) == result.n_assigned == len(rows)


def test_again_is_the_same(
    digits: FeatureStore, run: tuple[ClusterResult, Path], tmp_path: Path
) -> None:
    result, folder = run
    run_cluster(pipeline_of(digits, tmp_path, cluster=SPEC), device="cpu")
    for name in (result.assignments, result.centroids):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_clusters_are_labels_of_batches(
    digits: FeatureStore, run: tuple[ClusterResult, Path]
) -> None:
    result, folder = run
    labels = torch.from_numpy(pseudo_labels(folder / result.assignments, 40, N))
    assert labels[list(INVALID)].tolist() == [-1, -1]
    table = pq.read_table(folder / result.assignments)
    want = dict(zip(table["key"].to_pylist(), table["cluster_40"].to_pylist(), strict=True))
    stream = FeatureStream(digits, ["map"], batch_size=100, shuffle=True)
    seen = 0
    for batch in DataLoader(stream, batch_size=None):
        assert labels[batch.row].tolist() == [want[key] for key in batch.key]
        seen += len(batch.key)
    assert seen == len(want)
    with pytest.raises(InputError, match="no clusters with k = 7; it has 10, 40"):
        pseudo_labels(folder / result.assignments, 7, N)
    with pytest.raises(InputError, match="of another store"):
        pseudo_labels(folder / result.assignments, 10, 100)
    with pytest.raises(InputError, match="no assignments of `drl cluster`"):
        pseudo_labels(folder / "none.parquet", 10, N)


def test_what_cannot_be_asked(digits: FeatureStore, tmp_path: Path) -> None:
    def refused(error: type[Exception], match: str, **changes: object) -> None:
        spec = SPEC.model_copy(update=changes)
        with pytest.raises(error, match=match):
            run_cluster(pipeline_of(digits, tmp_path, cluster=spec))

    refused(
        SpecError, r"min_points 200 needs 8000 rows, there are \d+; want k <= 7", min_points=200
    )
    refused(SpecError, "no valid rows in 'nowhere'", split="nowhere")
    refused(TapError, "no array 'other'; it has map", tap="other")
    refused(TapError, "no timestep 12", timestep=12)
    refused(SpecError, "cluster.timestep: missing; 'map' has 10, 11", timestep=None)
    with pytest.raises(SpecError, match="lacks cluster"):
        run_cluster(pipeline_of(digits, tmp_path))
    with pytest.raises(ValueError, match="want each number once"):
        ClusterSpec(tap="map", k=(3, 3))


def test_command_and_report(tmp_path: Path) -> None:
    index = digits_index(tmp_path / "tars")
    store = store_of(tmp_path / "store", {"vector": noise(1, index.n_samples, 6)}, index)
    pipeline = pipeline_of(store, tmp_path / "results", cluster=ClusterSpec(tap="vector", k=(4, 9)))
    file = tmp_path / "p.yaml"
    file.write_text(pipeline.model_dump_json())
    done = CliRunner().invoke(app, ["cluster", str(file), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert [line.split()[0] for line in done.output.splitlines()[-2:]] == ["4", "9"]
    page = write_report(pipeline).read_text()
    assert 'id="clusters"' in page
    assert "k-means on <code>vector</code>" in page
    shown = page.split('id="clusters"')[1].split("</section>")[0]
    assert shown.count("data:image/png") == 4 * 10
