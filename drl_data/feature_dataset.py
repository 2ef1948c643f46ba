"""FeatureDataset: features by position, in any order, by any sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import overload

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import torch
from torch.utils.data import Dataset

from drl_data.augment import Augment
from drl_data.errors import SpecError
from drl_data.feature_batch import FeatureBatch, FeatureSample
from drl_data.forks import ForkGuard
from drl_data.joins import Source
from drl_data.row_blocks import RowReader
from drl_data.row_pixels import Images, row_pixels
from drl_data.selection import Timesteps, Views, select


class FeatureDataset(Dataset[FeatureSample]):
    """Random access to rows; item i is the i-th selected row, `dataset[[4, 2]]` a ready batch.

    Batches by coalesced reads, without samples to collate, are made by

        DataLoader(dataset, sampler=BatchSampler(RandomSampler(dataset), 256, False),
                   batch_size=None)

    A DataLoader that collates fetches whole batches too, through `__getitems__`. What is read is
    said as for `select`; `images`, `augment` and `seed` as for `FeatureStream`. Draws and
    augmentations change with `set_epoch`, which persistent workers see. Forked workers need stores
    on a local disk: on others they raise `ForkError`, 'spawn' and 'forkserver' work.
    """

    def __init__(
        self,
        store: Source,
        taps: Sequence[str] | None = None,
        timesteps: Timesteps | Mapping[str, Timesteps] = None,
        *,
        split: str | None = None,
        labelled: bool = False,
        where: pc.Expression | None = None,
        include_invalid: bool = False,
        partial: bool = False,
        view: Views | Mapping[str, Views] = None,
        images: Images = None,
        decode_threads: int = 4,
        augment: Augment | None = None,
        seed: int = 0,
    ) -> None:
        self.store = store
        self.selection = select(
            store,
            taps,
            timesteps,
            split=split,
            labelled=labelled,
            where=where,
            include_invalid=include_invalid,
            partial=partial,
            view=view,
        )
        if seed < 0:
            raise SpecError(f"FeatureDataset: seed={seed}; want at least 0")
        pixels = row_pixels(
            images, self.selection, include_invalid=include_invalid, n_threads=decode_threads
        )
        self._reader = RowReader(self.selection, seed=seed, pixels=pixels, augment=augment)
        stores = self.selection.source.stores.values()
        self._guard = ForkGuard.of(member.folder for member in stores)
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self.selection.rows)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, on which draws and augmentations depend."""
        if epoch < 0:
            raise SpecError(f"FeatureDataset: epoch {epoch}; want at least 0")
        self._epoch[0] = epoch

    @overload
    def __getitem__(self, item: int) -> FeatureSample: ...

    @overload
    def __getitem__(self, item: Sequence[int]) -> FeatureBatch: ...

    def __getitem__(self, item: int | Sequence[int]) -> FeatureSample | FeatureBatch:
        """One sample, or a batch of several."""
        if not isinstance(item, int | np.integer):
            return self.read(item)
        return self.__getitems__([item])[0]

    def __getitems__(self, items: Sequence[int]) -> list[FeatureSample]:
        """The samples at several positions, read together."""
        batch = self.read(items)
        nothing = torch.empty(0, dtype=torch.uint8)
        return [
            FeatureSample(
                features={tap: values[i] for tap, values in batch.features.items()},
                label=int(batch.label[i]),
                key=batch.key[i],
                row=int(batch.row[i]),
                timestep={tap: values[i] for tap, values in batch.timestep.items()},
                view={tap: values[i] for tap, values in batch.view.items()},
                pixels=nothing if batch.pixels is None else batch.pixels[i],
            )
            for i in range(len(items))
        ]

    def read(self, items: Sequence[int] | npt.NDArray[np.int64]) -> FeatureBatch:
        """The samples at several positions as one batch, without a collate step.

        Raises:
            IndexError: a position that there is none of.
            ForkError: a forked process and a store that is not on a local disk.
        """
        self._guard.check()
        places = np.asarray(items, np.int64)
        bad = (places < -len(self)) | (places >= len(self))
        if bad.any():  # also ends Python's own iteration
            raise IndexError(f"item {int(places[bad][0])} of {len(self)}")
        return self._reader.read(places % max(len(self), 1), int(self._epoch[0]))
