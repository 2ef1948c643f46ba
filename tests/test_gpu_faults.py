"""Faults of a real GPU; benchmarks/gpu_faults.py provokes them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "gpu_faults.py"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("fault", ["batch", "image", "model", "assert"])
def test_a_fault_of_the_gpu_is_named_and_costs_no_row(fault: str) -> None:
    done = subprocess.run([sys.executable, str(BENCHMARK), fault], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["ok"] is True
