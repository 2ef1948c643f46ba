"""A pipeline file: what to compute (spec.py), and where, how fast and what for.

The sections of a `Pipeline` fall in two groups that never mix:

- content: `dataset images backbone latents condition schedule noise taps` and the numeric settings
  in `features`. Resolved against the data and the weights they become a `FeatureSpec`;
- logistics: `store.url` and `run`. They change where, how much and how fast, never a byte.

Nothing here imports torch, zarr or ray.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)

from drl_data.correspond_spec import CorrespondSpec
from drl_data.diffusion_spec import (
    ConditionSpec,
    LatentSpec,
    NoiseSpec,
    ScheduleSpec,
)
from drl_data.distill_spec import DistillSpec
from drl_data.errors import SpecError
from drl_data.import_spec import SourceSpec
from drl_data.job_specs import ClusterSpec, ProbeSpec, RetrieveSpec
from drl_data.score_spec import ScoreSpec
from drl_data.segment_spec import SegmentSpec
from drl_data.spec import (
    BackboneSpec,
    BucketSpec,
    DatasetSpec,
    ImageSpec,
    NumericSpec,
    Tap,
)
from drl_data.spec_base import (
    Spec,
    as_tuple,
)
from drl_data.synthesize_spec import SynthesizeSpec


class StoreSpec(Spec):
    """Where the features go: a folder or any object-storage URL."""

    url: str
    reuse: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = ()
    """Older stores that have some of them: samples, taps or timesteps. What they have is copied."""


class RunSpec(Spec):
    """Where and how fast; never what."""

    executor: Literal["local", "process", "ray"] = "local"
    """`local`: threads of this process, which a sample that kills its process takes with it;
    `process`: child processes of this machine; `ray`: actors of a Ray cluster."""
    workers: Annotated[int, Field(ge=1)] = 1
    """Child processes or actors."""
    gpus_per_worker: Annotated[float, Field(ge=0)] = 1.0
    """GPUs of one actor, fractions allowed; ignored where the cluster has none."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    address: str | None = None
    """Address of an existing Ray cluster; default: start one on this machine."""
    leases: Annotated[int, Field(ge=1)] | None = None
    """Units in flight in one worker; default: two more than compute at a time."""
    decode_threads: Annotated[int, Field(ge=1)] = 4
    memory_bytes: Annotated[int, Field(ge=1)] = 4 << 30
    """Budget of one worker for pixels and features in flight."""
    max_attempts: Annotated[int, Field(ge=1)] = 3
    """Times that a unit is tried before it is searched for the sample that kills its worker, or
    listed as failed."""
    max_deaths_per_worker: Annotated[int, Field(ge=1)] = 4
    """Deaths in a row, of units not known to kill, before a worker slot is given up."""
    max_failed_in_a_row: Annotated[int, Field(ge=1)] = 20
    """Units that fail one after the other before the run ends: it is no longer the units' fault."""
    grace_s: Annotated[float, Field(ge=0)] = 20.0
    """Seconds that running units have to finish after SIGTERM, SIGINT or a preemption notice."""


class StatsSpec(Spec):
    """Mean and variance of every tap and timestep, over one split or all samples.

    `over: space` has one number for each channel, over samples and positions; `over: samples` one
    for each entry of a row (RAE normalises each channel at each position). `covariance` adds the
    covariance of the channels, [c, c].
    """

    split: str | None = None
    over: Literal["space", "samples"] = "space"
    covariance: bool = False

    @model_validator(mode="after")
    def _covariance_of_channels(self) -> StatsSpec:
        if self.covariance and self.over != "space":
            raise ValueError("covariance is of channels: want over: space")
        return self


class ClassesSpec(Spec):
    """What makes a training class-conditional: the network is told each image's label.

    A share `dropout` of the images is told a class of its own instead, the null class, numbered
    after the others: classifier-free guidance needs it (Ho and Salimans 2022). With `dropout: 0`
    there is none.
    """

    number: Annotated[int, Field(ge=1)] | None = None
    """Default: as many as the labels have names, or the largest label + 1."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1


def _as_classes(value: object) -> object:
    return {"number": value} if isinstance(value, int) else value


class PretrainSpec(Spec):
    """Training of a pixel-space DDPM (Ho et al. 2020): epsilon loss, EMA weights.

    `model` is the configuration of diffusers' `UNet2DModel`, `scheduler` that of `DDPMScheduler`.
    """

    split: str = "train"
    model: dict[str, JsonValue]
    scheduler: dict[str, JsonValue] = {}
    classes: Annotated[ClassesSpec | None, BeforeValidator(_as_classes)] = None
    """Also tell the network the label: a number of classes, or `{}` for the labels' own."""
    steps: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)] = 128
    learning_rate: float = 2e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 200
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    seed: int = 0
    checkpoint_every: Annotated[int, Field(ge=1)] = 1000
    output: str


class TinySpec(Spec):
    """What a pipeline has otherwise on a tiny random model of its family (`drl try`).

    `model` is a family of tiny_models.py, or `python:package.module:factory`; `network` overrides
    its configuration. The sections are partial: what they leave out stays as the pipeline has it,
    but weights and prompt embeddings that the pipeline reads from files become random ones.
    """

    SECTIONS: ClassVar[tuple[str, ...]] = ("images", "latents", "condition", "schedule", "noise")

    model: str
    network: dict[str, JsonValue] = {}
    vae: dict[str, JsonValue] = {}
    """The same of its VAE, for taps inside that."""
    taps: dict[str, Tap] = {}
    """Path of a tap in the pipeline -> path in the tiny model, where that one is shallower, and
    other reductions where that one is narrower."""
    backbone: dict[str, JsonValue] = {}
    images: dict[str, JsonValue] = {}
    latents: dict[str, JsonValue] = {}
    condition: dict[str, JsonValue] = {}
    schedule: dict[str, JsonValue] = {}
    noise: dict[str, JsonValue] = {}
    features: dict[str, JsonValue] = {}


class Pipeline(Spec):
    """One YAML file: images, backbone, features, store, tasks. Paths in it are relative to it."""

    name: str
    description: str = ""
    paper: str | None = None
    """The paper whose system this file reproduces, with its number."""
    dataset: DatasetSpec
    """Without tars only where the features come from a `source`: its files then make the rows."""
    images: ImageSpec | None
    source: SourceSpec | None = None
    """Features that are there already, in place of `backbone`, `schedule` and `taps`."""
    buckets: BucketSpec | None = None
    backbone: BackboneSpec | None = None
    latents: LatentSpec = LatentSpec()
    condition: ConditionSpec = ConditionSpec()
    schedule: ScheduleSpec | None = None
    noise: NoiseSpec = NoiseSpec()
    taps: tuple[Tap, ...] = ()
    features: NumericSpec = NumericSpec()
    store: StoreSpec | None = None
    run: RunSpec = RunSpec()
    results: str = "results"
    """Folder for what tasks find and for the report."""
    probe: ProbeSpec | None = None
    stats: StatsSpec | None = None
    cluster: ClusterSpec | None = None
    retrieve: RetrieveSpec | None = None
    segment: SegmentSpec | None = None
    correspond: CorrespondSpec | None = None
    score: ScoreSpec | None = None
    distill: DistillSpec | None = None
    pretrain: PretrainSpec | None = None
    synthesize: SynthesizeSpec | None = None
    tiny: TinySpec | None = None

    @model_validator(mode="before")
    @classmethod
    def _images_of_a_source(cls, data: object) -> object:
        """Imported features may come without their images."""
        if isinstance(data, Mapping) and data.get("source") is not None:
            return {"dataset": {"tars": {}}, "images": None, **data}
        return data

    @model_validator(mode="after")
    def _one_origin(self) -> Pipeline:
        given = ("backbone", "schedule", "taps", "buckets")
        both = [name for name in given if getattr(self, name)]
        if self.source is not None and both:
            raise ValueError(
                f"source and {', '.join(both)}: features are imported or computed, not both"
            )
        return self

    @property
    def image_spec(self) -> ImageSpec:
        """How images become pixels.

        Raises:
            SpecError: features come from a `source` without their images.
        """
        if self.images is None:
            raise SpecError(f"pipeline {self.name!r} lacks images, and this needs their pixels")
        return self.images

    @classmethod
    def parse(cls, data: object, source: str = "pipeline") -> Pipeline:
        """Validate plain data.

        Raises:
            SpecError: one line for each thing that is wrong: place, got, want.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            lines = [f"  {_explain(problem)}" for problem in error.errors()]
            raise SpecError(f"{source} is not a valid pipeline:\n" + "\n".join(lines)) from error

    @classmethod
    def load(cls, path: str | Path) -> Pipeline:
        """Read a YAML file; its relative paths become relative to the current directory.

        Raises:
            SpecError: if the file is missing, not YAML, or not a valid pipeline.
        """
        path = Path(path)
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise SpecError(
                f"{path}: no such pipeline file; `drl recipes` lists those that come with drl"
            ) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise SpecError(f"{path} is not YAML: {error}") from error
        return cls.parse(data, str(path)).relative_to(path.parent)

    def relative_to(self, folder: Path) -> Pipeline:
        """The same pipeline with each relative path in it joined to `folder`."""

        def join(url: str) -> str:
            return url if is_absolute(url) else str(folder / url)

        given, table = self.dataset, self.dataset.labels
        if table is not None:
            table = table.model_copy(update={"file": join(table.file)})
        tars = {split: tuple(join(url) for url in urls) for split, urls in given.tars.items()}
        changes: dict[str, object] = {
            "results": join(self.results),
            "dataset": given.model_copy(update={"tars": tars, "labels": table}),
        }
        if self.source:
            files = {k: tuple(join(u) for u in v) for k, v in self.source.files.items()}
            changes["source"] = self.source.model_copy(update={"files": files})
        if self.backbone:
            changes["backbone"] = _with_paths(self.backbone, join)
        if self.condition.prompt_embeddings:
            changes["condition"] = self.condition.model_copy(
                update={"prompt_embeddings": join(self.condition.prompt_embeddings)}
            )
        if self.noise.file:
            changes["noise"] = self.noise.model_copy(update={"file": join(self.noise.file)})
        if self.store:
            changes["store"] = StoreSpec(
                url=join(self.store.url), reuse=tuple(join(url) for url in self.store.reuse)
            )
        if self.probe:
            changes["probe"] = self.probe.model_copy(
                update={"compare": {k: join(v) for k, v in self.probe.compare.items()}}
            )
        if self.segment and self.segment.label_folder:
            changes["segment"] = self.segment.model_copy(
                update={"label_folder": join(self.segment.label_folder)}
            )
        if self.correspond:
            paths: dict[str, object] = {
                "stores": {name: join(path) for name, path in self.correspond.stores.items()}
            }
            if self.correspond.pairs:
                paths["pairs"] = join(self.correspond.pairs)
            changes["correspond"] = self.correspond.model_copy(update=paths)
        if self.score and self.score.url:
            changes["score"] = self.score.model_copy(update={"url": join(self.score.url)})
        if self.distill:
            changes["distill"] = _distill_with_paths(self.distill, join)
        if self.pretrain:
            changes["pretrain"] = self.pretrain.model_copy(
                update={"output": join(self.pretrain.output)}
            )
        if self.synthesize:
            changes["synthesize"] = _synthesize_with_paths(self.synthesize, join)
        return self.model_copy(update=changes)


def is_absolute(url: str) -> bool:
    """True for an absolute path or a URL with a scheme."""
    return url.startswith("/") or re.match(r"^[A-Za-z][A-Za-z0-9+.-]*:", url) is not None


def _with_paths(backbone: BackboneSpec, join: Callable[[str], str]) -> BackboneSpec:
    """The same backbone with `join` applied to its local paths."""
    update: dict[str, object] = {
        "lora": tuple(lora.model_copy(update={"path": join(lora.path)}) for lora in backbone.lora)
    }
    if _is_relative_folder(backbone.model):
        folder = join(backbone.model)  # which must still be told from a hub id
        is_told = is_absolute(folder) or folder.startswith(".")
        update["model"] = folder if is_told else f"./{folder}"
    if backbone.weights is not None:
        update["weights"] = join(backbone.weights)
    return backbone.model_copy(update=update)


def _synthesize_with_paths(spec: SynthesizeSpec, join: Callable[[str], str]) -> SynthesizeSpec:
    """The same section with `join` applied to its local paths."""
    update: dict[str, object] = {"url": join(spec.url)}
    if spec.backbone is not None:
        update["backbone"] = _with_paths(spec.backbone, join)
    if spec.prompts is not None and spec.prompts.file is not None:
        update["prompts"] = spec.prompts.model_copy(update={"file": join(spec.prompts.file)})
    return spec.model_copy(update=update)


def _distill_with_paths(distill: DistillSpec, join: Callable[[str], str]) -> DistillSpec:
    """The same section with `join` applied to its local paths."""
    update: dict[str, object] = {
        "teachers": {name: join(url) for name, url in distill.teachers.items()}
    }
    if distill.student.weights is not None:
        weights = join(distill.student.weights)
        update["student"] = distill.student.model_copy(update={"weights": weights})
    return distill.model_copy(update=update)


def _is_relative_folder(model: str) -> bool:
    """Hub ids look like `owner/name`; relative folders must start with a dot to be told apart."""
    return model.startswith((".", "..")) and not is_absolute(model)


def _explain(problem: Mapping[str, object]) -> str:
    loc = problem["loc"]
    assert isinstance(loc, Sequence)
    place = ".".join(str(part) for part in loc) or "top level"
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(loc[-1]), _fields_at(loc[:-1]), n=1)
        known = ", ".join(_fields_at(loc[:-1]))
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {known}"
        return f"{place}: unknown key{hint}"
    if problem["type"] == "missing":
        return f"{place}: missing, and it has no default"
    got = json.dumps(problem.get("input"), default=str)
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"{place}: {message}" + (f" (got {got})" if len(got) <= 80 else "")


def _fields_at(loc: Sequence[object]) -> list[str]:
    model: type[BaseModel] = Pipeline
    for part in loc:
        field = model.model_fields.get(str(part))
        model = (field and _model_in(field.annotation)) or model
    return sorted(model.model_fields)


def _model_in(annotation: object) -> type[BaseModel] | None:
    """The spec that a field holds, alone or in a union, a tuple, a mapping."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model_in(argument) for argument in get_args(annotation))
    return next((model for model in found if model is not None), None)
