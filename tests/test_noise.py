"""Noise belongs to the sample: a function of seed, key and member, and of nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drl_data.diffusion_spec import NoiseSpec
from drl_data.errors import SpecError
from drl_data.noise import batch_noise, draw_normal, draw_uniform, noise_shape

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


def test_uniform_noise_is_uniform_and_the_samples_own() -> None:
    spec = NoiseSpec(kind="uniform")
    x = batch_noise(spec, [f"k{i}" for i in range(200)], (1000,)).double()
    # 200,000 numbers: the standard error of the mean is 0.00065, of the variance 0.00017
    assert 0 <= float(x.min()) < 1e-4
    assert 1 - 1e-4 < float(x.max()) < 1
    assert abs(float(x.mean()) - 0.5) < 0.0033
    assert abs(float(x.var()) - 1 / 12) < 0.0009
    assert torch.equal(batch_noise(spec, ["k3"], (1000,))[0].double(), x[3])


def test_uniform_noise_is_golden() -> None:
    got = draw_uniform((3,), "noise", 0, "key", "digit-0001", 0, "all")
    want = [0.4629976749420166, 0.902840256690979, 0.9447093605995178]
    np.testing.assert_array_equal(got, np.array(want, dtype=np.float32))


def test_shared_noise_is_interpolated_from_its_base() -> None:
    """ODISE's 64 x 64 for other sizes: bicubic, which is no longer of unit variance."""
    based = NoiseSpec(kind="shared", shared_base=16)
    small = torch.from_numpy(draw_normal((4, 16, 16), "noise", 0, "shared", 0, "all"))
    want = torch.nn.functional.interpolate(
        small[None], size=(24, 40), mode="bicubic", align_corners=False
    )
    got = batch_noise(based, ["a", "b"], (4, 24, 40))
    assert torch.equal(got, want.expand(2, -1, -1, -1))
    assert float(got.var()) < 0.9
    assert torch.equal(batch_noise(based, ["a"], (4, 16, 16))[0], small)
    native = batch_noise(NoiseSpec(kind="shared"), ["a"], (4, 16, 16))
    assert torch.equal(native[0], small)


def test_a_bank_has_one_tensor_for_each_timestep_and_member_whoever_asks() -> None:
    spec = NoiseSpec(kind="bank", members=2)
    draws = {
        (t, m): batch_noise(spec, ["a", "b"], SHAPE, timestep=t, member=m)
        for t in (10, 10.5, 20)
        for m in (0, 1)
    }
    assert len({tuple(x[0].flatten().tolist()) for x in draws.values()}) == len(draws)
    for (t, m), x in draws.items():
        assert torch.equal(x[0], x[1])
        assert torch.equal(x[0], batch_noise(spec, ["z"], SHAPE, timestep=t, member=m)[0])


def test_timesteps_that_round_to_one_number_have_their_own_noise() -> None:
    spec = NoiseSpec(per_timestep=True)
    at = [batch_noise(spec, ["a"], SHAPE, timestep=t) for t in (0.26, 0.09, 0)]
    assert not torch.equal(at[0], at[1])
    assert not torch.equal(at[1], at[2])
    assert torch.equal(at[2], batch_noise(spec, ["a"], SHAPE, timestep=0.0))


def test_a_mask_has_one_number_a_patch() -> None:
    spec = NoiseSpec(kind="patch_mask", patch=4)
    got = batch_noise(spec, ["a"], (3, 8, 12))
    assert got.shape == (1, 1, 2, 3)
    want = draw_uniform((1, 2, 3), "noise", 0, "key", "a", 0, "all")
    np.testing.assert_array_equal(got[0].numpy(), want)
    with pytest.raises(SpecError, match=r"noise\.patch 4: .* do not tile 8x10"):
        noise_shape(spec, (3, 8, 10))


def test_an_inversion_draws_nothing() -> None:
    assert batch_noise(NoiseSpec(kind="inversion"), ["a"], SHAPE) is None
