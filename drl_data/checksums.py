"""JSON that carries its own CRC-32C, so that a flipped bit anywhere in it is found."""

from __future__ import annotations

import json
from collections.abc import Mapping

from pydantic import JsonValue

from drl_data.objects import Buffer
from drl_data.shards import crc32c
from drl_data.spec_base import canonical_json

KEY = "crc32c"


def signed_json(value: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """The value with the key `crc32c`: the checksum of its canonical JSON without that key."""
    return {**value, KEY: crc32c([canonical_json(dict(value))])}


def checked_json(value: JsonValue) -> dict[str, JsonValue]:
    """The value without its checksum.

    Raises:
        ValueError: it is no object, or its checksum is not that of what it holds.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{type(value).__name__}, want an object")
    rest = {key: item for key, item in value.items() if key != KEY}
    found = crc32c([canonical_json(rest)])
    if KEY in value and value[KEY] != found:
        raise ValueError(f"its crc32c is {found}, it says {value[KEY]}: damaged, or edited by hand")
    return rest


def parse_json(data: Buffer) -> JsonValue:
    """The value of canonical JSON.

    Raises:
        ValueError: it is no JSON, or written in another way than ours.
    """
    text = bytes(data)
    try:
        value: JsonValue = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if canonical_json(value) != text:
        raise ValueError("not canonical JSON: damaged, or edited by hand")
    return value
