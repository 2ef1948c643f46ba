"""Every recipe that comes with drl: it is whole, it runs, and a reference says that it is right."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from drl_data.pipeline import Pipeline, StoreSpec
from drl_data.recipes import find_recipe, recipe_folder, recipe_names
from drl_data.runs import prepare_all
from drl_data.testing import write_photo_tars

DEMO = {"digits", "digits_random", "digits_pretrain"}
PUBLISHED = sorted(set(recipe_names()) - DEMO)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_says_what_it_reproduces(name: str) -> None:
    recipe = Pipeline.load(find_recipe(name))
    assert recipe.name == name
    assert recipe.paper
    assert recipe.description
    assert recipe.tiny is not None
    assert recipe.store is not None
    assert recipe.store.url.endswith(f"/{name}.zarr")
    assert recipe.taps


def test_every_recipe_has_a_reference() -> None:
    """A test called as the recipe, which computes its features without drl_data (references.py);
    that such a test runs the recipe end to end is in `rehearse`."""
    tests = {
        node.name.removeprefix("test_")
        for file in Path(__file__).parent.glob("test_recipes_*.py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    missing = [name for name in PUBLISHED if name not in tests]
    assert not missing


def test_the_readme_has_a_row_for_every_recipe() -> None:
    lines = (recipe_folder() / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [line.split("|")[1] for line in lines if line.startswith("| `")]
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row)) == PUBLISHED


PLANNED = {
    # what is special about planning it
    "diffusion_classifier_dit": {"l2": (1000, 1)},  # a table
    "ditf_flux_spair": {"ditf": (3072, 40, 40)},  # buckets
    "vidfm3d_wan": {"block20": (1536, 21, 30, 52)},  # a video
    "diffae_ffhq256": {"z_sem": (512,)},  # Python code, whose weights are yet to be converted
    "cleandift_sd21": {"us6": (1280, 48, 48)},  # other weights, which are not there
    "diffseg": {},  # another model of a bundled architecture
}


@pytest.mark.parametrize("name", PLANNED)
def test_a_recipe_is_planned_offline(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the bundled configuration of its model, without weights: as `drl plan`."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    frames = 81 if name == "vidfm3d_wan" else 1
    write_photo_tars(tmp_path, n_samples=2, n_tars=1, size=32, frames=frames)
    recipe = Pipeline.load(find_recipe(name))
    dataset = recipe.dataset.model_copy(update={"tars": {"all": (str(tmp_path / "*.tar"),)}})
    store = StoreSpec(url=str(tmp_path / "s.zarr"))
    changed = recipe.model_copy(update={"dataset": dataset, "store": store})
    (prepared,) = prepare_all(changed, structure_only=True)
    shapes = {array.name: array.shape for array in prepared.arrays}
    assert PLANNED[name].items() <= shapes.items()
    flops = prepared.flops()
    assert flops.whole >= flops.cut >= 0
