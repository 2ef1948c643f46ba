"""Reductions on the device, before features travel to the host. Applied in the order written.

    mean, max            over space or tokens, and frames     (c, h, w) -> (c)      (n, c) -> (c)
    avg_pool(S | HxW)    adaptive average pool of a map, of each frame; never enlarges it
    frame_mean           over frames                          (c, f, h, w) -> (c, h, w)
    frames(0:4,8)        these frames, in this order
    cls                  the first token                      (n, c) -> (c)
    tokens(0:16,20)      these tokens, in this order
    channels(0:16,20)    these channels, in this order (of attention probabilities: keys)
    drop_channels(3,7)   all channels but these
    zero_channels(3,7)   these channels become 0 (massive activations: DiTF's 154 and 1446 of Flux)
    heads(0:4), head_mean, head_sum     of attention probabilities
    project(K[, seed])   Gaussian random projection of the channel to K (Johnson and Lindenstrauss)
    pca(K[, N])          the first K principal components, fitted on N samples before the run
    layer_norm[(eps)]    over the channel, without affine; eps 1e-6
    adaln                layer_norm, then (1 + scale) x + shift of the tapped block
    l2                   unit L2 norm along the channel
    standardise          per sample over everything: (x - mean) / std, n - 1 (RCG)
    spatial_norm[(G)]    per sample and channel: (x - G mean) / std over space (and frames); G 1
                         (iREPA)
    time_mean            mean over the timesteps; the array has one entry for all of them

The same code gives the shapes, on the meta device. Those from `project` to `spatial_norm` but `l2`
compute in float32.

Shapes: b batch, c channel, k component.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from drl_data.errors import SpecError
from drl_data.noise import draw_normal
from drl_data.spec_base import DType

MAP = ("channel", "height", "width")
VIDEO = ("channel", "frame", "height", "width")
TOKENS = ("token", "channel")
VECTOR = ("channel",)
PROBABILITIES = ("head", "token", "channel")
"""Axes of attention probabilities: head, query, key."""

TORCH_DTYPES: Mapping[DType, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""Types that a backbone computes in."""

SPACE = ("frame", "height", "width", "token")
"""Axes of positions, which `mean` and its like average over."""

TIME_MEAN = "time_mean"
LAYER_NORM_EPS = 1e-6
"""Of every AdaLN of DiT, SD3 and Flux."""
DEFAULT_FIT_SAMPLES = 1024


class Axes(NamedTuple):
    """A tensor [b, *dims] and the names of its axes."""

    x: Tensor
    dims: tuple[str, ...]


class Pca(NamedTuple):
    """mean [c] and components [k, c] (rows of unit length, by falling variance), float32."""

    mean: Tensor
    components: Tensor


@dataclass(frozen=True)
class Context:
    """What reductions need besides the tensor: the block's modulation, fitted components.

    `shift` and `scale` are [b, c]. Without `pca` on the meta device shapes are all that is asked.
    """

    shift: Tensor | None = None
    scale: Tensor | None = None
    pca: Pca | None = field(default=None)


NO_CONTEXT = Context()


def reduce(
    x: Tensor, dims: tuple[str, ...], reductions: Sequence[str], context: Context = NO_CONTEXT
) -> tuple[Tensor, tuple[str, ...]]:
    """Apply `reductions` to x [b, *dims]; returns the result and the names of its axes.

    `time_mean` is left to the caller, who sees all timesteps.

    Raises:
        SpecError: for an unknown reduction, or one that does not fit the axes.
    """
    found = Axes(x, dims)
    for text in reductions:
        name, arguments = parse_reduction(text)
        if name == TIME_MEAN:
            continue
        try:
            found = _REDUCTIONS[name](found, arguments, context)
        except _UnfitError as error:
            raise SpecError(
                f"reduce {text!r} on axes {found.dims} of {list(found.x.shape[1:])}: {error}"
            ) from error
    return found


def parse_reduction(text: str) -> tuple[str, tuple[str, ...]]:
    """`avg_pool(8x4)` -> ("avg_pool", ("8x4",)).

    Raises:
        SpecError: if there is no such reduction.
    """
    match = re.fullmatch(r"([a-z_0-9]+)(?:\(([^()]+)\))?", text.replace(" ", ""))
    if match is None or (match[1] not in _REDUCTIONS and match[1] != TIME_MEAN):
        raise SpecError(f"reduce {text!r}: want one of {', '.join([*_REDUCTIONS, TIME_MEAN])}")
    return match[1], tuple(match[2].split(",")) if match[2] else ()


def at_source(reductions: Sequence[str]) -> tuple[str, ...]:
    """The leading reductions that make attention probabilities small: heads and keys."""
    for i, text in enumerate(reductions):
        if parse_reduction(text)[0] not in ("heads", "head_mean", "head_sum", "channels"):
            return tuple(reductions[:i])
    return tuple(reductions)


def pca_of(reductions: Sequence[str]) -> tuple[int, int, int] | None:
    """(position in the list, components, samples to fit on) of `pca`, None if there is none.

    Raises:
        SpecError: if there are two, or arguments that mean nothing.
    """
    found = [i for i, text in enumerate(reductions) if parse_reduction(text)[0] == "pca"]
    if not found:
        return None
    if len(found) > 1:
        raise SpecError(f"reduce {list(reductions)}: pca twice; want it once")
    try:
        k, *rest = _integers(parse_reduction(reductions[found[0]])[1], 1, 2)
    except _UnfitError as error:
        raise SpecError(f"reduce {reductions[found[0]]!r}: {error}") from error
    return found[0], k, rest[0] if rest else DEFAULT_FIT_SAMPLES


class _UnfitError(Exception):
    """What a reduction wants instead; `reduce` says where."""


# --- arguments ----------------------------------------------------------------------------------


def _none(arguments: Sequence[str]) -> None:
    if arguments:
        raise _UnfitError("want no argument")


def _integers(arguments: Sequence[str], least: int, most: int) -> list[int]:
    if not least <= len(arguments) <= most or not all(a.isdecimal() for a in arguments):
        raise _UnfitError(f"want {least} to {most} whole numbers in parentheses")
    numbers = [int(a) for a in arguments]
    if numbers[0] < 1:
        raise _UnfitError("want at least 1")
    return numbers


def _number(arguments: Sequence[str], default: float) -> float:
    if not arguments:
        return default
    try:
        (value,) = map(float, arguments)
    except ValueError as error:
        raise _UnfitError("want one number in parentheses, or none") from error
    return value


def _positions(arguments: Sequence[str], size: int) -> list[int]:
    """`0:16,20` -> 0 .. 15, 20."""
    found: list[int] = []
    for text in arguments:
        match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
        if match is None:
            raise _UnfitError("want positions like (0:16,20)")
        start = int(match[1])
        found += range(start, int(match[2]) if match[2] else start + 1)
    if not found or max(found) >= size:
        raise _UnfitError(f"want positions of 0..{size - 1}, like (0:16,20)")
    return found


def _axis(a: Axes, name: str) -> int:
    if name not in a.dims:
        raise _UnfitError(f"want an axis {name!r}")
    return a.dims.index(name) + 1


# --- selecting and averaging --------------------------------------------------------------------


def _over_space(average: Callable[[Tensor, list[int]], Tensor]) -> Reduction:
    def apply(a: Axes, arguments: Sequence[str], _: Context) -> Axes:
        _none(arguments)
        space = [d for d in a.dims if d in SPACE]
        if not space:
            raise _UnfitError("it needs space or tokens")
        axes = [_axis(a, d) for d in space]
        return Axes(average(a.x, axes), tuple(d for d in a.dims if d not in space))

    return apply


def _avg_pool(a: Axes, arguments: Sequence[str], _: Context) -> Axes:
    sides = arguments[0].split("x") if len(arguments) == 1 else []
    if a.dims[-2:] != ("height", "width") or len(sides) not in (1, 2):
        raise _UnfitError("want a map, and avg_pool(S) or avg_pool(HxW)")
    if not all(side.isdecimal() and int(side) for side in sides):
        raise _UnfitError("want avg_pool(S) or avg_pool(HxW)")
    height, width = int(sides[0]), int(sides[-1])
    if height > a.x.shape[-2] or width > a.x.shape[-1]:
        raise _UnfitError(
            f"avg_pool({height}x{width}) of a map of {a.x.shape[-2]}x{a.x.shape[-1]}: it would "
            "enlarge it; store the native map and resize at read"
        )
    pooled = F.adaptive_avg_pool2d(a.x.flatten(1, -3), (height, width))
    return Axes(pooled.reshape(*a.x.shape[:-2], height, width), a.dims)


def _cls(a: Axes, arguments: Sequence[str], _: Context) -> Axes:
    _none(arguments)
    axis = _axis(a, "token")
    return Axes(a.x.select(axis, 0), tuple(d for d in a.dims if d != "token"))


def _select(name: str) -> Reduction:
    def apply(a: Axes, arguments: Sequence[str], _: Context) -> Axes:
        axis = _axis(a, name)
        chosen = _positions(arguments, a.x.shape[axis])
        return Axes(a.x.index_select(axis, torch.tensor(chosen, device=a.x.device)), a.dims)

    return apply


def _drop_channels(a: Axes, arguments: Sequence[str], _: Context) -> Axes:
    axis = _axis(a, "channel")
    n = a.x.shape[axis]
    dropped = set(_positions(arguments, n))
    kept = torch.tensor([i for i in range(n) if i not in dropped], device=a.x.device)
    if len(dropped) == n:
        raise _UnfitError("no channel would be left")
    return Axes(a.x.index_select(axis, kept), a.dims)


def _zero_channels(a: Axes, arguments: Sequence[str], _: Context) -> Axes:
    axis = _axis(a, "channel")
    zeroed = torch.tensor(_positions(arguments, a.x.shape[axis]), device=a.x.device)
    return Axes(a.x.index_fill(axis, zeroed, 0), a.dims)


def _over(name: str, average: Callable[[Tensor, int], Tensor]) -> Reduction:
    def apply(a: Axes, arguments: Sequence[str], _: Context) -> Axes:
        _none(arguments)
        return Axes(average(a.x, _axis(a, name)), tuple(d for d in a.dims if d != name))

    return apply


# --- projections of the channel -----------------------------------------------------------------


def _map_channel(a: Axes, function: Callable[[Tensor], Tensor]) -> Axes:
    """`function` on float32 [..., c]."""
    axis = _axis(a, "channel")
    return Axes(function(a.x.movedim(axis, -1).float()).movedim(-1, axis), a.dims)


@lru_cache(maxsize=64)
def _gaussian(n_channels: int, n_out: int, seed: int, device: torch.device) -> Tensor:
    """[c, k] of variance 1 / k, so that squared lengths are kept on average."""
    if device.type == "meta":
        return torch.empty(n_channels, n_out, device=device)
    drawn = draw_normal((n_channels, n_out), "projection", seed, n_channels, n_out)
    return torch.from_numpy(drawn / n_out**0.5).float().to(device)


def _project(a: Axes, arguments: Sequence[str], _: Context) -> Axes:
    k, *rest = _integers(arguments, 1, 2)
    n = a.x.shape[_axis(a, "channel")]
    matrix = _gaussian(n, k, rest[0] if rest else 0, a.x.device)
    return _map_channel(a, lambda x: x @ matrix)


def _pca(a: Axes, arguments: Sequence[str], context: Context) -> Axes:
    k = _integers(arguments, 1, 2)[0]
    n = a.x.shape[_axis(a, "channel")]
    if k > n:
        raise _UnfitError(f"want at most {n} components")
    if context.pca is None:
        if a.x.device.type != "meta":
            raise _UnfitError("it is not fitted; `drl extract` fits it before the first unit")
        meta = torch.empty(k, n, device="meta")
        return _map_channel(a, lambda x: x @ meta.T)
    mean, components = context.pca
    return _map_channel(a, lambda x: (x - mean) @ components.T)


# --- normalisations -----------------------------------------------------------------------------


def _layer_norm(a: Axes, arguments: Sequence[str], _: Context) -> Axes:
    eps = _number(arguments, LAYER_NORM_EPS)
    return _map_channel(a, lambda x: F.layer_norm(x, x.shape[-1:], eps=eps))


def _adaln(a: Axes, arguments: Sequence[str], context: Context) -> Axes:
    _none(arguments)
    axis = _axis(a, "channel")
    if context.shift is None or context.scale is None:
        raise _UnfitError("it needs the modulation of a block; tap a block that has an AdaLN")
    n, found = a.x.shape[axis], context.shift.shape[-1]
    if n != found:
        raise _UnfitError(f"the block's modulation has {found} channels")
    shape = (len(a.x), *([1] * (a.x.ndim - 2)), n)
    shift, scale = (m.float().reshape(shape) for m in (context.shift, context.scale))

    def modulate(x: Tensor) -> Tensor:
        return F.layer_norm(x, (n,), eps=LAYER_NORM_EPS) * (1 + scale) + shift

    return _map_channel(a, modulate)


def _l2(a: Axes, arguments: Sequence[str], _: Context) -> Axes:
    _none(arguments)
    return Axes(F.normalize(a.x, dim=_axis(a, "channel")), a.dims)


def _standardise(a: Axes, arguments: Sequence[str], _: Context) -> Axes:
    _none(arguments)
    x = a.x.float()
    axes = list(range(1, x.ndim))
    std, mean = torch.std_mean(x, axes, keepdim=True)
    return Axes((x - mean) / std, a.dims)


def _spatial_norm(a: Axes, arguments: Sequence[str], _: Context) -> Axes:
    gamma = _number(arguments, 1.0)
    axes = [_axis(a, d) for d in a.dims if d in SPACE]
    if not axes:
        raise _UnfitError("it needs space or tokens")
    x = a.x.float()
    std, mean = torch.std_mean(x, axes, keepdim=True)
    return Axes((x - gamma * mean) / (std + 1e-6), a.dims)


Reduction = Callable[[Axes, Sequence[str], Context], Axes]

_REDUCTIONS: Mapping[str, Reduction] = {
    "mean": _over_space(lambda x, axes: x.mean(axes)),
    "max": _over_space(lambda x, axes: x.amax(axes)),
    "avg_pool": _avg_pool,
    "cls": _cls,
    "tokens": _select("token"),
    "channels": _select("channel"),
    "drop_channels": _drop_channels,
    "zero_channels": _zero_channels,
    "heads": _select("head"),
    "head_mean": _over("head", lambda x, axis: x.mean(axis)),
    "head_sum": _over("head", lambda x, axis: x.sum(axis)),
    "frames": _select("frame"),
    "frame_mean": _over("frame", lambda x, axis: x.mean(axis)),
    "project": _project,
    "pca": _pca,
    "layer_norm": _layer_norm,
    "adaln": _adaln,
    "l2": _l2,
    "standardise": _standardise,
    "spatial_norm": _spatial_norm,
}
