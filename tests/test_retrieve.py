"""Neighbours: exact against brute force, approximate against exact, tables, queries by image."""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestNeighbors
from typer.testing import CliRunner

from drl_data import neighbours as neighbours_module
from drl_data.cli import app
from drl_data.errors import InputError, SpecError, StoreMismatchError
from drl_data.job_specs import IndexSpec, RetrieveSpec
from drl_data.neighbours import ApproximateIndex, exact_neighbours, rank
from drl_data.pipeline import Pipeline
from drl_data.recipes import find_recipe
from drl_data.report import write_report
from drl_data.runs import extract
from drl_data.shards import Array
from drl_data.spec import TapSpec
from drl_data.store import FeatureStore
from drl_data.tasks.retrieve import RetrieveResult, query, run_retrieve
from tests.task_stores import digits_index, noise, pipeline_of, store_of, toy_index

DIGITS, LABELS = load_digits(return_X_y=True)
N = 600
SPLITS = np.where(np.arange(N) % 4 == 0, "test", "train")
INVALID = (3, 500)


pytestmark = pytest.mark.usefixtures("module_on_one_thread")


def brute_force(queries: Array, base: Array, k: int, own: Array | None = None) -> Array:
    """In float64, ties by position."""
    d = np.linalg.norm(base[None].astype(np.float64) - queries[:, None].astype(np.float64), axis=2)
    if own is not None:
        inside = own >= 0
        d[np.flatnonzero(inside), own[inside]] = np.inf
    return np.argsort(d, axis=1, kind="stable")[:, :k]


# --- exact --------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_exact_is_brute_force(data: st.DataObject) -> None:
    """Rows of few values, so that many are equal and many distances tie, far from the origin too;
    with and without the queries themselves in the base."""
    n, m, c = (data.draw(st.integers(low, high)) for low, high in ((2, 60), (1, 8), (1, 3)))
    far = data.draw(st.sampled_from([0.0, 1000.0]))
    values = data.draw(st.lists(st.integers(-2, 2), min_size=(n + m) * c, max_size=(n + m) * c))
    x = (np.array(values, np.float32) + far).reshape(n + m, c)
    base, queries, own = x[:n], x[n:], None
    if data.draw(st.booleans()):
        own = np.array(data.draw(st.lists(st.integers(-1, n - 1), min_size=m, max_size=m)))
        queries = np.where((own >= 0)[:, None], base[own], queries)
    k = data.draw(st.integers(1, n - int(own is not None and bool((own >= 0).any()))))
    found = exact_neighbours(
        torch.from_numpy(queries),
        torch.from_numpy(base),
        k,
        own=None if own is None else torch.from_numpy(own),
        block=data.draw(st.integers(1, 9)),
    )
    want = brute_force(queries, base, k, own)
    assert found.positions.tolist() == want.tolist()
    np.testing.assert_allclose(
        found.distances, np.linalg.norm(base[want] - queries[:, None], axis=2), atol=1e-6
    )


@pytest.mark.parametrize("base_block", [37, 1 << 15])
def test_exact_is_brute_force_on_vectors(base_block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real vectors of unit length, doubled so that each has a twin: more ties than slack."""
    monkeypatch.setattr(neighbours_module, "BASE_BLOCK", base_block)
    x = DIGITS[:150] / np.linalg.norm(DIGITS[:150], axis=1, keepdims=True)
    x = np.concatenate([x, x, np.repeat(x[:1], 40, 0)]).astype(np.float32)
    own = np.arange(len(x))
    t = torch.from_numpy(x)
    found = exact_neighbours(t, t, 20, own=torch.from_numpy(own))
    assert (found.positions.numpy() == brute_force(x, x, 20, own)).all()
    assert found.positions[0].tolist() == [150, *range(300, 319)]


def test_agrees_with_scikit_learn() -> None:
    x = noise(400, 16)
    want, places = NearestNeighbors(n_neighbors=5, algorithm="brute").fit(x).kneighbors(x[:50])
    found = exact_neighbours(torch.from_numpy(x[:50]), torch.from_numpy(x), 5)
    assert (found.positions.numpy() == places).all()
    np.testing.assert_allclose(found.distances, want, atol=1e-4)


def test_more_neighbours_than_there_are() -> None:
    x = torch.from_numpy(noise(5, 2))
    with pytest.raises(SpecError, match="5 neighbours of 4"):
        exact_neighbours(x, x, 5, own=torch.arange(5))
    assert exact_neighbours(x, x, 5).positions.shape == (5, 5)


# --- approximate --------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [IndexSpec(kind="ivf", probes=8), IndexSpec(kind="hnsw")])
def test_approximate_finds_most_and_survives_a_file(spec: IndexSpec, tmp_path: Path) -> None:
    x = torch.from_numpy(DIGITS[:N].astype(np.float32))
    own = torch.arange(N)
    index = ApproximateIndex.build(x, spec, seed=0)
    found = index.candidates(x, 10, own)
    exact = exact_neighbours(x, x, 10, own=own).positions
    assert not (found == own[:, None]).any()
    recall = float((exact[:, :, None] == found[:, None]).any(2).double().mean())
    assert recall > 0.9
    index.save(tmp_path / "index.faiss")
    again = ApproximateIndex.load(tmp_path / "index.faiss")
    assert (len(again), again.n_channels) == (N, 64)
    assert torch.equal(again.candidates(x, 10, own), found)
    assert [p.name for p in tmp_path.iterdir()] == ["index.faiss"]


def test_all_cells_are_exact_and_few_say_what_is_missing() -> None:
    x = torch.from_numpy(noise(300, 4))
    own = torch.arange(300)
    exact = exact_neighbours(x, x, 10, own=own)
    every = ApproximateIndex.build(x, IndexSpec(kind="ivf", lists=60, probes=60), 0)
    assert torch.equal(rank(x, x, every.candidates(x, 10, own)).positions, exact.positions)
    few = ApproximateIndex.build(x, IndexSpec(kind="ivf", lists=60, probes=1), 0)
    found = rank(x, x, few.candidates(x, 10, own))
    missing = found.positions < 0
    assert missing.any()
    assert torch.equal(missing, found.distances.isnan())
    assert (missing.int().diff(dim=1) >= 0).all()  # they come last


def test_what_is_no_index(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no index \("):
        ApproximateIndex.load(tmp_path / "none.faiss")
    (tmp_path / "bad.faiss").write_bytes(b"not an index at all")
    with pytest.raises(InputError, match=r"no index \("):
        ApproximateIndex.load(tmp_path / "bad.faiss")
    with pytest.raises(SpecError, match="9 lists of 5 vectors"):
        ApproximateIndex.build(torch.from_numpy(noise(5, 2)), IndexSpec(kind="ivf", lists=9), 0)


def test_without_faiss_there_is_exact_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)  # as if it were not installed
    x = torch.from_numpy(noise(9, 2))
    assert exact_neighbours(x, x, 3).positions.shape == (9, 3)
    with pytest.raises(SpecError, match=r"needs faiss: pip install 'drl-data\[retrieve\]'"):
        ApproximateIndex.build(x, IndexSpec(kind="hnsw"), 0)


# --- the task -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    folder = tmp_path_factory.mktemp("retrieve")
    index = toy_index(LABELS[:N].tolist(), SPLITS.tolist())
    pixels = DIGITS[None, :N].astype(np.float32)
    return store_of(folder / "store", {"pixels": pixels}, index, invalid=INVALID)


SPEC = RetrieveSpec(tap="pixels", k=5)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("splits", [(None, None), ("train", None), ("train", "test")])
def test_table_is_brute_force_over_rows(
    digits: FeatureStore, tmp_path: Path, metric: str, splits: tuple[str | None, str | None]
) -> None:
    spec = RetrieveSpec(tap="pixels", k=5, metric=metric, split=splits[0], queries=splits[1])
    result = run_retrieve(pipeline_of(digits, tmp_path, retrieve=spec), device="cpu")
    assert RetrieveResult.load(tmp_path / "retrieve.json") == result
    table = pq.read_table(tmp_path / result.table)

    def rows_of(split: str | None) -> Array:
        return np.array(
            [r for r in range(N) if r not in INVALID and split in (None, SPLITS[r])], np.int64
        )

    base, queries = rows_of(splits[0]), rows_of(splits[1] or splits[0])
    assert table["row"].to_pylist() == queries.tolist()
    assert table["key"].to_pylist() == [f"key-{row:05d}" for row in queries]
    found = np.array(table["neighbours"].to_pylist())
    x = DIGITS[:N].astype(np.float32)
    if metric == "cosine":
        x = torch.nn.functional.normalize(torch.from_numpy(x), dim=1).numpy()
    own = None if splits[1] else np.arange(len(base))
    want = brute_force(x[queries], x[base], 5, own)
    assert (found == base[want]).all()
    assert not (found == queries[:, None]).any()
    d = np.linalg.norm(x[base[want]] - x[queries][:, None], axis=2)
    distances = np.array(table["distances"].to_pylist())
    np.testing.assert_allclose(distances, d**2 / 2 if metric == "cosine" else d, rtol=1e-4)
    assert result.same_label == pytest.approx((LABELS[found] == LABELS[queries][:, None]).mean())
    assert result.same_label > 0.9
    assert result.same_label_chance == pytest.approx(0.1, abs=0.01)
    assert (result.recall, result.index, result.n_missing) == (None, None, 0)


def test_index_and_queries_by_row(digits: FeatureStore, tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"index": IndexSpec(kind="ivf", probes=4), "recall_queries": 99})
    pipeline = pipeline_of(digits, tmp_path, retrieve=spec)
    with pytest.raises(InputError, match="not a result of `drl retrieve`"):
        query(pipeline, rows=[1])
    result = run_retrieve(pipeline, device="cpu")
    assert result.n_recall_queries == 99
    assert result.recall is not None
    assert 0.7 < result.recall < 1
    table = pq.read_table(tmp_path / result.table)
    one, two = query(pipeline, rows=[41, 7], k=5)
    for row, answer in ((41, one), (7, two)):
        (place,) = np.flatnonzero(table["row"].to_numpy() == row)
        assert answer.query == f"row {row}"
        assert answer.rows == table["neighbours"][place].as_py()
        assert answer.keys == [f"key-{r:05d}" for r in answer.rows]
        assert answer.labels == LABELS[answer.rows].tolist()
    changed = spec.model_copy(update={"metric": "l2"})
    with pytest.raises(InputError, match="another store or other settings"):
        query(pipeline_of(digits, tmp_path, retrieve=changed), rows=[1])


def test_what_cannot_be_asked(digits: FeatureStore, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="lacks retrieve"):
        run_retrieve(pipeline_of(digits, tmp_path))
    huge = pipeline_of(digits, tmp_path, retrieve=SPEC.model_copy(update={"k": 598}))
    with pytest.raises(SpecError, match=r"retrieve.k: 598 neighbours of 597"):
        run_retrieve(huge)
    pipeline = pipeline_of(digits, tmp_path, retrieve=SPEC)
    with pytest.raises(SpecError, match="row 3 has no features"):
        query(pipeline, rows=[3])
    with pytest.raises(SpecError, match="nothing is asked"):
        query(pipeline)


# --- by image -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pipeline, Path]:
    """Real digits through the bundled backbone, with a fitted reduction; and the tars."""
    folder = tmp_path_factory.mktemp("real")
    digits_index(folder / "tars")
    recipe = Pipeline.load(find_recipe("digits"))
    tap = TapSpec(path="mid_block", reduce=("mean", "pca(16)"))
    pipeline = Pipeline.parse(
        {
            **recipe.model_dump(exclude_unset=True, exclude={"probe", "distill"}),
            "dataset": {
                "tars": {s: str(folder / "tars" / f"{s}.tar") for s in ("train", "test")},
            },
            "schedule": {"convention": "ddpm_index", "timesteps": [50]},
            "taps": [tap.model_dump()],
            "store": {"url": str(folder / "store")},
            "results": str(folder / "results"),
            "retrieve": {"tap": "mid_block", "k": 8},
        }
    )
    assert not extract(pipeline).failed
    return pipeline, folder


def images_of(folder: Path) -> dict[str, bytes]:
    with tarfile.open(folder / "tars" / "test.tar") as tar:
        members = [m for m in tar.getmembers() if m.name.endswith(".png")]
        return {Path(m.name).stem: tar.extractfile(m).read() for m in members}


def test_an_image_of_the_store_finds_itself(real: tuple[Pipeline, Path], tmp_path: Path) -> None:
    """The same key has the same noise, and the reduction is the store's: the same features."""
    pipeline, folder = real
    images = images_of(folder)
    paths = []
    for key in sorted(images)[:3]:
        paths.append(tmp_path / f"{key}.png")
        paths[-1].write_bytes(images[key])
    for path, answer in zip(paths, query(pipeline, images=paths, k=4), strict=True):
        assert answer.query == str(path)
        assert answer.keys[0] == path.stem
        assert answer.distances[0] < 1e-4
        assert answer.distances[1] > 10 * answer.distances[0]


def test_other_names_find_their_digit(real: tuple[Pipeline, Path], tmp_path: Path) -> None:
    """Of another name and in another format the noise differs; the digit stays."""
    pipeline, folder = real
    store = FeatureStore.open(pipeline.store.url)
    samples = store.samples()
    label_of = dict(zip(samples["key"].to_pylist(), samples["label"].to_pylist(), strict=True))
    chosen = sorted(images_of(folder).items())[10:22]
    paths = [tmp_path / f"query{i}.more.bmp" for i in range(len(chosen))]
    for path, (_, data) in zip(paths, chosen, strict=True):
        Image.open(io.BytesIO(data)).save(path)
    same = [
        label == label_of[key]
        for (key, _), answer in zip(chosen, query(pipeline, images=paths), strict=True)
        for label in answer.labels
    ]
    assert np.mean(same) > 0.8


def test_images_that_are_none(real: tuple[Pipeline, Path], tmp_path: Path) -> None:
    pipeline, _ = real
    with pytest.raises(InputError, match=r"none\.png: No such file"):
        query(pipeline, images=[tmp_path / "none.png"])
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"bad\.png: decode"):
        query(pipeline, images=[tmp_path / "bad.png"])
    with pytest.raises(SpecError, match="two query images are called 'bad'"):
        query(pipeline, images=[tmp_path / "bad.png", tmp_path / "x" / "bad.jpg"])
    other = pipeline.model_copy(
        update={"images": pipeline.images.model_copy(update={"filter": "bilinear"})}
    )
    with pytest.raises(StoreMismatchError, match=r"made with other settings .*\(images\)"):
        query(other, images=[tmp_path / "bad.png"])


def test_command_and_report(real: tuple[Pipeline, Path], tmp_path: Path) -> None:
    pipeline, folder = real
    pipeline = pipeline.model_copy(update={"results": str(tmp_path / "results")})
    file = tmp_path / "p.yaml"
    file.write_text(pipeline.model_dump_json())

    def drl(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["retrieve", str(file), "--device", "cpu", *arguments])
        assert done.exit_code == 0, done.output
        return done.output

    assert "retrieve.parquet" in drl()
    key, data = min(images_of(folder).items())
    (tmp_path / f"{key}.png").write_bytes(data)
    lines = drl("--image", str(tmp_path / f"{key}.png"), "--row", "9", "-k", "3").splitlines()
    assert sum(line.strip().startswith("row 9") for line in lines) == 1
    assert any(key in line and "0.0000" in line for line in lines)
    page = write_report(pipeline).read_text()
    shown = page.split('id="neighbours"')[1].split("</section>")[0]
    assert "The search is exact." in shown
    assert shown.count("data:image/png") == 10 * 9  # 8 neighbours and the query
