"""Faults of a GPU, for real: too little memory for a batch, an image, a model; a broken context.

    python benchmarks/gpu_faults.py [batch|image|model|assert ...]

Each runs in a process of its own, because a limit of memory and a broken context stay with a
process. Prints a line of JSON for each, `ok` last; exit status 1 if one is not as it must be.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from drl_data.compare import compare_rows, tolerance
from drl_data.errors import DeviceLostError, DeviceMemoryError
from drl_data.extract import ExtractTask, make_task
from drl_data.pipeline import Pipeline
from drl_data.plan import Lease
from drl_data.runs import prepare
from drl_data.store import FeatureStore
from drl_data.testing import write_photo_tars
from drl_data.tiny_models import save_tiny_ddpm

N_SAMPLES, BATCH, SIDE = 96, 48, 128


def _pipeline(folder: Path, name: str) -> Pipeline:
    return Pipeline.parse(
        {
            "name": "gpu-faults",
            "dataset": {"tars": str(folder / "photos" / "*.tar")},
            "images": {"size": SIDE},
            "backbone": {"model": str(folder / "ddpm")},
            "schedule": {"timesteps": [0, 300]},
            "taps": [{"path": "mid_block", "reduce": "avg_pool(4)"}],
            "features": {"dtype": "float16", "batch_size": BATCH, "rows_per_unit": BATCH},
            "store": {"url": str(folder / name)},
        }
    )


def _task(folder: Path, name: str) -> tuple[FeatureStore, ExtractTask]:
    """An empty store, and a task on the GPU."""
    chosen = _pipeline(folder, name)
    found = prepare(chosen)
    assert chosen.store is not None
    assert chosen.backbone is not None
    store = FeatureStore.create(
        chosen.store.url, found.spec, found.arrays, found.times, found.index
    )
    task = make_task(
        store.url, chosen.backbone, chosen.condition, chosen.run, n_cpus=1, device="cuda"
    )
    return store, task


def _limit(n_bytes: int) -> None:
    """What this process may take of the GPU's memory from now on, beside what it holds."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + n_bytes) / total)


def _refusal(act: Callable[[], object]) -> str:
    """The message of the `DeviceMemoryError` that it raises."""
    try:
        act()
    except DeviceMemoryError as error:
        return str(error)
    return "it fitted"


def batch(folder: Path) -> dict[str, object]:
    """Half the memory that a batch takes: micro-batches, and the features of an undisturbed run."""
    reference, task = _task(folder, "reference")
    before = torch.cuda.memory_reserved()
    for unit in reference.units:
        task(Lease(unit))
    need = torch.cuda.max_memory_reserved() - before
    store, task = _task(folder, "limited")
    _limit(need // 2)
    sizes = []
    for unit in store.units:
        result = task(Lease(unit))
        assert result is not None
        sizes.append(result.receipt.run.micro_batch)
    assert all(size is not None and 0 < size < BATCH for size in sizes), sizes
    worst = 0.0
    for array in store.features:
        limit = tolerance(store.spec.backbone_dtype, array.dtype)
        for t in range(2):
            for unit in store.units:
                a, b = ({array.name: s.read_unit(array.name, t, unit)} for s in (store, reference))
                found = compare_rows(array, a, b, limit)
                assert found.within, (unit.id, t, found)
                worst = max(worst, found.largest)
    return {"batch": BATCH, "micro_batch": sizes, "largest_difference": worst, "need": need}


def image(folder: Path) -> dict[str, object]:
    """Memory for the weights and little more: an error that says that one image does not fit."""
    store, task = _task(folder, "store")
    _limit(0)
    message = _refusal(lambda: task(Lease(store.units[0])))
    assert "a single image does not fit" in message, message
    return {"error": message}


def model(folder: Path) -> dict[str, object]:
    """Memory for no weights at all."""
    _limit(1 << 20)
    message = _refusal(lambda: _task(folder, "store"))
    assert "the model takes" in message, message
    return {"error": message}


def broken(folder: Path) -> dict[str, object]:
    """A kernel that asserts on the device: the context is broken, and every later unit says so."""
    store, task = _task(folder, "store")

    def spoil(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        torch.zeros(3, device="cuda")[torch.tensor([7], device="cuda")].sum()

    computer = task._computers.get()
    computer.backbone.network.mid_block.register_forward_pre_hook(spoil)
    task._computers.put(computer)
    messages = []
    for unit in store.units:
        try:
            task(Lease(unit))
        except DeviceLostError as error:
            messages.append(str(error))
    assert len(messages) == len(store.units) == 2, messages
    assert store.pending() == store.units
    return {"errors": messages}


FAULTS: dict[str, Callable[[Path], dict[str, object]]] = {
    "batch": batch, "image": image, "model": model, "assert": broken
}  # fmt: skip


def provoke(name: str) -> dict[str, object]:
    """What came of a fault, in a fresh process.

    Raises:
        RuntimeError: it did not come out as it must.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_photo_tars(Path(folder) / "photos", n_samples=N_SAMPLES, size=160)
        save_tiny_ddpm(Path(folder) / "ddpm")
        done = subprocess.run(
            [sys.executable, __file__, "--inside", name, folder], capture_output=True, text=True
        )
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    if sys.argv[1:2] == ["--inside"]:
        print(json.dumps(FAULTS[sys.argv[2]](Path(sys.argv[3]))))
        return
    failed = False
    for name in sys.argv[1:] or FAULTS:
        try:
            print(json.dumps({name: provoke(name), "ok": True}))
        except RuntimeError as error:
            failed = True
            print(json.dumps({name: str(error), "ok": False}))
    sys.exit(failed)


if __name__ == "__main__":
    main()
