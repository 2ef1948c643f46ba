"""FeatureStream: shuffled, ready batches of one rank, resumable at any of them.

    plan (epochs.py)  ->  windows of rows, read ahead in a thread  ->  batches, gathered in another

Memory: of each store at most three windows, and three batches.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict

import numpy as np
import pyarrow.compute as pc
import torch
from torch.utils.data import IterableDataset, get_worker_info

from drl_data.augment import Augment
from drl_data.epochs import Dealing, EpochPlan, RankPlan, Rows, Segment, plan_rank, resumed, undealt
from drl_data.errors import SpecError
from drl_data.feature_batch import FeatureBatch
from drl_data.forks import ForkGuard
from drl_data.joins import Source
from drl_data.row_blocks import RowBlock, RowReader
from drl_data.row_pixels import Images, row_pixels
from drl_data.selection import Selection, Timesteps, Views, select
from drl_data.stream_position import Position, SharedPosition, dealing_from

BUFFER_BYTES = 256 << 20
"""Features that the default shuffle buffer holds; a second buffer is read ahead."""

N_AHEAD = 2
"""Batches that are gathered in a thread before they are asked for."""

AHEAD_BYTES = 8 << 20
"""Batches smaller than this are gathered when they are asked for: a hand-over between threads takes
longer."""


class FeatureStream(IterableDataset[FeatureBatch]):
    """Ready batches of one rank, for `DataLoader(stream, batch_size=None, num_workers=n)`.

    An epoch's order is a function of (seed, epoch, rank, world_size, batch_size, buffer_rows) and
    of what is selected; the number of workers does not change it. Units come in shuffled order;
    rows are mixed within windows of at least `buffer_rows` rows (by default, as many as
    `buffer_bytes` of features and pixels). While one window is given out, the next is read in a
    thread, so `num_workers=0` is the fast way for features, and the only one for object storage
    with forked workers (`ForkError`).

    All ranks give the same number of batches. Each selected row comes exactly once in an epoch over
    all ranks, the last batches being smaller; with `drop_last` all batches are whole, and the rest
    is left out; with `pad` ranks that have a row less repeat one (`batch.repeated`).

    With `split_batches`, `batch_size` is that of all ranks together: the rows of a step, over all
    ranks, are the batch that one process has at this step (as `split_batches` of Accelerate), so
    that a loss curve does not depend on the number of ranks. Batches must split evenly.

    `store` may be several stores, of one shape each (buckets.py): every batch is of one of them
    (`batch.bucket`), the same on all ranks.

    What is read is said as for `select`. `images` joins pixels of the same rows: True as features
    were computed of them, an `ImageSpec`, or (index, ImageSpec) for tars that have moved. `augment`
    mirrors and crops pixels and maps alike. `pin_memory` gathers into page-locked memory, without
    workers and with an accelerator only.
    """

    def __init__(
        self,
        store: Source | Sequence[Source],
        taps: Sequence[str] | None = None,
        timesteps: Timesteps | Mapping[str, Timesteps] = None,
        *,
        batch_size: int,
        split: str | None = None,
        labelled: bool = False,
        where: pc.Expression | None = None,
        include_invalid: bool = False,
        partial: bool = False,
        view: Views | Mapping[str, Views] = None,
        shuffle: bool = True,
        seed: int = 0,
        buffer_rows: int | None = None,
        buffer_bytes: int = BUFFER_BYTES,
        drop_last: bool = False,
        pad: bool = False,
        split_batches: bool = False,
        rank: int = 0,
        world_size: int = 1,
        images: Images = None,
        decode_threads: int = 4,
        augment: Augment | None = None,
        pin_memory: bool = False,
    ) -> None:
        self.stores = tuple(store) if isinstance(store, Sequence) else (store,)
        if not self.stores or (len(self.stores) > 1 and isinstance(images, tuple)):
            raise SpecError(
                f"FeatureStream: {len(self.stores)} stores and images={images!r}; want at least "
                "one store, and images=True or an ImageSpec for several"
            )
        if pin_memory and not torch.accelerator.is_available():
            raise SpecError(
                "FeatureStream: pin_memory=True, but torch sees no accelerator; leave it out"
            )
        _check_numbers(batch_size, buffer_rows, buffer_bytes, seed, rank, world_size)
        if drop_last and pad:
            raise SpecError("FeatureStream: drop_last and pad; want not both of them")
        self.selections = tuple(
            select(
                source,
                taps,
                timesteps,
                split=split,
                labelled=labelled,
                where=where,
                include_invalid=include_invalid,
                partial=partial,
                view=view,
            )
            for source in self.stores
        )
        self._readers = tuple(
            RowReader(
                chosen,
                seed=seed,
                pixels=row_pixels(
                    images, chosen, include_invalid=include_invalid, n_threads=decode_threads
                ),
                augment=augment,
                pin_memory=pin_memory,
            )
            for chosen in self.selections
        )
        if buffer_rows is None:
            share = buffer_bytes // len(self.stores)
            by_lane = [max(share // r.bytes_per_row, 4 * batch_size) for r in self._readers]
        else:
            by_lane = [buffer_rows] * len(self.stores)
        self.dealing = Dealing(
            batch_size,
            world_size,
            tuple(by_lane),
            shuffle,
            seed,
            drop_last=drop_last,
            pad=pad,
            split_batches=split_batches,
        )
        self.rank, self._pin_memory = rank, pin_memory
        self._guard = ForkGuard.of(
            member.folder for s in self.selections for member in s.source.stores.values()
        )
        self._shared = SharedPosition()
        self._own: Position | None = None  # of this worker, if it was told one
        self._begun: tuple[Position, int] | None = None  # what is being given out, batches given
        self.plan()  # refuses at once what cannot be dealt

    @property
    def selection(self) -> Selection:
        """What is read of the store; of several stores, of the first."""
        return self.selections[0]

    # --- position -------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration gives."""
        return self._shared.get().epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration, from its first batch."""
        if epoch < 0:
            raise SpecError(f"FeatureStream: epoch {epoch}; want at least 0")
        self._shared.set(Position(epoch))
        self._own = self._begun = None

    def __len__(self) -> int:
        """Batches of this rank in a whole epoch (of one that was resumed with another batch size or
        world size, in the rest of it)."""
        return self.plan().n_batches

    def state_dict(self, n_batches: int | None = None) -> dict[str, object]:
        """Where this rank is: plain values, for JSON. Equal on all ranks that train in step.

        With DataLoader workers the stream cannot see how many batches the loader has given (workers
        run ahead): say it with `n_batches`, counted since `set_epoch` or `load_state_dict`; or use
        torchdata's StatefulDataLoader, which asks each worker.
        """
        position, given = self._begun or (self._shared.get(), 0)
        if n_batches is not None:
            given = n_batches
        else:
            info = get_worker_info()
            given *= 1 if info is None else info.num_workers
        return {
            **position.to_json(),
            "batch": position.batch + given,
            "dealing": asdict(self.dealing),
            "content": self._content(),
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue after the last batch of `state`, until `set_epoch` starts another epoch.

        The same order goes on with any number of workers. With another batch size, world size,
        buffer, `drop_last` or `pad`, the rows that no rank had been given are dealt anew: each row
        still comes once in the epoch.

        Raises:
            SpecError: the state is of other rows, another seed or another store, with what differs.
        """
        content = self._content()
        saved = state.get("content")
        theirs: Mapping[str, object] = saved if isinstance(saved, Mapping) else {}
        differing = [
            f"{name}: {theirs.get(name)!r} saved, {value!r} now"
            for name, value in content.items()
            if theirs.get(name) != value
        ]
        if differing:
            raise SpecError(
                "FeatureStream: this state is of another stream, its batches would repeat or skip "
                f"rows ({'; '.join(differing)}); make the stream as before"
            )
        position = Position.from_json(state)
        dealing = state.get("dealing")
        if not isinstance(dealing, Mapping):
            raise SpecError("FeatureStream: not a state that state_dict gave (no dealing)")
        before = Segment(dealing_from(dealing), position.batch)
        segments = resumed(position.segments, before, self.dealing)
        batch = position.batch if len(segments) == len(position.segments) else 0
        position = Position(position.epoch, batch, segments)
        self._plan(position)
        if get_worker_info() is None:
            self._shared.set(position)
        else:
            self._own = position
        self._begun = None

    def _content(self) -> dict[str, object]:
        """What rows there are, and what they are shuffled by."""
        return {
            "stores": [
                [store.fingerprint for store in s.source.stores.values()] for s in self.selections
            ],
            "rows": [zlib.crc32(s.rows.tobytes()) for s in self.selections],
            "seed": self.dealing.seed,
            "shuffle": self.dealing.shuffle,
        }

    def plan(self) -> RankPlan:
        """The order of this rank's rows in the current epoch (in what is left of it, after another
        batch size or world size)."""
        return self._plan(self._shared.get())

    def _plan(self, position: Position) -> RankPlan:
        rows_per_unit = [s.rows_per_unit for s in self.selections]
        left = undealt(
            [s.rows for s in self.selections],
            rows_per_unit,
            position.segments,
            epoch=position.epoch,
        )
        return plan_rank(
            left,
            rows_per_unit,
            self.dealing,
            epoch=position.epoch,
            rank=self.rank,
            part=len(position.segments),
        )

    # --- batches --------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[FeatureBatch]:
        self._guard.check()
        info = get_worker_info()
        worker, n_workers = (0, 1) if info is None else (info.id, info.num_workers)
        if info is not None and self._pin_memory:
            raise SpecError(
                "FeatureStream: pin_memory=True in a DataLoader worker; leave it to the DataLoader "
                "(pin_memory=True there), or use num_workers=0"
            )
        position, self._own = self._own or self._shared.get(), None
        plan = self._plan(position)
        steps = plan.of_worker(position.batch, worker, n_workers)
        self._begun = (position, 0)
        loader = ThreadPoolExecutor(1, thread_name_prefix="feature-stream")
        gatherer = ThreadPoolExecutor(1, thread_name_prefix="feature-stream")
        lanes = [
            _Lane(reader, plan.lanes[lane], _batches(plan, steps, lane), position.epoch, lane)
            for lane, reader in enumerate(self._readers)
        ]

        def gather(step: int) -> FeatureBatch:
            return lanes[int(plan.lane_of[step])].batch(int(plan.batch_of[step]), loader)

        largest = max(reader.bytes_per_row for reader in self._readers) * self.dealing.batch_size
        n_ahead = N_AHEAD if largest >= AHEAD_BYTES else 0
        ahead: deque[Future[FeatureBatch]] = deque()
        try:
            for number, step in enumerate(steps):
                while n_ahead and len(ahead) <= n_ahead and number + len(ahead) < len(steps):
                    ahead.append(gatherer.submit(gather, steps[number + len(ahead)]))
                batch = ahead.popleft().result() if n_ahead else gather(step)
                self._begun = (position, number + 1)
                yield batch
                del batch
        finally:
            loader.shutdown(wait=False, cancel_futures=True)
            gatherer.shutdown(cancel_futures=True)
            loader.shutdown()


def _check_numbers(
    batch_size: int,
    buffer_rows: int | None,
    buffer_bytes: int,
    seed: int,
    rank: int,
    world_size: int,
) -> None:
    positive = min(batch_size, buffer_bytes, buffer_rows if buffer_rows is not None else 1) >= 1
    if not positive or seed < 0 or not 0 <= rank < world_size:
        raise SpecError(
            f"FeatureStream: batch_size={batch_size}, buffer_rows={buffer_rows}, "
            f"buffer_bytes={buffer_bytes}, seed={seed}, rank={rank} of {world_size}; want sizes "
            ">= 1, seed >= 0, 0 <= rank < world_size"
        )


def _batches(plan: RankPlan, steps: range, lane: int) -> list[int]:
    """Batches of a lane that are given at these steps, in order."""
    chosen = np.arange(steps.start, steps.stop, steps.step)
    return [int(b) for b in plan.batch_of[chosen[plan.lane_of[chosen] == lane]]]


class _Lane:
    """One store's batches, in order, with the window after the present one read ahead."""

    def __init__(
        self, reader: RowReader, plan: EpochPlan, batches: Sequence[int], epoch: int, number: int
    ) -> None:
        self._reader, self._plan, self._epoch, self._number = reader, plan, epoch, number
        self._needed = np.zeros(len(plan.order), np.bool_)
        for batch in batches:
            self._needed[plan.batch_slice(batch)] = True
        self._ahead: dict[int, Future[tuple[RowBlock, Rows]]] = {}

    def batch(self, batch: int, loader: ThreadPoolExecutor) -> FeatureBatch:
        """The batch; what is read for it and for those after it is read in `loader`."""
        plan, windows = self._plan, self._plan.windows_of(batch)
        for window in range(windows.start, min(windows.stop + 1, plan.n_windows)):
            if window not in self._ahead:
                self._ahead[window] = loader.submit(self._load, window)
        for window in [w for w in self._ahead if w < windows.start]:
            del self._ahead[window]
        where = plan.batch_slice(batch)
        blocks = []
        for window in windows:
            inside = plan.window_slice(window)
            first = max(where.start - inside.start, 0)
            block, places = self._ahead[window].result()
            blocks.append((block, places[first : where.stop - inside.start]))
        is_last = where.stop == len(plan.order)
        return self._reader.gather(
            blocks,
            self._epoch,
            n_repeats=plan.n_repeats if is_last else 0,
            bucket=self._number,
        )

    def _load(self, window: int) -> tuple[RowBlock, Rows]:
        """What is needed of a window, and where in it each of the window's rows is."""
        where = self._plan.window_slice(window)
        order = self._plan.order[where]
        rows = np.unique(order[self._needed[where]])
        return self._reader.load(rows, self._epoch), np.searchsorted(rows, order)
