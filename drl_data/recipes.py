"""The pipeline files that come with drl: in a checkout and in an installed wheel."""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path

from drl_data.errors import SpecError


def recipe_folder() -> Path:
    """Where the pipeline files lie: inside an installed package, beside it in a checkout."""
    package = Path(str(resources.files("drl_data")))
    installed = package / "pipelines"
    return installed if installed.is_dir() else package.parent / "pipelines"


def recipe_names() -> list[str]:
    """Names of the files, without `.yaml`."""
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """The file of a recipe.

    Raises:
        SpecError: if there is none, naming the nearest.
    """
    path = recipe_folder() / f"{name.removesuffix('.yaml')}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(name, recipe_names(), n=3, cutoff=0.3)
        known = ", ".join(near or recipe_names())
        raise SpecError(f"no recipe {name!r}; nearest: {known} (`drl recipes` lists them)")
    return path
