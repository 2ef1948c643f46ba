"""FeatureStore: features of one spec, in Zarr v3, written unit by unit (STORE.md is normative).

    create -> write metadata, once, before any unit
    write  -> check everything, put one shard per (array, timestep), sign with a receipt, last
    read   -> memory maps on a local disk, ranged reads elsewhere; zarr-python only as a fallback

The store takes and returns NumPy arrays; bfloat16 features travel as their uint16 bit patterns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from drl_data.catalogue import Catalogue
from drl_data.errors import (
    InputError,
    ObjectNotFoundError,
    SpecError,
    StoreError,
    StoreMismatchError,
    TapError,
    redacted,
)
from drl_data.import_spec import ImportSpec, StoreContent
from drl_data.index import SampleIndex, TarInfo
from drl_data.ledger import Ledger
from drl_data.objects import Folder, open_folder
from drl_data.plan import InvalidRow, Unit, plan_units
from drl_data.receipts import (
    ObjectRecord,
    Receipt,
    RunRecord,
    UnitCounts,
    receipt_path,
)
from drl_data.sealing import seal
from drl_data.shard_reader import ShardReader, in_threads, in_turn
from drl_data.shards import Array
from drl_data.spec import ArraySpec, DatasetSpec, FeatureSpec, ImageSpec, ResolvedTime
from drl_data.store_metadata import (
    Described,
    array_layout,
    check_arrays,
    parse_root,
    require_same,
    store_metadata,
    timestep_values,
)
from drl_data.unit_checks import REPAIR, Problem
from drl_data.unit_writer import UnitWriter, check_unit
from drl_data.verify import index_record, same_index, verify

__all__ = ["FeatureStore", "Problem", "Receipt", "RunRecord", "UnitCounts"]

NO_COUNTS = UnitCounts()


class FeatureStore:
    """All features of one spec. Pickles by URL; a copy in another process opens it again."""

    def __init__(
        self,
        folder: Folder,
        described: Described,
        index: SampleIndex | None = None,
    ) -> None:
        """Not for users: `create` and `open` make stores."""
        self.folder = folder
        self.url = folder.url
        self.described = described
        self.spec, self.arrays, self.times = described
        spec = self.spec
        self.fingerprint = spec.fingerprint()
        self.units = plan_units(spec.n_samples, spec.rows_per_unit)
        self._index = index
        self.layouts = {a.name: array_layout(a, spec, len(self.times)) for a in self.arrays}
        self._reader = ShardReader(folder, self.layouts, self.units)

    def __reduce__(self) -> tuple[Callable[[str], FeatureStore], tuple[str]]:
        return FeatureStore.open, (self.url,)

    def __repr__(self) -> str:
        url, n_arrays = redacted(self.url), len(self.arrays)
        return f"FeatureStore({url!r}, {n_arrays} arrays x {len(self.times)} timesteps)"

    # --- making and opening ---------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        url: str,
        spec: StoreContent,
        arrays: Sequence[ArraySpec],
        times: Sequence[ResolvedTime],
        index: SampleIndex,
        catalogue: Catalogue | None = None,
    ) -> FeatureStore:
        """Write all metadata, or open the store that is there if it holds exactly this.

        The group's `zarr.json` is put first, if absent, and claims the URL; the rest follows from
        it, so a creation that was cut short is completed by the next one. `catalogue` says where
        imported features are; others have none.

        Raises:
            SpecError: arrays that Zarr or xarray cannot hold.
            StoreMismatchError: the store there holds another spec, listed leaf by leaf.
            TapError: the same spec, but taps resolved to other arrays, both listed.
            StoreError: something else is there; or index, times and spec do not fit together.
        """
        check_arrays(arrays)
        store = cls(open_folder(url), Described(spec, tuple(arrays), tuple(times)), index)
        if index.n_samples != spec.n_samples or not times:
            raise StoreError(
                f"{url}: the index has {index.n_samples} samples and {len(times)} timesteps; want "
                f"{spec.n_samples} samples, as the spec says, and at least one timestep"
            )
        objects = store.metadata()
        root = objects.pop("zarr.json")
        if not store.folder.put_if_absent("zarr.json", [root]):
            existing = cls.open(url)
            require_same(existing.url, existing.described, store.described)
            last = "index.json" if catalogue is None else "source.json"
            if existing._has(last):
                existing._index = index
                return existing
        in_threads(lambda path: store.folder.put(path, [objects[path]]), list(objects))
        store.put_index(index)
        if catalogue is not None:
            store.put_catalogue(catalogue)
        return store

    @classmethod
    def open(cls, url: str) -> FeatureStore:
        """The store at a folder or URL, from one small object.

        Raises:
            InputError: there is none.
            StoreError: it is not one of this format.
        """
        folder = open_folder(url)
        try:
            root = folder.get("zarr.json")
        except ObjectNotFoundError as error:
            raise InputError(
                f"{url}: no store here (no zarr.json); `drl extract` makes one"
            ) from error
        return cls(folder, parse_root(bytes(root), url))

    @staticmethod
    def exists(url: str) -> bool:
        """Whether a Zarr node lies at the URL (`open` says whether it is a store)."""
        return _has(open_folder(url), "zarr.json")

    def _has(self, path: str) -> bool:
        return _has(self.folder, path)

    def put_index(self, index: SampleIndex) -> None:
        """Put the index and the record of its bytes, where they are absent."""
        data = index.to_parquet()
        if not self.folder.put_if_absent("index.parquet", [data]):
            there = self.folder.get("index.parquet")
            if same_index(there, index):  # of another creator, perhaps by another library
                data = there
            else:  # before index.json nothing vouches for it
                self.folder.put("index.parquet", [data])
        self.folder.put_if_absent("index.json", [index_record(data)])
        self._index = index

    def put_catalogue(self, catalogue: Catalogue) -> None:
        """Put where imported features are, and the record of its bytes; both are replaced."""
        data = catalogue.to_parquet()
        self.folder.put("source.parquet", [data])
        self.folder.put("source.json", [index_record(data)])

    def catalogue(self) -> Catalogue:
        """Where imported features are.

        Raises:
            StoreError: it is missing or damaged; or features were computed, not imported.
        """
        place = f"{self.url}/source.parquet"
        try:
            data = self.folder.get("source.parquet")
        except ObjectNotFoundError as error:
            raise StoreError(
                f"{place}: missing; `drl import --repair` with the store's pipeline restores it, "
                "if its features were imported at all"
            ) from error
        return Catalogue.from_parquet(data, place)

    def metadata(self) -> dict[str, bytes]:
        """Path -> bytes of every object but the index that is known before any unit."""
        return store_metadata(self.described)

    # --- what it holds --------------------------------------------------------------------------

    @property
    def index(self) -> SampleIndex:
        """The sample index that the store was made from; read at first use."""
        if self._index is None:
            self._index = SampleIndex.load(f"{self.url}/index.parquet")
        return self._index

    def locate_tars(self, tars: Sequence[TarInfo]) -> None:
        """Take the same tars to be here: those of the index have no secrets in their URLs, and may
        have been written again or elsewhere since.

        Raises:
            InputError: if they are not as many as the index has.
        """
        self._index = self.index.with_tars(tars)

    def locate_dataset(self, dataset: DatasetSpec) -> None:
        """Read images from where a pipeline says, if the URLs of the index have lost their secrets.

        Raises:
            InputError: if `dataset` names other tars.
        """
        if not dataset.tars:  # features that were imported without their images
            return
        self._index = self.index.located(dataset)

    @property
    def computed_spec(self) -> FeatureSpec:
        """The spec of features that a pipeline computed.

        Raises:
            StoreMismatchError: they were imported, so that nothing here can compute them.
        """
        if isinstance(self.spec, ImportSpec):
            raise StoreMismatchError(
                f"{self.url}: its features were imported with `drl import`, not computed, so they "
                "cannot be computed anew, extended, reused or merged; read several stores together "
                "with `drl_data.join`, or import all arrays with one `source:`"
            )
        return self.spec

    @property
    def image_spec(self) -> ImageSpec:
        """How the images of the features become pixels.

        Raises:
            SpecError: features were imported without saying so.
        """
        if self.spec.images is None:
            raise SpecError(
                f"{self.url}: its features were imported without images, so it has no pixels; do "
                "without them (`probe.pixels: false`), or import into another store with the "
                "sections `dataset:` and `images:`"
            )
        return self.spec.images

    @cached_property
    def _by_name(self) -> dict[str, ArraySpec]:
        return {a.name: a for a in self.arrays}

    @property
    def features(self) -> tuple[ArraySpec, ...]:
        """The arrays that are features, without the scales and offsets of quantised ones."""
        return tuple(a for a in self.arrays if a.quantises is None)

    def parts(self, name: str) -> tuple[str, ...]:
        """An array and, if it is quantised, the arrays of its scales and offsets."""
        self.array(name)
        return (name, *(a.name for a in self.arrays if a.quantises == name))

    def n_times(self, name: str) -> int:
        """Entries of an array's time axis: the timesteps, or 1 for all of them."""
        return self.array(name).n_times(len(self.times))

    def n_cells(self, name: str) -> int:
        """Shards of an array in each unit: entries of its time axis, in each view."""
        return self.array(name).n_cells(len(self.times))

    def time_of(self, name: str, cell: int) -> str:
        """The timestep of a cell, for messages."""
        if self.array(name).timesteps != "each":
            return "any"
        return f"{self.times[cell % len(self.times)].requested:g}"

    def array(self, name: str) -> ArraySpec:
        """The array of that name.

        Raises:
            TapError: there is none.
        """
        if name not in self._by_name:
            raise TapError(f"{self.url}: no array {name!r}; it has {', '.join(self._by_name)}")
        return self._by_name[name]

    def time_index(self, timestep: float) -> int:
        """Position of a requested timestep on the `timestep` axis.

        Raises:
            TapError: the store does not have it.
        """
        requested = [time.requested for time in self.times]
        if timestep not in requested:
            values = timestep_values(self.times).tolist()
            raise TapError(f"{self.url}: no timestep {timestep:g}; it has {values}")
        return requested.index(timestep)

    def view_index(self, view: str | None) -> int:
        """Position of a view on the `view` axis; None is the first, or that of a store without.

        Raises:
            TapError: the store does not have it.
        """
        names = self.spec.view_names
        if view is None or (view == "id" and not names):
            return 0
        if view not in names:
            raise TapError(f"{self.url}: no view {view!r}; it has {', '.join(names) or 'id'}")
        return names.index(view)

    def shards(self, unit: Unit) -> list[tuple[str, int, str]]:
        """(array, cell, path) of each feature shard of a unit, in the order of STORE.md."""
        return [
            (a.name, cell, self.layouts[a.name].path(a.name, cell, unit.id))
            for a in self.arrays
            for cell in range(a.n_cells(len(self.times)))
        ]

    # --- writing --------------------------------------------------------------------------------

    def write(
        self,
        unit: Unit,
        features: Mapping[str, Array],
        invalid: Sequence[InvalidRow],
        run: RunRecord,
        counts: UnitCounts = NO_COUNTS,
        present: Sequence[ObjectRecord] = (),
    ) -> Receipt:
        """Write one whole unit and sign it; the first signature wins.

        `features`: for each array [n_cells, unit.n_rows, *shape] of the stored type (bfloat16 as
        uint16, 8-bit floating point as uint8). Cells are the timesteps, or one for all of them, of
        the first view, then of the next. Rows listed in
        `invalid` are stored as NaN (0 in integers) whatever is passed for them. All is
        checked before the first byte is written. Nothing is overwritten: an object that an earlier
        attempt left is kept if it is equal but for rounding, and listed in `run.adopted`; a unit
        that is signed already is not written again. The receipt returned is the one in the store.
        `present` are shards that are there already (copying.py), with those of their scales and
        offsets: they are signed as they are said to be, what `features` has in their place means
        nothing, and an array that is there altogether may be left out.

        Raises:
            AlignmentError: the unit is not one of `units`.
            FeatureError: missing or unknown arrays, shapes, dtypes, values that are not finite,
                `counts.samples` that are not the digest of the unit's rows.
            ConflictError: the unit is signed, or was begun, with other content.
        """
        return UnitWriter(self).write(unit, features, invalid, run, counts, present)

    def valid_chunk(self, unit: Unit, invalid: Iterable[InvalidRow]) -> bytes:
        """The unit's chunk of the array `valid`: one byte a row, padded to a whole unit."""
        valid = np.zeros(self.spec.rows_per_unit, np.bool_)
        valid[: unit.n_rows] = True
        valid[[row.row - unit.start for row in invalid]] = False
        return valid.tobytes()

    # --- receipts -------------------------------------------------------------------------------

    def receipt(self, unit: Unit) -> Receipt | None:
        """The receipt of a unit, None if it is not done.

        Raises:
            StoreError: the object is there but is no receipt.
        """
        path = receipt_path(unit)
        try:
            data = self.folder.get(path)
        except ObjectNotFoundError:
            return None
        return Receipt.from_json(data, f"{self.url}/{path}")

    def receipts(self) -> dict[int, Receipt]:
        """Unit id -> receipt of every unit that is done."""
        return {receipt.unit: receipt for receipt in self.iter_receipts()}

    def iter_receipts(self) -> Iterator[Receipt]:
        """Receipts of the units that are done, in order; some hundred are held at a time."""
        pending = {unit.id for unit in self.pending()}
        done = [unit for unit in self.units if unit.id not in pending]
        return (receipt for receipt in in_turn(self.receipt, done) if receipt is not None)

    def pending(self, units: Iterable[Unit] | None = None) -> list[Unit]:
        """Units without a receipt, of `units` or of all, in their order; one listing."""
        signed = {info.path for info in self.folder.list("receipts")}
        return [
            u for u in (self.units if units is None else units) if receipt_path(u) not in signed
        ]

    @property
    def sealed(self) -> bool:
        """Whether the store is complete and says so."""
        return self._has("sealed.json")

    def seal(self) -> None:
        """Check that every row and every object is accounted for, then write the final sample
        table and the seal; a sealed store stays as it is.

        Raises:
            StoreError: units are pending, or something is not as their receipts say.
        """
        if not self.sealed:
            seal(self)

    def samples(self) -> pa.Table:
        """One line per sample, in row order.

        Columns: row int64, key, split, tar (URL), label int64, caption, status (`ok`, `invalid` or
        `pending`), stage and reason (null unless invalid).
        """
        if self.sealed:
            return self._sealed_samples()
        return Ledger(self.iter_receipts()).sample_table(self.index)

    def _sealed_samples(self, columns: list[str] | None = None) -> pa.Table:
        data = pa.BufferReader(self.folder.get("samples.parquet"))
        try:
            return pq.read_table(data, columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise StoreError(
                f"{self.url}/samples.parquet: not the sample table ({error}); delete sealed.json "
                "and seal the store again"
            ) from error

    def valid_rows(self) -> npt.NDArray[np.bool_]:
        """Whether each row has features, [n_samples]; False for pending rows."""
        if self.sealed:
            table = self._sealed_samples(["status"])
            return np.array([status == "ok" for status in table["status"].to_pylist()], np.bool_)
        valid = np.zeros(self.spec.n_samples, np.bool_)
        for receipt in self.iter_receipts():
            valid[receipt.start : receipt.stop] = True
            valid[[row.row for row in receipt.invalid]] = False
        return valid

    # --- reading --------------------------------------------------------------------------------

    def read_unit(self, name: str, time_index: int, unit: Unit, view: int = 0) -> Array:
        """Features [unit.n_rows, *shape] of one unit in one view, read-only and without a copy.

        A memory map on a local disk, the memory of one GET elsewhere. Invalid rows are NaN.

        Raises:
            TapError: no such array, timestep or view.
            AlignmentError: the unit is not one of `units`.
            StoreError: the unit is not written, or its shard is damaged.
        """
        check_unit(self, unit)
        cell = self._checked_cell(name, time_index, view)
        return self._reader.read_unit(name, cell, unit)

    def read_rows(self, name: str, time_index: int, rows: npt.ArrayLike, view: int = 0) -> Array:
        """Features [len(rows), *shape] of any rows in one view, in any order, with repeats.

        Rows of one shard that lie close are read in one request; requests run in threads.

        Raises:
            TapError: no such array, timestep or view.
            StoreError: a row that is out of range or not written, or a damaged shard.
        """
        return self.read_cell(name, self._checked_cell(name, time_index, view), rows)

    def read_cell(self, name: str, cell: int, rows: npt.ArrayLike) -> Array:
        """`read_rows` of a cell: a timestep of a view, as `shards` counts them."""
        wanted = np.asarray(rows, np.int64).reshape(-1)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < self.spec.n_samples:
            raise StoreError(
                f"{self.url}: rows {wanted.min()}..{wanted.max()} asked for; want rows of "
                f"0..{self.spec.n_samples - 1}"
            )
        return self._reader.read_rows(name, cell, wanted)

    def _checked_cell(self, name: str, time_index: int, view: int) -> int:
        """Which of the array's shards of a unit holds a timestep of a view."""
        array = self.array(name)
        if not 0 <= time_index < len(self.times):
            raise TapError(
                f"{self.url}: time index {time_index}; want 0..{len(self.times) - 1}, the "
                "position on the `timestep` axis (`store.time_index(timestep)` gives it)"
            )
        n_views = max(array.views, 1)
        if not 0 <= view < n_views:
            raise TapError(
                f"{self.url}: view {view} of {name!r}; want 0..{n_views - 1}, the position in "
                "`images.views`"
            )
        return array.cell(time_index, view, len(self.times))

    def verify(self, deep: bool = False) -> list[Problem]:
        """What is not as STORE.md says; empty for a store that is whole.

        Looks at receipts, metadata and the size of every object by listing; `deep` also reads all
        bytes: checksums, shard indices, values of valid rows.
        """
        return verify(self, deep=deep)


def problems_at(url: str, deep: bool = False) -> list[Problem]:
    """`FeatureStore.verify` of the store at a folder or URL, even if its root is damaged.

    Raises:
        InputError: there is nothing like a store.
    """
    try:
        store = FeatureStore.open(url)
    except StoreError as error:
        return [Problem(None, "zarr.json", str(error), REPAIR)]
    except InputError:
        if not _has(open_folder(url), "spec.json"):
            raise
        return [Problem(None, "zarr.json", "missing", REPAIR)]
    return store.verify(deep=deep)


def _has(folder: Folder, path: str) -> bool:
    try:
        folder.head(path)
    except ObjectNotFoundError:
        return False
    return True
