"""Sites, reductions and storage types from a pipeline file to the store, against straight loops.

The loops use plain diffusers calls, and the definition of the noise; batches are those that the
spec names, so that equal operations give equal bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiTTransformer2DModel, UNet2DConditionModel
from torch import Tensor

from drl_data import tap_sites
from drl_data.datasets import FeatureDataset, FeatureStream
from drl_data.errors import FeatureError, SpecError, StoreError, TapError
from drl_data.noise import draw_normal
from drl_data.pipeline import Pipeline
from drl_data.runs import extract, prepare
from drl_data.store import FeatureStore
from drl_data.tap_sites import Modules, Place
from drl_data.testing import write_photo_tars
from drl_data.tiny_models import save_tiny_dit, save_tiny_stable_diffusion

N_SAMPLES = 12
TIMES = (0, 300)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photo_tars(tmp_path_factory.mktemp("photos"), n_samples=N_SAMPLES, size=16)


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_stable_diffusion(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_dit(tmp_path_factory.mktemp("dit"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The bits of a convolution depend on the number of threads."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def pipeline(photos: Path, model: Path, store: Path, **changes: object) -> Pipeline:
    data: dict[str, object] = {
        "name": "test",
        "dataset": {"tars": str(photos / "*.tar")},
        "images": {"size": 16},
        "backbone": {"model": str(model)},
        "schedule": {"timesteps": list(TIMES)},
        "features": {"dtype": "float32", "batch_size": 4, "rows_per_unit": 8},
        "store": {"url": str(store)},
    }
    return Pipeline.parse({**data, **changes})


def whole(store: FeatureStore, name: str) -> np.ndarray:
    """[t, row, ...] of an array as stored."""
    return np.stack(
        [
            np.concatenate([store.read_unit(name, t, unit) for unit in store.units])
            for t in range(store.n_times(name))
        ]
    )


class Loop:
    """Plain diffusers on the same images: {module: [t, row, ...]} of outputs (or inputs)."""

    def __init__(self, photos: Path, model: Path, network: torch.nn.Module) -> None:
        self.network = network.eval()
        self.vae = AutoencoderKL.from_pretrained(model / "vae").eval()
        self.scheduler = DDPMScheduler.from_pretrained(model / "scheduler")
        index = prepare(pipeline(photos, model, Path("unused"), taps=["latent"])).index
        self.keys = index.table["key"].to_pylist()
        self.images = _decoded(photos)

    def noise(self, role: str, keys: list[str], member: int = 0) -> Tensor:
        drawn = [draw_normal((4, 8, 8), role, 0, "key", key, member, "all") for key in keys]
        return torch.from_numpy(np.stack(drawn))

    def run(self, call: object, *modules: str, inputs: bool = False) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}
        handles = [
            self.network.get_submodule(name).register_forward_hook(
                lambda m, a, k, out, name=name: kept.update(
                    {name: (a[0] if a else k["hidden_states"]).clone() if inputs else out}
                ),
                with_kwargs=True,
            )
            for name in modules
        ]
        found: dict[str, list[list[Tensor]]] = {name: [] for name in modules}
        for time in TIMES:
            for name in modules:
                found[name].append([])
            for start in range(0, N_SAMPLES, 4):
                keys = self.keys[start : start + 4]
                with torch.no_grad():
                    posterior = self.vae.encode(self.images[start : start + 4]).latent_dist
                    z = posterior.mean + posterior.std * self.noise("posterior", keys)
                    x = z * self.vae.config.scaling_factor
                    steps = torch.full((4,), time)
                    call(self.scheduler.add_noise(x, self.noise("noise", keys), steps), steps)
                for name in modules:
                    found[name][-1].append(kept[name])
        for handle in handles:
            handle.remove()
        return {
            name: torch.stack([torch.cat(batches) for batches in times])
            for name, times in found.items()
        }


def _decoded(photos: Path) -> Tensor:
    import io
    import tarfile

    from PIL import Image

    images = []
    for path in sorted(photos.glob("*.tar")):
        with tarfile.open(path) as tar:
            for name in sorted(n for n in tar.getnames() if n.endswith(".jpg")):
                image = Image.open(io.BytesIO(tar.extractfile(name).read())).convert("RGB")
                images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    return torch.stack(images).float() / 255 * 2 - 1


@pytest.fixture(scope="module")
def sd_loop(photos: Path, sd: Path) -> Loop:
    return Loop(photos, sd, UNet2DConditionModel.from_pretrained(sd / "unet"))


def sd_call(loop: Loop, sd: Path) -> object:
    from transformers import CLIPTextModel, CLIPTokenizer

    tokens = CLIPTokenizer.from_pretrained(sd / "tokenizer")(
        "", padding="max_length", return_tensors="pt"
    )
    with torch.no_grad():
        text = CLIPTextModel.from_pretrained(sd / "text_encoder").eval()(tokens.input_ids)
    hidden = text.last_hidden_state.expand(4, -1, -1)
    return lambda x, t: loop.network(x, t, encoder_hidden_states=hidden)


def test_sites_and_reductions_of_a_unet(
    photos: Path, sd: Path, sd_loop: Loop, tmp_path: Path
) -> None:
    """Hyperfeatures' conv2, JDM's pooled skips, a cross-attention map, a mean over timesteps, the
    clean latents and an encoder block: one store, one pass."""
    block = "up_blocks.1.attentions.0.transformer_blocks.0.attn2"
    taps = [
        "up_blocks.*.resnets.0@pre_residual",
        {"path": "up_blocks.0.resnets.1@skip", "reduce": "mean"},
        {"path": f"{block}@attn.probs", "name": "words", "reduce": ["head_mean", "channels(0:3)"]},
        {"path": "mid_block", "name": "over_time", "reduce": ["avg_pool(2)", "time_mean", "l2"]},
        "latent",
        "vae.enc[0]",
        "x0",
    ]
    store = extract(pipeline(photos, sd, tmp_path / "s", taps=taps)).store
    assert store.verify(deep=True) == []
    conv2 = ("up_blocks.0.resnets.0.conv2", "up_blocks.1.resnets.0.conv2")
    call = sd_call(sd_loop, sd)
    want = sd_loop.run(call, *conv2, "mid_block", f"{block}.to_q", f"{block}.to_k")
    for name in conv2:
        got = whole(store, name.replace(".conv2", "-pre_residual"))
        np.testing.assert_array_equal(got, want[name], name)
    inputs = sd_loop.run(call, "up_blocks.0.resnets.1", inputs=True)["up_blocks.0.resnets.1"]
    skip = inputs[:, :, 32:].mean((3, 4))
    np.testing.assert_array_equal(whole(store, "up_blocks.0.resnets.1-skip"), skip)

    attention = sd_loop.network.get_submodule(block)
    q, k = (
        want[f"{block}.{name}"].unflatten(-1, (attention.heads, -1)).transpose(2, 3)
        for name in ("to_q", "to_k")
    )
    probs = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1).mean(2)[..., :3]
    maps = probs.transpose(2, 3).unflatten(3, (8, 8))
    assert store.array("words").dims == ("channel", "height", "width")
    np.testing.assert_allclose(whole(store, "words"), maps, atol=1e-6)

    pooled = torch.nn.functional.adaptive_avg_pool2d(want["mid_block"].flatten(0, 1), 2)
    mean = pooled.unflatten(0, (2, N_SAMPLES)).sum(0, keepdim=True) / 2
    over_time = torch.nn.functional.normalize(mean, dim=2)
    np.testing.assert_array_equal(whole(store, "over_time"), over_time)
    assert whole(store, "latent").shape == (1, N_SAMPLES, 4, 8, 8)
    with torch.no_grad():
        posterior = sd_loop.vae.encode(sd_loop.images[:4]).latent_dist
        z = posterior.mean + posterior.std * sd_loop.noise("posterior", sd_loop.keys[:4])
        first = sd_loop.vae.encoder.down_blocks[0](sd_loop.vae.encoder.conv_in(sd_loop.images[:4]))
    factor = sd_loop.vae.config.scaling_factor
    np.testing.assert_array_equal(whole(store, "latent")[0, :4], z * factor)
    np.testing.assert_array_equal(whole(store, "vae.encoder.down_blocks.0")[0, :4], first)
    # at t = 0 there is little noise, and x0 says where the network thinks the latents are
    assert whole(store, "x0").shape == (2, N_SAMPLES, 4, 8, 8)
    assert store.array("x0").tap == "x0"


def test_members_are_averaged_before_a_norm(photos: Path, dit: Path, tmp_path: Path) -> None:
    """DiTF: raw features are averaged over the ensemble, then LayerNorm and the block's AdaLN."""
    path = "transformer_blocks.1"
    taps = [{"path": f"{path}@in", "name": "ditf", "reduce": ["zero_channels(3)", "adaln"]}]
    noise = {"members": 2}
    store = extract(pipeline(photos, dit, tmp_path / "s", taps=taps, noise=noise)).store
    network = DiTTransformer2DModel.from_pretrained(dit / "transformer")
    loop = Loop(photos, dit, network)
    network = loop.network
    label = torch.full((4,), 10)
    for t, time in enumerate(TIMES):
        steps = torch.full((4,), time)
        raw = torch.zeros(4, 16, 32)
        for member in (0, 1):
            kept: list[Tensor] = []
            handle = network.transformer_blocks[1].register_forward_pre_hook(
                lambda m, args, kept=kept: kept.append(args[0])
            )
            with torch.no_grad():
                posterior = loop.vae.encode(loop.images[:4]).latent_dist
                eps = loop.noise("posterior", loop.keys[:4], member)
                x = (posterior.mean + posterior.std * eps) * loop.vae.config.scaling_factor
                noisy = loop.scheduler.add_noise(
                    x, loop.noise("noise", loop.keys[:4], member), steps
                )
                network(noisy, timestep=steps, class_labels=label)
            handle.remove()
            raw += kept[0] / 2
        raw[..., 3] = 0
        norm = network.transformer_blocks[1].norm1
        with torch.no_grad():
            emb = norm.emb(steps, label, hidden_dtype=torch.float32)
            shift, scale, *_ = norm.linear(norm.silu(emb)).chunk(6, dim=1)
            normed = torch.nn.functional.layer_norm(raw, (32,), eps=1e-6)
        want = (normed * (1 + scale[:, None]) + shift[:, None]).transpose(1, 2).unflatten(2, (4, 4))
        np.testing.assert_allclose(whole(store, "ditf")[t, :4], want, atol=2e-5)


def test_principal_components_are_fitted_once_and_kept(
    photos: Path, sd: Path, sd_loop: Loop, tmp_path: Path
) -> None:
    taps = [{"path": "mid_block", "reduce": ["pca(3, 12)"]}, "up_blocks.0"]
    store = extract(pipeline(photos, sd, tmp_path / "s", taps=taps)).store
    assert store.verify(deep=True) == []
    assert store.array("mid_block").shape == (3, 4, 4)
    raw = sd_loop.run(sd_call(sd_loop, sd), "mid_block")["mid_block"].double().numpy()
    got = whole(store, "mid_block")
    for t in range(2):
        vectors = np.moveaxis(raw[t], 1, -1).reshape(-1, raw.shape[2])
        centred = vectors - vectors.mean(0)
        _, singular, rows = np.linalg.svd(centred, full_matrices=False)
        for i in range(3):
            row = rows[i] * np.sign(rows[i][np.abs(rows[i]).argmax()])
            want = (centred @ row).reshape(N_SAMPLES, 4, 4)
            np.testing.assert_allclose(got[t, :, i], want, atol=2e-4 * singular[0])
    fit = safetensors.numpy.load(bytes(store.folder.get("fits/mid_block.safetensors")))
    assert set(fit) == {
        f"{what}.{t}"
        for what in ("mean", "components", "variances", "total_variance")
        for t in (0, 1)
    }
    receipts = store.receipts()
    assert len({receipt.counts.fits["mid_block"] for receipt in receipts.values()}) == 1
    again = extract(pipeline(photos, sd, tmp_path / "other", taps=taps)).store
    np.testing.assert_array_equal(whole(again, "mid_block"), got)
    assert {k: r.content() for k, r in again.receipts().items()} == {
        k: r.content() for k, r in receipts.items()
    }
    # A unit computed anew is reduced by the same fit; another fit is noticed.
    path = Path(store.url) / "fits" / "mid_block.safetensors"
    data = path.read_bytes()
    path.write_bytes(safetensors.numpy.save({**fit, "mean.0": fit["mean.0"] + 1}))
    assert {p.what for p in store.verify(deep=True)} == {"not the fit that the unit was reduced by"}
    path.write_bytes(b"nothing")
    (Path(store.url) / "receipts" / "00000000.json").unlink()
    with pytest.raises(StoreError, match="not the one, though unit 1 was reduced by it"):
        extract(pipeline(photos, sd, tmp_path / "s", taps=taps))
    path.unlink()
    assert any(p.what.startswith("missing, though") for p in store.verify())
    path.write_bytes(data)
    assert extract(pipeline(photos, sd, tmp_path / "s", taps=taps)).n_pending == 1
    assert store.verify(deep=True) == []


def test_each_fit_sees_as_many_samples_as_it_asks_for(
    photos: Path, sd: Path, sd_loop: Loop, tmp_path: Path
) -> None:
    """In whole batches: 4 samples are the first batch, 12 are all of them."""
    taps = [
        {"path": "mid_block", "name": "few", "reduce": ["mean", "pca(2, 4)"]},
        {"path": "mid_block", "name": "all", "reduce": ["mean", "time_mean", "pca(2, 12)"]},
    ]
    store = extract(pipeline(photos, sd, tmp_path / "s", taps=taps)).store
    raw = sd_loop.run(sd_call(sd_loop, sd), "mid_block")["mid_block"].mean((3, 4)).numpy()
    fits = {
        name: safetensors.numpy.load(bytes(store.folder.get(f"fits/{name}.safetensors")))
        for name in ("few", "all")
    }
    for t in (0, 1):
        np.testing.assert_allclose(fits["few"][f"mean.{t}"], raw[t, :4].mean(0), atol=1e-5)
    np.testing.assert_allclose(fits["all"]["mean.0"], raw.mean((0, 1)), atol=1e-5)
    assert "mean.1" not in fits["all"]
    fit = fits["all"]
    want = (raw.mean(0) - fit["mean.0"]) @ fit["components.0"].T
    np.testing.assert_allclose(whole(store, "all")[0], want, atol=1e-5)


def test_too_few_vectors_to_fit_are_refused(photos: Path, sd: Path, tmp_path: Path) -> None:
    taps = [{"path": "mid_block", "reduce": ["mean", "pca(20, 4)"]}]
    with pytest.raises(FeatureError, match="4 vectors to fit 20 principal components"):
        extract(pipeline(photos, sd, tmp_path / "s", taps=taps))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float8_e4m3fn", "float8_e5m2"])
def test_storage_types_end_to_end(photos: Path, sd: Path, tmp_path: Path, dtype: str) -> None:
    taps = ["mid_block", {"path": "up_blocks.0", "name": "vector", "reduce": "mean"}]
    exact = extract(pipeline(photos, sd, tmp_path / "exact", taps=taps)).store
    features = {"dtype": dtype, "batch_size": 4, "rows_per_unit": 8}
    store = extract(pipeline(photos, sd, tmp_path / "s", taps=taps, features=features)).store
    assert store.verify(deep=True) == []
    assert [array.name for array in store.features] == ["mid_block", "vector"]
    batch = FeatureDataset(store).read(range(N_SAMPLES))
    limit = {"int8": 0.015, "uint8": 0.01, "float8_e4m3fn": 0.06, "float8_e5m2": 0.12}[dtype]
    for name, values in batch.features.items():
        want = whole(exact, name).swapaxes(0, 1)
        got = values.float().numpy()
        assert got.shape == want.shape
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert 0 < error < limit
    streamed = {
        int(row): {name: x[i] for name, x in b.features.items()}
        for b in FeatureStream(store, batch_size=5)
        for i, row in enumerate(b.row)
    }
    assert sorted(streamed) == list(range(N_SAMPLES))
    for row in (0, 7, 11):
        for name, values in batch.features.items():
            assert torch.equal(streamed[row][name].float(), values[row].float())
    first, second = store.receipts()[0], store.receipts()[1]
    assert second.run.damage == {}
    assert "damage" not in str(first.content())
    for name in ("mid_block", "vector"):
        found = first.run.damage[name]
        want = whole(exact, name)[:, :4].reshape(8, -1).astype(np.float64)
        got = batch.features[name][:4].float().numpy().swapaxes(0, 1).reshape(8, -1)
        assert found.relative_rmse == pytest.approx(
            np.linalg.norm(got - want) / np.linalg.norm(want), rel=1e-5
        )
        cosine = (got * want).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(want, axis=1)
        assert found.cosine == pytest.approx(cosine.mean(), abs=1e-6)


def test_float32_is_not_damaged(photos: Path, sd: Path, tmp_path: Path) -> None:
    store = extract(pipeline(photos, sd, tmp_path / "s", taps=["mid_block"])).store
    found = store.receipts()[0].run.damage["mid_block"]
    assert found.relative_rmse == 0
    assert found.cosine == pytest.approx(1, abs=1e-6)


def test_a_quantised_arrays_name_with_a_sibling_that_exists(
    photos: Path, sd: Path, tmp_path: Path
) -> None:
    taps = [{"path": "mid_block", "name": "a"}, {"path": "up_blocks.0", "name": "a__scale"}]
    features = {"dtype": "int8", "batch_size": 4, "rows_per_unit": 8}
    with pytest.raises(SpecError, match=r"arrays named twice: \['a__scale'\]"):
        extract(pipeline(photos, sd, tmp_path / "s", taps=taps, features=features))


def test_sites_are_frozen_in_the_store(photos: Path, sd: Path, tmp_path: Path) -> None:
    """Invariant 10: what a site stands for is recorded; a model without it is refused."""
    taps = ["up_blocks.**@pre_residual"]
    chosen = pipeline(photos, sd, tmp_path / "s", taps=taps)
    store = extract(chosen, limit=8).store
    assert [array.tap for array in store.arrays] == [
        f"up_blocks.{i}.resnets.{j}.conv2@out" for i in (0, 1) for j in (0, 1)
    ]

    def of_first_resnets(modules: Modules, module: str, parts: tuple[str, ...]) -> Place | None:
        return Place(module, "out", parts) if module.endswith("resnets.0") else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tap_sites._EXPANSIONS, "pre_residual", of_first_resnets)
        message = r"store: .*resnets\.1\.conv2@out.*\n +now: +up_blocks\.0\.resnets\.0@out"
        with pytest.raises(TapError, match=message):
            extract(chosen)
