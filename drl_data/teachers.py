"""What a student learns from: pixels and stored features of the same images, batch by batch.

The batch of a step is a function of (seed, epoch, step) alone: neither the number of ranks changes
it, nor whether the split is held in memory.

Shapes: b batch, c channel, h height, w width.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from drl_data.datasets import FeatureBatch, FeatureStream
from drl_data.distill_spec import DistillSpec
from drl_data.moments import Moments
from drl_data.pipeline import Pipeline
from drl_data.spec import ArraySpec, ImageSpec
from drl_data.spec_base import canonical_json
from drl_data.splits import finished_store
from drl_data.store import FeatureStore

CACHE_BYTES = 2 << 30
"""Pixels and features of the train split stay in memory, read once, if all ranks together need no
more."""

Batch = tuple[Tensor, dict[str, Tensor]]
"""Pixels, uint8 [b, c, h, w], and the targets [b, *shape] by name, as they are stored."""


@dataclass(frozen=True)
class Target:
    """What one head learns: a tap of a store at a timestep, under a name."""

    name: str
    tap: str
    timestep: float
    array: ArraySpec


@dataclass(frozen=True)
class Statistics:
    """Mean and variance of each target's channels, float64 [c], over the train split."""

    mean: dict[str, Tensor]
    variance: dict[str, Tensor]


class Teachers:
    """The store's features as targets, joined with the pixels of the same rows."""

    def __init__(self, store: FeatureStore, spec: DistillSpec, statistics: Path) -> None:
        """`statistics` is the file that keeps them.

        Raises:
            TapError: the store has no such tap or timestep.
            SpecError: a split without rows.
        """
        self.store, self.spec, self._file = store, spec, statistics
        array = store.array(spec.tap)
        name = f"{spec.tap}@{spec.timestep:g}"
        self.targets = (Target(name, spec.tap, spec.timestep, array),)
        self._whole = self.stream(spec.train)
        self.n_rows = len(self._whole.selection.rows)
        self._held: Batch | None = None

    @classmethod
    def of(cls, pipeline: Pipeline, spec: DistillSpec) -> Teachers:
        """Those of a pipeline; raises `UserError` for a store that is not there or not complete."""
        store = finished_store(pipeline, "distill")
        return cls(store, spec, Path(pipeline.results) / "distill.statistics.safetensors")

    @property
    def images(self) -> ImageSpec:
        """How pixels were made."""
        return self.store.spec.images

    def stream(self, split: str, *, labelled: bool = False) -> FeatureStream:
        """Every row of a split in order: features and pixels."""
        return self._stream(split, labelled=labelled, shuffle=False)

    # --- batches --------------------------------------------------------------------------------

    @property
    def n_batches(self) -> int:
        """Steps of an epoch."""
        return len(self._shuffled(0, 0, 1))

    def batches(
        self, epoch: int, *, rank: int = 0, world_size: int = 1, start: int = 0
    ) -> Iterator[Batch]:
        """This rank's equal part of each batch of an epoch, from step `start` on.

        Rows are shuffled anew for each epoch. All batches are whole (a last one of a single image
        would leave batch norm without a variance), unless the split is smaller than one.

        Raises:
            SpecError: batches that the ranks cannot split evenly.
        """
        stream = self._shuffled(epoch, rank, world_size)
        if self._fits(world_size):
            pixels, targets = self._in_memory()
            plan, chosen = stream.plan(), stream.selection
            for step in range(start, plan.n_batches):
                places = torch.from_numpy(chosen.places(plan.rows_of(step)))
                yield pixels[places], {name: x[places] for name, x in targets.items()}
            return
        stream.load_state_dict(stream.state_dict(start))
        for batch in stream:
            yield self._batch(batch)

    def _shuffled(self, epoch: int, rank: int, world_size: int) -> FeatureStream:
        stream = self._stream(self.spec.train, rank=rank, world_size=world_size)
        stream.set_epoch(epoch)
        return stream

    def _stream(
        self,
        split: str,
        *,
        labelled: bool = False,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> FeatureStream:
        return FeatureStream(
            self.store,
            [target.tap for target in self.targets],
            [target.timestep for target in self.targets],
            batch_size=self.spec.batch_size,
            split=split,
            labelled=labelled,
            shuffle=shuffle,
            seed=self.spec.seeds[0],
            drop_last=shuffle and self.n_rows >= self.spec.batch_size,
            split_batches=True,
            rank=rank,
            world_size=world_size,
            images=(self.store.index, self.images),
        )

    def _batch(self, batch: FeatureBatch) -> Batch:
        assert batch.pixels is not None  # the stream was asked for them
        return batch.pixels, {t.name: batch.features[t.tap][:, 0] for t in self.targets}

    # --- one pass over all rows -----------------------------------------------------------------

    def _fits(self, world_size: int) -> bool:
        row_bytes = self._whole.selection.bytes_per_row
        row_bytes += self.images.n_channels * math.prod(self.images.size)
        return self.n_rows * row_bytes * world_size <= CACHE_BYTES

    def _in_memory(self) -> Batch:
        """All rows of the train split, in order."""
        if self._held is None:
            read = [self._batch(batch) for batch in self._whole]
            pixels = torch.cat([x for x, _ in read])
            self._held = (
                pixels,
                {t.name: torch.cat([found[t.name] for _, found in read]) for t in self.targets},
            )
        return self._held

    @cached_property
    def statistics(self) -> Statistics:
        """Of each target, computed in one pass over the train split unless a file has them.

        The file is written once: let one rank ask first, and the others when it has. One that is of
        another store, split or target is replaced.
        """
        found = _read(self._file, self._key)
        if found is None:
            found = self._computed()
            _write(self._file, self._key, found)
        return found

    @property
    def _key(self) -> str:
        """What the statistics are of."""
        rows = hashlib.sha256(np.ascontiguousarray(self._whole.selection.rows).tobytes())
        return canonical_json(
            {
                "store": self.store.fingerprint,
                "rows": rows.hexdigest(),
                "targets": [target.name for target in self.targets],
            }
        ).decode()

    def _computed(self) -> Statistics:
        moments: dict[str, Moments] = {}
        blocks = [self._in_memory()] if self._fits(1) else map(self._batch, self._whole)
        for _, targets in blocks:
            for target in self.targets:
                x = targets[target.name].movedim(target.array.channel_axis + 1, -1)
                found = Moments.of(x.flatten(0, -2))
                seen = moments.get(target.name)
                moments[target.name] = found if seen is None else seen.merged(found)
        return Statistics(
            {name: found.mean for name, found in moments.items()},
            {name: found.variance for name, found in moments.items()},
        )


def _read(path: Path, key: str) -> Statistics | None:
    """What the file has, if it is there and of the same thing."""
    if not path.exists():
        return None
    with safetensors.safe_open(path, "pt") as file:
        if (file.metadata() or {}).get("of") != key:
            return None
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    of: dict[str, dict[str, Tensor]] = {part: {} for part in ("mean", "variance")}
    for name, value in tensors.items():
        part, _, target = name.partition(":")
        of[part][target] = value
    return Statistics(of["mean"], of["variance"])


def _write(path: Path, key: str, found: Statistics) -> None:
    """Whole or not at all, whoever reads at the same time."""
    parts = {"mean": found.mean, "variance": found.variance}
    tensors = {
        f"{part}:{target}": value.contiguous()
        for part, values in parts.items()
        for target, value in values.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    safetensors.torch.save_file(tensors, beside, metadata={"of": key})
    beside.replace(path)
