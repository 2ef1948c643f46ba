"""Specs: what enters the fingerprint and what does not, and what a wrong file says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue

from drl_data.diffusion_spec import ConditionSpec, LatentSpec, NoiseSpec, ScheduleSpec
from drl_data.errors import SpecError
from drl_data.pipeline import Pipeline, RunSpec, StoreSpec, is_absolute
from drl_data.recipes import find_recipe, recipe_names
from drl_data.spec import ArraySpec, FeatureSpec, ImageSpec, TapSpec
from drl_data.spec_base import Spec, canonical_json

SPEC = FeatureSpec(
    dataset="d" * 64,
    n_samples=100,
    images=ImageSpec(size=16),
    weights="w" * 64,
    backbone_dtype="float32",
    latents=LatentSpec(),
    condition=ConditionSpec(),
    schedule=ScheduleSpec(timesteps=(0, 50)),
    noise=NoiseSpec(),
    taps=(TapSpec(path="mid_block", reduce=("mean",)),),
    dtype="float16",
    batch_size=8,
    rows_per_unit=32,
    overflow="error",
)

CHANGES: dict[str, dict[str, object]] = {
    "input": {"dataset": "e" * 64},
    "number of samples": {"n_samples": 101},
    "image rule": {"images": ImageSpec(size=16, filter="bilinear")},
    "image range": {"images": ImageSpec(size=16, range=(0, 1))},
    "weights": {"weights": "v" * 64},
    "precision": {"backbone_dtype": "bfloat16"},
    "posterior": {"latents": LatentSpec(posterior="mean")},
    "prompt": {"condition": ConditionSpec(prompt="a cat")},
    "template": {"condition": ConditionSpec(template="a {label}")},
    "caption": {"condition": ConditionSpec(caption=True)},
    "class": {"condition": ConditionSpec(class_label="label")},
    "guidance": {"condition": ConditionSpec(guidance=1.0)},
    "lcm's guidance": {"condition": ConditionSpec(lcm_guidance=3.5)},
    "original size": {"condition": ConditionSpec(original_size=(16, 16))},
    "crop": {"condition": ConditionSpec(crops_coords_top_left=(0, 1))},
    "target size": {"condition": ConditionSpec(target_size=(16, 16))},
    "frames": {"images": ImageSpec(size=16, frames=9)},
    "frames alone": {"images": ImageSpec(size=16, frames=9, frame_latents="each")},
    "embeddings": {"condition_files": {"prompt_embeddings": "f" * 64}},
    "timestep": {"schedule": ScheduleSpec(timesteps=(0, 51))},
    "order of timesteps": {"schedule": ScheduleSpec(timesteps=(50, 0))},
    "seed": {"noise": NoiseSpec(seed=1)},
    "members": {"noise": NoiseSpec(members=2)},
    "one posterior draw": {"latents": LatentSpec(per_member=False)},
    "scale per channel": {"latents": LatentSpec(scale="per_channel")},
    "convention": {"schedule": ScheduleSpec(convention="learned", timesteps=(0, 50))},
    "flow": {"schedule": ScheduleSpec(timesteps=(0, 50), convention="flow")},
    "shift": {"schedule": ScheduleSpec(timesteps=(0, 50), convention="flow", shift=3)},
    "told time": {"schedule": ScheduleSpec(timesteps=(0, 50), condition_at=25)},
    "unit of time": {"schedule": ScheduleSpec(timesteps=(0, 50), model_time="fraction")},
    "kind of noise": {"noise": NoiseSpec(kind="bank")},
    "generator of the noise": {"noise": NoiseSpec(kind="bank", generator="torch")},
    "file of the noise": {"noise": NoiseSpec(kind="bank", file="sha256:" + "f" * 64)},
    "base of the noise": {"noise": NoiseSpec(kind="shared", shared_base=64)},
    "patch": {"noise": NoiseSpec(kind="patch_mask", patch=4)},
    "told in an inversion": {"noise": NoiseSpec(kind="inversion", told="next")},
    "tap": {"taps": (TapSpec(path="up_blocks.0", reduce=("mean",)),)},
    "reduction": {"taps": (TapSpec(path="mid_block"),)},
    "dtype": {"dtype": "float32"},
    "batch size": {"batch_size": 16},
    "unit size": {"rows_per_unit": 64},
    "overflow": {"overflow": "clip"},
    "not finite": {"non_finite": "invalid"},
}


def test_fingerprint_is_golden() -> None:
    """A fingerprint that changes by itself would orphan every store there is."""
    assert SPEC.fingerprint() == "87a9b9d7edd380ee15b4b213cb6760de"


def test_a_field_added_with_a_default_changes_no_fingerprint() -> None:
    class LaterNoise(NoiseSpec):
        colour: str = "white"

    class LaterSpec(FeatureSpec):
        noise: LaterNoise
        flavour: str = "plain"

    content = SPEC.model_dump()
    assert LaterSpec.model_validate(content).fingerprint() == SPEC.fingerprint()
    for change in ({"flavour": "x"}, {"noise": {"colour": "pink"}}):
        assert LaterSpec.model_validate({**content, **change}).fingerprint() != SPEC.fingerprint()


def test_format_is_content_although_it_has_a_default() -> None:
    assert SPEC.model_copy(update={"format": 2}).fingerprint() != SPEC.fingerprint()


def test_defaults_never_change() -> None:
    """They are not in a fingerprint: another default would give old stores another meaning."""
    defaults: list[tuple[Spec, dict[str, object]]] = [
        (ImageSpec(size=1), {
            "resize": "shortest", "filter": "bicubic", "mode": "RGB",
            "background": (255, 255, 255), "range": (-1.0, 1.0), "max_pixels": 178_956_970,
            "max_bytes": 1 << 30,
            "shorter_side": None, "fill": (0, 0, 0), "frames": 1, "frame_latents": "video",
        }),
        (LatentSpec(), {"posterior": "sample", "scale": True, "per_member": True}),
        (ConditionSpec(), {
            "prompt": "", "template": None, "caption": False, "prompt_embeddings": None,
            "class_label": "null", "guidance": 3.5, "candidates": (), "lcm_guidance": None,
            "original_size": None, "crops_coords_top_left": (0, 0), "target_size": None,
            "t5_tokens": None, "t5": True,
        }),
        (ScheduleSpec(timesteps=(0,)), {
            "convention": "ddpm_index", "condition_at": "same", "n_steps": None,
            "scheduler": None, "scheduler_config": {}, "model_time": "index", "shift": None,
        }),
        (NoiseSpec(), {
            "kind": "per_sample", "seed": 0, "members": 1, "per_timestep": False,
            "shared_base": None, "patch": 8, "told": "current", "generator": "philox", "file": None,
        }),
        (TapSpec(path="x"), {"name": None, "reduce": ()}),
        (SPEC, {"non_finite": "error"}),
    ]  # fmt: skip
    for spec, want in defaults:
        assert {name: getattr(spec, name) for name in want} == want


def test_every_field_is_in_the_table_above() -> None:
    named = {field for change in CHANGES.values() for field in change}
    assert named == set(FeatureSpec.model_fields) - {"format"}


@pytest.mark.parametrize("what", CHANGES)
def test_fingerprint_sees_every_change_of_content(what: str) -> None:
    other = SPEC.model_copy(update=CHANGES[what])
    assert other.fingerprint() != SPEC.fingerprint()
    (field,) = CHANGES[what]
    assert any(line.startswith(field) for line in SPEC.differences(other))


def test_equal_specs_have_no_differences() -> None:
    assert SPEC.differences(SPEC.model_copy()) == []


def test_spec_round_trips_through_json() -> None:
    assert FeatureSpec.model_validate_json(SPEC.model_dump_json()) == SPEC


def test_fingerprint_does_not_depend_on_the_process() -> None:
    code = (
        "import sys; from drl_data.spec import FeatureSpec;"
        "print(FeatureSpec.model_validate_json(sys.stdin.read()).fingerprint())"
    )
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=SPEC.model_dump_json(),
            capture_output=True,
            text=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[1])},
            check=True,
        )
        assert done.stdout.strip() == SPEC.fingerprint()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), JSON))
def test_canonical_json_is_json_and_ignores_order(value: dict[str, JsonValue]) -> None:
    assert json.loads(canonical_json(value)) == value
    assert canonical_json(dict(reversed(value.items()))) == canonical_json(value)


MINIMAL = {"name": "x", "dataset": {"tars": "a.tar"}, "images": {"size": 8}}


def test_short_forms_mean_the_long_ones() -> None:
    short = Pipeline.parse({**MINIMAL, "taps": ["mid_block", {"path": "up", "reduce": "mean"}]})
    assert short.dataset.tars == {"all": ("a.tar",)}
    assert short.images.size == (8, 8)
    assert short.taps == (TapSpec(path="mid_block"), TapSpec(path="up", reduce=("mean",)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tapps": []}, "tapps: unknown key; did you mean 'taps'"),
        ({"dataset": {"tars": "a", "lable": 1}}, "lable: unknown key; did you mean 'label'"),
        ({"images": {}}, r"images\.size: missing"),
        ({"images": {"size": 8, "filter": "x"}}, r"images\.filter: Input should be 'nearest'"),
        ({"schedule": {"timesteps": [1, 1]}}, "want at least one, none twice"),
        ({"schedule": {"timesteps": []}}, "want at least one, none twice"),
        ({"schedule": {"timesteps": [1, 2, 3], "condition_at": [1, 2]}}, "2 entries; want one, or"),
        ({"schedule": {"timesteps": [1], "convention": "none"}}, "want timesteps: 0"),
        ({"schedule": {"timesteps": [1], "n_steps": 50}}, "n_steps has no meaning with ddpm_index"),
        (
            {"schedule": {"timesteps": [1], "convention": "edm_index", "scheduler": "DDIM"}},
            "scheduler and scheduler_config have no meaning with edm_index",
        ),
        ({"schedule": {"timesteps": [1], "scheduler": "X"}}, "no meaning with ddpm_index"),
        ({"schedule": {"timesteps": [-8], "convention": "scheduler_position"}}, "needs n_steps"),
        ({"noise": {"kind": "inversion", "members": 2}}, "have no meaning with kind: inversion"),
        ({"noise": {"shared_base": 64}}, "shared_base has no meaning with kind: per_sample, only"),
        ({"schedule": {"timesteps": [1], "shift": 3}}, "a meaning with convention: flow only"),
        ({"noise": {"kind": "none", "members": 2}}, "have no meaning with kind: none"),
        ({"features": {"batch_size": 3, "rows_per_unit": 8}}, "not a multiple of batch_size 3"),
    ],
)  # fmt: skip
def test_a_wrong_file_says_where_and_what(change: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Pipeline.parse({**MINIMAL, **change})


def test_whole_timesteps_are_equal_however_they_are_written() -> None:
    as_floats = ScheduleSpec(timesteps=(0.0, 50.0))
    assert SPEC.model_copy(update={"schedule": as_floats}).fingerprint() == SPEC.fingerprint()
    assert ScheduleSpec(timesteps=(0.5,), convention="flow").timesteps == (0.5,)


def test_every_mistake_is_named_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        Pipeline.parse({"dataset": {"tars": "a"}, "images": {"size": 8}, "tapps": 1})
    assert "name: missing" in str(caught.value)
    assert "tapps: unknown" in str(caught.value)


def test_paths_in_a_file_are_relative_to_it(tmp_path: Path) -> None:
    data = {
        **MINIMAL,
        "dataset": {"tars": {"a": ["data/{0..3}.tar", "s3://b/x.tar"], "b": "/abs/y.tar"}},
        "backbone": {"model": "./weights"},
        "store": {"url": "f.zarr"},
        "condition": {"prompt_embeddings": "e.safetensors"},
        "probe": {"compare": {"other": "other.yaml"}},
        "pretrain": {"model": {}, "steps": 1, "output": "out"},
    }
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump(data))
    got = Pipeline.load(path)
    assert got.dataset.tars == {
        "a": (f"{tmp_path}/data/{{0..3}}.tar", "s3://b/x.tar"),
        "b": ("/abs/y.tar",),
    }
    assert got.store == StoreSpec(url=f"{tmp_path}/f.zarr")
    assert got.results == f"{tmp_path}/results"
    assert got.backbone is not None
    assert got.backbone.model == f"{tmp_path}/weights"
    assert got.condition.prompt_embeddings == f"{tmp_path}/e.safetensors"
    assert got.probe is not None
    assert got.probe.compare == {"other": f"{tmp_path}/other.yaml"}
    assert got.pretrain is not None
    assert got.pretrain.output == f"{tmp_path}/out"


def test_hub_ids_are_no_paths(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, "backbone": {"model": "owner/name"}}))
    backbone = Pipeline.load(path).backbone
    assert backbone is not None
    assert backbone.model == "owner/name"


def test_what_is_absolute() -> None:
    assert all(map(is_absolute, ["/a", "s3://b/c", "file:///a", "bundled:x", "memory://a"]))
    assert not any(map(is_absolute, ["a", "./a", "{a,b}/c", "../x:y"]))


def test_a_missing_or_broken_file_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no such pipeline file; `drl recipes`"):
        Pipeline.load(tmp_path / "none.yaml")
    (tmp_path / "x.yaml").write_text("a: [")
    with pytest.raises(SpecError, match="is not YAML"):
        Pipeline.load(tmp_path / "x.yaml")


def test_logistics_are_not_content() -> None:
    """What says where and how fast has no field in common with what names content."""
    content = set(FeatureSpec.model_fields)
    assert content.isdisjoint(RunSpec.model_fields)
    assert content.isdisjoint(StoreSpec.model_fields)


def test_bytes_per_row() -> None:
    array = ArraySpec(
        name="a", tap="a@out", dims=("channel", "height", "width"), shape=(4, 3, 2), dtype="float16"
    )
    assert array.bytes_per_row == 48


def test_recipes_are_valid_and_found() -> None:
    assert "digits" in recipe_names()
    for name in recipe_names():
        assert Pipeline.load(find_recipe(name)).name == name
    with pytest.raises(SpecError, match="no recipe 'digit'; nearest: digits"):
        find_recipe("digit")


def test_whole_numbers_are_written_either_way() -> None:
    whole = ScheduleSpec.model_validate({"timesteps": [50.0, 0.5], "convention": "sigma"})
    assert [type(t) for t in whole.timesteps] == [int, float]
    assert ScheduleSpec.model_validate({"timesteps": 50}) == ScheduleSpec(timesteps=(50,))
