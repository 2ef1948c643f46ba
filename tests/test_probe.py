"""The probe: what it learns, what it never sees, how it is reported."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from typer.testing import CliRunner

from drl_data import linear_probes
from drl_data.cli import app
from drl_data.errors import InputError, SpecError, UserError
from drl_data.intervals import t_interval, wilson_interval
from drl_data.job_specs import AttentiveSpec, KnnSpec, ProbeSpec
from drl_data.linear_probes import HeadwiseAdamW, LinearProbes, PooledFeatures, ProbeSplit
from drl_data.pipeline import Pipeline, StoreSpec
from drl_data.recipes import find_recipe
from drl_data.shards import Array
from drl_data.splits import is_validation
from drl_data.store import FeatureStore
from drl_data.tasks.attentive import as_tokens
from drl_data.tasks.knn_probe import knn_accuracy
from drl_data.tasks.probe import (
    ProbeCell,
    ProbeResult,
    ProbeSource,
    format_table,
    run_probe,
)
from drl_data.tasks.sweep import some_samples
from tests.stores import make_array
from tests.task_stores import N_CLASSES, digits_index, noise, pipeline_of, store_of, toy_index

N_TRAIN, N_TEST = 600, 200
N = N_TRAIN + N_TEST
LABELS = np.random.default_rng(1).integers(0, N_CLASSES, N)
SPLITS = ["train"] * N_TRAIN + ["test"] * N_TEST
QUICK = ProbeSpec(epochs=15, seeds=(0, 1), pixels=False, learning_rate=(0.05,))


pytestmark = pytest.mark.usefixtures("module_on_one_thread")


def pipeline(store: FeatureStore, results: Path, spec: ProbeSpec = QUICK) -> Pipeline:
    return pipeline_of(store, results, probe=spec)


def clusters(labels: Array = LABELS, n_channels: int = 8, strength: float = 6.0) -> Array:
    """One Gaussian cluster per class, [n, channel]."""
    centres = np.random.default_rng(7).standard_normal((N_CLASSES, n_channels)) * strength
    return (centres[labels] + noise(len(labels), n_channels)).astype(np.float32)


def cell(result: ProbeResult, tap: str, timestep: float, source: int = 0) -> ProbeCell:
    (found,) = [c for c in result.sources[source].cells if (c.tap, c.timestep) == (tap, timestep)]
    return found


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureStore, ProbeResult, Path]:
    """A store with a signal at (good, 11) and (map, 10) only, and its probe."""
    folder = tmp_path_factory.mktemp("probe")
    good = np.stack([noise(N, 8, seed=3), clusters()])
    maps = np.stack([np.tile(clusters()[:, :, None, None], (1, 1, 2, 3)), noise(N, 8, 2, 3)])
    maps += noise(*maps.shape, seed=4)  # the mean over space brings the signal back
    tokens = noise(2, N, 3, 5, seed=5)
    index = toy_index(LABELS.tolist(), SPLITS)
    store = store_of(folder / "store", {"good": good, "map": maps, "tokens": tokens}, index)
    return store, run_probe(pipeline(store, folder / "results")), folder


def test_separates_what_is_separable_and_nothing_else(
    toy: tuple[FeatureStore, ProbeResult, Path],
) -> None:
    _, result, _ = toy
    for tap, timestep in (("good", 11), ("map", 10)):
        assert min(cell(result, tap, timestep).test) > 0.99
        assert min(cell(result, tap, timestep).validation) > 0.99
    for tap, timestep in (("good", 10), ("map", 11), ("tokens", 10), ("tokens", 11)):
        # Four classes: chance is 25 %, four standard errors of 200 rows are 12 %.
        assert all(0.13 < p < 0.37 for p in cell(result, tap, timestep).test)
    assert (result.n_classes, result.chance) == (N_CLASSES, 0.25)
    (source,) = result.sources
    assert source.best in (cell(result, "good", 11), cell(result, "map", 10))
    counts = np.bincount(
        LABELS[:N_TRAIN][[not is_validation(f"key-{r:05d}", 0.15) for r in range(N_TRAIN)]]
    )
    assert result.majority == (LABELS[N_TRAIN:] == counts.argmax()).mean()


def test_shuffled_labels_are_at_chance(tmp_path: Path) -> None:
    shuffled = np.random.default_rng(5).permutation(LABELS)
    store = store_of(
        tmp_path / "store", {"good": clusters()[None]}, toy_index(shuffled.tolist(), SPLITS)
    )
    (source,) = run_probe(pipeline(store, tmp_path)).sources
    assert all(0.13 < p < 0.37 for p in source.cells[0].test)


def test_equals_logistic_regression_on_real_digits(tmp_path: Path) -> None:
    images, labels = load_digits(return_X_y=True)
    splits = np.where(np.arange(len(labels)) % 5 == 0, "test", "train")
    store = store_of(
        tmp_path / "store",
        {"pixels": images[None].astype(np.float32)},
        toy_index(labels.tolist(), splits.tolist()),
    )
    spec = ProbeSpec(pixels=False)
    (source,) = run_probe(pipeline(store, tmp_path, spec)).sources
    keys = store.index.table["key"].to_pylist()
    train = np.array(
        [s == "train" and not is_validation(k, 0.15) for s, k in zip(splits, keys, strict=True)]
    )
    mean, std = images[train].mean(0), images[train].std(0)
    x = (images - mean) / np.where(std > 0, std, 1)
    reference = LogisticRegression(max_iter=1000).fit(x[train], labels[train])
    want = reference.score(x[splits == "test"], labels[splits == "test"])
    assert abs(source.best.mean_test - want) < 0.02
    assert want > 0.94


def test_the_digest_of_the_key_chooses_validation(
    toy: tuple[FeatureStore, ProbeResult, Path],
) -> None:
    store, result, _ = toy
    split = ProbeSplit.of(store, QUICK)
    keys = store.index.table["key"].to_pylist()
    assert [keys[r] for r in split.validation] == [
        k for k in keys[:N_TRAIN] if is_validation(k, 0.15)
    ]
    assert sorted([*split.train, *split.validation]) == list(range(N_TRAIN))
    assert split.test.tolist() == list(range(N_TRAIN, N))
    assert 60 < len(split.validation) < 120
    wider = {k for k in keys if is_validation(k, 0.3)}
    assert {k for k in keys if is_validation(k, 0.15)} < wider
    assert result.sources[0].n_validation == len(split.validation)


def test_cells_together_learn_what_a_cell_learns_alone(
    toy: tuple[FeatureStore, ProbeResult, Path], tmp_path: Path
) -> None:
    store, together, _ = toy
    for array in store.arrays:
        whole = np.stack([store.read_rows(array.name, t, range(N)) for t in range(2)])
        alone = store_of(tmp_path / array.name, {array.name: whole[1:]}, store.index)
        (weights, data) = trained(alone)
        (all_weights, _) = trained(store)
        torch.testing.assert_close(
            weights.weight[array.name][0], all_weights.weight[array.name][1], rtol=1e-5, atol=1e-6
        )
        one = run_probe(pipeline(alone, tmp_path / "results"))
        assert cell(one, array.name, 10).test == cell(together, array.name, 11).test
        assert data.split.n_classes == N_CLASSES


def trained(store: FeatureStore, spec: ProbeSpec = QUICK) -> tuple[LinearProbes, PooledFeatures]:
    split = ProbeSplit.of(store, spec)
    data = PooledFeatures(store, spec, split, pixels=False)
    n_settings = len(spec.learning_rate) * len(spec.weight_decay)
    probes = LinearProbes(data.shapes, split.n_classes, spec.seeds, n_settings=n_settings)
    probes.standardise(data)
    for _ in probes.train(data, spec):
        pass
    return probes, data


def test_settings_together_learn_what_each_learns_alone(
    toy: tuple[FeatureStore, ProbeResult, Path], tmp_path: Path
) -> None:
    """Four pairs at once; a cell reports the pair that is best on validation."""
    store, _, _ = toy
    rates, decays = (1e-4, 0.05), (0.0, 5.0)
    many = QUICK.model_copy(update={"learning_rate": rates, "weight_decay": decays})
    together = trained(store, many)[0]
    alone = []
    for i, (rate, decay) in enumerate((r, d) for r in rates for d in decays):
        one = QUICK.model_copy(update={"learning_rate": (rate,), "weight_decay": (decay,)})
        heads = slice(2 * i, 2 * i + 2)
        weights = trained(store, one)[0]
        for name, weight in weights.weight.items():
            torch.testing.assert_close(
                together.weight[name][:, :, heads], weight, rtol=1e-4, atol=1e-6
            )
        alone.append((rate, decay, cell(run_probe(pipeline(store, tmp_path, one)), "good", 11)))
    best = max(alone, key=lambda found: found[2].rank())
    found = cell(run_probe(pipeline(store, tmp_path, many)), "good", 11)
    assert (found.learning_rate, found.weight_decay) == best[:2]
    assert found.validation == best[2].validation
    assert best[0] == 0.05  # the other rate is too low to learn in 15 epochs
    assert min(one[2].mean_validation for one in alone) < 0.97


def test_adamw_is_torchs() -> None:
    weight, bias = torch.randn(2, 5, 3, 4), torch.randn(2, 3, 4)
    mine = [weight.clone().requires_grad_(), bias.clone().requires_grad_()]
    theirs = [weight.clone().requires_grad_(), bias.clone().requires_grad_()]
    decay = torch.full((3, 1), 0.1)
    one = HeadwiseAdamW([(mine[0], decay), (mine[1], torch.zeros(3, 1))], torch.full((3, 1), 0.01))
    groups = [{"params": theirs[:1]}, {"params": theirs[1:], "weight_decay": 0.0}]
    two = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)
    for factor in (1.0, 0.5, 0.25):
        for weights in (mine, theirs):
            sum((w * w.detach().cos()).sum() for w in weights).backward()
        for group in two.param_groups:
            group["lr"] = 0.01 * factor
        one.step(factor)
        two.step()
        two.zero_grad()
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_rate_that_diverges_is_not_chosen(
    toy: tuple[FeatureStore, ProbeResult, Path], tmp_path: Path
) -> None:
    store, _, _ = toy
    spec = QUICK.model_copy(update={"learning_rate": (1e38, 0.05)})
    result = run_probe(pipeline(store, tmp_path, spec))
    for tap, timestep in (("good", 11), ("map", 10)):
        assert cell(result, tap, timestep).learning_rate == 0.05
        assert cell(result, tap, timestep).mean_test > 0.99
    only = QUICK.model_copy(update={"learning_rate": (1e38,)})
    run_probe(pipeline(store, tmp_path, only))
    ProbeResult.load(tmp_path / "probe.json")  # no NaN in JSON


def knn_store(tmp_path: Path, labels: Array) -> tuple[FeatureStore, Array]:
    images, _ = load_digits(return_X_y=True)
    splits = np.where(np.arange(len(labels)) % 5 == 0, "test", "train")
    x = images.astype(np.float32)[None, :, None, None].repeat(2, 0).reshape(2, -1, 64, 1, 1)
    store = store_of(tmp_path / "s", {"x": x}, toy_index(labels.tolist(), splits.tolist()))
    return store, images


def test_neighbours_vote_as_scikit_learns(tmp_path: Path) -> None:
    """Weights exp(cosine / T) on real digits; the best k by validation, train rows alone vote."""
    labels = load_digits(return_X_y=True)[1]
    store, images = knn_store(tmp_path, labels)
    spec = QUICK.model_copy(update={"epochs": 1, "knn": KnnSpec(k=(1, 20, 5000))})
    (source,) = run_probe(pipeline(store, tmp_path, spec)).sources
    assert [(c.tap, c.timestep) for c in source.knn] == [("x", 10), ("x", 11)]
    split = ProbeSplit.of(store, spec)
    x = images / np.linalg.norm(images, axis=1, keepdims=True)
    want = {}
    for k in (1, 20, len(split.train)):
        peer = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda d: np.exp(-d / 0.07)
        ).fit(x[split.train], labels[split.train])
        want[k] = [peer.score(x[rows], labels[rows]) for rows in (split.validation, split.test)]
    best = max(want, key=lambda k: want[k][0])
    found = source.best_knn
    assert found is not None
    assert found.k == best
    assert (found.validation, found.test) == pytest.approx(want[best], abs=2e-3)
    assert found.test > 0.97
    assert found.test_top5 is not None
    assert found.test < found.test_top5 <= 1
    low, high = source.knn_interval
    assert low < found.test < high
    assert source.best.test_top5[0] > source.best.test[0]


def test_neighbours_of_shuffled_labels_are_at_chance(tmp_path: Path) -> None:
    labels = np.random.default_rng(3).permutation(load_digits(return_X_y=True)[1])
    store, _ = knn_store(tmp_path, labels)
    spec = QUICK.model_copy(update={"epochs": 3, "knn": KnnSpec(k=(20,))})
    result = run_probe(pipeline(store, tmp_path, spec))
    low, high = result.sources[0].knn_interval
    assert low < result.chance < high
    low, high = result.sources[0].sampling_interval
    assert low < result.chance < high


FUSION = AttentiveSpec(width=32, heads=2, epochs=20, batch_size=64, learning_rate=3e-3)


def test_attention_fuses_what_no_single_cell_knows(tmp_path: Path) -> None:
    """Half of the class is in one tap at one timestep, half in another tap at the other, and there
    in the place of a blob, which the mean over space does not see."""
    high, low = LABELS // 2, LABELS % 2
    signs = np.random.default_rng(2).standard_normal(6).astype(np.float32)
    vectors = noise(2, N, 6, seed=8)
    vectors[0] += 3 * signs * (2 * high - 1)[:, None]
    maps = 0.3 * noise(2, N, 4, 4, 4, seed=9)
    corner = np.where(low == 0, 0, 3)
    maps[1, np.arange(N), 0, corner, corner] += 6
    index = toy_index(LABELS.tolist(), SPLITS)
    store = store_of(tmp_path / "store", {"vector": vectors, "map": maps}, index)
    spec = QUICK.model_copy(update={"attentive": FUSION, "epochs": 5})
    (source,) = run_probe(pipeline(store, tmp_path, spec)).sources
    fused = source.attentive
    assert fused is not None
    assert source.best.mean_test < 0.6  # a half, and chance for the rest
    assert min(fused.test) > 0.9
    assert (fused.n_cells, fused.n_tokens) == (4, 2 * (1 + 16))
    assert fused.loss[-1] < 0.5 * fused.loss[0]
    one = FUSION.model_copy(update={"taps": ("vector",), "timesteps": (10,), "epochs": 4})
    spec = spec.model_copy(update={"attentive": one})
    (source,) = run_probe(pipeline(store, tmp_path, spec)).sources
    assert source.attentive is not None
    assert source.attentive.mean_test < 0.65
    with torch.random.fork_rng():
        torch.manual_seed(99)
        again = run_probe(pipeline(store, tmp_path, spec)).sources[0].attentive
    assert again == source.attentive  # a function of its own seeds


def test_attention_learns_from_train_rows_alone(tmp_path: Path) -> None:
    """Other features in validation or test rows change the accuracy there, and nothing else."""
    held_out = [r for r in range(N_TRAIN) if is_validation(f"key-{r:05d}", QUICK.validation)]
    short = FUSION.model_copy(update={"epochs": 3})
    spec = QUICK.model_copy(update={"attentive": short, "epochs": 1})
    index = toy_index(LABELS.tolist(), SPLITS)
    found = []
    for name, rows in (("clean", []), ("validation", held_out), ("test", range(N_TRAIN, N))):
        x = clusters()[None]
        x[:, list(rows)] = np.random.default_rng(0).permutation(x[:, list(rows)], axis=1)
        store = store_of(tmp_path / name, {"x": x}, index)
        fused = run_probe(pipeline(store, tmp_path, spec)).sources[0].attentive
        assert fused is not None
        found.append(fused)
    clean, validation, test = found
    assert clean.loss == validation.loss == test.loss
    assert clean.test == validation.test != test.test
    assert clean.validation == test.validation != validation.validation
    assert clean.mean_validation > 0.9 > validation.mean_validation


def test_tokens_of_every_shape() -> None:
    def tokens(dims: str, *shape: int) -> torch.Tensor:
        array = make_array("x", (3,), "float32")
        array = array.model_copy(update={"dims": tuple(dims.split()), "shape": shape})
        x = torch.arange(2 * math.prod(shape), dtype=torch.float32).reshape(2, *shape)
        return as_tokens(x, array, pool=2)

    maps = tokens("channel height width", 3, 4, 6)
    whole = torch.arange(144.0).reshape(2, 3, 4, 6)
    assert maps.shape == (2, 4, 3)
    torch.testing.assert_close(maps[:, 1], whole[:, :, :2, 3:].mean((2, 3)))
    assert tokens("channel height width", 3, 1, 6).shape == (2, 2, 3)
    of_tokens = tokens("token channel", 8, 3)
    assert of_tokens.shape == (2, 4, 3)
    first = torch.arange(48.0).reshape(2, 8, 3)[:, :2].mean(1)
    torch.testing.assert_close(of_tokens[:, 0], first)
    assert tokens("token channel", 3, 5).shape == (2, 3, 5)
    assert tokens("channel", 5).shape == (2, 1, 5)
    assert tokens("channel frame height width", 3, 2, 4, 4).shape == (2, 4, 3)


def test_near_neighbours_weigh_more() -> None:
    """One at cosine 1 against two at cosine 0.8: alone at a low temperature, not at a high one."""
    train = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]])
    labels, asked = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]])
    for temperature, want in ((0.07, 1.0), (10.0, 0.0)):
        knn = KnnSpec(k=(3,), temperature=temperature)
        found = knn_accuracy(train, labels, asked, torch.tensor([0]), knn, 2)
        assert found == [(want, 1.0)]


def test_attention_on_shuffled_labels_is_at_chance(tmp_path: Path) -> None:
    shuffled = np.random.default_rng(6).permutation(LABELS)
    index = toy_index(shuffled.tolist(), SPLITS)
    store = store_of(tmp_path / "store", {"good": clusters()[None]}, index)
    short = FUSION.model_copy(update={"epochs": 5})
    spec = QUICK.model_copy(update={"attentive": short, "epochs": 1})
    fused = run_probe(pipeline(store, tmp_path, spec)).sources[0].attentive
    assert fused is not None
    low, high = fused.sampling_interval
    assert low < 0.25 < high


def test_sweep_extracts_a_few_and_ranks(tmp_path: Path) -> None:
    """Real digits through the bundled backbone; the ranking is that of the validation part."""
    index = digits_index(tmp_path / "tars")
    recipe = Pipeline.load(find_recipe("digits")).model_dump(
        exclude_unset=True, exclude={"distill", "cluster", "retrieve"}
    )
    tars = {name: str(tmp_path / "tars" / f"{name}.tar") for name in ("train", "test")}
    sweepable = Pipeline.parse(
        {
            **recipe,
            "dataset": {"tars": tars},
            "taps": ["down_blocks.1", "mid_block"],
            "schedule": {"convention": "ddpm_index", "timesteps": [50, 900]},
            "store": {"url": str(tmp_path / "store")},
            "results": str(tmp_path / "results"),
            "probe": {"epochs": 30, "seeds": [0, 1], "pixels": False},
        }
    )
    file = tmp_path / "p.yaml"
    file.write_text(sweepable.model_dump_json())
    done = CliRunner().invoke(app, ["probe", str(file), "--sweep", "160", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "store").exists()
    result = ProbeResult.load(tmp_path / "results" / "sweep-160" / "probe.json")
    (source,) = result.sources
    assert abs(source.n_train + source.n_validation + source.n_test - 160) <= 1
    lines = [line.split() for line in done.output.splitlines()]
    ranked = [line[1:3] for line in lines if line and line[0] in ("1", "2", "3", "4")]
    cells = sorted(source.cells, key=ProbeCell.rank, reverse=True)
    assert ranked == [[c.tap, f"{c.timestep:g}"] for c in cells]
    assert cells[0].timestep == 50  # at 900 of 1000 little of the digit is left
    ratios = [cell.high_frequency for cell in source.cells]
    assert all(ratio is not None and 0 < ratio < 1 for ratio in ratios)
    want = stats.spearmanr(ratios, [cell.mean_validation for cell in source.cells]).statistic
    assert source.frequency_correlation == pytest.approx(want)
    assert f"accuracy is {want:+.2f}" in " ".join(done.output.split())
    starred = [line[1:3] for line in lines if line and line[-1].endswith("*")]
    chosen = [source.by_frequency(tap) for tap in ("down_blocks.1", "mid_block")]
    assert sorted(starred) == [[c.tap, f"{c.timestep:g}"] for c in chosen if c is not None]
    small, large = (some_samples(index, ("train", "test"), n) for n in (40, 90))
    keys = [set(one.table["key"].to_pylist()) for one in (small, large)]
    assert keys[0] < keys[1]
    with pytest.raises(SpecError, match="labelled samples of split 'test'; want some of each"):
        some_samples(index, ("train", "test"), 1)


def test_test_rows_never_touch_training(tmp_path: Path) -> None:
    clean = np.stack([clusters(), noise(N, 8)])
    poisoned = clean.copy()
    poisoned[:, N_TRAIN:] = 1e6
    index = toy_index(LABELS.tolist(), SPLITS)
    one, _ = trained(store_of(tmp_path / "clean", {"x": clean}, index))
    two, data = trained(store_of(tmp_path / "poisoned", {"x": poisoned}, index))
    assert torch.equal(one.weight["x"], two.weight["x"])
    assert torch.equal(one.bias["x"], two.bias["x"])
    assert torch.equal(one.mean["x"], two.mean["x"])
    assert torch.equal(one.scale["x"], two.scale["x"])
    assert data.split.test.tolist() == list(range(N_TRAIN, N))


def test_validation_rows_choose_but_do_not_train(tmp_path: Path) -> None:
    clean = clusters()[None]
    poisoned = clean.copy()
    held_out = [r for r in range(N_TRAIN) if is_validation(f"key-{r:05d}", QUICK.validation)]
    poisoned[:, held_out] = 1e6
    index = toy_index(LABELS.tolist(), SPLITS)
    one, _ = trained(store_of(tmp_path / "clean", {"x": clean}, index))
    two, _ = trained(store_of(tmp_path / "poisoned", {"x": poisoned}, index))
    assert torch.equal(one.weight["x"], two.weight["x"])


def test_the_best_cell_is_chosen_on_validation() -> None:
    def make(name: str, validation: float, loss: float, test: float) -> ProbeCell:
        return ProbeCell(
            tap=name, timestep=1, validation=(validation,), validation_loss=(loss,), test=(test,)
        )

    cells = (make("a", 0.8, 0.5, 0.99), make("b", 0.9, 0.6, 0.5), make("c", 0.9, 0.4, 0.4))
    source = ProbeSource(
        label="x", store=None, fingerprint=None, cells=cells, n_train=1, n_validation=1, n_test=100
    )
    assert source.best.tap == "c"  # a has the best test accuracy, b the same validation accuracy


def test_invalid_and_unlabelled_rows_take_no_part(tmp_path: Path) -> None:
    invalid, unlabelled = [3, N_TRAIN + 1], [5, N_TRAIN + 2]
    labels: list[int | None] = [None if r in unlabelled else int(LABELS[r]) for r in range(N)]
    features = clusters()[None]
    features[:, unlabelled] = 1e6
    store = store_of(tmp_path / "s", {"x": features}, toy_index(labels, SPLITS), invalid=invalid)
    (source,) = run_probe(pipeline(store, tmp_path)).sources
    assert source.n_train + source.n_validation == N_TRAIN - 2
    assert source.n_test == N_TEST - 2
    assert source.best.mean_test > 0.99


def test_labels_may_be_any_integers_and_unseen_ones_count_as_wrong(tmp_path: Path) -> None:
    names = np.array([-5, 70, 7000, 2**40])
    labels = names[LABELS].tolist()
    labels[N_TRAIN : N_TRAIN + 20] = [9] * 20  # a class that the train split does not have
    store = store_of(tmp_path / "s", {"x": clusters()[None]}, toy_index(labels, SPLITS))
    result = run_probe(pipeline(store, tmp_path))
    assert result.n_classes == 4
    assert result.sources[0].best.mean_test == pytest.approx(0.9, abs=0.011)


def test_streaming_learns_as_well_as_memory(
    toy: tuple[FeatureStore, ProbeResult, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, cached, _ = toy
    monkeypatch.setattr(linear_probes, "CACHE_BYTES", 0)
    spec = QUICK.model_copy(update={"epochs": 8})
    streamed = run_probe(pipeline(store, tmp_path, spec))
    for tap, timestep in (("good", 11), ("map", 10)):
        assert cell(streamed, tap, timestep).mean_test > 0.99
    assert streamed.sources[0].n_train == cached.sources[0].n_train
    again = run_probe(pipeline(store, tmp_path, spec))
    assert again.sources == streamed.sources


def test_result_survives_its_file(toy: tuple[FeatureStore, ProbeResult, Path]) -> None:
    _, result, folder = toy
    assert ProbeResult.load(folder / "results" / "probe.json") == result
    with pytest.raises(InputError, match="not a result of `drl probe`"):
        ProbeResult.load(folder / "nothing.json")


def test_compared_stores_and_raw_pixels(tmp_path: Path) -> None:
    index = digits_index(tmp_path / "tars")
    labels = np.array(index.table["label"].to_pylist())
    own = store_of(tmp_path / "own", {"x": clusters(labels)[None]}, index)
    other = store_of(tmp_path / "other", {"x": noise(1, len(labels), 8)}, index)
    (tmp_path / "other.yaml").write_text(pipeline(other, tmp_path).model_dump_json())
    spec = ProbeSpec(epochs=30, seeds=(0, 1), compare={"random": str(tmp_path / "other.yaml")})
    result = run_probe(pipeline(own, tmp_path, spec))
    assert [source.label for source in result.sources] == ["toy", "random", "pixels"]
    trained, random, pixels = (source.best.mean_test for source in result.sources)
    assert trained > 0.99
    assert random < 0.45
    assert pixels > 0.9  # zeros against ones and so on, on 8 x 8 pixels
    assert result.sources[2].cells[0].timestep is None
    console = Console(file=io.StringIO(), width=140)
    console.print(format_table(result))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "random" in text
    assert f"{trained:.1%}" in text


def test_errors(toy: tuple[FeatureStore, ProbeResult, Path], tmp_path: Path) -> None:
    store, _, _ = toy
    with pytest.raises(
        SpecError, match=r"no rows with split='val'.*its splits are .'test', 'train'"
    ):
        run_probe(pipeline(store, tmp_path, QUICK.model_copy(update={"test": "val"})))
    with pytest.raises(SpecError, match="both 'train'"):
        run_probe(pipeline(store, tmp_path, QUICK.model_copy(update={"test": "train"})))
    with pytest.raises(SpecError, match="lacks probe"):
        run_probe(pipeline(store, tmp_path).model_copy(update={"probe": None}))
    with pytest.raises(SpecError, match="at least one"):
        run_probe(pipeline(store, tmp_path, QUICK.model_copy(update={"validation": 1e-9})))
    other = store_of(tmp_path / "o", {"x": clusters()[None]}, store.index, dataset="e" * 64)
    (tmp_path / "o.yaml").write_text(pipeline(other, tmp_path).model_dump_json())
    compare = QUICK.model_copy(update={"compare": {"o": str(tmp_path / "o.yaml")}})
    with pytest.raises(SpecError, match=r"probe\.compare\.o: .* holds another dataset"):
        run_probe(pipeline(store, tmp_path, compare))
    with pytest.raises(SpecError, match="'toy' names another source"):
        run_probe(pipeline(store, tmp_path, QUICK.model_copy(update={"compare": {"toy": "x"}})))
    unlabelled = toy_index([None] * N, SPLITS)
    no_label = store_of(tmp_path / "u", {"x": clusters()[None]}, unlabelled)
    with pytest.raises(SpecError, match="no rows with split='train', labelled=True"):
        run_probe(pipeline(no_label, tmp_path))


def test_a_store_that_is_not_finished_is_refused(tmp_path: Path) -> None:
    index = toy_index(LABELS.tolist(), SPLITS)
    part = store_of(tmp_path / "part", {"x": clusters()[None]}, index, n_units=2)
    with pytest.raises(UserError, match=r"5 of 7 units .* `drl extract` first"):
        run_probe(pipeline(part, tmp_path))
    nowhere = pipeline(part, tmp_path).model_copy(
        update={"store": StoreSpec(url=str(tmp_path / "nowhere"))}
    )
    with pytest.raises(UserError, match=r"no store at .*nowhere; make it with `drl extract`"):
        run_probe(nowhere)


def test_intervals() -> None:
    assert t_interval([0.5]) == (0.5, 0.5)
    for n in (2, 3, 5, 12, 21):
        values = np.random.default_rng(n).random(n)
        want = stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values))
        assert t_interval(values.tolist()) == pytest.approx(want, abs=3e-4)
    for right, n in ((342, 360), (0, 10), (10, 10), (1, 3)):
        proportion = stats.binomtest(right, n).proportion_ci(method="wilson")
        assert wilson_interval(right / n, n) == pytest.approx(tuple(proportion), abs=1e-6)
