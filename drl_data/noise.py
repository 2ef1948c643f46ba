"""Per-sample noise: the only place that draws random numbers for features.

Each draw is seeded by a stable digest of (role, seed, key, member, timestep), so that it does not
depend on position, batch, worker, device or Python's `hash`. Numbers come from NumPy's Philox
counter-based generator (Salmon et al. 2011) on the CPU, whatever the device of the backbone.

Noise that is the same for all samples may instead be rows of a table [n, c, h, w]: of a file
(noise_bank.py), or of torch's CPU generator, which published code draws from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from drl_data.diffusion_spec import NoiseSpec
from drl_data.errors import SpecError


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


def native_shape(spec: NoiseSpec, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of `shared` noise and of a bank's rows before they are interpolated to `shape`."""
    side = spec.shared_base
    return tuple(shape) if side is None else (*shape[:-2], side, side)


def noise_table(
    spec: NoiseSpec, shape: Sequence[int], n_timesteps: int, from_file: Tensor | None = None
) -> Tensor | None:
    """The rows that `batch_noise` takes for samples [c, h, w], float32 [n, *native_shape]; or None.

    Member m at the timestep in place t has the row t * members + m, or m where one draw serves all
    timesteps. A file may have more rows than are used; torch's generator draws as many as are:
    `torch.randn((n, c, h, w), generator=torch.Generator("cpu").manual_seed(seed))`.

    Raises:
        SpecError: if a file's rows are too few or of another shape.
    """
    if not spec.is_table:
        return None
    n_rows = spec.members * (1 if spec.moves else n_timesteps)
    native = native_shape(spec, shape)
    if spec.file is None:
        generator = torch.Generator("cpu").manual_seed(spec.seed)
        return torch.randn((n_rows, *native), generator=generator)
    if from_file is None:
        raise SpecError(f"noise.file {spec.file}: the spec names a file that was not given")
    if len(from_file) < n_rows or from_file.shape[1:] != native:
        raise SpecError(
            f"noise.file {spec.file}: holds {list(from_file.shape)}, want at least {n_rows} rows "
            f"(timesteps x members) of {list(native)}"
        )
    return from_file[:n_rows]


def batch_noise(
    spec: NoiseSpec,
    keys: Sequence[str],
    shape: Sequence[int],
    *,
    member: int = 0,
    timestep: float | None = None,
    role: str = "noise",
    table: Tensor | None = None,
    place: int = 0,
) -> Tensor | None:
    """Noise for samples `keys`: float32 [len(keys), *noise_shape(spec, shape)] on the CPU.

    None for the kinds that draw nothing: `none` and `inversion`. `timestep` matters only where
    one draw does not move along the schedule. `role` keeps independent uses apart (the noise of
    the diffusion, the draw from the VAE's posterior). A spec whose noise is rows of a table takes
    them from `table` (`noise_table`), those of the timestep in place `place`.
    """
    if spec.kind in ("none", "inversion"):
        return None
    when: str | int | float = "all"
    if timestep is not None and not spec.moves:
        when = int(timestep) if timestep == int(timestep) else timestep
    shape = noise_shape(spec, shape)
    if spec.kind in ("shared", "bank"):
        if spec.is_table:
            assert table is not None, "noise_table makes it"
            one = table[(0 if spec.moves else place) * spec.members + member]
        else:
            parts = (role, spec.seed, spec.kind, member, when)
            one = torch.from_numpy(draw_normal(native_shape(spec, shape), *parts))
        return _interpolated(one, shape).expand(len(keys), *shape)
    draw = draw_normal if spec.kind == "per_sample" else draw_uniform
    out = np.empty((len(keys), *shape), dtype=np.float32)
    for i, key in enumerate(keys):
        out[i] = draw(shape, role, spec.seed, "key", key, member, when)
    return torch.from_numpy(out)


def _interpolated(one: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The noise of all samples [c, h, w] or [c, f, h, w], each plane from a base size as ODISE
    does."""
    if one.shape == shape:
        return one
    planes = one.reshape(1, -1, *one.shape[-2:])
    enlarged = F.interpolate(planes, size=shape[-2:], mode="bicubic", align_corners=False)
    return enlarged.reshape(shape)
