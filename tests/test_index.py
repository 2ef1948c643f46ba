from __future__ import annotations

import gzip
import io
import json
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drl_data import index as index_module
from drl_data.errors import InputError
from drl_data.index import SampleIndex, build_index, expand_urls
from drl_data.objects import Folder, LocalFolder, open_folder
from drl_data.spec import DatasetSpec
from drl_data.tar import Member, RangedSource, open_source, walk_files
from tests.toy_tars import write_tar

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # webdataset imports deprecated parts of its dependencies
    from webdataset.tariterators import group_by_keys, tar_file_expander

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
HYPOTHESIS = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class CountingFolder(LocalFolder):
    """A local folder that looks remote and records every ranged read."""

    def __init__(self, root: Path, *, remote: bool) -> None:
        super().__init__(root)
        self.remote = remote
        self.ranges: list[tuple[int, int]] = []

    def get_range(self, path: str, start: int, stop: int) -> memoryview:
        self.ranges.append((start, stop))
        return super().get_range(path, start, stop)

    def local_path(self, path: str) -> Path | None:
        return None if self.remote else super().local_path(path)

    @property
    def n_bytes(self) -> int:
        return sum(stop - start for start, stop in self.ranges)


def members_of(path: Path) -> list[Member]:
    folder = LocalFolder(path.parent)
    return list(walk_files(open_source(folder, path.name, path.stat().st_size)))


def index_of(*paths: Path, **fields: object) -> SampleIndex:
    spec = DatasetSpec.model_validate({"tars": [str(p) for p in paths], **fields})
    return build_index(spec, n_threads=2)


# --- the tar reader against Python's tarfile ------------------------------------------------------

pieces = st.sampled_from(["a", "B", ".", "/", "_", "__", "é", "日", " ", "png", "cls", "x" * 60])
names = st.lists(pieces, min_size=1, max_size=7).map("".join)
KINDS = [tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE]
KINDS += [tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, b"V"]
entries = st.tuples(names, st.sampled_from(KINDS), st.binary(max_size=1500))


def write_entries(path: Path, items: list[tuple[str, bytes, bytes]], format: int) -> bool:
    """False if this format cannot hold one of the names."""
    try:
        with tarfile.open(path, "w", format=format) as tar:
            for name, kind, data in items:
                info = tarfile.TarInfo(name)
                info.type = kind
                info.mtime = 1_700_000_000.25
                folder = kind == tarfile.AREGTYPE and name.endswith("/")
                has_data = (info.isreg() and not folder) or kind == b"V"
                info.size = len(data) if has_data else 0
                info.linkname = "a" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
                tar.addfile(info, io.BytesIO(data) if has_data else None)
    except ValueError:
        return False
    return True


@given(items=st.lists(entries, max_size=8), format=st.sampled_from(FORMATS), gz=st.booleans())
@HYPOTHESIS
def test_members_are_those_of_tarfile(
    tmp_path: Path, items: list[tuple[str, bytes, bytes]], format: int, gz: bool
) -> None:
    path = tmp_path / "t.tar"
    if not write_entries(path, items, format):
        return
    with tarfile.open(path) as tar:
        want = [(m.name, m.offset_data, m.size, m.chksum, m.mtime) for m in tar if m.isreg()]
    if gz:
        path.write_bytes(gzip.compress(path.read_bytes()))
    got = [(m.name, m.offset, m.size, m.checksum, m.mtime) for m in members_of(path)]
    assert got == want


def test_global_pax_headers_apply_to_what_follows(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    headers = {"mtime": "12.5"}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers=headers) as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    assert [m.mtime for m in members_of(path)] == [12.5]


def test_long_ustar_names_use_the_prefix(tmp_path: Path) -> None:
    name = f"{'d' * 90}/{'e' * 50}/{'f' * 80}.png"
    path = write_tar(tmp_path / "t.tar", [(name, b"x")], format=tarfile.USTAR_FORMAT)
    assert [m.name for m in members_of(path)] == [name]


def test_the_size_of_a_link_counts_no_bytes(tmp_path: Path) -> None:
    link, after = tarfile.TarInfo("a.png"), tarfile.TarInfo("b.png")
    link.type, link.size = tarfile.LNKTYPE, 700
    path = tmp_path / "t.tar"
    path.write_bytes(link.tobuf() + after.tobuf() + bytes(1024))
    with tarfile.open(path) as tar:
        want = [(m.name, m.offset_data) for m in tar if m.isreg()]
    assert [(m.name, m.offset) for m in members_of(path)] == want == [("b.png", 1024)]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_member_over_8_gib(tmp_path: Path, format: int) -> None:
    path = tmp_path / "t.tar"
    size = 9 << 30
    info = tarfile.TarInfo("big.bin")
    info.size = size
    after = tarfile.TarInfo("a.png")
    header = info.tobuf(format)
    with open(path, "wb") as file:
        file.write(header)
        file.seek(size, io.SEEK_CUR)
        file.write(after.tobuf(format) + bytes(1024))
    got = [(m.name, m.offset, m.size) for m in members_of(path)]
    assert got == [("big.bin", len(header), size), ("a.png", len(header) + size + 512, 0)]


def test_old_gnu_sparse_members_are_marked_and_passed_over(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.png")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 600
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[482] = 1
    header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 256)
    maps = bytes(504) + b"\x01" + bytes(7) + bytes(512)
    path = tmp_path / "t.tar"
    after = tarfile.TarInfo("b.png").tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(bytes(header) + maps + bytes(1024) + after + bytes(1024))
    assert [(m.name, m.offset, m.sparse) for m in members_of(path)] == [
        ("a.png", 512 + 1024, True),
        ("b.png", 512 + 1024 + 1024 + 512, False),
    ]
    reasons = index_of(path).table.column("reason").to_pylist()
    assert "sparse" in reasons[0]
    assert reasons[1] is None


def test_pax_sparse_members_are_marked(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("GNUSparseFile.0/a.png")
        info.pax_headers = {
            "GNU.sparse.major": "1",
            "GNU.sparse.minor": "0",
            "GNU.sparse.name": "a.png",
            "GNU.sparse.realsize": "4096",
        }
        info.size = 512
        tar.addfile(info, io.BytesIO(bytes(512)))
    assert [(m.name, m.sparse, m.size) for m in members_of(path)] == [("a.png", True, 512)]


def test_names_that_are_not_utf8_become_escapes(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", [("caf\udce9.png", b"x")], format=tarfile.GNU_FORMAT)
    index = index_of(path)
    assert index.table.column("key").to_pylist() == ["caf\\xe9"]
    index.save(str(tmp_path / "i.parquet"))


# --- tars that are not whole ----------------------------------------------------------------------


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    members = [(f"{i}.png", bytes([i + 1]) * 700) for i in range(3)]
    return write_tar(tmp_path / "whole.tar", members).read_bytes()


def read_bytes_as_tar(tmp_path: Path, data: bytes) -> list[Member]:
    path = tmp_path / "t.tar"
    path.write_bytes(data)
    return members_of(path)


def test_every_truncation_is_found(tmp_path: Path, whole: bytes) -> None:
    end = len(whole.rstrip(b"\0"))
    end += -end % 512
    for size in [*range(1, end, 97), *range(512, end + 1, 512)]:
        with pytest.raises(InputError, match=r"t\.tar.*byte \d+.*copy"):
            read_bytes_as_tar(tmp_path, whole[:size])
    assert len(read_bytes_as_tar(tmp_path, whole[: end + 512])) == 3


def test_every_gzip_truncation_is_found(tmp_path: Path, whole: bytes) -> None:
    packed = gzip.compress(whole)
    for size in range(2, len(packed)):
        with pytest.raises(InputError, match=r"t\.tar.*gzip.*byte \d+"):
            read_bytes_as_tar(tmp_path, packed[:size])


def test_a_corrupt_header_is_found(tmp_path: Path, whole: bytes) -> None:
    for position in (3, 1536 + 3, 3072 + 3):
        broken = bytearray(whole)
        broken[position] ^= 1
        with pytest.raises(InputError, match=rf"byte {position - 3}: checksum"):
            read_bytes_as_tar(tmp_path, bytes(broken))


def test_corrupt_gzip_is_found(tmp_path: Path, whole: bytes) -> None:
    broken = bytearray(gzip.compress(whole))
    broken[len(broken) // 2] ^= 0xFF
    with pytest.raises(InputError, match="corrupt gzip data"):
        read_bytes_as_tar(tmp_path, bytes(broken))


def test_a_corrupt_pax_record_is_found(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", [("é.png", b"x")])
    data = path.read_bytes().replace(b" path=", b" path:")
    with pytest.raises(InputError, match="corrupt PAX record"):
        read_bytes_as_tar(tmp_path, data)


def test_joined_tars_are_found(tmp_path: Path, whole: bytes) -> None:
    with pytest.raises(InputError, match=rf"data at byte {len(whole)}, after the end marker"):
        read_bytes_as_tar(tmp_path, whole + whole)


def test_joined_gzip_members_are_one_stream(tmp_path: Path, whole: bytes) -> None:
    packed = gzip.compress(whole[:2000]) + gzip.compress(whole[2000:]) + bytes(100)
    assert len(read_bytes_as_tar(tmp_path, packed)) == 3


def test_empty_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="empty file"):
        read_bytes_as_tar(tmp_path, b"")
    with pytest.raises(InputError, match="xz file"):
        read_bytes_as_tar(tmp_path, b"\xfd7zXZ\x00" + bytes(600))
    with pytest.raises(InputError, match="not a tar"):
        read_bytes_as_tar(tmp_path, b"\x89PNG" * 200)
    assert read_bytes_as_tar(tmp_path, bytes(10240)) == []


# --- samples against the webdataset library -------------------------------------------------------

extensions = st.sampled_from(["png", "PNG", "jpg", "cls", "txt", "json", "a.png", "Cls", "seg.PNG"])
stems = st.sampled_from(
    ["0", "1", "d/0", "./d/1", "d.e/0", "ü", "__m__", "__m__/0", "s p", "k" * 90]
)
member_names = st.one_of(st.builds("{}.{}".format, stems, extensions), names)
plain_members = st.lists(st.tuples(member_names, st.binary(max_size=900)), max_size=12)


@given(members=plain_members, format=st.sampled_from(FORMATS), gz=st.booleans())
@HYPOTHESIS
def test_samples_are_those_of_webdataset(
    tmp_path: Path, members: list[tuple[str, bytes]], format: int, gz: bool
) -> None:
    path = tmp_path / "t.tar"
    kinds = [(name, tarfile.REGTYPE, data) for name, data in members]
    if not write_entries(path, kinds, format):
        return
    raw = path.read_bytes()
    if gz:
        path.write_bytes(gzip.compress(raw))
    with path.open("rb") as stream:
        files = tar_file_expander([{"url": str(path), "stream": stream}])
        want = list(group_by_keys(files, handler=lambda error: True))
    if not want:
        with pytest.raises(InputError, match="no samples"):
            index_of(path)
        return
    rows = index_of(path).table.to_pylist()
    assert [row["key"] for row in rows] == [sample["__key__"] for sample in want]
    for row, sample in zip(rows, want, strict=True):
        image = next((e for e in DatasetSpec(tars={}).image if e in sample), None)
        if image is None:
            assert row["member"] == ""
            assert "no image" in row["reason"]
        else:
            assert raw[row["offset"] : row["offset"] + row["size"]] == sample[image]
            assert row["member"].startswith(sample["__key__"])
            assert row["reason"] is None or "two members" in row["reason"]


def test_a_repeated_extension_costs_the_row(tmp_path: Path) -> None:
    members = [("a.png", b"1"), ("a.PNG", b"2"), ("b.png", b"3")]
    index = index_of(write_tar(tmp_path / "t.tar", members))
    assert index.n_samples == 2
    assert index.table.column("reason").to_pylist() == [
        "two members a.png: which one is meant is unknown",
        None,
    ]


def test_order_of_preference_of_extensions(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", [("a.jpg", b"1"), ("a.png", b"2"), ("b.jpg", b"3")])
    index = index_of(path, image=["png", "JPG"])
    assert index.table.column("member").to_pylist() == ["a.png", "b.jpg"]


# --- labels and captions --------------------------------------------------------------------------


def labels_of(tmp_path: Path, contents: list[bytes], extension: str, place: str) -> SampleIndex:
    members = []
    for i, content in enumerate(contents):
        members += [(f"{i}.{extension}", content), (f"{i}.png", b"x")]
    return index_of(write_tar(tmp_path / "t.tar", members), label=place)


@pytest.mark.parametrize(
    ("contents", "labels", "label_names"),
    [
        ([b"3", b" 07\n", b"-1"], [3, 7, -1], None),
        ([b"cat", b"ant", b"cat"], [1, 0, 1], ("ant", "cat")),
        ([b"3", b"cat"], [0, 1], ("3", "cat")),
        ([b"3", b"\xff", b""], [3, None, None], None),
        ([b"9" * 19, b"1"], [1, 0], ("1", "9" * 19)),
    ],
)
def test_text_labels(
    tmp_path: Path,
    contents: list[bytes],
    labels: list[int | None],
    label_names: tuple[str, ...] | None,
) -> None:
    index = labels_of(tmp_path, contents, "cls", "cls")
    assert index.table.column("label").to_pylist() == labels
    assert index.label_names == label_names
    assert index.n_unlabelled == labels.count(None)


@pytest.mark.parametrize(
    ("values", "labels", "label_names"),
    [
        ([3, "4", 5.0], [3, 4, 5], None),
        ([True, False], [1, 0], ("false", "true")),
        ([1, 1.5, None, [2]], [1, None, None, None], None),
    ],
)
def test_json_labels(
    tmp_path: Path,
    values: list[object],
    labels: list[int | None],
    label_names: tuple[str, ...] | None,
) -> None:
    contents = [json.dumps({"label": value}).encode() for value in values]
    index = labels_of(tmp_path, contents, "json", "json:label")
    assert index.table.column("label").to_pylist() == labels
    assert index.label_names == label_names


def test_json_that_cannot_be_read_is_no_label(tmp_path: Path) -> None:
    contents = [b"{", b"[" * 100_000, b"[1]", b'{"label": 2}']
    index = labels_of(tmp_path, contents, "json", "json:label")
    assert index.table.column("label").to_pylist() == [None, None, None, 2]
    assert index.n_unlabelled == 3


def test_captions(tmp_path: Path) -> None:
    caption = json.dumps({"text": "a \ud800 cat é"}).encode()
    path = write_tar(tmp_path / "t.tar", [("a.json", caption), ("a.png", b"x"), ("b.png", b"x")])
    index = index_of(path, caption="json:text")
    assert index.table.column("caption").to_pylist() == ["a \\ud800 cat é", None]


# --- digest, save, load ---------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> SampleIndex:
    one = [("a.png", b"11"), ("a.cls", b"x"), ("a.txt", b"one"), ("b.png", b"2"), ("c.cls", b"y")]
    write_tar(tmp_path / "in" / "1.tar", one)
    write_tar(tmp_path / "in" / "2.tar", [("a.png", b"33"), ("a.cls", b"y"), ("a.txt", b"")])
    tars = {"train": str(tmp_path / "in" / "1.tar"), "test": str(tmp_path / "in" / "2.tar")}
    return build_index(DatasetSpec.model_validate({"tars": tars}))


def test_saved_and_loaded_is_equal(tmp_path: Path, small: SampleIndex) -> None:
    url = str(tmp_path / "deep" / "index.parquet")
    small.save(url)
    loaded = SampleIndex.load(url)
    assert loaded == small
    assert loaded.table.schema == small.table.schema
    assert loaded.digest() == small.digest()
    assert [tar.split for tar in loaded.tars] == ["train", "test"]
    assert loaded.slice(1, 3).column("key").to_pylist() == ["b", "c"]


def test_an_index_that_is_not_one(tmp_path: Path) -> None:
    path = tmp_path / "i.parquet"
    with pytest.raises(InputError, match="no such index"):
        SampleIndex.load(str(path))
    path.write_bytes(b"no parquet")
    with pytest.raises(InputError, match="not a Parquet file"):
        SampleIndex.load(str(path))
    pa.parquet.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(InputError, match="format None, want 1"):
        SampleIndex.load(str(path))


def test_the_digest_does_not_know_places(tmp_path: Path, small: SampleIndex) -> None:
    fs = fsspec.filesystem("memory")
    for path in (tmp_path / "in").iterdir():
        fs.pipe_file(f"/digest/{path.name}", path.read_bytes())
    tars = {"train": "memory://digest/1.tar", "test": "memory://digest/2.*"}
    copied = build_index(DatasetSpec.model_validate({"tars": tars}))
    fs.rm("/digest", recursive=True)
    assert copied.tars != small.tars
    assert copied.digest() == small.digest()


def test_the_digest_does_not_know_chunks(small: SampleIndex) -> None:
    table = pa.concat_tables([small.table.slice(i, 1) for i in range(small.n_samples)])
    assert SampleIndex(table, small.tars, small.label_names, small.dataset).digest() == (
        small.digest()
    )


def test_the_digest_knows_every_value(small: SampleIndex) -> None:
    digests = {small.digest()}
    n_changes = 0
    for name in small.table.column_names:
        values = small.table.column(name).to_pylist()
        for row, value in enumerate(values):
            if value is None:
                other: object = "" if name in ("caption", "reason") else 0
            else:
                other = value + ("x" if isinstance(value, str) else 1)
            column = pa.array([*values[:row], other, *values[row + 1 :]], small.table[name].type)
            position = small.table.column_names.index(name)
            field = small.table.schema.field(name)
            table = small.table.set_column(position, field, column)
            changed = SampleIndex(table, small.tars, small.label_names, small.dataset)
            digests.add(changed.digest())
            n_changes += 1
    assert len(digests) == 1 + n_changes
    assert SampleIndex(small.table, small.tars, ("p", "q"), small.dataset).digest() not in digests


# --- which tars -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a-000.tar", "a-001.tar", "a-010.tar", "b.tar", "sub/c.tar", "sub/deep/d.tar"):
        write_tar(tmp_path / "x" / name, [("k.png", b"x")])
    (tmp_path / "x" / "odd[1].tar").write_bytes(b"")
    return tmp_path / "x"


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("a-{000..001}.tar", ["a-000.tar", "a-001.tar"]),
        ("{b,a-010}.tar", ["b.tar", "a-010.tar"]),
        ("a-*.tar", ["a-000.tar", "a-001.tar", "a-010.tar"]),
        ("a-0[01]0.tar", ["a-000.tar", "a-010.tar"]),
        ("?.tar", ["b.tar"]),
        ("*/c.tar", ["sub/c.tar"]),
        ("**/*.tar", None),
        ("{sub,sub/deep}/*.tar", ["sub/c.tar", "sub/deep/d.tar"]),
        ("odd[1].tar", ["odd[1].tar"]),
        ("not-there.tar", ["not-there.tar"]),
    ],
)
def test_patterns(folder: Path, pattern: str, found: list[str] | None) -> None:
    everything = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.tar"))
    want = [f"{folder}/{name}" for name in (everything if found is None else found)]
    assert expand_urls(f"{folder}/{pattern}") == want


def test_relative_patterns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert expand_urls("a-00*.tar") == ["a-000.tar", "a-001.tar"]
    assert expand_urls("sub/*.tar") == ["sub/c.tar"]
    assert build_index(DatasetSpec.model_validate({"tars": "a-*.tar"})).n_samples == 3


def test_patterns_that_match_nothing(folder: Path) -> None:
    with pytest.raises(InputError, match=r"a_\*\.tar' matches nothing: .*x holds .*a-0"):
        expand_urls(f"{folder}/a_*.tar")
    with pytest.raises(InputError, match="close every brace"):
        expand_urls(f"{folder}/a-{{0..1.tar")


def test_a_missing_tar_names_its_neighbours(folder: Path) -> None:
    with pytest.raises(InputError, match=r"a-002\.tar: no such tar; .* nearest: a-0"):
        index_of(folder / "a-000.tar", folder / "a-002.tar")


def test_a_tar_listed_twice(folder: Path) -> None:
    with pytest.raises(InputError, match=r"b\.tar: listed twice, in split 'all'"):
        index_of(folder / "b.tar", folder / "?.tar")


def test_rows_are_in_order_of_splits_patterns_and_names(folder: Path) -> None:
    tars = {"z": [f"{folder}/b.tar", f"{folder}/a-*.tar"], "a": f"{folder}/sub/*.tar"}
    index = build_index(DatasetSpec.model_validate({"tars": tars}), n_threads=3)
    assert [tar.url.rpartition("/")[2] for tar in index.tars] == [
        "b.tar",
        "a-000.tar",
        "a-001.tar",
        "a-010.tar",
        "c.tar",
    ]
    assert index.table.column("tar").to_pylist() == [0, 1, 2, 3, 4]
    assert index.table.column("split").to_pylist() == ["z"] * 4 + ["a"]


# --- what is fetched ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large_tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 MB: ten samples of a 5 MB image, a label and a caption."""
    rng = np.random.default_rng(0)

    def members() -> Iterator[tuple[str, bytes]]:
        for i in range(10):
            yield f"{i}.cls", b"1"
            yield f"{i}.png", rng.bytes(5_000_000)
            yield f"{i}.txt", b"a caption"

    return write_tar(tmp_path_factory.mktemp("large") / "large.tar", members())


@pytest.mark.parametrize("remote", [False, True])
def test_large_bodies_are_not_fetched(
    large_tar: Path, remote: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = CountingFolder(large_tar.parent, remote=remote)

    def open_counting(url: str) -> tuple[Folder, str]:
        return counting, url.rpartition("/")[2]

    monkeypatch.setattr(index_module, "open_parent", open_counting)
    index = index_of(large_tar)
    assert index.table.column("label").to_pylist() == [1] * 10
    assert len(counting.ranges) <= 12
    assert counting.n_bytes < large_tar.stat().st_size / 25


def test_small_members_share_requests(tmp_path: Path) -> None:
    members = [(f"{i}.{e}", bytes(3000)) for i in range(500) for e in ("cls", "png")]
    path = write_tar(tmp_path / "t.tar", members)
    counting = CountingFolder(tmp_path, remote=True)
    assert len(list(walk_files(RangedSource(counting, "t.tar", path.stat().st_size)))) == 1000
    assert len(counting.ranges) <= path.stat().st_size / (1 << 20) + 1


def test_object_storage_urls(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar.gz", [("a.png", b"x")], mode="w:gz")
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/remote/t.tar.gz", path.read_bytes())
    assert [i.path for i in open_folder("memory://remote").list()] == ["t.tar.gz"]
    index = build_index(DatasetSpec.model_validate({"tars": "memory://remote/*.tar.gz"}))
    fs.rm("/remote", recursive=True)
    assert index.tars[0].compression == "gzip"
    assert index.n_samples == 1
