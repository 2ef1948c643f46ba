"""ADM: the UNets of guided-diffusion (Dhariwal and Nichol 2021).

A checkpoint is a folder of two files: `model.safetensors`, the original state dict (its .pt is a
pickle; `torch.load(..., weights_only=True)` and `safetensors.torch.save_file` convert it once), and
`config.json`, the flags that it was made with, named as guided-diffusion names them:

    {"_class_name": "GuidedDiffusionUNet", "image_size": 256, "num_channels": 256,
     "num_res_blocks": 2, "attention_resolutions": "32,16,8", "num_head_channels": 64, ...}

It is loaded into diffusers' UNet2DModel, which computes the same function: the mapping is complete,
and an independent implementation in the tests agrees. Taps may use the names of either library
(adm_names.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from drl_data.backbones.adm_names import RESNET_PARTS, adm_blocks
from drl_data.backbones.loader import ModelFolder, build, placed, seeded, weights_errors
from drl_data.backbones.unet import PixelUNetBackbone
from drl_data.errors import WeightsError
from drl_data.reduce import TORCH_DTYPES
from drl_data.schedule import NoiseSchedule

if TYPE_CHECKING:
    from diffusers import UNet2DModel

GUIDED_DIFFUSION = "GuidedDiffusionUNet"

CHANNEL_MULTIPLIERS = {
    512: "0.5,1,1,2,2,4,4",
    256: "1,1,2,2,4,4",
    128: "1,1,2,3,4",
    64: "1,2,3,4",
}
"""guided-diffusion's default by image size (script_util.py, `create_model`)."""

BETA_SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


def load_guided_diffusion(folder: ModelFolder, device: torch.device) -> PixelUNetBackbone:
    """A guided-diffusion checkpoint in a UNet2DModel; on meta structure only.

    Raises:
        WeightsError: if the flags describe a network that UNet2DModel cannot be, or the weights do
            not fit.
    """
    from diffusers import DDPMScheduler, UNet2DModel

    flags = folder.config(folder.network)
    dtype = TORCH_DTYPES[folder.spec.dtype]
    with weights_errors(folder, folder.network):
        config = unet_config(flags)
        beta_schedule = BETA_SCHEDULES[str(flags.get("noise_schedule", "linear"))]
        n_steps = int(str(flags.get("diffusion_steps", 1000)))
        scheduler = DDPMScheduler(
            num_train_timesteps=n_steps,
            beta_start=0.1 / n_steps,
            beta_end=20 / n_steps,
            beta_schedule=beta_schedule,
        )
        schedule = NoiseSchedule(scheduler.alphas_cumprod)
        if device.type == "meta":
            return PixelUNetBackbone(build(UNet2DModel, config, "meta", dtype), schedule, device)
        with seeded(folder.spec.init_seed):
            network = build(UNet2DModel, config, "cpu", torch.float32)
        if folder.spec.init == "pretrained":
            folder.check_weights()
            original = load_file(folder.network / "model.safetensors")
            new_order = bool(flags.get("use_new_attention_order", False))
            network.load_state_dict(to_diffusers(original, network, new_order=new_order))
    return PixelUNetBackbone(placed(network.to(dtype), device), schedule, device)


def unet_config(flags: Mapping[str, object]) -> dict[str, object]:
    """UNet2DModel's configuration for guided-diffusion's flags.

    Raises:
        WeightsError: for flags that UNet2DModel cannot express.
    """
    size = int(str(flags["image_size"]))
    multipliers = str(flags.get("channel_mult") or CHANNEL_MULTIPLIERS[size])
    width = int(str(flags.get("num_channels", 128)))
    channels = [int(width * float(m)) for m in multipliers.split(",")]
    attention = {size // int(r) for r in str(flags.get("attention_resolutions", "16,8")).split(",")}
    attends = [2**level in attention for level in range(len(channels))]
    head = int(str(flags.get("num_head_channels", -1)))
    if head <= 0:
        raise WeightsError(
            "guided-diffusion with num_heads instead of num_head_channels: its heads are wider on "
            "lower levels, which UNet2DModel cannot express; want num_head_channels (ADM-256 has "
            "64)"
        )
    resnet = bool(flags.get("resblock_updown", False))
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    plain = plain if resnet else ("DownBlock2D", "UpBlock2D")
    scale_shift = bool(flags.get("use_scale_shift_norm", True))
    return {
        "sample_size": size,
        "in_channels": 3,
        "out_channels": 6 if flags.get("learn_sigma") else 3,
        "block_out_channels": channels,
        "layers_per_block": int(str(flags.get("num_res_blocks", 2))),
        "down_block_types": ["AttnDownBlock2D" if a else plain[0] for a in attends],
        "up_block_types": ["AttnUpBlock2D" if a else plain[1] for a in reversed(attends)],
        "downsample_type": "resnet" if resnet else "conv",
        "upsample_type": "resnet" if resnet else "conv",
        "attention_head_dim": head,
        "attn_norm_num_groups": 32,
        "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
        "num_class_embeds": 1000 if flags.get("class_cond") else None,
    }


OUTER_PARTS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def to_diffusers(
    original: Mapping[str, Tensor], network: UNet2DModel, *, new_order: bool
) -> dict[str, Tensor]:
    """A guided-diffusion state dict under the names of a UNet2DModel.

    `new_order`: q, k and v are split before the heads (`use_new_attention_order`), not after.

    Raises:
        WeightsError: for tensors that the network has no place for.
    """
    head_width = int(network.config.attention_head_dim)
    prefixes = {
        f"{block.name}.{j}": module
        for block in adm_blocks(network)
        for j, module in enumerate(block.modules)
    }
    converted: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in original.items():
        module, _, kind = name.rpartition(".")
        pieces = module.split(".")
        n = 2 if pieces[0] == "middle_block" else 3
        prefix, part = ".".join(pieces[:n]), ".".join(pieces[n:])
        if module in OUTER_PARTS:
            converted[f"{OUTER_PARTS[module]}.{kind}"] = tensor
        elif prefix not in prefixes:
            unknown.append(name)
        elif part == "qkv":
            for letter, rows in zip("qkv", _split_qkv(tensor, head_width, new_order), strict=True):
                converted[f"{prefixes[prefix]}.to_{letter}.{kind}"] = rows
        elif part in ("norm", "proj_out"):
            place = "group_norm" if part == "norm" else "to_out.0"
            converted[f"{prefixes[prefix]}.{place}.{kind}"] = tensor.reshape(tensor.shape[:2])
        elif part in RESNET_PARTS:
            converted[f"{prefixes[prefix]}.{RESNET_PARTS[part]}.{kind}"] = tensor
        else:  # the convolution itself: input_blocks.0, and up and down without a ResBlock
            place = {"op": ".conv", "conv": ".conv"}.get(part, "")
            converted[f"{prefixes[prefix]}{place}.{kind}"] = tensor
    if unknown:
        raise WeightsError(
            f"{len(unknown)} tensors have no place in the network of config.json's flags: "
            f"{', '.join(unknown[:5])}; are the flags those of the checkpoint?"
        )
    return converted


def to_original(network: UNet2DModel, *, new_order: bool) -> dict[str, Tensor]:
    """The inverse of `to_diffusers`: a UNet2DModel's weights under guided-diffusion's names."""
    head_width = int(network.config.attention_head_dim)
    ours = network.state_dict()
    original: dict[str, Tensor] = {}

    def take(theirs: str, module: str, *, kernel: int = 0) -> None:
        for kind in ("weight", "bias"):
            if f"{module}.{kind}" in ours:
                tensor = ours[f"{module}.{kind}"]
                original[f"{theirs}.{kind}"] = (
                    tensor[..., None] if kernel and kind == "weight" else tensor
                )

    for theirs, module in OUTER_PARTS.items():
        take(theirs, module)
    for block in adm_blocks(network):
        for j, module in enumerate(block.modules):
            name = f"{block.name}.{j}"
            if f"{module}.to_q.weight" in ours:
                take(f"{name}.norm", f"{module}.group_norm")
                take(f"{name}.proj_out", f"{module}.to_out.0", kernel=1)
                for kind in ("weight", "bias"):
                    parts = [ours[f"{module}.to_{letter}.{kind}"] for letter in "qkv"]
                    rows = _join_qkv(parts, head_width, new_order)
                    original[f"{name}.qkv.{kind}"] = rows[..., None] if kind == "weight" else rows
            elif f"{module}.conv1.weight" in ours:
                for theirs, part in RESNET_PARTS.items():
                    take(f"{name}.{theirs}", f"{module}.{part}")
            else:
                take(name, module)
                take(f"{name}.{'op' if 'down' in module else 'conv'}", f"{module}.conv")
    return {name: tensor.contiguous() for name, tensor in original.items()}


def _join_qkv(parts: Sequence[Tensor], head_width: int, new_order: bool) -> Tensor:
    if new_order:
        return torch.cat(list(parts))
    heads = [part.reshape(-1, head_width, *part.shape[1:]) for part in parts]
    return torch.stack(heads, 1).flatten(0, 2)


def _split_qkv(qkv: Tensor, head_width: int, new_order: bool) -> tuple[Tensor, ...]:
    """Rows [3 c, ...] of ADM's one convolution as (q, k, v), each [c, ...]."""
    rows = qkv.reshape(qkv.shape[:2])  # the kernel of its convolution is 1 wide
    if new_order:
        return rows.chunk(3)
    heads = rows.reshape(-1, 3, head_width, *rows.shape[1:])
    return tuple(heads[:, i].flatten(0, 1) for i in range(3))
