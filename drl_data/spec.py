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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import yaml
from pydantic import (
    AfterValidator,
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

Timestep = Annotated[int | float, AfterValidator(lambda t: int(t) if t == int(t) else t)]
"""A position on a noise schedule; 50.0 is 50, so that equal values have one fingerprint."""


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


Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
SizePair = tuple[Positive, Positive]


def _size_pair(value: object) -> object:
    return (value, value) if isinstance(value, int) else value


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

    size: Annotated[SizePair, BeforeValidator(_size_pair)]
    """Height and width in pixels, or one number for both."""
    resize: Literal["shortest", "stretch", "none", "pad"] = "shortest"
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

    views: tuple[Literal["id", "hflip"] | CropViews, ...] = ()
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
    lora: Annotated[tuple[Lora, ...], BeforeValidator(_as_tuple)] = ()
    """Low-rank updates fused into the denoiser's weights, in this order."""

    @model_validator(mode="after")
    def _replace_pretrained(self) -> BackboneSpec:
        if self.init == "random" and (self.weights or self.lora):
            raise ValueError("weights and lora have no meaning with init: random")
        return self


class LatentSpec(Spec):
    """How an image becomes the VAE's latents; without effect on a backbone that takes pixels.

    `sample` draws from the posterior with per-sample noise, `mean` takes its mean (which is its
    mode). `scale: true` is (z - shift) * factor with the VAE's own numbers, `false` leaves it out
    (VPD does), `per_channel` is (z - mean_c) * factor / std_c with the statistics in the VAE's
    configuration (Playground 2.5), as does `true` where a VAE has no factor (Wan, Qwen-Image).
    """

    posterior: Literal["sample", "mean"] = "sample"
    scale: bool | Literal["per_channel"] = True
    per_member: bool = True
    """A draw from the posterior for each member of the noise; `false`: one for all (SD4Match)."""


def _all_classes(value: object) -> object:
    if isinstance(value, Mapping) and set(value) == {"classes"}:
        return tuple(range(int(value["classes"])))
    return _as_tuple(value)


EXTRAS = (
    "lcm_guidance", "original_size", "crops_coords_top_left", "target_size", "t5_tokens", "t5"
)  # fmt: skip
"""Fields of a condition that a model without a place for them refuses."""


class ConditionSpec(Spec):
    """What the denoiser is told about the image besides the time.

    Text backbones take one of: `prompt`, the same for all; `template`, for example `a photo of a
    {label}`, over the name of the sample's label; `caption: true`, the sample's own caption;
    `prompt_embeddings`, a safetensors file with what the text encoders would give, so that none is
    needed: `prompt_embeds` [token, channel] and, where the family has them, `pooled_prompt_embeds`
    [channel] and `prompt_attention_mask` [token].

    Class-conditional ones take `class_label`: a number, `label` for the sample's own, or `null`
    for the model's unconditional class.

    A sample without the label or the caption that this needs is an invalid row: features told
    something else would look like the others and not be.

    `candidates` are what every image is scored against by the tap `loss`: prompts, or what stands
    for `{label}` in `template`; or classes, of which `{classes: N}` means 0 .. N-1.
    """

    prompt: str = ""
    template: str | None = None
    caption: bool = False
    prompt_embeddings: str | None = None
    class_label: int | Literal["null", "label"] = "null"
    guidance: float = 3.5
    """Guidance scale that guidance-distilled models are told (Flux-dev); others ignore it."""
    candidates: Annotated[tuple[str | int, ...], BeforeValidator(_all_classes)] = ()
    """One forward of the whole network for each of them, timestep and member."""
    lcm_guidance: float | None = None
    """Guidance scale that a UNet with `time_cond_proj_dim` is told (Latent Consistency Models, Luo
    et al. 2023, whose pipeline's default is 8.5); not said: told nothing of it."""
    original_size: Annotated[SizePair, BeforeValidator(_size_pair)] | None = None
    """Height and width in pixels that SDXL is told its image had before it was resized (Podell et
    al. 2023, section 2.2); not said: those of the input."""
    crops_coords_top_left: tuple[NonNegative, NonNegative] = (0, 0)
    """Rows and columns in pixels that SDXL is told were cropped above and left of it."""
    target_size: Annotated[SizePair, BeforeValidator(_size_pair)] | None = None
    """Height and width in pixels that SDXL is told it makes; not said: those of the input."""
    t5_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens that T5's text is cut or padded to; default: what diffusers' pipelines have (SD3 256,
    Flux and Wan 512). Seg4Diff has 77, the authors' own Flux-schnell 256, VidFM3D's Wan 226."""
    t5: bool = True
    """`false` has zeros where T5's states would be, as SD3's pipeline without its third encoder
    (Seg4Diff)."""

    @property
    def extras(self) -> tuple[str, ...]:
        """What is said of the fields that only some models take."""
        defaults = type(self).model_fields
        return tuple(n for n in EXTRAS if getattr(self, n) != defaults[n].default)

    @model_validator(mode="after")
    def _one_text(self) -> ConditionSpec:
        given = {
            "prompt": self.prompt, "template": self.template, "caption": self.caption,
            "prompt_embeddings": self.prompt_embeddings,
        }  # fmt: skip
        names = [name for name, value in given.items() if value]
        if len(names) > 1:
            raise ValueError(f"{' and '.join(names)}: want one of them")
        if self.template is not None and "{label}" not in self.template:
            raise ValueError(f"template {self.template!r} has no {{label}}; write it as prompt")
        if self.prompt_embeddings and (self.t5_tokens is not None or not self.t5):
            raise ValueError("t5_tokens and t5 have no meaning with prompt_embeddings")
        return self

    @model_validator(mode="after")
    def _candidates_alone(self) -> ConditionSpec:
        if not self.candidates:
            return self
        if self.prompt or self.caption or self.prompt_embeddings or self.class_label != "null":
            raise ValueError("candidates: leave out prompt, caption, embeddings and class_label")
        if len(set(self.candidates)) != len(self.candidates):
            raise ValueError("candidates: want none twice")
        if len({type(candidate) for candidate in self.candidates}) > 1:
            raise ValueError("candidates: want all prompts or all classes")
        return self

    def of_candidates(self) -> tuple[ConditionSpec, ...]:
        """The condition of each candidate; this one alone if there is none."""
        if not self.candidates:
            return (self,)
        alone = self.model_copy(update={"candidates": (), "template": None})
        return tuple(
            alone.model_copy(update={"class_label": candidate})
            if isinstance(candidate, int)
            else alone.model_copy(
                update={"prompt": (self.template or "{label}").replace("{label}", candidate)}
            )
            for candidate in self.candidates
        )

    @property
    def needs_label(self) -> bool:
        """Whether it differs between samples by their labels."""
        if self.candidates:
            return False
        return self.template is not None or self.class_label == "label"

    @property
    def per_sample(self) -> bool:
        """Whether it differs between samples."""
        return self.needs_label or self.caption


Timesteps = Annotated[tuple[Timestep, ...], BeforeValidator(_as_tuple)]

STEPPED = ("scheduler_position", "descending_index", "generation_label", "img2img_strength")
"""Conventions that count the steps of a scheduler."""


class ScheduleSpec(Spec):
    """Positions on the model's noise schedule and the convention that they are written in.

    Index into the schedule's alphas_cumprod, which is also what the network is told:

    - `ddpm_index`: 0 (clean) .. n-1 (DIFT, ODISE, CleanDIFT ...);
    - `ddpm_1based`: 1 .. n (DDAE);
    - `learned`: the noise is that of `ddpm_index`, the network is told the scalar `timestep` that
      its checkpoint carries (CleanDIFT);
    - `sigma`: the noise level sqrt(1 - abar) / sqrt(abar), told as the fractional index;
    - `none`: no noise and time 0 (encoders know no other); `timesteps` is then [0].

    Noise levels of EDM networks (Karras et al. 2022):

    - `edm_sigma`: the level itself;
    - `edm_index`: a position on the ladder of `n_steps` levels (18 if not said), 1 (least noise) ..
      `n_steps` (DDAE's EDM takes 4 of 18).

    Time of flow models, x_t = (1 - t) x_0 + t eps:

    - `flow`: 0 (clean) .. 1 (noise) (DiTF, SD3, REPA); with `shift` s, t is first moved to
      s t / (1 + (s - 1) t), as the schedulers of SD3 and Wan do.

    Position in the steps of a scheduler, by default the model's own; of flow models the first two
    (a scheduler with `use_dynamic_shifting` is shifted as the pipelines of Flux and SD3.5 do):

    - `scheduler_position`: index into the `n_steps` steps from noise to clean, negative from the
      end (LDM_correspondences, Seg4Diff);
    - `descending_index`: the same, with as many steps as the model was trained with (VidFM3D);
    - `generation_label`: 0 (noise) .. n-1, where n-1 is the clean input, told -1 (Hyperfeatures,
      SatDiFuser);
    - `img2img_strength`: t/n as the strength of diffusers' image-to-image pipelines (GDF).
    """

    convention: Literal[
        "ddpm_index",
        "ddpm_1based",
        "learned",
        "sigma",
        "none",
        "scheduler_position",
        "descending_index",
        "generation_label",
        "img2img_strength",
        "edm_sigma",
        "edm_index",
        "flow",
    ] = "ddpm_index"
    timesteps: Timesteps
    """Where the noise is at; the `timestep` axis of the store."""
    condition_at: Literal["same"] | Timesteps = "same"
    """Where the network is told that it is: one for each of `timesteps`, or one for all, in the
    convention's units (an index, a level sigma, t of 0..1 before its shift, a step). The input is
    that of `timesteps` all the same; an EDM network's may then be clean (0)."""
    n_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps of the scheduler, or levels of EDM's ladder."""
    scheduler: str | None = None
    """diffusers' name of the scheduler that counts the steps; default: the model's own."""
    scheduler_config: dict[str, JsonValue] = {}
    """What its configuration has different from the model's, for example `steps_offset: 0`."""
    model_time: Literal["index", "fraction"] = "index"
    """`fraction` tells the network t/n (DDAE: 11 of 1..1000 is 0.011)."""
    shift: Annotated[float, Field(gt=0)] | None = None
    """How far `flow` is moved towards noise; a scheduler's own steps have its own shift."""

    @model_validator(mode="before")
    @classmethod
    def _no_time_is_position_0(cls, data: object) -> object:
        if isinstance(data, Mapping) and data.get("convention") == "none":
            return {"timesteps": (0,), **data}
        return data

    @model_validator(mode="after")
    def _distinct(self) -> ScheduleSpec:
        if not self.timesteps or len(set(self.timesteps)) != len(self.timesteps):
            raise ValueError(f"timesteps {list(self.timesteps)}: want at least one, none twice")
        if self.shift is not None and self.convention != "flow":
            raise ValueError("shift has a meaning with convention: flow only")
        return self

    @model_validator(mode="after")
    def _told_fits(self) -> ScheduleSpec:
        if self.condition_at != "same" and len(self.condition_at) not in (1, len(self.timesteps)):
            raise ValueError(
                f"condition_at has {len(self.condition_at)} entries; want one, or one for each of "
                f"the {len(self.timesteps)} timesteps"
            )
        if self.convention == "none" and (self.timesteps != (0,) or self.condition_at != "same"):
            raise ValueError(
                "convention none has no time: want timesteps: 0 and no condition_at; a clean input "
                "that is told a time is `noise: {kind: none}` in the model's own convention"
            )
        return self

    @model_validator(mode="after")
    def _steps_where_they_count(self) -> ScheduleSpec:
        stepped = self.convention in STEPPED
        if not stepped and (self.scheduler or self.scheduler_config):
            raise ValueError(
                f"scheduler and scheduler_config have no meaning with {self.convention}; they "
                f"belong to {', '.join(STEPPED)}"
            )
        if self.n_steps and not stepped and self.convention != "edm_index":
            raise ValueError(
                f"n_steps has no meaning with {self.convention}; it belongs to edm_index, "
                f"{', '.join(STEPPED)}"
            )
        if self.n_steps is None and self.convention in ("scheduler_position", "generation_label"):
            raise ValueError(f"convention {self.convention} needs n_steps, the scheduler's steps")
        return self


class NoiseSpec(Spec):
    """What corrupts the latents, or the pixels where there are none.

    - `per_sample`: Gaussian noise seeded by (seed, key, member);
    - `shared`: one tensor for all samples (DDPM-Seg, DiffCut), natively or interpolated from a
      square of `shared_base` (ODISE, sd-dino);
    - `bank`: one tensor for each timestep and member, the same for all samples and prompts
      (Diffusion Classifier); its row is (place of the timestep in `schedule.timesteps`) * members
      + member;
    - `uniform`: numbers from [0, 1) where a Gaussian was meant (LDM_correspondences);
    - `none`: clean latents, whatever time the network is told;
    - `patch_mask`: squares of `patch` are zeroed in the share t/n of the image (MDM);
    - `inversion`: no random numbers but the network's own path from the clean latents, by DDIM
      (Song et al. 2021); needs the convention `generation_label`.

    `members` > 1 averages the features of that many draws in float32 (DIFT uses 8).
    `per_timestep` draws anew for each timestep instead of moving one draw along the schedule.
    """

    kind: Literal["per_sample", "shared", "bank", "uniform", "none", "patch_mask", "inversion"] = (
        "per_sample"
    )
    seed: int = 0
    members: Annotated[int, Field(ge=1)] = 1
    per_timestep: bool = False
    shared_base: Annotated[int, Field(ge=1)] | None = None
    """Side of the shared noise before bicubic interpolation, which loses its unit variance."""
    patch: Annotated[int, Field(ge=1)] = 8
    """Side of a masked square."""
    told: Literal["current", "next"] = "current"
    """The time that each step of an inversion tells the network: of the latents that it is given
    (Hyperfeatures, SatDiFuser), or of those that it makes (diffusers' DDIMInverseScheduler)."""
    generator: Literal["philox", "torch"] = "philox"
    """What draws `shared` noise and a `bank`. `torch` takes the rows of `torch.randn((n, c, h, w),
    generator=torch.Generator("cpu").manual_seed(seed))`, as published code does: DDPM-Seg (seed
    0), ODISE and sd-dino (seed 42, `shared_base: 64`)."""
    file: str | None = None
    """Path or URL of `shared` noise or a `bank`, [n, c, h, w] in a .npy, .safetensors or .pt file;
    in a `FeatureSpec`, the digest of its numbers."""

    @property
    def is_table(self) -> bool:
        """Whether the noise is rows of one tensor instead of draws of their own."""
        return self.generator == "torch" or self.file is not None

    @property
    def moves(self) -> bool:
        """Whether one draw serves all timesteps."""
        return not self.per_timestep and self.kind != "bank"

    @model_validator(mode="after")
    def _members_need_noise(self) -> NoiseSpec:
        if self.kind in ("none", "inversion") and (self.members > 1 or self.per_timestep):
            raise ValueError(f"members and per_timestep have no meaning with kind: {self.kind}")
        return self

    @model_validator(mode="after")
    def _settings_fit_the_kind(self) -> NoiseSpec:
        owner = {"shared_base": "shared", "patch": "patch_mask", "told": "inversion"}
        for name, kind in owner.items():
            if self.kind != kind and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no meaning with kind: {self.kind}, only with {kind}")
        return self

    @model_validator(mode="after")
    def _tables_are_shared(self) -> NoiseSpec:
        if self.is_table and self.kind not in ("shared", "bank"):
            raise ValueError(
                f"generator: torch and file have no meaning with kind: {self.kind}, only with "
                "shared and bank: noise of each sample is seeded by its key"
            )
        if self.generator == "torch" and self.file is not None:
            raise ValueError("generator: torch and file exclude each other")
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
    timestep: Timestep
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
    images: ImageSpec
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
    distill: DistillSpec | None = None
    pretrain: PretrainSpec | None = None
    tiny: TinySpec | None = None

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
        if self.backbone:
            changes["backbone"] = _with_paths(self.backbone, join)
        if self.condition.prompt_embeddings:
            changes["condition"] = self.condition.model_copy(
                update={"prompt_embeddings": join(self.condition.prompt_embeddings)}
            )
        if self.noise.file:
            changes["noise"] = self.noise.model_copy(update={"file": join(self.noise.file)})
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
