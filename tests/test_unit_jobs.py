"""Products of units outside a store: write-once, signed last, the first wins."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from drl_data.errors import ConflictError, InputError, StoreError, StoreMismatchError
from drl_data.objects import Buffer
from drl_data.plan import InvalidRow, Unit
from drl_data.receipts import Receipt, RunRecord, receipt_path
from drl_data.unit_jobs import JobSpec, UnitJob

SPEC = JobSpec(kind="squares", content={"of": {"power": 2}}, n_rows=7, rows_per_unit=3)


def product(unit: Unit, lost: Sequence[int] = (), note: str = "") -> list[Buffer]:
    rows = [row for row in range(unit.start, unit.stop) if row not in lost]
    return [json.dumps({"rows": rows, "note": note}).encode()]


def rows_in(data: Buffer) -> list[int]:
    found: list[int] = json.loads(bytes(data))["rows"]
    return found


def commit(job: UnitJob, unit: Unit, lost: Sequence[int] = (), note: str = "") -> Receipt:
    invalid = [InvalidRow(row, f"k{row}", "compute", "not a number") for row in lost]
    path = f"part-{unit.id}.json"
    return job.commit(unit, path, product(unit, lost, note), invalid, RunRecord(), rows_in)


def test_pending_units_are_those_without_a_receipt(folder_url: str) -> None:
    job = UnitJob.create(folder_url, SPEC)
    assert [unit.n_rows for unit in job.units] == [3, 3, 1]
    commit(job, job.units[1], lost=[4])
    again = UnitJob.create(folder_url, SPEC)
    assert [unit.id for unit in again.pending()] == [0, 2]
    (receipt,) = again.receipts()
    assert (receipt.n_ok, [row.row for row in receipt.invalid]) == (2, [4])
    assert again.problems() == ["unit 0: pending", "unit 2: pending"]


def test_another_job_is_refused_with_what_differs(tmp_path: Path) -> None:
    UnitJob.create(str(tmp_path), SPEC)
    other = SPEC.model_copy(update={"content": {"of": {"power": 3}}})
    with pytest.raises(StoreMismatchError, match=r"content\.of\.power: 2 != 3"):
        UnitJob.create(str(tmp_path), other)


def test_the_product_of_an_unfinished_attempt_is_kept(tmp_path: Path) -> None:
    job = UnitJob.create(str(tmp_path), SPEC)
    job.folder.put("part-0.json", product(job.units[0], note="in another last bit"))
    receipt = commit(job, job.units[0])
    assert receipt.run.adopted == ("part-0.json",)
    assert job.problems() == ["unit 1: pending", "unit 2: pending"]
    assert b"another last bit" in bytes(job.folder.get("part-0.json"))


def test_a_product_of_other_rows_is_a_conflict(tmp_path: Path) -> None:
    job = UnitJob.create(str(tmp_path), SPEC)
    job.folder.put("part-0.json", product(job.units[0], lost=[1]))
    with pytest.raises(ConflictError, match="2 rows, this attempt has 3"):
        commit(job, job.units[0])
    assert job.receipt(job.units[0]) is None


def test_who_signs_second_gets_the_first_receipt(tmp_path: Path) -> None:
    job = UnitJob.create(str(tmp_path), SPEC)
    first = commit(job, job.units[0])
    assert commit(job, job.units[0], note="a zombie's") == first
    with pytest.raises(ConflictError):
        commit(job, job.units[0], lost=[2])
    job.folder.delete("part-0.json")  # so that nothing but the receipt tells
    with pytest.raises(ConflictError, match="signed this unit"):
        commit(job, job.units[0], lost=[2])
    job.folder.delete("part-0.json")
    job.folder.put("part-0.json", product(job.units[0]))
    assert job.problems() == ["unit 1: pending", "unit 2: pending"]


def test_damage_is_found(tmp_path: Path) -> None:
    job = UnitJob.create(str(tmp_path), SPEC)
    for unit in job.units:
        commit(job, unit)
    assert job.problems() == []
    data = (tmp_path / "part-1.json").read_bytes()
    (tmp_path / "part-1.json").write_bytes(data.replace(b"5", b"6"))
    (tmp_path / "part-2.json").unlink()
    assert job.problems() == [
        "unit 1: part-1.json is not what was signed", "unit 2: part-2.json is missing"
    ]  # fmt: skip


def test_the_receipt_of_another_job_is_refused(tmp_path: Path) -> None:
    job = UnitJob.create(str(tmp_path / "a"), SPEC)
    commit(job, job.units[0])
    other = UnitJob.create(str(tmp_path / "b"), SPEC.model_copy(update={"kind": "cubes"}))
    path = receipt_path(job.units[0])
    other.folder.put(path, [job.folder.get(path)])
    with pytest.raises(StoreError, match="another job"):
        other.receipt(job.units[0])


def test_no_job_and_a_damaged_one_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no products"):
        UnitJob.open(str(tmp_path))
    UnitJob.create(str(tmp_path), SPEC)
    text = (tmp_path / "job.json").read_text()
    (tmp_path / "job.json").write_text(text.replace('"power":2', '"power":3'))
    with pytest.raises(StoreError, match="damaged"):
        UnitJob.create(str(tmp_path), SPEC)
