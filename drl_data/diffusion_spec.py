"""How an image becomes what the network sees, and what the network is told: latents, condition,
position on the noise schedule, noise. All of it is content (spec.py).

Nothing here imports torch, zarr or ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
    JsonValue,
    model_validator,
)

from drl_data.spec_base import (
    NonNegative,
    SizePair,
    Spec,
    Timestep,
    as_tuple,
    size_pair,
)


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
    return as_tuple(value)


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
    original_size: Annotated[SizePair, BeforeValidator(size_pair)] | None = None
    """Height and width in pixels that SDXL is told its image had before it was resized (Podell et
    al. 2023, section 2.2); not said: those of the input."""
    crops_coords_top_left: tuple[NonNegative, NonNegative] = (0, 0)
    """Rows and columns in pixels that SDXL is told were cropped above and left of it."""
    target_size: Annotated[SizePair, BeforeValidator(size_pair)] | None = None
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


def evenly_spread(value: object) -> object:
    """`{even: 500, of: 1000}` for the timesteps of a schedule: so many, in the middles of as many
    equal parts of 0 .. 999; with `of: 1`, of the times of a flow."""
    if not isinstance(value, Mapping) or set(value) != {"even", "of"}:
        return value
    n, total = int(value["even"]), int(value["of"])
    if n < 1 or (total != 1 and n > total):
        raise ValueError(
            f"timesteps: {n} of {total}; want at least 1, at most as many as there are"
        )
    if total == 1:
        return tuple((2 * i + 1) / (2 * n) for i in range(n))
    return tuple((2 * i + 1) * total // (2 * n) for i in range(n))


def _as_timesteps(value: object) -> object:
    return as_tuple(evenly_spread(value))


Timesteps = Annotated[tuple[Timestep, ...], BeforeValidator(_as_timesteps)]

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
    """Where the noise is at; the `timestep` axis of the store. `{even: 50, of: 1000}` is 10, 30,
    ... 990."""
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
