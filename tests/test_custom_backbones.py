"""Your own models: the worked examples end to end, from the spec to the store."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from drl_data.backbones import find_model, load_backbone
from drl_data.backbones.inventory import tappable_modules
from drl_data.errors import SpecError
from drl_data.images import read_batches
from drl_data.index import build_index
from drl_data.pipeline import Pipeline
from drl_data.plan import Unit
from drl_data.runs import extract
from drl_data.spec import BackboneSpec
from drl_data.store import FeatureStore
from drl_data.testing import write_photo_tars
from tests import custom_backbones
from tests.custom_backbones import JointModel, SemanticEncoder

pytestmark = pytest.mark.usefixtures("one_thread")

ENCODER = "python:tests.custom_backbones:semantic_encoder"
JOINT = "python:tests.custom_backbones:joint_model"


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of random weights for the encoder, named by the environment."""
    torch.manual_seed(0)
    path = tmp_path / "encoder.safetensors"
    save_file(SemanticEncoder().state_dict(), path)
    monkeypatch.setenv(custom_backbones.WEIGHTS, str(path))
    return path


def pipeline(folder: Path, **changes: object) -> Pipeline:
    data: dict[str, object] = {
        "name": "own",
        "dataset": {"tars": str(write_photo_tars(folder / "tars", n_samples=6) / "*.tar")},
        "images": {"size": 16},
        "features": {"dtype": "float32", "batch_size": 6, "rows_per_unit": 6},
        "store": {"url": str(folder / "store.zarr")},
    }
    return Pipeline.parse({**data, **changes})


def pixels_of(made: Pipeline) -> Tensor:
    (batch,) = read_batches(
        Unit(0, 0, 6), build_index(made.dataset), made.images,
        batch_size=6, n_threads=1, prefetch_bytes=1 << 20,
    )  # fmt: skip
    return torch.from_numpy(batch.pixels).float() / 255 * 2 - 1


def stored(url: str, array: str) -> Tensor:
    return torch.from_numpy(FeatureStore.open(url).read_rows(array, 0, range(6)))


def test_a_semantic_encoder_without_any_diffusion(tmp_path: Path, weights: Path) -> None:
    made = pipeline(
        tmp_path,
        backbone={"model": ENCODER},
        schedule={"convention": "none"},
        noise={"kind": "none"},
        taps=[{"path": "bottleneck", "name": "z_sem"}],
    )
    assert not extract(made).failed
    torch.manual_seed(0)
    with torch.no_grad():
        want = SemanticEncoder()(pixels_of(made))
    assert torch.equal(stored(str(tmp_path / "store.zarr"), "z_sem"), want)


def test_a_joint_model_tapped_at_all_its_skips(tmp_path: Path) -> None:
    made = pipeline(
        tmp_path,
        backbone={"model": JOINT, "init_seed": 4},
        schedule={"timesteps": [0]},
        noise={"kind": "none"},
        taps=[
            {"path": "skip_of.*", "reduce": "mean"},
            {"path": "middle", "reduce": "mean"},
        ],
    )
    assert not extract(made).failed
    torch.manual_seed(4)
    network = JointModel()
    kept: list[Tensor] = []
    for module in (*network.skip_of, network.middle):
        module.register_forward_hook(lambda m, a, out: kept.append(out.mean((2, 3))))
    with torch.no_grad():
        network(pixels_of(made), torch.zeros(6, dtype=torch.long))
    names = ["skip_of.0", "skip_of.1", "skip_of.2", "middle"]
    for name, want in zip(names, kept, strict=True):
        assert torch.equal(stored(str(tmp_path / "store.zarr"), name), want)


def test_the_digest_is_the_factory_s_word(weights: Path) -> None:
    def digest(**changes: object) -> str:
        return find_model(BackboneSpec(**{"model": ENCODER, **changes})).digest()

    first = digest()
    assert first == digest()
    moved = weights.with_name("moved.safetensors")
    moved.write_bytes(weights.read_bytes())
    assert first == digest()
    assert digest(model=JOINT) != first
    assert digest(model=f"{ENCODER}_again") != first
    assert digest(model=JOINT, init_seed=1) != digest(model=JOINT)
    assert digest(init="random") != first
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert digest() != first


def test_own_models_can_be_listed() -> None:
    spec = BackboneSpec(model=JOINT)
    paths = [module.path for module in tappable_modules(spec, 16).modules]
    assert paths[:4] == ["time", "skip_of.0", "skip_of.1", "skip_of.2"]
    with pytest.raises(SpecError, match="give --size"):
        tappable_modules(spec)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("python:no.such.module:f", "No module named 'no'; the module must be installed"),
        ("python:tests.custom_backbones:nothing", "has no attribute 'nothing'"),
        ("python:tests.custom_backbones", r"want python:package\.module:factory"),
        ("python:tests.custom_backbones:a:b", r"want python:package\.module:factory"),
        (
            "python:tests.custom_backbones:not_a_backbone",
            "gave a JointModel; want a CustomBackbone",
        ),
    ],
)
def test_what_is_no_factory_is_refused(model: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        load_backbone(find_model(BackboneSpec(model=model)), "meta")
