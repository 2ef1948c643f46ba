"""Noise belongs to the sample: a function of seed, key and member, and of nothing else."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from drl_data.noise import batch_noise, draw_normal
from drl_data.spec import NoiseSpec

SHAPE = (2, 3, 3)
KEYS = st.lists(st.text(max_size=8), min_size=1, max_size=8)


@given(KEYS, st.data())
def test_noise_ignores_batching_and_order(keys: list[str], data: st.DataObject) -> None:
    spec = NoiseSpec(seed=3)
    whole = batch_noise(spec, keys, SHAPE)
    order = data.draw(st.permutations(range(len(keys))))
    cut = data.draw(st.integers(0, len(keys)))
    for part in (order[:cut], order[cut:]):
        if part:
            assert torch.equal(batch_noise(spec, [keys[i] for i in part], SHAPE), whole[list(part)])


def test_noise_is_golden() -> None:
    """Another NumPy or processor must draw the same numbers, or stores cannot be compared."""
    got = draw_normal((4,), "noise", 0, "key", "digit-0001", 0, "all")
    want = [1.0294491052627563, 0.9692478179931641, -1.508581519126892, 0.8739451766014099]
    np.testing.assert_array_equal(got, np.array(want, dtype=np.float32))


def test_every_ingredient_matters_and_nothing_is_glued_together() -> None:
    spec = NoiseSpec(seed=1, per_timestep=True, members=2)
    draws = [
        batch_noise(spec, ["a"], SHAPE, member=0, timestep=10),
        batch_noise(spec, ["b"], SHAPE, member=0, timestep=10),
        batch_noise(spec, ["a"], SHAPE, member=1, timestep=10),
        batch_noise(spec, ["a"], SHAPE, member=0, timestep=11),
        batch_noise(spec, ["a"], SHAPE, member=0, timestep=10, role="posterior"),
        batch_noise(NoiseSpec(seed=2, per_timestep=True), ["a"], SHAPE, timestep=10),
    ]
    assert len({tuple(x.flatten().tolist()) for x in draws}) == len(draws)
    assert not np.array_equal(draw_normal((4,), "ab", "c"), draw_normal((4,), "a", "bc"))
    assert not np.array_equal(draw_normal((4,), "1"), draw_normal((4,), 1))


def test_one_draw_moves_along_the_schedule_unless_asked_otherwise() -> None:
    keys = ["a", "b"]
    at = [batch_noise(NoiseSpec(), keys, SHAPE, timestep=t) for t in (0, 500)]
    assert torch.equal(*at)


def test_shared_noise_is_one_tensor_for_all() -> None:
    noise = batch_noise(NoiseSpec(kind="shared"), ["a", "b", "c"], SHAPE)
    assert noise.shape == (3, *SHAPE)
    assert torch.equal(noise[0], noise[2])
    assert torch.equal(noise[0], batch_noise(NoiseSpec(kind="shared"), ["z"], SHAPE)[0])


def test_no_noise_is_none() -> None:
    assert batch_noise(NoiseSpec(kind="none"), ["a"], SHAPE) is None


def test_noise_is_standard_normal() -> None:
    x = batch_noise(NoiseSpec(), [f"k{i}" for i in range(200)], (1000,)).double()
    # 200,000 numbers: the standard error of the mean is 0.0022, of the variance 0.0032
    assert abs(float(x.mean())) < 0.011
    assert abs(float(x.var()) - 1) < 0.016
    assert abs(float((x[:-1] * x[1:]).mean())) < 0.011  # neighbours are independent
    assert abs(float((x.abs() > 1.96).double().mean()) - 0.05) < 0.0025
