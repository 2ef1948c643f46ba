"""What loaders give: a sample, a batch, and stored values as tensors.

Shapes: b rows of a batch, v views, t timesteps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from drl_data.augment import Moves
from drl_data.quantise import from_storage
from drl_data.shards import Array
from drl_data.spec import ArraySpec
from drl_data.store import FeatureStore


class FeatureSample(NamedTuple):
    """One row: features {tap: [t, *shape]} (or [v, t, *shape]), its label, key and row number.

    `timestep` is float64 [t] and `view` int64 [v] by tap, as in `FeatureBatch`. `pixels` is uint8
    [c, h, w], of size 0 if no images were asked for, so that samples collate.
    """

    features: dict[str, torch.Tensor]
    label: int
    key: str
    row: int
    timestep: dict[str, torch.Tensor]
    view: dict[str, torch.Tensor]
    pixels: torch.Tensor


class Keys:
    """Keys of a batch: a list of strings for most purposes, made of them when they are looked at.

    No `Sequence` on purpose: torch's DataLoader and its pinning walk through those string by
    string, which took longer than reading pooled features.
    """

    def __init__(self, names: pa.Array) -> None:
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, i: int) -> str:
        if not -len(self) <= i < len(self):
            raise IndexError(f"key {i} of {len(self)}")
        return str(self._names[i].as_py())

    def __iter__(self) -> Iterator[str]:
        return iter(self.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Keys | list) and self.tolist() == list(other)

    __hash__ = None  # type: ignore[assignment]  # as a list's

    def __repr__(self) -> str:
        return f"Keys({self.tolist()})"

    def tolist(self) -> list[str]:
        """The keys as a list."""
        return [str(name) for name in self._names.to_pylist()]


class FeatureBatch(NamedTuple):
    """Rows together: features {tap: [b, t, *shape]} as stored, label and row int64 [b], b keys.

    With a list of views features are [b, v, t, *shape]. A label of -1 means that there is none.
    """

    features: dict[str, torch.Tensor]
    label: torch.Tensor
    key: Keys
    row: torch.Tensor
    """In its store; in the first one where stores are joined."""
    pixels: torch.Tensor | None
    """uint8 [b, c, h, w] if images were asked for; of a list of views, [b, v, c, h, w]."""
    timestep: dict[str, torch.Tensor]
    """{tap: float64 [b, t]}: the timesteps of each row, as they were requested when extracting."""
    view: dict[str, torch.Tensor]
    """{tap: int64 [b, v]}: positions in the store's `images.views`, 0 where it has none."""
    repeated: torch.Tensor
    """bool [b]: rows that came before in this epoch, to pad a rank (`pad=True`)."""
    bucket: int
    """Which of the stream's stores this batch is of."""
    moves: Moves | None
    """What augmentation did to each row."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> FeatureBatch:
        """The same batch with features, labels and pixels on a device."""

        def move(x: torch.Tensor) -> torch.Tensor:
            return x.to(device, non_blocking=non_blocking)

        return self._replace(
            features={tap: move(x) for tap, x in self.features.items()},
            label=move(self.label),
            pixels=None if self.pixels is None else move(self.pixels),
            timestep={tap: move(x) for tap, x in self.timestep.items()},
        )


def as_tensor(stored: Mapping[str, Array], array: ArraySpec) -> torch.Tensor:
    """Features [..., *shape] from what the store holds of an array and of its scales.

    The same memory as a tensor of the true type where nothing is quantised (bfloat16 comes as
    uint16, 8-bit floating point as uint8), else float32.
    """
    return from_storage({name: _tensor(values) for name, values in stored.items()}, array)


def read_features(
    store: FeatureStore, tap: str, time_index: int, rows: npt.ArrayLike, view: int = 0
) -> torch.Tensor:
    """Features [b, *shape] of any rows of one tap, timestep and view, as `as_tensor` gives them."""
    stored = {name: store.read_rows(name, time_index, rows, view) for name in store.parts(tap)}
    return as_tensor(stored, store.array(tap))


def _tensor(values: Array) -> torch.Tensor:
    # torch has few operations on uint16, and makes none of it from NumPy in older versions.
    return torch.from_numpy(values.view(np.int16) if values.dtype == np.uint16 else values)
