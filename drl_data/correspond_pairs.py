"""Keypoints of pairs, matched by every column: distances, a table, what was left out.

Points in files are (x, y) whose middles of pixels are whole numbers; inside they are continuous
(y, x), half a pixel more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from drl_data.correspond_data import (
    Column,
    Columns,
    MapReader,
    image_side,
    inside,
    original_sizes,
    searched,
    view_of,
)
from drl_data.correspond_spec import CorrespondSpec
from drl_data.errors import SpecError, visible
from drl_data.fitting import PixelMap, pixel_map
from drl_data.matching import Side, match
from drl_data.pairs import KeyRows, Pair
from drl_data.pck import Distances, PckScore
from drl_data.progress import Progress
from drl_data.spec_base import Spec
from drl_data.store import FeatureStore

N_NAMED = 20
"""Points left out that the result names."""
N_EXAMPLES = 4
"""Pairs that the report shows."""

Floats = npt.NDArray[np.float64]


class ExamplePair(Spec):
    """A pair for the report: rows, and points (y, x) as shares 0..1 of the backbone's input."""

    name: str
    source: int
    target: int
    points: tuple[tuple[float, float], ...]
    truth: tuple[tuple[float, float], ...]
    found: tuple[tuple[float, float], ...]
    distances: tuple[float, ...]
    """From the truth, in units of what alpha is relative to."""


@dataclass
class PairMatches:
    """What was found of all pairs."""

    relative_to: str
    distances: dict[str, list[tuple[str, Distances]]] = field(default_factory=dict)
    """Column -> (category, distances) of each pair that has points that count."""
    left_out: Counter[str] = field(default_factory=Counter)
    named: list[str] = field(default_factory=list)
    tables: list[pa.Table] = field(default_factory=list)
    examples: dict[str, list[ExamplePair]] = field(default_factory=dict)

    def score(self, column: str, alphas: Sequence[float]) -> PckScore:
        """Of all pairs."""
        return PckScore.of([one for _, one in self.distances[column]], alphas)

    def categories(self, column: str, alphas: Sequence[float]) -> dict[str, PckScore]:
        """Of the pairs of each category, by name; empty without any."""
        found: dict[str, list[Distances]] = {}
        for category, one in self.distances[column]:
            found.setdefault(category, []).append(one)
        if set(found) == {""}:
            return {}
        return {name: PckScore.of(found[name], alphas) for name in sorted(found)}


def match_pairs(
    store: FeatureStore,
    columns: Columns,
    pairs: Sequence[Pair],
    spec: CorrespondSpec,
    device: str,
    progress: Progress,
) -> PairMatches:
    """Match the points of all pairs.

    Raises:
        InputError: a key that no sample has; tars that are gone or changed.
        SpecError: boxes are wanted that there are none of; no point is left.
    """
    boxed = all(pair.box is not None for pair in pairs)
    if spec.relative_to == "box" and not boxed:
        raise SpecError("correspond.relative_to: box, but not every pair has one; want image")
    found = PairMatches(spec.relative_to or ("box" if boxed else "image"))
    keys = KeyRows(store.index.table.column("key").to_pylist(), store.url)
    rows = [
        tuple(keys.row(names, in_folders=p.in_folders) for names in (p.source, p.target))
        for p in pairs
    ]
    reader = MapReader(store, columns.cells, device)
    valid = {row: reader.valid(row) for row in sorted({r for both in rows for r in both})}
    sizes = original_sizes(store, [row for row in valid if valid[row]])
    shown = set(((2 * np.arange(N_EXAMPLES) + 1) * len(pairs) // (2 * N_EXAMPLES)).tolist())
    with progress.bar("pairs", len(pairs), "pairs") as bar:
        for i, (pair, (source, target)) in enumerate(zip(pairs, rows, strict=True)):
            if valid[source] and valid[target]:
                one = _PairWork.of(store, columns, pair, (source, target), sizes, reader, spec)
                _match_pair(one, columns, found, spec, is_example=i in shown)
            else:
                reason = "an image without features"
                _leave_out(found, pair, [reason] * len(pair.source_points))
            bar.advance(1)
    if not found.distances:
        raise SpecError(
            f"correspond: none of the points of {len(pairs)} pairs can be matched: "
            f"{dict(found.left_out)}"
        )
    return found


@dataclass(frozen=True)
class _PairWork:
    """A pair with both sides; `inputs` are from their points to the backbone's input."""

    pair: Pair
    rows: tuple[int, int]
    source: Side
    target: Side
    inputs: tuple[PixelMap, PixelMap]
    input_size: tuple[int, int]

    @classmethod
    def of(
        cls,
        store: FeatureStore,
        columns: Columns,
        pair: Pair,
        rows: tuple[int, int],
        sizes: dict[int, tuple[int, int]],
        reader: MapReader,
        spec: CorrespondSpec,
    ) -> _PairWork:
        images, view = store.image_spec, view_of(store, spec.view)
        source, target = (
            image_side(sizes[row], columns.cells, reader.maps(row), spec.view) for row in rows
        )
        first, second = (pixel_map(sizes[row], images, view=view) for row in rows)
        return cls(pair, rows, source, target, (first, second), images.size)

    def threshold(self, relative_to: str) -> float:
        """What alpha is relative to, in pixels of the target."""
        if relative_to == "image" or self.pair.box is None:
            return float(max(self.target.size))
        left, top, right, bottom = self.pair.box
        return max(right - left, bottom - top)


def _inside_points(points_xy: Floats) -> Tensor:
    """Points of a file as continuous (y, x)."""
    return torch.from_numpy(points_xy[:, ::-1] + 0.5)


def _statuses(one: _PairWork) -> list[str]:
    """`ok`, or why a point is left out."""
    found = []
    sides = (one.source, one.pair.source_points), (one.target, one.pair.target_points)
    views = [(side, _inside_points(points)) for side, points in sides]
    covered = [inside(side, points) for side, points in views]
    for i in range(len(one.pair.source_points)):
        status = "ok"
        for (side, points), there, name in zip(views, covered, ("source", "target"), strict=True):
            y, x = points[i].tolist()
            if y != y or x != x:
                status = "not visible"
            elif not (0 <= y <= side.size[0] and 0 <= x <= side.size[1]):
                status = f"outside the {name} image"
            elif not there[i]:
                status = f"cropped from the {name}"
            if status != "ok":
                break
        found.append(status)
    return found


def _match_pair(
    one: _PairWork, columns: Columns, found: PairMatches, spec: CorrespondSpec, *, is_example: bool
) -> None:
    statuses = _statuses(one)
    counted = np.array([status == "ok" for status in statuses])
    _leave_out(found, one.pair, statuses)
    if not counted.any():
        return
    points = _inside_points(one.pair.source_points[counted])
    truth = _inside_points(one.pair.target_points[counted])
    threshold = one.threshold(found.relative_to)
    for column in columns.columns:
        target = searched(one.target, column, spec.search, one.inputs[1], one.input_size)
        matches = match(one.source, target, points, column.parts)
        pixels = (matches.points - truth).norm(dim=1).numpy()
        back = _back(one, column, matches.points, points, spec) if spec.cycle else None
        distances = Distances(
            pixels / threshold, None if back is None else back / max(one.source.size)
        )
        found.distances.setdefault(column.name, []).append((one.pair.category, distances))
        found.tables.append(
            _table(
                one, column, counted, truth, matches.points, pixels, threshold, matches.cosine, back
            )
        )
        if is_example:
            found.examples.setdefault(column.name, []).append(
                _example(one, points, truth, matches.points, distances)
            )


def _back(
    one: _PairWork, column: Column, matched: Tensor, points: Tensor, spec: CorrespondSpec
) -> Floats:
    """Pixels between each point and where its match leads back to."""
    origin = searched(one.source, column, spec.search, one.inputs[0], one.input_size)
    back = match(one.target, origin, matched, column.parts)
    distance: Floats = (back.points - points).norm(dim=1).numpy()
    return distance


def _leave_out(found: PairMatches, pair: Pair, statuses: Sequence[str]) -> None:
    out = [(i, status) for i, status in enumerate(statuses) if status != "ok"]
    found.left_out.update(status for _, status in out)
    for i, status in out:
        if len(found.named) < N_NAMED:
            found.named.append(f"{visible(pair.name)}, point {i}: {status}")
    if out:
        n = len(out)
        columns: dict[str, list[object]] = {
            "pair": [pair.name] * n,
            "category": [pair.category] * n,
            "point": [i for i, _ in out],
            "status": [status for _, status in out],
        }
        found.tables.append(_as_table(columns, n))


_SCHEMA = pa.schema(
    [
        ("pair", pa.string()),
        ("category", pa.string()),
        ("point", pa.int32()),
        ("status", pa.string()),
        ("cell", pa.string()),
        ("source_row", pa.int64()),
        ("target_row", pa.int64()),
        *((name, pa.float64()) for name in ("truth_x", "truth_y", "found_x", "found_y")),
        *((name, pa.float64()) for name in ("distance", "threshold", "cosine", "cycle_distance")),
    ]
)


def _as_table(columns: dict[str, list[object]], n: int) -> pa.Table:
    """With nulls where nothing is said."""
    filled = {name: columns.get(name, [None] * n) for name in _SCHEMA.names}
    return pa.table(filled, schema=_SCHEMA)


def _table(
    one: _PairWork,
    column: Column,
    counted: npt.NDArray[np.bool_],
    truth: Tensor,
    matched: Tensor,
    pixels: Floats,
    threshold: float,
    cosine: Tensor,
    back: Floats | None,
) -> pa.Table:
    n = int(counted.sum())
    same = {
        "pair": one.pair.name,
        "category": one.pair.category,
        "status": "ok",
        "cell": column.name,
        "source_row": one.rows[0],
        "target_row": one.rows[1],
        "threshold": threshold,
    }
    columns: dict[str, list[object]] = {name: [value] * n for name, value in same.items()}
    columns["point"] = list(np.flatnonzero(counted).tolist())
    for name, points in (("truth", truth), ("found", matched)):
        columns[f"{name}_x"] = (points[:, 1] - 0.5).tolist()
        columns[f"{name}_y"] = (points[:, 0] - 0.5).tolist()
    columns["distance"], columns["cosine"] = pixels.tolist(), cosine.tolist()
    if back is not None:
        columns["cycle_distance"] = back.tolist()
    return _as_table(columns, n)


def _example(
    one: _PairWork, points: Tensor, truth: Tensor, matched: Tensor, distances: Distances
) -> ExamplePair:
    def shares(place: PixelMap, at: Tensor) -> tuple[tuple[float, float], ...]:
        h, w = one.input_size
        mapped = (place(y, x) for y, x in at.tolist())
        return tuple((y / h, x / w) for y, x in mapped)

    return ExamplePair(
        name=one.pair.name,
        source=one.rows[0],
        target=one.rows[1],
        points=shares(one.inputs[0], points),
        truth=shares(one.inputs[1], truth),
        found=shares(one.inputs[1], matched),
        distances=tuple(distances.match.tolist()),
    )
