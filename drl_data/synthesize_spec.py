"""The section `synthesize:` of a pipeline file: images from prompts, classes, or other images.

Nothing here imports torch or diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, JsonValue, model_validator

from drl_data.spec import BackboneSpec
from drl_data.spec_base import NonNegative, Positive, SizePair, Spec, as_tuple, size_pair

PROMPT_FILES = (".txt", ".jsonl", ".parquet", ".csv")

OWN_ARGUMENTS = (
    "prompt", "negative_prompt", "class_labels", "image", "strength", "height", "width",
    "num_inference_steps", "guidance_scale", "generator", "output_type", "return_dict",
    "num_images_per_prompt", "batch_size",
)  # fmt: skip
"""Arguments of a pipeline's call that other fields of the section set."""


class PromptsSpec(Spec):
    """Where prompts come from: one of `texts`, `file`, `captions`, `template`."""

    texts: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = ()
    file: str | None = None
    """.txt with one prompt a line (empty lines are none), or .jsonl, .parquet, .csv."""
    column: str = "prompt"
    """Of a .parquet or .csv file, or the field of a line of .jsonl."""
    captions: bool = False
    """The captions of the pipeline's own dataset."""
    template: str | None = None
    """Text with `{label}` in it: the name of the class, or of the label of the source image."""
    split: str | None = None
    """Of the dataset, for `captions`; default: all of it."""

    @model_validator(mode="after")
    def _one_source(self) -> PromptsSpec:
        given = [name for name in ("texts", "file", "captions", "template") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                f"prompts: {' and '.join(given) or 'nothing'} given; want one of texts (a list), "
                "file, captions: true, template"
            )
        if self.file is not None and not self.file.endswith(PROMPT_FILES):
            raise ValueError(f"prompts: {self.file!r}: want a list, or {', '.join(PROMPT_FILES)}")
        if self.template is not None and "{label}" not in self.template:
            raise ValueError(f"prompts.template {self.template!r} has no {{label}} in it")
        return self


def _as_prompts(value: object) -> object:
    if isinstance(value, str):
        return {"file": value}
    return {"texts": value} if isinstance(value, list | tuple) else value


class ClassSpec(Spec):
    """One class: its number, its name, or both."""

    id: NonNegative | None = None
    name: str | None = None


def _as_classes(value: object) -> object:
    if isinstance(value, Mapping):
        return tuple({"id": number, "name": name} for number, name in value.items())
    if value == "all":
        return value
    shorthand = {int: "id", str: "name"}
    items = value if isinstance(value, list | tuple) else (value,)
    return tuple({shorthand[type(x)]: x} if type(x) in shorthand else x for x in items)


class SourceSpec(Spec):
    """Image to image: each image of the pipeline's dataset, as its section `images` fits it, is
    noised and denoised again (Meng et al. 2022; ScribbleGen's encode ratio is `strength`)."""

    strength: Annotated[
        tuple[Annotated[float, Field(gt=0, le=1)], ...],
        BeforeValidator(as_tuple),
        Field(min_length=1),
    ] = (0.5,)
    """Share of the steps that are done: 1 keeps nothing of the source. Of several, each image is
    made with each."""
    split: str | None = None
    """Of the dataset; default: all of it."""


class SchedulerSpec(Spec):
    """A scheduler class of diffusers, made from the model's configuration with other options."""

    name: str | None = None
    """Default: the model's own."""
    options: dict[str, JsonValue] = {}


class ImageFileSpec(Spec):
    """How images are written: png and webp without loss, jpg with its quality."""

    kind: Literal["png", "jpg", "webp"] = "png"
    quality: Annotated[int, Field(ge=1, le=100)] | None = None
    """jpg only; default 95."""

    @model_validator(mode="after")
    def _quality_of_jpg(self) -> ImageFileSpec:
        if self.quality is not None and self.kind != "jpg":
            raise ValueError(f"quality belongs to jpg; {self.kind} is written without loss")
        return self


class SynthesizeSpec(Spec):
    """Images of a diffusion model as WebDataset tars, to be extracted like any other.

    Of a text-to-image model `prompts` says what to make; of a class-conditional one `classes`; of
    an unconditional one neither. `classes` with `prompts.template` names classes to a text model.
    """

    url: str
    """Folder or object-storage URL for the tars, `NAME-000000.tar` ..., empty or begun before."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", max_length=60)] = "synth"
    """Begins the names of tars and the keys of samples."""
    backbone: BackboneSpec | None = None
    """The model; default: the pipeline's backbone. `lora` and `weights` are of its denoiser."""
    prompts: Annotated[PromptsSpec, BeforeValidator(_as_prompts)] | None = None
    """A list, the name of a file, or their settings."""
    classes: (
        Annotated[
            tuple[ClassSpec, ...] | Literal["all"],
            BeforeValidator(_as_classes),
            Field(min_length=1),
        ]
        | None
    ) = None
    """Numbers or names, `{number: name}`, or `all` that the model knows."""
    source: SourceSpec | None = None
    n_images: Positive = 1
    """Images of each prompt, class, or source and strength; of an unconditional model in all."""
    order: Literal["grouped", "interleaved"] = "grouped"
    """Images of one prompt or class one after the other, or one of each in turn."""
    negative_prompt: str | None = None
    guidance_scale: Annotated[float, Field(ge=0)] | None = None
    """As diffusers has it: 1 is none. Default: the pipeline's."""
    steps: Positive | None = None
    """Default: the pipeline's."""
    scheduler: Annotated[
        SchedulerSpec, BeforeValidator(lambda v: {"name": v} if isinstance(v, str) else v)
    ] = SchedulerSpec()
    size: Annotated[SizePair, BeforeValidator(size_pair)] | None = None
    """Height and width in pixels; default: the model's own; image to image has that of `images`."""
    arguments: dict[str, JsonValue] = {}
    """More arguments of the pipeline's call: `eta`, `clip_skip`, `max_sequence_length` ..."""
    batch_size: Positive = 8
    """Images of one call, and content: other batches are not bit-equal on a GPU."""
    seed: int = 0
    format: Annotated[
        ImageFileSpec, BeforeValidator(lambda v: {"kind": v} if isinstance(v, str) else v)
    ] = ImageFileSpec()
    flagged: Literal["mark", "leave_out"] = "mark"
    """What a safety checker made black: stays, marked in its JSON, or is left out. Counted both
    ways."""
    samples_per_tar: Positive = 1000
    """A tar is a unit of work."""

    @model_validator(mode="after")
    def _what_to_make(self) -> SynthesizeSpec:
        prompts, template = self.prompts, self.prompts is not None and self.prompts.template
        if self.source is not None and (prompts is None or self.classes is not None):
            raise ValueError(
                "source: image to image wants prompts (a list, captions: true, or a template of "
                "the sources' labels) and no classes"
            )
        if self.source is None and template and self.classes is None:
            raise ValueError("prompts.template: want classes, or source, whose labels it names")
        if self.classes is not None and prompts is not None and not template:
            raise ValueError("classes beside prompts: want prompts.template, which names them")
        if self.source is not None and self.size is not None:
            raise ValueError("size: image to image has the size of the section `images`")
        if self.source and self.prompts and self.prompts.split not in (None, self.source.split):
            raise ValueError("prompts.split: the captions are of source.split")
        return self

    @model_validator(mode="after")
    def _arguments_are_no_others(self) -> SynthesizeSpec:
        taken = sorted(set(self.arguments) & set(OWN_ARGUMENTS))
        if taken:
            raise ValueError(f"arguments: {', '.join(taken)} is set by other fields")
        return self

    @model_validator(mode="after")
    def _some_steps(self) -> SynthesizeSpec:
        if self.source is not None and self.steps is not None:
            least = min(self.source.strength)
            if int(self.steps * least) < 1:
                raise ValueError(
                    f"steps {self.steps} x strength {least} is less than one step; want more steps"
                )
        return self


class ImageCall(Spec):
    """How every image of a job is made: the section resolved against the model, without defaults.

    It is part of the job's identity, so that another version of diffusers with other defaults does
    not go on with it.
    """

    pipeline: str
    """diffusers' class; `UNet2DModel` for a pixel-space network, which drl samples itself."""
    scheduler: str
    scheduler_options: dict[str, JsonValue] = {}
    steps: int
    guidance_scale: float | None
    """None where the pipeline has no such number, or none by default."""
    negative_prompt: str | None
    size: SizePair | None
    arguments: dict[str, JsonValue]
    null_class: int | None = None
    """What a pixel-space network is told for guidance."""
    class_names: dict[int, str] = {}
    n_classes: int | None = None
    """Classes that the model knows, without the null class."""
    takes: Literal["prompt", "class", "nothing"]
