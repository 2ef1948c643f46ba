"""The faults of the soak, each injected once by one function: (world, chance) -> `Trial`."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ray.cluster_utils import Cluster

from benchmarks.soak_model import EATS, KILLS
from benchmarks.soak_world import BATCH_S, N_SAMPLES, Trial, World, descendants, ended

Inject = Callable[[World, random.Random], Trial]
WORKERS = 2


def process(n_workers: int = WORKERS) -> tuple[str, ...]:
    """Options of `drl extract` for child processes."""
    return ("--executor", "process", "--workers", str(n_workers))


# --- processes that end -------------------------------------------------------------------------


def signalled_driver(options: Sequence[str], number: signal.Signals) -> Inject:
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


def killed_child(world: World, chance: random.Random) -> Trial:
    """One of the child processes is killed; the same run goes on."""
    store = world.new_store()
    with ended(world.start(store, process())) as run:
        met = run.until_encoded(world, chance.randrange(1, N_SAMPLES))
        time.sleep(chance.uniform(0, 2 * BATCH_S))
        workers = _at_work(descendants(run.process.pid))
        began = time.monotonic()
        if workers:
            os.kill(chance.choice(workers), signal.SIGKILL)
        status = run.wait()
    trial = world.judge(store)
    trial.recover_s, trial.met = time.monotonic() - began, met and bool(workers)
    trial.wrong += status != 0
    return trial


def _at_work(pids: Sequence[int]) -> list[int]:
    """Those that have torch loaded: workers, not helpers of multiprocessing."""
    found = []
    for pid in pids:
        try:
            maps = Path(f"/proc/{pid}/maps").read_text()
        except OSError:
            continue
        if "libtorch" in maps:
            found.append(pid)
    return found


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


# --- Ray ----------------------------------------------------------------------------------------


def on_ray(what: str) -> Inject:
    """`driver`, `actor`, `node` (a replacement comes) or `node for good`, killed at random."""

    def inject(world: World, chance: random.Random) -> Trial:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        try:
            nodes = [cluster.add_node(num_cpus=1) for _ in range(WORKERS)]
            cluster.wait_for_nodes()
            options = (
                "--executor", "ray", "--workers", str(WORKERS), "--address", cluster.address
            )  # fmt: skip
            store = world.new_store()
            with ended(world.start(store, options)) as run:
                met = run.until_encoded(world, chance.randrange(1, N_SAMPLES))
                time.sleep(chance.uniform(0, 2 * BATCH_S))
                began = time.monotonic()
                if what == "driver":
                    met = run.send(signal.SIGKILL) and met
                elif what == "actor":
                    pids = _actors()
                    met = met and bool(pids)
                    os.kill(chance.choice(pids), signal.SIGKILL)
                else:
                    cluster.remove_node(chance.choice(nodes), allow_graceful=False)
                    if what == "node":
                        cluster.add_node(num_cpus=1)
                status = run.wait()
            if what == "driver":
                world.finish(store, {}, *options)
            trial = world.judge(store)
            trial.recover_s, trial.met = time.monotonic() - began, met
            trial.wrong += what != "driver" and status != 0
            return trial
        finally:
            cluster.shutdown()

    return inject


def _actors() -> list[int]:
    """Process ids of our actors in the Ray that this process started (not of its agents, with which
    a node ends)."""
    found = []
    for pid in descendants(os.getpid()):
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if title.startswith(b"ray::_Minder"):
            found.append(pid)
    return found


# --- input --------------------------------------------------------------------------------------


def poisoned(colour: tuple[int, int, int], why: str) -> Inject:
    """One or two samples end the process that encodes them, or use up its memory."""

    def inject(world: World, chance: random.Random) -> Trial:
        rows = sorted(chance.sample(range(N_SAMPLES), chance.randint(1, 2)))
        tars = world.poisoned_tars(rows, colour)
        tame = world.tame_reference(tars)
        store = world.new_store()
        began = time.monotonic()
        with ended(world.start(store, process(), tars=tars)) as run:
            status = run.wait()
        trial = world.judge(store, reference=tame, invalid=dict.fromkeys(rows, why))
        trial.recover_s = time.monotonic() - began
        if status != 1:
            trial.wrong += 1
            trial.note += f" exit status {status}, want 1"
        return trial

    return inject


# --- storage ------------------------------------------------------------------------------------


def flipped_bit(world: World, chance: random.Random) -> Trial:
    """A bit of one object of a sealed store is flipped, or it is cut, or it is gone."""
    store = world.new_store()
    world.finish(store, {})
    files = sorted(p for p in Path(store).rglob("*") if p.is_file())
    victim, kind = chance.choice(files), chance.choice(["bit", "bit", "cut", "gone"])
    data = bytearray(victim.read_bytes())
    at = chance.randrange(8 * len(data)) if data else 0
    os.chmod(victim, 0o644)
    if kind == "bit":
        data[at // 8] ^= 1 << at % 8
        victim.write_bytes(data)
    elif kind == "cut":
        victim.write_bytes(data[: len(data) // 2])
    else:
        victim.unlink()
    found = world.command(store, "verify", store, "--deep").wait()
    began = time.monotonic()
    status = world.start(store, ("--repair",)).wait()
    trial = world.judge(store)
    trial.recover_s = time.monotonic() - began
    trial.wrong += (found == 0) + (status != 0)
    if found == 0 or status != 0:
        trial.note += f" {kind} of {victim.relative_to(store)}: verify {found}, repair {status}"
    return trial


def full_disk(world: World, chance: random.Random) -> Trial:
    """The store's file system is full after some units; then it has room again."""
    mount = world.folder / "small"
    mount.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(mount)], check=True)
    try:
        store = world.new_store(str(mount))
        ballast = mount / "ballast"
        room = chance.randrange(64 << 10, 1 << 20)
        with open(ballast, "wb") as file:
            free = os.statvfs(mount).f_bavail * os.statvfs(mount).f_frsize
            file.write(bytes(free - room))
        status = world.start(store).wait()
        ballast.unlink()
        began = time.monotonic()
        world.finish(store, {})
        trial = world.judge(store)
        trial.recover_s = time.monotonic() - began
        trial.met = status != 0
        return trial
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


__all__ = [
    "EATS", "KILLS", "flipped_bit", "full_disk", "killed_child", "on_ray", "poisoned", "process",
    "signalled_driver", "two_drivers", "zombie_driver",
]  # fmt: skip
