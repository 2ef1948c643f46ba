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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from drl_data.backbones.backbone import Backbone
from drl_data.backbones.bundles import (
    bundle_folder,
    bundle_names,
    bundle_of,
    bundled_image_size,
    hub_ids,
    is_config_only,
)
from drl_data.backbones.custom import CustomModel
from drl_data.backbones.overrides import apply_overrides
from drl_data.backbones.samplers import FLOW, DiffusersSampler, DynamicShift
from drl_data.errors import SpecError, WeightsError
from drl_data.factories import PYTHON
from drl_data.reduce import TORCH_DTYPES
from drl_data.schedule import NoiseSchedule, Schedule
from drl_data.schedule_edm import EDMSchedule
from drl_data.schedule_flow import FlowSchedule
from drl_data.spec import BackboneSpec
from drl_data.spec_base import canonical_json, file_digest

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

BUNDLED = "bundled:"
NETWORK_FOLDERS = ("unet", "transformer")
COMPONENTS = (
    *NETWORK_FOLDERS,
    "vae",
    *(f"{name}{n}" for n in ("", "_2", "_3") for name in ("text_encoder", "tokenizer")),
    "scheduler",
)
ENCODER = "transformers"
PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
LEARNED_TIME = "timestep"
LEGACY_CLASSES = {
    "ada_norm_zero": "DiTTransformer2DModel",
    "ada_norm_single": "PixArtTransformer2DModel",
}
"""What a `Transformer2DModel` of an old repository is now, by its norm_type."""
_SIDE_FILES = (".json", ".safetensors", ".txt", ".model", ".jinja")
_NOT_READ = ("training.json", "source.json")
_TO_SAFETENSORS = (
    'python -c "import torch, safetensors.torch as s; s.save_file({k: v.contiguous() for k, v in '
    "torch.load('%s', weights_only=True, map_location='cpu').items()}, 'model.safetensors')\""
)


@dataclass(frozen=True)
class ModelFolder:
    """A model in diffusers' own layout: a pipeline's folder, or the folder of one network."""

    root: Path
    spec: BackboneSpec

    @classmethod
    def find(cls, spec: BackboneSpec, *, whole: bool = False) -> ModelFolder:
        """The local folder of `spec.model`, fetched from the hub if it is a hub id; with `whole`
        all that its model_index.json names, and not only what features need.

        Raises:
            WeightsError: if there is no such model, with the id and the revision that were tried.
        """
        if spec.model.endswith(PICKLES):
            raise WeightsError(
                f"model {spec.model!r} is a pickle, which may run code when it is read. Convert it "
                f"once, if you trust it: {_TO_SAFETENSORS % spec.model}\nthen put it into a folder "
                "with a config.json (backbones/adm.py says which for guided-diffusion)"
            )
        if spec.model.startswith(BUNDLED):
            root = bundle_folder(spec.model.removeprefix(BUNDLED))
        elif spec.model.startswith(("/", ".")) or Path(spec.model).is_dir():
            root = Path(spec.model)
        else:
            root = _fetch(spec, whole)
        folder = cls(root, spec)
        if not root.is_dir():
            raise WeightsError(f"model {spec.model!r}: no folder {root}")
        if not folder.network.joinpath("config.json").is_file():
            raise WeightsError(
                f"model {spec.model!r}: {root} is not in diffusers' layout, nor in transformers'; "
                "want config.json in it, or in its subfolder unet/ or transformer/"
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
        """diffusers' name of the denoiser's class, as it is today; `transformers` for a model of
        that library."""
        config = self.config(self.network)
        name = str(config.get("_class_name", ENCODER if "model_type" in config else None))
        if name == "Transformer2DModel":
            return LEGACY_CLASSES.get(str(config.get("norm_type")), name)
        return name

    def image_size(self) -> int:
        """Side in pixels that the model was made for, as far as its configuration says.

        Raises:
            SpecError: if it does not say.
        """
        bundled = bundled_image_size(self.root)
        if bundled is not None:
            return bundled
        config = self.config(self.network)
        size = config.get("sample_size", config.get("image_size"))
        if not isinstance(size, int):
            raise SpecError(
                f"model {self.spec.model!r} does not say for which size of images it is"
            )
        vae = self.component("vae")
        sides = {} if vae is None else self.config(vae)
        blocks = sides.get("block_out_channels", sides.get("encoder_block_out_channels"))
        return size * 2 ** (len(blocks) - 1) if isinstance(blocks, list) and blocks else size

    @property
    def config_only(self) -> str | None:
        """`bundled:NAME` if these are a bundle's configurations without weights, else None."""
        return f"{BUNDLED}{self.root.name}" if is_config_only(self.root) else None

    def check_weights(self) -> None:
        """Refuse pretrained weights of a configuration that comes without.

        Raises:
            WeightsError: saying where the weights are.
        """
        if self.spec.init == "pretrained" and is_config_only(self.root):
            hub = " or ".join(hub_ids(self.root)) or "not on the hub"
            raise WeightsError(
                f"model {self.spec.model!r} is a configuration without weights, for plans and for "
                f"`init: random`; the weights: {hub} (as backbone.model with a revision, or a "
                "local folder)"
            )

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
        if self.spec.dit_time_shift != 1:
            entries["dit_time_shift"] = str(self.spec.dit_time_shift)
        if self.spec.weights is not None:
            entries["weights"] = file_digest(self.spec.weights)
        for i, lora in enumerate(self.spec.lora):
            entries[f"lora {i}"] = f"{lora.scale!r} {file_digest(lora.path)}"
        return hashlib.sha256(canonical_json(dict(entries))).hexdigest()

    def whole_digest(self) -> str:
        """SHA-256 over every file that the whole pipeline reads: `digest`, model_index.json, and
        components that features do not need (a safety checker)."""
        entries = {"backbone": self.digest()}
        index = self.root / "model_index.json"
        if index.is_file():
            entries["model_index.json"] = _content_digest(index)
        for name in sorted(set(pipeline_components(self.root)) - set(COMPONENTS)):
            for file in sorted((self.root / name).glob("*")):
                is_weights = ".safetensors" in file.name
                if file.suffix in _SIDE_FILES and (not is_weights or self._is_used(file)):
                    entries[f"{name}/{file.name}"] = _content_digest(file)
        return hashlib.sha256(canonical_json(dict(entries))).hexdigest()

    def pipeline_name(self) -> str:
        """diffusers' name of the pipeline's class.

        Raises:
            WeightsError: there is none, so that nothing says how to sample from the model.
        """
        name = model_index(self.root).get("_class_name")
        if not isinstance(name, str):
            raise WeightsError(
                f"model {self.spec.model!r}: no model_index.json that names a pipeline of "
                "diffusers says how to sample from it; give the folder of a whole pipeline"
            )
        return name

    def class_names(self) -> dict[int, str]:
        """Names of classes, as a DiT's model_index.json has them."""
        names = model_index(self.root).get("id2label")
        return {int(n): str(name) for n, name in names.items()} if isinstance(names, dict) else {}

    def weight_files(self) -> list[Path]:
        """The safetensors of the network, of the variant asked for."""
        found = sorted(self.network.glob("*.safetensors"))
        return [file for file in found if self._is_used(file)]

    def _files(self) -> Iterator[Path]:
        folders = [self.root / name for name in COMPONENTS if (self.root / name).is_dir()]
        for folder in folders if self.network != self.root else [self.root, *folders]:
            names = {p for p in folder.iterdir() if p.suffix in _SIDE_FILES and p.is_file()}
            weights = {p for p in names if ".safetensors" in p.name}
            yield from sorted(names - weights - {self.root / n for n in _NOT_READ})
            yield from sorted(p for p in weights if self._is_used(p))

    def _is_used(self, file: Path) -> bool:
        """Whether a weights file is of the variant asked for (`name.fp16.safetensors`)."""
        variant = self.spec.variant
        stem = file.name.split(".safetensors")[0]
        if variant is not None:
            return f".{variant}" in stem
        return "." not in stem.split("-0")[0]


def model_index(root: Path) -> dict[str, object]:
    """model_index.json of a pipeline's folder; empty if there is none."""
    try:
        index = json.loads((root / "model_index.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return index if isinstance(index, dict) else {}


def pipeline_class(name: str) -> type[DiffusionPipeline]:
    """A pipeline class of diffusers.

    Raises:
        WeightsError: diffusers has none of that name.
    """
    import diffusers

    found = getattr(diffusers, name, None)
    if not isinstance(found, type) or not issubclass(found, diffusers.DiffusionPipeline):
        raise WeightsError(
            f"{name!r} is no pipeline of diffusers {diffusers.__version__}; code of other places "
            "is not run"
        )
    return found


def pipeline_components(root: Path) -> dict[str, tuple[str, str]]:
    """Components of a pipeline's folder, as its model_index.json names them: name -> (library,
    class). Empty if there is none, as in the folder of a single network."""
    return {
        name: (value[0], value[1])
        for name, value in model_index(root).items()
        if isinstance(value, list) and len(value) == 2 and None not in value and name[0] != "_"
    }


def _fetch(spec: BackboneSpec, whole: bool) -> Path:
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

    def download() -> Path:
        return Path(snapshot_download(spec.model, revision=spec.revision, allow_patterns=patterns))

    try:
        root = download()
        if (root / "config.json").is_file():  # one network: its weights lie beside it
            patterns.append("*.safetensors")
            root = download()
        others = set(pipeline_components(root)) - set(COMPONENTS) if whole else set()
        if others:
            patterns += [f"{name}/*{end}" for name in sorted(others) for end in _SIDE_FILES]
            root = download()
        return root
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


Model = ModelFolder | CustomModel
"""Where a backbone comes from: `spec`, `digest()` and `check_weights()` without reading weights."""


def find_model(spec: BackboneSpec, *, structure_only: bool = False) -> Model:
    """The folder of a model, or the Python code that makes it.

    With `structure_only` a hub id that is not at hand becomes its bundled configuration, and so
    does a folder that is not there but has a bundle's name (`./models/adm-256-uncond`).

    Raises:
        SpecError: for a hub id without a revision, or other weights for a model of Python code.
        WeightsError: if there is no such model.
    """
    if spec.model.startswith(PYTHON):
        if spec.lora:
            raise SpecError(f"backbone.lora: {spec.model!r} loads its weights itself")
        return CustomModel(spec)
    try:
        return ModelFolder.find(spec)
    except (SpecError, WeightsError):
        name = _bundle_instead(spec.model) if structure_only else None
        if name is None:
            raise
        return ModelFolder(bundle_folder(name), spec)


def _bundle_instead(model: str) -> str | None:
    """The bundled configuration of a hub id, or of a folder that is yet to be made."""
    path = Path(model)
    if model.startswith(("/", ".")) and not path.exists() and path.name in bundle_names():
        return path.name
    return bundle_of(model)


def load_backbone(model: Model, device: str | torch.device) -> Backbone:
    """The adapter of the model's family with weights on `device`; on "meta" structure only.

    Raises:
        WeightsError: for a class that no adapter knows, or files that do not load.
    """
    place = torch.device(device)
    if isinstance(model, CustomModel):
        return model.load(place)
    folder = model
    from drl_data.backbones.adm import GUIDED_DIFFUSION, load_guided_diffusion
    from drl_data.backbones.autoencoder import AutoencoderBackbone
    from drl_data.backbones.encoder import EncoderBackbone
    from drl_data.backbones.joint import FluxBackbone, SD3Backbone
    from drl_data.backbones.qwen_image import QwenImageBackbone
    from drl_data.backbones.transformer import DiTBackbone, PixArtBackbone, SanaBackbone
    from drl_data.backbones.unet import PixelUNetBackbone, load_latent_unet
    from drl_data.backbones.video import CogVideoXBackbone, WanBackbone
    from drl_data.backbones.z_image import ZImageBackbone

    families: dict[str, Callable[[ModelFolder, torch.device], Backbone]] = {
        "UNet2DModel": PixelUNetBackbone.load,
        "UNet2DConditionModel": load_latent_unet,
        "DiTTransformer2DModel": DiTBackbone.load,
        "PixArtTransformer2DModel": PixArtBackbone.load,
        "SD3Transformer2DModel": SD3Backbone.load,
        "FluxTransformer2DModel": FluxBackbone.load,
        "SanaTransformer2DModel": SanaBackbone.load,
        "WanTransformer3DModel": WanBackbone.load,
        "CogVideoXTransformer3DModel": CogVideoXBackbone.load,
        "ZImageTransformer2DModel": ZImageBackbone.load,
        "QwenImageTransformer2DModel": QwenImageBackbone.load,
        GUIDED_DIFFUSION: load_guided_diffusion,
        "AutoencoderKL": AutoencoderBackbone.load,
        "AutoencoderDC": AutoencoderBackbone.load,
        ENCODER: EncoderBackbone.load,
    }
    if folder.spec.dit_time_shift != 1 and folder.class_name != "DiTTransformer2DModel":
        raise SpecError(f"backbone.dit_time_shift: {folder.class_name} is no DiT; leave it out")
    if folder.class_name not in families:
        raise WeightsError(
            f"model {folder.spec.model!r} is a {folder.class_name}; families with an adapter: "
            f"{', '.join(families)}"
        )
    backbone = families[folder.class_name](folder, place)
    if place.type != "meta":
        apply_overrides(backbone.network, folder.spec)
    return backbone


def load_network(folder: ModelFolder, cls: type, device: torch.device) -> nn.Module:
    """The denoiser: pretrained, seeded random, or on meta; in the precision of the spec."""
    dtype = TORCH_DTYPES[folder.spec.dtype]
    if device.type != "meta" and folder.spec.init == "random":
        return placed(build_random(folder, folder.network, cls, dtype), device)
    if device.type == "meta":
        return build(cls, folder.config(folder.network), "meta", dtype)
    return placed(load_component(folder, folder.network, cls, dtype), device)


def build_random(folder: ModelFolder, path: Path, cls: type, dtype: torch.dtype) -> nn.Module:
    """A component with the weights that its constructor draws, from the seed of the spec."""
    with seeded(folder.spec.init_seed):
        return build(cls, folder.config(path), "cpu", dtype)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from `seed` inside; outside, nobody's change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def build(cls: type, config: dict[str, object], device: str, dtype: torch.dtype) -> nn.Module:
    """A diffusers model from its configuration; weights as its constructor makes them."""
    fields = {key: value for key, value in config.items() if not key.startswith("_")}
    with torch.device(device):
        network: nn.Module = cls.from_config(fields)  # type: ignore[attr-defined]
    return network if dtype == torch.float32 else nn.Module.to(network, dtype)


def load_component(
    folder: ModelFolder, path: Path, cls: type, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A pretrained component from its folder: safetensors only, no network access.

    Raises:
        WeightsError: if the files are missing or do not fit.
    """
    folder.check_weights()
    with weights_errors(folder, path):
        loaded: nn.Module = cls.from_pretrained(  # type: ignore[attr-defined]
            path,
            variant=folder.spec.variant,
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
        )
    return loaded


def placed(network: nn.Module, device: torch.device) -> nn.Module:
    """The module frozen and on its device; channels_last on a GPU, if its convolutions are flat."""
    network = network.eval().requires_grad_(False).to(device)
    if device.type == "cuda" and not any(p.ndim == 5 for p in network.parameters()):
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def load_schedule(folder: ModelFolder) -> Schedule:
    """The schedule of scheduler/scheduler_config.json, and the scheduler itself.

    Raises:
        WeightsError: if the folder has none.
    """
    from diffusers import CogVideoXDDIMScheduler, DDPMScheduler, EDMEulerScheduler

    path = _scheduler_folder(folder)
    if path is None:
        raise WeightsError(
            f"model {folder.spec.model!r}: no scheduler/ beside the network, so its noise schedule "
            "is unknown; give the folder of the whole pipeline"
        )
    config = _scheduler_config(folder, path)
    if config.get("_class_name") in FLOW:
        return load_flow_schedule(folder)
    with weights_errors(folder, path):
        if str(config.get("_class_name")).startswith("EDM"):
            edm = EDMEulerScheduler.from_config(config).config
            return EDMSchedule(edm.sigma_min, edm.sigma_max, edm.sigma_data, edm.rho)
        # The table of CogVideoX is moved towards noise (its snr_shift_scale), in float64.
        is_shifted = str(config.get("_class_name")).startswith("CogVideoX")
        scheduler_class = CogVideoXDDIMScheduler if is_shifted else DDPMScheduler
        scheduler = scheduler_class.from_pretrained(path, local_files_only=True)
    return NoiseSchedule(
        scheduler.alphas_cumprod.float(),
        prediction=scheduler.config.prediction_type,
        make_sampler=partial(DiffusersSampler.of, config),
        read_learned_time=partial(learned_time, folder),
    )


def load_flow_schedule(
    folder: ModelFolder,
    time_scale: float = 1000.0,
    shift: DynamicShift | None = None,
    *,
    counts_from_noise: bool = False,
) -> FlowSchedule:
    """The schedule of a flow model whose network is told `time_scale` * t, or 1 - t, whatever
    scheduler lies beside it; that one's steps can be counted, shifted as `shift` says if it shifts
    by size."""
    path = _scheduler_folder(folder)
    if path is None:
        return FlowSchedule(time_scale, counts_from_noise=counts_from_noise)
    config = _scheduler_config(folder, path)
    make_sampler = partial(DiffusersSampler.of, config, shift=shift)
    return FlowSchedule(time_scale, make_sampler, counts_from_noise)


def scheduler_config(folder: ModelFolder) -> dict[str, object]:
    """scheduler_config.json of a model.

    Raises:
        WeightsError: if the folder has none.
    """
    path = _scheduler_folder(folder)
    if path is None:
        raise WeightsError(
            f"model {folder.spec.model!r}: no scheduler/ beside the network; give the folder of "
            "the whole pipeline"
        )
    return _scheduler_config(folder, path)


def _scheduler_folder(folder: ModelFolder) -> Path | None:
    """scheduler/, or where google/ddpm-* have its configuration: beside the network."""
    if (folder.root / "scheduler_config.json").is_file():
        return folder.component("scheduler") or folder.root
    return folder.component("scheduler")


def _scheduler_config(folder: ModelFolder, path: Path) -> dict[str, object]:
    with weights_errors(folder, path):
        config: dict[str, object] = json.loads(
            (path / "scheduler_config.json").read_text(encoding="utf-8")
        )
    return config


def learned_time(folder: ModelFolder) -> float:
    """The one number called `timestep` among the network's weights (CleanDIFT's parameter).

    Raises:
        WeightsError: if the weights hold no such number.
    """
    for file in sorted(folder.network.glob("*.safetensors")):
        with weights_errors(folder, file), safe_open(file, framework="pt") as tensors:
            names = tensors.keys()
            if LEARNED_TIME in names:
                value: torch.Tensor = tensors.get_tensor(LEARNED_TIME)
                if value.numel() == 1:
                    return float(value)
    raise WeightsError(
        f"model {folder.spec.model!r}: schedule.convention learned needs a tensor of one number "
        f"called {LEARNED_TIME!r} in {folder.network}/*.safetensors; use ddpm_index with the "
        "number that the checkpoint was trained with"
    )


@contextlib.contextmanager
def weights_errors(folder: ModelFolder, path: Path) -> Iterator[None]:
    """What a library raises while it loads, as a WeightsError that names the folder."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise WeightsError(
            f"model {folder.spec.model!r}: {path} does not load as {folder.class_name}'s "
            f"component: {error}"
        ) from error
