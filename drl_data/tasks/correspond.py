"""Keypoints matched between images by their nearest neighbours in feature maps (DIFT), and PCK.

Tang et al. 2023, "Emergent Correspondence from Image Diffusion". As in their code: maps are
upsampled (bilinear, align_corners false) to the original images, a keypoint's vector is compared by
cosine with that of every pixel of the target, the first largest one is the match, and it is right
within alpha times the longer side of the box; means over images and over points. Keypoints are
mapped through the pipeline's resize and crop, so that it need not be `stretch`; those that are
cropped away are left out and listed.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.table import Table

from drl_data.correspond_data import Columns, view_of
from drl_data.correspond_pairs import ExamplePair, PairMatches, match_pairs
from drl_data.correspond_spec import CorrespondSpec, WarpCheckSpec
from drl_data.errors import SpecError, redacted
from drl_data.pairs import read_pairs
from drl_data.pck import PckScore
from drl_data.pipeline import Pipeline
from drl_data.progress import SILENT, Progress
from drl_data.results import TaskResult
from drl_data.spec_base import Spec
from drl_data.splits import finished_store
from drl_data.warp_check import WarpPck, check_warps


class ColumnPck(Spec):
    """How well the points of all pairs are found by one cell, or a fusion of cells."""

    name: str
    tap: str | None
    timestep: float | None
    score: PckScore
    categories: dict[str, PckScore]


class CorrespondResult(TaskResult):
    """What `run_correspond` found; JSON, and of pairs a Parquet table of the same name.

    The table has a line for each point and column: pair, category, point, status, cell, source_row,
    target_row; truth_x, truth_y, found_x, found_y in pixels of the target, whose middles are whole
    numbers; distance in pixels, `threshold` (what alpha is relative to), cosine, and cycle_distance
    in pixels of the source. A point that is left out has one line, without a cell.
    """

    task: ClassVar[str] = "correspond"

    pipeline: str
    spec: CorrespondSpec
    store: str
    fingerprint: str
    n_pairs: int
    """In the file."""
    n_points: int
    left_out: dict[str, int]
    """Points that count nowhere, by reason."""
    named: tuple[str, ...]
    """The first of them, by name."""
    relative_to: str
    columns: tuple[ColumnPck, ...]
    """Empty without pairs."""
    best: int | None
    """The column with the largest mean over points at alpha 0.1 (the middle one, if there is no
    such): chosen on the same pairs, so its number flatters."""
    checks: tuple[WarpPck, ...]
    examples: tuple[ExamplePair, ...]
    table: str | None
    device: str
    seconds: float


def format_tables(result: CorrespondResult) -> list[Table]:
    """One line for each cell; and for each warp and cell."""
    tables: list[Table] = []
    heads = [f"@{alpha:g}" for alpha in result.spec.alphas]
    if result.columns:
        skipped = sum(result.left_out.values())
        table = Table(
            title=f"PCK of {result.n_points - skipped} points of {result.n_pairs} pairs, relative "
            f"to the {result.relative_to}, by image / by point; {skipped} points left out",
            title_justify="left",
            box=None,
        )
        for name in ("matched by", *heads, *(f"cycle {h}" for h in heads[-1:] if _cycles(result))):
            table.add_column(name, justify="left" if name == "matched by" else "right",
                             no_wrap=True)  # fmt: skip
        for column in result.columns:
            score = column.score
            both = zip(score.by_image, score.by_point, strict=True)
            table.add_row(column.name, *(f"{100 * a:.1f} / {100 * b:.1f}" for a, b in both),
                          *(f"{100 * c:.1f}" for c in score.cycle[-1:]))  # fmt: skip
        tables.append(table)
    if result.checks:
        table = Table(title="PCK of warps whose truth is known", title_justify="left", box=None)
        for name in ("warp", "matched by", *heads, "median px", "cycle " + heads[-1]):
            text = name in ("warp", "matched by")
            table.add_column(name, justify="left" if text else "right", no_wrap=True)
        for check in result.checks:
            table.add_row(
                check.warp,
                check.cell,
                *(f"{100 * a:.1f}" for a in check.score.by_point),
                f"{check.median_px:.2f}",
                *(f"{100 * c:.1f}" for c in check.score.cycle[-1:]),
            )
        tables.append(table)
    return tables


def _cycles(result: CorrespondResult) -> bool:
    return any(column.score.cycle for column in result.columns)


def run_correspond(
    pipeline: Pipeline, *, device: str | None = None, progress: Progress = SILENT
) -> CorrespondResult:
    """Match the keypoints of all pairs by every cell, and check matches whose truth is known.

    Writes `correspond.json` and, of pairs, `correspond.parquet` in the results folder. `device`
    defaults to the first visible GPU, else the CPU.

    Raises:
        SpecError: no `correspond` section; a tap that is no map; no point to match.
        TapError: the store has no such tap, timestep or view.
        InputError: pairs that are not as they must be, or of other images; tars that are gone.
        UserError: a store that is not there or not complete.
    """
    spec = pipeline.correspond
    if spec is None:
        raise SpecError(
            f"pipeline {pipeline.name!r} lacks correspond; `correspond: {{}}` is the least"
        )
    started = time.perf_counter()
    store = finished_store(pipeline, "correspond")
    view_of(store, spec.view)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    columns = Columns.of(store, spec)
    pairs = [] if spec.pairs is None else read_pairs(spec.pairs)
    check = spec.check or (None if pairs else WarpCheckSpec())
    found: PairMatches | None = None
    checks: tuple[WarpPck, ...] = ()
    with torch.no_grad():
        if pairs:
            found = match_pairs(store, columns, pairs, spec, device, progress)
        if check is not None:
            checks = check_warps(pipeline, store, columns, spec, check, device, progress)
    scores = () if found is None else _scores(found, columns, spec)
    best = _best(scores, spec)
    result = CorrespondResult(
        pipeline=pipeline.name,
        spec=_public(spec),
        store=redacted(store.url),
        fingerprint=store.fingerprint,
        n_pairs=len(pairs),
        n_points=sum(len(pair.source_points) for pair in pairs),
        left_out={} if found is None else dict(found.left_out),
        named=() if found is None else tuple(found.named),
        relative_to="image" if found is None else found.relative_to,
        columns=scores,
        best=best,
        checks=checks,
        examples=()
        if found is None or best is None
        else tuple(found.examples.get(scores[best].name, ())),
        table=None if found is None else "correspond.parquet",
        device=device,
        seconds=time.perf_counter() - started,
    )
    _save(result, found, Path(pipeline.results))
    return result


def _public(spec: CorrespondSpec) -> CorrespondSpec:
    """What is written: without the secrets of URLs."""
    stores = {name: redacted(path) for name, path in spec.stores.items()}
    pairs = None if spec.pairs is None else redacted(spec.pairs)
    return spec.model_copy(update={"pairs": pairs, "stores": stores})


def _save(result: CorrespondResult, found: PairMatches | None, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if found is not None:
        about = {
            b"fingerprint": result.fingerprint.encode(),
            b"spec": result.spec.model_dump_json().encode(),
        }
        table = pa.concat_tables(found.tables).replace_schema_metadata(about)
        pq.write_table(table, folder / "correspond.parquet", compression="zstd")
    result.save(folder / "correspond.json")


def main_alpha(spec: CorrespondSpec) -> int:
    """Position of 0.1, which the papers report, or of the middle one."""
    return spec.alphas.index(0.1) if 0.1 in spec.alphas else len(spec.alphas) // 2


def _scores(found: PairMatches, columns: Columns, spec: CorrespondSpec) -> tuple[ColumnPck, ...]:
    return tuple(
        ColumnPck(
            name=column.name,
            tap=column.tap,
            timestep=column.timestep,
            score=found.score(column.name, spec.alphas),
            categories=found.categories(column.name, spec.alphas),
        )
        for column in columns.columns
    )


def _best(scores: tuple[ColumnPck, ...], spec: CorrespondSpec) -> int | None:
    at = main_alpha(spec)
    return max(range(len(scores)), key=lambda i: scores[i].score.by_point[at], default=None)
