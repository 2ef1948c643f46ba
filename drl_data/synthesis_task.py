"""One unit of a synthesis: images of one tar, made in batches that never cross units.

Batches are the unit's images by their position, as many as `batch_size`, of one strength. On a CPU
one image maker works for each core, with one thread, as the bits of a convolution depend on it.
"""

from __future__ import annotations

import queue
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from PIL import Image
from pydantic import JsonValue

from drl_data.backbones.image_maker import ImageMaker, ImageRequest
from drl_data.backbones.image_pipelines import load_images
from drl_data.backbones.loader import ModelFolder
from drl_data.computers import use_exact_float32
from drl_data.device_memory import MicroBatches, faults_named
from drl_data.errors import InputError, StoreMismatchError
from drl_data.extract import is_of, run_identity
from drl_data.images import read_batches
from drl_data.index import SampleIndex
from drl_data.metering import Clock, take
from drl_data.pipeline import RunSpec
from drl_data.plan import InvalidRow, Lease, Unit
from drl_data.receipts import Receipt, RunRecord, UnitCounts
from drl_data.spec import BackboneSpec, ImageSpec
from drl_data.spec_base import canonical_json
from drl_data.stopping import Stop
from drl_data.synthesis_plan import Item, SynthesisPlan, plan_from_parquet
from drl_data.synthesis_tar import encode_image, key_of, numbers_in, tar_bytes, tar_name
from drl_data.synthesize_spec import ImageCall, SynthesizeSpec
from drl_data.unit_jobs import UnitJob

ENTRIES = "entries.parquet"
"""What is made, beside the job: prompts, classes, sources."""


@dataclass(frozen=True)
class Sources:
    """Where the source images of image to image are read from, and how they are fitted."""

    index: SampleIndex
    images: ImageSpec


@dataclass(frozen=True)
class Synthesis:
    """Everything that a worker is told: plain values, which cross processes."""

    spec: SynthesizeSpec
    backbone: BackboneSpec
    call: ImageCall
    model: str
    """Name of the model as samples record it: a hub id, or the last part of a folder's name."""
    weights: str
    """Digest of its files."""
    run: RunSpec
    sources: Sources | None


@dataclass(frozen=True)
class UnitMade:
    """The receipt of a unit, and whether it is of this run or was found."""

    receipt: Receipt
    computed: bool


@dataclass(frozen=True)
class _Made:
    """A sample, or why there is none."""

    item: Item
    members: dict[str, bytes] | None
    reason: InvalidRow | None = None
    flagged: bool = False


class SynthesisTask:
    """Makes units of one job; safe to call from several threads."""

    def __init__(
        self,
        job: UnitJob,
        plan: SynthesisPlan,
        what: Synthesis,
        makers: Sequence[ImageMaker],
        device: torch.device,
    ) -> None:
        self._job, self._plan, self._what, self._device = job, plan, what, device
        self._makers: queue.SimpleQueue[ImageMaker] = queue.SimpleQueue()
        for maker in makers:
            self._makers.put(maker)
        self._micro_batches = MicroBatches(device)
        self._identity = run_identity(device)

    def __call__(self, lease: Lease, stop: Stop | None = None) -> UnitMade | None:
        """Make and write one unit; None if the lease only probes some images.

        Raises:
            StoppedError: the run ends, and the unit had not begun or took too long.
            SpecError: a scheduler that draws other random numbers than the images' own.
            InputError: a tar of source images that changed since it was indexed.
            ConflictError: another attempt wrote other images.
            ObjectError: storage that failed.
            DeviceMemoryError: a GPU without memory for a single image.
            DeviceLostError: a GPU that this process cannot use again.
        """
        unit, stop = lease.unit, stop or Stop()
        stop.check_begin()
        if lease.probe is None:
            signed = self._job.receipt(unit)
            if signed is not None:
                return UnitMade(signed, computed=False)
        clock = Clock(self._device)
        maker = take(self._makers, stop.check_begin)
        try:
            with faults_named(self._device, f"{self._job.folder.url}, unit {unit.id}"):
                made = [
                    one
                    for batch in self._batches(unit, lease)
                    for one in self._batch(batch, maker, clock, stop)
                ]
        finally:
            self._makers.put(maker)
        return None if lease.probe is not None else self._write(lease, made, clock)

    def _batches(self, unit: Unit, lease: Lease) -> list[list[Item]]:
        """The unit's images by position; of a probe only those in its rows, and none that kills."""
        killing = dict(lease.poison)
        start, stop = lease.probe or (unit.start, unit.stop)
        batches: list[list[Item]] = []
        group: list[Item] = []
        for number in range(unit.start, unit.stop):
            item = self._plan.item(number)
            if number in killing:
                item = replace(item, reason=killing[number], stage="worker")
            full = len(group) == self._what.spec.batch_size
            if group and (full or item.strength != group[0].strength):
                batches.append(group)
                group = []
            group.append(item)
        batches.append(group)
        chosen = ([item for item in b if start <= item.number < stop] for b in batches)
        return [batch for batch in chosen if batch]

    def _batch(
        self, batch: Sequence[Item], maker: ImageMaker, clock: Clock, stop: Stop
    ) -> list[_Made]:
        """Samples of one batch, in its order."""
        stop.check()
        pixels, lost = self._read_sources(batch, clock)
        for item in batch:
            if item.reason is not None:
                lost[item.number] = self._invalid(item, item.stage, item.reason)
        good = [item for item in batch if item.number not in lost]
        images: list[tuple[torch.Tensor, bool]] = []

        def draw(start: int, end: int) -> None:
            request = self._request(good[start:end], pixels)
            with clock.stage("denoise"):
                drawn = maker.draw(request)
            images.extend(zip(drawn.images_bchw, drawn.flagged, strict=True))

        self._micro_batches.run(len(good), draw)
        with clock.stage("encode"):
            done = {
                item.number: self._sample(item, image, flagged)
                for item, (image, flagged) in zip(good, images, strict=True)
            }
        return [done.get(i.number) or _Made(i, None, lost[i.number]) for i in batch]

    def _request(
        self, items: Sequence[Item], pixels: dict[int, npt.NDArray[np.uint8]]
    ) -> ImageRequest:
        seed = self._what.spec.seed
        first = items[0]
        sources = [pixels[i.source_row] for i in items if i.source_row is not None]
        return ImageRequest(
            generators=[torch.Generator().manual_seed(i.generator_seed(seed)) for i in items],
            prompts=None if first.prompt is None else [i.prompt or "" for i in items],
            classes=None if first.class_id is None else [i.class_id or 0 for i in items],
            sources=[_as_rgb(image) for image in sources] or None,
            strength=first.strength,
        )

    def _read_sources(
        self, batch: Sequence[Item], clock: Clock
    ) -> tuple[dict[int, npt.NDArray[np.uint8]], dict[int, InvalidRow]]:
        """Pixels [c, h, w] by source row, and the images whose source does not decode."""
        sources = self._what.sources
        good = [i for i in batch if i.reason is None and i.source_row is not None]
        if sources is None or not good:
            return {}, {}
        rows = sorted({i.source_row for i in good if i.source_row is not None})
        chosen = replace(sources.index, table=sources.index.table.take(pa.array(rows)))
        pixels: dict[int, npt.NDArray[np.uint8]] = {}
        bad: dict[int, InvalidRow] = {}
        for read in read_batches(
            Unit(0, 0, len(rows)),
            chosen,
            sources.images,
            batch_size=len(rows),
            n_threads=self._what.run.decode_threads,
            prefetch_bytes=self._what.run.memory_bytes // 32,
            retries=clock.retries,
        ):
            clock.add("read", read.read_s)
            clock.add("decode", read.decode_s)
            bad = {rows[invalid.row]: invalid for invalid in read.invalid}
            pixels = dict(zip(rows, read.pixels, strict=True))
        lost = {
            i.number: self._invalid(i, bad[i.source_row].stage, bad[i.source_row].reason)
            for i in good
            if i.source_row in bad
        }
        return pixels, lost

    def _sample(self, item: Item, image_chw: torch.Tensor, flagged: bool) -> _Made:
        """What becomes of one image as the model gave it."""
        spec = self._what.spec
        n_bad = int((~torch.isfinite(image_chw)).sum())
        if n_bad:
            what = f"{n_bad} of {image_chw.numel()} values are not finite"
            return _Made(item, None, self._invalid(item, "denoise", what))
        if flagged and spec.flagged == "leave_out":
            why = "the safety checker made it black"
            return _Made(item, None, self._invalid(item, "safety", why), flagged=True)
        values_hwc = image_chw.permute(1, 2, 0).numpy()
        pixels_hwc = (values_hwc * 255).round().astype(np.uint8)
        members = {
            spec.format.kind: encode_image(pixels_hwc, spec.format),
            "json": canonical_json(self._about(item, pixels_hwc.shape[:2], flagged)) + b"\n",
        }
        if item.label is not None:
            members["cls"] = item.label.encode()
        if item.prompt is not None:
            members["txt"] = item.prompt.encode()
        return _Made(item, members, flagged=flagged)

    def _about(self, item: Item, size: tuple[int, ...], flagged: bool) -> dict[str, JsonValue]:
        """The `.json` of a sample: enough to make this image again."""
        what, spec, call = self._what, self._what.spec, self._what.call
        return {
            "prompt": item.prompt,
            "negative_prompt": call.negative_prompt,
            "class": item.class_id,
            "class_name": item.class_name,
            "label": item.label,
            "source": item.source,
            "strength": item.strength,
            "seed": spec.seed,
            "ordinal": item.ordinal,
            "generator_seed": item.generator_seed(spec.seed),
            "guidance_scale": call.guidance_scale,
            "steps": call.steps,
            "scheduler": call.scheduler,
            "scheduler_options": call.scheduler_options,
            "arguments": call.arguments,
            "pipeline": call.pipeline,
            "model": what.model,
            "revision": what.backbone.revision,
            "weights": what.weights,
            "dtype": what.backbone.dtype,
            "batch_size": spec.batch_size,
            "size": list(size),
            "flagged": flagged,
        }

    def _invalid(self, item: Item, stage: str, reason: str) -> InvalidRow:
        return InvalidRow(item.number, key_of(self._what.spec.name, item.number), stage, reason)

    def _write(self, lease: Lease, made: Sequence[_Made], clock: Clock) -> UnitMade:
        unit, name = lease.unit, self._what.spec.name
        with clock.stage("pack"):
            tar = tar_bytes(
                [(key_of(name, o.item.number), o.members) for o in made if o.members is not None]
            )
        run: RunRecord = self._identity.model_copy(
            update={
                "seconds": clock.seconds(),
                "attempt": lease.attempt,
                "micro_batch": self._micro_batches.size,
                "retries": clock.retries.value,
            }
        )
        receipt = self._job.commit(
            unit,
            tar_name(name, unit.id),
            [tar],
            [o.reason for o in made if o.reason is not None],
            run,
            numbers_in,
            UnitCounts(flagged=sum(o.flagged for o in made)),
        )
        return UnitMade(receipt, computed=is_of(receipt, run))


def make_synthesis_task(
    url: str, what: Synthesis, n_cpus: int, device: str | None = None
) -> SynthesisTask:
    """Open the job and load the weights: what an executor runs once in each worker.

    `n_cpus` is how many units may be made at a time where there is no GPU. `device` defaults to the
    first visible GPU, else the CPU.

    Raises:
        StoreMismatchError: the weights here are not those that the job was begun with.
        InputError: the list of what is made is missing or damaged.
        WeightsError: files that are missing, do not fit, or are pickles.
    """
    job = UnitJob.open(url)
    folder = ModelFolder.find(what.backbone, whole=True)
    found = folder.whole_digest()
    if found != what.weights:
        raise StoreMismatchError(
            f"synthesize: {what.backbone.model} has the weights {found[:16]}... here, and "
            f"{what.weights[:16]}... where the run began; give every worker the same files"
        )
    plan = plan_from_parquet(job.folder.get(ENTRIES), what.spec)
    if plan.digest() != _wanted_entries(job):
        raise InputError(
            f"{job.folder.url}/{ENTRIES} is not what the job was begun with; delete it and run "
            "the same command again"
        )
    use_exact_float32()
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type == "cpu":
        torch.set_num_threads(1)
    with faults_named(place, "loading the model"):
        maker = load_images(folder, what.call, place)
    n_replicas = n_cpus - 1 if place.type == "cpu" else 0
    return SynthesisTask(
        job, plan, what, [maker, *(maker.replica() for _ in range(n_replicas))], place
    )


def _wanted_entries(job: UnitJob) -> JsonValue:
    entries = job.spec.content.get("entries")
    return entries.get("digest") if isinstance(entries, dict) else None


def _as_rgb(pixels_chw: npt.NDArray[np.uint8]) -> Image.Image:
    image = np.ascontiguousarray(pixels_chw.transpose(1, 2, 0))
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).convert("RGB")
