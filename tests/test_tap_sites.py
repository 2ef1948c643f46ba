"""Every site of every family against plain hooks and plain arithmetic on diffusers' own modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor, nn
from torch.nn import functional

from drl_data.backbones import Backbone, ModelFolder, load_backbone
from drl_data.capture import Streams, capture
from drl_data.diffusion_spec import ConditionSpec, ScheduleSpec
from drl_data.errors import TapError
from drl_data.spec import BackboneSpec, ImageSpec, TapSpec
from drl_data.tap_reducer import TapReducer
from drl_data.taps import resolve
from drl_data.tiny_models import save_tiny_ddpm, save_tiny_dit, save_tiny_stable_diffusion

Forward = Callable[[], object]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_weights(model: nn.Module) -> nn.Module:
    """Weights that make no block the identity and no bias zero."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15
    return model.eval().requires_grad_(False)


def take(
    model: nn.Module,
    forward: Forward,
    *paths: str,
    streams: Streams | None = None,
    reduce: str | None = None,
    stop_early: bool = True,
) -> dict[str, Tensor]:
    """{path: tensor}, the tensors as the taps took them."""
    reductions = (reduce,) if reduce else ()
    taps = resolve(
        model, [TapSpec(path=path, name=f"{i}", reduce=reductions) for i, path in enumerate(paths)]
    )
    with torch.no_grad():
        got = capture(
            model, taps, forward, lambda _, x: x.clone(), streams=streams, stop_early=stop_early
        )
    return {path: got[f"{i}"] for i, path in enumerate(paths)}


def hook(model: nn.Module, module: str, forward: Forward) -> tuple[list[object], object]:
    """[args and kwargs values], output of a module, by plain hooks."""
    seen: list[tuple[list[object], object]] = []

    def after(_: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        values = [x.clone() if isinstance(x, Tensor) else x for x in (*args, *kwargs.values())]
        seen.append((values, output))

    handle = model.get_submodule(module).register_forward_hook(after, with_kwargs=True)
    with torch.no_grad():
        forward()
    handle.remove()
    return seen[0]


# --- UNets ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    """Two levels, two resnets a level, self- and cross-attention of 3 heads at the finer one."""
    return random_weights(
        UNet2DConditionModel(
            sample_size=8,
            layers_per_block=2,
            block_out_channels=(24, 48),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=20,
            norm_num_groups=8,
            attention_head_dim=3,
        )
    )


@pytest.fixture(scope="module")
def run_unet(unet: UNet2DConditionModel) -> Forward:
    x, text = randn(2, 4, 8, 8), randn(2, 5, 20, seed=1)
    return lambda: unet(x, 50, encoder_hidden_states=text)


def test_pre_residual_is_conv2_and_the_resnets_output_is_not(
    unet: UNet2DConditionModel, run_unet: Forward
) -> None:
    """Hyperfeatures' tap (recipes.md 0.1: the resnet's output differs by 1.93)."""
    path = "up_blocks.1.resnets.0"
    _, want = hook(unet, f"{path}.conv2", run_unet)
    _, output = hook(unet, path, run_unet)
    got = take(unet, run_unet, f"{path}@pre_residual")
    assert torch.equal(got[f"{path}@pre_residual"], want)
    assert not torch.allclose(output, want, atol=0.1)
    (tap,) = resolve(unet, [TapSpec(path=f"{path}@pre_residual")])
    assert (tap.name, tap.address) == (f"{path}-pre_residual", f"{path}.conv2@out")


def test_suffix_globs_take_what_has_the_site(unet: UNet2DConditionModel) -> None:
    """SatDiFuser: every attn1 output and every conv2 of the up blocks."""
    taps = resolve(
        unet, [TapSpec(path="up_blocks.**@pre_residual"), TapSpec(path="up_blocks.**attn1")]
    )
    assert [tap.address for tap in taps] == [
        *(f"up_blocks.{i}.resnets.{j}.conv2@out" for i in (0, 1) for j in (0, 1, 2)),
        *(f"up_blocks.1.attentions.{j}.transformer_blocks.0.attn1@out" for j in (0, 1, 2)),
    ]


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_pre_concat_and_skip_are_what_is_concatenated(
    unet: UNet2DConditionModel, run_unet: Forward, level: int, position: int
) -> None:
    """sd-dino's decoder features and Joint Diffusion's skips, against the tensors that `torch.cat`
    is given in the block's own forward."""
    path = f"up_blocks.{level}.resnets.{position}"
    got = take(unet, run_unet, f"{path}@pre_concat", f"{path}@skip")
    joined: list[tuple[Tensor, Tensor]] = []

    class Cat(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.cat and len(args[0]) == 2 and args[0][0].ndim == 4:
                joined.append(args[0])
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Cat():
        run_unet()
    hidden, skip = joined[3 * level + position]
    assert len(joined) == 6
    assert torch.equal(got[f"{path}@pre_concat"], hidden)
    assert torch.equal(got[f"{path}@skip"], skip)


def test_skips_of_a_pixel_unet(tmp_path: Path) -> None:
    """Joint Diffusion taps all skips and the middle."""
    backbone = load_backbone(
        ModelFolder.find(BackboneSpec(model=str(save_tiny_ddpm(tmp_path / "m")))), "cpu"
    )
    taps = backbone.resolve([TapSpec(path="up_blocks.*.resnets.*@skip", reduce=("mean",))])
    assert len(taps) == 4
    arrays = backbone.arrays(
        taps,
        ImageSpec(size=16),
        ConditionSpec(),
        backbone.schedule.resolve(ScheduleSpec(timesteps=(0,)))[0],
        "float16",
    )
    assert [a.shape for a in arrays] == [(32,), (16,), (16,), (16,)]


def by_hand(q: Tensor, k: Tensor, n_heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) [b, h, q, k] of tokens [b, n, h d]."""
    q, k = (x.unflatten(-1, (n_heads, -1)).transpose(1, 2) for x in (q, k))
    return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)


@pytest.mark.parametrize("attention", ["attn1", "attn2"])
def test_attention_sites(unet: UNet2DConditionModel, run_unet: Forward, attention: str) -> None:
    path = f"up_blocks.1.attentions.0.transformer_blocks.0.{attention}"
    module = unet.get_submodule(path)
    (hidden, text, *_), output = hook(unet, path, run_unet)
    text = text if attention == "attn2" else hidden
    with torch.no_grad():
        q, k, v = module.to_q(hidden), module.to_k(text), module.to_v(text)
    sites = {f"{path}@attn.{name}": x for name, x in (("q", q), ("k", k), ("v", v))}
    got = take(unet, run_unet, *sites, f"{path}@attn.out")
    for name, want in sites.items():
        assert torch.equal(got[name], want), name
    assert torch.equal(got[f"{path}@attn.out"], output)
    size = q.shape[-1] // module.heads
    heads = take(unet, run_unet, f"{path}@attn.k.heads[2,0]")[f"{path}@attn.k.heads[2,0]"]
    want = torch.cat([k[..., 2 * size :], k[..., :size]], dim=-1)
    assert module.heads == 3
    assert torch.equal(heads, want)
    probs = by_hand(q, k, module.heads)
    for reduction, want in (
        ("head_mean", probs.mean(1)),
        ("head_sum", probs.sum(1)),
        ("heads(1)", probs[:, 1:2]),
        ("channels(1:3)", probs[..., 1:3]),
    ):
        one = take(unet, run_unet, f"{path}@attn.probs", reduce=reduction)
        torch.testing.assert_close(one[f"{path}@attn.probs"], want, atol=1e-6, rtol=1e-5)
    chosen = take(unet, run_unet, f"{path}@attn.probs.heads[0,2]")
    torch.testing.assert_close(
        chosen[f"{path}@attn.probs.heads[0,2]"], probs[:, [0, 2]], atol=1e-6, rtol=1e-5
    )


def test_probabilities_of_chunks_are_those_of_the_batch(
    unet: UNet2DConditionModel, run_unet: Forward, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1@attn.probs"
    whole = take(unet, run_unet, path, reduce="head_mean")
    monkeypatch.setattr("drl_data.attention.CHUNK_BYTES", 1)
    torch.testing.assert_close(take(unet, run_unet, path, reduce="head_mean"), whole)


def test_probabilities_leave_the_forward_as_it_is(
    unet: UNet2DConditionModel, run_unet: Forward
) -> None:
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1@attn.probs"
    taps = resolve(unet, [TapSpec(path=path, reduce="head_mean"), TapSpec(path="conv_out")])
    with torch.no_grad():
        got = capture(unet, taps, run_unet, lambda _, x: x.clone())
        assert torch.equal(got["conv_out"], run_unet().sample)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())


def test_probabilities_must_be_reduced(unet: UNet2DConditionModel) -> None:
    with pytest.raises(TapError, match="reduce them first by head_mean"):
        resolve(unet, [TapSpec(path="**.attn1@attn.probs", reduce=("mean",))])


def test_attention_that_is_not_fused_is_told(unet: UNet2DConditionModel) -> None:
    class Eager(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.to_q(x)

    model = nn.ModuleDict({"attn": Eager()})
    with pytest.raises(TapError, match=r"attn@attn\.probs: .*does not call F\.scaled_dot"):
        take(model, lambda: model["attn"](torch.ones(1)), "attn@attn.probs", reduce="head_mean")


def test_feed_forward_input(unet: UNet2DConditionModel, run_unet: Forward) -> None:
    path = "up_blocks.1.attentions.0.transformer_blocks.0"
    (want, *_), _ = hook(unet, f"{path}.ff", run_unet)
    assert torch.equal(take(unet, run_unet, f"{path}@ff.in")[f"{path}@ff.in"], want)


def test_a_site_that_no_match_has_names_those_that_do(unet: UNet2DConditionModel) -> None:
    with pytest.raises(
        TapError, match=r"'up_blocks\.0@pre_concat': none of the 1 .*nearest that do: up_blocks"
    ):
        resolve(unet, [TapSpec(path="up_blocks.0@pre_concat")])
    with pytest.raises(TapError, match=r"has the site adaln\.shift; nearest that do: none"):
        resolve(unet, [TapSpec(path="mid_block@adaln.shift")])
    with pytest.raises(TapError, match=r"has the site attn\.q\.heads\[9\]"):
        resolve(unet, [TapSpec(path="mid_block.attentions.0.**.attn1@attn.q.heads[9]")])
    # Down blocks concatenate nothing.
    with pytest.raises(TapError, match="none of the 4 modules"):
        resolve(unet, [TapSpec(path="down_blocks.*.resnets.*@skip")])


@pytest.mark.parametrize(
    "path",
    [
        "mid_block",
        "up_blocks.1.resnets.0@pre_residual",
        "up_blocks.*.resnets.*@skip",
        "**.attn1@attn.k.heads[1]",
        "mid_block.attentions.0.**@ff.in",
        "down_blocks.0@out.0",
        "eps",
        "latent.noisy",
        "vae.enc[*]",
        "vae.dec[0]@in",
    ],
)
def test_an_address_resolves_to_itself(unet: UNet2DConditionModel, path: str) -> None:
    """What the store records is a tap: the same tensor, without a glob or another site's name."""
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    for tap in resolve(unet, [TapSpec(path=path)], vae):
        (again,) = resolve(unet, [TapSpec(path=tap.address, name=tap.name)], vae)
        assert again == tap


# --- transformers --------------------------------------------------------------------------------


def tiny_dit() -> DiTTransformer2DModel:
    return random_weights(
        DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=10,
            norm_num_groups=8,
        )
    )


def test_adaln_of_dit() -> None:
    model = tiny_dit()
    x, time, label = randn(2, 4, 8, 8), torch.tensor([5, 90]), torch.tensor([1, 10])
    run = lambda: model(x, timestep=time, class_labels=label)  # noqa: E731
    block = model.transformer_blocks[1]
    with torch.no_grad():
        emb = block.norm1.emb(time, label, hidden_dtype=torch.float32)
        chunks = block.norm1.linear(functional.silu(emb)).chunk(6, dim=1)
    names = ("shift", "scale", "gate", "shift_mlp", "scale_mlp", "gate_mlp")
    paths = [f"transformer_blocks.1@adaln.{name}" for name in names]
    got = take(model, run, *paths)
    for path, want in zip(paths, chunks, strict=True):
        assert torch.equal(got[path], want), path
    everything = take(model, run, "transformer_blocks.1@adaln")
    assert torch.equal(everything["transformer_blocks.1@adaln"], torch.cat(chunks, dim=1))


def test_adaln_of_pixart() -> None:
    """The modulation is table + time embedding, with no module of its own."""
    model = random_weights(
        PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=8,
            cross_attention_dim=16,
            caption_channels=12,
            norm_num_groups=8,
            use_additional_conditions=False,
        )
    )
    x, time, text = randn(2, 4, 8, 8), torch.tensor([5, 90]), randn(2, 3, 12, seed=2)
    run = lambda: model(  # noqa: E731
        x, encoder_hidden_states=text, timestep=time, added_cond_kwargs={}
    )
    paths = ("transformer_blocks.1@adaln.scale_mlp", "transformer_blocks.1@adaln.shift")
    got = take(model, run, *paths)
    _, (embedding, _) = hook(model, "adaln_single", run)
    table = model.transformer_blocks[1].scale_shift_table
    chunks = (table[None] + embedding.reshape(2, 6, -1)).chunk(6, dim=1)
    assert torch.equal(got[paths[0]], chunks[4][:, 0])
    assert torch.equal(got[paths[1]], chunks[0][:, 0])
    (tap,) = resolve(model, [TapSpec(path=paths[1])])
    assert resolve(model, [TapSpec(path=tap.address, name=tap.name)]) == (tap,)


@pytest.fixture(scope="module")
def flux() -> FluxTransformer2DModel:
    return random_weights(
        FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            pooled_projection_dim=10,
            axes_dims_rope=(2, 2, 4),
        )
    )


N_TEXT, N_IMAGE = 5, 12


@pytest.fixture(scope="module")
def run_flux(flux: FluxTransformer2DModel) -> Forward:
    inputs = {
        "hidden_states": randn(2, N_IMAGE, 16),
        "encoder_hidden_states": randn(2, N_TEXT, 12, seed=3),
        "pooled_projections": randn(2, 10, seed=4),
        "timestep": torch.tensor([0.26, 0.5]),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(3.0), torch.arange(4.0)),
        "txt_ids": torch.zeros(N_TEXT, 3),
        "guidance": None,
    }
    return lambda: flux(**inputs)


STREAMS = Streams(n_image=N_IMAGE, n_text=N_TEXT)


def test_streams_of_flux(flux: FluxTransformer2DModel, run_flux: Forward) -> None:
    double, single = "transformer_blocks.1", "single_transformer_blocks.1"
    got = take(
        flux,
        run_flux,
        double,
        f"{double}@out.text",
        f"{double}@in",
        f"{double}@in.text",
        f"{double}.attn@attn.out",
        f"{double}.attn@attn.out.text",
        f"{double}.attn.add_k_proj",
        single,
        f"{single}@in",
        f"{single}.attn@attn.q",
        f"{single}.attn@attn.q.text",
        f"{single}.proj_out",
        streams=STREAMS,
    )
    (image_in, text_in, *_), (text_out, image_out) = hook(flux, double, run_flux)
    assert torch.equal(got[double], image_out)
    assert torch.equal(got[f"{double}@out.text"], text_out)
    assert torch.equal(got[f"{double}@in"], image_in)
    assert torch.equal(got[f"{double}@in.text"], text_in)
    _, (attended, attended_text) = hook(flux, f"{double}.attn", run_flux)
    assert torch.equal(got[f"{double}.attn@attn.out"], attended)
    assert torch.equal(got[f"{double}.attn@attn.out.text"], attended_text)
    assert got[f"{double}.attn.add_k_proj"].shape[1] == N_TEXT  # only text there
    (single_in, *_), (_, single_out) = hook(flux, single, run_flux)
    assert torch.equal(got[single], single_out)
    assert torch.equal(got[f"{single}@in"], single_in)
    _, joint = hook(flux, f"{single}.attn.to_q", run_flux)
    assert joint.shape[1] == N_TEXT + N_IMAGE
    assert torch.equal(got[f"{single}.attn@attn.q"], joint[:, N_TEXT:])
    assert torch.equal(got[f"{single}.attn@attn.q.text"], joint[:, :N_TEXT])
    _, joint = hook(flux, f"{single}.proj_out", run_flux)
    assert torch.equal(got[f"{single}.proj_out"], joint[:, N_TEXT:])


def test_streams_with_equally_many_tokens(flux: FluxTransformer2DModel) -> None:
    inputs = {
        "hidden_states": randn(1, 4, 16),
        "encoder_hidden_states": randn(1, 4, 12, seed=3),
        "pooled_projections": randn(1, 10, seed=4),
        "timestep": torch.tensor([0.26]),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(4, 3),
    }
    run = lambda: flux(**inputs)  # noqa: E731
    block, attention = "transformer_blocks.0", "transformer_blocks.0.attn@attn.out"
    got = take(flux, run, block, f"{block}@out.text", f"{block}@in", attention,
               streams=Streams(4, 4))  # fmt: skip
    _, (text, image) = hook(flux, block, run)
    assert torch.equal(got[block], image)
    assert torch.equal(got[f"{block}@out.text"], text)
    assert torch.equal(got[attention], hook(flux, f"{block}.attn", run)[1][0])
    assert torch.equal(got[f"{block}@in"], hook(flux, block, run)[0][0])


def test_joint_probabilities(flux: FluxTransformer2DModel, run_flux: Forward) -> None:
    """Seg4Diff and ConceptAttention: from image queries to text keys, softmax over all keys. The
    reference is the values: a forward whose v is the identity gives the probabilities."""
    path = "transformer_blocks.0.attn"
    seen: list[Tensor] = []
    attend = functional.scaled_dot_product_attention

    def watching(query: Tensor, key: Tensor, value: Tensor, **kwargs: object) -> Tensor:
        identity = torch.eye(key.shape[-2]).expand(*key.shape[:2], -1, -1)
        seen.append(attend(query, key, identity, **kwargs))
        return attend(query, key, value, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", watching)
        run_flux()
    joint = seen[0]
    assert joint.shape[-2:] == (N_TEXT + N_IMAGE,) * 2
    got = take(
        flux,
        run_flux,
        f"{path}@attn.probs",
        f"{path}@attn.probs.image.text",
        f"{path}@attn.probs.text.image",
        streams=STREAMS,
        reduce="head_mean",
    )
    mean = joint.mean(1)
    for name, want in (
        (f"{path}@attn.probs", mean[:, N_TEXT:]),
        (f"{path}@attn.probs.image.text", mean[:, N_TEXT:, :N_TEXT]),
        (f"{path}@attn.probs.text.image", mean[:, :N_TEXT, N_TEXT:]),
    ):
        torch.testing.assert_close(got[name], want, atol=1e-6, rtol=1e-5)


def test_ditf_taps_and_plain_norm2_is_not_one(
    flux: FluxTransformer2DModel, run_flux: Forward
) -> None:
    """recipes.md 3E and 8: k < 19 the input of ff, which is not norm2's output; k >= 19 the input
    of a single block, whose AdaLN gives norm's output[0]."""
    double, single = "transformer_blocks.1", "single_transformer_blocks.0"
    got = take(flux, run_flux, f"{double}@ff.in", streams=STREAMS)[f"{double}@ff.in"]
    _, norm2 = hook(flux, f"{double}.norm2", run_flux)
    chunks = hook(flux, f"{double}.norm1.linear", run_flux)[1].chunk(6, dim=1)
    assert torch.equal(got, norm2 * (1 + chunks[4][:, None]) + chunks[3][:, None])
    assert not torch.allclose(got, norm2, atol=0.1)

    reducer = TapReducer(
        resolve(flux, [TapSpec(path=f"{single}@in", name="ditf", reduce=("adaln",))])
    )
    _, (normed, _) = hook(flux, f"{single}.norm", run_flux)
    dims = {2: ("channel",), 3: ("token", "channel")}
    reducer.start(0, 1)
    with torch.no_grad():
        capture(
            flux,
            reducer.denoiser,
            run_flux,
            lambda tap, x: reducer.take(tap, x, dims[x.ndim]),
            streams=STREAMS,
        )
    (ditf,) = reducer.finish().values()
    torch.testing.assert_close(ditf, normed[:, N_TEXT:], atol=1e-5, rtol=1e-5)
    (tap,) = reducer.taps
    assert tap.address == (
        f"{single}@in + {single}.norm.linear@out.channels[0:16] + "
        f"{single}.norm.linear@out.channels[16:32]"
    )


def test_adaln_of_the_last_norm(flux: FluxTransformer2DModel, run_flux: Forward) -> None:
    """diffusers' AdaLayerNormContinuous has the scale before the shift."""
    (x, _), normed = hook(flux, "norm_out", run_flux)
    got = take(flux, run_flux, "norm_out@adaln.scale", "norm_out@adaln.shift")
    scale, shift = got.values()
    want = functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(normed, want)
    with pytest.raises(TapError, match=r"has the site adaln\.gate; nearest"):
        resolve(flux, [TapSpec(path="norm_out@adaln.gate")])


def test_adaln_without_a_modulation_is_refused(unet: UNet2DConditionModel) -> None:
    with pytest.raises(TapError, match="reduce adaln needs the shift of mid_block, which has no"):
        resolve(unet, [TapSpec(path="mid_block", reduce=("adaln",))])


def test_streams_of_sd3() -> None:
    """Joint tensors hold image tokens first there; the last block gives no text."""
    model = random_weights(
        SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            caption_projection_dim=16,
            pooled_projection_dim=10,
            out_channels=4,
            pos_embed_max_size=8,
        )
    )
    x, text, pooled = randn(2, 4, 8, 8), randn(2, 3, 12, seed=5), randn(2, 10, seed=6)
    run = lambda: model(  # noqa: E731
        hidden_states=x, encoder_hidden_states=text, pooled_projections=pooled,
        timestep=torch.tensor([5.0, 500.0]),
    )  # fmt: skip
    streams = Streams(n_image=16, n_text=3, text_first=False)
    paths = ["transformer_blocks.0", "transformer_blocks.1", "transformer_blocks.0@out.text"]
    got = take(model, run, *paths, streams=streams)
    _, (text_out, image_out) = hook(model, "transformer_blocks.0", run)
    assert torch.equal(got["transformer_blocks.0"], image_out)
    assert torch.equal(got["transformer_blocks.0@out.text"], text_out)
    _, (nothing, image_out) = hook(model, "transformer_blocks.1", run)
    assert nothing is None
    assert torch.equal(got["transformer_blocks.1"], image_out)
    path = "transformer_blocks.0.attn@attn.probs.image.text"
    probs = take(model, run, path, streams=streams, reduce="head_mean")[path]
    attention = model.transformer_blocks[0].attn
    (hidden, context), _ = hook(model, "transformer_blocks.0.attn", run)
    with torch.no_grad():
        q = attention.to_q(hidden)
        k = torch.cat([attention.to_k(hidden), attention.add_k_proj(context)], dim=1)
    want = by_hand(q, k, 2)[..., 16:].mean(1)
    torch.testing.assert_close(probs, want, atol=1e-6, rtol=1e-5)


def test_cut_equals_uncut_at_every_site(unet: UNet2DConditionModel, run_unet: Forward) -> None:
    block = "up_blocks.0.resnets.1"
    paths = (f"{block}@pre_residual", f"{block}@pre_concat", f"{block}@skip")
    attention = "down_blocks.0.attentions.1.transformer_blocks.0"
    more = (f"{attention}@ff.in", f"{attention}.attn2@attn.v")
    calls: list[int] = []
    handle = unet.conv_out.register_forward_hook(lambda *_: calls.append(1))
    cut = take(unet, run_unet, *paths, *more)
    assert not calls
    uncut = take(unet, run_unet, *paths, *more, stop_early=False)
    assert calls == [1]
    handle.remove()
    assert all(torch.equal(cut[name], uncut[name]) for name in cut)


# --- sites of the whole model --------------------------------------------------------------------


MODELS = {"ddpm": save_tiny_ddpm, "sd": save_tiny_stable_diffusion, "dit": save_tiny_dit}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: make(root / name) for name, make in MODELS.items()}


def load(path: Path, device: str = "cpu") -> Backbone:
    return load_backbone(ModelFolder.find(BackboneSpec(model=str(path))), device)


@pytest.mark.parametrize("family", MODELS)
def test_predictions_of_the_output(models: dict[str, Path], family: str) -> None:
    """eps is the network's output; x0 and v follow from x_t = alpha x_0 + sigma eps."""
    backbone = load(models[family])
    x = randn(2, *backbone.input_shape(ImageSpec(size=16)))
    (time,) = backbone.schedule.resolve(ScheduleSpec(timesteps=(300,)))
    taps = backbone.resolve([TapSpec(path=p) for p in ("eps", "x0", "v", "latent.noisy")])
    with torch.no_grad():
        got = backbone.tap(
            x, time, backbone.conditioning(ConditionSpec()), taps, lambda _, x, dims: x.clone()
        )
        told = torch.full((2,), 300)
        if family == "ddpm":
            eps = UNet2DModel.from_pretrained(models[family] / "unet").eval()(x, told).sample
        elif family == "dit":
            network = DiTTransformer2DModel.from_pretrained(models[family] / "transformer").eval()
            output = network(x, timestep=told, class_labels=torch.full((2,), 10)).sample
            eps = output[:, :4]  # the rest is the learned variance
        else:
            network = UNet2DConditionModel.from_pretrained(models[family] / "unet").eval()
            text = backbone.conditioning(ConditionSpec()).expand(2)["encoder_hidden_states"]
            eps = network(x, told, encoder_hidden_states=text).sample
    assert torch.equal(got["eps"], eps)
    assert torch.equal(got["latent.noisy"], x)
    x0 = (x - time.sigma * eps) / time.alpha
    torch.testing.assert_close(got["x0"], x0)
    torch.testing.assert_close(got["v"], time.alpha * eps - time.sigma * x0)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_conversions_are_diffusers(prediction: str) -> None:
    """x_0 of DDIMScheduler for each of its prediction types, and the three agree on eps."""
    from diffusers import DDIMScheduler

    from drl_data.schedule import NoiseSchedule, to_eps, to_v, to_x0

    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False)
    scheduler.set_timesteps(1000)
    output, x = randn(1, 4, 8, 8), randn(1, 4, 8, 8, seed=1)
    schedule = NoiseSchedule(scheduler.alphas_cumprod)
    (time,) = schedule.resolve(ScheduleSpec(timesteps=(400,)))
    x0 = to_x0(output, x, time, prediction)
    want = scheduler.step(output, 400, x).pred_original_sample
    torch.testing.assert_close(x0, want, atol=1e-5, rtol=1e-5)
    eps = to_eps(output, x, time, prediction)
    torch.testing.assert_close(time.alpha * x0 + time.sigma * eps, x, atol=1e-5, rtol=1e-5)
    velocity = scheduler.get_velocity(x0, eps, torch.tensor([400]))
    torch.testing.assert_close(to_v(output, x, time, prediction), velocity, atol=1e-5, rtol=1e-5)


def test_taps_of_the_vae(models: dict[str, Path]) -> None:
    """ODISE: encoder blocks of the clean image and decoder blocks of its latents."""
    backbone = load(models["sd"])
    vae = AutoencoderKL.from_pretrained(models["sd"] / "vae").eval()
    pixels, eps = randn(2, 3, 16, 16), randn(2, 4, 8, 8, seed=1)
    paths = ("vae.enc[1]", "vae.encoder.mid_block@in", "vae.dec[0]@in", "vae.dec[1]")
    taps = backbone.resolve([TapSpec(path=p) for p in (*paths, "latent.moments", "latent")])
    reducer = TapReducer(taps)
    reducer.start(0, 1)
    with torch.no_grad():
        posterior = backbone.encode_and_tap(pixels, reducer.encoder, reducer.take)
        latents = posterior.latents(eps)
        backbone.decode_and_tap(latents, reducer.decoder, reducer.take, scaled=True)
        want = vae.encode(pixels).latent_dist
        z = want.mean + want.std * eps
    got = list(reducer.finish().values())
    encode, decode = (lambda: vae.encode(pixels)), (lambda: vae.decode(z))
    assert torch.equal(got[0], hook(vae, "encoder.down_blocks.1", encode)[1])
    assert torch.equal(got[1], hook(vae, "encoder.mid_block", encode)[0][0])
    torch.testing.assert_close(got[2], hook(vae, "decoder.up_blocks.0", decode)[0][0])
    torch.testing.assert_close(got[3], hook(vae, "decoder.up_blocks.1", decode)[1])
    assert torch.equal(got[4], torch.cat([want.mean, want.std], dim=1))
    assert torch.equal(got[5], z * vae.config.scaling_factor)
    assert not any(m._forward_hooks for m in backbone.vae.modules())


def test_replicas_share_weights_and_no_hooks(models: dict[str, Path]) -> None:
    backbone = load(models["sd"])
    other = backbone.replica()
    assert other.vae is not backbone.vae
    mine, theirs = (next(b.vae.parameters()).data_ptr() for b in (backbone, other))
    assert mine == theirs


def test_a_pixel_model_has_no_vae(models: dict[str, Path]) -> None:
    backbone = load(models["ddpm"])
    with pytest.raises(TapError, match=r"'vae\.enc\[0\]' matches no module"):
        backbone.resolve([TapSpec(path="vae.enc[0]")])
    (tap,) = backbone.resolve([TapSpec(path="latent.moments")])
    with pytest.raises(TapError, match="no VAE with a posterior"):
        backbone.encode_and_tap(randn(1, 3, 16, 16), [tap], lambda tap, x, dims: x)


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("latent.image", r"latent\.image: the site latent has the parts noisy or moments"),
        ("eps.cls", r"eps\.cls: the site eps has no parts"),
        ("mid_block@out.shift", "the part shift means nothing at this site"),
        ("mid_block@out.text", "no tokens named 'text'"),
    ],
)
def test_parts_that_mean_nothing(models: dict[str, Path], site: str, message: str) -> None:
    backbone = load(models["ddpm"], "meta")
    (time,) = backbone.schedule.resolve(ScheduleSpec(timesteps=(0,)))
    with pytest.raises(TapError, match=message):
        backbone.arrays(
            backbone.resolve([TapSpec(path=site)]), ImageSpec(size=16), ConditionSpec(), time,
            "float16",
        )  # fmt: skip
