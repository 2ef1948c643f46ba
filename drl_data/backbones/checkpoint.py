"""Pixel-space networks of your own code whose weights are one safetensors file.

What a factory (custom.py) needs most often: structure on meta, seeded random weights, or those of
`backbone.weights`, of which only the tensors under a prefix are the network's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from drl_data.backbones.backbone import Conditioning, Posterior, check_images, refuse_text
from drl_data.backbones.custom import CustomBackbone
from drl_data.backbones.loader import placed, seeded
from drl_data.backbones.overrides import read_tensors, replace_tensors
from drl_data.diffusion_spec import ConditionSpec
from drl_data.errors import SpecError
from drl_data.reduce import TORCH_DTYPES
from drl_data.schedule import Schedule
from drl_data.spec import BackboneSpec, ImageSpec
from drl_data.spec_base import file_digest


class CheckpointBackbone(CustomBackbone):
    """A network of RGB pixels [b, 3, h, w], without conditions.

    `make` builds the network, `prefix` is what its tensors are called in the checkpoint before the
    network's own names (other tensors of the file are left alone), `multiple` is what the sides of
    images must be a multiple of.

    Raises:
        SpecError: if pretrained weights are asked for and `backbone.weights` names no file.
        WeightsError: if the file does not hold exactly the network's tensors.
    """

    reads_weights = True

    def __init__(
        self,
        make: Callable[[], nn.Module],
        schedule: Schedule,
        spec: BackboneSpec,
        device: torch.device,
        *,
        prefix: str = "",
        multiple: int = 1,
    ) -> None:
        super().__init__(_build(make, spec, device, prefix), schedule, device)
        self._spec = spec
        self._multiple = multiple

    def input_shape(self, images: ImageSpec) -> tuple[int, int, int]:
        check_images(images, 3, self._multiple)
        return (images.n_channels, *images.size)

    def encode(self, pixels: Tensor) -> Posterior:
        return Posterior(pixels)

    def conditioning(self, spec: ConditionSpec) -> Conditioning:
        refuse_text(spec, type(self.network).__name__)
        if spec.class_label != "null":
            raise SpecError(f"condition.class_label {spec.class_label}: this model takes none")
        return Conditioning()

    def forward(self, x: Tensor, model_time: Tensor, kwargs: Mapping[str, Tensor]) -> object:
        return self.network(x, model_time)

    def weights_digest(self) -> str:
        return file_digest(_weights(self._spec)) if self._spec.init == "pretrained" else "random"


def _build(
    make: Callable[[], nn.Module], spec: BackboneSpec, device: torch.device, prefix: str
) -> nn.Module:
    dtype = TORCH_DTYPES[spec.dtype]
    if device.type == "meta":
        with device:
            return make().to(dtype)
    with seeded(spec.init_seed):
        network = make()
    if spec.init == "pretrained":
        path = _weights(spec)
        tensors = {
            name.removeprefix(prefix): tensor
            for name, tensor in read_tensors(path).items()
            if name.startswith(prefix)
        }
        replace_tensors(network, tensors, path)
    return placed(network.to(dtype), device)


def _weights(spec: BackboneSpec) -> str:
    if spec.weights is None:
        raise SpecError(
            f"backbone.model {spec.model!r} reads its weights from backbone.weights; give the "
            "checkpoint as a safetensors file there, or init: random"
        )
    return spec.weights
