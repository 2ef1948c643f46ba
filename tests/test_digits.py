from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from drl_data.digits import split_digits, write_digits
from drl_data.images import read_batches
from drl_data.index import SampleIndex, build_index
from drl_data.plan import Unit
from drl_data.spec import DatasetSpec, ImageSpec


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    return build_index(
        DatasetSpec.model_validate({"tars": write_digits(tmp_path_factory.mktemp("digits"))})
    )


def test_every_pixel_and_label_is_scikit_learns(index: SampleIndex) -> None:
    digits = load_digits()
    keys = index.table.column("key").to_pylist()
    rows = np.array([int(key.removeprefix("digit-")) for key in keys])
    assert sorted(rows) == list(range(1797))
    spec = ImageSpec(size=(8, 8), resize="none", mode="L")
    batches = list(
        read_batches(
            Unit(0, 0, 1797), index, spec, batch_size=100, n_threads=1, prefetch_bytes=1 << 24
        )
    )
    assert not any(batch.invalid for batch in batches)
    pixels = np.concatenate([batch.pixels[: batch.n_rows, 0] for batch in batches])
    np.testing.assert_array_equal(np.rint(pixels * (16 / 255)), digits.images[rows])
    np.testing.assert_array_equal(index.table.column("label").to_numpy(), digits.target[rows])


def test_splits_are_disjoint_and_balanced(index: SampleIndex) -> None:
    splits = np.array(index.table.column("split").to_pylist())
    labels = index.table.column("label").to_numpy()
    assert (splits == "train").sum() == 1437
    assert (splits == "test").sum() == 360
    share = np.bincount(labels[splits == "test"]) / np.bincount(labels)
    assert np.abs(share * np.bincount(labels) - np.bincount(labels) * 360 / 1797).max() < 1
    assert [t.url.rpartition("/")[2] for t in index.tars] == [
        *(f"train-{i:06d}.tar" for i in range(4)),
        "test-000000.tar",
    ]


def test_test_rows_are_spread_over_the_writers() -> None:
    is_test = split_digits(load_digits().target)
    parts = [part.mean() for part in np.array_split(is_test, 13)]
    assert min(parts) > 0.15
    assert max(parts) < 0.25


def test_bytes_are_the_same_every_time(tmp_path: Path) -> None:
    write_digits(tmp_path / "a")
    write_digits(tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(names) == 5
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
