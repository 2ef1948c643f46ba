"""FLOPs against numbers counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drl_data.backbones import find_model, load_backbone
from drl_data.backbones.backbone import CLEAN
from drl_data.backbones.inventory import tappable_modules
from drl_data.capture import image_output
from drl_data.diffusion_spec import ConditionSpec
from drl_data.flops import FeatureFlops, Forwards, count_flops, trace
from drl_data.spec import BackboneSpec, ImageSpec, TapSpec
from drl_data.tiny_models import save_tiny_ddpm, save_tiny_stable_diffusion


class Two(nn.Module):
    """A convolution of 2 x 3 x 3 x 3 weights over 8 x 8, then a linear layer of 2 to 5."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, padding=1)
        self.never = nn.Linear(1, 1)
        self.last = nn.Linear(2, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.conv(x)
        return h, self.last(h.mean((2, 3)))


def image_of(model: nn.Module) -> Callable[[str, object], Tensor | None]:
    return lambda path, output: image_output(model, path, output, None)


CONV = 2 * 2 * 3 * 9 * 64
LAST = 2 * 2 * 5


def test_a_multiply_and_an_add_are_two() -> None:
    model = Two().to("meta")
    assert count_flops(lambda: model(torch.empty(1, 3, 8, 8, device="meta"))) == CONV + LAST


def test_modules_come_in_order_with_what_is_done_at_their_end() -> None:
    model = nn.Sequential(Two())
    calls, total = trace(model, lambda: model(torch.zeros(1, 3, 8, 8)), select=image_of(model))
    assert total == CONV + LAST
    assert [(c.path, c.kind, tuple(c.output.shape), c.flops_through) for c in calls] == [
        ("0", "Two", (1, 2, 8, 8), CONV + LAST),
        ("0.conv", "Conv2d", (1, 2, 8, 8), CONV),
        ("0.last", "Linear", (1, 5), CONV + LAST),
    ]
    assert not any(module._forward_hooks for module in model.modules())


def test_a_module_that_is_called_twice_counts_to_the_end_of_its_first_call() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, shared)
    calls, total = trace(model, lambda: model(torch.zeros(1, 4)), select=image_of(model))
    assert [(c.path, c.flops_through) for c in calls] == [("0", 32)]
    assert total == 64


def test_savings_and_sums() -> None:
    flops = FeatureFlops(whole=100, cut=55, encode=30)
    assert flops.saving == pytest.approx(0.45)
    assert flops.per_image(Forwards(3)) == 30 + 3 * 55
    assert flops.per_image(Forwards(1, 4), 2) == 2 * (30 + 55 + 4 * 100)


@pytest.mark.parametrize("make", [save_tiny_ddpm, save_tiny_stable_diffusion])
def test_every_listed_module_can_be_tapped_and_costs_what_is_listed(
    make: object, tmp_path: Path
) -> None:
    assert callable(make)
    spec = BackboneSpec(model=str(make(tmp_path / "model")))
    found = tappable_modules(spec)
    backbone = load_backbone(find_model(spec), "meta")
    images, condition = ImageSpec(size=16), ConditionSpec()
    assert len(found.modules) > 50
    for module in found.modules[5::40]:
        taps = backbone.resolve([TapSpec(path=module.path)])
        flops = backbone.flops(taps, images, condition)
        assert flops.whole == found.flops
        # the counter sees a module's work when the hook of the tap ends it
        assert flops.cut == pytest.approx(module.share * found.flops, rel=1e-9)
        if module.dims:
            (array,) = backbone.arrays(taps, images, condition, CLEAN, "float16")
            assert (array.dims, array.shape) == (module.dims, module.shape)


def test_attention_is_counted_on_meta() -> None:
    q = torch.empty(1, 2, 16, 8, device="meta")  # b, head, token, channel
    run = partial(F.scaled_dot_product_attention, q, q, q)
    assert count_flops(run) == 2 * (2 * 2 * 16 * 16 * 8)
