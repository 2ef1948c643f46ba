"""Stores that are parts of one another: of some tars, taps and timesteps of a tiny model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from drl_data.pipeline import Pipeline
from drl_data.runs import extract
from drl_data.store import FeatureStore

Changes = dict[str, Any]
MID = "mid_block"
UP = {"path": "up_blocks.*", "reduce": "avg_pool(4)"}
TAPS: list[object] = [MID, UP]


def pipelines_of(
    tars: Sequence[str], model: Path, folder: Path, numerics: Mapping[str, object]
) -> Callable[..., Pipeline]:
    """Pipelines by the name of their store below `folder`; tars by their numbers."""

    def make(
        name: str,
        *,
        reuse: Sequence[str] = (),
        numbers: str = "012",
        features: Mapping[str, object] | None = None,
        **changes: object,
    ) -> Pipeline:
        data: Changes = {
            "name": "test",
            "dataset": {"tars": [tars[int(number)] for number in numbers]},
            "images": {"size": 16},
            "backbone": {"model": str(model)},
            "schedule": {"timesteps": [0, 300]},
            "taps": TAPS,
            "store": {"url": str(folder / name), "reuse": list(reuse)},
        }
        own = {**numerics, **(features or {})}
        return Pipeline.parse({**data, **changes, "features": own})

    return make


def direct_stores(pipeline: Callable[..., Pipeline]) -> Callable[..., FeatureStore]:
    """The store of a direct extraction by what is changed, each made once."""
    made: dict[str, FeatureStore] = {}

    def get(**changes: object) -> FeatureStore:
        name = repr(sorted(changes.items()))
        if name not in made:
            summary = extract(pipeline(f"direct-{len(made)}", **changes))
            assert not summary.failed
            made[name] = summary.store
        return made[name]

    return get
