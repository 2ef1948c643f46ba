"""A pipeline on a tiny random model of its own family and on a few real photographs: `drl try`.

Whoever writes a pipeline file sees in seconds, on any machine and offline, whether its taps,
times, noise, condition and reductions go together, and in which shapes features come.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from drl_data.errors import SpecError
from drl_data.spec import Pipeline, TinySpec
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
    if not model.startswith("python:"):
        model = str(save_tiny(model, folder / "model", **tiny.network))
    frames = tiny.images.get("frames", pipeline.images.frames)
    write_photo_tars(
        folder / "photos",
        n_samples=n_samples,
        n_tars=2,
        size=PHOTO_SIZE,
        frames=frames if isinstance(frames, int) else 1,
    )
    backbone = {"model": model, "revision": None, "variant": None, "dtype": "float32"}
    changed = merged(
        pipeline.model_dump(exclude_unset=True, exclude={"tiny"}),
        {
            **{name: getattr(tiny, name) for name in TinySpec.SECTIONS},
            "backbone": {**backbone, **tiny.backbone},
            "features": {"batch_size": 4, "rows_per_unit": 4, **tiny.features},
            "store": {"url": str(folder / "features.zarr")},
            "run": {"executor": "local"},
            "results": str(folder / "results"),
        },
    )
    taps = [
        {**tap.model_dump(exclude_unset=True), "path": tiny.taps.get(tap.path, tap.path)}
        for tap in pipeline.taps
    ]
    dataset = {
        **pipeline.dataset.model_dump(exclude_unset=True),
        "tars": {"all": str(folder / "photos" / "*.tar")},
    }
    return Pipeline.parse(
        {**changed, "taps": taps, "dataset": dataset},
        f"pipeline {pipeline.name!r} with its section `tiny`",
    )


def merged(whole: Mapping[str, object], change: Mapping[str, object]) -> dict[str, object]:
    """`change` over `whole`, mapping by mapping."""
    both = dict(whole)
    for key, value in change.items():
        old = both.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = merged(old, value)
        both[key] = value
    return both
