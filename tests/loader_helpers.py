"""What tests of loaders share: a store of small and large rows, marks, rows of batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from drl_data.datasets import FeatureBatch
from drl_data.shards import LARGE_ROW_BYTES
from drl_data.store import FeatureStore

from .stores import fill, make_array, make_store, make_times

INVALID = (2, 9, 17)
VALID = [row for row in range(31) if row not in INVALID]


def small_and_large(folder: str) -> FeatureStore:
    """31 rows in units of 4, three invalid; three timesteps; rows of 12 bytes and of 16 KiB."""
    arrays = (
        make_array("pooled", (6,), "float16"),
        make_array("map", (LARGE_ROW_BYTES // 64, 4, 4), "float32"),
    )
    made = make_store(folder, 31, 4, arrays=arrays, times=make_times(10, 50, 200))
    fill(made, INVALID)
    return made


def with_workers(test: Callable[..., None]) -> Callable[..., None]:
    """Torch warns about forks beside threads, and about more workers than cores."""
    for message in (
        "ignore:.*multi-threaded, use of fork:DeprecationWarning",
        "ignore:This DataLoader will create:UserWarning",
    ):
        test = pytest.mark.filterwarnings(message)(test)
    return test


def rows_of(batches: Sequence[FeatureBatch]) -> list[int]:
    """Rows in the order that they were given."""
    return [int(row) for batch in batches for row in batch.row]
