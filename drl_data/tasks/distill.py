"""A small student learns the stored features of the same images, then a task from few labels.

Stage 1 regresses cells of one or several stores from pixels (distillation.py), in its simplest form
without labels one (tap, timestep), whitened per channel, by squared error. Stage 2 fine-tunes the
student with a linear head on few labels, beside the same architecture from scratch (few_labels.py).

Shapes: b batch, c channel, h height, w width.
"""

from __future__ import annotations

import time
from pathlib import Path

from rich.table import Table

from drl_data.distill_spec import DistillSpec
from drl_data.distillation import LOSS, Distillation, mean_chances
from drl_data.errors import SpecError, redacted
from drl_data.intervals import mean_and_half
from drl_data.pipeline import Pipeline
from drl_data.progress import SILENT, Progress
from drl_data.ranks import launched_ranks
from drl_data.results import TaskResult
from drl_data.spec_base import Spec
from drl_data.splits import require_two_splits
from drl_data.stopping import Stop
from drl_data.tasks.few_labels import FewLabels, FewLabelTask, compare
from drl_data.tasks.stage_one import learn_features
from drl_data.teachers import Teachers
from drl_data.threads import one_thread

# --- results ------------------------------------------------------------------------------------


class PolicyFound(Spec):
    """Where the policy ended: its mean chance of each timestep over the train split."""

    timesteps: tuple[float, ...]
    chances: tuple[float, ...]


class DistillResult(TaskResult):
    """What `run_distill` found; JSON on disk, the student beside it."""

    task = "distill"

    pipeline: str
    spec: DistillSpec
    store: str
    fingerprint: str
    teachers: dict[str, str]
    """Fingerprints of the other stores."""
    model: str
    """The student's model type, or its Python factory."""
    targets: tuple[str, ...]
    """What it learnt."""
    n_parameters: int
    """Weights of the student, without heads."""
    enlarge: int
    """Pixels are enlarged this many times (bilinear) before the student sees them."""
    n_images: int
    n_test: int
    n_classes: int
    loss: tuple[float, ...]
    """Loss of stage 1 by epoch; of the squared error, always answering the mean would give 1."""
    policy: PolicyFound | None
    few: tuple[FewLabels, ...]
    verdict: str
    student: str
    """Folder that `AutoModel.from_pretrained` reads, and `student.weights`."""
    device: str
    seconds: float


def format_table(result: DistillResult) -> Table:
    """For the terminal: accuracy by number of labels, distilled and from scratch, and who wins."""
    what = f"Student of {', '.join(result.targets)}, {result.n_parameters:,} weights"
    if not result.few:
        table = Table(
            "epochs", "first loss", "last loss", title=what, title_justify="left", box=None
        )
        table.add_row(str(len(result.loss)), f"{result.loss[0]:.4g}", f"{result.loss[-1]:.4g}")
        return table
    table = Table(
        title=f"{what}, test accuracy on {result.n_test} images",
        caption=f"mean and 95 % half-width over seeds (t)\n{result.verdict}",
        title_justify="left",
        caption_justify="left",
        box=None,
    )
    for name in ("labels", "distilled", result.few[0].rival):
        table.add_column(name, justify="right")
    for few in result.few:
        cells = [
            "{:.1%} ± {:.1%}".format(*mean_and_half(arm)) for arm in (few.distilled, few.scratch)
        ]
        table.add_row(few.budget, *cells)
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
        raise SpecError(
            f"pipeline {pipeline.name!r} lacks distill; it needs tap and timestep, or targets"
        )
    started = time.perf_counter()
    if spec.test is not None:
        require_two_splits(spec.train, spec.test, "distill")
    teachers = Teachers.of(pipeline, spec)
    few = FewLabelTask.of(teachers)
    with launched_ranks(device) as ranks:
        model, curve = learn_features(pipeline, teachers, ranks, stop or Stop(), progress)
    if not ranks.leads:
        return None
    student, device = model.student, str(ranks.device)
    with one_thread(student.small):
        found = compare(student, teachers, few, device, progress) if few else []
        policy = _policy(model, teachers, device)
    folder = Path(pipeline.results) / "student"
    student.save(folder)
    result = DistillResult(
        pipeline=pipeline.name,
        spec=spec,
        store=redacted(teachers.store.url),
        fingerprint=teachers.store.fingerprint,
        teachers={name: store.fingerprint for name, store in teachers.others.items()},
        model=spec.student.model_type or "resnet",
        targets=tuple(target.name for target in teachers.targets),
        n_parameters=student.n_parameters,
        enlarge=student.enlarge,
        n_images=teachers.n_rows,
        n_test=len(few.test.rows) if few else 0,
        n_classes=len(few.classes) if few else 0,
        loss=curve.by_epoch(teachers.n_batches)[LOSS],
        policy=policy,
        few=tuple(found),
        verdict=_verdict(spec, found),
        student=str(folder),
        device=device,
        seconds=time.perf_counter() - started,
    )
    result.save(Path(pipeline.results) / "distill.json")
    return result


def _verdict(spec: DistillSpec, found: list[FewLabels]) -> str:
    if not found:
        return "No test split was named: the student was not compared."
    verdict = ". ".join(one.verdict() for one in found) + "."
    if spec.asks_labels:
        verdict += (
            f" The policy learnt from all labels of {spec.train!r}, which the rival did not have: "
            "this is no comparison with few labels."
        )
    return verdict


def _policy(model: Distillation, teachers: Teachers, device: str) -> PolicyFound | None:
    if model.policy is None:
        return None
    pixels = (x.to(device) for x, _ in teachers.batches(0))
    return PolicyFound(
        timesteps=model.chosen[0].timesteps, chances=tuple(mean_chances(model, pixels))
    )
