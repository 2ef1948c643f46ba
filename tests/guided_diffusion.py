"""ADM as functions of its state dict: an independent reference for what drl_data loads and taps.

Written from Dhariwal and Nichol 2021 and Nichol and Dhariwal 2021, with the parameter names of
their checkpoints, without diffusers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

Weights = dict[str, Tensor]


class GuidedDiffusion:
    """A UNet [b, 3, h, w] -> [b, 3 or 6, h, w]; `outputs` and `inputs` have those of each block."""

    def __init__(self, weights: Weights, flags: Mapping[str, object]) -> None:
        self.w = weights
        self.width = int(str(flags["num_channels"]))
        self.head = int(str(flags["num_head_channels"]))
        self.n_blocks = int(str(flags["num_res_blocks"]))
        self.scale_shift = bool(flags["use_scale_shift_norm"])
        self.resamples = bool(flags["resblock_updown"])
        self.new_order = bool(flags.get("use_new_attention_order"))
        self.outputs: Weights = {}
        self.inputs: Weights = {}

    @classmethod
    def load(cls, folder: Path) -> GuidedDiffusion:
        """The network of a folder of model.safetensors and config.json."""
        flags = json.loads((folder / "config.json").read_text())
        return cls(load_file(folder / "model.safetensors"), flags)

    def __call__(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        emb = self.linear("time_embed.2", F.silu(self.linear("time_embed.0", self.sinusoid(t))))
        if label is not None:
            emb = emb + self.w["label_emb.weight"][label]
        skips = []
        for i in range(self.count("input_blocks")):
            x = self.block(f"input_blocks.{i}", x, emb)
            skips.append(x)
        x = self.block("middle_block", x, emb)
        for i in range(self.count("output_blocks")):
            x = self.block(f"output_blocks.{i}", torch.cat([x, skips.pop()], 1), emb)
        return self.conv("out.2", F.silu(self.norm("out.0", x)))

    def count(self, root: str) -> int:
        return 1 + max(int(name.split(".")[1]) for name in self.w if name.startswith(root))

    def sinusoid(self, t: Tensor) -> Tensor:
        """Cosines, then sines, of t 10000^(-i/half)."""
        half = self.width // 2
        angle = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(half) / half)
        return torch.cat([angle.cos(), angle.sin()], 1)

    def block(self, name: str, x: Tensor, emb: Tensor) -> Tensor:
        self.inputs[name] = x
        for j in range(3):
            here = f"{name}.{j}"
            if f"{here}.in_layers.0.weight" in self.w:
                x = self.resblock(here, x, emb, self.change_of(name, j))
            elif f"{here}.qkv.weight" in self.w:
                x = self.attention(here, x)
            elif f"{here}.op.weight" in self.w:
                x = self.conv(f"{here}.op", x, stride=2)
            elif f"{here}.conv.weight" in self.w:
                x = self.conv(f"{here}.conv", F.interpolate(x, scale_factor=2.0))
            elif f"{here}.weight" in self.w:
                x = self.conv(here, x)
            self.outputs[here] = x
        self.outputs[name] = x
        return x

    def change_of(self, name: str, j: int) -> str | None:
        """The ResBlocks that change the resolution: an input block of its own after the blocks of
        each level, and the last module of the last output block of each level."""
        root, _, number = name.partition(".")
        if not self.resamples or not number:
            return None
        i = int(number)
        if root == "input_blocks":
            return "down" if i and i % (self.n_blocks + 1) == 0 else None
        is_last_module = not any(k.startswith(f"{name}.{j + 1}.") for k in self.w)
        return "up" if j and is_last_module else None

    def resblock(self, name: str, x: Tensor, emb: Tensor, change: str | None) -> Tensor:
        h = F.silu(self.norm(f"{name}.in_layers.0", x))
        if change == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        elif change == "up":
            h, x = (F.interpolate(y, scale_factor=2.0, mode="nearest") for y in (h, x))
        h = self.conv(f"{name}.in_layers.2", h)
        told = self.linear(f"{name}.emb_layers.1", F.silu(emb))[:, :, None, None]
        if self.scale_shift:
            scale, shift = told.chunk(2, 1)
            h = self.norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
        else:
            h = self.norm(f"{name}.out_layers.0", h + told)
        h = self.conv(f"{name}.out_layers.3", F.silu(h))
        self.outputs[f"{name}.out_layers.3"] = h
        if f"{name}.skip_connection.weight" in self.w:
            x = self.conv(f"{name}.skip_connection", x)
        return x + h

    def attention(self, name: str, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        flat = self.norm(f"{name}.norm", x).reshape(b, c, -1)
        qkv = F.conv1d(flat, self.w[f"{name}.qkv.weight"], self.w[f"{name}.qkv.bias"])
        n = c // self.head
        if self.new_order:  # [3, head, channel]
            q, k, v = qkv.reshape(b, 3, n, self.head, -1).unbind(1)
        else:  # [head, 3, channel]
            q, k, v = qkv.reshape(b, n, 3, self.head, -1).unbind(2)
        weight = torch.softmax(q.transpose(2, 3) @ k / math.sqrt(self.head), -1)
        a = (v @ weight.transpose(2, 3)).reshape(b, c, -1)
        out = F.conv1d(a, self.w[f"{name}.proj_out.weight"], self.w[f"{name}.proj_out.bias"])
        return x + out.reshape(b, c, height, width)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.w[f"{name}.weight"]
        return F.conv2d(x, weight, self.w[f"{name}.bias"], stride, weight.shape[-1] // 2)
