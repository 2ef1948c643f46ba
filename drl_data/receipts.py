"""The receipt: the small JSON that is written last for a unit and says that it is done."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, JsonValue, ValidationError, model_validator

from drl_data.checksums import checked_json, parse_json, signed_json
from drl_data.errors import StoreError, redacted
from drl_data.objects import Buffer
from drl_data.plan import InvalidRow, Unit
from drl_data.spec import FORMAT_VERSION
from drl_data.spec_base import Spec, canonical_json

Count = Annotated[int, Field(ge=0)]


class Damage(Spec):
    """What storing an array cost, against the features as computed: |x - y| / |x| over all values,
    and the mean cosine of rows."""

    relative_rmse: float
    cosine: float


class TarRecord(Spec):
    """One tar as it was when the unit was read; the URL without its secrets."""

    url: Annotated[str, AfterValidator(redacted)]
    size: Count
    etag: str


class Reused(Spec):
    """What of a unit was copied from an older store instead of computed."""

    store: str
    """URL, without its secrets."""
    rows: Count = 0
    """Rows of which anything was copied."""
    features: Count = 0
    """Features that were copied: one for each row, array, timestep and view."""
    linked: Count = 0
    """Whole objects that are hard links."""
    copied: Count = 0
    """Whole objects that the storage server copied."""
    rewritten: Count = 0
    """Whole objects whose bytes were read and written."""

    def added_to(self, other: Reused | None) -> Reused:
        """Both together."""
        if other is None:
            return self
        a, b = (one.model_dump(exclude={"store"}) for one in (self, other))
        return Reused(store=self.store, **{name: n + b[name] for name, n in a.items()})


class RunRecord(Spec):
    """How a unit was computed: seconds by stage, peak memory, where, with what. Never content."""

    seconds: dict[str, float] = Field(default_factory=dict)
    """Keys: read, decode, condition, encode, denoise, copy, reuse, write, wait."""
    peak_bytes: Count = 0
    """Peak of the device's memory, 0 on a CPU."""
    host: str = ""
    device: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    attempt: Annotated[int, Field(ge=1)] = 1
    damage: dict[str, Damage] = Field(default_factory=dict)
    """By array, measured on the first batch of unit 0; empty in other units."""
    tars: tuple[TarRecord, ...] = ()
    """The tars that the rows were read from."""
    retries: Count = 0
    """Requests to object storage, for this unit, that failed and were made again."""
    micro_batch: Count | None = None
    """Images of one forward, where a whole batch did not fit the device's memory."""
    adopted: tuple[str, ...] = ()
    """Objects that an earlier attempt had written and that were kept."""
    reused: tuple[Reused, ...] = ()
    """What was copied from older stores (`drl extract --reuse`, `drl merge`)."""


class NonFinite(Spec):
    """Values of an array at a timestep that were not finite as computed."""

    nan: Count = 0
    inf: Count = 0


class UnitCounts(Spec):
    """What was counted while a unit was computed, and a digest of the samples that it holds."""

    samples: str = ""
    """`SampleIndex.digest_rows` of the unit's rows: equal for equal samples in equal order."""
    input_bytes: Count = 0
    """Bytes of the images, compressed."""
    clipped: dict[str, dict[str, Count]] = Field(default_factory=dict)
    """Array -> requested timestep -> finite values that the storage type could not hold; an array
    that has one entry for all timesteps counts under `any`. Over all views; also of rows that are
    invalid for it."""
    non_finite: dict[str, dict[str, NonFinite]] = Field(default_factory=dict)
    """Likewise, values that were NaN or infinite as computed."""
    flagged: Count = 0
    """Images that a safety checker made black (`drl synthesize`)."""
    fits: dict[str, Count] = Field(default_factory=dict)
    """Array -> CRC-32C of the fitted reduction that it was reduced by."""


class ObjectRecord(Spec):
    """One object that a unit wrote: path in the store, size, CRC-32C of its bytes."""

    path: str
    n_bytes: Count
    crc32c: Annotated[int, Field(ge=0, lt=2**32)]


class Receipt(Spec):
    """A unit is done when its receipt exists."""

    format: int = FORMAT_VERSION
    fingerprint: str
    unit: Count
    start: Count
    stop: int
    n_ok: Count
    n_invalid: Count
    invalid: tuple[InvalidRow, ...]
    """Rows without features, in increasing order."""
    counts: UnitCounts
    objects: tuple[ObjectRecord, ...]
    run: RunRecord

    @model_validator(mode="after")
    def _nothing_dropped(self) -> Receipt:
        rows = [row.row for row in self.invalid]
        if self.n_ok + self.n_invalid != self.stop - self.start or self.n_invalid != len(rows):
            raise ValueError(
                f"{self.n_ok} ok + {self.n_invalid} invalid ({len(rows)} listed) is not the "
                f"{self.stop - self.start} rows of the unit"
            )
        if rows != sorted(set(rows)) or any(not self.start <= row < self.stop for row in rows):
            raise ValueError(
                f"invalid rows {rows}: want distinct, increasing rows of {self.start}..{self.stop}"
            )
        return self

    def content(self) -> dict[str, JsonValue]:
        """The part that must be equal however the unit was computed: everything but `run`."""
        return self.model_dump(mode="json", exclude={"run"})

    def to_json(self) -> bytes:
        """The object's bytes, with their own checksum."""
        return canonical_json(signed_json(self.model_dump(mode="json")))

    @classmethod
    def from_json(cls, data: Buffer, place: str) -> Receipt:
        """Parse a receipt; `place` names it in errors.

        Raises:
            StoreError: if it is not a receipt, of another format, or damaged.
        """
        try:
            return cls.model_validate_json(canonical_json(checked_json(parse_json(data))))
        except ValueError as error:
            why = str(error)
            if isinstance(error, ValidationError):
                first = error.errors()[0]
                why = f"{'.'.join(map(str, first['loc'])) or 'receipt'}: {first['msg']}"
            raise StoreError(
                f"{place}: not a receipt of format {FORMAT_VERSION} ({why}); "
                "`drl extract --repair` computes the unit anew"
            ) from error


def receipt_path(unit: Unit) -> str:
    """Path of a unit's receipt in the store."""
    return f"receipts/{unit.id:08d}.json"


def fit_path(array: str) -> str:
    """Path of the object that an array's fitted reduction is in."""
    return f"fits/{array}.safetensors"
