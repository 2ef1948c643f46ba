"""Two stores side by side: every difference is told, and nothing is read where checksums agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from drl_data.cli import app
from drl_data.diff import StoreDiff, diff_stores, format_diff
from drl_data.index import SampleIndex
from drl_data.objects import LocalFolder
from drl_data.spec import ImageSpec
from drl_data.store import FeatureStore

from .stores import (
    EVERY_DTYPE,
    RUN,
    TIMES,
    computed_features,
    invalid_row,
    make_array,
    make_index,
    make_spec,
    make_store,
    make_times,
    reference,
)

N = 7


def filled(
    url: Path, attempt: int = 0, noise: float = 1e-6, skip: tuple[int, ...] = ()
) -> FeatureStore:
    store = make_store(str(url), N, arrays=EVERY_DTYPE)
    for unit in store.units:
        if unit.id not in skip:
            bad = [invalid_row(5)] if unit.id == 1 else []
            store.write(unit, computed_features(store, unit, attempt, noise), bad, RUN)
    return store


class Unread(LocalFolder):
    """A folder that counts which shards are looked at."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.read: list[str] = []

    def local_path(self, path: str) -> Path | None:
        if "/c/" in path:
            self.read.append(path)
        return super().local_path(path)


def test_equal_stores_are_equal_by_their_checksums(tmp_path: Path) -> None:
    a, b = filled(tmp_path / "a"), filled(tmp_path / "b")
    folders = Unread(tmp_path / "a"), Unread(tmp_path / "b")
    found = diff_stores(*(FeatureStore(folder, a.described) for folder in folders))
    assert found.verdict == "equal"
    assert format_diff(found) == []
    assert [folder.read for folder in folders] == [[], []]
    assert len(found.common) == 2 * len(a.features)
    assert {(one.found.n_rows, one.n_signed_equal) for one in found.common} == {(N, N)}
    assert b.verify(deep=True) == []


def test_other_last_bits_are_equal_within_the_tolerance(tmp_path: Path) -> None:
    found = diff_stores(filled(tmp_path / "a"), filled(tmp_path / "b", 1))
    assert found.verdict == "equal within tolerance"
    full = {one.timestep: one for one in found.common if one.array == "full"}
    assert set(full) == {"10", "200"}
    assert full["10"].found.n_differing == N - 1  # the invalid row is equal
    assert 0 < full["10"].found.largest < 1e-5 < full["10"].tolerance
    assert {one.found.n_beyond for one in found.common} == {0}


def test_other_features_are_different_and_said_where(tmp_path: Path) -> None:
    a = filled(tmp_path / "a")
    b = make_store(str(tmp_path / "b"), N, arrays=EVERY_DTYPE)
    for unit in b.units:
        features = computed_features(b, unit)
        if unit.id == 1:
            features["full"] = features["full"].copy()
            features["full"][1, 2] += 1
        b.write(unit, features, [invalid_row(5)] if unit.id == 1 else [], RUN)
    found = diff_stores(a, b)
    assert found.verdict == "different"
    (one,) = [one for one in found.common if not one.found.within]
    assert (one.array, one.timestep) == ("full", "200")
    assert (one.found.n_differing, one.found.n_beyond, one.found.first) == (1, 1, 6)
    assert one.n_signed_equal == 4


def test_pending_units_and_validity_are_named(tmp_path: Path) -> None:
    a, b = filled(tmp_path / "a"), filled(tmp_path / "b", skip=(0,))
    found = diff_stores(a, b)
    assert found.pending == ((), (0,))
    assert (found.n_rows, found.verdict) == (3, "different")
    assert diff_stores(b, b).verdict == "equal"
    c = make_store(str(tmp_path / "c"), N, arrays=EVERY_DTYPE)
    for unit in c.units:
        c.write(unit, computed_features(c, unit), [], RUN)
    found = diff_stores(a, c)
    assert found.validity == ("key-00005",)
    assert {one.found.n_validity for one in found.common} == {1}
    assert "rows that are valid in one only: key-00005" in format_diff(found)


def test_arrays_timesteps_and_specs_of_one_only(tmp_path: Path) -> None:
    index = make_index(N)
    stores = []
    for name, arrays, times, size in (
        ("a", ("x", "y"), (10, 200), 8),
        ("b", ("y", "z"), (200, 300.5), 16),
    ):
        spec = make_spec(N, 4, dataset=index.digest(), images=ImageSpec(size=size))
        specs = [make_array(array, (3,), "float32") for array in arrays]
        made = make_times(*times)
        if name == "b":
            made = tuple(time.model_copy(update={"alpha": 0.7}) for time in made)
        store = FeatureStore.create(str(tmp_path / name), spec, specs, made, index)
        for unit in store.units:
            whole = {array.name: reference(array, 2, N) for array in specs}
            if name == "b":
                whole["y"] = whole["y"][::-1]  # 200 comes first there
            own = {n: x[:, unit.start : unit.stop] for n, x in whole.items()}
            store.write(unit, own, [], RUN)
        stores.append(store)
    found = diff_stores(*stores)
    assert (found.arrays, found.timesteps) == ((("x",), ("z",)), ((10,), (300.5,)))
    assert found.noise_levels == (200,)
    assert found.spec == ("images.size[0]: 8 != 16", "images.size[1]: 8 != 16")
    (one,) = found.common
    assert (one.array, one.timestep, one.found.equal) == ("y", "200", True)
    assert one.n_signed_equal == N
    assert found.verdict == "different"


def subset(index: SampleIndex, rows: list[int]) -> SampleIndex:
    return SampleIndex(index.table.take(rows), index.tars, index.label_names, index.dataset)


def test_rows_of_other_datasets_are_matched_by_key(tmp_path: Path) -> None:
    index, array = make_index(N), make_array("x", (3,), "float32")
    whole = reference(array, 2, N)
    stores = []
    for name, rows, size in (("a", [0, 1, 2, 3, 4], 2), ("b", [6, 3, 2, 2, 1], 3)):
        mine = subset(index, rows)
        spec = make_spec(len(rows), size, dataset=mine.digest())
        store = FeatureStore.create(str(tmp_path / name), spec, [array], TIMES, mine)
        for unit in store.units:
            store.write(unit, {"x": whole[:, rows[unit.start : unit.stop]]}, [], RUN)
        stores.append(store)
    found = diff_stores(*stores)
    assert found.rows == (("key-00000", "key-00004"), ("key-00006", "key-00002"))
    assert found.n_rows == 3
    assert all(one.found.equal and one.found.n_rows == 3 for one in found.common)
    assert {one.n_signed_equal for one in found.common} == {0}


def test_views_are_matched_by_name(tmp_path: Path) -> None:
    index = make_index(4)
    stores = []
    for name, views in (("a", ("id", "hflip")), ("b", ("hflip", "id"))):
        images = ImageSpec.model_validate({"size": 8, "views": views})
        spec = make_spec(4, 4, dataset=index.digest(), images=images)
        array = make_array("x", (3,), "float32").model_copy(update={"views": 2})
        store = FeatureStore.create(str(tmp_path / name), spec, [array], make_times(10), index)
        values = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
        store.write(store.units[0], {"x": values if name == "a" else values[::-1]}, [], RUN)
        stores.append(store)
    found = diff_stores(*stores)
    assert [(one.view, one.found.equal) for one in found.common] == [("id", True), ("hflip", True)]


@pytest.mark.parametrize(
    ("attempt", "noise", "arguments", "status", "says"),
    [
        (0, 0.0, [], 0, "equal: 7 rows of both compared"),
        (1, 1e-6, [], 0, "equal within tolerance: 7 rows"),
        (1, 1e-6, ["--exact"], 1, "equal within tolerance: 7 rows"),
        (1, 1.0, [], 1, "different: 7 rows"),
    ],
)
def test_the_command(
    tmp_path: Path, attempt: int, noise: float, arguments: list[str], status: int, says: str
) -> None:
    a, b = filled(tmp_path / "a"), filled(tmp_path / "b", attempt, noise)
    shown = CliRunner().invoke(app, ["diff", a.url, b.url, *arguments])
    assert shown.exit_code == status, shown.output
    assert says in shown.output
    assert "signed" in shown.output


def test_nothing_is_the_verdict_of_nothing() -> None:
    none: tuple[()] = ()
    empty = (none, none)
    found = StoreDiff(none, empty, empty, none, empty, empty, empty, none, 0, none)
    assert found.verdict == "equal"
    many = StoreDiff(
        none, empty, empty, none, empty, (tuple("abc") * 9, none), empty, none, 0, none
    )
    assert format_diff(many)[0].endswith("and 7 more")
    assert many.verdict == "different"
