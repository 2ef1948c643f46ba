"""Keys as names of files and of members of tars, whatever is in them."""

from __future__ import annotations

import hashlib
from urllib.parse import quote

MAX_NAME = 180
"""Characters of a key that become a file's name; file systems allow 255 bytes."""


def file_name(key: str) -> str:
    """A key as one name in a folder, whatever is in it: `a/b` is `a%2Fb`; never a path, never
    hidden, and short."""
    name = quote(key, safe=" +,=@()[]")
    if name.startswith("."):
        name = "%2E" + name[1:]
    if len(name) <= MAX_NAME:
        return name
    return f"{name[:MAX_NAME]}-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}"


def member_name(key: str) -> str:
    """A key inside a tar. Folders stay, so that tars of images join; what would lead elsewhere, and
    dots, which would cut the key there, are escaped."""
    parts = key.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in key:
        return file_name(key).replace(".", "%2E")
    return "/".join(file_name(part).replace(".", "%2E") for part in parts)
