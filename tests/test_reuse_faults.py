"""Old stores that are damaged, unfinished or elsewhere; runs that are cut short; copies."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from drl_data import copying
from drl_data.cli import app
from drl_data.copying import DamagedError, copy_object
from drl_data.errors import ConflictError, InputError, StoreMismatchError, UserError
from drl_data.objects import open_folder
from drl_data.pipeline import Pipeline
from drl_data.receipts import ObjectRecord
from drl_data.runs import RunSummary, extract
from drl_data.shards import crc32c
from drl_data.store import FeatureStore
from drl_data.testing import write_photo_tars
from drl_data.tiny_models import save_tiny_ddpm
from tests.test_extract import assert_same_store

Changes = dict[str, Any]
MORE = {"taps": ["mid_block", "conv_in"]}
MOVED = {"features": {"dtype": "float32", "batch_size": 4, "rows_per_unit": 8}}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pipeline]:
    photos = write_photo_tars(tmp_path_factory.mktemp("photos"), n_samples=10, size=20)
    model = save_tiny_ddpm(tmp_path_factory.mktemp("ddpm"))

    def make(url: str | Path, *reuse: str, **changes: object) -> Pipeline:
        data: Changes = {
            "name": "test",
            "dataset": {"tars": str(photos / "*.tar")},
            "images": {"size": 16},
            "backbone": {"model": str(model)},
            "schedule": {"timesteps": [0, 300]},
            "taps": ["mid_block"],
            "features": {"dtype": "float32", "batch_size": 4, "rows_per_unit": 4},
            "store": {"url": str(url), "reuse": list(reuse)},
        }
        return Pipeline.parse({**data, **changes})

    return make


@pytest.fixture(scope="module")
def direct(
    pipeline: Callable[..., Pipeline], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., FeatureStore]:
    """What must come out, whatever happened to the old store."""
    made: dict[str, FeatureStore] = {}

    def get(**changes: object) -> FeatureStore:
        name = repr(sorted(changes.items()))
        if name not in made:
            made[name] = extract(pipeline(tmp_path_factory.mktemp("direct"), **changes)).store
        return made[name]

    return get


@pytest.fixture
def old(pipeline: Callable[..., Pipeline], tmp_path: Path) -> FeatureStore:
    return extract(pipeline(tmp_path / "old")).store


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.unlink()
    path.write_bytes(data)


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-5])


def empty(path: Path) -> None:
    path.unlink()
    path.write_bytes(b"")


SHARD, RECEIPT, INDEX = "mid_block/c/1/1/0/0/0", "receipts/00000001.json", "index.parquet"
FAULTS: dict[str, tuple[str, Callable[[Path], None], Changes, int, str]] = {
    "a shard is missing": (SHARD, Path.unlink, MORE, 10, "missing"),
    "a shard is cut": (SHARD, cut, MORE, 10, "its receipt says"),
    "a shard is empty": (SHARD, empty, MORE, 10, "0 bytes, its receipt says"),
    "a bit of a shard is flipped, and its rows move": (SHARD, flip, MOVED, 10, "CRC-32C"),
    "a unit is pending": (RECEIPT, Path.unlink, MORE, 6, ""),
    "a receipt is damaged": (RECEIPT, flip, MORE, 6, "not a receipt"),
    "a receipt is empty": (RECEIPT, empty, MORE, 6, "not a receipt"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_damaged_is_computed_with_a_warning(
    fault: str,
    old: FeatureStore,
    pipeline: Callable[..., Pipeline],
    direct: Callable[..., FeatureStore],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path, damage, changes, n_rows, message = FAULTS[fault]
    damage(Path(old.url, path))
    summary = extract(pipeline(tmp_path / "new", old.url, **changes))
    assert not summary.failed
    assert_same_store(summary.store, direct(**changes))
    assert not summary.store.verify(deep=True)
    (reused,) = summary.reused.values()
    assert reused.rows == n_rows
    assert reused.features == {10: 16, 6: 12}[n_rows], "all but the damaged place, or unit"
    assert message in caplog.text


def test_a_flipped_bit_in_a_linked_shard_keeps_its_old_checksum(
    old: FeatureStore, pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    """It is not read, so it is not seen; nor is it laundered: `verify --deep` finds it."""
    flip(Path(old.url, SHARD))
    store = extract(pipeline(tmp_path / "new", old.url, **MORE)).store
    assert [problem.object for problem in store.verify(deep=True)] == [SHARD]


def test_an_old_store_is_unchanged(
    old: FeatureStore, pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    before = {info.path: bytes(old.folder.get(info.path)) for info in old.folder.list()}
    extract(pipeline(tmp_path / "new", old.url, **MORE))
    assert before == {info.path: bytes(old.folder.get(info.path)) for info in old.folder.list()}


def test_a_run_that_was_cut_short_resumes(
    old: FeatureStore,
    pipeline: Callable[..., Pipeline],
    direct: Callable[..., FeatureStore],
    tmp_path: Path,
) -> None:
    """Between the last object and the receipt, of a unit that was copied and one to come."""
    chosen = pipeline(tmp_path / "new", old.url, **MORE)
    store = extract(chosen, limit=8).store
    store.folder.delete("receipts/00000001.json")
    summary = extract(chosen)
    assert summary.n_pending == 2
    assert_same_store(store, direct(**MORE))


def test_an_object_that_is_there_already_is_kept(
    old: FeatureStore,
    pipeline: Callable[..., Pipeline],
    direct: Callable[..., FeatureStore],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Left by a run without --reuse: equal bytes are fine, others are a conflict."""
    new = pipeline(tmp_path / "new", old.url, **MORE)
    Path(tmp_path / "new/mid_block/c/1/1/0/0").mkdir(parents=True)
    Path(tmp_path / "new/mid_block/c/1/0/0/0").mkdir(parents=True)
    same = tmp_path / "new/mid_block/c/1/0/0/0/0"
    same.write_bytes(Path(old.url, "mid_block/c/1/0/0/0/0").read_bytes())
    summary = extract(new)
    assert not summary.failed
    assert_same_store(summary.store, direct(**MORE))
    assert same.stat().st_nlink == 1
    other = tmp_path / "other" / SHARD
    other.parent.mkdir(parents=True)
    whole = bytearray(Path(old.url, SHARD).read_bytes())
    whole[:400] = whole[400:800]
    other.write_bytes(whole)
    summary = extract(pipeline(tmp_path / "other", old.url, **MORE))
    ((unit, reason),) = summary.failed
    assert unit.id == 1
    assert "an unfinished attempt left other content" in reason
    assert "rewriting it" in caplog.text


def test_an_old_store_of_no_use_is_refused_before_the_new_one_is_made(
    old: FeatureStore, pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    new = tmp_path / "new"
    with pytest.raises(StoreMismatchError, match=r"noise\.seed: 0 != 1\n  schedule.convention"):
        extract(
            pipeline(
                new,
                old.url,
                noise={"seed": 1},
                schedule={"convention": "ddpm_1based", "timesteps": [1, 300]},
            )
        )
    with pytest.raises(InputError, match="no store here"):
        extract(pipeline(new, str(tmp_path / "nowhere")))
    assert not new.exists()
    with pytest.raises(UserError, match="cannot reuse itself"):
        extract(pipeline(old.url, old.url))


def test_the_command_and_the_file(
    old: FeatureStore, pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    """Paths of a file are relative to it; --reuse comes instead of the file's."""
    import yaml

    data = pipeline("new", **MORE).model_dump(mode="json", exclude_defaults=True)
    data["store"]["reuse"] = "old"
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump(data))
    assert Pipeline.load(file).store.reuse == (old.url,)
    result = CliRunner().invoke(app, ["extract", str(file)])
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    assert "reused of" in words
    assert "20 features of 10 rows; 6 objects linked, 0 copied by the server" in words
    args = ["extract", str(file), "--store", str(tmp_path / "b"), "--reuse", str(tmp_path / "new")]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    assert "40 features of 10 rows; 12 objects linked" in " ".join(result.output.split())


# --- copies -------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(
    pipeline: Callable[..., Pipeline], direct: Callable[..., FeatureStore]
) -> Callable[[str, str], RunSummary]:
    def grow(old: str, new: str) -> RunSummary:
        extract(pipeline(old))
        summary = extract(pipeline(new, old, **MORE))
        assert not summary.failed
        assert_same_store(summary.store, direct(**MORE))
        assert not summary.store.verify(deep=True)
        return summary

    return grow


@pytest.mark.s3
def test_within_a_bucket_the_server_copies(
    elsewhere: Callable[[str, str], RunSummary], s3_url: str
) -> None:
    (reused,) = elsewhere(f"{s3_url}/old", f"{s3_url}/deep/new").reused.values()
    assert (reused.linked, reused.copied, reused.rewritten) == (0, 6, 0)


@pytest.mark.s3
def test_between_kinds_of_storage_bytes_are_read_and_written(
    elsewhere: Callable[[str, str], RunSummary], s3_url: str, tmp_path: Path
) -> None:
    (reused,) = elsewhere(str(tmp_path / "old"), f"{s3_url}/new").reused.values()
    assert (reused.linked, reused.copied, reused.rewritten) == (0, 0, 6)


@pytest.mark.ceph
def test_within_a_bucket_of_ceph_the_server_copies(
    elsewhere: Callable[[str, str], RunSummary], ceph_url: str
) -> None:
    (reused,) = elsewhere(f"{ceph_url}/old", f"{ceph_url}/deep/new").reused.values()
    assert (reused.linked, reused.copied, reused.rewritten) == (0, 6, 0)


def record_of(path: str, data: bytes) -> ObjectRecord:
    return ObjectRecord(path=path, n_bytes=len(data), crc32c=crc32c([data]))


def test_without_hard_links_bytes_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As between two disks; what links for put_if_absent is within the target's."""
    source, target = (open_folder(str(tmp_path / name)) for name in "ab")
    source.put("x", [b"data"])
    link = os.link

    def two_disks(a: os.PathLike[str] | str, b: os.PathLike[str] | str) -> None:
        if Path(a).parent != Path(b).parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        link(a, b)

    monkeypatch.setattr(copying.os, "link", two_disks)
    assert copy_object(source, record_of("x", b"data"), target, "y/z") == "rewritten"
    assert bytes(target.get("y/z")) == b"data"


def test_copies_never_overwrite(folder_url: str, tmp_path: Path) -> None:
    """Of what is there, equal bytes are kept and others refused; a damaged source is no source."""
    root = folder_url
    for name in (f"{root}/a", str(tmp_path / "local"), f"memory://{uuid.uuid4().hex}"):
        source, target = open_folder(name), open_folder(f"{root}/b")
        path = uuid.uuid4().hex
        source.put("x", [b"data"])
        first = copy_object(source, record_of("x", b"data"), target, path)
        assert first in ("linked", "copied", "rewritten")
        assert copy_object(source, record_of("x", b"data"), target, path) in (first, "rewritten")
        assert bytes(target.get(path)) == b"data"
        source.put("w", [b"DATA"])
        with pytest.raises(ConflictError, match="holds other bytes"):
            copy_object(source, record_of("w", b"DATA"), target, path)
        assert bytes(target.get(path)) == b"data"
        with pytest.raises(DamagedError, match="4 bytes, its receipt says 5"):
            copy_object(source, record_of("x", b"data!"), target, "other")
        with pytest.raises(DamagedError, match="missing"):
            copy_object(source, record_of("nothing", b"data"), target, "other")
    with pytest.raises(DamagedError, match="CRC-32C"):
        copy_object(source, record_of("x", b"DATA"), target, "other")
