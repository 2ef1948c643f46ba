"""Label maps: decoded as they are, fitted as pixels are, found in tars and folders."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from drl_data.errors import InputError
from drl_data.fitting import fitted
from drl_data.index import build_index
from drl_data.label_maps import LabelMaps, decode_labels, fit_labels
from drl_data.spec import DatasetSpec, ImageSpec
from drl_data.store import FeatureStore
from tests.stores import RUN, make_array, make_spec, make_times
from tests.toy_tars import png, write_tar

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def labels_png(seed: int, height: int = 6, width: int = 5) -> bytes:
    values = np.random.default_rng(seed).integers(0, 9, (height, width), dtype=np.uint8)
    return encoded(Image.fromarray(values))


# --- decoding and fitting -----------------------------------------------------------------------


def test_numbers_are_what_the_file_has() -> None:
    values = np.random.default_rng(0).integers(0, 256, (7, 4), dtype=np.uint8)
    grey = Image.fromarray(values)
    with_palette = grey.copy()
    with_palette.putpalette([255 - i // 3 for i in range(768)])
    for image in (grey, with_palette):
        assert (decode_labels(encoded(image), "seg.png", "x") == values).all()
    wide = values.astype(np.uint16) * 200
    assert (decode_labels(encoded(Image.fromarray(wide)), "seg.png", "x") == wide).all()
    bits = encoded(Image.fromarray(values > 99))
    assert (decode_labels(bits, "png", "x") == (values > 99)).all()
    buffer = io.BytesIO()
    np.save(buffer, wide.astype(np.int64))
    assert (decode_labels(buffer.getvalue(), "mask.npy", "x") == wide).all()


@pytest.mark.parametrize(
    ("data", "extension", "match"),
    [
        (encoded(Image.new("RGB", (3, 2))), "png", "here: a PNG of mode RGB; want numbers"),
        (encoded(Image.new("L", (3, 2)), "JPEG"), "png", "here: no label map: cannot identify"),
        (labels_png(0)[:60], "png", "here: no label map"),
        (b"", "npy", "here: no label map"),
    ],
)
def test_what_is_no_label_map(data: bytes, extension: str, match: str) -> None:
    with pytest.raises(InputError, match=match):
        decode_labels(data, extension, "here")


def test_arrays_that_are_no_label_maps() -> None:
    for values, match in (
        (np.zeros((2, 3)), "float64 of shape"),
        (np.zeros((2, 3, 4), np.uint8), r"\(2, 3, 4\)"),
        (np.full((2, 3), -1), r"values -1..-1; want 0 and more"),
        (np.array([[{}]], object), "no label map: Object arrays cannot be loaded"),
    ):
        buffer = io.BytesIO()
        np.save(buffer, values)
        with pytest.raises(InputError, match=match):
            decode_labels(buffer.getvalue(), "npy", "here")


@given(SIZES, SIZES, st.sampled_from(["shortest", "stretch", "pad"]), st.integers(0, 99))
@settings(deadline=None, max_examples=150, derandomize=True)
def test_fitted_as_pixels_are_and_never_smoothed(
    size: tuple[int, int], target: tuple[int, int], resize: str, seed: int
) -> None:
    """The path of the images with `filter: nearest`, and numbers that there are."""
    values = np.random.default_rng(seed).integers(1, 200, size, dtype=np.uint8)
    spec = ImageSpec.model_validate(
        {"size": target, "resize": resize, "filter": "nearest", "mode": "L"}
    )
    want = np.asarray(fitted(Image.fromarray(values), spec)).astype(np.int64)
    found = fit_labels(values.astype(np.int64), spec, -1)
    assert (np.where(found < 0, 0, found) == want).all()
    assert set(np.unique(found)) <= {-1, *np.unique(values).tolist()}
    assert resize == "pad" or found.min() > 0


# --- where they are -----------------------------------------------------------------------------


def store_on(folder: Path, dataset: DatasetSpec, rows: list[int] | None = None) -> FeatureStore:
    """A store of noise on some of the samples of tars."""
    index = build_index(dataset)
    if rows is not None:
        from dataclasses import replace

        index = replace(index, table=index.table.take(rows))
    spec = make_spec(index.n_samples, 4, images=ImageSpec(size=(6, 5)), dataset=index.digest())
    store = FeatureStore.create(
        str(folder), spec, [make_array("map", (2, 3, 3), "float16")], make_times(1), index
    )
    for unit in store.units:
        store.write(unit, {"map": np.ones((1, unit.n_rows, 2, 3, 3), np.float16)}, [], RUN)
    return store


def tars(folder: Path, mode: str = "w") -> DatasetSpec:
    """Seven samples in two tars; the third has no label map."""
    for tar, keys in enumerate((range(4), range(4, 7))):
        members = []
        for i in keys:
            members.append((f"d/k{i}.png", png(i)))
            if i != 2:
                members.append((f"d/k{i}.seg.png", labels_png(i)))
        write_tar(folder / f"{tar}.tar", members, mode=mode)
    return DatasetSpec(tars={"a": str(folder / "0.tar"), "b": str(folder / "1.tar")})


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_members_of_the_tars(tmp_path: Path, mode: str) -> None:
    store = store_on(tmp_path / "s", tars(tmp_path, mode))
    for rows in (np.arange(7), np.array([1, 2, 5])):
        maps = LabelMaps.open(store, rows, extension="seg.png")
        assert maps.rows.tolist() == [row for row in rows.tolist() if row != 2]
        for order in (maps.rows.tolist(), maps.rows[::-1].tolist()):
            found = dict(maps.read(order))
            assert list(found) == order
            for row, labels in found.items():
                want = decode_labels(labels_png(row), "png", "x")
                assert (labels == want).all()
    mirrored = LabelMaps.open(store, np.arange(7), extension="seg.png", view="hflip")
    ((_, labels),) = mirrored.read([5])
    assert (labels[:, ::-1] == decode_labels(labels_png(5), "png", "x")).all()


def test_a_store_of_other_rows_in_another_order(tmp_path: Path) -> None:
    """A bucket's, or a merged one's: rows are found by key."""
    store = store_on(tmp_path / "s", tars(tmp_path), rows=[5, 0, 2, 3])
    maps = LabelMaps.open(store, np.arange(4), extension="seg.png")
    assert maps.rows.tolist() == [0, 1, 3]
    for row, labels in maps.read([0, 1, 3]):
        assert (labels == decode_labels(labels_png([5, 0, 2, 3][row]), "png", "x")).all()


def test_a_tar_that_changed(tmp_path: Path) -> None:
    store = store_on(tmp_path / "s", tars(tmp_path))
    maps = LabelMaps.open(store, np.arange(7), extension="seg.png")
    write_tar(tmp_path / "1.tar", [("d/k4.png", png(4)), ("d/k4.seg.png", labels_png(9))])
    with pytest.raises(InputError, match=r"1\.tar: changed since it was indexed"):
        list(maps.read([5]))
    (tmp_path / "1.tar").unlink()
    with pytest.raises(InputError, match=r"1\.tar: gone since it was indexed"):
        list(maps.read([5]))


def test_an_error_names_its_row(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a\x1b.png", png(0)), ("a\x1b.seg.png", png(0))])
    store = store_on(tmp_path / "s", DatasetSpec(tars=str(tmp_path / "0.tar")))
    maps = LabelMaps.open(store, np.arange(1), extension="seg.png")
    with pytest.raises(InputError, match=r"row 0 \(key a\\x1b\), seg.png: a PNG of mode RGB"):
        list(maps.read([0]))


def test_a_folder_is_never_left(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(labels_png(0))
    folder = tmp_path / "labels"
    folder.mkdir()
    for key in ("../secret", "/etc/x", "a/../../secret"):
        write_tar(tmp_path / "0.tar", [(f"{key}.png", png(0))])
        store = store_on(tmp_path / f"s{len(key)}", DatasetSpec(tars=str(tmp_path / "0.tar")))
        if store.index.table["key"][0].as_py() != key:
            continue
        with pytest.raises(InputError, match="leads out of"):
            LabelMaps.open(store, np.arange(1), extension="png", folder=str(folder))
