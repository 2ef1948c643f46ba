"""What a student learns from: pixels and stored features of the same images, batch by batch.

The batch of a step is a function of (seed, epoch, step) alone, and so is everything that is drawn
for it: neither the number of ranks changes it, nor whether the split is held in memory.

Shapes: b batch, n rows, t timestep, k teacher, c channel, h height, w width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from drl_data.datasets import FeatureBatch, FeatureStream, join
from drl_data.distill_spec import OWN, DistillSpec, TargetSpec
from drl_data.draws import uniform
from drl_data.errors import SpecError
from drl_data.pipeline import Pipeline
from drl_data.row_pixels import RowPixels, row_pixels
from drl_data.selection import Draw, Rows, Selection
from drl_data.spec import ArraySpec, ImageSpec
from drl_data.splits import finished_store, open_finished
from drl_data.store import FeatureStore
from drl_data.teacher_statistics import Statistics, computed, read_statistics, write_statistics

CACHE_BYTES = 2 << 30
"""Pixels and features of the train split stay in memory, read once, if all ranks together need no
more."""

LABEL = "label"
"""Among the targets of a batch: positions of the labels among the classes, -1 for none, int64 [b];
only if stage 1 learns from labels."""
POLICY_DRAW = "policy"
"""Numbers of [0, 1) that the policy's choice is drawn by, [b]; only if there is a policy."""
TEACHER_DRAW = "drop"
"""Numbers of [0, 1) by which teachers are left out, [b, k]; only if some are."""

Batch = tuple[Tensor, dict[str, Tensor]]
"""Pixels, uint8 [b, c, h, w], and targets by name."""


def time_key(name: str) -> str:
    """Among the targets of a batch: which of a target's timesteps were drawn, int64 [b]."""
    return f"{name} timestep"


@dataclass(frozen=True)
class Target:
    """What one head learns: a tap of a teacher's store at one timestep or several.

    In a batch it is [b, *shape] as stored, or [b, t, *shape] for the policy to choose from.
    """

    name: str
    spec: TargetSpec
    alias: str
    """Of its store in the join: each target has one, so that it reads its own timesteps."""
    timesteps: tuple[float, ...]
    array: ArraySpec

    @property
    def tap(self) -> str:
        """What it is called in a batch of the stream."""
        return f"{self.alias}/{self.spec.tap}"


class Teachers:
    """Stores' features as targets, joined with the pixels of the same rows."""

    def __init__(
        self,
        store: FeatureStore,
        spec: DistillSpec,
        statistics: Path,
        others: Mapping[str, FeatureStore] | None = None,
    ) -> None:
        """`others` are the stores of `spec.teachers`; `statistics` is the file that keeps them.

        Raises:
            TapError: a store has no such tap or timestep.
            InputError: a teacher's store lacks samples, or is of other images.
            SpecError: a split without rows, or the same target twice.
        """
        self.store, self.spec, self._file = store, spec, statistics
        self.others = dict(others or {})
        stores = {OWN: store, **self.others}
        self.targets = _targets(spec, stores)
        self._source = join({OWN: store} | {t.alias: stores[t.spec.teacher] for t in self.targets})
        self.n_rows = spec.batch_size  # until the rows are selected
        self._whole = self._stream(shuffle=False, drawn=False)
        self.n_rows = len(self._whole.selection.rows)
        self._held: Batch | None = None

    @classmethod
    def of(cls, pipeline: Pipeline, spec: DistillSpec) -> Teachers:
        """Those of a pipeline; raises `UserError` for a store that is not there or not complete."""
        store = finished_store(pipeline, "distill")
        others = {name: open_finished(url, "distill") for name, url in spec.teachers.items()}
        return cls(store, spec, Path(pipeline.results) / "distill.statistics.safetensors", others)

    @property
    def images(self) -> ImageSpec:
        """How pixels were made."""
        return self.store.image_spec

    @property
    def selection(self) -> Selection:
        """Rows of the train split that all teachers have."""
        return self._whole.selection

    @cached_property
    def classes(self) -> Rows:
        """Labels of the train split, increasing."""
        found: Rows = np.unique(self.selection.labels[self.selection.labels >= 0])
        return found

    def pixels(self, rows: Rows) -> Tensor:
        """uint8 [n, c, h, w] of rows of the pipeline's store, which increase; the first view's."""
        found = torch.from_numpy(self._row_pixels.read(rows))
        return found[:, 0] if self.images.views else found

    @cached_property
    def _row_pixels(self) -> RowPixels:
        images = (self.store.index, self.images)
        reader = row_pixels(images, self.selection, include_invalid=False, n_threads=4)
        assert reader is not None  # images were asked for
        return reader

    # --- batches --------------------------------------------------------------------------------

    @cached_property
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
            plan = stream.plan()
            for step in range(start, plan.n_batches):
                rows = plan.rows_of(step)
                places = torch.from_numpy(self.selection.places(rows))
                chosen = {name: x[places] for name, x in targets.items()}
                self._draw_timesteps(chosen, rows, stream)
                yield pixels[places], chosen | self._extras(rows, epoch)
            return
        stream.load_state_dict(stream.state_dict(start))
        for batch in stream:
            found, targets = self._batch(batch)
            for target in self.targets:
                if target.spec.choose == "uniform":
                    times = batch.timestep[target.tap][:, 0].tolist()
                    position = [target.timesteps.index(time) for time in times]
                    targets[time_key(target.name)] = torch.tensor(position)
            yield found, targets | self._extras(batch.row.numpy(), epoch)

    def _draw_timesteps(self, chosen: dict[str, Tensor], rows: Rows, stream: FeatureStream) -> None:
        """Of all timesteps that are held, those that the stream would have drawn."""
        axes = {choice.name: choice.times for choice in stream.selection.choices}
        for target in self.targets:
            if target.spec.choose != "uniform":
                continue
            axis = axes[target.alias]
            drawn = axis.of_rows(rows, stream.dealing.seed, stream.epoch, "timestep")[:, 0]
            position = np.array([axis.positions.index(i) for i in drawn.tolist()])
            chosen[time_key(target.name)] = torch.from_numpy(position)
            chosen[target.name] = chosen[target.name][torch.arange(len(rows)), position]

    def _extras(self, rows: Rows, epoch: int) -> dict[str, Tensor]:
        """What else a step needs of its rows."""
        seed, found = self.spec.seeds[0], {}
        if any(target.spec.choose == "policy" for target in self.targets):
            found[POLICY_DRAW] = torch.from_numpy(uniform(seed, epoch, rows, "policy"))
        if self.spec.drop_teachers:
            k = len({target.spec.teacher for target in self.targets})
            numbers = rows[:, None] * k + np.arange(k)
            drawn = uniform(seed, epoch, numbers.ravel(), "drop")
            found[TEACHER_DRAW] = torch.from_numpy(drawn.reshape(-1, k))
        if self.spec.asks_labels:
            labels = self.selection.labels[self.selection.places(rows)]
            found[LABEL] = torch.from_numpy(positions_of(labels, self.classes))
        return found

    def _shuffled(self, epoch: int, rank: int, world_size: int) -> FeatureStream:
        stream = self._stream(shuffle=True, drawn=True, rank=rank, world_size=world_size)
        stream.set_epoch(epoch)
        return stream

    def _stream(
        self, *, shuffle: bool, drawn: bool, rank: int = 0, world_size: int = 1
    ) -> FeatureStream:
        """Rows of the train split; `drawn` reads of a random timestep only that one."""
        timesteps = {
            t.alias: Draw(t.timesteps) if drawn and t.spec.choose == "uniform" else t.timesteps
            for t in self.targets
        }
        return FeatureStream(
            self._source,
            [target.tap for target in self.targets],
            timesteps,
            batch_size=self.spec.batch_size,
            split=self.spec.train,
            shuffle=shuffle,
            seed=self.spec.seeds[0],
            drop_last=shuffle and self.n_rows >= self.spec.batch_size,
            split_batches=True,
            rank=rank,
            world_size=world_size,
            images=(self.store.index, self.images),
        )

    def _batch(self, batch: FeatureBatch) -> Batch:
        """Pixels and targets: [b, *shape], or [b, t, *shape] of several timesteps."""
        assert batch.pixels is not None  # the stream was asked for them
        features = {t.name: batch.features[t.tap] for t in self.targets}
        return batch.pixels, {n: x[:, 0] if x.shape[1] == 1 else x for n, x in features.items()}

    # --- all rows -------------------------------------------------------------------------------

    def _fits(self, world_size: int) -> bool:
        row_bytes = self.selection.bytes_per_row
        row_bytes += self.images.n_channels * math.prod(self.images.size)
        return self.n_rows * row_bytes * world_size <= CACHE_BYTES

    def _in_memory(self) -> Batch:
        """All rows of the train split, in order, at all timesteps."""
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
        other stores, rows or targets is replaced.
        """
        of = {
            "stores": [store.fingerprint for store in self._source.stores.values()],
            "rows": self.selection.rows,
            "targets": [target.name for target in self.targets],
        }
        found = read_statistics(self._file, of)
        if found is None:
            blocks = [self._in_memory()] if self._fits(1) else map(self._batch, self._whole)
            arrays = {target.name: target.array for target in self.targets}
            several = {t.name for t in self.targets if len(t.timesteps) > 1}
            found = computed((targets for _, targets in blocks), arrays, several)
            write_statistics(self._file, of, found)
        return found


def positions_of(labels: Rows, classes: Rows) -> Rows:
    """Positions of labels in `classes`, which increase; -1 for a label that is not there."""
    position = np.searchsorted(classes, labels).clip(max=len(classes) - 1)
    found: Rows = np.where(classes[position] == labels, position, -1)
    return found


def _targets(spec: DistillSpec, stores: Mapping[str, FeatureStore]) -> tuple[Target, ...]:
    found: list[Target] = []
    for number, cell in enumerate(spec.cells):
        store = stores[cell.teacher]
        array = store.array(cell.tap)
        timesteps = _timesteps(store, array, cell)
        name = cell.tap if cell.teacher == OWN else f"{cell.teacher}/{cell.tap}"
        if array.timesteps == "each":
            name += "@" + ",".join(f"{time:g}" for time in timesteps)
        if cell.stage is not None:
            name += f" -> {cell.stage}"
        found.append(Target(name, cell, f"target{number}", timesteps, array))
    names = [target.name for target in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SpecError(f"distill.targets: {', '.join(twice)} twice; give its losses as a mapping")
    choices = {t.timesteps for t in found if t.spec.choose == "policy"}
    if len(choices) > 1:
        raise SpecError(
            "distill.targets: the policy chooses one timestep for all of its targets, but they "
            f"have {' and '.join(str(list(times)) for times in sorted(choices))}; want the same"
        )
    return tuple(found)


def _timesteps(store: FeatureStore, array: ArraySpec, cell: TargetSpec) -> tuple[float, ...]:
    """The timesteps of a target, checked."""
    requested = tuple(time.requested for time in store.times)
    if array.timesteps != "each":
        if cell.choose != "fixed":
            raise SpecError(
                f"distill: {cell.tap!r} has one entry for all timesteps; want choose: fixed"
            )
        return requested[:1]
    for time in cell.timestep:
        store.time_index(time)
    times = tuple(float(time) for time in cell.timestep) or requested
    if cell.choose == "fixed" and len(times) > 1:
        shown = ", ".join(f"{time:g}" for time in times)
        raise SpecError(f"distill.timestep: missing; {cell.tap!r} has {shown}")
    if cell.choose != "fixed" and len(times) < 2:
        raise SpecError(f"distill: choose: {cell.choose}, but {store.url} has one timestep")
    return times
