"""Parts of a real photograph whose correspondences are known, with simple features of their own."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_image

from drl_data.decode import decode_image
from drl_data.index import build_index
from drl_data.spec import DatasetSpec, ImageSpec
from drl_data.store import FeatureStore
from tests.stores import RUN, make_array, make_spec, make_times
from tests.toy_tars import write_tar

CROPS = ((100, 150, 200, 240), (120, 190, 200, 240), (90, 130, 220, 260), (130, 170, 180, 220))
"""(top, left, height, width) in the photograph of a temple, 427 x 640."""
POINTS = ((180, 215), (200, 260), (210, 330), (240, 300), (260, 240), (265, 360), (230, 215))
"""(y, x) in the photograph, whole numbers, in all crops; the last but one is near their borders."""


def photograph() -> npt.NDArray[np.uint8]:
    pixels: npt.NDArray[np.uint8] = load_sample_image("china.jpg")
    return pixels


def write_crops(folder: Path) -> DatasetSpec:
    """A tar of four parts of the photograph, keys crops/0 to crops/3, in their own sizes."""
    members = []
    for i, (top, left, height, width) in enumerate(CROPS):
        buffer = io.BytesIO()
        Image.fromarray(photograph()[top : top + height, left : left + width]).save(buffer, "PNG")
        members.append((f"crops/{i}.png", buffer.getvalue()))
    return DatasetSpec(tars=str(write_tar(folder / "crops.tar", members)))


def patches(pixels_chw: npt.NDArray[np.uint8], side: int) -> torch.Tensor:
    """Colours of 3 x 3 cells around each of side x side cells, without their mean: [27, s, s]."""
    x = torch.from_numpy(pixels_chw).float()[None] / 255
    cells = F.adaptive_avg_pool2d(x, (side, side))
    around = F.unfold(F.pad(cells, (1, 1, 1, 1), mode="replicate"), 3).reshape(27, side, side)
    return around - around.mean(0)


def crops_store(
    folder: Path, dataset: DatasetSpec, url: str | None = None, **images: object
) -> FeatureStore:
    """Patches of two sizes as the taps `fine` and `coarse` at timestep 1, shuffled among places at
    timestep 2."""
    spec = ImageSpec.model_validate({"size": 96, **images})
    index = build_index(dataset)
    arrays = [
        make_array("fine", (27, 32, 32), "float32"),
        make_array("coarse", (27, 16, 16), "float32"),
    ]
    store = FeatureStore.create(
        url or str(folder / "crops.zarr"),
        make_spec(len(CROPS), 4, images=spec, dataset=index.digest(), dtype="float32"),
        arrays,
        make_times(1, 2),
        index,
    )
    features: dict[str, npt.NDArray[np.float32]] = {}
    for array in arrays:
        found = []
        for top, left, height, width in CROPS:
            buffer = io.BytesIO()
            crop = photograph()[top : top + height, left : left + width]
            Image.fromarray(crop).save(buffer, "PNG")
            found.append(patches(decode_image(buffer.getvalue(), spec), array.shape[1]).numpy())
        true = np.stack(found)
        flat = true.reshape(*true.shape[:2], -1)
        shuffled = np.random.default_rng(0).permuted(flat, axis=2).reshape(true.shape)
        features[array.name] = np.ascontiguousarray(np.stack([true, shuffled]), np.float32)
    (unit,) = store.units
    store.write(unit, features, [], RUN)
    store.seal()
    return store


def pair_records(boxes: bool = True) -> list[dict[str, object]]:
    """All ordered pairs of the crops."""
    records: list[dict[str, object]] = []
    for i, source in enumerate(CROPS):
        for j, target in enumerate(CROPS):
            if i == j:
                continue
            record: dict[str, object] = {"source": f"crops/{i}", "target": f"crops/{j}"}
            for name, (top, left, _, _) in (("source", source), ("target", target)):
                record[f"{name}_points"] = [[x - left, y - top] for y, x in POINTS]
            record["category"] = "near" if abs(i - j) == 1 else "far"
            if boxes:
                record["box"] = [10, 20, 110, 100]
            records.append(record)
    return records


def write_jsonl(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return path
