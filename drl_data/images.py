"""Rows of one unit to pixels: ranged reads, decode in threads, validity (decode.py: one image).

`read_batches` fetches a unit's bytes in a few large ranges (one for each run of neighbouring images
in a tar), decodes in threads, and stays within a budget of bytes. Pixels depend on neither.

Shape suffixes: h height, w width, c channel, f frame, b row of a batch; pixels are uint8 [c, h, w],
of a window of a video [c, f, h, w].
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from drl_data.decode import decode_image, decode_views, displayed_size
from drl_data.errors import ImageError, InputError, ObjectNotFoundError, is_redacted
from drl_data.index import SampleIndex, TarInfo
from drl_data.objects import Buffer, Folder, RetryCount, counted, open_parent
from drl_data.plan import InvalidRow, Unit
from drl_data.spans import MAX_SPAN_BYTES, Span, SpanPlace, cut_spans
from drl_data.spec import ImageSpec
from drl_data.tar import GzipSource

_N_READERS = 4


@dataclass
class ImageBatch:
    """Consecutive rows of one unit, decoded.

    `pixels` is uint8 [batch_size, *spec.shape], or [batch_size, view, *spec.shape] if `has_views`;
    invalid rows, and rows past `n_rows`, are zeros.
    `read_s` and `decode_s` are seconds summed over threads.
    """

    start: int
    n_rows: int
    pixels: np.ndarray
    keys: list[str]
    invalid: list[InvalidRow]
    n_bytes: int
    """Bytes of the images of this batch, compressed."""
    read_s: float
    decode_s: float
    has_views: bool = False

    def of_view(self, view: int) -> np.ndarray:
        """Pixels [batch_size, *spec.shape] of one view; without the axis, of the only one."""
        return self.pixels[:, view] if self.has_views else self.pixels


def read_batches(
    unit: Unit,
    index: SampleIndex,
    spec: ImageSpec,
    *,
    batch_size: int,
    n_threads: int,
    prefetch_bytes: int,
    views: bool = False,
    retries: RetryCount | None = None,
    rows: npt.NDArray[np.bool_] | None = None,
    skip: Mapping[int, ImageError] | None = None,
) -> Generator[ImageBatch]:
    """The unit's rows in order, `batch_size` at a time, decoded ahead in `n_threads` threads.

    With `views` the images come in the views of the spec, if it has any; else as they are.

    `prefetch_bytes` bounds what is fetched and decoded ahead of the consumer; what the next batch
    needs is always fetched, but large images of it one after the other. Closing the generator ends
    its threads. A gzip tar is inflated from its beginning for each unit. `retries` counts the
    requests that were made again.

    With `rows` [unit.n_rows] only these are read, and batches without any of them are left out; the
    other rows are zeros, and not listed. Rows in `skip` are listed as invalid with the error given,
    and neither fetched (but with the rest of a gzip tar) nor decoded.

    Raises:
        InputError: if a tar is gone or has changed since it was indexed, before the first batch or
            after the last one.
        ObjectError: if a read fails.
    """
    if not views:
        spec = spec.model_copy(update={"views": ()})
    chosen = np.ones(unit.n_rows, np.bool_) if rows is None else rows
    reader = _UnitReader(
        unit,
        index,
        spec,
        batch_size,
        n_threads,
        prefetch_bytes,
        retries or RetryCount(),
        chosen,
        dict(skip or {}),
    )
    try:
        reader.check_tars()
        for at in range(0, unit.n_rows, batch_size):
            if chosen[at : at + batch_size].any():
                yield reader.batch(unit.start + at)
        reader.check_tars()
    finally:
        reader.close()


@dataclass(slots=True)
class _InFlight:
    """A span that was asked for: bytes as fetched, until they are decoded, and as pixels."""

    span: Span
    n_compressed: int
    n_pixels: int


@dataclass(frozen=True, slots=True)
class _Decoded:
    n_bytes: int
    read_s: float
    decode_s: float
    error: ImageError | None
    again: Callable[[], _Decoded] | None = None
    """Decodes once more, where memory did not suffice."""


class _UnitReader:
    """Threads that fetch and decode ahead of the rows that are asked for."""

    def __init__(
        self,
        unit: Unit,
        index: SampleIndex,
        spec: ImageSpec,
        batch_size: int,
        n_threads: int,
        prefetch_bytes: int,
        retries: RetryCount,
        chosen: npt.NDArray[np.bool_],
        skip: Mapping[int, ImageError],
    ) -> None:
        self._unit, self._spec, self._batch_size = unit, spec, batch_size
        self._chosen = chosen
        axis = [spec.n_views] if spec.views else []
        self._row_shape = (*axis, *spec.shape)
        rows = index.slice(unit.start, unit.stop)
        self._keys: list[str] = rows.column("key").to_pylist()
        self._reasons: list[str | None] = rows.column("reason").to_pylist()
        tars = rows.column("tar").to_pylist()
        sizes: list[int] = rows.column("size").to_pylist()
        too_large = {
            unit.start + i: ImageError(
                "read", f"{size} bytes, want at most {spec.max_bytes} (images.max_bytes)"
            )
            for i, size in enumerate(sizes)
            if size > spec.max_bytes
        }
        self._skip = {**too_large, **skip}
        places = [
            (tar, SpanPlace(unit.start + i, offset, size))
            for i, (tar, offset, size) in enumerate(
                zip(tars, rows.column("offset").to_pylist(), sizes, strict=True)
            )
            if chosen[i] and self._reasons[i] is None and unit.start + i not in self._skip
        ]
        cuts = cut_spans(places, min(MAX_SPAN_BYTES, prefetch_bytes // 4), self._skip)
        self._spans = deque(cuts)
        read_from = sorted({tar for tar, is_read in zip(tars, chosen, strict=True) if is_read})
        self._tars = {tar: _OpenTar(index.tars[tar], retries) for tar in read_from}
        self._budget, self._in_flight = prefetch_bytes, 0
        self._flying: deque[_InFlight] = deque()
        self._pixels: dict[int, np.ndarray] = {}
        self._decoded: dict[int, Future[_Decoded]] = {}
        self._readers = ThreadPoolExecutor(_N_READERS, thread_name_prefix="drl-read")
        self._decoders = ThreadPoolExecutor(n_threads, thread_name_prefix="drl-decode")

    def check_tars(self) -> None:
        """Compare every tar of the unit with what was indexed."""
        list(self._readers.map(_OpenTar.check, self._tars.values()))

    def close(self) -> None:
        """Drop what is queued and wait for what is running."""
        self._decoders.shutdown(wait=False, cancel_futures=True)
        self._readers.shutdown(cancel_futures=True)
        self._decoders.shutdown()

    def batch(self, start: int) -> ImageBatch:
        """The batch that begins at row `start`; batches are asked for in order."""
        stop = min(start + self._batch_size, self._unit.stop)
        self._fetch_ahead(stop)
        keys = self._keys[start - self._unit.start : stop - self._unit.start]
        batch = ImageBatch(
            start, stop - start, self._batch_pixels(start), keys, [], 0, 0.0, 0.0,
            has_views=bool(self._spec.views),
        )  # fmt: skip
        for row in range(start, stop):
            key, reason = keys[row - start], self._reasons[row - self._unit.start]
            if not self._chosen[row - self._unit.start]:
                continue
            if reason is not None:
                batch.invalid.append(InvalidRow(row, key, "index", reason))
                continue
            if row in self._skip:
                error = self._skip[row]
                batch.invalid.append(InvalidRow(row, key, error.stage, error.reason))
                continue
            done = self._decoded.pop(row).result()
            if done.again is not None:  # memory may suffice for it alone
                wait(self._decoded.values())
                done = done.again()
            batch.n_bytes += done.n_bytes
            batch.read_s += done.read_s
            batch.decode_s += done.decode_s
            if done.error is not None:
                batch.invalid.append(InvalidRow(row, key, done.error.stage, done.error.reason))
        del self._pixels[start]
        while self._flying and self._flying[0].span.places[-1].row < stop:
            done_with = self._flying.popleft()
            self._in_flight -= done_with.n_compressed + done_with.n_pixels
        return batch

    def _fetch_ahead(self, stop: int) -> None:
        """Start on everything that rows up to `stop` need, and on more while the budget lasts."""
        bytes_per_row = math.prod(self._row_shape)
        while self._spans:
            span = self._spans[0]
            new = _InFlight(span, span.stop - span.start, bytes_per_row * len(span.places))
            cost = new.n_compressed + new.n_pixels
            if span.places[0].row < stop:
                self._make_room(cost)
            elif self._in_flight + cost > self._budget:
                return
            self._spans.popleft()
            self._in_flight += cost
            self._flying.append(new)
            read = self._tars[span.tar].submit(self._readers, span)
            for i, place in enumerate(span.places):
                behind = (place.row - self._unit.start) % self._batch_size
                out = self._batch_pixels(place.row - behind)[behind]
                key = self._keys[place.row - self._unit.start]
                self._decoded[place.row] = self._decoders.submit(
                    _decode_into, out, read, i, self._spec, key
                )

    def _make_room(self, cost: int) -> None:
        """Wait for images in flight to be decoded, oldest first, until `cost` fits the budget or
        only pixels are left: large members of one batch are not held all at once."""
        for flying in self._flying:
            if self._in_flight + cost <= self._budget:
                return
            rows = (place.row for place in flying.span.places)
            wait([self._decoded[row] for row in rows if row in self._decoded])
            self._in_flight -= flying.n_compressed
            flying.n_compressed = 0

    def _batch_pixels(self, start: int) -> np.ndarray:
        if start not in self._pixels:
            self._pixels[start] = np.zeros((self._batch_size, *self._row_shape), np.uint8)
        return self._pixels[start]


@dataclass(frozen=True, slots=True)
class _Read:
    """The bytes of each image of a span, and the seconds that fetching one byte took."""

    images: list[Buffer]
    s_per_byte: float


def _decode_into(
    out: np.ndarray, read: Future[_Read], i: int, spec: ImageSpec, key: str, alone: bool = False
) -> _Decoded:
    """Decode the i-th image of a span into `out`, [*spec.shape] or [view, *spec.shape].

    Where memory does not suffice the image is at fault only if it is decoded `alone`.
    """
    fetched = read.result()
    data = fetched.images[i]
    start = time.perf_counter()
    error: ImageError | None = None
    try:
        out[:] = decode_views(data, spec, key) if spec.views else decode_image(data, spec)
    except ImageError as problem:
        error = problem
    except MemoryError:
        if not alone:
            again = partial(_decode_into, out, read, i, spec, key, True)
            return _Decoded(len(data), 0.0, 0.0, None, again)
        height, width = displayed_size(data)
        error = ImageError("decode", f"not enough memory to decode {height}x{width} pixels")
    seconds = time.perf_counter() - start
    return _Decoded(len(data), fetched.s_per_byte * len(data), seconds, error)


class _OpenTar:
    """One tar of a unit: plain, read by ranges; or gzip, read from front to back."""

    def __init__(self, info: TarInfo, retries: RetryCount) -> None:
        self._info = info
        if is_redacted(info.url):
            raise InputError(
                f"{info.url}: a store keeps the URLs of tars without their secrets; give them "
                "again: `store.index.with_urls([...])`, or `store.locate_dataset(...)`"
            )
        folder, self._name = open_parent(info.url)
        self._folder: Folder = counted(folder, retries)
        self._gzip: GzipSource | None = None
        if info.compression == "gzip":
            self._gzip = GzipSource(self._folder, self._name, info.size)
        self._last: Future[_Read] | None = None

    def check(self) -> None:
        """Raise `InputError` if the tar is not what was indexed."""
        try:
            now = self._folder.head(self._name)
        except ObjectNotFoundError as error:
            raise InputError(
                f"{self._info.url}: gone since it was indexed; put it back or index again"
            ) from error
        if (now.size, now.etag) != (self._info.size, self._info.etag):
            raise InputError(
                f"{self._info.url}: changed since it was indexed: {now.size} bytes, tag "
                f"{now.etag}; was {self._info.size} bytes, tag {self._info.etag}; index again"
            )

    def submit(self, readers: ThreadPoolExecutor, span: Span) -> Future[_Read]:
        """Fetch a span in one of the threads; spans come in order."""
        if self._gzip is None:
            return readers.submit(self._read_plain, span)
        self._last = readers.submit(self._read_gzip, self._gzip, span, self._last)
        return self._last

    def _read_plain(self, span: Span) -> _Read:
        start = time.perf_counter()
        data = self._folder.get_range(self._name, span.start, span.stop)
        seconds = time.perf_counter() - start
        at = span.start
        images: list[Buffer] = [data[p.offset - at : p.offset - at + p.size] for p in span.places]
        return _Read(images, seconds / max(sum(p.size for p in span.places), 1))

    def _read_gzip(self, source: GzipSource, span: Span, before: Future[_Read] | None) -> _Read:
        if before is not None:
            before.result()
        start = time.perf_counter()
        images: list[Buffer] = [source.read(p.offset, p.size) for p in span.places]
        seconds = time.perf_counter() - start
        if any(len(data) != p.size for data, p in zip(images, span.places, strict=True)):
            raise InputError(f"{self._info.url}: shorter than when it was indexed; index again")
        return _Read(images, seconds / max(sum(p.size for p in span.places), 1))
