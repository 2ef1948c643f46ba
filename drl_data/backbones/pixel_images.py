"""Images of diffusers' UNet2DModel, by any scheduler of diffusers, with or without classes.

diffusers has no pipeline for class-conditional ones, and its DDPMPipeline neither scales the first
noise nor the input, as schedulers in sigmas need it. This loop does; with DDPMScheduler and
DDIMScheduler its images are those of DDPMPipeline and DDIMPipeline, bit for bit on a CPU.

eps = eps_null + guidance (eps_class - eps_null)      (Ho and Salimans 2022, eq. 6: w + 1)

Shape suffixes: b batch, c channel, h height, w width.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers.utils.torch_utils import randn_tensor
from pydantic import JsonValue
from torch import Tensor

from drl_data.backbones.image_maker import DrawnImages, ImageRequest, own_generators_only
from drl_data.backbones.loader import ModelFolder, load_network
from drl_data.backbones.overrides import apply_overrides
from drl_data.backbones.unet import NULL_CLASS
from drl_data.errors import SpecError, WeightsError
from drl_data.synthesize_spec import ImageCall, SynthesizeSpec

if TYPE_CHECKING:
    from diffusers import SchedulerMixin, UNet2DModel

TRAINING = "training.json"
"""What `drl pretrain` recorded beside the weights."""
STEP_ARGUMENTS = ("eta", "use_clipped_model_output")
"""Arguments of a scheduler's step that a pipeline file may set."""


class PixelImages:
    """A `UNet2DModel` and its scheduler; an `ImageMaker`."""

    def __init__(
        self,
        network: UNet2DModel,
        scheduler: SchedulerMixin,
        call: ImageCall,
        device: torch.device,
        pixel_range: tuple[float, float],
    ) -> None:
        self._network, self._scheduler = network, scheduler
        self._call, self._device = call, device
        self._low, self._high = pixel_range

    @classmethod
    def load(
        cls,
        folder: ModelFolder,
        call: ImageCall,
        scheduler: SchedulerMixin,
        device: torch.device,
    ) -> PixelImages:
        """Weights on `device`."""
        from diffusers import UNet2DModel

        network = load_network(folder, UNet2DModel, device)
        apply_overrides(network, folder.spec)
        return cls(network, scheduler, call, device, pixel_range(folder.root))

    def replica(self) -> PixelImages:
        other = copy.copy(self)
        other._scheduler = copy.deepcopy(self._scheduler)
        return other

    @torch.no_grad()
    def draw(self, request: ImageRequest) -> DrawnImages:
        """The images of one batch.

        Raises:
            SpecError: the scheduler draws other random numbers than the images' own.
        """
        generators = list(request.generators)
        config = self._network.config
        size = config.sample_size
        height, width = self._call.size or ((size, size) if isinstance(size, int) else size)
        told_b = None
        if request.classes is not None:
            told_b = torch.tensor(list(request.classes), device=self._device)
        scheduler = self._scheduler
        with own_generators_only(self._device, self._call.scheduler):
            scheduler.set_timesteps(self._call.steps)
            shape = (len(generators), config.in_channels, height, width)
            x_bchw = randn_tensor(
                shape, generator=generators, device=self._device, dtype=self._network.dtype
            )
            x_bchw = x_bchw * scheduler.init_noise_sigma
            more = self._step_arguments(generators)
            for t in scheduler.timesteps:
                eps_bchw = self._guided(scheduler.scale_model_input(x_bchw, t), t, told_b)
                x_bchw = scheduler.step(eps_bchw, t, x_bchw, **more).prev_sample
        width_of_range = self._high - self._low
        images_bchw = (x_bchw.float() / width_of_range - self._low / width_of_range).clamp(0, 1)
        return DrawnImages(images_bchw.cpu(), (False,) * len(generators))

    def _guided(self, x_bchw: Tensor, t: Tensor, told_b: Tensor | None) -> Tensor:
        if told_b is None:
            plain: Tensor = self._network(x_bchw, t).sample
            return plain
        eps_bchw: Tensor = self._network(x_bchw, t, class_labels=told_b).sample
        guidance, null = self._call.guidance_scale, self._call.null_class
        if guidance in (None, 1) or null is None:
            return eps_bchw
        null_b = torch.full_like(told_b, null)
        null_bchw: Tensor = self._network(x_bchw, t, class_labels=null_b).sample
        return null_bchw + guidance * (eps_bchw - null_bchw)

    def _step_arguments(self, generators: list[torch.Generator]) -> dict[str, object]:
        taken = inspect.signature(self._scheduler.step).parameters
        own = {"generator": generators} if "generator" in taken else {}
        return {**own, **self._call.arguments}


def pixel_range(root: Path) -> tuple[float, float]:
    """What uint8 0 and 255 were in training, if `drl pretrain` recorded it; else (-1, 1)."""
    try:
        record = json.loads((root / TRAINING).read_text(encoding="utf-8"))
        low, high = record["images"]["range"]
    except (FileNotFoundError, KeyError):
        return -1.0, 1.0
    return float(low), float(high)


def pixel_call(
    folder: ModelFolder, scheduler: SchedulerMixin, spec: SynthesizeSpec
) -> dict[str, object]:
    """What an `ImageCall` has of a UNet2DModel, from its configuration.

    Raises:
        SpecError: what such a network cannot do, by name.
        WeightsError: a network that predicts its variance, or is told something else than a class.
    """
    config = folder.config(folder.network)
    place = f"model {folder.spec.model!r}"
    if config.get("class_embed_type") is not None:
        raise WeightsError(f"{place}: class_embed_type {config['class_embed_type']!r} is no class")
    if config.get("out_channels", 3) != config.get("in_channels", 3):
        raise WeightsError(
            f"{place}: {config.get('out_channels')} channels out of {config.get('in_channels')}: "
            "networks that learn their variance are not sampled"
        )
    for name, given in (("negative_prompt", spec.negative_prompt), ("source", spec.source)):
        if given is not None:
            raise SpecError(f"synthesize.{name}: a UNet2DModel in pixel space has none")
    _check_arguments(scheduler, spec.arguments)
    n_embeddings, null = config.get("num_class_embeds"), config.get(NULL_CLASS)
    guidance = spec.guidance_scale
    if n_embeddings is None and guidance is not None:
        raise SpecError(f"synthesize.guidance_scale: {place} is told no class; leave it out")
    if guidance not in (None, 1) and null is None:
        raise SpecError(
            f"synthesize.guidance_scale {guidance}: {place} was trained without a null class "
            "(pretrain.classes.dropout); want 1"
        )
    _check_size(config, spec.size)
    n_classes = null if isinstance(null, int) else n_embeddings
    return {
        "pipeline": "UNet2DModel",
        "takes": "nothing" if n_embeddings is None else "class",
        "steps": spec.steps or scheduler.config.num_train_timesteps,
        "guidance_scale": None if n_embeddings is None else guidance or 1.0,
        "null_class": null,
        "n_classes": n_classes,
        "class_names": _class_names(folder),
    }


def _check_arguments(scheduler: SchedulerMixin, arguments: Mapping[str, JsonValue]) -> None:
    known = [n for n in inspect.signature(scheduler.step).parameters if n in STEP_ARGUMENTS]
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        raise SpecError(
            f"synthesize.arguments: {', '.join(unknown)}: {type(scheduler).__name__} takes "
            f"{', '.join(known) or 'none'} beside a UNet2DModel"
        )


def _check_size(config: Mapping[str, object], size: tuple[int, int] | None) -> None:
    blocks = config.get("block_out_channels", (224, 448, 672, 896))
    assert isinstance(blocks, list | tuple)
    multiple = 2 ** (len(blocks) - 1)
    if size is not None and any(side % multiple for side in size):
        raise SpecError(f"synthesize.size {list(size)}: want multiples of {multiple}")


def _class_names(folder: ModelFolder) -> dict[int, str]:
    """As `drl pretrain` recorded them."""
    try:
        record = json.loads((folder.root / TRAINING).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    names = (record.get("classes") or {}).get("names") or []
    return dict(enumerate(names))
