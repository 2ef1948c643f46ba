"""The store: what is written, who else can read it, what is refused, what is found damaged."""

from __future__ import annotations

import os
import pickle
import struct
import textwrap
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import tensorstore
import torch
import xarray
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drl_data import store as store_module
from drl_data.errors import (
    AlignmentError,
    FeatureError,
    InputError,
    SpecError,
    StoreError,
    StoreMismatchError,
    TapError,
)
from drl_data.objects import LocalFolder, ObjectInfo, open_folder
from drl_data.plan import Unit
from drl_data.shards import STORED, ShardLayout, crc32c, non_finite_rows
from drl_data.spec import ArraySpec, ImageSpec
from drl_data.spec_base import ITEMSIZE, StorageDType
from drl_data.store import FeatureStore, UnitCounts

from .stores import (
    ARRAYS,
    RUN,
    TIMES,
    expected,
    fill,
    invalid_row,
    make_array,
    make_index,
    make_spec,
    make_store,
    make_times,
    reference,
    unit_features,
)

DTYPES = st.sampled_from(sorted(STORED))
SHAPES = st.sampled_from([(), (1,), (7,), (96,), (3, 5), (2, 4, 3), (8, 40, 32), (2, 64, 128)])


def equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Same shape, type and bits; NaN equals the same NaN."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


# --- the format: every other reader agrees, byte for byte ----------------------------------------


@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(
    shape=SHAPES,
    dtype=DTYPES,
    n=st.integers(1, 40),
    rows_per_unit=st.sampled_from([1, 2, 3, 4, 6, 8, 16, 24, 64]),
    n_times=st.integers(1, 3),
    data=st.data(),
)
def test_every_other_reader_agrees(
    shape: tuple[int, ...],
    dtype: StorageDType,
    n: int,
    rows_per_unit: int,
    n_times: int,
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    invalid = data.draw(st.lists(st.integers(0, n - 1), max_size=4, unique=True))
    rows = data.draw(st.lists(st.integers(0, n - 1), max_size=12))
    url = str(tmp_path_factory.mktemp("agree") / "store")
    arrays = (make_array("a", shape, dtype), make_array("b.c-d_e", (2, 3), "float16"))
    times = make_times(*range(n_times))
    store = make_store(url, n, rows_per_unit, arrays=arrays, times=times)
    fill(store, invalid)
    with xarray.open_zarr(url) as dataset:
        assert np.array_equal(dataset["timestep"].values, np.arange(n_times))
        assert dataset["timestep"].dtype == np.int64
        assert np.array_equal(dataset["valid"].values, ~np.isin(np.arange(n), invalid))
        in_xarray = {a.name: dataset[a.name].values for a in arrays}
        assert dataset["a"].dims[:2] == ("sample", "timestep")
    group = zarr.open_group(url, mode="r")
    for array in arrays:
        want = expected(store, array.name, invalid)
        by_sample = want.swapaxes(0, 1)
        assert equal(in_xarray[array.name], by_sample)
        assert equal(np.asarray(group[array.name][...]), by_sample)
        spec = {"driver": "zarr3", "kvstore": f"file://{url}/{array.name}"}
        assert equal(tensorstore.open(spec).result().read().result(), by_sample)
        for t in range(n_times):
            units = [store.read_unit(array.name, t, unit) for unit in store.units]
            assert equal(np.concatenate(units), want[t])
            assert equal(store.read_rows(array.name, t, rows), want[t][np.array(rows, int)])
    assert store.verify(deep=True) == []


@pytest.mark.parametrize("invalid", [(), (2, 9)])
def test_written_and_read_on_every_kind_of_folder(
    folder_url: str, invalid: tuple[int, ...]
) -> None:
    make_store(folder_url)
    store = FeatureStore.open(folder_url)
    assert [u.id for u in store.pending()] == [0, 1, 2]
    assert store.read_rows("tokens", 0, []).shape == (0, 3, 5)
    fill(store, invalid)
    assert store.pending() == []
    assert store.verify(deep=True) == []
    rows = np.array([10, 3, 3, 0, 9, 5, 2])
    for array in store.arrays:
        want = expected(store, array.name, invalid)
        for t in range(2):
            units = [store.read_unit(array.name, t, unit) for unit in store.units]
            assert equal(np.concatenate(units), want[t])
            assert equal(store.read_rows(array.name, t, rows), want[t][rows])
    assert np.flatnonzero(~store.valid_rows()).tolist() == list(invalid)
    store.seal()
    assert FeatureStore.open(folder_url).sealed
    assert np.flatnonzero(~store.valid_rows()).tolist() == list(invalid)
    samples = store.samples()
    assert samples["status"].to_pylist() == [
        "invalid" if row in invalid else "ok" for row in range(11)
    ]
    assert samples["key"].to_pylist() == [f"key-{row:05d}" for row in range(11)]
    assert store.verify(deep=True) == []


@pytest.mark.s3
def test_other_readers_open_a_store_on_s3(s3_url: str) -> None:
    store = make_store(f"{s3_url}/features")
    fill(store, [2])
    with xarray.open_zarr(store.url) as dataset:
        got = dataset["mid_block"].values
    assert equal(got, expected(store, "mid_block", [2]).swapaxes(0, 1))
    spec = {
        "driver": "zarr3",
        "kvstore": {
            "driver": "s3",
            "bucket": s3_url.removeprefix("s3://"),
            "endpoint": os.environ["AWS_ENDPOINT_URL"],
            "path": "features/mid_block/",
        },
    }
    assert equal(tensorstore.open(spec).result().read().result(), got)


def crc32c_by_definition(data: bytes) -> int:
    """Bit by bit, from the polynomial 0x1EDC6F41 (reflected)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@settings(deadline=None)
@given(shape=SHAPES, dtype=DTYPES, rows_per_unit=st.integers(1, 300), data=st.data())
def test_shard_layout(
    shape: tuple[int, ...], dtype: StorageDType, rows_per_unit: int, data: st.DataObject
) -> None:
    layout = ShardLayout(rows_per_unit, shape, dtype)
    n_rows = data.draw(st.integers(1, rows_per_unit))
    k, size = layout.rows_per_chunk, layout.row_bytes
    assert rows_per_unit % k == 0
    if size >= 16384:
        assert k == 1
    else:
        divisors = [d for d in range(1, rows_per_unit + 1) if rows_per_unit % d == 0]
        badness = {d: abs(np.log(d * size / 65536)) for d in divisors}
        assert badness[k] <= min(badness.values()) + 1e-9
    footer = layout.footer(n_rows)
    assert len(footer) == layout.footer_bytes
    (crc,) = struct.unpack("<I", footer[-4:])
    assert crc == crc32c_by_definition(footer[:-4])
    for chunk in range(rows_per_unit // k):
        entry = struct.unpack_from("<QQ", footer, 16 * chunk)
        present = chunk * k < n_rows
        missing = 2**64 - 1
        assert entry == ((chunk * k * size, k * size) if present else (missing, missing))


@given(st.lists(st.binary(max_size=40), max_size=5))
def test_crc32c(parts: list[bytes]) -> None:
    assert crc32c([memoryview(p) for p in parts]) == crc32c_by_definition(b"".join(parts))


@given(data=st.data(), dtype=DTYPES)
def test_non_finite_rows(data: st.DataObject, dtype: StorageDType) -> None:
    width = 8 * ITEMSIZE[dtype]
    bits = data.draw(
        st.lists(st.lists(st.integers(0, 2**width - 1), min_size=3, max_size=3), min_size=1)
    )
    raw = np.array(bits, f"<u{width // 8}")
    rows: np.ndarray = raw
    if dtype == "bfloat16":
        finite = np.isfinite((raw.astype(np.uint32) << 16).view(np.float32))
    elif dtype.startswith("float8"):
        values = torch.from_numpy(raw).view(getattr(torch, dtype)).float().numpy()
        finite = np.isfinite(values)
    else:
        rows = raw.view(dtype)
        finite = np.isfinite(rows)
    assert non_finite_rows(rows, dtype).tolist() == np.flatnonzero(~finite.all(axis=1)).tolist()


def test_dimensions_of_one_name_and_two_sizes_are_told_apart(tmp_path: Path) -> None:
    store = make_store(str(tmp_path / "s"))
    with xarray.open_zarr(store.url) as dataset:
        assert dataset["mid_block"].dims == ("sample", "timestep", "channel_4", "height", "width")
        assert dataset["up.1"].dims == ("sample", "timestep", "channel_6")
        assert dataset["tokens"].dims == ("sample", "timestep", "token", "channel_5")
        assert dataset["up.1"].attrs["drl_data"] == {"tap": "net.up.1", "dtype": "bfloat16"}


def test_one_entry_for_all_timesteps(tmp_path: Path) -> None:
    """Means over timesteps, and what has none, are stored once and read at each."""
    arrays = (
        make_array("each", (4,), "float16"),
        make_array("mean", (4,), "float32").model_copy(update={"timesteps": "mean"}),
        make_array("vae", (2, 3, 3), "int8").model_copy(update={"timesteps": "none"}),
    )
    store = make_store(str(tmp_path / "s"), arrays=arrays)
    features = {a.name: reference(a, a.n_times(2), 11) for a in arrays}
    for unit in store.units:
        own = {name: x[:, unit.start : unit.stop] for name, x in features.items()}
        store.write(unit, own, [], RUN)
    assert store.verify(deep=True) == []
    rows = [10, 0, 5]
    for t in (0, 1):
        assert equal(store.read_rows("each", t, rows), features["each"][t][rows])
        assert equal(store.read_rows("mean", t, rows), features["mean"][0][rows])
        assert equal(store.read_unit("vae", t, store.units[0]), features["vae"][0][:4])
    with pytest.raises(TapError, match=r"time index 2; want 0\.\.1"):
        store.read_rows("mean", 2, rows)
    with xarray.open_zarr(store.url) as dataset:
        assert dataset["mean"].dims == ("sample", "timestep_mean", "channel_4")
        assert dataset["vae"].dims[:2] == ("sample", "timeless")
        assert dataset["mean"].attrs["drl_data"]["timesteps"] == "mean"
    assert len(list((tmp_path / "s" / "mean" / "c" / "0").iterdir())) == 1
    wrong = {name: x[:, :4] for name, x in features.items()}
    wrong["mean"] = np.concatenate([wrong["mean"]] * 2)
    other = make_store(str(tmp_path / "other"), arrays=arrays)
    with pytest.raises(FeatureError, match=r"'mean': float32 \(2, 4, 4\), want .* \(1, 4, 4\)"):
        other.write(other.units[0], wrong, [], RUN)


def test_fractional_timesteps_are_float64(tmp_path: Path) -> None:
    store = make_store(str(tmp_path / "s"), times=make_times(0.5, 10))
    with xarray.open_zarr(store.url) as dataset:
        assert dataset["timestep"].values.tolist() == [0.5, 10.0]
    assert store.time_index(0.5) == 0


def test_features_are_written_and_read_without_a_copy(tmp_path: Path) -> None:
    layout = ShardLayout(4, (5,), "float32")
    rows = np.arange(15, dtype="<f4").reshape(3, 5)
    parts = layout.parts(rows, [1])
    mine = [part for part in parts if np.shares_memory(np.frombuffer(part, np.uint8), rows)]
    assert sum(len(part) for part in mine) == 2 * 20
    store = make_store(str(tmp_path / "s"))
    fill(store)
    unit = store.read_unit("mid_block", 0, store.units[0])
    assert not unit.flags.owndata
    assert not unit.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        unit[0] = 0


def test_the_reader_in_the_format_page_reads(tmp_path: Path) -> None:
    page = Path(store_module.__file__).with_name("STORE.md").read_text(encoding="utf-8")
    code = page.partition("## 8. A reader\n")[2].partition("\n(It")[0]
    names: dict[str, Callable[..., np.ndarray]] = {}
    exec(textwrap.dedent(code), names)
    store = make_store(str(tmp_path / "s"))
    for unit in store.units[:2]:
        store.write(unit, unit_features(store, unit), [], RUN)
    for array in store.arrays:
        for t in range(2):
            for unit in store.units[:2]:
                got = names["read_unit"](store.url, array.name, t, unit.id)
                assert equal(got, store.read_unit(array.name, t, unit))
    with pytest.raises(LookupError, match="unit 2 is not done"):
        names["read_unit"](store.url, "tokens", 0, 2)


# --- making and opening --------------------------------------------------------------------------


def test_shapes_first(tmp_path: Path) -> None:
    """Invariant 1: all metadata is there, and readable, before any unit."""
    store = make_store(str(tmp_path / "s"))
    with xarray.open_zarr(store.url) as dataset:
        assert dataset.sizes["sample"] == 11
        assert not dataset["valid"].values.any()
        assert np.isnan(dataset["mid_block"].values).all()
    assert store.index.n_samples == 11
    assert {p.unit for p in store.verify()} == {0, 1, 2}


def test_a_creation_that_was_cut_short_is_completed(tmp_path: Path) -> None:
    whole = make_store(str(tmp_path / "whole"))
    cut = LocalFolder(tmp_path / "cut")
    cut.put("zarr.json", [whole.folder.get("zarr.json")])
    store = make_store(str(tmp_path / "cut"))
    fill(store)
    assert store.verify(deep=True) == []


def test_an_index_that_a_dead_creator_left_torn_is_put_again(tmp_path: Path) -> None:
    whole = make_store(str(tmp_path / "whole"))
    cut = LocalFolder(tmp_path / "cut")
    cut.put("zarr.json", [whole.folder.get("zarr.json")])
    cut.put("index.parquet", [whole.folder.get("index.parquet")[:-9]])
    store = make_store(str(tmp_path / "cut"))
    assert cut.get("index.parquet") == whole.folder.get("index.parquet")
    fill(store)
    assert store.verify(deep=True) == []


def test_an_equal_store_is_opened(tmp_path: Path) -> None:
    url = str(tmp_path / "s")
    fill(make_store(url), [3])
    again = make_store(url)
    assert again.pending() == []
    assert FeatureStore.exists(url)
    assert not FeatureStore.exists(str(tmp_path / "other"))


def test_another_spec_is_refused_leaf_by_leaf(tmp_path: Path) -> None:
    url = str(tmp_path / "s")
    make_store(url)
    other = make_spec(11, 4, images=ImageSpec(size=16), overflow="clip")
    with pytest.raises(StoreMismatchError) as error:
        FeatureStore.create(url, other, ARRAYS, TIMES, make_index(11))
    assert 'overflow: "error" != "clip"' in str(error.value)
    assert "images.size[0]: 8 != 16" in str(error.value)


def test_taps_are_frozen(tmp_path: Path) -> None:
    """Invariant 10: the same spec resolved to other arrays is refused with both lists."""
    url = str(tmp_path / "s")
    make_store(url)
    other = (*ARRAYS[:2], make_array("tokens", (4, 5), "float32"))
    with pytest.raises(TapError) as error:
        make_store(url, arrays=other)
    assert "tokens = net.tokens float32[3, 5]" in str(error.value)
    assert "tokens = net.tokens float32[4, 5]" in str(error.value)
    with pytest.raises(StoreMismatchError, match="other noise levels"):
        make_store(url, times=make_times(10, 201))


def test_racing_creators_make_one_store(folder_url: str) -> None:
    barrier = Barrier(4)

    def create(member: int) -> str:
        barrier.wait()
        spec_arrays = ARRAYS if member % 2 else (*ARRAYS[:2], make_array("t", (2,), "float16"))
        try:
            return make_store(folder_url, arrays=spec_arrays).arrays[2].name
        except TapError:
            return "refused"

    with ThreadPoolExecutor(4) as pool:
        names = list(pool.map(create, range(4)))
    winner = FeatureStore.open(folder_url).arrays[2].name
    assert sorted(names) == sorted([winner, winner, "refused", "refused"])
    store = FeatureStore.open(folder_url)
    fill(store)
    assert store.verify(deep=True) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no store here"),
        (b"{", "not a drl_data store"),
        (b'{"attributes": {}}', "not a drl_data store"),
        (b'{"attributes": {"drl_data": {"format": 99}}}', "store format 99; this drl_data reads"),
    ],
)
def test_what_is_no_store_is_not_opened(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    if content is not None:
        LocalFolder(tmp_path).put("zarr.json", [content])
    with pytest.raises((StoreError, InputError), match=message):
        FeatureStore.open(str(tmp_path))


def test_an_edited_spec_is_noticed(tmp_path: Path) -> None:
    store = make_store(str(tmp_path))
    root = bytes(store.folder.get("zarr.json"))
    store.folder.put("zarr.json", [root.replace(b'"n_samples":11', b'"n_samples":12')])
    with pytest.raises(StoreError, match="it was edited"):
        FeatureStore.open(str(tmp_path))


def test_the_index_must_fit_the_spec(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="the index has 10 samples and 2 timesteps; want 11"):
        FeatureStore.create(str(tmp_path), make_spec(11, 4), ARRAYS, TIMES, make_index(10))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ((), "no arrays"),
        ((make_array("a/b", (2,), "float16"),), "'a/b': the name may hold"),
        ((make_array("..", (2,), "float16"),), "the name may hold"),
        ((make_array("", (2,), "float16"),), "the name may hold"),
        ((make_array("__a", (2,), "float16"),), "reserved"),
        ((make_array("valid", (2,), "float16"),), "reserved"),
        ((make_array("a", (2,), "float16"),) * 2, "named twice"),
        ((make_array("channel", (2,), "float16"),), "both an array and a dimension"),
        ((make_array("a", (2, 0), "float16"),), "one positive size"),
        ((ArraySpec(name="a", tap="a", dims=("c",), shape=(2, 3), dtype="float16"),), "one pos"),
        (
            (ArraySpec(name="a", tap="a", dims=("x", "x"), shape=(2, 3), dtype="float16"),),
            "distinct",
        ),
    ],
)
def test_arrays_that_zarr_or_xarray_cannot_hold(
    tmp_path: Path, arrays: tuple[ArraySpec, ...], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        make_store(str(tmp_path / "s"), arrays=arrays)
    assert not (tmp_path / "s").exists()


def test_a_handle_pickles_by_url(tmp_path: Path) -> None:
    store = make_store(str(tmp_path))
    fill(store)
    again = pickle.loads(pickle.dumps(store))
    assert equal(again.read_rows("tokens", 1, [7]), store.read_rows("tokens", 1, [7]))
    assert len(pickle.dumps(store)) < 300


# --- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "unit", [Unit(0, 0, 3), Unit(0, 1, 5), Unit(1, 0, 4), Unit(2, 8, 12), Unit(3, 12, 16)]
)
def test_one_writer_per_object(tmp_path: Path, unit: Unit) -> None:
    """Invariant 2: what is not one whole unit is refused."""
    store = make_store(str(tmp_path))
    with pytest.raises(AlignmentError, match="are not one whole unit of 4 rows; two writers"):
        store.write(unit, {}, [], RUN)


def broken(kind: str, features: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Features of unit 1 with one thing wrong in the last array."""
    if kind == "missing":
        del features["tokens"]
    elif kind == "unknown":
        features["extra"] = features["tokens"]
    elif kind == "short":
        features["tokens"] = features["tokens"][:, :3]
    elif kind == "float64":
        features["tokens"] = features["tokens"].astype(np.float64)
    elif kind == "bfloat16":
        features["up.1"][1, 2, 3] = 0x7F80
    else:
        features["tokens"][1, 2, 0, 4] = np.nan if kind == "nan" else -np.inf
    return features


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"unit 1: arrays missing \['tokens'\], unknown \[\]; want exactly"),
        ("unknown", r"unit 1: arrays missing \[\], unknown \['extra'\]"),
        ("short", r"tap 'tokens': float32 \(2, 3, 3, 5\), want float32 \(2, 4, 3, 5\)"),
        ("float64", r"tap 'tokens': float64 \(2, 4, 3, 5\), want float32"),
        ("nan", r"tap 'tokens', timestep 200: 1 rows are not finite, the first is row 6 \(key 'k"),
        ("inf", r"not finite, the first is row 6 \(key 'key-00006'\)"),
        ("bfloat16", r"tap 'up.1', timestep 200: 1 rows are not finite, the first is row 6"),
    ],
)
def test_check_all_write_then_sign(tmp_path: Path, kind: str, message: str) -> None:
    """Invariant 3: one bad tap, and no byte of any tap is written."""
    store = make_store(str(tmp_path))
    before = {info.path for info in store.folder.list()}
    unit = store.units[1]
    features = {name: values.copy() for name, values in unit_features(store, unit).items()}
    with pytest.raises(FeatureError, match=message):
        store.write(unit, broken(kind, features), [], RUN)
    assert {info.path for info in store.folder.list()} == before


def test_not_finite_is_allowed_where_a_row_is_invalid(tmp_path: Path) -> None:
    store = make_store(str(tmp_path))
    unit = store.units[1]
    features = {name: values.copy() for name, values in unit_features(store, unit).items()}
    features["tokens"][:, 2] = np.inf
    store.write(unit, features, [invalid_row(6)], RUN)
    assert np.isnan(store.read_unit("tokens", 0, unit)[2]).all()
    assert np.isinf(features["tokens"][:, 2]).all()


@pytest.mark.parametrize("rows", [(3,), (8,), (5, 5)])
def test_invalid_rows_belong_to_the_unit(tmp_path: Path, rows: tuple[int, ...]) -> None:
    store = make_store(str(tmp_path))
    features = unit_features(store, store.units[1])
    with pytest.raises(FeatureError, match=r"want distinct rows of 4\.\.8"):
        store.write(store.units[1], features, [invalid_row(row) for row in rows], RUN)


def test_nothing_is_dropped(tmp_path: Path) -> None:
    """Invariant 6: every row is ok, invalid with stage and reason, or pending."""
    store = make_store(str(tmp_path))
    for unit in store.units[1:]:
        bad = [invalid_row(row) for row in (9, 8) if unit.id == 2]
        receipt = store.write(unit, unit_features(store, unit), bad, RUN, UnitCounts(input_bytes=9))
        assert receipt.n_ok + receipt.n_invalid == unit.n_rows
    samples = store.samples()
    status = ["pending"] * 4 + ["ok"] * 4 + ["invalid"] * 2 + ["ok"]
    assert samples["status"].to_pylist() == status
    assert samples["stage"].to_pylist() == ["decode" if s == "invalid" else None for s in status]
    assert samples["reason"][8].as_py() == "truncated file"
    assert samples["tar"][0].as_py() == "/tars/all.tar"
    assert samples["row"].to_pylist() == list(range(11))
    assert store.valid_rows().tolist() == [s == "ok" for s in status]
    with pytest.raises(StoreError, match="1 of 3 units have no receipt, the first is unit 0"):
        store.seal()


def test_the_write_is_timed_and_the_content_is_not(tmp_path: Path) -> None:
    store = make_store(str(tmp_path))
    unit = store.units[0]
    receipt = store.write(unit, unit_features(store, unit), [], RUN)
    assert receipt.run.seconds["denoise"] == 1.5
    assert receipt.run.seconds["write"] > 0
    assert "run" not in receipt.content()
    assert store.receipt(unit) == receipt


def test_sixteen_writers_of_one_unit_sign_it_once(folder_url: str) -> None:
    make_store(folder_url)
    barrier = Barrier(16)

    def write(member: int) -> str:
        store = FeatureStore.open(folder_url)
        unit = store.units[1]
        features = unit_features(store, unit)
        run = RUN.model_copy(update={"host": f"host-{member}"})
        barrier.wait()
        return store.write(unit, features, [], run).run.host

    with ThreadPoolExecutor(16) as pool:
        hosts = set(pool.map(write, range(16)))
    store = FeatureStore.open(folder_url)
    receipt = store.receipt(store.units[1])
    assert receipt is not None
    assert hosts == {receipt.run.host}
    assert [p.unit for p in store.verify(deep=True)] == [0, 2]


# --- reading -------------------------------------------------------------------------------------


def test_what_cannot_be_read_says_why(tmp_path: Path) -> None:
    store = make_store(str(tmp_path))
    unit = store.units[0]
    with pytest.raises(TapError, match=r"no array 'mid'; it has mid_block, up\.1, tokens"):
        store.read_unit("mid", 0, unit)
    with pytest.raises(TapError, match=r"time index 2; want 0\.\.1"):
        store.read_rows("tokens", 2, [0])
    with pytest.raises(TapError, match=r"no timestep 11; it has \[10, 200\]"):
        store.time_index(11)
    with pytest.raises(AlignmentError):
        store.read_unit("tokens", 0, Unit(0, 0, 3))
    for rows in ([-1], [11], [0, 11]):
        with pytest.raises(StoreError, match=r"want rows of 0\.\.10"):
            store.read_rows("tokens", 0, rows)


def test_reading_a_pending_unit_says_so(folder_url: str) -> None:
    store = make_store(folder_url)
    want = r"unit 1 \(rows 4\.\.8\): tokens/c/1/0/0/0 is not written; run `drl extract`"
    with pytest.raises(StoreError, match=want):
        store.read_unit("tokens", 0, store.units[1])
    with pytest.raises(StoreError, match=want):
        store.read_rows("tokens", 0, [5])


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_an_array_that_another_tool_rewrote_is_still_read(tmp_path: Path, kind: str) -> None:
    url = str(tmp_path / "s") if kind == "local" else f"memory://{uuid.uuid4().hex}"
    store = make_store(url)
    fill(store, [9])
    want = expected(store, "mid_block", [9])
    for path in [info.path for info in store.folder.list("mid_block")]:
        store.folder.delete(path)
    other = str(tmp_path / "rewritten")
    array = zarr.create_array(
        other,
        shape=(11, 2, 4, 2, 2),
        shards=(4, 1, 4, 2, 2),
        chunks=(2, 1, 4, 2, 2),
        dtype="float16",
        fill_value=np.nan,
        compressors=zarr.codecs.ZstdCodec(),
    )
    array[...] = want.swapaxes(0, 1)
    rewritten = LocalFolder(tmp_path / "rewritten")
    for info in rewritten.list():
        store.folder.put(f"mid_block/{info.path}", [rewritten.get(info.path)])
    rows = np.array([10, 0, 9, 9, 3])
    for t in range(2):
        units = [store.read_unit("mid_block", t, unit) for unit in store.units]
        assert equal(np.concatenate(units), want[t])
        assert equal(store.read_rows("mid_block", t, rows), want[t][rows])


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_a_damaged_shard_is_an_error(tmp_path: Path, kind: str) -> None:
    url = str(tmp_path / "s") if kind == "local" else f"memory://{uuid.uuid4().hex}"
    store = make_store(url)
    fill(store)
    path = "tokens/c/1/0/0/0"
    shard = bytearray(store.folder.get(path))
    shard[-1] ^= 1
    for damaged in (bytes(shard), bytes(shard[:-7]), b""):
        store.folder.put(path, [damaged])
        again = FeatureStore.open(url)
        with pytest.raises(StoreError, match=r"tokens/c/1/0/0/0: damaged shard"):
            again.read_unit("tokens", 0, again.units[1])
        with pytest.raises(StoreError, match=r"tokens/c/1/0/0/0: damaged shard"):
            again.read_rows("tokens", 0, [4])


class Counting(LocalFolder):
    """A local folder that hides that it is local, and counts what is read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.ranges: list[tuple[str, int, int]] = []

    def get_range(self, path: str, start: int, stop: int) -> memoryview:
        self.ranges.append((path, start, stop))
        return super().get_range(path, start, stop)

    def local_path(self, path: str) -> Path | None:
        return None


def test_close_rows_are_read_in_one_request(tmp_path: Path) -> None:
    shape = (32, 32, 32)  # 128 KiB a row: gaps of up to 2 rows are read through
    arrays = (make_array("a", shape, "float32"),)
    store = make_store(str(tmp_path), 20, 16, arrays=arrays, times=make_times(1))
    fill(store)
    folder = Counting(tmp_path)
    remote = FeatureStore(folder, store.described)
    want = expected(store, "a")[0]
    row = 4 * 32**3
    for rows, n_ranges in [([3, 0, 6, 3], 1), ([0, 4], 2), ([15, 16], 2), ([19, 0, 1], 2)]:
        remote.read_rows("a", 0, rows)  # learns the footers
        folder.ranges.clear()
        assert equal(remote.read_rows("a", 0, rows), want[rows])
        assert len(folder.ranges) == n_ranges
    assert sorted(folder.ranges) == [
        ("a/c/0/0/0/0/0", 0, 2 * row),
        ("a/c/1/0/0/0/0", 3 * row, 4 * row),
    ]


def test_the_seal_names_the_content_however_it_was_computed(tmp_path: Path) -> None:
    seals = []
    for name, order, host in (("a", 1, "x"), ("b", -1, "y")):
        store = make_store(str(tmp_path / name))
        for unit in store.units[::order]:
            run = RUN.model_copy(update={"host": host, "attempt": 3})
            store.write(unit, unit_features(store, unit), [], run)
        store.seal()
        seals.append(bytes(store.folder.get("sealed.json")))
    assert seals[0] == seals[1]
    other = make_store(str(tmp_path / "c"))
    fill(other, seed=1)
    other.seal()
    assert bytes(other.folder.get("sealed.json")) != seals[0]


def test_listing_names_are_relative(folder_url: str) -> None:
    folder = open_folder(folder_url)
    folder.put("receipts/00000000.json", [b"{}"])
    assert [info.path for info in folder.list("receipts")] == ["receipts/00000000.json"]
    assert isinstance(folder.head("receipts/00000000.json"), ObjectInfo)


def test_public_names() -> None:
    assert all(name in vars(store_module) for name in store_module.__all__)
