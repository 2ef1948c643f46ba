"""Pixels and maps move together: a cell goes on lying over the pixels that it came from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drl_data.augment import Augment, Geometry
from drl_data.datasets import FeatureDataset, FeatureStream
from drl_data.decode import decode_image
from drl_data.errors import SpecError
from drl_data.index import build_index
from drl_data.shards import Array
from drl_data.spec import DatasetSpec, ImageSpec
from drl_data.store import FeatureStore

from .stores import RUN, make_array, make_spec, make_times
from .toy_tars import png, write_tar

SIZE = (24, 36)
ARRAYS = {
    "map": make_array("map", (3, 4, 6), "float32"),
    "fine": make_array("fine", (3, 8, 12), "float32"),
    "tokens": make_array("tokens", (24, 3), "float32"),
    "pooled": make_array("pooled", (3,), "float32"),
}
GRIDS = {"tokens": (4, 6)}


def averaged(pixels: Array, grid: tuple[int, int]) -> Array:
    """[c, *grid] means of a picture's blocks: a map that says which pixels are below each cell."""
    c, h, w = pixels.shape
    blocks = pixels.astype(np.float32).reshape(c, grid[0], h // grid[0], grid[1], w // grid[1])
    return np.ascontiguousarray(blocks.mean(axis=(2, 4)))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Features are averages of the pixels below them, which no move of both can change."""
    folder = tmp_path_factory.mktemp("augment")
    tar = write_tar(folder / "a.tar", [(f"k{row}.png", png(row, *SIZE)) for row in range(16)])
    index = build_index(DatasetSpec(tars=str(tar)))
    images = ImageSpec(size=SIZE)
    spec = make_spec(16, 4, images=images, dataset=index.digest())
    made = FeatureStore.create(
        str(folder / "s"), spec, list(ARRAYS.values()), make_times(10), index
    )
    decoded = np.stack([decode_image(png(row, *SIZE), images) for row in range(16)])
    for unit in made.units:
        pixels = decoded[unit.start : unit.stop]
        maps = np.stack([averaged(x, (4, 6)) for x in pixels])
        made.write(
            unit,
            {
                "map": maps[None],
                "fine": np.stack([averaged(x, (8, 12)) for x in pixels])[None],
                "tokens": np.ascontiguousarray(maps.reshape(len(maps), 3, 24).swapaxes(1, 2))[None],
                "pooled": maps.mean(axis=(2, 3))[None],
            },
            [],
            RUN,
        )
    return made


@pytest.mark.parametrize("crop", [None, (24, 36), (12, 18), (6, 6), (18, 30)])
def test_maps_go_on_lying_over_their_pixels(
    store: FeatureStore, crop: tuple[int, int] | None
) -> None:
    augment = Augment(flip=0.5, crop=crop, grids=GRIDS)
    stream = FeatureStream(store, images=True, augment=augment, batch_size=5)
    height, width = crop or SIZE
    moves = []
    for epoch in range(3):
        stream.set_epoch(epoch)
        for batch in stream:
            assert batch.pixels is not None
            assert batch.moves is not None
            assert batch.pixels.shape[1:] == (3, height, width)
            cells = (height // 6, width // 6)
            for i, pixels in enumerate(batch.pixels.numpy()):
                moves.append((bool(batch.moves.flipped[i]), *batch.moves.corner[i].tolist()))
                x = {tap: values[i, 0].numpy() for tap, values in batch.features.items()}
                np.testing.assert_allclose(x["map"], averaged(pixels, cells), rtol=1e-5)
                fine = averaged(pixels, (height // 3, width // 3))
                np.testing.assert_allclose(x["fine"], fine, rtol=1e-5)
                assert np.array_equal(x["tokens"], x["map"].reshape(3, -1).T)
                row = int(batch.row[i])
                assert np.array_equal(x["pooled"], store.read_rows("pooled", 0, [row])[0])
    assert {flipped for flipped, *_ in moves} == {False, True}
    places = {tuple(corner) for _, *corner in moves}
    assert (len(places) == 1) == (crop in (None, SIZE))
    assert all(top % 6 == left % 6 == 0 for top, left in places)
    if crop == (18, 30):
        assert places == {(0, 0), (0, 6), (6, 0), (6, 6)}


def test_moves_are_a_function_of_seed_epoch_and_row(store: FeatureStore) -> None:
    augment = Augment(crop=(12, 12), grids=GRIDS)
    dataset = FeatureDataset(store, images=True, augment=augment, seed=4)
    dataset.set_epoch(1)
    whole = dataset.read(range(16))
    stream = FeatureStream(store, images=True, augment=augment, seed=4, batch_size=3)
    stream.set_epoch(1)
    for batch in stream:
        for tap, x in batch.features.items():
            assert torch.equal(x, whole.features[tap][batch.row])
        assert whole.pixels is not None
        assert torch.equal(batch.pixels, whole.pixels[batch.row])
    dataset.set_epoch(2)
    other = dataset.read(range(16)).moves
    assert whole.moves is not None
    assert other is not None
    assert not torch.equal(other.flipped, whole.moves.flipped)
    assert not torch.equal(other.corner, whole.moves.corner)


def test_never_and_always(store: FeatureStore) -> None:
    plain = FeatureDataset(store, ["map"], images=True).read(range(16))
    for flip in (0.0, 1.0):
        augment = Augment(flip=flip)
        moved = FeatureDataset(store, ["map"], images=True, augment=augment).read(range(16))
        for a, b in ((plain.features["map"], moved.features["map"]), (plain.pixels, moved.pixels)):
            assert torch.equal(b, a.flip(-1) if flip else a)  # type: ignore[union-attr]


@settings(deadline=None, max_examples=60)
@given(
    cells=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    finer=st.integers(1, 3),
    pixels=st.integers(1, 4),
    kept=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
    seed=st.integers(0, 9),
)
def test_any_grids(
    cells: tuple[int, int], finer: int, pixels: int, kept: tuple[float, float], seed: int
) -> None:
    """A map that numbers its cells, and pixels that repeat those numbers."""
    size = tuple(n * finer * pixels for n in cells)
    crop = tuple(max(int(n * k), 1) * finer * pixels for n, k in zip(cells, kept, strict=True))
    arrays = {"a": make_array("a", (1, *cells), "float32")}
    geometry = Geometry(Augment(crop=crop), arrays, size, seed)  # type: ignore[arg-type]
    numbers = torch.arange(cells[0] * cells[1], dtype=torch.float32).reshape(1, 1, 1, *cells)
    x = numbers.repeat(5, 2, 1, 1, 1)
    image = x.repeat_interleave(size[0] // cells[0], 3).repeat_interleave(size[1] // cells[1], 4)
    moves = geometry.moves(np.arange(5), 0)
    got, seen = geometry.features("a", x, moves), geometry.pixels(image, moves)
    scale = (size[0] // cells[0], size[1] // cells[1])
    assert torch.equal(got.repeat_interleave(scale[0], 3).repeat_interleave(scale[1], 4), seen)
    assert seen.shape[3:] == crop


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        (Augment(flip=1.5, grids=GRIDS), "flip=1.5; want a probability"),
        (Augment(crop=(13, 12), grids=GRIDS), r"crop \[13, 12\].*multiples of \[6, 6\]"),
        (Augment(crop=(30, 12), grids=GRIDS), r"crop \[30, 12\] of \[24, 36\]"),
        (Augment(), r"'tokens' has 24 tokens and the grid None"),
        (Augment(grids={"tokens": (5, 5)}), r"grid \(5, 5\).*product is 24"),
        (Augment(grids={"token": (4, 6)}), r"grids of \['token'\]; the taps are"),
    ],
)
def test_what_is_not_on_the_grid_is_refused(
    store: FeatureStore, augment: Augment, message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        FeatureStream(store, augment=augment, batch_size=2)
