"""Labels from a table of their own: joined by key, counted, digested, refused where ambiguous."""

from __future__ import annotations

import csv
import io
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drl_data.errors import InputError
from drl_data.index import SampleIndex, build_index, if_current, joined_index
from drl_data.label_table import read_label_table
from drl_data.objects import open_parent
from drl_data.pipeline import Pipeline
from drl_data.runs import extract
from drl_data.spec import DatasetSpec, LabelsSpec
from drl_data.testing import write_photo_tars
from drl_data.tiny_models import save_tiny_ddpm
from tests.test_extract import pipeline as extracting
from tests.toy_tars import write_tar

KEYS = ["n01/0001", "n01/0002", "n02/0003", "0004"]
GOLDEN = "9f0158fe0060878087867db990a09f076d9ef6415b345ec0a09709cbf286732a"


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Four samples without labels but one; images are not read."""
    for i, key in enumerate(KEYS):
        own = [(f"{key}.cls", b"77")] if i == 1 else []
        write_tar(tmp_path / f"x-{i}.tar", [(f"{key}.png", b"not read" * (i + 1)), *own])
    return tmp_path


def table_at(path: Path, columns: dict[str, list[object]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
        return path
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def dataset(tars: Path, **labels: object) -> DatasetSpec:
    return DatasetSpec.model_validate({"tars": f"{tars}/x-*.tar", "labels": labels})


def column(index: SampleIndex, name: str) -> list[object]:
    found: list[object] = index.table.column(name).to_pylist()
    return found


@pytest.mark.parametrize("kind", ["parquet", "csv", "tsv"])
def test_labels_captions_and_splits_come_by_key(tars: Path, kind: str) -> None:
    path = table_at(
        tars / f"l.{kind}",
        {
            "id": [*reversed(KEYS), "stranger"],
            "class": ["dog", "cat", "dog", "bird", "newt"],
            "text": ["a dog", "a, cat", "", "é", "x"],
            "part": ["val", "train", "train", "train", "val"],
            "rest": [1, 2, 3, 4, 5],
        },
    )
    named = {"key": "id", "label": "class", "caption": "text", "split": "part"}
    index = build_index(dataset(tars, file=str(path), **named))
    assert index.label_names == ("bird", "cat", "dog")
    assert column(index, "label") == [0, 2, 1, 2]
    assert column(index, "caption") == ["é", "", "a, cat", "a dog"]
    assert column(index, "split") == ["train", "train", "train", "val"]
    assert column(index, "tar") == [0, 1, 2, 3]


def test_keys_of_a_csv_are_texts(tars: Path) -> None:
    path = table_at(tars / "l.csv", {"key": ["0004"], "label": ["12"]})
    index = build_index(dataset(tars, file=str(path)))
    assert (index.label_names, column(index, "label")) == (None, [None, None, None, 12])


def test_samples_without_a_line_are_counted(tars: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The tars' own labels give way; a table without labels leaves them."""
    path = table_at(tars / "l.parquet", {"key": [KEYS[0], KEYS[2]], "label": [5, None]})
    with caplog.at_level(logging.WARNING):
        index = build_index(dataset(tars, file=str(path)))
    assert column(index, "label") == [5, None, None, None]
    assert index.n_unlabelled == 3
    assert "no line for 2 of 4 samples" in caplog.text
    captions = build_index(dataset(tars, file=str(path), label=None, split="label"))
    assert column(captions, "label") == [None, 77, None, None]
    assert column(captions, "split") == ["5", "all", "all", "all"]


def test_digests(tars: Path) -> None:
    """By what the table says of the samples; without one as ever; a changed file is seen."""
    plain = DatasetSpec(tars=f"{tars}/x-*.tar")
    path = table_at(tars / "l.parquet", {"key": KEYS, "label": [1, 2, 3, 4]})
    spec = dataset(tars, file=str(path))
    index = build_index(spec)
    assert index.digest() != build_index(plain).digest()
    other = table_at(tars / "o.csv", {"key": [*KEYS, "x"], "label": [1, 2, 3, 4, 9]})
    assert build_index(dataset(tars, file=str(other))).digest() == index.digest()
    again = SampleIndex.from_parquet(index.to_parquet(), "index")
    assert again.labels_digest == index.labels_digest
    assert if_current(again, spec) is not None
    assert if_current(again, dataset(tars, file=str(other))) is None
    assert if_current(again, plain) is None
    table_at(path, {"key": KEYS, "label": [1, 2, 3, 5]})
    assert if_current(again, spec) is None
    with pytest.raises(InputError, match="other rules"):
        joined_index([index, build_index(plain)])


def test_an_index_without_a_table_is_written_as_ever(tars: Path) -> None:
    """Digests of stores that exist stay: this one is of the version before there were tables."""
    index = build_index(DatasetSpec(tars=f"{tars}/x-*.tar"))
    schema = pq.read_schema(pa.BufferReader(index.to_parquet()))
    assert b"labels" not in schema.metadata[b"drl_data"]  # an older version reads it, too
    assert index.digest() == GOLDEN


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"key": ["a", "b", "a"], "label": [1, 2, 3]}, "1 keys have several lines, 'a'"),
        ({"key": ["a", None], "label": [1, 2]}, "line 2 has no 'key'"),
        ({"id": KEYS, "label": [1, 2, 3, 4]}, "no column 'key'.*it has id, label"),
        ({"key": KEYS, "class": [1, 2, 3, 4]}, "no column 'label'"),
        ({"key": ["x.jpg"], "label": [1]}, "none of the 4 samples.*'n01/0001'.*'x.jpg'"),
    ],
)
@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_refused(tars: Path, columns: dict[str, list[object]], message: str, kind: str) -> None:
    path = table_at(tars / f"l.{kind}", columns)
    with pytest.raises(InputError, match=message):
        build_index(dataset(tars, file=str(path)))


@pytest.mark.parametrize("data", [b"", b"PAR1 but no more", b"\xff\xfe\x00", b"a,b\n1,2,3\n"])
def test_files_that_are_no_tables(tars: Path, data: bytes) -> None:
    (tars / "l.csv").write_bytes(data)
    with pytest.raises(InputError, match=r"l\.csv"):
        build_index(dataset(tars, file=f"{tars}/l.csv"))
    with pytest.raises(InputError, match="no such table"):
        build_index(dataset(tars, file=f"{tars}/none.csv"))


keys = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=12, unique=True)


@settings(deadline=None, max_examples=60)
@given(keys=keys, data=st.data())
def test_every_sample_has_its_own_line(keys: list[str], data: st.DataObject) -> None:
    """Against a dict, whatever the keys and their order."""
    lines = data.draw(st.permutations(keys))[: data.draw(st.integers(1, len(keys)))]
    labels = {key: i for i, key in enumerate(lines)}
    buffer = io.BytesIO()
    pq.write_table(pa.table({"key": list(labels), "label": list(labels.values())}), buffer)
    name = f"memory://labels/{abs(hash(tuple(lines)))}.parquet"
    folder, path = open_parent(name)
    folder.put(path, [buffer.getvalue()])
    rows = pa.table({"key": keys, "label": pa.array([None] * len(keys), pa.string()),
                     "split": ["all"] * len(keys)})  # fmt: skip
    found, n = read_label_table(LabelsSpec(file=name)).onto(rows)
    want = [str(labels[key]) if key in labels else None for key in keys]
    assert (found["label"].to_pylist(), n) == (want, len(lines))


def test_a_pipeline_with_a_table(tmp_path: Path) -> None:
    """Relative to the file; the store has the labels, and an extraction goes on with them."""
    photos = write_photo_tars(tmp_path / "photos", n_samples=6, n_tars=2)
    keys = build_index(DatasetSpec(tars=f"{photos}/*.tar")).table["key"].to_pylist()
    table_at(tmp_path / "l.csv", {"key": keys, "label": ["x", "y"] * 3})
    model = save_tiny_ddpm(tmp_path / "ddpm")
    base = extracting(photos, model, tmp_path / "s.zarr").model_dump(exclude_unset=True)
    base["dataset"]["labels"] = {"file": "l.csv"}
    made = Pipeline.parse(base).relative_to(tmp_path)
    assert made.dataset.labels is not None
    assert made.dataset.labels.file == f"{tmp_path}/l.csv"
    store = extract(made, limit=1).store
    assert store.index.label_names == ("x", "y")
    assert store.samples()["label"].to_pylist() == [0, 1] * 3
    assert extract(made).store.sealed
