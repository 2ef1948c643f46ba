"""Taps: grammar, globs, hooks, and the early end of the forward."""

from __future__ import annotations

import fnmatch
from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from drl_data.capture import capture
from drl_data.errors import TapError
from drl_data.spec import TapSpec
from drl_data.tap_sites import MODEL_SITES, SITES
from drl_data.taps import ResolvedTap, parse, resolve


class InPlace(nn.Module):
    """Changes its input, as an in-place activation does."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


class Pair(nn.Module):
    """Returns a tuple and takes its input by keyword."""

    def forward(self, *, hidden: Tensor) -> tuple[None, Tensor, Tensor]:
        return None, hidden + 1, hidden + 2


class Model(nn.Module):
    """first -> second -> pair -> last, with `second` run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Identity()
        self.second = InPlace()
        self.pair = Pair()
        self.last = nn.Identity()
        self.unused = nn.Identity()
        self.n_last = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x))
        x = self.second(x)
        x = self.pair(hidden=x)[1]
        self.n_last += 1
        return self.last(x)


def taps_of(model: nn.Module, *paths: str) -> tuple[ResolvedTap, ...]:
    return resolve(model, [TapSpec(path=path) for path in paths])


def run(model: Model, *paths: str, stop_early: bool = True) -> dict[str, float]:
    got = capture(
        model,
        taps_of(model, *paths),
        lambda: model(torch.ones(1)),
        lambda _, x: x.clone(),
        stop_early=stop_early,
    )
    return {name: float(x) for name, x in got.items()}


NAMES = st.from_regex(r"[a-z_]{1,8}(\.[a-z0-9_*?]{1,8}){0,3}", fullmatch=True)


PARTS = st.lists(
    st.sampled_from(["image", "text", "cls", "heads[0,3]", "channels[0:4,8:9]", "shift_mlp"]),
    max_size=3,
)


@given(
    NAMES.filter(lambda name: name.split(".")[0] not in MODEL_SITES),
    st.sampled_from(["", *SITES]),
    st.none() | st.integers(0, 99),
    PARTS,
)
def test_grammar_round_trips(pattern: str, site: str, index: int | None, parts: list[str]) -> None:
    words = tuple(([] if index is None else [str(index)]) + parts) if site else ()
    text = ".".join((f"{pattern}@{site}" if site else pattern, *words))
    assert parse(text) == (pattern, site or "out", words)


@pytest.mark.parametrize(
    "text", ["", "a b", "a@nowhere", "a@out.x", "@out", "a@in.1.2", "a@eps", "a@out.heads[]"]
)
def test_what_is_no_tap_is_refused(text: str) -> None:
    with pytest.raises(TapError, match=r"want module\.path\[@site\]\[\.part\]"):
        parse(text)


COMPONENTS = st.sampled_from(["a", "b", "0", "1", "conv"])
PATHS = st.lists(st.lists(COMPONENTS, min_size=1, max_size=4).map(".".join), min_size=1)


@given(PATHS, st.lists(COMPONENTS | st.sampled_from(["*", "?", "c*"]), min_size=1, max_size=4))
def test_one_star_stays_within_a_component(paths: list[str], pattern: list[str]) -> None:
    root = nn.Module()
    for path in paths:
        place = root
        for part in path.split("."):
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place._modules[part]  # type: ignore[assignment]
    every = [name for name, _ in root.named_modules() if name]
    want = [
        name
        for name in every
        if len(name.split(".")) == len(pattern)
        and all(map(fnmatch.fnmatchcase, name.split("."), pattern))
    ]
    try:
        got = [tap.module for tap in taps_of(root, ".".join(pattern))]
    except TapError:
        got = []
    assert got == want


def test_two_stars_cross_components() -> None:
    model = nn.Sequential(OrderedDict(a=nn.Sequential(nn.Identity(), nn.ReLU()), b=nn.ReLU()))
    assert [t.module for t in taps_of(model, "a**")] == ["a", "a.0", "a.1"]
    assert [t.module for t in taps_of(model, "**.1")] == ["a.1"]


def test_a_tap_that_does_not_exist_names_the_nearest() -> None:
    with pytest.raises(TapError, match=r"'secnd' matches no module.*nearest: second"):
        taps_of(Model(), "secnd")


def test_two_taps_of_one_name_are_refused() -> None:
    with pytest.raises(TapError, match=r"first@out and first@out would both be .*'first'"):
        taps_of(Model(), "first", "fir*")


def test_one_name_for_many_modules_is_refused() -> None:
    with pytest.raises(TapError, match="matches 2 modules: first, last"):
        resolve(Model(), [TapSpec(path="*st", name="x")])


def test_no_taps_are_refused() -> None:
    with pytest.raises(TapError, match="no taps"):
        resolve(Model(), [])


def test_sites_and_parts() -> None:
    assert run(Model(), "pair@in", "pair", "pair@out.2", stop_early=False) == {
        "pair-in": 4.0,
        "pair": 5.0,
        "pair-2": 6.0,
    }


def test_a_module_called_twice_gives_its_first_call() -> None:
    assert run(Model(), "second", "second@in", stop_early=False) == {
        "second-in": 1.0,
        "second": 2.0,
    }


def test_a_later_change_in_place_is_not_seen() -> None:
    assert run(Model(), "first", "pair@in") == {"first": 1.0, "pair-in": 4.0}


def test_forward_stops_after_the_last_tap() -> None:
    model = Model()
    assert run(model, "pair", "first") == run(model, "first", "pair")
    assert model.n_last == 0
    run(model, "pair", stop_early=False)
    assert model.n_last == 1


def test_hooks_are_gone_afterwards_even_after_an_error() -> None:
    model = Model()
    run(model, "first", "pair@in")
    with pytest.raises(TapError, match=r"the forward never reached unused@out"):
        run(model, "first", "unused")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_part_that_is_no_tensor_is_described() -> None:
    with pytest.raises(TapError, match=r"pair@out\.0: no tensor.*gave \(NoneType, tensor\[1\]"):
        run(Model(), "pair@out.0")


def test_a_model_that_catches_exceptions_does_not_catch_the_stop() -> None:
    class Catching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            try:
                self.inner(x)
            except Exception:
                raise AssertionError("the stop was caught") from None
            raise AssertionError("the forward went on")

    model = Catching()
    got = capture(model, taps_of(model, "inner"), lambda: model(torch.ones(1)), lambda _, x: x)
    assert list(got) == ["inner"]
