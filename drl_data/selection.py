"""Which rows, taps, timesteps and views of a store, or of joined stores, a consumer reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from drl_data.draws import Purpose, choose, uniform
from drl_data.errors import SpecError, StoreError
from drl_data.joins import JoinedStores, Source, as_joined
from drl_data.spec import ArraySpec
from drl_data.store import FeatureStore

NO_LABEL = -1
"""Label of a sample without one."""

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Draw:
    """One for each item instead of all: a timestep or a view, drawn anew in every epoch.

    `of` which (all that the store has, if not said), with which probabilities (equal, if not said;
    they need not add to 1). The draw is a function of (seed, epoch, row).
    """

    of: Sequence[float | str] | None = None
    weights: Sequence[float] | None = None


Timesteps = Sequence[float] | Draw | Literal["sample"] | None
"""All of the store's (None), these, or one drawn for each item ("sample": any, equally often)."""

Views = str | Sequence[str] | Draw | None
"""The first (None), this one, all of these on an axis, or one drawn for each item ("sample")."""


@dataclass(frozen=True)
class Axis:
    """Positions on an axis of a store, all of them or, with weights, one drawn for each row."""

    positions: tuple[int, ...]
    weights: tuple[float, ...] | None = None

    def __len__(self) -> int:
        """Entries of the axis in a batch."""
        return len(self.positions) if self.weights is None else 1

    def of_rows(self, rows: Rows, seed: int, epoch: int, purpose: Purpose) -> Rows:
        """Positions [len(rows), len(self)] that are read of each row."""
        if self.weights is None:
            return np.broadcast_to(np.array(self.positions, np.int64), (len(rows), len(self)))
        drawn = choose(uniform(seed, epoch, rows, purpose), self.weights)
        return np.array(self.positions, np.int64)[drawn][:, None]


@dataclass(frozen=True)
class Choice:
    """What is read of one store: arrays, timesteps, views, and its rows for those selected."""

    name: str
    store: FeatureStore
    taps: tuple[str, ...]
    times: Axis
    views: Axis
    view_axis: bool
    """Whether batches have an axis of views."""
    own_rows: Rows | None

    def batch_name(self, tap: str) -> str:
        """What a tap is called in a batch."""
        return f"{self.name}/{tap}" if self.name else tap

    def rows(self, rows: Rows) -> Rows:
        """This store's rows of the selection's."""
        return rows if self.own_rows is None else self.own_rows[rows]

    @property
    def arrays(self) -> dict[str, ArraySpec]:
        """What a tap is called in a batch -> its array."""
        return {self.batch_name(tap): self.store.array(tap) for tap in self.taps}

    @property
    def lead(self) -> tuple[int, ...]:
        """Axes of a batch between the row and the feature: (timestep) or (view, timestep)."""
        return (len(self.views), len(self.times)) if self.view_axis else (len(self.times),)

    @property
    def bytes_per_row(self) -> int:
        """Bytes of all taps of a row, at all timesteps and views that are read."""
        parts = [self.store.array(part) for tap in self.taps for part in self.store.parts(tap)]
        return sum(a.bytes_per_row for a in parts) * len(self.times) * len(self.views)


@dataclass(frozen=True)
class Selection:
    """Which rows of a source are read, and what of each store. Rows increase."""

    source: JoinedStores
    rows: Rows
    labels: npt.NDArray[np.int64]
    keys: pa.Array
    choices: tuple[Choice, ...]

    @property
    def rows_per_unit(self) -> int:
        """Rows of a unit of the first store."""
        return self.source.first.spec.rows_per_unit

    @property
    def arrays(self) -> dict[str, ArraySpec]:
        """The taps of a batch, by name, in order."""
        return {name: array for c in self.choices for name, array in c.arrays.items()}

    @property
    def bytes_per_row(self) -> int:
        """Bytes of features that are read of a row."""
        return sum(choice.bytes_per_row for choice in self.choices)

    def places(self, rows: Rows) -> Rows:
        """Where in `rows` these rows are."""
        found: Rows = np.searchsorted(self.rows, rows)
        return found

    def keys_at(self, places: npt.NDArray[np.int64]) -> pa.Array:
        """Keys of the rows at these positions in `rows`."""
        return self.keys.take(pa.array(places))


def select(
    source: Source,
    taps: Sequence[str] | None = None,
    timesteps: Timesteps | Mapping[str, Timesteps] = None,
    *,
    split: str | None = None,
    labelled: bool = False,
    where: pc.Expression | None = None,
    include_invalid: bool = False,
    partial: bool = False,
    view: Views | Mapping[str, Views] = None,
) -> Selection:
    """Rows in order that satisfy every condition; taps, timesteps and views in the order given.

    `split` names one; `labelled` leaves out rows without a label; `where` is a predicate on the
    columns of `samples()` (row, key, split, tar, label, caption, status):
    `pyarrow.compute.field("label") == 3`. `include_invalid` keeps rows without features; they
    read as NaN. `partial` allows a store with pending units, whose rows are left out.

    `timesteps` and `view` are a list, or a `Draw` (or "sample") of one for each item; of joined
    stores they hold for each, or are given by the store's name. Joined rows are valid in all.

    Raises:
        TapError: an unknown tap, timestep or view.
        SpecError: no row is left, nothing is asked for, or the predicate is not one.
        StoreError: units are pending.
    """
    joined = as_joined(source)
    choices = _choices(joined, taps, timesteps, view)
    samples = joined.samples()
    status = samples["status"]
    n_pending = pc.sum(pc.equal(status, "pending")).as_py()
    if n_pending and not partial:
        raise StoreError(
            f"{joined.url}: {n_pending} of {samples.num_rows} rows are not computed yet; run "
            "`drl extract` again, or say partial=True to leave them out"
        )
    keep = pc.equal(status, "ok")
    if include_invalid:
        keep = pc.or_(keep, pc.equal(status, "invalid"))
    if split is not None:
        keep = pc.and_(keep, pc.equal(samples["split"], split))
    if labelled:
        keep = pc.and_(keep, pc.is_valid(samples["label"]))
    chosen = _satisfying(samples.filter(keep), where, joined.url)
    if not chosen.num_rows:
        splits = sorted(pc.unique(samples["split"]).to_pylist())
        raise SpecError(
            f"{joined.url}: no rows with split={split!r}, labelled={labelled}, where={where}; its "
            f"splits are {splits}, {pc.sum(pc.equal(status, 'ok')).as_py()} rows are valid"
        )
    return Selection(
        source=joined,
        rows=chosen["row"].to_numpy(),
        labels=pc.fill_null(chosen["label"], NO_LABEL).to_numpy(),
        keys=chosen["key"].combine_chunks(),
        choices=choices,
    )


def _satisfying(samples: pa.Table, where: pc.Expression | None, url: str) -> pa.Table:
    if where is None:
        return samples
    try:
        return samples.filter(where).sort_by("row")
    except (pa.ArrowException, TypeError) as error:
        raise SpecError(
            f"{url}: where={where} is no predicate on the sample table ({error}); its columns are "
            f"{', '.join(samples.column_names)}, as in pyarrow.compute.field('label') == 3"
        ) from error


# --- taps, timesteps, views ----------------------------------------------------------------------


def _choices(
    joined: JoinedStores,
    taps: Sequence[str] | None,
    timesteps: Timesteps | Mapping[str, Timesteps],
    view: Views | Mapping[str, Views],
) -> tuple[Choice, ...]:
    _check_names(timesteps, joined, "timesteps")
    _check_names(view, joined, "view")
    choices = []
    known: list[str] = []
    for name, store in joined.stores.items():
        prefix = f"{name}/" if name else ""
        own = [f"{prefix}{array.name}" for array in store.features]
        if taps is not None:
            own = [tap for tap in taps if tap.startswith(prefix)]
        known.extend(own)
        if not own:
            continue
        times = _times(store, timesteps.get(name) if isinstance(timesteps, Mapping) else timesteps)
        views, view_axis = _views(store, view.get(name) if isinstance(view, Mapping) else view)
        bare = tuple(tap.removeprefix(prefix) for tap in own)
        for tap in bare:
            store.array(tap)
        choices.append(Choice(name, store, bare, times, views, view_axis, joined.own_rows[name]))
    strange = [tap for tap in taps or () if tap not in known]
    if strange or not choices:
        raise SpecError(
            f"{joined.url}: taps {list(taps or ())}; want some"
            + (f", as '{next(iter(joined.stores))}/TAP'" if "" not in joined.stores else "")
            + (f"; {strange} begin with none of {list(joined.stores)}" if strange else "")
        )
    return tuple(choices)


def _check_names(wanted: object, joined: JoinedStores, what: str) -> None:
    """What is given by store names existing ones."""
    unknown = sorted(wanted.keys() - joined.stores.keys()) if isinstance(wanted, Mapping) else []
    if unknown:
        raise SpecError(
            f"{joined.url}: {what} of {unknown}; the joined stores are {list(joined.stores)}"
        )


def _times(store: FeatureStore, wanted: Timesteps) -> Axis:
    if isinstance(wanted, str):
        if wanted != "sample":
            raise SpecError(f"{store.url}: timesteps={wanted!r}; want a list, a Draw or 'sample'")
        wanted = Draw()
    draw = wanted if isinstance(wanted, Draw) else None
    listed: Sequence[float | str] | None = wanted.of if isinstance(wanted, Draw) else wanted
    values = [time.requested for time in store.times] if listed is None else list(listed)
    if not values or any(isinstance(value, str) for value in values):
        raise SpecError(f"{store.url}: timesteps {values}; want some numbers")
    positions = tuple(store.time_index(float(value)) for value in values)
    return Axis(positions, None if draw is None else _weights(store, draw, values))


def _views(store: FeatureStore, wanted: Views) -> tuple[Axis, bool]:
    if wanted == "sample":
        wanted = Draw()
    if isinstance(wanted, Draw):
        names = wanted.of if wanted.of is not None else store.spec.view_names or ("id",)
        weights = _weights(store, wanted, names)
        return Axis(tuple(store.view_index(str(name)) for name in names), weights), False
    if wanted is None or isinstance(wanted, str):
        return Axis((store.view_index(wanted),)), False
    if not wanted:
        raise SpecError(f"{store.url}: view []; want some names, or None for the first")
    return Axis(tuple(store.view_index(name) for name in wanted)), True


def _weights(store: FeatureStore, draw: Draw, of: Sequence[object]) -> tuple[float, ...]:
    weights = tuple(map(float, draw.weights)) if draw.weights is not None else (1.0,) * len(of)
    fine = len(weights) == len(of) and all(0 <= w < float("inf") for w in weights)
    if not fine or not sum(weights):
        raise SpecError(
            f"{store.url}: Draw of {list(of)} with weights {list(weights)}; want one for each, "
            "none negative, not all 0"
        )
    return weights
