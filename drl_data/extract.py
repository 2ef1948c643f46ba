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
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from drl_data.backbones import Backbone, find_model, load_backbone
from drl_data.conditions import SampleConditions
from drl_data.diffusion_spec import ConditionSpec
from drl_data.errors import FeatureError, StoreMismatchError, TapError
from drl_data.features import FeatureComputer
from drl_data.fits import fitted
from drl_data.images import ImageBatch, read_batches
from drl_data.metering import ByteBudget, Clock
from drl_data.noise_bank import bank_digest, read_bank
from drl_data.pipeline import RunSpec
from drl_data.plan import InvalidRow, Lease, Unit
from drl_data.quantise import (
    DamageMeter,
    from_storage,
    storage_buffer,
    to_storage,
)
from drl_data.receipts import Damage, Receipt, RunRecord, UnitCounts
from drl_data.spec import BackboneSpec, ImageSpec
from drl_data.spec_base import file_digest
from drl_data.stopping import Stop
from drl_data.store import FeatureStore
from drl_data.taps import ResolvedTap

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
    ) -> None:
        self._store = store
        self._conditions = conditions
        self._fits = dict(fits or {})
        self._spec = store.spec
        self._index = store.index
        self._run = run
        self._device = computers[0].backbone.device
        self._computers: queue.SimpleQueue[FeatureComputer] = queue.SimpleQueue()
        for computer in computers:
            self._computers.put(computer)
        self._budget = ByteBudget(run.memory_bytes)

    def __call__(self, lease: Lease, stop: Stop | None = None) -> Receipt:
        """Compute and write one unit; returns the receipt that the store holds in the end.

        Raises:
            FeatureError: features not finite, or past the storage dtype's range with
                `overflow: error`.
            InputError: a tar that changed since it was indexed.
            ObjectError: storage that failed.
        """
        unit, clock = lease.unit, Clock(self._device)
        n_times = len(self._store.times)
        per_row = sum(a.n_cells(n_times) * a.bytes_per_row for a in self._store.arrays)
        features_bytes = unit.n_rows * per_row
        prefetch_bytes = max(self._run.memory_bytes // 32, 1)
        with self._budget.reserve(features_bytes + prefetch_bytes):
            batches = read_batches(
                unit,
                self._index,
                self._spec.images,
                batch_size=self._spec.batch_size,
                n_threads=self._run.decode_threads,
                prefetch_bytes=prefetch_bytes,
                views=True,
                retries=clock.retries,
            )
            with closing(batches):
                primed = itertools.chain([next(batches)], batches)  # reads while others compute
                computer = self._computers.get()
                try:
                    computed = self._compute_unit(unit, primed, computer, clock)
                finally:
                    self._computers.put(computer)
            return self._store.write(
                unit,
                {name: _as_numpy(x) for name, x in computed.features.items()},
                computed.invalid,
                RunRecord(
                    seconds=clock.seconds(),
                    peak_bytes=_peak_bytes(self._device),
                    host=socket.gethostname(),
                    device=_device_name(self._device),
                    versions=_versions(),
                    attempt=lease.attempt,
                    damage=computed.damage,
                    retries=clock.retries.value,
                ),
                UnitCounts(
                    samples=self._index.digest_rows(unit.start, unit.stop),
                    input_bytes=computed.input_bytes,
                    clipped=computed.clipped,
                    fits=self._fits,
                ),
            )

    def _compute_unit(
        self, unit: Unit, batches: Iterator[ImageBatch], computer: FeatureComputer, clock: Clock
    ) -> _Computed:
        features = {
            array.name: storage_buffer(
                array,
                (self._store.n_cells(array.name), unit.n_rows),
                pinned=self._device.type == "cuda",
            )
            for array in self._store.arrays
        }
        computed = _Computed(features)
        overflowed: list[tuple[str, int, Tensor]] = []
        meters: dict[str, DamageMeter] = defaultdict(DamageMeter)
        clip = self._spec.overflow == "clip"
        for batch in clock.waiting(batches):
            clock.add("read", batch.read_s)
            clock.add("decode", batch.decode_s)
            computed.input_bytes += batch.n_bytes
            with clock.stage("condition"):
                told = self._conditions.batch(batch.start, batch.n_rows, len(batch.pixels))
            invalid = _merged(batch.invalid, told.invalid)
            computed.invalid.extend(invalid)
            rows = _valid_positions(batch, invalid)
            if not rows:
                continue
            place = [batch.start - unit.start + row for row in rows]
            for view, keys in enumerate(noise_keys(batch, self._spec.images)):
                pixels = batch.of_view(view)
                for t, captured in computer.compute(pixels, keys, clock, told.conditioning):
                    with clock.stage("copy"):
                        for name, x in captured.items():
                            chosen = x[: batch.n_rows] if len(rows) == batch.n_rows else x[rows]
                            array = self._store.array(name)
                            stored, count = to_storage(chosen, array, clip=clip)
                            overflowed.append((name, t, count))
                            cell = array.cell(t, view, len(self._store.times))
                            for part, cast in stored.items():
                                _copy_rows(features[part][cell], place, cast)
                            if unit.id == 0 and batch.start == unit.start:
                                meters[name].add(chosen, from_storage(stored, array))
        clock.synchronize()
        computed.clipped = self._check_overflow(unit, overflowed)
        computed.damage = {
            name: Damage(relative_rmse=found[0], cosine=found[1])
            for name, meter in meters.items()
            if (found := meter.result()) is not None
        }
        return computed

    def _check_overflow(
        self, unit: Unit, counts: Sequence[tuple[str, int, Tensor]]
    ) -> dict[str, dict[str, int]]:
        """Clipped values of each array and requested timestep that has any.

        Raises:
            FeatureError: if there are any and the spec does not allow clipping.
        """
        totals: dict[tuple[str, int], int] = defaultdict(int)
        for name, t, count in counts:
            totals[name, t] += int(count)
        over = {place: n for place, n in totals.items() if n}
        if over and self._spec.overflow == "error":
            lines = ", ".join(
                f"{name} at timestep {self._store.times[t].requested:g}: {n} values"
                for (name, t), n in over.items()
            )
            raise FeatureError(
                f"unit {unit.id}: {lines} are too large for {self._spec.dtype}; set "
                "`features.dtype: bfloat16` or float32, or `features.overflow: clip`"
            )
        clipped: dict[str, dict[str, int]] = defaultdict(dict)
        for (name, t), n in over.items():
            clipped[name][f"{self._store.times[t].requested:g}"] = n
        return dict(clipped)


def make_task(
    store_url: str,
    backbone: BackboneSpec,
    condition: ConditionSpec,
    run: RunSpec,
    n_cpus: int,
    device: str | None = None,
    noise_file: str | None = None,
    tar_urls: Sequence[str] | None = None,
) -> ExtractTask:
    """Open the store and load the weights: what an executor runs once in each worker.

    `backbone`, `condition` and `noise_file` say where the files are whose digests the store's spec
    holds; `tar_urls` where the tars are, if the store may not say it (their URLs hold secrets).
    `n_cpus` is how many units may compute at a time where there is no GPU. `device` defaults to
    the first visible GPU, else the CPU.

    Raises:
        StoreMismatchError: if the weights are not those that the store was made for.
        TapError: if the model has other modules than when the store was made.
    """
    store = FeatureStore.open(store_url)
    if tar_urls is not None:
        store.locate_tars(tar_urls)
    model = find_model(backbone)
    found = {"weights": model.digest(), **condition_files(condition)}
    wanted = {"weights": store.spec.weights, **store.spec.condition_files}
    bank = None if noise_file is None else read_bank(noise_file)
    if bank is not None:
        found["noise"] = bank_digest(bank)
    if store.spec.noise.file is not None:
        wanted["noise"] = store.spec.noise.file
    if found != wanted:
        raise StoreMismatchError(
            f"{store_url} was made with {wanted}, but {backbone.model} and the other files "
            f"have {found}; give the same files, or another store"
        )
    use_exact_float32()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_backbone(model, device)
    conditions = SampleConditions(loaded, condition, store.index)
    computer = FeatureComputer(
        loaded,
        _frozen_taps(loaded, store),
        conditions.constant,
        store.times,
        store.spec,
        bank=bank,
        candidates=conditions.candidates,
    )
    on_cpu = loaded.device.type == "cpu"
    if on_cpu:
        torch.set_num_threads(1)
    fits, checksums = fitted(store, computer, conditions, run)
    computer = computer.with_taps(computer.taps, fits)
    replicas = [computer.replica() for _ in range(n_cpus - 1)] if on_cpu else []
    return ExtractTask(store, [computer, *replicas], conditions, run, checksums)


def condition_files(condition: ConditionSpec) -> dict[str, str]:
    """Digests of the files that a condition names, as a `FeatureSpec` holds them."""
    path = condition.prompt_embeddings
    return {} if path is None else {"prompt_embeddings": file_digest(path)}


def use_exact_float32() -> None:
    """Let float32 mean float32: NVIDIA's convolutions would silently round to TF32."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def _frozen_taps(backbone: Backbone, store: FeatureStore) -> tuple[ResolvedTap, ...]:
    """The taps resolved against this model, refused if they are not those that the store froze."""
    taps = backbone.resolve(store.spec.taps)
    now = [(tap.name, tap.address) for tap in taps]
    frozen = [(array.name, array.tap) for array in store.features]
    if now != frozen:
        raise TapError(
            f"{store.url}: the taps resolve differently than when the store was made.\n"
            f"  store: {', '.join(address for _, address in frozen)}\n"
            f"  now:   {', '.join(address for _, address in now)}\n"
            "Use the library versions that the store's receipts record, or another store."
        )
    return taps


@dataclass
class _Computed:
    """What computing a unit leaves for the writer; features [t, rows, *shape] on the host."""

    features: dict[str, Tensor]
    invalid: list[InvalidRow] = field(default_factory=list)
    input_bytes: int = 0
    clipped: dict[str, dict[str, int]] = field(default_factory=dict)
    damage: dict[str, Damage] = field(default_factory=dict)


def noise_keys(batch: ImageBatch, images: ImageSpec) -> Iterator[list[str]]:
    """What the noise of each row is seeded by, for each view: the sample's key, and for views but
    the image itself also the view's name. Rows past the end have the key ""."""
    rest = [""] * (len(batch.pixels) - batch.n_rows)
    for name in images.view_names or ("id",):
        suffix = "" if name == "id" else f"\x1f{name}"
        yield [*(f"{key}{suffix}" for key in batch.keys), *rest]


def _merged(first: Sequence[InvalidRow], second: Sequence[InvalidRow]) -> list[InvalidRow]:
    """Each invalid row once, in order of rows; the first reason counts."""
    rows = {row.row: row for row in (*second, *first)}
    return [rows[row] for row in sorted(rows)]


def _valid_positions(batch: ImageBatch, invalid: Sequence[InvalidRow]) -> list[int]:
    bad = {row.row - batch.start for row in invalid}
    return [i for i in range(batch.n_rows) if i not in bad]


def _copy_rows(host: Tensor, rows: Sequence[int], x: Tensor) -> None:
    """host[rows] = x, without waiting for the device where the rows are one run."""
    if rows[-1] - rows[0] + 1 == len(rows):
        host[rows[0] : rows[-1] + 1].copy_(x, non_blocking=True)
    else:
        host[list(rows)] = x.to(host.device)


def _as_numpy(x: Tensor) -> np.ndarray:
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def _peak_bytes(device: torch.device) -> int:
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
