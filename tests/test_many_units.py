"""Neither memory nor a start grows with the number of units."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from drl_data.objects import LocalFolder
from drl_data.pipeline import Pipeline
from drl_data.receipts import receipt_path
from drl_data.runs import extract
from drl_data.testing import write_photo_tars
from drl_data.tiny_models import save_tiny_ddpm

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "many_units.py"


def test_memory_does_not_grow_with_the_number_of_units() -> None:
    """Between unit 200 and unit 2,200 of a run in a fresh process. A receipt that somebody keeps is
    some 60 objects; the queue of units, which shrinks, gives one a unit back."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--units", "2200", "--after", "200"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, last, sealed = json.loads(done.stdout.splitlines()[-1])
    assert (first["n_units"], last["n_units"]) == (200, 2200)
    assert last["python_blocks"] - first["python_blocks"] < 500
    assert last["resident_bytes"] - first["resident_bytes"] < 16 << 20
    # The seal reads every receipt, some hundred at a time, and keeps a line for each sample.
    assert sealed["peak_bytes"] - first["peak_bytes"] < 16 << 20


def test_a_start_reads_no_receipts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a store with units done and units pending: one listing, and a look for the receipts of
    those that are pending."""
    photos = write_photo_tars(tmp_path / "photos", n_samples=22)
    chosen = Pipeline.parse(
        {
            "name": "start",
            "dataset": {"tars": str(photos / "*.tar")},
            "images": {"size": 16},
            "backbone": {"model": str(save_tiny_ddpm(tmp_path / "ddpm"))},
            "schedule": {"timesteps": [50]},
            "taps": [{"path": "conv_in", "reduce": "mean"}],
            "features": {"batch_size": 2, "rows_per_unit": 2},
            "store": {"url": str(tmp_path / "s")},
        }
    )
    extract(chosen, limit=16)
    read: list[str] = []
    listed: list[str] = []
    get, list_ = LocalFolder.get, LocalFolder.list

    def recording_get(self: LocalFolder, path: str) -> memoryview:
        read.append(path)
        return get(self, path)

    def recording_list(self: LocalFolder, prefix: str = "") -> object:
        listed.append(prefix)
        return list_(self, prefix)

    monkeypatch.setattr(LocalFolder, "get", recording_get)
    monkeypatch.setattr(LocalFolder, "list", recording_list)
    summary = extract(chosen, limit=18)
    assert (summary.n_pending, summary.n_ok) == (1, 2)
    (pending,) = (unit for unit in summary.store.units if unit.start == 16)
    receipts = {path for path in read if path.startswith("receipts/")}
    assert receipts == {receipt_path(pending)}
    assert listed.count("receipts") == 2  # at the start, and to see whether all is done
    read.clear()
    assert extract(chosen, limit=18).n_pending == 0
    assert not [path for path in read if path.startswith("receipts/")]
