"""Per-sample noise: the only place that draws random numbers for features.

Each draw is seeded by a stable digest of (role, seed, key, member, timestep), so that it does not
depend on position, batch, worker, device or Python's `hash`. Numbers come from NumPy's Philox
counter-based generator (Salmon et al. 2011) on the CPU, whatever the device of the backbone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from drl_data.errors import SpecError
from drl_data.spec import NoiseSpec


def draw_normal(shape: Sequence[int], *parts: str | int | float) -> np.ndarray:
    """Standard normal numbers, float32 [*shape], a function of `parts` alone."""
    return _generator(*parts).standard_normal(tuple(shape), dtype=np.float32)


def draw_uniform(shape: Sequence[int], *parts: str | int | float) -> np.ndarray:
    """Numbers from [0, 1), float32 [*shape], a function of `parts` alone."""
    return _generator(*parts).random(tuple(shape), dtype=np.float32)


def _generator(*parts: str | int | float) -> np.random.Generator:
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def noise_shape(spec: NoiseSpec, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of the numbers that corrupt one sample [c, h, w] or [c, f, h, w]: its own, or one for
    each patch.

    Raises:
        SpecError: if patches do not tile the sample.
    """
    if spec.kind != "patch_mask":
        return tuple(shape)
    if any(side % spec.patch for side in shape[-2:]):
        raise SpecError(
            f"noise.patch {spec.patch}: squares of that side do not tile {shape[-2]}x{shape[-1]}"
        )
    return (1, *shape[1:-2], shape[-2] // spec.patch, shape[-1] // spec.patch)


def batch_noise(
    spec: NoiseSpec,
    keys: Sequence[str],
    shape: Sequence[int],
    *,
    member: int = 0,
    timestep: float | None = None,
    role: str = "noise",
) -> Tensor | None:
    """Noise for samples `keys`: float32 [len(keys), *noise_shape(spec, shape)] on the CPU.

    None for the kinds that draw nothing: `none` and `inversion`. `timestep` matters only where
    one draw does not move along the schedule. `role` keeps independent uses apart (the noise of
    the diffusion, the draw from the VAE's posterior).
    """
    if spec.kind in ("none", "inversion"):
        return None
    when: str | int | float = "all"
    if timestep is not None and not spec.moves:
        when = int(timestep) if timestep == int(timestep) else timestep
    shape = noise_shape(spec, shape)
    if spec.kind in ("shared", "bank"):
        return _shared(spec, shape, role, member, when).expand(len(keys), *shape)
    draw = draw_normal if spec.kind == "per_sample" else draw_uniform
    out = np.empty((len(keys), *shape), dtype=np.float32)
    for i, key in enumerate(keys):
        out[i] = draw(shape, role, spec.seed, "key", key, member, when)
    return torch.from_numpy(out)


def _shared(
    spec: NoiseSpec, shape: tuple[int, ...], role: str, member: int, when: str | int | float
) -> Tensor:
    """The one draw of all samples [c, h, w] or [c, f, h, w]; each plane interpolated as ODISE does
    if it has a base size."""
    side = spec.shared_base
    native = shape if side is None else (*shape[:-2], side, side)
    one = torch.from_numpy(draw_normal(native, role, spec.seed, spec.kind, member, when))
    if native == shape:
        return one
    planes = one.reshape(1, -1, *one.shape[-2:])
    enlarged = F.interpolate(planes, size=shape[-2:], mode="bicubic", align_corners=False)
    return enlarged.reshape(shape)
