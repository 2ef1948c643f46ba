"""Checkpoints of a training: folders of safetensors and JSON, written whole or not at all.

    <root>/step-00000500/             of one process, or of those that torchrun started
    <root>/ray-<time>/step-.../       Ray Train's own checkpoint folders; the same files
        model.safetensors             every parameter and buffer by name
        optimizer.safetensors         AdamW's moments, `exp_avg:<parameter>` ...
        average.safetensors           moving average of the parameters, if there is one
        curve.safetensors             losses of every step so far, float64 [steps]; images of each
        state.json                    step, epoch, position in the epoch, what is trained, on what

A run continues from the newest of them, whoever wrote it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import JsonValue, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from drl_data.errors import InputError, SpecError
from drl_data.folders import local_errors
from drl_data.objects import LocalFolder
from drl_data.spec_base import Spec, canonical_json

STATE = "state.json"
TENSORS = ("model", "optimizer", "average", "curve")
FORMAT_VERSION = 1
RAY_RUNS = "ray-"
"""Folders of Ray Train's runs begin so."""


class TrainState(Spec):
    """The part of a checkpoint that is no tensor."""

    format_version: int = FORMAT_VERSION
    step: int
    """Steps that lie behind."""
    epoch: int
    batch: int
    """The next batch of this epoch."""
    identity: dict[str, JsonValue]
    """Everything that decides the weights."""
    world_size: int
    device: str
    torch: str


@dataclass
class Curve:
    """Losses of every step, over all processes: means over the images of the step's batch."""

    n_images: list[float] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=dict)

    def by_epoch(self, n_batches: int) -> dict[str, tuple[float, ...]]:
        """Means over the images of each epoch, by name."""
        starts = range(0, len(self.n_images), n_batches)
        parts = [slice(start, start + n_batches) for start in starts]

        def mean(values: list[float], part: slice) -> float:
            n = self.n_images[part]
            return sum(a * b for a, b in zip(n, values[part], strict=True)) / sum(n)

        return {
            name: tuple(mean(values, part) for part in parts)
            for name, values in self.losses.items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint: float64 [steps] each."""
        losses = {f"loss:{name}": values for name, values in self.losses.items()}
        named = {"n_images": self.n_images, **losses}
        return {name: torch.tensor(values, dtype=torch.float64) for name, values in named.items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Curve:
        """From what `tensors` gave."""
        values = {name: tensor.tolist() for name, tensor in tensors.items()}
        return cls(values.pop("n_images"), {k.removeprefix("loss:"): v for k, v in values.items()})


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory: names of tensors by kind."""

    state: TrainState
    tensors: Mapping[str, Mapping[str, Tensor]]
    """`model`, `optimizer`, `average`, `curve` -> name -> tensor on the CPU."""


class Checkpoints:
    """The checkpoints below one folder; written to `run`, read from all of it."""

    def __init__(self, root: Path, *, run: str = "", keep: int | None = 2) -> None:
        """`keep` newest checkpoints stay, of all runs; None leaves removing to somebody else."""
        self.root, self._keep = root, keep
        self.folder = root / run

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint and remove old ones; returns its folder.

        One that is there already has the same content, as a run is determined by its identity.
        """
        target = self.folder / _name(checkpoint.state.step)
        if not (target / STATE).exists():
            with local_errors(target):
                self.folder.mkdir(parents=True, exist_ok=True)
                temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=self.folder))
                temporary.chmod(0o755)
                if target.exists():  # its removal was cut off
                    shutil.rmtree(target)
            try:
                files = LocalFolder(temporary)
                for kind, tensors in checkpoint.tensors.items():
                    files.put(f"{kind}.safetensors", [save_tensors(_plain(tensors))])
                files.put(STATE, [checkpoint.state.model_dump_json(indent=1).encode()])
                with local_errors(target):
                    _sync(temporary)
                    temporary.rename(target)
                    _sync(self.folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        if self._keep is not None:
            self.prune(self._keep)
        return target

    def newest(self) -> Path | None:
        """The folder of the checkpoint with the most steps, if there is one."""
        found = self._all()
        return found[-1] if found else None

    def load(self, identity: Mapping[str, JsonValue]) -> Checkpoint | None:
        """The newest checkpoint, if there is one.

        Raises:
            SpecError: it is of another training; with what differs.
            InputError: it is damaged.
        """
        folder = self.newest()
        if folder is None:
            return None
        state = self._state(folder, identity)
        return Checkpoint(state, {kind: _read(folder, kind) for kind in TENSORS})

    def state(self, identity: Mapping[str, JsonValue]) -> TrainState | None:
        """What `load` would find, without its tensors; raises the same."""
        folder = self.newest()
        return None if folder is None else self._state(folder, identity)

    def begin(self) -> None:
        """Remove what runs that were killed left half-written."""
        for path in self.root.glob("**/.tmp-*"):
            shutil.rmtree(path, ignore_errors=True)

    def prune(self, keep: int) -> None:
        """Remove all but the newest checkpoints, and the folders of runs that have none."""
        for folder in self._all()[:-keep]:
            # Not found any more from its first moment: what reads begins with the state.
            LocalFolder(folder).delete(STATE)
            shutil.rmtree(folder, ignore_errors=True)
        for folder in self.root.glob(f"{RAY_RUNS}*/"):
            if folder != self.folder and not any(folder.glob("step-*")):
                shutil.rmtree(folder, ignore_errors=True)

    def _all(self) -> list[Path]:
        """Folders of whole checkpoints by their steps."""
        found = [path.parent for path in self.root.glob(f"**/step-*/{STATE}")]
        return sorted(found, key=lambda folder: (folder.name, str(folder)))

    def _state(self, folder: Path, wanted: Mapping[str, JsonValue]) -> TrainState:
        state = _read_state(folder)
        lines = [
            f"  {key}: {_shown(there)} there, {_shown(here)} wanted"
            for key, there, here in _differences("", state.identity, _as_json(wanted))
        ]
        if lines:
            raise SpecError(
                f"{self.root} holds {state.step} steps of another training; choose another "
                "`results`, or delete that folder to begin anew:\n" + "\n".join(lines)
            )
        return state


_ABSENT = object()


def _as_json(identity: Mapping[str, JsonValue]) -> JsonValue:
    """As it comes back from a file: tuples are lists."""
    found: JsonValue = json.loads(canonical_json(dict(identity)))
    return found


def _differences(place: str, there: object, wanted: object) -> list[tuple[str, object, object]]:
    """(place, value there, value wanted) of every leaf that differs."""
    if isinstance(there, Mapping) and isinstance(wanted, Mapping):
        return [
            found
            for key in sorted({*there, *wanted})
            for found in _differences(
                f"{place}.{key}" if place else str(key),
                there.get(key, _ABSENT),
                wanted.get(key, _ABSENT),
            )
        ]
    return [] if there == wanted else [(place, there, wanted)]


def _shown(value: object) -> str:
    return "nothing" if value is _ABSENT else json.dumps(value)


def _name(step: int) -> str:
    return f"step-{step:010d}"


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, each with memory of its own, as safetensors wants."""
    return {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}


def _read_state(folder: Path) -> TrainState:
    try:
        return TrainState.model_validate_json((folder / STATE).read_bytes())
    except (OSError, ValidationError) as error:
        raise _damaged(folder, error) from error


def _read(folder: Path, kind: str) -> dict[str, Tensor]:
    try:
        return load_tensors((folder / f"{kind}.safetensors").read_bytes())
    except (OSError, SafetensorError) as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: Exception) -> InputError:
    return InputError(
        f"{folder}: not a whole checkpoint ({' '.join(str(error).split())}); delete this folder to "
        "go on from the one before it"
    )


def _sync(folder: Path) -> None:
    """As far as the file system can: some network mounts know no fsync of folders."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)
