"""Images of diffusers' own pipelines: Stable Diffusion, SDXL, SD3, Flux, PixArt, Sana, DiT ...

`resolve_call` reads configurations and signatures only, so that what a model cannot do is known
before any weights are loaded; `load_images` loads them: safetensors only, and no code.

Shape suffixes: b batch, c channel, h height, w width.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor, nn

from drl_data.backbones.image_maker import (
    DrawnImages,
    ImageMaker,
    ImageRequest,
    own_generators_only,
)
from drl_data.backbones.loader import (
    ModelFolder,
    pipeline_class,
    placed,
    scheduler_config,
    weights_errors,
)
from drl_data.backbones.overrides import apply_overrides
from drl_data.backbones.pixel_images import PixelImages, pixel_call
from drl_data.backbones.transformer import shift_dit_time
from drl_data.errors import SpecError
from drl_data.reduce import TORCH_DTYPES
from drl_data.synthesize_spec import OWN_ARGUMENTS, ImageCall, SchedulerSpec, SynthesizeSpec

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

PIXEL = "UNet2DModel"
DIT = "DiTTransformer2DModel"
DIT_NULL_CLASS = 1000
"""DiTPipeline of diffusers 0.42 has this number written into it."""
FIXED_ARGUMENTS: Mapping[str, object] = {"clean_caption": False}
"""Defaults of pipelines that are not taken: cleaning depends on packages that may be missing."""
NO_PLAIN_VALUE = re.compile(r"self|callback.*|.*latents|.*embeds.*|.*attention_mask|ip_adapter.*")
"""Arguments of pipelines that no pipeline file sets: code and tensors."""


def resolve_call(folder: ModelFolder, spec: SynthesizeSpec) -> ImageCall:
    """How images are made of this model as the spec wants them; no weights are read.

    Raises:
        SpecError: what the model, its pipeline or the scheduler cannot do, by name.
        WeightsError: no pipeline that makes images.
    """
    if folder.spec.init == "random":
        raise SpecError("synthesize: backbone.init random has no images to give")
    if folder.spec.dit_time_shift != 1 and folder.class_name != DIT:
        raise SpecError(f"backbone.dit_time_shift: {folder.class_name} is no DiT; leave it out")
    scheduler = rescheduled(own_scheduler(folder), spec.scheduler)
    if folder.class_name == PIXEL:
        found = pixel_call(folder, scheduler, spec)
    else:
        found = _pipeline_call(folder, scheduler, spec)
    call = ImageCall.model_validate(
        {
            "scheduler": type(scheduler).__name__,
            "scheduler_options": spec.scheduler.options,
            "negative_prompt": spec.negative_prompt,
            "size": spec.size,
            "arguments": spec.arguments,
            **found,
        }
    )
    _check_takes(call, spec)
    if spec.source is not None and int(call.steps * min(spec.source.strength)) < 1:
        raise SpecError(
            f"synthesize.source.strength {min(spec.source.strength)}: less than one of the "
            f"{call.steps} steps; want more steps"
        )
    return call


def load_images(folder: ModelFolder, call: ImageCall, device: str | torch.device) -> ImageMaker:
    """The model with its weights on a device.

    Raises:
        WeightsError: files that are missing, do not fit, or are pickles.
    """
    place = torch.device(device)
    folder.check_weights()
    wanted = SchedulerSpec(name=call.scheduler, options=call.scheduler_options)
    if call.pipeline == PIXEL:
        return PixelImages.load(folder, call, rescheduled(own_scheduler(folder), wanted), place)
    return PipelineImages.load(folder, call, wanted, place)


class PipelineImages:
    """A pipeline of diffusers; an `ImageMaker`."""

    def __init__(self, pipeline: DiffusionPipeline, call: ImageCall, device: torch.device) -> None:
        self._pipeline, self._call, self._device = pipeline, call, device
        pipeline.set_progress_bar_config(disable=True)

    @classmethod
    def load(
        cls,
        folder: ModelFolder,
        call: ImageCall,
        scheduler: SchedulerSpec,
        device: torch.device,
    ) -> PipelineImages:
        """Weights on `device`, frozen."""
        from diffusers import DiffusionPipeline
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging

        for library in (diffusers_logging, logging):
            library.disable_progress_bar()
        with weights_errors(folder, folder.root):
            pipeline = DiffusionPipeline.from_pretrained(
                folder.root,
                dtype=TORCH_DTYPES[folder.spec.dtype],
                variant=folder.spec.variant,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
            )
        # From the pipeline's own, whose configuration its constructor may have mended.
        pipeline.scheduler = rescheduled(pipeline.scheduler, scheduler)
        if call.pipeline != type(pipeline).__name__:
            pipeline = pipeline_class(call.pipeline)(**_parts_for(call.pipeline, pipeline))
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module):
                if name == folder.network.name:
                    apply_overrides(part, folder.spec)
                    if folder.class_name == DIT:
                        shift_dit_time(part, folder.spec.dit_time_shift)
                placed(part, device)
        return cls(pipeline, call, device)

    def replica(self) -> PipelineImages:
        """Shares the weights; schedulers and tokenizers count and pad for one thread, and a VAE of
        videos keeps frames from call to call."""
        other, pipeline = copy.copy(self), copy.copy(self._pipeline)
        for name, part in self._pipeline.components.items():
            shared = isinstance(part, nn.Module) and not any(p.ndim == 5 for p in part.parameters())
            if part is not None and not shared:
                setattr(pipeline, name, copy.deepcopy(part))
        other._pipeline = pipeline
        return other

    @torch.no_grad()
    def draw(self, request: ImageRequest) -> DrawnImages:
        """The images of one batch.

        Raises:
            SpecError: the pipeline draws other random numbers than the images' own, or gives no
                images.
        """
        n = len(request.generators)
        with (
            own_generators_only(self._device, f"{self._call.pipeline} with {self._call.scheduler}"),
            np.errstate(invalid="ignore"),  # a NaN image on its way to a safety checker
        ):
            found = self._pipeline(**self._arguments(request))
        images_bchw = found.get("images")
        if not isinstance(images_bchw, Tensor) or len(images_bchw) != n or images_bchw.ndim != 4:
            raise SpecError(f"synthesize: {self._call.pipeline} gives no images [b, c, h, w]")
        flagged = found.get("nsfw_content_detected") or [False] * n
        return DrawnImages(images_bchw.float().cpu(), tuple(bool(one) for one in flagged))

    def _arguments(self, request: ImageRequest) -> dict[str, object]:
        call, n = self._call, len(request.generators)
        taken = inspect.signature(type(self._pipeline).__call__).parameters
        height, width = call.size or (None, None)
        if request.sources is not None:
            width, height = request.sources[0].size
        given = {
            "prompt": None if request.prompts is None else list(request.prompts),
            "class_labels": None if request.classes is None else list(request.classes),
            "image": None if request.sources is None else list(request.sources),
            "strength": request.strength,
            "negative_prompt": None if call.negative_prompt is None else [call.negative_prompt] * n,
            "guidance_scale": call.guidance_scale,
            "height": height if "height" in taken else None,
            "width": width if "width" in taken else None,
        }
        return {
            **call.arguments,
            **{name: value for name, value in given.items() if value is not None},
            "num_inference_steps": call.steps,
            "generator": list(request.generators),
            "output_type": "pt",
        }


def own_scheduler(folder: ModelFolder) -> SchedulerMixin:
    """The scheduler that lies beside a model.

    Raises:
        WeightsError: there is none.
    """
    import diffusers

    config = scheduler_config(folder)
    with weights_errors(folder, folder.root):
        own = getattr(diffusers, str(config.get("_class_name")), diffusers.DDPMScheduler)
        return own.from_config(config)


def rescheduled(own: SchedulerMixin, wanted: SchedulerSpec) -> SchedulerMixin:
    """A scheduler of diffusers from the configuration of a model's own.

    Raises:
        SpecError: one that the configuration is not for, or options that it does not have.
    """
    classes = {one.__name__: one for one in own.compatibles} | {type(own).__name__: type(own)}
    name = wanted.name or type(own).__name__
    if name not in classes:
        raise SpecError(
            f"synthesize.scheduler {name!r}: the model's configuration is for "
            f"{', '.join(sorted(classes))}"
        )
    known = set(inspect.signature(classes[name].__init__).parameters) - {"self"}
    for option in wanted.options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=3, cutoff=0.3) or sorted(known)
            raise SpecError(
                f"synthesize.scheduler.options: {name} has no {option!r}; nearest: "
                f"{', '.join(near)}"
            )
    if name == type(own).__name__ and not wanted.options:
        return own
    try:
        return classes[name].from_config(own.config, **wanted.options)
    except (ValueError, NotImplementedError, ImportError) as error:
        raise SpecError(f"synthesize.scheduler {name}: {error}") from error


def _pipeline_call(
    folder: ModelFolder, scheduler: SchedulerMixin, spec: SynthesizeSpec
) -> dict[str, object]:
    made_by = folder.pipeline_name()
    if spec.source is not None:
        made_by = _image_to_image(made_by)
    taken = dict(inspect.signature(pipeline_class(made_by).__call__).parameters)
    for name in ("generator", "output_type", "num_inference_steps"):
        if name not in taken:
            raise SpecError(f"synthesize: {made_by} takes no {name}; its images are not repeatable")
    if spec.negative_prompt is not None and "negative_prompt" not in taken:
        raise SpecError(f"synthesize.negative_prompt: {made_by} takes none")
    if spec.guidance_scale is not None and "guidance_scale" not in taken:
        raise SpecError(f"synthesize.guidance_scale: {made_by} takes none")
    if spec.size is not None and "height" not in taken:
        raise SpecError(f"synthesize.size: {made_by} has one size, the model's")
    known = {name for name in taken if not NO_PLAIN_VALUE.fullmatch(name)} - set(OWN_ARGUMENTS)
    unknown = sorted(set(spec.arguments) - known)
    if unknown:
        raise SpecError(
            f"synthesize.arguments: {made_by} takes no {', '.join(unknown)}; it takes "
            f"{', '.join(sorted(known))}"
        )
    fixed = {name: value for name, value in FIXED_ARGUMENTS.items() if name in taken}
    guidance = taken.get("guidance_scale")
    found: dict[str, object] = {
        "pipeline": made_by,
        "takes": _takes(taken),
        "steps": spec.steps or taken["num_inference_steps"].default,
        "guidance_scale": spec.guidance_scale,
        "arguments": {**fixed, **spec.arguments},
    }
    if spec.guidance_scale is None and guidance is not None:
        found["guidance_scale"] = guidance.default
    if found["takes"] == "class":
        found |= _classes_of_dit(folder, scheduler, found)
    return found


def _takes(taken: Mapping[str, inspect.Parameter]) -> Literal["prompt", "class", "nothing"]:
    if "prompt" in taken:
        return "prompt"
    return "class" if "class_labels" in taken else "nothing"


def _classes_of_dit(
    folder: ModelFolder, scheduler: SchedulerMixin, found: Mapping[str, object]
) -> dict[str, object]:
    """The classes of a class-conditional transformer, and two traps of diffusers' DiTPipeline.

    Raises:
        SpecError: a scheduler whose noise it would not scale, or guidance with a null class that
            is not the model's.
    """
    n_classes = folder.config(folder.network).get("num_embeds_ada_norm")
    guidance, steps = found["guidance_scale"], found["steps"]
    assert isinstance(guidance, float | int)
    assert isinstance(steps, int)
    if guidance > 1 and n_classes != DIT_NULL_CLASS:
        raise SpecError(
            f"synthesize.guidance_scale {guidance:g}: {found['pipeline']} of diffusers takes "
            f"{DIT_NULL_CLASS} for the null class, but {folder.spec.model!r} has {n_classes} "
            "classes; want 1"
        )
    scheduler.set_timesteps(steps)
    if float(scheduler.init_noise_sigma) != 1:
        raise SpecError(
            f"synthesize.scheduler {type(scheduler).__name__}: {found['pipeline']} of diffusers "
            "begins with noise of variance 1, and this one wants "
            f"{float(scheduler.init_noise_sigma) ** 2:.4g}; take DDIMScheduler, "
            "DPMSolverMultistepScheduler, DDPMScheduler or PNDMScheduler"
        )
    return {"n_classes": n_classes, "class_names": folder.class_names()}


def _image_to_image(made_by: str) -> str:
    """Name of the image-to-image pipeline of a pipeline's family."""
    from diffusers.pipelines.auto_pipeline import (
        AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
        _get_task_class,
    )

    try:
        found = _get_task_class(AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, made_by)
    except ValueError as error:
        raise SpecError(
            f"synthesize.source: diffusers has no image to image for {made_by}"
        ) from error
    if "strength" not in inspect.signature(found.__call__).parameters:
        raise SpecError(f"synthesize.source: {found.__name__} takes no strength")
    return str(found.__name__)


def _parts_for(name: str, pipeline: DiffusionPipeline) -> dict[str, object]:
    """The components of a pipeline that another one of its family takes, and its settings."""
    cls = pipeline_class(name)
    needed, optional = cls._get_signature_keys(cls)
    parts = {key: part for key, part in pipeline.components.items() if key in needed}
    settings = {key: pipeline.config[key] for key in optional if key in pipeline.config}
    return {**settings, **parts}


def _check_takes(call: ImageCall, spec: SynthesizeSpec) -> None:
    """Refuse prompts for a model of classes, and so on.

    Raises:
        SpecError: saying what the model takes.
    """
    if spec.prompts is not None:
        given: Literal["prompt", "class", "nothing"] = "prompt"
    else:
        given = "nothing" if spec.classes is None else "class"
    if given != call.takes:
        want = {"prompt": "prompts", "class": "classes", "nothing": "neither prompts nor classes"}
        raise SpecError(
            f"synthesize: {call.pipeline} is told {want[call.takes]}; the section has {want[given]}"
        )
