"""What a synthesis makes: entries (prompts, classes, source images), and the images of each.

Image number n of a job is what (entry, strength, copy) say; its random numbers are seeded by what
it is made from, never by n, so that an entry that is added changes no other image.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from drl_data.errors import InputError, ObjectNotFoundError, SpecError, redacted
from drl_data.index import SampleIndex
from drl_data.objects import Buffer, open_parent
from drl_data.spec_base import canonical_json
from drl_data.synthesize_spec import ClassSpec, ImageCall, PromptsSpec, SynthesizeSpec

SCHEMA = pa.schema(
    [
        pa.field("prompt", pa.string()),
        pa.field("class_id", pa.int64()),  # what a class-conditional model is told
        pa.field("class_name", pa.string()),
        pa.field("label", pa.string()),  # of the sample: what its .cls holds
        pa.field("source_row", pa.int64()),
        pa.field("source", pa.string()),  # key of the source image
        pa.field("reason", pa.string()),  # why nothing can be made of it
    ]
)


@dataclass(frozen=True)
class Item:
    """One image to be made."""

    number: int
    prompt: str | None
    class_id: int | None
    class_name: str | None
    label: str | None
    source_row: int | None
    source: str | None
    strength: float | None
    ordinal: int
    """Counts images that are made from the same, from 0."""
    reason: str | None = None
    """Why it cannot be made, found out at `stage`."""
    stage: str = "index"

    def generator_seed(self, seed: int) -> int:
        """63 bits for `torch.Generator().manual_seed`: a digest of what the image is made from.

        Without the strength, so that one source's images of several strengths share their noise.
        """
        parts = ("synthesize", seed, self.prompt, self.class_id, self.source, self.ordinal)
        text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class SynthesisPlan:
    """Entries and how many images each has; `item(n)` is image n of `n_items`."""

    entries: pa.Table
    strengths: tuple[float, ...] = field(default=())
    n_images: int = 1
    interleaved: bool = False

    @property
    def n_items(self) -> int:
        """Images in all."""
        return int(self.entries.num_rows) * max(len(self.strengths), 1) * self.n_images

    def item(self, number: int) -> Item:
        """Image `number`: strengths outermost, then entries and copies in the spec's order."""
        n_entries = int(self.entries.num_rows)
        place, rest = divmod(number, n_entries * self.n_images)
        if self.interleaved:
            copy, entry = divmod(rest, n_entries)
        else:
            entry, copy = divmod(rest, self.n_images)
        (row,) = self.entries.slice(entry, 1).to_pylist()
        return Item(
            number=number,
            strength=self.strengths[place] if self.strengths else None,
            ordinal=int(self._earlier[entry]) * self.n_images + copy,
            **row,
        )

    @cached_property
    def _earlier(self) -> np.ndarray:
        """How many equal entries come before each."""
        counts: Counter[tuple[object, ...]] = Counter()
        earlier = np.zeros(self.entries.num_rows, np.int64)
        columns = [self.entries[name].to_pylist() for name in ("prompt", "class_id", "source")]
        for i, made_from in enumerate(zip(*columns, strict=True)):
            earlier[i] = counts[made_from]
            counts[made_from] += 1
        return earlier

    def digest(self) -> str:
        """SHA-256 over the entries; where they were read from is no part of it."""
        total = hashlib.sha256()
        for batch in self.entries.to_batches(max_chunksize=4096):
            for row in batch.to_pylist():
                total.update(canonical_json(row) + b"\n")
        return total.hexdigest()

    def to_parquet(self) -> memoryview:
        """The entries as one Parquet file."""
        buffer = pa.BufferOutputStream()
        pq.write_table(self.entries, buffer, compression="zstd")
        return memoryview(buffer.getvalue())


def make_plan(spec: SynthesizeSpec, call: ImageCall, index: SampleIndex | None) -> SynthesisPlan:
    """What the section asks for; `index` is of the pipeline's dataset, where it is needed.

    Raises:
        SpecError: classes that the model does not have; nothing to make.
        InputError: a file of prompts that is missing or has no such column.
    """
    if spec.source is not None:
        assert index is not None
        rows = _source_rows(spec, index)
    elif spec.prompts is not None and spec.prompts.captions:
        assert index is not None
        rows = _caption_rows(spec.prompts, index)
    elif spec.classes is not None:
        rows = _class_rows(spec, call)
    elif spec.prompts is not None:
        rows = [{"prompt": prompt} for prompt in read_prompts(spec.prompts)]
    else:
        rows = [{}]
    if not rows:
        raise SpecError("synthesize: no prompts, classes or sources: nothing to make")
    return SynthesisPlan(
        pa.Table.from_pylist([{**dict.fromkeys(SCHEMA.names), **row} for row in rows], SCHEMA),
        () if spec.source is None else spec.source.strength,
        spec.n_images,
        spec.order == "interleaved",
    )


def plan_from_parquet(data: Buffer, spec: SynthesizeSpec) -> SynthesisPlan:
    """Read what `SynthesisPlan.to_parquet` wrote."""
    table = pq.read_table(pa.BufferReader(data)).cast(SCHEMA)
    return SynthesisPlan(
        table,
        () if spec.source is None else spec.source.strength,
        spec.n_images,
        spec.order == "interleaved",
    )


def needs_dataset(spec: SynthesizeSpec) -> bool:
    """Whether the pipeline's own dataset is read."""
    return spec.source is not None or bool(spec.prompts and spec.prompts.captions)


def read_prompts(spec: PromptsSpec) -> list[str]:
    """The prompts of a list or of a file, in order, equal ones as often as they come.

    Raises:
        InputError: the file is missing, unreadable, or has no such column or field.
    """
    if spec.file is None:
        return list(spec.texts)
    folder, name = open_parent(spec.file)
    place = redacted(spec.file)
    try:
        data = folder.get(name)
    except ObjectNotFoundError as error:
        raise InputError(f"synthesize.prompts: {place}: no such file") from error
    try:
        found = _parsed(data, spec)
    except (ValueError, pa.ArrowException, csv.Error) as error:
        raise InputError(f"synthesize.prompts: {place}: {error}") from error
    bad = next((i for i, prompt in enumerate(found) if not isinstance(prompt, str)), None)
    if bad is not None:
        raise InputError(
            f"synthesize.prompts: {place}: row {bad} of {spec.column!r} is {found[bad]!r}, want "
            "text"
        )
    return [str(prompt) for prompt in found]


def _parsed(data: Buffer, spec: PromptsSpec) -> Sequence[object]:
    assert spec.file is not None
    if spec.file.endswith(".parquet"):
        table = pq.read_table(pa.BufferReader(data))
        return list(table[_column(spec.column, table.column_names)].to_pylist())
    text = bytes(data).decode("utf-8-sig")
    if spec.file.endswith(".txt"):
        return [line for line in text.splitlines() if line.strip()]
    if spec.file.endswith(".csv"):
        reader = csv.DictReader(io.StringIO(text, newline=""))
        column = _column(spec.column, list(reader.fieldnames or []))
        return [row[column] for row in reader]
    lines = [json.loads(line) for line in text.splitlines() if line.strip()]
    if not all(isinstance(line, dict) for line in lines):
        raise ValueError(f"want an object with the field {spec.column!r} on each line")
    return [line.get(spec.column) for line in lines]


def _column(name: str, names: Sequence[str]) -> str:
    if name not in names:
        raise ValueError(f"no column {name!r}; there are {', '.join(names)}")
    return name


# --- entries --------------------------------------------------------------------------------------


def _class_rows(spec: SynthesizeSpec, call: ImageCall) -> list[dict[str, object]]:
    assert spec.classes is not None
    if call.takes == "prompt":
        return _named_classes(spec)
    n_classes = call.n_classes or 0
    if spec.classes == "all":
        wanted = tuple(ClassSpec(id=number) for number in range(n_classes))
    else:
        wanted = spec.classes
    ids = {
        name.strip(): number
        for number, names in call.class_names.items()
        for name in (names, *names.split(","))
    }
    rows: list[dict[str, object]] = []
    for one in wanted:
        number = one.id if one.id is not None else ids.get((one.name or "").strip())
        if number is None:
            known = ", ".join(list(call.class_names.values())[:8]) or "none; give its number"
            raise SpecError(f"synthesize.classes: no class {one.name!r}; the model names {known}")
        if number >= n_classes:
            raise SpecError(f"synthesize.classes: {number}, want 0..{n_classes - 1}")
        name = one.name or call.class_names.get(number)
        rows.append({"class_id": number, "class_name": name, "label": str(number)})
    return rows


def _named_classes(spec: SynthesizeSpec) -> list[dict[str, object]]:
    assert spec.prompts is not None
    assert spec.prompts.template is not None
    if spec.classes is None or spec.classes == "all":
        raise SpecError("synthesize.classes: a text model knows none; give {number: name}")
    rows: list[dict[str, object]] = []
    for one in spec.classes:
        if one.id is None or one.name is None:
            raise SpecError(
                "synthesize.classes: beside a template want {number: name}, as the number becomes "
                f"the label and the name is in the prompt; got {one.name if one.name else one.id!r}"
            )
        prompt = spec.prompts.template.replace("{label}", one.name)
        rows.append({"prompt": prompt, "class_name": one.name, "label": str(one.id)})
    return rows


def _dataset_rows(index: SampleIndex, split: str | None) -> list[dict[str, object]]:
    """Row, key, label's text, caption and reason of the rows of a split.

    Raises:
        SpecError: there is no such split.
    """
    columns = index.table.select(["key", "split", "label", "caption", "reason"]).to_pylist()
    rows = [{"row": i, **row} for i, row in enumerate(columns) if split in (None, row["split"])]
    if not rows:
        known = ", ".join(sorted(set(index.table["split"].to_pylist())))
        raise SpecError(f"synthesize: no samples in split {split!r}; splits: {known}")
    names = index.label_names
    for row in rows:
        if row["label"] is not None:
            row["label"] = names[row["label"]] if names is not None else str(row["label"])
    return rows


def _caption_rows(prompts: PromptsSpec, index: SampleIndex) -> list[dict[str, object]]:
    return [
        {
            "prompt": row["caption"],
            "label": row["label"],
            "source": row["key"],
            "reason": None if row["caption"] is not None else "it has no caption",
        }
        for row in _dataset_rows(index, prompts.split)
    ]


def _source_rows(spec: SynthesizeSpec, index: SampleIndex) -> list[dict[str, object]]:
    assert spec.source is not None
    assert spec.prompts is not None
    prompts = spec.prompts
    texts: list[str | None] = [None]
    if not prompts.captions and prompts.template is None:
        texts = list(read_prompts(prompts))
    rows: list[dict[str, object]] = []
    for row in _dataset_rows(index, spec.source.split):
        base = {"source_row": row["row"], "source": row["key"], "label": row["label"]}
        if prompts.captions:
            lacks = "it has no caption" if row["caption"] is None else None
            rows.append({**base, "prompt": row["caption"], "reason": row["reason"] or lacks})
        elif prompts.template is not None:
            lacks = "it has no label" if row["label"] is None else None
            text = prompts.template.replace("{label}", str(row["label"]))
            rows.append({**base, "prompt": text, "reason": row["reason"] or lacks})
        else:
            rows += [{**base, "prompt": text, "reason": row["reason"]} for text in texts]
    return rows
