"""A file under its final name, unless the name is taken: for file systems with and without links.

link       atomic everywhere that has hard links: the disks of Linux, NFS
renameat2  Linux, where there are none: FAT, exFAT, some FUSE and network mounts
rename     where the kernel or the file system cannot refuse an existing name: looks first, so
           of two writers in the same instant the later one wins. Never a half-written file.
"""

from __future__ import annotations

import ctypes
import errno
import os
from functools import cache
from pathlib import Path

AT_FDCWD = -100
RENAME_NOREPLACE = 1

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
"""FAT has no links (EPERM), others say so (ENOTSUP, ENOSYS), or had too many of one file."""
_NO_FLAG = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def place_if_absent(source: str, target: Path) -> bool:
    """Give a whole, synced file in the same folder its final name; False if the name is taken.

    `source` may stay behind.

    Raises:
        OSError: the file system refuses for another reason.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _renamed(source, target)
    return True


def _renamed(source: str, target: Path) -> bool:
    rename = _renameat2()
    if rename is not None:
        arguments = (AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target))
        if rename(*arguments, RENAME_NOREPLACE) == 0:
            return True
        code = ctypes.get_errno()
        if code == errno.EEXIST:
            return False
        if code not in _NO_FLAG:
            raise OSError(code, os.strerror(code), str(target))
    if os.path.lexists(target):
        return False
    os.replace(source, target)
    return True


@cache
def _renameat2() -> ctypes._NamedFuncPointer | None:
    """The system call, as the C library has it; None elsewhere than on Linux."""
    try:
        return ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return None
