"""Where a stream is: plain values for checkpoints, shared with the DataLoader's workers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import torch

from drl_data.epochs import Dealing, Segment
from drl_data.errors import SpecError

_SHARED_BYTES = 1 << 16


@dataclass(frozen=True)
class Position:
    """The epoch, its parts that lie behind, and the next batch of the present part."""

    epoch: int = 0
    batch: int = 0
    segments: tuple[Segment, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self)

    @staticmethod
    def from_json(state: Mapping[str, object]) -> Position:
        """What `to_json` gave.

        Raises:
            SpecError: if it did not.
        """
        try:
            segments = state["segments"]
            epoch, batch = state["epoch"], state["batch"]
            if not isinstance(epoch, int) or not isinstance(batch, int) or batch < 0:
                raise TypeError(f"epoch {epoch!r}, batch {batch!r}")
            if not isinstance(segments, list | tuple):
                raise TypeError(f"segments {segments!r}")
            return Position(
                epoch,
                batch,
                tuple(Segment(dealing_from(s["dealing"]), int(s["n_batches"])) for s in segments),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise SpecError(
                f"FeatureStream: not a state that state_dict gave ({type(error).__name__}: {error})"
            ) from error


def dealing_from(values: Mapping[str, object]) -> Dealing:
    """A dealing from plain values."""
    buffer_rows = values["buffer_rows"]
    if not isinstance(buffer_rows, list | tuple):
        raise TypeError(f"buffer_rows {buffer_rows!r}")
    return replace(Dealing(**values), buffer_rows=tuple(buffer_rows))  # type: ignore[arg-type]


class SharedPosition:
    """A position in shared memory: what the training process sets, persistent workers see."""

    def __init__(self) -> None:
        self._memory = torch.zeros(_SHARED_BYTES, dtype=torch.uint8)
        self._memory.share_memory_()  # type: ignore[no-untyped-call]  # not typed in torch
        self.set(Position())

    def get(self) -> Position:
        """The position that was set last."""
        n_bytes = int.from_bytes(self._memory[:4].numpy().tobytes(), "little")
        return Position.from_json(json.loads(self._memory[4 : 4 + n_bytes].numpy().tobytes()))

    def set(self, position: Position) -> None:
        """Change it for all processes.

        Raises:
            SpecError: an epoch that was resumed with other numbers some hundred times.
        """
        data = json.dumps(position.to_json()).encode()
        if len(data) + 4 > len(self._memory):
            raise SpecError(
                f"FeatureStream: epoch {position.epoch} has {len(position.segments)} parts that "
                "were dealt differently, too many to keep; begin the next epoch"
            )
        whole = len(data).to_bytes(4, "little") + data
        self._memory[: len(whole)] = torch.frombuffer(bytearray(whole), dtype=torch.uint8)
