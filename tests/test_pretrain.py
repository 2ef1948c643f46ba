from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from drl_data import pretrain as pretrain_module
from drl_data.errors import SpecError, WeightsError
from drl_data.index import SampleIndex, build_index
from drl_data.pipeline import PretrainSpec
from drl_data.pretrain import _batches_of_rows, pretrain
from drl_data.progress import SILENT, Progress
from drl_data.sampling import sample
from drl_data.spec import DatasetSpec, ImageSpec
from tests.toy_tars import write_tar

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
IMAGES = ImageSpec(size=(8, 8), mode="L")
MODEL = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": [8, 8],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    "dropout": 0.1,
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Networks this small only lose by more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def spec_of(folder: Path, **fields: object) -> PretrainSpec:
    settings = {
        "split": "train",
        "model": MODEL,
        "steps": 7,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "warmup_steps": 3,
        "checkpoint_every": 3,
        "output": str(folder),
    }
    return PretrainSpec.model_validate(settings | fields)


def bright_half(row: int) -> bytes:
    """Dark above, bright below: something that a network learns in seconds."""
    pixels = np.random.default_rng(row).integers(0, 20, (8, 8), dtype=np.uint8)
    pixels[4:] += 230
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    """Two tars of split `train` between others; one of 21 images does not decode."""
    folder = tmp_path_factory.mktemp("tars")
    members = [(f"{i}.png", bright_half(i)) for i in range(20)]
    first = write_tar(folder / "1.tar", members[:12])
    second = write_tar(folder / "2.tar", [*members[12:], ("bad.png", b"\x89PNG")])
    black = io.BytesIO()
    Image.new("L", (8, 8)).save(black, "png")
    other = write_tar(folder / "0.tar", [("a.png", black.getvalue())])
    after = write_tar(folder / "3.tar", [("a.png", black.getvalue())])
    tars = {"a": str(other), "train": [str(first), str(second)], "z": str(after)}
    return build_index(DatasetSpec.model_validate({"tars": tars}))


class Interrupting:
    """A progress that interrupts training after some steps, as a user would."""

    def __init__(self, after: int) -> None:
        self.after = after

    @contextmanager
    def bar(self, label: str, total: int, unit: str) -> Iterator[Interrupting]:
        self.left = self.after if label == "pretrain" else total + 1
        yield self

    def advance(self, n: int = 1, **numbers: float) -> None:
        self.left -= n
        if self.left <= 0:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def trained(index: SampleIndex, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "ddpm"
    return pretrain(spec_of(folder), index, IMAGES, device="cpu")


def test_the_folder_is_in_diffusers_layout(trained: Path, index: SampleIndex) -> None:
    files = sorted(str(path.relative_to(trained)) for path in trained.rglob("*") if path.is_file())
    assert files == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "training.json",
        "unet/config.json",
        WEIGHTS,
    ]
    pipeline = DDPMPipeline.from_pretrained(trained)
    assert pipeline.unet.config.block_out_channels == [8, 8]
    assert all(t.dtype == torch.float32 for t in load_file(trained / WEIGHTS).values())
    record = json.loads((trained / "training.json").read_text())
    assert record["dataset"] == index.digest()
    assert (record["n_images"], record["n_invalid"]) == (20, 1)
    assert record["loss"] > 0
    assert record["spec"]["steps"] == 7


@pytest.mark.parametrize("after", [1, 3, 4, 6])
def test_interrupted_and_resumed_is_the_same(
    trained: Path, index: SampleIndex, tmp_path: Path, after: int
) -> None:
    spec = spec_of(tmp_path / "ddpm")
    with pytest.raises(KeyboardInterrupt):
        pretrain(spec, index, IMAGES, device="cpu", progress=Interrupting(after))
    torch.manual_seed(after)  # whatever the process did in between
    resumed = pretrain(spec, index, IMAGES, device="cpu")
    assert (resumed / WEIGHTS).read_bytes() == (trained / WEIGHTS).read_bytes()
    records = [json.loads((f / "training.json").read_text()) for f in (resumed, trained)]
    assert records[0]["loss"] == records[1]["loss"]


def test_a_resumed_run_does_not_start_over(index: SampleIndex, tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "ddpm", checkpoint_every=6)
    with pytest.raises(KeyboardInterrupt):
        pretrain(spec, index, IMAGES, device="cpu", progress=Interrupting(7))
    checkpoint = tmp_path / "ddpm" / "checkpoint.safetensors"
    assert checkpoint.exists()
    steps: list[int] = []

    class Counting(Interrupting):
        def advance(self, n: int = 1, **numbers: float) -> None:
            steps.append(n)

    pretrain(spec, index, IMAGES, device="cpu", progress=Counting(0))
    assert steps[-2:] == [6, 1]
    assert not checkpoint.exists()


def test_a_complete_run_is_left_alone(trained: Path, index: SampleIndex) -> None:
    before = (trained / "training.json").stat().st_mtime_ns
    refuse: Progress = Interrupting(0)
    assert pretrain(spec_of(trained), index, IMAGES, device="cpu", progress=refuse) == trained
    assert (trained / "training.json").stat().st_mtime_ns == before


def test_another_training_in_the_folder_is_refused(
    trained: Path, index: SampleIndex, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match=r"training\.json is of another training.*\n  spec: "):
        pretrain(spec_of(trained, seed=1), index, IMAGES, device="cpu")
    folder = tmp_path / "ddpm"
    with pytest.raises(KeyboardInterrupt):
        pretrain(spec_of(folder), index, IMAGES, device="cpu", progress=Interrupting(5))
    with pytest.raises(SpecError, match=r"checkpoint\.safetensors is of another training"):
        pretrain(spec_of(folder, learning_rate=1.0), index, IMAGES, device="cpu")


def test_the_seed_decides_and_the_process_does_not(
    trained: Path, index: SampleIndex, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = pretrain(spec_of(tmp_path / "a"), index, IMAGES, device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert (again / WEIGHTS).read_bytes() == (trained / WEIGHTS).read_bytes()
    other = pretrain(spec_of(tmp_path / "b", seed=1), index, IMAGES, device="cpu")
    assert (other / WEIGHTS).read_bytes() != (trained / WEIGHTS).read_bytes()


def test_it_learns_and_samples(index: SampleIndex, tmp_path: Path) -> None:
    spec = spec_of(
        tmp_path / "ddpm",
        model=MODEL | {"block_out_channels": [16, 16], "dropout": 0.0},
        steps=200,
        batch_size=32,
        learning_rate=5e-3,
        ema_decay=0.95,
        checkpoint_every=1000,
    )
    folder = pretrain(spec, index, IMAGES, device="cpu")
    assert json.loads((folder / "training.json").read_text())["loss"] < 0.5
    drawn = sample(folder, 8, seed=1, steps=20, device="cpu")
    assert drawn.shape == (8, 1, 8, 8)
    assert drawn.dtype == np.uint8
    assert drawn[:, :, :4].mean() < 60
    assert drawn[:, :, 4:].mean() > 195
    np.testing.assert_array_equal(drawn, sample(folder, 8, seed=1, steps=20))
    assert (drawn != sample(folder, 8, seed=2, steps=20)).any()


@settings(deadline=None)
@given(n=st.integers(1, 30), batch_size=st.integers(1, 40), seed=st.integers(0, 5))
def test_each_epoch_has_every_row_once(n: int, batch_size: int, seed: int) -> None:
    batches = _batches_of_rows(n, batch_size, seed)
    rows = np.concatenate([next(batches) for _ in range(-(-3 * n // batch_size))])[: 3 * n]
    assert all(sorted(epoch) == list(range(n)) for epoch in rows.reshape(3, n))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"split": "training"}, r"no samples in split 'training'; splits: a, train, z"),
        ({"model": MODEL | {"in_channels": 3}}, r"\(3, 1, 8\), want \(1, 1, 8\)"),
        ({"model": MODEL | {"sample_size": 16}}, r"\(1, 1, 16\), want \(1, 1, 8\)"),
        ({"model": MODEL | {"depth": 3}}, r"not a UNet2DModel: .*depth"),
        ({"scheduler": {"betas": 1}}, r"DDPMScheduler has no betas"),
        ({"scheduler": {"prediction_type": "v_prediction"}}, r"want 'epsilon'"),
        ({"scheduler": {"clip_sample_range": 2.0}}, r"want \[-2\.0, 2\.0\]"),
        ({"output": "s3://bucket/x"}, r"not a local folder"),
    ],
)
def test_settings_that_do_not_fit(
    index: SampleIndex, tmp_path: Path, fields: dict[str, object], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        pretrain(spec_of(tmp_path / "x", **fields), index, IMAGES, device="cpu", progress=SILENT)


def test_a_set_over_the_budget_is_refused(
    index: SampleIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain_module, "MAX_PIXEL_BYTES", 21 * 64 - 1)
    with pytest.raises(SpecError, match=r"21 images are .* GiB"):
        pretrain(spec_of(tmp_path / "x"), index, IMAGES, device="cpu")


def test_sampling_from_nothing(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no diffusers folder with unet/"):
        sample(tmp_path, 1)
