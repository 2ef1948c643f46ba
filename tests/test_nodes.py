"""Ray nodes that come and go: killed with and without a replacement, none left, taken away with a
notice. Real raylets, by `ray.cluster_utils.Cluster`; the tasks are stubs."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from drl_data import executors
from drl_data.executors import Workers, run_ray
from drl_data.leases import Limits, Outcome
from drl_data.plan import plan_units
from drl_data.ray_pool import NOTICE_EVERY_S
from tests.stub_tasks import make_logged
from tests.test_executors import ok, results, wait_until

pytestmark = pytest.mark.ray


class Nodes:
    """A cluster with a head that computes nothing, and worker nodes with one slot each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        self.address: str = self._cluster.address

    def add(self) -> object:
        return self._cluster.add_node(num_cpus=1)

    def kill(self, node: object) -> None:
        self._cluster.remove_node(node, allow_graceful=False)

    def kill_all(self) -> None:
        for node in list(self._cluster.worker_nodes):
            self.kill(node)

    def announce(self, node: object, seconds: float) -> None:
        """As the cloud's daemon does for a spot machine that will be taken away."""
        import ray
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        client = ray._raylet.GcsClient(address=self._cluster.gcs_address)
        accepted, why = client.drain_node(
            node.node_id,  # type: ignore[attr-defined]
            DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
            "spot",
            int((time.time() + seconds) * 1000),
        )
        assert accepted, why

    def close(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    """Another Ray than the one that the session shares, if that runs."""
    import ray

    shared = ray.is_initialized()
    ray.shutdown()
    found = Nodes()
    ray.init(address=found.address, log_to_driver=False, configure_logging=False)
    yield found
    ray.shutdown()
    found.close()
    if shared:
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )


@pytest.fixture
def nodes(cluster: Nodes) -> Iterator[Nodes]:
    """The cluster without worker nodes, before the test and after it."""
    yield cluster
    cluster.kill_all()


def begun(folder: Path, node: object) -> list[Path]:
    """Marks of the units that began on a node."""
    (raylet,) = node.all_processes["raylet"]  # type: ignore[attr-defined]
    return list(folder.glob(f"*-{raylet.process.pid}"))


@pytest.fixture
def behind() -> Iterator[ThreadPoolExecutor]:
    """Runs go on in a thread: Ray starts nodes in the main one alone."""
    with ThreadPoolExecutor(1) as pool:
        yield pool


def run_logged(
    folder: Path, n_units: int, seconds: float, leases: int = 2, writes: bool = False
) -> list[Outcome[int]]:
    return list(
        run_ray(
            partial(make_logged, folder, seconds, writes),
            plan_units(n_units, 1),
            workers=Workers(2),
            limits=Limits(leases),
        )
    )


def assert_all_right(outcomes: list[Outcome[int]], n_units: int) -> None:
    assert results(iter(outcomes)) == (ok(plan_units(n_units, 1)), {})


@pytest.mark.parametrize("replaced", [False, True])
def test_a_node_that_is_killed_costs_time_alone(
    nodes: Nodes, tmp_path: Path, behind: ThreadPoolExecutor, replaced: bool
) -> None:
    lost, _ = nodes.add(), nodes.add()
    run = behind.submit(run_logged, tmp_path, 16, 0.2)
    wait_until(lambda: len(begun(tmp_path, lost)) >= 2)
    nodes.kill(lost)
    if replaced:
        nodes.add()
    assert_all_right(run.result(120), 16)


def test_with_no_node_left_the_run_waits_says_so_and_goes_on(
    nodes: Nodes,
    tmp_path: Path,
    behind: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(executors, "WARN_AFTER_S", 0.5)
    caplog.set_level(logging.WARNING)
    only = nodes.add()
    run = behind.submit(run_logged, tmp_path, 6, 0.2, leases=1)
    wait_until(lambda: len(begun(tmp_path, only)) >= 1)
    caplog.clear()
    nodes.kill(only)
    wait_until(lambda: "no worker is ready; the run waits for one. There is a" in caplog.text)
    nodes.add()
    assert_all_right(run.result(120), 6)
    assert "a worker is ready; the run goes on" in caplog.text


def test_a_notice_sends_units_elsewhere_and_charges_nobody(
    nodes: Nodes, tmp_path: Path, behind: ThreadPoolExecutor
) -> None:
    """Units come back from the node that will be taken away, and are computed elsewhere as if they
    had never begun; no unit begins there afterwards."""
    lost, _ = nodes.add(), nodes.add()
    run = behind.submit(run_logged, tmp_path, 4, 3 * NOTICE_EVERY_S)  # at work when it is heard of
    wait_until(lambda: len(begun(tmp_path, lost)) == 2)
    nodes.announce(lost, 60)
    wait_until(lambda: len(list(tmp_path.glob("stopped-*"))) == 2)
    n_begun = len(begun(tmp_path, lost))
    outcomes = run.result(120)
    assert_all_right(outcomes, 4)
    assert {outcome.attempts for outcome in outcomes} == {1}
    assert len(begun(tmp_path, lost)) == n_begun


def test_a_notice_lets_units_that_write_finish(
    nodes: Nodes, tmp_path: Path, behind: ThreadPoolExecutor
) -> None:
    """They are deaf to a stop, as a write that has begun is, and none is computed again."""
    lost, _ = nodes.add(), nodes.add()
    run = behind.submit(run_logged, tmp_path, 4, 3 * NOTICE_EVERY_S, writes=True)
    wait_until(lambda: len(begun(tmp_path, lost)) == 2)
    nodes.announce(lost, 60)
    assert_all_right(run.result(120), 4)
    assert len(begun(tmp_path, lost)) == 2
    assert len(list(tmp_path.iterdir())) == 4  # each unit once, wherever
