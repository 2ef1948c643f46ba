"""Section `score` of a pipeline file: the zero-shot diffusion classifier.

Li et al. 2023, "Your Diffusion Model is Secretly a Zero-Shot Classifier" (arXiv:2303.16203);
Clark and Jaini 2023, "Text-to-Image Diffusion Models are Zero-Shot Classifiers" (arXiv:2303.15233).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from drl_data.spec_base import Positive, Spec, as_tuple

WeightRule = Literal["uniform", "x0", "snr", "truncated_snr", "min_snr", "exp"]


class LearnedWeights(Spec):
    """Weights of the timesteps that make the classes of a labelled split most likely.

    Clark and Jaini 2023, section 3.1: p(class) = softmax(- sum_t w_t loss_t), w_t >= 0. Their rows
    have no part in the accuracy.
    """

    split: str
    rows: Positive = 2000
    """At most so many labelled rows, evenly spaced."""


class StageSpec(Spec):
    """Every candidate that is left has seen `timesteps` of the schedule; then some are dropped.

    `keep` leaves the best ones; `p_value` drops those whose losses are above the best one's by a
    paired t-test (Clark and Jaini 2023, algorithm 1, have 2e-3).
    """

    timesteps: Positive
    """In all, those of the stages before counted; each with all members of the noise."""
    keep: Positive | None = None
    p_value: Annotated[float, Field(gt=0, lt=1)] | None = None


def _as_stage(value: object) -> object:
    """`[50, 5]` is 50 timesteps, keep 5."""
    if isinstance(value, list | tuple) and len(value) == 2:
        return {"timesteps": value[0], "keep": value[1]}
    return {"timesteps": value} if isinstance(value, int) else value


Stage = Annotated[StageSpec, BeforeValidator(_as_stage)]

Weights = WeightRule | tuple[float, ...] | LearnedWeights


def _as_weights(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


class ScoreSpec(Spec):
    """The class of an image is that of the candidate under which its noise is predicted best.

    Without `stages` the table of a finished store is read (tap `loss`). With them losses are
    computed for the candidates that each stage leaves, and no store is needed.
    """

    tap: str | None = None
    """Name of the tap `loss`; not needed where there is one."""
    split: str | None = None
    """Rows that are scored; default: all."""
    view: str | None = None
    """Of a store with views; default: the first."""
    weights: Annotated[Weights, BeforeValidator(_as_weights)] = "uniform"
    """Of the timesteps in the mean: numbers, one for each; `{split: train}`, learned; or a rule.

    `uniform` is 1 for the network's own loss, whatever it predicts (Li et al.). The others weigh
    the squared error of x_0, with SNR = (alpha / sigma)^2: `x0` 1; `snr` SNR, which is the loss of
    the noise; `truncated_snr` max(SNR, 1) (Salimans and Ho 2022); `min_snr` min(SNR, 5) (Hang et
    al. 2023); `exp` exp(-7 t), t = atan(sigma / alpha) 2 / pi, which is the time of Imagen's cosine
    schedule (Clark and Jaini 2023).
    """
    labels: Annotated[tuple[int | str, ...], BeforeValidator(as_tuple)] = ()
    """Label of each candidate, a number or a name; several prompts may have one, of which the best
    counts. Default: a class is its own label, a prompt the label of its name, or of its place where
    labels have no names."""
    stages: tuple[Stage, ...] = ()
    """As `[timesteps, keep]` or in full. Li et al. have `[[50, 5], [500, 1]]` for 10 classes and
    `[[50, 500], [100, 50], [500, 10], [1000, 1]]` for 1,000. Each takes timesteps that are evenly
    spread over the schedule."""
    url: str | None = None
    """Folder or URL of the losses of `stages`; default: `score` in the results folder."""

    @model_validator(mode="after")
    def _stages_shrink(self) -> ScoreSpec:
        for before, after in zip(self.stages, self.stages[1:], strict=False):
            if after.timesteps <= before.timesteps:
                raise ValueError(
                    f"stages: {after.timesteps} timesteps after {before.timesteps}; they count "
                    "those of the stages before, want more"
                )
            if before.keep is None and before.p_value is None:
                raise ValueError("stages: all but the last want keep or p_value")
            if before.keep is not None and after.keep is not None and after.keep >= before.keep:
                raise ValueError(f"stages: keep {after.keep} after {before.keep}; want fewer")
        if self.stages and (self.stages[-1].keep not in (None, 1) or self.stages[-1].p_value):
            raise ValueError("stages: after the last one the best candidate is taken; keep 1")
        return self

    @model_validator(mode="after")
    def _nothing_of_the_other_way(self) -> ScoreSpec:
        if self.stages and isinstance(self.weights, LearnedWeights):
            raise ValueError(
                "weights: they are learned from a whole table, and stages make none; run "
                "`drl score` on a store without stages, and write the weights that it finds here"
            )
        if not self.stages and self.url is not None:
            raise ValueError("url is where losses of stages go; without stages there are none")
        if self.stages and self.view is not None:
            raise ValueError("view is of a store; with stages images are scored as they are")
        return self

    @model_validator(mode="after")
    def _weights_weigh(self) -> ScoreSpec:
        if isinstance(self.weights, tuple) and (min(self.weights, default=0) < 0
                                                or not any(self.weights)):  # fmt: skip
            raise ValueError(f"weights {list(self.weights)}: want none negative, not all 0")
        return self
