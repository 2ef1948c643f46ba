"""What a task found, as JSON on disk."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from drl_data.errors import InputError
from drl_data.spec_base import Spec


class TaskResult(Spec):
    """The base of every task's result; `task` is the verb of the command line that makes it."""

    task: ClassVar[str]

    def save(self, path: str | Path) -> None:
        """Write as JSON; makes the folder."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(self.model_dump_json(indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            InputError: if there is no such file, or it is not a result of this task.
        """
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path}: not a result of `drl {cls.task}` ({error}); run it again"
            ) from error
