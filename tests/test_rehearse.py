"""`drl try`: a pipeline on a tiny random model of its family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from drl_data.cli import app
from drl_data.errors import SpecError
from drl_data.pipeline import Pipeline, TinySpec
from drl_data.recipes import find_recipe
from drl_data.rehearse import merged, rehearsal
from drl_data.tiny_models import save_tiny

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


def test_files_that_a_pipeline_reads_become_random_ones(tmp_path: Path) -> None:
    clean = rehearsal(Pipeline.load(find_recipe("cleandift_sd21")), tmp_path / "weights")
    assert clean.backbone is not None
    assert clean.backbone.weights is not None
    other = load_file(clean.backbone.weights)
    own = load_file(Path(clean.backbone.model) / "unet" / "diffusion_pytorch_model.safetensors")
    assert {k: v.shape for k, v in other.items()} == {k: v.shape for k, v in own.items()}
    assert not torch.equal(other["conv_in.weight"], own["conv_in.weight"])
    told = rehearsal(Pipeline.load(find_recipe("sd4match_sd21_spair")), tmp_path / "embeddings")
    assert told.condition.prompt_embeddings is not None
    (embeddings,) = load_file(told.condition.prompt_embeddings).values()
    assert embeddings.shape == (7, 24)  # the tiny network's width of text
    recipe = Pipeline.load(find_recipe("sd4match_sd21_spair"))
    assert recipe.tiny is not None
    without = recipe.tiny.model_copy(update={"condition": {"prompt_embeddings": None}})
    plain = rehearsal(recipe.model_copy(update={"tiny": without}), tmp_path / "without")
    assert plain.condition.prompt_embeddings is None


def test_embeddings_for_a_model_without_text(tmp_path: Path) -> None:
    recipe = Pipeline.load(find_recipe("sd4match_sd21_spair"))
    assert recipe.tiny is not None
    other = recipe.tiny.model_copy(update={"model": "dinov2", "network": {}})
    with pytest.raises(SpecError, match="prompt_embeddings: the tiny model takes no text"):
        rehearsal(recipe.model_copy(update={"tiny": other}), tmp_path)


def test_a_tiny_vae_may_be_deeper(tmp_path: Path) -> None:
    rehearsal(Pipeline.load(find_recipe("odise_sd13")), tmp_path)
    config = json.loads((tmp_path / "model" / "vae" / "config.json").read_text())
    assert (config["block_out_channels"], config["layers_per_block"]) == ([4, 8, 8, 8], 2)
    with pytest.raises(SpecError, match="'dinov2' has no VAE to configure"):
        save_tiny("dinov2", tmp_path / "other", vae={"layers_per_block": 2})
