"""Handles that do not survive fork(), noticed before they hang."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from drl_data.errors import ForkError
from drl_data.objects import Folder


class ForkGuard:
    """Refuses folders that were opened before this process was forked, unless they are files.

    Clients of object storage own threads, and a forked child has their locks without their threads.
    A pickled copy belongs to the process that unpickles it, where folders are opened anew.
    """

    def __init__(self, remote: tuple[str, ...]) -> None:
        self._remote = remote
        self._pid = os.getpid()

    @classmethod
    def of(cls, folders: Iterable[Folder]) -> ForkGuard:
        """A guard of these folders, opened in this process."""
        return cls(tuple(f.url for f in folders if f.local_path("") is None))

    def __reduce__(self) -> tuple[Callable[..., ForkGuard], tuple[tuple[str, ...]]]:
        return ForkGuard, (self._remote,)

    def check(self) -> None:
        """Raise at once where a read could wait for ever.

        Raises:
            ForkError: this process was forked after a remote folder was opened.
        """
        if self._remote and os.getpid() != self._pid:
            raise ForkError(
                f"{self._remote[0]}: this process was forked after the store was opened, and what "
                "reads from object storage did not survive the fork; use num_workers=0 "
                "(FeatureStream reads ahead in a thread), or start workers by 'spawn' or "
                "'forkserver': DataLoader(..., multiprocessing_context='forkserver')"
            )
