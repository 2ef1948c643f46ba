"""The whole main job on real images with a trained backbone, offline: `drl demo`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from drl_data.backbones import ModelFolder
from drl_data.digits import write_digits
from drl_data.errors import ExecutionError
from drl_data.pipeline import Pipeline
from drl_data.progress import Progress
from drl_data.recipes import find_recipe
from drl_data.report import write_report
from drl_data.runs import extract, required_sections
from drl_data.sampling import sample
from drl_data.tasks.cluster import format_table as cluster_table
from drl_data.tasks.cluster import run_cluster
from drl_data.tasks.distill import format_table as distill_table
from drl_data.tasks.distill import run_distill
from drl_data.tasks.probe import format_table as probe_table
from drl_data.tasks.probe import run_probe
from drl_data.tasks.retrieve import format_table as retrieve_table
from drl_data.tasks.retrieve import run_retrieve

FILES = ("digits", "digits_random", "digits_pretrain")
SHEET = (8, 16)
"""Rows and columns of the sheet of samples."""
GAP = 1
"""Grey pixels around each sample."""


def run_demo(folder: Path, progress: Progress, say: Callable[[object], None]) -> Path:
    """Pack the digits, extract with trained and with random weights, probe, cluster, find
    neighbours, distil, report.

    Returns the report. Run again, it computes only what is missing from the stores.

    Raises:
        ExecutionError: if an extraction did not compute every sample.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_digits(folder / "data")
    for name in FILES:
        shutil.copyfile(find_recipe(name), folder / f"{name}.yaml")
    pipeline = Pipeline.load(folder / "digits.yaml")
    for name in FILES[:2]:
        summary = extract(Pipeline.load(folder / f"{name}.yaml"), progress=progress)
        if summary.failed or summary.n_invalid:
            raise ExecutionError(f"{name}: {summary.failed}, {summary.n_invalid} invalid samples")
        say(f"{name}: {summary.n_ok} samples computed, store {summary.store.url}")
    say(probe_table(run_probe(pipeline, progress=progress)))
    say(cluster_table(run_cluster(pipeline, progress=progress)))
    say(retrieve_table(run_retrieve(pipeline, progress=progress)))
    if (student := run_distill(pipeline, progress=progress)) is not None:
        say(distill_table(student))
    sheet = Path(pipeline.results) / "samples.png"
    write_sample_sheet(pipeline, sheet)
    return write_report(pipeline, samples=sheet)


def write_sample_sheet(pipeline: Pipeline, path: Path) -> None:
    """A sheet of images that the pipeline's own backbone draws, as PNG."""
    backbone, _, _ = required_sections(pipeline)
    rows, columns = SHEET
    images = sample(ModelFolder.find(backbone).root, rows * columns, seed=0)
    images = np.pad(images, ((0, 0), (0, 0), (GAP, GAP), (GAP, GAP)), constant_values=96)
    _, channels, height, width = images.shape
    grid = images.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    sheet = np.ascontiguousarray(grid).reshape(rows * height, columns * width, channels)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet[..., 0] if channels == 1 else sheet).save(path)
