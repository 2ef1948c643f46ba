"""Distillation's losses against straight-line NumPy, whitening, regressors, dropped teachers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from drl_data.distill_losses import LOSSES, rkd_angle, rkd_distance, weighted
from drl_data.distill_spec import RegressorSpec
from drl_data.distillation import keep_teachers
from drl_data.regressors import Linear, Pyramid, Whitening, as_map, build_regressor
from drl_data.shards import Array
from tests.stores import make_array

B, C, H, W = 4, 3, 2, 5


@pytest.fixture(scope="module")
def pair() -> tuple[Tensor, Tensor]:
    """Predictions and targets, [b, c, h, w], float64."""
    generator = torch.Generator().manual_seed(0)
    return tuple(  # type: ignore[return-value]
        torch.randn(B, C, H, W, generator=generator, dtype=torch.float64) * 1.5 for _ in range(2)
    )


def huber(d: float) -> float:
    return d * d / 2 if abs(d) < 1 else abs(d) - 0.5


def by_hand(name: str, p: Array, t: Array) -> list[float]:
    """The loss of each image, entry by entry."""
    places = list(itertools.product(range(H), range(W)))
    entries = list(itertools.product(range(C), range(H), range(W)))
    found = []
    for b in range(B):
        if name == "mse":
            found.append(sum((p[b][e] - t[b][e]) ** 2 for e in entries) / len(entries))
        elif name == "smooth_l1":
            found.append(sum(huber(p[b][e] - t[b][e]) for e in entries) / len(entries))
        elif name == "cosine":
            total = 0.0
            for i, j in places:
                x, y = p[b, :, i, j], t[b, :, i, j]
                total += 1 - float(x @ y) / (math.sqrt(x @ x) * math.sqrt(y @ y))
            found.append(total / len(places))
        elif name == "attention":
            q_p = [sum(p[b, c, i, j] ** 2 for c in range(C)) for i, j in places]
            q_t = [sum(t[b, c, i, j] ** 2 for c in range(C)) for i, j in places]
            n_p, n_t = (math.sqrt(sum(x * x for x in q)) for q in (q_p, q_t))
            found.append(sum((x / n_p - y / n_t) ** 2 for x, y in zip(q_p, q_t, strict=True)))
    return found


@pytest.mark.parametrize("name", ["mse", "smooth_l1", "cosine", "attention"])
def test_losses_of_an_image(name: str, pair: tuple[Tensor, Tensor]) -> None:
    p, t = pair
    got = LOSSES[name](p, t)  # type: ignore[index]
    assert got.shape == (B,)
    assert got.numpy() == pytest.approx(by_hand(name, p.numpy(), t.numpy()), rel=1e-12)
    assert LOSSES[name](p, p).abs().max() < 1e-12  # type: ignore[index]


def test_relations_of_distances(pair: tuple[Tensor, Tensor]) -> None:
    """Park et al. 2019, eq. 5 and 6, pair by pair."""
    vectors = [x.mean((2, 3)).numpy() for x in pair]
    scaled = []
    for x in vectors:
        d = np.array([[math.dist(x[i], x[j]) for j in range(B)] for i in range(B)])
        mu = sum(d[i, j] for i in range(B) for j in range(B) if i != j) / (B * (B - 1))
        scaled.append(d / mu)
    want = [sum(huber(scaled[0][i, j] - scaled[1][i, j]) for j in range(B)) / B for i in range(B)]
    assert rkd_distance(*pair).numpy() == pytest.approx(want, rel=1e-9)
    p, t = pair
    assert rkd_distance(p, 7 * p + 3).max() < 1e-12  # scale and place do not matter
    assert rkd_distance(p, t).max() > 1e-3


def test_relations_of_angles(pair: tuple[Tensor, Tensor]) -> None:
    """Park et al. 2019, eq. 8, triple by triple."""
    vectors = [x.mean((2, 3)).numpy() for x in pair]

    def angle(x: Array, i: int, j: int, k: int) -> float:
        if j in (i, k):
            return 0.0
        e, f = x[i] - x[j], x[k] - x[j]
        return float(e @ f) / math.sqrt(float(e @ e) * float(f @ f))

    want = [
        sum(
            huber(angle(vectors[0], i, j, k) - angle(vectors[1], i, j, k))
            for i in range(B)
            for k in range(B)
        )
        / B**2
        for j in range(B)
    ]
    assert rkd_angle(*pair).numpy() == pytest.approx(want, rel=1e-9)


def test_relations_have_gradients_where_images_are_equal() -> None:
    p = torch.ones(3, 2, 1, 1, requires_grad=True)
    t = torch.randn(3, 2, 1, 1)
    (rkd_distance(p, t) + rkd_angle(p, t)).sum().backward()
    assert p.grad is not None
    assert bool(p.grad.isfinite().all())


def test_weights_of_losses(pair: tuple[Tensor, Tensor]) -> None:
    """DreamTeacher's: the squared error and ten times the attention's."""
    p, t = pair
    want = LOSSES["mse"](p, t) + 10 * LOSSES["attention"](p, t)
    assert torch.allclose(weighted({"mse": 1.0, "attention": 10.0}, p, t), want)


def test_whitening_of_each_timestep() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(5, [[[1.0]], [[30.0]], [[0.0]]], (2, 50, 3, 4, 4))  # two timesteps
    x[1] = 2 * x[1] - 40
    mean, variance = x.mean((1, 3, 4)), x.var((1, 3, 4))
    whiten = Whitening(torch.from_numpy(mean), torch.from_numpy(variance))
    time = torch.from_numpy(rng.integers(0, 2, 50))
    rows = x[time.numpy(), np.arange(50)]
    got = whiten(torch.from_numpy(rows).float(), time).numpy()
    scale = np.where(variance > 1e-9, 1 / np.sqrt(np.maximum(variance, 1e-9)), 0)
    want = (rows - mean[time.numpy()][:, :, None, None]) * scale[time.numpy()][:, :, None, None]
    assert np.abs(got - want).max() < 1e-4
    assert np.abs(got[:, 2]).max() == 0  # a channel that does not vary asks nothing


def test_layer_norm_is_over_the_channels_of_a_place(pair: tuple[Tensor, Tensor]) -> None:
    x = pair[0].numpy()
    nothing = torch.zeros(1, C, dtype=torch.float64)
    got = Whitening(nothing, nothing, "layer_norm")(pair[0]).numpy()
    std = np.sqrt(x.var(1, keepdims=True) + 1e-5)
    assert np.allclose(got, (x - x.mean(1, keepdims=True)) / std)
    assert Whitening(nothing, nothing, "none")(pair[0]) is pair[0]


ARRAYS = [
    make_array("map", (6, 4, 4), "float32"),
    make_array("tokens", (4, 5), "float32"),
    make_array("vector", (7,), "float32"),
]
CHANNELS = {"stage1": 8, "stage2": 12, "stage3": 16}


def maps() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sides = (16, 8, 4)
    return {
        stage: torch.randn(2, n, side, side, generator=generator)
        for (stage, n), side in zip(CHANNELS.items(), sides, strict=True)
    }


@pytest.mark.parametrize("kind", ["linear", "fpn"])
def test_regressors_give_each_target_its_shape(kind: str) -> None:
    spec = RegressorSpec.model_validate({"kind": kind, "channels": 10, "pools": [1, 2]})
    stages = ["stage1", "stage3", "stage2"]
    build = lambda seed: build_regressor(spec, CHANNELS, stages, ARRAYS, seed)  # noqa: E731
    one, same, other = build(0), build(0), build(1)
    for got, array in zip(one(maps()), ARRAYS, strict=True):
        stored = torch.zeros(2, *array.shape)
        assert got.shape == as_map(stored, array).shape
    equal = [torch.equal(a, b) for a, b in zip(one(maps()), same(maps()), strict=True)]
    assert all(equal)
    assert not torch.equal(one(maps())[0], other(maps())[0])


@pytest.mark.parametrize("kind", ["linear", "fpn"])
def test_every_weight_of_a_regressor_is_trained(kind: str) -> None:
    spec = RegressorSpec.model_validate({"kind": kind, "channels": 10})
    regressor = build_regressor(spec, CHANNELS, ["stage2", "stage2", "stage3"], ARRAYS, 0)
    inputs = {stage: x.requires_grad_() for stage, x in maps().items()}
    torch.stack([x.square().mean() for x in regressor(inputs)]).sum().backward()
    for name, parameter in regressor.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert inputs["stage1"].grad is None  # no target is of it, nor of a deeper one


def test_a_shallow_level_of_the_pyramid_knows_the_deepest_stage() -> None:
    """What a linear head of stage 1 cannot see; and deeper levels do not see shallower ones."""
    array = [ARRAYS[0]]
    shallow = Pyramid(RegressorSpec(kind="fpn", channels=10), CHANNELS, ["stage1"], array)
    deep = Pyramid(RegressorSpec(kind="fpn", channels=10), CHANNELS, ["stage3"], array)
    linear = Linear(CHANNELS, ["stage1"], array)
    for regressor, seen in ((shallow, (1, 2, 3)), (deep, (3,)), (linear, (1,))):
        inputs = {stage: x.requires_grad_() for stage, x in maps().items()}
        regressor(inputs)[0].sum().backward()
        got = tuple(i for i, x in enumerate(inputs.values(), 1) if x.grad is not None)
        assert got == seen


def test_dropped_teachers() -> None:
    losses = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0))
    draws = torch.rand(4000, 3, generator=torch.Generator().manual_seed(1))
    kept = keep_teachers(losses, draws, 0.5)
    worst = losses.argmax(1)
    assert kept.gather(1, worst[:, None]).min() == 1  # never the one that is matched worst
    others = kept.sum(1) - 1
    assert others.mean().item() == pytest.approx(1.0, abs=0.05)  # of two, one on the average
    assert keep_teachers(losses, draws, 0.0).min() == 1
