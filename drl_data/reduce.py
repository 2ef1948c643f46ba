"""Reductions on the device, before features travel to the host; then the cast to storage.

    mean            average over space or tokens           (c, h, w) -> (c)      (n, c) -> (c)
    max             maximum over space or tokens           (c, h, w) -> (c)      (n, c) -> (c)
    avg_pool(S)     adaptive average pool to S x S, or avg_pool(HxW); never enlarges a map
    l2              unit L2 norm along the channel

They are applied in the order written. The same code gives the shapes, on the meta device.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from drl_data.errors import SpecError
from drl_data.spec import DType

MAP = ("channel", "height", "width")
TOKENS = ("token", "channel")
VECTOR = ("channel",)

TORCH_DTYPES: dict[DType, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

_CALL = re.compile(r"^(?P<name>[a-z_0-9]+)(?:\((?P<height>\d+)(?:x(?P<width>\d+))?\))?$")


def reduce(
    x: Tensor, dims: tuple[str, ...], reductions: Sequence[str]
) -> tuple[Tensor, tuple[str, ...]]:
    """Apply `reductions` to x [b, *dims]; returns the result and the names of its axes.

    Raises:
        SpecError: for an unknown reduction, or one that does not fit the axes.
    """
    for text in reductions:
        match = _CALL.match(text.replace(" ", ""))
        name = match["name"] if match else ""
        if match and name in ("mean", "max") and match["height"] is None and dims != VECTOR:
            axes = (2, 3) if dims == MAP else (1,)
            x = x.mean(axes) if name == "mean" else x.amax(axes)
            dims = VECTOR
        elif match and name == "avg_pool" and match["height"] and dims == MAP:
            x = _avg_pool(x, int(match["height"]), int(match["width"] or match["height"]))
        elif match and name == "l2" and match["height"] is None:
            x = F.normalize(x, dim=dims.index("channel") + 1)
        else:
            raise SpecError(
                f"reduce {text!r} on axes {dims}: want mean, max, avg_pool(S), avg_pool(HxW) (maps "
                "only) or l2; mean and max need space or tokens"
            )
    return x, dims


def _avg_pool(x: Tensor, height: int, width: int) -> Tensor:
    if height > x.shape[2] or width > x.shape[3]:
        raise SpecError(
            f"avg_pool({height}x{width}) of a map of {x.shape[2]}x{x.shape[3]}: it would enlarge "
            "it; store the native map and resize at read"
        )
    return F.adaptive_avg_pool2d(x, (height, width))


def to_storage(x: Tensor, dtype: DType, *, clip: bool) -> tuple[Tensor, Tensor]:
    """Cast to the storage type; returns (cast, number of finite values that it cannot hold).

    Such values become infinite, or with `clip` the largest finite value of their sign. The count
    is a 0-d int64 tensor on the device, so that counting does not synchronise. NaN and infinite
    inputs stay what they are.
    """
    target = TORCH_DTYPES[dtype]
    if target == x.dtype:
        return x, torch.zeros((), dtype=torch.int64, device=x.device)
    cast = x.to(target)
    overflowed = torch.isinf(cast) & torch.isfinite(x)
    if clip:
        largest = torch.finfo(target).max
        cast = torch.where(overflowed, cast.clamp(-largest, largest), cast)
    return cast, overflowed.sum()
