"""Repair: after any damage, and killed at any point, the store is that of an undisturbed run."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from drl_data.cli import app
from drl_data.errors import (
    ConflictError,
    InputError,
    ObjectError,
    StoreError,
    StoreMismatchError,
    TapError,
)
from drl_data.objects import Buffer, LocalFolder
from drl_data.pipeline import Pipeline
from drl_data.receipts import fit_path, receipt_path
from drl_data.repair import (
    Repair,
    remove_damaged,
    remove_stale,
    require_fits,
    restore_root,
    sound_index,
)
from drl_data.runs import extract
from drl_data.shards import crc32c
from drl_data.spec_base import canonical_json
from drl_data.store import FeatureStore, UnitCounts, problems_at
from drl_data.store_metadata import Described
from drl_data.testing import write_photo_tars
from drl_data.tiny_models import save_tiny_ddpm

from .stores import (
    EVERY_DTYPE,
    RUN,
    computed_features,
    invalid_row,
    make_array,
    make_index,
    make_store,
    make_times,
    quantised,
)

FIT = b"a fit, as far as a store is concerned"
N = 11
N_SMALL = 7


def fit(store: FeatureStore, made: bytes = FIT) -> int:
    """Make the fit unless it is there; its checksum."""
    store.folder.put_if_absent(fit_path("full"), [made])
    return crc32c([store.folder.get(fit_path("full"))])


def compute(store: FeatureStore, made: bytes = FIT) -> list[int]:
    """Compute what is pending, as extraction would; the units."""
    pending = store.pending()
    for unit in pending:
        bad = [invalid_row(5)] if unit.id == 1 else []
        counts = UnitCounts(fits={"full": fit(store, made)})
        store.write(unit, computed_features(store, unit), bad, RUN, counts)
    return [unit.id for unit in pending]


def repair(
    root: Path, described: Described, made: bytes = FIT, folder: LocalFolder | None = None
) -> tuple[Repair, list[int]]:
    """What `extract(repair=True)` does to a store, without a model; and the units computed."""
    url, index = str(root), make_index(described.spec.n_samples)
    done = restore_root(url, described)
    store = FeatureStore.create(url, *described, index)
    mine = FeatureStore(folder or store.folder, described, index)
    done = done.merged(remove_damaged(mine, index, mine.units))
    computed = compute(mine, made)
    if done.fits:
        done = done.merged(remove_stale(mine, mine.units))
        computed += compute(mine, made)
    if not mine.sealed:
        mine.seal()
    return done, computed


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    store = make_store(str(tmp_path_factory.mktemp("whole") / "s"), N, arrays=EVERY_DTYPE)
    compute(store)
    store.seal()
    assert store.verify(deep=True) == []
    return store


@pytest.fixture
def damaged(undisturbed: FeatureStore, tmp_path: Path) -> FeatureStore:
    """A copy, to be damaged."""
    shutil.copytree(undisturbed.url, tmp_path / "s")
    return FeatureStore(LocalFolder(tmp_path / "s"), undisturbed.described)


def contents(folder: Path) -> dict[str, bytes]:
    """Every object; of receipts what is content, not how it came about."""
    found = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    for path, data in found.items():
        if path.startswith("receipts/"):
            value = json.loads(data)
            del value["run"], value["crc32c"]
            found[path] = canonical_json(value)
    return found


def assert_same(root: Path, undisturbed: FeatureStore) -> None:
    assert problems_at(str(root), deep=True) == []
    assert contents(root) == contents(Path(undisturbed.url))


def flip(store: FeatureStore, path: str) -> None:
    data = bytearray(store.folder.get(path))
    data[len(data) // 2] ^= 2
    store.folder.put(path, [data])


CHANGES: dict[str, Callable[[FeatureStore, str], object]] = {
    "flip": flip,
    "delete": lambda store, path: store.folder.delete(path),
    "cut": lambda store, path: store.folder.put(path, [store.folder.get(path)[:-1]]),
}

R1 = "receipts/00000001.json"
CASES = [
    ("zarr.json", []),
    ("spec.json", []),
    ("full/zarr.json", []),
    ("timestep/c/0", []),
    ("valid/zarr.json", []),
    ("index.parquet", []),
    ("index.json", []),
    ("samples.parquet", []),
    ("sealed.json", []),
    (R1, [1]),
    ("valid/c/1", [1]),
    ("full/c/1/0/0/0", [1]),
    ("signed/c/2/1/0/0/0", [2]),
    ("signed__scale/c/2/1/0", [2]),
    ("fits/full.safetensors", [0]),
]


@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize(("path", "units"), CASES)
def test_damage_is_repaired_and_only_damaged_units_are_computed(
    damaged: FeatureStore, undisturbed: FeatureStore, path: str, units: list[int], change: str
) -> None:
    CHANGES[change](damaged, path)
    root = Path(damaged.url)
    if (path, change) != ("sealed.json", "delete"):
        assert problems_at(str(root), deep=True)
    done, computed = repair(root, undisturbed.described)
    assert computed == units == list(done.units)
    assert_same(root, undisturbed)
    assert repair(root, undisturbed.described) == (Repair(), [])


def test_scales_go_with_their_integers_and_the_rest_stays(
    damaged: FeatureStore, undisturbed: FeatureStore
) -> None:
    flip(damaged, "unsigned__offset/c/2/1/0")
    done, _ = repair(Path(damaged.url), undisturbed.described)
    assert set(done.removed) == {
        "unsigned/c/2/1/0/0",
        "unsigned__scale/c/2/1/0",
        "unsigned__offset/c/2/1/0",
        "receipts/00000002.json",
    }
    assert done.unsealed
    receipt = damaged.receipt(damaged.units[2])
    assert receipt is not None
    assert receipt.run.adopted == ()


def test_a_repair_of_some_units_leaves_the_others(damaged: FeatureStore) -> None:
    flip(damaged, "full/c/0/0/0/0")
    flip(damaged, "full/c/2/0/0/0")
    done = remove_damaged(damaged, make_index(N), damaged.units[:1])
    assert done.units == (0,)
    assert [p.unit for p in damaged.verify(deep=True)] == [0, 2]


def test_what_an_unfinished_attempt_left_is_removed(tmp_path: Path) -> None:
    """The remedy of a conflict: leftovers of other content."""
    store = make_store(str(tmp_path), N)
    unit = store.units[0]
    store.folder.put_if_absent(
        "tokens/c/0/0/0/0",
        store.layouts["tokens"].parts(computed_features(store, unit, 1, noise=1)["tokens"][0], []),
    )
    with pytest.raises(ConflictError, match="`drl extract --repair` removes"):
        store.write(unit, computed_features(store, unit), [], RUN)
    done = remove_damaged(store, make_index(N), store.units)
    assert done.units == (0,)
    store.write(unit, computed_features(store, unit), [], RUN)
    assert [p.unit for p in store.verify(deep=True)] == [1, 2]


def test_what_a_careless_server_let_happen_is_repaired(
    damaged: FeatureStore, undisturbed: FeatureStore
) -> None:
    """A zombie's object, whole and of other last bits, over a signed one."""
    unit = damaged.units[0]
    other = computed_features(damaged, unit, attempt=1)["full"][0]
    damaged.folder.put("full/c/0/0/0/0", damaged.layouts["full"].parts(other, []))
    assert [p.unit for p in damaged.verify(deep=True)] == [0]
    _, computed = repair(Path(damaged.url), undisturbed.described)
    assert computed == [0]
    assert_same(Path(damaged.url), undisturbed)


# --- fits ----------------------------------------------------------------------------------------


def test_a_fit_that_comes_out_otherwise_is_everywhere(
    damaged: FeatureStore, undisturbed: FeatureStore
) -> None:
    """On a GPU a fit may differ in its last bits: whoever names the old one is computed again."""
    flip(damaged, fit_path("full"))
    done, computed = repair(Path(damaged.url), undisturbed.described, made=b"another fit")
    assert computed == [0, 1, 2]
    assert done.fits == ("full",)
    assert damaged.verify(deep=True) == []
    assert {r.counts.fits["full"] for r in damaged.receipts().values()} == {
        crc32c([b"another fit"])
    }


def test_a_new_fit_that_some_units_name_stands(
    damaged: FeatureStore, undisturbed: FeatureStore
) -> None:
    """A repair that was killed after the first unit with the new fit goes on with it."""
    damaged.folder.delete(fit_path("full"))
    unit = damaged.units[0]
    for path in [receipt_path(unit), *(p for _, _, p in damaged.shards(unit))]:
        damaged.folder.delete(path)
    compute(damaged, made=b"another fit")
    done, computed = repair(Path(damaged.url), undisturbed.described)
    assert done.fits == ()
    assert computed == [1, 2]
    assert damaged.verify(deep=True) == []


@pytest.mark.parametrize(("change", "state"), [("flip", "not the one"), ("delete", "missing")])
def test_nothing_is_computed_with_another_fit(
    damaged: FeatureStore, change: str, state: str
) -> None:
    require_fits(damaged)
    CHANGES[change](damaged, fit_path("full"))
    with pytest.raises(StoreError, match=rf"full.safetensors: {state}, though unit 0 was"):
        require_fits(damaged)
    damaged.folder.delete("sealed.json")
    with pytest.raises(StoreError, match="not sealed"):
        FeatureStore(damaged.folder, damaged.described).seal()


# --- killed at any point -------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends."""


class Killing(LocalFolder):
    """A folder whose process is killed at the n-th change."""

    def __init__(self, root: Path, n_left: int) -> None:
        super().__init__(root)
        self._n_left = n_left
        self._lock = threading.Lock()

    def _count(self) -> None:
        with self._lock:
            self._n_left -= 1
            if self._n_left < 0:
                raise Killed

    def put(self, path: str, parts: Sequence[Buffer]) -> None:
        self._count()
        super().put(path, parts)

    def put_if_absent(self, path: str, parts: Sequence[Buffer]) -> bool:
        self._count()
        return super().put_if_absent(path, parts)

    def delete(self, path: str) -> None:
        self._count()
        super().delete(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Two units of few objects."""
    arrays = (make_array("full", (5,), "float32"), *quantised("signed", (3, 2), "int8"))
    url = str(tmp_path_factory.mktemp("small") / "s")
    store = make_store(url, N_SMALL, arrays=arrays, times=make_times(10))
    compute(store)
    store.seal()
    return store


def damages() -> Iterator[tuple[str, ...]]:
    yield ("full/c/1/0/0", "signed__scale/c/0/0/0")
    yield (R1, "index.parquet", "valid/c/0")
    yield (fit_path("full"), "spec.json")
    yield ("samples.parquet", "index.json")


@pytest.mark.parametrize("paths", list(damages()))
def test_a_repair_that_is_killed_and_run_again_ends_in_the_same_store(
    small: FeatureStore, tmp_path: Path, paths: tuple[str, ...]
) -> None:
    for n_before in range(1000):
        root = tmp_path / str(n_before)
        shutil.copytree(small.url, root)
        store = FeatureStore(LocalFolder(root), small.described)
        for path in paths:
            flip(store, path)
        try:
            repair(root, small.described, folder=Killing(root, n_before))
            break
        except Killed:
            # Nothing damaged passes for good: what is missing is pending or found.
            assert problems_at(str(root), deep=True) or not (root / "sealed.json").exists()
        repair(root, small.described)
        assert_same(root, small)
        shutil.rmtree(root)
    assert n_before > 3
    assert_same(root, small)


def test_extraction_after_a_killed_repair_does_not_take_damage_for_good(
    small: FeatureStore, tmp_path: Path
) -> None:
    """Also without `--repair`: it ends in the same store, or damage is still found."""
    for n_before in range(1000):
        root = tmp_path / str(n_before)
        shutil.copytree(small.url, root)
        store = FeatureStore(LocalFolder(root), small.described, make_index(N_SMALL))
        path = root / "full/c/1/0/0"
        data = bytearray(path.read_bytes())
        data[0] ^= 1  # the last bit of a float32: well within the tolerance
        path.write_bytes(data)
        try:
            repair(root, small.described, folder=Killing(root, n_before))
            break
        except Killed:
            pass
        if not store.sealed:
            compute(store)
            with contextlib.suppress(StoreError):  # told to repair
                store.seal()
        if not problems_at(str(root), deep=True):
            assert_same(root, small)
    assert n_before > 3


# --- the root ------------------------------------------------------------------------------------


def test_a_root_is_restored_only_where_receipts_vouch_for_it(
    damaged: FeatureStore, undisturbed: FeatureStore, tmp_path: Path
) -> None:
    described, url = undisturbed.described, damaged.url
    damaged.folder.put("zarr.json", [b"{}"])
    other = described.spec.model_copy(update={"weights": "x" * 64})
    with pytest.raises(StoreMismatchError, match="receipts are of fingerprint"):
        restore_root(url, described._replace(spec=other))
    with pytest.raises(TapError, match="unit 0 has other objects than the pipeline's taps"):
        restore_root(url, described._replace(arrays=described.arrays[1:]))
    for info in list(damaged.folder.list("receipts")):
        damaged.folder.delete(info.path)
    with pytest.raises(StoreMismatchError, match=r"no receipt and no spec\.json says"):
        restore_root(url, described._replace(spec=other))
    assert restore_root(url, described).rewritten == ("zarr.json",)
    assert restore_root(url, described) == Repair()
    assert restore_root(str(tmp_path / "nothing"), described) == Repair()


def test_what_the_root_does_not_say_is_compared_too(damaged: FeatureStore) -> None:
    assert sound_index(damaged) is not None
    flip(damaged, "index.parquet")
    assert sound_index(damaged) is None
    fewer = damaged.described._replace(times=make_times(10))
    damaged.folder.delete("zarr.json")
    with pytest.raises(TapError):
        restore_root(damaged.url, fewer)


# --- from end to end -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("repair")
    write_photo_tars(folder / "photos", n_samples=10)
    model = save_tiny_ddpm(folder / "ddpm")
    return Pipeline.parse(
        {
            "name": "repair",
            "dataset": {"tars": str(folder / "photos" / "*.tar")},
            "images": {"size": 16},
            "backbone": {"model": str(model)},
            "schedule": {"timesteps": [0, 300]},
            "taps": ["mid_block", {"path": "up_blocks.0", "reduce": "pca(2, 8)"}],
            "features": {"dtype": "float32", "batch_size": 4, "rows_per_unit": 4},
            "store": {"url": str(folder / "whole.zarr")},
        }
    )


def at(pipeline: Pipeline, url: Path) -> Pipeline:
    assert pipeline.store is not None
    return pipeline.model_copy(
        update={"store": pipeline.store.model_copy(update={"url": str(url)})}
    )


@pytest.fixture(scope="module")
def extracted(pipeline: Pipeline) -> FeatureStore:
    return extract(pipeline).store


@pytest.mark.parametrize(
    ("paths", "units"),
    [
        (["zarr.json", "index.parquet"], ()),
        (["mid_block/c/1/1/0/0/0", "valid/c/2"], (1, 2)),
        (["fits/up_blocks.0.safetensors"], (0,)),
        (["receipts/00000000.json", "fits/up_blocks.0.safetensors"], (0,)),
    ],
)
def test_extract_repairs(
    pipeline: Pipeline,
    extracted: FeatureStore,
    tmp_path: Path,
    paths: list[str],
    units: tuple[int, ...],
) -> None:
    root = tmp_path / "s.zarr"
    shutil.copytree(extracted.url, root)
    store = FeatureStore(LocalFolder(root), extracted.described)
    for path in paths:
        flip(store, path)
    found = {problem.object for problem in problems_at(str(root), deep=True)}
    assert found == ({"zarr.json"} if "zarr.json" in paths else set(paths))
    summary = extract(at(pipeline, root), repair=True)
    assert summary.repaired.units == units
    assert summary.n_pending == len(units)
    assert_same(root, extracted)
    again = extract(at(pipeline, root), repair=True)
    assert (again.repaired, again.n_pending) == (Repair(), 0)


def test_the_command_line_says_what_is_damaged_and_what_was_done(
    pipeline: Pipeline, extracted: FeatureStore, tmp_path: Path
) -> None:
    root = tmp_path / "s.zarr"
    shutil.copytree(extracted.url, root)
    store = FeatureStore(LocalFolder(root), extracted.described)
    flip(store, "mid_block/c/1/1/0/0/0")
    flip(store, "spec.json")
    (root / "notes.txt").write_text("mine")
    runner = CliRunner()
    shown = runner.invoke(app, ["verify", str(root), "--deep"])
    assert shown.exit_code == 1
    assert "unit 1, mid_block/c/1/1/0/0/0: CRC-32C" in shown.output
    assert "2 problems; units 1" in shown.output
    assert "note: 1 objects that are not the store's, such as notes.txt" in shown.output
    file = tmp_path / "p.yaml"
    file.write_text(at(pipeline, root).model_dump_json(exclude_unset=True), encoding="utf-8")
    done = runner.invoke(app, ["extract", str(file), "--repair"])
    assert done.exit_code == 0, done.output
    assert "repaired: spec.json written again" in done.output
    assert "repaired: 2 objects removed, units 1 computed again" in done.output
    assert runner.invoke(app, ["verify", str(root), "--deep"]).exit_code == 0
    (root / "zarr.json").write_text("{}")
    assert "--repair" in runner.invoke(app, ["verify", str(root)]).output


def test_tars_that_changed_keep_a_repair_from_removing_anything(
    pipeline: Pipeline, extracted: FeatureStore, tmp_path: Path
) -> None:
    root = tmp_path / "s.zarr"
    shutil.copytree(extracted.url, root)
    flip(FeatureStore(LocalFolder(root), extracted.described), "mid_block/c/1/1/0/0/0")
    before = contents(root)
    write_photo_tars(tmp_path / "others", n_samples=9)
    other = pipeline.dataset.model_copy(update={"tars": {"all": (f"{tmp_path}/others/*.tar",)}})
    with pytest.raises(StoreMismatchError):
        extract(at(pipeline.model_copy(update={"dataset": other}), root), repair=True)
    gone = pipeline.dataset.model_copy(update={"tars": {"all": (f"{tmp_path}/gone/*.tar",)}})
    with pytest.raises((InputError, ObjectError)):
        extract(at(pipeline.model_copy(update={"dataset": gone}), root), repair=True)
    assert contents(root) == before
