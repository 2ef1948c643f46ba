"""What every task asks of a store first: that it is finished, and which rows are whose."""

from __future__ import annotations

import hashlib

from drl_data.errors import SpecError, UserError
from drl_data.pipeline import Pipeline
from drl_data.store import FeatureStore


def finished_store(pipeline: Pipeline, task: str) -> FeatureStore:
    """The pipeline's store, with features of every row that can have them.

    Raises:
        SpecError: the pipeline names no store.
        UserError: there is no store yet, or units of it are pending.
    """
    if pipeline.store is None:
        raise SpecError(f"pipeline {pipeline.name!r} lacks store; {task} reads features from it")
    store = open_finished(pipeline.store.url, task)
    store.locate_dataset(pipeline.dataset)
    return store


def open_finished(url: str, task: str) -> FeatureStore:
    """A store with features of every row that can have them.

    Raises:
        UserError: there is no store yet, or units of it are pending.
    """
    if not FeatureStore.exists(url):
        raise UserError(f"{task}: no store at {url}; make it with `drl extract` first")
    store = FeatureStore.open(url)
    if not store.sealed and (pending := store.pending()):
        raise UserError(
            f"{task}: {len(pending)} of {len(store.units)} units of {url} are not computed yet; "
            "finish it with `drl extract` first"
        )
    return store


def is_validation(key: str, fraction: float) -> bool:
    """Whether a sample is of the validation part: the BLAKE2b digest of its key decides.

    The same on every machine, in every store, in any order; a larger fraction adds samples only.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def require_two_splits(train: str, test: str, task: str) -> None:
    """Training rows are no test.

    Raises:
        SpecError: both names are one split.
    """
    if train == test:
        raise SpecError(f"{task}: train and test are both {train!r}; a test needs rows of its own")
