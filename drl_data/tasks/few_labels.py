"""Stage 2 of distillation: few labels. The student against the same architecture from scratch.

Both have the same labels, augmentation, schedule and learning rate.

Shapes: b batch, c channel, h height, w width.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from drl_data.datasets import FeatureBatch
from drl_data.distill_spec import DistillSpec
from drl_data.errors import SpecError
from drl_data.intervals import mean_and_half
from drl_data.optimisation import anneal, optimizer_of, step
from drl_data.progress import Progress
from drl_data.selection import Rows, Selection, select
from drl_data.spec_base import Spec
from drl_data.student import Classifier, Student
from drl_data.teachers import Teachers

MIN_BATCH = 32
MIN_STEPS = 4
"""Fine-tuning on few labels: images of a step (or all, if fewer), and steps of an epoch."""

Arm = tuple[float, ...]


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


@dataclass(frozen=True)
class FewLabelTask:
    """Which rows are learnt from, and the test rows; labels as 0 .. n_classes-1."""

    classes: npt.NDArray[np.int64]
    train: Selection
    test: Selection
    spec: DistillSpec

    @classmethod
    def of(cls, teachers: Teachers) -> FewLabelTask:
        """Labelled rows of both splits.

        Raises:
            SpecError: a split without labels, or with fewer of one class than asked for.
        """
        store, spec = teachers.store, teachers.spec
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


# --- stage 2: few labels ------------------------------------------------------------------------


def compare(
    student: Student, teachers: Teachers, few: FewLabelTask, device: str, progress: Progress
) -> list[FewLabels]:
    """Fine-tune both arms for every number of labels and seed, then test them all in one pass."""
    spec = few.spec
    images = teachers.store.spec.images
    drawn = {(n, s): few.draw(n, s) for n in spec.labels_per_class for s in spec.seeds}
    pixels = _pixels(teachers, np.unique(np.concatenate(list(drawn.values()))))
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
    tested = _test(models, teachers, few, device)

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


def _pixels_of(batch: FeatureBatch) -> Tensor:
    assert batch.pixels is not None  # the stream was asked for them
    return batch.pixels


def _pixels(teachers: Teachers, rows: Rows) -> dict[int, Tensor]:
    """Row -> uint8 [c, h, w] of some labelled rows of the train split, in one pass over it."""
    found: dict[int, Tensor] = {}
    for batch in teachers.stream(teachers.spec.train, labelled=True):
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
    optimizer = optimizer_of(model, spec)
    model.train()
    batch_size = min(spec.batch_size, max(MIN_BATCH, len(x) // 8))
    steps_per_epoch = max(MIN_STEPS, math.ceil(len(x) / batch_size))
    n_steps = spec.finetune_epochs * steps_per_epoch
    order = torch.empty(0, dtype=torch.int64)
    for number in range(n_steps):
        if len(order) < min(batch_size, len(x)):
            order = torch.cat([order, torch.randperm(len(x), generator=generator)])
        chosen, order = order[:batch_size], order[batch_size:]
        anneal(optimizer, spec, number / n_steps)
        shifted = random_shift(x[chosen], generator)
        step(optimizer, F.cross_entropy(model(shifted), y[chosen]))
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
    teachers: Teachers,
    few: FewLabelTask,
    device: str,
) -> dict[tuple[int, int, bool], float]:
    """Accuracy of every model on the test split, in one pass over it."""
    right = dict.fromkeys(models, 0)
    for batch in teachers.stream(teachers.spec.test, labelled=True):
        x, y = _pixels_of(batch).to(device), few.targets(batch.label.numpy()).to(device)
        for name, model in models.items():
            right[name] += _n_right(model, x, y)
    return {name: n / len(few.test.rows) for name, n in right.items()}


@torch.no_grad()
def _n_right(model: Classifier, x: Tensor, y: Tensor) -> int:
    return int((model(x).argmax(1) == y).sum())
