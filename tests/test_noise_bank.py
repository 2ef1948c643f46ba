"""Noise of a file or of torch's generator: the published code's own numbers, bit for bit."""

from __future__ import annotations

import io
import os
import pickle
import uuid
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from drl_data.diffusion_spec import ConditionSpec, NoiseSpec
from drl_data.errors import SpecError, StoreMismatchError
from drl_data.extract import make_task
from drl_data.noise import batch_noise, noise_table
from drl_data.noise_bank import bank_digest, read_bank
from drl_data.pipeline import Pipeline, RunSpec
from drl_data.runs import extract, prepare
from drl_data.spec import BackboneSpec
from drl_data.store import FeatureStore
from drl_data.testing import write_photo_tars
from drl_data.tiny_models import save_tiny_ddpm

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (4, 16, 16)
DDPM_SHAPE = (3, 16, 16)


def drawn(spec: NoiseSpec, shape: tuple[int, ...], n_timesteps: int = 1, **at: int) -> Tensor:
    table = noise_table(spec, shape, n_timesteps)
    noise = batch_noise(spec, ["a", "b"], shape, timestep=7, table=table, **at)
    assert noise is not None
    assert torch.equal(noise[0], noise[1])
    return noise[0]


# --- torch's generator: what published code draws -----------------------------------------------


def test_ddpm_segs_noise_is_seed_0_of_torch() -> None:
    """`FeatureExtractorDDPM` of DDPM-Seg: one tensor for all images and timesteps."""
    rnd_gen = torch.Generator("cpu").manual_seed(0)
    want = torch.randn(1, 3, 256, 256, generator=rnd_gen)
    got = drawn(NoiseSpec(kind="shared", generator="torch"), (3, 256, 256), 3, place=2)
    assert torch.equal(got, want[0])


def test_odises_noise_is_seed_42_of_torch_interpolated() -> None:
    """ODISE and sd-dino: 64 x 64, bicubic for latents of another size."""
    rng = torch.Generator().manual_seed(42)
    shared_noise = torch.randn(1, 4, 64, 64, generator=rng)
    want = F.interpolate(shared_noise, size=(96, 120), mode="bicubic", align_corners=False)
    spec = NoiseSpec(kind="shared", generator="torch", seed=42, shared_base=64)
    assert torch.equal(drawn(spec, (4, 96, 120)), want[0])
    assert torch.equal(drawn(spec, (4, 64, 64)), shared_noise[0])


def test_a_bank_is_numbered_as_diffusion_classifiers() -> None:
    """`eval_error` there: n_trials rows for each timestep, in the order of the timesteps."""
    ts, n_trials = [100, 300, 500], 2
    generator = torch.Generator().manual_seed(5)
    all_noise = torch.randn((len(ts) * n_trials, *SHAPE), generator=generator)
    noise_idxs = [
        list(range(n_trials * t_idx, n_trials * (t_idx + 1))) for t_idx, _ in enumerate(ts)
    ]
    spec = NoiseSpec(kind="bank", generator="torch", seed=5, members=n_trials)
    for place, rows in enumerate(noise_idxs):
        for member, row in enumerate(rows):
            got = drawn(spec, SHAPE, len(ts), place=place, member=member)
            assert torch.equal(got, all_noise[row])


def test_shared_noise_has_a_row_for_each_timestep_only_if_asked() -> None:
    spec = NoiseSpec(kind="shared", generator="torch")
    assert torch.equal(drawn(spec, SHAPE, 2, place=0), drawn(spec, SHAPE, 2, place=1))
    anew = NoiseSpec(kind="shared", generator="torch", per_timestep=True)
    assert not torch.equal(drawn(anew, SHAPE, 2, place=0), drawn(anew, SHAPE, 2, place=1))


def test_the_default_generator_has_no_table() -> None:
    assert noise_table(NoiseSpec(kind="shared"), SHAPE, 1) is None
    ours = batch_noise(NoiseSpec(kind="shared"), ["a"], SHAPE)
    assert ours is not None
    assert not torch.equal(ours[0], drawn(NoiseSpec(kind="shared", generator="torch"), SHAPE))


# --- files --------------------------------------------------------------------------------------


def bank_of(n: int, seed: int = 1, shape: tuple[int, ...] = DDPM_SHAPE) -> Tensor:
    return torch.randn((n, *shape), generator=torch.Generator().manual_seed(seed))


def write(path: Path, bank: Tensor) -> str:
    if path.suffix == ".npy":
        np.save(path, bank.numpy())
    elif path.suffix == ".safetensors":
        save_file({"noise": bank}, path)
    else:
        torch.save(bank, path)
    return str(path)


@pytest.mark.parametrize("name", ["b.npy", "b.safetensors", "b.pt", "b.pth"])
def test_every_format_gives_the_same_numbers_and_digest(tmp_path: Path, name: str) -> None:
    bank = bank_of(3)
    got = read_bank(write(tmp_path / name, bank))
    assert got.dtype == torch.float32
    assert torch.equal(got, bank)
    assert bank_digest(got) == bank_digest(bank)
    assert torch.equal(read_bank(write(tmp_path / f"half-{name}", bank.half())), bank.half())


def test_the_digest_is_of_numbers_and_shape_and_golden() -> None:
    """A digest that changes by itself would orphan every store that was made with a bank."""
    bank = torch.arange(16.0).reshape(1, 1, 4, 4)
    want = "sha256:d437ca1d03c86ea2"
    assert bank_digest(bank)[: len(want)] == want
    assert bank_digest(bank) != bank_digest(bank.reshape(1, 1, 2, 8))
    assert bank_digest(bank) != bank_digest(bank + 1)


def test_a_bank_may_lie_at_any_url() -> None:
    bank, url = bank_of(2), f"memory://{uuid.uuid4().hex}/bank.npy"
    buffer = io.BytesIO()
    np.save(buffer, bank.numpy())
    with fsspec.open(url, "wb") as file:
        file.write(buffer.getvalue())
    assert torch.equal(read_bank(url), bank)


class Runs:
    """Leaves a trace if a reader runs what a pickle says."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_bank_runs_no_code(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    for name in ("a.pt", "a.npy"):
        (tmp_path / name).write_bytes(pickle.dumps(Runs(trace), protocol=2))
    torch.save(Runs(trace), tmp_path / "b.pt")
    np.save(tmp_path / "b.npy", np.array([Runs(trace)]), allow_pickle=True)
    for name in ("a.pt", "b.pt", "a.npy", "b.npy"):
        with pytest.raises(SpecError, match=r"does not read as \."):
            read_bank(str(tmp_path / name))
    assert not trace.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.pt", torch.zeros(3, 16, 16), r"holds torch\.float32 \[3, 16, 16\]; want one tensor"),
        ("x.pt", torch.zeros(1, 3, 4, 4, dtype=torch.int64), r"holds torch\.int64"),
        ("x.pt", {"a": torch.zeros(1, 3, 4, 4)}, "holds <class 'dict'>"),
        ("x.pt", torch.full((1, 3, 4, 4), torch.inf), "holds numbers that are not finite"),
        ("x.bin", torch.zeros(1, 3, 4, 4), r"want a name that ends in \.npy, \.safetensors"),
    ],
)
def test_what_is_no_bank_is_refused(
    tmp_path: Path, name: str, content: object, message: str
) -> None:
    torch.save(content, tmp_path / name)
    with pytest.raises(SpecError, match=message):
        read_bank(str(tmp_path / name))


def test_a_missing_file_two_tensors_and_nonsense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"noise\.file .*: no such file"):
        read_bank(str(tmp_path / "none.npy"))
    save_file({"a": bank_of(1), "b": bank_of(1)}, tmp_path / "two.safetensors")
    with pytest.raises(SpecError, match="holds <class 'list'>"):
        read_bank(str(tmp_path / "two.safetensors"))
    for suffix in (".npy", ".safetensors", ".pt"):
        for content in (b"", b"nothing of the kind"):
            (tmp_path / f"bad{suffix}").write_bytes(content)
            with pytest.raises(SpecError, match=rf"does not read as \{suffix}"):
                read_bank(str(tmp_path / f"bad{suffix}"))


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        ({"generator": "torch"}, "have no meaning with kind: per_sample, only with shared and"),
        ({"kind": "uniform", "file": "b.npy"}, "have no meaning with kind: uniform"),
        ({"kind": "bank", "file": "b.npy", "generator": "torch"}, "exclude each other"),
    ],
)
def test_tables_go_with_noise_that_is_the_same_for_all(
    noise: dict[str, object], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        Pipeline.parse(
            {"name": "x", "dataset": {"tars": "a"}, "images": {"size": 8}, "noise": noise}
        )


def test_the_file_of_a_pipeline_is_relative_to_it(tmp_path: Path) -> None:
    data = {"name": "x", "dataset": {"tars": "a"}, "images": {"size": 8}}
    noise = {"kind": "bank", "file": "banks/b.npy"}
    got = Pipeline.parse({**data, "noise": noise}).relative_to(tmp_path).noise
    assert got == NoiseSpec(kind="bank", file=f"{tmp_path}/banks/b.npy")


# --- whole stores -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photo_tars(tmp_path_factory.mktemp("photos"), n_samples=4, n_tars=1)


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_ddpm(tmp_path_factory.mktemp("ddpm"))


def pipeline(photos: Path, ddpm: Path, store: Path, **noise: object) -> Pipeline:
    return Pipeline.parse(
        {
            "name": "test",
            "dataset": {"tars": str(photos / "*.tar")},
            "images": {"size": 16},
            "backbone": {"model": str(ddpm)},
            "schedule": {"timesteps": [400, 100]},
            "noise": noise,
            "taps": [{"path": "conv_in@in", "name": "x"}],
            "features": {"dtype": "float32", "batch_size": 4, "rows_per_unit": 4},
            "store": {"url": str(store)},
        }
    )


def noisy_inputs(store: FeatureStore) -> np.ndarray:
    """[t, sample, c, h, w]"""
    (unit,) = store.units
    return np.stack([store.read_unit("x", t, unit) for t in range(len(store.times))])


def test_each_timestep_is_corrupted_by_its_own_row(
    photos: Path, ddpm: Path, tmp_path: Path
) -> None:
    bank = bank_of(5)  # more than the 2 that are used
    file = write(tmp_path / "bank.npy", bank)
    got = extract(pipeline(photos, ddpm, tmp_path / "s", kind="bank", file=file)).store
    clean = extract(pipeline(photos, ddpm, tmp_path / "c", kind="none")).store
    for t, time in enumerate(got.times):
        x = torch.from_numpy(noisy_inputs(clean)[t])
        want = time.alpha * x + time.sigma * bank[t]
        assert torch.equal(torch.from_numpy(noisy_inputs(got)[t]), want)
    alone = extract(pipeline(photos, ddpm, tmp_path / "m", kind="shared", file=file)).store
    want = alone.times[1].alpha * x + alone.times[1].sigma * bank[0]
    assert torch.equal(torch.from_numpy(noisy_inputs(alone)[1]), want)


def test_a_store_of_torchs_generator_is_that_of_a_file_with_its_numbers(
    photos: Path, ddpm: Path, tmp_path: Path
) -> None:
    drawn_there = torch.randn((2, *DDPM_SHAPE), generator=torch.Generator().manual_seed(9))
    file = write(tmp_path / "bank.pt", drawn_there)
    by_file = extract(pipeline(photos, ddpm, tmp_path / "f", kind="bank", file=file)).store
    by_seed = pipeline(photos, ddpm, tmp_path / "g", kind="bank", generator="torch", seed=9)
    np.testing.assert_array_equal(noisy_inputs(by_file), noisy_inputs(extract(by_seed).store))


def test_the_fingerprint_is_that_of_the_numbers(photos: Path, ddpm: Path, tmp_path: Path) -> None:
    files = {
        "npy": write(tmp_path / "a.npy", bank_of(2)),
        "pt": write(tmp_path / "b.pt", bank_of(2)),
        "other": write(tmp_path / "c.npy", bank_of(2, seed=2)),
    }
    prints = {
        name: prepare(pipeline(photos, ddpm, tmp_path / "s", kind="bank", file=file)).spec
        for name, file in files.items()
    }
    assert prints["npy"].fingerprint() == prints["pt"].fingerprint()
    assert prints["npy"].fingerprint() != prints["other"].fingerprint()
    assert str(tmp_path) not in prints["npy"].noise.model_dump_json()
    drawn_here = prepare(pipeline(photos, ddpm, tmp_path / "s", kind="bank")).spec
    assert drawn_here.fingerprint() != prints["npy"].fingerprint()


def test_another_file_than_the_stores_is_refused(photos: Path, ddpm: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "a.npy", bank_of(2))
    url = str(tmp_path / "s")
    extract(pipeline(photos, ddpm, tmp_path / "s", kind="bank", file=file))
    told = (url, BackboneSpec(model=str(ddpm)), ConditionSpec(), RunSpec(), 1)
    other = write(tmp_path / "b.npy", bank_of(2, seed=2))
    for given in (None, other):
        with pytest.raises(StoreMismatchError, match=r"'noise': 'sha256:.*give the same files"):
            make_task(*told, noise_file=given)
    copy = write(tmp_path / "c.pt", bank_of(2))
    make_task(*told, noise_file=copy)


@pytest.mark.parametrize(
    ("bank", "message"),
    [
        (bank_of(1), r"holds \[1, 3, 16, 16\], want at least 2 rows .* of \[3, 16, 16\]"),
        (bank_of(2, shape=(4, 16, 16)), r"holds \[2, 4, 16, 16\], want at least 2"),
    ],
)
def test_a_bank_that_does_not_fit_is_refused_before_the_run(
    photos: Path, ddpm: Path, tmp_path: Path, bank: Tensor, message: str
) -> None:
    file = write(tmp_path / "a.npy", bank)
    with pytest.raises(SpecError, match=message):
        extract(pipeline(photos, ddpm, tmp_path / "s", kind="bank", file=file))
    assert not (tmp_path / "s").exists()
