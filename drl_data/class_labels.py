"""The classes of a class-conditional training: how many, of which rows, and the null class.

Shape suffixes: b batch, n images of the training set.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
import torch
from diffusers import UNet2DModel
from torch import Tensor

from drl_data.backbones.unet import NULL_CLASS
from drl_data.errors import SpecError
from drl_data.index import SampleIndex
from drl_data.pipeline import ClassesSpec


@dataclass(frozen=True)
class Classes:
    """Classes 0 .. number-1; `dropout` is the share of images that are told `null` instead."""

    number: int
    dropout: float
    names: tuple[str, ...] | None

    @property
    def null(self) -> int | None:
        """The null class, the last one of the network's embeddings; None without dropout."""
        return self.number if self.dropout else None

    @property
    def n_embeddings(self) -> int:
        """Classes of the network: those of the labels, and the null class."""
        return self.number + (self.null is not None)

    def mark(self, model: UNet2DModel) -> None:
        """Write the null class into the configuration that is saved with the weights."""
        if self.null is not None:
            model.register_to_config(**{NULL_CLASS: self.null})

    def dropped(self, labels_b: Tensor, generator: torch.Generator) -> Tensor:
        """The labels int64 [b] with their share replaced by the null class (Ho and Salimans 2022,
        algorithm 1)."""
        if self.null is None:
            return labels_b
        lost_b = torch.rand(labels_b.shape, generator=generator) < self.dropout
        return torch.where(lost_b, self.null, labels_b)


def classes_of(spec: ClassesSpec | None, index: SampleIndex) -> Classes | None:
    """The classes that a training has over a dataset; None if it is not told any.

    Raises:
        SpecError: if no sample has a label, or a label is not one of the classes.
    """
    if spec is None:
        return None
    labels = pc.min_max(index.table.column("label")).as_py()
    if labels["max"] is None:
        raise SpecError(
            "pretrain.classes: no sample of the dataset has a label; dataset.label says which "
            "extension it is read from"
        )
    names = index.label_names
    number = spec.number or (labels["max"] + 1 if names is None else len(names))
    if labels["min"] < 0 or labels["max"] >= number:
        raise SpecError(
            f"pretrain.classes: labels are {labels['min']}..{labels['max']}, want 0..{number - 1}; "
            "set pretrain.classes.number to the largest label + 1"
        )
    return Classes(number, spec.dropout, names)


def labels_of(index: SampleIndex, start: int, stop: int) -> np.ndarray:
    """Labels int64 of rows `start` to `stop` (exclusive); -1 where there is none."""
    column = index.slice(start, stop).column("label")
    filled: np.ndarray = pc.fill_null(column, -1).to_numpy()
    return filled
