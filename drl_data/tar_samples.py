"""Samples of a tar as WebDataset defines them: consecutive members of one key; labels, captions.

The key is the name up to the first dot after the last slash, the rest in lower case is the
extension.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from pydantic import JsonValue

from drl_data.errors import redacted, visible
from drl_data.tar import GzipSource, Member, RangedSource, walk_files

log = logging.getLogger(__name__)

MAX_MEMBER_BYTES = 16 << 20
"""Larger members are not read for a label or a caption (SA-1B's JSON has a few MB)."""
MAX_TEXT_BYTES = 64 << 10
"""A longer label or caption is none: no text encoder takes a hundredth of it."""

_INT64 = range(-(2**63), 2**63)

# The webdataset library's own rules, so that both see the same samples.
_KEY_AND_EXTENSION = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_META = re.compile(r"__[^/]*__($|/)")


@dataclass(slots=True)
class Sample:
    """Consecutive members with one key."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)
    repeated: str | None = None


def read_samples(
    source: RangedSource | GzipSource, places: Iterable[str | None]
) -> Iterator[Sample]:
    """Every sample of a tar, with the members that `places` (`EXT` or `EXT:FIELD`) name as texts.

    Raises:
        InputError: a tar that is truncated or corrupt.
    """
    wanted = {place.partition(":")[0].lower() for place in places if place}
    sample: Sample | None = None
    for member in walk_files(source):
        match = _KEY_AND_EXTENSION.match(member.name)
        if match is None or _META.match(member.name):
            continue
        key, extension = match[1], match[2].lower()
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = Sample(key)
        if extension in sample.members:
            sample.repeated = extension
            continue
        sample.members[extension] = member
        if extension in wanted and not member.sparse and _readable(member, source):
            sample.texts[extension] = source.read(member.offset, member.size)
    if sample is not None:
        yield sample


def _readable(member: Member, source: RangedSource | GzipSource) -> bool:
    if member.size > MAX_MEMBER_BYTES:
        log.warning(
            "%s: %s has %d bytes, want at most %d; its sample is without label or caption",
            redacted(source.name), visible(member.name), member.size, MAX_MEMBER_BYTES,
        )  # fmt: skip
    return member.size <= MAX_MEMBER_BYTES


def field_of(texts: dict[str, bytes], place: str | None) -> JsonValue:
    """The text of a member (`EXT`) or a field of a JSON one (`EXT:FIELD`); None if unreadable."""
    extension, _, name = (place or "").partition(":")
    data = texts.get(extension.lower())
    if data is None:
        return None
    try:
        text = data.decode("utf-8")
        if not name:
            return text.strip()
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value.get(name) if isinstance(value, dict) else None


def label_text(value: JsonValue) -> str | None:
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else None
    if isinstance(value, bool):
        return str(value).lower()
    return _kept(str(value)) if isinstance(value, str | int) and value != "" else None


def caption_text(value: JsonValue) -> str | None:
    return _kept(value) if isinstance(value, str) else None


def _kept(text: str) -> str | None:
    """The text as the table can hold it; None if it is too long to be a label or a caption."""
    data = text.encode("utf-8", "backslashreplace")  # JSON may hold lone surrogates
    return data.decode("utf-8") if len(data) <= MAX_TEXT_BYTES else None


def resolve_labels(
    texts: Sequence[str | None],
) -> tuple[list[int | None], tuple[str, ...] | None]:
    """Integers if all labels are; otherwise positions in the sorted distinct strings."""
    present = {text for text in texts if text is not None}
    if all(re.fullmatch(r"[+-]?[0-9]{1,19}", t) and int(t) in _INT64 for t in present):
        return [None if t is None else int(t) for t in texts], None
    names = tuple(sorted(present))
    position = {name: i for i, name in enumerate(names)}
    return [None if t is None else position[t] for t in texts], names
