"""Pairs of images with keypoints: JSON lines, Parquet, or SPair-71k's folder of annotations.

A line, or a row of the table, has

    source, target                   keys of two samples
    source_points, target_points     [[x, y], ...] in pixels of the original images, the same
                                     number; null where a point is not visible
    category                         optional: its name
    box                              optional: [left, top, right, bottom] of the target's object
    name                             optional: of the pair

The middle of a pixel is a whole number, as SPair-71k and DIFT count. SPair's JSON files have
`src_imname`, `trg_imname`, `src_kps`, `trg_kps`, `category` and `trg_bndbox`; the key of an image
is its category and its name without the extension (`aeroplane/2008_000716`), or that name alone, or
either with folders before it.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from drl_data.errors import InputError, ObjectError, redacted, visible
from drl_data.objects import open_folder, open_parent

Points = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Pair:
    """Two images and the points that belong together, float64 [n, 2] as (x, y); NaN: not visible.

    `source` and `target` are keys, each as the names that it may have, the likeliest first.
    """

    name: str
    source: tuple[str, ...]
    target: tuple[str, ...]
    source_points: Points
    target_points: Points
    category: str
    box: tuple[float, float, float, float] | None
    in_folders: bool = False
    """Whether keys may have folders before these names."""


def read_pairs(url: str) -> list[Pair]:
    """The pairs of a file, or of a folder of SPair's JSON files, in order (of names).

    Raises:
        InputError: it is not there, or a pair is not as it must be, with its place.
    """
    try:
        if url.endswith((".jsonl", ".json", ".parquet")):
            folder, name = open_parent(url)
            data = bytes(folder.get(name))
            records = _parquet(data) if url.endswith(".parquet") else _lines(data, url)
            pairs = [_pair(record, i, url) for i, record in enumerate(records)]
        else:
            there = open_folder(url)
            names = sorted(info.path for info in there.list() if info.path.endswith(".json"))
            pairs = [_spair(_object(bytes(there.get(n)), f"{url}/{n}"), n, url) for n in names]
    except (ObjectError, pa.ArrowException) as error:
        raise InputError(f"{redacted(url)}: no pairs to read: {error}") from error
    if not pairs:
        raise InputError(f"{redacted(url)}: no pairs in it")
    return pairs


def _parquet(data: bytes) -> list[dict[str, object]]:
    found: list[dict[str, object]] = pq.read_table(io.BytesIO(data)).to_pylist()
    return found


def _lines(data: bytes, url: str) -> Iterator[dict[str, object]]:
    for number, line in enumerate(data.splitlines(), 1):
        if line.strip():
            yield _object(line, f"{url}, line {number}")


def _object(data: bytes, where: str) -> dict[str, object]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{redacted(where)}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{redacted(where)}: {type(value).__name__}; want an object")
    return value


def _pair(record: Mapping[str, object], number: int, url: str) -> Pair:
    where = f"{redacted(url)}, pair {number}"
    for name in ("source", "target", "source_points", "target_points"):
        if record.get(name) is None:
            raise InputError(f"{where}: lacks {name}; it has {', '.join(record)}")
    keys = {name: record[name] for name in ("source", "target")}
    if not all(isinstance(key, str) for key in keys.values()):
        raise InputError(f"{where}: source and target are {keys}; want two keys")
    told = record.get("name")
    return _checked(
        Pair(
            str(told) if told is not None else f"{keys['source']} - {keys['target']}",
            (str(keys["source"]),),
            (str(keys["target"]),),
            _points(record["source_points"], f"{where}, source_points"),
            _points(record["target_points"], f"{where}, target_points"),
            str(record.get("category") or ""),
            _box(record.get("box"), where),
        ),
        where,
    )


def _spair(record: Mapping[str, object], file: str, url: str) -> Pair:
    where = f"{redacted(url)}/{visible(file)}"
    for name in ("src_imname", "trg_imname", "src_kps", "trg_kps", "category", "trg_bndbox"):
        if record.get(name) is None:
            raise InputError(f"{where}: lacks {name}; want a pair of SPair-71k")
    category = str(record["category"])

    def keys(image: object) -> tuple[str, ...]:
        stem = PurePosixPath(str(image)).stem
        return f"{category}/{stem}", stem

    return _checked(
        Pair(
            file.removesuffix(".json"),
            keys(record["src_imname"]),
            keys(record["trg_imname"]),
            _points(record["src_kps"], f"{where}, src_kps"),
            _points(record["trg_kps"], f"{where}, trg_kps"),
            category,
            _box(record["trg_bndbox"], where),
            in_folders=True,
        ),
        where,
    )


def _points(value: object, where: str) -> Points:
    """[n, 2]; a null point, or one of nulls, is NaN."""
    found: list[tuple[float, float]] = []
    for point in value if isinstance(value, Sequence) and not isinstance(value, str) else [value]:
        if point is None:
            found.append((math.nan, math.nan))
            continue
        if not isinstance(point, Sequence) or isinstance(point, str) or len(point) != 2:
            raise InputError(f"{where}: {point!r}; want [x, y]")
        xy = [math.nan if v is None else v for v in point]
        if not all(isinstance(v, int | float) and not math.isinf(v) for v in xy):
            raise InputError(f"{where}: {point!r}; want [x, y], two numbers")
        x, y = (math.nan if any(map(math.isnan, xy)) else float(v) for v in xy)
        found.append((x, y))
    return np.array(found, np.float64).reshape(-1, 2)


def _box(value: object, where: str) -> tuple[float, float, float, float] | None:
    if value is None:
        return None
    sides = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    if len(sides) != 4 or not all(isinstance(v, int | float) and math.isfinite(v) for v in sides):
        raise InputError(f"{where}: box {value!r}; want [left, top, right, bottom]")
    left, top, right, bottom = map(float, sides)
    if right <= left or bottom <= top:
        raise InputError(f"{where}: box {sides}; want [left, top, right, bottom] of some size")
    return left, top, right, bottom


def _checked(pair: Pair, where: str) -> Pair:
    n_source, n_target = len(pair.source_points), len(pair.target_points)
    if n_source != n_target or not n_source:
        raise InputError(
            f"{where}: {n_source} source points and {n_target} target points; want as many, and "
            "some"
        )
    return pair


class KeyRows:
    """Rows by key, and by the last parts of keys."""

    def __init__(self, keys: Sequence[str], url: str) -> None:
        self._url = url
        self._rows: dict[str, list[int]] = {}
        self._tails: dict[str, list[int]] | None = None
        self._keys = keys
        for row, key in enumerate(keys):
            self._rows.setdefault(key, []).append(row)

    def row(self, names: Sequence[str], *, in_folders: bool = False) -> int:
        """The row of the sample that has the first of these names that there is; with `in_folders`
        also one whose key ends so.

        Raises:
            InputError: none has, or several.
        """
        for known in (self._rows, self._by_tails() if in_folders else {}):
            for name in names:
                rows = known.get(name, [])
                if len(rows) > 1:
                    raise InputError(
                        f"correspond: {len(rows)} samples of {self._url} are called "
                        f"{visible(name)!r}; which one is meant is unknown"
                    )
                if rows:
                    return rows[0]
        wanted = " nor ".join(repr(visible(name)) for name in names)
        raise InputError(
            f"correspond: no sample of {self._url} is called {wanted}; keys are as "
            f"{visible(self._keys[0])!r}"
        )

    def _by_tails(self) -> dict[str, list[int]]:
        if self._tails is None:
            self._tails = {}
            for row, key in enumerate(self._keys):
                parts = key.split("/")
                for start in range(1, len(parts)):
                    self._tails.setdefault("/".join(parts[start:]), []).append(row)
        return self._tails
