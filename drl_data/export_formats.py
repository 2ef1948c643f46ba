"""Files that others read: .npy, safetensors, Parquet, WebDataset, HDF5. One part of rows each.

No pickle is written. NumPy and Parquet have no bfloat16 nor 8-bit floating point: float32 there.

Shapes: b rows, t timestep.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
import webdataset
from PIL import Image
from torch import Tensor

from drl_data.errors import SpecError
from drl_data.key_names import file_name, member_name
from drl_data.selection import NO_LABEL, Rows

if TYPE_CHECKING:
    from types import ModuleType

PER_FOLDER = 1000
IMAGES = "images"

NATIVE = (torch.float32, torch.float16, torch.uint8, torch.int8)
"""What NumPy, Parquet and HDF5 have."""


@dataclass(frozen=True)
class Part:
    """Rows of one file; `cells` are {(array, name of the timestep): [b, *shape]}."""

    rows: Rows
    keys: list[str]
    splits: list[str]
    labels: Rows
    cells: Mapping[tuple[str, str], Tensor]
    flipped: Mapping[tuple[str, str], Tensor]
    """The same of the mirrored images, if the store has that view and the format wants it."""
    pixels: Tensor | None = None
    """[b, c, h, w] uint8, if the format wants them."""


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that becomes it when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{hashlib.md5(path.name.encode()).hexdigest()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def as_numpy(x: Tensor) -> np.ndarray:
    """As it is where NumPy has the type, else float32."""
    return (x if x.dtype in NATIVE else x.float()).contiguous().numpy()


def npy_path(folder: Path, row: int, key: str, names: str) -> Path:
    """Of one sample: `00012/KEY.npy`, or by rows as REPA's images are numbered."""
    name = f"img-feature-{row:08d}" if names == "row" else file_name(key)
    return folder / f"{row // PER_FOLDER:05d}" / f"{name}.npy"


def write_npy(out: Path, part: Part, names: str) -> None:
    """One file for each sample in a folder of each (array, timestep); those that exist stay."""
    for (array, time), x in part.cells.items():
        values = as_numpy(x)
        for i, row in enumerate(part.rows.tolist()):
            path = npy_path(out / array / time, row, part.keys[i], names)
            if not path.exists():
                with whole(path) as temporary, open(temporary, "wb") as file:
                    np.save(file, values[i], allow_pickle=False)


def write_images(out: Path, part: Part, names: str) -> None:
    """One PNG for each sample in the folder `images`, beside and in the order of its features."""
    assert part.pixels is not None
    for pixels, row, key in zip(part.pixels.numpy(), part.rows.tolist(), part.keys, strict=True):
        path = image_path(out / IMAGES, row, key, names)
        if not path.exists():
            picture = pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
            with whole(path) as temporary:
                Image.fromarray(np.ascontiguousarray(picture)).save(temporary, "PNG")


def image_path(folder: Path, row: int, key: str, names: str) -> Path:
    """Of one sample's image; sorted by name it is where its features are (REPA pairs them so)."""
    name = f"img{row:08d}" if names == "row" else file_name(key)
    return folder / f"{row // PER_FOLDER:05d}" / f"{name}.png"


def write_safetensors(path: Path, part: Part, cell: tuple[str, str], fingerprint: str) -> None:
    """LightningDiT's shard: `latents`, `labels`, with the mirrored view `latents_flip`; `rows`."""
    tensors = {
        "latents": part.cells[cell].contiguous(),
        "labels": torch.from_numpy(part.labels),
        "rows": torch.from_numpy(part.rows),
    }
    if cell in part.flipped:
        tensors["latents_flip"] = part.flipped[cell].contiguous()
    # One entry: safetensors writes several in an order of its own.
    about = {"drl_data": json.dumps({"fingerprint": fingerprint, "keys": part.keys})}
    with whole(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata=about)


def write_parquet(path: Path, part: Part) -> None:
    """Columns row, key, split, label, and `ARRAY@TIME`: lists of fixed length; their shape is in
    the metadata of the field."""
    columns = {
        "row": pa.array(part.rows),
        "key": pa.array(part.keys, pa.string()),
        "split": pa.array(part.splits, pa.string()),
        "label": pa.array(part.labels, mask=part.labels == NO_LABEL),
    }
    fields = [pa.field(name, column.type) for name, column in columns.items()]
    for (array, time), x in part.cells.items():
        values = as_numpy(x)
        size = int(np.prod(values.shape[1:], dtype=int))
        column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), size)
        shape = json.dumps(list(values.shape[1:])).encode()
        fields.append(pa.field(f"{array}@{time}", column.type, metadata={b"shape": shape}))
        columns[f"{array}@{time}"] = column
    with whole(path) as temporary:
        pq.write_table(pa.table(list(columns.values()), schema=pa.schema(fields)), temporary)


def write_webdataset(path: Path, part: Part) -> None:
    """A tar of samples: `KEY.ARRAY.TIME.npy`, `KEY.cls` where there is a label, `KEY.json`."""
    values = {f"{array}.{time}.npy": as_numpy(x) for (array, time), x in part.cells.items()}
    with (
        whole(path) as temporary,
        webdataset.TarWriter(str(temporary), mtime=0, encoder=False) as writer,
    ):
        for i, row in enumerate(part.rows.tolist()):
            about = {"key": part.keys[i], "row": row, "split": part.splits[i]}
            sample: dict[str, object] = {
                "__key__": member_name(part.keys[i]),
                "json": json.dumps(about).encode(),
            }
            if part.labels[i] != NO_LABEL:
                sample["cls"] = str(part.labels[i]).encode()
            for name, x in values.items():
                buffer = io.BytesIO()
                np.save(buffer, x[i], allow_pickle=False)
                sample[name] = buffer.getvalue()
            writer.write(sample)


def write_hdf5(path: Path, part: Part, fingerprint: str) -> None:
    """Datasets `row`, `key`, `split`, `label` (-1: none) and `ARRAY/TIME` [b, *shape]."""
    h5py = import_h5py()
    with whole(path) as temporary, h5py.File(temporary, "w") as file:
        file.attrs["fingerprint"] = fingerprint
        file["row"], file["label"] = part.rows, part.labels
        text = h5py.string_dtype("utf-8")
        file.create_dataset("key", data=part.keys, dtype=text)
        file.create_dataset("split", data=part.splits, dtype=text)
        for (array, time), x in part.cells.items():
            file[f"{array}/{time}"] = as_numpy(x)


def import_h5py() -> ModuleType:
    """h5py, which is optional.

    Raises:
        SpecError: it is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise SpecError("export to hdf5 needs h5py: pip install 'drl-data[hdf5]'") from error
    module: ModuleType = h5py
    return module
