"""What each sample is told: label, template, caption, class; equal to telling them one by one."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from drl_data.backbones import Backbone, Conditioning, ModelFolder, load_backbone
from drl_data.conditions import SampleConditions, extremes, lacking, of_sample
from drl_data.diffusion_spec import ConditionSpec
from drl_data.errors import SpecError
from drl_data.index import SampleIndex, build_index
from drl_data.pipeline import Pipeline
from drl_data.runs import extract
from drl_data.spec import BackboneSpec, DatasetSpec
from drl_data.store import FeatureStore
from drl_data.tiny_models import save_tiny_dit, save_tiny_sd3, save_tiny_stable_diffusion

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = ["cat", "dog", None, "owl"]
CAPTIONS = ["a cat", "", "a dog", None]


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14 samples in one tar; every fourth has no label, another fourth no caption."""
    folder = tmp_path_factory.mktemp("tars")
    generator = np.random.default_rng(0)
    with webdataset.TarWriter(str(folder / "a.tar"), mtime=0) as writer:
        for i in range(14):
            buffer = io.BytesIO()
            pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG")
            sample = {"__key__": f"s{i:02d}", "png": buffer.getvalue()}
            label, caption = CLASSES[i % 4], CAPTIONS[(i // 2) % 4]
            if label is not None:
                sample["cls"] = label.encode()
            if caption is not None:
                sample["txt"] = caption.encode()
            writer.write(sample)
    return folder


@pytest.fixture(scope="module")
def index(tars: Path) -> SampleIndex:
    return build_index(DatasetSpec(tars=str(tars / "a.tar")))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    makers = {
        "sd": save_tiny_stable_diffusion, "sd3": save_tiny_sd3, "dit": save_tiny_dit
    }  # fmt: skip
    return {name: make(root / name) for name, make in makers.items()}


def load(models: dict[str, Path], family: str) -> Backbone:
    return load_backbone(ModelFolder.find(BackboneSpec(model=str(models[family]))), "cpu")


TEMPLATE = ConditionSpec(template="a photo of a {label}")


def test_a_sample_is_told_its_own_label_caption_or_class() -> None:
    names = ("cat", "dog")
    assert of_sample(TEMPLATE, 1, None, names) == ConditionSpec(prompt="a photo of a dog")
    assert of_sample(TEMPLATE, 7, None) == ConditionSpec(prompt="a photo of a 7")
    caption = ConditionSpec(caption=True)
    assert of_sample(caption, None, "{label}, red", names) == ConditionSpec(prompt="{label}, red")
    assert of_sample(caption, None, "") == ConditionSpec()
    assert of_sample(ConditionSpec(class_label="label"), 3, None) == ConditionSpec(class_label=3)
    constant = ConditionSpec(prompt="x")
    assert of_sample(constant, 1, "y", names) is constant


@given(
    st.sampled_from([TEMPLATE, ConditionSpec(caption=True), ConditionSpec(class_label="label")]),
    st.integers(0, 5),
    st.text(),
)
def test_what_a_sample_is_told_is_the_same_for_all_told_so(
    spec: ConditionSpec, label: int, caption: str
) -> None:
    told = of_sample(spec, label, caption)
    assert not told.per_sample
    assert told == of_sample(spec, label, caption)
    assert hash(told) == hash(of_sample(spec, label, caption))
    assert ConditionSpec.model_validate(told.model_dump()) == told
    assert lacking(told, None, None) is None


@pytest.mark.parametrize(
    ("spec", "label", "caption", "want"),
    [
        (TEMPLATE, None, "x", "label"),
        (TEMPLATE, 0, None, None),
        (ConditionSpec(caption=True), 0, None, "caption"),
        (ConditionSpec(caption=True), None, "", None),
        (ConditionSpec(class_label="label"), None, "x", "label"),
        (ConditionSpec(class_label=1), None, None, None),
    ],
)
def test_what_a_sample_lacks_is_named(
    spec: ConditionSpec, label: int | None, caption: str | None, want: str | None
) -> None:
    assert lacking(spec, label, caption) == want


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ({"prompt": "a", "caption": True}, "prompt and caption: want one of them"),
        ({"template": "a {label}", "prompt_embeddings": "e"}, "template and prompt_embeddings: w"),
        ({"template": "a cat"}, r"template 'a cat' has no \{label\}; write it as prompt"),
    ],
)
def test_texts_that_exclude_each_other(condition: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Pipeline.parse(
            {"name": "x", "dataset": {"tars": "a"}, "images": {"size": 8}, "condition": condition}
        )


@pytest.mark.parametrize("family", ["sd", "sd3"])
@pytest.mark.parametrize("spec", [TEMPLATE, ConditionSpec(caption=True)])
def test_a_batch_is_told_what_its_samples_are_one_by_one(
    models: dict[str, Path], index: SampleIndex, family: str, spec: ConditionSpec
) -> None:
    backbone = load(models, family)
    conditions = SampleConditions(backbone, spec, index)
    got = conditions.batch(4, 7, 8)
    lacks = [row.row for row in got.invalid]
    for i, row in enumerate(index.slice(4, 11).to_pylist()):
        missing = row["caption" if spec.caption else "label"] is None
        assert (4 + i in lacks) == missing
        if missing:
            continue
        prompt = row["caption"] if spec.caption else f"a photo of a {CLASSES[i % 4]}"
        want = backbone.conditioning(ConditionSpec(prompt=prompt)).kwargs
        for name, tensor in got.conditioning.kwargs.items():
            assert len(tensor) == 8
            assert torch.equal(tensor[i : i + 1], want[name]), (prompt, name)
    what = "caption" if spec.caption else "label"
    reasons = {(row.stage, row.reason) for row in got.invalid}
    assert reasons == {("condition", f"the sample has no {what}, which the condition needs")}
    assert all(row.key == f"s{row.row:02d}" for row in got.invalid)


class Counting:
    """Counts what a backbone is asked to encode, and passes it on."""

    def __init__(self, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.backbone = backbone
        encode = backbone.conditioning

        def conditioning(spec: ConditionSpec) -> Conditioning:
            self.asked.append(spec.prompt)
            return encode(spec)

        monkeypatch.setattr(backbone, "conditioning", conditioning)


def test_each_distinct_prompt_is_encoded_once_and_then_the_encoders_are_freed(
    models: dict[str, Path], index: SampleIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load(models, "sd")
    assert backbone.text is not None
    counting = Counting(backbone, monkeypatch)
    conditions = SampleConditions(backbone, TEMPLATE, index)
    conditions.batch(0, 2, 4)
    assert counting.asked == ["a photo of a cat", "a photo of a dog"]
    assert backbone.text.n_loaded
    for start in (2, 6, 10, 2):
        conditions.batch(start, 4, 4)
    assert sorted(counting.asked) == [f"a photo of a {name}" for name in ("cat", "dog", "owl")]
    assert not backbone.text.n_loaded


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_no_caption_is_encoded_with_another(
    models: dict[str, Path],
    index: SampleIndex,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
) -> None:
    """In a batch, the projection of CLIP's pooled vector has other bits."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

    n_rows: list[int] = []

    def counted(plain: Callable[..., object]) -> Callable[..., object]:
        def forward(self: object, *args: object, **kwargs: object) -> object:
            ids = args[0] if args else kwargs["input_ids"]
            assert isinstance(ids, torch.Tensor)
            n_rows.append(len(ids))
            return plain(self, *args, **kwargs)

        return forward

    for encoder in (CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel):
        monkeypatch.setattr(encoder, "forward", counted(encoder.forward))
    conditions = SampleConditions(load(models, family), ConditionSpec(caption=True), index)
    conditions.batch(0, 8, 8)
    assert len(n_rows) >= 3  # that many captions are distinct
    assert set(n_rows) == {1}


def test_a_full_cache_forgets_what_was_used_longest_ago(
    models: dict[str, Path], index: SampleIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load(models, "sd")
    counting = Counting(backbone, monkeypatch)
    one = backbone.conditioning(ConditionSpec()).n_bytes
    assert one == 4 * 77 * 24
    conditions = SampleConditions(backbone, TEMPLATE, index, cache_bytes=2 * one)
    counting.asked.clear()
    whole = conditions.batch(0, 4, 4).conditioning  # cat, dog, owl; cat is forgotten
    conditions.batch(1, 1, 1)
    conditions.batch(3, 1, 1)
    assert len(counting.asked) == 3
    again = conditions.batch(0, 4, 4).conditioning
    assert counting.asked[3:] == ["a photo of a cat", "a photo of a dog", "a photo of a owl"]
    assert torch.equal(again.kwargs["encoder_hidden_states"], whole.kwargs["encoder_hidden_states"])


def test_one_condition_for_all_is_made_once_and_not_copied(
    models: dict[str, Path], index: SampleIndex
) -> None:
    backbone = load(models, "sd")
    assert backbone.text is not None
    conditions = SampleConditions(backbone, ConditionSpec(prompt="x"), index)
    assert not backbone.text.n_loaded
    batch = conditions.batch(0, 4, 8)
    assert batch.conditioning is conditions.constant
    (row,) = conditions.constant.kwargs.values()
    (rows,) = batch.conditioning.expand(8).values()
    assert rows.shape == (8, 77, 24)
    assert rows.data_ptr() == row.data_ptr()


def without(index: SampleIndex, column: str) -> SampleIndex:
    i = index.table.schema.get_field_index(column)
    empty = pa.nulls(index.n_samples, index.table.schema.field(i).type)
    return SampleIndex(
        index.table.set_column(i, column, empty), index.tars, index.label_names, index.dataset
    )


@pytest.mark.parametrize(
    ("spec", "column"), [(TEMPLATE, "label"), (ConditionSpec(caption=True), "caption")]
)
def test_a_dataset_without_what_the_condition_needs_is_refused(
    index: SampleIndex, spec: ConditionSpec, column: str
) -> None:
    with pytest.raises(
        SpecError, match=f"each sample's {column}, and no sample .* dataset.{column}"
    ):
        extremes(spec, without(index, column))
    other = {"label": "caption", "caption": "label"}[column]
    assert all(not condition.per_sample for condition in extremes(spec, without(index, other)))


# --- whole stores -------------------------------------------------------------------------------


def run(tars: Path, model: Path, store: Path, **condition: object) -> FeatureStore:
    pipeline = {
        "name": "test",
        "dataset": {"tars": str(tars / "a.tar")},
        "images": {"size": 16},
        "backbone": {"model": str(model)},
        "condition": condition,
        "schedule": {"timesteps": [100]},
        "taps": ["**.attn1.to_q"],
        "features": {"dtype": "float32", "batch_size": 4, "rows_per_unit": 8},
        "store": {"url": str(store)},
    }
    return extract(Pipeline.parse(pipeline)).store


def rows_of(store: FeatureStore) -> np.ndarray:
    name = store.arrays[-1].name
    return np.concatenate([store.read_unit(name, 0, unit) for unit in store.units])


@pytest.mark.parametrize(
    ("family", "condition", "one_by_one", "column"),
    [
        (
            "sd",
            {"template": "a {label}"},
            lambda row, names: {"prompt": f"a {names[row['label']]}"},
            "label",
        ),
        ("sd", {"caption": True}, lambda row, names: {"prompt": row["caption"]}, "caption"),
        (
            "dit",
            {"class_label": "label"},
            lambda row, names: {"class_label": row["label"]},
            "label",
        ),
    ],
)
def test_a_store_equals_stores_of_one_condition_each(
    tars: Path,
    index: SampleIndex,
    models: dict[str, Path],
    tmp_path: Path,
    family: str,
    condition: dict[str, object],
    one_by_one: Callable[[dict[str, object], list[str]], dict[str, object]],
    column: str,
) -> None:
    store = run(tars, models[family], tmp_path / "all.zarr", **condition)
    got = rows_of(store)
    rows = index.table.to_pylist()
    lacks = [i for i, row in enumerate(rows) if row[column] is None]
    assert lacks
    invalid = [row for receipt in store.receipts().values() for row in receipt.invalid]
    assert [(row.row, row.stage) for row in invalid] == [(i, "condition") for i in lacks]
    assert np.isnan(got[lacks]).all()
    assert store.sealed
    seen: dict[str, np.ndarray] = {}
    for i, row in enumerate(rows):
        if i in lacks:
            continue
        told = one_by_one(row, index.label_names)
        if str(told) not in seen:
            path = tmp_path / f"{len(seen)}.zarr"
            seen[str(told)] = rows_of(run(tars, models[family], path, **told))
        np.testing.assert_array_equal(got[i], seen[str(told)][i])
    assert len(seen) == 3
    assert not np.array_equal(*list(seen.values())[:2])  # the condition matters at this tap


def test_labels_that_the_model_has_not_are_refused_before_the_run(
    tars: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    tar = tmp_path / "a.tar"
    with webdataset.TarWriter(str(tar), mtime=0) as writer:
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16)).save(buffer, "PNG")
        for label in (3, 11):
            key = f"k{label}"
            writer.write({"__key__": key, "png": buffer.getvalue(), "cls": str(label).encode()})
    with pytest.raises(SpecError, match=r"class_label 11: want 0\.\.10 or null"):
        run(tmp_path, models["dit"], tmp_path / "s.zarr", class_label="label")
    assert not (tmp_path / "s.zarr").exists()
    with pytest.raises(SpecError, match="takes no text"):
        run(tars, models["dit"], tmp_path / "s.zarr", caption=True)
