"""The loop: equal to one in plain torch, to itself interrupted, and to itself on two processes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from drl_data.errors import ExecutionError, InputError, SpecError, StoppedError
from drl_data.ranks import Ranks
from drl_data.stopping import Stop
from drl_data.train_checkpoints import Checkpoints, Curve
from drl_data.train_spec import OptimizerSpec, TrainRunSpec
from drl_data.training import Settings, Venue, rate_factor, train
from tests.train_cases import (
    CASES,
    GPU_CASES,
    IDENTITY,
    SETTINGS,
    Digits,
    Learner,
    trained,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def venue(folder: Path, stop: Stop | None = None, keep: int | None = 2) -> Venue:
    return Venue(Ranks(CPU), Checkpoints(folder, keep=keep), stop or Stop())


def run(folder: Path, module: Learner, given: Settings = SETTINGS, **changes: object) -> Curve:
    return train(module, Digits(), replace(given, **changes), IDENTITY, venue(folder))


def weights(module: Learner) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def assert_equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def straight_line(optimizer: OptimizerSpec) -> tuple[list[float], Learner]:
    """The same training in plain torch: losses of every step, and the module."""
    module, data = Learner(), Digits()
    n_steps = SETTINGS.epochs * data.n_batches
    adam = torch.optim.AdamW(module.parameters(), SETTINGS.learning_rate, weight_decay=1e-2)
    n_warm = round(optimizer.warmup * n_steps)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        adam,
        [
            torch.optim.lr_scheduler.LambdaLR(adam, lambda step: (step + 1) / n_warm),
            torch.optim.lr_scheduler.CosineAnnealingLR(adam, n_steps - n_warm),
        ],
        [n_warm],
    )
    losses = []
    for epoch in range(SETTINGS.epochs):
        for pixels, targets in data.whole(epoch):
            adam.zero_grad()
            loss = module(pixels, targets)["loss"]
            loss.backward()
            if optimizer.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(module.parameters(), optimizer.clip_norm)
            adam.step()
            schedule.step()
            losses.append(float(loss.detach()))
    return losses, module


@pytest.mark.parametrize("clip_norm", [None, 0.3])
def test_the_loop_is_the_one_of_plain_torch(tmp_path: Path, clip_norm: float | None) -> None:
    optimizer = OptimizerSpec(warmup=0.2, clip_norm=clip_norm)
    losses, reference = straight_line(optimizer)
    module = Learner()
    curve = run(tmp_path, module, optimizer=optimizer)
    assert curve.losses["loss"] == pytest.approx(losses, rel=1e-5)
    assert losses[-1] < 0.7 * losses[0]
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[name], rtol=1e-4, atol=1e-6)
    assert curve.n_images == [32, 32, 32, 32, 22] * 3


def test_means_of_epochs_weigh_steps_by_their_images() -> None:
    curve = Curve([4, 1, 4, 1], {"loss": [1.0, 2.0, 3.0, 8.0]})
    assert curve.by_epoch(2) == {"loss": (6 / 5, 20 / 5)}


def test_the_rate_rises_then_falls_to_nothing() -> None:
    rates = [rate_factor(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0
    assert rates == sorted(rates[:11]) + sorted(rates[11:], reverse=True)
    assert rates[99] < 0.001
    assert rate_factor(0, 10, 0.0) == 1.0


def test_parts_of_a_batch_give_its_gradients(tmp_path: Path) -> None:
    whole, parts = Learner(), Learner()
    a = run(tmp_path / "a", whole)
    b = run(tmp_path / "b", parts, micro_batch=7)
    assert b.losses["loss"] == pytest.approx(a.losses["loss"], rel=1e-5)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(value, parts.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_the_average_is_that_of_the_weights(tmp_path: Path) -> None:
    """Of two steps: the first decay is 1/10, the second 2/11."""
    module, last = Learner(), Learner()
    short = {"epochs": 1, "optimizer": OptimizerSpec(ema_decay=0.99)}
    data = Digits(n=64)
    start = weights(module)
    given = replace(SETTINGS, **short, checkpoint_every=1)
    train(module, data, given, IDENTITY, venue(tmp_path / "a"))
    train(last, data, replace(SETTINGS, epochs=1), IDENTITY, venue(tmp_path / "b", keep=None))
    found = Checkpoints(tmp_path / "a").load(IDENTITY)
    assert found is not None
    first = _load(tmp_path / "a" / "step-0000000001", "model")
    for name, value in module.named_parameters():
        expected = start[name].lerp(first[name], 0.9).lerp(last.state_dict()[name], 9 / 11)
        torch.testing.assert_close(value.detach(), expected)


def _load(folder: Path, kind: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / f"{kind}.safetensors")


# --- interruption -------------------------------------------------------------------------------


class StopAt(Stop):
    """Asks for the end once so many steps have asked for it."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._left = step

    @property
    def requested(self) -> bool:
        self._left -= 1
        return self._left < 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Curve, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    module = Learner(norm=True, dropout=0.2)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    curve = run(folder, module, optimizer=OptimizerSpec(ema_decay=0.9))
    torch.set_num_threads(before)
    return curve, weights(module)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(steps=st.lists(st.integers(0, 14), max_size=3), every=st.integers(1, 6))
def test_an_interrupted_run_gives_the_bits_of_one_that_was_not(
    undisturbed: tuple[Curve, dict[str, Tensor]],
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[int],
    every: int,
) -> None:
    """Stopped anywhere, as often as one likes, with dropout, batch norm and a moving average."""
    folder = tmp_path_factory.mktemp("stopped")
    given_ = replace(SETTINGS, optimizer=OptimizerSpec(ema_decay=0.9), checkpoint_every=every)
    behind = 0
    for step in steps:
        if behind + step >= 15:
            break
        with pytest.raises(StoppedError, match=f"at step {behind + step} of 15"):
            train(
                Learner(norm=True, dropout=0.2),
                Digits(),
                given_,
                IDENTITY,
                venue(folder, StopAt(step)),
            )
        behind += step
        assert Checkpoints(folder).load(IDENTITY).state.step == behind  # type: ignore[union-attr]
    module = Learner(norm=True, dropout=0.2)
    curve = train(module, Digits(), given_, IDENTITY, venue(folder))
    assert curve == undisturbed[0]
    assert_equal(weights(module), undisturbed[1])


class Broken(Digits):
    """Batches that end with an error: the process dies there, without a checkpoint."""

    def batches(
        self, epoch: int, *, rank: int = 0, world_size: int = 1, start: int = 0
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        for i, batch in enumerate(super().batches(epoch, start=start), start):
            if epoch == 1 and i == 3:
                raise OSError("cut off")
            yield batch


def test_a_crash_costs_the_steps_since_the_last_checkpoint(
    undisturbed: tuple[Curve, dict[str, Tensor]], tmp_path: Path
) -> None:
    given_ = replace(SETTINGS, optimizer=OptimizerSpec(ema_decay=0.9), checkpoint_every=3)
    with pytest.raises(OSError, match="cut off"):
        train(Learner(norm=True, dropout=0.2), Broken(), given_, IDENTITY, venue(tmp_path))
    assert Checkpoints(tmp_path).load(IDENTITY).state.step == 6  # type: ignore[union-attr]
    module = Learner(norm=True, dropout=0.2)
    curve = train(module, Digits(), given_, IDENTITY, venue(tmp_path))
    assert curve == undisturbed[0]
    assert_equal(weights(module), undisturbed[1])


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    module, again = Learner(), Learner()
    curve = run(tmp_path, module)
    before = sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*"))
    assert train(again, Broken(), SETTINGS, IDENTITY, venue(tmp_path)) == curve
    assert_equal(weights(again), weights(module))
    assert sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*")) == before


# --- checkpoints --------------------------------------------------------------------------------


def test_the_last_checkpoints_stay(tmp_path: Path) -> None:
    run(tmp_path, Learner(), checkpoint_every=4)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "step-0000000012",
        "step-0000000015",
    ]
    files = {path.name for path in (tmp_path / "step-0000000012").iterdir()}
    assert files == {
        "state.json",
        *(f"{kind}.safetensors" for kind in ("model", "optimizer", "average", "curve")),
    }
    state = json.loads((tmp_path / "step-0000000012" / "state.json").read_text())
    assert (state["step"], state["epoch"], state["batch"]) == (12, 2, 2)


def test_another_training_is_refused_with_what_differs(tmp_path: Path) -> None:
    run(tmp_path, Learner())
    other = {"what": "digits", "settings": {"seed": 4, "epochs": 2}}
    with pytest.raises(SpecError) as caught:
        train(Learner(), Digits(), SETTINGS, other, venue(tmp_path))
    message = str(caught.value)
    assert "holds 15 steps of another training" in message
    assert "settings.seed: 3 there, 4 wanted" in message
    assert "settings.epochs: nothing there, 2 wanted" in message
    assert "what" not in message.partition("anew:")[2]
    assert "delete that folder to begin anew" in message


def test_what_a_kill_left_half_written_is_no_checkpoint(tmp_path: Path) -> None:
    a = Learner()
    curve = run(tmp_path, a, checkpoint_every=4)
    half = tmp_path / ".tmp-killed"
    half.mkdir()
    (half / "state.json").write_text("{")
    # A checkpoint whose removal was cut off has no state any more.
    (tmp_path / "step-0000000099").mkdir()
    (tmp_path / "step-0000000099" / "model.safetensors").write_bytes(b"")
    b = Learner()
    assert run(tmp_path, b, checkpoint_every=4) == curve
    assert not half.exists()
    assert_equal(weights(a), weights(b))


@pytest.mark.parametrize("name", ["state.json", "model.safetensors", "optimizer.safetensors"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, name: str) -> None:
    run(tmp_path, Learner(), checkpoint_every=4)
    (tmp_path / "step-0000000015" / name).write_bytes(b"xx")
    with pytest.raises(InputError, match=r"step-0+15: not a whole checkpoint .* delete this"):
        run(tmp_path, Learner())
    for path in (tmp_path / "step-0000000015").iterdir():
        path.unlink()
    module, reference = Learner(), Learner()
    run(tmp_path, module)
    run(tmp_path / "other", reference)
    assert_equal(weights(module), weights(reference))


# --- what cannot be trained ---------------------------------------------------------------------


def test_batch_norm_must_see_its_share(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="micro_batch: the student has batch norm"):
        run(tmp_path, Learner(norm=True), micro_batch=4)


def test_a_loss_that_is_not_finite_ends_the_run_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ExecutionError, match=r"is (nan|inf) at step \d+ of 15; try a lower"):
        run(tmp_path, Learner(), learning_rate=1e30, checkpoint_every=1)
    found = Checkpoints(tmp_path).load(IDENTITY)
    assert found is not None
    assert all(math.isfinite(x) for x in found.tensors["curve"]["loss:loss"].tolist())


def test_workers_are_of_ray_or_torchrun() -> None:
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 2"):
        TrainRunSpec(workers=2)
    assert TrainRunSpec(executor="ray", workers=2).workers == 2


# --- several processes --------------------------------------------------------------------------


def torchrun(folder: Path, *arguments: str) -> Path:
    """What came of every case on two processes."""
    launched = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "tests.train_cases", str(folder), *arguments],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr
    return folder


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return torchrun(tmp_path_factory.mktemp("two"), "cpu")


@pytest.mark.parametrize("name", CASES)
def test_two_processes_have_the_curve_of_one(on_two: Path, tmp_path: Path, name: str) -> None:
    """Within 1e-5 of each loss: float32 gradients added up in another order."""
    alone = trained(CASES[name], tmp_path, Ranks(CPU))
    first, second = (json.loads((on_two / f"rank-{i}.json").read_text())[name] for i in (0, 1))
    assert first == second
    assert first["n"] == alone["n"]
    for loss in ("loss", "digit", "ink"):
        assert first[loss] == pytest.approx(alone[loss], rel=1e-5)
    assert first["weights"] == pytest.approx(alone["weights"], abs=1e-4)


def test_one_process_goes_on_where_two_were(on_two: Path, tmp_path: Path) -> None:
    """From their checkpoint in the middle of an epoch."""
    folder = on_two / "uneven"
    newest = max(folder.iterdir())
    assert newest.name == "step-0000000015"
    (newest / "state.json").unlink()
    continued = trained(CASES["uneven"], folder, Ranks(CPU))
    alone = trained(CASES["uneven"], tmp_path, Ranks(CPU))
    assert continued["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert continued["n"] == alone["n"]


# --- GPUs ---------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_two_gpus_have_the_curve_of_one(tmp_path: Path) -> None:
    """NCCL, batch norm over both (SyncBatchNorm), bfloat16, and one GPU where two were."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"{torch.cuda.device_count()} GPUs here; want two")
    two, one = torchrun(tmp_path), Ranks(torch.device("cuda:0"))
    first, second = (json.loads((two / f"rank-{i}.json").read_text()) for i in (0, 1))
    assert first == second
    for name, case in GPU_CASES.items():
        tolerance = 0.02 if name == "bfloat16" else 1e-4
        alone = trained(case, tmp_path / "one" / name, one)
        assert first[name]["loss"] == pytest.approx(alone["loss"], rel=tolerance), name
        assert first[name]["weights"] == pytest.approx(alone["weights"], abs=10 * tolerance), name
        (max((two / name).iterdir()) / "state.json").unlink()
        continued = trained(case, two / name, one)
        assert continued["loss"] == pytest.approx(alone["loss"], rel=tolerance), name
    assert abs(first["bfloat16"]["loss"][0] / first["float32"]["loss"][0] - 1) < 0.02
    assert first["bfloat16"]["loss"][0] != first["float32"]["loss"][0]  # it was autocast
