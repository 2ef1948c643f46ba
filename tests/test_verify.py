"""Damage at rest: what `verify` finds, and which unit it names."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import JsonValue

from drl_data.checksums import checked_json, signed_json
from drl_data.errors import InputError, StoreError
from drl_data.objects import LocalFolder
from drl_data.receipts import fit_path, receipt_path
from drl_data.shards import crc32c
from drl_data.spec_base import canonical_json
from drl_data.store import FeatureStore, UnitCounts, problems_at
from drl_data.unit_checks import Problem
from drl_data.verify import foreign_objects

from .stores import (
    EVERY_DTYPE,
    RUN,
    computed_features,
    fill,
    invalid_row,
    make_index,
    make_store,
)


def edited(data: bytearray, changes: dict[str, JsonValue]) -> bytearray:
    """A receipt that says something else, with the right checksum."""
    value = checked_json(json.loads(data))
    return bytearray(canonical_json(signed_json({**value, **changes})))


def damage(store: FeatureStore, path: str, change: str) -> None:
    data = bytearray(store.folder.get(path))
    if change == "delete":
        store.folder.delete(path)
        return
    if change == "flip":
        data[len(data) // 3] ^= 4
    elif change == "cut":
        data = data[:-1]
    elif change == "extend":
        data += b"\0"
    elif change == "other unit":
        data = edited(data, {"unit": 2})
    elif change == "other spec":
        data = edited(data, {"fingerprint": "f" * 32})
    store.folder.put(path, [data])


R1 = "receipts/00000001.json"


@pytest.mark.parametrize(
    ("path", "change", "deep", "unit", "what"),
    [
        ("zarr.json", "flip", False, None, "not what the store's spec implies"),
        ("tokens/zarr.json", "delete", False, None, "missing"),
        ("timestep/c/0", "flip", False, None, "not what"),
        ("spec.json", "cut", False, None, "not what"),
        ("index.parquet", "delete", False, None, "missing"),
        ("index.parquet", "flip", False, None, "not as index.json says"),
        ("index.json", "delete", False, None, "missing"),
        (R1, "delete", False, 1, "no receipt: the unit is not computed"),
        (R1, "cut", False, 1, "not a receipt of format 1"),
        (R1, "flip", False, 1, "not a receipt of format 1"),
        (R1, "other unit", False, 1, "not of this store's unit"),
        (R1, "other spec", False, 1, "not of this store's unit"),
        ("tokens/c/1/0/0/0", "delete", False, 1, "missing, though the receipt lists it"),
        ("tokens/c/1/0/0/0", "cut", False, 1, "259 bytes, receipt 260, layout 260"),
        ("tokens/c/1/0/0/0", "extend", False, 1, "261 bytes, receipt 260, layout 260"),
        ("tokens/c/1/0/0/0", "flip", True, 1, "the bytes changed after the unit was signed"),
        ("valid/c/1", "flip", True, 1, "the bytes changed"),
        ("valid/c/1", "cut", False, 1, "3 bytes, receipt 4, layout 4"),
    ],
)
def test_verify_finds_damage(
    tmp_path: Path, path: str, change: str, deep: bool, unit: int | None, what: str
) -> None:
    store = make_store(str(tmp_path))
    fill(store, [5])
    assert store.verify(deep=True) == []
    damage(store, path, change)
    problems = store.verify(deep=deep)
    assert [(p.unit, p.object) for p in problems] == [(unit, path)]
    assert what in problems[0].what
    assert problems[0].remedy
    if deep:
        assert store.verify() == []


def resign(store: FeatureStore, path: str, data: bytes) -> None:
    """Replace an object and make the receipt of unit 1 agree with it."""
    store.folder.put(path, [data])
    receipt = store.receipt(store.units[1])
    assert receipt is not None
    objects = tuple(
        o.model_copy(update={"crc32c": crc32c([data])}) if o.path == path else o
        for o in receipt.objects
    )
    receipt = receipt.model_copy(update={"objects": objects})
    store.folder.put(receipt_path(store.units[1]), [receipt.to_json()])


def test_deep_verify_looks_behind_the_checksums(tmp_path: Path) -> None:
    store = make_store(str(tmp_path))
    fill(store, [5])
    path = "tokens/c/1/0/0/0"
    shard = bytearray(store.folder.get(path))
    wrong_index = shard.copy()
    wrong_index[-20] ^= 1
    resign(store, path, bytes(wrong_index))
    assert [p.what for p in store.verify(deep=True)] == [
        "the shard index is not the one of this layout"
    ]
    nan = shard.copy()
    nan[60 * 2 : 60 * 2 + 4] = struct.pack("<f", np.nan)
    resign(store, path, bytes(nan))
    assert [p.what for p in store.verify(deep=True)] == ["valid row 6 is not finite"]
    resign(store, path, bytes(shard))
    resign(store, "valid/c/1", b"\1\1\1\1")
    assert [p.what for p in store.verify(deep=True)] == [
        "does not match the receipt's invalid rows"
    ]


def test_receipts_that_list_other_objects_are_found(tmp_path: Path) -> None:
    store = make_store(str(tmp_path))
    fill(store)
    receipt = store.receipt(store.units[1])
    assert receipt is not None
    fewer = receipt.model_copy(update={"objects": receipt.objects[1:]})
    store.folder.put(R1, [fewer.to_json()])
    assert ["too many or too few" in p.what for p in store.verify()] == [True]


def test_a_seal_that_does_not_match_is_found(tmp_path: Path) -> None:
    store = make_store(str(tmp_path))
    fill(store)
    store.seal()
    assert store.verify() == []
    sealed = bytes(store.folder.get("sealed.json"))
    for path, data in [("samples.parquet", b"PAR1"), ("sealed.json", b"{}"), ("sealed.json", b"{")]:
        kept = bytes(store.folder.get(path))
        store.folder.put(path, [data])
        assert [p.object for p in store.verify()] == ["sealed.json"]
        store.folder.put(path, [kept])
    store.seal()
    assert bytes(store.folder.get("sealed.json")) == sealed
    store.folder.delete("samples.parquet")
    assert [p.object for p in store.verify()] == ["samples.parquet"]


# --- every bit of every object -------------------------------------------------------------------

FIT = b"a fit, as far as a store is concerned"


def complete_store(folder: Path) -> FeatureStore:
    """A sealed store with an object of each kind."""
    store = make_store(str(folder), 7, arrays=EVERY_DTYPE)
    store.folder.put(fit_path("full"), [FIT])
    for unit in store.units:
        bad = [invalid_row(5)] if unit.id == 1 else []
        counts = UnitCounts(fits={"full": crc32c([FIT])})
        store.write(unit, computed_features(store, unit), bad, RUN, counts)
    store.seal()
    assert store.verify(deep=True) == []
    return store


def units_of(store: FeatureStore, path: str) -> set[int | None]:
    """Whose object it is."""
    if path == fit_path("full"):
        return {0, 1}
    for unit in store.units:
        own = {receipt_path(unit), f"valid/c/{unit.id}", *(p for _, _, p in store.shards(unit))}
        if path in own:
            return {unit.id}
    return {None}


def found_units(problems: list[Problem]) -> set[int | None]:
    return {problem.unit for problem in problems}


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return complete_store(tmp_path_factory.mktemp("complete"))


def test_a_flipped_bit_is_found_wherever_it_is(complete: FeatureStore) -> None:
    """In the first, the last and a middle byte of every object."""
    for info in list(complete.folder.list()):
        original = bytes(complete.folder.get(info.path))
        for position in (0, info.size // 2, info.size - 1):
            assert_flip_is_found(complete, info.path, 8 * position + position % 8, original)


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_random_flipped_bit_is_found(complete: FeatureStore, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(info.path for info in complete.folder.list())))
    original = bytes(complete.folder.get(path))
    bit = data.draw(st.integers(0, 8 * len(original) - 1))
    assert_flip_is_found(complete, path, bit, original)


def assert_flip_is_found(store: FeatureStore, path: str, bit: int, original: bytes) -> None:
    damaged = bytearray(original)
    damaged[bit // 8] ^= 1 << bit % 8
    store.folder.put(path, [damaged])
    try:
        problems = problems_at(store.url, deep=True)
        assert found_units(problems) == units_of(store, path), (path, bit, problems)
        assert all("drl extract --repair" in str(problem) for problem in problems)
    finally:
        store.folder.put(path, [original])


@pytest.mark.parametrize("change", ["delete", "cut", "extend"])
def test_sizes_are_known_without_reading(tmp_path: Path, change: str) -> None:
    store = complete_store(tmp_path / "s")
    for path in sorted(info.path for info in store.folder.list()):
        if path == "sealed.json" and change == "delete":
            continue  # a store without a seal is whole, and open
        original = bytes(store.folder.get(path))
        damage(store, path, change)
        assert found_units(problems_at(store.url)) == units_of(store, path), path
        store.folder.put(path, [original])
    assert problems_at(store.url, deep=True) == []


def test_a_root_of_another_content_is_found(tmp_path: Path) -> None:
    """The fingerprint covers the spec; arrays and noise levels have a checksum."""
    store = make_store(str(tmp_path))
    root = bytes(store.folder.get("zarr.json"))
    store.folder.put("zarr.json", [root.replace(b'"alpha":0.8', b'"alpha":0.9')])
    with pytest.raises(StoreError, match="damaged, or edited by hand"):
        FeatureStore.open(store.url)
    assert [(p.unit, p.object) for p in problems_at(store.url)] == [(None, "zarr.json")]
    store.folder.delete("zarr.json")
    assert [(p.unit, p.object) for p in problems_at(store.url)] == [(None, "zarr.json")]
    with pytest.raises(InputError, match="no store here"):
        problems_at(str(tmp_path / "nothing"))


# --- accounting ----------------------------------------------------------------------------------


def test_a_receipt_of_other_samples_is_found(tmp_path: Path) -> None:
    store = make_store(str(tmp_path))
    fill(store)
    receipt = store.receipt(store.units[1])
    assert receipt is not None
    counts = receipt.counts.model_copy(update={"samples": "0" * 64})
    store.folder.put(R1, [receipt.model_copy(update={"counts": counts}).to_json()])
    want = "is of other samples than the index has in its rows"
    assert [(p.unit, p.what) for p in store.verify()] == [(1, want)]
    with pytest.raises(StoreError, match=f"unit 1, {R1}: {want}; run `drl extract --repair`"):
        store.seal()
    assert not store.sealed
    earlier = receipt.counts.model_copy(update={"samples": ""})
    store.folder.put(R1, [receipt.model_copy(update={"counts": earlier}).to_json()])
    store.seal()


def test_an_index_of_another_dataset_is_found(tmp_path: Path) -> None:
    store = make_store(str(tmp_path))
    fill(store)
    for path in ("index.parquet", "index.json"):
        store.folder.delete(path)
    other = make_index(11)
    table = other.table.set_column(9, "checksum", pa.array([8] * 11, pa.int64()))
    store.put_index(type(other)(table, other.tars, None, other.dataset))
    (problem,) = store.verify()
    assert problem.object == "index.parquet"
    assert f"the store's spec says {store.spec.dataset}" in problem.what


@pytest.mark.parametrize("change", ["delete", "cut", "other unit", "other spec"])
def test_what_is_not_as_receipts_say_is_not_sealed(tmp_path: Path, change: str) -> None:
    store = make_store(str(tmp_path))
    fill(store)
    damage(store, R1 if change.startswith("other") else "tokens/c/1/0/0/0", change)
    with pytest.raises(StoreError, match="not sealed, because 1 things are not as the receipts"):
        store.seal()
    assert not store.sealed


def test_a_sample_table_that_a_dead_sealer_left_is_replaced(tmp_path: Path) -> None:
    store = make_store(str(tmp_path))
    fill(store, [3])
    for left in (b"PAR1", bytes(make_index(11).to_parquet())):
        store.folder.put("samples.parquet", [left])
        store.folder.delete("sealed.json")
        store.seal()
        assert store.verify(deep=True) == []
        assert store.samples()["status"].to_pylist().count("invalid") == 1


def test_statuses_must_be_those_of_the_receipts(tmp_path: Path) -> None:
    """A sample table with a right checksum that says something else."""
    a, b = make_store(str(tmp_path / "a")), make_store(str(tmp_path / "b"))
    fill(a, [3])
    fill(b, [4])
    for store in (a, b):
        store.seal()
    samples = b.folder.get("samples.parquet")
    seal = json.loads(bytes(a.folder.get("sealed.json")))
    seal["samples"] = {"n_bytes": len(samples), "crc32c": crc32c([samples])}
    a.folder.put("samples.parquet", [samples])
    a.folder.put("sealed.json", [canonical_json(seal)])
    assert [p.what for p in a.verify(deep=True)] == ["not the statuses that the receipts say"]


def test_foreign_objects_are_told_and_are_no_problem(tmp_path: Path) -> None:
    store = complete_store(tmp_path)
    assert foreign_objects(store) == []
    for path in ("README.txt", "receipts/00000009.json", "full/c/9/0/0/0", ".DS_Store"):
        store.folder.put(path, [b"hello"])
    assert foreign_objects(store) == sorted(
        ["README.txt", "receipts/00000009.json", "full/c/9/0/0/0", ".DS_Store"]
    )
    assert store.verify(deep=True) == []


def test_a_missing_store_is_the_users_mistake(tmp_path: Path) -> None:
    LocalFolder(tmp_path).put("README.txt", [b"hello"])
    with pytest.raises(InputError, match="no store here"):
        problems_at(str(tmp_path))
