"""Reductions that are fitted on some samples before the first unit: principal components.

Whoever comes first computes the fit and puts `fits/<array>.safetensors` if it is absent; all read
what is there, so that every unit is reduced by the same numbers, wherever it is computed. Receipts
record the object's checksum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import safetensors.numpy
import torch
from safetensors import SafetensorError
from torch import Tensor

from drl_data.backbones import Conditioning
from drl_data.conditions import SampleConditions
from drl_data.device_memory import MicroBatches
from drl_data.errors import FeatureError, InputError, ObjectNotFoundError, StoreError
from drl_data.features import FeatureComputer
from drl_data.images import ImageBatch, read_batches
from drl_data.moments import Moments
from drl_data.pipeline import RunSpec
from drl_data.plan import Unit
from drl_data.receipts import fit_path
from drl_data.reduce import Pca, pca_of
from drl_data.shards import crc32c
from drl_data.store import FeatureStore
from drl_data.tap_reducer import Fits
from drl_data.taps import ResolvedTap


def fitted(
    store: FeatureStore,
    computer: FeatureComputer,
    conditions: SampleConditions,
    run: RunSpec,
    micro_batches: MicroBatches,
    *,
    read_only: bool = False,
) -> tuple[Fits, dict[str, int]]:
    """The fits of a store on the computer's device, and their checksums; made where there are none.

    Raises:
        FeatureError: too few vectors for so many components, or values that are not finite.
        InputError: no image that can be read.
        StoreError: an object that is no fit.
    """
    wanted = [tap for tap in computer.taps if pca_of(tap.reduce) is not None]
    missing = [tap for tap in wanted if _get(store, tap) is None]
    if missing and read_only:
        raise StoreError(
            f"{store.url}: {', '.join(fit_path(tap.name) for tap in missing)} missing; units that "
            "are done depend on it: restore it from a backup, or extract into another store"
        )
    if missing:
        # As many samples as the tap that wants most, fitted or not: which samples they are must not
        # depend on which fits are there already.
        n_samples = max(n for tap in wanted if (found := pca_of(tap.reduce)) for n in found[2:])
        made = _fit(store, computer, conditions, missing, n_samples, run, micro_batches)
        for name, fit in made.items():
            store.folder.put_if_absent(fit_path(name), [fit])
    fits: dict[str, list[Pca]] = {}
    checksums: dict[str, int] = {}
    for tap in wanted:
        data = _get(store, tap)
        if data is None:
            raise StoreError(f"{store.url}/{fit_path(tap.name)}: deleted while it was fitted")
        fits[tap.name] = _parse(data, f"{store.url}/{fit_path(tap.name)}", computer)
        checksums[tap.name] = crc32c([data])
    return fits, checksums


def _get(store: FeatureStore, tap: ResolvedTap) -> bytes | None:
    try:
        return bytes(store.folder.get(fit_path(tap.name)))
    except ObjectNotFoundError:
        return None


def _parse(data: bytes, place: str, computer: FeatureComputer) -> list[Pca]:
    device = computer.backbone.device
    try:
        arrays = safetensors.numpy.load(data)
        return [
            Pca(
                torch.from_numpy(arrays[f"mean.{t}"]).to(device),
                torch.from_numpy(arrays[f"components.{t}"]).to(device),
            )
            for t in range(sum(name.startswith("mean.") for name in arrays))
        ]
    except (SafetensorError, KeyError) as error:
        raise StoreError(
            f"{place}: not a fit ({error}); units that are done depend on it: restore it from a "
            "backup, or extract into another store"
        ) from error


def _fit(
    store: FeatureStore,
    computer: FeatureComputer,
    conditions: SampleConditions,
    taps: Sequence[ResolvedTap],
    n_samples: int,
    run: RunSpec,
    micro_batches: MicroBatches,
) -> dict[str, bytes]:
    """Array -> bytes of its fit, from the first view of `n_samples` samples, or of as many of them
    as it wants, spread evenly over the rows."""
    settings = {tap.name: found for tap in taps if (found := pca_of(tap.reduce))}
    before = [replace(tap, reduce=tap.reduce[: settings[tap.name][0]]) for tap in taps]
    computer_before = computer.with_taps(before)
    moments: dict[tuple[str, int], Moments] = {}
    n_wanted = {name: n for name, (_, _, n) in settings.items()}
    n_seen = 0
    for batch in _spread_batches(store, n_samples, run):
        told = conditions.batch(batch.start, batch.n_rows, len(batch.pixels))
        bad = {row.row - batch.start for row in (*batch.invalid, *told.invalid)}
        rows = [i for i in range(batch.n_rows) if i not in bad]
        if not rows:
            continue
        parts: list[dict[tuple[str, int], Moments]] = []
        micro_batches.run(
            len(batch.pixels),
            partial(_add_moments, parts, store, computer_before, batch, told.conditioning, rows),
        )
        for place, new in (item for part in parts for item in part.items()):
            if n_seen < n_wanted[place[0]]:
                moments[place] = moments[place].merged(new) if place in moments else new
        n_seen += len(rows)
    if not moments:
        raise InputError(f"{store.url}: none of the images to fit on can be read")
    for tap in taps:
        for t in range(store.n_times(tap.name)):
            if (tap.name, t) not in moments:
                raise FeatureError(
                    f"{store.url}, tap {tap.name!r}: no sample to fit on has finite features at "
                    "every timestep; compute in another precision (`backbone.dtype: float32`)"
                )
    return {tap.name: _solved(store, tap, settings[tap.name][1], moments) for tap in taps}


def _add_moments(
    parts: list[dict[tuple[str, int], Moments]],
    store: FeatureStore,
    computer: FeatureComputer,
    batch: ImageBatch,
    told: Conditioning,
    rows: Sequence[int],
    start: int,
    stop: int,
) -> None:
    """Append {(array, cell): moments of the vectors} of `rows` among `start` to `stop` (exclusive)
    of a batch."""
    here = [row - start for row in rows if start <= row < stop]
    if not here:
        return
    keys = [*batch.keys, *[""] * (len(batch.pixels) - batch.n_rows)][start:stop]
    found: dict[tuple[str, int], Moments] = {}
    pixels, told = batch.of_view(0)[start:stop], told.rows(start, stop)
    for t, captured in computer.compute(pixels, keys, conditioning=told):
        for name, x in captured.items():
            kept = _finite_rows(x[here], store.spec.non_finite)
            if len(kept):
                channel = computer.dims[name].index("channel") + 1
                vectors = kept.movedim(channel, -1).flatten(0, -2)
                place = (name, store.array(name).cell(t, 0, len(store.times)))
                found[place] = Moments.of(vectors, covariance=True)
    parts.append(found)


def _finite_rows(x: Tensor, policy: Literal["error", "clip", "invalid"]) -> Tensor:
    """Features [b, ...] without the rows that are not finite, unless that is an error later."""
    return x if policy == "error" else x[torch.isfinite(x).flatten(1).all(1)]


def _spread_batches(store: FeatureStore, n_samples: int, run: RunSpec) -> Iterator[ImageBatch]:
    """Whole batches of consecutive rows, evenly spread, that have `n_samples` rows together."""
    spec = store.computed_spec
    n_batches = -(-min(n_samples, spec.n_samples) // spec.batch_size)
    last = max(spec.n_samples - spec.batch_size, 0)
    for i in range(n_batches):
        start = i * last // max(n_batches - 1, 1)
        yield from read_batches(
            Unit(0, start, min(start + spec.batch_size, spec.n_samples)),
            store.index,
            spec.images,
            batch_size=spec.batch_size,
            n_threads=run.decode_threads,
            prefetch_bytes=max(run.memory_bytes // 32, 1),
            views=True,
        )


def _solved(
    store: FeatureStore, tap: ResolvedTap, k: int, moments: dict[tuple[str, int], Moments]
) -> bytes:
    """mean.T [c], components.T [k, c] and variances.T [k] float32 of each entry T of the time
    axis, and total_variance.T [1]."""
    arrays = {}
    for (name, t), found in sorted(moments.items()):
        if name != tap.name:
            continue
        if found.count <= k:
            raise FeatureError(
                f"{store.url}, tap {name!r}: {found.count} vectors to fit {k} principal components "
                "on; want more vectors than components: fit on more samples, pca(K, N)"
            )
        if not torch.isfinite(found.deviation).all():
            raise FeatureError(
                f"{store.url}, tap {name!r}: features to fit on are not finite; compute in another "
                "precision (`backbone.dtype: bfloat16` or float32), or set `features.non_finite: "
                "invalid` or clip, and such rows are left out of the fit"
            )
        components, variances = found.principal(k)
        values = {
            "mean": found.mean,
            "components": components,
            "variances": variances,
            "total_variance": found.variance.sum()[None],
        }
        for what, value in values.items():
            arrays[f"{what}.{t}"] = value.float().contiguous().cpu().numpy()
    return safetensors.numpy.save(arrays)
