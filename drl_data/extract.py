"""One unit: read, encode, denoise, reduce, write; timed. Knows no Ray and starts nothing by itself.

An `ExtractTask` holds the weights and is called with one unit at a time, from several threads at
once: while one unit computes, the next one reads and the one before it writes. Memory in flight is
bounded by a budget in bytes.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import queue
import resource
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from drl_data.computers import load_computer
from drl_data.conditions import SampleConditions
from drl_data.device_memory import MicroBatches, faults_named
from drl_data.diffusion_spec import ConditionSpec
from drl_data.errors import (
    ImageError,
    redacted,
)
from drl_data.features import FeatureComputer
from drl_data.fits import fitted
from drl_data.images import read_batches
from drl_data.index import SampleIndex, TarInfo
from drl_data.metering import ByteBudget, Clock, take
from drl_data.numerics import COUNTS_BYTES
from drl_data.pipeline import RunSpec
from drl_data.plan import Lease, Unit
from drl_data.receipts import Receipt, RunRecord, TarRecord, UnitCounts
from drl_data.spec import BackboneSpec
from drl_data.stopping import Stop
from drl_data.store import FeatureStore
from drl_data.unit_features import WHOLE, Selection, UnitFeatures, UnitPass

RECORDED_PACKAGES = ("torch", "diffusers", "transformers", "numpy", "pillow", "drl-data")


class ExtractTask:
    """Computes units of one store; safe to call from several threads.

    `computers` are as many as units may compute at a time: one on a GPU; on a CPU one for each
    core, each computing with one thread, because the bits of a convolution depend on the number of
    threads and a store's must not.
    """

    def __init__(
        self,
        store: FeatureStore,
        computers: Sequence[FeatureComputer],
        conditions: SampleConditions,
        run: RunSpec,
        fits: Mapping[str, int] | None = None,
        micro_batches: MicroBatches | None = None,
    ) -> None:
        self._store = store
        self._conditions = conditions
        self.fits = dict(fits or {})
        """Array -> CRC-32C of the fitted reduction that it is reduced by."""
        self._spec = store.computed_spec
        self._index = store.index
        self._run = run
        self._device = computers[0].backbone.device
        self._micro_batches = micro_batches or MicroBatches(self._device)
        self._computers: queue.SimpleQueue[FeatureComputer] = queue.SimpleQueue()
        for computer in computers:
            self._computers.put(computer)
        self.identity = run_identity(self._device)
        """Where this is and with what, as receipts record it."""
        self._budget = ByteBudget(run.memory_bytes)
        self._prefetch_bytes = max(run.memory_bytes // 32, 1)

    def __call__(self, lease: Lease, stop: Stop | None = None) -> UnitResult | None:
        """Compute and write one unit; None if the lease only probes some rows.

        Another driver may have signed the unit: then its receipt is returned and nothing computed.

        Raises:
            StoppedError: the run ends, and the unit had not begun or took too long.
            FeatureError: features not finite or past the storage dtype's range where the spec
                says that this is an error.
            InputError: a tar that changed since it was indexed.
            ObjectError: storage that failed.
            DeviceMemoryError: a GPU without memory for a single image.
            HostMemoryError: the host without memory.
            DeviceLostError: a GPU that this process cannot use again.
        """
        unit, stop = lease.unit, stop or Stop()
        stop.check_begin()
        if lease.probe is None:
            signed = self._store.receipt(unit)
            if signed is not None:
                return UnitResult(signed, computed=False)
        with self.room(unit, stop):
            clock = Clock(self._device)
            selection = Selection() if lease.probe is None else _rows_of(unit, *lease.probe)
            computed = self.compute(unit, selection, poison=lease.poison, clock=clock, stop=stop)
            if lease.probe is not None:
                return None
            return self.write(unit, computed, clock=clock, attempt=lease.attempt)

    @contextmanager
    def room(self, unit: Unit, stop: Stop) -> Iterator[None]:
        """Hold the memory that the features of a unit take; blocks until it is free.

        Raises:
            StoppedError: the run was told to stop meanwhile.
        """
        n_times = len(self._store.times)
        per_row = sum(
            a.n_cells(n_times) * (a.bytes_per_row + COUNTS_BYTES) for a in self._store.arrays
        )
        n_bytes = unit.n_rows * per_row + self._prefetch_bytes
        with self._budget.reserve(n_bytes, stop.check_begin):
            yield

    def compute(
        self,
        unit: Unit,
        selection: Selection = WHOLE,
        *,
        poison: Sequence[tuple[int, str]] = (),
        clock: Clock | None = None,
        stop: Stop | None = None,
        into: Mapping[str, Tensor] | None = None,
    ) -> UnitFeatures:
        """The features of a unit, or of a part of it; nothing is written. Inside `room`.

        Rows of `poison` (row, why) are invalid without being read. `into` has the memory to fill,
        as `empty_features` makes it. Reading begins at once, computing when a computer is free.

        Raises:
            as `__call__`.
        """
        clock, stop = clock or Clock(self._device), stop or Stop()
        batches = read_batches(
            unit,
            self._index,
            self._spec.images,
            batch_size=self._spec.batch_size,
            n_threads=self._run.decode_threads,
            prefetch_bytes=self._prefetch_bytes,
            views=True,
            retries=clock.retries,
            rows=selection.rows,
            skip={row: ImageError("worker", reason) for row, reason in poison},
        )
        doing = f"{self._store.url}, unit {unit.id}"
        with closing(batches), faults_named(self._device, doing):
            first = list(itertools.islice(batches, 1))  # reads while others compute
            computer = take(self._computers, stop.check_begin)
            try:
                work = UnitPass(
                    self._store,
                    unit,
                    computer,
                    self._conditions,
                    selection,
                    clock=clock,
                    micro_batches=self._micro_batches,
                    ask=stop.check,
                    into=into,
                )
                return work.run(itertools.chain(first, batches))
            finally:
                self._computers.put(computer)

    def write(
        self, unit: Unit, computed: UnitFeatures, *, clock: Clock, attempt: int = 1
    ) -> UnitResult:
        """Write a whole unit and sign it; what another driver signed first stays.

        Raises:
            FeatureError: values that are not finite.
            ConflictError: the unit is signed with other content.
            ObjectError: storage that failed.
        """
        run = unit_record(
            self.identity, self._index, unit, clock, attempt, [computed], self._device
        )
        counts = UnitCounts(
            input_bytes=computed.input_bytes,
            clipped=computed.clipped,
            non_finite=computed.non_finite,
            fits=self.fits,
        )
        features = {name: as_numpy(x) for name, x in computed.features.items()}
        receipt = self._store.write(unit, features, computed.invalid, run, counts)
        return UnitResult(receipt, computed=is_of(receipt, run))

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        return self._device


@dataclass(frozen=True)
class UnitResult:
    """The receipt of a unit, and whether it is of this run or was found in the store."""

    receipt: Receipt
    computed: bool


def is_of(receipt: Receipt, run: RunRecord) -> bool:
    """Whether a receipt is of this very attempt: no two measure the same seconds."""
    seconds = {name: s for name, s in receipt.run.seconds.items() if name != "write"}
    return (seconds, receipt.run.host) == (run.seconds, run.host)


def run_identity(device: torch.device) -> RunRecord:
    """Where this is and with what, as receipts record it."""
    return RunRecord(host=socket.gethostname(), device=_device_name(device), versions=_versions())


def unit_record(
    identity: RunRecord,
    index: SampleIndex,
    unit: Unit,
    clock: Clock,
    attempt: int,
    parts: Sequence[UnitFeatures],
    device: torch.device,
) -> RunRecord:
    """How a unit was computed: here and now, in one or more parts."""
    micro_batches = [part.micro_batch for part in parts if part.micro_batch is not None]
    return identity.model_copy(
        update={
            "seconds": clock.seconds(),
            "peak_bytes": peak_bytes(device),
            "attempt": attempt,
            "damage": {name: found for part in parts for name, found in part.damage.items()},
            "tars": tar_records(index, unit),
            "retries": clock.retries.value,
            "micro_batch": min(micro_batches, default=None),
        }
    )


def tar_records(index: SampleIndex, unit: Unit) -> tuple[TarRecord, ...]:
    """The tars of a unit's rows as they were indexed; `read_batches` refuses others."""
    numbers = sorted(set(index.slice(unit.start, unit.stop).column("tar").to_pylist()))
    return tuple(
        TarRecord(url=redacted(tar.url), size=tar.size, etag=tar.etag)
        for tar in (index.tars[number] for number in numbers)
    )


def _rows_of(unit: Unit, start: int, stop: int) -> Selection:
    """Rows `start` to `stop` (exclusive) of the index, as far as they are the unit's."""
    rows = np.arange(unit.start, unit.stop)
    return Selection(rows=(rows >= start) & (rows < stop))


def make_task(
    store_url: str,
    backbone: BackboneSpec,
    condition: ConditionSpec,
    run: RunSpec,
    n_cpus: int,
    device: str | None = None,
    noise_file: str | None = None,
    tars: Sequence[TarInfo] | None = None,
    read_only: bool = False,
) -> ExtractTask:
    """Open the store and load the weights: what an executor runs once in each worker.

    `backbone`, `condition` and `noise_file` say where the files are whose digests the store's spec
    holds; `tars` where the tars are, if the store's index does not.
    `n_cpus` is how many units may compute at a time where there is no GPU. `device` defaults to
    the first visible GPU, else the CPU. With `read_only` no fit is put where there is none.

    Raises:
        StoreMismatchError: if the weights are not those that the store was made for.
        TapError: if the model has other modules than when the store was made.
        DeviceMemoryError: if the device has too little memory for the model.
    """
    store = FeatureStore.open(store_url)
    if tars is not None:
        store.locate_tars(tars)
    computer, conditions = load_computer(
        store.described._replace(spec=store.computed_spec),
        store.index,
        backbone,
        condition,
        device=device,
        noise_file=noise_file,
        place=store_url,
    )
    here = computer.backbone.device
    on_cpu = here.type == "cpu"
    with faults_named(here, f"{store_url}, before the first unit"):
        micro_batches = MicroBatches(here)
        fits, checksums = fitted(
            store, computer, conditions, run, micro_batches, read_only=read_only
        )
        computer = computer.with_taps(computer.taps, fits)
        replicas = [computer.replica() for _ in range(n_cpus - 1)] if on_cpu else []
    computers = [computer, *replicas]
    return ExtractTask(store, computers, conditions, run, checksums, micro_batches)


def as_numpy(x: Tensor) -> np.ndarray:
    """The same memory as the store takes it: bfloat16 as its bits."""
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def peak_bytes(device: torch.device) -> int:
    """Peak memory of the GPU, or of the process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in RECORDED_PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # run from a checkout, or an optional package
    return found
