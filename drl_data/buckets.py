"""Images that keep their aspect: one store for each shape, so that every store is dense.

A transformer that takes any grid of patches sees an image undistorted if its longer side becomes
`images.size` and the other one the nearest multiple of `buckets.multiple` (DiTF, SDXL's training).
Images of one shape are a bucket: a pipeline of its own with a fixed size and the rows that belong
to it, whose store is called as the pipeline's with `-HEIGHTxWIDTH`. Nothing else knows of buckets.

Shapes are read from the first bytes of each image, and kept beside the stores.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from drl_data.decode import displayed_size
from drl_data.errors import ImageError, InputError, ObjectNotFoundError, SpecError
from drl_data.index import SampleIndex
from drl_data.objects import Buffer, Folder, open_parent
from drl_data.pipeline import Pipeline, StoreSpec
from drl_data.progress import SILENT, Progress
from drl_data.store import FeatureStore
from drl_data.tar import GzipSource
from drl_data.urls import missing

HEAD_BYTES = 64 << 10
"""What is read of an image first; most formats say their size in the first hundreds of bytes."""

Size = tuple[int, int]
"""Height and width."""


@dataclass(frozen=True)
class Bucket:
    """The images of one shape: their rows, and the pipeline that computes them."""

    size: Size
    pipeline: Pipeline
    index: SampleIndex


def bucket_size(size: Size, long_side: int, multiple: int) -> Size:
    """Height and width that an image of `size` is resized to: the longer side to `long_side`, the
    other one to the nearest multiple of `multiple` that is not 0."""
    scale = long_side / max(size)
    height, width = (max(round(side * scale / multiple), 1) * multiple for side in size)
    return (height, width)


def split_into_buckets(
    pipeline: Pipeline, index: SampleIndex, *, n_threads: int = 32, progress: Progress = SILENT
) -> list[Bucket]:
    """One bucket for each shape that images have, in the order of their shapes.

    A row whose image cannot be read goes with most others, where it becomes an invalid row.

    Raises:
        SpecError: if the pipeline has no buckets, no store, or another size than one that they can
            have.
        InputError: if a tar is gone.
    """
    spec, images = pipeline.buckets, pipeline.image_spec
    if spec is None or pipeline.store is None:
        raise SpecError(f"pipeline {pipeline.name!r} lacks buckets or store")
    long_side = images.size[0]
    if images.shorter_side is not None:
        raise SpecError("images.shorter_side has no meaning with buckets: images are not cropped")
    if images.size != (long_side, long_side) or long_side % spec.multiple:
        raise SpecError(
            f"images.size {list(images.size)}: with buckets it is the longer side, one number that "
            f"is a multiple of {spec.multiple}"
        )
    store = pipeline.store
    stem = store.url.removesuffix(".zarr")
    sizes = _kept_sizes(f"{stem}-sizes.parquet", index, n_threads, progress)
    shapes = [size and bucket_size(size, long_side, spec.multiple) for size in sizes]
    rows: dict[Size, list[int]] = defaultdict(list)
    known = Counter(shape for shape in shapes if shape)
    common = known.most_common(1)[0][0] if known else (long_side, long_side)
    for row, shape in enumerate(shapes):
        rows[shape or common].append(row)
    return [
        Bucket(
            size,
            pipeline.model_copy(
                update={
                    "buckets": None,
                    "images": images.model_copy(update={"size": size, "resize": "stretch"}),
                    "store": StoreSpec(
                        url=_url_of(store.url, size),
                        reuse=tuple(
                            url
                            for url in (_url_of(old, size) for old in store.reuse)
                            if FeatureStore.exists(url)  # older images may not have had this shape
                        ),
                    ),
                }
            ),
            replace(index, table=index.table.take(pa.array(rows[size]))),
        )
        for size in sorted(rows)
    ]


def _url_of(url: str, size: Size) -> str:
    """Where the store of a bucket is, of a pipeline whose store is at `url`."""
    return f"{url.removesuffix('.zarr')}-{size[0]}x{size[1]}.zarr"


def _kept_sizes(
    url: str, index: SampleIndex, n_threads: int, progress: Progress
) -> list[Size | None]:
    """Sizes from the file that an earlier run left, or from the images."""
    folder, name = open_parent(url)
    digest = index.digest().encode()
    try:
        table = pq.read_table(pa.BufferReader(folder.get(name)))
    except ObjectNotFoundError:
        table = None
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{url}: not the sizes of images that an earlier run left ({error}); delete it"
        ) from error
    if table is None or (table.schema.metadata or {}).get(b"index") != digest:
        found = read_sizes(index, n_threads=n_threads, progress=progress)
        table = pa.table(
            {
                "height": pa.array([size and size[0] for size in found], pa.int32()),
                "width": pa.array([size and size[1] for size in found], pa.int32()),
            }
        ).replace_schema_metadata({b"index": digest})
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer)
        folder.put(name, [memoryview(buffer.getvalue())])
    columns = (table.column(name).to_pylist() for name in ("height", "width"))
    return [None if h is None else (h, w) for h, w in zip(*columns, strict=True)]


def read_sizes(
    index: SampleIndex, *, n_threads: int = 32, progress: Progress = SILENT
) -> list[Size | None]:
    """Height and width of each row's image as it is shown (EXIF), None where it cannot be read.

    Reads the first 64 KiB of an image, and the whole of one whose size comes later.

    Raises:
        InputError: if a tar is gone.
    """
    names = ("tar", "offset", "size", "reason")
    columns = (index.table.column(name).to_pylist() for name in names)
    places: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for row, (tar, offset, size, reason) in enumerate(zip(*columns, strict=True)):
        if reason is None:
            places[tar].append((row, offset, size))
    sizes: list[Size | None] = [None] * index.n_samples
    with (
        progress.bar("sizes", index.n_samples, "images") as bar,
        ThreadPoolExecutor(n_threads, thread_name_prefix="drl-sizes") as pool,
    ):
        for tar, wanted in places.items():
            info = index.tars[tar]
            folder, name = open_parent(info.url)
            try:
                if info.compression == "gzip":
                    source = GzipSource(folder, name, info.size)
                    whole = ((row, source.read(offset, size)) for row, offset, size in wanted)
                    found: Iterable[tuple[int, Size | None]] = (
                        (row, _size_of(data)) for row, data in whole
                    )
                else:
                    found = pool.map(partial(_plain_size, folder, name), wanted)
                for row, size in found:
                    sizes[row] = size
                    bar.advance(1)
            except ObjectNotFoundError as error:
                raise missing(info.url, folder, name) from error
    return sizes


def _plain_size(folder: Folder, name: str, place: tuple[int, int, int]) -> tuple[int, Size | None]:
    row, offset, size = place
    head = min(size, HEAD_BYTES)
    found = _size_of(folder.get_range(name, offset, offset + head)) if head else None
    if found is None and size > head:
        found = _size_of(folder.get_range(name, offset, offset + size))
    return row, found


def _size_of(data: Buffer) -> Size | None:
    try:
        return displayed_size(data)
    except ImageError:
        return None
