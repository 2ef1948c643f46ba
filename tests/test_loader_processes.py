"""Whatever the DataLoader does, it works or says why at once: real processes, real S3 requests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

from drl_data.store import FeatureStore

from .stores import expected, fill, make_array, make_store

ROOT = Path(__file__).parents[1]
ARRAYS = (make_array("mid", (4, 2, 2), "float32"), make_array("up", (6,), "float16"))
INVALID = (2, 9)
TIMEOUT_S = 240
"""A hang, not a performance test: the slowest case starts four processes that import torch."""


def run(method: str, places: dict[str, str]) -> dict[tuple[str, str, str], str]:
    """(kind, place, start method) -> what `loader_cases` read; a hang fails, and is ended."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.loader_cases", method]
        + [f"{place}={url}" for place, url in places.items()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, _ = process.communicate()
        pytest.fail(f"{method}: hung after {out.splitlines()[-1:]}")
    assert process.returncode == 0, err
    found = [json.loads(line) for line in out.splitlines()]
    return {(kind, place, how): text for kind, place, how, text in found}


def made(url: str) -> FeatureStore:
    store = make_store(url, 22, 4, arrays=ARRAYS)
    fill(store, INVALID)
    store.seal()
    return store


def rewritten(url: str) -> FeatureStore:
    """As another tool would: chunks of several rows, compressed."""
    store = made(url)
    array = zarr.open_array(f"{url}/mid", mode="r")
    values, attributes = array[:], dict(array.attrs)
    zarr.create_array(
        f"{url}/mid",
        data=values,
        shards=(4, 1, 4, 2, 2),
        chunks=(2, 1, 4, 2, 2),
        compressors=zarr.codecs.ZstdCodec(level=1),
        overwrite=True,
        attributes=attributes,
    )
    return store


def whole(store: FeatureStore) -> str:
    """What every loader must find."""
    rows = [row for row in range(22) if row not in INVALID]
    sums = sum(float(expected(store, a.name)[:, rows].astype(np.float64).sum()) for a in ARRAYS)
    return json.dumps([rows, round(sums, 2)])


@pytest.mark.s3
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_no_loader_hangs(tmp_path: Path, s3_url: str, method: str) -> None:
    places = {"local": str(tmp_path / "s"), "s3": f"{s3_url}/s"}
    stores = {place: made(url) for place, url in places.items()}
    if method == "fork":
        places["zarr"] = str(tmp_path / "z")
        stores["zarr"] = rewritten(places["zarr"])
    found = run(method, places)
    methods = ["none", "fork"] if method == "fork" else [method]
    kinds = {(k, p, m) for k in ("map", "stream") for p in places for m in methods}
    if method == "fork":
        kinds |= {("threads", place, "none") for place in places}
    assert found.keys() == kinds
    for (kind, place, how), text in found.items():
        if place == "s3" and how == "fork":
            assert text.startswith("ForkError: "), (kind, text)
            assert "did not survive the fork; use num_workers=0" in text
            assert "'spawn' or 'forkserver'" in text
        else:
            got, want = json.loads(text), json.loads(whole(stores[place]))
            assert got[0] == want[0], (kind, place, how)
            assert abs(got[1] - want[1]) < 0.05, (kind, place, how)
