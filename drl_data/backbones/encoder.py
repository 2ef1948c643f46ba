"""Encoders of `transformers` as backbones: DINOv2, CLIP's vision tower, ViT, MAE, ConvNeXt ...

They see the clean image, so there is no noise and no time: `schedule: {convention: none}` and
`noise: {kind: none}`. Pixels are normalised as `images.range`, `mean` and `std` say.

A tap on tokens [b, n, c] gives the map of the patches, row-major; `@out.cls` gives the vector of
the class token, `@out.prefix` all tokens before the patches (class and registers), and
`@out.patches` the map again, but refuses what holds no patches. DINOv2's
`layernorm` is what REPA aligns to (256 x 768 for images of 224).

CLIP's image embedding is the tap `visual_projection`, [b, c] without an L2 norm, where the
checkpoint has that projection beside its vision tower; all other taps are the tower's.

Shapes: b batch, c channel, h w height and width in pixels or patches, n token.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor, nn

from drl_data.backbones.backbone import (
    Backbone,
    Conditioning,
    Posterior,
    arrange,
    check_images,
    refuse_text,
)
from drl_data.backbones.loader import ModelFolder, placed, seeded, weights_errors
from drl_data.backbones.tokens import TokenLayout
from drl_data.capture import Streams
from drl_data.diffusion_spec import ConditionSpec
from drl_data.errors import SpecError, WeightsError
from drl_data.reduce import TOKENS, TORCH_DTYPES
from drl_data.schedule import NoSchedule
from drl_data.spec import ImageSpec
from drl_data.taps import ResolvedTap

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


PROJECTION = "visual_projection"
"""CLIP's linear map from its pooled class token to the space that it shares with text."""


class EncoderBackbone(Backbone):
    """A `transformers` vision model."""

    network: PreTrainedModel

    def __init__(self, network: PreTrainedModel, device: torch.device) -> None:
        super().__init__(network, NoSchedule(), device)
        self._takes = frozenset(inspect.signature(network.forward).parameters)
        self._projects = any(name == PROJECTION for name, _ in network.named_children())

    @classmethod
    def load(cls, folder: ModelFolder, device: torch.device) -> EncoderBackbone:
        """Weights on `device`, or structure only on meta."""
        return cls(_load_network(folder, device), device)

    @property
    def patch(self) -> int | None:
        """Side of a patch in pixels; None for a network without patches."""
        side = self.network.config.to_dict().get("patch_size")
        return side if isinstance(side, int) else None

    @property
    def native_size(self) -> int | None:
        """Side of the images that the positions are for; None if any size is native."""
        size = self.network.config.to_dict().get("image_size")
        return size if isinstance(size, int) else None

    def input_shape(self, images: ImageSpec) -> tuple[int, int, int]:
        check_images(images, self.network.config.num_channels, self.patch or 1)
        return (images.n_channels, *images.size)

    def encode(self, pixels: Tensor) -> Posterior:
        return Posterior(pixels)

    def conditioning(self, spec: ConditionSpec) -> Conditioning:
        refuse_text(spec, "an encoder")
        if spec.class_label != "null":
            raise SpecError(f"condition.class_label {spec.class_label}: an encoder takes none")
        return Conditioning()

    def forward(self, x: Tensor, model_time: Tensor, kwargs: Mapping[str, Tensor]) -> object:
        options: dict[str, object] = {}
        if "interpolate_pos_encoding" in self._takes and x.shape[2:] != (self.native_size,) * 2:
            options["interpolate_pos_encoding"] = True
        if self.network.config.model_type == "vit_mae" and self.patch is not None:
            # MAE orders patches by random noise and drops the last; increasing "noise" and a mask
            # ratio of 0 (`_configured`) leave all of them, in place.
            n_patches = (x.shape[2] // self.patch) * (x.shape[3] // self.patch)
            options["noise"] = torch.arange(n_patches, device=x.device).expand(len(x), -1)
        output = self.network(pixel_values=x, **options, **kwargs)
        if self._projects:
            self.network.get_submodule(PROJECTION)(output.pooler_output)
        return output

    def streams(self, x: Tensor, kwargs: Mapping[str, Tensor]) -> Streams | None:
        if self.patch is None:
            return None
        return Streams((x.shape[-2] // self.patch) * (x.shape[-1] // self.patch), n_text=None)

    def arrange(
        self, tap: ResolvedTap, x: Tensor, size: tuple[int, ...]
    ) -> tuple[Tensor, tuple[str, ...]]:
        if x.ndim == 3 and tap.parts[-1:] == ("prefix",):
            return x, TOKENS
        if self.patch is None:
            return arrange(x, size)
        return TokenLayout(size[0] // self.patch, size[1] // self.patch).arrange(tap, x, text=False)


def _load_network(folder: ModelFolder, device: torch.device) -> PreTrainedModel:
    from transformers import AutoModel

    dtype = TORCH_DTYPES[folder.spec.dtype]
    with weights_errors(folder, folder.root):
        config = _configured(folder)
        projection_dim = _projection_dim(folder)
        if device.type == "meta":
            with device:
                network = AutoModel.from_config(config, dtype=dtype)
                _add_projection(network, projection_dim)
        elif folder.spec.init == "random":
            with seeded(folder.spec.init_seed):
                network = AutoModel.from_config(config, dtype=dtype)
                _add_projection(network, projection_dim)
        else:
            network = _pretrained(folder, config, dtype)
            _add_projection(network, projection_dim, _projection_weight(folder, projection_dim))
    if network.main_input_name != "pixel_values":
        raise WeightsError(
            f"model {folder.spec.model!r} is a {type(network).__name__}, which takes "
            f"{network.main_input_name} and no images; want a vision model"
        )
    return network.eval() if device.type == "meta" else placed(network, device)


def _configured(folder: ModelFolder) -> PretrainedConfig:
    """The model's configuration; of a model with a vision tower (CLIP, SigLIP), the tower's."""
    from transformers import AutoConfig

    with weights_errors(folder, folder.root):
        # Without the last one, transformers would ask the terminal whether to run a model's code.
        config = AutoConfig.from_pretrained(
            folder.root, local_files_only=True, trust_remote_code=False
        )
    if "vision_config" in config.to_dict():
        config = config.vision_config
    if config.model_type == "vit_mae":
        config.mask_ratio = 0.0
    return config


def _projection_dim(folder: ModelFolder) -> int | None:
    """Channels of CLIP's image embedding; None for a model without."""
    config = folder.config(folder.root)
    architectures = config.get("architectures")
    alone = isinstance(architectures, list) and "CLIPVisionModelWithProjection" in architectures
    if config.get("model_type") != "clip" and not alone:
        return None
    from transformers import AutoConfig

    loaded = AutoConfig.from_pretrained(folder.root, local_files_only=True, trust_remote_code=False)
    return int(loaded.projection_dim)


def _add_projection(
    network: PreTrainedModel, projection_dim: int | None, weight: Tensor | None = None
) -> None:
    """CLIP's projection beside the tower, whose own modules and weights stay what they are."""
    if projection_dim is None:
        return
    projection = nn.Linear(network.config.hidden_size, projection_dim, bias=False)
    if weight is not None:
        projection.weight = nn.Parameter(weight)
    network.add_module(PROJECTION, projection.to(network.dtype))


def _projection_weight(folder: ModelFolder, projection_dim: int | None) -> Tensor | None:
    """Its weight [projection_dim, c] from the model's safetensors.

    Raises:
        WeightsError: if they have none.
    """
    if projection_dim is None:
        return None
    name = f"{PROJECTION}.weight"
    for file in folder.weight_files():
        with safe_open(file, framework="pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118
                weight: Tensor = tensors.get_tensor(name)
                return weight
    raise WeightsError(f"model {folder.spec.model!r}: {folder.root} lacks {name}")


def _pretrained(
    folder: ModelFolder, config: PretrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    """Weights from safetensors; missing ones are an error, where transformers would draw them."""
    from transformers import AutoModel
    from transformers.utils import logging

    folder.check_weights()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the text tower's weights are unexpected, and rightly so
    logging.disable_progress_bar()
    try:
        network, loading = AutoModel.from_pretrained(
            folder.root,
            config=config,
            dtype=dtype,
            variant=folder.spec.variant,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(loading["missing_keys"])
    if missing and all(name.startswith("pooler.") for name in missing):
        network.pooler = None  # a head that many checkpoints lack; without it, it cannot be tapped
    elif missing:
        raise WeightsError(
            f"model {folder.spec.model!r}: {folder.root} lacks {len(missing)} weights of "
            f"{type(network).__name__}: {', '.join(missing[:5])}"
        )
    return network
