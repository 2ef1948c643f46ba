"""What to compute, as frozen values with a fingerprint; where and how fast is in pipeline.py.

Everything here is content: resolved against the data and the weights it becomes a `FeatureSpec`,
whose `fingerprint()` names the content of a store.

Nothing here imports torch, zarr or ray.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)

from drl_data.diffusion_spec import (
    ConditionSpec,
    LatentSpec,
    NoiseSpec,
    ScheduleSpec,
)
from drl_data.errors import SpecError
from drl_data.spec_base import (
    ITEMSIZE,
    DType,
    Positive,
    SizePair,
    Spec,
    StorageDType,
    StrTuple,
    as_tuple,
    canonical_json,
    differences,
    size_pair,
)

FORMAT_VERSION = 1
"""Version of the store format and of the fingerprint; STORE.md says what it covers."""


def as_splits(value: object) -> object:
    """`tars: a.tar` and `tars: [a.tar]` read as `tars: {all: [a.tar]}`."""
    return value if isinstance(value, Mapping) else {"all": value}


class LabelsSpec(Spec):
    """A table with a line for each sample: labels, captions or splits that the tars do not have."""

    file: str
    """Parquet, or CSV (`.tsv`: tabs) with a line of names; a path or URL."""
    key: str = "key"
    """Column of the samples' keys (a tar's member `a/b.jpg` has the key `a/b`); each once."""
    label: str | None = "label"
    """Column of the labels, integers or texts; null: labels are those of the tars."""
    caption: str | None = None
    """Column of the captions; null: those of the tars."""
    split: str | None = None
    """Column of the names of splits; null, or no value in a line: as `tars` says."""


class DatasetSpec(Spec):
    """WebDataset tars and which of their members mean what.

    `tars` maps the name of a split to URLs; each may hold braces (`{000..012}`) and globs. A plain
    string or list is one split called `all`. Row order is: splits as written, patterns as written,
    expansions sorted, samples as in the tar.
    """

    tars: Annotated[dict[str, StrTuple], BeforeValidator(as_splits)]
    image: StrTuple = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")
    """Extensions that hold the image, in order of preference; compared in lower case."""
    label: str | None = "cls"
    """Extension of the label, or `EXT:FIELD` for a field of a JSON member."""
    caption: str | None = "txt"
    """Extension of the caption, or `EXT:FIELD` for a field of a JSON member."""
    labels: LabelsSpec | None = None
    """A table that has them instead."""


Channel = Annotated[int, Field(ge=0, le=255)]
"""One channel of a colour."""


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


VIEW_NAMES = {"seeded": "crop", "padded": "padded"}


class PaddedCropViews(Spec):
    """`n` views of the fitted image padded by `padding` black pixels on every side and cropped to
    its size again at a random place, flipped with probability one half: CIFAR's augmentation (He et
    al. 2016, section 4.2; torchvision's RandomCrop).

    A crop is a function of (seed, key of the sample, number of the view).
    """

    crop: Literal["padded"]
    n: Annotated[int, Field(ge=1)] = 1
    seed: int = 0
    padding: Positive = 4
    flip: bool = True


class ImageSpec(Spec):
    """From bytes to pixels [c, h, w] uint8: decode, orient, composite, resize, crop.

    With `frames` above 1 a sample is a window of a video, [c, f, h, w]: one member of the tar that
    holds its frames in order, as an animated WebP, an animated PNG or GIF, or a TIFF of several
    pages does. Every frame is treated alike.

    `resize: shortest` scales the shorter side to the target and keeps the aspect (then `crop:
    center` cuts the rest), `pad` scales the longer side, keeps the aspect, centres the image and
    fills the rest (sd-dino, GeoAware-SC), `stretch` scales both sides, `none` demands the exact
    size. Filters are Pillow's, which antialias when they shrink. Where a pixel of the original ends
    up is in fitting.py.
    """

    size: Annotated[SizePair, BeforeValidator(size_pair)]
    """Height and width in pixels, or one number for both."""
    resize: Literal["shortest", "stretch", "none", "pad"] = "shortest"
    shorter_side: Positive | None = None
    """What `shortest` scales the shorter side to, before the centre is cropped to `size`; not said:
    as much as the size needs. With it, sizes and corners are rounded as torchvision's Resize and
    CenterCrop do: 256 and then 224 is how DINO, MSN and MoCo are evaluated."""
    fill: Literal["edge"] | tuple[Channel, Channel, Channel] = (0, 0, 0)
    """What `pad` fills with: a colour, RGB 0..255, or the nearest pixels of the image."""
    filter: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] = "bicubic"
    mode: Literal["RGB", "L"] = "RGB"
    background: tuple[int, int, int] = (255, 255, 255)
    """Colour under transparent pixels, RGB 0..255."""
    range: tuple[float, float] = (-1.0, 1.0)
    """What uint8 0 and 255 become for the backbone."""
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    """Then (x - mean) / std of each channel, as encoders want: with `range: [0, 1]`, DINOv2 takes
    mean [0.485, 0.456, 0.406] and std [0.229, 0.224, 0.225]."""
    max_pixels: int = 178_956_970
    """An image with more pixels than this is refused before it is decoded (Pillow's bomb limit)."""
    max_bytes: Positive = 1 << 30
    """A member of the tar with more bytes than this is refused before it is fetched; the default is
    what `max_pixels` pixels of three channels of 16 bits have, uncompressed."""

    views: tuple[Literal["id", "hflip"] | CropViews | PaddedCropViews, ...] = ()
    """Views of each image that features are computed of: `id` (the image), `hflip` (mirrored), and
    crops. With any, the store has an axis `view`, in this order; without, none."""
    frames: Annotated[int, Field(ge=1)] = 1
    """Frames of a sample, the first ones that it has; one with fewer is an invalid row."""
    frame_latents: Literal["video", "each"] = "video"
    """Whether a video's VAE takes the window as a video, which it compresses in time, or `each`
    frame for itself (DiffTrack)."""

    @model_validator(mode="after")
    def _each_of_several(self) -> ImageSpec:
        if self.frame_latents == "each" and self.frames == 1:
            raise ValueError("frame_latents has a meaning with frames above 1 only")
        return self

    @model_validator(mode="after")
    def _shorter_side_covers(self) -> ImageSpec:
        if self.shorter_side is None:
            return self
        if self.resize != "shortest":
            raise ValueError(f"shorter_side belongs to resize: shortest, not {self.resize}")
        if self.shorter_side < max(self.size):
            raise ValueError(f"shorter_side {self.shorter_side}: less than size {list(self.size)}")
        return self

    @model_validator(mode="after")
    def _fill_where_there_is_a_rest(self) -> ImageSpec:
        if self.resize != "pad" and self.fill != (0, 0, 0):
            raise ValueError(f"fill has a meaning with resize: pad only, not {self.resize}")
        return self

    @model_validator(mode="after")
    def _views_once(self) -> ImageSpec:
        names = self.view_names
        if len(set(names)) != len(names):
            raise ValueError(f"views {list(names)}: want none twice; give crops different seeds")
        return self

    @property
    def view_names(self) -> tuple[str, ...]:
        """`id`, `hflip`, `crop-SEED-NUMBER`, `padded-SEED-NUMBER`: one for each entry of the axis
        `view`."""
        return tuple(
            name
            for view in self.views
            for name in (
                [view]
                if isinstance(view, str)
                else [f"{VIEW_NAMES[view.crop]}-{view.seed}-{i}" for i in range(view.n)]
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

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the pixels of a sample: (c, h, w), of a window (c, f, h, w)."""
        window = (self.frames,) if self.frames > 1 else ()
        return (self.n_channels, *window, *self.size)

    @model_validator(mode="after")
    def _one_mean_and_std_a_channel(self) -> ImageSpec:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std belong together; give both or neither")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != self.n_channels:
                raise ValueError(f"{name}: {len(values)} numbers for {self.n_channels} channels")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std {list(self.std)}: want positive numbers")
        return self


class BucketSpec(Spec):
    """Keep each image's aspect: a store for every shape that images have (buckets.py).

    `images.size` is then the longer side; the other one is the nearest multiple of `multiple`.
    """

    multiple: Annotated[int, Field(ge=1)] = 16
    """Pixels; what the model's VAE and patches divide by (Flux and SD3: 16)."""


class LoraSpec(Spec):
    """A LoRA file (Hu et al. 2021) and the weight that it gets; a plain path has weight 1."""

    path: str
    scale: float = 1.0


Lora = Annotated[LoraSpec, BeforeValidator(lambda v: {"path": v} if isinstance(v, str) else v)]


class BackboneSpec(Spec):
    """The frozen model: a hub id with a pinned revision, a local folder, `bundled:NAME`, or code.

    Your own code is `python:package.module:factory`, as backbones/custom.py documents. `model` and
    `revision` say where the weights are; what enters the fingerprint is the digest of the files.
    `init: random` builds the same architecture with seeded random weights, the control that every
    claim about learnt features needs.
    """

    model: str
    revision: str | None = None
    variant: str | None = None
    """diffusers' weight variant, for example `fp16`."""
    init: Literal["pretrained", "random"] = "pretrained"
    init_seed: int = 0
    dtype: DType = "float32"
    """Precision of the forward pass."""
    dit_time_shift: Literal[0, 1] = 1
    """DiT only: `downscale_freq_shift` of the sinusoids that tell it the time. diffusers has 1; the
    original code (Peebles and Xie 2023), which trained the weights, has 0."""
    weights: str | None = None
    """A safetensors file that replaces every weight of the denoiser (CleanDIFT), or of an encoder,
    under the names of the network in memory, which `drl taps` lists; or the checkpoint of a model
    of Python code that reads one."""
    lora: Annotated[tuple[Lora, ...], BeforeValidator(as_tuple)] = ()
    """Low-rank updates fused into the denoiser's weights, in this order."""

    @model_validator(mode="after")
    def _replace_pretrained(self) -> BackboneSpec:
        if self.init == "random" and (self.weights or self.lora):
            raise ValueError("weights and lora have no meaning with init: random")
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
    overflow: Literal["error", "clip", "invalid"] = "error"
    """Finite values that the storage dtype cannot hold: fail the unit, clip them to the largest
    one, or list their rows as invalid. They are counted in each case."""
    non_finite: Literal["error", "clip", "invalid"] = "error"
    """NaN and infinite values as computed: fail the unit, store 0 for NaN and the largest value for
    an infinity (of the type; of a quantised array the largest finite one under its scale), or list
    their rows as invalid. They are counted in each case."""

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

    x_t = alpha * x_0 + sigma * noise. Clean input has alpha 1 and sigma 0; with `patch_mask` they
    are the shares of the image that stay and go.
    """

    requested: float
    convention: str
    model_time: float
    alpha: float
    sigma: float


class ArraySpec(Spec):
    """One feature array: name, the tap that it comes from, and the shape of one row.

    `dims` names the axes of `shape`: ("channel", "height", "width"), of a video ("channel",
    "frame", "height", "width"), ("token", "channel") or ("channel",), or those with "head" in
    front; ("candidate", "member") of a table of losses. In the store the axes ("sample",
    "timestep") come before them.
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

    @property
    def channel_axis(self) -> int:
        """Position of "channel" among `dims`.

        Raises:
            SpecError: if this is a table without channels.
        """
        if "channel" not in self.dims:
            raise SpecError(
                f"array {self.name!r} has the axes {', '.join(self.dims)} and no channel: it is a "
                "table, not features; read it with drl_data.datasets or zarr"
            )
        return self.dims.index("channel")

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


class ContentSpec(Spec):
    """The identity of a store's content, wherever the features come from.

    A `FeatureSpec` where they were extracted, an `ImportSpec` where somebody had them.
    """

    format: int = FORMAT_VERSION
    dataset: str
    n_samples: Annotated[int, Field(ge=1)]
    rows_per_unit: int
    overflow: Literal["error", "clip", "invalid"]
    non_finite: Literal["error", "clip", "invalid"] = "error"

    def fingerprint(self) -> str:
        """32 hexadecimal digits of the SHA-256 of the canonical JSON of this spec.

        Fields that have their default are left out, at every depth, so that a field that a later
        version adds does not orphan the stores of an earlier one. Hence a default never changes,
        and a field that holds one of several specs needs a key without default to tell them apart.
        """
        content = {**self.model_dump(mode="json", exclude_defaults=True), "format": self.format}
        return hashlib.sha256(canonical_json(content)).hexdigest()[:32]

    def differences(self, other: ContentSpec) -> list[str]:
        """Lines `path: mine != theirs`, one for each leaf that differs; empty if equal."""
        return differences(self.model_dump(mode="json"), other.model_dump(mode="json"))


class FeatureSpec(ContentSpec):
    """The identity of extracted features: everything that changes a byte, nothing that does not.

    Made by resolving a `Pipeline` against its data (`dataset`: digest of the sample index) and its
    model (`weights`: digest of the files, or of configuration and seed for random weights;
    `condition_files`: digests of embeddings that the condition names).
    """

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

    @property
    def view_names(self) -> tuple[str, ...]:
        """One for each entry of the axis `view`; none without one."""
        return self.images.view_names
