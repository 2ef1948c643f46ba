"""Images that keep their aspect: a store for each shape, equal to a pipeline of that size."""

from __future__ import annotations

import gzip
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_image
from typer.testing import CliRunner

from drl_data.buckets import bucket_size, read_sizes, split_into_buckets
from drl_data.cli import app
from drl_data.decode import decode_image, displayed_size
from drl_data.errors import ImageError, SpecError
from drl_data.index import build_index
from drl_data.pipeline import Pipeline
from drl_data.runs import extract, extract_all
from drl_data.spec import DatasetSpec, ImageSpec
from drl_data.tiny_models import save_tiny
from tests.test_extract import assert_same_store

SHAPES = [(60, 90), (90, 60), (64, 64), (61, 89), (40, 300)]
"""Height and width; the first and the fourth are one bucket at 48 px in multiples of 8."""
BUCKETS = {(8, 48): ["s4"], (32, 48): ["s0", "s3", "broken"], (48, 32): ["s1", "turned"],
           (48, 48): ["s2"]}  # fmt: skip


def jpeg(height: int, width: int, seed: int, **options: object) -> bytes:
    photo = Image.fromarray(load_sample_image("china.jpg"))
    left = seed * 17
    buffer = io.BytesIO()
    photo.crop((left, 20, left + width, 20 + height)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tars")
    exif = Image.Exif()
    exif[0x0112] = 6
    with webdataset.TarWriter(str(folder / "a.tar"), mtime=0) as writer:
        for i, shape in enumerate(SHAPES):
            writer.write({"__key__": f"s{i}", "jpg": jpeg(*shape, i), "cls": b"0"})
        writer.write({"__key__": "turned", "jpg": jpeg(60, 90, 7, exif=exif), "cls": b"0"})
        writer.write({"__key__": "broken", "jpg": b"no image", "cls": b"0"})
        writer.write({"__key__": "without", "cls": b"0"})
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("ddpm", tmp_path_factory.mktemp("model") / "m")


def pipeline(tars: Path, model: Path, store: Path, **changes: object) -> Pipeline:
    return Pipeline.parse(
        {
            "name": "buckets",
            "dataset": {"tars": str(tars / "*.tar*")},
            "images": {"size": 48},
            "buckets": {"multiple": 8},
            "backbone": {"model": str(model)},
            "schedule": {"timesteps": [100]},
            "taps": ["mid_block"],
            "features": {"dtype": "float32", "batch_size": 2, "rows_per_unit": 2},
            "store": {"url": str(store / "f.zarr")},
            **changes,
        }
    )


@given(
    st.tuples(st.integers(1, 5000), st.integers(1, 5000)), st.integers(1, 40), st.integers(1, 40)
)
def test_a_bucket_keeps_the_aspect_as_well_as_its_multiple_allows(
    size: tuple[int, int], n: int, multiple: int
) -> None:
    long_side = n * multiple
    found = bucket_size(size, long_side, multiple)
    assert max(found) == long_side
    assert (found[0] >= found[1]) == (size[0] >= size[1]) or found[0] == found[1]
    for side, true in zip(found, size, strict=True):
        assert side % multiple == 0
        wanted = true * long_side / max(size)
        assert abs(side - wanted) <= multiple / 2 or side == multiple


def test_sizes_are_those_that_a_viewer_shows(tars: Path) -> None:
    index = build_index(DatasetSpec(tars=str(tars / "a.tar")))
    assert read_sizes(index) == [*SHAPES, (90, 60), None, None]


def test_sizes_in_a_gzip_tar_are_the_same(tars: Path, tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.tar.gz", "wb") as file:
        file.write((tars / "a.tar").read_bytes())
    index = build_index(DatasetSpec(tars=str(tmp_path / "a.tar.gz")))
    assert read_sizes(index) == [*SHAPES, (90, 60), None, None]


def test_a_size_behind_a_long_comment_is_found(tmp_path: Path) -> None:
    """64 KiB of APP segments before the frame header: the whole image is read."""
    data = jpeg(30, 50, 0)
    comment = b"\xff\xfe" + (65_535).to_bytes(2, "big") + bytes(65_533)
    long = data[:2] + comment * 2 + data[2:]
    assert displayed_size(long) == (30, 50)
    with pytest.raises(ImageError):
        displayed_size(long[: 64 << 10])
    with webdataset.TarWriter(str(tmp_path / "a.tar"), mtime=0) as writer:
        writer.write({"__key__": "s", "jpg": long})
    assert read_sizes(build_index(DatasetSpec(tars=str(tmp_path / "a.tar")))) == [(30, 50)]


def test_displayed_size_is_that_of_the_decoded_image() -> None:
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        data = jpeg(30, 50, 0, exif=exif)
        height, width = displayed_size(data)
        spec = ImageSpec(size=(height, width), resize="none")
        assert decode_image(data, spec).shape == (3, height, width)


def test_every_row_is_in_the_bucket_of_its_shape(tars: Path, model: Path, tmp_path: Path) -> None:
    given = pipeline(tars, model, tmp_path)
    index = build_index(given.dataset)
    buckets = split_into_buckets(given, index)
    found = {b.size: b.index.table.column("key").to_pylist() for b in buckets}
    found[(32, 48)].remove("without")
    assert found == BUCKETS
    assert sum(b.index.n_samples for b in buckets) == index.n_samples
    assert [b.pipeline.store.url for b in buckets if b.pipeline.store] == [
        str(tmp_path / f"f-{h}x{w}.zarr") for h, w in sorted(BUCKETS)
    ]
    # sizes are kept, and read again only if the tars are others
    shutil.copytree(tars, tmp_path / "tars")
    moved = pipeline(tmp_path / "tars", model, tmp_path)
    (tmp_path / "tars" / "a.tar").rename(tmp_path / "tars" / "b.tar")
    again = build_index(moved.dataset)
    (tmp_path / "tars" / "b.tar").unlink()
    assert [b.size for b in split_into_buckets(moved, again)] == [b.size for b in buckets]


def test_stores_of_buckets_equal_stores_of_their_size(
    tars: Path, model: Path, tmp_path: Path
) -> None:
    given = pipeline(tars, model, tmp_path)
    summaries = extract_all(given)
    assert [s.store.spec.images.size for s in summaries] == sorted(BUCKETS)
    assert sum(s.n_ok for s in summaries) == len(SHAPES) + 1
    assert sum(s.n_invalid for s in summaries) == 2
    wide = next(s.store for s in summaries if s.store.spec.images.size == (32, 48))
    alone = extract(
        pipeline(
            tars,
            model,
            tmp_path / "alone",
            buckets=None,
            images={"size": [32, 48], "resize": "stretch"},
        )
    ).store
    rows = {key: i for i, key in enumerate(alone.index.table.column("key").to_pylist())}
    for i, key in enumerate(wide.index.table.column("key").to_pylist()[:2]):
        unit, other = wide.units[i // 2], alone.units[rows[key] // 2]
        mine = wide.read_unit("mid_block", 0, unit)[i % 2]
        theirs = alone.read_unit("mid_block", 0, other)[rows[key] % 2]
        np.testing.assert_array_equal(mine, theirs)
    assert all(s.n_pending == 0 for s in extract_all(given))


def test_buckets_reuse_buckets_of_their_size(tars: Path, model: Path, tmp_path: Path) -> None:
    """The older store is named as the pipeline's is, and has one for each shape, or none."""
    first, *_ = extract_all(pipeline(tars, model, tmp_path / "old"))
    for summary in extract_all(pipeline(tars, model, tmp_path / "gone"))[1:]:
        shutil.rmtree(summary.store.url)
    for old, n_reused in (("old", len(BUCKETS)), ("gone", 1)):
        given = pipeline(tars, model, tmp_path / f"from-{old}")
        assert given.store is not None
        changed = given.store.model_copy(update={"reuse": (str(tmp_path / old / "f.zarr"),)})
        summaries = extract_all(given.model_copy(update={"store": changed}))
        assert sum(bool(s.reused) for s in summaries) == n_reused
        assert "denoise" not in summaries[0].stage_s
        assert_same_store(summaries[0].store, first.store)


def test_commands_go_through_all_buckets(tars: Path, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(
        f"""
name: buckets
dataset: {{tars: "{tars}/a.tar"}}
images: {{size: 48}}
buckets: {{multiple: 8}}
backbone: {{model: "{model}"}}
schedule: {{timesteps: [100]}}
taps: [mid_block]
features: {{batch_size: 2}}
store: {{url: f.zarr}}
"""
    )
    result = CliRunner().invoke(app, ["plan", str(file)])
    assert result.exit_code == 0, result.output
    assert "of 32x48 pixels" in result.output
    assert "of 8x48 pixels" in result.output
    result = CliRunner().invoke(app, ["extract", str(file)])
    assert result.exit_code == 1, result.output  # two samples have no image
    assert sorted(p.name for p in tmp_path.glob("*.zarr")) == sorted(
        f"f-{h}x{w}.zarr" for h, w in BUCKETS
    )


def test_what_buckets_cannot_be_is_refused(tars: Path, model: Path, tmp_path: Path) -> None:
    index = build_index(DatasetSpec(tars=str(tars / "a.tar")))
    for size in ([48, 32], 50):
        given = pipeline(tars, model, tmp_path, images={"size": size})
        with pytest.raises(SpecError, match="with buckets it is the longer side"):
            split_into_buckets(given, index)
    crops = pipeline(tars, model, tmp_path, images={"size": 48, "shorter_side": 64})
    with pytest.raises(SpecError, match="images are not cropped"):
        split_into_buckets(crops, index)
    with pytest.raises(SpecError, match="has buckets, which are a store each"):
        extract(pipeline(tars, model, tmp_path))
    with pytest.raises(SpecError, match="lacks buckets or store"):
        split_into_buckets(pipeline(tars, model, tmp_path, buckets=None), index)
