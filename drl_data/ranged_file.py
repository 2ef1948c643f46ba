"""An object at a URL as a file that is read at any place, for readers that want a file."""

from __future__ import annotations

import io

from drl_data.objects import Folder


class RangedFile(io.RawIOBase):
    """Read-only; each read is one ranged request."""

    def __init__(self, folder: Folder, path: str, size: int) -> None:
        super().__init__()
        self._folder, self._path, self._size, self._at = folder, path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        n = self._size - self._at if size is None or size < 0 else size
        stop = min(self._at + n, self._size)
        if stop <= self._at:
            return b""
        data = self._folder.get_range(self._path, self._at, stop)
        self._at = stop
        return bytes(data)
