"""A training process as users have it: a store, a loader, workers started in one of the ways.

    python -m tests.loader_cases METHOD NAME=URL...

prints a line of JSON for each case: what was read, or the error.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import threading
import warnings
from collections.abc import Iterator

from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from drl_data.datasets import FeatureDataset, FeatureStream
from drl_data.store import FeatureStore


def loaders(url: str, method: str) -> Iterator[tuple[str, DataLoader[object]]]:
    """A loader of each kind; the store has been read in this process before workers start."""
    store = FeatureStore.open(url)
    store.read_rows(store.arrays[0].name, 0, [0, 5])
    workers = {} if method == "none" else {"num_workers": 1, "multiprocessing_context": method}
    dataset = FeatureDataset(store)
    sampler = BatchSampler(SequentialSampler(dataset), 5, False)
    yield "map", DataLoader(dataset, sampler=sampler, batch_size=None, **workers)
    stream = FeatureStream(store, batch_size=5, buffer_rows=6)
    yield "stream", DataLoader(stream, batch_size=None, **workers)


def read(loader: DataLoader[object]) -> str:
    try:
        batches = list(loader)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    sums = sum(float(x.float().sum()) for b in batches for x in b.features.values())
    return json.dumps([sorted(int(row) for b in batches for row in b.row), round(sums, 2)])


def say(kind: str, place: str, method: str, found: str) -> None:
    print(json.dumps([kind, place, method, found]), flush=True)


def in_threads(url: str) -> str:
    """One dataset and one stream, read by four threads at once."""
    found: list[str] = []
    both = [loader for _, loader in loaders(url, "none")] * 2
    threads = [
        threading.Thread(target=lambda one=loader: found.append(read(one))) for loader in both
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1, found
    return found[0]


def main(method: str, *places: str) -> None:
    """Every kind of loader on every store, workers started by `method`."""
    warnings.simplefilter("ignore")
    if method == "forkserver":
        multiprocessing.set_forkserver_preload(["tests.loader_cases"])
    for place, url in (item.split("=", 1) for item in places):
        if method == "fork":
            say("threads", place, "none", in_threads(url))
            for kind, loader in loaders(url, "none"):
                say(kind, place, "none", read(loader))
        # Another stream is in the middle of an epoch, its threads running, while workers start.
        middle = iter(FeatureStream(FeatureStore.open(url), batch_size=2, buffer_rows=4))
        next(middle)
        for kind, loader in loaders(url, method):
            say(kind, place, method, read(loader))
        assert len(list(middle)) > 3


if __name__ == "__main__":
    main(*sys.argv[1:])
