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
from torch import Tensor

from drl_data.spec import NoiseSpec


def draw_normal(shape: Sequence[int], *parts: str | int) -> np.ndarray:
    """Standard normal numbers, float32 [*shape], a function of `parts` alone."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
    return generator.standard_normal(tuple(shape), dtype=np.float32)


def batch_noise(
    spec: NoiseSpec,
    keys: Sequence[str],
    shape: Sequence[int],
    *,
    member: int = 0,
    timestep: int | str | None = None,
    role: str = "noise",
) -> Tensor | None:
    """Noise for samples `keys`: float32 [len(keys), *shape] on the CPU, or None for `kind: none`.

    `timestep` matters only with `per_timestep`. `role` keeps independent uses apart (the noise of
    the diffusion, the draw from the VAE's posterior).
    """
    if spec.kind == "none":
        return None
    when = "all" if timestep is None or not spec.per_timestep else timestep
    if spec.kind == "shared":
        one = torch.from_numpy(draw_normal(shape, role, spec.seed, "shared", member, when))
        return one.expand(len(keys), *shape)
    out = np.empty((len(keys), *shape), dtype=np.float32)
    for i, key in enumerate(keys):
        out[i] = draw_normal(shape, role, spec.seed, "key", key, member, when)
    return torch.from_numpy(out)
