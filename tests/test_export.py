"""Exports: every format against the store, whatever the keys; resumed; what is refused."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors
import torch
import webdataset
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from drl_data.cli import app
from drl_data.datasets import FeatureDataset
from drl_data.errors import InputError, SpecError
from drl_data.export_formats import whole
from drl_data.index import SampleIndex
from drl_data.key_names import file_name, member_name
from drl_data.plan import InvalidRow
from drl_data.spec import ImageSpec
from drl_data.store import FeatureStore
from drl_data.tasks import export as export_module
from drl_data.tasks.export import ExportResult, export

from .stores import RUN, make_array, make_index, make_spec, make_times, reference

ARRAYS = (
    make_array("map", (4, 2, 3), "float16"),
    make_array("up.1", (5,), "bfloat16"),
    make_array("mean", (6,), "float32").model_copy(update={"timesteps": "mean"}),
)
N, INVALID = 23, (2, 13)
NASTY = ["../evil", "/etc/passwd", "a/../../b", "..", ".hidden", "a\\..\\b", "x" * 400, "å/ü.1"]
ROWS = [row for row in range(N) if row not in INVALID]


def nasty_index() -> SampleIndex:
    index = make_index(N, {"train": 15, "test": 8})
    keys = [*NASTY, *index.table["key"].to_pylist()[len(NASTY) :]]
    place = index.table.column_names.index("key")
    table = index.table.set_column(place, "key", pa.array(keys))
    return SampleIndex(table, index.tars, index.label_names, index.dataset)


def store_at(url: Path, index: SampleIndex, images: ImageSpec | None = None) -> FeatureStore:
    spec = make_spec(N, 4, images=images or ImageSpec(size=8))
    n_views = spec.images.n_views
    arrays = [a.model_copy(update={"views": n_views}) for a in ARRAYS]
    store = FeatureStore.create(str(url), spec, arrays, make_times(10, 200), index)
    keys = index.table["key"].to_pylist()
    cells = {a.name: reference(a, a.n_cells(2), N) for a in arrays}
    for unit in store.units:
        own = {name: x[:, unit.start : unit.stop] for name, x in cells.items()}
        bad = [InvalidRow(r, keys[r], "decode", "bad") for r in INVALID if r in
               range(unit.start, unit.stop)]  # fmt: skip
        store.write(unit, own, bad, RUN)
    store.seal()
    return store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return store_at(tmp_path_factory.mktemp("export") / "store", nasty_index())


def features(store: FeatureStore, tap: str, t: int, view: str | None = None) -> torch.Tensor:
    dataset = FeatureDataset(store, [tap], view=view)
    return dataset.read(range(len(dataset))).features[tap][:, t]


CELLS = [("map", "t10", 0), ("map", "t200", 1), ("up.1", "t10", 0), ("up.1", "t200", 1),
         ("mean", "all", 0)]  # fmt: skip


def files_under(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


# --- formats ------------------------------------------------------------------------------------


def test_npy(store: FeatureStore, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    result = export(store, "npy", out)
    assert (result.n_samples, result.n_invalid, result.complete) == (N - 2, 2, True)
    assert ExportResult.load(out / "export.json") == result
    assert [p for p in tmp_path.iterdir() if p.name != "deep"] == []  # nothing went elsewhere
    assert list((tmp_path / "deep").iterdir()) == [out]
    labels = store.samples()["label"].to_pylist()
    keys = store.samples()["key"].to_pylist()
    for tap, time, t in CELLS:
        want = features(store, tap, t)
        folder = out / tap / time
        listed = dict(json.loads((folder / "dataset.json").read_text())["labels"])
        for i, row in enumerate(ROWS):
            path = folder / "00000" / f"{file_name(keys[row])}.npy"
            found = np.load(path, allow_pickle=False)
            assert found.dtype == (np.float16 if tap == "map" else np.float32)
            assert torch.equal(torch.from_numpy(found).float(), want[i].float())
            assert listed.get(f"00000/{path.name}") == labels[row]
        assert len(listed) == sum(labels[row] is not None for row in ROWS)
        assert len(files_under(folder)) == len(ROWS) + 1


def test_npy_by_rows_sorts_as_the_store(store: FeatureStore, tmp_path: Path) -> None:
    """REPA pairs features with images by sorting both."""
    export(store, "npy", tmp_path / "o", taps=["map"], timesteps=[200], names="row", split="test")
    paths = sorted((tmp_path / "o" / "map" / "t200").rglob("*.npy"))
    assert [p.name for p in paths] == [f"img-feature-{r:08d}.npy" for r in ROWS if r >= 15]
    want = features(store, "map", 1)[[i for i, r in enumerate(ROWS) if r >= 15]]
    assert torch.equal(torch.from_numpy(np.stack([np.load(p) for p in paths])), want)


def test_safetensors(store: FeatureStore, tmp_path: Path) -> None:
    """Read as LightningDiT's loader does: shards sorted by name, a slice for each item."""
    export(store, "safetensors", tmp_path / "o", rows_per_file=8)
    for tap, time, t in CELLS:
        want, folder = features(store, tap, t), tmp_path / "o" / tap / time
        found, labels, rows = [], [], []
        for path in sorted(folder.glob("*.safetensors")):
            with safetensors.safe_open(path, framework="pt") as file:
                latents = file.get_slice("latents")
                found += [latents[i : i + 1] for i in range(latents.get_shape()[0])]
                labels += file.get_tensor("labels").tolist()
                rows += file.get_tensor("rows").tolist()
                assert "latents_flip" not in file.keys()  # noqa: SIM118  # no mapping
        assert len(list(folder.glob("*.safetensors"))) == 3
        assert rows == ROWS
        assert torch.equal(torch.cat(found), want)
        assert torch.cat(found).dtype == want.dtype
        assert labels == [-1 if row % 5 == 4 else row % 3 for row in ROWS]
        stats = safetensors.torch.load_file(folder / "stats" / "latents_stats.safetensors")
        x = want.double().movedim(1, -1).reshape(-1, want.shape[1])
        shape = (1, want.shape[1], *[1] * (want.ndim - 2))
        assert stats["mean"].shape == shape
        np.testing.assert_allclose(stats["mean"].flatten(), x.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stats["std"].flatten(), x.std(0), rtol=1e-5)


def test_a_lost_file_is_made_again_and_no_other(store: FeatureStore, tmp_path: Path) -> None:
    out = tmp_path / "o"
    export(store, "safetensors", out, taps=["map"])
    lost, kept = (
        out / "map" / time / "latents_rank00_shard000.safetensors" for time in ("t10", "t200")
    )
    data, when = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    export(store, "safetensors", out, taps=["map"])
    assert lost.read_bytes() == data
    assert kept.stat().st_mtime_ns == when


def test_safetensors_with_the_mirrored_view(tmp_path: Path) -> None:
    images = ImageSpec(size=8, views=("id", "hflip"))
    store = store_at(tmp_path / "s", make_index(N), images)
    export(store, "safetensors", tmp_path / "o", taps=["map"])
    path = tmp_path / "o" / "map" / "t200" / "latents_rank00_shard000.safetensors"
    found = safetensors.torch.load_file(path)
    assert torch.equal(found["latents"], features(store, "map", 1))
    assert torch.equal(found["latents_flip"], features(store, "map", 1, "hflip"))
    assert not torch.equal(found["latents"], found["latents_flip"])
    export(store, "safetensors", tmp_path / "f", taps=["map"], view="hflip")
    path = tmp_path / "f" / "map" / "t200" / "latents_rank00_shard000.safetensors"
    only = safetensors.torch.load_file(path)
    assert torch.equal(only["latents"], found["latents_flip"])
    assert "latents_flip" not in only


def test_parquet(store: FeatureStore, tmp_path: Path) -> None:
    export(store, "parquet", tmp_path / "o", rows_per_file=8)
    table = pq.read_table(sorted((tmp_path / "o").glob("*.parquet")))
    samples = store.samples().take(ROWS)
    for name in ("row", "key", "split", "label"):
        assert table[name].to_pylist() == samples[name].to_pylist()
    for tap, time, t in CELLS:
        column = table[f"{tap}@{time}"]
        shape = json.loads(table.schema.field(f"{tap}@{time}").metadata[b"shape"])
        values = column.combine_chunks().flatten().to_numpy().reshape(len(ROWS), *shape).copy()
        assert torch.equal(torch.from_numpy(values).float(), features(store, tap, t).float())


def test_webdataset(store: FeatureStore, tmp_path: Path) -> None:
    export(store, "webdataset", tmp_path / "o", rows_per_file=8)
    tars = sorted(str(path) for path in (tmp_path / "o").glob("*.tar"))
    assert len(tars) == 3
    members: dict[str, dict[str, bytes]] = {}
    for path in tars:
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                parts = member.name.split("/")
                assert not member.name.startswith("/")
                assert not {"", ".", ".."} & set(parts)
                key, _, extension = parts[-1].partition(".")
                place = "/".join([*parts[:-1], key])
                file = tar.extractfile(member)
                assert file is not None
                members.setdefault(place, {})[extension] = file.read()
    samples = list(members.values())
    keys = store.samples()["key"].to_pylist()
    assert list(members) == [member_name(keys[row]) for row in ROWS]
    assert [json.loads(sample["json"])["key"] for sample in samples] == [keys[r] for r in ROWS]
    assert [json.loads(sample["json"])["row"] for sample in samples] == ROWS
    for tap, time, t in CELLS:
        want = features(store, tap, t)
        for i, sample in enumerate(samples):
            found = np.load(io.BytesIO(sample[f"{tap}.{time}.npy"]), allow_pickle=False)
            assert torch.equal(torch.from_numpy(found).float(), want[i].float())
    for row, sample in zip(ROWS, samples, strict=True):
        assert sample.get("cls") == (None if row % 5 == 4 else str(row % 3).encode())


def test_webdataset_is_read_by_its_library(store: FeatureStore, tmp_path: Path) -> None:
    export(store, "webdataset", tmp_path / "o", taps=["map"])
    (tar,) = (tmp_path / "o").glob("*.tar")
    with open(tar, "rb") as stream:
        files = webdataset.tariterators.tar_file_expander([{"url": str(tar), "stream": stream}])
        samples = list(webdataset.tariterators.group_by_keys(files))
    assert len(samples) == len(ROWS)
    assert {"map.t10.npy", "map.t200.npy", "json"} <= samples[0].keys()


def test_hdf5(store: FeatureStore, tmp_path: Path) -> None:
    export(store, "hdf5", tmp_path / "o")
    with h5py.File(tmp_path / "o" / "part-00000.h5") as file:
        assert file["row"][:].tolist() == ROWS
        keys = store.samples()["key"].to_pylist()
        assert file["key"].asstr()[:].tolist() == [keys[row] for row in ROWS]
        assert file["split"].asstr()[0] == "train"
        assert file["label"][:].tolist() == [-1 if row % 5 == 4 else row % 3 for row in ROWS]
        assert file.attrs["fingerprint"] == store.fingerprint
        for tap, time, t in CELLS:
            found = torch.from_numpy(file[f"{tap}/{time}"][:])
            assert torch.equal(found.float(), features(store, tap, t).float())


# --- names --------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(min_size=1), st.text(min_size=1))
@example("../evil", "..%2Fevil")
@example("a" * 300, "a" * 299 + "b")
@example(".x", "%2Ex")
@example("a\x00b", "a")
def test_names_stay_in_their_folder_and_differ(one: str, two: str) -> None:
    try:
        names = [file_name(key) for key in (one, two)]
    except UnicodeEncodeError:  # a lone surrogate is in no tar
        return
    for name in names:
        assert not set(name) & set('/\\\0:*?"<>|')
        assert not name.startswith(".")
        assert len(f"{name}.npy".encode()) <= 255
    assert (names[0] == names[1]) == (one == two)
    for key in (one, two):
        parts = member_name(key).split("/")
        assert not {"", ".", ".."} & set(parts)
        assert "." not in "".join(parts)
    assert (member_name(one) == member_name(two)) == (one == two)


# --- again --------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["npy", "safetensors", "parquet", "webdataset", "hdf5"])
def test_goes_on_where_it_was_cut(
    store: FeatureStore, tmp_path: Path, to: export_module.Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut at the second part: no broken file is left, the first part stays, the rest is made."""
    out = tmp_path / "o"
    real: Callable[..., object] = export_module._part
    calls: list[int] = []

    def dies_at_the_second(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(export_module, "_part", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        export(store, to, out, rows_per_file=8)
    assert not ExportResult.load(out / "export.json").complete
    before = {path: path.stat().st_mtime_ns for path in files_under(out)}
    assert not [path for path in before if ".tmp-" in path.name]
    monkeypatch.setattr(export_module, "_part", real)
    assert export(store, to, out, rows_per_file=8).complete
    whole_out = tmp_path / "whole"
    export(store, to, whole_out, rows_per_file=8)
    names = sorted(path.relative_to(out) for path in files_under(out))
    assert names == sorted(path.relative_to(whole_out) for path in files_under(whole_out))
    for path, when in before.items():
        if path.name != "export.json":
            assert path.stat().st_mtime_ns == when
    for name in names:
        if to != "hdf5":
            assert (out / name).read_bytes() == (whole_out / name).read_bytes()


def test_a_file_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fails() -> None:
        with whole(tmp_path / "x.npy") as temporary:
            temporary.write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fails()
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused(store: FeatureStore, tmp_path: Path) -> None:
    export(store, "parquet", tmp_path / "o", taps=["up.1"])
    with pytest.raises(InputError, match=r"holds another export \(of .*, parquet\)"):
        export(store, "parquet", tmp_path / "o")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="not empty and holds no export"):
        export(store, "npy", tmp_path / "full")
    index = make_index(N)
    place = index.table.column_names.index("key")
    keys = pa.array(["same"] * 3 + index.table["key"].to_pylist()[3:])
    table = index.table.set_column(place, "key", keys)
    twins = SampleIndex(table, index.tars, index.label_names, index.dataset)
    double = store_at(tmp_path / "twins", twins)
    with pytest.raises(SpecError, match=r"1 samples share their key .*'same'.*--names row"):
        export(double, "npy", tmp_path / "t")
    assert not (tmp_path / "t").exists()
    export(double, "npy", tmp_path / "t", names="row")


def test_without_h5py(store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)  # as if it were not installed
    with pytest.raises(SpecError, match="needs h5py"):
        export(store, "hdf5", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_command(store: FeatureStore, tmp_path: Path) -> None:
    arguments = ["export", store.url, "--to", "parquet", "--out", str(tmp_path / "o")]
    done = CliRunner().invoke(app, [*arguments, "--tap", "map", "--timestep", "10"])
    assert done.exit_code == 0, done.output
    assert "21 samples" in done.output
    assert "2 without features left out" in done.output
    assert pq.read_schema(tmp_path / "o" / "part-00000.parquet").names[-1] == "map@t10"
