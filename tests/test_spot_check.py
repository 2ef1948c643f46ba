"""`drl verify --sample`: features come out again, and what is not of the spec does not."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from typer.testing import CliRunner

from drl_data.cli import app
from drl_data.errors import InputError, StoreError, StoreMismatchError
from drl_data.extract import make_task
from drl_data.pipeline import Pipeline
from drl_data.plan import InvalidRow, Lease
from drl_data.runs import extract, prepare
from drl_data.spot_check import SpotCheck, _chosen_rows, spot_check
from drl_data.store import FeatureStore
from drl_data.tiny_models import save_tiny_ddpm

N = 30
BROKEN = (4, 21)
DTYPES = ["float32", "bfloat16", "uint8"]


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tars")
    generator = np.random.default_rng(0)
    with webdataset.TarWriter(str(folder / "a.tar"), mtime=0) as writer:
        for i in range(N):
            buffer = io.BytesIO()
            pixels = generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG")
            data = b"no image" if i in BROKEN else buffer.getvalue()
            writer.write({"__key__": f"k{i:02d}", "png": data, "cls": "0"})
    return folder


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_ddpm(tmp_path_factory.mktemp("ddpm"))


def pipeline(tars: Path, model: Path, store: Path, **changes: object) -> Pipeline:
    data: dict[str, object] = {
        "name": "check",
        "dataset": {"tars": str(tars / "*.tar")},
        "images": {"size": 16, "views": ["id", "hflip"]},
        "backbone": {"model": str(model)},
        "schedule": {"timesteps": [0, 300]},
        "taps": ["mid_block", {"path": "up_blocks.0", "reduce": ["mean", "time_mean"]}],
        "features": {"dtype": "float32", "batch_size": 4, "rows_per_unit": 8},
        "store": {"url": str(store)},
    }
    return Pipeline.parse({**data, **changes})


def check(chosen: Pipeline, n_rows: int = 5, seed: int = 0) -> SpotCheck:
    assert chosen.store is not None
    return spot_check(FeatureStore.open(chosen.store.url), chosen, n_rows, seed=seed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_features_come_out_again_bit_for_bit(
    tars: Path, ddpm: Path, tmp_path: Path, dtype: str
) -> None:
    features = {"dtype": dtype, "batch_size": 4, "rows_per_unit": 8}
    chosen = pipeline(tars, ddpm, tmp_path / "s", features=features)
    extract(chosen)
    before = {path: path.read_bytes() for path in (tmp_path / "s").rglob("*") if path.is_file()}
    found = check(chosen)
    assert found.differences == []
    assert found.n_invalid == 2
    assert 5 <= found.n_equal == found.n_rows <= N - 2
    assert found.largest == {"mid_block": 0, "up_blocks.0": 0}
    assert {p: p.read_bytes() for p in (tmp_path / "s").rglob("*") if p.is_file()} == before
    everything = check(chosen, n_rows=N)
    assert (everything.n_rows, everything.n_invalid) == (N - 2, 2)


def test_the_seed_chooses_the_rows(tars: Path, ddpm: Path, tmp_path: Path) -> None:
    chosen = pipeline(tars, ddpm, tmp_path / "s")
    store = extract(chosen).store
    seen: list[list[int]] = []
    for seed in (0, 0, 1, 2):
        seen.append(np.flatnonzero(_chosen_rows(store, 3, seed)).tolist())
    assert seen[0] == seen[1]
    assert len({tuple(rows) for rows in seen}) == 3
    assert all(set(BROKEN) <= set(rows) and len(rows) == 5 for rows in seen)


def test_a_flipped_bit_is_found_and_named(tars: Path, ddpm: Path, tmp_path: Path) -> None:
    chosen = pipeline(tars, ddpm, tmp_path / "s")
    store = extract(chosen).store
    path = tmp_path / "s" / "mid_block/c/2/1/1/0/0/0"  # unit 2, hflip, timestep 300
    data = bytearray(path.read_bytes())
    row_bytes = store.array("mid_block").bytes_per_row
    data[3 * row_bytes + 40] ^= 1  # the last bit of a value of row 19
    path.write_bytes(data)
    (difference,) = check(chosen, n_rows=N).differences
    assert (difference.row, difference.key, difference.unit) == (19, "k19", 2)
    assert "mid_block, timestep 300, view hflip: relative difference" in str(difference)


def forged(tars: Path, other: Pipeline, chosen: Pipeline) -> None:
    """Make the store of `chosen`, and put the features of `other` into it."""
    assert chosen.store is not None
    store, source = extract(chosen).store, extract(other).store
    for array in store.arrays:
        shutil.rmtree(f"{store.url}/{array.name}/c")
        shutil.copytree(f"{source.url}/{array.name}/c", f"{store.url}/{array.name}/c")


def test_features_of_other_noise_are_found(tars: Path, ddpm: Path, tmp_path: Path) -> None:
    chosen = pipeline(tars, ddpm, tmp_path / "s")
    forged(tars, pipeline(tars, ddpm, tmp_path / "other", noise={"seed": 1}), chosen)
    found = check(chosen)
    assert found.n_equal == 0
    assert len({d.row for d in found.differences}) == found.n_rows
    assert min(found.largest.values()) > 0.01


def test_features_of_other_weights_are_found(tars: Path, ddpm: Path, tmp_path: Path) -> None:
    chosen = pipeline(tars, ddpm, tmp_path / "s")
    other = pipeline(tars, save_tiny_ddpm(tmp_path / "m", seed=1), tmp_path / "other")
    forged(tars, other, chosen)
    assert min(check(chosen).largest.values()) > 0.01
    assert len(check(chosen).differences) > 5
    with pytest.raises(StoreMismatchError, match="give the same files"):
        spot_check(FeatureStore.open(str(tmp_path / "s")), other, 1)


def test_elsewhere_what_differs_by_rounding_passes(
    tars: Path, ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = pipeline(tars, ddpm, tmp_path / "s")
    store = extract(chosen).store
    for path in (tmp_path / "s").glob("mid_block/c/*/0/0/0/0/0"):
        data = bytearray(path.read_bytes())
        data[40] ^= 1
        path.write_bytes(data)
    assert len(check(chosen, n_rows=N).differences) == len(store.units)
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    found = check(chosen, n_rows=N)
    assert found.differences == []
    assert found.n_equal == found.n_rows - len(store.units)
    assert 0 < found.largest["mid_block"] < 1e-5


def test_rows_that_are_not_invalid_any_more(tars: Path, ddpm: Path, tmp_path: Path) -> None:
    """A row that killed its worker is not touched; one that now decodes is a difference."""
    chosen = pipeline(tars, ddpm, tmp_path / "s")
    found = prepare(chosen)
    store = FeatureStore.create(
        str(tmp_path / "s"), found.spec, found.arrays, found.times, found.index
    )
    assert chosen.backbone is not None
    task = make_task(store.url, chosen.backbone, chosen.condition, chosen.run, 1)
    for unit in store.units:
        task(Lease(unit, poison=((9, "it killed its worker"),)))
    again = check(chosen, n_rows=N)
    assert again.differences == []
    assert again.n_invalid == 3
    broken = store.units[2]
    receipt = store.receipt(broken)
    assert receipt is not None
    listed = (InvalidRow(20, "k20", "decode", "cut short"), *receipt.invalid)
    changed = receipt.model_copy(update={"invalid": listed, "n_invalid": 2, "n_ok": 6})
    (tmp_path / "s" / "receipts" / f"{broken.id:08d}.json").write_bytes(changed.to_json())
    (difference,) = check(chosen, n_rows=N).differences
    assert str(difference) == (
        "row 20 (key 'k20', unit 2): listed as invalid (decode: cut short), and now it has features"
    )


def test_nothing_done_and_fits_that_are_missing(tars: Path, ddpm: Path, tmp_path: Path) -> None:
    taps = [{"path": "mid_block", "reduce": "pca(2)"}]
    chosen = pipeline(tars, ddpm, tmp_path / "s", taps=taps)
    found = prepare(chosen)
    FeatureStore.create(str(tmp_path / "s"), found.spec, found.arrays, found.times, found.index)
    with pytest.raises(InputError, match="nothing to check"):
        check(chosen)
    extract(chosen)
    assert check(chosen).differences == []
    (tmp_path / "s" / "fits" / "mid_block.safetensors").unlink()
    with pytest.raises(StoreError, match=r"mid_block\.safetensors missing"):
        check(chosen)
    assert not list((tmp_path / "s" / "fits").iterdir())


def test_the_command(tars: Path, ddpm: Path, tmp_path: Path) -> None:
    text = f"""
name: check
dataset: {{tars: "{tars}/*.tar"}}
images: {{size: 16}}
backbone: {{model: "{ddpm}"}}
schedule: {{timesteps: [0]}}
taps: [mid_block]
features: {{dtype: float32, batch_size: 4, rows_per_unit: 8}}
store: {{url: "{tmp_path}/s"}}
"""
    file = tmp_path / "p.yaml"
    file.write_text(text)
    extract(Pipeline.load(file))
    command = ["verify", str(tmp_path / "s"), "--sample", "4", "--pipeline", str(file)]
    done = CliRunner().invoke(app, [*command, "--seed", "3", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "2 invalid rows tried again; 0 differences" in done.output
    shard = tmp_path / "s" / "mid_block/c/1/0/0/0/0"
    data = bytearray(shard.read_bytes())
    data[3] ^= 64
    shard.write_bytes(data)
    command[3] = str(N)
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1, done.output
    assert "differs: row 8 (key 'k08', unit 1): mid_block, timestep 0: relative" in done.output
