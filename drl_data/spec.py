"""What to compute, as frozen values with a fingerprint; and where and how fast, as separate ones.

A `Pipeline` is one YAML file. Its sections fall in two groups that never mix:

- content: `dataset images backbone latents condition schedule noise taps` and the numeric settings
  in `features`. Resolved against the data and the weights they become a `FeatureSpec`, whose
  `fingerprint()` names the content of a store;
- logistics: `store.url` and `run`. They change where, how much and how fast, never a byte.

Nothing here imports torch, zarr or ray.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)

from drl_data.errors import SpecError

FORMAT_VERSION = 1
"""Version of the store format and of the fingerprint; STORE.md says what it covers."""

DType = Literal["float32", "float16", "bfloat16"]
StorageDType = Literal[DType, "float8_e4m3fn", "float8_e5m2", "int8", "uint8"]
"""Types that features are stored in; quantise.py and STORE.md say how."""
ITEMSIZE: Mapping[str, int] = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
    "uint8": 1,
}


class Spec(BaseModel):
    """A frozen value; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _as_tuple(value: object) -> object:
    """A single item where a list is meant: `tars: a.tar` reads as `tars: [a.tar]`."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _as_splits(value: object) -> object:
    """`tars: a.tar` and `tars: [a.tar]` read as `tars: {all: [a.tar]}`."""
    return value if isinstance(value, Mapping) else {"all": value}


StrTuple = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]


# --- content ------------------------------------------------------------------------------------


class DatasetSpec(Spec):
    """WebDataset tars and which of their members mean what.

    `tars` maps the name of a split to URLs; each may hold braces (`{000..012}`) and globs. A plain
    string or list is one split called `all`. Row order is: splits as written, patterns as written,
    expansions sorted, samples as in the tar.
    """

    tars: Annotated[dict[str, StrTuple], BeforeValidator(_as_splits)]
    image: StrTuple = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")
    """Extensions that hold the image, in order of preference; compared in lower case."""
    label: str | None = "cls"
    """Extension of the label, or `EXT:FIELD` for a field of a JSON member."""
    caption: str | None = "txt"
    """Extension of the caption, or `EXT:FIELD` for a field of a JSON member."""


def _size_pair(value: object) -> object:
    return (value, value) if isinstance(value, int) else value


class CropViews(Spec):
    """`n` views of random crops, resized to the size of the images (Szegedy et al. 2015, as
    torchvision's RandomResizedCrop), and flipped with probability one half.

    A crop is a function of (seed, key of the sample, number of the view).
    """

    crop: Literal["seeded"] = "seeded"
    n: Annotated[int, Field(ge=1)] = 1
    seed: int = 0
    area: tuple[float, float] = (0.25, 1.0)
    """Least and largest part of the image's area."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Least and largest width over height."""
    flip: bool = True

    @model_validator(mode="after")
    def _ranges(self) -> CropViews:
        if not 0 < self.area[0] <= self.area[1] <= 1 or not 0 < self.aspect[0] <= self.aspect[1]:
            raise ValueError(
                f"area {self.area}, aspect {self.aspect}: want (least, largest) above 0, and an "
                "area of at most 1"
            )
        return self


class ImageSpec(Spec):
    """From bytes to pixels [c, h, w] uint8: decode, orient, composite, resize, crop.

    `resize: shortest` scales the shorter side to the target and keeps the aspect (then `crop:
    center` cuts the rest), `stretch` scales both sides, `none` demands the exact size. Filters are
    Pillow's, which antialias when they shrink.
    """

    size: Annotated[tuple[int, int], BeforeValidator(_size_pair)]
    """Height and width in pixels, or one number for both."""
    resize: Literal["shortest", "stretch", "none"] = "shortest"
    filter: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] = "bicubic"
    mode: Literal["RGB", "L"] = "RGB"
    background: tuple[int, int, int] = (255, 255, 255)
    """Colour under transparent pixels, RGB 0..255."""
    range: tuple[float, float] = (-1.0, 1.0)
    """What uint8 0 and 255 become for the backbone."""
    max_pixels: int = 178_956_970
    """An image with more pixels than this is refused before it is decoded (Pillow's bomb limit)."""

    views: tuple[Literal["id", "hflip"] | CropViews, ...] = ()
    """Views of each image that features are computed of: `id` (the image), `hflip` (mirrored), and
    crops. With any, the store has an axis `view`, in this order; without, none."""

    @model_validator(mode="after")
    def _views_once(self) -> ImageSpec:
        names = self.view_names
        if len(set(names)) != len(names):
            raise ValueError(f"views {list(names)}: want none twice; give crops different seeds")
        return self

    @property
    def view_names(self) -> tuple[str, ...]:
        """`id`, `hflip`, `crop-SEED-NUMBER`: one for each entry of the axis `view`."""
        return tuple(
            name
            for view in self.views
            for name in (
                [f"crop-{view.seed}-{i}" for i in range(view.n)]
                if isinstance(view, CropViews)
                else [view]
            )
        )

    @property
    def n_views(self) -> int:
        """Entries of the axis `view`; 0 without one."""
        return len(self.view_names)

    @property
    def n_channels(self) -> int:
        """3 for RGB, 1 for L."""
        return 3 if self.mode == "RGB" else 1


class BackboneSpec(Spec):
    """The frozen model: a hub id with a pinned revision, a local folder, or `bundled:NAME`.

    `model` and `revision` say where the weights are; what enters the fingerprint is the digest of
    the files. `init: random` builds the same architecture with seeded random weights, the control
    that every claim about learnt features needs.
    """

    model: str
    revision: str | None = None
    variant: str | None = None
    """diffusers' weight variant, for example `fp16`."""
    init: Literal["pretrained", "random"] = "pretrained"
    init_seed: int = 0
    dtype: DType = "float32"
    """Precision of the forward pass."""


class LatentSpec(Spec):
    """How an image becomes the VAE's latents; without effect on a backbone that takes pixels.

    `sample` draws from the posterior with per-sample noise, `mean` takes its mean (which is its
    mode). `scale: false` leaves out the VAE's scaling factor (VPD does).
    """

    posterior: Literal["sample", "mean"] = "sample"
    scale: bool = True


class ConditionSpec(Spec):
    """What the denoiser is told about the image besides the time.

    Text backbones take `prompt`, or `prompt_embeddings`: a safetensors file with one tensor
    [token, channel] called `prompt_embeds`, so that no text encoder is needed. Class-conditional
    ones take `class_label`; `null` is the model's unconditional class.
    """

    prompt: str = ""
    prompt_embeddings: str | None = None
    class_label: int | Literal["null"] = "null"


class ScheduleSpec(Spec):
    """Positions on the model's noise schedule and the convention that they are written in.

    `ddpm_index`: 0 (clean) .. n-1, the index into the scheduler's alphas_cumprod, which is also
    what the network is told (DIFT, ODISE, CleanDIFT ...).
    """

    convention: Literal["ddpm_index"] = "ddpm_index"
    timesteps: tuple[int, ...]

    @model_validator(mode="after")
    def _distinct(self) -> ScheduleSpec:
        if not self.timesteps or len(set(self.timesteps)) != len(self.timesteps):
            raise ValueError(f"timesteps {list(self.timesteps)}: want at least one, none twice")
        return self


class NoiseSpec(Spec):
    """The noise that corrupts the latents.

    `per_sample`: seeded by (seed, key, member), `shared`: one tensor for all samples (DDPM-Seg,
    ODISE), `none`: clean latents, whatever time the network is told. `members` > 1 averages the
    features of that many draws in float32 (DIFT uses 8). `per_timestep` draws anew for each
    timestep instead of moving one draw along the schedule.
    """

    kind: Literal["per_sample", "shared", "none"] = "per_sample"
    seed: int = 0
    members: Annotated[int, Field(ge=1)] = 1
    per_timestep: bool = False

    @model_validator(mode="after")
    def _members_need_noise(self) -> NoiseSpec:
        if self.kind == "none" and (self.members > 1 or self.per_timestep):
            raise ValueError("members and per_timestep have no meaning with kind: none")
        return self


class TapSpec(Spec):
    """A named tensor inside the backbone, and what is done to it on the device.

    `path` is `module.path[@site][.part]` as taps.py defines it, with globs; `reduce` is a list of
    reductions as reduce.py defines them, applied in order. A plain string in a pipeline file is a
    tap without reductions.
    """

    path: str
    name: str | None = None
    """Name of the array in the store; default: the resolved path."""
    reduce: StrTuple = ()


def _as_tap(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


Tap = Annotated[TapSpec, BeforeValidator(_as_tap)]


class NumericSpec(Spec):
    """Numeric settings that change bytes: storage dtype, batch shape, unit size, overflow.

    `batch_size` is content, because another batch shape is not bit-equal on a GPU. Batches never
    cross units and are padded to `batch_size`, so each sees one shape.
    """

    dtype: StorageDType = "float16"
    """Type that features are stored in."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    rows_per_unit: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Rows of one unit, a multiple of `batch_size`; `auto` aims at 64 MiB for the largest shard."""
    overflow: Literal["error", "clip"] = "error"
    """Values that the storage dtype cannot hold: fail the unit, or clip them and count them."""

    @model_validator(mode="after")
    def _batches_fill_units(self) -> NumericSpec:
        if self.rows_per_unit != "auto" and self.rows_per_unit % self.batch_size:
            raise ValueError(
                f"rows_per_unit {self.rows_per_unit} is not a multiple of batch_size "
                f"{self.batch_size}; batches never cross units"
            )
        return self


class ResolvedTime(Spec):
    """One timestep, resolved: what was asked for, what the network is told, and the corruption.

    x_t = alpha * x_0 + sigma * noise.
    """

    requested: float
    convention: str
    model_time: float
    alpha: float
    sigma: float


class ArraySpec(Spec):
    """One feature array: name, the tap that it comes from, and the shape of one row.

    `dims` names the axes of `shape`: ("channel", "height", "width"), ("token", "channel") or
    ("channel",), or those with "head" in front. In the store the axes ("sample", "timestep") come
    before them.
    """

    name: str
    tap: str
    """The resolved address: module path and site, without globs."""
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: StorageDType
    timesteps: Literal["each", "mean", "none"] = "each"
    """`each` timestep has an entry; or there is one, their `mean`, or that of a tensor that has
    `none` (of the VAE)."""
    quantises: str | None = None
    """The integer array that these are the scales or offsets of."""
    views: int = 0
    """Length of the axis `view`, which comes after `sample`; 0 without one."""

    def n_times(self, n_timesteps: int) -> int:
        """Length of the array's time axis in a store of `n_timesteps`."""
        return n_timesteps if self.timesteps == "each" else 1

    def n_cells(self, n_timesteps: int) -> int:
        """Pairs (view, entry of the time axis), each of which is one shard of a unit."""
        return max(self.views, 1) * self.n_times(n_timesteps)

    def cell(self, timestep: int, view: int, n_timesteps: int) -> int:
        """Which of them a timestep of a view is, given its position in the store; views outside."""
        own = timestep if self.timesteps == "each" else 0
        return view * self.n_times(n_timesteps) + own

    @property
    def bytes_per_row(self) -> int:
        """Bytes of one sample at one timestep, in one view."""
        n = ITEMSIZE[self.dtype]
        for side in self.shape:
            n *= side
        return n


class FeatureSpec(Spec):
    """The identity of a store's content: everything that changes a byte, nothing that does not.

    Made by resolving a `Pipeline` against its data (`dataset`: digest of the sample index) and its
    model (`weights`: digest of the files, or of configuration and seed for random weights;
    `condition_files`: digests of embeddings that the condition names).
    """

    format: int = FORMAT_VERSION
    dataset: str
    n_samples: Annotated[int, Field(ge=1)]
    images: ImageSpec
    weights: str
    backbone_dtype: DType
    latents: LatentSpec
    condition: ConditionSpec
    condition_files: dict[str, str] = {}
    schedule: ScheduleSpec
    noise: NoiseSpec
    taps: tuple[TapSpec, ...]
    dtype: StorageDType
    batch_size: int
    rows_per_unit: int
    overflow: Literal["error", "clip"]

    def fingerprint(self) -> str:
        """32 hexadecimal digits of the SHA-256 of the canonical JSON of this spec.

        Fields that have their default are left out, at every depth, so that a field that a later
        version adds does not orphan the stores of an earlier one. Hence a default never changes,
        and a field that holds one of several specs needs a key without default to tell them apart.
        """
        content = {**self.model_dump(mode="json", exclude_defaults=True), "format": self.format}
        return hashlib.sha256(canonical_json(content)).hexdigest()[:32]

    def differences(self, other: FeatureSpec) -> list[str]:
        """Lines `path: mine != theirs`, one for each leaf that differs; empty if equal."""
        mine = dict(_leaves(self.model_dump(mode="json")))
        theirs = dict(_leaves(other.model_dump(mode="json")))
        return [
            f"{path}: {json.dumps(mine.get(path))} != {json.dumps(theirs.get(path))}"
            for path in sorted(mine.keys() | theirs.keys())
            if mine.get(path) != theirs.get(path)
        ]


def canonical_json(value: JsonValue) -> bytes:
    """UTF-8 JSON with sorted keys and no white space: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal.

    Raises:
        SpecError: if there is no such file.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SpecError(f"{path}: {error.strerror}") from error


def _leaves(value: JsonValue, path: str = "") -> list[tuple[str, JsonValue]]:
    if isinstance(value, dict) and value:
        return [leaf for k in value for leaf in _leaves(value[k], f"{path}.{k}" if path else k)]
    if isinstance(value, list) and value:
        return [leaf for i, v in enumerate(value) for leaf in _leaves(v, f"{path}[{i}]")]
    return [(path, value)]


# --- logistics ----------------------------------------------------------------------------------


class StoreSpec(Spec):
    """Where the features go: a folder or any object-storage URL."""

    url: str


class RunSpec(Spec):
    """Where and how fast; never what."""

    executor: Literal["local", "ray"] = "local"
    workers: Annotated[int, Field(ge=1)] = 1
    """Actors of the ray executor."""
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
    """Times that a unit is tried before it is listed as failed."""


# --- tasks --------------------------------------------------------------------------------------


class ProbeSpec(Spec):
    """Linear probes for every (tap, timestep) cell, trained together in one pass.

    The best cell is chosen on a validation part of the train split (rows whose key hashes below
    `validation`), its accuracy is reported on the test split, which is used for nothing else.
    """

    train: str = "train"
    test: str = "test"
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.15
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: Annotated[int, Field(ge=1)] = 60
    batch_size: Annotated[int, Field(ge=1)] = 256
    learning_rate: float = 1e-2
    weight_decay: float = 1e-3
    pool: Annotated[int, Field(ge=1)] = 1
    """Side of the grid that maps are averaged to before the classifier: 1 is the mean over space,
    2 is what "Diffusion models beat GANs on image classification" uses. A smaller map stays."""
    pixels: bool = True
    """Also probe the raw pixels, the floor that features must beat."""
    compare: dict[str, str] = {}
    """Other pipeline files whose stores are probed beside this one: {label: path}."""


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


class StudentSpec(Spec):
    """A student from `transformers`, built from its configuration (no weights are downloaded)."""

    model_type: str = "resnet"
    config: dict[str, JsonValue] = {}


class DistillSpec(Spec):
    """A student learns the stored features of the same images, then a linear head on few labels.

    Compared with the same student trained from scratch on those labels.
    """

    tap: str
    timestep: int
    train: str = "train"
    test: str = "test"
    student: StudentSpec = StudentSpec()
    epochs: Annotated[int, Field(ge=1)] = 30
    finetune_epochs: Annotated[int, Field(ge=1)] = 40
    batch_size: Annotated[int, Field(ge=1)] = 128
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    labels_per_class: tuple[int, ...] = (1, 5, 20)
    seeds: tuple[int, ...] = (0, 1, 2)


class PretrainSpec(Spec):
    """Training of a pixel-space DDPM (Ho et al. 2020): epsilon loss, EMA weights.

    `model` is the configuration of diffusers' `UNet2DModel`, `scheduler` that of `DDPMScheduler`.
    """

    split: str = "train"
    model: dict[str, JsonValue]
    scheduler: dict[str, JsonValue] = {}
    steps: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)] = 128
    learning_rate: float = 2e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 200
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    seed: int = 0
    checkpoint_every: Annotated[int, Field(ge=1)] = 1000
    output: str


# --- the pipeline file --------------------------------------------------------------------------


class Pipeline(Spec):
    """One YAML file: images, backbone, features, store, tasks. Paths in it are relative to it."""

    name: str
    description: str = ""
    paper: str | None = None
    """The paper whose system this file reproduces, with its number."""
    dataset: DatasetSpec
    images: ImageSpec
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
    distill: DistillSpec | None = None
    pretrain: PretrainSpec | None = None

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
        except yaml.YAMLError as error:
            raise SpecError(f"{path} is not YAML: {error}") from error
        return cls.parse(data, str(path)).relative_to(path.parent)

    def relative_to(self, folder: Path) -> Pipeline:
        """The same pipeline with each relative path in it joined to `folder`."""

        def join(url: str) -> str:
            return url if is_absolute(url) else str(folder / url)

        changes: dict[str, object] = {
            "results": join(self.results),
            "dataset": self.dataset.model_copy(
                update={
                    "tars": {k: tuple(join(u) for u in v) for k, v in self.dataset.tars.items()}
                }
            ),
        }
        if self.backbone and _is_relative_folder(self.backbone.model):
            changes["backbone"] = self.backbone.model_copy(
                update={"model": join(self.backbone.model)}
            )
        if self.condition.prompt_embeddings:
            changes["condition"] = self.condition.model_copy(
                update={"prompt_embeddings": join(self.condition.prompt_embeddings)}
            )
        if self.store:
            changes["store"] = StoreSpec(url=join(self.store.url))
        if self.probe:
            changes["probe"] = self.probe.model_copy(
                update={"compare": {k: join(v) for k, v in self.probe.compare.items()}}
            )
        if self.pretrain:
            changes["pretrain"] = self.pretrain.model_copy(
                update={"output": join(self.pretrain.output)}
            )
        return self.model_copy(update=changes)


def is_absolute(url: str) -> bool:
    """True for an absolute path or a URL with a scheme."""
    return url.startswith("/") or re.match(r"^[A-Za-z][A-Za-z0-9+.-]*:", url) is not None


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
        if field is None:
            continue
        nested = re.findall(r"[A-Za-z]+Spec", str(field.annotation))
        if nested:
            model = globals()[nested[0]]
    return sorted(model.model_fields)
