"""Weights on a device, behind a computer of features; what every worker loads once."""

from __future__ import annotations

import torch

from drl_data.backbones import Backbone, Model, find_model, load_backbone
from drl_data.conditions import SampleConditions
from drl_data.device_memory import described as memory_of
from drl_data.device_memory import faults_named, is_out_of_memory
from drl_data.diffusion_spec import ConditionSpec
from drl_data.errors import DeviceMemoryError, StoreMismatchError, TapError
from drl_data.features import FeatureComputer
from drl_data.index import SampleIndex
from drl_data.noise_bank import bank_digest, read_bank
from drl_data.spec import BackboneSpec
from drl_data.spec_base import file_digest
from drl_data.store_metadata import Described
from drl_data.taps import ResolvedTap


def load_computer(
    described: Described,
    index: SampleIndex,
    backbone: BackboneSpec,
    condition: ConditionSpec,
    *,
    device: str | None,
    noise_file: str | None,
    place: str,
) -> tuple[FeatureComputer, SampleConditions]:
    """The weights, and what the samples are told, for the features that are described.

    `backbone`, `condition` and `noise_file` say where the files are whose digests the spec holds;
    `place` names what is made in errors. `device` defaults to the first visible GPU, else the CPU,
    where torch is then told to use one thread: the bits of a convolution depend on their number.

    Raises:
        StoreMismatchError: if the weights or other files are not those of the spec.
        TapError: if the model has other modules than when the taps were resolved.
        DeviceMemoryError: if the device has too little memory for the model.
    """
    spec = described.computed
    model = find_model(backbone)
    found = {"weights": model.digest(), **condition_files(condition)}
    wanted = {"weights": spec.weights, **spec.condition_files}
    bank = None if noise_file is None else read_bank(noise_file)
    if bank is not None:
        found["noise"] = bank_digest(bank)
    if spec.noise.file is not None:
        wanted["noise"] = spec.noise.file
    if found != wanted:
        raise StoreMismatchError(
            f"{place} was made with {wanted}, but {backbone.model} and the other files "
            f"have {found}; give the same files, or another store"
        )
    use_exact_float32()
    loaded = _loaded(
        model, torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    )
    if loaded.device.type == "cpu":
        torch.set_num_threads(1)
    with faults_named(loaded.device, f"{place}, before the first unit"):
        conditions = SampleConditions(loaded, condition, index)
        computer = FeatureComputer(
            loaded,
            _frozen_taps(loaded, described, place),
            conditions.constant,
            described.times,
            spec,
            bank=bank,
            candidates=conditions.candidates,
        )
    return computer, conditions


def _loaded(model: Model, device: torch.device) -> Backbone:
    """The backbone on a device.

    Raises:
        DeviceMemoryError: naming the device, its memory, and what the weights take.
    """
    with faults_named(device, "loading the model"):
        try:
            return load_backbone(model, str(device))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            meta = load_backbone(model, "meta")
            parts = [part for part in (meta.network, meta.vae) if part is not None]
            n_bytes = sum(p.nbytes for part in parts for p in part.parameters())
            raise DeviceMemoryError(
                f"{memory_of(device)}: the model takes {n_bytes / 1e9:.2f} GB in "
                f"{str(meta.dtype).removeprefix('torch.')} and does not fit; set `backbone.dtype: "
                "bfloat16`, end what else runs on the GPU (`run.gpus_per_worker: 1`, fewer "
                "workers), or take one with more memory"
            ) from error


def condition_files(condition: ConditionSpec) -> dict[str, str]:
    """Digests of the files that a condition names, as a `FeatureSpec` holds them."""
    path = condition.prompt_embeddings
    return {} if path is None else {"prompt_embeddings": file_digest(path)}


def use_exact_float32() -> None:
    """Let float32 mean float32: NVIDIA's convolutions would silently round to TF32."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def _frozen_taps(backbone: Backbone, described: Described, place: str) -> tuple[ResolvedTap, ...]:
    """The taps resolved against this model, refused if they are not those that were frozen."""
    taps = backbone.resolve(described.computed.taps)
    now = [(tap.name, tap.address) for tap in taps]
    frozen = [(array.name, array.tap) for array in described.arrays if array.quantises is None]
    if now != frozen:
        raise TapError(
            f"{place}: the taps resolve differently than when the store was made.\n"
            f"  store: {', '.join(address for _, address in frozen)}\n"
            f"  now:   {', '.join(address for _, address in now)}\n"
            "Use the library versions that the store's receipts record, or another store."
        )
    return taps
