"""FLOPs of a forward pass, counted and not estimated: 2 for each multiply and add, by torch itself.

On the meta device nothing is computed, so the largest models are counted in a second. Count there:
torch has no formula for the CPU's fused attention and would leave it out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from drl_data.spec import FeatureSpec


@dataclass(frozen=True)
class FeatureFlops:
    """FLOPs for one image: one whole forward, one that ends at the last tap, and the encoding."""

    whole: int
    cut: int
    encode: int

    @property
    def saving(self) -> float:
        """Share of the forward that ending at the last tap leaves out, 0..1."""
        return 1 - self.cut / self.whole if self.whole else 0.0

    def per_image(self, forwards: Forwards, n_views: int = 1) -> int:
        """FLOPs for one encoding and the forwards of each view."""
        return n_views * (self.encode + forwards.cut * self.cut + forwards.whole * self.whole)


class Forwards(NamedTuple):
    """Forwards for one view of an image: those that end at the last tap, and whole ones."""

    cut: int
    whole: int = 0


def count_forwards(spec: FeatureSpec) -> Forwards:
    """Timesteps x members x candidates; of an inversion, every step down to the deepest label."""
    if spec.noise.kind == "inversion":
        assert spec.schedule.n_steps is not None, "the convention of an inversion demands it"
        return Forwards(1, spec.schedule.n_steps - int(min(spec.schedule.timesteps)) - 1)
    n_candidates = max(len(spec.condition.candidates), 1)
    return Forwards(len(spec.schedule.timesteps) * spec.noise.members * n_candidates)


@dataclass(frozen=True)
class ModuleCall:
    """A module at the end of its first call: the first tensor that it put out, and the FLOPs so
    far in the whole forward."""

    path: str
    kind: str
    output: Tensor
    flops_through: int


def count_flops(run: Callable[[], object]) -> int:
    """FLOPs of whatever `run` does."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def trace(
    model: nn.Module,
    forward: Callable[[], object],
    *,
    select: Callable[[str, object], Tensor | None],
) -> tuple[list[ModuleCall], int]:
    """Every module that puts out a tensor, in the order of the tree, and the FLOPs of the whole.

    `select` says which tensor of what a module puts out is meant; None where there is none.
    """
    calls: dict[str, ModuleCall] = {}
    counter = FlopCounterMode(display=False)

    def note(path: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, _: object, output: object) -> None:
            tensor = select(path, output)
            if tensor is not None and path not in calls:
                through = int(counter.get_total_flops())
                calls[path] = ModuleCall(path, type(module).__name__, tensor, through)

        return hook

    handles = [
        module.register_forward_hook(note(path)) for path, module in model.named_modules() if path
    ]
    try:
        with counter:
            forward()
    finally:
        for handle in handles:
            handle.remove()
    ordered = [calls[path] for path, _ in model.named_modules() if path in calls]
    return ordered, int(counter.get_total_flops())
