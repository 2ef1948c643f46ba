"""Python code that a pipeline names: `python:package.module:factory`.

Naming it is the consent: the module must be installed or on PYTHONPATH already, nothing is
downloaded.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable

from drl_data.errors import SpecError

PYTHON = "python:"

_FACTORY = re.compile(r"^python:(?P<module>[A-Za-z_][\w.]*):(?P<name>[A-Za-z_]\w*)$")


def load_factory(name: str, place: str) -> Callable[..., object]:
    """The function that `name` names; `place` is the key of the pipeline file that has it.

    Raises:
        SpecError: a name of another form, or of nothing that can be imported.
    """
    match = _FACTORY.match(name)
    if match is None:
        raise SpecError(f"{place} {name!r}: want python:package.module:factory")
    try:
        found = getattr(importlib.import_module(match["module"]), match["name"])
    except (ImportError, AttributeError) as error:
        raise SpecError(
            f"{place} {name!r}: {error}; the module must be installed or on PYTHONPATH"
        ) from error
    if not callable(found):
        raise SpecError(f"{place} {name!r} is a {type(found).__name__}; want a function")
    function: Callable[..., object] = found
    return function
