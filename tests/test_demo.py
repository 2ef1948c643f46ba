"""`drl demo`, whole: digits, the bundled backbone, stores, probe, student, report; and README."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from drl_data.demo import run_demo
from drl_data.pipeline import Pipeline
from drl_data.progress import SILENT
from drl_data.runs import extract
from drl_data.store import FeatureStore
from drl_data.tasks.cluster import ClusterResult, run_cluster
from drl_data.tasks.distill import DistillResult
from drl_data.tasks.probe import ProbeResult
from drl_data.tasks.retrieve import RetrieveResult

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a whole run of the demo leaves, called demo-out."""
    folder = tmp_path_factory.mktemp("demo") / "demo-out"
    said: list[object] = []
    report = run_demo(folder, SILENT, said.append)
    assert report == folder / "results" / "report.html"
    assert len(said) == 6
    return folder


def test_learnt_features_beat_random_ones_and_pixels(demo: Path) -> None:
    result = ProbeResult.load(demo / "results" / "probe.json")
    trained, random, pixels = result.sources
    assert (trained.label, random.label, pixels.label) == ("digits", "random weights", "pixels")
    assert (trained.n_train + trained.n_validation, trained.n_test) == (1437, 360)
    assert len(trained.cells) == len(random.cells) == 25
    assert all(len(cell.test) == 3 for source in result.sources for cell in source.cells)
    assert trained.best.mean_test > 0.98
    assert trained.best.mean_test > random.best.mean_test + 0.005
    assert trained.best.mean_test > pixels.best.mean_test + 0.005
    assert min(random.best.mean_test, pixels.best.mean_test) > 0.9


def test_clusters_and_neighbours_are_digits(demo: Path) -> None:
    ten, hundred = ClusterResult.load(demo / "results" / "cluster.json").found
    assert (ten.k, hundred.k) == (10, 100)
    assert {a.split: a.nmi for a in ten.agreement}["test"] > 0.8
    assert min(a.purity for a in hundred.agreement) > 0.9
    found = RetrieveResult.load(demo / "results" / "retrieve.json")
    assert (found.n_base, found.n_queries, found.recall) == (1797, 1797, None)
    assert found.same_label > 0.9


def test_the_pool_of_the_clusters_was_chosen_on_the_train_split(demo: Path, tmp_path: Path) -> None:
    """The comment in the recipe says so."""
    pipeline = Pipeline.load(demo / "digits.yaml")
    assert pipeline.cluster is not None
    found = {}
    for pool in (1, 2, 4, 8):
        spec = pipeline.cluster.model_copy(update={"pool": pool, "k": (10,)})
        changed = pipeline.model_copy(update={"cluster": spec, "results": str(tmp_path)})
        (one,) = run_cluster(changed, device="cpu").found
        found[pool] = {a.split: a.nmi for a in one.agreement}["train"]
    assert max(found, key=lambda pool: found[pool]) == pipeline.cluster.pool


def test_the_student_says_whether_it_beats_scratch(demo: Path) -> None:
    result = DistillResult.load(demo / "results" / "distill.json")
    assert [few.fraction for few in result.few] == [0.01, 0.05, 0.2]
    assert [few.n_labels for few in result.few] == [14, 72, 287]
    assert result.loss[-1] < 0.7 * result.loss[0]
    for few in result.few:
        assert few.verdict() in result.verdict
        assert min(few.distilled_train + few.scratch_train) > 0.9  # both had steps enough to learn
    assert (Path(result.student) / "model.safetensors").is_file()


def test_stores_are_sealed_whole_and_not_computed_again(demo: Path) -> None:
    for name in ("digits", "digits_random"):
        pipeline = Pipeline.load(demo / f"{name}.yaml")
        summary = extract(pipeline)
        assert summary.n_pending == 0
        assert summary.store.sealed
        assert summary.store.verify(deep=True) == []


def test_the_report_stands_alone(demo: Path) -> None:
    page = (demo / "results" / "report.html").read_text(encoding="utf-8")
    assert len(page) < 3_000_000
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)[^\"]*", page)
    for text in (
        "The backbone",
        "Features as colours",
        "Linear probes",
        "The student",
        "Clusters",
        "Neighbours",
        "99.",
    ):
        assert text in page


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_readme_python_runs(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo.parent)
    found = blocks("python")
    assert len(found) == 4
    namespace: dict[str, object] = {}
    exec(compile(found[0], "README.md", "exec"), namespace)
    assert tuple(namespace["x"].shape[1:]) == (2, 72, 4, 4)
    assert namespace["loss"].item() < 1.0  # of ten classes: 2.3 when nothing was learnt
    exec(compile(found[1], "README.md", "exec"), namespace)
    batch = namespace["batch"]
    assert tuple(batch.pixels.shape[1:]) == (1, *namespace["store"].spec.images.size)
    assert batch.features.keys() == {"trained/mid_block", "random/mid_block"}
    assert batch.label.max() < 5
    assert namespace["both"].by_digest("random")
    assert namespace["ready"].row.tolist() != sorted(namespace["ready"].row.tolist())
    for code in found[2:]:
        exec(compile(code, "README.md", "exec"), namespace)
    assert len(namespace["y"]) == len(namespace["batch"].row)


def test_readme_pipelines_are_valid() -> None:
    """Whole files by themselves, sections in the place of those of the first file."""
    first, *others = (yaml.safe_load(text) for text in blocks("yaml"))
    assert Pipeline.parse(first).run.executor == "ray"
    assert len(others) >= 3
    for other in others:
        Pipeline.parse(other if "name" in other else {**first, **other})


def test_readme_names_files_that_exist() -> None:
    named = re.findall(r"\b([a-z_]+\.py|tasks/|backbones/|STORE\.md)", README)
    assert len(named) > 20
    for name in named:
        place = name if name in ("tasks/", "backbones/") else name.split("/")[-1]
        here = [ROOT / "drl_data" / place, ROOT / "drl_data" / "backbones" / place]
        assert any(path.exists() for path in here), name


def test_readme_figures_are_the_demos(demo: Path) -> None:
    """The accuracies that README states are those of this run, to a point."""
    result = ProbeResult.load(demo / "results" / "probe.json")
    stated = [float(x) for x in re.findall(r"(\d\d\.\d) %", README.split("## Where things are")[0])]
    for source, want in zip(result.sources, stated, strict=False):
        assert source.best.mean_test * 100 == pytest.approx(want, abs=1.0), source.label
    assert len(stated) >= 3


def test_store_opens_as_the_demo_left_it(demo: Path) -> None:
    store = FeatureStore.open(str(demo / "features.zarr"))
    assert [a.name for a in store.arrays][:2] == ["down_blocks.1", "down_blocks.2"]
    assert [t.requested for t in store.times] == [10, 50, 100, 200, 400]
