"""Mean and variance of targets over the train split, and the file that keeps them.

Shapes: b batch, t timestep, c channel.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from drl_data.moments import Moments
from drl_data.spec import ArraySpec
from drl_data.spec_base import canonical_json


@dataclass(frozen=True)
class Statistics:
    """Mean and variance of the channels of each target, float64 [t, c], over all places."""

    mean: dict[str, Tensor]
    variance: dict[str, Tensor]


def computed(
    blocks: Iterable[Mapping[str, Tensor]], arrays: Mapping[str, ArraySpec], several: set[str]
) -> Statistics:
    """Of targets [b, *shape] that come in blocks; [b, t, *shape] of those in `several`."""
    moments: dict[str, list[Moments]] = {}
    for block in blocks:
        for name, array in arrays.items():
            x = block[name] if name in several else block[name][:, None]
            x = x.movedim(array.channel_axis + 2, -1)
            found = [Moments.of(x[:, t].flatten(0, -2)) for t in range(x.shape[1])]
            seen = moments.get(name)
            moments[name] = (
                found if seen is None else [a.merged(b) for a, b in zip(seen, found, strict=True)]
            )
    return Statistics(
        {name: torch.stack([m.mean for m in of_times]) for name, of_times in moments.items()},
        {name: torch.stack([m.variance for m in of_times]) for name, of_times in moments.items()},
    )


def read_statistics(path: Path, of: Mapping[str, object]) -> Statistics | None:
    """What a file has, if it is there and of these stores, rows and targets."""
    if not path.exists():
        return None
    with safetensors.safe_open(path, "pt") as file:
        if (file.metadata() or {}).get("of") != _key(of):
            return None
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in ("mean", "variance")}
    for name, value in tensors.items():
        part, _, target = name.partition(":")
        parts[part][target] = value
    return Statistics(parts["mean"], parts["variance"])


def write_statistics(path: Path, of: Mapping[str, object], found: Statistics) -> None:
    """Whole or not at all, whoever reads at the same time."""
    parts = {"mean": found.mean, "variance": found.variance}
    tensors = {
        f"{part}:{target}": value.contiguous()
        for part, values in parts.items()
        for target, value in values.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    safetensors.torch.save_file(tensors, beside, metadata={"of": _key(of)})
    beside.replace(path)


def _key(of: Mapping[str, object]) -> str:
    plain = {
        name: hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        if isinstance(value, np.ndarray)
        else value
        for name, value in of.items()
    }
    return canonical_json(plain).decode()  # type: ignore[arg-type]
