"""The processes that train together: who of them this one is, and what they do in common.

One process needs none of it. Several are started by `torchrun`, which says who is who by
environment variables, or by Ray Train, which has made the process group already.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from drl_data.errors import SpecError


class Ranks:
    """This process among `world_size` that train together, on one device each."""

    def __init__(self, device: torch.device) -> None:
        """Of the process group, if there is one."""
        grouped = dist.is_available() and dist.is_initialized()
        self.device = device
        self.rank = dist.get_rank() if grouped else 0
        self.world_size = dist.get_world_size() if grouped else 1
        # Numbers of the host travel by gloo: NCCL would make the host wait for the device.
        self._group = None
        if self.world_size > 1 and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value added up over the processes, in float64; all of them call it, and get the
        same. With none but this one, the values as they are."""
        if self.world_size == 1 or not values:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self._group)
        found: list[float] = tensor.tolist()
        return found

    def wrapped(self, module: nn.Module, *, divided: bool) -> nn.Module:
        """The module whose gradients are the mean over all processes.

        Its weights are those of `module`, but with batch norm on GPUs: then they are copies, which
        normalise over all processes. `divided` says that a process does not see its share of a
        batch at once.

        Raises:
            SpecError: batch norm would see less than the whole batch.
        """
        normalises = any(isinstance(m, _BatchNorm) and m.training for m in module.modules())
        if normalises and divided:
            raise SpecError(
                "micro_batch: the student has batch norm, which must see its whole share of a "
                "batch; leave micro_batch out, or take a student with layer norm (convnext, vit)"
            )
        if self.world_size == 1:
            return module
        if normalises:
            if self.device.type != "cuda":
                raise SpecError(
                    f"the student has batch norm, and each of {self.world_size} processes on CPUs "
                    "would normalise by the images of its own (only GPUs have SyncBatchNorm); take "
                    "a student with layer norm (convnext, vit), one process, or GPUs"
                )
            module = nn.SyncBatchNorm.convert_sync_batchnorm(  # type: ignore[no-untyped-call]
                copy.deepcopy(module)
            )
        return DistributedDataParallel(
            module,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            find_unused_parameters=True,  # poolers of transformers; heads that a batch leaves out
        )


@contextmanager
def launched_ranks(device: str | None) -> Iterator[Ranks]:
    """The processes that `torchrun` started, joined in a group; without it this process alone.

    `device` defaults to the GPU of this process's local rank, else the CPU.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    has_gpus = torch.cuda.is_available()
    launched = "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1
    if device is None:
        device = ("cuda" if not launched else f"cuda:{local_rank}") if has_gpus else "cpu"
    chosen = torch.device(device)
    if not launched:
        yield Ranks(chosen)
        return
    if chosen.type == "cuda":
        chosen = torch.device("cuda", local_rank)  # one for each, whatever was said to all
        if local_rank >= torch.cuda.device_count():
            raise SpecError(
                f"torchrun: process {local_rank} of this machine, which has "
                f"{torch.cuda.device_count()} GPUs; want one for each, or --device cpu"
            )
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Ranks(chosen)
    finally:
        dist.destroy_process_group()
