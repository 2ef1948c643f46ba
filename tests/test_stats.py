"""`drl stats` against NumPy over the whole store in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from pydantic import ValidationError
from typer.testing import CliRunner

from drl_data.cli import app
from drl_data.datasets import FeatureDataset
from drl_data.errors import SpecError, UserError
from drl_data.pipeline import Pipeline, StatsSpec
from drl_data.store import FeatureStore
from drl_data.tasks.stats import StatsResult, run_stats

from .stores import RUN, fill, invalid_row, make_array, make_store, reference, unit_features

ARRAYS = (
    make_array("map", (4, 2, 3), "float16"),
    make_array("tokens", (3, 5), "bfloat16"),
    make_array("vector", (6,), "float32"),
    make_array("mean", (6,), "float32").model_copy(update={"timesteps": "mean"}),
)
INVALID = (2, 13)
N = 23


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    store = make_store(str(tmp_path / "s"), N, 4, arrays=ARRAYS, splits={"train": 15, "test": 8})
    features = {a.name: reference(a, a.n_times(2), N) for a in ARRAYS}
    for unit in store.units:
        own = {name: x[:, unit.start : unit.stop] for name, x in features.items()}
        bad = [invalid_row(row) for row in INVALID if unit.start <= row < unit.stop]
        store.write(unit, own, bad, RUN)
    store.seal()
    return Pipeline.parse(
        {
            "name": "test",
            "dataset": {"tars": "/tars/*.tar"},
            "images": {"size": 8},
            "store": {"url": store.url},
            "results": str(tmp_path / "results"),
        }
    )


def rows_of(pipeline: Pipeline, name: str, t: int, split: str | None = None) -> np.ndarray:
    """float64 [n, *shape] of the valid rows, read by FeatureDataset."""
    dataset = FeatureDataset(FeatureStore.open(pipeline.store.url), [name], split=split)
    return dataset.read(range(len(dataset))).features[name][:, t].double().numpy()


@pytest.mark.parametrize("split", [None, "train", "test"])
def test_moments_are_numpys(pipeline: Pipeline, split: str | None) -> None:
    spec = StatsSpec(split=split, covariance=True)
    result = run_stats(pipeline.model_copy(update={"stats": spec}), device="cpu")
    folder = Path(pipeline.results)
    assert StatsResult.load(folder / "stats.json") == result
    tensors = safetensors.numpy.load_file(folder / result.tensors)
    assert result.n_samples == {None: N - 2, "train": 13, "test": 8}[split]
    assert len(result.cells) == 7
    assert [cell.timestep for cell in result.cells[-3:]] == [10, 200, None]
    for cell in result.cells:
        t = int(cell.key.rpartition(".")[2])
        x = rows_of(pipeline, cell.tap, t, split)
        if x.ndim == 4:
            x = np.moveaxis(x, 1, -1)
        x = x.reshape(-1, 4 if x.ndim == 4 else x.shape[-1])
        assert cell.count == len(x)
        np.testing.assert_allclose(tensors[f"{cell.key}.mean"], x.mean(0), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(tensors[f"{cell.key}.variance"], x.var(0, ddof=1), rtol=1e-12)
        np.testing.assert_allclose(
            tensors[f"{cell.key}.covariance"], np.cov(x.T), rtol=1e-10, atol=1e-12
        )
        square = (x**2).mean(0)
        assert cell.massive_channel == np.argmax((x.mean(0) ** 2) + x.var(0, ddof=1))
        assert cell.massive_ratio > 1
        assert cell.mean == pytest.approx(x.mean())
        assert square.max() > 0


def test_over_samples_is_per_entry(pipeline: Pipeline) -> None:
    """RAE: one mean and variance for each channel at each position."""
    spec = StatsSpec(over="samples")
    result = run_stats(pipeline.model_copy(update={"stats": spec}), device="cpu")
    tensors = safetensors.numpy.load_file(Path(pipeline.results) / result.tensors)
    x = rows_of(pipeline, "map", 1)
    assert tensors["map.1.mean"].shape == (4, 2, 3)
    np.testing.assert_allclose(tensors["map.1.mean"], x.mean(0), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(tensors["map.1.variance"], x.var(0, ddof=1), rtol=1e-12)
    assert result.cells[0].count == N - 2
    assert not any(name.endswith("covariance") for name in tensors)


def test_blocks_smaller_than_a_unit_change_nothing(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_stats(pipeline, device="cpu").cells
    monkeypatch.setattr("drl_data.tasks.stats.BLOCK_BYTES", 1)
    for a, b in zip(whole, run_stats(pipeline, device="cpu").cells, strict=True):
        assert (a.count, a.massive_channel) == (b.count, b.massive_channel)
        assert a.std == pytest.approx(b.std, rel=1e-12)


def test_the_command_prints_every_cell(pipeline: Pipeline, tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(pipeline.model_dump_json())
    done = CliRunner().invoke(app, ["stats", str(file), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.output.splitlines() if line.strip()]
    assert [line[:2] for line in lines if line[0] == "map"] == [["map", "10"], ["map", "200"]]
    assert [line[:2] for line in lines if line[0] == "mean"] == [["mean", "all"]]


def test_what_cannot_be_asked(pipeline: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="covariance is of channels"):
        StatsSpec(over="samples", covariance=True)
    other = pipeline.model_copy(update={"stats": StatsSpec(split="nowhere")})
    with pytest.raises(SpecError, match="no rows with split='nowhere'"):
        run_stats(other)
    store = make_store(str(tmp_path / "open"), 8, 4)
    store.write(store.units[0], unit_features(store, store.units[0]), [], RUN)
    unfinished = pipeline.model_copy(
        update={"store": pipeline.store.model_copy(update={"url": store.url})}
    )
    with pytest.raises(UserError, match=r"1 of 2 units of .* are not computed yet"):
        run_stats(unfinished)
    fill(store)
