"""Importing the package is cheap and starts nothing; its public names are real."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import drl_data

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "ray", "diffusers", "transformers", "zarr", "sklearn", "matplotlib")


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["drl_data", "drl_data.cli", "drl_data.spec", "drl_data.plan"])
def test_importing_pulls_in_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])"
    assert python(code) == "[]"


@pytest.mark.parametrize("module", ["drl_data.extract", "drl_data.runs", "drl_data.datasets"])
def test_the_compute_rooms_start_neither_ray_nor_cuda(module: str) -> None:
    code = (
        f"import sys, {module}, torch;"
        "print([m for m in ('ray', 'diffusers', 'transformers') if m in sys.modules],"
        "torch.cuda.is_initialized())"
    )
    assert python(code) == "[] False"


def test_every_public_name_is_there_and_documented() -> None:
    assert sorted(drl_data.__all__) == drl_data.__all__
    assert set(drl_data.__all__) == set(drl_data._HOME)
    for name in drl_data.__all__:
        assert getattr(drl_data, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = drl_data.nothing


def test_import_time_is_well_under_a_second() -> None:
    """Counted in modules, which do not depend on the machine: the standard library and little."""
    n = int(
        python("import sys; a = len(sys.modules); import drl_data; print(len(sys.modules) - a)")
    )
    assert n < 40
