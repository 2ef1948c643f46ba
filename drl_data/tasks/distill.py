"""A small student learns the stored features of the same images, then a task from few labels.

Stage 1 regresses one (tap, timestep) of the store from pixels, without labels: whitened per
channel, squared error (feature regression as in DreamTeacher, Li et al. 2023, in its simplest
form). Stage 2 fine-tunes it with a linear head on few labels, beside the same architecture from
scratch: same labels, augmentation, schedule and learning rate.

Shapes: b batch, c channel, h height, w width.
"""

from __future__ import annotations

import time
from pathlib import Path

from rich.table import Table

from drl_data.distill_spec import DistillSpec
from drl_data.distillation import LOSS
from drl_data.errors import SpecError, redacted
from drl_data.intervals import mean_and_half
from drl_data.pipeline import Pipeline
from drl_data.progress import SILENT, Progress
from drl_data.ranks import launched_ranks
from drl_data.results import TaskResult
from drl_data.splits import require_two_splits
from drl_data.stopping import Stop
from drl_data.tasks.few_labels import FewLabels, FewLabelTask, compare
from drl_data.tasks.stage_one import learn_features
from drl_data.teachers import Teachers
from drl_data.threads import one_thread

# --- results ------------------------------------------------------------------------------------


class DistillResult(TaskResult):
    """What `run_distill` found; JSON on disk, the student beside it."""

    task = "distill"

    pipeline: str
    spec: DistillSpec
    store: str
    fingerprint: str
    n_parameters: int
    """Weights of the student, without heads."""
    enlarge: int
    """Pixels are enlarged this many times (bilinear) before the student sees them."""
    n_images: int
    n_test: int
    n_classes: int
    loss: tuple[float, ...]
    """Mean squared error of stage 1 by epoch; always answering the mean would give 1."""
    few: tuple[FewLabels, ...]
    verdict: str
    student: str
    """Folder that `AutoModel.from_pretrained` reads."""
    device: str
    seconds: float


def format_table(result: DistillResult) -> Table:
    """For the terminal: accuracy by number of labels, distilled and from scratch, and who wins."""
    table = Table(
        title=f"Student of {result.spec.tap} at timestep {result.spec.timestep}, "
        f"{result.n_parameters:,} weights, test accuracy on {result.n_test} images",
        caption=f"mean and 95 % half-width over seeds (t)\n{result.verdict}",
        title_justify="left",
        caption_justify="left",
        box=None,
    )
    for name in ("labels per class", "distilled", "from scratch"):
        table.add_column(name, justify="right")
    for few in result.few:
        cells = [
            "{:.1%} ± {:.1%}".format(*mean_and_half(arm)) for arm in (few.distilled, few.scratch)
        ]
        table.add_row(str(few.labels_per_class), *cells)
    return table


# --- the task -----------------------------------------------------------------------------------


def run_distill(
    pipeline: Pipeline,
    *,
    device: str | None = None,
    progress: Progress = SILENT,
    stop: Stop | None = None,
) -> DistillResult | None:
    """Distil a student from the pipeline's store and measure it on few labels.

    Writes `<results>/distill.json` and the student to `<results>/student`. `device` defaults to the
    first visible GPU, else the CPU. Run again it goes on from the last checkpoint of stage 1. Under
    `torchrun` all processes train, then the first one does the rest and the others get None.

    Raises:
        StoppedError: it was told to stop during stage 1, and has written a checkpoint.
        SpecError: no `distill` section, unknown splits, a student that cannot be built, fewer
            labels than asked for.
        TapError: the store has no such tap or timestep.
        UserError: the store is not there or not complete.
    """
    spec = pipeline.distill
    if spec is None:
        raise SpecError(f"pipeline {pipeline.name!r} lacks distill; it needs tap and timestep")
    started = time.perf_counter()
    require_two_splits(spec.train, spec.test, "distill")
    teachers = Teachers.of(pipeline, spec)
    few = FewLabelTask.of(teachers)
    with launched_ranks(device) as ranks:
        model, curve = learn_features(pipeline, teachers, ranks, stop or Stop(), progress)
    if not ranks.leads:
        return None
    student, device = model.student, str(ranks.device)
    with one_thread(student.small):
        found = compare(student, teachers, few, device, progress)
    folder = Path(pipeline.results) / "student"
    student.save(folder)
    result = DistillResult(
        pipeline=pipeline.name,
        spec=spec,
        store=redacted(teachers.store.url),
        fingerprint=teachers.store.fingerprint,
        n_parameters=student.n_parameters,
        enlarge=student.enlarge,
        n_images=teachers.n_rows,
        n_test=len(few.test.rows),
        n_classes=len(few.classes),
        loss=curve.by_epoch(teachers.n_batches)[LOSS],
        few=tuple(found),
        verdict=". ".join(one.verdict() for one in found) + ".",
        student=str(folder),
        device=device,
        seconds=time.perf_counter() - started,
    )
    result.save(Path(pipeline.results) / "distill.json")
    return result
