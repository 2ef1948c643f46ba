"""The diffusion classifier: losses of a plain loop, staged pruning of a whole table, executors,
resumption, invalid images; and real digits, which it tells apart."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import tarfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DModel,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from drl_data import pair_losses, score_run
from drl_data.answers import Task
from drl_data.backbones.text import TextEncoders
from drl_data.backbones.unet import PixelUNetBackbone
from drl_data.cli import app
from drl_data.digits import write_digits
from drl_data.errors import SpecError, StoreMismatchError, UserError
from drl_data.features import FeatureComputer
from drl_data.index import build_index
from drl_data.noise import draw_normal
from drl_data.objects import open_folder
from drl_data.pipeline import Pipeline, PretrainSpec
from drl_data.plan import Unit
from drl_data.pretrain import pretrain
from drl_data.receipts import Receipt
from drl_data.report import write_report
from drl_data.runs import extract
from drl_data.score_run import rows_per_unit
from drl_data.score_spec import StageSpec
from drl_data.score_units import LossTable, losses_path, read_losses, rows_in
from drl_data.spec import DatasetSpec, ImageSpec, ResolvedTime
from drl_data.stages import Losses, Stage, StagedLosses, plan_stages
from drl_data.store import FeatureStore
from drl_data.tasks.score import ScoreRun, run_score
from drl_data.tasks.score_result import ScoreResult
from drl_data.testing import Schedule, write_photo_tars
from drl_data.threads import one_thread as with_one_thread
from drl_data.tiny_models import save_tiny
from drl_data.unit_jobs import UnitJob
from tests.test_families import told_by_sd3
from tests.test_stages import simulated

pytestmark = pytest.mark.usefixtures("one_thread")

N, N_CLASSES = 10, 7
TIMES = [50, 250, 450, 650, 850, 950]
STAGES = [[2, 4], [3, 2], [6, 1]]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photo_tars(tmp_path_factory.mktemp("photos"), n_samples=N, n_tars=2, size=16)


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights; its classes differ more than those of a new network would, and what it puts
    out is small, so that another class is the best of each draw of noise."""
    folder = save_tiny("ddpm", tmp_path_factory.mktemp("m") / "ddpm", num_class_embeds=N_CLASSES)
    network = UNet2DModel.from_pretrained(folder / "unet")
    network.class_embedding.weight.data.mul_(5)
    network.conv_out.weight.data.mul_(0.05)
    network.save_pretrained(folder / "unet")
    return folder


def pipeline(photos: Path, model: Path, out: Path, **changes: object) -> Pipeline:
    return Pipeline.parse(
        {
            "name": "score",
            "dataset": {"tars": str(photos / "*.tar")},
            "images": {"size": 16, "resize": "none"},
            "backbone": {"model": str(model)},
            "condition": {"candidates": {"classes": N_CLASSES}},
            "schedule": {"timesteps": TIMES},
            "noise": {"kind": "bank"},
            "taps": ["loss"],
            "features": {"dtype": "float32", "batch_size": 4, "rows_per_unit": 4},
            "store": {"url": str(out / "store.zarr")},
            "results": str(out / "results"),
            "score": {"stages": STAGES},
            **changes,
        }
    )


def whole_table(store: FeatureStore) -> Losses:
    """[image, candidate, timestep, member]."""
    parts = [
        np.stack([store.read_unit("loss", t, unit) for t in range(len(store.times))], 2)
        for unit in store.units
    ]
    return np.concatenate(parts)


def files(run: ScoreRun, given: Pipeline) -> dict[int, dict[int, list[float]]]:
    """{row: {candidate: losses}} of all units, by pyarrow alone."""
    found: dict[int, dict[int, list[float]]] = {}
    folder = open_folder(given.score.url or f"{given.results}/score")  # type: ignore[union-attr]
    for info in folder.list("losses"):
        for line in pq.read_table(pa.BufferReader(folder.get(info.path))).to_pylist():
            found.setdefault(line["row"], {})[line["candidate"]] = line["losses"]
    return found


def pictures(folder: Path) -> Tensor:
    """The photographs [n, 3, 16, 16] in -1 .. 1."""
    images = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith("jpg"):
                    data = tar.extractfile(member).read()  # type: ignore[union-attr]
                    images.append(np.array(Image.open(io.BytesIO(data))))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return pixels.float() / 255 * 2 - 1


def bank(shape: Sequence[int], member: int, t: float) -> Tensor:
    return torch.from_numpy(draw_normal(shape, "noise", 0, "bank", member, t))


# --- losses -------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_losses_are_those_of_a_plain_loop(
    photos: Path, ddpm: Path, tmp_path: Path, prediction: str
) -> None:
    """In diffusers, candidate by candidate; as far as the stages go."""
    model = tmp_path / "model"
    network = UNet2DModel.from_pretrained(ddpm / "unet").eval()
    network.save_pretrained(model / "unet")
    scheduler = DDPMScheduler(prediction_type=prediction)
    scheduler.save_pretrained(model / "scheduler")
    given = pipeline(photos, model, tmp_path, noise={"kind": "bank", "members": 2})
    run = run_score(given)
    assert (run.failed, run.invalid, run.n_left) == ([], [], 0)
    found = files(run, given)
    specs = [StageSpec(timesteps=n, keep=k) for n, k in STAGES]
    plan = plan_stages(specs, 6)
    images = pictures(photos)
    want = torch.empty(N, N_CLASSES, 6, 2)
    order = [place for stage in plan for place in stage.places]
    for k, place in enumerate(order):
        t = torch.full((N,), TIMES[place])
        for member in range(2):
            eps = bank((3, 16, 16), member, TIMES[place]).expand(N, 3, 16, 16)
            noisy = scheduler.add_noise(images, eps, t)
            target = eps if prediction == "epsilon" else scheduler.get_velocity(images, eps, t)
            for candidate in range(N_CLASSES):
                out = network(noisy, t, class_labels=torch.full((N,), candidate)).sample
                error = (out - target).square().mean((1, 2, 3))
                want[:, candidate, k, member] = error
    lengths = set()
    for row in range(N):
        assert sorted(found[row]) == list(range(N_CLASSES))
        for candidate, losses in found[row].items():
            one = want[row, candidate].reshape(-1)[: len(losses)]
            np.testing.assert_allclose(losses, one, rtol=2e-5)
            lengths.add(len(losses))
    assert lengths == {2 * sum(len(s.places) for s in plan[:i]) for i in (1, 2, 3)}


@torch.no_grad()
def test_losses_of_a_flow_over_prompts(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SD3: velocity, a VAE that encodes each image once, each prompt encoded once."""
    model = save_tiny("sd3", tmp_path / "sd3")
    encoded: list[int] = []
    prompts: list[str] = []
    plain_encode, plain_clip = FeatureComputer.encode, TextEncoders.clip

    def encode(self: FeatureComputer, pixels: np.ndarray, keys: Sequence[str]) -> list[Tensor]:
        encoded.extend(range(len([key for key in keys if key])))
        return plain_encode(self, pixels, keys)

    def clip(self: TextEncoders, suffix: str, prompt: str, **rest: bool) -> object:
        if not suffix:
            prompts.append(prompt)
        return plain_clip(self, suffix, prompt, **rest)

    monkeypatch.setattr(FeatureComputer, "encode", encode)
    monkeypatch.setattr(TextEncoders, "clip", clip)
    given = pipeline(
        photos,
        model,
        tmp_path,
        latents={"posterior": "mean"},
        condition={"template": "A small {label}", "candidates": ["cat", "dog", "emu"]},
        schedule={"convention": "flow", "timesteps": {"even": 4, "of": 1}},
        noise={"kind": "bank"},
        score={"stages": [[2, 2], [4, 1]]},
    )
    run = run_score(given)
    assert len(encoded) == N
    assert prompts == ["A small cat", "A small dog", "A small emu"]
    found = files(run, given)
    vae = AutoencoderKL.from_pretrained(model / "vae").eval()
    network = SD3Transformer2DModel.from_pretrained(model / "transformer").eval()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    clean = (vae.encode(pictures(photos)).latent_dist.mean - 0.0609) * 1.5305
    told = told_by_sd3(model)  # of "A small cat"
    for row in range(N):
        for k, t in enumerate((0.375, 0.875, 0.125, 0.625)[: len(found[row][0])]):
            eps = bank((16, 8, 8), 0, t)[None]
            noisy = scheduler.scale_noise(clean[row : row + 1], torch.tensor([1000 * t]), eps)
            out = network(noisy, timestep=torch.tensor([1000 * t]), **told).sample
            want = float((out - (eps - clean[row : row + 1])).square().mean())
            assert found[row][0][k] == pytest.approx(want, rel=1e-4)
        assert sorted(len(losses) for losses in found[row].values()) == [2, 4, 4]


# --- pruning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bank", "per_sample"])
def test_stages_are_the_whole_table_restricted(
    photos: Path, ddpm: Path, tmp_path: Path, kind: str
) -> None:
    given = pipeline(photos, ddpm, tmp_path, noise={"kind": kind, "members": 2})
    table = whole_table(extract(given).store)
    run = run_score(given)
    assert run.result is not None
    found = files(run, given)
    specs = [StageSpec(timesteps=n, keep=k) for n, k in STAGES]
    plan = plan_stages(specs, len(TIMES))
    order = [place for stage in plan for place in stage.places]
    predictions = pq.read_table(f"{given.results}/score.parquet").to_pydict()
    cost = 0
    for row in range(N):
        winner, alive = simulated(table[row], plan, [1] * len(TIMES))
        assert predictions["top"][row][0] == winner
        for candidate in range(N_CLASSES):
            reached = sum(candidate in one for one in alive)
            n_seen = sum(len(stage.places) for stage in plan[:reached])
            want = table[row, candidate, order[:n_seen]].reshape(-1)
            np.testing.assert_allclose(found[row][candidate], want, rtol=1e-5)
            cost += 2 * n_seen
    assert run.result.cost.n_evaluations == cost == sum(predictions["n_evaluations"])
    assert run.result.cost.n_full == table.size
    # in the first stage, where nothing is dropped, a full batch has the very forwards of the table
    first = len(plan[0].places) * 2
    for row in range(8):
        for candidate in range(N_CLASSES):
            got = np.array(found[row][candidate][:first], np.float32)
            want = table[row, candidate, list(plan[0].places)].reshape(-1)
            np.testing.assert_array_equal(got, want)


def test_the_full_budget_is_the_unpruned_answer(photos: Path, ddpm: Path, tmp_path: Path) -> None:
    noise = {"kind": "per_sample", "members": 2}
    whole = pipeline(photos, ddpm, tmp_path / "a", score={}, noise=noise)
    extract(whole)
    one = run_score(whole).result
    other = pipeline(photos, ddpm, tmp_path / "b", score={"stages": [6]}, noise=noise)
    two = run_score(other).result
    assert one is not None
    assert two is not None
    tables = [pq.read_table(tmp_path / part / "results/score.parquet") for part in "ab"]
    for column in tables[0].column_names:
        if column == "top_losses":
            a, b = (np.array(t[column].to_pylist()) for t in tables)
            np.testing.assert_allclose(a, b, rtol=1e-6)
        else:
            assert tables[0][column].equals(tables[1][column]), column
    assert (one.splits, one.cost, one.curve) == (two.splits, two.cost, two.curve)
    assert one.timesteps == two.timesteps
    assert len(set(tables[0]["predicted"].to_pylist())) > 1


def test_weights_change_who_is_dropped(photos: Path, ddpm: Path, tmp_path: Path) -> None:
    weights = [0.0, 0, 0, 0, 1, 0]
    given = pipeline(photos, ddpm, tmp_path, noise={"kind": "per_sample"},
                     score={"stages": [[2, 3], [6, 1]], "weights": weights})  # fmt: skip
    table = whole_table(extract(given).store)
    run_score(given)
    plan = plan_stages([StageSpec(timesteps=2, keep=3), StageSpec(timesteps=6)], 6)
    top = pq.read_table(f"{given.results}/score.parquet")["top"].to_pylist()
    assert [line[0] for line in top] == [simulated(x, plan, weights)[0] for x in table]


def test_many_candidates(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 classes: two timesteps for all, then 20, then 2; what they are told stays on the host
    if it is large."""
    folder = save_tiny("ddpm", tmp_path / "m", num_class_embeds=1000, block_out_channels=(8, 8))
    given = pipeline(
        photos,
        folder,
        tmp_path,
        condition={"candidates": {"classes": 1000}},
        noise={"kind": "bank"},
        features={"batch_size": 250},
        score={"stages": [[1, 20], [2, 2], [6, 1]]},
        dataset={"tars": str(photos / "photos-000000.tar")},
        images={"size": 8, "resize": "stretch"},
    )
    run = run_score(given)
    assert run.result is not None
    found = files(run, given)
    lengths = sorted(len(x) for x in found[0].values())
    seen = plan_stages([StageSpec(timesteps=n, keep=1) for n in (1, 2, 6)], 6)
    ends = np.cumsum([len(stage.places) for stage in seen]).tolist()
    assert lengths == [ends[0]] * 980 + [ends[1]] * 18 + [ends[2]] * 2
    assert run.result.cost.n_evaluations == 5 * sum(lengths)
    assert run.result.confusion is None
    assert run.result.splits[0].top5 is not None
    monkeypatch.setattr(pair_losses, "TOLD_BYTES", 0)
    other = given.model_copy(update={"results": str(tmp_path / "other")})
    assert files(run_score(other), other) == found


def test_units_of_some_thousand_evaluations() -> None:
    stages = [Stage((1, 2), keep=10), Stage((0, 3, 4, 5))]
    # 100 candidates x 2 + 10 x 4 = 240, with two members 480
    assert rows_per_unit(stages, (100, 2), 8) == score_run.EVALUATIONS_PER_UNIT // 480 // 8 * 8
    assert rows_per_unit(stages, (10**6, 1), 8) == 8
    assert rows_per_unit([Stage((0,))], (1, 1), 32) == 16384


# --- runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", ["process", pytest.param("ray", marks=pytest.mark.ray)])
def test_every_executor_finds_the_same(
    photos: Path, ddpm: Path, tmp_path: Path, executor: str, request: pytest.FixtureRequest
) -> None:
    if executor == "ray":
        request.getfixturevalue("local_ray")
    here = pipeline(photos, ddpm, tmp_path / "local")
    there = pipeline(photos, ddpm, tmp_path / executor, run={"executor": executor, "workers": 2})
    want, got = run_score(here), run_score(there)
    assert got.n_pending == 3
    assert got.result is not None
    assert want.result is not None
    assert files(got, there) == files(want, here)
    assert got.result.fingerprint == want.result.fingerprint
    places = [tmp_path / name / "results/score.parquet" for name in ("local", executor)]
    tables = [pq.read_table(place) for place in places]
    assert tables[0].equals(tables[1])


def test_a_run_is_resumed_and_nothing_is_done_twice(
    photos: Path, ddpm: Path, folder_url: str, tmp_path: Path
) -> None:
    given = pipeline(photos, ddpm, tmp_path, score={"stages": STAGES, "url": folder_url})
    first = run_score(given, part=(1, 3))
    assert (first.n_units, first.n_pending, first.result) == (1, 1, None)
    job = UnitJob.open(folder_url)
    receipt = job.receipt(Unit(1, 4, 8))
    rest = run_score(given)
    assert (rest.n_units, rest.n_pending) == (3, 2)
    assert rest.result is not None
    assert job.receipt(Unit(1, 4, 8)) == receipt
    again = run_score(given)
    assert (again.n_pending, again.n_left) == (0, 0)
    skip = {"seconds"}
    assert again.result is not None
    assert again.result.model_dump(exclude=skip) == rest.result.model_dump(exclude=skip)
    assert job.problems() == []
    assert all(r.run.seconds["denoise"] > 0 and r.counts.samples for r in job.receipts())
    plain = pipeline(photos, ddpm, tmp_path / "plain")
    assert files(run_score(plain), plain) == files(rest, given)


def test_the_first_images_alone(photos: Path, ddpm: Path, tmp_path: Path) -> None:
    given = pipeline(photos, ddpm, tmp_path)
    run = run_score(given, limit=5)
    assert run.result is not None
    assert (run.n_units, run.result.n_images) == (2, 8)


def test_another_job_in_the_folder_is_refused(photos: Path, ddpm: Path, tmp_path: Path) -> None:
    run_score(pipeline(photos, ddpm, tmp_path), limit=1)
    other = pipeline(photos, ddpm, tmp_path, score={"stages": [[2, 5], [6, 1]]})
    with pytest.raises(StoreMismatchError, match=r"stages\[0\].keep: 4 != 5"):
        run_score(other)
    weighted = pipeline(photos, ddpm, tmp_path, score={"stages": STAGES, "weights": "exp"})
    with pytest.raises(StoreMismatchError, match="weights"):
        run_score(weighted)


def test_a_failed_unit_is_listed_and_the_rest_is_done(
    photos: Path, ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = score_run.make_score_task

    def failing(*args: object, **rest: object) -> Task[Receipt | None]:
        make = partial(plain, *args, **rest)  # type: ignore[arg-type]
        return Schedule(make, {(1, 1): "fail", (2, 1): "error"})()

    given = pipeline(photos, ddpm, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(score_run, "make_score_task", failing)
        run = run_score(given)
    assert [unit.id for unit, _ in run.failed] == [2]
    assert "scheduled error" in run.failed[0][1]
    assert run.result is None
    again = run_score(given)
    assert (again.n_pending, again.failed) == (1, [])
    assert again.result is not None


def test_images_that_do_not_decode_are_listed(ddpm: Path, tmp_path: Path) -> None:
    photos = write_photo_tars(tmp_path / "photos", n_samples=6, n_tars=1, size=16)
    (path,) = photos.glob("*.tar")
    with tarfile.open(path) as tar:
        members = [(m, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
    with tarfile.open(path, "w") as tar:
        for member, data in members:
            data = b"\xff\xd8 no" if member.name == "crop-0004.jpg" else data
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    given = pipeline(photos, ddpm, tmp_path)
    run = run_score(given)
    assert [(row.row, row.key, row.stage) for row in run.invalid] == [(4, "crop-0004", "decode")]
    assert run.result is not None
    assert run.result.n_images == 5
    assert sorted(files(run, given)) == [0, 1, 2, 3, 5]
    assert sum(r.n_ok + r.n_invalid for r in UnitJob.open(f"{given.results}/score").receipts()) == 6


def test_a_split_is_scored_alone(photos: Path, ddpm: Path, tmp_path: Path) -> None:
    """Its rows keep their numbers; those that do not decode, too."""
    tars = {f"s{i}": str(photos / f"photos-{i:06d}.tar") for i in range(2)}
    both = {"dataset": {"tars": tars}}
    given = pipeline(photos, ddpm, tmp_path, score={"stages": STAGES, "split": "s1"}, **both)
    run = run_score(given)
    assert run.result is not None
    assert [(one.split, one.n_images) for one in run.result.splits] == [("s1", 5)]
    assert sorted(files(run, given)) == list(range(5, 10))
    all_of_them = pipeline(photos, ddpm, tmp_path / "all", **both)
    everything = files(run_score(all_of_them), all_of_them)
    for row in range(5, 10):
        for candidate, losses in everything[row].items():
            np.testing.assert_allclose(files(run, given)[row][candidate], losses, rtol=1e-5)
    with pytest.raises(SpecError, match="no samples in 's2'; splits: s0, s1"):
        run_score(pipeline(photos, ddpm, tmp_path / "x", score={"stages": STAGES, "split": "s2"},
                           **both))  # fmt: skip


@pytest.fixture
def broken_class(ddpm: Path, tmp_path: Path) -> Path:
    """A model whose class 3 gives NaN."""
    model = tmp_path / "nan"
    network = UNet2DModel.from_pretrained(ddpm / "unet")
    network.class_embedding.weight.data[3] = torch.nan
    network.save_pretrained(model / "unet")
    DDPMScheduler().save_pretrained(model / "scheduler")
    return model


def test_losses_that_are_not_finite(photos: Path, broken_class: Path, tmp_path: Path) -> None:
    numbers = {"dtype": "float32", "batch_size": 4, "rows_per_unit": 4}
    run = run_score(pipeline(photos, broken_class, tmp_path))
    assert len(run.failed) == 3
    assert "candidate 3 at timestep 250 is not finite; set" in run.failed[0][1]
    listed = pipeline(photos, broken_class, tmp_path / "b",
                      features=numbers | {"non_finite": "invalid"})  # fmt: skip
    run = run_score(listed)
    assert [row.row for row in run.invalid] == list(range(N))
    assert {row.stage for row in run.invalid} == {"denoise"}
    assert (run.failed, run.result) == ([], None)
    with pytest.raises(SpecError, match="would become a number, and win"):
        run_score(pipeline(photos, broken_class, tmp_path / "c",
                           features=numbers | {"non_finite": "clip"}))  # fmt: skip
    stored = pipeline(photos, broken_class, tmp_path / "d", score={},
                      features=numbers | {"non_finite": "clip"})  # fmt: skip
    extract(stored)
    with pytest.raises(SpecError, match="unit 0 has losses that were not finite"):
        run_score(stored)


class OneAtATime:
    """A device on which forwards of two images find no memory."""

    def __init__(self, plain: object) -> None:
        self.plain, self.sizes = plain, []  # type: ignore[var-annotated]

    def forward(self, backbone: PixelUNetBackbone, x: Tensor, *rest: object) -> object:
        self.sizes.append(len(x))
        if len(x) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.plain(backbone, x, *rest)  # type: ignore[operator]


def test_micro_batches_do_not_change_the_result(
    photos: Path, ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = pipeline(photos, ddpm, tmp_path / "a")
    want = files(run_score(here), here)
    device = OneAtATime(PixelUNetBackbone.forward)
    monkeypatch.setattr(
        PixelUNetBackbone, "forward", lambda self, *args: device.forward(self, *args)
    )
    small = pipeline(photos, ddpm, tmp_path / "b")
    run = run_score(small)
    assert run.failed == []
    assert {4, 2, 1} == set(device.sizes)
    got = files(run, small)
    for row, candidates in want.items():
        for candidate, losses in candidates.items():
            np.testing.assert_allclose(got[row][candidate], losses, rtol=1e-5)
    assert (
        max(r.run.micro_batch or 0 for r in UnitJob.open(f"{small.results}/score").receipts()) == 1
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": None}, "lacks score"),
        ({"images": {"size": 16, "resize": "none", "views": ["id"]}}, "leave out images.views"),
        ({"score": {"stages": [7]}}, "7 timesteps, schedule.timesteps has 6"),
        ({"score": {"stages": [6], "weights": [1, 2]}}, "2 for 6 timesteps"),
        ({"score": {"stages": [6], "labels": [1]}}, "1 for 7 candidates"),
        ({"taps": ["loss", "loss.l1"]}, r"want one of them"),
        ({"taps": ["loss", "loss.l1"], "score": {"stages": [6], "tap": "x"}}, "'x'"),
        ({"noise": {"kind": "none"}}, "adds no noise to be predicted"),
        ({"condition": {"class_label": 1}}, "scores images against condition.candidates"),
        ({"schedule": None}, "lacks schedule"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    photos: Path, ddpm: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        run_score(pipeline(photos, ddpm, tmp_path, **changes))
    assert not (tmp_path / "results" / "score" / "losses").exists()


def test_what_a_store_cannot_be_asked(photos: Path, ddpm: Path, tmp_path: Path) -> None:
    given = pipeline(photos, ddpm, tmp_path, score={})
    with pytest.raises(UserError, match="no store at"):
        run_score(given)
    extract(given, limit=1)
    with pytest.raises(UserError, match=r"2 of 3 units .* are not computed yet"):
        run_score(given)
    extract(given)
    with pytest.raises(SpecError, match="a store is read whole"):
        run_score(given, limit=3)
    with pytest.raises(SpecError, match=r"has the tables \['loss'\]"):
        run_score(pipeline(photos, ddpm, tmp_path, score={"tap": "other"}))
    with pytest.raises(SpecError, match="no test of it"):
        run_score(pipeline(photos, ddpm, tmp_path,
                           score={"split": "all", "weights": {"split": "all"}}))  # fmt: skip
    with pytest.raises(SpecError, match="is a feature store"):
        run_score(pipeline(photos, ddpm, tmp_path,
                           score={"stages": [6], "url": str(tmp_path / "store.zarr")}))  # fmt: skip


# --- the files ----------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.data())
def test_a_units_file_is_read_as_written(data: st.DataObject) -> None:
    n, n_candidates, n_members = (data.draw(st.integers(1, m)) for m in (6, 4, 2))
    sizes = [1, *data.draw(st.lists(st.integers(0, 3), max_size=2))]
    ends = np.cumsum(sizes)
    stages, start = [], 0
    for size in sizes:
        stages.append(Stage(tuple(range(start, start + size))))
        start += size
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    stage_bc = rng.integers(1, len(sizes) + 1, (n, n_candidates)).astype(np.int16)
    lost = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    stage_bc[lost] = 0
    losses = rng.random((n, n_candidates, start, n_members), np.float32)
    losses[np.arange(start) >= np.concatenate([[0], ends])[stage_bc][:, :, None]] = np.nan
    table = LossTable()
    half = n // 2
    for part in (slice(0, half), slice(half, n)):
        table.add(
            100 + np.arange(n)[part], StagedLosses(losses[part], stage_bc[part], tuple(stages))
        )
    times = [
        ResolvedTime(requested=t, convention="x", model_time=t, alpha=1, sigma=1)
        for t in range(start)
    ]
    file = table.to_parquet(stages, times)
    about = pq.read_schema(pa.BufferReader(file)).metadata
    assert json.loads(about[b"timesteps"]) == list(range(start))
    assert rows_in(file, 100) == np.flatnonzero(~lost).tolist()
    max_bytes = data.draw(st.sampled_from([1, 10**6]))
    got = list(read_losses(file, stages, n_candidates, n_members, max_bytes))
    rows = np.concatenate([rows for rows, _ in got]) if got else np.empty(0, np.int64)
    np.testing.assert_array_equal(rows, 100 + np.flatnonzero(~lost))
    if got:
        np.testing.assert_array_equal(
            np.concatenate([part.losses_bckm for _, part in got]), losses[~lost]
        )
        np.testing.assert_array_equal(
            np.concatenate([part.stage_bc for _, part in got]), stage_bc[~lost]
        )


# --- real digits --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional DDPM of 8 px digits, trained in seconds on the train split, and its
    tars."""
    folder = tmp_path_factory.mktemp("digits")
    patterns = write_digits(folder / "data")
    index = build_index(DatasetSpec.model_validate({"tars": patterns, "label": "cls"}))
    spec = PretrainSpec.model_validate(
        {
            "classes": {"dropout": 0.1},
            "model": {
                "sample_size": 8,
                "in_channels": 1,
                "out_channels": 1,
                "layers_per_block": 1,
                "block_out_channels": [16, 32],
                "down_block_types": ["DownBlock2D", "DownBlock2D"],
                "up_block_types": ["UpBlock2D", "UpBlock2D"],
                "attention_head_dim": 8,
                "norm_num_groups": 8,
                "dropout": 0.0,
            },
            "scheduler": {"beta_schedule": "squaredcos_cap_v2"},
            "steps": 150,
            "batch_size": 64,
            "learning_rate": 3e-3,
            "warmup_steps": 20,
            "ema_decay": 0.98,
            "output": str(folder / "ddpm"),
        }
    )
    with with_one_thread():
        pretrain(spec, index, ImageSpec(size=(8, 8), mode="L", resize="stretch"), device="cpu")
    with tarfile.open(folder / "data/train-000001.tar") as source:
        members = [(m, source.extractfile(m)) for m in source.getmembers()[: 2 * 100]]
        with tarfile.open(folder / "data/learn.tar", "w") as target:
            for member, file in members:
                target.addfile(member, file)
    return folder


def of_digits(folder: Path, out: Path, **score: object) -> Pipeline:
    data = folder / "data"
    return Pipeline.parse(
        {
            "name": "digits",
            "dataset": {
                "tars": {"learn": str(data / "learn.tar"), "test": str(data / "test-*.tar")},
                "label": "cls",
            },
            "images": {"size": 8, "mode": "L", "resize": "stretch"},
            "backbone": {"model": str(folder / "ddpm")},
            "condition": {"candidates": {"classes": 10}},
            "schedule": {"timesteps": {"even": 6, "of": 1000}},
            "noise": {"kind": "bank"},
            "taps": ["loss"],
            "features": {"dtype": "float32", "batch_size": 40, "rows_per_unit": 120},
            "store": {"url": str(folder / "digits.zarr")},
            "results": str(out),
            "score": score,
        }
    )


@pytest.fixture(scope="module")
def scored(digits: Path) -> Path:
    """The whole table of the test digits and of 100 others."""
    with with_one_thread():
        extract(of_digits(digits, digits / "results"))
    return digits


def test_it_tells_digits_apart(scored: Path, tmp_path: Path) -> None:
    """Held-out digits, and chance where the candidates' labels are shuffled."""
    right = run_score(of_digits(scored, tmp_path / "a", split="test")).result
    assert right is not None
    (test,) = right.splits
    assert (test.split, test.n_images, test.n_judged) == ("test", 360, 360)
    assert test.top1 is not None
    assert test.top1 > 0.8
    assert test.top5 is not None
    assert test.top5 > 0.97
    assert test.top1_interval is not None
    assert test.top1_interval[0] < test.top1 < test.top1_interval[1]
    by_time = [one.top1 for one in right.timesteps]
    assert max(by_time[2:5]) > max(by_time[0], by_time[5]) + 0.1  # the middle tells most
    assert right.curve[-1].top1 == test.top1
    assert right.curve[-1].behind == right.curve[-1].behind_half == 0
    assert sum(map(sum, right.confusion or ())) == 360
    shuffled = [3, 7, 0, 9, 1, 8, 2, 5, 4, 6]  # none is its own
    wrong = run_score(of_digits(scored, tmp_path / "b", split="test", labels=shuffled)).result
    assert wrong is not None
    assert wrong.splits[0].top1 is not None
    assert wrong.splits[0].top1 < 0.1


def test_pruning_digits_costs_less_and_answers_alike(scored: Path, tmp_path: Path) -> None:
    whole = run_score(of_digits(scored, tmp_path / "a", split="test")).result
    pruned = run_score(
        of_digits(scored, tmp_path / "b", split="test", stages=[[2, 4], [6, 1]])
    ).result
    assert whole is not None
    assert pruned is not None
    assert pruned.cost.n_evaluations == 360 * (10 * 2 + 4 * 4)
    assert pruned.cost.n_full == whole.cost.n_evaluations == 360 * 60
    assert pruned.splits[0].top1 is not None
    assert whole.splits[0].top1 is not None
    assert abs(pruned.splits[0].top1 - whole.splits[0].top1) < 0.1


def test_weights_are_learned_on_a_split(scored: Path, tmp_path: Path) -> None:
    plain = run_score(of_digits(scored, tmp_path / "a", split="test")).result
    learned = run_score(of_digits(scored, tmp_path / "b", weights={"split": "learn"})).result
    assert plain is not None
    assert learned is not None
    assert [one.split for one in learned.splits] == ["test"]  # rows that it learns on are no test
    assert learned.splits[0].top1 is not None
    assert plain.splits[0].top1 is not None
    assert learned.splits[0].top1 > plain.splits[0].top1 - 0.02
    assert sum(learned.weights) == pytest.approx(1)
    best = max(plain.timesteps, key=lambda one: one.top1).timestep
    weights = {one.timestep: one.weight for one in learned.timesteps}
    assert weights[best] > min(weights.values())


def test_the_report(scored: Path, tmp_path: Path) -> None:
    """Of a store; and of stages over the samples of the store."""
    given = of_digits(scored, tmp_path, split="test")
    result = run_score(given).result
    assert result is not None
    page = write_report(given).read_text()
    section = page.split('<section id="score">')[1].split("</section>")[0]
    assert "from the whole table of losses" in section
    assert f"<b>{result.splits[0].top1:.1%}</b>".replace("%", " %") in section
    assert section.count("<svg") == 2
    right = re.findall(r'title="(.) taken for (.)">(\d*)<', section)
    assert len(right) == 100
    assert sum(int(n or 0) for a, b, n in right if a == b) == sum(
        line[i] for i, line in enumerate(result.confusion or ())
    )
    assert section.count('src="data:image/png') == len(result.examples) == 10
    assert section.count("(wrong)") == min(5, 360 - round(360 * (result.splits[0].top1 or 0)))
    staged = of_digits(scored, tmp_path, split="test", stages=[[2, 3], {"timesteps": 6}])
    run_score(staged, limit=40)
    assert "in 2 stages (2 timesteps, keep 3; 6 timesteps)" in write_report(staged).read_text()
    shown = ScoreResult.load(tmp_path / "score.json")
    shown.model_copy(update={"dataset": "f" * 64}).save(tmp_path / "score.json")
    assert 'id="score"' not in write_report(staged).read_text()


def test_the_verb(scored: Path, tmp_path: Path) -> None:
    given = of_digits(scored, tmp_path / "results", split="test", stages=[[2, 3], [6, 1]])
    file = tmp_path / "digits.yaml"
    file.write_text(given.model_dump_json(exclude_none=True, exclude_defaults=True))
    part = CliRunner().invoke(app, ["score", str(file), "--units", "0/3"])
    assert part.exit_code == 0, part.output
    assert "no result before all have" in " ".join(part.output.split())
    done = CliRunner().invoke(app, ["score", str(file), "--executor", "local"])
    assert done.exit_code == 0, done.output
    assert "test   360     360" in done.output
    assert "of the 21,600 of all" in done.output
    result = ScoreResult.load(tmp_path / "results" / "score.json")
    table = pq.read_table(tmp_path / "results" / result.table)
    assert table["correct"].to_pylist().count(True) / 360 == pytest.approx(result.splits[0].top1)
    assert dataclasses.asdict(UnitJob.open(str(tmp_path / "results/score")).units[0])["stop"] == 120
    assert losses_path(Unit(2, 0, 1)) == "losses/00000002.parquet"
