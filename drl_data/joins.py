"""Several stores as one: features of the same samples, joined by row or by key.

Teacher A beside teacher B, VAE moments beside an encoder's tokens. Rows are those of the first
store; another store's row of the same sample is found

    by digest   both were made from the same index, or from indices of equal samples in equal order:
                row i is row i, proven without looking at a key
    by key      otherwise; a key that comes twice is refused, and so are images of unequal size

Names of arrays get the store's name in front: `dino/layernorm`, `vae/latent.moments`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from drl_data.errors import InputError, SpecError
from drl_data.index import SampleIndex
from drl_data.store import FeatureStore

Rows = npt.NDArray[np.int64]

ABSENT = "absent"
"""Status of a sample of the first store that another store does not have."""

_SEPARATOR = "\x1f"


@dataclass(frozen=True)
class JoinedStores:
    """Stores by name. `own_rows[name][row]` is the row in that store of the first store's `row`,
    -1 where it has none; None where it is the same row."""

    stores: Mapping[str, FeatureStore]
    own_rows: Mapping[str, Rows | None]

    @property
    def first(self) -> FeatureStore:
        """The store whose rows, labels and units are used."""
        return next(iter(self.stores.values()))

    @property
    def url(self) -> str:
        """URLs of all stores, for messages."""
        return " + ".join(store.url for store in self.stores.values())

    def by_digest(self, name: str) -> bool:
        """Whether rows of that store were proven equal, without looking keys up."""
        return self.own_rows[name] is None

    def samples(self) -> pa.Table:
        """`FeatureStore.samples` of the first store; the status is `ok` where all stores say so,
        else that of the first store that does not, `absent` where a store has no such sample."""
        table = self.first.samples()
        columns = {name: table[name] for name in ("status", "stage", "reason")}
        for name, store in list(self.stores.items())[1:]:
            other, own = store.samples(), self.own_rows[name]
            if own is not None:
                other = other.take(pa.array(np.where(own < 0, 0, own)))
            theirs = {column: other[column] for column in columns}
            if own is not None:
                theirs["status"] = pc.if_else(pa.array(own < 0), ABSENT, theirs["status"])
            mine = pc.equal(columns["status"], "ok")
            columns = {c: pc.if_else(mine, theirs[c], columns[c]) for c in columns}
        for name, values in columns.items():
            table = table.set_column(table.column_names.index(name), name, values)
        return table


Source = FeatureStore | JoinedStores
"""What loaders read: one store, or several that are joined."""


def as_joined(source: Source) -> JoinedStores:
    """One store as a join of one, whose arrays keep their names."""
    if isinstance(source, JoinedStores):
        return source
    return JoinedStores({"": source}, {"": None})


def join(
    stores: Mapping[str, FeatureStore],
    *,
    on: Sequence[Literal["key", "split"]] = ("key",),
    missing: Literal["refuse", "drop"] = "refuse",
    same_images: bool = True,
) -> JoinedStores:
    """Several stores of the same samples, for `FeatureDataset`, `FeatureStream` and `select`.

    `on`: what says which sample is which where row orders differ; ("split", "key") if keys repeat
    between splits. `missing="drop"` leaves out samples that one of the stores lacks. Images of
    matched samples must have equal sizes in bytes; `same_images=False` trusts keys alone, for
    images that were packed again in another format.

    Raises:
        InputError: repeated keys; samples of the first store that another one lacks; other images.
        SpecError: no stores, or names that cannot stand before a "/".
    """
    if not stores or any(not name or "/" in name for name in stores):
        raise SpecError(f"join: names {list(stores)}; want at least one, none empty or with '/'")
    first = next(iter(stores.values()))
    own_rows = {
        name: None if store is first else _own_rows(first, store, on, missing, same_images)
        for name, store in stores.items()
    }
    return JoinedStores(dict(stores), own_rows)


def _own_rows(
    first: FeatureStore,
    other: FeatureStore,
    on: Sequence[Literal["key", "split"]],
    missing: Literal["refuse", "drop"],
    same_images: bool,
) -> Rows | None:
    """Rows of `other` in the order of `first`; None if that is the order that they have."""
    n = first.spec.n_samples
    if n == other.spec.n_samples:
        if first.spec.dataset == other.spec.dataset:
            return None
        if first.index.digest_rows(0, n) == other.index.digest_rows(0, n):
            return None
    mine, theirs = _names(first, on), _names(other, on)
    own: Rows = pc.fill_null(pc.index_in(mine, value_set=theirs), -1).cast(pa.int64()).to_numpy()
    lacking = np.flatnonzero(own < 0)
    if len(lacking) == n or (len(lacking) and missing == "refuse"):
        raise InputError(
            f"join: {other.url} lacks {len(lacking)} of the {n} samples of {first.url}, the first "
            f"is {_shown(mine, int(lacking[0]))}; "
            + (
                "these are other data sets"
                if len(lacking) == n
                else "missing='drop' leaves such out"
            )
        )
    if same_images:
        _require_same_images(first, other, own)
    return own


def _names(store: FeatureStore, on: Sequence[Literal["key", "split"]]) -> pa.Array:
    """What each sample of a store is called, all different."""
    table = store.index.table
    columns = [table[column].combine_chunks() for column in on]
    names = pc.binary_join_element_wise(*columns, _SEPARATOR)
    values = pc.value_counts(names)
    repeated = values.filter(pc.greater(values.field("counts"), 1))
    if len(repeated):
        name = repeated.field("values")[0].as_py()
        rows = np.flatnonzero(pc.equal(names, name).to_numpy(zero_copy_only=False)).tolist()
        raise InputError(
            f"join: {len(repeated)} names come twice in {store.url}, for one "
            f"{'/'.join(name.split(_SEPARATOR))!r} in rows {rows[:3]}; a join by {list(on)} needs "
            + ("each once" if "split" in on else "each once: say on=('split', 'key')")
        )
    return names


def _require_same_images(first: FeatureStore, other: FeatureStore, own: Rows) -> None:
    def sizes(index: SampleIndex) -> npt.NDArray[np.int64]:
        found: Rows = index.table["size"].to_numpy()
        return found

    here = np.flatnonzero(own >= 0)
    differing = here[sizes(first.index)[here] != sizes(other.index)[own[here]]]
    if len(differing):
        row = int(differing[0])
        key = first.index.table["key"][row].as_py()
        raise InputError(
            f"join: {len(differing)} samples have equal keys but images of other sizes in "
            f"{first.url} and {other.url}, the first is {key!r}; if they are the same pictures "
            "packed again, say same_images=False"
        )


def _shown(names: pa.Array, row: int) -> str:
    return repr("/".join(str(names[row].as_py()).split(_SEPARATOR)))
