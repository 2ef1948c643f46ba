"""Noise from a file: the tensors that somebody published or drew elsewhere, bit for bit.

A bank is one tensor [n, c, h, w], in a `.npy` file, alone in a `.safetensors` file, or saved by
`torch.save` in a `.pt` or `.pth` file, of which only tensors are read (`weights_only`). float16 and
bfloat16 become float32 without loss, float64 is rounded to it.

A bank is known by its numbers: neither its place nor its format enters a store's fingerprint.
"""

from __future__ import annotations

import hashlib
import io
import pickle

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from drl_data.diffusion_spec import NoiseSpec
from drl_data.errors import ObjectError, SpecError
from drl_data.objects import Buffer, open_parent

SUFFIXES = (".npy", ".safetensors", ".pt", ".pth")


def read_bank(url: str) -> Tensor:
    """The tensor [n, c, h, w] of a bank's file at a path or URL: float32, finite.

    Raises:
        SpecError: if there is no such file, or it does not hold one such tensor.
    """
    suffix = next((end for end in SUFFIXES if url.endswith(end)), None)
    if suffix is None:
        raise SpecError(f"noise.file {url!r}: want a name that ends in {', '.join(SUFFIXES)}")
    try:
        folder, name = open_parent(url)
        found = _parsed(folder.get(name), suffix)
    except ObjectError as error:
        raise SpecError(f"noise.file {url!r}: {error}") from error
    except (
        ValueError, TypeError, EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError
    ) as error:  # fmt: skip
        reason = str(error).strip().split("\n")[0]
        raise SpecError(
            f"noise.file {url!r}: does not read as {suffix}: {reason}; want one tensor [n, c, h, w]"
        ) from error
    if not isinstance(found, Tensor) or found.ndim != 4 or not found.is_floating_point():
        got = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found)
        raise SpecError(f"noise.file {url!r}: holds {got}; want one tensor of floats [n, c, h, w]")
    bank = found.float().contiguous()
    if not bool(bank.isfinite().all()):
        raise SpecError(f"noise.file {url!r}: holds numbers that are not finite")
    return bank


def _parsed(data: Buffer, suffix: str) -> object:
    if suffix == ".npy":
        return torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False))
    if suffix == ".safetensors":
        tensors = list(load(bytes(data)).values())
        return tensors[0] if len(tensors) == 1 else tensors
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def bank_digest(bank: Tensor) -> str:
    """`sha256:` and the digest of a bank's shape and numbers (float32, little-endian)."""
    digest = hashlib.sha256(f"{list(bank.shape)}".encode())
    digest.update(bank.numpy().astype("<f4", copy=False).tobytes())
    return f"sha256:{digest.hexdigest()}"


def by_content(spec: NoiseSpec, bank: Tensor | None) -> NoiseSpec:
    """The spec with the digest of its file's numbers in place of the file's name."""
    return spec if bank is None else spec.model_copy(update={"file": bank_digest(bank)})
