"""Too little memory: micro-batches of the same batch, clear errors, images that do not fit."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from drl_data.backbones import Backbone, Conditioning, Model, load_backbone
from drl_data.device_memory import MicroBatches, faults_named, is_out_of_memory
from drl_data.errors import DeviceMemoryError, FeatureError, HostMemoryError
from drl_data.pipeline import Pipeline
from drl_data.runs import extract
from drl_data.store import FeatureStore
from drl_data.testing import write_photo_tars
from drl_data.tiny_models import save_tiny_stable_diffusion

CPU = torch.device("cpu")
N_SAMPLES = 22
TOLERANCE = 1e-4
"""Relative RMSE of rows of float32 features in batches of other shapes."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photo_tars(tmp_path_factory.mktemp("photos"), n_samples=N_SAMPLES)


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_stable_diffusion(tmp_path_factory.mktemp("sd"))


def pipeline(photos: Path, model: Path, store: Path, **changes: object) -> Pipeline:
    data: dict[str, object] = {
        "name": "memory",
        "dataset": {"tars": str(photos / "*.tar")},
        "images": {"size": 16, "views": ["id", "hflip"]},
        "backbone": {"model": str(model)},
        "schedule": {"timesteps": [0, 300]},
        "noise": {"members": 2},
        "condition": {"caption": True},
        "taps": ["mid_block", {"path": "up_blocks.1", "reduce": ["mean", "time_mean"]}],
        "features": {"dtype": "float32", "batch_size": 6, "rows_per_unit": 12},
        "store": {"url": str(store)},
    }
    return Pipeline.parse({**data, **changes})


def small_device(
    monkeypatch: pytest.MonkeyPatch, n_images: int, module: str = "mid_block"
) -> list[tuple[int, ...]]:
    """Every model's `module` raises what CUDA raises if it is given more images; returns the
    numbers of images that it was given."""
    seen: list[tuple[int, ...]] = []

    def loaded(model: Model, device: str) -> Backbone:
        backbone = load_backbone(model, device)
        backbone.network.get_submodule(module).register_forward_pre_hook(refuse)
        return backbone

    def refuse(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen.append((len(args[0]),))
        if len(args[0]) > n_images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("drl_data.computers.load_backbone", loaded)
    return seen


def close(a: FeatureStore, b: FeatureStore) -> None:
    """Equal receipts but for checksums and runs, and features that differ by rounding alone."""
    mine, theirs = a.receipts(), b.receipts()
    assert mine.keys() == theirs.keys()
    for unit, receipt in mine.items():
        left, right = receipt.content(), theirs[unit].content()
        left.pop("objects"), right.pop("objects")
        assert left == right
    for array in a.arrays:
        for view, t in itertools.product((0, 1), range(a.n_times(array.name))):
            for unit in a.units:
                x, y = (s.read_unit(array.name, t, unit, view) for s in (a, b))
                x, y = (v.reshape(unit.n_rows, -1) for v in (x, y))
                rmse = np.linalg.norm(x - y, axis=1) / np.linalg.norm(y, axis=1)
                assert rmse.max() < TOLERANCE, (array.name, t, view)
    assert a.sealed
    assert b.sealed


@pytest.mark.parametrize(("fits", "want"), [(3, 3), (2, 1), (1, 1), (5, 3), (6, None)])
def test_a_batch_that_does_not_fit_is_computed_in_parts(
    photos: Path,
    sd: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fits: int,
    want: int | None,
) -> None:
    reference = extract(pipeline(photos, sd, tmp_path / "whole")).store
    seen = small_device(monkeypatch, fits)
    summary = extract(pipeline(photos, sd, tmp_path / "s", run={"leases": 1}))
    assert summary.failed == []
    close(summary.store, reference)
    receipts = summary.store.receipts()
    assert [r.run.micro_batch for r in receipts.values()] == [want, want]
    assert receipts[0].run.damage.keys() == reference.receipts()[0].run.damage.keys()
    tried = [n for (n,) in seen]
    # What did not fit is not tried again: 6, and then 3 (6 // 2), and so on.
    sizes = [n for n, _ in itertools.groupby(tried) if n > fits]
    assert sizes == [n for n in (6, 3) if n > fits]


def test_the_numbers_of_units_do_not_depend_on_when_memory_runs_out(
    photos: Path, sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the second timestep of the second batch: what was counted of it is not counted twice."""
    features = {"dtype": "float16", "batch_size": 6, "rows_per_unit": 12, "overflow": "clip"}
    calls = itertools.count()

    def loaded(model: Model, device: str) -> Backbone:
        backbone = load_backbone(model, device)
        network = backbone.network
        network.mid_block.register_forward_hook(lambda m, args, output: output * 1e5)
        network.mid_block.register_forward_pre_hook(refuse)
        return backbone

    def refuse(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if runs_out and next(calls) == 6:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")

    runs_out = False
    monkeypatch.setattr("drl_data.computers.load_backbone", loaded)
    changes = {"features": features, "taps": ["mid_block"], "noise": {}, "run": {"leases": 1}}
    changes["images"] = {"size": 16}
    whole = extract(pipeline(photos, sd, tmp_path / "whole", **changes)).store
    runs_out = True
    store = extract(pipeline(photos, sd, tmp_path / "s", **changes)).store
    assert next(calls) > 7
    for unit, receipt in store.receipts().items():
        mine, theirs = receipt.counts.clipped, whole.receipts()[unit].counts.clipped
        assert mine.keys() == theirs.keys()
        for time, n in mine["mid_block"].items():
            assert n == pytest.approx(theirs["mid_block"][time], abs=2)
    mine, theirs = (s.receipts()[0].run.damage["mid_block"] for s in (store, whole))
    assert mine.relative_rmse == pytest.approx(theirs.relative_rmse, rel=1e-3)


def test_one_image_that_does_not_fit_is_an_error_that_says_what_to_change(
    photos: Path, sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_device(monkeypatch, 0)
    failed = extract(pipeline(photos, sd, tmp_path / "s")).failed
    assert len(failed) == 2
    for word in ("cpu: a single image does not fit", "2.00 GiB", "bfloat16", "`images.size`"):
        assert word in failed[0][1]


def test_a_model_that_does_not_fit_is_an_error_with_its_size(
    photos: Path, sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(model: Model, device: str) -> Backbone:
        if device == "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return load_backbone(model, device)

    monkeypatch.setattr("drl_data.computers.load_backbone", loaded)
    with pytest.raises(DeviceMemoryError, match=r"the model takes 0\.\d\d GB in float32 and does"):
        extract(pipeline(photos, sd, tmp_path / "s"))


def test_a_fit_is_made_in_parts_too(
    photos: Path, sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taps = [{"path": "mid_block", "reduce": "pca(3)"}]
    reference = extract(pipeline(photos, sd, tmp_path / "whole", taps=taps)).store
    small_device(monkeypatch, 2)
    store = extract(pipeline(photos, sd, tmp_path / "s", taps=taps)).store
    for unit in store.units:
        x, y = (s.read_unit("mid_block", 1, unit) for s in (store, reference))
        np.testing.assert_allclose(x, y, atol=2e-3 * np.abs(y).max())


@given(st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_parts_cover_a_batch_once(n_images: int, fits: int) -> None:
    micro, done, tried = MicroBatches(CPU), [], 0

    def work(start: int, stop: int) -> None:
        nonlocal tried
        tried += 1
        if stop - start > fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        done.extend(range(start, stop))

    for _ in range(3):
        micro.run(n_images, work)
    assert done == 3 * list(range(n_images))
    size = micro.size or n_images
    assert size <= max(fits, 1)
    assert n_images <= fits or size > fits // 2 or size == 1 or n_images // 2**5 <= size
    assert tried <= 3 * math.ceil(n_images / size) + math.ceil(math.log2(n_images)) + 1


def test_other_errors_are_not_taken_for_memory() -> None:
    def work(start: int, stop: int) -> None:
        raise FeatureError("no")

    with pytest.raises(FeatureError):
        MicroBatches(CPU).run(4, work)
    with pytest.raises(RuntimeError, match="shapes"):
        MicroBatches(CPU).run(4, lambda start, stop: raise_(RuntimeError("shapes")))
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert not is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError, match="mat1"), faults_named(CPU, "unit 3"):
        torch.ones(2, 3) @ torch.ones(2, 3)


def raise_(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    "allocate",
    [lambda: torch.empty(1 << 50, dtype=torch.uint8), lambda: np.empty(1 << 50, np.uint8)],
    ids=["torch", "numpy"],
)
def test_too_little_memory_of_the_host_is_named(allocate: Callable[[], object]) -> None:
    named = pytest.raises(HostMemoryError, match=r"unit 3: the host .*run\.memory_bytes")
    with named, faults_named(CPU, "unit 3"):
        allocate()


def test_conditioning_of_a_part_of_a_batch() -> None:
    told = Conditioning({"a": torch.arange(6).reshape(6, 1), "b": torch.ones(1, 3)})
    part = told.rows(2, 5)
    assert part.kwargs["a"].flatten().tolist() == [2, 3, 4]
    assert part.kwargs["b"].shape == (1, 3)
    whole = part.expand(3)
    assert whole["b"].shape == (3, 3)


DECODE = """
import resource, sys
from drl_data.images import read_batches
from drl_data.index import build_index
from drl_data.plan import Unit
from drl_data.spec import DatasetSpec, ImageSpec

index = build_index(DatasetSpec(tars=sys.argv[1]))
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (600 << 20), -1))
for batch in read_batches(
    Unit(0, 0, index.n_samples), index, ImageSpec(size=16), batch_size=4, n_threads=2,
    prefetch_bytes=1 << 20,
):
    for row in batch.invalid:
        print(row.row, row.stage, row.reason)
"""


def test_an_image_that_memory_does_not_suffice_for_costs_its_row(tmp_path: Path) -> None:
    """In a process that may have 600 MB more: 13000x13000 pixels as RGB are 507 MB, twice."""
    import io

    import webdataset

    with webdataset.TarWriter(str(tmp_path / "a.tar"), mtime=0) as writer:
        for i in range(6):
            side, buffer = (13000 if i == 2 else 20), io.BytesIO()
            Image.new("L" if i == 2 else "RGB", (side, side), 7).save(buffer, "PNG")
            writer.write({"__key__": f"k{i}", "png": buffer.getvalue(), "cls": "0"})
    done = subprocess.run(
        [sys.executable, "-c", DECODE, str(tmp_path / "a.tar")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2 decode not enough memory to decode 13000x13000 pixels\n"
