"""guided-diffusion's names for the blocks of a UNet2DModel, as DDPM-Seg, DIFT-ADM and GD use them.

    input_blocks.0                                   conv_in
    input_blocks.I, middle_block, output_blocks.I    a block: its last module's output
    input_blocks.I.J, middle_block.J ...             one module: ResBlock, attention, up or down
    ....in_layers.2, .out_layers.3                   conv1 and conv2 of a ResBlock

The numbering follows from the structure, so it holds for every UNet2DModel: of ADM-256,
`output_blocks.4` is `up_blocks.1.attentions.1`, and `middle_block.2.out_layers.3` is
`mid_block.resnets.1.conv2`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import UNet2DModel

RESNET_PARTS = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


@dataclass(frozen=True)
class Block:
    """One block of ADM as diffusers' modules, in the order they are called."""

    name: str
    modules: tuple[str, ...]


def adm_blocks(network: UNet2DModel) -> Iterator[Block]:
    """ADM's blocks of a UNet2DModel: input_blocks.*, middle_block, output_blocks.*."""
    names = {name for name, _ in network.named_modules()}

    def present(*paths: str) -> tuple[str, ...]:
        return tuple(path for path in paths if path in names)

    yield Block("input_blocks.0", ("conv_in",))
    position = 1
    for i, down in enumerate(network.down_blocks):
        at = f"down_blocks.{i}"
        for j in range(len(down.resnets)):
            modules = present(f"{at}.resnets.{j}", f"{at}.attentions.{j}")
            yield Block(f"input_blocks.{position}", modules)
            position += 1
        if present(f"{at}.downsamplers.0"):
            yield Block(f"input_blocks.{position}", (f"{at}.downsamplers.0",))
            position += 1
    middle = ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")
    yield Block("middle_block", present(*middle))
    position = 0
    for i, up in enumerate(network.up_blocks):
        at, last = f"up_blocks.{i}", len(up.resnets) - 1
        for j in range(last + 1):
            modules = present(f"{at}.resnets.{j}", f"{at}.attentions.{j}")
            if j == last:
                modules += present(f"{at}.upsamplers.0")
            yield Block(f"output_blocks.{position}", modules)
            position += 1


def adm_aliases(network: UNet2DModel) -> dict[str, tuple[str, str]]:
    """{ADM's name: (module whose output it is, module whose input it is)} for every block and part.

    The two differ: a block of several modules begins with its ResBlock and ends with its attention
    or its change of resolution.
    """
    found: dict[str, tuple[str, str]] = {}
    for block in adm_blocks(network):
        found[block.name] = (block.modules[-1], block.modules[0])
        for j, module in enumerate(block.modules):
            found[f"{block.name}.{j}"] = (module, module)
            if "resnets" in module:
                for part, ours in RESNET_PARTS.items():
                    found[f"{block.name}.{j}.{part}"] = (f"{module}.{ours}",) * 2
    return found
