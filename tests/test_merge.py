"""`drl merge`: the store of a direct extraction, from stores of its samples, taps or timesteps."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from typer.testing import CliRunner

from drl_data.cli import app
from drl_data.errors import InputError, SpecError, StoreMismatchError, UserError
from drl_data.index import build_index, joined_index
from drl_data.merge import merge
from drl_data.pipeline import Pipeline
from drl_data.runs import extract
from drl_data.spec import DatasetSpec
from drl_data.store import FeatureStore
from drl_data.tiny_models import save_tiny_ddpm
from tests.part_stores import MID, UP, Changes, direct_stores, pipelines_of
from tests.test_extract import assert_same_store


def image(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Four tars of six, six, five and three samples; one of each of the first two is no image."""
    folder = tmp_path_factory.mktemp("tars")
    names = []
    row = 0
    for number, n in enumerate((6, 6, 5, 3)):
        names.append(str(folder / f"x-{number}.tar"))
        with webdataset.TarWriter(names[-1], mtime=0) as writer:
            for i in range(n):
                data = b"not an image" if i == 4 and number < 2 else image(row)
                label = ("cat", "dog", "ant")[row % 3 if number > 1 else row % 2]
                writer.write({"__key__": f"k{row:03d}", "jpg": data, "cls": label})
                row += 1
    return names


@pytest.fixture(scope="module")
def pipeline(tars: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pipeline]:
    return pipelines_of(
        tars,
        save_tiny_ddpm(tmp_path_factory.mktemp("ddpm")),
        tmp_path_factory.mktemp("stores"),
        {"dtype": "float16", "batch_size": 2, "rows_per_unit": 4},
    )


@pytest.fixture(scope="module")
def extracted(pipeline: Callable[..., Pipeline]) -> Callable[..., FeatureStore]:
    return direct_stores(pipeline)


CASES: dict[str, tuple[list[Changes], Changes]] = {
    "taps": ([{"taps": [MID]}, {"taps": [UP]}], {}),
    "overlapping taps": ([{"taps": [MID, "conv_in"]}, {}], {"taps": [MID, "conv_in", UP]}),
    "timesteps": (
        [{"schedule": {"timesteps": [300]}}, {"schedule": {"timesteps": [0, 700]}}],
        {"schedule": {"timesteps": [300, 0, 700]}},
    ),
    "timesteps, told one time": (
        [{"schedule": {"timesteps": [t], "condition_at": 500}} for t in (300, 0)],
        {"schedule": {"timesteps": [300, 0], "condition_at": 500}},
    ),
    "timesteps, told other times": (
        [{"schedule": {"timesteps": [t], "condition_at": t + 5}} for t in (300, 0)],
        {"schedule": {"timesteps": [300, 0], "condition_at": [305, 5]}},
    ),
    "four corners": (
        [
            {"taps": [tap], "schedule": {"timesteps": [t]}}
            for t in (300, 0)
            for tap in (UP, MID)
        ],
        {"taps": [UP, MID], "schedule": {"timesteps": [300, 0]}},
    ),
    "rows": ([{"numbers": "02"}, {"numbers": "31"}], {"numbers": "0231"}),
    "rows of three stores": (
        [{"numbers": number} for number in "320"],
        {"numbers": "320"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_merged_store_is_that_of_a_direct_extraction(
    case: str, extracted: Callable[..., FeatureStore], tmp_path: Path
) -> None:
    parts, whole = CASES[case]
    direct = extracted(**whole)
    summary = merge([extracted(**part).url for part in parts], str(tmp_path / "merged"))
    assert not summary.failed
    assert_same_store(summary.store, direct)
    assert not summary.store.verify(deep=True)
    if "rows" not in case:
        linked = sum(old.linked for old in summary.reused.values())
        shards = {path for unit in direct.units for _, _, path in direct.shards(unit)}
        assert linked == len(shards)
        for path in shards:
            assert os.stat(Path(summary.store.url, path)).st_nlink > 1


def test_splits_and_labels_of_joined_indices_are_those_of_the_joined_tars(
    tars: list[str],
) -> None:
    a, b = (
        build_index(DatasetSpec(tars={"train": (tars[i],), name: (tars[j],)}))
        for i, j, name in ((0, 1, "test"), (3, 2, "more"))
    )
    both = joined_index([a, b])
    direct = build_index(
        DatasetSpec(tars={"train": (tars[0], tars[3]), "test": (tars[1],), "more": (tars[2],)})
    )
    assert a.label_names != direct.label_names
    assert both.digest() == direct.digest()
    assert both.tars == direct.tars
    assert both.table == direct.table
    assert both.dataset == direct.dataset
    with pytest.raises(InputError, match=r"x-0\.tar: in several of the indices"):
        joined_index([a, build_index(DatasetSpec(tars=tars[0]))])


def test_a_merge_resumes(
    extracted: Callable[..., FeatureStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = [extracted(**part).url for part in CASES["rows"][0]]
    out = str(tmp_path / "merged")
    merge(urls, out)
    store = FeatureStore.open(out)
    for unit in store.units[1:3]:
        for path in (f"receipts/{unit.id:08d}.json", f"valid/c/{unit.id}"):
            store.folder.delete(path)
    store.folder.delete("sealed.json")
    assert merge(urls, out).n_pending == 2
    assert_same_store(store, extracted(**CASES["rows"][1]))
    assert merge(urls, out).n_pending == 0


def test_what_no_store_has_is_named(extracted: Callable[..., FeatureStore], tmp_path: Path) -> None:
    a = extracted(taps=[MID], schedule={"timesteps": [300]})
    b = extracted(taps=[UP], schedule={"timesteps": [0]})
    with pytest.raises(
        StoreMismatchError, match=r"mid_block at 0\n.*up_blocks\.0 at 300"
    ) as caught:
        merge([a.url, b.url], str(tmp_path / "merged"))
    assert "--reuse" in str(caught.value)


def test_stores_that_do_not_fit_are_refused(
    extracted: Callable[..., FeatureStore], pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    whole, out = extracted(), str(tmp_path / "merged")
    with pytest.raises(StoreMismatchError, match=r"noise\.seed: 1 != 0"):
        merge([whole.url, extracted(noise={"seed": 1}).url], out)
    with pytest.raises(StoreMismatchError, match=r"other samples .* other taps or timesteps"):
        merge([extracted(numbers="3").url, extracted(taps=[MID]).url], out)
    with pytest.raises(InputError, match=r"both have 'k006', 'k007'.* and 1 more: samples would"):
        merge([extracted(numbers="01").url, extracted(numbers="13").url], out)
    pooled = extracted(taps=[{"path": MID, "reduce": "mean"}])
    with pytest.raises(SpecError, match=r"arrays \['mid_block'\] come from different taps"):
        merge([extracted(taps=[MID]).url, pooled.url], out)
    with pytest.raises(InputError, match="named twice"):
        merge([whole.url, whole.url], out)
    with pytest.raises(InputError, match="1 store; want two"):
        merge([whole.url], out)
    with pytest.raises(InputError, match="some have not; merge the former first"):
        merge([whole.url, extracted(taps=[MID]).url, extracted(numbers="3").url], out)
    part = extract(pipeline("part", taps=["conv_in"]), limit=1).store
    with pytest.raises(InputError, match="units are pending, the first is unit 1; finish it"):
        merge([whole.url, part.url], out)
    assert not Path(out).exists()


def copied(store: FeatureStore, url: Path, scale: float = 1.0) -> FeatureStore:
    """A copy of a store; features of its first array in unit 1 are scaled, and signed so."""
    copy = FeatureStore.create(str(url), *store.described, store.index)
    for unit in store.units:
        receipt = store.receipt(unit)
        assert receipt is not None
        features = {
            a.name: np.stack([store.read_unit(a.name, t, unit) for t in range(len(store.times))])
            for a in store.arrays
        }
        first = store.arrays[0].name
        if unit.id == 1:
            features[first] = (features[first].astype("f4") * scale).astype("f2")
        copy.write(unit, features, receipt.invalid, receipt.run, receipt.counts)
    copy.seal()
    return copy


def test_overlapping_cells_must_agree_but_for_rounding(
    extracted: Callable[..., FeatureStore], tmp_path: Path
) -> None:
    a, b = extracted(taps=[MID, "conv_in"]), extracted()
    close = copied(b, tmp_path / "close", 1.0005)
    summary = merge([a.url, close.url], str(tmp_path / "merged"))
    assert_same_store(summary.store, extracted(taps=[MID, "conv_in", UP]))
    far = copied(b, tmp_path / "far", 1.5)
    summary = merge([a.url, far.url], str(tmp_path / "refused"))
    assert [unit.id for unit, _ in summary.failed] == [1]
    assert not summary.store.sealed
    ((_, message),) = summary.failed
    assert "mid_block at timestep 0: 3 rows" in message
    assert "differ by more than" in message


def test_damage_is_not_merged(extracted: Callable[..., FeatureStore], tmp_path: Path) -> None:
    damaged = copied(extracted(taps=[UP]), tmp_path / "damaged")
    path = Path(damaged.url, damaged.shards(damaged.units[2])[0][2])
    path.write_bytes(path.read_bytes()[:-5])
    summary = merge([extracted(taps=[MID]).url, damaged.url], str(tmp_path / "merged"))
    ((unit, message),) = summary.failed
    assert unit.id == 2
    assert "its receipt says" in message
    assert not summary.store.sealed


def test_the_command(extracted: Callable[..., FeatureStore], tmp_path: Path) -> None:
    parts, whole = CASES["taps"]
    urls = [extracted(**part).url for part in parts]
    out = str(tmp_path / "merged")
    result = CliRunner().invoke(app, ["merge", *urls, "--out", out])
    assert result.exit_code == 1, "two rows are invalid, and listed"
    assert "k004" in result.output
    assert "linked" in result.output
    assert "sealed, 5 of 5 units merged now" in result.output
    assert_same_store(FeatureStore.open(out), extracted(**whole))
    with pytest.raises(UserError):
        CliRunner().invoke(app, ["merge", urls[0], "--out", out], catch_exceptions=False)
