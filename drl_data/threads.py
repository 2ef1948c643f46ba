"""How many threads PyTorch's CPU kernels use, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread(yes: bool = True) -> Iterator[None]:
    """Kernels run in the calling thread, if `yes`; the number before is restored.

    Small tensors gain nothing from more threads, and when other processes want the cores the
    threads' barriers cost more than the work: 36 s against 6 s for the demo's probe.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1 if yes else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
