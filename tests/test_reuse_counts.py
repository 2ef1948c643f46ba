"""What a receipt counts is the same whether its features were computed or copied."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from drl_data.extract import make_task
from drl_data.pipeline import Pipeline, RunSpec
from drl_data.plan import Lease
from drl_data.reuse_task import make_reuse_task
from drl_data.runs import RunSummary, extract, prepare
from drl_data.store import FeatureStore
from drl_data.tiny_models import save_tiny_ddpm
from tests.test_extract import assert_same_store
from tests.test_numerics import spoil

Changes = dict[str, Any]
NAN, INF = float("nan"), float("inf")
WHITE = (1, 2, 8, 9)
BROKEN = 4
NO_IMAGE = 10


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two tars of six samples; the features of white images can be spoilt."""
    folder = tmp_path_factory.mktemp("white")
    generator = np.random.default_rng(0)
    names = [str(folder / f"{number}.tar") for number in range(2)]
    for number, name in enumerate(names):
        with webdataset.TarWriter(name, mtime=0) as writer:
            for row in range(6 * number, 6 * number + 6):
                pixels = generator.integers(20, 200, (16, 16, 3), dtype=np.uint8)
                buffer = io.BytesIO()
                whole = np.full_like(pixels, 255) if row in WHITE else pixels
                Image.fromarray(whole).save(buffer, "PNG")
                data = b"no image" if row == BROKEN else buffer.getvalue()
                extension = "bin" if row == NO_IMAGE else "png"
                writer.write({"__key__": f"k{row:02d}", extension: data})
    return names


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_ddpm(tmp_path_factory.mktemp("ddpm"))


@pytest.fixture
def grow(tars: list[str], ddpm: Path, tmp_path: Path) -> Callable[..., RunSummary]:
    def pipeline(name: str, reuse: list[str], changes: Changes) -> Pipeline:
        data: Changes = {
            "name": "test",
            "dataset": {"tars": [tars[int(number)] for number in changes.pop("numbers", "01")]},
            "images": {"size": 16, "resize": "none"},
            "backbone": {"model": str(ddpm)},
            "schedule": {"timesteps": [0, 50]},
            "noise": {"kind": "none"},
            "taps": ["mid_block", {"path": "mid_block", "name": "m", "reduce": ["time_mean"]}],
            "store": {"url": str(tmp_path / name), "reuse": reuse},
        }
        base = {"dtype": "float16", "batch_size": 2, "rows_per_unit": 4}
        features = {**base, **changes.pop("features", {})}
        return Pipeline.parse({**data, **changes, "features": features})

    def run(old: Changes, new: Changes) -> RunSummary:
        direct = extract(pipeline("direct", [], {**new}))
        before = extract(pipeline("old", [], {**old}))
        summary = extract(pipeline("new", [before.store.url], {**new}))
        assert not [*direct.failed, *before.failed, *summary.failed]
        assert_same_store(summary.store, direct.store)
        assert not summary.store.verify(deep=True)
        return summary

    return run


MORE = {"taps": ["conv_in", "mid_block"]}
MOVED = {"numbers": "10", "features": {"rows_per_unit": 6}}


@pytest.mark.parametrize(
    ("old", "new"),
    [({}, MORE), ({}, MOVED), ({"numbers": "0"}, {})],
    ids=["a tap", "moved rows", "tars behind"],
)
@pytest.mark.parametrize("overflow", ["clip", "invalid"])
@pytest.mark.parametrize("non_finite", ["clip", "invalid"])
def test_policies(
    non_finite: str,
    overflow: str,
    old: Changes,
    new: Changes,
    grow: Callable[..., RunSummary],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(monkeypatch, {0: [NAN, 1e6], 50: [65504.0, 1e6], 300: [INF]})
    policy = {"overflow": overflow, "non_finite": non_finite}
    changed = {**new, "features": {**new.get("features", {}), **policy}}
    summary = grow({**old, "features": policy}, changed)
    receipts = summary.store.receipts().values()
    assert any(receipt.counts.clipped or receipt.counts.non_finite for receipt in receipts)


def test_rows_that_a_new_tap_makes_invalid_are_so_in_every_array(
    grow: Callable[..., RunSummary], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their old shards are no longer right, and are written anew; others are linked."""
    spoil(monkeypatch, {0: [1e6]}, module="conv_in")
    policy = {"overflow": "invalid"}
    new = {"taps": ["mid_block", "conv_in"], "features": policy}
    summary = grow({"taps": ["mid_block"], "features": policy}, new)
    receipts = summary.store.receipts()
    bad = [row.row for r in receipts.values() for row in r.invalid if row.stage == "features"]
    assert bad == list(WHITE)
    linked = {unit: sum(old.linked for old in r.run.reused) for unit, r in receipts.items()}
    assert linked == {0: 0, 1: 2, 2: 0}


def test_clipped_values_are_told_from_the_largest_by_their_number(
    grow: Callable[..., RunSummary], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the stored maxima are as many as were clipped, rows that move are not computed."""
    clip = {"overflow": "clip", "non_finite": "clip"}
    changed = {"numbers": "10", "features": clip}
    spoil(monkeypatch, {0: [1e6, -1e6], 50: [1e6]})
    summary = grow({"features": clip, "taps": ["mid_block"]}, {**changed, "taps": ["mid_block"]})
    assert "denoise" not in summary.stage_s, "nothing was computed"


def test_and_computed_again_where_that_is_not_known(
    grow: Callable[..., RunSummary], monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = {"overflow": "clip", "non_finite": "clip"}
    changed = {"numbers": "10", "features": clip}
    spoil(monkeypatch, {0: [1e6, 65504.0], 50: [1e6]})
    summary = grow({"features": clip, "taps": ["mid_block"]}, {**changed, "taps": ["mid_block"]})
    assert summary.stage_s["denoise"] > 0
    (reused,) = summary.reused.values()
    assert reused.rows == 10, "of white rows the other timestep is reused"


def test_a_sample_that_killed_its_worker_is_not_tried_again(
    tars: list[str], ddpm: Path, tmp_path: Path
) -> None:
    """Nor read, nor counted among the bytes that were."""
    poison = ((2, "the worker died"),)

    def made(name: str, taps: list[str], reuse: list[str]) -> FeatureStore:
        chosen = Pipeline.parse(
            {
                "name": "test",
                "dataset": {"tars": tars[:1]},
                "images": {"size": 16},
                "backbone": {"model": str(ddpm)},
                "schedule": {"timesteps": [50]},
                "taps": taps,
                "features": {"dtype": "float32", "batch_size": 2, "rows_per_unit": 4},
                "store": {"url": str(tmp_path / name), "reuse": reuse},
            }
        )
        found = prepare(chosen)
        assert chosen.store is not None
        assert chosen.backbone is not None
        url = chosen.store.url
        store = FeatureStore.create(url, found.spec, found.arrays, found.times, found.index)
        making = partial(
            make_task, url, chosen.backbone, chosen.condition, RunSpec(), 1, device="cpu"
        )
        task = making()
        if reuse:
            task = make_reuse_task(making, chosen.store, chosen.backbone, 1 << 20)
        for unit in store.units:
            task(Lease(unit, poison=() if reuse or unit.id else poison))
        store.seal()
        return store

    old = made("old", ["mid_block"], [])
    direct = made("direct", ["conv_in", "mid_block"], [])
    grown = made("grown", ["conv_in", "mid_block"], [old.url])
    assert_same_store(grown, direct)
    (bad,) = (row for row in grown.receipts()[0].invalid)
    assert (bad.row, bad.stage, bad.reason) == (2, "worker", "the worker died")


def test_input_bytes_and_reasons_are_those_of_reading(grow: Callable[..., RunSummary]) -> None:
    store = grow({}, {**MORE, **MOVED}).store
    stages = {row.key: row.stage for r in store.receipts().values() for row in r.invalid}
    assert stages == {f"k{BROKEN:02d}": "decode", f"k{NO_IMAGE:02d}": "index"}
