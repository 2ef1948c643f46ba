"""`python -m tests.faulty_extract PIPELINE.yaml FAULTS.json`: extract where faults lie in wait.

A fault with the victim "driver" is for this process. Everything else is as `drl extract` does it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from drl_data import runs
from drl_data.extract import ExtractTask, make_task
from drl_data.pipeline import Pipeline
from drl_data.testing import Fault, PoisonImage, make_faulty_task


def make(faults: Sequence[Fault | PoisonImage], *args: object, **kwargs: object) -> ExtractTask:
    """In place of `make_task` in runs.py."""
    return make_faulty_task(faults, partial(make_task, *args, **kwargs))  # type: ignore[arg-type]


def extract_with(pipeline: Pipeline, faults: Sequence[Fault | PoisonImage]) -> runs.RunSummary:
    """`extract`, with faults in every process that computes."""
    runs.make_task, plain = partial(make, faults), runs.make_task  # type: ignore[assignment]
    try:
        return runs.extract(pipeline)
    finally:
        runs.make_task = plain


def main() -> None:
    found = json.loads(Path(sys.argv[2]).read_text())
    victims = {"driver": os.getpid()}
    faults = [Fault(**{**one, "victim": victims.get(v := one["victim"], v)}) for one in found]
    summary = extract_with(Pipeline.load(sys.argv[1]), faults)
    assert not summary.failed, summary.failed


if __name__ == "__main__":
    importlib.import_module("tests.faulty_extract").main()  # where children find `make`
