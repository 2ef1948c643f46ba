"""Patterns of URLs: braces and globs, and what is there when nothing matches."""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import re
from collections.abc import Sequence
from contextlib import suppress

import braceexpand

from drl_data.errors import InputError, ObjectError
from drl_data.objects import Folder, open_folder, open_parent


def expand_urls(pattern: str) -> list[str]:
    """The URLs that braces (`{000..012}`, `{a,b}`) and globs (`*`, `?`, `[ab]`, `**`) stand for.

    Braces expand in the order written; what one glob matches is sorted by name. A name without
    glob characters is returned as it is, whether it exists or not.

    Raises:
        InputError: if braces do not match, or a glob matches nothing.
    """
    try:
        names = list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise InputError(f"{pattern!r}: {error}; close every brace that is opened") from error
    return [url for name in names for url in _glob(name)]


def _glob(url: str) -> list[str]:
    if not re.search(r"[*?[]", url) or url.startswith(("http:", "https:")):
        return [url]
    parts = url.split("/")
    first = next(i for i, part in enumerate(parts) if re.search(r"[*?[]", part))
    root = "/".join(parts[:first]) or ("/" if url.startswith("/") else ".")
    folder = open_folder(root)
    if _exists(*open_parent(url)):
        return [url]  # a file whose own name has brackets
    pattern = re.compile(_glob_regex(parts[first:]))
    try:
        names = sorted(info.path for info in folder.list())
    except ObjectError as error:
        raise InputError(f"{url!r}: cannot list {root}: {error}") from error
    found = [name for name in names if pattern.fullmatch(name)]
    if not found:
        raise InputError(
            f"{url!r} matches nothing: {root} holds {_nearest('/'.join(parts[first:]), names)}"
        )
    prefix = "/".join(parts[:first])
    return [f"{prefix}/{name}" if first else name for name in found]


def _glob_regex(parts: Sequence[str]) -> str:
    """`*` and `?` stay within a folder, `**` is any number of folders."""
    pieces = []
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if part == "**":
            pieces.append(".*" if last else "(?:.*/)?")
        else:
            inside = fnmatch.translate(part)[len("(?s:") : -len(r")\Z")].replace(".*", "[^/]*")
            pieces.append(inside if last else inside + "/")
    return "".join(pieces)


def _exists(folder: Folder, name: str) -> bool:
    with suppress(ObjectError):
        return bool(folder.head(name))
    return False


def _nearest(name: str, names: Sequence[str]) -> str:
    """At most three of `names`, the most similar ones first, for an error message."""
    if not names:
        return "nothing"
    near = difflib.get_close_matches(name, names[:10_000], n=3, cutoff=0.3) or list(names[:3])
    return f"{len(names)} files, nearest: {', '.join(near)}"


def missing(url: str, folder: Folder, name: str) -> InputError:
    """The error that a tar is not there, with the names nearest to it."""
    names: list[str] = []
    with suppress(ObjectError):
        names = [info.path for info in itertools.islice(folder.list(), 10_000)]
    return InputError(f"{url}: no such tar; {folder.url} holds {_nearest(name, names)}")
