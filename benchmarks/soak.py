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
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from soak_world import BATCH_S, N_SAMPLES, Trial, World, ended

WORK_S = N_SAMPLES / 4 * BATCH_S
"""Seconds that the batches of a store take one after the other."""


@dataclass(frozen=True)
class Fault:
    """A row of the table."""

    name: str
    how: str
    n_trials: int
    inject: Callable[[World, random.Random], Trial]


def killed_driver(options: tuple[str, ...], number: signal.Signals) -> Callable[..., Trial]:
    """The driver gets a signal when a random number of images is encoded, and a moment later."""

    def inject(world: World, chance: random.Random) -> Trial:
        store = world.new_store()
        with ended(world.start(store, options)) as run:
            met = run.until_encoded(world, chance.randrange(1, N_SAMPLES))
            time.sleep(chance.uniform(0, 2 * BATCH_S))
            met = run.send(number) and met
            status = run.wait()
        began = time.monotonic()
        world.finish(store, {}, *options)
        trial = world.judge(store)
        trial.recover_s, trial.met = time.monotonic() - began, met
        if number == signal.SIGTERM and met and status not in (0, 3):
            trial.wrong += 1
            trial.note = f"exit status {status}, want 3"
        return trial

    return inject


def two_drivers(world: World, chance: random.Random) -> Trial:
    """Two commands on one store, the second one starting a little later."""
    store = world.new_store()
    with ended(world.start(store)) as first:
        time.sleep(chance.uniform(0, 2))
        with ended(world.start(store)) as second:
            statuses = first.wait(), second.wait()
    trial = world.judge(store)
    trial.wrong += sum(status != 0 for status in statuses)
    return trial


def zombie_driver(world: World, chance: random.Random) -> Trial:
    """A driver is stopped (SIGSTOP), another one completes the store, the first one wakes."""
    store = world.new_store()
    with ended(world.start(store)) as zombie:
        met = zombie.until_encoded(world, chance.randrange(1, N_SAMPLES))
        time.sleep(chance.uniform(0, BATCH_S))
        zombie.send(signal.SIGSTOP)
        began = time.monotonic()
        world.finish(store, {})
        recover_s = time.monotonic() - began
        zombie.send(signal.SIGCONT)
        status = zombie.wait()
    trial = world.judge(store)
    trial.recover_s, trial.met = recover_s, met
    trial.wrong += status != 0
    return trial


FAULTS = [
    Fault(
        "driver killed (local)",
        "`kill -9` of `drl extract` at a random moment",
        20,
        killed_driver((), signal.SIGKILL),
    ),
    Fault(
        "driver told to stop (local)",
        "SIGTERM at a random moment",
        10,
        killed_driver((), signal.SIGTERM),
    ),
    Fault("two drivers", "two commands on one store at once", 5, two_drivers),
    Fault("zombie driver", "SIGSTOP, another run completes the store, SIGCONT", 10, zombie_driver),
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
