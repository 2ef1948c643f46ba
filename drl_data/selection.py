"""Which rows, taps and timesteps of a store a consumer reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from drl_data.errors import SpecError, StoreError
from drl_data.store import FeatureStore

NO_LABEL = -1
"""Label of a sample without one."""

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Selection:
    """Which rows, taps and timesteps of a store are read. Rows increase."""

    rows: Rows
    labels: npt.NDArray[np.int64]
    keys: pa.Array
    taps: tuple[str, ...]
    times: tuple[int, ...]
    view: int

    def keys_at(self, places: npt.NDArray[np.int64]) -> list[str]:
        """Keys of the rows at these positions in `rows`."""
        return [str(key) for key in self.keys.take(pa.array(places)).to_pylist()]


def select(
    store: FeatureStore,
    taps: Sequence[str] | None = None,
    timesteps: Sequence[float] | None = None,
    *,
    split: str | None = None,
    labelled: bool = False,
    include_invalid: bool = False,
    partial: bool = False,
    view: str | None = None,
) -> Selection:
    """Rows of one split (or all), in order; taps and timesteps in the order given (or all).

    `labelled` leaves out rows without a label. `include_invalid` keeps rows without features; they
    read as NaN. `partial` allows a store with pending units, whose rows are left out. `view` names
    one of the store's views; the first is the default.

    Raises:
        TapError: an unknown tap or timestep.
        SpecError: no row is left, or nothing is asked for.
        StoreError: units are pending.
    """
    names = tuple(taps) if taps is not None else tuple(array.name for array in store.features)
    wanted = timesteps if timesteps is not None else [time.requested for time in store.times]
    for name in names:
        store.array(name)
    times = tuple(store.time_index(timestep) for timestep in wanted)
    if not names or not times:
        raise SpecError(f"{store.url}: taps {list(names)}, timesteps {list(wanted)}; want some")
    samples = store.samples()
    status = samples["status"]
    n_pending = pc.sum(pc.equal(status, "pending")).as_py()
    if n_pending and not partial:
        raise StoreError(
            f"{store.url}: {n_pending} of {store.spec.n_samples} rows are not computed yet; run "
            "`drl extract` again, or say partial=True to leave them out"
        )
    keep = pc.not_equal(status, "pending") if include_invalid else pc.equal(status, "ok")
    if split is not None:
        keep = pc.and_(keep, pc.equal(samples["split"], split))
    if labelled:
        keep = pc.and_(keep, pc.is_valid(samples["label"]))
    chosen = samples.filter(keep)
    if not chosen.num_rows:
        splits = sorted(pc.unique(samples["split"]).to_pylist())
        raise SpecError(
            f"{store.url}: no rows with split={split!r}, labelled={labelled}; its splits are "
            f"{splits}, {pc.sum(pc.equal(status, 'ok')).as_py()} rows are valid"
        )
    return Selection(
        rows=chosen["row"].to_numpy(),
        labels=pc.fill_null(chosen["label"], NO_LABEL).to_numpy(),
        keys=chosen["key"].combine_chunks(),
        taps=names,
        times=times,
        view=store.view_index(view),
    )
