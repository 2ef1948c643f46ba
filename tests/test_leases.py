"""What a worker does with a lease: find, skip, probe, give back; and parts of a unit."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from drl_data.diffusion_spec import ConditionSpec
from drl_data.errors import ImageError, StoppedError
from drl_data.extract import ExtractTask, make_task
from drl_data.images import read_batches
from drl_data.index import build_index
from drl_data.metering import ByteBudget, take
from drl_data.objects import LocalFolder
from drl_data.pipeline import Pipeline, RunSpec
from drl_data.plan import InvalidRow, Lease, Unit
from drl_data.runs import extract, prepare
from drl_data.spec import BackboneSpec, DatasetSpec, ImageSpec
from drl_data.stopping import Stop
from drl_data.store import FeatureStore
from drl_data.testing import write_photo_tars
from drl_data.tiny_models import save_tiny_ddpm, save_tiny_stable_diffusion
from drl_data.unit_features import Selection, UnitFeatures

N_SAMPLES = 22
CONDITION = ConditionSpec()
ROWS_PER_UNIT = 8


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photo_tars(tmp_path_factory.mktemp("photos"), n_samples=N_SAMPLES)


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_ddpm(tmp_path_factory.mktemp("ddpm"))


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_stable_diffusion(tmp_path_factory.mktemp("sd"))


def pipeline(photos: Path, model: Path, store: Path, **changes: object) -> Pipeline:
    data: dict[str, object] = {
        "name": "leases",
        "dataset": {"tars": str(photos / "*.tar")},
        "images": {"size": 16},
        "backbone": {"model": str(model)},
        "schedule": {"timesteps": [0, 300]},
        "taps": ["mid_block", {"path": "up_blocks.*", "reduce": "avg_pool(4)"}],
        "features": {"dtype": "float32", "batch_size": 4, "rows_per_unit": ROWS_PER_UNIT},
        "store": {"url": str(store)},
    }
    return Pipeline.parse({**data, **changes})


def created(pipeline: Pipeline) -> FeatureStore:
    """The pipeline's store, without a unit."""
    found = prepare(pipeline)
    assert pipeline.store is not None
    return FeatureStore.create(
        pipeline.store.url, found.spec, found.arrays, found.times, found.index
    )


def task_of(
    store: FeatureStore, model: Path, condition: ConditionSpec = CONDITION, **settings: int
) -> ExtractTask:
    backbone = BackboneSpec(model=str(model))
    return make_task(store.url, backbone, condition, RunSpec(**settings), n_cpus=1)


def before_forwards(task: ExtractTask, call: Callable[[], object]) -> RemovableHandle:
    """Call something before each forward of the task's only computer."""

    def hook(module: nn.Module, args: tuple[object, ...]) -> None:
        call()

    computer = task._computers.get()
    handle = computer.backbone.network.register_forward_pre_hook(hook)
    task._computers.put(computer)
    return handle


def once(call: Callable[[], object]) -> Callable[[], object]:
    """What calls at its first call only."""
    left = [call]
    return lambda: left.pop()() if left else None


def test_a_unit_that_another_driver_signed_is_not_computed(
    photos: Path, ddpm: Path, tmp_path: Path
) -> None:
    store = created(pipeline(photos, ddpm, tmp_path / "s"))
    task = task_of(store, ddpm)
    first = task(Lease(store.units[1]))
    assert first is not None
    assert first.computed

    def never() -> None:
        raise AssertionError("a forward ran")

    before_forwards(task, never)
    again = task(Lease(store.units[1], attempt=2))
    assert again is not None
    assert again.receipt == first.receipt
    assert not again.computed
    with pytest.raises(AssertionError, match="a forward ran"):
        task(Lease(store.units[0]))


def test_the_loser_of_a_race_says_that_its_unit_is_anothers(
    photos: Path, ddpm: Path, tmp_path: Path
) -> None:
    """Two tasks that both find no receipt: one signs, and both return what is signed."""
    store = created(pipeline(photos, ddpm, tmp_path / "s"))
    tasks = [task_of(store, ddpm), task_of(store, ddpm)]
    barrier = threading.Barrier(2)
    for task in tasks:
        before_forwards(task, once(barrier.wait))
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda task: task(Lease(store.units[0])), tasks))
    assert sorted(one.computed for one in found if one) == [False, True]
    signed = store.receipt(store.units[0])
    assert [one.receipt for one in found if one] == [signed, signed]


def test_a_run_counts_what_it_found_apart(photos: Path, ddpm: Path, tmp_path: Path) -> None:
    """Another driver signs every unit as soon as this one has listed what is pending."""
    chosen = pipeline(photos, ddpm, tmp_path / "s", run={"leases": 1})
    store = created(chosen)
    other = task_of(store, ddpm)

    class Overtaken:
        """A progress display at whose first advance another driver has done all units."""

        def bar(self, label: str, total: int, unit: str) -> Overtaken:
            return self

        def __enter__(self) -> Overtaken:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def advance(self, n: int = 1, **numbers: float) -> None:
            for unit in store.units:
                other(Lease(unit))

    mine = extract(chosen, progress=Overtaken())
    assert (mine.n_found, mine.n_ok) in ((2, 8), (1, 16))  # the second may have begun
    receipts = mine.store.receipts()
    own = [receipts[unit] for unit in range(3 - mine.n_found)]
    for stage in ("denoise", "write"):
        assert mine.stage_s[stage] == pytest.approx(sum(r.run.seconds[stage] for r in own))
    assert mine.store.sealed
    assert extract(chosen).n_found == 0


def test_poison_is_listed_and_never_read(
    photos: Path, ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No range that is read holds a byte of it; its neighbours have their features all the same."""
    store = created(pipeline(photos, ddpm, tmp_path / "s"))
    reference = extract(pipeline(photos, ddpm, tmp_path / "reference")).store
    unit = store.units[1]
    reason = "its worker was killed by signal 9 in 3 of 3 attempts"
    ranges: list[tuple[str, int, int]] = []

    class Recording(LocalFolder):
        def get_range(self, path: str, start: int, stop: int) -> memoryview:
            ranges.append((path, start, stop))
            return super().get_range(path, start, stop)

    monkeypatch.setattr(
        "drl_data.images.open_parent",
        lambda url: (Recording(Path(url).parent), Path(url).name),
    )
    result = task_of(store, ddpm)(Lease(unit, attempt=4, poison=((10, reason), (13, reason))))
    assert result is not None
    assert result.receipt.invalid == (
        InvalidRow(10, "crop-0010", "worker", reason),
        InvalidRow(13, "crop-0013", "worker", reason),
    )
    assert (result.receipt.n_ok, result.receipt.run.attempt) == (6, 4)
    assert {path for path, _, _ in ranges} == {"photos-000000.tar", "photos-000001.tar"}
    for row in (10, 13):
        start, size = (store.index.table[name][row].as_py() for name in ("offset", "size"))
        tar = Path(store.index.tars[store.index.table["tar"][row].as_py()].url).name
        assert all(b <= start or a >= start + size for path, a, b in ranges if path == tar)
    rest = [i for i in range(unit.n_rows) if i not in (2, 5)]
    for array in store.arrays:
        got, want = (s.read_unit(array.name, 1, unit) for s in (store, reference))
        np.testing.assert_array_equal(got[rest], want[rest], array.name)
        assert np.isnan(got[[2, 5]]).all()


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_rows_left_out_are_neither_fetched_nor_decoded(photos: Path, data: st.DataObject) -> None:
    index = build_index(DatasetSpec(tars=str(photos / "*.tar")))
    rows = np.array(data.draw(st.lists(st.booleans(), min_size=12, max_size=12)))
    skip = data.draw(st.sets(st.integers(5, 16), max_size=3))
    unit = Unit(0, 5, 17)
    batches = list(
        read_batches(
            unit,
            index,
            ImageSpec(size=16),
            batch_size=5,
            n_threads=2,
            prefetch_bytes=1 << 20,
            rows=rows,
            skip={row: ImageError("worker", "why") for row in skip},
        )
    )
    assert [b.start for b in batches] == [
        start for start in (5, 10, 15) if rows[start - 5 : start].any()
    ]
    wanted = set((np.flatnonzero(rows) + 5).tolist())
    listed = [row for batch in batches for row in batch.invalid]
    assert [row.row for row in listed] == sorted(wanted & skip)
    assert all((row.stage, row.reason) == ("worker", "why") for row in listed)
    assert all(row.key == index.table["key"][row.row].as_py() for row in listed)
    for batch in batches:
        seen = batch.pixels.reshape(5, -1).any(axis=1).nonzero()[0] + batch.start
        inside = range(batch.start, batch.start + batch.n_rows)
        assert seen.tolist() == sorted((wanted - skip).intersection(inside))


def test_a_probe_computes_its_rows_in_their_places_and_writes_nothing(
    photos: Path, ddpm: Path, tmp_path: Path
) -> None:
    store = created(pipeline(photos, ddpm, tmp_path / "s"))
    task = task_of(store, ddpm)
    seen: list[Tensor] = []
    computer = task._computers.get()
    computer.backbone.network.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    task._computers.put(computer)
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    assert task(Lease(store.units[1], probe=(12, 14), poison=((12, "why"),))) is None
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before
    assert store.pending() == store.units
    assert [len(x) for x in seen] == [4, 4]  # one of the unit's two batches, both timesteps
    assert task(Lease(store.units[1], probe=(12, 13), poison=((12, "why"),))) is None
    assert len(seen) == 2  # nothing is left to compute
    task(Lease(store.units[1]))
    assert len(seen) == 6


def computed(task: ExtractTask, selection: Selection, unit: int = 1) -> UnitFeatures:
    with task.room(task._store.units[unit], Stop()):
        return task.compute(task._store.units[unit], selection)


PARTS: dict[str, dict[str, object]] = {
    "features": {
        "taps": [
            "mid_block",
            {"path": "up_blocks.0", "reduce": ["mean", "time_mean"], "name": "averaged"},
            {"path": "vae.encoder.mid_block", "name": "encoded"},
        ],
        "noise": {"members": 2},
        "features": {"dtype": "int8", "batch_size": 4, "rows_per_unit": ROWS_PER_UNIT},
    },
    "losses": {
        "taps": ["loss", "loss.l1"],
        "condition": {"template": "a {label}", "candidates": ["cat", "dog"]},
        "features": {"dtype": "float32", "batch_size": 4, "rows_per_unit": ROWS_PER_UNIT},
    },
    "inversion": {
        "noise": {"kind": "inversion"},
        "latents": {"posterior": "mean"},
        "schedule": {
            "convention": "generation_label",
            "n_steps": 10,
            "timesteps": [9, 2, 6],
            "scheduler": "DDIMScheduler",
        },
    },
}


@pytest.fixture(scope="module", params=list(PARTS))
def parts(
    photos: Path, sd: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[ExtractTask, UnitFeatures]:
    """A task with arrays of some kinds, and one whole unit by it."""
    chosen = pipeline(
        photos,
        sd,
        tmp_path_factory.mktemp("parts") / "s",
        **{"schedule": {"timesteps": [0, 300, 700]}, **PARTS[request.param]},
    )
    task = task_of(created(chosen), sd, chosen.condition)
    return task, computed(task, Selection())


@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_a_part_of_a_unit_has_the_bits_of_the_whole(
    parts: tuple[ExtractTask, UnitFeatures], data: st.DataObject
) -> None:
    task, whole = parts
    store = task._store
    rows = np.array(data.draw(st.lists(st.booleans(), min_size=8, max_size=8)))
    times: dict[str, frozenset[int]] = {}
    for array in store.features:
        some = data.draw(st.frozensets(st.integers(0, 2)), array.name)
        times[array.name] = frozenset(range(3)) if array.timesteps == "mean" and some else some
    part = computed(task, Selection(rows=rows, times=times))
    assert part.invalid == []
    for array in store.arrays:
        wanted = times[array.quantises or array.name]
        for cell in {array.cell(t, 0, 3) for t in wanted}:
            got, want = part.features[array.name][cell], whole.features[array.name][cell]
            np.testing.assert_array_equal(got[rows].numpy(), want[rows].numpy(), array.name)


@pytest.mark.parametrize("parts", ["features"], indirect=True)
def test_forwards_that_no_array_wants_are_left_out(
    parts: tuple[ExtractTask, UnitFeatures],
) -> None:
    task, _ = parts
    calls: list[int] = []
    hook = before_forwards(task, lambda: calls.append(1))
    rows = np.arange(8) >= 4
    computed(task, Selection(rows=rows, times={"mid_block": {1}}))
    assert len(calls) == 2  # members, of one batch, at one timestep
    computed(task, Selection(rows=rows, times={"encoded": {0}}))
    assert len(calls) == 2
    computed(task, Selection(times={"mid_block": {0}, "averaged": {0, 1, 2}}))
    assert len(calls) == 2 + 2 * 3 * 2
    hook.remove()


def test_memory_that_was_given_is_filled(parts: tuple[ExtractTask, UnitFeatures]) -> None:
    """Two parts into one memory are the whole."""
    task, whole = parts
    unit = task._store.units[1]
    rows = np.arange(8) % 3 == 0
    first = computed(task, Selection(rows=rows))
    with task.room(unit, Stop()):
        both = task.compute(unit, Selection(rows=~rows), into=first.features)
    for name, want in whole.features.items():
        np.testing.assert_array_equal(both.features[name].numpy(), want.numpy(), name)


def test_receipts_name_the_tars_without_secrets(photos: Path, ddpm: Path, tmp_path: Path) -> None:
    store = extract(pipeline(photos, ddpm, tmp_path / "s")).store
    receipts = store.receipts()
    tars = store.index.tars
    names = [[tar.url for tar in receipts[i].run.tars] for i in range(3)]
    assert names == [[tars[0].url], [tars[0].url, tars[1].url], [tars[1].url]]
    for receipt in receipts.values():
        for tar in receipt.run.tars:
            (info,) = [t for t in tars if t.url == tar.url]
            assert (tar.size, tar.etag) == (info.size, info.etag)


# --- the wish to stop ---------------------------------------------------------------------------


def stopped(grace_s: float) -> Stop:
    stop = Stop()
    stop.request(grace_s)
    return stop


def test_no_unit_begins_after_the_wish_to_stop(photos: Path, ddpm: Path, tmp_path: Path) -> None:
    store = created(pipeline(photos, ddpm, tmp_path / "s"))
    with pytest.raises(StoppedError, match="before the unit began"):
        task_of(store, ddpm)(Lease(store.units[0]), stopped(1000))
    assert store.pending() == store.units


@pytest.mark.parametrize("forwards", [1, 2, 3])
def test_a_unit_ends_at_the_deadline_between_forwards(
    photos: Path, ddpm: Path, tmp_path: Path, forwards: int
) -> None:
    """Without time left nothing is written; with time the unit is finished and signed."""
    for grace_s, is_done in ((0.0, False), (1000.0, True)):
        store = created(pipeline(photos, ddpm, tmp_path / str(grace_s)))
        task, stop = task_of(store, ddpm), Stop()
        calls = itertools.count(1)

        def ask(calls: Iterator[int] = calls, stop: Stop = stop, grace_s: float = grace_s) -> None:
            if next(calls) == forwards:
                stop.request(grace_s)

        before_forwards(task, ask)
        if is_done:
            assert task(Lease(store.units[0]), stop) is not None
        else:
            with pytest.raises(StoppedError, match="the time to finish the unit is over"):
                task(Lease(store.units[0]), stop)
            assert next(calls) == forwards + 1
        assert (store.receipt(store.units[0]) is not None) == is_done
        assert task._computers.qsize() == 1
        with task.room(store.units[0], Stop()):
            pass  # the memory is free again


def test_a_write_that_has_begun_is_finished(photos: Path, ddpm: Path, tmp_path: Path) -> None:
    store = created(pipeline(photos, ddpm, tmp_path / "s"))
    task, stop = task_of(store, ddpm), Stop()
    write = task._store.write

    def stop_and_write(*args: object) -> object:
        stop.request(0)
        return write(*args)  # type: ignore[arg-type]

    task._store.write = stop_and_write  # type: ignore[method-assign, assignment]
    assert task(Lease(store.units[0]), stop) is not None
    assert store.receipt(store.units[0]) is not None


def test_a_stop_does_not_wait_behind_others(photos: Path, ddpm: Path, tmp_path: Path) -> None:
    """One unit holds the only computer, another the memory: who waits for them gives up."""
    store = created(pipeline(photos, ddpm, tmp_path / "s"))
    task = task_of(store, ddpm, memory_bytes=1)
    for held in ("computer", "memory"):
        stop, unit = Stop(), store.units[0]
        with ThreadPoolExecutor(1) as pool:
            if held == "computer":
                computer = task._computers.get()
                waiting = pool.submit(task, Lease(unit), stop)
                stop.request(1000)
                try:
                    with pytest.raises(StoppedError):
                        waiting.result(timeout=60)
                finally:
                    task._computers.put(computer)
            else:
                with task.room(unit, Stop()):
                    waiting = pool.submit(task, Lease(unit), stop)
                    stop.request(1000)
                    with pytest.raises(StoppedError):
                        waiting.result(timeout=60)
    assert task(Lease(store.units[0])) is not None


def test_who_waits_asks_and_may_be_told_to_go() -> None:
    budget, asked = ByteBudget(10), itertools.count()

    def ask() -> None:
        if next(asked) == 2:
            raise StoppedError("enough")

    with budget.reserve(10), pytest.raises(StoppedError), budget.reserve(1, ask):
        pass
    with budget.reserve(10):
        pass
    assert next(asked) == 3
    with pytest.raises(StoppedError):
        take(queue.SimpleQueue(), stopped(0).check)
