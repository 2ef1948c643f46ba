"""The job: tars that are a function of the section alone, counted, resumed, read like any other."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression

from drl_data.digits import write_digits
from drl_data.errors import InputError, SpecError, StoreMismatchError
from drl_data.index import SampleIndex, build_index
from drl_data.objects import open_folder
from drl_data.pipeline import Pipeline
from drl_data.plan import Lease
from drl_data.pretrain import pretrain
from drl_data.report import write_report
from drl_data.row_pixels import RowPixels
from drl_data.runs import extract, hand_out
from drl_data.spec import DatasetSpec
from drl_data.stopping import Stop
from drl_data.synthesis_plan import Item, SynthesisPlan, make_plan, read_prompts
from drl_data.synthesis_tar import encode_image, numbers_in
from drl_data.synthesis_task import make_synthesis_task
from drl_data.synthesize_spec import ImageCall, ImageFileSpec, PromptsSpec, SynthesizeSpec
from drl_data.tasks.probe import run_probe
from drl_data.tasks.synthesize import (
    SynthesizeResult,
    prepare_synthesis,
    run_synthesize,
    tars_of,
)
from drl_data.testing import KillingRows, write_photo_tars
from drl_data.tiny_models import save_tiny
from drl_data.unit_jobs import UnitJob
from tests.conftest import Drl
from tests.test_cli import ROOT
from tests.test_image_pipelines import change, photographs, with_safety_checker
from tests.toy_tars import write_tar

N_CLASSES = 4


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    before, n = diffusers_logging.get_verbosity(), torch.get_num_threads()
    diffusers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    yield
    diffusers_logging.set_verbosity(before)
    torch.set_num_threads(n)


@pytest.fixture(scope="module")
def by_class(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random pixel network that is told one of four classes, or the null class."""
    folder = tmp_path_factory.mktemp("model") / "by_class"
    save_tiny("ddpm", folder, num_class_embeds=N_CLASSES + 1)
    change(folder / "unet" / "config.json", _null_class=N_CLASSES)
    return folder


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Stable Diffusion."""
    folder = tmp_path_factory.mktemp("model") / "tiny-sd"
    save_tiny("stable_diffusion", folder)
    change(folder / "scheduler" / "scheduler_config.json", steps_offset=1)
    return folder


def pipeline(folder: Path, model: Path, **fields: object) -> Pipeline:
    """A pipeline file that has a section `synthesize`, over tars that may not be there."""
    more: dict[str, object] = {}
    for name in ("dataset", "images", "run"):
        if name in fields:
            more[name] = fields.pop(name)
    return Pipeline.parse(
        {
            "name": "made",
            "dataset": {"tars": str(folder / "none-*.tar")},
            "images": {"size": 16},
            "results": str(folder / "results"),
            "synthesize": {
                "url": str(folder / "tars"),
                "backbone": {"model": str(model)},
                "steps": 2,
                "batch_size": 2,
                "samples_per_tar": 5,
                **fields,
            },
            **more,
        }
    )


def classes(folder: Path, model: Path, **fields: object) -> Pipeline:
    return pipeline(folder, model, **{"classes": "all", "n_images": 4, **fields})


def texts(folder: Path, model: Path, **fields: object) -> Pipeline:
    return pipeline(folder, model, **{"prompts": ["a cat", "a dog"], "size": 16, **fields})


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "tars").glob("*.tar"))}


def members(data: bytes) -> dict[str, bytes]:
    """Name -> content of a tar."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            found[member.name] = file.read()
    return found


def samples(folder: Path) -> dict[str, dict[str, bytes]]:
    """Key -> extension -> content, over all tars."""
    found: dict[str, dict[str, bytes]] = {}
    for data in tars(folder).values():
        for name, content in members(data).items():
            key, _, extension = name.partition(".")
            found.setdefault(key, {})[extension] = content
    return found


def pixels(sample: dict[str, bytes], extension: str = "png") -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(sample[extension])))


# --- samples --------------------------------------------------------------------------------------


def test_a_sample_says_how_to_make_it_again(diffusion: Path, tmp_path: Path) -> None:
    made = texts(tmp_path, diffusion, n_images=2, negative_prompt="blur", guidance_scale=3, seed=7)
    done = run_synthesize(made)
    assert (done.n_made, done.result.n_ok, done.result.n_invalid, done.failed) == (4, 4, 0, [])
    found = samples(tmp_path)
    assert list(found) == [f"synth-{i:09d}" for i in range(4)]
    plain = StableDiffusionPipeline.from_pretrained(diffusion)
    plain.set_progress_bar_config(disable=True)
    for part in (plain.unet, plain.vae, plain.text_encoder):
        part.requires_grad_(False)
    for i, (key, sample) in enumerate(found.items()):
        assert sorted(sample) == ["json", "png", "txt"]
        about = json.loads(sample["json"])
        assert sample["txt"].decode() == about["prompt"] == ("a cat", "a cat", "a dog", "a dog")[i]
        assert about["weights"] == done.result.weights
        assert (about["ordinal"], about["seed"], about["size"]) == (i % 2, 7, [16, 16])
        assert (about["model"], about["revision"]) == ("tiny-sd", None)
        again = plain(
            about["prompt"],
            height=about["size"][0],
            width=about["size"][1],
            num_inference_steps=about["steps"],
            guidance_scale=about["guidance_scale"],
            negative_prompt=about["negative_prompt"],
            generator=torch.Generator().manual_seed(about["generator_seed"]),
        ).images[0]
        difference = np.asarray(again).astype(int) - pixels(sample).astype(int)
        assert np.abs(difference).max() <= 1, key  # alone, not in a batch: to rounding


def test_images_of_batches_are_those_of_the_pipeline_bit_for_bit(
    diffusion: Path, tmp_path: Path
) -> None:
    """Batches of two, never across tars of three: (0 1) (2) (3)."""
    run_synthesize(texts(tmp_path, diffusion, n_images=2, samples_per_tar=3))
    found = list(samples(tmp_path).values())
    plain = StableDiffusionPipeline.from_pretrained(diffusion)
    plain.set_progress_bar_config(disable=True)
    for part in (plain.unet, plain.vae, plain.text_encoder):
        part.requires_grad_(False)
    for batch in ([0, 1], [2], [3]):
        about = [json.loads(found[i]["json"]) for i in batch]
        seeds = [torch.Generator().manual_seed(a["generator_seed"]) for a in about]
        want = plain([a["prompt"] for a in about], 16, 16, 2, generator=seeds).images
        for i, image in zip(batch, want, strict=True):
            assert np.array_equal(np.asarray(image), pixels(found[i]))


@pytest.mark.parametrize(("kind", "exact"), [("png", True), ("webp", True), ("jpg", False)])
@pytest.mark.parametrize("channels", [1, 3])
def test_formats(kind: str, exact: bool, channels: int) -> None:
    photo = np.asarray(photographs(1)[0])[..., :channels]
    data = encode_image(photo, ImageFileSpec.model_validate({"kind": kind}))
    back = np.asarray(Image.open(io.BytesIO(data)).convert("L" if channels == 1 else "RGB"))
    assert back.reshape(photo.shape).shape == photo.shape
    difference = np.abs(back.reshape(photo.shape).astype(int) - photo)
    assert (difference.max() == 0) == exact
    assert difference.mean() < 8
    with pytest.raises(SpecError, match="images of 2 channels"):
        encode_image(photo[..., :1].repeat(2, 2), ImageFileSpec())


def test_tars_are_plain_and_readable_by_webdataset(by_class: Path, tmp_path: Path) -> None:
    from webdataset.tariterators import group_by_keys, tar_file_expander

    run_synthesize(classes(tmp_path, by_class, format={"kind": "jpg", "quality": 80}))
    (first, *_), found = tars(tmp_path).values(), samples(tmp_path)
    with tarfile.open(fileobj=io.BytesIO(first)) as tar:
        headers = tar.getmembers()
    assert [m.name for m in headers] == sorted(m.name for m in headers)
    assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in headers} == {(0, 0, 0, "", 0o644)}
    assert b"ustar\x00" in first[:512]
    streams = [{"url": n, "stream": io.BytesIO(d)} for n, d in tars(tmp_path).items()]
    read = group_by_keys(tar_file_expander(streams))
    assert {s["__key__"]: s["cls"] for s in read} == {k: s["cls"] for k, s in found.items()}


# --- the same bytes, whatever happens -------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(by_class: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    run_synthesize(classes(folder, by_class))
    found = tars(folder)
    assert list(found) == [f"synth-{i:06d}.tar" for i in range(4)]
    return found


@pytest.mark.parametrize(
    "executor", ["local", "process", pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.soak])]
)
def test_executors_make_the_same_tars(
    executor: str,
    by_class: Path,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if executor == "ray":
        request.getfixturevalue("local_ray")
    run = {"executor": executor, "workers": 2, "gpus_per_worker": 0}
    done = run_synthesize(classes(tmp_path, by_class, run=run))
    assert (done.n_made, done.n_left, done.failed) == (16, 0, [])
    assert tars(tmp_path) == undisturbed
    again = run_synthesize(classes(tmp_path, by_class, run=run))
    assert (again.n_pending, again.n_made, again.result.n_ok) == (0, 0, 16)


def test_several_threads_make_the_same_tars(
    by_class: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    torch.set_num_threads(3)  # then three makers work at a time, of one thread each
    run_synthesize(classes(tmp_path, by_class))
    assert tars(tmp_path) == undisturbed


def test_parts_and_limits_add_up(
    by_class: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    made = classes(tmp_path, by_class)
    assert run_synthesize(made, part=(1, 2)).n_made == 6
    assert list(tars(tmp_path)) == ["synth-000002.tar", "synth-000003.tar"]
    assert run_synthesize(made, limit=1).n_made == 5
    last = run_synthesize(made)
    assert (last.n_made, last.result.n_ok, last.result.n_done) == (5, 16, 4)
    assert tars(tmp_path) == undisturbed


class _After:
    """Progress that asks for the end after the first tar."""

    def __init__(self, stop: Stop) -> None:
        self.stop = stop

    def advance(self, n: int = 1, **numbers: float) -> None:
        self.stop.request(0)

    def bar(self, label: str, total: int, unit: str) -> _After:
        return self

    def __enter__(self) -> _After:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_a_stopped_run_goes_on_where_it_was(
    by_class: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    made, stop = classes(tmp_path, by_class), Stop()
    done = run_synthesize(made, stop=stop, progress=_After(stop))
    assert done.n_left > 0
    assert done.result.n_done == len(tars(tmp_path)) < 4
    assert run_synthesize(made).n_left == 0
    assert tars(tmp_path) == undisturbed


def test_a_tar_without_a_receipt_is_made_again_and_kept(
    by_class: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """A writer that died before it signed; and one whose tar is gone with its receipt."""
    made = classes(tmp_path, by_class)
    run_synthesize(made)
    (tmp_path / "tars" / "receipts" / "00000001.json").unlink()
    (tmp_path / "tars" / "receipts" / "00000002.json").unlink()
    (tmp_path / "tars" / "synth-000002.tar").unlink()
    done = run_synthesize(made)
    assert done.n_pending == 2
    assert tars(tmp_path) == undisturbed
    job = UnitJob.open(str(tmp_path / "tars"))
    assert [r.run.adopted for r in job.receipts()] == [(), ("synth-000001.tar",), (), ()]
    assert job.problems() == []


def test_another_job_in_the_folder_is_refused_with_what_differs(
    by_class: Path, tmp_path: Path
) -> None:
    run_synthesize(classes(tmp_path, by_class), limit=1)
    for change_, message in (
        ({"seed": 1}, r"content\.synthesize\.seed: 0 != 1"),
        ({"steps": 3}, r"content\.call\.steps: 2 != 3"),
        ({"classes": [0, 1]}, r"content\.entries\.number: 4 != 2"),
        ({"samples_per_tar": 6}, r"rows_per_unit: 5 != 6"),
    ):
        with pytest.raises(StoreMismatchError, match=message):
            run_synthesize(classes(tmp_path, by_class, **change_))


def test_other_weights_under_the_same_name_are_another_job(by_class: Path, tmp_path: Path) -> None:
    model = tmp_path / "by_class"
    shutil.copytree(by_class, model)
    prepared = prepare_synthesis(classes(tmp_path, by_class))
    assert prepare_synthesis(classes(tmp_path, model)).job == prepared.job  # wherever it lies
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "conv_out.bias": tensors["conv_out.bias"] + 1}, weights)
    assert prepare_synthesis(classes(tmp_path, model)).job != prepared.job
    run_synthesize(classes(tmp_path, by_class), limit=1)
    swapped = prepared.what.backbone.model_copy(update={"model": str(model)})
    what = dataclasses.replace(prepared.what, backbone=swapped)
    with pytest.raises(StoreMismatchError, match=r"has the weights .* here"):
        make_synthesis_task(what.spec.url, what, 1)


# --- what cannot be made --------------------------------------------------------------------------


def test_an_image_that_is_not_finite_is_left_out_and_listed(
    by_class: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    """Class 2 is told NaN; images of the same batch with another class are what they were."""
    model = tmp_path / "by_class"
    shutil.copytree(by_class, model)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["class_embedding.weight"][2] = float("nan")
    save_file(tensors, weights)
    done = run_synthesize(classes(tmp_path, model, order="interleaved"))
    assert (done.result.n_ok, done.result.n_invalid, done.result.n_items) == (12, 4, 16)
    assert [row.row for row in done.result.invalid] == [2, 6, 10, 14]
    assert {row.reason for row in done.result.invalid} == {"768 of 768 values are not finite"}
    assert done.result.invalid[0].key == "synth-000000002"
    found = samples(tmp_path)
    assert sorted(int(s["cls"]) for s in found.values()) == [0] * 4 + [1] * 4 + [3] * 4
    job = UnitJob.open(str(tmp_path / "tars"))
    assert job.problems() == []
    assert SynthesizeResult.load(tmp_path / "results" / "synthesize.json") == done.result


@pytest.mark.parametrize("flagged", ["mark", "leave_out"])
def test_what_a_safety_checker_made_black_is_marked_and_counted(
    flagged: str, diffusion: Path, tmp_path: Path
) -> None:
    model = with_safety_checker(diffusion, tmp_path / "model")
    done = run_synthesize(texts(tmp_path, model, flagged=flagged))
    assert done.result.n_flagged == 2
    found = samples(tmp_path)
    if flagged == "mark":
        assert [json.loads(s["json"])["flagged"] for s in found.values()] == [True, True]
        assert not any(pixels(s).any() for s in found.values())
        assert done.result.n_invalid == 0
    else:
        assert found == {}
        assert {row.reason for row in done.result.invalid} == {"the safety checker made it black"}


@pytest.mark.soak
def test_an_image_that_kills_its_worker_costs_itself(
    by_class: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    made = classes(tmp_path, by_class, run={"executor": "process", "max_attempts": 1})
    prepared = prepare_synthesis(made)
    job = UnitJob.create(str(tmp_path / "tars"), prepared.job)
    job.folder.put("entries.parquet", [prepared.plan.to_parquet()])
    make = partial(make_synthesis_task, str(tmp_path / "tars"), prepared.what, 1)
    task: Callable[[], Callable[[Lease, Stop], object]] = KillingRows(make, rows=(3,))
    (outcome,) = hand_out(made.run, task, job.units[:1])
    assert outcome.error is None
    (receipt,) = job.receipts()
    assert [(row.row, row.stage) for row in receipt.invalid] == [(3, "worker")]
    good, kept = tars(tmp_path)["synth-000000.tar"], undisturbed["synth-000000.tar"]
    assert numbers_in(good) == [0, 1, 2, 4]
    name = "synth-000000000.png"
    assert members(good)[name] == members(kept)[name]


# --- what is made: prompts, classes, sources ------------------------------------------------------


def plan_of(spec: dict[str, object], index: SampleIndex | None = None) -> SynthesisPlan:
    fields = {"url": "/nowhere", **spec}
    call = ImageCall(
        pipeline="P", scheduler="S", steps=1, guidance_scale=None, negative_prompt=None, size=None,
        arguments={}, takes="class" if "classes" in spec and "prompts" not in spec else "prompt",
        n_classes=10, class_names={3: "cat, tabby", 4: "dog"},
    )  # fmt: skip
    return make_plan(SynthesizeSpec.model_validate(fields), call, index)


def items(plan: SynthesisPlan) -> list[Item]:
    return [plan.item(n) for n in range(plan.n_items)]


WORDS = st.lists(st.sampled_from(["a", "b", "c", ""]), min_size=1, max_size=6)


@given(WORDS, WORDS, st.integers(1, 3), st.integers(1, 3), st.booleans())
@settings(max_examples=60, deadline=None)
def test_seeds_are_distinct_and_do_not_move(
    words: list[str], more: list[str], n: int, larger: int, interleaved: bool
) -> None:
    order = "interleaved" if interleaved else "grouped"
    found = items(plan_of({"prompts": words, "n_images": n, "order": order}))
    assert len(found) == len(words) * n
    seeds = [item.generator_seed(0) for item in found]
    assert len(set(seeds)) == len(seeds)  # also of a prompt that comes twice
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sorted(i.prompt or "" for i in found) == sorted(words * n)
    if not interleaved:
        assert [i.prompt for i in found] == [w for w in words for _ in range(n)]
    longer = items(plan_of({"prompts": [*words, *more], "n_images": n, "order": order}))
    made_from = {(i.prompt, i.ordinal): i.generator_seed(0) for i in longer}
    assert all(made_from[i.prompt, i.ordinal] == s for i, s in zip(found, seeds, strict=True))
    assert seeds != [item.generator_seed(larger) for item in found]


def test_seeds_are_these() -> None:
    """They may never change: images of a job begun with an earlier version depend on them."""
    (one,) = items(plan_of({"prompts": ["a cat"]}))
    assert one.generator_seed(0) == 5855271645769319859
    (two,) = items(plan_of({"classes": [3]}))
    assert two.generator_seed(5) == 9095284079284062367


def test_strengths_share_their_noise(tmp_path: Path) -> None:
    write_photo_tars(tmp_path, n_samples=3, n_tars=1)
    index = build_index(DatasetSpec(tars=str(tmp_path / "*.tar")))
    spec = {"prompts": {"captions": True}, "source": {"strength": [0.2, 1.0]}, "n_images": 2}
    found = items(plan_of(spec, index))
    assert [i.strength for i in found] == [0.2] * 6 + [1.0] * 6
    assert [i.source for i in found[:6:2]] == ["crop-0000", "crop-0001", "crop-0002"]
    low, high = ([i.generator_seed(0) for i in found[k : k + 6]] for k in (0, 6))
    assert low == high
    assert len(set(low)) == 6


def test_files_of_prompts(tmp_path: Path) -> None:
    words = ["a cat", 'a "dog", wet', "ein Käse", "a cat"]
    (tmp_path / "a.txt").write_text("\n".join(words) + "\n\n", encoding="utf-8")
    lines = [json.dumps({"text": word, "n": i}) for i, word in enumerate(words)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    pq.write_table(pa.table({"prompt": words}), tmp_path / "a.parquet")
    rows = ["text,n", *('"' + w.replace('"', '""') + '",1' for w in words)]
    (tmp_path / "a.csv").write_text("\n".join(rows), encoding="utf-8")
    for name, column in (("txt", "-"), ("jsonl", "text"), ("parquet", "prompt"), ("csv", "text")):
        spec = PromptsSpec(file=str(tmp_path / f"a.{name}"), column=column)
        assert read_prompts(spec) == words, name
    digests = {plan_of({"prompts": p}).digest() for p in (words, str(tmp_path / "a.txt"))}
    assert len(digests) == 1  # what was read counts, not from where
    for name, message in (
        ("b.txt", "no such file"),
        ("a.csv", "no column 'prompt'; there are text, n"),
        ("a.jsonl", "row 0 of 'prompt' is None, want text"),
    ):
        with pytest.raises(InputError, match=message):
            read_prompts(PromptsSpec(file=str(tmp_path / name)))


def test_classes_by_number_by_name_and_all() -> None:
    def ids(given_: object) -> list[int | None]:
        return [i.class_id for i in items(plan_of({"classes": given_}))]

    assert ids("all") == list(range(10))
    assert ids([4, "tabby", "dog"]) == [4, 3, 4]
    assert ids({7: "seven"}) == [7]
    assert items(plan_of({"classes": ["dog"]}))[0].label == "4"
    with pytest.raises(SpecError, match="no class 'cow'; the model names cat, tabby"):
        ids(["cow"])
    with pytest.raises(SpecError, match=r"synthesize\.classes: 10, want 0\.\.9"):
        ids([10])
    template = {"prompts": {"template": "a photo of a {label}"}}
    (one,) = items(plan_of({**template, "classes": {5: "cat"}}))
    assert (one.prompt, one.label, one.class_id) == ("a photo of a cat", "5", None)
    with pytest.raises(SpecError, match=r"want \{number: name\}"):
        plan_of({**template, "classes": ["cat"]})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompts": ["a"], "classes": [1]}, "want prompts.template"),
        ({"prompts": {"template": "a {label}"}}, "want classes, or source"),
        ({"prompts": {"template": "a"}, "classes": {1: "b"}}, "no {label} in it"),
        ({"prompts": {"texts": ["a"], "captions": True}}, "texts and captions given"),
        ({"prompts": "words.doc"}, "want a list, or .txt"),
        ({"source": {}}, "image to image wants prompts"),
        ({"source": {"strength": 0}, "prompts": ["a"]}, "greater than 0"),
        ({"source": {"strength": 0.1}, "prompts": ["a"], "steps": 5}, "less than one step"),
        ({"source": {}, "prompts": ["a"], "size": 8}, "the size of the section `images`"),
        ({"prompts": ["a"], "arguments": {"generator": 1}}, "generator is set by other fields"),
        ({"format": {"kind": "png", "quality": 3}}, "quality belongs to jpg"),
        ({"name": "../x"}, "pattern"),
    ],
)
def test_sections_that_mean_nothing(fields: dict[str, object], message: str) -> None:
    data = {"name": "p", "dataset": {"tars": "a.tar"}, "images": {"size": 8}}
    with pytest.raises(SpecError) as error:
        Pipeline.parse({**data, "synthesize": {"url": "x", **fields}})
    assert message in str(error.value)


def test_the_section_in_the_readme_is_valid() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = (b.split("```")[0] for b in text.split("```yaml\n") if b.startswith("synthesize:"))
    data = {"name": "p", "dataset": {"tars": "a.tar"}, "images": {"size": 8}}
    found = Pipeline.parse({**data, **yaml.safe_load(block)}).synthesize
    assert found is not None
    assert [c.name for c in found.classes or () if c != "all"] == ["tench", "goldfish"]


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    section = {"url": "tars", "prompts": "words.txt", "backbone": {"model": "./model"}}
    data = {"name": "p", "dataset": {"tars": "a.tar"}, "images": {"size": 8}}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({**data, "synthesize": section}))
    found = Pipeline.load(tmp_path / "p.yaml").synthesize
    assert found is not None
    assert found.prompts is not None
    assert found.backbone is not None
    paths = (found.url, found.prompts.file, found.backbone.model)
    assert paths == tuple(str(tmp_path / name) for name in ("tars", "words.txt", "model"))


# --- from a dataset, and back into one ------------------------------------------------------------


def test_image_to_image_keeps_source_label_and_caption(diffusion: Path, tmp_path: Path) -> None:
    """Little noise stays near what the VAE makes of the source, much does not; a source that does
    not decode costs its images."""
    write_photo_tars(tmp_path / "photos", n_samples=4, n_tars=1)
    bad = [("crop-0009.jpg", b"no image"), ("crop-0009.txt", b"a ruin"), ("crop-0009.cls", b"0")]
    write_tar(tmp_path / "photos" / "photos-9.tar", bad)
    made = pipeline(
        tmp_path,
        diffusion,
        dataset={"tars": str(tmp_path / "photos" / "*.tar")},
        images={"size": 32},
        prompts={"captions": True},
        source={"strength": [0.1, 1.0]},
        steps=10,
        batch_size=3,
        samples_per_tar=4,
    )
    done = run_synthesize(made)
    assert (done.result.n_items, done.result.n_ok, done.result.n_invalid) == (10, 8, 2)
    assert [(r.row, r.stage) for r in done.result.invalid] == [(4, "decode"), (9, "decode")]
    found = [(s, json.loads(s["json"])) for s in samples(tmp_path).values()]
    assert [about["source"] for _, about in found] == [f"crop-{i:04d}" for i in range(4)] * 2
    assert [about["strength"] for _, about in found] == [0.1] * 4 + [1.0] * 4
    assert [s["cls"] for s, _ in found[:2]] == [b"0", b"1"]
    assert [s["txt"] for s, _ in found[:2]] == [b"a temple", b"a flower"]
    for near, far in zip(found[:4], found[4:], strict=True):
        assert near[1]["generator_seed"] == far[1]["generator_seed"]
        assert not np.array_equal(pixels(near[0]), pixels(far[0]))


def test_a_source_without_a_caption_is_listed(diffusion: Path, tmp_path: Path) -> None:
    photo = io.BytesIO()
    photographs(1)[0].save(photo, "png")
    two = [("a.png", photo.getvalue()), ("a.txt", b"a flower"), ("b.png", photo.getvalue())]
    write_tar(tmp_path / "photos" / "p.tar", two)
    dataset = {"tars": str(tmp_path / "photos" / "p.tar")}
    made = texts(tmp_path, diffusion, dataset=dataset, prompts={"captions": True})
    done = run_synthesize(made)
    assert (done.result.n_ok, [r.reason for r in done.result.invalid]) == (1, ["it has no caption"])


@pytest.mark.parametrize("place", ["folder", pytest.param("s3", marks=pytest.mark.s3)])
def test_made_tars_are_extracted_and_probed_like_any_other(
    place: str, diffusion: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bucket = request.getfixturevalue("s3_url") if place == "s3" else str(tmp_path)
    url = f"{bucket}/made"
    made = texts(
        tmp_path,
        diffusion,
        url=url,
        classes={3: "cat", 5: "dog"},
        prompts={"template": "a photo of a {label}"},
        n_images=15,
        order="interleaved",
        samples_per_tar=12,
        batch_size=10,
    )
    done = run_synthesize(made)
    assert made.synthesize is not None
    pattern = tars_of(made.synthesize, done.result.n_units)
    assert pattern == f"{url}/synth-{{000000..000002}}.tar"
    names = {info.path for info in open_folder(url).list()}
    assert {f"synth-{i:06d}.tar" for i in range(3)} <= names
    one = f"{url}/synth-000000.tar"
    rest = f"{url}/synth-{{000001..000002}}.tar"
    ready = Pipeline.parse(
        {
            **made.model_dump(exclude_unset=True),
            "dataset": {"tars": {"train": rest, "test": one}},
            "backbone": {"model": "bundled:digits-ddpm"},
            "images": {"size": 16, "mode": "L"},
            "schedule": {"convention": "ddpm_index", "timesteps": [50]},
            "taps": ["mid_block"],
            "store": {"url": f"{bucket}/features.zarr"},
            "probe": {"seeds": [0], "epochs": 5, "validation": 0.3},
        }
    )
    store = extract(ready).store
    assert store.sealed
    table = store.samples()
    assert table["label"].to_pylist() == [3, 5] * 15
    assert set(store.index.table["caption"].to_pylist()) == {"a photo of a cat", "a photo of a dog"}
    assert run_probe(ready, device="cpu").n_classes == 2
    page = write_report(ready).read_text(encoding="utf-8")
    assert "<h2>Synthetic images</h2>" in page
    assert (
        page.count("a photo of a cat</figcaption>") + page.count("a photo of a dog</figcaption>")
        == 24
    )
    assert "30 images of 30" in page


def test_a_probe_trained_on_synthetic_digits_reads_real_ones(tmp_path: Path) -> None:
    """A network trained for half a minute draws each digit on demand, and logistic regression that
    saw nothing else reads real ones, so labels and images belong together; with the labels moved by
    one it reads none."""
    real = write_digits(tmp_path / "data")
    made = pipeline(
        tmp_path,
        tmp_path / "model",
        dataset={"tars": real},
        images={"size": 8, "resize": "stretch", "mode": "L"},
        classes="all",
        n_images=30,
        order="interleaved",
        steps=12,
        guidance_scale=3,
        scheduler={"name": "DDIMScheduler", "options": {"timestep_spacing": "trailing"}},
        batch_size=100,
        samples_per_tar=100,
    )
    training = {
        "classes": 10, "steps": 200, "batch_size": 32, "learning_rate": 4e-3, "warmup_steps": 20,
        "ema_decay": 0.99, "scheduler": {"beta_schedule": "squaredcos_cap_v2"},
        "output": str(tmp_path / "model"),
        "model": {
            "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1,
            "block_out_channels": [16, 32], "down_block_types": ["DownBlock2D"] * 2,
            "up_block_types": ["UpBlock2D"] * 2, "norm_num_groups": 8, "add_attention": False,
        },
    }  # fmt: skip
    with_training = Pipeline.parse({**made.model_dump(exclude_unset=True), "pretrain": training})
    assert with_training.pretrain is not None
    pretrain(with_training.pretrain, build_index(made.dataset), made.images, device="cpu")
    assert run_synthesize(made).result.n_ok == 300
    both = {"synthetic": str(tmp_path / "tars" / "synth-*.tar"), "real": real["test"]}
    index = build_index(DatasetSpec.model_validate({"tars": both}))
    x = RowPixels(index, made.images, "", False, 2).read(np.arange(index.n_samples))
    x, y = x.reshape(len(x), -1) / 255, index.table["label"].to_numpy()
    is_real = np.asarray(index.table["split"].to_pylist()) == "real"
    assert is_real.sum() == 360
    fitted = LogisticRegression(max_iter=500).fit(x[~is_real], y[~is_real])
    assert fitted.score(x[is_real], y[is_real]) > 0.6  # chance: 0.1
    assert fitted.score(x[is_real], (y[is_real] + 1) % 10) < 0.2


# --- the command ----------------------------------------------------------------------------------


def write_file(folder: Path, made: Pipeline) -> Path:
    path = folder / "p.yaml"
    path.write_text(yaml.safe_dump(made.model_dump(mode="json", exclude_unset=True)))
    return path


def test_the_command(
    drl: Drl, by_class: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    path = write_file(tmp_path, classes(tmp_path, by_class))
    code, out, err = drl("synthesize", path, "--units", "0/2", "--executor", "local")
    assert code == 0, err
    assert "10 images in" in out
    assert "10 images of 16 in 2 of 4 tars" in out
    code, out, err = drl("synthesize", path)
    assert (code, tars(tmp_path)) == (0, undisturbed)
    assert "synth-{000000..000003}.tar" in out
    assert "UNet2DModel, DDPMScheduler, 2 steps, guidance 1" in out
    code, out, _ = drl("synthesize", path)
    assert "nothing left to do: no model was loaded" in out
    elsewhere = tmp_path / "elsewhere"
    assert drl("synthesize", path, "--out", elsewhere, "--limit", "1")[0] == 0
    assert (elsewhere / "synth-000000.tar").read_bytes() == undisturbed["synth-000000.tar"]
    code, out, _ = drl("index", tmp_path / "tars" / "*.tar", "--out", tmp_path / "i.parquet")
    assert "16 samples of 4 tars" in out
    other = classes(tmp_path, by_class, seed=3)
    code, _, err = drl("synthesize", write_file(tmp_path, other))
    assert code == 2
    assert "content.synthesize.seed: 0 != 3" in err


def test_sigterm_ends_with_3_and_the_next_run_finishes(by_class: Path, tmp_path: Path) -> None:
    made = classes(tmp_path, by_class, n_images=60, steps=4, samples_per_tar=4)
    command = [sys.executable, "-m", "drl_data", "synthesize", str(write_file(tmp_path, made))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    receipts = tmp_path / "tars" / "receipts"
    while process.poll() is None and not list(receipts.glob("*.json")):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 3, err
    assert "tars left; run the same command again to resume" in err
    n_done = len(tars(tmp_path))
    assert 0 < n_done < 60
    done = run_synthesize(made)
    assert (done.n_made, done.result.n_ok) == (240 - 4 * n_done, 240)
    assert len(samples(tmp_path)) == 240
