"""A small thing to train, for the tests of the loop: real digits, two heads, one of them unused.

Run under `torchrun` as a module, it trains some cases and writes what came of each.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from drl_data.ranks import Ranks, launched_ranks
from drl_data.train_checkpoints import Checkpoints
from drl_data.train_spec import OptimizerSpec
from drl_data.training import Settings, Venue, train

IDENTITY = {"what": "digits", "settings": {"seed": 3}}
SETTINGS = Settings(epochs=3, learning_rate=1e-2, weight_decay=1e-2, seed=3)


class Learner(nn.Module):
    """Reads the digit and its ink off 8 x 8 pixels; `idle` is used by nobody."""

    def __init__(self, *, norm: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 32), nn.GELU(), nn.LayerNorm(32), nn.Dropout(dropout)
        )
        if norm:
            self.body.append(nn.BatchNorm1d(32))
        self.digit, self.ink, self.idle = nn.Linear(32, 10), nn.Linear(32, 1), nn.Linear(32, 4)

    def forward(self, pixels: Tensor, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        x = self.body(pixels.float() / 16)
        digit = F.cross_entropy(self.digit(x), targets["digit"])
        ink = F.mse_loss(self.ink(x)[:, 0], targets["ink"])
        return {"digit": digit, "ink": ink, "loss": digit + 0.5 * ink}


@dataclass(frozen=True)
class Digits:
    """Batches of the first `n` digits; the last one may be smaller."""

    n: int = 150
    batch_size: int = 32

    @property
    def n_batches(self) -> int:
        return -(-self.n // self.batch_size)

    def whole(self, epoch: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """The batches of one process."""
        digits = load_digits()
        pixels = torch.from_numpy(digits.images[: self.n]).to(torch.uint8)[:, None]
        targets = {
            "digit": torch.from_numpy(digits.target[: self.n]).long(),
            "ink": pixels.float().mean((1, 2, 3)) / 4,
        }
        order = torch.randperm(self.n, generator=torch.Generator().manual_seed(epoch))
        for rows in order.split(self.batch_size):
            yield pixels[rows], {k: v[rows] for k, v in targets.items()}

    def batches(
        self, epoch: int, *, rank: int = 0, world_size: int = 1, start: int = 0
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """The share of a rank: shares of a batch differ by one image where they must."""
        for pixels, targets in islice(self.whole(epoch), start, None):
            share = pixels.tensor_split(world_size)[rank]
            yield share, {k: v.tensor_split(world_size)[rank] for k, v in targets.items()}


@dataclass(frozen=True)
class Case:
    """What is trained on the ranks of `torchrun`, and must equal one process."""

    batch_size: int = 32
    micro_batch: int | None = None
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    norm: bool = False


CASES = {
    "even": Case(),
    "uneven": Case(batch_size=31),
    "micro": Case(batch_size=31, micro_batch=5),
    "average": Case(optimizer=OptimizerSpec(ema_decay=0.9, clip_norm=0.3)),
}

FLOAT32 = OptimizerSpec(precision="float32")
GPU_CASES = {
    "float32": Case(optimizer=FLOAT32),
    "norm": Case(norm=True, optimizer=FLOAT32),
    "bfloat16": Case(),
}


def trained(case: Case, folder: Path, ranks: Ranks) -> dict[str, list[float]]:
    """The loss curve, and the weights and buffers."""
    module = Learner(norm=case.norm)
    settings = Settings(
        SETTINGS.epochs,
        SETTINGS.learning_rate,
        SETTINGS.weight_decay,
        SETTINGS.seed,
        case.optimizer,
        case.micro_batch,
        checkpoint_every=4,
    )
    curve = train(
        module, Digits(batch_size=case.batch_size), settings, IDENTITY,
        Venue(ranks, Checkpoints(folder)),
    )  # fmt: skip
    weights = torch.cat([x.flatten().double().cpu() for x in module.state_dict().values()])
    return {"n": curve.n_images, **curve.losses, "weights": weights.tolist()}


def main(folder: Path, device: str | None) -> None:
    """Every case on the ranks that there are."""
    cases = CASES if device == "cpu" else GPU_CASES
    with launched_ranks(device) as ranks:
        found = {name: trained(case, folder / name, ranks) for name, case in cases.items()}
        (folder / f"rank-{ranks.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
