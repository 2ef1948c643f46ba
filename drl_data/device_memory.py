"""What is done when memory runs out, and when a GPU is lost.

A batch that does not fit a device is computed in micro-batches: fewer images a forward, the same
keys, noise and order. Their size is halved until they fit and never grows again in a worker: what
did not fit once fits no better later, and each try costs a forward.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from drl_data.errors import DeviceLostError, DeviceMemoryError, DrlDataError, HostMemoryError


class MicroBatches:
    """How many images one forward of a worker takes; shared by its threads."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.size: int | None = None
        """None: as many as a batch has."""

    def run(self, n_images: int, work: Callable[[int, int], None]) -> None:
        """Call `work(start, stop)` for parts of 0 .. n_images, in order.

        A part that does not fit is done again from its beginning, with fewer images.

        Raises:
            DeviceMemoryError: a single image does not fit.
        """
        start = 0
        while start < n_images:
            stop = min(start + (self.size or n_images), n_images)
            if self._fits(start, stop, work):
                start = stop
            else:
                self.size = min((stop - start) // 2, self.size or n_images)
                gc.collect()  # the frames that the error held, and their tensors
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()

    def _fits(self, start: int, stop: int, work: Callable[[int, int], None]) -> bool:
        try:
            work(start, stop)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if stop - start == 1:
                raise DeviceMemoryError(
                    f"{described(self._device)}: a single image does not fit "
                    f"({first_line(error)}); set `backbone.dtype: bfloat16` or a smaller "
                    "`images.size`, tap fewer modules, or take a GPU with more memory"
                ) from error
            return False
        return True


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device had too little memory; its context works on."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    # cuBLAS and cuDNN have workspaces of their own, which they fail to get in their own words.
    words = ("CUDA error: out of memory", "CUDA out of memory", "_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def is_out_of_host_memory(error: BaseException) -> bool:
    """Whether the host had too little memory, for Python or for torch's CPU allocator."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


@contextmanager
def faults_named(device: torch.device, doing: str) -> Iterator[None]:
    """Turn what hardware does into errors that say so; `doing` says what was done.

    Raises:
        DeviceMemoryError: the device had too little memory.
        HostMemoryError: the host had.
        DeviceLostError: the device's context is broken.
    """
    try:
        yield
    except DrlDataError:
        raise
    except (RuntimeError, MemoryError) as error:
        if is_out_of_host_memory(error):
            raise HostMemoryError(
                f"{doing}: the host has too little memory ({first_line(error)}); set a smaller "
                "`run.memory_bytes`, `run.leases` or `run.decode_threads`"
            ) from error
        if is_out_of_memory(error):
            raise DeviceMemoryError(
                f"{doing}: {described(device)}: too little memory ({first_line(error)}); set "
                "`backbone.dtype: bfloat16`, end what else runs on it, or take a GPU with more"
            ) from error
        if device.type == "cuda" and not _answers(device):
            raise DeviceLostError(
                f"{doing}: {torch.cuda.get_device_name(device)}: its context is broken "
                f"({first_line(error)}); this process cannot use it again, another one may"
            ) from error
        raise


def described(device: torch.device) -> str:
    """Name of a device and its memory, total and free."""
    if device.type != "cuda":
        return str(device)
    free, total = torch.cuda.mem_get_info(device)
    name = torch.cuda.get_device_name(device)
    return f"{name} ({total / 1e9:.2f} GB of memory, {free / 1e9:.2f} GB free)"


def first_line(error: BaseException) -> str:
    """The first line of a message: CUDA's go on for many."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def _answers(device: torch.device) -> bool:
    """Whether a GPU still computes: errors that break its context come back at every call."""
    try:
        torch.cuda.synchronize(device)
        torch.ones(1, device=device).add_(1).item()
    except RuntimeError:
        return False
    return True
