"""Every recipe that comes with drl: it is whole, it runs, and a reference says that it is right."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from drl_data.pipeline import Pipeline
from drl_data.recipes import find_recipe, recipe_folder, recipe_names

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
