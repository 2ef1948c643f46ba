"""Faults of object storage for the soak: a real S3 server behind `drl_data.faulty_s3`.

The server is Ceph's gateway where it is installed, else moto's. Commands of `drl` see it through
the proxy; the judge reads the server itself.
"""

from __future__ import annotations

import atexit
import os
import random
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import botocore.session
from soak_world import Trial, World

from drl_data.faulty_s3 import PASSING, Fault, FaultyS3, Kind, RandomFaults
from drl_data.objects import open_folder

Inject = Callable[[World, random.Random], Trial]

CEPH = Path(__file__).resolve().parent.parent / "tests" / "ceph.sh"
MANY = 1 << 20
ALL_KINDS: tuple[Kind, ...] = (*PASSING, "409", "refused")
"""What random faults are drawn from."""


@dataclass(frozen=True)
class Server:
    """A real S3 server, alone on this machine until this process ends."""

    endpoint: str
    key: str
    secret: str


@cache
def server(folder: Path) -> Server:
    """Start it at first use."""
    if shutil.which("radosgw") is not None:
        started = subprocess.run(
            ["bash", str(CEPH), "start", str(folder)], capture_output=True, text=True, timeout=300
        )
        atexit.register(subprocess.run, ["bash", str(CEPH), "stop", str(folder)], check=True)
        assert started.returncode == 0, started.stdout + started.stderr
        endpoint = started.stdout.strip().splitlines()[-1]
        return Server(endpoint, "cephkey123", "cephsecret123")
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    atexit.register(moto.stop)
    host, port = moto.get_host_and_port()
    return Server(f"http://{host}:{port}", "test", "test")


@dataclass(frozen=True)
class Bucket:
    """A new bucket with the tars, and the proxy in front of its server."""

    url: str
    proxy: FaultyS3

    @property
    def settings(self) -> dict[str, str | None]:
        """For `World.start` and `World.finish`."""
        return {"AWS_ENDPOINT_URL": self.proxy.endpoint, "tars": f"{self.url}/tars/*.tar"}


@contextmanager
def bucket(world: World) -> Iterator[Bucket]:
    """Make one; the environment of this process names the server itself."""
    real = server(world.folder / "s3")
    os.environ.update(
        AWS_ENDPOINT_URL=real.endpoint,
        AWS_ACCESS_KEY_ID=real.key,
        AWS_SECRET_ACCESS_KEY=real.secret,
        AWS_REGION="us-east-1",
        AWS_DEFAULT_REGION="us-east-1",
    )
    name = f"soak-{uuid.uuid4().hex[:12]}"
    client = botocore.session.get_session().create_client("s3")
    client.create_bucket(Bucket=name)
    client.close()
    folder = open_folder(f"s3://{name}/tars")
    for path in (world.folder / "tars").glob("*.tar"):
        folder.put(path.name, [path.read_bytes()])
    with FaultyS3(real.endpoint) as proxy:
        yield Bucket(f"s3://{name}", proxy)


def _seconds(run: Callable[[], object]) -> float:
    start = time.monotonic()
    run()
    return time.monotonic() - start


@cache
def undisturbed_s(world_folder: Path) -> float:
    """Seconds of a run on the server without faults."""
    world = World(world_folder, n_stores=MANY)
    with bucket(world) as made:
        store = world.new_store(made.url)
        return _seconds(lambda: world.finish(store, made.settings))


def flaky_storage(rate: float) -> Inject:
    """A share of all requests fails, by chance, in every way that passes."""

    def inject(world: World, chance: random.Random) -> Trial:
        usual_s = undisturbed_s(world.folder)
        with bucket(world) as made:
            store = world.new_store(made.url)
            made.proxy.random = RandomFaults(rate, chance.randrange(MANY), ALL_KINDS)
            took_s = _seconds(lambda: world.finish(store, made.settings))
            struck = made.proxy.struck()
            trial = world.judge(store)
        trial.recover_s = max(took_s - usual_s, 0.0)
        trial.met = sum(struck.values()) > 0
        trial.note = f"{len(made.proxy.requests)} requests, {dict(struck)} {trial.note}"
        return trial

    return inject


def unusable_storage(kind: Kind) -> Inject:
    """From some object on every write fails for good; then the cause is mended."""

    def inject(world: World, chance: random.Random) -> Trial:
        with bucket(world) as made:
            store = world.new_store(made.url)
            nth = chance.randrange(1, 80)
            made.proxy.faults = [Fault(kind, on="put", key=".*/c/.*", nth=nth, times=None)]
            run = world.start(store, **made.settings)
            status = run.wait()
            made.proxy.faults = []
            took_s = _seconds(lambda: world.finish(store, made.settings))
            trial = world.judge(store)
        trial.recover_s = took_s
        trial.met = status == 1
        trial.note = f"exit status {status} {trial.note}"
        return trial

    return inject


def main() -> None:
    """One trial of each, for a look: `python benchmarks/soak_storage.py FOLDER [SEED]`."""
    world = World.make(Path(sys.argv[1]))
    chance = random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    for name, inject in {
        "5 %": flaky_storage(0.05),
        "20 %": flaky_storage(0.2),
        "access denied": unusable_storage("403"),
        "bucket missing": unusable_storage("bucket"),
    }.items():
        print(name, inject(world, chance), flush=True)


if __name__ == "__main__":
    main()
