"""Faults on purpose: `make soak` runs them all and writes the table of docs/reliability.md.

    python benchmarks/soak.py [--only NAME ...] [--seed N] [--scale F] [--write docs/reliability.md]

Each row is a fault, injected so many times at random moments into real processes (`drl extract`,
its children, Ray's actors and nodes, an S3 server behind a proxy); after each the run is started
again until the store is complete, and the store is compared with that of an undisturbed run.
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from soak_faults import (
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
from soak_world import Trial, World


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
        10,
        signalled_driver(process(), signal.SIGKILL),
    ),
    Fault("driver killed, executor ray", "the same, on two Ray nodes", 4, on_ray("driver")),
    Fault("child killed, executor process", "`kill -9` of a worker", 10, killed_child),
    Fault("actor killed, executor ray", "`kill -9` of an actor", 4, on_ray("actor")),
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
        6,
        signalled_driver((), signal.SIGTERM),
    ),
    Fault(
        "told to stop, executor process",
        "the same",
        6,
        signalled_driver(process(), signal.SIGTERM),
    ),
    Fault("two drivers", "two commands on one store at once", 5, two_drivers),
    Fault("zombie driver", "SIGSTOP, another run completes the store, SIGCONT", 10, zombie_driver),
    Fault(
        "samples that kill",
        "one or two images at which the process gets SIGSEGV",
        4,
        poisoned(KILLS, "SIGSEGV"),
    ),
    Fault(
        "samples that eat memory",
        "one or two images at which the process takes 1 GiB and gets SIGKILL",
        4,
        poisoned(EATS, "SIGKILL"),
    ),
    Fault(
        "corruption at rest",
        "a bit flipped in a random object, or the object cut or removed; `--repair`",
        20,
        flipped_bit,
    ),
    Fault("disk full", "a tmpfs without room after some objects", 4, full_disk),
]


def soak(world: World, faults: list[Fault], seed: int, scale: float) -> Iterator[str]:
    """The lines of the table, as they are known."""
    yield (
        "| fault | how it is injected | tried | met a run at work | rows lost | rows wrong "
        "| rows recomputed, median (largest) | seconds to recover, median |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for fault in faults:
        chance = random.Random(f"{seed} {fault.name}")
        trials = []
        for i in range(max(round(fault.n_trials * scale), 1)):
            trial = fault.inject(world, chance)
            trials.append(trial)
            print(f"{fault.name} {i}: {trial}", file=sys.stderr, flush=True)
        again = sorted(t.recomputed for t in trials)
        yield (
            f"| {fault.name} | {fault.how} | {len(trials)} | {sum(t.met for t in trials)} "
            f"| {sum(t.lost for t in trials)} | {sum(t.wrong for t in trials)} "
            f"| {statistics.median(again):g} ({again[-1]}) "
            f"| {statistics.median(t.recover_s for t in trials):.1f} |"
        )


def main() -> None:
    """Run the faults that are asked for; exit status 1 if a row was lost or wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="faults whose name has this in it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of trials")
    chosen = parser.parse_args()
    faults = [f for f in FAULTS if not chosen.only or any(o in f.name for o in chosen.only)]
    with tempfile.TemporaryDirectory(prefix="drl-soak-") as folder:
        for line in soak(World.make(Path(folder)), faults, chosen.seed, chosen.scale):
            print(line, flush=True)


if __name__ == "__main__":
    main()
