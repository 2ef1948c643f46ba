"""Other weights for a denoiser: a whole state dict (CleanDIFT), or LoRA fused into it.

W' = W + scale * (alpha / r) * B A     (Hu et al. 2021, eq. 3), A [r, in] "down", B [out, r] "up"
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from drl_data.errors import WeightsError
from drl_data.spec import BackboneSpec, LoraSpec

_LORA_KEY = re.compile(
    r"^(?P<module>.+?)(?:[._]lora)?[._]"
    r"(?P<part>lora_A|lora_B|lora_down|lora_up|down|up|alpha)(?:\.default)?(?:\.weight)?$"
)
_DOWN = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up"}
_PREFIX = re.compile(
    r"^(?:base_model[._]model[._])?(?:lora_unet_|lora_transformer_|unet\.|transformer\.)?"
)


def apply_overrides(network: nn.Module, spec: BackboneSpec) -> None:
    """Replace the network's weights and fuse LoRAs into them, as the spec says.

    Raises:
        WeightsError: if a file does not fit the network.
    """
    if spec.weights is not None:
        replace_weights(network, spec.weights)
    for lora in spec.lora:
        fuse_lora(network, lora)


def replace_weights(network: nn.Module, path: str) -> None:
    """Load a safetensors state dict that has exactly the network's tensors.

    Raises:
        WeightsError: with the tensors that are missing, unexpected or of another shape.
    """
    state = _read(path)
    own = network.state_dict()
    other_shape = [
        f"{name} {list(state[name].shape)}, want {list(own[name].shape)}"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": sorted(other_shape),
    }
    if any(problems.values()):
        lines = "; ".join(f"{what}: {_some(names)}" for what, names in problems.items() if names)
        raise WeightsError(
            f"backbone.weights {path!r} does not fit {type(network).__name__}: {lines}; want the "
            "network's own names, as `drl taps` lists its modules, or the whole other checkpoint "
            "as backbone.model"
        )
    network.load_state_dict(state)


def fuse_lora(network: nn.Module, lora: LoraSpec) -> None:
    """Add a LoRA to the weights that it names; diffusers', PEFT's and kohya's key names.

    Raises:
        WeightsError: for keys that belong to no module of the network, or ranks that do not fit.
    """
    modules = {name.replace(".", "_"): module for name, module in network.named_modules()}
    found: dict[str, dict[str, Tensor]] = {}
    strange: list[str] = []
    for key, tensor in _read(lora.path).items():
        match = _LORA_KEY.match(key)
        name = _PREFIX.sub("", match["module"]) if match else ""
        name = name.replace(".processor", "").replace(".", "_")
        if match is None or not isinstance(modules.get(name), nn.Linear | nn.Conv2d):
            strange.append(key)
        else:
            found.setdefault(name, {})[_DOWN.get(match["part"], match["part"])] = tensor.float()
    if strange or not found:
        raise WeightsError(
            f"backbone.lora {lora.path!r}: {len(strange)} tensors belong to no linear or "
            f"convolution of {type(network).__name__}: {_some(sorted(strange))}; want "
            "MODULE.lora_A.weight / lora_B, or lora_down / lora_up with alpha, in diffusers' names "
            "and for the denoiser alone"
        )
    for name, parts in found.items():
        _add(modules[name], parts, lora, name)


def _add(module: nn.Module, parts: Mapping[str, Tensor], lora: LoraSpec, name: str) -> None:
    weight = module.weight
    assert isinstance(weight, Tensor)
    down, up = parts.get("down"), parts.get("up")
    if down is None or up is None:
        raise WeightsError(f"backbone.lora {lora.path!r}: {name} has only {', '.join(parts)}")
    rank = down.shape[0]
    scale = lora.scale * float(parts.get("alpha", torch.tensor(rank))) / rank
    if up.shape[1] != rank or up.shape[0] * down[0].numel() != weight.numel():
        raise WeightsError(
            f"backbone.lora {lora.path!r}: {name} has up {list(up.shape)} and down "
            f"{list(down.shape)}, the weight is {list(weight.shape)}"
        )
    update = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    with torch.no_grad():
        weight.copy_(weight.float() + (scale * update).to(weight.device))


def _read(path: str) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: {error}; want a safetensors file") from error


def _some(names: list[str], n: int = 8) -> str:
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")
