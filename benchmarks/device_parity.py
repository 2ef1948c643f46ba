"""Every recipe's rehearsal on the CPU and on another device: how far features are apart.

    python benchmarks/device_parity.py [--device cuda] [NAME ...]

Tiny random models in float32, so that what differs is the order of additions. Exit status 1 if a
recipe fails on one of the devices or differs by more than `LIMIT` of its largest value.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
import torch

from drl_data.buckets import split_into_buckets
from drl_data.extract import make_task
from drl_data.index import build_index
from drl_data.pipeline import Pipeline, StoreSpec
from drl_data.plan import Lease
from drl_data.recipes import find_recipe, recipe_names
from drl_data.rehearse import rehearsal
from drl_data.runs import prepare, required_sections
from drl_data.spec import NumericSpec
from drl_data.store import FeatureStore

LIMIT = 1e-3


def extracted(pipeline: Pipeline, url: str, device: str) -> FeatureStore:
    """The pipeline's store, computed on a device."""
    pipeline = pipeline.model_copy(update={"store": StoreSpec(url=url)})
    index = build_index(pipeline.dataset)
    if pipeline.buckets is not None:
        (bucket,) = split_into_buckets(pipeline, index)  # a rehearsal's photographs have one shape
        pipeline, index = bucket.pipeline, bucket.index
    prepared = prepare(pipeline, index=index)
    backbone, _, store_spec = required_sections(pipeline)
    store = FeatureStore.create(
        store_spec.url, prepared.spec, prepared.arrays, prepared.times, prepared.index
    )
    run, noise_file = pipeline.run, pipeline.noise.file
    task = make_task(store.url, backbone, pipeline.condition, run, 1, device, noise_file)
    for unit in store.units:
        task(Lease(unit))
    return store


def difference(name: str, device: str) -> float:
    """Largest difference of a recipe's features over their largest value, of all arrays."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(name) if name.endswith(".yaml") else find_recipe(name)
        pipeline = rehearsal(Pipeline.load(file), Path(folder), n_samples=4)
        numeric = NumericSpec(**(pipeline.features.model_dump() | {"dtype": "float32"}))
        pipeline = pipeline.model_copy(update={"features": numeric})
        mine, other = (extracted(pipeline, f"{folder}/{d}.zarr", d) for d in ("cpu", device))
        found = 0.0
        for array in mine.features:
            for t in range(array.n_times(len(mine.times))):
                x, y = (
                    np.asarray(s.read_unit(array.name, t, s.units[0]), np.float64)
                    for s in (mine, other)
                )
                found = max(found, float(np.abs(x - y).max() / max(np.abs(x).max(), 1e-30)))
        return found


def main() -> int:
    """Compare, print, and say whether all is well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("names", nargs="*", help="recipes or files (default: all recipes)")
    arguments = parser.parse_args()
    names = arguments.names or [n for n in recipe_names() if not n.startswith("digits")]
    found: list[tuple[float, str]] = []
    failed: list[str] = []
    for name in names:
        try:
            found.append((difference(name, arguments.device), name))
        except Exception as error:
            failed.append(name)
            last = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__}: {str(error)[:300]}"
            print(f"FAILED {name}: {what} ({last.filename}:{last.lineno})")
    apart = [(e, name) for e, name in found if not e <= LIMIT]
    for e, name in sorted(found, reverse=True)[:15]:
        print(f"{e:9.2e}  {name}")
    values = sorted(e for e, _ in found)
    device = arguments.device
    if device == "cuda":
        device = torch.cuda.get_device_name()
    print(
        f"{len(found)} recipes, CPU against {device}: median {values[len(values) // 2]:.1e}, "
        f"largest {values[-1]:.1e}; {len(apart)} beyond {LIMIT:g}, {len(failed)} failed "
        f"(Python {platform.python_version()}, torch {torch.__version__})"
    )
    return 1 if apart or failed else 0


if __name__ == "__main__":
    sys.exit(main())
