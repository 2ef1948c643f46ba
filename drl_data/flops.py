"""FLOPs of a forward pass, counted and not estimated: 2 for each multiply and add, by torch itself.

On the meta device nothing is computed, so the largest models are counted in a second. Count there:
torch has no formula for the CPU's fused attention and would leave it out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


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

    def per_image(self, n_forwards: int) -> int:
        """FLOPs for `n_forwards` cut forwards (timesteps times members) and one encoding."""
        return self.encode + n_forwards * self.cut


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
    select: Callable[[nn.Module, object], Tensor | None],
) -> tuple[list[ModuleCall], int]:
    """Every module that puts out a tensor, in the order of the tree, and the FLOPs of the whole.

    `select` says which tensor of what a module puts out is meant; None where there is none.
    """
    calls: dict[str, ModuleCall] = {}
    counter = FlopCounterMode(display=False)

    def note(path: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, _: object, output: object) -> None:
            tensor = select(module, output)
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
