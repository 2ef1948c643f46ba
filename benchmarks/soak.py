"""Faults on purpose: `make soak` runs them all and writes the table of docs/reliability.md.

    python -m benchmarks.soak [--only NAME ...] [--seed N] [--scale F] [--write FILE]

Each row is a fault, injected so many times at random moments into real processes (`drl extract`,
its children, Ray's actors and nodes, an S3 server behind a proxy); after each the run is started
again until the store is complete, and the store is compared with that of an undisturbed run.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

from benchmarks.soak_faults import (
    EATS,
    KILLS,
    flipped_bit,
    full_disk,
    killed_child,
    on_ray,
    poisoned,
    process,
    signalled_driver,
    two_drivers,
    zombie_driver,
)
from benchmarks.soak_storage import flaky_storage, kind_of_server, unusable_storage
from benchmarks.soak_world import Trial, World


@dataclass(frozen=True)
class Fault:
    """A row of the table."""

    name: str
    how: str
    n_trials: int
    inject: Callable[[World, random.Random], Trial]


FAULTS = [
    Fault(
        "driver killed, executor local",
        "`kill -9` of `drl extract` at a random moment of its work",
        20,
        signalled_driver((), signal.SIGKILL),
    ),
    Fault(
        "driver killed, executor process",
        "the same; its children must end by themselves",
        6,
        signalled_driver(process(), signal.SIGKILL),
    ),
    Fault("driver killed, executor ray", "the same, on two Ray nodes", 4, on_ray("driver")),
    Fault("child killed, executor process", "`kill -9` of a worker", 8, killed_child),
    Fault("actor killed, executor ray", "`kill -9` of an actor", 6, on_ray("actor")),
    Fault(
        "node killed, executor ray",
        "one of two nodes is killed, one comes",
        4,
        on_ray("node"),
    ),
    Fault(
        "node killed for good, executor ray",
        "one of two nodes is killed, none comes",
        4,
        on_ray("node for good"),
    ),
    Fault(
        "told to stop, executor local",
        "SIGTERM at a random moment; exit status 3",
        4,
        signalled_driver((), signal.SIGTERM),
    ),
    Fault(
        "told to stop, executor process",
        "the same",
        4,
        signalled_driver(process(), signal.SIGTERM),
    ),
    Fault("two drivers", "two commands on one store at once", 3, two_drivers),
    Fault("zombie driver", "SIGSTOP, another run completes the store, SIGCONT", 6, zombie_driver),
    Fault(
        "samples that kill",
        "one or two images at which the process gets SIGSEGV",
        2,
        poisoned(KILLS, "SIGSEGV"),
    ),
    Fault(
        "samples that eat memory",
        "one or two images at which the process takes 1 GiB and gets SIGKILL",
        2,
        poisoned(EATS, "SIGKILL"),
    ),
    Fault(
        "corruption at rest",
        "a bit flipped in a random object, or the object cut or removed; `--repair`",
        12,
        flipped_bit,
    ),
    Fault("disk full", "a tmpfs without room after some objects", 2, full_disk),
    Fault(
        "a twentieth of all requests fails",
        "the proxy: errors, resets, cut bodies, lost answers",
        2,
        flaky_storage(0.05),
    ),
    Fault("a fifth of all requests fails", "the same", 2, flaky_storage(0.2)),
    Fault(
        "access denied from some object on",
        "the proxy answers 403; later it does not",
        2,
        unusable_storage("403"),
    ),
    Fault(
        "bucket missing from some object on",
        "the proxy answers 404 NoSuchBucket; later it does not",
        2,
        unusable_storage("bucket"),
    ),
]

BEGIN, END = "<!-- soak -->", "<!-- /soak -->"
"""Around the table in docs/reliability.md."""


HEADER = (
    "| fault | how it is injected | tried | met a run at work | rows lost | rows wrong "
    "| rows recomputed, median (largest) | seconds to recover, median (largest) |",
    "|---|---|---|---|---|---|---|---|",
)


def attempts(world: World, fault: Fault, seed: int, scale: float) -> Iterator[Trial]:
    """Inject a fault so many times, each time at another moment."""
    chance = random.Random(f"{seed} {fault.name}")
    for i in range(max(round(fault.n_trials * scale), 1)):
        trial = fault.inject(world, chance)
        print(f"{fault.name} {i}: {trial}", file=sys.stderr, flush=True)
        yield trial


def line(fault: Fault, trials: list[Trial]) -> str:
    """A row of the table."""
    again, seconds = ([getattr(t, name) for t in trials] for name in ("recomputed", "recover_s"))
    return (
        f"| {fault.name} | {fault.how} | {len(trials)} | {sum(t.met for t in trials)} "
        f"| {sum(t.lost for t in trials)} | {sum(t.wrong for t in trials)} "
        f"| {statistics.median(again):g} ({max(again)}) "
        f"| {statistics.median(seconds):.1f} ({max(seconds):.1f}) |"
    )


def machine() -> str:
    """What the table was made on."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "ray", "obstore"))
    return (
        f"{date.today():%Y-%m-%d}; {os.cpu_count()} CPU cores, {platform.system()}, Python "
        f"{platform.python_version()}, {versions}; object storage: {kind_of_server()}."
    )


def written(page: str, lines: list[str]) -> str:
    """The page with the table between its marks."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return "\n".join([head + BEGIN, "", *lines, "", END + tail])


def main() -> None:
    """Run the faults that are asked for; exit status 1 if a row was lost or wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="faults whose name has this in it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of trials")
    parser.add_argument("--write", type=Path, help="page to write the table into")
    chosen = parser.parse_args()
    faults = [f for f in FAULTS if not chosen.only or any(o in f.name for o in chosen.only)]
    lines, bad = list(HEADER), 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="drl-soak-") as folder:
        world = World.make(Path(folder))
        print("\n".join(HEADER), flush=True)
        for fault in faults:
            trials = list(attempts(world, fault, chosen.seed, chosen.scale))
            lines.append(line(fault, trials))
            bad += sum(trial.lost + trial.wrong for trial in trials)
            print(lines[-1], flush=True)
    minutes = (time.monotonic() - began) / 60
    lines += ["", f"`make soak`, {minutes:.0f} minutes, seed {chosen.seed}, {machine()}"]
    print(lines[-1])
    if chosen.write:
        chosen.write.write_text(written(chosen.write.read_text(), lines))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
