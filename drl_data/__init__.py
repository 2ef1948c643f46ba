"""Precompute the inner features of diffusion models over image datasets, and train on them.

Importing this starts nothing: names are loaded at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from drl_data.backbones import Backbone, ModelFolder, load_backbone
    from drl_data.datasets import (
        Augment,
        Draw,
        FeatureBatch,
        FeatureDataset,
        FeatureStream,
        JoinedStores,
        join,
    )
    from drl_data.errors import DrlDataError, UserError
    from drl_data.executors import Workers, run_local, run_process, run_ray
    from drl_data.extract import ExtractTask, make_task
    from drl_data.fitting import pixel_map
    from drl_data.index import SampleIndex, build_index
    from drl_data.leases import Limits, Outcome
    from drl_data.pipeline import Pipeline
    from drl_data.plan import Unit, estimate, plan_units
    from drl_data.runs import extract, extract_all, prepare
    from drl_data.spec import FeatureSpec
    from drl_data.stopping import Stop
    from drl_data.store import FeatureStore

_HOME = {
    "Augment": "datasets",
    "Backbone": "backbones",
    "Draw": "datasets",
    "DrlDataError": "errors",
    "ExtractTask": "extract",
    "FeatureBatch": "datasets",
    "FeatureDataset": "datasets",
    "FeatureSpec": "spec",
    "FeatureStore": "store",
    "FeatureStream": "datasets",
    "JoinedStores": "datasets",
    "Limits": "leases",
    "ModelFolder": "backbones",
    "Outcome": "leases",
    "Pipeline": "pipeline",
    "SampleIndex": "index",
    "Stop": "stopping",
    "Unit": "plan",
    "UserError": "errors",
    "Workers": "executors",
    "build_index": "index",
    "estimate": "plan",
    "extract": "runs",
    "extract_all": "runs",
    "join": "datasets",
    "load_backbone": "backbones",
    "make_task": "extract",
    "pixel_map": "fitting",
    "plan_units": "plan",
    "prepare": "runs",
    "run_local": "executors",
    "run_process": "executors",
    "run_ray": "executors",
}

__all__ = [
    "Augment",
    "Backbone",
    "Draw",
    "DrlDataError",
    "ExtractTask",
    "FeatureBatch",
    "FeatureDataset",
    "FeatureSpec",
    "FeatureStore",
    "FeatureStream",
    "JoinedStores",
    "Limits",
    "ModelFolder",
    "Outcome",
    "Pipeline",
    "SampleIndex",
    "Stop",
    "Unit",
    "UserError",
    "Workers",
    "build_index",
    "estimate",
    "extract",
    "extract_all",
    "join",
    "load_backbone",
    "make_task",
    "pixel_map",
    "plan_units",
    "prepare",
    "run_local",
    "run_process",
    "run_ray",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'drl_data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"drl_data.{_HOME[name]}"), name)
