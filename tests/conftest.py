"""Fixtures shared by the rooms: S3 servers, and small stores and indices to put in them."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from drl_data import cli

Drl = Callable[..., tuple[int, str, str]]
"""Runs `drl ARGS`: exit status, standard output, standard error."""

AWS_SETTINGS = (
    "AWS_ENDPOINT_URL",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
)


def new_bucket(endpoint: str, key: str, secret: str) -> Iterator[str]:
    """URL of a new bucket; the environment names the server while the fixture lives."""
    import botocore.session

    before = {name: os.environ.get(name) for name in AWS_SETTINGS}
    os.environ.update(
        AWS_ENDPOINT_URL=endpoint,
        AWS_ACCESS_KEY_ID=key,
        AWS_SECRET_ACCESS_KEY=secret,
        AWS_REGION="us-east-1",
        AWS_DEFAULT_REGION="us-east-1",
    )
    bucket = f"drl-{uuid.uuid4().hex[:12]}"
    client = botocore.session.get_session().create_client("s3", region_name="us-east-1")
    client.create_bucket(Bucket=bucket)
    client.close()
    yield f"s3://{bucket}"
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(autouse=True)
def _threads_stay() -> Iterator[None]:
    """Who computes features with one thread in this process must not slow down the tests after."""
    before = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    yield
    if before is not None:
        sys.modules["torch"].set_num_threads(before)


@pytest.fixture(scope="module")
def module_on_one_thread() -> Iterator[None]:
    """As `one_thread`, for fixtures of the whole module too: small computations are faster so."""
    from drl_data.threads import one_thread

    with one_thread():
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The bits of a convolution depend on the number of threads; extraction computes with one.

    For modules whose references must be exact:
    `pytestmark = pytest.mark.usefixtures("one_thread")`.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    """moto's S3 server over HTTP, on a free port."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_url(moto_endpoint: str) -> Iterator[str]:
    """A new, empty bucket on moto's server."""
    yield from new_bucket(moto_endpoint, "test", "test")


@pytest.fixture(scope="session")
def ceph_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Ceph's RADOS gateway over HTTP, on free ports."""
    missing = [p for p in ("ceph-mon", "ceph-osd", "radosgw") if shutil.which(p) is None]
    if missing:
        pytest.skip(
            f"{', '.join(missing)} not installed: apt-get install --no-install-recommends "
            "ceph-mon ceph-osd ceph-common radosgw"
        )
    folder = tmp_path_factory.mktemp("ceph")
    script = Path(__file__).with_name("ceph.sh")
    try:
        started = subprocess.run(
            ["bash", str(script), "start", str(folder)], capture_output=True, text=True, timeout=180
        )
        assert started.returncode == 0, started.stdout + started.stderr
        yield started.stdout.strip().splitlines()[-1]
    finally:
        subprocess.run(["bash", str(script), "stop", str(folder)], check=True, timeout=60)


@pytest.fixture
def ceph_url(ceph_endpoint: str) -> Iterator[str]:
    """A new, empty bucket on Ceph's gateway."""
    yield from new_bucket(ceph_endpoint, "cephkey123", "cephsecret123")


@pytest.fixture(
    params=[
        "local",
        "memory",
        pytest.param("s3", marks=pytest.mark.s3),
        pytest.param("ceph", marks=pytest.mark.ceph),
    ]
)
def folder_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder of each kind that `objects` knows."""
    if request.param == "local":
        return str(tmp_path / "folder")
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}"
    bucket = request.getfixturevalue("s3_url" if request.param == "s3" else "ceph_url")
    return f"{bucket}/folder"


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A Ray on this machine with four CPU slots, shared by the session."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import ray

    ray.init(
        address="local",  # and not what else may run on this machine
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    yield
    ray.shutdown()


@pytest.fixture
def drl(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Drl:
    """Run `drl ARGS` in this process: (exit status, standard output, standard error)."""

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["drl", *map(str, args)])
        monkeypatch.setattr(cli.out, "width", 200)
        before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            with pytest.raises(SystemExit) as ended:
                cli.main()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        captured = capfd.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), captured.out, captured.err

    return run
