"""Writing a unit: objects are write-once, so no attempt can change what a receipt has signed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drl_data.compare import compare_rows, tolerance
from drl_data.errors import ConflictError, FeatureError, ObjectError
from drl_data.objects import Buffer, Folder, LocalFolder
from drl_data.receipts import Receipt
from drl_data.shards import crc32c
from drl_data.spec import ArraySpec
from drl_data.store import FeatureStore, UnitCounts

from .stores import (
    EVERY_DTYPE,
    RUN,
    computed_features,
    fill,
    invalid_row,
    make_array,
    make_store,
    quantised,
    unit_features,
)

ONE_UNIT = 4
"""Rows of stores that are one unit."""

SMALL = (make_array("full", (5,), "float32"), *quantised("signed", (3, 2), "int8"))


def write(store: FeatureStore, attempt: int, invalid: Sequence[int] = ()) -> Receipt:
    """What one attempt at unit 0 does: features with its own last bits."""
    unit = store.units[0]
    run = RUN.model_copy(update={"attempt": attempt + 1, "host": f"host-{attempt}"})
    bad = [invalid_row(row) for row in invalid]
    return store.write(unit, computed_features(store, unit, attempt), bad, run)


def assert_whole(store: FeatureStore) -> Receipt:
    """Checksums agree with the one receipt, features are those of the exact attempt but for
    rounding; the receipt."""
    store = FeatureStore(store.folder, store.described)
    assert store.verify(deep=True) == []
    unit = store.units[0]
    want = computed_features(store, unit)
    for array in store.features:
        limit = 2 * tolerance("float32", array.dtype)  # of two attempts, each from the exact one
        for cell in range(store.n_cells(array.name)):
            names = store.parts(array.name)
            got = {name: store.read_unit(name, cell, unit) for name in names}
            found = compare_rows(array, got, {n: want[n][cell] for n in names}, limit)
            assert found.within, (array.name, cell, found)
    (receipt,) = store.receipts().values()
    assert [info.path for info in store.folder.list("receipts")] == ["receipts/00000000.json"]
    for record in receipt.objects:
        assert crc32c([store.folder.get(record.path)]) == record.crc32c
    return receipt


# --- signed already ------------------------------------------------------------------------------


def test_a_signed_unit_is_not_written_again(folder_url: str) -> None:
    store = make_store(folder_url)
    unit = store.units[0]
    first = store.write(unit, unit_features(store, unit), [], RUN)
    run = RUN.model_copy(update={"host": "elsewhere"})
    assert store.write(unit, unit_features(store, unit), [], run) == first
    other = unit_features(store, unit)
    other["tokens"] = other["tokens"] + np.float32(1)
    want = r"content: tokens at timestep 10: 4 of 4 rows differ by more than 0\.001, the most by"
    with pytest.raises(ConflictError, match=want):
        store.write(unit, other, [], RUN)
    with pytest.raises(ConflictError, match=r"invalid rows \[\] there, \[2\] here"):
        store.write(unit, unit_features(store, unit), [invalid_row(2)], RUN)
    with pytest.raises(ConflictError, match=r"fits \{\} there, \{'tokens': 7\} here"):
        store.write(unit, unit_features(store, unit), [], RUN, UnitCounts(fits={"tokens": 7}))
    assert store.verify(deep=True) == [p for p in store.verify() if p.unit != 0]


class Reading(LocalFolder):
    """A folder that counts what is read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.read: list[str] = []

    def get(self, path: str) -> memoryview:
        self.read.append(path)
        return super().get(path)


def test_objects_are_read_only_where_checksums_differ(tmp_path: Path) -> None:
    store = make_store(str(tmp_path), ONE_UNIT)
    first = write(store, 0)
    folder = Reading(tmp_path)
    again = FeatureStore(folder, store.described, store.index)
    assert write(again, 0) == first
    assert folder.read == ["receipts/00000000.json"]
    assert write(again, 1) == first  # in other last bits
    assert "tokens/c/0/0/0/0" in folder.read
    assert "valid/c/0" not in folder.read
    counted = UnitCounts(clipped={"tokens": {"10": 3}}, input_bytes=1)
    unit = store.units[0]
    assert store.write(unit, computed_features(store, unit), [], RUN, counted) == first


def test_features_of_other_samples_are_refused(tmp_path: Path) -> None:
    store = make_store(str(tmp_path))
    features = unit_features(store, store.units[0])
    with pytest.raises(FeatureError, match=r"digest 1234; the store's index has [0-9a-f]{64}"):
        store.write(store.units[0], features, [], RUN, UnitCounts(samples="1234"))
    receipt = store.write(store.units[0], features, [], RUN)
    assert receipt.counts.samples == store.index.digest_rows(0, 4)


# --- begun before --------------------------------------------------------------------------------


class Failing(LocalFolder):
    """A disk that fails at the n-th conditional write."""

    def __init__(self, root: Path, n_left: int) -> None:
        super().__init__(root)
        self._n_left = n_left
        self._lock = threading.Lock()

    def put_if_absent(self, path: str, parts: Sequence[Buffer]) -> bool:
        with self._lock:
            self._n_left -= 1
            if self._n_left < 0:
                raise ObjectError("disk failed")
        return super().put_if_absent(path, parts)


def cut_short(store: FeatureStore, n_written: int) -> FeatureStore:
    """The same store on a disk that fails after some writes."""
    assert isinstance(store.folder, LocalFolder)
    return FeatureStore(Failing(store.folder.root, n_written), store.described, store.index)


def contents(folder: Path) -> dict[str, bytes]:
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    return {name: p.read_bytes() for name, p in files.items() if not name.startswith("receipts")}


@pytest.mark.parametrize("n_written", range(8))
def test_a_write_that_was_cut_short_is_pending_and_can_be_repeated(
    tmp_path: Path, n_written: int
) -> None:
    store = make_store(str(tmp_path / "cut"))
    cut = cut_short(store, n_written)
    with pytest.raises(ObjectError, match="disk failed"):
        cut.write(store.units[0], unit_features(store, store.units[0]), [], RUN)
    assert [u.id for u in store.pending()] == [0, 1, 2]
    fill(store)
    whole = make_store(str(tmp_path / "whole"))
    fill(whole)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    mine, theirs = store.receipts(), whole.receipts()
    assert [r.content() for r in mine.values()] == [r.content() for r in theirs.values()]
    assert mine[0].run.adopted == ()


def test_what_an_unfinished_attempt_left_is_adopted_and_signed_as_it_is(tmp_path: Path) -> None:
    arrays = [make_array(name, (3, 5), "float32") for name in ("a", "b")]
    store = make_store(str(tmp_path), ONE_UNIT, arrays=arrays)
    with pytest.raises(ObjectError):
        write(cut_short(store, 3), 1)
    left = {info.path: bytes(store.folder.get(info.path)) for info in store.folder.list()}
    left = {path: data for path, data in left.items() if "/c/0/" in path}
    assert len(left) == 3
    receipt = write(store, 2)
    assert receipt.run.adopted == tuple(sorted(left))
    for path, data in left.items():
        assert bytes(store.folder.get(path)) == data
    assert_whole(store)


@pytest.mark.parametrize(
    ("seed", "invalid", "message"),
    [
        (5, (), r"4 of 4 rows differ by more than"),
        (0, (2,), r"row 2 is invalid here, and not there"),
    ],
)
def test_what_another_computation_left_is_a_conflict(
    tmp_path: Path, seed: int, invalid: tuple[int, ...], message: str
) -> None:
    store = make_store(str(tmp_path))
    unit = store.units[0]
    with pytest.raises(ObjectError):
        cut_short(store, 4).write(unit, unit_features(store, unit), [], RUN)
    left = contents(tmp_path)
    bad = [invalid_row(row) for row in invalid]
    want = rf"unit 0: an unfinished attempt left other content: .*{message}.*--repair` removes"
    with pytest.raises(ConflictError, match=want):
        store.write(unit, unit_features(store, unit, seed), bad, RUN)
    assert {path: data for path, data in contents(tmp_path).items() if path in left} == left
    assert store.receipt(unit) is None


def test_rows_that_were_invalid_before_and_are_not_now_are_a_conflict(tmp_path: Path) -> None:
    store = make_store(str(tmp_path))
    unit = store.units[0]
    features = unit_features(store, unit)
    with pytest.raises(ObjectError):  # all but the receipt
        cut_short(store, 7).write(unit, features, [invalid_row(1)], RUN)
    with pytest.raises(ConflictError, match=r"rows \[1\] there, \[\] here") as error:
        store.write(unit, features, [], RUN)
    assert "the first is row 1" in str(error.value)
    assert "(1 are invalid there, and not here)" in str(error.value)


@pytest.mark.parametrize("at", ["padding", "footer", "nan"])
def test_bytes_that_are_no_rows_must_be_equal(tmp_path: Path, at: str) -> None:
    store = make_store(str(tmp_path), 5, arrays=(make_array("a", (6,), "bfloat16"),))
    unit = store.units[1]
    with pytest.raises(ObjectError):
        cut_short(store, 2).write(unit, unit_features(store, unit), [invalid_row(4)], RUN)
    path = tmp_path / "a/c/1/0/0"
    data = bytearray(path.read_bytes())
    data[{"nan": 0, "padding": 20, "footer": len(data) - 3}[at]] ^= 1
    path.write_bytes(data)
    want = "row 4 is invalid here" if at == "nan" else r"is no shard of this layout \("
    with pytest.raises(ConflictError, match=want):
        store.write(unit, unit_features(store, unit), [invalid_row(4)], RUN)


def test_a_torn_object_is_put_again(tmp_path: Path) -> None:
    """Where a put is not whole or nothing (some fsspec file systems), a dead writer leaves half."""
    store = make_store(str(tmp_path), ONE_UNIT)
    for path in ("tokens/c/0/1/0/0", "valid/c/0"):
        store.folder.put(path, [b"abc"])
    assert write(store, 1).run.adopted == ()
    assert_whole(store)


# --- scales belong to their integers -------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("n_written", range(1, 6))
def test_integers_of_one_attempt_with_scales_of_another_are_within_the_tolerance(
    tmp_path: Path, dtype: str, n_written: int
) -> None:
    arrays = quantised("q", (3, 5), "int8" if dtype == "int8" else "uint8")
    store = make_store(str(tmp_path), ONE_UNIT, arrays=arrays)
    with pytest.raises(ObjectError):
        write(cut_short(store, n_written), 1)
    write(store, 2)
    receipt = assert_whole(store)
    assert len(receipt.run.adopted) <= n_written


def test_a_group_that_makes_no_sense_together_is_a_conflict(tmp_path: Path) -> None:
    """A channel of zeros has the scale 1; integers of another attempt's tiny values would be
    huge with it."""
    arrays = quantised("q", (2,), "int8")
    store = make_store(str(tmp_path), ONE_UNIT, arrays=arrays)
    unit = store.units[0]
    zero = {
        "q": np.zeros((2, 4, 2), np.int8), "q__scale": np.ones((2, 4), np.float32)
    }  # fmt: skip
    tiny = {
        "q": np.full((2, 4, 2), 127, np.int8),
        "q__scale": np.full((2, 4), 1e-9, np.float32),
    }
    store.folder.put_if_absent("q/c/0/0/0", store.layouts["q"].parts(tiny["q"][0], []))
    with pytest.raises(ConflictError, match="q at timestep 10: 4 of 4 rows differ"):
        store.write(unit, zero, [], RUN)
    assert store.receipt(unit) is None


# --- zombies -------------------------------------------------------------------------------------


class Paused:
    """A folder that stops before its n-th conditional put, until told to go on."""

    def __init__(self, folder: Folder, n_before: int) -> None:
        self._folder = folder
        self._n_left = n_before
        self._lock = threading.Lock()
        self.paused = threading.Event()
        self.go_on = threading.Event()
        self.url = folder.url
        self.get, self.get_range, self.put = folder.get, folder.get_range, folder.put
        self.head, self.list, self.delete = folder.head, folder.list, folder.delete
        self.local_path = folder.local_path

    def put_if_absent(self, path: str, parts: Sequence[Buffer]) -> bool:
        with self._lock:
            self._n_left -= 1
            wait = self._n_left < 0
        if wait:
            self.paused.set()
            assert self.go_on.wait(60)
        return self._folder.put_if_absent(path, parts)


@contextmanager
def zombie(store: FeatureStore, n_before: int, attempt: int) -> Iterator[list[Receipt]]:
    """An attempt that puts `n_before` objects and falls asleep; it wakes up at the end of the
    block, and its receipt is then in the list."""
    folder = Paused(store.folder, n_before)
    asleep = FeatureStore(folder, store.described, store.index)
    receipts: list[Receipt] = []
    thread = threading.Thread(target=lambda: receipts.append(write(asleep, attempt)))
    thread.start()
    assert folder.paused.wait(60)
    try:
        yield receipts
    finally:
        folder.go_on.set()
        thread.join(60)


def n_objects(store: FeatureStore) -> int:
    return len(store.shards(store.units[0])) + 1


def test_a_zombie_cannot_change_what_is_signed(folder_url: str) -> None:
    """For every number of objects that it wrote before another attempt did all the rest."""
    arrays = SMALL if folder_url.startswith("s3:") else EVERY_DTYPE
    for n_before in range(n_objects(make_store(f"{folder_url}/n", ONE_UNIT, arrays=arrays)) + 1):
        store = make_store(f"{folder_url}/{n_before}", ONE_UNIT, arrays=arrays)
        with zombie(store, n_before, 1) as woken:
            signed = write(store, 2)
            assert len(signed.run.adopted) <= n_before
            assert assert_whole(store) == signed
        assert woken == [signed]
        assert assert_whole(store) == signed


def test_attempts_do_differ_in_their_last_bits(tmp_path: Path) -> None:
    store = make_store(str(tmp_path), ONE_UNIT, arrays=EVERY_DTYPE)
    a, b = (computed_features(store, store.units[0], attempt) for attempt in (1, 2))
    same = {name for name in a if a[name].tobytes() == b[name].tobytes()}
    assert same <= {"half", "brain", "eight", "signed", "unsigned"}
    assert not {"full", "signed__scale", "unsigned__scale"} & same


class Turns:
    """Lets one conditional put of one attempt through at a time, in an order that is given."""

    def __init__(self, n_attempts: int) -> None:
        self.permits = [threading.Semaphore(0) for _ in range(n_attempts)]
        self.passed = [threading.Semaphore(0) for _ in range(n_attempts)]
        self.ended = [threading.Event() for _ in range(n_attempts)]

    def let(self, attempt: int) -> None:
        """Let one put of an attempt happen, unless it has ended."""
        if not self.ended[attempt].is_set():
            self.permits[attempt].release()
            assert self.passed[attempt].acquire(timeout=60)

    def end(self, attempt: int) -> None:
        self.ended[attempt].set()
        self.passed[attempt].release()


class TakingTurns(LocalFolder):
    """One attempt's view of the store."""

    def __init__(self, root: Path, turns: Turns, attempt: int) -> None:
        super().__init__(root)
        self._turns, self._attempt = turns, attempt

    def put_if_absent(self, path: str, parts: Sequence[Buffer]) -> bool:
        assert self._turns.permits[self._attempt].acquire(timeout=60)
        try:
            return super().put_if_absent(path, parts)
        finally:
            self._turns.passed[self._attempt].release()


@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(order=st.lists(st.integers(0, 2), max_size=40))
def test_any_interleaving_of_three_attempts_is_one_store(
    order: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("turns")
    store = make_store(str(root), ONE_UNIT, arrays=SMALL)
    turns = Turns(3)
    receipts: list[Receipt] = []

    def attempt(number: int) -> None:
        folder = TakingTurns(root, turns, number)
        try:
            mine = FeatureStore(folder, store.described, store.index)
            receipts.append(write(mine, number + 1))
        finally:
            turns.end(number)

    threads = [threading.Thread(target=attempt, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for number in order:
        turns.let(number)
    for number, thread in enumerate(threads):
        for _ in range(20):
            turns.permits[number].release()
        thread.join(60)
    assert len(receipts) == 3
    signed = assert_whole(store)
    assert all(receipt == signed for receipt in receipts)


# --- races for the receipt -----------------------------------------------------------------------


class SigningFirst(LocalFolder):
    """A folder in which another writer does all its work just before this one signs."""

    def __init__(self, root: Path, sign: Callable[[], object]) -> None:
        super().__init__(root)
        self._sign = sign

    def put_if_absent(self, path: str, parts: Sequence[Buffer]) -> bool:
        if path.startswith("receipts"):
            self._sign()
        return super().put_if_absent(path, parts)


def test_the_loser_of_a_race_takes_the_winners_receipt(tmp_path: Path) -> None:
    winner = make_store(str(tmp_path), ONE_UNIT)
    folder = SigningFirst(tmp_path, lambda: write(winner, 1))
    loser = FeatureStore(folder, winner.described)
    assert write(loser, 2).run.host == "host-1"
    assert_whole(winner)


def test_a_lost_answer_is_no_conflict(tmp_path: Path) -> None:
    """The put worked, its answer did not come, the put was made again: the object is there."""

    class Losing(LocalFolder):
        def put_if_absent(self, path: str, parts: Sequence[Buffer]) -> bool:
            super().put_if_absent(path, parts)
            return super().put_if_absent(path, parts)

    store = make_store(str(tmp_path), ONE_UNIT)
    lossy = FeatureStore(Losing(tmp_path), store.described)
    assert write(lossy, 1).run.adopted == ()
    assert_whole(store)


# --- servers that ignore conditions --------------------------------------------------------------


class Overwriting(LocalFolder):
    """As a server that ignores `If-None-Match`: the last writer wins, and each is told it did."""

    def put_if_absent(self, path: str, parts: Sequence[Buffer]) -> bool:
        self.put(path, parts)
        return True


@pytest.mark.parametrize("n_before", range(8))
def test_equal_bytes_are_right_where_conditions_are_ignored(tmp_path: Path, n_before: int) -> None:
    store = make_store(str(tmp_path), ONE_UNIT)
    careless = FeatureStore(Overwriting(tmp_path), store.described, store.index)
    with zombie(careless, n_before, 0):
        write(careless, 0)
    assert_whole(store)


def test_other_bytes_are_found_where_conditions_are_ignored(tmp_path: Path) -> None:
    arrays: tuple[ArraySpec, ...] = (make_array("full", (5,), "float32"),)
    store = make_store(str(tmp_path), ONE_UNIT, arrays=arrays)
    careless = FeatureStore(Overwriting(tmp_path), store.described, store.index)
    with zombie(careless, 1, 1):
        write(careless, 2)
        signed = store.receipt(store.units[0])
    # The zombie has put its own shard over a signed one, then its receipt over the other's.
    problems = FeatureStore.open(store.url).verify(deep=True)
    assert signed is not None
    assert problems
    assert {p.unit for p in problems} == {0}
    assert all("--repair" in p.remedy for p in problems)
