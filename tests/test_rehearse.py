"""`drl try`: a pipeline on a tiny random model of its family."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from drl_data.cli import app
from drl_data.errors import SpecError
from drl_data.recipes import find_recipe
from drl_data.rehearse import merged, rehearsal
from drl_data.spec import Pipeline, TinySpec

RECIPE = find_recipe("dift_sd21_spair")


def test_the_tiny_section_lies_over_the_pipeline(tmp_path: Path) -> None:
    recipe = Pipeline.load(RECIPE)
    tiny = rehearsal(recipe, tmp_path)
    assert tiny.images == recipe.images.model_copy(update={"size": (32, 32)})
    assert (tiny.schedule, tiny.noise, tiny.taps) == (recipe.schedule, recipe.noise, recipe.taps)
    assert tiny.condition == recipe.condition
    assert tiny.store is not None
    assert tiny.store.url.startswith(str(tmp_path))
    assert tiny.tiny is None


def test_taps_may_be_shallower(tmp_path: Path) -> None:
    recipe = Pipeline.load(RECIPE)
    assert recipe.tiny is not None
    section = recipe.tiny.model_dump(exclude_unset=True) | {
        "taps": {"up_blocks.1": {"path": "up_blocks.0", "reduce": "mean"}}
    }
    tiny = recipe.model_copy(update={"tiny": TinySpec(**section)})
    (tap,) = rehearsal(tiny, tmp_path / "a").taps
    assert (tap.path, tap.name, tap.reduce) == ("up_blocks.0", "up1", ("mean",))
    tiny = recipe.model_copy(
        update={"tiny": TinySpec(**section | {"taps": {"up_blocks.1": "up_blocks.0"}})}
    )
    (tap,) = rehearsal(tiny, tmp_path / "b").taps
    assert (tap.path, tap.name, tap.reduce) == ("up_blocks.0", "up1", ())


def test_merging_goes_into_mappings_and_replaces_the_rest() -> None:
    whole = {"a": {"x": 1, "y": [1, 2]}, "b": 2}
    assert merged(whole, {"a": {"y": [3]}, "c": 4}) == {"a": {"x": 1, "y": [3]}, "b": 2, "c": 4}
    assert whole == {"a": {"x": 1, "y": [1, 2]}, "b": 2}


def test_what_cannot_be_rehearsed_says_so(tmp_path: Path) -> None:
    recipe = Pipeline.load(RECIPE)
    with pytest.raises(SpecError, match="has no `tiny:`; add one"):
        rehearsal(recipe.model_copy(update={"tiny": None}), tmp_path / "a")
    assert recipe.tiny is not None
    other = recipe.tiny.model_copy(update={"model": "stable_difusion"})
    with pytest.raises(SpecError, match="no tiny model 'stable_difusion'; nearest: stable_diffu"):
        rehearsal(recipe.model_copy(update={"tiny": other}), tmp_path / "b")
    wrong = recipe.tiny.model_copy(update={"images": {"size": -3}})
    with pytest.raises(SpecError, match="with its section `tiny`"):
        rehearsal(recipe.model_copy(update={"tiny": wrong}), tmp_path / "c")


def test_try_shows_what_comes_out(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["try", "dift_sd21_spair", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "up_blocks.1@out" in result.output
    assert "16x16x16" in result.output
    assert "6 photographs x 1 timesteps through a tiny random stable_diffusion" in result.output
    assert (tmp_path / "features.zarr").is_dir()
