"""Training of a small pixel-space DDPM (Ho et al. 2020) from any tars.

x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, loss |eps - eps_theta(x_t, t)|^2 (their eq. 14).
With `classes` the network is told the image's label, too, and sometimes the null class instead.

Every random number of a step comes from a generator seeded by (seed, step), so that a run which
was interrupted and resumed gives the weights of one that was not: bit for bit on a CPU.

Shape suffixes: b batch, c channel, h height, w width, n images of the training set.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from pydantic import JsonValue
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from drl_data.backbones.pixel_images import TRAINING
from drl_data.class_labels import Classes, classes_of, labels_of
from drl_data.errors import InputError, ObjectNotFoundError, SpecError
from drl_data.images import read_batches
from drl_data.index import SampleIndex
from drl_data.objects import LocalFolder
from drl_data.pipeline import PretrainSpec, is_absolute
from drl_data.plan import Unit
from drl_data.progress import SILENT, Progress
from drl_data.spec import ImageSpec
from drl_data.spec_base import canonical_json

MAX_PIXEL_BYTES = 8 << 30
"""The training set is held on the device as uint8; a larger one is refused."""
CHECKPOINT = "checkpoint.safetensors"
LOSS_DECAY = 0.99
"""Of the running mean of the loss that is shown and recorded."""


def pretrain(
    spec: PretrainSpec,
    index: SampleIndex,
    images: ImageSpec,
    *,
    device: str | None = None,
    progress: Progress = SILENT,
    bfloat16: bool = False,
) -> Path:
    """Train on one split and write the EMA weights in diffusers' layout; returns the folder.

    The folder (`spec.output`) gets model_index.json, unet/, scheduler/ and, last, training.json:
    what was trained, on what, and how it went. Run again, it resumes from its checkpoint, or does
    nothing if it is complete. `device` is torch's name, default the GPU if there is one; `bfloat16`
    runs the network in autocast.

    Raises:
        SpecError: if the settings do not fit together, or the folder holds another training.
    """
    folder = Path(spec.output)
    if is_absolute(spec.output) and not folder.is_absolute():
        raise SpecError(f"pretrain.output: {spec.output} is not a local folder; weights go to one")
    identity = _identity(spec, index, images, bfloat16)
    if _is_complete(folder, identity):
        return folder
    start = time.perf_counter()
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    scheduler, classes = _scheduler(spec, images), classes_of(spec.classes, index)
    data = _training_data(spec, index, images, classes, progress)
    devices = [chosen] if chosen.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        trainer = _Trainer(spec, scheduler, images, data, classes, chosen, bfloat16)
        trainer.load(folder, identity)
        with progress.bar("pretrain", spec.steps, "steps") as bar:
            bar.advance(trainer.step)
            while trainer.step < spec.steps:
                trainer.train_step()
                shown = {"loss": float(trainer.loss)} if trainer.step % 50 == 0 else {}
                bar.advance(1, **shown)
                if trainer.step % spec.checkpoint_every == 0 and trainer.step < spec.steps:
                    trainer.save(folder, identity)
    DDPMPipeline(trainer.ema.cpu(), scheduler).save_pretrained(folder)
    record: JsonValue = {
        **identity,
        "n_images": len(data.pixels_nchw),
        "n_invalid": data.n_invalid,
        **_class_record(classes, data),
        "loss": float(trainer.loss),
        "seconds": round(time.perf_counter() - start, 1),
        "device": torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else chosen.type,
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }
    files = LocalFolder(folder)
    files.put(TRAINING, [json.dumps(record, indent=2).encode()])
    files.delete(CHECKPOINT)
    return folder


class _Trainer:
    """Network, its moving average, and optimizer; `step` steps have been done."""

    def __init__(
        self,
        spec: PretrainSpec,
        scheduler: DDPMScheduler,
        images: ImageSpec,
        data: _TrainingData,
        classes: Classes | None,
        device: torch.device,
        bfloat16: bool,
    ) -> None:
        self.step = 0
        self.loss = torch.zeros((), device=device)
        self._spec, self._device, self._bfloat16 = spec, device, bfloat16
        self._low, self._high = images.range
        self._pixels_nchw = torch.from_numpy(data.pixels_nchw).to(device)
        self._labels_n = torch.from_numpy(data.labels_n)
        self._classes = classes
        self._scheduler = scheduler
        torch.manual_seed(_seed(spec.seed, "init"))
        self.model = _model(spec, images, classes).to(device).train()
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self._parameters = list(self.model.parameters())
        self._averages = list(self.ema.parameters())
        self._optimizer = torch.optim.AdamW(self._parameters, lr=spec.learning_rate)
        self._order = _batches_of_rows(len(data.pixels_nchw), spec.batch_size, spec.seed)

    def train_step(self) -> None:
        """One step of AdamW on one batch, and of the moving average."""
        x_bchw, noise_bchw, t_b, told_b = self._draw(next(self._order))
        noisy_bchw = self._scheduler.add_noise(x_bchw, noise_bchw, t_b)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bfloat16):
            predicted_bchw = self.model(noisy_bchw, t_b, class_labels=told_b).sample
        loss = F.mse_loss(predicted_bchw.float(), noise_bchw)
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        warmup = min(1.0, (self.step + 1) / max(self._spec.warmup_steps, 1))
        self._optimizer.param_groups[0]["lr"] = self._spec.learning_rate * warmup
        self._optimizer.step()
        # The usual warm-up of the average: early weights are forgotten sooner.
        decay = min(self._spec.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self._averages, self._parameters, 1 - decay)
            kept = LOSS_DECAY if self.step else 0.0
            self.loss = kept * self.loss + (1 - kept) * loss.detach()
        self.step += 1

    def _draw(
        self, rows_b: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Images, noise, timesteps and classes of this step; dropout follows from the same seed.

        Drawn on the CPU, so that every device trains on the same numbers.
        """
        generator = torch.manual_seed(_seed(self._spec.seed, f"step {self.step}"))
        rows = torch.from_numpy(rows_b)
        t_b = torch.randint(
            self._scheduler.config.num_train_timesteps, rows.shape, generator=generator
        )
        shape = (len(rows), *self._pixels_nchw.shape[1:])
        noise_bchw = torch.randn(shape, generator=generator).to(self._device)
        pixels_bchw = self._pixels_nchw[rows.to(self._device)].float()
        x_bchw = pixels_bchw * ((self._high - self._low) / 255) + self._low
        told_b = None
        if self._classes is not None:
            told_b = self._classes.dropped(self._labels_n[rows], generator).to(self._device)
        return x_bchw, noise_bchw, t_b.to(self._device), told_b

    def save(self, folder: Path, identity: dict[str, JsonValue]) -> None:
        """Write the checkpoint, whole or not at all."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        for i, moments in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": v for k, v in moments.items()}
        tensors["loss"] = self.loss
        about = {"step": str(self.step), "identity": canonical_json(identity).decode()}
        contents = {k: v.detach().contiguous() for k, v in tensors.items()}
        LocalFolder(folder).put(CHECKPOINT, [save_tensors(contents, metadata=about)])

    def load(self, folder: Path, identity: dict[str, JsonValue]) -> None:
        """Continue from the checkpoint in the folder, if there is one."""
        try:
            data = bytes(LocalFolder(folder).get(CHECKPOINT))
        except ObjectNotFoundError:
            return
        try:
            tensors = load_tensors(data)
            header_bytes = int.from_bytes(data[:8], "little")
            about = json.loads(data[8 : 8 + header_bytes])["__metadata__"]
        except (SafetensorError, ValueError, KeyError) as error:
            raise InputError(
                f"{folder / CHECKPOINT}: not a checkpoint of `drl pretrain` ({error}); delete it "
                "to begin anew"
            ) from error
        _check_same(json.loads(about["identity"]), identity, folder / CHECKPOINT)
        self.step = int(about["step"])
        self.loss = tensors.pop("loss").to(self._device)
        self.model.load_state_dict(_below(tensors, "model."))
        self.ema.load_state_dict(_below(tensors, "ema."))
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in _below(tensors, "optimizer.").items():
            i, _, moment = name.partition(".")
            state.setdefault(int(i), {})[moment] = tensor
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        for _ in range(self.step):
            next(self._order)


# --- data ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _TrainingData:
    """The split's valid images uint8 [n, c, h, w], decoded once, and their labels int64 [n] (-1 is
    none); how many images were left out because they do not decode, or have no label."""

    pixels_nchw: np.ndarray
    labels_n: np.ndarray
    n_invalid: int
    n_unlabelled: int


def _training_data(
    spec: PretrainSpec,
    index: SampleIndex,
    images: ImageSpec,
    classes: Classes | None,
    progress: Progress,
) -> _TrainingData:
    if images.frames > 1:
        raise SpecError(f"images.frames {images.frames}: pretraining is of images, not of videos")
    splits = np.array(index.table.column("split").to_pylist())
    rows = np.flatnonzero(splits == spec.split)
    if not len(rows):
        known = ", ".join(sorted(set(splits)))
        raise SpecError(f"pretrain.split: no samples in split {spec.split!r}; splits: {known}")
    unit = Unit(0, int(rows[0]), int(rows[-1]) + 1)  # the rows of one split are consecutive
    n_bytes = unit.n_rows * images.n_channels * images.size[0] * images.size[1]
    if n_bytes > MAX_PIXEL_BYTES:
        raise SpecError(
            f"pretrain: {unit.n_rows} images are {n_bytes / 2**30:.1f} GiB of pixels, want at most "
            f"{MAX_PIXEL_BYTES / 2**30:.0f} GiB; make images.size or the split smaller"
        )
    parts, labels, n_invalid, n_unlabelled = [], [], 0, 0
    with progress.bar("decode", unit.n_rows, "images") as bar:
        for batch in read_batches(
            unit, index, images, batch_size=1024, n_threads=4, prefetch_bytes=256 << 20
        ):
            good = np.ones(batch.n_rows, bool)
            good[[row.row - batch.start for row in batch.invalid]] = False
            n_invalid += batch.n_rows - int(good.sum())
            found = labels_of(index, batch.start, batch.start + batch.n_rows)
            if classes is not None:
                n_unlabelled += int((good & (found < 0)).sum())
                good &= found >= 0
            parts.append(batch.pixels[: batch.n_rows][good])
            labels.append(found[good])
            bar.advance(batch.n_rows)
    pixels_nchw, labels_n = np.concatenate(parts), np.concatenate(labels)
    if not len(pixels_nchw):
        raise SpecError(
            f"pretrain.split: {spec.split!r} has {unit.n_rows} samples, of which {n_invalid} do "
            f"not decode and {n_unlabelled} have no label; want at least one to train on"
        )
    return _TrainingData(pixels_nchw, labels_n, n_invalid, n_unlabelled)


def _batches_of_rows(n: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """Endless batches: epochs in a new order each, joined, so that every batch is full."""
    left = np.empty(0, np.int64)
    epoch = 0
    while True:
        while len(left) < batch_size:
            order = np.random.default_rng(_seed(seed, f"epoch {epoch}")).permutation(n)
            left = np.concatenate([left, order])
            epoch += 1
        yield left[:batch_size]
        left = left[batch_size:]


def _seed(seed: int, purpose: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:7], "big")


# --- settings -----------------------------------------------------------------------------------


def _identity(
    spec: PretrainSpec, index: SampleIndex, images: ImageSpec, bfloat16: bool
) -> dict[str, JsonValue]:
    """Everything that changes the weights."""
    # Trainings without classes are those that were recorded before there were any.
    unused = {"output", "checkpoint_every"} | (set() if spec.classes else {"classes"})
    return {
        "spec": spec.model_dump(mode="json", exclude=unused),
        "images": images.model_dump(mode="json"),
        "dataset": index.digest(),
        "bfloat16": bfloat16,
    }


def _class_record(classes: Classes | None, data: _TrainingData) -> dict[str, JsonValue]:
    """What training.json says of the classes; nothing without any."""
    if classes is None:
        return {}
    names: list[JsonValue] | None = None if classes.names is None else list(classes.names)
    return {
        "classes": {"number": classes.number, "names": names, "null_class": classes.null},
        "n_unlabelled": data.n_unlabelled,
    }


def _is_complete(folder: Path, identity: dict[str, JsonValue]) -> bool:
    try:
        record = json.loads(bytes(LocalFolder(folder).get(TRAINING)))
    except ObjectNotFoundError:
        return False
    _check_same({key: record.get(key) for key in identity}, identity, folder / TRAINING)
    return True


def _check_same(found: dict[str, JsonValue], wanted: dict[str, JsonValue], place: Path) -> None:
    if found != wanted:
        lines = [
            f"  {key}: {json.dumps(found.get(key))} there, {json.dumps(value)} wanted"
            for key, value in wanted.items()
            if found.get(key) != value
        ]
        raise SpecError(
            f"{place} is of another training; choose another pretrain.output or delete the "
            "folder:\n" + "\n".join(lines)
        )


def _scheduler(spec: PretrainSpec, images: ImageSpec) -> DDPMScheduler:
    unknown = set(spec.scheduler) - set(DDPMScheduler().config)
    if unknown:
        raise SpecError(f"pretrain.scheduler: DDPMScheduler has no {', '.join(sorted(unknown))}")
    scheduler = DDPMScheduler.from_config(dict(spec.scheduler))
    if scheduler.config.prediction_type != "epsilon":
        raise SpecError(
            f"pretrain.scheduler.prediction_type: {scheduler.config.prediction_type!r}, want "
            "'epsilon', which is what is trained"
        )
    limit = scheduler.config.clip_sample_range
    if scheduler.config.clip_sample and images.range != (-limit, limit):
        raise SpecError(
            f"images.range: {list(images.range)}, want {[-limit, limit]}, to which the scheduler "
            "clips samples; or set pretrain.scheduler.clip_sample: false"
        )
    return scheduler


def _model(spec: PretrainSpec, images: ImageSpec, classes: Classes | None) -> UNet2DModel:
    told = [name for name in ("num_class_embeds", "class_embed_type") if spec.model.get(name)]
    if told:
        raise SpecError(
            f"pretrain.model.{told[0]}: want it left out; pretrain.classes makes the network "
            "class-conditional"
        )
    of_classes = {} if classes is None else {"num_class_embeds": classes.n_embeddings}
    try:
        model = UNet2DModel(**spec.model, **of_classes)
    except (TypeError, ValueError) as error:
        raise SpecError(f"pretrain.model is not a UNet2DModel: {error}") from error
    size = model.config.sample_size
    got = (model.config.in_channels, model.config.out_channels, size)
    square = images.size[0] if images.size[0] == images.size[1] else list(images.size)
    if got != (images.n_channels, images.n_channels, square):
        raise SpecError(
            f"pretrain.model: (in_channels, out_channels, sample_size) = {got}, want "
            f"{(images.n_channels, images.n_channels, square)}, the shape of `images`"
        )
    if classes is not None:
        classes.mark(model)
    return model


def _below(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
