"""Tiny random backbones in the real layout: what `drl try` runs a pipeline on, and tests load.

`save_tiny(family, folder, **config)` writes a model folder that the family's own loading code
reads; `config` overrides the network's configuration, so that deep taps exist.
"""

from __future__ import annotations

import difflib
import inspect
import json
import string
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from drl_data.errors import SpecError
from drl_data.tiny_qwen import save_tiny_qwen3, save_tiny_qwen_vl

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def save_tiny(
    family: str, folder: Path, *, vae: Mapping[str, object] | None = None, **config: object
) -> Path:
    """A tiny model of a family, one of `FAMILIES`, in `folder`; `vae` overrides its VAE's
    configuration as `config` the network's.

    Raises:
        SpecError: if there is no such family, naming the nearest; or `vae` of one without.
    """
    make = FAMILIES.get(family)
    if make is None:
        near = difflib.get_close_matches(family, FAMILIES, n=3, cutoff=0.3)
        raise SpecError(f"no tiny model {family!r}; nearest: {', '.join(near or FAMILIES)}")
    if vae and "vae" not in inspect.signature(make).parameters:
        raise SpecError(f"tiny model {family!r} has no VAE to configure; leave out tiny.vae")
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging

    for library in (diffusers_logging, logging):
        library.disable_progress_bar()  # of saving one small file
    made = make(folder, **config, **({"vae": vae} if vae else {}))
    if family in PIPELINES:
        _write_model_index(made, PIPELINES[family])
    return made


def _write_model_index(folder: Path, pipeline: str) -> None:
    """model_index.json over the components that a folder has, as `save_pretrained` writes it."""
    import diffusers

    cls = getattr(diffusers, pipeline)
    parts: dict[str, list[str | None]] = {}
    for name in sorted(cls._get_signature_keys(cls)[0]):
        parts[name] = [None, None]
        for file in ("config.json", "scheduler_config.json", "tokenizer_config.json"):
            if (folder / name / file).is_file():
                config = json.loads((folder / name / file).read_text())
                own = config.get("_class_name")
                other = (config.get("architectures") or [config.get("tokenizer_class")])[0]
                parts[name] = ["diffusers", own] if own else ["transformers", other]
                break
    settings = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__}
    (folder / "model_index.json").write_text(json.dumps({**settings, **parts}, indent=2))


def save_tiny_ddpm(
    folder: Path, *, seed: int = 0, channels: int = 3, size: int = 16, **config: object
) -> Path:
    """A `DDPMPipeline` folder of a UNet2DModel with some 100,000 random weights."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(seed)
    network = UNet2DModel(
        **{
            "sample_size": size,
            "in_channels": channels,
            "out_channels": channels,
            "layers_per_block": 1,
            "block_out_channels": (16, 32),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "norm_num_groups": 8,
            "attention_head_dim": 8,
            **config,
        }
    )
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(folder)
    return folder


def save_tiny_stable_diffusion(
    folder: Path, *, seed: int = 0, vae: Mapping[str, object] | None = None, **config: object
) -> Path:
    """The folder of a Stable Diffusion pipeline: unet, vae, text_encoder, tokenizer, scheduler."""
    from diffusers import PNDMScheduler, UNet2DConditionModel

    torch.manual_seed(seed)
    UNet2DConditionModel(
        **{
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "layers_per_block": 1,
            "block_out_channels": (16, 32),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 24,
            "norm_num_groups": 8,
            "attention_head_dim": 8,
            **config,
        }
    ).save_pretrained(folder / "unet")
    _tiny_vae(4, vae).save_pretrained(folder / "vae")
    PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True
    ).save_pretrained(folder / "scheduler")
    _save_tiny_clip(folder, "")
    return folder


def save_tiny_dit(
    folder: Path, *, seed: int = 0, vae: Mapping[str, object] | None = None, **config: object
) -> Path:
    """The folder of a DiT pipeline: transformer, vae, scheduler; 10 classes and the null class."""
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    torch.manual_seed(seed)
    network = DiTTransformer2DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 3,
            "sample_size": 8,
            "patch_size": 2,
            "num_embeds_ada_norm": 10,
            "norm_num_groups": 8,
            **config,
        }
    )
    for parameter in network.parameters():  # adaLN-zero blocks would be the identity
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    network.save_pretrained(folder / "transformer")
    _tiny_vae(4, vae).save_pretrained(folder / "vae")
    DDIMScheduler().save_pretrained(folder / "scheduler")
    return folder


def save_tiny_edm(folder: Path, *, seed: int = 0, **config: object) -> Path:
    """The tiny DDPM's folder with the scheduler of EDM (Karras et al. 2022) in its place."""
    from diffusers import EDMEulerScheduler

    save_tiny_ddpm(folder, seed=seed, **config)  # type: ignore[arg-type]
    EDMEulerScheduler().save_pretrained(folder / "scheduler")
    return folder


TINY_ADM: Mapping[str, object] = {
    "_class_name": "GuidedDiffusionUNet",
    "image_size": 16,
    "num_channels": 32,
    "channel_mult": "1,2",
    "num_res_blocks": 1,
    "attention_resolutions": "8",
    "num_head_channels": 16,
    "resblock_updown": True,
    "use_scale_shift_norm": True,
    "learn_sigma": True,
    "class_cond": False,
    "noise_schedule": "linear",
    "diffusion_steps": 1000,
}
"""Flags of guided-diffusion for a network like ADM-256, of some 400,000 weights."""


def save_tiny_adm(folder: Path, *, seed: int = 0, **flags: object) -> Path:
    """A folder of guided-diffusion's own layout, random weights under its own names."""
    from diffusers import UNet2DModel
    from safetensors.torch import save_file

    from drl_data.backbones.adm import to_original, unet_config
    from drl_data.backbones.loader import build

    torch.manual_seed(seed)
    config = {**TINY_ADM, **flags}
    network = build(UNet2DModel, unet_config(config), "cpu", torch.float32)
    for parameter in network.parameters():  # scales and shifts of norms would all be 1 and 0
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    folder.mkdir(parents=True)
    new_order = bool(config.get("use_new_attention_order"))
    save_file(to_original(network, new_order=new_order), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


TINY_ENCODERS: Mapping[str, Mapping[str, object]] = {
    "dinov2": {},
    "dinov2_with_registers": {"num_register_tokens": 2},
    "clip_vision_model": {"intermediate_size": 64},
    "siglip_vision_model": {"intermediate_size": 64},
    "vit": {"intermediate_size": 64},
    "vit_mae": {"intermediate_size": 64},
    "vit_msn": {"intermediate_size": 64},
    "convnext": {"num_stages": 2, "hidden_sizes": [16, 32], "depths": [1, 1], "patch_size": 2},
    "resnet": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]},
}
"""Architectures of `transformers` that `save_tiny_encoder` makes, with what is special to each."""


def save_tiny_encoder(
    folder: Path, model_type: str = "dinov2", *, seed: int = 0, **config: object
) -> Path:
    """The folder of a vision model of `transformers` for images of 16 px, in patches of 4."""
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(seed)
    size: dict[str, object] = {"image_size": 16, "patch_size": 4}
    trunk = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if model_type in ("convnext", "resnet"):
        size, trunk = {}, {}
    special = TINY_ENCODERS[model_type]
    whole = {**size, **trunk, **special, **config}
    network = AutoModel.from_config(AutoConfig.for_model(model_type, **whole))
    for name, parameter in network.named_parameters():
        if parameter.ndim == 1:  # biases begin as zeros, the scales of norms as ones
            begins = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            torch.nn.init.normal_(parameter, mean=begins, std=0.1)
    network.save_pretrained(folder)
    return folder


def save_tiny_clip(folder: Path, *, seed: int = 0, **config: object) -> Path:
    """The folder of a CLIP of both towers, its vision tower as `save_tiny_encoder` has it; `config`
    overrides the vision tower's."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    tower = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 24,
    }
    vision = {**tower, "image_size": 16, "patch_size": 4, "intermediate_size": 64, **config}
    text = {**tower, "vocab_size": 10, "intermediate_size": 64}
    ends = {"bos_token_id": 8, "eos_token_id": 9, "pad_token_id": 9}
    CLIPModel(
        CLIPConfig(vision_config=vision, text_config={**text, **ends}, projection_dim=24)
    ).save_pretrained(folder)
    return folder


def save_tiny_sdxl(
    folder: Path, *, seed: int = 0, vae: Mapping[str, object] | None = None, **config: object
) -> Path:
    """The folder of an SDXL pipeline: two CLIPs, the UNet told the image size."""
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

    torch.manual_seed(seed)
    UNet2DConditionModel(
        **{
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "layers_per_block": 1,
            "block_out_channels": (16, 32),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2),
            "attention_head_dim": (2, 4),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 16,
            "cross_attention_dim": 48,
            "norm_num_groups": 8,
            **config,
        }
    ).save_pretrained(folder / "unet")
    _tiny_vae(4, vae).save_pretrained(folder / "vae")
    EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ).save_pretrained(folder / "scheduler")
    _save_tiny_clip(folder, "")
    _save_tiny_clip(folder, "_2", projection=16)
    return folder


def save_tiny_pixart(
    folder: Path, *, seed: int = 0, vae: Mapping[str, object] | None = None, **config: object
) -> Path:
    """The folder of a PixArt-alpha pipeline with T5; the transformer is told size and aspect."""
    from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

    torch.manual_seed(seed)
    network = PixArtTransformer2DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 12,  # resolution and aspect take a third of the width each
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "cross_attention_dim": 24,
            "sample_size": 8,
            "patch_size": 2,
            "caption_channels": 24,
            "use_additional_conditions": True,
            "norm_num_groups": 8,
            **config,
        }
    )
    network.save_pretrained(folder / "transformer")
    _tiny_vae(4, vae).save_pretrained(folder / "vae")
    DPMSolverMultistepScheduler().save_pretrained(folder / "scheduler")
    _save_tiny_t5(folder, "")
    return folder


def save_tiny_sd3(
    folder: Path, *, seed: int = 0, vae: Mapping[str, object] | None = None, **config: object
) -> Path:
    """The folder of an SD3 pipeline: two CLIPs, T5, latents of 16 channels with a shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    torch.manual_seed(seed)
    SD3Transformer2DModel(
        **{
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 16,
            "num_layers": 3,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "joint_attention_dim": 48,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 24 + 16,
            "out_channels": 16,
            "pos_embed_max_size": 8,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
            **config,
        }
    ).save_pretrained(folder / "transformer")
    _tiny_vae(16, vae, scaling_factor=1.5305, shift_factor=0.0609).save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    _save_tiny_clip(folder, "", projection=24, width=16)
    _save_tiny_clip(folder, "_2", projection=16, width=16)
    _save_tiny_t5(folder, "_3", width=48)
    return folder


def save_tiny_flux(
    folder: Path, *, seed: int = 0, vae: Mapping[str, object] | None = None, **config: object
) -> Path:
    """The folder of a Flux-dev pipeline: CLIP, T5, two double and two single blocks, guidance."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    torch.manual_seed(seed)
    FluxTransformer2DModel(
        **{
            "in_channels": 64,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 24,
            "pooled_projection_dim": 24,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 6, 6),
            **config,
        }
    ).save_pretrained(folder / "transformer")
    _tiny_vae(16, vae, scaling_factor=0.3611, shift_factor=0.1159).save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(folder / "scheduler")
    _save_tiny_clip(folder, "")
    _save_tiny_t5(folder, "_2")
    return folder


def save_tiny_sana(folder: Path, *, seed: int = 0, **config: object) -> Path:
    """The folder of a Sana pipeline: Gemma 2, the deterministic AutoencoderDC."""
    from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    torch.manual_seed(seed)
    SanaTransformer2DModel(
        **{
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 24,
            "sample_size": 8,
            **config,
        }
    ).save_pretrained(folder / "transformer")
    blocks = {
        "block_out_channels": (8, 16),
        "layers_per_block": (1, 1),
        "qkv_multiscales": ((), ()),
    }
    AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        scaling_factor=0.41407,
        **{
            f"{side}_{key}": value
            for side in ("encoder", "decoder")
            for key, value in blocks.items()
        },
    ).save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.ascii_lowercase]
    GemmaTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[]).save_pretrained(
        folder / "tokenizer"
    )
    Gemma2Model(
        Gemma2Config(
            vocab_size=len(words),
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=12,
        )
    ).save_pretrained(folder / "text_encoder")
    return folder


def save_tiny_wan(folder: Path, *, seed: int = 0, **config: object) -> Path:
    """The folder of a Wan 2.1 pipeline: UMT5, a VAE of videos, a flow scheduler."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    WanTransformer3DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "text_dim": 24,
            "freq_dim": 16,
            "ffn_dim": 32,
            "num_layers": 2,
            "rope_max_seq_len": 32,
            **config,
        }
    ).save_pretrained(folder / "transformer")
    AutoencoderKLWan(base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1).save_pretrained(
        folder / "vae"
    )
    UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ).save_pretrained(folder / "scheduler")
    n_words = _save_tiny_t5_tokenizer(folder / "tokenizer")
    UMT5EncoderModel(
        UMT5Config(vocab_size=n_words, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    ).save_pretrained(folder / "text_encoder")
    return folder


def save_tiny_cogvideox(folder: Path, *, seed: int = 0, **config: object) -> Path:
    """The folder of a CogVideoX-2b pipeline: T5, a VAE of videos, a v-prediction scheduler."""
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXTransformer3DModel,
    )

    torch.manual_seed(seed)
    CogVideoXTransformer3DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 16,
            "text_embed_dim": 24,
            "num_layers": 2,
            "sample_width": 6,
            "sample_height": 4,
            "sample_frames": 9,
            "max_text_seq_length": 8,
            **config,
        }
    ).save_pretrained(folder / "transformer")
    AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_height=32,
        sample_width=48,
    ).save_pretrained(folder / "vae")
    CogVideoXDDIMScheduler(
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    ).save_pretrained(folder / "scheduler")
    _save_tiny_t5(folder, "")
    return folder


def save_tiny_autoencoder(folder: Path, *, seed: int = 0, **config: object) -> Path:
    """The folder of an AutoencoderKL alone."""
    torch.manual_seed(seed)
    _tiny_vae(4, config).save_pretrained(folder)
    return folder


def save_tiny_z_image(
    folder: Path, *, seed: int = 0, vae: Mapping[str, object] | None = None, **config: object
) -> Path:
    """The folder of a Z-Image pipeline: Qwen 3, tokens padded to multiples of 32."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel

    torch.manual_seed(seed)
    network = ZImageTransformer2DModel(
        **{
            "in_channels": 16,
            "dim": 32,
            "n_layers": 3,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 24,
            "axes_dims": (4, 6, 6),
            "axes_lens": (1024, 16, 16),
            **config,
        }
    )
    for pad in (network.x_pad_token, network.cap_pad_token):
        torch.nn.init.normal_(pad)
    network.save_pretrained(folder / "transformer")
    _tiny_vae(16, vae, scaling_factor=0.3611, shift_factor=0.1159).save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    save_tiny_qwen3(folder)
    return folder


def save_tiny_qwen_image(folder: Path, *, seed: int = 0, **config: object) -> Path:
    """The folder of a Qwen-Image pipeline: Qwen 2.5 VL, the VAE of videos."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImageTransformer2DModel,
    )

    torch.manual_seed(seed)
    QwenImageTransformer2DModel(
        **{
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 24,
            "axes_dims_rope": (4, 6, 6),
            **config,
        }
    ).save_pretrained(folder / "transformer")
    AutoencoderKLQwenImage(
        base_dim=8, z_dim=16, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False]
    ).save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192
    ).save_pretrained(folder / "scheduler")
    save_tiny_qwen_vl(folder)
    return folder


def _tiny_vae(
    channels: int,
    config: Mapping[str, object] | None,
    *,
    scaling_factor: float = 0.18215,
    shift_factor: float | None = None,
) -> AutoencoderKL:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        **{
            "block_out_channels": (8, 16),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "latent_channels": channels,
            "norm_num_groups": 4,
            "sample_size": 16,
            "scaling_factor": scaling_factor,
            "shift_factor": shift_factor,
            **(config or {}),
        }
    )


def _save_tiny_clip(
    folder: Path, suffix: str, *, width: int = 24, projection: int | None = None
) -> None:
    """`tokenizer{suffix}/` and `text_encoder{suffix}/`; with a projection as SDXL's second."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    n_tokens = _save_tiny_tokenizer(folder / f"tokenizer{suffix}")
    config = CLIPTextConfig(
        vocab_size=n_tokens,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=n_tokens - 2,
        eos_token_id=n_tokens - 1,
        projection_dim=projection or 512,
    )
    encoder_class = CLIPTextModel if projection is None else CLIPTextModelWithProjection
    encoder_class(config).save_pretrained(folder / f"text_encoder{suffix}")


def _save_tiny_t5(folder: Path, suffix: str, *, width: int = 24) -> None:
    """`tokenizer{suffix}/` and `text_encoder{suffix}/` of T5 over single letters."""
    from transformers import T5Config, T5EncoderModel

    n_words = _save_tiny_t5_tokenizer(folder / f"tokenizer{suffix}")
    T5EncoderModel(
        T5Config(vocab_size=n_words, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    ).save_pretrained(folder / f"text_encoder{suffix}")


def _save_tiny_t5_tokenizer(folder: Path) -> int:
    """T5's tokenizer over single letters; returns the size of the vocabulary."""
    from transformers import T5Tokenizer

    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    words += [(letter, -3.0) for letter in string.ascii_lowercase]
    T5Tokenizer(vocab=words, extra_ids=0).save_pretrained(folder)
    return len(words)


def _save_tiny_tokenizer(folder: Path) -> int:
    """CLIP's tokenizer files over single letters; returns the size of the vocabulary."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77})
    )
    CLIPTokenizer.from_pretrained(folder, local_files_only=True).save_pretrained(folder)
    return len(words)


FAMILIES: Mapping[str, Callable[..., Path]] = {
    "ddpm": save_tiny_ddpm,
    "edm": save_tiny_edm,
    "adm": save_tiny_adm,
    "stable_diffusion": save_tiny_stable_diffusion,
    "sdxl": save_tiny_sdxl,
    "dit": save_tiny_dit,
    "pixart": save_tiny_pixart,
    "sana": save_tiny_sana,
    "sd3": save_tiny_sd3,
    "flux": save_tiny_flux,
    "clip": save_tiny_clip,
    "wan": save_tiny_wan,
    "cogvideox": save_tiny_cogvideox,
    "autoencoder": save_tiny_autoencoder,
    "z_image": save_tiny_z_image,
    "qwen_image": save_tiny_qwen_image,
    **{name: partial(save_tiny_encoder, model_type=name) for name in TINY_ENCODERS},
}
"""What `save_tiny` makes; encoders under transformers' names of their architectures."""

PIPELINES: Mapping[str, str] = {
    "stable_diffusion": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "dit": "DiTPipeline",
    "pixart": "PixArtAlphaPipeline",
    "sana": "SanaPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
    "z_image": "ZImagePipeline",
    "qwen_image": "QwenImagePipeline",
}
"""Families whose folder says which pipeline samples from them, as the hub's do."""
