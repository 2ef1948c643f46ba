"""What stage 1 trains: a student, a regressor, the policy, and the losses between them.

Shapes: b batch, t timestep, k teacher, c channel, h height, w width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from drl_data.distill_losses import weighted
from drl_data.distill_spec import DistillSpec
from drl_data.errors import SpecError
from drl_data.regressors import Whitening, as_map, build_regressor
from drl_data.student import Student
from drl_data.teachers import (
    LABEL,
    POLICY_DRAW,
    TEACHER_DRAW,
    Target,
    Teachers,
    time_key,
)
from drl_data.time_policy import Drawn, TaskHead, TimePolicy, policy_losses

LOSS = "loss"
"""Name of the sum of all losses."""
FEATURES = "features"
"""Name of the weighted mean of the targets' losses."""


class Distillation(nn.Module):
    """Pixels and targets to losses. Its parameters are all that stage 1 trains."""

    weight: Tensor
    """[target, k]: weights of the targets, each in its teacher's column; they add to 1."""

    def __init__(self, spec: DistillSpec, teachers: Teachers) -> None:
        """Random weights, decided by the first of `spec.seeds`.

        Raises:
            SpecError: a student that cannot be built or has no such stage, a target that is no map,
                a policy without labels to learn from.
        """
        super().__init__()
        seed, targets = spec.seeds[0], teachers.targets
        self.spec, self._targets = spec, targets
        self.student = Student(spec.student, teachers.images, seed)
        stages = [self._stage(target) for target in targets]
        self.student.keep_used(set(stages), teachers.images)
        arrays = [target.array for target in targets]
        channels = self.student.channels
        self.regressor = build_regressor(spec.regressor, channels, stages, arrays, seed)
        statistics = teachers.statistics
        self.whiten = nn.ModuleList(
            Whitening(statistics.mean[t.name], statistics.variance[t.name], t.spec.whiten)
            for t in targets
        )
        self.teachers = list(dict.fromkeys(target.spec.teacher for target in targets))
        weight = torch.zeros(len(targets), len(self.teachers))
        for number, target in enumerate(targets):
            weight[number, self.teachers.index(target.spec.teacher)] = target.spec.weight
        self.register_buffer("weight", weight / weight.sum(), persistent=False)
        self.chosen = [t for t in targets if t.spec.choose == "policy"]
        self.policy, self.task = self._policy(teachers, seed)

    def _stage(self, target: Target) -> str:
        stage = target.spec.stage or self.student.last
        if stage not in self.student.channels:
            raise SpecError(
                f"distill.targets: {target.spec.tap!r} has stage {stage!r}; the student's are "
                f"{', '.join(self.student.channels)}"
            )
        return stage

    def _policy(self, teachers: Teachers, seed: int) -> tuple[TimePolicy | None, TaskHead | None]:
        if not self.chosen:
            return None, None
        if self.spec.asks_labels and len(teachers.classes) < 2:
            raise SpecError(
                f"distill.policy.reward: task, but {self.spec.train!r} has labels of "
                f"{len(teachers.classes)} classes; want reward: distill"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            policy = TimePolicy(teachers.images.n_channels, len(self.chosen[0].timesteps))
            if not self.spec.asks_labels:
                return policy, None
            width = sum(t.array.shape[t.array.channel_axis] for t in self.chosen)
            return policy, TaskHead(width, len(teachers.classes))

    def forward(self, pixels: Tensor, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """uint8 [b, c, h, w] and what `Teachers.batches` gives, to mean losses by target.

        "features" is their weighted mean (with `drop_teachers`, over the teachers that each image
        keeps), "loss" the sum of it and of the policy's losses.
        """
        predicted = self.regressor(self.student(pixels))
        drawn = None
        if self.policy is not None:
            drawn = self.policy.draw(self.student.normalised(pixels), targets[POLICY_DRAW])
        wanted = self.whitened(targets, None if drawn is None else drawn.position)
        each = torch.stack(
            [
                weighted(target.spec.loss, mine, wanted[target.name])
                for target, mine in zip(self._targets, predicted, strict=True)
            ],
            1,
        )
        losses = {t.name: each[:, i].mean() for i, t in enumerate(self._targets)}
        losses[FEATURES] = self._balanced(each, targets).mean()
        total = losses[FEATURES]
        if drawn is not None:
            for name, loss in self._of_policy(drawn, each, wanted, targets).items():
                losses[name] = loss
                total = total + loss
        return {**losses, LOSS: total}

    def whitened(
        self, targets: Mapping[str, Tensor], position: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What is regressed: float32 [b, c, h, w] by target; `position` [b] is the policy's."""
        found = {}
        for target, whiten in zip(self._targets, self.whiten, strict=True):
            x, time = targets[target.name], targets.get(time_key(target.name))
            if target.spec.choose == "policy":
                assert position is not None
                time = position
                x = x[torch.arange(len(x), device=x.device), time]
            found[target.name] = whiten(as_map(x, target.array), time)
        return found

    def _balanced(self, each: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """[b, target] to the weighted mean of each image, [b]."""
        of_teacher = each @ self.weight  # [b, k], each times the teacher's weight
        if not self.spec.drop_teachers:
            return of_teacher.sum(1)
        weight = self.weight.sum(0)
        kept = keep_teachers(
            of_teacher.detach() / weight, targets[TEACHER_DRAW], self.spec.drop_teachers
        )
        return (of_teacher * kept).sum(1) / (weight * kept).sum(1)

    def _of_policy(
        self,
        drawn: Drawn,
        each: Tensor,
        wanted: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        if self.task is None:
            chosen = [i for i, t in enumerate(self._targets) if t.spec.choose == "policy"]
            weight = self.weight[chosen].sum(1)
            return policy_losses(drawn, each[:, chosen] @ weight / weight.sum(), self.spec.policy)
        pooled = torch.cat([wanted[t.name].mean((2, 3)) for t in self.chosen], 1)
        loss = self.task(pooled, targets[LABEL])
        return {**policy_losses(drawn, loss, self.spec.policy), "task": loss.mean()}

    @torch.no_grad()
    def chances(self, pixels: Tensor) -> Tensor:
        """The policy's chances of the timesteps for images uint8 [b, c, h, w]: [b, t]."""
        assert self.policy is not None
        chances: Tensor = self.policy(self.student.normalised(pixels)).exp()
        return chances


def keep_teachers(losses: Tensor, draws: Tensor, chance: float) -> Tensor:
    """1 for teachers that an image keeps, else 0, [b, k], from losses [b, k] and numbers of [0, 1).

    Teacher dropping of UNIC (Sariyildiz et al. 2024): the teacher of the largest loss stays, each
    other one is left out by chance, so that none that is easy to match drowns the others.
    """
    kept = draws >= chance
    kept = kept.scatter(1, losses.argmax(1, keepdim=True), True)
    return kept.to(losses.dtype)


def mean_chances(model: Distillation, batches: Iterable[Tensor]) -> list[float]:
    """The policy's chances, averaged over images uint8 [b, c, h, w] in batches."""
    found = torch.cat([model.chances(pixels) for pixels in batches])
    return [float(chance) for chance in found.double().mean(0)]
