"""Losses of a diffusion classifier with staged pruning, unit by unit, outside a store.

    job.json, index.parquet      what is scored, with what (unit_jobs.py)
    losses/00000000.parquet      of a unit: row, candidate, stage (the last one that it was in,
                                 from 1), losses (float32, timestep by timestep in the order of
                                 the file's metadata, the members of each together)
    receipts/00000000.json

A unit counts images of one split from 0; the column `row` counts those of the index.
"""

from __future__ import annotations

import itertools
import json
import queue
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import JsonValue

from drl_data.backbones import Conditioning
from drl_data.computers import load_computer
from drl_data.device_memory import MicroBatches, faults_named
from drl_data.diffusion_spec import ConditionSpec
from drl_data.errors import FeatureError, ImageError, StoreMismatchError
from drl_data.extract import peak_bytes, run_identity, tar_records
from drl_data.features import FeatureComputer
from drl_data.images import ImageBatch, read_batches
from drl_data.index import SampleIndex, TarInfo
from drl_data.metering import Clock, take
from drl_data.objects import Buffer
from drl_data.pair_losses import PairLosses, told_to_candidates
from drl_data.pipeline import RunSpec
from drl_data.plan import InvalidRow, Lease, Unit
from drl_data.receipts import Receipt, UnitCounts
from drl_data.spec import ArraySpec, BackboneSpec, FeatureSpec, ResolvedTime
from drl_data.spec_base import Spec
from drl_data.stages import Floats, Stage, StagedLosses, evaluate, order_of
from drl_data.stopping import Stop
from drl_data.store_metadata import Described
from drl_data.unit_jobs import UnitJob

INDEX = "index.parquet"


class StageRecord(Spec):
    """A stage as a job holds it."""

    places: tuple[int, ...]
    keep: int | None
    p_value: float | None


class ScoreContent(Spec):
    """What `job.json` says: everything that changes a loss."""

    features: FeatureSpec
    arrays: tuple[ArraySpec, ...]
    times: tuple[ResolvedTime, ...]
    tap: str
    stages: tuple[StageRecord, ...]
    weights: tuple[float, ...]
    """Of the timesteps, by their places; they decide who is dropped."""
    first_row: int
    """Row of the index that is the job's row 0."""

    def to_json(self) -> dict[str, JsonValue]:
        """As `JobSpec.content`."""
        return self.model_dump(mode="json")

    @property
    def described(self) -> Described:
        """As a store would be."""
        return Described(self.features, self.arrays, self.times)

    @property
    def plan(self) -> tuple[Stage, ...]:
        """The stages."""
        return tuple(Stage(stage.places, stage.keep, stage.p_value) for stage in self.stages)


def content_of(job: UnitJob) -> ScoreContent:
    """What a folder's job says.

    Raises:
        StoreMismatchError: it is of another verb.
    """
    if job.spec.kind != "score":
        raise StoreMismatchError(f"{job.folder.url}: holds a job of `drl {job.spec.kind}`")
    return ScoreContent.model_validate(job.spec.content)


def losses_path(unit: Unit) -> str:
    """Path of a unit's losses."""
    return f"losses/{unit.id:08d}.parquet"


# --- the table of a unit ------------------------------------------------------------------------


class LossTable:
    """Losses of a unit's images as they are computed; a line for each image and candidate."""

    def __init__(self) -> None:
        self._rows: list[npt.NDArray[np.int64]] = []
        self._candidates: list[npt.NDArray[np.int64]] = []
        self._stages: list[npt.NDArray[np.int16]] = []
        self._lengths: list[npt.NDArray[np.int64]] = []
        self._losses: list[npt.NDArray[np.float32]] = []

    def add(self, rows: npt.NDArray[np.int64], found: StagedLosses) -> None:
        """Add a batch, whose images have these rows of the index."""
        images, candidates = np.nonzero(found.stage_bc)
        stage = found.stage_bc[images, candidates]
        ends = np.cumsum([0, *(len(s.places) for s in found.stages)])
        n_members = found.losses_bckm.shape[3]
        lengths = ends[stage] * n_members
        n_seen = int(ends[-1]) * n_members
        flat = found.losses_bckm[images, candidates].reshape(len(images), n_seen)
        self._rows.append(rows[images])
        self._candidates.append(candidates)
        self._stages.append(stage)
        self._lengths.append(lengths)
        self._losses.append(flat[np.arange(n_seen) < lengths[:, None]])

    def to_parquet(self, stages: Sequence[Stage], times: Sequence[ResolvedTime]) -> Buffer:
        """The file's bytes; `timesteps` in its metadata are those of the losses, in order."""
        lengths = np.concatenate([[0], *self._lengths])
        losses = np.concatenate([np.empty(0, np.float32), *self._losses])
        table = pa.table(
            {
                "row": np.concatenate([np.empty(0, np.int64), *self._rows]),
                "candidate": np.concatenate([np.empty(0, np.int64), *self._candidates]).astype(
                    np.int32
                ),
                "stage": np.concatenate([np.empty(0, np.int16), *self._stages]),
                "losses": pa.LargeListArray.from_arrays(np.cumsum(lengths), losses),
            }
        )
        order = [times[place].requested for place in order_of(stages)]
        table = table.replace_schema_metadata({b"timesteps": json.dumps(order).encode()})
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, compression="zstd")
        return memoryview(buffer.getvalue())


def rows_in(data: Buffer, first_row: int) -> list[int]:
    """The job's rows that a unit's file has."""
    rows = pq.read_table(pa.BufferReader(data), columns=["row"])["row"].to_numpy()
    found: list[int] = (np.unique(rows) - first_row).tolist()
    return found


def read_losses(
    data: Buffer, stages: Sequence[Stage], n_candidates: int, n_members: int, max_bytes: int
) -> Iterator[tuple[npt.NDArray[np.int64], StagedLosses]]:
    """(rows of the index, their losses) of a unit's file, some images at a time."""
    table = pq.read_table(pa.BufferReader(data))
    lines = table["row"].to_numpy()
    candidates, stage = table["candidate"].to_numpy(), table["stage"].to_numpy()
    lists = table["losses"].combine_chunks()
    offsets, values = lists.offsets.to_numpy(), lists.values.to_numpy()
    shape = (n_candidates, len(order_of(stages)), n_members)
    at_once = max(max_bytes // (4 * int(np.prod(shape))), 1)
    rows = np.unique(lines)
    for start in range(0, len(rows), at_once):
        part = rows[start : start + at_once]
        inside = np.flatnonzero((lines >= part[0]) & (lines <= part[-1]))
        images = np.searchsorted(part, lines[inside])
        losses = np.full((len(part), n_candidates, shape[1] * n_members), np.nan, np.float32)
        lengths = np.diff(offsets)[inside]
        filled = np.arange(losses.shape[2]) < lengths[:, None]
        begin, end = (offsets[inside[0]], offsets[inside[-1] + 1]) if len(inside) else (0, 0)
        spread = np.full(filled.shape, np.nan, np.float32)
        spread[filled] = values[begin:end]
        losses[images, candidates[inside]] = spread
        stage_bc = np.zeros((len(part), n_candidates), np.int16)
        stage_bc[images, candidates[inside]] = stage[inside]
        yield part, StagedLosses(losses.reshape(len(part), *shape), stage_bc, tuple(stages))


# --- the task -----------------------------------------------------------------------------------


@dataclass
class _Computed:
    """What computing a unit, or a part of it, leaves."""

    table: LossTable
    invalid: list[InvalidRow]
    n_bytes: int = 0


class ScoreTask:
    """Computes losses of units; safe to call from several threads, as `ExtractTask` is."""

    def __init__(
        self,
        job: UnitJob,
        index: SampleIndex,
        computers: Sequence[FeatureComputer],
        told: Conditioning,
        run: RunSpec,
        micro_batches: MicroBatches,
    ) -> None:
        """`told` is what `told_to_candidates` makes of the computers' candidates."""
        self._job, self._content = job, content_of(job)
        self._index, self._told, self._run = index, told, run
        self._micro_batches = micro_batches
        self._device = computers[0].backbone.device
        self._computers: queue.SimpleQueue[FeatureComputer] = queue.SimpleQueue()
        for computer in computers:
            self._computers.put(computer)
        self._identity = run_identity(self._device)
        self._weights: Floats = np.array(self._content.weights)
        self._tap = next(tap for tap in computers[0].taps if tap.name == self._content.tap)

    def __call__(self, lease: Lease, stop: Stop | None = None) -> Receipt | None:
        """Compute, put and sign one unit; None if the lease only probes some rows.

        Raises:
            as `ExtractTask` does; ConflictError as `UnitJob.commit` does.
        """
        unit, stop = lease.unit, stop or Stop()
        stop.check_begin()
        if lease.probe is None:
            signed = self._job.receipt(unit)
            if signed is not None:
                return signed
        clock = Clock(self._device)
        computed = self._compute(lease, clock, stop)
        if lease.probe is not None:
            return None
        product = computed.table.to_parquet(self._content.plan, self._content.times)
        shifted = self._shifted(unit)
        run = self._identity.model_copy(
            update={
                "seconds": clock.seconds(),
                "peak_bytes": peak_bytes(self._device),
                "attempt": lease.attempt,
                "tars": tar_records(self._index, shifted),
                "retries": clock.retries.value,
                "micro_batch": self._micro_batches.size,
            }
        )
        counts = UnitCounts(
            samples=self._index.digest_rows(shifted.start, shifted.stop),
            input_bytes=computed.n_bytes,
        )
        first = self._content.first_row
        return self._job.commit(
            unit,
            losses_path(unit),
            [product],
            computed.invalid,
            run,
            lambda data: rows_in(data, first),
            counts,
        )

    def _shifted(self, unit: Unit) -> Unit:
        """The unit in rows of the index."""
        first = self._content.first_row
        return Unit(unit.id, unit.start + first, unit.stop + first)

    def _compute(self, lease: Lease, clock: Clock, stop: Stop) -> _Computed:
        unit, first = self._shifted(lease.unit), self._content.first_row
        rows = np.arange(unit.start, unit.stop)
        if lease.probe is not None:
            asked = (rows >= lease.probe[0] + first) & (rows < lease.probe[1] + first)
        else:
            asked = np.ones(unit.n_rows, np.bool_)
        spec = self._content.features
        batches = read_batches(
            unit,
            self._index,
            spec.images,
            batch_size=spec.batch_size,
            n_threads=self._run.decode_threads,
            prefetch_bytes=max(self._run.memory_bytes // 32, 1),
            retries=clock.retries,
            rows=asked,
            skip={row + first: ImageError("worker", reason) for row, reason in lease.poison},
        )
        found = _Computed(LossTable(), [])
        doing = f"{self._job.folder.url}, unit {unit.id}"
        with closing(batches), faults_named(self._device, doing):
            ahead = list(itertools.islice(batches, 1))  # reads while others compute
            computer = take(self._computers, stop.check_begin)
            try:
                for batch in clock.waiting(itertools.chain(ahead, batches)):
                    stop.check()
                    inside = asked[batch.start - unit.start :][: batch.n_rows]
                    self._take(batch, inside, computer, found, clock, stop)
            finally:
                self._computers.put(computer)
        clock.synchronize()
        return found

    def _take(
        self,
        batch: ImageBatch,
        inside: npt.NDArray[np.bool_],
        computer: FeatureComputer,
        found: _Computed,
        clock: Clock,
        stop: Stop,
    ) -> None:
        """Score the images of a batch that are asked for and decode."""
        clock.add("read", batch.read_s)
        clock.add("decode", batch.decode_s)
        found.n_bytes += batch.n_bytes
        asked_b = np.zeros(len(batch.pixels), np.bool_)
        asked_b[: batch.n_rows] = inside
        asked_b[[row.row - batch.start for row in batch.invalid]] = False
        first = self._content.first_row
        found.invalid.extend(_moved(row, -first) for row in batch.invalid)
        if not asked_b.any():
            return
        keys = [*batch.keys, *[""] * (len(batch.pixels) - batch.n_rows)]
        pairs = PairLosses(
            computer,
            self._told,
            self._tap,
            batch.pixels,
            keys,
            micro_batches=self._micro_batches,
            clock=clock,
            ask=stop.check,
        )
        spec = self._content.features
        staged = evaluate(
            pairs,
            asked_b,
            len(spec.condition.candidates),
            spec.noise.members,
            self._content.plan,
            self._weights,
        )
        bad = self._not_finite(batch, staged)
        found.invalid.extend(_moved(row, -first) for row in bad)
        staged.stage_bc[[row.row - batch.start for row in bad]] = 0
        found.table.add(batch.start + np.arange(len(asked_b)), staged)

    def _not_finite(self, batch: ImageBatch, staged: StagedLosses) -> list[InvalidRow]:
        """Rows with a loss that is not finite, which `non_finite: invalid` lists.

        Raises:
            FeatureError: there are some, and the spec says that this is an error.
        """
        ends = np.cumsum([0, *(len(s.places) for s in staged.stages)])[staged.stage_bc]
        seen = np.arange(staged.losses_bckm.shape[2]) < ends[:, :, None]
        bad_bck = seen & ~np.isfinite(staged.losses_bckm).all(3)
        rows = []
        for b in np.flatnonzero(bad_bck.any((1, 2))).tolist():
            c, k = (int(x[0]) for x in np.nonzero(bad_bck[b]))
            time = self._content.times[staged.order[k]].requested
            reason = f"the loss of candidate {c} at timestep {time:g} is not finite"
            rows.append(InvalidRow(batch.start + b, batch.keys[b], "denoise", reason))
        if rows and self._content.features.non_finite == "error":
            raise FeatureError(
                f"{self._job.folder.url}: row {rows[0].row}, {rows[0].key}: {rows[0].reason}; set "
                "`backbone.dtype: bfloat16` or float32, or features.non_finite: invalid to list "
                "such rows"
            )
        return rows


def _moved(row: InvalidRow, by: int) -> InvalidRow:
    return InvalidRow(row.row + by, row.key, row.stage, row.reason)


def make_score_task(
    url: str,
    backbone: BackboneSpec,
    condition: ConditionSpec,
    run: RunSpec,
    n_cpus: int,
    device: str | None = None,
    noise_file: str | None = None,
    tars: Sequence[TarInfo] | None = None,
) -> ScoreTask:
    """Open the job and load the weights: what an executor runs once in each worker.

    Raises:
        as `extract.make_task`.
    """
    job = UnitJob.open(url)
    content = content_of(job)
    index = SampleIndex.from_parquet(job.folder.get(INDEX), f"{url}/{INDEX}")
    if tars is not None:
        index = index.with_tars(tars)
    computer, conditions = load_computer(
        content.described,
        index,
        backbone,
        condition,
        device=device,
        noise_file=noise_file,
        place=url,
    )
    here = computer.backbone.device
    told = told_to_candidates(conditions.candidates, here)
    replicas = [computer.replica() for _ in range(n_cpus - 1)] if here.type == "cpu" else []
    return ScoreTask(job, index, [computer, *replicas], told, run, MicroBatches(here))
