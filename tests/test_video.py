"""Windows of videos: decoding, the axis `frame`, and the adapters of Wan and CogVideoX."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import T5Tokenizer, UMT5EncoderModel

from drl_data.backbones import Backbone, find_model, load_backbone
from drl_data.backbones.backbone import CLEAN, Posterior
from drl_data.capture import Streams, capture
from drl_data.decode import decode_image, decode_views
from drl_data.diffusion_spec import ConditionSpec, NoiseSpec, ScheduleSpec
from drl_data.distill_spec import StudentSpec
from drl_data.errors import ImageError, SpecError, TapError, WeightsError
from drl_data.images import ImageBatch, read_batches
from drl_data.index import build_index
from drl_data.linear_probes import _flat_pixels
from drl_data.noise import batch_noise
from drl_data.pipeline import Pipeline
from drl_data.plan import Unit
from drl_data.pooling import pooled
from drl_data.reduce import VIDEO, reduce
from drl_data.regressors import grid_of
from drl_data.rehearse import rehearsal
from drl_data.runs import extract
from drl_data.schedule import mask_patches
from drl_data.spec import (
    ArraySpec,
    BackboneSpec,
    CropViews,
    DatasetSpec,
    ImageSpec,
    ResolvedTime,
    TapSpec,
)
from drl_data.student import Student
from drl_data.tap_reducer import TapReducer
from drl_data.taps import ResolvedTap, resolve
from drl_data.testing import write_photo_tars
from drl_data.tiny_models import save_tiny
from tests.references import hooked

FAMILIES = ("wan", "cogvideox")
IMAGES = ImageSpec(size=(32, 48), frames=9)
CAT = ConditionSpec(prompt="a cat")

# --- pixels -------------------------------------------------------------------------------------


def pictures(n: int, size: tuple[int, int] = (12, 10)) -> list[Image.Image]:
    """Frames of noise, width x height."""
    generator = np.random.default_rng(0)
    shape = (n, size[1], size[0], 3)
    return [Image.fromarray(x) for x in generator.integers(0, 256, shape, dtype=np.uint8)]


def encoded(frames: list[Image.Image], format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    frames[0].save(buffer, format, save_all=True, append_images=frames[1:], **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("format", "options"), [("TIFF", {}), ("PNG", {}), ("WEBP", {"lossless": True})]
)
def test_frames_come_in_order_and_the_first_ones(format: str, options: dict[str, object]) -> None:
    frames = pictures(5)
    data = encoded(frames, format, **options)
    got = decode_image(data, ImageSpec(size=(10, 12), frames=4))
    assert got.shape == (3, 4, 10, 12)
    assert got.flags.c_contiguous
    for i in range(4):
        assert np.array_equal(got[:, i].transpose(1, 2, 0), np.asarray(frames[i]))
    one = decode_image(data, ImageSpec(size=(10, 12)))
    assert np.array_equal(one, got[:, 0])


def test_a_gif_is_what_pillow_says() -> None:
    data = encoded(pictures(3), "GIF")
    got = decode_image(data, ImageSpec(size=(10, 12), frames=3))
    with Image.open(io.BytesIO(data)) as image:
        for i in range(3):
            image.seek(i)
            assert np.array_equal(got[:, i].transpose(1, 2, 0), np.asarray(image.convert("RGB")))


def test_every_frame_is_resized_and_cropped_alike() -> None:
    frames = pictures(3, (40, 30))
    spec = ImageSpec(size=16, frames=3)
    got = decode_image(encoded(frames, "TIFF"), spec)
    for i, frame in enumerate(frames):
        buffer = io.BytesIO()
        frame.save(buffer, "PNG")
        assert np.array_equal(got[:, i], decode_image(buffer.getvalue(), ImageSpec(size=16)))


def test_views_are_of_all_frames_alike() -> None:
    one = pictures(1, (40, 30))[0]
    spec = ImageSpec(size=16, frames=2, views=("id", "hflip", CropViews(n=2)))
    got = decode_views(encoded([one, one], "TIFF"), spec, "key")
    assert got.shape == (4, 3, 2, 16, 16)
    assert np.array_equal(got[:, :, 0], got[:, :, 1])
    assert np.array_equal(got[1], got[0][..., ::-1])


@pytest.mark.parametrize("n", [1, 3])
def test_too_few_frames_are_an_image_error(n: int) -> None:
    with pytest.raises(ImageError, match=rf"{n} frames, want 4 or more \(images.frames\)"):
        decode_image(encoded(pictures(n), "TIFF"), ImageSpec(size=8, frames=4))


def test_a_later_frame_may_be_the_bomb() -> None:
    frames = [pictures(1, (8, 8))[0], pictures(1, (64, 64))[0]]
    data = encoded(frames, "TIFF")
    with pytest.raises(ImageError, match="64 x 64 = 4096 pixels, want at most 100"):
        decode_image(data, ImageSpec(size=8, frames=2, max_pixels=100))


def test_a_window_is_a_row_and_a_short_one_is_invalid(tmp_path: Path) -> None:
    write_photo_tars(tmp_path, n_samples=2, n_tars=1, frames=3)
    index = build_index(DatasetSpec(tars=f"{tmp_path}/*.tar"))

    def batch(spec: ImageSpec, *, views: bool = False) -> ImageBatch:
        (found,) = read_batches(
            Unit(0, 0, 2), index, spec, batch_size=4, n_threads=1, prefetch_bytes=1 << 20,
            views=views,
        )  # fmt: skip
        return found

    whole = batch(ImageSpec(size=20, frames=3))
    assert whole.pixels.shape == (4, 3, 3, 20, 20)
    assert whole.of_view(0) is whole.pixels
    assert not whole.pixels[2:].any()
    assert whole.pixels[:2].any()
    assert not whole.invalid
    viewed = batch(ImageSpec(size=20, frames=3, views=("hflip", "id")), views=True)
    assert np.array_equal(viewed.of_view(1), whole.pixels)
    assert np.array_equal(viewed.of_view(0), whole.pixels[..., ::-1])
    short = batch(ImageSpec(size=20, frames=4))
    assert [row.row for row in short.invalid] == [0, 1]
    assert {row.reason for row in short.invalid} == {"3 frames, want 4 or more (images.frames)"}
    assert not short.pixels.any()


def test_frames_alone_need_frames() -> None:
    assert ImageSpec(size=(4, 6), frames=9).shape == (3, 9, 4, 6)
    assert ImageSpec(size=(4, 6)).shape == (3, 4, 6)
    with pytest.raises(ValidationError, match="frame_latents has a meaning with frames above 1"):
        ImageSpec(size=4, frame_latents="each")


# --- the axis `frame` ---------------------------------------------------------------------------


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_reductions_of_videos() -> None:
    x = randn(2, 5, 3, 4, 6)
    assert_reduced(x, "mean", x.mean((2, 3, 4)), ("channel",))
    assert_reduced(x, "max", x.amax((2, 3, 4)), ("channel",))
    assert_reduced(x, "frame_mean", x.mean(2), ("channel", "height", "width"))
    assert_reduced(x, "frames(2,0)", x[:, :, [2, 0]], VIDEO)
    assert_reduced(x, "channels(1:3)", x[:, 1:3], VIDEO)
    pooled = torch.stack([F.adaptive_avg_pool2d(x[:, :, i], (2, 3)) for i in range(3)], dim=2)
    assert_reduced(x, "avg_pool(2x3)", pooled, VIDEO)
    assert_reduced(x, "layer_norm", F.layer_norm(x.movedim(1, -1), (5,), eps=1e-6).movedim(-1, 1))
    std, mean = torch.std_mean(x, (2, 3, 4), keepdim=True)
    assert_reduced(x, "spatial_norm", (x - mean) / (std + 1e-6))
    assert reduce(x, VIDEO, ["project(7)", "mean"])[0].shape == (2, 7)
    with pytest.raises(SpecError, match="want an axis 'frame'"):
        reduce(x[:, :, 0], ("channel", "height", "width"), ["frame_mean"])


def assert_reduced(x: Tensor, text: str, want: Tensor, dims: tuple[str, ...] = VIDEO) -> None:
    got, names = reduce(x, VIDEO, [text])
    assert names == dims
    assert torch.allclose(got, want, atol=1e-6)


def test_noise_of_videos() -> None:
    shape = (2, 3, 4, 6)
    mask = batch_noise(NoiseSpec(kind="patch_mask", patch=2), ["a"], shape)
    assert mask is not None
    assert mask.shape == (1, 1, 3, 2, 3)
    time = ResolvedTime(requested=500, convention="x", model_time=0, alpha=0.5, sigma=0.5)
    masked = mask_patches(torch.ones(1, *shape), mask, time)
    assert masked.mean() == 0.5
    assert not torch.equal(masked[:, :, 0], masked[:, :, 1])
    shared = batch_noise(NoiseSpec(kind="shared", shared_base=8), ["a"], (2, 3, 16, 16))
    assert shared is not None
    base = batch_noise(NoiseSpec(kind="shared"), ["a"], (2, 3, 8, 8))
    assert base is not None
    for i in range(3):
        want = F.interpolate(base[:, :, i], (16, 16), mode="bicubic", align_corners=False)
        assert torch.equal(shared[:, :, i], want)


def test_probes_average_frames() -> None:
    x = randn(2, 1, 5, 3, 4, 6)
    assert torch.allclose(pooled(x, VIDEO, 1), x.mean((3, 4, 5)), atol=1e-6)
    assert pooled(x, VIDEO, 2).shape == (2, 1, 20)
    pixels = torch.randint(0, 256, (2, 3, 4, 8, 8), dtype=torch.uint8)
    flat = _flat_pixels(pixels)
    assert torch.allclose(flat, pixels.float().mean(2).flatten(1)[:, None] / 255)


def test_students_take_images() -> None:
    array = ArraySpec(name="x", tap="x", dims=VIDEO, shape=(16, 1, 4, 4), dtype="float32")
    with pytest.raises(SpecError, match=r"'x' has frames; average them .*frame_mean"):
        grid_of(array)
    with pytest.raises(SpecError, match=r"images.frames 9: students take images, not videos"):
        Student(StudentSpec(), IMAGES, 0)


# --- the adapters -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("video")
    return {family: save_tiny(family, folder / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def backbones(models: dict[str, Path]) -> dict[str, Backbone]:
    return {family: load(path) for family, path in models.items()}


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """References must be exact."""


def load(path: Path, device: str = "cpu", **settings: object) -> Backbone:
    return load_backbone(find_model(BackboneSpec(model=str(path), **settings)), device)


def with_config(path: Path, to: Path, component: str, **changes: object) -> Path:
    """A copy of a model folder with another configuration."""
    copy = Path(shutil.copytree(path, to))
    file = copy / component / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return copy


BLOCKS = {"wan": "blocks", "cogvideox": "transformer_blocks"}
TAPS = {
    "wan": (
        "patch_embedding",
        "condition_embedder.text_embedder",
        "blocks.0",
        "blocks.0@in",
        "blocks.0.attn1@attn.q",
        "blocks.0.attn1@attn.query",
        "blocks.0.attn2@attn.key",
        "blocks.0.attn2@attn.out",
        "blocks.0@ff.in",
        "latent.noisy",
    ),
    "cogvideox": (
        "patch_embed",
        "patch_embed.text_proj",
        "transformer_blocks.0",
        "transformer_blocks.0@in",
        "transformer_blocks.0@out.text",
        "transformer_blocks.0.norm1",
        "transformer_blocks.0.attn1@attn.q",
        "transformer_blocks.0.attn1@attn.query",
        "transformer_blocks.0.attn1@attn.key.text",
        "transformer_blocks.0.attn1@attn.out",
        "transformer_blocks.0@ff.in",
        "latent.noisy",
    ),
}


def tapped(
    backbone: Backbone, taps: tuple[str, ...], x: Tensor, *, stop_early: bool = True
) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
    axes: dict[str, tuple[str, ...]] = {}

    def keep(tap: ResolvedTap, tensor: Tensor, dims: tuple[str, ...]) -> Tensor:
        axes[tap.name] = dims
        return tensor.clone()

    time = CLEAN.model_copy(update={"model_time": 300})
    resolved = backbone.resolve([TapSpec(path=path) for path in taps])
    with torch.no_grad():
        told = backbone.conditioning(CAT)
        got = backbone.tap(x, time, told, resolved, keep, stop_early=stop_early)
    return {name: (tensor, axes[name]) for name, tensor in got.items()}


def inputs(backbone: Backbone, images: ImageSpec = IMAGES) -> Tensor:
    return randn(2, *backbone.input_shape(images), seed=1).to(backbone.dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_on_meta_are_the_real_ones_and_the_cut_changes_nothing(
    models: dict[str, Path], backbones: dict[str, Backbone], family: str
) -> None:
    backbone, meta = backbones[family], load(models[family], "meta")
    x = inputs(backbone)
    real = tapped(backbone, TAPS[family], x)
    whole = tapped(backbone, TAPS[family], x, stop_early=False)
    assert all(torch.equal(real[name][0], whole[name][0]) for name in real)
    taps = meta.resolve([TapSpec(path=path) for path in TAPS[family]])
    arrays = meta.arrays(taps, IMAGES, ConditionSpec(), CLEAN, "float32")
    want = {name: (tuple(tensor.shape[1:]), dims) for name, (tensor, dims) in real.items()}
    assert {array.name: (array.shape, array.dims) for array in arrays} == want
    for name, (shape, dims) in want.items():
        is_text = "text" in name or "attn2-attn.key" in name
        assert dims == (("token", "channel") if is_text else VIDEO), name
        assert is_text or shape[1] == 3, name
    assert len(meta.modules(IMAGES, ConditionSpec())) > 20
    assert meta.flops(taps, IMAGES, ConditionSpec()).saving > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_frame_after_frame(backbones: dict[str, Backbone], family: str) -> None:
    """Each token of the patches depends on its own place alone."""
    backbone = backbones[family]
    embedding = {"wan": "patch_embedding", "cogvideox": "patch_embed"}[family]
    x = inputs(backbone)
    other = x.clone()
    other[:, :, 1, 2:4, 4:6] += 1
    one, two = (tapped(backbone, (embedding,), given)[embedding][0] for given in (x, other))
    changed = (one != two).any(1).nonzero()[:, 1:].unique(dim=0)
    assert changed.tolist() == [[1, 1, 2]]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_is_a_window_of_one(backbones: dict[str, Backbone], family: str) -> None:
    backbone = backbones[family]
    image = ImageSpec(size=(32, 48))
    assert backbone.input_shape(image)[1:] == (1, 4, 6)
    pixels = randn(2, 3, 32, 48)
    with torch.no_grad():
        assert backbone.encode(pixels).mean.shape[2:] == (1, 4, 6)
    (found,) = tapped(backbone, (f"{BLOCKS[family]}.0",), inputs(backbone, image)).values()
    assert found[0].shape[2:] == (1, 2, 3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_precision_runs(models: dict[str, Path], family: str, dtype: str) -> None:
    backbone = load(models[family], dtype=dtype)
    assert str(backbone.dtype) == f"torch.{dtype}"
    with torch.no_grad():
        posterior = backbone.encode(randn(1, 3, 9, 32, 48).to(backbone.dtype))
    assert posterior.mean.dtype == backbone.dtype
    for name, (x, _) in tapped(backbone, TAPS[family], inputs(backbone)).items():
        assert torch.isfinite(x).all(), name


def taken(backbone: Backbone, x: Tensor, taps: dict[str, str]) -> dict[str, Tensor]:
    """{name: tensor as it is stored} of {name: path}."""
    got: dict[str, Tensor] = {}
    specs = [TapSpec(path=path, name=name) for name, path in taps.items()]
    with torch.no_grad():
        told = backbone.conditioning(ConditionSpec())
        backbone.tap(
            x,
            CLEAN,
            told,
            backbone.resolve(specs),
            lambda tap, tensor, _: got.setdefault(tap.name, tensor.clone()),
        )
    return got


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_and_keys_are_what_the_attention_multiplies(
    backbones: dict[str, Backbone], family: str
) -> None:
    """Their product is that of the probabilities; Wan turns them, CogVideoX normalises heads."""
    backbone = backbones[family]
    attention = f"{BLOCKS[family]}.0.attn1"
    names = ("query", "key", "probs")
    taps = {name: f"{attention}@attn.{name}.heads[1]" for name in names}
    if family == "cogvideox":
        taps["text"] = f"{attention}@attn.key.text.heads[1]"
    got = taken(backbone, inputs(backbone), taps)
    queries, keys = (got[name].flatten(2).transpose(1, 2) for name in ("query", "key"))
    if "text" in got:
        keys = torch.cat([got["text"], keys], dim=1)
    scores = queries @ keys.transpose(1, 2) / queries.shape[-1] ** 0.5
    probabilities = got["probs"].flatten(3)[:, 0].transpose(1, 2)  # [b, query, key]
    assert torch.allclose(scores.softmax(-1), probabilities, atol=1e-6)
    both = taken(backbone, inputs(backbone), {"query": f"{attention}@attn.query"})["query"]
    assert torch.equal(both.chunk(2, dim=1)[1], got["query"])


def test_queries_of_an_attention_without_norms_are_its_projections(tmp_path: Path) -> None:
    backbone = load(save_tiny("dit", tmp_path / "dit"))
    block = "transformer_blocks.0.attn1"
    names = ("q", "query", "k", "key")
    got = taken(backbone, randn(2, 4, 8, 8), {name: f"{block}@attn.{name}" for name in names})
    q, query, k, key = (got[name] for name in names)
    assert torch.equal(q, query)
    assert torch.equal(k, key)
    with pytest.raises(TapError, match=r"has the site attn\.query"):
        resolve(backbone.network, [TapSpec(path="pos_embed@attn.query")])


def test_blocks_of_cogvideox_give_the_image_first() -> None:
    """With as many tokens of text as of the image only the order tells which is which."""

    class CogVideoXBlock(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, -x

    model = nn.ModuleDict({"block": CogVideoXBlock()})
    taps = resolve(model, [TapSpec(path="block"), TapSpec(path="block@out.text")])
    x = randn(1, 4, 2)
    got = capture(
        model, taps, lambda: model["block"](x), lambda _, tensor: tensor, streams=Streams(4, 4)
    )
    assert torch.equal(got["block"], x)
    assert torch.equal(got["block-text"], -x)


@torch.no_grad()
def test_wan_is_told_what_its_pipeline_tells(
    models: dict[str, Path], backbones: dict[str, Backbone]
) -> None:
    pipeline = WanPipeline(
        T5Tokenizer.from_pretrained(models["wan"] / "tokenizer"),
        UMT5EncoderModel.from_pretrained(models["wan"] / "text_encoder"),
        AutoencoderKLWan.from_pretrained(models["wan"] / "vae"),
        UniPCMultistepScheduler.from_pretrained(models["wan"] / "scheduler"),
    )
    text = "  a &amp;amp;  cat\n"
    for n_tokens in (512, 226):
        spec = ConditionSpec(prompt=text, t5_tokens=None if n_tokens == 512 else n_tokens)
        got = backbones["wan"].conditioning(spec).kwargs["encoder_hidden_states"]
        want, _ = pipeline.encode_prompt(
            text, do_classifier_free_guidance=False, max_sequence_length=n_tokens, device="cpu"
        )
        assert torch.equal(got, want)
        meta = load(models["wan"], "meta").conditioning(spec).kwargs["encoder_hidden_states"]
        assert meta.shape == got.shape


@torch.no_grad()
def test_cogvideox_with_rotary_positions_is_called_as_its_pipeline_calls(
    models: dict[str, Path], tmp_path: Path
) -> None:
    path = save_tiny("cogvideox", tmp_path / "5b", use_rotary_positional_embeddings=True)
    backbone = load(path)
    network = CogVideoXTransformer3DModel.from_pretrained(path / "transformer").eval()
    pipeline = CogVideoXPipeline(None, None, None, network, CogVideoXDDIMScheduler())
    pipeline.vae_scale_factor_spatial = 8
    for size in ((32, 48), (48, 48)):
        x = inputs(backbone, ImageSpec(size=size, frames=9))
        rotary = pipeline._prepare_rotary_positional_embeddings(*size, x.shape[2], "cpu")
        told = backbone.conditioning(CAT).expand(2)
        t = torch.tensor([300, 300])
        kept = hooked(network, "transformer_blocks.1")
        network(x.transpose(1, 2), timestep=t, image_rotary_emb=rotary, **told)
        image = kept["transformer_blocks.1"][0]
        (got,) = tapped(backbone, ("transformer_blocks.1",), x).values()
        assert torch.equal(got[0].flatten(2).transpose(1, 2), image)


@torch.no_grad()
def test_outputs_are_read_as_velocities(backbones: dict[str, Backbone]) -> None:
    """x0, eps and v of the network's output are latents with frames."""
    for family, backbone in backbones.items():
        x = inputs(backbone)
        got = tapped(backbone, ("v", "x0"), x)
        assert {dims for _, dims in got.values()} == {VIDEO}, family
        assert got["v"][0].shape == x.shape
    wan = WanTransformer3DModel.from_pretrained
    network = wan(backbones["wan"].network.config._name_or_path).eval()
    x = inputs(backbones["wan"])
    told = backbones["wan"].conditioning(CAT).expand(2)
    (want,) = network(x, timestep=torch.tensor([300, 300]), **told, return_dict=False)
    assert torch.equal(tapped(backbones["wan"], ("v",), x)["v"][0], want)


def test_schedules_are_the_models_own(models: dict[str, Path]) -> None:
    scheduler = CogVideoXDDIMScheduler.from_pretrained(models["cogvideox"] / "scheduler")
    backbone = load(models["cogvideox"], "meta")
    spec = ScheduleSpec(timesteps=(0, 250, 999))
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    for time in backbone.schedule.resolve(spec):
        t = torch.tensor([int(time.requested)])
        assert time.alpha == float(scheduler.add_noise(one, zero, t))
        assert time.sigma == float(scheduler.add_noise(zero, one, t))
    (there,) = backbone.schedule.resolve(ScheduleSpec(convention="sigma", timesteps=1.0))
    assert 0 < there.model_time < 999  # the table ends in an infinite level
    wan = UniPCMultistepScheduler.from_pretrained(models["wan"] / "scheduler")
    wan.set_timesteps(1000)
    spec = ScheduleSpec(convention="descending_index", timesteps=749)
    (time,) = load(models["wan"], "meta").schedule.resolve(spec)
    assert (time.model_time, time.sigma) == (502, float(wan.sigmas[749]))


def test_latents_are_scaled_by_what_the_vae_has(
    models: dict[str, Path], backbones: dict[str, Backbone], tmp_path: Path
) -> None:
    pixels = randn(1, 3, 9, 32, 48)
    with torch.no_grad():
        posterior = backbones["wan"].encode(pixels)
        assert posterior.channel_mean is not None
        assert posterior.channel_std is not None
        want = (posterior.mean - posterior.channel_mean) * (1.0 / posterior.channel_std)
        for scale in (True, "per_channel"):  # there is no other one
            assert torch.equal(posterior.latents(None, scale=scale), want)
        assert torch.equal(posterior.latents(None, scale=False), posterior.mean)
        path = with_config(models["cogvideox"], tmp_path / "x", "vae", invert_scale_latents=True)
        factor = backbones["cogvideox"].vae.config.scaling_factor  # type: ignore[union-attr]
        assert load(path, "meta").encode(pixels.to("meta")).scaling_factor == 1 / factor


def untouched(_tap: ResolvedTap, x: Tensor, _dims: tuple[str, ...]) -> Tensor:
    return x


def test_frames_may_be_encoded_one_by_one(backbones: dict[str, Backbone]) -> None:
    for backbone in backbones.values():
        pixels = randn(2, 3, 3, 32, 48)
        with torch.no_grad():
            each = backbone.encode_and_tap(pixels, [], untouched, frame_latents="each")
            for i in range(3):
                want = backbone.encode(pixels[:, :, i])
                assert torch.allclose(each.mean[:, :, i], want.mean[:, :, 0], atol=1e-5)
        assert isinstance(each, Posterior)
        images = ImageSpec(size=(32, 48), frames=3, frame_latents="each")
        assert each.mean.shape[1:] == backbone.input_shape(images)


def test_moments_have_frames(backbones: dict[str, Backbone]) -> None:
    backbone = backbones["wan"]
    taps = backbone.resolve([TapSpec(path="latent.moments"), TapSpec(path="latent")])
    reducer = TapReducer(taps)
    reducer.start(0, 1)
    with torch.no_grad():
        posterior = backbone.encode_and_tap(randn(1, 3, 9, 32, 48), reducer.encoder, reducer.take)
        backbone.decode_and_tap(posterior.mean, reducer.decoder, reducer.take, scaled=False)
    found = reducer.finish()
    assert found["latent.moments"].shape == (1, 32, 3, 4, 6)
    assert reducer.dims == {"latent.moments": VIDEO, "latent": VIDEO}


def test_pixels_are_normalised_by_channel(tmp_path: Path) -> None:
    """The mean and std of the images act on the channels, not on frames or rows."""
    given = {"frames": 9, "size": [32, 48], "resize": "stretch"}
    plain = {**given, "range": [-1, 1]}
    same = {**given, "range": [0, 1], "mean": [0.5] * 3, "std": [0.5] * 3}
    other = {**same, "mean": [0.5, 0.5, 0.0]}
    first, second, third = (
        extract(
            rehearsal(
                pipeline("wan", "latent", images=images, features={"dtype": "float32"}),
                tmp_path / str(i),
                n_samples=1,
            )
        ).store.read_unit("latent", 0, Unit(0, 0, 1))
        for i, images in enumerate((plain, same, other))
    )
    assert np.allclose(first, second, atol=1e-4)
    assert not np.allclose(first, third, atol=1e-2)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_model_cannot_take_is_refused(
    models: dict[str, Path], backbones: dict[str, Backbone], family: str, tmp_path: Path
) -> None:
    backbone = backbones[family]
    with pytest.raises(SpecError, match=r"images.frames 8: .* multiples of 4; want 5, or"):
        backbone.input_shape(ImageSpec(size=32, frames=8))
    with pytest.raises(SpecError, match="multiples of 16"):
        backbone.input_shape(ImageSpec(size=24, frames=9))
    with pytest.raises(TapError, match="sees it piece by piece"):
        backbone.resolve([TapSpec(path="vae.encoder.conv_in")])
    with pytest.raises(SpecError, match="takes a prompt, not a class"):
        backbone.conditioning(ConditionSpec(class_label=1))
    wide = with_config(models[family], tmp_path / "i2v", "transformer", in_channels=36)
    with pytest.raises(WeightsError, match=r"36 channels into the transformer.*image-to-video"):
        load(wide, "meta")


def test_only_models_of_videos_take_them(tmp_path: Path) -> None:
    for family in ("ddpm", "stable_diffusion", "dit", "dinov2"):
        backbone = load(save_tiny(family, tmp_path / family), "meta")
        with pytest.raises(SpecError, match=r"frames 9: the model takes images, not videos"):
            backbone.input_shape(ImageSpec(size=16, frames=9))


def test_only_some_models_pad_freely(backbones: dict[str, Backbone], tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"condition\.t5_tokens: .* takes none"):
        backbones["cogvideox"].conditioning(ConditionSpec(t5_tokens=4))
    with pytest.raises(SpecError, match="DiT takes none"):
        load(save_tiny("dit", tmp_path / "dit"), "meta").conditioning(ConditionSpec(t5_tokens=4))
    with pytest.raises(ValidationError, match="no meaning with prompt_embeddings"):
        ConditionSpec(t5_tokens=4, prompt_embeddings="x.safetensors")


def test_cogvideox_1_5_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    path = with_config(models["cogvideox"], tmp_path / "1.5", "transformer", patch_size_t=2)
    with pytest.raises(WeightsError, match=r"CogVideoX 1\.5.* has no adapter"):
        load(path, "meta")


def pipeline(family: str, tap: str, **sections: object) -> Pipeline:
    content: dict[str, object] = {
        "name": "video",
        "dataset": {"tars": "none.tar"},
        "images": {"size": [32, 48], "resize": "stretch", "frames": 9},
        "backbone": {"model": "none/none"},
        "latents": {"posterior": "mean"},
        "schedule": {"convention": "descending_index", "timesteps": 749},
        "taps": [tap],
        "tiny": {"model": family},
        **sections,
    }
    return Pipeline.parse(content)


# --- the whole way ------------------------------------------------------------------------------


def test_a_store_of_videos_with_views(tmp_path: Path) -> None:
    images = {"size": [32, 48], "resize": "stretch", "frames": 9, "views": ["id", "hflip"]}
    spec = pipeline(
        "wan",
        "blocks.0",
        images=images,
        taps=["blocks.0", {"path": "blocks.0", "name": "pooled", "reduce": ["mean"]}],
        features={"dtype": "float32"},
    )
    summary = extract(rehearsal(spec, tmp_path, n_samples=2))
    assert summary.n_ok == 2
    store = summary.store
    assert store.array("blocks.0").dims == VIDEO
    ids, flips = (store.read_unit("blocks.0", 0, store.units[0], view) for view in (0, 1))
    assert ids.shape == (2, 24, 3, 2, 3)
    assert not np.array_equal(ids, flips)
    pooled = store.read_unit("pooled", 0, store.units[0])
    assert np.allclose(pooled, ids.mean((2, 3, 4)), atol=1e-5)


def test_a_window_that_is_too_short_is_a_row_of_its_store(tmp_path: Path) -> None:
    tiny = {"model": "wan", "images": {"frames": 5}}
    run = rehearsal(pipeline("wan", "blocks.0", tiny=tiny), tmp_path, n_samples=2)
    longer = run.model_copy(update={"images": run.images.model_copy(update={"frames": 9})})
    summary = extract(longer)
    assert (summary.n_ok, summary.n_invalid) == (0, 2)
