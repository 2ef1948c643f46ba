"""The exception tree. Every message says place, got, want, remedy.

DrlDataError
├── UserError                 the user's mistake: exit status 2, one clear message, no traceback
│   ├── SpecError             a pipeline file or a spec that is not valid
│   ├── TapError              a tap that the model does not have, or that changed its meaning
│   ├── WeightsError          a model that cannot be found or loaded
│   ├── InputError            tars, stores or results that are missing, unreadable or changed
│   └── StoreMismatchError    a store that holds another spec than the one asked for
├── ImageError                one sample that cannot become pixels; costs its row, never the run
├── StoreError                a store that is not as STORE.md says
│   ├── AlignmentError        a write that is not one whole unit
│   ├── FeatureError          features of the wrong shape or dtype, or not finite
│   └── ConflictError         two writers signed one unit with different bytes
├── ObjectError               object storage failed
│   ├── ObjectNotFoundError   ... the object is not there
│   ├── TransientError        ... busy, cut off, timed out: was tried again and again
│   └── StorageUnusableError  ... access denied, bucket missing, disk full: ends the run
├── ForkError                 a handle that does not survive fork() was used in a forked process
├── StoppedError              a unit given back, because the run was told to stop
└── ExecutionError            workers died, or units failed more often than allowed
    ├── HostMemoryError       the host without memory for a unit, as MemoryError is
    ├── DeviceMemoryError     a GPU without enough memory for the model, or for one image
    └── DeviceLostError       a GPU whose context is broken: this process cannot use it again
"""

from __future__ import annotations

import re

HIDDEN = "***"
"""What stands in the place of a secret."""

_USER_INFO = re.compile(r"([a-z][a-z0-9+.-]*://)[^/\s'\"]+@", re.IGNORECASE)
_QUERY = re.compile(r"([a-z][a-z0-9+.-]*://[^?\s'\"]*)\?[^\s'\"]*", re.IGNORECASE)
_PARAMETER = re.compile(
    r"\b((?:X-(?:Amz|Goog)-(?:Signature|Credential|Security-Token)|AWSAccessKeyId|Signature|sig|"
    r"access_token)=)[^&\s'\"]+",
    re.IGNORECASE,
)


def redacted(text: str) -> str:
    """The text without what may be secret in the URLs in it: user, password, query.

    `https://me:secret@host/a.tar?X-Amz-Signature=1` becomes `https://***@host/a.tar?***`. A
    signature of a presigned URL is hidden without a URL around it too.
    """
    text = _QUERY.sub(rf"\1?{HIDDEN}", _USER_INFO.sub(rf"\1{HIDDEN}@", text))
    return _PARAMETER.sub(rf"\1{HIDDEN}", text)


def is_redacted(url: str) -> bool:
    """Whether a URL has lost its secrets, so that it names an object but cannot read it."""
    return f"://{HIDDEN}@" in url or url.endswith(f"?{HIDDEN}")


def visible(text: str) -> str:
    """The text as one line of printable characters: a name in a tar may hold a terminal's controls,
    and all that is not printable is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class DrlDataError(Exception):
    """Root of everything that drl_data raises on purpose. Its message holds no secret of a URL."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(redacted(x) if isinstance(x, str) else x for x in args))


class UserError(DrlDataError):
    """The user's mistake; the message says what to change."""


class SpecError(UserError):
    """A pipeline file or spec that is not valid."""


class TapError(UserError):
    """A tap that the model does not have, or that resolves differently than the store recorded."""


class WeightsError(UserError):
    """A model that cannot be found or loaded."""


class InputError(UserError):
    """Tars, stores or results that are missing or unreadable, or tars that changed."""


class StoreMismatchError(UserError):
    """A store that holds another spec than the one asked for."""


class ImageError(DrlDataError):
    """One sample that cannot become pixels.

    `stage` is where it failed (`index`, `read`, `decode`), `reason` one line for people.
    """

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(f"{stage}: {reason}")
        self.stage = stage
        self.reason = redacted(reason)


class StoreError(DrlDataError):
    """A store that is not as STORE.md says."""


class AlignmentError(StoreError):
    """A write that is not exactly one unit; two writers of one shard would lose rows."""


class FeatureError(StoreError):
    """Features of the wrong shape or dtype, or not finite."""


class ConflictError(StoreError):
    """Two writers signed one unit with different bytes."""


class ObjectError(DrlDataError):
    """Object storage failed."""


class ObjectNotFoundError(ObjectError):
    """The object is not there."""


class TransientError(ObjectError):
    """A request that may work the next time; whoever sees it, requests were repeated in vain."""


class StorageUnusableError(ObjectError):
    """Access denied, a bucket that is missing, a full disk: no retry helps, the run ends."""


class ForkError(DrlDataError):
    """A handle that does not survive fork() was used in a forked process."""


class StoppedError(DrlDataError):
    """A unit was given back, because the run was told to stop."""


class ExecutionError(DrlDataError):
    """Workers died, or units failed more often than allowed."""


class HostMemoryError(ExecutionError, MemoryError):
    """The host had too little memory for a unit: executors take the worker for dead, and search for
    the sample that exhausts memory if it happens again."""


class DeviceMemoryError(ExecutionError):
    """A GPU without enough memory for the model, or for a single image."""


class DeviceLostError(ExecutionError):
    """A GPU whose context is broken: every later call of this process on it fails."""
