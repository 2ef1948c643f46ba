"""Bodies of students: `AutoModel` and `AutoBackbone` of `transformers`, and modules of your own.

Shapes: b batch, c channel, h height, w width, n token.
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors
import safetensors.torch
import torch
from pydantic import JsonValue
from torch import Tensor, nn

from drl_data.distill_spec import StudentSpec
from drl_data.errors import SpecError
from drl_data.factories import PYTHON, load_factory
from drl_data.spec import ImageSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

WEIGHTS = "model.safetensors"

LAST = "last"
"""Name of the stage of a model that gives one map."""

SMALL_RESNET: dict[str, JsonValue] = {
    "embedding_size": 32,
    "hidden_sizes": [32, 64],
    "depths": [1, 1],
    "layer_type": "basic",
}
"""The student if the pipeline says nothing: a ResNet of some 90,000 weights, for small images."""


class Body(nn.Module):
    """Normalised pixels [b, c, h, w] to maps [b, c, h, w] by stage, the deepest last."""

    @abstractmethod
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """One map for each stage."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write weights and configuration; makes the folder."""


class HubModel(Body):
    """A model of `transformers`: an `AutoBackbone`, whose stages are those of its configuration, or
    an `AutoModel`."""

    def __init__(self, model: PreTrainedModel, stages: tuple[str, ...]) -> None:
        """`stages` are the names of the backbone's maps; none of an `AutoModel`."""
        super().__init__()
        self.model, self._stages = model, stages

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Tokens are laid out as the grid that they come from."""
        out = self.model(x)
        if self._stages:
            return dict(zip(self._stages, out.feature_maps, strict=True))
        features: Tensor = out.last_hidden_state
        if features.ndim == 4:
            return {LAST: features}
        # Tokens: the last square number of them is the grid, what comes before is no place.
        side = math.isqrt(features.shape[1])
        grid = features[:, -side * side :].transpose(1, 2)
        return {LAST: grid.reshape(*grid.shape[:2], side, side)}

    def save(self, folder: Path) -> None:
        """As `from_pretrained` of `transformers` reads it."""
        from transformers.utils import logging

        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            self.model.save_pretrained(folder)
        finally:
            if shown:
                logging.enable_progress_bar()


class OwnModel(Body):
    """A module that a pipeline's Python code makes."""

    def __init__(self, model: nn.Module, spec: StudentSpec) -> None:
        super().__init__()
        self.model, self._spec = model, spec

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Raises `SpecError` if the module gives anything but maps."""
        out = self.model(x)
        maps: dict[str, object] = dict(out) if isinstance(out, Mapping) else {LAST: out}
        found = {}
        for stage, value in maps.items():
            if not isinstance(value, Tensor) or value.ndim != 4 or len(value) != len(x):
                shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise SpecError(
                    f"distill.student {self._spec.model_type!r}: stage {stage!r} is {shape}; want "
                    f"maps [{len(x)}, c, h, w]"
                )
            found[stage] = value
        return found

    def save(self, folder: Path) -> None:
        """The state dict, and what the factory was called with."""
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_model(self.model, str(folder / WEIGHTS))
        about = {"factory": self._spec.model_type, "config": self._spec.config}
        (folder / "config.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


def build_body(spec: StudentSpec, images: ImageSpec, enlarge: int, seed: int) -> Body:
    """The body that a spec says, on the CPU, for pixels that were enlarged so many times.

    Raises:
        SpecError: there is no such model, not with this configuration, or not these weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if spec.model_type is not None and spec.model_type.startswith(PYTHON):
            return _own(spec, images)
        return _of_hub(spec, images, enlarge)


# --- your own -----------------------------------------------------------------------------------


def _own(spec: StudentSpec, images: ImageSpec) -> Body:
    assert spec.model_type is not None
    if spec.stages:
        raise SpecError(
            f"distill.student.stages {list(spec.stages)}: {spec.model_type!r} says itself which "
            "stages it gives; leave them out"
        )
    made = load_factory(spec.model_type, "distill.student.model_type")(images, dict(spec.config))
    if not isinstance(made, nn.Module):
        raise SpecError(
            f"distill.student.model_type {spec.model_type!r} gave a {type(made).__name__}; want a "
            "torch.nn.Module"
        )
    if spec.weights is not None:
        path = _weights_file(spec.weights)
        try:
            safetensors.torch.load_model(made, str(path))
        except (RuntimeError, safetensors.SafetensorError) as error:
            raise SpecError(
                f"distill.student.weights {path}: not those of {spec.model_type!r}: "
                f"{_first_lines(error)}"
            ) from error
    return OwnModel(made, spec)


# --- of transformers ----------------------------------------------------------------------------


def _of_hub(spec: StudentSpec, images: ImageSpec, enlarge: int) -> Body:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoBackbone, AutoModel

    auto = AutoBackbone if spec.stages else AutoModel
    try:
        config = _config(spec, images, enlarge)
        model: PreTrainedModel = auto.from_config(config)
    except (ValueError, TypeError, KeyError, OSError, StrictDataclassError) as error:
        raise SpecError(
            f"distill.student: transformers cannot build {spec.model_type or 'it'!r} as "
            f"{auto.__name__} from {spec.weights or spec.config}: {_first_lines(error)}"
        ) from error
    if spec.weights is not None:
        model = _with_weights(model, config, spec.weights)
    return HubModel(model, tuple(model.out_features) if spec.stages else ())


def _config(spec: StudentSpec, images: ImageSpec, enlarge: int) -> PreTrainedConfig:
    from transformers import AutoConfig

    chosen: dict[str, JsonValue] = {}
    if spec.stages:
        by_name = isinstance(spec.stages[0], str)
        chosen["out_features" if by_name else "out_indices"] = list(spec.stages)
    if spec.weights is None:
        kind = spec.model_type or "resnet"
        config: dict[str, JsonValue] = {
            "num_channels": images.n_channels,
            "image_size": [side * enlarge for side in images.size],
        }
        if kind == "resnet" and not spec.config:
            config.update(SMALL_RESNET)
        return AutoConfig.for_model(kind, **{**config, **spec.config, **chosen})
    if spec.config:
        raise SpecError(
            f"distill.student.config {spec.config}: {spec.weights} brings its own; leave it out"
        )
    found = AutoConfig.from_pretrained(
        spec.weights, local_files_only=True, trust_remote_code=False, **chosen
    )
    if spec.model_type not in (None, found.model_type):
        raise SpecError(
            f"distill.student.model_type {spec.model_type!r}: {spec.weights} is a "
            f"{found.model_type!r}"
        )
    if found.num_channels != images.n_channels:
        raise SpecError(
            f"distill.student.weights {spec.weights} takes {found.num_channels} channels, "
            f"images.mode {images.mode!r} gives {images.n_channels}"
        )
    return found


def _with_weights(model: PreTrainedModel, config: PreTrainedConfig, folder: str) -> PreTrainedModel:
    """The same model with a folder's weights; only a pooler, which nothing uses, may lack."""
    _weights_file(folder)
    # By the model's own class: AutoBackbone asks the hub for a folder's name first.
    loaded, info = type(model).from_pretrained(
        folder,
        config=config,
        local_files_only=True,
        use_safetensors=True,
        dtype=torch.float32,
        output_loading_info=True,
    )
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler"))
    if missing or info["mismatched_keys"]:
        raise SpecError(
            f"distill.student.weights {folder}: not those of {type(model).__name__}; "
            f"{len(missing)} tensors lack ({', '.join(missing[:3])}), "
            f"{len(info['mismatched_keys'])} have other shapes"
        )
    result: PreTrainedModel = loaded
    return result


def _weights_file(folder: str) -> Path:
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise SpecError(
            f"distill.student.weights {folder}: no {WEIGHTS} in it (other formats are not read)"
        )
    return path


def _first_lines(error: Exception) -> str:
    return " ".join(line for line in str(error).splitlines() if line)[:300]
