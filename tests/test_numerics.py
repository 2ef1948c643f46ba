"""NaN, infinite and too large features: counted, and an error, invalid rows or replaced."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from torch import Tensor, nn

from drl_data.backbones import Backbone, Model, load_backbone
from drl_data.errors import FeatureError
from drl_data.pipeline import Pipeline
from drl_data.plan import InvalidRow
from drl_data.quantise import from_storage
from drl_data.receipts import NonFinite, UnitCounts
from drl_data.runs import RunSummary, extract
from drl_data.store import FeatureStore
from drl_data.tiny_models import save_tiny_ddpm, save_tiny_stable_diffusion

DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "uint8")
WHITE = (2, 3, 9)
"""Rows of white images, whose features the tests spoil."""
BROKEN = 5
"""A row that does not decode. It is black in its batch, as padding is, and spoilt as well."""
N = 14
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("white")
    generator = np.random.default_rng(0)
    with webdataset.TarWriter(str(folder / "a.tar"), mtime=0) as writer:
        for i in range(N):
            pixels = generator.integers(20, 200, (16, 16, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(np.full_like(pixels, 255) if i in WHITE else pixels).save(buffer, "PNG")
            data = b"no image" if i == BROKEN else buffer.getvalue()
            writer.write({"__key__": f"k{i:02d}", "png": data, "cls": str(i % 2).encode()})
    return folder


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_ddpm(tmp_path_factory.mktemp("ddpm"))


def pipeline(tars: Path, model: Path, store: Path, **changes: object) -> Pipeline:
    base = {"dtype": "float32", "batch_size": 4, "rows_per_unit": 8}
    data: dict[str, object] = {
        "name": "numerics",
        "dataset": {"tars": str(tars / "*.tar")},
        "images": {"size": 16, "resize": "none"},
        "backbone": {"model": str(model)},
        "schedule": {"timesteps": [0, 50]},
        "noise": {"kind": "none"},
        "taps": ["mid_block", {"path": "down_blocks.0", "reduce": "mean"}],
        "store": {"url": str(store)},
    }
    features = changes.pop("features", {})
    assert isinstance(features, dict)
    return Pipeline.parse({**data, **changes, "features": {**base, **features}})


def spoil(
    monkeypatch: pytest.MonkeyPatch, values: Mapping[int, list[float]], module: str = "mid_block"
) -> None:
    """Let a module of every model put out `values` {timestep: first values of a row} where the
    image is white or black."""

    def loaded(model: Model, device: str) -> Backbone:
        backbone = load_backbone(model, device)
        # State is on the module itself, of which every replica has its own.
        backbone.network.register_forward_pre_hook(mark, with_kwargs=True)
        backbone.network.get_submodule(module).register_forward_hook(put)
        return backbone

    def mark(network: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        x, time = args[0], args[1] if len(args) > 1 else kwargs["timestep"]
        rows = (x.flatten(1).mean(1).abs() > 0.98).nonzero().flatten()
        network.get_submodule(module).spoilt = (rows, values.get(int(time[0]), []))  # type: ignore[assignment]

    def put(module: nn.Module, args: object, output: Tensor) -> Tensor:
        rows, bad = module.spoilt  # type: ignore[misc]
        output = output.clone(memory_format=torch.contiguous_format)
        for row in rows:
            output[row].view(-1)[: len(bad)] = torch.tensor(bad)
        return output

    monkeypatch.setattr("drl_data.computers.load_backbone", loaded)


def run(chosen: Pipeline) -> RunSummary:
    summary = extract(chosen)
    assert summary.failed == []
    assert summary.store.verify(deep=True) == []
    return summary


def failed_of(chosen: Pipeline) -> dict[int, str]:
    """Unit -> message."""
    return {unit.id: message for unit, message in extract(chosen).failed}


def features_of(store: FeatureStore, name: str, t: int) -> np.ndarray:
    """[row, ...] float32, decoded."""
    array = store.array(name)
    parts = {
        part: torch.from_numpy(
            np.concatenate([store.read_unit(part, t, unit) for unit in store.units])
        )
        for part in store.parts(name)
    }
    return from_storage(parts, array).float().numpy()


def counts_of(store: FeatureStore) -> list[UnitCounts]:
    return [receipt.counts for receipt in store.receipts().values()]


def test_an_error_names_places_numbers_rows_and_the_remedy(
    tars: Path, ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {50: [NAN, NAN, INF]})
    failed = failed_of(pipeline(tars, ddpm, tmp_path / "s"))
    assert failed.keys() == {0, 1}
    message = failed[0]
    assert "unit 0: features are not finite: mid_block at timestep 50: 4 NaN, 2 Inf, " in message
    assert "in 2 rows, the first of them 2 (key 'k02')" in message
    assert "features.non_finite: invalid` or clip" in message
    assert "in 1 rows, the first of them 9 (key 'k09')" in failed[1]
    assert FeatureStore.open(str(tmp_path / "s")).receipts() == {}
    assert not list((tmp_path / "s" / "mid_block").glob("c/*"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_invalid_rows_are_listed_and_no_other_changes(
    tars: Path, ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    features = {"dtype": dtype, "non_finite": "invalid"}
    clean = run(pipeline(tars, ddpm, tmp_path / "clean", features=features)).store
    assert all(counts.non_finite == {} for counts in counts_of(clean))
    spoil(monkeypatch, {0: [INF], 50: [NAN, NAN, NAN, -INF]})
    summary = run(pipeline(tars, ddpm, tmp_path / "s", features=features))
    store = summary.store
    assert (summary.n_ok, summary.n_invalid) == (N - 4, 4)
    found = [row for receipt in store.receipts().values() for row in receipt.invalid]
    reason = "non-finite at mid_block, timestep 0: 1 Inf; and at 1 more"
    assert [row for row in found if row.row != BROKEN] == [
        InvalidRow(row, f"k{row:02d}", "features", reason) for row in WHITE
    ]
    two = {"0": NonFinite(inf=2), "50": NonFinite(nan=6, inf=2)}
    one = {"0": NonFinite(inf=1), "50": NonFinite(nan=3, inf=1)}
    assert [c.non_finite for c in counts_of(store)] == [{"mid_block": two}, {"mid_block": one}]
    assert all(counts.clipped == {} for counts in counts_of(store))
    good = [row for row in range(N) if row not in (*WHITE, BROKEN)]
    for array in store.features:
        for t in (0, 1):
            x, want = (features_of(s, array.name, t) for s in (store, clean))
            np.testing.assert_array_equal(x[good], want[good])
            assert np.isnan(x[[*WHITE, BROKEN]]).reshape(4, -1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_clipped_values_are_zero_and_the_largest(
    tars: Path, ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    features = {"dtype": dtype, "non_finite": "clip"}
    clean = run(pipeline(tars, ddpm, tmp_path / "clean", features=features)).store
    spoil(monkeypatch, {50: [NAN, INF, -INF]})
    store = run(pipeline(tars, ddpm, tmp_path / "s", features=features)).store
    assert [c.non_finite for c in counts_of(store)] == [
        {"mid_block": {"50": NonFinite(nan=2, inf=4)}},
        {"mid_block": {"50": NonFinite(nan=1, inf=2)}},
    ]
    np.testing.assert_array_equal(
        features_of(store, "mid_block", 0), features_of(clean, "mid_block", 0)
    )
    x, want = (features_of(s, "mid_block", 1) for s in (store, clean))
    good = [row for row in range(N) if row not in WHITE]
    np.testing.assert_array_equal(x[good], want[good])
    white = x[list(WHITE)].reshape(3, -1)
    assert np.isfinite(white).all()
    assert (np.abs(white[:, 0]) < 1e-6).all()
    if "int" in dtype:  # the largest value under the scale that the infinities have
        group = x[list(WHITE)].reshape(3, x.shape[1], -1)[:, 0]
        np.testing.assert_array_equal(white[:, 1], group.max(1))
        np.testing.assert_array_equal(white[:, 2], group.min(1))
    else:
        kind = getattr(torch, dtype)
        np.testing.assert_array_equal(white[:, 1], torch.finfo(kind).max)
        np.testing.assert_array_equal(white[:, 2], -torch.finfo(kind).max)


def test_too_large_values_may_make_their_rows_invalid(
    tars: Path, ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {0: [1e6, -1e6]})
    features = {"dtype": "float16", "overflow": "invalid"}
    store = run(pipeline(tars, ddpm, tmp_path / "s", features=features)).store
    found = [row for receipt in store.receipts().values() for row in receipt.invalid]
    reason = "too large for float16 at mid_block, timestep 0: 2 values"
    assert [(r.row, r.reason) for r in found if r.row != BROKEN] == [(r, reason) for r in WHITE]
    assert [c.clipped for c in counts_of(store)] == [
        {"mid_block": {"0": 4}}, {"mid_block": {"0": 2}}
    ]  # fmt: skip
    assert all(c.non_finite == {} for c in counts_of(store))


def test_each_of_the_two_policies_is_its_own(
    tars: Path, ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {0: [1e6], 50: [NAN]})
    features = {"dtype": "float16", "overflow": "clip", "non_finite": "error"}
    failed = failed_of(pipeline(tars, ddpm, tmp_path / "a", features=features))
    assert "mid_block at timestep 50: 2 NaN" in failed[0]
    assert "too large" not in failed[0]
    features = {"dtype": "float16", "overflow": "error", "non_finite": "invalid"}
    failed = failed_of(pipeline(tars, ddpm, tmp_path / "b", features=features))
    assert "mid_block at timestep 0: 2 values" in failed[0]
    assert "NaN" not in failed[0]
    features = {"dtype": "float16"}
    failed = failed_of(pipeline(tars, ddpm, tmp_path / "c", features=features))
    assert "too large for float16" in failed[0]
    assert "2 NaN" in failed[0]
    features = {"dtype": "float16", "overflow": "clip", "non_finite": "invalid"}
    store = run(pipeline(tars, ddpm, tmp_path / "d", features=features)).store
    assert counts_of(store)[0].clipped == {"mid_block": {"0": 2}}
    assert counts_of(store)[0].non_finite == {"mid_block": {"50": NonFinite(nan=2)}}


def test_a_mean_over_timesteps_and_views_count_in_one_place(
    tars: Path, ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {50: [NAN]})
    taps = ["mid_block", {"path": "mid_block", "reduce": "time_mean", "name": "averaged"}]
    chosen = pipeline(
        tars,
        ddpm,
        tmp_path / "s",
        taps=taps,
        images={"size": 16, "resize": "none", "views": ["hflip", "id"]},
        features={"non_finite": "invalid"},
    )
    store = run(chosen).store
    assert counts_of(store)[0].non_finite == {
        "mid_block": {"50": NonFinite(nan=4)}, "averaged": {"any": NonFinite(nan=4)}
    }  # fmt: skip
    (row, _, _) = store.receipts()[0].invalid
    assert row.reason == "non-finite at mid_block, timestep 50, view hflip: 1 NaN; and at 3 more"


def test_a_table_of_losses_is_counted_too(
    tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny_stable_diffusion(tmp_path / "sd")

    def loaded(model: Model, device: str) -> Backbone:
        backbone = load_backbone(model, device)
        backbone.network.conv_out.register_forward_hook(
            lambda module, args, output: (
                output / (args[0].flatten(1).mean(1) * 0)[:, None, None, None]
            )
        )
        return backbone

    monkeypatch.setattr("drl_data.computers.load_backbone", loaded)
    chosen = pipeline(
        tars,
        model,
        tmp_path / "s",
        taps=["loss"],
        noise={},
        condition={"template": "a {label}", "candidates": ["cat", "dog", "tree"]},
        features={"non_finite": "invalid"},
    )
    summary = run(chosen)
    assert summary.n_ok == 0
    counts = counts_of(summary.store)[0].non_finite["loss"]
    assert set(counts) == {"0", "50"}
    assert all(c.nan + c.inf == 3 * 7 for c in counts.values())


def test_fits_leave_rows_out_that_are_not_finite(
    tars: Path, ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `invalid` the fit is that of the rows that stay; with `error` nothing is fitted."""
    taps = [{"path": "mid_block", "reduce": f"pca(3,{N})"}]
    spoil(monkeypatch, {0: [NAN]})
    with pytest.raises(FeatureError, match=r"features to fit on are not finite; .*\.non_finite"):
        extract(pipeline(tars, ddpm, tmp_path / "a", taps=taps))
    features = {"non_finite": "invalid", "batch_size": 7, "rows_per_unit": 7}
    chosen = pipeline(tars, ddpm, tmp_path / "b", taps=taps, features=features)
    store = run(chosen).store
    assert store.receipts()[0].n_invalid == 3  # two white ones and the broken one
    kept = features_of(store, "mid_block", 0)[[r for r in range(N) if r not in (*WHITE, BROKEN)]]
    means = np.moveaxis(kept, 1, -1).reshape(-1, 3).mean(0)
    np.testing.assert_allclose(means, 0, atol=1e-4)
