"""A handful of the trials of `make soak`: real commands, killed at random moments."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.soak import BEGIN, END, line, written
from benchmarks.soak_faults import killed_child, signalled_driver, zombie_driver
from benchmarks.soak_world import Trial, World

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    before = dict(os.environ)
    yield World.make(tmp_path_factory.mktemp("soak"))
    os.environ.clear()
    os.environ.update(before)


def assert_nothing_lost(trial: Trial) -> None:
    assert (trial.lost, trial.wrong) == (0, 0), trial
    assert trial.met


@pytest.mark.parametrize("seed", [1, 2])
def test_a_driver_killed_at_a_random_moment(world: World, seed: int) -> None:
    assert_nothing_lost(signalled_driver((), signal.SIGKILL)(world, random.Random(seed)))


def test_a_child_killed_at_a_random_moment(world: World) -> None:
    assert_nothing_lost(killed_child(world, random.Random(3)))


def test_a_driver_that_sleeps_while_another_does_its_work(world: World) -> None:
    assert_nothing_lost(zombie_driver(world, random.Random(4)))


def test_the_judge_sees_what_is_lost_and_what_is_wrong(world: World) -> None:
    """The soak's own negative control."""
    store = Path(world.new_store())
    world.finish(str(store), {})
    shard = next(p for p in (store / "mid_block" / "c" / "3").rglob("*") if p.is_file())
    data = bytearray(shard.read_bytes())
    data[0] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(data)
    (store / "receipts" / "00000005.json").unlink()
    trial = world.judge(str(store))
    assert trial.lost == 8  # the rows of unit 5
    assert trial.wrong >= 2  # a row's bits, and what `verify --deep` says


@pytest.mark.parametrize("name", ["index.parquet", "zarr.json", "samples.parquet"])
def test_the_store_s_own_objects_are_repaired_by_the_command(world: World, name: str) -> None:
    store = Path(world.new_store())
    world.finish(str(store), {})
    path = store / name
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert world.start(str(store), ("--repair",)).wait() == 0, world.log(str(store))
    assert_nothing_lost(world.judge(str(store)))


def test_the_table_goes_between_its_marks() -> None:
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert written(page, ["new"]) == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
    assert written(written(page, ["a"]), ["new"]) == written(page, ["new"])


def test_a_line_of_the_table_adds_up() -> None:
    from benchmarks.soak import FAULTS

    trials = [Trial(lost=1, wrong=2, recomputed=4, recover_s=2.0), Trial(recomputed=8, met=False)]
    cells = [cell.strip() for cell in line(FAULTS[0], trials).split("|")[1:-1]]
    assert cells[2:] == ["2", "1", "1", "2", "6 (8)", "1.0 (2.0)"]
