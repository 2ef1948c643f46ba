"""What an error of a storage library means: gone, refused for good, or worth another try.

obstore has one exception for most failures, so its text is read: the status of the answer, and the
code and message of an XML body. Nothing else of the text is shown, because it names the request.
"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass

from obstore.exceptions import (
    InvalidPathError,
    NotSupportedError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnknownConfigurationKeyError,
)

from drl_data.errors import (
    ObjectError,
    ObjectNotFoundError,
    StorageUnusableError,
    TransientError,
)
from drl_data.folders import unusable

_STATUS = re.compile(r"status code: ([1-5][0-9][0-9]) ?([A-Za-z -]*)")
_CODE = re.compile(r"<Code>([^<]{1,100})</Code>")
_MESSAGE = re.compile(r"<Message>([^<]{1,300})</Message>")
_REQUEST = re.compile(r"Error performing .{0,40}?\S+://\S+ in [0-9.]+\S+ - |\S+://\S+")

_RETRIED_STATUS = frozenset((408, 425, 429, *range(500, 600))) - {501, 505, 507}
_RETRIED_CODES = frozenset(
    (
        "BadDigest",  # bytes that changed on their way
        "ConditionalRequestConflict",
        "IncompleteBody",
        "OperationAborted",
        "RequestTimeout",
        "SlowDown",
        "XAmzContentSHA256Mismatch",
    )
)
_FULL_CODES = frozenset(
    ("QuotaExceeded", "XMinioStorageFull", "StorageFull", "InsufficientStorage")
)
_NO_BUCKET_CODES = frozenset(("NoSuchBucket", "ContainerNotFound", "AllAccessDisabled"))
_DENIED_CODES = frozenset(
    ("ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "TokenRefreshRequired",
     "AuthorizationHeaderMalformed", "AccessDenied")
)  # fmt: skip

_DENIED = (
    "give these credentials the rights to list, read, and write (without the right to list, S3 "
    "denies access to what is missing); expired ones must be renewed, and the clock be right"
)
_NO_BUCKET = "make the bucket, or mend its name, the region or the endpoint (AWS_ENDPOINT_URL)"
_FULL = "the storage is full, or a quota is used up; make room"
_AGAIN = "then run the same command again"


@dataclass(frozen=True)
class Answer:
    """What a server answered, as far as an obstore error tells; status 0 if it did not answer."""

    status: int
    code: str
    text: str
    """One line for people, without the request."""
    without_ranges: bool
    """The server sent a whole object where a part was asked for."""

    @classmethod
    def of(cls, error: Exception) -> Answer:
        """Read an error of obstore."""
        text = str(error).partition("\n\nDebug source")[0]
        status, code, message = _STATUS.search(text), _CODE.search(text), _MESSAGE.search(text)
        if status is None:
            shown = " ".join(_REQUEST.sub("", text).split())[:300] or type(error).__name__
        else:
            shown = f"{status[1]} {status[2].strip()}"
            shown += "".join(f", {found[1].strip()}" for found in (code, message) if found)
        return cls(
            int(status[1]) if status else 0,
            code[1] if code else "",
            shown,
            isinstance(error, NotSupportedError) or "Received non-partial response" in text,
        )

    @property
    def is_transient(self) -> bool:
        """Whether the server says that the same request may work later."""
        return self.status in _RETRIED_STATUS or self.code in _RETRIED_CODES


def obstore_error(place: str, error: Exception, *, writing: bool = False) -> ObjectError:
    """The error that an error of obstore means; `writing`: of a request to write.

    No answer at all (no connection, a time-out, a body that broke off) is transient.
    """
    answer = Answer.of(error)
    if answer.code in _FULL_CODES or answer.status == 507:
        return StorageUnusableError(f"{place}: {answer.text}: {_FULL}, {_AGAIN}")
    if answer.is_transient:
        return TransientError(f"{place}: {answer.text}")
    missing = answer.status == 404 or isinstance(error, FileNotFoundError)
    if answer.code in _NO_BUCKET_CODES or (missing and writing):
        return StorageUnusableError(f"{place}: {answer.text}: {_NO_BUCKET}, {_AGAIN}")
    if missing:
        return ObjectNotFoundError(f"{place}: no such object")
    if isinstance(error, UnauthenticatedError) and not answer.status:
        # Those of an instance's role are fetched over the network, too.
        return TransientError(f"{place}: the credentials could not be fetched: {answer.text}")
    if (
        isinstance(error, PermissionDeniedError | UnauthenticatedError)
        or answer.status in (401, 403)
        or answer.code in _DENIED_CODES
    ):
        return StorageUnusableError(f"{place}: {answer.text}: {_DENIED}, {_AGAIN}")
    if "incorrectly configured region" in str(error):
        return StorageUnusableError(f"{place}: {answer.text}: set AWS_REGION, {_AGAIN}")
    if answer.without_ranges:
        return ObjectError(f"{place}: the server does not give parts of objects; use another")
    known = isinstance(error, InvalidPathError | UnknownConfigurationKeyError | ValueError)
    if answer.status or known:
        return ObjectError(f"{place}: {answer.text}")
    return TransientError(f"{place}: {answer.text}")


_MISUSED = (TypeError, AttributeError, NotImplementedError, ValueError, KeyError, IndexError)
"""Errors of a call, not of the storage: the same call fails the same way."""


def fsspec_error(place: str, error: Exception) -> ObjectError:
    """The error that an error of an fsspec file system means; an unknown one is transient.

    URLs in what the library below says are not shown.
    """
    if isinstance(error, FileNotFoundError):
        return ObjectNotFoundError(f"{place}: no such object")
    if isinstance(error, PermissionError):
        return StorageUnusableError(f"{place}: access is denied: {_DENIED}, {_AGAIN}")
    if isinstance(error, OSError):
        final = unusable(place, error)
        if final is not None:
            return final
        if error.errno in (errno.EISDIR, errno.ENOTDIR, errno.EINVAL, errno.ENAMETOOLONG):
            return ObjectError(f"{place}: {error.strerror or error}")
    text = " ".join(_REQUEST.sub("", f"{type(error).__name__}: {error}").split())[:300]
    return (ObjectError if isinstance(error, _MISUSED) else TransientError)(f"{place}: {text}")
