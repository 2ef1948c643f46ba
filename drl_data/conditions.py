"""What each sample's denoiser is told: its label's name, its caption, its class.

A spec that speaks of the sample is resolved, row by row, to one that does not ("a photo of a
{label}" to "a photo of a cat"), so that backbones only know conditions that are the same for all.
Equal ones are encoded once in a worker.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow.compute as pc
import torch

from drl_data.backbones import Backbone, Conditioning
from drl_data.diffusion_spec import ConditionSpec
from drl_data.errors import SpecError
from drl_data.index import SampleIndex
from drl_data.plan import InvalidRow

CACHE_BYTES = 8 << 30
"""Host memory of one worker for what its samples are told: ImageNet's classes by T5 need half."""


def lacking(spec: ConditionSpec, label: int | None, caption: str | None) -> str | None:
    """What the spec needs and a sample has not: `caption`, `label`, or None."""
    if spec.caption and caption is None:
        return "caption"
    return "label" if spec.needs_label and label is None else None


def of_sample(
    spec: ConditionSpec,
    label: int | None,
    caption: str | None,
    label_names: Sequence[str] | None = None,
) -> ConditionSpec:
    """The condition of a sample that lacks nothing; equal for samples that are told the same.

    Labels without names are named by their number.
    """
    changes: dict[str, object] = {}
    if spec.caption:
        changes = {"caption": False, "prompt": caption}
    if spec.template is not None:
        name = str(label) if label_names is None or label is None else label_names[label]
        changes = {"template": None, "prompt": spec.template.replace("{label}", name)}
    if spec.class_label == "label":
        changes["class_label"] = label
    return spec.model_copy(update=changes) if changes else spec


def extremes(spec: ConditionSpec, index: SampleIndex) -> list[ConditionSpec]:
    """Conditions that a model must be able to take for it to take those of all samples.

    Raises:
        SpecError: if no sample has what the spec needs.
    """
    if not spec.per_sample:
        return list(spec.of_candidates())
    labels = pc.min_max(index.table.column("label")).as_py()
    captions = index.table.column("caption").drop_null().slice(0, 1).to_pylist()
    caption = captions[0] if captions else None
    what = lacking(spec, labels["min"], caption)
    if what is not None:
        raise SpecError(
            f"condition: it needs each sample's {what}, and no sample of the dataset has one; "
            f"dataset.{what} says which extension it is read from"
        )
    return [
        of_sample(spec, label, caption, index.label_names)
        for label in dict.fromkeys([labels["min"], labels["max"]])
    ]


@dataclass(frozen=True)
class BatchConditions:
    """Conditioning of a batch's rows, and the rows that lack what theirs needs."""

    conditioning: Conditioning
    invalid: list[InvalidRow]


class SampleConditions:
    """The conditioning of every sample of an index; used by several threads at a time.

    One that is the same for all is made once. Others are made when first asked for and kept on the
    host, the least recently used forgotten when they fill `cache_bytes`; text encoders then run on
    the backbone's device, and are freed when everything that the index holds has been encoded.
    """

    def __init__(
        self,
        backbone: Backbone,
        spec: ConditionSpec,
        index: SampleIndex,
        *,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._backbone = backbone
        self._spec = spec
        self._index = index
        self._lock = threading.Lock()
        self._cache: OrderedDict[ConditionSpec, Conditioning] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._used_bytes = 0
        self._n_distinct = _n_distinct(spec, index) if spec.per_sample else 1
        self.constant = Conditioning()
        self.candidates: tuple[Conditioning, ...] = ()
        """Of `spec.candidates`, each [1, ...], on the host."""
        if spec.candidates:
            if backbone.text is not None:
                backbone.text.run_on(backbone.device)
            self.candidates = tuple(
                backbone.conditioning(one).to(torch.device("cpu")) for one in spec.of_candidates()
            )
            self.constant = self.candidates[0].to(backbone.device)
            self._release()
        elif spec.per_sample:
            if backbone.text is not None:
                backbone.text.run_on(backbone.device)
        else:
            self.constant = backbone.conditioning(spec)
            self._release()

    def batch(self, start: int, n_rows: int, batch_size: int) -> BatchConditions:
        """What `n_rows` rows from `start` are told, padded to `batch_size` rows.

        Rows that lack what theirs needs, and the padding, are told what another row is.
        """
        if not self._spec.per_sample:
            return BatchConditions(self.constant, [])
        rows = self._index.slice(start, start + n_rows)
        keys, labels, captions = (
            rows.column(name).to_pylist() for name in ("key", "label", "caption")
        )
        invalid: list[InvalidRow] = []
        told: list[ConditionSpec | None] = []
        for i, (key, label, caption) in enumerate(zip(keys, labels, captions, strict=True)):
            what = lacking(self._spec, label, caption)
            if what is None:
                told.append(of_sample(self._spec, label, caption, self._index.label_names))
            else:
                told.append(None)
                reason = f"the sample has no {what}, which the condition needs"
                invalid.append(InvalidRow(start + i, key, "condition", reason))
        known = [condition for condition in told if condition is not None]
        if not known:
            return BatchConditions(self.constant, invalid)
        padding = [None] * (batch_size - n_rows)
        conditioning = self._stack([condition or known[0] for condition in (*told, *padding)])
        return BatchConditions(conditioning, invalid)

    def _stack(self, conditions: Sequence[ConditionSpec]) -> Conditioning:
        """The conditioning of each, on the backbone's device."""
        with self._lock:
            made = {condition: self._made(condition) for condition in dict.fromkeys(conditions)}
            if len(self._cache) == self._n_distinct:
                self._release()
        rows = [made[condition] for condition in conditions]
        return Conditioning.stack(rows).to(self._backbone.device)

    def _made(self, condition: ConditionSpec) -> Conditioning:
        """From the cache, or encoded now."""
        found = self._cache.get(condition)
        if found is None:
            found = self._backbone.conditioning(condition).to(torch.device("cpu"))
            self._cache[condition] = found
            self._used_bytes += found.n_bytes
            while self._used_bytes > self._cache_bytes and len(self._cache) > 1:
                self._used_bytes -= self._cache.popitem(last=False)[1].n_bytes
        self._cache.move_to_end(condition)
        return found

    def _release(self) -> None:
        if self._backbone.text is not None:
            self._backbone.text.release()


def _n_distinct(spec: ConditionSpec, index: SampleIndex) -> int:
    """How many conditions the samples of an index have between them, at most."""
    n_labels, n_captions = (
        int(pc.count_distinct(index.table.column(name), mode="only_valid").as_py()) if used else 1
        for name, used in (("label", spec.needs_label), ("caption", spec.caption))
    )
    return n_labels * n_captions
