"""Class-conditional training: what the network is told, what is recorded, and that it learns."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from drl_data.backbones import find_model, load_backbone
from drl_data.class_labels import Classes
from drl_data.diffusion_spec import ConditionSpec
from drl_data.errors import SpecError
from drl_data.index import SampleIndex, build_index
from drl_data.pipeline import PretrainSpec
from drl_data.pretrain import pretrain
from drl_data.sampling import sample
from drl_data.spec import BackboneSpec, DatasetSpec
from tests.test_pretrain import IMAGES, MODEL, WEIGHTS, Interrupting, bright_half, spec_of
from tests.toy_tars import write_tar

pytestmark = pytest.mark.usefixtures("one_thread")


def flipped(row: int) -> bytes:
    """Class 0 is bright below, class 1 above."""
    image = Image.open(io.BytesIO(bright_half(row)))
    buffer = io.BytesIO()
    (ImageOps.flip(image) if row % 2 else image).save(buffer, "png")
    return buffer.getvalue()


def index_of(folder: Path, labels: list[str | None], broken: int = 0) -> SampleIndex:
    members = []
    for row, label in enumerate(labels):
        members.append((f"{row:03d}.png", b"\x89PNG" if row < broken else flipped(row)))
        if label is not None:
            members.append((f"{row:03d}.cls", label.encode()))
    tar = write_tar(folder / "train.tar", members)
    given = {"tars": {"train": str(tar)}, "label": "cls"}
    return build_index(DatasetSpec.model_validate(given))


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    """24 images, the first does not decode, the last two have no label."""
    labels: list[str | None] = [str(row % 2) for row in range(22)]
    return index_of(tmp_path_factory.mktemp("tars"), [*labels, None, None], broken=1)


@pytest.fixture(scope="module")
def trained(index: SampleIndex, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "ddpm"
    return pretrain(spec_of(folder, classes=2), index, IMAGES, device="cpu")


def test_the_null_class_is_in_the_configuration(trained: Path, index: SampleIndex) -> None:
    config = json.loads((trained / "unet/config.json").read_text())
    assert (config["num_class_embeds"], config["_null_class"]) == (3, 2)
    assert UNet2DModel.from_pretrained(trained / "unet").config["_null_class"] == 2
    record = json.loads((trained / "training.json").read_text())
    assert record["classes"] == {"number": 2, "names": None, "null_class": 2}
    assert record["spec"]["classes"] == {"number": 2, "dropout": 0.1}
    assert (record["n_images"], record["n_invalid"], record["n_unlabelled"]) == (21, 1, 2)


def test_a_backbone_is_told_the_classes_and_null(trained: Path) -> None:
    for device in ("cpu", "meta"):
        backbone = load_backbone(find_model(BackboneSpec(model=str(trained))), device)
        for label, want in (("null", 2), (0, 0), (1, 1)):
            told = backbone.conditioning(ConditionSpec.model_validate({"class_label": label}))
            assert told.kwargs["class_labels"].shape == (1,)
            if device == "cpu":
                assert told.kwargs["class_labels"].tolist() == [want]
        with pytest.raises(SpecError, match=r"class_label 2: want 0\.\.1 or null"):
            backbone.conditioning(ConditionSpec(class_label=2))


def test_without_dropout_there_is_no_null_class(index: SampleIndex, tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "ddpm", classes={"dropout": 0}, steps=1)
    folder = pretrain(spec, index, IMAGES, device="cpu")
    config = json.loads((folder / "unet/config.json").read_text())
    assert config["num_class_embeds"] == 2
    assert "_null_class" not in config
    backbone = load_backbone(find_model(BackboneSpec(model=str(folder))), "meta")
    with pytest.raises(SpecError, match="without a null class; give a number"):
        backbone.conditioning(ConditionSpec())
    with pytest.raises(SpecError, match="trained without a null class"):
        sample(folder, 1, labels=[0], guidance=2.0)


@pytest.mark.parametrize("after", [1, 4])
def test_interrupted_and_resumed_is_the_same(
    trained: Path, index: SampleIndex, tmp_path: Path, after: int
) -> None:
    spec = spec_of(tmp_path / "ddpm", classes=2)
    with pytest.raises(KeyboardInterrupt):
        pretrain(spec, index, IMAGES, device="cpu", progress=Interrupting(after))
    torch.manual_seed(after)
    resumed = pretrain(spec, index, IMAGES, device="cpu")
    assert (resumed / WEIGHTS).read_bytes() == (trained / WEIGHTS).read_bytes()
    with pytest.raises(SpecError, match="another training"):
        pretrain(spec_of(resumed, classes={"number": 2, "dropout": 0.2}), index, IMAGES)


def test_trainings_without_classes_are_recorded_as_ever(index: SampleIndex, tmp_path: Path) -> None:
    """So that those of older versions are still complete."""
    folder = pretrain(spec_of(tmp_path / "ddpm", steps=1), index, IMAGES, device="cpu")
    record = json.loads((folder / "training.json").read_text())
    assert not {"classes", "n_unlabelled"} & (set(record) | set(record["spec"]))
    assert record["n_images"] == 23  # labels or not


@settings(deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), max_size=40),
    dropout=st.floats(0, 0.9),
    seed=st.integers(0, 99),
)
def test_dropped_labels_are_null_and_others_stay(
    labels: list[int], dropout: float, seed: int
) -> None:
    classes = Classes(5, dropout, None)
    given = torch.tensor(labels, dtype=torch.int64)
    told = classes.dropped(given, torch.Generator().manual_seed(seed))
    assert bool(((told == given) | (told == 5)).all())
    assert told.dtype == torch.int64
    if not dropout:
        assert torch.equal(told, given)


def test_the_share_that_is_dropped() -> None:
    told = Classes(5, 0.25, None).dropped(torch.zeros(40_000).long(), torch.Generator())
    share = float((told == 5).float().mean())
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 40_000) ** 0.5


@pytest.mark.parametrize(
    ("fields", "labels", "message"),
    [
        ({"classes": 1}, ["0", "1"], r"labels are 0\.\.1, want 0\.\.0; set .*classes\.number"),
        ({"classes": {}}, ["-1", "1"], r"labels are -1\.\.1, want 0\.\.1"),
        ({"classes": {}}, [None, None], "no sample of the dataset has a label"),
        ({"model": MODEL | {"num_class_embeds": 3}}, ["0", "1"], "want it left out"),
        (
            {"classes": {}, "model": MODEL | {"class_embed_type": "timestep"}},
            ["0", "1"],
            "class_embed_type: want it left out",
        ),
    ],
)
def test_classes_that_do_not_fit(
    tmp_path: Path, fields: dict[str, object], labels: list[str | None], message: str
) -> None:
    index = index_of(tmp_path, labels)
    with pytest.raises(SpecError, match=message):
        pretrain(spec_of(tmp_path / "x", **fields), index, IMAGES, device="cpu")


def test_a_split_without_labels_is_refused(tmp_path: Path) -> None:
    index = index_of(tmp_path, [None, None, "1"])
    other = write_tar(tmp_path / "other.tar", [("a.png", flipped(0))])
    tars = {"train": index.tars[0].url, "other": str(other)}
    both = build_index(DatasetSpec.model_validate({"tars": tars, "label": "cls"}))
    with pytest.raises(SpecError, match="1 samples, of which 0 do not decode and 1 have no label"):
        pretrain(spec_of(tmp_path / "x", split="other", classes={}), both, IMAGES, device="cpu")


def test_text_labels_are_classes_by_their_names(tmp_path: Path) -> None:
    index = index_of(tmp_path, ["cat", "dog", "cat", "emu"])
    folder = pretrain(spec_of(tmp_path / "ddpm", classes={}, steps=1), index, IMAGES, device="cpu")
    record = json.loads((folder / "training.json").read_text())
    assert record["classes"] == {"number": 3, "names": ["cat", "dog", "emu"], "null_class": 3}


def test_it_learns_the_classes(index: SampleIndex, tmp_path: Path) -> None:
    """Class 0 is bright below, class 1 above."""
    spec: PretrainSpec = spec_of(
        tmp_path / "ddpm",
        model=MODEL | {"block_out_channels": [16, 16], "dropout": 0.0},
        classes={"dropout": 0.2},
        steps=200,
        batch_size=32,
        learning_rate=5e-3,
        ema_decay=0.95,
        checkpoint_every=1000,
    )
    folder = pretrain(spec, index, IMAGES, device="cpu")

    drawn = sample(folder, 8, labels=[0, 1] * 4, seed=1, steps=20).astype(float)
    above = drawn[:, 0, :4].mean((1, 2)) - drawn[:, 0, 4:].mean((1, 2))
    assert (above[0::2] < -100).all()
    assert (above[1::2] > 100).all()


@torch.no_grad()
def test_guidance_is_that_of_the_paper(trained: Path) -> None:
    """(1 + w) eps_label - w eps_null with w = guidance - 1 (Ho and Salimans 2022, eq. 6)."""
    model = UNet2DModel.from_pretrained(trained / "unet").eval()
    config = DDIMScheduler.load_config(trained / "scheduler")
    scheduler = DDIMScheduler.from_config(config, timestep_spacing="trailing")
    scheduler.set_timesteps(3)
    x = torch.randn((2, 1, 8, 8), generator=torch.Generator().manual_seed(4))
    labels, null = torch.tensor([1, 0]), torch.tensor([2, 2])
    for t in scheduler.timesteps:
        eps = 4.0 * model(x, t, labels).sample - 3.0 * model(x, t, null).sample
        x = scheduler.step(eps, t, x).prev_sample
    want = ((x + 1) / 2 * 255).round().clamp(0, 255).byte().numpy()
    got = sample(trained, 2, labels=[1, 0], guidance=4.0, seed=4, steps=3)
    assert np.abs(got.astype(int) - want.astype(int)).max() <= 1  # the sums are in another order
    assert not np.array_equal(got, sample(trained, 2, labels=[1, 0], seed=4, steps=3))


def test_sampling_without_what_it_needs(trained: Path, index: SampleIndex, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="labels: none, want 2"):
        sample(trained, 2)
    with pytest.raises(SpecError, match="labels: 1, want 2"):
        sample(trained, 2, labels=[0])
    with pytest.raises(SpecError, match=r"labels 0\.\.3: want 0\.\.2"):
        sample(trained, 2, labels=[0, 3])
    plain = pretrain(spec_of(tmp_path / "ddpm", steps=1), index, IMAGES, device="cpu")
    with pytest.raises(SpecError, match="not class-conditional"):
        sample(plain, 1, labels=[0])
