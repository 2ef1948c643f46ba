"""What every spec is made of: frozen values, shorthands of YAML, canonical JSON, digests.

Nothing here imports torch, zarr or ray.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
)

from drl_data.errors import SpecError

DType = Literal["float32", "float16", "bfloat16"]

StorageDType = Literal[DType, "float8_e4m3fn", "float8_e5m2", "int8", "uint8"]
"""Types that features are stored in; quantise.py and STORE.md say how."""

ITEMSIZE: Mapping[str, int] = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
    "uint8": 1,
}


class Spec(BaseModel):
    """A frozen value; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def as_tuple(value: object) -> object:
    """A single item where a list is meant: `tars: a.tar` reads as `tars: [a.tar]`."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


StrTuple = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]

Timestep = Annotated[int | float, AfterValidator(lambda t: int(t) if t == int(t) else t)]
"""A position on a noise schedule; 50.0 is 50, so that equal values have one fingerprint."""

Positive = Annotated[int, Field(ge=1)]

NonNegative = Annotated[int, Field(ge=0)]

SizePair = tuple[Positive, Positive]


def size_pair(value: object) -> object:
    """One number where (height, width) is meant."""
    return (value, value) if isinstance(value, int) else value


def canonical_json(value: JsonValue) -> bytes:
    """UTF-8 JSON with sorted keys and no white space: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def differences(mine: JsonValue, theirs: JsonValue) -> list[str]:
    """Lines `path: mine != theirs`, one for each leaf that differs; empty if equal."""
    a, b = dict(_leaves(mine)), dict(_leaves(theirs))
    return [
        f"{path}: {json.dumps(a.get(path))} != {json.dumps(b.get(path))}"
        for path in sorted(a.keys() | b.keys())
        if a.get(path) != b.get(path)
    ]


def _leaves(value: JsonValue, path: str = "") -> list[tuple[str, JsonValue]]:
    if isinstance(value, dict) and value:
        return [leaf for k in value for leaf in _leaves(value[k], f"{path}.{k}" if path else k)]
    if isinstance(value, list) and value:
        return [leaf for i, v in enumerate(value) for leaf in _leaves(v, f"{path}[{i}]")]
    return [(path, value)]


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal.

    Raises:
        SpecError: if there is no such file.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SpecError(f"{path}: {error.strerror}") from error
