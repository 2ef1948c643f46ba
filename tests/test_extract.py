"""Extraction: the store equals a straight loop, however it was computed."""

from __future__ import annotations

import io
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import CLIPTextModel, CLIPTokenizer

from drl_data.backbones import ModelFolder, load_backbone
from drl_data.datasets import FeatureStream
from drl_data.diffusion_spec import ConditionSpec, ScheduleSpec
from drl_data.errors import SpecError, StoreMismatchError, TapError
from drl_data.extract import make_task
from drl_data.features import FeatureComputer
from drl_data.metering import ByteBudget
from drl_data.noise import draw_normal
from drl_data.objects import open_folder
from drl_data.pipeline import Pipeline, RunSpec, StoreSpec
from drl_data.plan import Lease
from drl_data.runs import RunSummary, extract, prepare
from drl_data.spec import BackboneSpec, FeatureSpec
from drl_data.store import FeatureStore
from drl_data.taps import resolve
from drl_data.testing import write_photo_tars
from drl_data.tiny_models import save_tiny_ddpm, save_tiny_stable_diffusion

N_SAMPLES = 22


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tars with 22 crops of photographs."""
    return write_photo_tars(tmp_path_factory.mktemp("photos"), n_samples=N_SAMPLES)


@pytest.fixture(scope="session")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion."""
    return save_tiny_stable_diffusion(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="session")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pixel-space DDPM."""
    return save_tiny_ddpm(tmp_path_factory.mktemp("ddpm"))


def pipeline(photos: Path, model: Path, store: Path, **changes: object) -> Pipeline:
    data: dict[str, object] = {
        "name": "test",
        "dataset": {"tars": str(photos / "*.tar")},
        "images": {"size": 16},
        "backbone": {"model": str(model)},
        "schedule": {"timesteps": [0, 300]},
        "taps": ["mid_block", {"path": "up_blocks.*", "reduce": "avg_pool(4)"}],
        "features": {"dtype": "float32", "batch_size": 4, "rows_per_unit": 8},
        "store": {"url": str(store)},
    }
    return Pipeline.parse({**data, **changes})


def arrays_of(store: FeatureStore) -> dict[str, np.ndarray]:
    """{array: [t, row, ...]} of the whole store."""
    return {
        array.name: np.stack(
            [
                np.concatenate([store.read_unit(array.name, t, unit) for unit in store.units])
                for t in range(len(store.times))
            ]
        )
        for array in store.arrays
    }


def assert_same_store(a: FeatureStore, b: FeatureStore) -> None:
    """Every array bit for bit, every receipt but for its timings."""
    assert a.fingerprint == b.fingerprint
    left, right = arrays_of(a), arrays_of(b)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name].view(np.uint8), right[name].view(np.uint8), name)
    mine, theirs = a.receipts(), b.receipts()
    assert {k: r.content() for k, r in mine.items()} == {k: r.content() for k, r in theirs.items()}
    assert a.sealed
    assert b.sealed


def test_store_equals_a_straight_loop_of_plain_diffusers(
    photos: Path, sd: Path, tmp_path: Path
) -> None:
    """No drl_data code but the noise's definition: one image at a time would round otherwise, so
    the loop uses the batches that the spec names (4 rows, the last one of a unit padded)."""
    store = extract(pipeline(photos, sd, tmp_path / "s.zarr")).store
    got = arrays_of(store)

    images = []
    for path in sorted(photos.glob("*.tar")):
        with tarfile.open(path) as tar:
            for name in sorted(n for n in tar.getnames() if n.endswith(".jpg")):
                image = Image.open(tar.extractfile(name)).convert("RGB")
                image = image.resize((16, 16), Image.Resampling.BICUBIC)
                x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 * 2 - 1
                images.append((name.removesuffix(".jpg"), x))
    assert len(images) == N_SAMPLES
    unet = UNet2DConditionModel.from_pretrained(sd / "unet").eval()
    vae = AutoencoderKL.from_pretrained(sd / "vae").eval()
    scheduler = DDPMScheduler.from_pretrained(sd / "scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(sd / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(sd / "text_encoder").eval()
    kept: dict[str, Tensor] = {}
    for name in ("mid_block", "up_blocks.0", "up_blocks.1"):
        unet.get_submodule(name).register_forward_hook(
            lambda m, args, out, name=name: kept.update({name: out})
        )
    ids = tokenizer("", padding="max_length", return_tensors="pt").input_ids

    def noise(role: str, key: str) -> Tensor:
        return torch.from_numpy(draw_normal((4, 8, 8), role, 0, "key", key, 0, "all"))

    want: dict[str, list[list[np.ndarray]]] = {name: [[], []] for name in got}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        text = encoder(ids).last_hidden_state.expand(4, -1, -1)
        for start in (0, 4, 8, 12, 16, 20):
            batch = images[start : start + 4]
            n_rows = len(batch)
            black = torch.zeros(3, 16, 16) / 255 * 2 - 1
            batch = batch + [("", black)] * (4 - n_rows)
            pixels = torch.stack([x for _, x in batch])
            posterior = vae.encode(pixels).latent_dist
            eps = torch.stack([noise("posterior", key) for key, _ in batch])
            latents = (posterior.mean + posterior.std * eps) * vae.config.scaling_factor
            eps = torch.stack([noise("noise", key) for key, _ in batch])
            for t, step in enumerate((0, 300)):
                noisy = scheduler.add_noise(latents, eps, torch.full((4,), step))
                unet(noisy, torch.full((4,), step), encoder_hidden_states=text)
                for name, x in kept.items():
                    if name != "mid_block":
                        x = torch.nn.functional.adaptive_avg_pool2d(x, 4)
                    want[name][t].append(x[:n_rows].numpy().copy())
    torch.set_num_threads(threads)
    for name in got:
        reference = np.stack([np.concatenate(parts) for parts in want[name]])
        np.testing.assert_array_equal(got[name], reference, name)


@pytest.mark.ray
def test_one_store_however_it_was_computed(
    photos: Path, sd: Path, tmp_path: Path, local_ray: None
) -> None:
    def run(name: str, settings: dict[str, object], **how: object) -> FeatureStore:
        chosen = pipeline(photos, sd, tmp_path / name, run=settings)
        summary = extract(chosen, **how)
        assert not summary.failed
        return summary.store

    reference = run("local", {})
    assert_same_store(reference, run("one-lease", {"leases": 1, "decode_threads": 1}))
    assert_same_store(reference, run("shuffled", {"decode_threads": 8}, shuffle_seed=3))
    run("resumed", {}, limit=8)
    assert len(FeatureStore.open(str(tmp_path / "resumed")).receipts()) == 1
    assert_same_store(reference, run("resumed", {}))
    run("parts", {}, part=(1, 2))
    assert_same_store(reference, run("parts", {}, part=(0, 2)))
    processes = {"executor": "process", "workers": 2}
    assert_same_store(reference, run("processes", processes, shuffle_seed=4))
    ray_one = {"executor": "ray", "workers": 1, "cpus_per_worker": 1}
    assert_same_store(reference, run("ray-1", ray_one))
    ray_two = {"executor": "ray", "workers": 2, "cpus_per_worker": 1}
    assert_same_store(reference, run("ray-2", ray_two, shuffle_seed=5))


@pytest.mark.parametrize("n_threads", [1, 2])
def test_the_number_of_threads_changes_no_bit(
    photos: Path, sd: Path, tmp_path: Path, n_threads: int
) -> None:
    """By `extract`, which gives the threads back; and by a task alone, as a Ray worker has it."""
    reference = extract(pipeline(photos, sd, tmp_path / "reference")).store
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        assert_same_store(reference, extract(pipeline(photos, sd, tmp_path / "whole")).store)
        assert torch.get_num_threads() == n_threads
        limited = extract(pipeline(photos, sd, tmp_path / "alone"), limit=1).store
        backbone = BackboneSpec(model=str(sd))
        task = make_task(limited.url, backbone, ConditionSpec(), RunSpec(), n_cpus=2)
        for unit in limited.pending():
            task(Lease(unit))
        limited.seal()
        assert_same_store(reference, limited)
    finally:
        torch.set_num_threads(before)


class Interrupting:
    """A progress display at whose first advance the user presses Ctrl-C."""

    def bar(self, label: str, total: int, unit: str) -> Interrupting:
        return self

    def __enter__(self) -> Interrupting:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def advance(self, n: int = 1, **numbers: float) -> None:
        raise KeyboardInterrupt


def test_an_interrupted_run_resumes(photos: Path, ddpm: Path, tmp_path: Path) -> None:
    chosen = pipeline(photos, ddpm, tmp_path / "s", run={"leases": 1})
    with pytest.raises(KeyboardInterrupt):
        extract(chosen, progress=Interrupting())
    store = FeatureStore.open(str(tmp_path / "s"))
    assert 1 <= len(store.receipts()) < len(store.units)
    assert not store.sealed
    assert_same_store(
        extract(chosen).store, extract(pipeline(photos, ddpm, tmp_path / "whole")).store
    )


def test_a_second_run_starts_no_backbone(
    photos: Path, ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = pipeline(photos, ddpm, tmp_path / "s")
    assert extract(chosen).n_pending == 3

    def never(*_: object) -> None:
        raise AssertionError("a backbone was started")

    monkeypatch.setattr("drl_data.computers.load_backbone", never)
    summary = extract(chosen)
    assert summary.n_pending == 0
    assert summary.n_units == 3
    with pytest.raises(AssertionError, match="a backbone was started"):
        extract(pipeline(photos, ddpm, tmp_path / "other"))


def computer_of(model: Path, **changes: object) -> FeatureComputer:
    """A computer at timesteps 0, 100, 200; of mid_block unless `changes` say otherwise."""
    changes = {"taps": ["mid_block"], **changes}
    base = pipeline(Path("/none"), model, Path("/none"), **changes)
    backbone = load_backbone(ModelFolder.find(BackboneSpec(model=str(model))), "cpu")
    spec = FeatureSpec(
        dataset="",
        n_samples=1,
        images=base.images,
        weights="",
        backbone_dtype="float32",
        latents=base.latents,
        condition=base.condition,
        schedule=ScheduleSpec(timesteps=(0, 100, 200)),
        noise=base.noise,
        taps=base.taps,
        dtype="float32",
        batch_size=4,
        rows_per_unit=4,
        overflow="error",
    )
    return FeatureComputer(
        backbone,
        resolve(backbone.network, spec.taps),
        backbone.conditioning(spec.condition),
        backbone.schedule.resolve(spec.schedule),
        spec,
    )


PIXELS = np.random.default_rng(0).integers(0, 256, (4, 3, 16, 16), dtype=np.uint8)
KEYS = ["a", "b", "c", "d"]


def test_an_image_is_encoded_once_for_all_timesteps_and_members(sd: Path) -> None:
    computer = computer_of(sd, noise={"members": 2})
    calls: list[int] = []
    computer.backbone.vae.encoder.register_forward_hook(lambda m, args, out: calls.append(len(out)))
    n_forwards: list[int] = []
    computer.backbone.network.mid_block.register_forward_hook(
        lambda m, args, out: n_forwards.append(1)
    )
    assert [t for t, _ in computer.compute(PIXELS, KEYS)] == [0, 1, 2]
    assert calls == [4]
    assert len(n_forwards) == 3 * 2


def test_members_average_the_features(ddpm: Path) -> None:
    both = dict(computer_of(ddpm, noise={"members": 2}).compute(PIXELS, KEYS))
    computer = computer_of(ddpm)
    times = computer._times
    pixels = torch.from_numpy(PIXELS).float() / 255 * 2 - 1
    for t, when in enumerate(times):
        singles = []
        for member in (0, 1):
            eps = torch.stack(
                [
                    torch.from_numpy(draw_normal((3, 16, 16), "noise", 0, "key", k, member, "all"))
                    for k in KEYS
                ]
            )
            kept: list[Tensor] = []
            hook = computer.backbone.network.mid_block.register_forward_hook(
                lambda m, args, out, kept=kept: kept.append(out)
            )
            with torch.no_grad():
                noisy = when.alpha * pixels + when.sigma * eps
                computer.backbone.network(noisy, torch.full((4,), int(when.model_time)))
            hook.remove()
            singles.append(kept[0])
        assert torch.equal(both[t]["mid_block"], (singles[0] + singles[1]) / 2)


@pytest.mark.parametrize("members", [1, 2])
def test_what_the_model_does_to_a_tensor_later_is_not_seen(ddpm: Path, members: int) -> None:
    noise = {"members": members}
    first_and_last = ["conv_in", "mid_block"]
    want = dict(computer_of(ddpm, noise=noise, taps=first_and_last).compute(PIXELS, KEYS))
    computer = computer_of(ddpm, noise=noise, taps=first_and_last)
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[object, ...], output: Tensor) -> None:
        seen.append(output)

    def wipe(module: nn.Module, args: tuple[object, ...]) -> None:
        seen[-1].zero_()

    network = computer.backbone.network
    network.conv_in.register_forward_hook(keep)
    network.mid_block.register_forward_pre_hook(wipe)
    got = dict(computer.compute(PIXELS, KEYS))
    assert len(seen) == 3 * members
    for t in want:
        assert torch.equal(got[t]["conv_in"], want[t]["conv_in"])


def test_clean_input_takes_no_noise(ddpm: Path) -> None:
    """Without noise only the told time differs, and the same pixels give the same features."""
    got = dict(computer_of(ddpm, noise={"kind": "none"}).compute(PIXELS, KEYS))
    again = dict(computer_of(ddpm, noise={"kind": "none"}).compute(PIXELS, ["x"] * 4))
    for t in got:
        assert torch.equal(got[t]["mid_block"], again[t]["mid_block"])
    assert not torch.equal(got[0]["mid_block"], got[1]["mid_block"])


def test_replicas_share_weights_and_not_hooks(ddpm: Path) -> None:
    computer = computer_of(ddpm)
    replicas = [computer, *(computer.replica() for _ in range(3))]
    first = next(computer.backbone.network.parameters()).data_ptr()
    for other in replicas[1:]:
        assert next(other.backbone.network.parameters()).data_ptr() == first
        assert other.backbone.network is not computer.backbone.network
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    want = {t: x["mid_block"] for t, x in computer.compute(PIXELS, KEYS)}
    barrier = threading.Barrier(len(replicas))

    def work(replica: FeatureComputer) -> bool:
        barrier.wait()
        return all(
            torch.equal(x["mid_block"], want[t])
            for _ in range(5)
            for t, x in replica.compute(PIXELS, KEYS)
        )

    with ThreadPoolExecutor(len(replicas)) as pool:
        assert all(pool.map(work, replicas))
    torch.set_num_threads(threads)


def broken_tars(folder: Path) -> Path:
    """Ten good JPEGs, and between them one that is text and one that is cut short."""
    folder.mkdir()
    generator = np.random.default_rng(1)
    with webdataset.TarWriter(str(folder / "x-0.tar"), mtime=0) as writer:
        for i in range(12):
            buffer = io.BytesIO()
            pixels = generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(buffer, "JPEG")
            data = buffer.getvalue()
            data = {3: b"not an image", 9: data[: len(data) // 3]}.get(i, data)
            writer.write({"__key__": f"k{i:02d}", "jpg": data, "cls": "0"})
    return folder


def test_a_sample_that_does_not_decode_costs_its_own_row(ddpm: Path, tmp_path: Path) -> None:
    tars = broken_tars(tmp_path / "tars")
    summary = extract(pipeline(tars, ddpm, tmp_path / "s"))
    assert (summary.n_ok, summary.n_invalid, summary.failed) == (10, 2, [])
    store = summary.store
    rows = [row for receipt in store.receipts().values() for row in receipt.invalid]
    assert [(row.row, row.key, row.stage) for row in rows] == [
        (3, "k03", "decode"),
        (9, "k09", "decode"),
    ]
    assert all(row.reason for row in rows)
    x = arrays_of(store)["mid_block"]
    bad = np.isnan(x).reshape(2, 12, -1)
    assert bad[:, [3, 9]].all()
    assert not np.delete(bad, [3, 9], axis=1).any()
    assert store.verify(deep=True) == []
    status = store.samples().column("status").to_pylist()
    assert [i for i, s in enumerate(status) if s == "invalid"] == [3, 9]


def test_neighbours_of_a_bad_sample_are_not_changed(ddpm: Path, tmp_path: Path) -> None:
    """The same run with the two bad samples repaired differs in their rows only."""
    broken = extract(pipeline(broken_tars(tmp_path / "a"), ddpm, tmp_path / "s1")).store
    good = tmp_path / "b"
    good.mkdir()
    generator = np.random.default_rng(1)
    with webdataset.TarWriter(str(good / "x-0.tar"), mtime=0) as writer:
        for i in range(12):
            buffer = io.BytesIO()
            pixels = generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(buffer, "JPEG")
            writer.write({"__key__": f"k{i:02d}", "jpg": buffer.getvalue(), "cls": "0"})
    whole = extract(pipeline(good, ddpm, tmp_path / "s2")).store
    rest = [i for i in range(12) if i not in (3, 9)]
    for name, x in arrays_of(broken).items():
        np.testing.assert_array_equal(x[:, rest], arrays_of(whole)[name][:, rest])


def big_model(ddpm: Path, folder: Path) -> Path:
    """The tiny DDPM with a mid block whose output passes float16's range."""
    from diffusers import DDPMPipeline

    loaded = DDPMPipeline.from_pretrained(ddpm)
    with torch.no_grad():
        loaded.unet.mid_block.resnets[-1].conv2.weight.mul_(1e7)
    loaded.save_pretrained(folder)
    return folder


def test_overflow_is_an_error_or_a_counted_clip(photos: Path, ddpm: Path, tmp_path: Path) -> None:
    model = big_model(ddpm, tmp_path / "big")
    settings = {"dtype": "float16", "batch_size": 4, "rows_per_unit": 8}
    taps = ["mid_block"]
    summary = extract(pipeline(photos, model, tmp_path / "a", features=settings, taps=taps))
    assert len(summary.failed) == 3
    assert "mid_block at timestep 0:" in summary.failed[0][1]
    assert "features.overflow: clip" in summary.failed[0][1]
    assert not summary.store.receipts()
    clip = {**settings, "overflow": "clip"}
    store = extract(pipeline(photos, model, tmp_path / "b", features=clip, taps=taps)).store
    x = arrays_of(store)["mid_block"]
    exact = {**settings, "dtype": "float32"}
    full = extract(pipeline(photos, model, tmp_path / "c", features=exact, taps=taps)).store
    reference = arrays_of(full)["mid_block"]
    n_over = int((np.abs(reference) >= 65520).sum())  # halfway above the largest float16
    assert n_over > 0
    counts = [r.counts.clipped["mid_block"] for r in store.receipts().values()]
    assert sum(n for by_time in counts for n in by_time.values()) == n_over
    assert np.abs(x).max() == 65504
    np.testing.assert_array_equal(x, np.clip(reference, -65504, 65504).astype(np.float16))


def test_bfloat16_is_stored_as_its_bits(photos: Path, ddpm: Path, tmp_path: Path) -> None:
    settings = {"dtype": "bfloat16", "batch_size": 4, "rows_per_unit": 8}
    taps = ["mid_block"]
    store = extract(pipeline(photos, ddpm, tmp_path / "b", features=settings, taps=taps)).store
    exact = extract(pipeline(photos, ddpm, tmp_path / "f", taps=taps)).store
    bits = torch.from_numpy(arrays_of(store)["mid_block"].copy()).view(torch.bfloat16)
    want = torch.from_numpy(arrays_of(exact)["mid_block"].copy()).to(torch.bfloat16)
    assert torch.equal(bits, want)


def test_other_weights_are_refused(photos: Path, ddpm: Path, tmp_path: Path) -> None:
    extract(pipeline(photos, ddpm, tmp_path / "s"), limit=8)
    other = save_tiny_ddpm(tmp_path / "other", seed=1)
    backbone = BackboneSpec(model=str(other))
    with pytest.raises(StoreMismatchError, match="give the same files, or another store"):
        make_task(str(tmp_path / "s"), backbone, ConditionSpec(), RunSpec(), 1)
    with pytest.raises(StoreMismatchError, match="weights"):
        extract(pipeline(photos, other, tmp_path / "s"))


def test_taps_that_resolve_differently_are_refused_with_both_lists(
    photos: Path, ddpm: Path, tmp_path: Path
) -> None:
    chosen = pipeline(photos, ddpm, tmp_path / "s")
    prepared = prepare(chosen)
    FeatureStore.create(
        str(tmp_path / "s"), prepared.spec, prepared.arrays[:-1], prepared.times, prepared.index
    )
    with pytest.raises(TapError, match=r"(?s)store: mid_block@out, up_blocks\.0@out\n.*now: .*\.1"):
        make_task(str(tmp_path / "s"), BackboneSpec(model=str(ddpm)), ConditionSpec(), RunSpec(), 1)


def test_tars_that_changed_since_are_not_taken_for_those_of_the_store(
    ddpm: Path, tmp_path: Path
) -> None:
    tars = write_photo_tars(tmp_path / "tars", n_samples=8)
    chosen = pipeline(tars, ddpm, tmp_path / "s")
    extract(chosen)
    (tars / "photos-000002.tar").write_bytes((tars / "photos-000000.tar").read_bytes())
    with pytest.raises(StoreMismatchError, match=r"n_samples: (8 != 12|12 != 8)"):
        extract(chosen)
    (tars / "photos-000002.tar").unlink()
    assert extract(chosen).n_pending == 0
    write_photo_tars(tars, n_samples=8, size=41)  # other images under the same names
    with pytest.raises(StoreMismatchError, match="dataset"):
        extract(chosen)


def test_what_extraction_needs_is_named(photos: Path, ddpm: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="lacks schedule, taps; extraction needs them"):
        prepare(pipeline(photos, ddpm, tmp_path / "s", schedule=None, taps=[]))


def test_logistics_change_no_fingerprint(photos: Path, ddpm: Path, tmp_path: Path) -> None:
    base = prepare(pipeline(photos, ddpm, tmp_path / "s")).spec.fingerprint()
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in photos.glob("*.tar"):
        (moved / path.name).write_bytes(path.read_bytes())
    settings = {"executor": "ray", "workers": 7, "decode_threads": 9, "leases": 5}
    other = pipeline(moved, ddpm, tmp_path / "elsewhere", run=settings)
    assert prepare(other).spec.fingerprint() == base


@pytest.mark.parametrize(
    "change",
    [
        {"taps": ["mid_block"]},
        {"schedule": {"timesteps": [0, 301]}},
        {"noise": {"seed": 1}},
        {"features": {"dtype": "float16", "batch_size": 4, "rows_per_unit": 8}},
        {"features": {"dtype": "float32", "batch_size": 8, "rows_per_unit": 8}},
        {"images": {"size": 16, "filter": "bilinear"}},
        {"backbone": "random"},
        {"dataset": "fewer"},
    ],
    ids=str,
)
def test_content_changes_the_fingerprint(
    photos: Path, ddpm: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    base = prepare(pipeline(photos, ddpm, tmp_path / "s")).spec.fingerprint()
    if change == {"backbone": "random"}:
        change = {"backbone": {"model": str(ddpm), "init": "random"}}
    if change == {"dataset": "fewer"}:
        change = {"dataset": {"tars": str(photos / "photos-000000.tar")}}
    other = pipeline(photos, ddpm, tmp_path / "s", **change)
    assert prepare(other).spec.fingerprint() != base


def test_stage_times_are_recorded(photos: Path, sd: Path, tmp_path: Path) -> None:
    summary: RunSummary = extract(pipeline(photos, sd, tmp_path / "s"))
    stages = {"read", "decode", "condition", "encode", "denoise", "copy", "write", "wait"}
    for receipt in summary.store.receipts().values():
        assert set(receipt.run.seconds) == stages
        assert receipt.run.peak_bytes > 0
        assert receipt.run.versions["torch"]
    assert set(summary.stage_s) == stages


@pytest.mark.parametrize(
    "server",
    [
        pytest.param("s3_url", marks=pytest.mark.s3),
        pytest.param("ceph_url", marks=pytest.mark.ceph),
    ],
)
def test_the_whole_flow_on_s3(
    photos: Path, ddpm: Path, tmp_path: Path, request: pytest.FixtureRequest, server: str
) -> None:
    """Tars and store on S3 give the store that the local disk has, and feed a training loop."""
    bucket: str = request.getfixturevalue(server)
    for path in photos.glob("*.tar"):
        open_folder(f"{bucket}/tars").put(path.name, [path.read_bytes()])
    remote = pipeline(photos, ddpm, tmp_path / "unused", dataset={"tars": f"{bucket}/tars/*.tar"})
    remote = remote.model_copy(update={"store": StoreSpec(url=f"{bucket}/features.zarr")})
    store = extract(remote).store
    assert extract(remote).n_pending == 0
    assert store.verify(deep=True) == []
    local = extract(pipeline(photos, ddpm, tmp_path / "local")).store
    assert_same_store(store, local)
    assert not (tmp_path / "unused").exists()
    want = arrays_of(local)["mid_block"]
    opened = FeatureStore.open(f"{bucket}/features.zarr")
    stream = FeatureStream(
        opened,
        taps=["mid_block"],
        batch_size=5,
        shuffle=True,
        images=(opened.index, opened.spec.images),
    )
    seen: list[int] = []
    for batch in DataLoader(stream, batch_size=None):
        for i, row in enumerate(batch.row.tolist()):
            np.testing.assert_array_equal(batch.features["mid_block"][i].numpy(), want[:, row])
            assert int(batch.label[i]) == row % 2
        assert batch.pixels is not None
        assert batch.pixels.shape[1:] == (3, 16, 16)
        seen += batch.row.tolist()
    assert sorted(seen) == list(range(N_SAMPLES))


@given(st.lists(st.integers(1, 120), min_size=1, max_size=12))
def test_the_budget_is_never_exceeded_and_never_deadlocks(sizes: list[int]) -> None:
    budget = ByteBudget(100)
    lock, used, peak = threading.Lock(), 0, 0

    def work(n: int) -> None:
        nonlocal used, peak
        with budget.reserve(n):
            with lock:
                used += min(n, 100)
                peak = max(peak, used)
            with lock:
                used -= min(n, 100)

    with ThreadPoolExecutor(len(sizes)) as pool:
        list(pool.map(work, sizes))
    assert peak <= 100
    assert used == 0
