"""No pickle is read or written, and no code comes with data: by reading our code, and by feeding
every reader a pickle that would leave a trace.

Python's pickle does run between processes of one run: Ray and `multiprocessing` send our own task
(a function, a spec, URLs) to workers that they started, and DataLoader sends datasets to its own.
Nothing of it is read from, or written to, a disk or an object store.
"""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import drl_data
from drl_data.backbones import find_model, load_backbone
from drl_data.backbones.overrides import read_tensors
from drl_data.backbones.text import read_embeddings
from drl_data.computers import condition_files
from drl_data.errors import DrlDataError
from drl_data.extract import make_task
from drl_data.index import SampleIndex
from drl_data.noise_bank import read_bank
from drl_data.pipeline import Pipeline, PretrainSpec
from drl_data.pretrain import pretrain
from drl_data.runs import extract, extract_all
from drl_data.spec import BackboneSpec, ImageSpec
from drl_data.store import FeatureStore
from drl_data.tasks.probe import ProbeResult
from drl_data.testing import write_photo_tars
from drl_data.tiny_models import save_tiny_adm, save_tiny_ddpm, save_tiny_encoder
from tests.test_extract import pipeline

SOURCES = sorted(Path(drl_data.__file__).parent.rglob("*.py"))
FORBIDDEN = {
    "pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "imp",
    "jsonpickle", "pandas", "h5py",
}  # fmt: skip
NEVER_CALLED = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.save",
    "np.savez", "torch.hub.load", "torch.jit.load",
}  # fmt: skip
EXCEPTIONS = {("noise_bank.py", "import pickle"), ("export_formats.py", "import h5py")}
"""One names an exception that `torch.load(weights_only=True)` raises, and calls nothing; the other
writes numbers and text, and reads nothing."""
DYNAMIC_IMPORTS = {"__init__.py", "factories.py", "testing.py"}
"""Our own modules by name; `python:MODULE:FACTORY`, which the user's pipeline names."""


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a name or attribute, "" of anything else at its root."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def offences(source: str, name: str) -> Iterator[str]:
    """What a file does that this project does not."""
    for node in ast.walk(ast.parse(source)):
        where = f"{name}:{getattr(node, 'lineno', 0)}: "
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            modules = [module or ""] if module else [alias.name for alias in node.names]
            for each in modules:
                if each.split(".")[0] in FORBIDDEN and (name, f"import {each}") not in EXCEPTIONS:
                    yield f"{where}import {each}"
        name_of = dotted(node) if isinstance(node, ast.Attribute) else ""
        if name_of.startswith("pickle.") and name_of != "pickle.UnpicklingError":
            yield f"{where}{name_of}"
        if isinstance(node, ast.Call):
            yield from (where + each for each in bad_call(node, name))


def bad_call(node: ast.Call, name: str) -> Iterator[str]:
    called, last = dotted(node.func), dotted(node.func).rpartition(".")[2]
    given = {keyword.arg: keyword.value for keyword in node.keywords}

    def has(keyword: str, value: object) -> bool:
        found = given.get(keyword)
        return isinstance(found, ast.Constant) and found.value is value

    if called in NEVER_CALLED:
        yield called
    if last == "import_module" and name not in DYNAMIC_IMPORTS:
        yield called
    if called.startswith("yaml.") and last not in ("safe_load", "safe_dump"):
        yield called
    if called == "torch.load" and not has("weights_only", True):
        yield f"{called} without weights_only=True"
    if called in ("np.load", "numpy.load", "np.save", "numpy.save") and not has(
        "allow_pickle", False
    ):
        yield f"{called} without allow_pickle=False"
    if last in ("read_pickle", "to_pickle", "load_pickle", "object_codec"):
        yield called
    if "shell" in given and not has("shell", False):
        yield f"{called} with shell"
    if "trust_remote_code" in given and not has("trust_remote_code", False):
        yield f"{called} with trust_remote_code"
    if last == "from_pretrained":
        if not has("local_files_only", True):
            yield f"{called} without local_files_only=True"
        is_model = called == "cls.from_pretrained" or "Model." in called
        if is_model and not has("use_safetensors", True):
            yield f"{called} without use_safetensors=True"
        if called.startswith("Auto") and not has("trust_remote_code", False):
            yield f"{called} without trust_remote_code=False"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_our_code_reads_and_writes_no_pickle(path: Path) -> None:
    assert list(offences(path.read_text(encoding="utf-8"), path.name)) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from pickle import loads", "import cloudpickle as c", "import joblib",
        "pickle.loads(b'')", "eval('1')", "exec(code)", "os.system('ls')", "yaml.load(text)",
        "yaml.unsafe_load(text)", "torch.load(path)", "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)", "np.load(path)", "np.load(path, allow_pickle=True)",
        "subprocess.run('ls', shell=True)", "AutoModel.from_pretrained(p, local_files_only=True)",
        "x.from_pretrained(p, local_files_only=True, trust_remote_code=True)", "pd.read_pickle(p)",
        "cls.from_pretrained(path, local_files_only=True)", "importlib.import_module(name)",
        "torch.save(x, path)",
    ],
)  # fmt: skip
def test_the_search_finds(line: str) -> None:
    assert list(offences(line, "x.py"))


# --- a pickle in the place of everything ----------------------------------------------------------


class Trace:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def trace(tmp_path: Path) -> Iterator[Path]:
    """Where an unpickled pickle leaves its trace; there is none at the end."""
    path = tmp_path / "trace"
    yield path
    assert not path.exists()


def pickles(trace: Path) -> dict[str, bytes]:
    """The same pickle plain, as torch.save packs it now and did before, and as NumPy does."""
    new, old, array = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"w": Trace(trace)}, new)
    torch.save({"w": Trace(trace)}, old, _use_new_zipfile_serialization=False)
    np.save(array, np.array([Trace(trace)]), allow_pickle=True)
    return {
        "plain": pickle.dumps(Trace(trace)),
        "protocol 0": pickle.dumps(Trace(trace), protocol=0),
        "torch": new.getvalue(),
        "old torch": old.getvalue(),
        "numpy": array.getvalue(),
    }


def test_the_pickles_would_leave_a_trace(tmp_path: Path) -> None:
    for name, data in pickles(tmp_path / "trace").items():
        if name in ("plain", "protocol 0"):
            pickle.loads(data)
        elif name == "numpy":
            np.load(io.BytesIO(data), allow_pickle=True)
        else:
            torch.load(io.BytesIO(data), weights_only=False)
        (tmp_path / "trace").rmdir()


KINDS = ["plain", "protocol 0", "torch", "old torch", "numpy"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photo_tars(tmp_path_factory.mktemp("photos"), n_samples=4, n_tars=1)


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_ddpm(tmp_path_factory.mktemp("ddpm"))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, photos: Path, ddpm: Path) -> Pipeline:
    """A finished store with a fitted array."""
    folder = tmp_path_factory.mktemp("stored")
    taps = [{"path": "mid_block", "reduce": ["pca(2, 4)"]}]
    spec = pipeline(photos, ddpm, folder / "s.zarr", taps=taps)
    extract(spec)
    return spec


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_files_of_tensors(kind: str, tmp_path: Path, trace: Path) -> None:
    data = pickles(trace)[kind]
    for suffix in (".npy", ".safetensors", ".pt", ".pth"):
        path = tmp_path / f"x{suffix}"
        path.write_bytes(data)
        readers: list[Callable[[str], object]] = [read_bank, read_tensors]
        readers.append(lambda p: read_embeddings(p, {"prompt_embeds": (1, 4)}))
        for read in readers:
            with pytest.raises(DrlDataError, match=r"x\."):
                read(str(path))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [save_tiny_ddpm, save_tiny_adm, save_tiny_encoder])
def test_weights(kind: str, make: Callable[[Path], Path], tmp_path: Path, trace: Path) -> None:
    """A pickle under the name of safetensors, and pickles under their own names alone."""
    data = pickles(trace)[kind]
    folder = make(tmp_path / "model")
    (weights,) = folder.rglob("*.safetensors")
    weights.write_bytes(data)
    spec = BackboneSpec(model=str(folder))
    with pytest.raises(DrlDataError):
        load_backbone(find_model(spec), "cpu")
    weights.unlink()
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin", "model.pt"):
        (weights.parent / name).write_bytes(data)
    with pytest.raises(DrlDataError, match="safetensors"):
        load_backbone(find_model(spec), "cpu")
    for suffix in (".pt", ".pth", ".ckpt", ".bin"):
        (tmp_path / f"m{suffix}").write_bytes(data)
        with pytest.raises(DrlDataError, match="is a pickle, which may run code"):
            find_model(BackboneSpec(model=str(tmp_path / f"m{suffix}")))


def test_code_that_comes_with_a_model_does_not_run(
    tmp_path: Path, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask the terminal; here nobody is asked."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\n"))
    folder = save_tiny_encoder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "architectures": ["Evil"],
               "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Evil"}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(trace)!r})\n")
    with pytest.raises(DrlDataError):
        load_backbone(find_model(BackboneSpec(model=str(folder))), "cpu")


OBJECTS = {
    "zarr.json": lambda url: FeatureStore.open(url),
    "index.parquet": lambda url: FeatureStore.open(url).index,
    "receipts/00000000.json": lambda url: FeatureStore.open(url).receipts(),
    "samples.parquet": lambda url: FeatureStore.open(url).samples(),
    "mid_block/zarr.json": lambda url: FeatureStore.open(url).verify() or _fail(),
    "sealed.json": lambda url: FeatureStore.open(url).verify() or _fail(),
    "mid_block/c/0/0/0/0/0": lambda url: FeatureStore.open(url).verify(deep=True) or _fail(),
}  # fmt: skip


def _fail() -> None:
    raise AssertionError("verify found nothing")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", OBJECTS)
def test_objects_of_a_store(
    kind: str, path: str, stored: Pipeline, tmp_path: Path, trace: Path
) -> None:
    assert stored.store is not None
    url = str(shutil.copytree(stored.store.url, tmp_path / "s.zarr"))
    assert (tmp_path / "s.zarr" / path).exists()
    (tmp_path / "s.zarr" / path).write_bytes(pickles(trace)[kind])
    try:
        OBJECTS[path](url)
    except DrlDataError as error:
        assert path in str(error) or "s.zarr" in str(error)  # noqa: PT017


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit(kind: str, stored: Pipeline, tmp_path: Path, trace: Path) -> None:
    assert stored.store is not None
    assert stored.backbone is not None
    url = str(shutil.copytree(stored.store.url, tmp_path / "s.zarr"))
    (fit,) = (tmp_path / "s.zarr" / "fits").iterdir()
    fit.write_bytes(pickles(trace)[kind])
    with pytest.raises(DrlDataError, match="not a fit"):
        make_task(url, stored.backbone, stored.condition, stored.run, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_files_beside_a_store(
    kind: str, photos: Path, ddpm: Path, stored: Pipeline, tmp_path: Path, trace: Path
) -> None:
    """An index, a task's result, the sizes of buckets, a checkpoint of pretraining, a pipeline."""
    data = pickles(trace)[kind]
    path = tmp_path / "x"
    path.write_bytes(data)
    with pytest.raises(DrlDataError, match="not a Parquet file"):
        SampleIndex.load(str(path))
    with pytest.raises(DrlDataError, match="not a result of `drl probe`"):
        ProbeResult.load(path)
    with pytest.raises(DrlDataError):
        Pipeline.load(path)
    (tmp_path / "b-sizes.parquet").write_bytes(data)
    changes = {"buckets": {"multiple": 8}, "images": {"size": 16}}
    with pytest.raises(DrlDataError, match="sizes"):
        extract_all(pipeline(photos, ddpm, tmp_path / "b.zarr", **changes))
    assert stored.store is not None
    index = FeatureStore.open(stored.store.url).index
    out = tmp_path / "trained"
    out.mkdir()
    (out / "checkpoint.safetensors").write_bytes(data)
    model = {"sample_size": 16, "block_out_channels": [32], "layers_per_block": 1}
    blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    spec = PretrainSpec(split="all", model={**model, **blocks}, steps=1, output=str(out))
    with pytest.raises(DrlDataError, match="not a checkpoint of `drl pretrain`"):
        pretrain(spec, index, ImageSpec(size=16), device="cpu")


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.mkdir [{trace}]",
        "name: !!python/object/apply:os.mkdir [{trace}]",
        "name: x\ndataset: !!python/object/new:os.mkdir [{trace}]",
        "!!python/module:os",
    ],
)
def test_yaml_makes_no_objects(text: str, tmp_path: Path, trace: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text.replace("{trace}", str(trace)))
    with pytest.raises(DrlDataError, match=r"p\.yaml"):
        Pipeline.load(path)


def test_digests_of_files_read_bytes_alone(tmp_path: Path, trace: Path, stored: Pipeline) -> None:
    path = tmp_path / "e.safetensors"
    path.write_bytes(pickles(trace)["torch"])
    told = stored.condition.model_copy(update={"prompt_embeddings": str(path)})
    assert len(condition_files(told)["prompt_embeddings"]) == 64
