"""Tars that are broken, or want to do harm, through `drl index` and a whole extraction.

Each row of the tables is a tar, or several. Either the run refuses it with one message and exit
status 2, or it makes a store in which every good sample has, bit for bit, the features that it has
in an undisturbed store, whatever lies beside it, and the others are listed with stage and reason.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import lzma
import os
import re
import tarfile
import tracemalloc
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import GifImagePlugin, Image, ImageFile, PngImagePlugin

from drl_data.decode import decode_image
from drl_data.errors import ImageError, InputError
from drl_data.extract import make_task
from drl_data.images import read_batches
from drl_data.index import SampleIndex, build_index
from drl_data.pipeline import Pipeline
from drl_data.plan import Lease, Unit
from drl_data.runs import extract
from drl_data.spec import DatasetSpec, ImageSpec
from drl_data.store import FeatureStore
from drl_data.tar_samples import MAX_MEMBER_BYTES
from drl_data.tiny_models import save_tiny_ddpm
from tests import conftest
from tests.hostile_images import HOSTILE, damaged, encode, photo
from tests.test_extract import assert_same_store, pipeline
from tests.toy_tars import png, write_tar

N_GOOD = 6
Member = tuple[str | tarfile.TarInfo, bytes]
Drl = Callable[..., tuple[int, str]]


@pytest.fixture(scope="session")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_ddpm(tmp_path_factory.mktemp("ddpm"))


@pytest.fixture
def drl(drl: conftest.Drl) -> Drl:
    """Run `drl ARGS` in this process: (exit status, what it printed)."""

    def run(*args: object) -> tuple[int, str]:
        status, out, err = drl(*args)
        return status, out + err

    return run


# --- tars by hand ---------------------------------------------------------------------------------


def good(i: int) -> list[Member]:
    return [(f"good-{i}.cls", str(i).encode()), (f"good-{i}.png", png(i, 24, 24))]


def good_members() -> list[Member]:
    return [member for i in range(N_GOOD) for member in good(i)]


def among(*hostile: Member) -> list[Member]:
    """Hostile members in the middle of good ones."""
    return [*(m for i in range(3) for m in good(i)), *hostile,
            *(m for i in range(3, N_GOOD) for m in good(i))]  # fmt: skip


def tar_of(
    members: list[Member], format: int = tarfile.PAX_FORMAT, **headers: dict[str, str]
) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format, **headers) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            if info.isreg():
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def special(name: str, kind: bytes, target: str = "") -> Member:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def with_records(name: str, **records: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.pax_headers = dict(records)
    return info


def header_of(name: str, kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def pax_size(value: bytes) -> bytes:
    """A tar with a member whose PAX record says another size than its header."""
    record = b" size=" + value + b"\n"
    n = len(record) + 2
    record = str(n if len(str(n)) == 2 else n + 1).encode() + record
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, len(record)
    member = tarfile.TarInfo("bad.png")
    padded = record + bytes(-len(record) % 512)
    return header.tobuf() + padded + member.tobuf() + bytes(1024)


WHOLE = tar_of(good_members())
END = len(WHOLE.rstrip(b"\0")) // 512 * 512 + 512


# --- tars that are refused ------------------------------------------------------------------------

REFUSED: dict[str, tuple[bytes | None, str]] = {
    "not there": (None, "no such tar"),
    "empty": (b"", "empty file, want a tar; copy or write it again"),
    "nothing but the end": (bytes(10240), "no samples in 1 tars.*want members named KEY.EXT"),
    "cut in a header": (WHOLE[: END - 1500], r"ends before byte \d+.*copy it again"),
    "cut in an image": (WHOLE[: END - 600], r"ends before byte \d+.*copy it again"),
    "cut before its end marker": (WHOLE[:END], r"ends before byte \d+.*truncate -s \+1024"),
    "cut in a long name": (
        tar_of([("x" * 3000 + ".png", b"1")], tarfile.GNU_FORMAT)[:1500],
        r"ends before byte \d+",
    ),
    "a web page": (b"<html>not found</html>" * 100, "not a tar, or a corrupt one at byte 0"),
    "another byte in a header": (
        WHOLE.replace(b"good-2.png", b"gooD-2.png", 1), r"a corrupt header at byte \d+: checksum"),
    "two tars joined": (WHOLE + WHOLE, r"data at byte \d+, after the end marker"),
    "xz": (lzma.compress(WHOLE), "a xz file, want a plain or gzip tar"),
    "gzip, cut": (gzip.compress(WHOLE)[:-300], r"the gzip data end early, at byte \d+"),
    "gzip, corrupt": (
        gzip.compress(WHOLE)[:500] + b"\xff\xff" + gzip.compress(WHOLE)[502:],
        r"corrupt gzip data before byte \d+",
    ),
    "gzip of a cut tar": (gzip.compress(WHOLE[:2000]), r"ends before byte \d+"),
    "a negative size": (pax_size(b"-512"), "PAX size '-512' at byte 1024, want a number"),
    "a size of 10,000 digits": (pax_size(b"9" * 70), r"ends before byte \d+"),
    "a size that is no number": (pax_size(b"x"), "PAX size 'x' at byte 1024, want a number"),
    "a time that never comes": (
        tar_of(among((with_records("t.png", mtime="nan"), b"1"))), "PAX mtime 'nan' at byte"),
    "a corrupt PAX record": (
        tar_of([("é.png", b"1")]).replace(b" path=", b" path:"), "a corrupt PAX record"),
    "a header of 2 GiB": (
        header_of("x", tarfile.XHDTYPE, 2 << 30) + bytes(1024),
        "an extended header of 2147483648 bytes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_tar_that_is_refused(name: str, tmp_path: Path, ddpm: Path, drl: Drl) -> None:
    """One message that names the tar, exit status 2, and nothing written."""
    data, message = REFUSED[name]
    write_tar(tmp_path / "in" / "0.tar", [(n, d) for n, d in good_members() if isinstance(n, str)])
    path = tmp_path / "in" / "hostile.tar"
    if data is not None:
        path.write_bytes(data)
    tars = [str(tmp_path / "in" / "0.tar"), str(path)]
    if name == "nothing but the end":
        tars = [str(path)]  # beside a tar with samples, one without is no mistake
    code, printed = drl("index", *tars, "--out", tmp_path / "index.parquet")
    assert code == 2
    assert re.search(message, printed.replace("\n", " "))
    assert "hostile.tar" in printed
    assert "Traceback" not in printed
    spec = pipeline(tmp_path, ddpm, tmp_path / "s.zarr", dataset={"tars": tars})
    with pytest.raises(InputError, match=message):
        extract(spec)
    assert {p.name for p in tmp_path.rglob("*")} <= {"in", "0.tar", "hostile.tar"}


# --- tars that cost rows --------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Tars, and what becomes of the rows that are not good: key -> pattern of `stage: reason`,
    or None for a row that has features."""

    tars: tuple[bytes, ...]
    rows: dict[str, str | None] = field(default_factory=dict)
    images: dict[str, object] = field(default_factory=dict)
    warns: str | None = None


def case(*hostile: Member, format: int = tarfile.PAX_FORMAT, **rest: object) -> Case:
    return Case((tar_of(among(*hostile), format),), **rest)  # type: ignore[arg-type]


IMAGE = png(99, 24, 24)
LONG = "d/" * 2000 + "n" * 3000
DEEP = b"[" * 200_000

CASES: dict[str, Case] = {
    "undisturbed": Case((WHOLE,)),
    "gzip": Case((gzip.compress(WHOLE),)),
    "gzip in three members": Case(
        (b"".join(gzip.compress(p) for p in (WHOLE[:999], WHOLE[999:1999], WHOLE[1999:])),)),
    "one tar without samples": Case((WHOLE, bytes(10240))),
    "an image of 0 bytes": case(("bad.png", b""), rows={"bad": "decode: 0 bytes"}),
    "no image": case(("bad.cls", b"1"), rows={"bad": "index: no image: the sample has cls, want"}),
    "an image of another kind": case(
        ("bad.avif", IMAGE), rows={"bad": "index: no image: the sample has avif"}),
    "no label": case(("ok.png", IMAGE), rows={"ok": None}),
    "a label that is no text": case(("ok.cls", b"\xff\xfe"), ("ok.png", IMAGE), rows={"ok": None}),
    "a label of 17 MiB": case(
        ("ok.cls", bytes(MAX_MEMBER_BYTES + 1)), ("ok.png", IMAGE), rows={"ok": None},
        warns="ok.cls has 16777217 bytes, want at most 16777216"),
    "a label of 100 kB": case(("ok.cls", b"7" * 100_000), ("ok.png", IMAGE), rows={"ok": None}),
    "a caption of 100 kB": case(("ok.txt", b"x" * 100_000), ("ok.png", IMAGE), rows={"ok": None}),
    "text as .jpg": case(("bad.jpg", b"<html>"), rows={"bad": "decode: begins with b'<html>'"}),
    "a pickle as .png": case(
        ("bad.png", b"\x80\x04\x8c\x05posix\x8c\x06system."), rows={"bad": "decode: begins with"}),
    "too many bytes": case(
        ("bad.png", IMAGE + bytes(20_000)), rows={"bad": r"read: \d+ bytes, want at most 10000 "},
        images={"max_bytes": 10_000}),
    "too many pixels": case(
        ("bad.png", encode(Image.new("L", (40, 40)), "PNG")),
        rows={"bad": "decode: 40 x 40 = 1600 pixels, want at most 576"},
        images={"max_pixels": 576}),
    "one extension twice": case(
        ("bad.png", IMAGE), ("bad.PNG", IMAGE), rows={"bad": "index: two members bad.png"}),
    "one key again, later": case(*good(1), warns="1 of 7 samples have a key that an earlier"),
    "one key again, in another tar": Case(
        (WHOLE, tar_of([*good(2), *good(4)])), warns="2 of 8 samples.*for example good-2"),
    "the same tar twice, by other names": Case((WHOLE, WHOLE), warns="6 of 12 samples"),
    "absolute names": case(("/etc/evil.png", IMAGE), rows={"/etc/evil": None}),
    "names that climb": case(("../../evil.png", IMAGE), rows={"../../evil": None}),
    "a name of dots": case(("..", IMAGE), ("...png", IMAGE)),
    "backslashes": case((r"..\..\evil.png", IMAGE), rows={}),
    "backslashes in a key": case((r"C:\evil.png", IMAGE), rows={r"C:\evil": None}),
    "a line feed": case(("a\nb.png", IMAGE), rows={"a\nb": None}),
    "a terminal's controls": case(
        ("\x1b]0;evil\x07\x1b[2J.png", b"x"), rows={"\x1b]0;evil\x07\x1b[2J": "decode: begins"}),
    "NUL in a PAX name": case(
        (with_records("y.png", path="a\0b.png"), IMAGE), rows={"a\0b": None}),
    "a very long name, GNU": case(
        (LONG + ".png", IMAGE), format=tarfile.GNU_FORMAT, rows={LONG: None}),
    "a very long name, PAX": case((LONG + ".png", IMAGE), rows={LONG: None}),
    "two normal forms of one word": case(
        (unicodedata.normalize("NFC", "é") + ".png", IMAGE),
        (unicodedata.normalize("NFD", "é") + ".png", IMAGE),
        rows={unicodedata.normalize(form, "é"): None for form in ("NFC", "NFD")}),
    "names that are not UTF-8": case(
        ("\udcff\udcfe.png", IMAGE), format=tarfile.GNU_FORMAT, rows={r"\xff\xfe": None}),
    "a URL with a secret as key": case(
        ("https://me:pw@h/x.png", b"x"), rows={"https://me:pw@h/x": "decode: begins"}),
    "markup": case(("[red]<script>alert(1)</script>.png", b"x"),
                   rows={"[red]<script>alert(1)</script>": "decode: begins"}),
    "links, devices, folders, pipes": case(
        special("l.png", tarfile.SYMTYPE, "/etc/passwd"),
        special("h.png", tarfile.LNKTYPE, "good-0.png"),
        special("c.png", tarfile.CHRTYPE), special("b.png", tarfile.BLKTYPE),
        special("f.png", tarfile.FIFOTYPE), special("d.png", tarfile.DIRTYPE)),
    "a hard link beside a label": case(
        ("bad.cls", b"1"), special("bad.png", tarfile.LNKTYPE, "good-0.png"),
        rows={"bad": "index: no image: the sample has cls"}),
    "a sparse member, PAX": case(
        (with_records("GNUSparseFile.0/bad.png", **{"GNU.sparse.major": "1",
         "GNU.sparse.minor": "0", "GNU.sparse.name": "bad.png"}), IMAGE),
        rows={"bad": "index: bad.png is a sparse member; pack the tar again without --sparse"}),
    "a sparse member, old GNU": case(
        special("bad.png", tarfile.GNUTYPE_SPARSE), rows={"bad": "index: bad.png is a sparse"}),
    "a global header": Case(
        (tar_of(good_members(), pax_headers={"comment": "x" * 5000, "mtime": "7.5"}),)),
    "a global header with many records": Case(
        (tar_of(good_members(), pax_headers={f"k{i}": "v" for i in range(20_000)}),)),
    "JSON as deep as the stack": case(("ok.json", DEEP), ("ok.png", IMAGE), rows={"ok": None}),
}  # fmt: skip


UNLABELLED = {name for name in CASES if "label" in name or "caption of" in name} - {
    "a hard link beside a label"
}


def run_case(folder: Path, ddpm: Path, found: Case) -> FeatureStore:
    (folder / "in").mkdir(parents=True)
    for i, data in enumerate(found.tars):
        (folder / "in" / f"{i}.tar").write_bytes(data)
    spec = pipeline(
        folder / "in", ddpm, folder / "s.zarr", images={"size": 16, **found.images},
        taps=["mid_block"], schedule={"timesteps": [300]},
    )  # fmt: skip
    return extract(spec).store


def features(store: FeatureStore) -> dict[str, list[bytes]]:
    """Key -> the bits of each row with that key, of all arrays and timesteps."""
    by_key: dict[str, list[bytes]] = {}
    samples = store.samples().select(["row", "key", "status"]).to_pylist()
    assert [sample["row"] for sample in samples] == list(range(store.spec.n_samples))
    for sample in samples:
        if sample["status"] == "ok":
            row = [sample["row"]]
            bits = b"".join(
                np.ascontiguousarray(store.read_rows(array.name, t, row)).tobytes()
                for array in store.arrays
                for t in range(len(store.times))
            )
            by_key.setdefault(sample["key"], []).append(bits)
    return by_key


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, ddpm: Path) -> dict[str, bytes]:
    """Key -> features of the good samples."""
    store = run_case(tmp_path_factory.mktemp("undisturbed"), ddpm, Case((WHOLE,)))
    found = features(store)
    assert len(set(map(tuple, found.values()))) == N_GOOD
    return {key: bits for key, (bits,) in found.items()}


@pytest.mark.parametrize("name", CASES)
def test_a_tar_that_costs_rows(
    name: str,
    tmp_path: Path,
    ddpm: Path,
    undisturbed: dict[str, bytes],
    drl: Drl,
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = CASES[name]
    store = run_case(tmp_path, ddpm, found)
    assert store.sealed
    assert not store.verify(deep=True)
    by_key = features(store)
    for key, bits in undisturbed.items():
        assert set(by_key.pop(key)) == {bits}
    assert sorted(by_key) == sorted(k for k, reason in found.rows.items() if reason is None)
    receipts = store.receipts().values()
    listed = {row.key: f"{row.stage}: {row.reason}" for r in receipts for row in r.invalid}
    wanted = {key: reason for key, reason in found.rows.items() if reason is not None}
    assert listed.keys() == wanted.keys()
    for key, reason in wanted.items():
        assert re.match(reason, listed[key]), listed[key]
    if found.warns is None:
        assert not caplog.records
    else:
        assert re.search(found.warns, caplog.text)
    if name in UNLABELLED:
        (ok,) = [row for row in store.samples().to_pylist() if row["key"] == "ok"]
        assert (ok["label"], ok["caption"]) == (None, None)
    # Names in a tar are never paths: all that there is now are the tars and the store.
    assert {path.name for path in tmp_path.iterdir()} == {"in", "s.zarr"}
    names = {part for path in store.folder.list() for part in path.path.split("/")}
    assert not any("evil" in part or ".." in part for part in names)

    out = tmp_path / "index.parquet"
    code, _ = drl("index", *sorted((tmp_path / "in").iterdir()), "--out", out)
    assert code == 0
    # drl index names its split otherwise; all else is the same
    table = SampleIndex.load(str(out)).table.drop_columns(["split"])
    assert table.equals(store.index.table.drop_columns(["split"]))
    code, printed = drl("status", store.url)
    assert code == (1 if wanted else 0)
    assert "\x1b" not in printed
    assert "\x07" not in printed


def test_hostile_images_cost_their_rows_alone(
    tmp_path: Path, ddpm: Path, undisturbed: dict[str, bytes]
) -> None:
    """All of them in one tar, one good image after each few."""
    names = list(HOSTILE)
    members: list[Member] = []
    for i in range(N_GOOD):
        members += [(f"bad-{j}.png", HOSTILE[names[j]][0]) for j in range(i, len(names), N_GOOD)]
        members += good(i)
    store = run_case(tmp_path, ddpm, Case((tar_of(members),)))
    by_key = features(store)
    assert {key: by_key[key] for key in undisturbed} == {k: [b] for k, b in undisturbed.items()}
    listed = {row.key: row for receipt in store.receipts().values() for row in receipt.invalid}
    for j, name in enumerate(names):
        reason = HOSTILE[name][1]
        assert (f"bad-{j}" in by_key) == (reason is None), name
        if reason is not None:
            assert listed[f"bad-{j}"].stage == "decode"
            assert re.search(reason, listed[f"bad-{j}"].reason), name


@pytest.mark.parametrize("resize", ["shortest", "stretch", "pad"])
def test_thin_images(resize: str) -> None:
    for name in ("png of one pixel", "png of 300:1", "png of 1:300"):
        assert decode_image(HOSTILE[name][0], ImageSpec(size=8, resize=resize)).shape == (3, 8, 8)
        with pytest.raises(ImageError, match="want 8 x 8"):
            decode_image(HOSTILE[name][0], ImageSpec(size=8, resize="none"))


# --- sizes ----------------------------------------------------------------------------------------


def test_members_over_4_gib(tmp_path: Path, ddpm: Path, undisturbed: dict[str, bytes]) -> None:
    """Real members of 3 GiB, as holes of a file; good images lie beyond bytes 2^31 and 2^32."""
    path = tmp_path / "in" / "0.tar"
    path.parent.mkdir()
    huge: dict[int, str] = {1: "bad.png", 3: "movie.mp4", 4: "text.txt"}
    offsets = []
    with open(path, "wb") as file:
        for i in range(N_GOOD):
            if i in huge:
                info = tarfile.TarInfo(huge[i])
                info.size = 3 << 30
                file.write(info.tobuf(tarfile.GNU_FORMAT))
                file.seek(3 << 30, io.SEEK_CUR)
            offsets.append(file.tell())
            file.write(tar_of(good(i))[: -(-len(png(i, 24, 24)) // 512) * 512 + 1536])
        file.write(bytes(1024))
    assert offsets[2] > 2**31
    assert offsets[3] > 2**32
    tracemalloc.start()
    spec = pipeline(
        path.parent, ddpm, tmp_path / "s.zarr", taps=["mid_block"], schedule={"timesteps": [300]}
    )
    store = extract(spec).store
    assert tracemalloc.get_traced_memory()[1] < 256 << 20
    tracemalloc.stop()
    by_key = features(store)
    assert {key: by_key[key] for key in undisturbed} == {k: [b] for k, b in undisturbed.items()}
    listed = [(r.key, r.stage, r.reason) for x in store.receipts().values() for r in x.invalid]
    assert [row[:2] for row in listed] == [("bad", "read"), ("movie", "index"), ("text", "index")]
    assert listed[0][2] == "3221225472 bytes, want at most 1073741824 (images.max_bytes)"


def test_a_gzip_bomb_takes_time_and_no_memory(tmp_path: Path) -> None:
    """256 MiB of zeros in 256 kB: passed over by inflating, a MiB at a time."""
    path = tmp_path / "bomb.tar"
    with gzip.open(path, "wb") as file:
        file.write(tar_of(good_members())[:END])
        info = tarfile.TarInfo("bomb.png")
        info.size = 256 << 20
        file.write(info.tobuf())
        for _ in range(16):
            file.write(bytes(1 << 24))
        file.write(bytes(1024))
    assert path.stat().st_size < 1 << 20
    tracemalloc.start()
    index = build_index(DatasetSpec.model_validate({"tars": str(path)}))
    spec = ImageSpec(size=8, max_bytes=1 << 20)
    unit = Unit(0, 0, N_GOOD + 1)
    parts = read_batches(unit, index, spec, batch_size=4, n_threads=2, prefetch_bytes=1 << 20)
    invalid = [row for part in parts for row in part.invalid]
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()
    assert [(row.key, row.stage) for row in invalid] == [("bomb", "read")]


def test_large_images_of_one_batch_are_not_held_at_once(tmp_path: Path) -> None:
    members = [(f"{i}.png", png(i) + bytes(8 << 20)) for i in range(16)]
    path = write_tar(tmp_path / "t.tar", members)
    index = build_index(DatasetSpec.model_validate({"tars": str(path)}))
    tracemalloc.start()
    (batch,) = read_batches(
        Unit(0, 0, 16), index, ImageSpec(size=8), batch_size=16, n_threads=1, prefetch_bytes=9 << 20
    )
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
    assert not batch.invalid
    assert batch.pixels.any(axis=(1, 2, 3)).all()


# --- tars that change while they are used ---------------------------------------------------------


@dataclass
class Run:
    """A store half way: one unit of three is computed by a task that is there still."""

    spec: Pipeline
    store: FeatureStore
    tar: Path


@pytest.fixture
def begun(tmp_path: Path, ddpm: Path) -> Run:
    write_tar(tmp_path / "in" / "0.tar", [(n, d) for n, d in good_members() if isinstance(n, str)])
    features = {"dtype": "float32", "batch_size": 2, "rows_per_unit": 2}
    spec = pipeline(tmp_path / "in", ddpm, tmp_path / "s.zarr", features=features)
    return Run(spec, extract(spec, limit=2).store, tmp_path / "in" / "0.tar")


def the_rest(run: Run) -> Iterator[Callable[[], object]]:
    assert run.spec.backbone is not None
    task = make_task(run.store.url, run.spec.backbone, run.spec.condition, run.spec.run, 1)
    return iter([lambda u=unit: task(Lease(u)) for unit in run.store.pending()])


def replaced(path: Path, members: list[Member]) -> None:
    path.unlink()
    path.write_bytes(tar_of(members))


def test_a_tar_replaced_between_two_units(begun: Run, tmp_path: Path, ddpm: Path) -> None:
    """The units after it fail and say so; with the tar back the store is the undisturbed one."""
    original = begun.tar.read_bytes()
    units = the_rest(begun)
    next(units)()
    replaced(begun.tar, [(f"good-{i}.png", png(50 + i, 24, 24)) for i in range(N_GOOD)])
    with pytest.raises(InputError, match=r"0\.tar: changed since it was indexed.*index again"):
        next(units)()
    assert len(begun.store.receipts()) == 2
    begun.tar.write_bytes(original)  # another time, but the same bytes: the same samples
    extract(begun.spec)
    clean = begun.spec.model_copy(
        update={"store": type(begun.spec.store)(url=str(tmp_path / "clean.zarr"))}  # type: ignore
    )
    assert_same_store(begun.store, extract(clean).store)


def test_a_tar_deleted_in_the_middle(begun: Run) -> None:
    units = the_rest(begun)
    next(units)()
    begun.tar.unlink()
    with pytest.raises(InputError, match=r"0\.tar: gone since it was indexed; put it back"):
        next(units)()


def test_a_tar_replaced_while_a_unit_reads_it(tmp_path: Path) -> None:
    """What is read after the last batch was fetched is noticed before anything is written."""
    path = write_tar(tmp_path / "t.tar", [(f"{i}.png", png(i)) for i in range(4)])
    index = build_index(DatasetSpec.model_validate({"tars": str(path)}))
    batches = read_batches(
        Unit(0, 0, 4), index, ImageSpec(size=8), batch_size=2, n_threads=1, prefetch_bytes=1
    )
    next(batches)
    replaced(path, [(f"{i}.png", png(9 - i)) for i in range(4)])
    next(batches)
    with pytest.raises(InputError, match="changed since it was indexed"):
        next(batches)


def test_what_cannot_be_noticed(begun: Run) -> None:
    """Other bytes of the same size, written in place, with the old time set back: a local disk does
    not tell, only `drl verify --sample` can. On object storage the ETag does."""
    before = os.stat(begun.tar)
    data = begun.tar.read_bytes()
    assert data.count(b"\x89PNG") == N_GOOD
    start = data.rindex(b"\x89PNG")
    with open(begun.tar, "r+b") as file:
        file.seek(start)
        file.write(b"\x88")
    os.utime(begun.tar, ns=(before.st_atime_ns, before.st_mtime_ns))
    store = extract(begun.spec).store
    (bad,) = [row for receipt in store.receipts().values() for row in receipt.invalid]
    assert (bad.key, bad.stage) == ("good-5", "decode")


# --- the process around the decoder ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (ImageFile, "LOAD_TRUNCATED_IMAGES", True),
        (PngImagePlugin, "MAX_TEXT_CHUNK", 10),
        (PngImagePlugin, "MAX_TEXT_MEMORY", 10),
        (GifImagePlugin, "LOADING_STRATEGY", GifImagePlugin.LoadingStrategy.RGB_ALWAYS),
    ],
)
def test_settings_that_change_what_is_an_image_are_refused(
    module: object, name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, value)
    with pytest.raises(InputError, match=rf"{name} is .* in this process, want"):
        decode_image(IMAGE, ImageSpec(size=8))


def test_a_limit_of_pixels_of_the_process_is_not_taken_for_the_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = encode(photo(), "WEBP")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(InputError, match="MAX_IMAGE_PIXELS is 10 in this process"):
        decode_image(data, ImageSpec(size=8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert decode_image(data, ImageSpec(size=8)).any()


def fuzz_decoders(n: int, seed: int) -> tuple[int, int]:
    """Decode `n` damaged images: (how many were images still, how many were refused).

    Raises:
        AssertionError: pixels of another shape.
        Exception: anything that is not an ImageError, which is a bug.
    """
    n_ok, reasons = 0, set()
    for data in itertools.islice(damaged(seed), n):
        for frames in (1, 3):
            spec = ImageSpec(size=8, max_pixels=1_000_000, frames=frames)
            try:
                assert decode_image(data, spec).shape == spec.shape
                n_ok += 1
            except ImageError as error:
                reasons.add((error.stage, len(error.reason) < 500))
    assert reasons == {("decode", True)}
    return n_ok, 2 * n - n_ok


@pytest.mark.filterwarnings("ignore")
def test_damaged_images_are_images_or_image_errors() -> None:
    n_ok, n_refused = fuzz_decoders(600, seed=0)
    assert n_ok > 100
    assert n_refused > 100


@pytest.mark.filterwarnings("ignore")
def test_the_same_bytes_give_the_same_reason() -> None:
    """Receipts hold reasons, and two attempts must agree."""
    spec = ImageSpec(size=8, max_pixels=1_000_000)

    def outcome(data: bytes) -> object:
        try:
            return decode_image(data, spec).tobytes()
        except ImageError as error:
            return error.reason

    for data in itertools.islice(damaged(1), 200):
        assert outcome(data) == outcome(data)


def test_json_of_the_index_names_no_secret_of_a_key(tmp_path: Path) -> None:
    """Keys are data, and kept as they are, in Parquet and JSON."""
    key = "https://me:pw@h/x?y"
    path = write_tar(tmp_path / "t.tar", [(f"{key}.png", IMAGE)])
    index = build_index(DatasetSpec.model_validate({"tars": str(path)}))
    index.save(str(tmp_path / "i.parquet"))
    loaded = SampleIndex.load(str(tmp_path / "i.parquet"))
    assert loaded.table["key"].to_pylist() == [key]
    assert json.dumps(loaded.table["key"].to_pylist())
