"""What `drl` prints: plans, summaries, repairs, invalid rows; and numbers for people."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from drl_data.errors import redacted, visible

if TYPE_CHECKING:
    from drl_data.plan import InvalidRow
    from drl_data.receipts import Reused
    from drl_data.repair import Repair
    from drl_data.runs import Prepared, RunSummary
    from drl_data.spot_check import SpotCheck
    from drl_data.store import FeatureStore
    from drl_data.tasks.synthesize import SynthesisRun

MAX_LISTED = 20
"""Invalid rows that are printed one by one."""

LOG_WIDTH = None if sys.stdout.isatty() else 120
"""Columns of tables in a log; a terminal says itself how wide it is."""
out = Console(width=LOG_WIDTH)
err = Console(stderr=True)


def print_plan(prepared: Prepared) -> None:
    from drl_data.flops import count_forwards
    from drl_data.plan import estimate

    spec = prepared.spec
    height, width = spec.images.size
    cost = estimate(prepared.arrays, spec.n_samples, len(prepared.times), spec.rows_per_unit)
    table = Table("array", "tap", "shape", "dtype", "per sample", "in all", "objects", box=None)
    for array, one in zip(prepared.arrays, cost.arrays, strict=True):
        shape = "x".join(map(str, array.shape))
        sizes = (format_bytes(one.bytes_per_sample), format_bytes(one.bytes_total))
        table.add_row(array.name, array.tap, shape, array.dtype, *sizes, str(one.n_objects))
    out.print(table)
    out.print(
        f"{spec.n_samples} samples of {height}x{width} pixels x {len(prepared.times)} timesteps = "
        f"{format_bytes(cost.bytes_total)} in {cost.n_objects} objects, {cost.n_units} units of "
        f"{spec.rows_per_unit} rows; fingerprint {spec.fingerprint()}",
        soft_wrap=True,
    )
    for path in prepared.missing:
        out.print(
            f"planned without {path}, which is not there: with it, another fingerprint",
            soft_wrap=True,
        )
    if prepared.without_weights:
        out.print(
            "planned from the bundled configuration, without weights: theirs will be another "
            f"fingerprint (the configuration: {prepared.without_weights})",
            soft_wrap=True,
        )
    flops = prepared.flops()
    n_views, forwards = max(spec.images.n_views, 1), count_forwards(spec)
    views = f"{n_views} views, each " if n_views > 1 else ""
    whole = f"{forwards.whole} whole forwards + " if forwards.whole else ""
    out.print(
        f"{format_flops(flops.per_image(forwards, n_views))} per image: {views}"
        f"{format_flops(flops.encode)} to encode + {whole}{forwards.cut} forwards of "
        f"{format_flops(flops.cut)}, cut after the last tap "
        f"(whole: {format_flops(flops.whole)}; saved: {flops.saving:.0%})",
        soft_wrap=True,
    )


def print_summary(summary: RunSummary) -> bool:
    """Say what a run did; whether its store has everything."""
    if summary.repaired:
        print_repair(summary.repaired)
    if not summary.n_pending:
        out.print(f"nothing left to do: {summary.n_units} units done, no backbone was started")
    else:
        rate = summary.n_ok / summary.wall_s
        out.print(
            f"{summary.n_ok} samples in {summary.wall_s:.1f} s ({rate:.1f}/s), "
            f"{format_bytes(summary.n_bytes)} to {redacted(summary.store.url)}",
            soft_wrap=True,
        )
        stages = ", ".join(f"{name} {s:.1f}" for name, s in summary.stage_s.items())
        out.print(f"seconds by stage, over all threads: {stages}", soft_wrap=True)
    if summary.n_found:
        out.print(f"{summary.n_found} units were signed by another run meanwhile, and are its own")
    for old in summary.reused.values():
        out.print(f"reused of {escape(old.store)}: {describe_reused(old)}", soft_wrap=True)
    for unit, message in summary.failed:
        err.print(f"[red]unit {unit.id} failed:[/] {escape(message)}", soft_wrap=True)
    return not print_invalid(summary.store) and not summary.failed


def print_synthesis(done: SynthesisRun, table: Table) -> None:
    """Say what a run made, and what a job could not make."""
    if done.n_pending:
        rate = done.n_made / done.wall_s
        out.print(f"{done.n_made} images in {done.wall_s:.1f} s ({rate:.3g}/s)")
    else:
        out.print("nothing left to do: no model was loaded")
    out.print(table)
    for unit, message in done.failed:
        err.print(f"[red]tar {unit.id} failed:[/] {escape(message)}", soft_wrap=True)
    listed = done.result.invalid[:MAX_LISTED]
    print_rows(listed)
    if done.result.n_invalid > len(listed):
        err.print(f"... and {done.result.n_invalid - len(listed)} more; receipts/ has them all")


def print_repair(repaired: Repair) -> None:
    for path in repaired.rewritten:
        out.print(f"repaired: {path} written again", soft_wrap=True)
    for name in repaired.fits:
        out.print(f"repaired: the fit of {name} made again", soft_wrap=True)
    if repaired.units:
        out.print(
            f"repaired: {len(repaired.removed)} objects removed, units "
            f"{', '.join(map(str, repaired.units))} computed again",
            soft_wrap=True,
        )
    if repaired.unsealed:
        out.print("repaired: the seal was removed; a complete store is sealed again")


def describe_reused(old: Reused) -> str:
    """What was copied from an older store, in words."""
    return (
        f"{old.features} features of {old.rows} rows; {old.linked} objects linked, {old.copied} "
        f"copied by the server, {old.rewritten} read and written whole"
    )


def print_invalid(store: FeatureStore) -> int:
    """List the rows that have no features, at most 20; returns how many there are."""
    return print_rows([row for receipt in store.iter_receipts() for row in receipt.invalid])


def print_rows(rows: Sequence[InvalidRow], source: str = "samples.parquet has") -> int:
    """List invalid rows, at most 20; returns how many there are. `source` has the others."""
    for row in rows[:MAX_LISTED]:
        err.print(
            f"[yellow]invalid:[/] row {row.row}, {escape(visible(row.key))}: {row.stage}: "
            f"{escape(visible(row.reason))}",
            soft_wrap=True,
        )
    if len(rows) > MAX_LISTED:
        err.print(f"... and {len(rows) - MAX_LISTED} more; {source} them all")
    return len(rows)


def print_spot_check(found: SpotCheck) -> bool:
    """Say how rows that were extracted anew compare; whether all agree."""
    for difference in found.differences[:MAX_LISTED]:
        err.print(f"[red]differs:[/] {escape(str(difference))}", soft_wrap=True)
    if len(found.differences) > MAX_LISTED:
        err.print(f"... and {len(found.differences) - MAX_LISTED} more")
    for name, largest in found.largest.items():
        out.print(f"  {name}: largest relative difference of a row {largest:.3g}", soft_wrap=True)
    out.print(
        f"{found.n_rows} rows extracted anew, {found.n_equal} equal bit for bit; "
        f"{found.n_invalid} invalid rows tried again; {len(found.differences)} differences",
        soft_wrap=True,
    )
    return not found.differences


def format_bytes(n: float) -> str:
    """1536 -> '1.5 KB'; powers of 1000."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} PB"


def format_flops(n: float) -> str:
    """1.5e12 -> '1.5 TFLOP'; a multiply and an add are two."""
    for unit in ("FLOP", "kFLOP", "MFLOP", "GFLOP"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TFLOP"
