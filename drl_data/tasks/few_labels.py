"""Stage 2 of distillation: few labels. The student against the same architecture from scratch.

Both have the same labels, augmentation, schedule and learning rate.

Shapes: b batch, c channel, h height, w width.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from drl_data.distill_spec import DistillSpec
from drl_data.errors import SpecError
from drl_data.intervals import mean_and_half
from drl_data.optimisation import anneal, optimizer_of, step
from drl_data.progress import Progress
from drl_data.selection import Rows, Selection, select
from drl_data.spec_base import Spec
from drl_data.student import Classifier, Student
from drl_data.teachers import Teachers, positions_of

MIN_BATCH = 32
MIN_STEPS = 4
"""Fine-tuning on few labels: images of a step (or all, if fewer), and steps of an epoch."""

Arm = tuple[float, ...]


@dataclass(frozen=True)
class Budget:
    """How many labels: so many of each class, or a share of each."""

    per_class: int | None = None
    fraction: float | None = None

    def counts(self, available: Rows) -> Rows:
        """Labels of each class, of so many that there are.

        A share is rounded so that the classes together have it (largest remainders; of equal ones
        the first), and each has one at least.
        """
        if self.fraction is None:
            return np.full(len(available), self.per_class)
        quota = self.fraction * available
        counts = np.floor(quota + 1e-9).astype(np.int64)
        left = round(self.fraction * int(available.sum())) - int(counts.sum())
        order = np.argsort(counts - quota, kind="stable")
        counts[order[: max(left, 0)]] += 1
        found: Rows = np.minimum(counts.clip(1), available)
        return found


class FewLabels(Spec):
    """Test accuracies 0..1 with some labels, one number for each seed."""

    labels_per_class: int | None
    """None where a share of the labels was asked for."""
    fraction: float | None = None
    n_labels: int
    distilled: tuple[float, ...]
    scratch: tuple[float, ...]
    distilled_train: tuple[float, ...]
    """Accuracy on the labels learnt from, in the end; well below 1 means too few steps."""
    scratch_train: tuple[float, ...]
    rival: str = "from scratch"
    """What the second arm began with."""

    @property
    def labels(self) -> str:
        """How many labels, in words."""
        if self.fraction is not None:
            return f"{100 * self.fraction:g} %"
        return str(self.labels_per_class)

    @property
    def budget(self) -> str:
        """The same as a part of a sentence."""
        if self.fraction is not None:
            return f"{self.labels} of the labels ({self.n_labels})"
        return f"{self.labels} label{'s' if self.labels_per_class != 1 else ''} per class"

    def verdict(self) -> str:
        """One sentence on who is better: the paired difference over seeds, with its 95 % interval.

        The one distilled student is the same for all seeds; how another one would do is not in it.
        """
        differences = [a - b for a, b in zip(self.distilled, self.scratch, strict=True)]
        mean, half = mean_and_half(differences)
        a, b = mean_and_half(self.distilled)[0], mean_and_half(self.scratch)[0]
        numbers = f"{self.budget}: distilled {a:.1%}, {self.rival} {b:.1%}"
        if len(differences) < 2:
            return f"{numbers}; one seed says nothing about chance"
        n = len(differences)
        if abs(mean) <= half:
            gap = f"{100 * mean:+.1f} ± {100 * half:.1f}"
            return f"{numbers}; {gap} points are within the noise of {n} seeds"
        gap = f"{100 * abs(mean):.1f} ± {100 * half:.1f}"
        outcome = "beats" if mean > 0 else "loses to"
        rival = self.rival.removeprefix("from ")
        return f"{numbers}; distilled {outcome} {rival} by {gap} points over {n} seeds"


@dataclass(frozen=True)
class FewLabelTask:
    """Which rows are learnt from, and the test rows; labels as 0 .. n_classes-1."""

    classes: npt.NDArray[np.int64]
    train: Selection
    test: Selection
    spec: DistillSpec

    @classmethod
    def of(cls, teachers: Teachers) -> FewLabelTask | None:
        """Labelled rows of both splits; None if no comparison is wanted.

        Raises:
            SpecError: a split without labels, or with fewer of one class than asked for.
        """
        store, spec = teachers.store, teachers.spec
        if spec.test is None:
            return None
        train = select(store, split=spec.train, labelled=True)
        test = select(store, split=spec.test, labelled=True)
        classes, counts = np.unique(train.labels, return_counts=True)
        most = max(spec.labels_per_class, default=0)
        if counts.min() < most:
            raise SpecError(
                f"distill.labels_per_class {most}: class {classes[counts.argmin()]} has only "
                f"{counts.min()} labelled rows in {spec.train!r}; ask for fewer"
            )
        return cls(classes, train, test, spec)

    @property
    def budgets(self) -> list[Budget]:
        """All that are asked for."""
        return [
            *(Budget(per_class=n) for n in self.spec.labels_per_class),
            *(Budget(fraction=share) for share in self.spec.label_fractions),
        ]

    def targets(self, labels: Rows) -> Tensor:
        """Positions of labels in `classes`; -1 for a label that the train split does not have."""
        return torch.from_numpy(positions_of(labels, self.classes))

    def draw(self, budget: Budget, seed: int) -> Rows:
        """Rows of each class, increasing, by digests of (seed, key); of one class, a larger draw
        holds the smaller."""
        digests = np.array(
            [
                hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
                for key in self.train.keys.to_pylist()
            ]
        )
        order = np.argsort(digests, kind="stable")
        of_class = [order[self.train.labels[order] == label] for label in self.classes]
        counts = budget.counts(np.array([len(rows) for rows in of_class]))
        chosen = [rows[:n] for rows, n in zip(of_class, counts.tolist(), strict=True)]
        return np.sort(self.train.rows[np.concatenate(chosen)])


def compare(
    student: Student, teachers: Teachers, few: FewLabelTask, device: str, progress: Progress
) -> list[FewLabels]:
    """Fine-tune both arms for every number of labels and seed, then test them all in one pass."""
    spec = few.spec
    drawn = {(budget, s): few.draw(budget, s) for budget in few.budgets for s in spec.seeds}
    every = np.unique(np.concatenate(list(drawn.values())))
    pixels = teachers.pixels(every)
    labels = few.targets(few.train.labels[few.train.places(every)])
    models: dict[tuple[Budget, int, bool], Classifier] = {}
    fitted: dict[tuple[Budget, int, bool], float] = {}
    with progress.bar("few labels", 2 * len(drawn), "students") as bar:
        for (budget, seed), rows in drawn.items():
            places = np.searchsorted(every, rows)
            x, y = pixels[places].to(device), labels[places].to(device)
            for distilled in (True, False):
                body = (
                    copy.deepcopy(student)
                    if distilled
                    else Student(spec.student, teachers.images, seed)
                )
                model = Classifier(body, len(few.classes), seed).to(device)
                fine_tune(model, x, y, spec, seed)
                models[budget, seed, distilled] = model
                fitted[budget, seed, distilled] = _n_right(model, x, y) / len(y)
                bar.advance()
    tested = _test(models, teachers, few, device)

    def arm(
        found: Mapping[tuple[Budget, int, bool], float], budget: Budget, distilled: bool
    ) -> Arm:
        return tuple(found[budget, seed, distilled] for seed in spec.seeds)

    return [
        FewLabels(
            labels_per_class=budget.per_class,
            fraction=budget.fraction,
            n_labels=len(drawn[budget, spec.seeds[0]]),
            distilled=arm(tested, budget, True),
            scratch=arm(tested, budget, False),
            distilled_train=arm(fitted, budget, True),
            scratch_train=arm(fitted, budget, False),
            rival="from scratch" if spec.student.weights is None else "from the same weights",
        )
        for budget in few.budgets
    ]


def fine_tune(model: Classifier, x: Tensor, y: Tensor, spec: DistillSpec, seed: int) -> None:
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


def _test(
    models: Mapping[tuple[Budget, int, bool], Classifier],
    teachers: Teachers,
    few: FewLabelTask,
    device: str,
) -> dict[tuple[Budget, int, bool], float]:
    """Accuracy of every model on the test split, in one pass over it."""
    right = dict.fromkeys(models, 0)
    for x, y in _batches(teachers, few):
        for name, model in models.items():
            right[name] += _n_right(model, x.to(device), y.to(device))
    return {name: n / len(few.test.rows) for name, n in right.items()}


def _batches(teachers: Teachers, few: FewLabelTask) -> Iterator[tuple[Tensor, Tensor]]:
    """Pixels and classes of the test split."""
    rows, size = few.test.rows, few.spec.batch_size
    for start in range(0, len(rows), size):
        where = slice(start, start + size)
        yield teachers.pixels(rows[where]), few.targets(few.test.labels[where])


@torch.no_grad()
def _n_right(model: Classifier, x: Tensor, y: Tensor) -> int:
    return int((model(x).argmax(1) == y).sum())
