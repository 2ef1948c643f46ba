"""Views: flips and seeded crops as an axis of the store."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import xarray
import zarr
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from drl_data.datasets import FeatureDataset, FeatureStream
from drl_data.decode import decode_image, decode_views
from drl_data.errors import FeatureError, TapError
from drl_data.images import ImageBatch
from drl_data.noise import draw_normal
from drl_data.pipeline import Pipeline
from drl_data.plan import estimate
from drl_data.runs import extract
from drl_data.spec import CropViews, ImageSpec, PaddedCropViews
from drl_data.store import FeatureStore
from drl_data.testing import write_photo_tars
from drl_data.tiny_models import save_tiny_ddpm
from drl_data.unit_features import noise_keys
from drl_data.views import crop_box, padded_crop, seeded_crop

from .stores import RUN, invalid_row, make_array, make_store, reference

VIEWS = ["id", "hflip", {"crop": "seeded", "n": 2, "seed": 5}]


def photo(width: int = 40, height: int = 30) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


# --- pixels --------------------------------------------------------------------------------------


def test_views_of_one_image() -> None:
    spec = ImageSpec(size=16, views=VIEWS)
    assert spec.view_names == ("id", "hflip", "crop-5-0", "crop-5-1")
    views = decode_views(photo(), spec, "key")
    assert views.shape == (4, 3, 16, 16)
    whole = decode_image(photo(), spec)
    np.testing.assert_array_equal(views[0], whole)
    np.testing.assert_array_equal(views[1], whole[:, :, ::-1])
    assert not np.array_equal(views[2], views[3])
    np.testing.assert_array_equal(views, decode_views(photo(), spec, "key"))
    other = decode_views(photo(), spec, "other key")
    np.testing.assert_array_equal(other[:2], views[:2])
    assert not np.array_equal(other[2], views[2])
    assert not np.array_equal(decode_views(photo(), spec, "key")[2], other[2])


def test_a_crop_is_a_part_of_the_image() -> None:
    """Golden: stores depend on the numbers, which are Python's generator seeded by BLAKE2b."""
    view = CropViews(seed=5, flip=False)
    image = Image.open(io.BytesIO(photo())).convert("RGB")
    got = seeded_crop(image, (8, 8), Image.Resampling.BOX, view, 0, "key")
    want = image.crop(GOLDEN_BOX).resize((8, 8), Image.Resampling.BOX)
    assert np.abs(np.asarray(got).astype(int) - np.asarray(want)).max() <= 1


GOLDEN_BOX = (10, 4, 34, 28)


@given(
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(lambda a: tuple(sorted(a))),
    st.tuples(st.floats(0.1, 5), st.floats(0.1, 5)).map(lambda a: tuple(sorted(a))),
    st.integers(0, 2**64 - 1),
)
def test_a_crop_lies_in_the_image(
    size: tuple[int, int], area: tuple[float, float], aspect: tuple[float, float], seed: int
) -> None:
    view = CropViews(area=area, aspect=aspect)
    left, top, right, bottom = crop_box(size, view, random.Random(seed))
    assert 0 <= left < right <= size[0]
    assert 0 <= top < bottom <= size[1]


def test_crops_have_the_area_and_aspect_asked_for() -> None:
    view = CropViews(area=(0.3, 0.5), aspect=(0.8, 1.25))
    boxes = [crop_box((400, 300), view, random.Random(seed)) for seed in range(300)]
    areas = [(r - x) * (b - y) / 120_000 for x, y, r, b in boxes]
    aspects = [(r - x) / (b - y) for x, y, r, b in boxes]
    assert 0.29 < min(areas) < 0.33
    assert 0.47 < max(areas) < 0.51
    assert min(aspects) > 0.78
    assert max(aspects) < 1.28
    assert len({box[:2] for box in boxes}) > 250


def test_half_of_the_crops_are_mirrored() -> None:
    image = Image.open(io.BytesIO(photo())).convert("L")
    whole = {"area": (1.0, 1.0), "aspect": (4 / 3, 4 / 3)}
    plain = np.asarray(image)
    n_mirrored = 0
    for number in range(100):
        got = seeded_crop(
            image, (30, 40), Image.Resampling.NEAREST, CropViews(**whole), number, "key"
        )
        mirrored = np.array_equal(np.asarray(got), plain[:, ::-1])
        assert mirrored or np.array_equal(np.asarray(got), plain)
        n_mirrored += mirrored
    assert 30 < n_mirrored < 70


def test_a_padded_crop_is_the_image_moved_over_black() -> None:
    """By at most the padding, each way alike; the same for one (seed, number, key) and no other."""
    plain = np.asarray(Image.open(io.BytesIO(photo())).convert("L").resize((16, 16)))
    wide = np.pad(plain, 3)
    places = set()
    for number in range(300):
        view = PaddedCropViews(crop="padded", padding=3, n=300)
        image = Image.fromarray(plain)
        got = np.asarray(padded_crop(image, view, number, "key"))
        assert np.array_equal(got, np.asarray(padded_crop(image, view, number, "key")))
        found = [
            (top, left, mirrored)
            for top in range(7)
            for left in range(7)
            for mirrored in (False, True)
            if np.array_equal(
                got[:, ::-1] if mirrored else got, wide[top : top + 16, left : left + 16]
            )
        ]
        assert len(found) == 1
        places |= set(found)
    assert {place[:2] for place in places} == {(y, x) for y in range(7) for x in range(7)}
    assert {place[2] for place in places} == {False, True}
    still = PaddedCropViews(crop="padded", padding=3, flip=False)
    other = [np.asarray(padded_crop(Image.fromarray(plain), still, 0, key)) for key in "abc"]
    assert len({x.tobytes() for x in other}) > 1


def test_padded_crops_are_views_like_others() -> None:
    crops = PaddedCropViews(crop="padded", n=2, seed=5)
    spec = ImageSpec(size=16, resize="stretch", views=["id", crops])
    assert spec.view_names == ("id", "padded-5-0", "padded-5-1")
    views = decode_views(photo(), spec, "key")
    whole = Image.open(io.BytesIO(photo())).convert("RGB")
    plain = whole.resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(views[0], np.asarray(plain).transpose(2, 0, 1))
    want = padded_crop(plain, crops, 1, "key")
    assert np.array_equal(views[2], np.asarray(want).transpose(2, 0, 1))
    read = ImageSpec.model_validate(spec.model_dump(mode="json"))
    assert read == spec  # the two kinds of crops are told apart


@pytest.mark.parametrize(
    ("views", "message"),
    [
        (["id", "id"], "want none twice"),
        ([{"n": 2}, {"n": 1}], "give crops different seeds"),
        ([{"area": [0, 1]}], "above 0, and an area of at most 1"),
        ([{"area": [0.5, 0.2]}], "want \\(least, largest\\)"),
        (["vflip"], "Input should be 'id' or 'hflip'"),
    ],
)
def test_views_that_do_not_exist(views: list[object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ImageSpec(size=8, views=views)


def test_noise_of_views() -> None:
    """The image itself has the noise that it has in a store without views."""
    batch = ImageBatch(0, 1, np.zeros((2, 4, 1, 1, 1), np.uint8), ["a"], [], 0, 0, 0)
    keys = list(noise_keys(batch, ImageSpec(size=8, views=VIEWS)))
    assert keys[0] == ["a", ""]
    assert len({view[0] for view in keys}) == 4
    assert all(view[1] == "" for view in keys)
    assert list(noise_keys(batch, ImageSpec(size=8))) == [["a", ""]]


# --- the store -----------------------------------------------------------------------------------

ARRAYS = tuple(
    array.model_copy(update={"views": 3})
    for array in (
        make_array("map", (2, 2, 3), "float16"),
        make_array("mean", (4,), "bfloat16").model_copy(update={"timesteps": "mean"}),
    )
)


def test_every_other_reader_agrees(tmp_path: Path) -> None:
    n, url = 11, str(tmp_path / "s")
    store = make_store(url, n, 4, arrays=ARRAYS)
    assert store.n_cells("map") == 6
    features = {a.name: reference(a, a.n_cells(2), n) for a in ARRAYS}
    for unit in store.units:
        own = {name: x[:, unit.start : unit.stop] for name, x in features.items()}
        bad = [invalid_row(9)] if unit.start <= 9 < unit.stop else []
        store.write(unit, own, bad, RUN)
    assert store.verify(deep=True) == []
    features["map"][:, 9], features["mean"][:, 9] = np.nan, 0x7FC0
    rows = [10, 0, 9, 5]
    with xarray.open_zarr(url) as dataset:
        assert dataset["map"].dims == (
            "sample", "view", "timestep", "channel_2", "height", "width",
        )  # fmt: skip
        assert dataset["mean"].dims[:3] == ("sample", "view", "timestep_mean")
        in_xarray = dataset["map"].values
    group = zarr.open_group(url, mode="r")
    by_tensorstore = (
        tensorstore.open({"driver": "zarr3", "kvstore": f"file://{url}/map"}).result().read()
    ).result()
    for view in range(3):
        for t in range(2):
            want = features["map"][2 * view + t]
            for got in (in_xarray, np.asarray(group["map"][...]), by_tensorstore):
                np.testing.assert_array_equal(got[:, view, t], want)
            np.testing.assert_array_equal(store.read_rows("map", t, rows, view), want[rows])
            np.testing.assert_array_equal(
                store.read_unit("map", t, store.units[1], view), want[4:8]
            )
            mean = features["mean"][view]
            np.testing.assert_array_equal(store.read_rows("mean", t, rows, view), mean[rows])
    with pytest.raises(TapError, match=r"view 3 of 'map'; want 0\.\.2"):
        store.read_rows("map", 0, rows, 3)
    cost = estimate(ARRAYS, n, 2, 4)
    assert cost.bytes_total == n * (6 * 24 + 3 * 8)
    assert cost.n_objects == 3 * (6 + 3) + 2 * 3


def test_another_tools_layout_is_read(tmp_path: Path) -> None:
    """A store that was rewritten with a compressor goes through zarr-python."""
    store = make_store(str(tmp_path / "s"), 8, 4, arrays=ARRAYS[:1])
    want = reference(ARRAYS[0], 6, 8)
    for unit in store.units:
        store.write(unit, {"map": want[:, unit.start : unit.stop]}, [], RUN)
    values = np.asarray(zarr.open_group(store.url, mode="r")["map"][...])
    zarr.create_array(
        f"{store.url}/map", data=values, chunks=(1, 1, 1, 2, 2, 3), shards=(4, 1, 1, 2, 2, 3),
        compressors=zarr.codecs.ZstdCodec(), overwrite=True,
    )  # fmt: skip
    again = FeatureStore.open(store.url)
    for view in range(3):
        np.testing.assert_array_equal(
            again.read_rows("map", 1, [7, 2], view), want[2 * view + 1][[7, 2]]
        )


# --- extraction ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photo_tars(tmp_path_factory.mktemp("photos"), n_samples=10)


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_ddpm(tmp_path_factory.mktemp("ddpm"))


def pipeline(photos: Path, ddpm: Path, store: Path, *views: object, **changes: object) -> Pipeline:
    data: dict[str, object] = {
        "name": "test",
        "dataset": {"tars": str(photos / "*.tar")},
        "images": {"size": 16, "views": list(views)},
        "backbone": {"model": str(ddpm)},
        "schedule": {"timesteps": [0, 300]},
        "taps": [
            "mid_block",
            {"path": "up_blocks.0", "name": "v", "reduce": ["mean", "time_mean"]},
        ],
        "features": {"dtype": "float32", "batch_size": 4, "rows_per_unit": 8},
        "store": {"url": str(store)},
    }
    return Pipeline.parse({**data, **changes})


def test_views_end_to_end(photos: Path, ddpm: Path, tmp_path: Path) -> None:
    """The view `id` is the store without views; a flip is a store of flipped images."""
    plain = extract(pipeline(photos, ddpm, tmp_path / "plain")).store
    none = {"noise": {"kind": "none"}}
    store = extract(pipeline(photos, ddpm, tmp_path / "s", *VIEWS)).store
    assert store.verify(deep=True) == []
    assert store.array("mid_block").views == 4
    rows = list(range(10))
    for t in (0, 1):
        for name in ("mid_block", "v"):
            np.testing.assert_array_equal(
                store.read_rows(name, t, rows, 0), plain.read_rows(name, t, rows)
            )
    flipped = [store.read_rows("mid_block", 0, rows, view) for view in range(4)]
    for i in range(4):
        for j in range(i):
            assert not np.allclose(flipped[i], flipped[j], atol=1e-3)

    clean = extract(pipeline(photos, ddpm, tmp_path / "clean", "hflip", "id", **none)).store
    alone = extract(pipeline(photos, ddpm, tmp_path / "alone", "hflip", **none)).store
    only = extract(pipeline(photos, ddpm, tmp_path / "only", **none)).store
    np.testing.assert_array_equal(
        clean.read_rows("mid_block", 1, rows, 0), alone.read_rows("mid_block", 1, rows)
    )
    np.testing.assert_array_equal(
        clean.read_rows("mid_block", 1, rows, 1), only.read_rows("mid_block", 1, rows)
    )
    assert len({s.fingerprint for s in (plain, store, clean, alone, only)}) == 5


def test_a_views_noise_is_its_own(photos: Path, ddpm: Path, tmp_path: Path) -> None:
    taps = ["latent.noisy"]
    store = extract(pipeline(photos, ddpm, tmp_path / "s", "id", "hflip", taps=taps)).store
    key = store.index.table["key"][3].as_py()
    (time, *_) = store.times[1:]
    for view, name in enumerate((key, f"{key}\x1fhflip")):
        noisy = store.read_rows("latent.noisy", 1, [3], view)[0]
        eps = draw_normal((3, 16, 16), "noise", 0, "key", name, 0, "all")
        clean = (noisy - time.sigma * eps) / time.alpha
        assert clean.min() > -1.01
        assert clean.max() < 1.01
        if view == 0:
            first = clean
    np.testing.assert_allclose(clean, first[:, :, ::-1], atol=1e-4)


def test_readers_take_one_view(photos: Path, ddpm: Path, tmp_path: Path) -> None:
    features = {"dtype": "int8", "batch_size": 4, "rows_per_unit": 8}
    store = extract(pipeline(photos, ddpm, tmp_path / "s", "id", "hflip", features=features)).store
    batches = {}
    for view in ("id", "hflip"):
        dataset = FeatureDataset(store, ["mid_block"], view=view)
        batches[view] = dataset.read(range(10)).features["mid_block"]
        stream = FeatureStream(store, ["mid_block"], batch_size=4, view=view, shuffle=False)
        streamed = np.concatenate([batch.features["mid_block"].numpy() for batch in stream])
        np.testing.assert_array_equal(streamed, batches[view])
    assert not np.allclose(batches["id"], batches["hflip"], atol=1e-2)
    default = FeatureDataset(store, ["mid_block"]).read(range(10)).features["mid_block"]
    np.testing.assert_array_equal(default, batches["id"])
    with pytest.raises(TapError, match="no view 'crop-0-0'; it has id, hflip"):
        FeatureDataset(store, view="crop-0-0")
    with_pixels = FeatureStream(
        store, ["mid_block"], batch_size=4, images=(store.index, store.spec.images)
    )
    assert next(iter(with_pixels)).pixels.shape == (4, 3, 16, 16)


def test_a_missing_view_is_refused(tmp_path: Path) -> None:
    store = make_store(str(tmp_path / "s"), 8, 4, arrays=ARRAYS[:1])
    with pytest.raises(FeatureError, match=r"float16 \(2, 4, 2, 2, 3\), want float16 \(6, 4,"):
        store.write(store.units[0], {"map": reference(ARRAYS[0], 2, 4)}, [], RUN)
