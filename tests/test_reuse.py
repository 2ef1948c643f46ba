"""Additive work: what older stores have is copied, and the store is as if all were computed."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from drl_data import computers
from drl_data.backbones.backbone import Backbone
from drl_data.images import read_batches
from drl_data.index import SampleIndex, build_index
from drl_data.pipeline import Pipeline
from drl_data.plan import Unit
from drl_data.runs import RunSummary, extract
from drl_data.spec import ImageSpec, ResolvedTime
from drl_data.store import FeatureStore
from drl_data.testing import write_photo_tars
from drl_data.tiny_models import save_tiny_ddpm, save_tiny_stable_diffusion
from tests.part_stores import TAPS, Changes, direct_stores, pipelines_of
from tests.test_extract import assert_same_store

N_TARS, PER_TAR = 4, 6


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Four tars of six photographs each."""
    folder = tmp_path_factory.mktemp("photos")
    write_photo_tars(folder, n_samples=N_TARS * PER_TAR, n_tars=N_TARS, size=20)
    return sorted(str(path) for path in folder.glob("*.tar"))


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pixel-space DDPM."""
    return save_tiny_ddpm(tmp_path_factory.mktemp("ddpm"))


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion."""
    return save_tiny_stable_diffusion(tmp_path_factory.mktemp("sd"))


class Meter:
    """Which images a model has encoded and denoised, by key, whoever ran it."""

    def __init__(self) -> None:
        self.encoded: Counter[str] = Counter()
        self.denoised: Counter[tuple[str, float]] = Counter()
        self.loaded = 0
        self.keys: dict[bytes, str] = {}
        self._now = threading.local()

    def start(self) -> None:
        """Count from here."""
        self.encoded.clear()
        self.denoised.clear()
        self.loaded = 0

    def learn(self, index: SampleIndex, images: ImageSpec) -> None:
        """Know the images of an index by their pixels, in every view."""
        unit = Unit(0, 0, index.n_samples)
        for batch in read_batches(
            unit, index, images, batch_size=8, n_threads=1, prefetch_bytes=1 << 20, views=True
        ):
            for view in range(max(images.n_views, 1)):
                for key, pixels in zip(batch.keys, batch.of_view(view), strict=False):
                    self.keys[self._name(pixels)] = key

    @staticmethod
    def _name(pixels: np.ndarray) -> bytes:
        return np.ascontiguousarray(pixels).tobytes()

    def encode(self, pixels: Tensor) -> None:
        """Images [b, c, h, w] in -1..1; those that are left out are black."""
        back = ((pixels.float() + 1) * 127.5).round().byte().numpy()
        self._now.keys = [self.keys[self._name(x)] for x in back if x.any()]
        self.encoded.update(self._now.keys)

    def denoise(self, requested: float) -> None:
        self.denoised.update((key, requested) for key in self._now.keys)


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> Meter:
    """Counts what real backbones do from now on."""
    found = Meter()
    load = computers.load_backbone

    def load_backbone(*args: object) -> object:
        found.loaded += 1
        return load(*args)

    monkeypatch.setattr(computers, "load_backbone", load_backbone)
    encode, forward = Backbone.encode_and_tap, Backbone._forward

    def encode_and_tap(self: Backbone, pixels: Tensor, *args: object, **kwargs: object) -> object:
        if pixels.device.type != "meta":
            found.encode(pixels)
        return encode(self, pixels, *args, **kwargs)

    def _forward(self: Backbone, x: Tensor, time: ResolvedTime, *args: object) -> object:
        if x.device.type != "meta":
            found.denoise(time.requested)
        return forward(self, x, time, *args)

    monkeypatch.setattr(Backbone, "encode_and_tap", encode_and_tap)
    monkeypatch.setattr(Backbone, "_forward", _forward)
    return found


@pytest.fixture(scope="module")
def pipeline(
    tars: list[str], ddpm: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Pipeline]:
    numbers = {"dtype": "float32", "batch_size": 4, "rows_per_unit": 8}
    return pipelines_of(tars, ddpm, tmp_path_factory.mktemp("stores"), numbers)


@pytest.fixture(scope="module")
def extracted(pipeline: Callable[..., Pipeline]) -> Callable[..., FeatureStore]:
    return direct_stores(pipeline)


@pytest.fixture
def grown(
    pipeline: Callable[..., Pipeline],
    extracted: Callable[..., FeatureStore],
    meter: Meter,
    request: pytest.FixtureRequest,
) -> Callable[..., RunSummary]:
    """A store from older ones, which must be that of a direct extraction; `meter` counts it."""

    numbers = itertools.count()

    def grow(olds: Sequence[Changes], new: Changes, **both: object) -> RunSummary:
        name = f"{request.node.name}-{next(numbers)}"
        for changes in (*olds, new):
            one = pipeline("none", **{**both, **changes})
            meter.learn(build_index(one.dataset), one.images)
        direct = extracted(**{**both, **new})
        urls = [extracted(**{**both, **changes}).url for changes in olds]
        meter.start()
        summary = extract(pipeline(name, reuse=urls, **{**both, **new}))
        assert not summary.failed
        assert_same_store(summary.store, direct)
        assert not summary.store.verify(deep=True)
        return summary

    return grow


CASES: dict[str, tuple[list[Changes], Changes]] = {
    "a timestep at the end": ([{}], {"schedule": {"timesteps": [0, 300, 600]}}),
    "a timestep in the middle": ([{}], {"schedule": {"timesteps": [0, 100, 300]}}),
    "a tap": ([{}], {"taps": ["conv_in", *TAPS]}),
    "a tap and a timestep": (
        [{}],
        {"taps": [*TAPS, "conv_in"], "schedule": {"timesteps": [600, 300, 0]}},
    ),
    "tars behind": ([{}], {"numbers": "0123"}),
    "tars in front": ([{}], {"numbers": "3012"}),
    "tars, a tap and a timestep": (
        [{}],
        {"numbers": "3012", "taps": ["conv_in", *TAPS], "schedule": {"timesteps": [0, 300, 600]}},
    ),
    "two stores": (
        [{"taps": ["mid_block"]}, {"schedule": {"timesteps": [600]}, "numbers": "20"}],
        {"schedule": {"timesteps": [0, 300, 600]}},
    ),
    "two stores, one within the other": (
        [{"numbers": "01"}, {}],
        {"taps": ["conv_in", *TAPS]},
    ),
}  # fmt: skip


def lacking(olds: Sequence[Changes], new: Changes) -> set[tuple[int, float, str]]:
    """(tar, timestep, tap) of a new pipeline that none of the old ones has."""

    def has(changes: Changes) -> set[tuple[int, float, str]]:
        return {
            (int(number), time, str(tap))
            for number in changes.get("numbers", "012")
            for time in changes.get("schedule", {"timesteps": [0, 300]})["timesteps"]
            for tap in changes.get("taps", TAPS)
        }

    return has(new) - set().union(*(has(old) for old in olds))


@pytest.mark.parametrize("case", CASES)
def test_only_what_is_missing_is_computed(
    case: str, grown: Callable[..., RunSummary], meter: Meter
) -> None:
    """Bit for bit the store of a direct extraction, and each missing (image, timestep) once."""
    olds, new = CASES[case]
    grown(olds, new)
    missing = lacking(olds, new)

    def keys(number: int) -> list[str]:
        return [f"crop-{i:04d}" for i in range(number * PER_TAR, (number + 1) * PER_TAR)]

    want = {(key, time) for number, time, _ in missing for key in keys(number)}
    assert set(meter.denoised) == want
    assert set(meter.encoded) == {key for key, _ in want}
    assert max(meter.encoded.values()) == 1
    # A pixel-space model is run once for the image and once for its features at a timestep.
    assert max(meter.denoised.values()) == 1


PURE: dict[str, tuple[list[Changes], Changes]] = {
    "without a tap": ([{}], {"taps": TAPS[1:]}),
    "without a timestep": ([{}], {"schedule": {"timesteps": [300]}}),
    "timesteps in another order": ([{}], {"schedule": {"timesteps": [300, 0]}}),
    "taps in another order, with other names": (
        [{}],
        {"taps": [*reversed(TAPS[1:]), {"path": "mid_block", "name": "middle"}]},
    ),
    "tars in another order": ([{}], {"numbers": "201"}),
    "fewer tars": ([{}], {"numbers": "12"}),
    "smaller units": ([{}], {"features": {"rows_per_unit": 4}}),
    "larger units": ([{}], {"features": {"rows_per_unit": 12}}),
    "taps of two stores": ([{"taps": TAPS[:1]}, {"taps": TAPS[1:]}], {}),
    "timesteps of two stores": (
        [{"schedule": {"timesteps": [300]}}, {"schedule": {"timesteps": [0]}}],
        {},
    ),
    "tars of two stores": ([{"numbers": "2"}, {"numbers": "01"}], {}),
    "the same again": ([{}], {}),
}


@pytest.mark.parametrize("case", PURE)
def test_what_is_there_altogether_starts_no_backbone(
    case: str, grown: Callable[..., RunSummary], meter: Meter
) -> None:
    summary = grown(*PURE[case])
    assert not meter.encoded
    assert not meter.denoised
    assert not meter.loaded
    assert sum(old.rows for old in summary.reused.values()) >= summary.store.spec.n_samples


def test_child_processes_reuse_as_threads_do(
    pipeline: Callable[..., Pipeline], extracted: Callable[..., FeatureStore]
) -> None:
    """The plan is made again in each worker, and only what is needed crosses to it."""
    new: Changes = {"taps": ["conv_in", *TAPS], "numbers": "30"}
    run = {"executor": "process", "workers": 1}
    summary = extract(pipeline("by-processes", reuse=[extracted().url], run=run, **new))
    assert not summary.failed
    assert_same_store(summary.store, extracted(**new))


# --- what timesteps depend on -------------------------------------------------------------------

LADDER = {"convention": "generation_label", "n_steps": 6, "scheduler": "DDIMScheduler"}
NOISES: dict[str, tuple[Changes, list[float], list[float]]] = {
    "per_sample": ({"seed": 3}, [0, 300], []),
    "per_sample, drawn for each timestep": ({"per_timestep": True}, [0, 300], []),
    "per_sample, members": ({"members": 2}, [0, 300], []),
    "uniform": ({"kind": "uniform"}, [0, 300], []),
    "none": ({"kind": "none"}, [0, 300], []),
    "patch_mask": ({"kind": "patch_mask", "patch": 4}, [0, 300], []),
    "shared": ({"kind": "shared"}, [0, 300], []),
    "shared, drawn for each timestep": ({"kind": "shared", "per_timestep": True}, [0, 300], []),
    "shared, of torch": ({"kind": "shared", "generator": "torch"}, [0, 300], []),
    "shared, of torch, for each timestep": (
        {"kind": "shared", "generator": "torch", "per_timestep": True},
        [0],
        [300],
    ),
    "bank": ({"kind": "bank", "members": 2}, [0, 300], []),
    "bank, of torch": ({"kind": "bank", "generator": "torch", "members": 2}, [0], [300]),
    "bank, of a file": ({"kind": "bank", "file": "FILE"}, [0], [300]),
}  # fmt: skip
"""Noise; which of the old timesteps 0 and 300 have the same when 100 is put between them; which
have not, because a row of a table belongs to a place."""


@pytest.mark.parametrize("case", NOISES)
def test_a_timestep_is_reused_where_its_noise_is_the_same(
    case: str, grown: Callable[..., RunSummary], meter: Meter, tmp_path: Path
) -> None:
    noise, same, other = NOISES[case]
    if noise.get("file"):
        bank = np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32)
        np.save(tmp_path / "bank.npy", bank)
        noise = {**noise, "file": str(tmp_path / "bank.npy")}
    grown(
        [{"schedule": {"timesteps": [0, 300]}}],
        {"schedule": {"timesteps": [0, 100, 300]}},
        noise=noise,
        taps=["mid_block"],
        numbers="0",
    )
    assert {time for _, time in meter.denoised} == {100, *other}
    assert not {time for _, time in meter.denoised} & set(same)


def test_along_an_inversion_labels_are_independent(
    grown: Callable[..., RunSummary], meter: Meter
) -> None:
    """The path to a deeper label is walked again, but nothing is tapped that is there already."""
    summary = grown(
        [{"schedule": {**LADDER, "timesteps": [4, 2]}}],
        {"schedule": {**LADDER, "timesteps": [4, 3, 2, 1]}},
        noise={"kind": "inversion"},
        taps=["mid_block"],
        numbers="0",
    )
    (reused,) = summary.reused.values()
    assert reused.features == 2 * PER_TAR
    assert {time for _, time in meter.denoised} == {5, 4, 3, 2, 1}


def test_the_mean_over_timesteps_is_reused_with_all_of_them_only(
    grown: Callable[..., RunSummary], meter: Meter
) -> None:
    taps = ["mid_block", {"path": "mid_block", "name": "mean", "reduce": ["mean", "time_mean"]}]
    grown(
        [{"taps": taps}],
        {"taps": taps, "schedule": {"timesteps": [0, 300, 600]}},
        numbers="0",
    )
    assert {time for _, time in meter.denoised} == {0, 300, 600}
    grown([{"taps": taps}], {"taps": [*taps, "conv_in"]}, numbers="0")
    meter.start()
    summary = grown([{"taps": taps}], {"taps": taps[1:]}, numbers="0")
    assert not meter.denoised
    assert sum(old.features for old in summary.reused.values()) == PER_TAR


def test_principal_components_are_reused_with_their_fit(
    grown: Callable[..., RunSummary], meter: Meter
) -> None:
    """Other samples, timesteps or a tap fitted on more samples make another fit."""
    pca = {"path": "mid_block", "reduce": ["pca(4, 12)"]}
    summary = grown([{"taps": [pca]}], {"taps": ["conv_in", pca]})
    assert sum(old.linked for old in summary.reused.values()) == 2 * len(summary.store.units)
    grown([{"taps": [pca]}], {"taps": [pca, "conv_in"], "schedule": {"timesteps": [0]}})
    meter.start()
    summary = grown([{"taps": [pca, "conv_in"]}], {"taps": [pca, "conv_in"], "numbers": "0123"})
    assert {time for _, time in meter.denoised} == {0, 300}
    more = {"path": "up_blocks.1", "reduce": ["mean", "pca(2, 18)"]}
    summary = grown([{"taps": [pca]}], {"taps": [pca, more]})
    assert not any(old.features for old in summary.reused.values())


# --- what is stored -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "int8", "uint8"])
def test_every_storage_type(dtype: str, grown: Callable[..., RunSummary], meter: Meter) -> None:
    grown(
        [{}],
        {"schedule": {"timesteps": [300, 50]}, "numbers": "30"},
        features={"dtype": dtype},
        numbers="01",
    )
    assert {time for _, time in meter.denoised} == {50, 300}


def test_views_and_latents(sd: Path, grown: Callable[..., RunSummary], meter: Meter) -> None:
    """Stable Diffusion, told each sample's label; taps that have a timestep, and one without."""
    taps = ["latent", {"path": "mid_block", "reduce": "avg_pool(2)"}]
    grown(
        [{"taps": taps}],
        {
            "taps": [*taps, {"path": "up_blocks.1", "reduce": "mean"}],
            "schedule": {"timesteps": [300, 50, 0]},
            "numbers": "30",
        },
        backbone={"model": str(sd)},
        images={"size": 16, "views": ["id", "hflip"]},
        condition={"template": "a photo of a {label}"},
        features={"dtype": "uint8", "batch_size": 4, "rows_per_unit": 4},
        numbers="01",
    )
    assert {time for _, time in meter.denoised} == {0, 50, 300}
    assert max(meter.encoded.values()) == 2, "once for each view"


def test_an_array_without_timesteps_is_computed_without_a_forward(
    sd: Path, grown: Callable[..., RunSummary], meter: Meter
) -> None:
    taps = ["mid_block"]
    grown(
        [{"taps": taps}],
        {"taps": ["latent", *taps]},
        backbone={"model": str(sd)},
        features={"batch_size": 4, "rows_per_unit": 4},
        numbers="0",
    )
    assert meter.encoded
    assert not meter.denoised
