"""Staged pruning against an independent simulation on whole tables; weights; what is counted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_rel
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix, top_k_accuracy_score

from drl_data.diffusion_spec import ScheduleSpec
from drl_data.errors import SpecError
from drl_data.schedule import NoiseSchedule
from drl_data.schedule_edm import EDMSchedule
from drl_data.schedule_flow import FlowSchedule
from drl_data.score_spec import LearnedWeights, ScoreSpec, StageSpec
from drl_data.score_tables import Tally, classes_of, curve_samples, final_scores, sample_part
from drl_data.score_weights import learn_weights, rule_weights
from drl_data.spec import ResolvedTime
from drl_data.stages import (
    Losses,
    Places,
    Stage,
    StagedLosses,
    evaluate,
    even_places,
    order_of,
    plan_stages,
)

Table = Losses


def li_places(total: int, n: int) -> list[int]:
    """The published code's choice of timesteps (`eval_prob_adaptive.py`)."""
    grid = list(range(total))
    return grid[len(grid) // n // 2 :: len(grid) // n][:n]


def simulated(
    table_ctm: Table, plan: Sequence[Stage], weights: Sequence[float]
) -> tuple[int, list[list[int]]]:
    """One image, candidate by candidate, in plain Python: (winner, those in each stage)."""
    left = list(range(len(table_ctm)))
    seen: list[int] = []
    alive = []
    for stage in plan:
        alive.append(list(left))
        seen += stage.places

        def samples(c: int, seen: Sequence[int] = tuple(seen)) -> list[float]:
            return [weights[t] * float(x) for t in seen for x in table_ctm[c, t]]

        left = sorted(left, key=lambda c: (sum(samples(c)), c))
        winner = left[0]
        if stage.p_value is not None and len(samples(0)) > 1:
            left = [
                c
                for c in left
                if c == winner or not ttest_rel(samples(c), samples(winner)).pvalue < stage.p_value
            ]
        if stage.keep is not None:
            left = left[: stage.keep]
        left = sorted(left)
        if len(left) == 1:
            break
    return winner, alive


def staged_on(table_bctm: Table, plan: Sequence[Stage], weights: Sequence[float]) -> StagedLosses:
    asked: list[tuple[int, int, int]] = []

    def losses(places: Sequence[int], images: Places, candidates: Places) -> Losses:
        found = table_bctm[images, candidates][:, list(places)]
        for b, c in zip(images.tolist(), candidates.tolist(), strict=True):
            asked.extend((b, c, t) for t in places)
        return found

    n, n_candidates, _, n_members = table_bctm.shape
    found = evaluate(
        losses, np.ones(n, np.bool_), n_candidates, n_members, plan, np.array(weights, float)
    )
    assert len(set(asked)) == len(asked)  # nothing twice
    return found


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.data())
def test_stages_are_the_simulation(data: st.DataObject) -> None:
    n_candidates, n_times, n_members = (data.draw(st.integers(1, m)) for m in (7, 12, 2))
    numbers = sorted(data.draw(st.sets(st.integers(1, n_times), min_size=1, max_size=4)))
    specs = []
    for n in numbers[:-1]:
        keep = data.draw(st.one_of(st.none(), st.integers(1, n_candidates)))
        p = data.draw(st.sampled_from([None, 0.05, 0.4]))
        specs.append(StageSpec(timesteps=n, keep=keep, p_value=p))
    plan = plan_stages([*specs, StageSpec(timesteps=numbers[-1])], n_times)
    weights = data.draw(st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=n_times,
                                 max_size=n_times))  # fmt: skip
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    table = rng.random((4, n_candidates, n_times, n_members), np.float32)
    found = staged_on(table, plan, weights)
    scores = final_scores(found, np.array(weights)[list(found.order)])
    for b in range(4):
        winner, alive = simulated(table[b], plan, weights)
        assert found.stage_bc[b].max() == len(alive)
        for number, candidates in enumerate(alive, start=1):
            assert np.flatnonzero(found.stage_bc[b] >= number).tolist() == candidates
        assert np.lexsort((scores[b], -found.stage_bc[b]))[0] == winner
    stops = np.cumsum([0, *(len(stage.places) for stage in plan)])[found.stage_bc]
    is_seen = np.arange(len(found.order)) < stops[:, :, None]
    np.testing.assert_array_equal(np.isnan(found.losses_bckm).all(3), ~is_seen)
    np.testing.assert_array_equal(found.losses_bckm[is_seen], table[:, :, found.order][is_seen])


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 60), st.integers(2, 20))
def test_the_published_codes_timesteps(n: int, factor: int) -> None:
    total = n * factor
    assert even_places(total, n) == li_places(total, n)
    given_times = ScheduleSpec.model_validate({"timesteps": {"even": n, "of": total}}).timesteps
    start = total // n // 2
    assert list(given_times) == list(range(start, total, total // n))[:n]


@settings(deadline=None, derandomize=True)
@given(st.data())
def test_even_places_are_distinct_and_even(data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 200))
    n = data.draw(st.integers(1, total))
    places = even_places(total, n)
    assert len(set(places)) == n
    assert 0 <= places[0] <= places[-1] < total
    assert abs(places[0] - (total - 1 - places[-1])) <= 1
    gaps = set(np.diff(places).tolist())
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_imagenets_stages_as_published() -> None:
    """`--n_samples 50 100 500 1000 --to_keep 500 50 10 1`: each timestep once."""
    specs = ScoreSpec.model_validate(
        {"stages": [[50, 500], [100, 50], [500, 10], [1000, 1]]}
    ).stages
    plan = plan_stages(specs, 1000)
    seen: list[int] = []
    for n, stage in zip((50, 100, 500, 1000), plan, strict=True):
        assert list(stage.places) == [t for t in li_places(1000, n) if t not in seen]
        seen += stage.places
    assert sorted(order_of(plan)) == list(range(1000))


def test_times_of_a_flow_and_numbers_that_do_not_divide() -> None:
    assert ScheduleSpec.model_validate(
        {"convention": "flow", "timesteps": {"even": 4, "of": 1}}
    ).timesteps == (0.125, 0.375, 0.625, 0.875)
    assert ScheduleSpec.model_validate({"timesteps": {"even": 3, "of": 10}}).timesteps == (1, 5, 8)
    with pytest.raises(ValueError, match="11 of 10; want at least 1"):
        ScheduleSpec.model_validate({"timesteps": {"even": 11, "of": 10}})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stages": [[4, 5], [4, 1]]}, "4 timesteps after 4"),
        ({"stages": [4, 8]}, "all but the last want keep or p_value"),
        ({"stages": [[4, 5], [8, 5], [9, 1]]}, "keep 5 after 5; want fewer"),
        ({"stages": [[4, 5], [8, 2]]}, "the best candidate is taken; keep 1"),
        ({"stages": [4], "weights": {"split": "train"}}, "stages make none"),
        ({"stages": [4], "view": "hflip"}, "view is of a store"),
        ({"url": "x"}, "without stages there are none"),
        ({"weights": [1, -1]}, "want none negative"),
        ({"weights": [0, 0]}, "not all 0"),
    ],
)
def test_sections_that_do_not_make_sense(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScoreSpec.model_validate(fields)


def test_more_timesteps_than_the_schedule() -> None:
    with pytest.raises(SpecError, match=r"9 timesteps, schedule.timesteps has 8"):
        plan_stages([StageSpec(timesteps=9)], 8)


def test_a_loss_that_is_not_finite_never_wins() -> None:
    table = np.ones((1, 3, 2, 1), np.float32)
    table[0, 1] = np.nan
    table[0, 2, :, 0] = 2
    found = staged_on(table, [Stage((0,), keep=3), Stage((1,))], [1, 1])
    assert found.stage_bc.tolist() == [[2, 1, 2]]


# --- weights ------------------------------------------------------------------------------------

WHEN = (0.2, 0.6)
SCHEDULES = {
    "epsilon": NoiseSchedule(DDPMScheduler().alphas_cumprod),
    "v_prediction": NoiseSchedule(DDPMScheduler().alphas_cumprod, "v_prediction"),
    "sample": NoiseSchedule(DDPMScheduler().alphas_cumprod, "sample"),
    "flow": FlowSchedule(),
    "edm": EDMSchedule(),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_weighted_losses_are_errors_of_x0(name: str) -> None:
    """x0's own squared error, with whatever the network predicts."""
    schedule = SCHEDULES[name]
    spec = {
        "flow": ScheduleSpec(convention="flow", timesteps=WHEN),
        "edm": ScheduleSpec(convention="edm_sigma", timesteps=WHEN),
    }.get(name, ScheduleSpec(timesteps=(200, 600)))
    times = schedule.resolve(spec)
    torch.manual_seed(0)
    for i, time in enumerate(times):
        clean, eps, output = torch.randn(3, 1, 3, 4, 4, dtype=torch.float64)
        noisy = time.alpha * clean + time.sigma * eps
        own = (output - schedule.target(clean, eps, time)).square().mean()
        of_x0 = (schedule.predicted("x0", output, noisy, time) - clean).square().mean()
        snr = (time.alpha / time.sigma) ** 2
        found = {
            rule: rule_weights(rule, times, schedule, "loss")[i] * float(own)  # type: ignore[arg-type]
            for rule in ("x0", "snr", "truncated_snr", "min_snr", "exp")
        }
        assert found["x0"] == pytest.approx(float(of_x0), rel=1e-4)
        assert found["snr"] == pytest.approx(snr * float(of_x0), rel=1e-4)
        assert found["truncated_snr"] == pytest.approx(max(snr, 1) * float(of_x0), rel=1e-4)
        assert found["min_snr"] == pytest.approx(min(snr, 5) * float(of_x0), rel=1e-4)
        t = np.arctan(time.sigma / time.alpha) * 2 / np.pi
        assert found["exp"] == pytest.approx(np.exp(-7 * t) * float(of_x0), rel=1e-4)


def test_snr_weights_of_an_epsilon_network_are_uniform() -> None:
    times = SCHEDULES["epsilon"].resolve(ScheduleSpec(timesteps=(1, 500, 999)))
    weights = rule_weights("snr", times, SCHEDULES["epsilon"], "loss")
    np.testing.assert_allclose(weights, 1, rtol=1e-5)


def test_rules_are_of_squared_errors_and_of_noise() -> None:
    times = SCHEDULES["epsilon"].resolve(ScheduleSpec(timesteps=(1,)))
    with pytest.raises(SpecError, match=r"the tap is loss\.l1"):
        rule_weights("exp", times, SCHEDULES["epsilon"], "loss.l1")
    clean = ResolvedTime(requested=0, convention="flow", model_time=0, alpha=1, sigma=0)
    with pytest.raises(SpecError, match="not finite at timestep 0"):
        rule_weights("snr", [clean], SCHEDULES["flow"], "loss")


def test_learned_weights_find_the_timestep_that_tells() -> None:
    """Of four timesteps one tells the class, one tells it half as well, two are noise."""
    rng = np.random.default_rng(0)
    n, n_classes = 400, 5
    labels = rng.integers(0, n_classes, n)
    losses = rng.standard_normal((n, n_classes, 4)) * np.array([1, 1, 100, 0.1])
    own = np.arange(n_classes) == labels[:, None]
    losses[..., 0] -= 1.5 * own
    losses[..., 3] -= 0.075 * own
    classes = np.arange(n_classes)
    weights = learn_weights(losses, classes, labels)
    assert weights.sum() == pytest.approx(1)
    assert (weights >= 0).all()
    share = weights * np.array([1, 1, 100, 0.1])  # by spread
    share /= share.sum()
    assert share[0] > 0.5
    assert 0.2 < share[3] < 0.5
    assert share[1] + share[2] < 0.1
    right = ((losses @ weights).argmin(1) == labels).mean()
    assert right > (losses[..., 0].argmin(1) == labels).mean()
    # with two classes this is a logistic regression on the difference of the losses
    pair = losses[labels < 2][:, :2]
    two = labels[labels < 2]
    learned = learn_weights(pair, np.arange(2), two) * np.array([1, 1, 100, 0.1])
    x = (pair[:, 0] - pair[:, 1]) / np.array([1, 1, 100, 0.1])
    model = LogisticRegression(C=1e3, fit_intercept=False).fit(x, two)
    coefficients = model.coef_[0]
    assert learned[3] / learned[0] == pytest.approx(coefficients[3] / coefficients[0], rel=0.1)


def test_weights_with_several_prompts_of_a_class() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 200)
    classes = np.array([0, 0, 1, 1])
    losses = rng.standard_normal((200, 4, 2))
    losses[..., 0] -= 2.0 * (np.array([0, 2, 1, 3])[None] == labels[:, None] * 1)  # one prompt each
    weights = learn_weights(losses, classes, labels)
    assert weights[0] > 3 * weights[1]
    assert LearnedWeights(split="train").rows == 2000


# --- what is counted ----------------------------------------------------------------------------


def tally_of(table: Table, labels: Places, weights: Sequence[float] | None = None) -> Tally:
    n, n_candidates, n_times, n_members = table.shape
    tally = Tally(
        classes_of(tuple(range(n_candidates)), (), None), curve_samples(n_times, n_members)
    )
    w = np.ones(n_times) if weights is None else np.array(weights, float)
    for start in range(0, n, 7):  # in parts, as it comes
        part = table[start : start + 7]
        found = StagedLosses(
            part, np.ones(part.shape[:2], np.int16), (Stage(tuple(range(n_times))),)
        )
        tally.add(np.arange(start, start + len(part)), labels[start : start + 7], found, w)
    return tally


def test_counts_of_a_whole_table_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 8, 60)
    table = rng.random((60, 8, 5, 2), np.float32)
    table[np.arange(60), labels] -= 0.1
    weights = [1, 0, 2, 0.5, 3]
    tally = tally_of(table, labels, weights)
    mean = (table.mean(3) * np.array(weights)).sum(2) / sum(weights)
    hits = np.concatenate(tally.hits)
    for k, column in ((1, 0), (5, 1)):
        want = top_k_accuracy_score(labels, -mean, k=k, labels=range(8))
        assert hits[:, column].mean() == pytest.approx(want)
    top = np.concatenate(tally.top)
    np.testing.assert_array_equal(top, np.argsort(mean, axis=1)[:, :5])
    np.testing.assert_allclose(
        np.concatenate(tally.top_scores), np.sort(mean, axis=1)[:, :5], rtol=1e-5
    )
    by_time = np.concatenate(tally.timestep_hits)
    np.testing.assert_array_equal(by_time, table.mean(3).argmin(1) == labels[:, None])
    assert confusion_matrix(labels, top[:, 0]).trace() == hits[:, 0].sum()


@pytest.mark.parametrize(
    ("n_times", "n_members", "want"),
    [(1, 1, [1]), (5, 1, [1, 2, 4, 5]), (4, 1, [1, 2, 4]), (4, 3, [1, 2, 4, 8, 12]),
     (1, 4, [1, 2, 4])],
)  # fmt: skip
def test_the_curves_samples(n_times: int, n_members: int, want: list[int]) -> None:
    assert curve_samples(n_times, n_members) == want
    table = np.arange(n_times * n_members, dtype=np.float32).reshape(1, 1, n_times, n_members)
    for n in want:
        part, weights = sample_part(table, np.ones(n_times), n)
        assert part.size == n
        assert len(weights) == part.shape[2]


def test_the_curve_ends_with_the_answer() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 50)
    table = rng.random((50, 4, 6, 2), np.float32)
    tally = tally_of(table, labels)
    hits = np.concatenate(tally.point_hits)
    assert tally.samples == [1, 2, 4, 6, 12]
    np.testing.assert_array_equal(hits[:, -1], np.concatenate(tally.hits)[:, 0])
    np.testing.assert_array_equal(hits[:, 0], table[:, :, 3, 0].argmin(1) == labels)
    np.testing.assert_array_equal(
        np.concatenate(tally.point_evaluations), np.tile([4, 8, 16, 24, 48], (50, 1))
    )


def test_the_curve_of_stages_is_what_each_would_answer() -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 6, 40)
    table = rng.random((40, 6, 8, 1), np.float32)
    plan = plan_stages(
        [StageSpec(timesteps=2, p_value=0.2), StageSpec(timesteps=4, keep=2),
         StageSpec(timesteps=8)], 8
    )  # fmt: skip
    found = staged_on(table, plan, [1] * 8)
    tally = Tally(classes_of(tuple(range(6)), (), None), [2, 4, 8])
    tally.add(np.arange(40), labels, found, np.ones(len(found.order)))
    hits = np.concatenate(tally.point_hits)
    for b in range(40):
        for i in range(3):
            winner, alive = simulated(table[b], plan[: i + 1], [1] * 8)
            assert hits[b, i] == (winner == labels[b])
            cost = sum(len(a) * len(s.places) for a, s in zip(alive, plan, strict=False))
            assert tally.point_evaluations[0][b, i] == cost
    np.testing.assert_array_equal(tally.evaluations[0], tally.point_evaluations[0][:, -1])


# --- classes ------------------------------------------------------------------------------------


def test_classes_of_prompts_by_name_by_place_and_as_told() -> None:
    by_name = classes_of(("dog", "cat", "yak"), (), ("cat", "dog", "emu"))
    assert by_name.names == ("dog", "cat", "yak")
    assert by_name.of(np.array([0, 1, 2, -1])).tolist() == [1, 0, -1, -1]
    by_place = classes_of(("a", "b"), (), None)
    assert by_place.of(np.array([0, 1, 2])).tolist() == [0, 1, -1]
    told = classes_of(("a cat", "a kitten", "a dog"), ("cat", "cat", "dog"), ("cat", "dog"))
    assert told.names == ("cat", "dog")
    assert told.of_candidates.tolist() == [0, 0, 1]
    numbers = classes_of((3, 7), (), ("a", "b", "c", "d"))
    assert numbers.names == ("d", "7")
    assert numbers.of(np.array([3, 0])).tolist() == [0, -1]


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ((1,), None, "1 for 2 candidates"),
        ((), ("x", "y"), "no candidate is the name of a label"),
        (("x", "y"), None, "are numbers; want numbers"),
    ],
)
def test_classes_that_cannot_be_told(
    labels: tuple[str | int, ...], names: tuple[str, ...] | None, message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        classes_of(("a photo of x", "a photo of y"), labels, names)


def test_the_best_of_a_classs_prompts_counts() -> None:
    table = np.array([[3, 1, 2], [1, 3, 2], [9, 8, 1]], np.float32).reshape(3, 3, 1, 1)
    classes = classes_of(("a", "b", "c"), (0, 0, 1), None)
    tally = Tally(classes, [1])
    found = StagedLosses(table, np.ones((3, 3), np.int16), (Stage((0,)),))
    tally.add(np.arange(3), np.array([0, 1, 1]), found, np.ones(1))
    assert tally.hits[0][:, 0].tolist() == [True, False, True]
    assert tally.hits[0][:, 1].all()
