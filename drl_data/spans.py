"""Neighbouring pieces of files, fetched at once: one request costs about as much as a megabyte."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

MAX_SPAN_BYTES = 64 << 20
"""Largest range that is fetched at once, unless one piece is larger."""
MAX_GAP_BYTES = 1 << 20
"""Bytes between two pieces that are fetched with them; a request costs about as much."""


@dataclass(frozen=True, slots=True)
class SpanPlace:
    """Where the bytes of a row lie in their file."""

    row: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring pieces of one file, fetched at once."""

    tar: int
    places: list[SpanPlace]

    @property
    def start(self) -> int:
        return self.places[0].offset

    @property
    def stop(self) -> int:
        return self.places[-1].offset + self.places[-1].size


def cut_spans(
    places: Iterable[tuple[int, SpanPlace]], max_bytes: int, apart: Collection[int] = ()
) -> Iterator[Span]:
    """Runs of pieces in one file with small gaps, each within `max_bytes` or a single piece; none
    reaches over the rows `apart`."""
    span: Span | None = None
    for tar, place in places:
        if (
            span is None
            or span.tar != tar
            or place.offset - span.stop > MAX_GAP_BYTES
            or place.offset + place.size - span.start > max_bytes
            or any(span.places[-1].row < row < place.row for row in apart)
        ):
            if span is not None:
                yield span
            span = Span(tar, [])
        span.places.append(place)
    if span is not None:
        yield span
