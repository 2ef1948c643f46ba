"""Does memory grow with the number of units? A run over many tiny units, measured on the way.

    python benchmarks/many_units.py [--units 2200] [--after 200] [--folder DIR]

prints a line of JSON: `Memory` after so many units, after all of them, and after the seal. Images
of 8x8 pixels, one a unit, through a small UNet, on one CPU. `measure` runs it in a fresh process.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image

from drl_data.pipeline import Pipeline
from drl_data.runs import extract
from drl_data.tiny_models import save_tiny_ddpm


@dataclass(frozen=True)
class Memory:
    """Of a process, after a number of units."""

    n_units: int
    resident_bytes: int
    peak_bytes: int
    """The most that was resident so far."""
    python_blocks: int
    """Pieces of memory that Python objects hold."""


def measure(n_units: int, after: int, folder: Path | None = None) -> tuple[Memory, ...]:
    """Memory after `after` units, after all, and after the seal, of a run of `n_units` in a fresh
    process."""
    command = [sys.executable, __file__, "--units", str(n_units), "--after", str(after)]
    if folder is not None:
        command += ["--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return tuple(Memory(**found) for found in json.loads(done.stdout.splitlines()[-1]))


class _Watch:
    """A progress display that looks at memory at some units."""

    def __init__(self, at: set[int]) -> None:
        self._at = at
        self._n_units = 0
        self.seen: list[Memory] = []

    def bar(self, label: str, total: int, unit: str) -> _Watch:
        return self

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def advance(self, n: int = 1, **numbers: float) -> None:
        self._n_units += 1
        if self._n_units in self._at:
            self.look()

    def look(self) -> None:
        """Note what this process holds now."""
        gc.collect()
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[1])
        resident = pages * os.sysconf("SC_PAGE_SIZE")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.seen.append(Memory(self._n_units, resident, peak, sys.getallocatedblocks()))


def _run(n_units: int, after: int, folder: Path) -> list[Memory]:
    generator = np.random.default_rng(0)
    with webdataset.TarWriter(str(folder / "a.tar"), mtime=0) as writer:
        for i in range(n_units):
            buffer = io.BytesIO()
            pixels = generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG")
            writer.write({"__key__": f"k{i:07d}", "png": buffer.getvalue()})
    model = save_tiny_ddpm(folder / "model")
    pipeline = Pipeline.parse(
        {
            "name": "many-units",
            "dataset": {"tars": str(folder / "a.tar")},
            "images": {"size": 8},
            "backbone": {"model": str(model)},
            "schedule": {"timesteps": [50]},
            "taps": [{"path": "conv_in", "reduce": "mean"}],
            "features": {"batch_size": 1, "rows_per_unit": 1},
            "store": {"url": str(folder / "store")},
            "run": {"decode_threads": 1},
        }
    )
    torch.set_num_threads(1)
    watch = _Watch({after, n_units})
    summary = extract(pipeline, progress=watch)
    if summary.n_ok != n_units or not summary.store.sealed:
        raise RuntimeError(f"{summary.n_ok} of {n_units} rows; {summary.failed[:3]}")
    watch.look()
    return watch.seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--units", type=int, default=2200)
    parser.add_argument("--after", type=int, default=200)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        seen = _run(given.units, given.after, Path(folder))
    print(json.dumps([asdict(memory) for memory in seen]))


if __name__ == "__main__":
    main()
