"""Which samples, arrays and timesteps of two stores are the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from drl_data.backbones import find_model, load_backbone
from drl_data.diffusion_spec import ConditionSpec, NoiseSpec, ScheduleSpec
from drl_data.index import SampleIndex, TarInfo
from drl_data.reuse import match_rows, reductions, same_noise, taps_of, unlike
from drl_data.spec import BackboneSpec, FeatureSpec, ImageSpec, TapSpec
from drl_data.spec_base import Spec
from drl_data.tiny_models import save_tiny_stable_diffusion
from tests.stores import ARRAYS, make_index, make_spec

SPEC = make_spec(4, 2)
TAR = TarInfo("/tars/a.tar", "all", 10, "tag", "none")


def index_of(
    keys: Sequence[str],
    *,
    sizes: Sequence[int] | None = None,
    labels: Sequence[int | None] | None = None,
    captions: Sequence[str | None] | None = None,
    tars: Sequence[int] | None = None,
    etags: Sequence[str] = ("tag",),
    names: tuple[str, ...] | None = None,
) -> SampleIndex:
    n = len(keys)
    table = make_index(n).table
    columns: dict[str, pa.Array] = {
        "key": pa.array(keys, pa.string()),
        "member": pa.array([f"{key}.png" for key in keys], pa.string()),
        "size": pa.array(sizes or [100] * n, pa.int64()),
        "label": pa.array(labels or [0] * n, pa.int64()),
        "caption": pa.array(captions or [None] * n, pa.string()),
        "tar": pa.array(tars or [0] * n, pa.int32()),
    }
    for name, column in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, column)
    infos = tuple(replace(TAR, url=f"/tars/{i}.tar", etag=etag) for i, etag in enumerate(etags))
    return SampleIndex(table, infos, names, make_index(1).dataset)


@given(
    st.lists(st.integers(0, 30), unique=True, max_size=20),
    st.lists(st.integers(0, 30), unique=True, max_size=20),
)
def test_rows_are_found_wherever_they_lie(new: list[int], old: list[int]) -> None:
    if not new or not old:
        return
    found = match_rows(SPEC, index_of([str(i) for i in new]), index_of([str(i) for i in old]))
    assert found.tolist() == [old.index(i) if i in old else -1 for i in new]


def test_another_image_under_one_key_is_another_sample() -> None:
    new = index_of(["a", "b", "c"], sizes=[100, 101, 100])
    old = index_of(["c", "b", "a"], sizes=[100, 100, 100])
    assert match_rows(SPEC, new, old).tolist() == [2, -1, 0]


def test_lengths_keep_columns_apart() -> None:
    """No key can be made of another sample's key and name."""
    new, old = index_of(["a\n5"]), index_of(["a"])
    assert match_rows(SPEC, new, old).tolist() == [-1]
    null, empty = (index_of(["a"], captions=[caption]) for caption in (None, ""))
    told = SPEC.model_copy(update={"condition": ConditionSpec(caption=True)})
    assert match_rows(told, null, empty).tolist() == [-1]
    assert match_rows(told, null, null).tolist() == [0]


def test_labels_and_captions_count_where_the_network_is_told_them() -> None:
    """A label is its name to a template, and its number to a class."""
    old = index_of(["a", "b", "c"], labels=[0, 1, None], names=("cat", "dog"), captions="xyz")
    new = index_of(
        ["a", "b", "c"], labels=[1, 2, None], names=("ant", "cat", "dog"), captions="xyw"
    )
    swapped = index_of(["a", "b", "c"], labels=[0, 1, None], names=("cat", "cow"), captions="xyz")

    def found(condition: dict[str, object], index: SampleIndex) -> list[int]:
        spec = SPEC.model_copy(update={"condition": ConditionSpec.model_validate(condition)})
        return match_rows(spec, index, old).tolist()

    assert found({}, new) == [0, 1, 2]
    assert found({"caption": True}, new) == [0, 1, -1]
    assert found({"template": "a {label}"}, new) == [0, 1, 2]
    assert found({"template": "a {label}"}, swapped) == [0, -1, 2]
    assert found({"class_label": "label"}, new) == [-1, -1, 2]
    assert found({"class_label": "label"}, swapped) == [0, 1, 2]


def test_samples_that_look_alike_are_told_apart_by_their_place() -> None:
    """Headers say nothing of the pixels: two tars may have another image under one key."""
    old = index_of(["a", "a", "b"], tars=[0, 1, 1], etags=("one", "two"))
    assert match_rows(SPEC, old, old).tolist() == [0, 1, 2]
    moved = index_of(["b", "a", "a"], tars=[0, 0, 1], etags=("two", "one"))
    assert match_rows(SPEC, moved, old).tolist() == [2, 1, -1], "one has another offset"
    one = index_of(["a"], etags=("one",))
    assert match_rows(SPEC, one, old).tolist() == [0]
    assert match_rows(SPEC, index_of(["a"], etags=("new",)), old).tolist() == [-1]
    assert match_rows(SPEC, old, one).tolist() == [0, -1, -1]


CHANGES: dict[str, Spec | str | int] = {
    "images": ImageSpec(size=9),
    "weights": "x" * 64,
    "backbone_dtype": "bfloat16",
    "condition": ConditionSpec(prompt="a cat"),
    "noise": NoiseSpec(seed=1),
    "schedule": ScheduleSpec(timesteps=(10, 200), model_time="fraction"),
    "dtype": "float32",
    "batch_size": 2,
    "overflow": "clip",
    "non_finite": "clip",
}
FREE: dict[str, object] = {
    "dataset": "e" * 64,
    "n_samples": 9,
    "rows_per_unit": 4,
    "taps": (TapSpec(path="conv_in"),),
    "schedule": ScheduleSpec(timesteps=(10,), condition_at=(3,)),
}


def test_every_field_of_a_spec_is_either_compared_or_free() -> None:
    for name, value in CHANGES.items():
        lines = unlike(SPEC.model_copy(update={name: value}), SPEC)
        assert lines, name
        assert all(line.startswith(name) for line in lines)
    for name, free in FREE.items():
        assert not unlike(SPEC.model_copy(update={name: free}), SPEC), name
    known = {*CHANGES, *FREE, "format", "latents", "condition_files"}
    assert set(FeatureSpec.model_fields) == known


def test_a_row_of_a_table_belongs_to_a_place_and_torchs_last_rows_to_their_number() -> None:
    """torch draws 16 numbers at a time, and the last 16 anew if they are no multiple of it."""
    shape = (1, 4, 5)
    spec = NoiseSpec(kind="bank", generator="torch")
    assert same_noise(spec, (0, 2), (0, 2))
    assert not same_noise(spec, (1, 2), (0, 2), shape)
    assert same_noise(spec, (0, 3), (0, 2), shape)
    assert not same_noise(spec, (1, 3), (1, 2), shape)
    assert same_noise(spec, (1, 3), (1, 2), (1, 4, 4))
    assert not same_noise(spec, (0, 3), (0, 2)), "not known without the shape"
    assert same_noise(NoiseSpec(kind="bank", file="sha256:1"), (1, 3), (1, 2))
    assert same_noise(NoiseSpec(kind="bank"), (1, 3), (0, 2))


TAPS = (
    TapSpec(path="up_blocks.*", reduce=("mean",)),
    TapSpec(path="up_blocks.*@in"),
    TapSpec(path="mid_block", name="up_blocks.7", reduce=("l2",)),
    TapSpec(path="**.attn1@attn.q.heads[0]", reduce=("mean",)),
    TapSpec(path="**.attn1@attn.out"),
    TapSpec(path="vae.enc[0]", reduce=("avg_pool(2)",)),
    TapSpec(path="latent.noisy", reduce=("mean",)),
    TapSpec(path="eps"),
    TapSpec(path="cleandift:mid", reduce=("avg_pool(1)",)),
    TapSpec(path="ldm:middle_block.0", reduce=("spatial_norm",)),
)


def test_names_tell_the_tap_of_an_array(tmp_path: Path) -> None:
    """As the model itself resolves them."""
    model = find_model(BackboneSpec(model=str(save_tiny_stable_diffusion(tmp_path))))
    resolved = load_backbone(model, "meta").resolve(TAPS)
    arrays = [ARRAYS[0].model_copy(update={"name": tap.name}) for tap in resolved]
    spec = SPEC.model_copy(update={"taps": TAPS})
    assert reductions(spec, arrays) == {tap.name: tap.reduce for tap in resolved}
    assert {tap for taps in taps_of(spec, arrays).values() for tap in taps} == set(TAPS)


def test_two_taps_that_may_give_an_array_say_nothing_of_its_reductions() -> None:
    taps = (TapSpec(path="mid*", reduce=("mean",)), TapSpec(path="*block", reduce=("l2",)))
    spec = SPEC.model_copy(update={"taps": taps})
    assert reductions(spec, ARRAYS[:1]) == {"mid_block": None}
