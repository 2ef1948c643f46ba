"""A small student learns the stored features of the same images, then a task from few labels.

Stage 1 regresses one (tap, timestep) of the store from pixels, without labels: whitened per
channel, squared error (feature regression as in DreamTeacher, Li et al. 2023, in its simplest
form). Stage 2 fine-tunes it with a linear head on few labels, beside the same architecture from
scratch: same labels, augmentation, schedule and learning rate.

Shapes: b batch, c channel, h height, w width.
"""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from drl_data.datasets import FeatureBatch, FeatureStream
from drl_data.errors import SpecError, redacted
from drl_data.intervals import mean_and_half
from drl_data.pipeline import DistillSpec, Pipeline
from drl_data.progress import SILENT, Progress
from drl_data.results import TaskResult
from drl_data.selection import Rows, Selection, select
from drl_data.spec_base import Spec
from drl_data.splits import finished_store, require_two_splits
from drl_data.store import FeatureStore
from drl_data.student import Classifier, Student, TeacherHead
from drl_data.threads import one_thread

CACHE_BYTES = 2 << 30
"""Pixels and features of the train split stay in memory, read once, if they need no more."""

MIN_BATCH = 32
MIN_STEPS = 4
"""Fine-tuning on few labels: images of a step (or all, if fewer), and steps of an epoch."""

Arm = tuple[float, ...]

# --- results ------------------------------------------------------------------------------------


class FewLabels(Spec):
    """Test accuracies 0..1 with some labels per class, one number for each seed."""

    labels_per_class: int
    distilled: tuple[float, ...]
    scratch: tuple[float, ...]
    distilled_train: tuple[float, ...]
    """Accuracy on the labels learnt from, in the end; well below 1 means too few steps."""
    scratch_train: tuple[float, ...]

    def verdict(self) -> str:
        """One sentence on who is better: the paired difference over seeds, with its 95 % interval.

        The one distilled student is the same for all seeds; how another one would do is not in it.
        """
        differences = [a - b for a, b in zip(self.distilled, self.scratch, strict=True)]
        mean, half = mean_and_half(differences)
        few = f"{self.labels_per_class} label{'s' if self.labels_per_class > 1 else ''} per class"
        a, b = mean_and_half(self.distilled)[0], mean_and_half(self.scratch)[0]
        numbers = f"{few}: distilled {a:.1%}, from scratch {b:.1%}"
        if len(differences) < 2:
            return f"{numbers}; one seed says nothing about chance"
        n = len(differences)
        if abs(mean) <= half:
            gap = f"{100 * mean:+.1f} ± {100 * half:.1f}"
            return f"{numbers}; {gap} points are within the noise of {n} seeds"
        gap = f"{100 * abs(mean):.1f} ± {100 * half:.1f}"
        outcome = "beats" if mean > 0 else "loses to"
        return f"{numbers}; distilled {outcome} scratch by {gap} points over {n} seeds"


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
    pipeline: Pipeline, *, device: str | None = None, progress: Progress = SILENT
) -> DistillResult:
    """Distil a student from the pipeline's store and measure it on few labels.

    Writes `<results>/distill.json` and the student to `<results>/student`. `device` defaults to the
    first visible GPU, else the CPU.

    Raises:
        SpecError: no `distill` section, unknown splits, a student that cannot be built, fewer
            labels than asked for.
        TapError: the store has no such tap or timestep.
        UserError: the store is not there or not complete.
    """
    spec = pipeline.distill
    if spec is None:
        raise SpecError(f"pipeline {pipeline.name!r} lacks distill; it needs tap and timestep")
    started = time.perf_counter()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    require_two_splits(spec.train, spec.test, "distill")
    store = finished_store(pipeline, "distill")
    teacher = Teacher(store, spec)
    few = FewLabelTask.of(teacher)
    student = Student(spec.student, store.image_spec, spec.seeds[0]).to(device)
    with one_thread(student.small):
        loss = _distil(student, teacher, device, progress)
        found = _compare(student, teacher, few, device, progress)
    folder = Path(pipeline.results) / "student"
    student.save(folder)
    result = DistillResult(
        pipeline=pipeline.name,
        spec=spec,
        store=redacted(store.url),
        fingerprint=store.fingerprint,
        n_parameters=student.n_parameters,
        enlarge=student.enlarge,
        n_images=len(select(store, [spec.tap], [spec.timestep], split=spec.train).rows),
        n_test=len(few.test.rows),
        n_classes=len(few.classes),
        loss=tuple(loss),
        few=tuple(found),
        verdict=". ".join(one.verdict() for one in found) + ".",
        student=str(folder),
        device=device,
        seconds=time.perf_counter() - started,
    )
    result.save(Path(pipeline.results) / "distill.json")
    return result


@dataclass(frozen=True)
class Teacher:
    """One (tap, timestep) of a store, with the pixels of the same rows."""

    store: FeatureStore
    spec: DistillSpec

    def stream(
        self, split: str, *, shuffle: bool = False, labelled: bool = False, drop_last: bool = False
    ) -> FeatureStream:
        """Batches of the split's rows: features and pixels joined by row."""
        return FeatureStream(
            self.store,
            [self.spec.tap],
            [self.spec.timestep],
            batch_size=self.spec.batch_size,
            split=split,
            labelled=labelled,
            shuffle=shuffle,
            seed=self.spec.seeds[0],
            drop_last=drop_last,
            images=(self.store.index, self.store.image_spec),
        )


@dataclass(frozen=True)
class FewLabelTask:
    """Which rows are learnt from, and the test rows; labels as 0 .. n_classes-1."""

    classes: npt.NDArray[np.int64]
    train: Selection
    test: Selection
    spec: DistillSpec

    @classmethod
    def of(cls, teacher: Teacher) -> FewLabelTask:
        """Labelled rows of both splits.

        Raises:
            SpecError: a split without labels, or with fewer of one class than asked for.
        """
        store, spec = teacher.store, teacher.spec
        tap, timestep = [spec.tap], [spec.timestep]
        train = select(store, tap, timestep, split=spec.train, labelled=True)
        test = select(store, tap, timestep, split=spec.test, labelled=True)
        classes, counts = np.unique(train.labels, return_counts=True)
        most = max(spec.labels_per_class)
        if counts.min() < most:
            raise SpecError(
                f"distill.labels_per_class {most}: class {classes[counts.argmin()]} has only "
                f"{counts.min()} labelled rows in {spec.train!r}; ask for fewer"
            )
        return cls(classes, train, test, spec)

    def targets(self, labels: npt.NDArray[np.int64]) -> Tensor:
        """Positions of labels in `classes`; -1 for a label that the train split does not have."""
        position = np.searchsorted(self.classes, labels).clip(max=len(self.classes) - 1)
        return torch.from_numpy(np.where(self.classes[position] == labels, position, -1))

    def draw(self, n: int, seed: int) -> Rows:
        """`n` rows of each class, by digests of (seed, key); a larger draw holds the smaller."""
        digests = np.array(
            [
                hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
                for key in self.train.keys.to_pylist()
            ]
        )
        order = np.argsort(digests, kind="stable")
        chosen = [order[self.train.labels[order] == label][:n] for label in self.classes]
        return np.sort(self.train.rows[np.concatenate(chosen)])


# --- stage 1: features --------------------------------------------------------------------------


def _distil(student: Student, teacher: Teacher, device: str, progress: Progress) -> list[float]:
    """Train the student on all images of the train split; the mean loss of each epoch."""
    spec = teacher.spec
    head = TeacherHead(student.n_channels, teacher.store.array(spec.tap), spec.seeds[0]).to(device)
    pairs = Pairs(teacher, head)
    optimizer = _optimizer([student, head], spec)
    losses = []
    with progress.bar("distill", spec.epochs, "epochs") as bar:
        for epoch in range(spec.epochs):
            total, n_done = 0.0, 0
            for x, target in pairs.batches(epoch):
                _anneal(optimizer, spec, (epoch + n_done / pairs.n_rows) / spec.epochs)
                loss = F.mse_loss(head(student(x.to(device))), target.to(device))
                _step(optimizer, loss)
                total += float(loss.detach()) * len(x)
                n_done += len(x)
            losses.append(total / n_done)
            bar.advance(loss=losses[-1])
    return losses


class Pairs:
    """Pixels and whitened features of the train split, from memory if they fit, or read again.

    Features are whitened per channel by mean and standard deviation of the split, in float64. A
    channel that does not vary becomes 0, and so asks nothing of the student.
    """

    def __init__(self, teacher: Teacher, head: TeacherHead) -> None:
        self._tap, self._head = teacher.spec.tap, head
        array, images = teacher.store.array(self._tap), teacher.store.image_spec
        first = teacher.stream(teacher.spec.train)
        self.n_rows = len(first.selection.rows)
        self._batch_size = teacher.spec.batch_size
        # A last batch of one image would leave batch norm without a variance.
        self._drop_last = self.n_rows >= self._batch_size
        self._stream = teacher.stream(teacher.spec.train, shuffle=True, drop_last=self._drop_last)
        row_bytes = 4 * math.prod(array.shape) + images.n_channels * math.prod(images.size)
        keep = self.n_rows * row_bytes <= CACHE_BYTES
        held: list[tuple[Tensor, Tensor]] = []
        sums = torch.zeros(array.shape[array.channel_axis], 2, dtype=torch.float64)
        n = 0
        for batch in first:
            x = self._target(batch)
            sums += torch.stack([x.double().sum((0, 2, 3)), x.double().square().sum((0, 2, 3))], 1)
            n += x[:, 0].numel()
            if keep:
                held.append((_pixels_of(batch), x))
        mean, square = (sums / n).unbind(1)
        std = (square - mean.square()).clamp_min(0).sqrt()
        scale = torch.where(std > 1e-6 * mean.abs() + 1e-12, 1 / std, 0.0)
        self.mean, self.scale = mean.float()[:, None, None], scale.float()[:, None, None]
        self._held = (
            (torch.cat([x for x, _ in held]), self.whiten(torch.cat([y for _, y in held])))
            if keep
            else None
        )

    def whiten(self, target: Tensor) -> Tensor:
        """[b, c, h, w], each channel with mean 0 and variance 1 over the train split."""
        return (target - self.mean) * self.scale

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(pixels, whitened features) of every row, shuffled anew for each epoch."""
        if self._held is None:
            self._stream.set_epoch(epoch)
            for batch in self._stream:
                yield _pixels_of(batch), self.whiten(self._target(batch))
            return
        order = torch.randperm(self.n_rows, generator=torch.Generator().manual_seed(epoch))
        for chosen in torch.split(order, self._batch_size):
            if len(chosen) == self._batch_size or not self._drop_last:
                yield self._held[0][chosen], self._held[1][chosen]

    def _target(self, batch: FeatureBatch) -> Tensor:
        return self._head.target(batch.features[self._tap][:, 0])


def _pixels_of(batch: FeatureBatch) -> Tensor:
    assert batch.pixels is not None  # the stream was asked for them
    return batch.pixels


# --- stage 2: few labels ------------------------------------------------------------------------


def _compare(
    student: Student, teacher: Teacher, few: FewLabelTask, device: str, progress: Progress
) -> list[FewLabels]:
    """Fine-tune both arms for every number of labels and seed, then test them all in one pass."""
    spec = few.spec
    images = teacher.store.image_spec
    drawn = {(n, s): few.draw(n, s) for n in spec.labels_per_class for s in spec.seeds}
    pixels = _pixels(teacher, np.unique(np.concatenate(list(drawn.values()))))
    labels = dict(zip(few.train.rows.tolist(), few.targets(few.train.labels).tolist(), strict=True))
    models: dict[tuple[int, int, bool], Classifier] = {}
    fitted: dict[tuple[int, int, bool], float] = {}
    with progress.bar("few labels", 2 * len(drawn), "students") as bar:
        for (n, seed), rows in drawn.items():
            x = torch.stack([pixels[row] for row in rows.tolist()]).to(device)
            y = torch.tensor([labels[row] for row in rows.tolist()], device=device)
            for distilled in (True, False):
                body = copy.deepcopy(student) if distilled else Student(spec.student, images, seed)
                model = Classifier(body, len(few.classes), seed).to(device)
                _fine_tune(model, x, y, spec, seed)
                models[n, seed, distilled] = model
                fitted[n, seed, distilled] = _n_right(model, x, y) / len(y)
                bar.advance()
    tested = _test(models, teacher, few, device)

    def arm(found: Mapping[tuple[int, int, bool], float], n: int, distilled: bool) -> Arm:
        return tuple(found[n, seed, distilled] for seed in spec.seeds)

    return [
        FewLabels(
            labels_per_class=n,
            distilled=arm(tested, n, True),
            scratch=arm(tested, n, False),
            distilled_train=arm(fitted, n, True),
            scratch_train=arm(fitted, n, False),
        )
        for n in spec.labels_per_class
    ]


def _pixels(teacher: Teacher, rows: Rows) -> dict[int, Tensor]:
    """Row -> uint8 [c, h, w] of some labelled rows of the train split, in one pass over it."""
    found: dict[int, Tensor] = {}
    for batch in teacher.stream(teacher.spec.train, labelled=True):
        pixels = _pixels_of(batch)
        for i in np.flatnonzero(np.isin(batch.row.numpy(), rows)).tolist():
            found[int(batch.row[i])] = pixels[i].clone()
    return found


def _fine_tune(model: Classifier, x: Tensor, y: Tensor, spec: DistillSpec, seed: int) -> None:
    """All weights, cross-entropy, AdamW with a cosine schedule, random shifts.

    An epoch is at least MIN_STEPS steps: with one step of ten images an epoch neither arm would
    have learnt its own labels after forty, and the comparison would be of two beginnings.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = _optimizer([model], spec)
    model.train()
    batch_size = min(spec.batch_size, max(MIN_BATCH, len(x) // 8))
    steps_per_epoch = max(MIN_STEPS, math.ceil(len(x) / batch_size))
    n_steps = spec.finetune_epochs * steps_per_epoch
    order = torch.empty(0, dtype=torch.int64)
    for step in range(n_steps):
        if len(order) < min(batch_size, len(x)):
            order = torch.cat([order, torch.randperm(len(x), generator=generator)])
        chosen, order = order[:batch_size], order[batch_size:]
        _anneal(optimizer, spec, step / n_steps)
        shifted = random_shift(x[chosen], generator)
        _step(optimizer, F.cross_entropy(model(shifted), y[chosen]))
    model.eval()


def random_shift(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image of [b, c, h, w] moved by up to 1/8 of its sides; its edge is repeated."""
    b, _, h, w = x.shape
    row, column = (
        (
            torch.arange(side)
            + torch.randint(-(side // 8), side // 8 + 1, (b, 1), generator=generator)
        ).clamp(0, side - 1)
        for side in (h, w)
    )
    picked = x[torch.arange(b)[:, None, None], :, row[:, :, None], column[:, None, :]]
    return picked.movedim(3, 1)


@torch.no_grad()
def _test(
    models: Mapping[tuple[int, int, bool], Classifier],
    teacher: Teacher,
    few: FewLabelTask,
    device: str,
) -> dict[tuple[int, int, bool], float]:
    """Accuracy of every model on the test split, in one pass over it."""
    right = dict.fromkeys(models, 0)
    for batch in teacher.stream(teacher.spec.test, labelled=True):
        x, y = _pixels_of(batch).to(device), few.targets(batch.label.numpy()).to(device)
        for name, model in models.items():
            right[name] += _n_right(model, x, y)
    return {name: n / len(few.test.rows) for name, n in right.items()}


@torch.no_grad()
def _n_right(model: Classifier, x: Tensor, y: Tensor) -> int:
    return int((model(x).argmax(1) == y).sum())


# --- optimisation, the same in both stages ------------------------------------------------------


def _optimizer(modules: Sequence[nn.Module], spec: DistillSpec) -> torch.optim.Optimizer:
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return torch.optim.AdamW(parameters, lr=spec.learning_rate, weight_decay=spec.weight_decay)


def _anneal(optimizer: torch.optim.Optimizer, spec: DistillSpec, done: float) -> None:
    """Cosine schedule; `done` is the share of the training that lies behind."""
    for group in optimizer.param_groups:
        group["lr"] = spec.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()
