"""`drl` as a user meets it: exit statuses, messages, and what is left when it is interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from drl_data.index import SampleIndex
from drl_data.store import FeatureStore
from drl_data.testing import write_photo_tars
from drl_data.tiny_models import save_tiny_ddpm
from tests.conftest import Drl
from tests.test_extract import assert_same_store, broken_tars

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DDPM."""
    return save_tiny_ddpm(tmp_path_factory.mktemp("model") / "m")


def write_pipeline(folder: Path, model: Path, tars: str, **changes: object) -> Path:
    path = folder / "p.yaml"
    data = {
        "name": "p",
        "dataset": {"tars": tars},
        "images": {"size": 16},
        "backbone": {"model": str(model)},
        "schedule": {"timesteps": [0, 200]},
        "taps": ["mid_block"],
        "features": {"dtype": "float16", "batch_size": 2, "rows_per_unit": 2},
        "store": {"url": "f.zarr"},
    }
    path.write_text(yaml.safe_dump({**data, **changes}))
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with two tars of nine samples."""
    write_photo_tars(tmp_path / "data", n_samples=9)
    return tmp_path


def test_extract_then_nothing_left_to_do(drl: Drl, photos: Path, model: Path) -> None:
    path = write_pipeline(photos, model, "data/*.tar")
    code, out, err = drl("extract", path)
    assert code == 0, err
    assert "9 samples in" in out
    assert "extract: 9/9 images" in err
    code, out, err = drl("extract", path)
    assert (code, err) == (0, "")
    assert "nothing left to do: 5 units done, no backbone was started" in out
    code, out, _ = drl("verify", photos / "f.zarr", "--deep")
    assert (code, out.strip()) == (0, f"{photos}/f.zarr: 0 problems")


def test_plan_says_what_will_be_written(drl: Drl, photos: Path, model: Path) -> None:
    code, out, _ = drl("plan", write_pipeline(photos, model, "data/*.tar"))
    assert code == 0
    # 32 channels of 8 x 8 in float16 at two timesteps
    assert "32x8x8" in out
    assert "8.19 KB" in out
    assert (
        "9 samples of 16x16 pixels x 2 timesteps = 73.7 KB in 20 objects, 5 units of 2 rows" in out
    )
    assert not (photos / "f.zarr").exists()


def test_a_bad_sample_is_listed_and_the_exit_status_is_1(
    drl: Drl, tmp_path: Path, model: Path
) -> None:
    broken_tars(tmp_path / "data")
    path = write_pipeline(tmp_path, model, "data/*.tar")
    code, out, err = drl("extract", path)
    assert code == 1
    assert "10 samples in" in out
    assert "invalid: row 3, k03: decode: " in err
    code, out, err = drl("status", tmp_path / "f.zarr")
    assert code == 1
    assert "sealed, 6 of 6 units done, 10 of 12 samples ok" in out
    assert "invalid: row 3, k03: decode: begins with b'not an image'" in err
    assert "invalid: row 9, k09: decode: " in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["extract", "nowhere.yaml"], "nowhere.yaml: no such pipeline file"),
        (["status", "nowhere.zarr"], "no store here"),
        (["recipes", "digitz"], "no recipe 'digitz'; nearest: digits"),
        (["index", "none-*.tar", "--out", "x.parquet"], "none-*.tar"),
        (["extract"], "Missing argument"),
        (["nothing"], "No such command 'nothing'"),
    ],
)
def test_a_users_mistake_is_one_message_and_status_2(
    drl: Drl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = drl(*args)
    assert message in err
    assert "Traceback" not in err
    assert code == 2


def test_the_command_line_changes_where_and_how_much(
    drl: Drl, photos: Path, model: Path, tmp_path: Path
) -> None:
    path = write_pipeline(photos, model, "nowhere/*.tar")
    tars = f"all={photos}/data/*.tar"
    reference = str(tmp_path / "a.zarr")
    assert drl("extract", path, "--tars", tars, "--store", reference)[0] == 0
    other = str(tmp_path / "b.zarr")
    shared = ["extract", path, "--tars", f"{photos}/data/*.tar", "--store", other]
    assert drl(*shared, "--units", "1/2")[0] == 0
    assert sorted(FeatureStore.open(other).receipts()) == [2, 3, 4]
    assert drl(*shared, "--limit", "1", "--shuffle", "3")[0] == 0
    assert sorted(FeatureStore.open(other).receipts()) == [0, 2, 3, 4]
    assert drl(*shared)[0] == 0
    assert_same_store(FeatureStore.open(reference), FeatureStore.open(other))
    code, _, err = drl(*shared, "--units", "2")
    assert code == 2
    assert "want I/N" in err


def test_index_writes_a_table(drl: Drl, photos: Path) -> None:
    path = photos / "index.parquet"
    code, out, _ = drl("index", f"{photos}/data/photos-{{000000,000001}}.tar", "--out", path)
    assert code == 0
    assert f"9 samples of 2 tars in {path}" in out
    assert SampleIndex.load(str(path)).n_samples == 9


def test_recipes_are_listed_and_printed(drl: Drl) -> None:
    code, out, _ = drl("recipes")
    assert code == 0
    assert "digits_random" in out
    code, out, _ = drl("recipes", "digits")
    assert out == (ROOT / "pipelines" / "digits.yaml").read_text()


def test_verify_lists_damage(drl: Drl, photos: Path, model: Path) -> None:
    drl("extract", write_pipeline(photos, model, "data/*.tar"))
    store = FeatureStore.open(str(photos / "f.zarr"))
    path = store.folder.local_path(store.shards(store.units[1])[0][2])
    assert path is not None
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    assert drl("verify", photos / "f.zarr")[0] == 0  # sizes are right
    code, _, err = drl("verify", photos / "f.zarr", "--deep")
    assert code == 1
    assert "mid_block/c/1/0/0/0/0" in err


def start_extract(
    tmp_path: Path, model: Path, n_samples: int, **run: object
) -> tuple[list[str], dict[str, str], subprocess.Popen[str]]:
    """`drl extract` on so many samples, once its first unit is signed."""
    write_photo_tars(tmp_path / "data", n_samples=n_samples)
    path = write_pipeline(tmp_path, model, "data/*.tar", run={"leases": 1, **run})
    command = [sys.executable, "-m", "drl_data", "extract", str(path)]
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"
    }  # fmt: skip
    process = subprocess.Popen(
        command,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    receipts = tmp_path / "f.zarr" / "receipts"
    while process.poll() is None and not list(receipts.glob("*.json")):
        time.sleep(0.02)
    return command, environment, process


@pytest.mark.parametrize(
    ("executor", "number"),
    [
        ("local", signal.SIGTERM),
        ("local", signal.SIGINT),
        ("process", signal.SIGINT),
        pytest.param("ray", signal.SIGINT, marks=[pytest.mark.ray, pytest.mark.soak]),
        pytest.param("ray", signal.SIGTERM, marks=[pytest.mark.ray, pytest.mark.soak]),
    ],
)
def test_a_signal_stops_the_run_and_the_next_one_resumes(
    tmp_path: Path, model: Path, executor: str, number: signal.Signals
) -> None:
    """SIGINT goes to every process of the group, as from a terminal; SIGTERM to the driver."""
    n = 400 if executor == "local" else 1000
    command, environment, process = start_extract(tmp_path, model, n, executor=executor)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 3, err
    assert f"{number.name}: no unit begins now; those that run have 20 s to finish" in err
    assert "units left; run the same command again to resume" in err
    assert "Traceback" not in err
    assert "died" not in err
    store = FeatureStore.open(str(tmp_path / "f.zarr"))
    n_done = len(store.receipts())
    assert 0 < n_done < len(store.units)
    assert f"{2 * n_done} samples in" in out
    local = [*command, "--executor", "local"]
    done = subprocess.run(local, env=environment, capture_output=True, text=True, check=True)
    assert f"{n - 2 * n_done} samples in" in done.stdout
    assert store.sealed
    assert store.verify(deep=True) == []


def test_a_second_signal_ends_the_run_at_once(tmp_path: Path, model: Path) -> None:
    _, _, process = start_extract(tmp_path, model, 400, executor="process")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3, err
    assert "again: ending at once; run the same command to resume" in err
    assert "Traceback" not in err
    assert not FeatureStore.open(str(tmp_path / "f.zarr")).sealed


def test_a_signal_before_units_run_ends_the_command(tmp_path: Path, model: Path) -> None:
    """While a file is waited for there is nothing to finish: exit 3, and nothing is left behind."""
    fifo = tmp_path / "p.yaml"
    os.mkfifo(fifo)
    process = subprocess.Popen(
        [sys.executable, "-m", "drl_data", "extract", str(fifo)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    with open(fifo, "w"):  # it has begun to read
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err.strip()) == (
        3,
        "interrupted; run the same command again to resume",
    )
