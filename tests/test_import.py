"""`drl import`: what was exported comes back, whatever the format; and everything else as it is."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from drl_data.cli import app
from drl_data.datasets import FeatureDataset, FeatureStream, join
from drl_data.diff import diff_stores
from drl_data.errors import InputError, SpecError, StoreMismatchError, UserError
from drl_data.import_spec import ImportSpec
from drl_data.import_task import make_import_task
from drl_data.imports import import_features, prepare_import
from drl_data.index import SampleIndex, TarInfo
from drl_data.job_specs import ClusterSpec, ProbeSpec, RetrieveSpec
from drl_data.merge import merge
from drl_data.npy import parse_npy, parse_npz
from drl_data.objects import open_folder
from drl_data.pipeline import Pipeline, StatsSpec
from drl_data.plan import Lease
from drl_data.report import write_report
from drl_data.runs import extract
from drl_data.shards import Array
from drl_data.source_files import safetensors_header
from drl_data.spec import ImageSpec
from drl_data.store import FeatureStore
from drl_data.tasks.cluster import run_cluster
from drl_data.tasks.export import Format, export
from drl_data.tasks.probe import run_probe
from drl_data.tasks.retrieve import run_retrieve
from drl_data.tasks.stats import run_stats
from drl_data.tasks.sweep import run_sweep
from tests.task_stores import N_CLASSES, digits_index, store_of
from tests.toy_tars import write_tar

INVALID = (3, 150, 400)
TIMES = (10, 11)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Real digits at two levels of blur as maps, and their rows and columns as vectors."""
    folder = tmp_path_factory.mktemp("original")
    index = digits_index(folder / "tars")
    images = load_digits(n_class=N_CLASSES).images / 16
    x = np.stack([images[int(key[1:])] for key in index.table["key"].to_pylist()])
    blurred = (x + np.roll(x, 1, 1) + np.roll(x, 1, 2)) / 3
    maps = np.stack([x, blurred])[:, :, None].astype(np.float32)
    sums = np.stack([np.concatenate([y.sum(1), y.sum(2)], axis=1) for y in (x, blurred)])
    features: Mapping[str, Array] = {"map": maps, "sums": sums.astype(np.float32)}
    store = store_of(folder / "s.zarr", features, index, invalid=INVALID, dataset=index.digest())
    store.seal()
    return store


def tars_of(store: FeatureStore) -> dict[str, str]:
    return {tar.split: tar.url for tar in store.index.tars}


def source_of(to: Format, out: Path, **changes: object) -> dict[str, Any]:
    """What reads an export of the original again."""
    files = {
        "npy": f"{out}",
        "webdataset": f"{out}/*.tar",
        "parquet": f"{out}/*.parquet",
    }
    place = {
        "npy": "{name}/t{t}", "webdataset": "{name}.t{t}", "parquet": "{name}@t{t}"
    }[to]  # fmt: skip
    arrays = [
        {"name": name, "places": [place.format(name=name, t=t) for t in TIMES]}
        for name in ("map", "sums")
    ]
    return {"format": to, "files": files[to], "arrays": arrays, "timesteps": TIMES,
            "rows_per_unit": 128, **changes}  # fmt: skip


def pipeline(url: Path, source: Mapping[str, Any], **sections: object) -> Pipeline:
    return Pipeline.parse(
        {
            "name": "imported",
            "source": source,
            "store": {"url": str(url)},
            "results": str(url.parent / "results"),
            **sections,
        }
    )


def of_images(store: FeatureStore) -> dict[str, Any]:
    return {"dataset": {"tars": tars_of(store)}, "images": {"size": 8, "mode": "L"}}


def assert_same_arrays(a: FeatureStore, b: FeatureStore) -> None:
    """Bit for bit, invalid rows included."""
    assert [x.name for x in a.arrays] == [x.name for x in b.arrays]
    for array in a.arrays:
        for t in range(a.n_times(array.name)):
            mine, theirs = (
                np.concatenate([s.read_unit(array.name, t, unit) for unit in s.units])
                for s in (a, b)
            )
            np.testing.assert_array_equal(mine.view(np.uint8), theirs.view(np.uint8))


# --- there and back -----------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["npy", "webdataset", "parquet"])
def test_what_was_exported_comes_back(original: FeatureStore, to: Format, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(original, to, out)
    source = source_of(to, out)
    summary = import_features(pipeline(tmp_path / "b.zarr", source, **of_images(original)))
    store = FeatureStore.open(str(tmp_path / "b.zarr"))
    assert (summary.n_ok, summary.n_invalid, summary.failed) == (
        original.spec.n_samples - len(INVALID), len(INVALID), []
    )  # fmt: skip
    assert store.sealed
    assert store.verify(deep=True) == []
    assert_same_arrays(original, store)
    table = store.samples()
    assert table["label"].equals(original.samples()["label"])
    bad = table.filter(pa.compute.equal(table["status"], "invalid"))
    assert bad["row"].to_pylist() == list(INVALID)
    assert set(bad["stage"].to_pylist()) == {"source"}
    found = diff_stores(original, store)
    assert found.n_rows == original.spec.n_samples
    assert [one.found.n_differing for one in found.common] == [0, 0, 0, 0]
    assert found.noise_levels == ()


@pytest.mark.parametrize("view", [None, "hflip"])
def test_latents_of_lightningdit_come_back(
    original: FeatureStore, tmp_path: Path, view: str | None
) -> None:
    """Shards with `latents` and `latents_flip`, matched by the keys of our metadata."""
    out = tmp_path / "out"
    export(original, "safetensors", out, timesteps=[10], taps=["map"], rows_per_file=200)
    shards = sorted((out / "map" / "t10").glob("*.safetensors"))
    assert len(shards) == 4
    for path in shards:  # a mirrored view, which this store has not
        with safetensors.safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = file.metadata()
        tensors["latents_flip"] = tensors["latents"].flip(-1).contiguous()
        safetensors.torch.save_file(tensors, path, metadata=about)
    source = {
        "format": "safetensors",
        "files": f"{out}/map/t10/*.safetensors",
        "views": ["id", "hflip"],
        "timesteps": [10],
        "arrays": [{"name": "map", "places": ["latents", "latents_flip"]}],
    }
    import_features(pipeline(tmp_path / "b.zarr", source, **of_images(original)))
    store = FeatureStore.open(str(tmp_path / "b.zarr"))
    got = FeatureDataset(store, view=view).read(range(20)).features["map"][:, 0]
    want = FeatureDataset(original, ["map"], [10]).read(range(20)).features["map"][:, 0]
    assert torch.equal(got, want if view is None else want.flip(-1))
    assert store.verify(deep=True) == []


@pytest.mark.parametrize("to", ["webdataset", "parquet", "npy"])
def test_files_without_images_make_their_own_rows(
    original: FeatureStore, to: Format, tmp_path: Path
) -> None:
    """Keys, labels and splits of the files; the probe has the accuracy of the original."""
    for split in ("train", "test"):
        export(original, to, tmp_path / split, split=split)
    rest = {"webdataset": "*.tar", "parquet": "*.parquet", "npy": ""}[to]
    files = {split: f"{tmp_path}/{split}/{rest}".rstrip("/") for split in ("train", "test")}
    spec = ProbeSpec(seeds=(0,), epochs=20, pixels=False)
    own = pipeline(
        tmp_path / "b.zarr", source_of(to, tmp_path, files=files), probe=spec.model_dump()
    )
    import_features(own)
    store = FeatureStore.open(str(tmp_path / "b.zarr"))
    chosen = FeatureDataset(original)
    table = store.samples()
    assert sorted(table["key"].to_pylist()) == sorted(chosen.selection.keys.to_pylist())
    position = {key: i for i, key in enumerate(table["key"].to_pylist())}
    rows = [position[key] for key in chosen.selection.keys.to_pylist()]
    batch = chosen.read(range(len(rows)))
    assert table["label"].take(pa.array(rows)).to_pylist() == batch.label.tolist()
    again = FeatureDataset(store).read(rows)
    for name, x in batch.features.items():
        assert torch.equal(again.features[name], x)
    probe = run_probe(own)
    other = own.model_copy(
        update={"store": own.store.model_copy(update={"url": original.url}),  # type: ignore[union-attr]
                "results": str(tmp_path / "r")}
    )  # fmt: skip
    want = run_probe(other)
    assert probe.sources[0].best.mean_test == pytest.approx(
        want.sources[0].best.mean_test, abs=0.02
    )
    assert probe.sources[0].best.mean_test > 0.8


def test_extracted_exported_imported(tmp_path: Path) -> None:
    """A whole way round with a model, by the command line, with images to join."""
    from drl_data.testing import write_photo_tars
    from drl_data.tiny_models import save_tiny_ddpm
    from tests.test_extract import pipeline as extracting

    photos = write_photo_tars(tmp_path / "photos", n_samples=8, n_tars=2)
    model = save_tiny_ddpm(tmp_path / "ddpm")
    store = extract(extracting(photos, model, tmp_path / "a.zarr")).store
    export(store, "webdataset", tmp_path / "out")
    array = store.features[0]
    times = [time.requested for time in store.times]
    text = json.dumps(
        {
            "name": "imported",
            "dataset": {"tars": f"{photos}/*.tar"},
            "images": store.image_spec.model_dump(mode="json", exclude_defaults=True),
            "source": {
                "format": "webdataset",
                "files": "out/*.tar",
                "timesteps": times,
                "arrays": [{"name": array.name, "places": [f"{array.name}.t{t:g}" for t in times]}],
            },
            "store": {"url": "b.zarr"},
        }
    )
    file = tmp_path / "import.yaml"
    file.write_text(text)
    result = CliRunner().invoke(app, ["import", str(file)])
    assert result.exit_code == 0, result.output
    imported = FeatureStore.open(str(tmp_path / "b.zarr"))
    for t in range(len(times)):
        rows = range(store.spec.n_samples)
        a = store.read_rows(array.name, t, rows)
        np.testing.assert_array_equal(a, imported.read_rows(array.name, t, rows))
    pixels = next(iter(FeatureStream(imported, batch_size=4, images=True))).pixels
    assert torch.equal(
        pixels, next(iter(FeatureStream(store, batch_size=4, images=True))).pixels
    )  # fmt: skip
    again = CliRunner().invoke(app, ["import", str(file)])
    assert again.exit_code == 0
    assert "nothing left to do" in again.output


# --- what people have ---------------------------------------------------------------------------


def npy(x: npt.ArrayLike) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(x))
    return buffer.getvalue()


def imported(url: Path, source: Mapping[str, Any], **sections: object) -> FeatureStore:
    summary = import_features(pipeline(url, source, **sections))
    assert not summary.failed, summary.failed
    return FeatureStore.open(str(url))


def reasons(store: FeatureStore) -> dict[str, str]:
    table = store.samples()
    return {
        key: reason
        for key, reason in zip(table["key"].to_pylist(), table["reason"].to_pylist(), strict=True)
        if reason is not None
    }


def test_one_npy_for_each_key_with_time_first(tmp_path: Path) -> None:
    """`KEY.npy` [t, c]; Fortran order and big-endian numbers are what they say."""
    x = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    members = [
        ("a.npy", npy(x[0])),
        ("a.cls", b"7"),
        ("b.npy", npy(np.asfortranarray(x[1]))),
        ("c.npy", npy(x[2].astype(">f4"))),
        ("d.npy", npy(x[3].astype("<f4"))),
        ("e.jpg", b"an image of its own"),
    ]
    write_tar(tmp_path / "x.tar", members)
    store = imported(
        tmp_path / "s.zarr",
        {
            "format": "webdataset",
            "files": f"{tmp_path}/x.tar",
            "timesteps": [5, 0.5],
            "arrays": [{"name": "clip", "places": "npy", "time_axis": True}],
        },
    )
    got = [store.read_rows("clip", t, range(4)) for t in range(2)]
    np.testing.assert_array_equal(np.stack(got, 1), x)
    assert store.samples()["label"].to_pylist() == [7, None, None, None]
    assert store.array("clip").dims == ("channel",)
    with pytest.raises(SpecError, match="imported without images"):
        FeatureStream(store, batch_size=2, images=True)
    with pytest.raises(UserError, match="imported without images"):
        FeatureDataset(store, images=(store.index, ImageSpec(size=8))).read([0])


def test_bad_values_are_rows_with_a_reason(tmp_path: Path) -> None:
    good = np.ones(3, np.float32)
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }"
    claims = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}]), allow_pickle=True)
    write_tar(
        tmp_path / "x.tar",
        [
            ("a.f.npy", npy(good)),
            ("b.f.npy", npy(np.ones(4, np.float32))),
            ("c.f.npy", buffer.getvalue()),
            ("d.f.npy", claims),
            ("e.f.npy", b"no array"),
            ("f.f.npy", npy(np.ones(3))),
            ("g.other.npy", npy(good)),
            ("g.f.npy", npy(good)),
            ("h.other.npy", npy(good)),
            ("i.f.npy", npy(["x", "y", "z"])),
        ],
    )
    store = imported(
        tmp_path / "s.zarr",
        {"format": "webdataset", "files": f"{tmp_path}/x.tar", "arrays": [{"name": "f"}]},
    )
    found = reasons(store)
    assert sorted(found) == ["b", "c", "d", "e", "f", "i"]  # h has nothing that is asked for
    assert "(4,), want (3,)" in found["b"]
    assert "pickled" in found["c"]
    assert "0 bytes of values, its header says 4000000000000" in found["d"]
    assert "no .npy of version 1 to 3" in found["e"]
    assert "float64, the first sample has float32" in found["f"]
    assert "want numbers" in found["i"]
    receipt = store.receipts()[0]
    assert receipt.n_ok + receipt.n_invalid == store.spec.n_samples == 8
    assert store.verify(deep=True) == []


def test_rows_that_lack_a_value_count_for_nothing(tmp_path: Path) -> None:
    """A NaN in a row that has no features anyway fails no unit and is not counted."""
    bad = np.array([np.nan, np.inf], np.float32)
    write_tar(
        tmp_path / "x.tar",
        [
            ("a.f.npy", npy(np.ones(2, np.float32))),
            ("a.g.npy", npy(np.ones(2, np.float32))),
            ("b.f.npy", npy(bad)),
        ],
    )
    source = {
        "format": "webdataset",
        "files": f"{tmp_path}/x.tar",
        "arrays": [{"name": "f"}, {"name": "g"}],
    }
    store = imported(tmp_path / "s.zarr", source)
    assert reasons(store) == {"b": "g: no g.npy: the sample has f.npy"}
    assert store.receipts()[0].counts.non_finite == {}
    assert parse_npy(npy(np.ones(2, np.dtype(">f4")))).dtype.isnative


GOOD_NPY, GOOD_NPZ = io.BytesIO(), io.BytesIO()
np.save(GOOD_NPY, np.arange(6, dtype=np.float16).reshape(2, 3))
np.savez_compressed(GOOD_NPZ, x=np.arange(6))


@settings(deadline=None, max_examples=400)
@given(
    st.sampled_from([GOOD_NPY.getvalue(), GOOD_NPZ.getvalue()]),
    st.integers(0, 400), st.integers(0, 255), st.integers(0, 400),
)  # fmt: skip
def test_damaged_bytes_are_values_or_a_reason(data: bytes, at: int, byte: int, n: int) -> None:
    """Whatever is cut or flipped: NumPy's own reader of headers lets a TokenError out."""
    damaged = bytearray(data[:n])
    if at < len(damaged):
        damaged[at] = byte
    parse = parse_npy if data[:1] == b"\x93" else partial(parse_npz, name="x")
    with suppress(ValueError):
        parse(bytes(damaged))


@given(
    hnp.arrays(
        st.sampled_from([np.float16, np.dtype(">f4"), np.float64, np.int8, np.dtype(">u2")]),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    ),
    st.booleans(),
)
def test_npy_as_numpy_reads_it(x: npt.NDArray[np.generic], fortran: bool) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.asfortranarray(x) if fortran and x.ndim else x)
    found = parse_npy(buffer.getvalue())
    assert found.dtype == x.dtype.newbyteorder("=")
    np.testing.assert_array_equal(found, x)


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 200), st.integers(0, 255), st.integers(0, 400))
def test_damaged_shards_are_refused_by_name(at: int, byte: int, n: int) -> None:
    tensors = {"latents": torch.zeros(2, 3, 4), "labels": torch.zeros(2, dtype=torch.int64)}
    damaged = bytearray(safetensors.torch.save(tensors))[:n]
    if at < len(damaged):
        damaged[at] = byte
    folder = open_folder("memory://damaged-shards")
    folder.put("x.safetensors", [bytes(damaged)])
    file = TarInfo("memory://damaged-shards/x.safetensors", "all", len(damaged), "", "none")
    with suppress(InputError):
        header, begin = safetensors_header(file)
        for name, tensor in header.items():
            if name != "__metadata__":
                assert begin + tensor["data_offsets"][1] <= len(damaged)
                assert all(n >= 0 for n in tensor["shape"])


def test_a_shard_of_negative_sizes_is_refused() -> None:
    """Two of them multiply to the bytes that are there."""
    about = {"x": {"dtype": "F32", "shape": [2, -3, -4], "data_offsets": [0, 96]}}
    header = json.dumps(about).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(96)
    open_folder("memory://negative-shards").put("x.safetensors", [data])
    file = TarInfo("memory://negative-shards/x.safetensors", "all", len(data), "", "none")
    with pytest.raises(InputError, match=r"of shape \[2, -3, -4\]"):
        safetensors_header(file)


def test_a_damaged_column_ends_its_unit(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), 64)
    table = pa.table({"key": [str(i) for i in range(50)], "v": column})
    path = tmp_path / "x.parquet"
    pq.write_table(table, path, row_group_size=25, compression="zstd", use_dictionary=False)
    source = {"format": "parquet", "files": str(path), "arrays": [{"name": "v"}],
              "rows_per_unit": 25}  # fmt: skip
    place = pq.ParquetFile(path).metadata.row_group(1).column(1)
    data = bytearray(path.read_bytes())
    middle = place.data_page_offset + place.total_compressed_size // 2
    data[middle : middle + 64] = bytes(64)
    path.write_bytes(bytes(data))
    summary = import_features(pipeline(tmp_path / "s.zarr", source))
    assert [unit.id for unit, _ in summary.failed] == [1]
    assert "column 'v' cannot be read" in summary.failed[0][1]


def test_npz_members(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, mid=np.arange(6, dtype=np.float16).reshape(2, 3))
    write_tar(tmp_path / "x.tar", [("a.npz", buffer.getvalue()), ("b.npz", b"PK no")])
    store = imported(
        tmp_path / "s.zarr",
        {
            "format": "webdataset",
            "files": f"{tmp_path}/x.tar",
            "arrays": [{"name": "mid", "places": "npz:mid"}],
        },
    )
    assert store.array("mid").dims == ("token", "channel")
    np.testing.assert_array_equal(store.read_rows("mid", 0, [0])[0], [[0, 1, 2], [3, 4, 5]])
    assert "npz" in reasons(store)["b"]


def test_keys_of_a_dataset_decide(original: FeatureStore, tmp_path: Path) -> None:
    """Rows without features are invalid, features without rows are left out, and what is not of
    one sample alone is nobody's."""
    keys = original.index.table["key"].to_pylist()
    x = {key: np.full(2, i, np.float32) for i, key in enumerate(keys)}
    members = [(f"{key}.f.npy", npy(x[key])) for key in reversed(keys[5:])]
    write_tar(tmp_path / "a.tar", [*members, ("stranger.f.npy", npy(np.zeros(2)))])
    write_tar(tmp_path / "b.tar", [(f"{keys[9]}.f.npy", npy(x[keys[9]]))])
    source = {"format": "webdataset", "files": f"{tmp_path}/?.tar", "arrays": [{"name": "f"}]}
    store = imported(tmp_path / "s.zarr", source, **of_images(original))
    found = reasons(store)
    assert sorted(found) == sorted([*keys[:5], keys[9]])
    assert "not in the files" in found[keys[0]]
    assert "not of one sample alone" in found[keys[9]]
    dataset = FeatureDataset(store)
    batch = dataset.read(range(len(dataset)))
    assert [x[key][0] for key in batch.key] == batch.features["f"][:, 0, 0].tolist()
    joined = FeatureDataset(join({"a": original, "b": store}))
    assert len(joined) == original.spec.n_samples - 6 - 2  # row 3 is in both


def test_position_and_number_of_the_name(original: FeatureStore, tmp_path: Path) -> None:
    """LightningDiT's own shards have no keys; REPA's files are numbered as its images."""
    n = original.spec.n_samples
    x = torch.arange(n * 4, dtype=torch.float32).reshape(n, 4)
    save = safetensors.torch.save_file
    save(
        {"latents": x[:100].clone(), "labels": torch.zeros(100).long()},
        tmp_path / "a-00.safetensors",
    )
    save(
        {"latents": x[100:].clone(), "labels": torch.ones(n - 100).long()},
        tmp_path / "a-01.safetensors",
    )
    source = {
        "format": "safetensors",
        "files": f"{tmp_path}/a-*.safetensors",
        "arrays": [{"name": "vae", "places": "latents"}],
    }
    by_place = imported(tmp_path / "p.zarr", {**source, "match": "position"}, **of_images(original))
    np.testing.assert_array_equal(by_place.read_rows("vae", 0, range(n)), x.numpy())
    own = imported(tmp_path / "o.zarr", source)
    assert own.samples()["key"][100].as_py() == "a-01-00000000"
    assert own.samples()["label"].to_pylist() == [0] * 100 + [1] * (n - 100)
    with pytest.raises(InputError, match="none of"):
        imported(tmp_path / "q.zarr", source, **of_images(original))
    for row in range(0, n, 2):
        path = tmp_path / "tree" / "vae-sd" / f"{row // 1000:05d}" / f"img-mean-std-{row:08d}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, x[row].numpy())
    tree = {
        "format": "npy",
        "files": f"{tmp_path}/tree",
        "key": "row",
        "arrays": [{"name": "vae", "places": "vae-sd"}],
    }
    numbered = imported(tmp_path / "n.zarr", tree, **of_images(original))
    np.testing.assert_array_equal(numbered.read_rows("vae", 0, range(0, n, 2)), x.numpy()[::2])
    assert numbered.receipts()[0].n_invalid == numbered.units[0].n_rows // 2


def test_types_are_kept_or_cast_with_a_policy(tmp_path: Path) -> None:
    values = torch.tensor([[1.5, -2.0], [3.0, 1e6], [float("nan"), 4.0]])
    kinds = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn}
    for name, kind in kinds.items():
        tensors = {"x": values[:1].to(kind)}
        safetensors.torch.save_file(tensors, tmp_path / f"{name}.safetensors")
        store = imported(
            tmp_path / f"{name}.zarr",
            {"format": "safetensors", "files": f"{tmp_path}/{name}.safetensors",
             "arrays": [{"name": "x"}]},
        )  # fmt: skip
        assert store.array("x").dtype == name
        got = FeatureDataset(store).read([0]).features["x"][0, 0]
        assert torch.equal(got.float(), values[0])
    safetensors.torch.save_file({"x": values, "i": values[:2].long()}, tmp_path / "v.safetensors")

    def source(array: str = "x", **changes: object) -> dict[str, Any]:
        return {"format": "safetensors", "files": f"{tmp_path}/v.safetensors",
                "arrays": [{"name": array}], **changes}  # fmt: skip

    failing = import_features(pipeline(tmp_path / "e.zarr", source()))
    assert "not finite: x at timestep any: 1 NaN" in failing.failed[0][1]
    assert "`source.non_finite: invalid`" in failing.failed[0][1]
    half = imported(
        tmp_path / "h.zarr", source(dtype="float16", overflow="invalid", non_finite="clip")
    )
    assert list(reasons(half).values()) == ["too large for float16 at x: 1 values"]
    np.testing.assert_array_equal(half.read_rows("x", 0, [0, 2]), [[1.5, -2.0], [0.0, 4.0]])
    clipped = imported(
        tmp_path / "c.zarr", source(dtype="float16", overflow="clip", non_finite="invalid")
    )
    assert clipped.receipts()[0].counts.clipped == {"x": {"any": 1}}
    assert clipped.read_rows("x", 0, [1])[0, 1] == np.finfo(np.float16).max
    integers = imported(tmp_path / "8.zarr", source(dtype="int8", non_finite="clip"))
    assert integers.arrays[1].name == "x__scale"
    with pytest.raises(SpecError, match="integers in the files"):
        prepare_import(pipeline(tmp_path / "i.zarr", source("i")))


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array(["a", "b"]), "want lists of numbers"),
        (pa.array([1.0, 2.0]), "want lists of numbers"),
    ],
)
def test_columns_that_are_no_vectors(tmp_path: Path, column: pa.Array, message: str) -> None:
    pq.write_table(pa.table({"key": ["a", "b"], "v": column}), tmp_path / "x.parquet")
    source = {"format": "parquet", "files": f"{tmp_path}/x.parquet", "arrays": [{"name": "v"}]}
    with pytest.raises(InputError, match=message):
        prepare_import(pipeline(tmp_path / "s.zarr", source))


def test_lists_of_a_column(tmp_path: Path) -> None:
    """Lists of any length and with nulls; groups of rows; labels as text; another name of key."""
    lists = [[1.0, 2, 3, 4], [5.0], None, [1.0, None, 3, 4], [9.0, 8, 7, 6]]
    table = pa.table(
        {
            "id": [10, 11, 12, 13, 14],
            "v": pa.array(lists, pa.list_(pa.float32())),
            "label": ["cat", "dog", "cat", None, "dog"],
            "part": ["train", "test", "train", "test", "train"],
        }
    )
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=2)
    store = imported(
        tmp_path / "s.zarr",
        {
            "format": "parquet",
            "files": f"{tmp_path}/x.parquet",
            "key": "id",
            "split": "part",
            "arrays": [{"name": "v", "shape": [1, 2, 2]}],
        },
    )
    found = reasons(store)
    assert sorted(found) == ["11", "12", "13"]
    assert "shape (1,), want (1, 2, 2)" in found["11"]
    assert "null in its column" in found["12"]
    assert "1 nulls among its values" in found["13"]
    np.testing.assert_array_equal(store.read_rows("v", 0, [4])[0], [[[9, 8], [7, 6]]])
    assert store.samples()["split"].to_pylist() == table["part"].to_pylist()
    assert store.index.label_names == ("cat", "dog")


# --- runs ---------------------------------------------------------------------------------------


@pytest.fixture
def exported(original: FeatureStore, tmp_path: Path) -> Callable[..., Pipeline]:
    export(original, "webdataset", tmp_path / "out", rows_per_file=300)

    def make(name: str, **sections: object) -> Pipeline:
        source = source_of("webdataset", tmp_path / "out")
        return pipeline(tmp_path / name, source, **of_images(original), **sections)

    return make


def receipts_of(store: FeatureStore) -> dict[int, object]:
    return {unit: receipt.content() for unit, receipt in store.receipts().items()}


def test_parts_processes_and_order_change_nothing(exported: Callable[..., Pipeline]) -> None:
    want = import_features(exported("a.zarr")).store
    import_features(exported("b.zarr"), part=(1, 2))
    half = import_features(exported("b.zarr"), limit=130, shuffle_seed=3)
    assert half.n_pending == 2
    run = {"executor": "process", "workers": 2}
    rest = import_features(exported("b.zarr", run=run), shuffle_seed=1)
    assert (len(want.units), rest.n_pending) == (6, 1)
    store = rest.store
    assert store.sealed
    assert receipts_of(store) == receipts_of(want)
    assert_same_arrays(store, want)


@pytest.mark.s3
@pytest.mark.parametrize("to", ["npy", "webdataset", "parquet", "safetensors"])
def test_files_and_store_on_s3(
    original: FeatureStore, s3_url: str, to: Format, tmp_path: Path
) -> None:
    export(original, to, tmp_path / "out", timesteps=[10], taps=["map"], rows_per_file=250)
    for path in (tmp_path / "out").rglob("*.*"):
        if path.is_file() and ".done" not in path.parts:
            name = path.relative_to(tmp_path).as_posix()
            open_folder(s3_url).put(name, [path.read_bytes()])
    files, place = {
        "npy": ("out", "map/t10"),
        "webdataset": ("out/*.tar", "map.t10"),
        "parquet": ("out/*.parquet", "map@t10"),
        "safetensors": ("out/map/t10/*.safetensors", "latents"),
    }[to]
    source = {"format": to, "files": f"{s3_url}/{files}", "timesteps": [10],
              "arrays": [{"name": "map", "places": place}]}  # fmt: skip
    made = Pipeline.parse(
        {"name": "s3", "source": source, "store": {"url": f"{s3_url}/{to}.zarr"},
         **of_images(original)}
    )  # fmt: skip
    store = import_features(made).store
    assert store.verify(deep=True) == []
    rows = np.flatnonzero(original.valid_rows())
    assert (store.valid_rows() == original.valid_rows()).all()
    np.testing.assert_array_equal(
        store.read_rows("map", 0, rows), original.read_rows("map", 0, rows)
    )
    assert import_features(made).n_pending == 0


def test_rows_that_killed_a_worker_are_not_read(exported: Callable[..., Pipeline]) -> None:
    made = exported("a.zarr")
    store = import_features(made, limit=1).store
    task = make_import_task(store.url, None, 1 << 30)
    unit = store.units[1]
    lease = Lease(unit, probe=(unit.start + 2, unit.start + 9))
    assert task(lease) is None
    assert store.receipt(unit) is None
    found = task(Lease(unit, attempt=2, poison=((unit.start + 1, "died"),)))
    assert found is not None
    bad = found.receipt.invalid
    assert [(row.row, row.stage) for row in bad] == [
        (unit.start + 1, "worker"), (150, "source")
    ]  # fmt: skip
    again = task(Lease(unit))
    assert again is not None
    assert not again.computed


def test_a_changed_file_ends_the_import(exported: Callable[..., Pipeline], tmp_path: Path) -> None:
    import_features(exported("a.zarr"), limit=1)
    path = next(iter(sorted((tmp_path / "out").glob("*.tar"))))
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        member = next(m for m in tar if m.name.endswith(".npy"))
    data[member.offset_data + member.size - 1] ^= 1  # a value; headers and sizes stay
    path.write_bytes(bytes(data))
    with pytest.raises(InputError, match="changed since the import"):
        import_features(exported("a.zarr"))


def test_damage_is_found_and_repaired(exported: Callable[..., Pipeline], tmp_path: Path) -> None:
    made = exported("a.zarr")
    store = import_features(made).store
    want = receipts_of(store)
    for path in ("source.parquet", "map/c/1/0/0/0/0", "zarr.json"):
        file = tmp_path / "a.zarr" / path
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 4
        file.write_bytes(bytes(data))
    (tmp_path / "a.zarr" / "source.json").unlink()
    summary = import_features(made, repair=True)
    assert "zarr.json" in summary.repaired.rewritten
    assert summary.repaired.units == (1,)
    assert summary.store.verify(deep=True) == []
    assert receipts_of(summary.store) == want
    data = bytearray((tmp_path / "a.zarr" / "source.parquet").read_bytes())
    data[100] ^= 1
    (tmp_path / "a.zarr" / "source.parquet").write_bytes(bytes(data))
    assert [p.object for p in summary.store.verify()] == ["source.parquet"]


# --- what reads a store -------------------------------------------------------------------------


def test_jobs_on_an_imported_store(
    original: FeatureStore, exported: Callable[..., Pipeline], tmp_path: Path
) -> None:
    cell = {"tap": "map", "timestep": 10, "pool": 4}
    own = exported(
        "a.zarr",
        cluster=ClusterSpec(**cell, k=(N_CLASSES,)).model_dump(),
        retrieve=RetrieveSpec(**cell, k=3).model_dump(),
        stats=StatsSpec().model_dump(),
        probe=ProbeSpec(seeds=(0,), epochs=5).model_dump(),
    )
    store = import_features(own).store
    theirs = own.model_copy(
        update={"store": own.store.model_copy(update={"url": original.url}),  # type: ignore[union-attr]
                "results": str(tmp_path / "of-original")}
    )  # fmt: skip
    for run in (run_cluster, run_retrieve, run_stats, run_probe):
        mine, want = (run(p).model_dump(mode="json") for p in (own, theirs))  # type: ignore[operator]
        for place in ("store", "fingerprint", "seconds"):
            mine.pop(place, None)
            want.pop(place, None)
        if run is not run_probe:
            assert mine == want
        else:
            cells = [one["sources"][0]["cells"] for one in (mine, want)]
            assert cells[0] == cells[1]
    page = write_report(own).read_text()
    assert "imported from" in page
    assert "weights</dt>" not in page
    for command in (["status"], ["verify", "--deep"], ["diff", original.url]):
        result = CliRunner().invoke(app, [command[0], *command[1:], store.url])
        assert result.exit_code in (0, 1), result.output
        assert result.exception is None or isinstance(result.exception, SystemExit)


def test_what_needs_a_model_is_refused_by_name(
    original: FeatureStore, exported: Callable[..., Pipeline], tmp_path: Path
) -> None:
    own = exported("a.zarr", probe={})
    store = import_features(own).store
    with pytest.raises(SpecError, match="`drl import` makes its store"):
        extract(own)
    with pytest.raises(SpecError, match="`drl import` makes its store"):
        run_sweep(own, 100)
    with pytest.raises(StoreMismatchError, match=r"imported with `drl import`, not computed"):
        merge([store.url, original.url], str(tmp_path / "m.zarr"))
    with pytest.raises(StoreMismatchError, match=r"imported with `drl import`, not computed"):
        merge([original.url, store.url], str(tmp_path / "m.zarr"))
    file = tmp_path / "p.yaml"
    file.write_text(json.dumps(own.model_dump(mode="json", exclude_unset=True)))
    runner = CliRunner()
    for arguments in (
        ["plan", str(file)],
        ["extract", str(file)],
        ["verify", store.url, "--sample", "3", "--pipeline", str(file)],
    ):
        result = runner.invoke(app, arguments)
        assert isinstance(result.exception, UserError), arguments
        assert "import" in str(result.exception)


# --- the section --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arrays": []}, "source.arrays"),
        ({"arrays": [{"name": "a"}, {"name": "a"}]}, "want each once"),
        ({"arrays": [{"name": "a", "time_axis": True}], "timesteps": []}, "give its `timesteps:`"),
        ({"arrays": [{"name": "a", "places": ["x", "y", "z"]}]}, "3 places for 2 timesteps"),
        ({"timesteps": [10, 10.0]}, "want each once"),
        ({"views": ["crop"]}, "source.views"),
        ({"format": "hdf5"}, "source.format"),
    ],
)
def test_sections_that_mean_nothing(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    source = {**source_of("webdataset", tmp_path), **changes}
    with pytest.raises(SpecError, match=message):
        pipeline(tmp_path / "s.zarr", source)


def test_imported_or_computed_but_not_both(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="imported or computed, not both"):
        pipeline(tmp_path / "s.zarr", source_of("npy", tmp_path), taps=["mid_block"])
    with pytest.raises(SpecError, match=r"dataset: missing"):
        Pipeline.parse({"name": "x"})


def test_fingerprint_of_an_import_is_golden(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.f.npy", npy(np.ones(3, np.float32)))])
    source = {"format": "webdataset", "files": f"{tmp_path}/x.tar", "arrays": [{"name": "f"}]}
    spec = prepare_import(pipeline(tmp_path / "s.zarr", source)).described.spec
    assert isinstance(spec, ImportSpec)
    assert spec.fingerprint() == "17ec2a4a0fb5ad9b2f3e04997a7890b9"
    (tmp_path / "moved").mkdir()
    (tmp_path / "x.tar").rename(tmp_path / "moved" / "x.tar")
    moved = {**source, "files": f"{tmp_path}/moved/x.tar"}
    again = prepare_import(pipeline(tmp_path / "s.zarr", moved)).described.spec
    assert again == spec
    named = prepare_import(pipeline(tmp_path / "s.zarr", {**moved, "about": "CLIP"})).described.spec
    assert named.fingerprint() != spec.fingerprint()


def test_the_index_has_no_secrets(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.f.npy", npy(np.ones(3, np.float32)))])
    url = "https://me:secret@host/x.tar?X-Amz-Signature=1"
    source = {"format": "webdataset", "files": f"{tmp_path}/x.tar", "arrays": [{"name": "f"}]}
    found = prepare_import(pipeline(tmp_path / "s.zarr", source)).catalogue
    moved = found.with_files([found.files[0].__class__(url, "all", 1, "", "none")])
    assert b"secret" not in bytes(moved.to_parquet())
    with pytest.raises(InputError, match="without their secrets"):
        type(found).from_parquet(moved.to_parquet(), "x").require_readable()


def test_own_rows_must_have_distinct_keys(tmp_path: Path) -> None:
    one = ("a.f.npy", npy(np.ones(3, np.float32)))
    write_tar(tmp_path / "x.tar", [one])
    write_tar(tmp_path / "y.tar", [one])
    source = {"format": "webdataset", "files": f"{tmp_path}/?.tar", "arrays": [{"name": "f"}]}
    with pytest.raises(InputError, match="'a' for example; want each once"):
        prepare_import(pipeline(tmp_path / "s.zarr", source))


def test_index_of_files_reads_as_any(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.f.npy", npy(np.ones(3, np.float32)))])
    source = {"format": "webdataset", "files": f"{tmp_path}/x.tar", "arrays": [{"name": "f"}]}
    index = prepare_import(pipeline(tmp_path / "s.zarr", source)).index
    assert SampleIndex.from_parquet(index.to_parquet(), "x").digest() == index.digest()
