"""A pipeline on a tiny random model of its own family and on a few real photographs: `drl try`.

Whoever writes a pipeline file sees in seconds, on any machine and offline, whether its taps,
times, noise, condition and reductions go together, and in which shapes features come.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from drl_data.backbones import find_model, load_backbone
from drl_data.backbones.latent import LatentTextBackbone
from drl_data.backbones.text import MASK
from drl_data.errors import SpecError
from drl_data.noise import draw_normal
from drl_data.pipeline import Pipeline, TinySpec
from drl_data.spec import BackboneSpec
from drl_data.testing import write_photo_tars
from drl_data.tiny_models import save_tiny

N_SAMPLES = 6
PHOTO_SIZE = 72
"""Side of the photographs in pixels; not a power of two, so that they are resized."""


def rehearsal(pipeline: Pipeline, folder: Path, *, n_samples: int = N_SAMPLES) -> Pipeline:
    """The pipeline as its section `tiny` has it, everything under `folder`, which must be empty.

    Raises:
        SpecError: if it has no such section, or what comes of it is no valid pipeline.
    """
    tiny = pipeline.tiny
    if tiny is None:
        raise SpecError(
            f"pipeline {pipeline.name!r} has no `tiny:`; add one that names the family of its "
            "model, for example `tiny: {model: stable_diffusion, images: {size: 64}}`"
        )
    model = tiny.model
    backbone: dict[str, object] = {"revision": None, "variant": None, "dtype": "float32"}
    if model.startswith("python:"):
        backbone["weights"] = None  # those of the real one
    else:
        model = str(save_tiny(tiny.model, folder / "model", vae=tiny.vae, **tiny.network))
        if pipeline.backbone is not None and pipeline.backbone.weights is not None:
            backbone["weights"] = str(_other_weights(tiny, folder / "weights"))
    condition: dict[str, object] = {}
    if pipeline.condition.prompt_embeddings is not None:
        condition["prompt_embeddings"] = str(_embeddings(model, folder / "embeddings.safetensors"))
    frames = tiny.images.get("frames", pipeline.image_spec.frames)
    write_photo_tars(
        folder / "photos",
        n_samples=n_samples,
        n_tars=2,
        size=PHOTO_SIZE,
        frames=frames if isinstance(frames, int) else 1,
    )
    changed = merged(
        pipeline.model_dump(exclude_unset=True, exclude={"tiny"}),
        {
            **{name: getattr(tiny, name) for name in TinySpec.SECTIONS},
            "backbone": {"model": model, **backbone, **tiny.backbone},
            "condition": {**condition, **tiny.condition},
            "features": {"batch_size": 4, "rows_per_unit": 4, **tiny.features},
            "store": {"url": str(folder / "features.zarr")},
            "run": {"executor": "local"},
            "results": str(folder / "results"),
        },
    )
    taps = [
        {
            **tap.model_dump(exclude_unset=True),
            **tiny.taps.get(tap.path, tap).model_dump(exclude_unset=True),
        }
        for tap in pipeline.taps
    ]
    dataset = {
        **pipeline.dataset.model_dump(exclude_unset=True, exclude={"labels"}),
        "tars": {"all": str(folder / "photos" / "*.tar")},
    }
    return Pipeline.parse(
        {**changed, "taps": taps, "dataset": dataset},
        f"pipeline {pipeline.name!r} with its section `tiny`",
    )


def _other_weights(tiny: TinySpec, folder: Path) -> Path:
    """The denoiser's weights of the same tiny model from another seed."""
    save_tiny(tiny.model, folder, vae=tiny.vae, **{"seed": 1, **tiny.network})
    found = [
        file
        for place in ("unet", "transformer", ".")
        for file in sorted((folder / place).glob("*.safetensors"))
    ]
    if not found:
        raise SpecError(f"tiny model {tiny.model!r} has no weights that others could replace")
    return found[0]


def _embeddings(model: str, file: Path, *, n_tokens: int = 7) -> Path:
    """Random numbers in place of the prompt embeddings of a text backbone, as many as it takes."""
    backbone = load_backbone(find_model(BackboneSpec(model=model)), "meta")
    if not isinstance(backbone, LatentTextBackbone):
        raise SpecError("condition.prompt_embeddings: the tiny model takes no text")
    save_file(
        {
            name: torch.from_numpy(draw_normal(shape, "rehearsal", name))
            for name, shape in backbone.text_shapes(n_tokens).items()
            if name != MASK  # without one nothing is hidden
        },
        file,
    )
    return file


def merged(whole: Mapping[str, object], change: Mapping[str, object]) -> dict[str, object]:
    """`change` over `whole`, mapping by mapping."""
    both = dict(whole)
    for key, value in change.items():
        old = both.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = merged(old, value)
        both[key] = value
    return both
