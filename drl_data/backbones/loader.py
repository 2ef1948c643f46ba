"""From a hub id, a local folder or a bundled name to weights on a device, and to their digest.

Only safetensors are read, never pickles, and no code comes with a model. The digest of the files
is what enters a store's fingerprint; where they lie does not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from torch import nn

from drl_data.backbones.backbone import Backbone
from drl_data.errors import SpecError, WeightsError
from drl_data.reduce import TORCH_DTYPES
from drl_data.schedule import NoiseSchedule
from drl_data.spec import BackboneSpec, canonical_json, file_digest

BUNDLED = "bundled:"
NETWORK_FOLDERS = ("unet", "transformer")
COMPONENTS = (*NETWORK_FOLDERS, "vae", "text_encoder", "tokenizer", "scheduler")
_SIDE_FILES = (".json", ".safetensors", ".txt")


@dataclass(frozen=True)
class ModelFolder:
    """A model in diffusers' own layout: a pipeline's folder, or the folder of one network."""

    root: Path
    spec: BackboneSpec

    @classmethod
    def find(cls, spec: BackboneSpec) -> ModelFolder:
        """The local folder of `spec.model`, fetched from the hub if it is a hub id.

        Raises:
            WeightsError: if there is no such model, with the id and the revision that were tried.
        """
        if spec.model.startswith(BUNDLED):
            name = spec.model.removeprefix(BUNDLED)
            root = Path(str(resources.files("drl_data"))) / "assets" / name
        elif spec.model.startswith(("/", ".")) or Path(spec.model).is_dir():
            root = Path(spec.model)
        else:
            root = _fetch(spec)
        folder = cls(root, spec)
        if not root.is_dir():
            raise WeightsError(f"model {spec.model!r}: no folder {root}")
        if not folder.network.joinpath("config.json").is_file():
            raise WeightsError(
                f"model {spec.model!r}: {root} is not in diffusers' layout; want config.json in "
                "it, or in its subfolder unet/ or transformer/"
            )
        return folder

    @property
    def network(self) -> Path:
        """The folder of the denoiser."""
        for name in NETWORK_FOLDERS:
            if (self.root / name / "config.json").is_file():
                return self.root / name
        return self.root

    def component(self, name: str) -> Path | None:
        """The folder of another component (`vae`, `text_encoder` ...), or None."""
        return self.root / name if (self.root / name).is_dir() else None

    def config(self, component: Path) -> dict[str, object]:
        """config.json of a component."""
        config = json.loads((component / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise WeightsError(f"{component}/config.json: want an object, got {type(config)}")
        return config

    @property
    def class_name(self) -> str:
        """diffusers' name of the denoiser's class."""
        return str(self.config(self.network).get("_class_name"))

    def digest(self) -> str:
        """SHA-256 over every file that the backbone reads; for `init: random` its seed instead of
        the network's weights."""
        entries: dict[str, str] = {}
        for file in self._files():
            name = str(file.relative_to(self.root))
            if self.spec.init == "random" and file.parent == self.network:
                if file.suffix == ".safetensors" or file.name.endswith(".index.json"):
                    continue
                entries["random"] = str(self.spec.init_seed)
            entries[name] = _content_digest(file)
        return hashlib.sha256(canonical_json(dict(entries))).hexdigest()

    def _files(self) -> Iterator[Path]:
        folders = [self.root / name for name in COMPONENTS if (self.root / name).is_dir()]
        for folder in folders if self.network != self.root else [self.root, *folders]:
            names = {p for p in folder.iterdir() if p.suffix in _SIDE_FILES and p.is_file()}
            weights = {p for p in names if ".safetensors" in p.name}
            yield from sorted(names - weights - {self.root / "training.json"})
            yield from sorted(p for p in weights if self._is_used(p))

    def _is_used(self, file: Path) -> bool:
        """Whether a weights file is of the variant asked for (`name.fp16.safetensors`)."""
        variant = self.spec.variant
        stem = file.name.split(".safetensors")[0]
        if variant is not None:
            return f".{variant}" in stem
        return "." not in stem.split("-0")[0]


def _fetch(spec: BackboneSpec) -> Path:
    """A snapshot of a hub repository at its pinned revision; only the files that are read."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if spec.revision is None:
        raise SpecError(
            f"backbone.model {spec.model!r} is a hub id and needs backbone.revision, a commit "
            "hash, so that the features stay what they are when the repository changes; a local "
            "folder starts with '/' or './'"
        )
    patterns = ["*.json", *(f"{name}/*{end}" for name in COMPONENTS for end in _SIDE_FILES)]
    try:
        return Path(snapshot_download(spec.model, revision=spec.revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise WeightsError(
            f"model {spec.model!r} at revision {spec.revision!r} is neither in the local cache "
            f"nor to be had from the hub: {str(error).splitlines()[0]}; give a local folder as "
            "backbone.model, or check the id, the revision and your access"
        ) from error


def _content_digest(file: Path) -> str:
    """Digest of a file; of JSON without the keys that do not change what the model computes."""
    if file.suffix == ".json":
        data = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(data, dict):
            data = {k: v for k, v in data.items() if k == "_class_name" or not k.startswith("_")}
        return hashlib.sha256(canonical_json(data)).hexdigest()
    return file_digest(file)


def load_backbone(folder: ModelFolder, device: str | torch.device) -> Backbone:
    """The adapter of the model's family with weights on `device`; on "meta" structure only.

    Raises:
        WeightsError: for a class that no adapter knows, or files that do not load.
    """
    from drl_data.backbones.transformer import DiTBackbone
    from drl_data.backbones.unet import LatentUNetBackbone, PixelUNetBackbone

    families: dict[str, Callable[[ModelFolder, torch.device], Backbone]] = {
        "UNet2DModel": PixelUNetBackbone.load,
        "UNet2DConditionModel": LatentUNetBackbone.load,
        "DiTTransformer2DModel": DiTBackbone.load,
    }
    if folder.class_name not in families:
        raise WeightsError(
            f"model {folder.spec.model!r} is a {folder.class_name}; families with an adapter: "
            f"{', '.join(families)}"
        )
    return families[folder.class_name](folder, torch.device(device))


def load_network(folder: ModelFolder, cls: type, device: torch.device) -> nn.Module:
    """The denoiser: pretrained, seeded random, or on meta; in the precision of the spec."""
    dtype = TORCH_DTYPES[folder.spec.dtype]
    config = {k: v for k, v in folder.config(folder.network).items() if not k.startswith("_")}
    if device.type == "meta":
        return build(cls, config, "meta", dtype)
    if folder.spec.init == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(folder.spec.init_seed)
            return placed(build(cls, config, "cpu", dtype), device)
    return placed(load_component(folder, folder.network, cls, dtype), device)


def build(cls: type, config: dict[str, object], device: str, dtype: torch.dtype) -> nn.Module:
    """A diffusers model from its configuration; weights as its constructor makes them."""
    with torch.device(device):
        network: nn.Module = cls.from_config(config)  # type: ignore[attr-defined]
    return network if dtype == torch.float32 else nn.Module.to(network, dtype)


def load_component(
    folder: ModelFolder, path: Path, cls: type, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A pretrained component from its folder: safetensors only, no network access.

    Raises:
        WeightsError: if the files are missing or do not fit.
    """
    with _weights_errors(folder, path):
        loaded: nn.Module = cls.from_pretrained(  # type: ignore[attr-defined]
            path,
            variant=folder.spec.variant,
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
        )
    return loaded


def placed(network: nn.Module, device: torch.device) -> nn.Module:
    """The module frozen and on its device; channels_last on a GPU."""
    network = network.eval().requires_grad_(False).to(device)
    if device.type == "cuda":
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def load_schedule(folder: ModelFolder) -> NoiseSchedule:
    """The training schedule from scheduler/scheduler_config.json.

    Raises:
        WeightsError: if the folder has none.
    """
    from diffusers import DDPMScheduler

    path = folder.component("scheduler")
    if path is None:
        raise WeightsError(
            f"model {folder.spec.model!r}: no scheduler/ beside the network, so its noise schedule "
            "is unknown; give the folder of the whole pipeline"
        )
    with _weights_errors(folder, path):
        scheduler = DDPMScheduler.from_pretrained(path, local_files_only=True)
    return NoiseSchedule(scheduler.alphas_cumprod, scheduler.config.prediction_type)


@contextlib.contextmanager
def _weights_errors(folder: ModelFolder, path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightsError(
            f"model {folder.spec.model!r}: {path} does not load as {folder.class_name}'s "
            f"component: {error}"
        ) from error
