"""The High-Frequency Ratio of a sweep: against gratings whose answer is known, and a plain loop."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.datasets import load_digits

from drl_data.job_specs import ProbeSpec
from drl_data.tasks.frequency import high_frequency_ratio, mean_ratio
from drl_data.tasks.probe import ProbeCell, ProbeResult, ProbeSource
from drl_data.tasks.sweep import with_frequencies
from tests.task_stores import noise, store_of, toy_index


def grating(cycles_y: int, cycles_x: int, side: int = 16) -> torch.Tensor:
    """[1, 1, side, side], so many cycles along each axis."""
    along = torch.arange(side, dtype=torch.float64)
    y, x = torch.meshgrid(along, along, indexing="ij")
    return torch.cos(2 * math.pi * (cycles_y * y + cycles_x * x) / side)[None, None]


def test_gratings() -> None:
    low, high = grating(1, 0), grating(0, 6)  # 1/16 and 6/16 of a cycle a pixel; the cut is 1/4
    for x, want in ((low, 0.0), (high, 1.0), (3 * low + 2 * high, 4 / 13)):
        assert high_frequency_ratio(x).item() == pytest.approx(want, abs=1e-12)
        assert high_frequency_ratio(x + 100).item() == pytest.approx(want, abs=1e-9)
    assert high_frequency_ratio(grating(4, 0)).item() < 1e-12  # just at the cut
    assert high_frequency_ratio(grating(3, 3)).item() == pytest.approx(1)  # a radius, not an axis
    channels = torch.cat([low, 2 * high], dim=1)
    assert high_frequency_ratio(channels).item() == pytest.approx(4 / 5)
    assert math.isnan(high_frequency_ratio(torch.full((1, 3, 8, 8), 1e4)).item())


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 4), st.integers(2, 7), st.integers(2, 7), st.integers(0, 99),
    st.floats(0.1, 0.9),
)  # fmt: skip
def test_against_a_loop(c: int, h: int, w: int, seed: int, cutoff: float) -> None:
    x = np.random.default_rng(seed).standard_normal((2, c, h, w)).astype(np.float32)
    got = high_frequency_ratio(torch.from_numpy(x), cutoff).numpy()
    for one, found in zip(x, got, strict=True):
        high = total = 0.0
        for channel in one:
            power = np.abs(np.fft.fft2(channel.astype(np.float64))) ** 2
            for i, fy in enumerate(np.fft.fftfreq(h)):
                for j, fx in enumerate(np.fft.fftfreq(w)):
                    if i or j:
                        total += power[i, j]
                        high += power[i, j] * (math.hypot(fy, fx) > cutoff / 2)
        assert found == pytest.approx(high / total, rel=1e-9, abs=1e-12)


def test_cells_of_a_store(tmp_path: Path) -> None:
    """Digits and digits in noise; only maps have it, and only the train rows count."""
    digits = load_digits().images[:80, None].astype(np.float32)
    maps = np.stack([digits, digits + 8 * noise(80, 1, 8, 8), np.full_like(digits, 3.0)])
    maps[:, 40:] = noise(3, 40, 1, 8, 8, seed=1)  # test rows
    vectors = noise(3, 80, 5)
    index = toy_index([row % 4 for row in range(80)], ["train"] * 40 + ["test"] * 40)
    store = store_of(tmp_path / "s", {"map": maps, "vec": vectors}, index, invalid=(2,))
    rows = np.array([row for row in range(40) if row != 2])
    ratios = [mean_ratio(store, "map", t, rows) for t in range(3)]
    want = high_frequency_ratio(torch.from_numpy(maps[0, rows])).mean().item()
    assert ratios[0] == pytest.approx(want)
    assert ratios[1] is not None
    assert ratios[0] < ratios[1]
    assert ratios[2] is None
    assert mean_ratio(store, "vec", 0, rows) is None

    def cell(tap: str, time: int, accuracy: float) -> ProbeCell:
        values = {"validation": (accuracy,), "validation_loss": (1.0,), "test": (accuracy,)}
        return ProbeCell(tap=tap, timestep=time, **values)  # type: ignore[arg-type]

    cells = tuple(cell(tap, time, 0.1 * time) for tap in ("map", "vec") for time in (10, 11, 12))
    source = ProbeSource(
        label="x", store=None, fingerprint=None, cells=cells, n_train=1, n_validation=1, n_test=1
    )
    result = ProbeResult(
        pipeline="x", spec=ProbeSpec(), n_classes=4, chance=0.25, majority=0.25,
        sources=(source,), device="cpu", seconds=0.0,
    )  # fmt: skip
    (found,) = with_frequencies(result, store).sources
    assert [c.high_frequency for c in found.cells] == [*ratios, None, None, None]
    assert found.by_frequency("map") == found.cells[1]
    assert found.by_frequency("vec") is None
    assert found.frequency_correlation is None  # two cells make no ranking

    def ranked(*pairs: tuple[float, float], tap: str = "map") -> list[ProbeCell]:
        return [
            cell(tap, t, accuracy).model_copy(update={"high_frequency": ratio})
            for t, (ratio, accuracy) in enumerate(pairs)
        ]

    one, two = (
        ranked((0.1, 0.5), (0.2, 0.6), (0.3, 0.9)),
        ranked((0.9, 0.1), (0.8, 0.2), (0.7, 0.3), tap="b"),
    )
    both = source.model_copy(update={"cells": (*one, *two)})
    assert both.frequency_correlation_of_taps == pytest.approx(0)  # 1 and -1
    assert both.frequency_correlation == pytest.approx(
        stats.spearmanr([0.1, 0.2, 0.3, 0.9, 0.8, 0.7], [0.5, 0.6, 0.9, 0.1, 0.2, 0.3]).statistic
    )
    same = source.model_copy(update={"cells": tuple(ranked((0.1, 0.5), (0.2, 0.5), (0.3, 0.5)))})
    assert same.frequency_correlation is None
