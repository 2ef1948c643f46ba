"""Joint transformers, which attend over image and text tokens together: SD3, SD3.5, Flux."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from drl_data.backbones.latent import LatentTextBackbone
from drl_data.backbones.loader import ModelFolder, load_flow_schedule, load_network
from drl_data.backbones.samplers import FLUX_SHIFT, SD3_SHIFT
from drl_data.backbones.text import POOLED, PROMPT, TextEncoders
from drl_data.backbones.tokens import TokenLayout
from drl_data.backbones.vae import latent_shape, load_vae
from drl_data.capture import Streams
from drl_data.diffusion_spec import ConditionSpec
from drl_data.errors import SpecError
from drl_data.schedule_flow import FlowSchedule
from drl_data.spec import ImageSpec
from drl_data.tap_sites import is_text
from drl_data.taps import ResolvedTap

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

JOINT_BLOCKS = (
    "JointTransformerBlock",
    "FluxTransformerBlock",
    "FluxSingleTransformerBlock",
    "QwenImageTransformerBlock",
    "ZImageTransformerBlock",  # one stream in, one out
)
"""Called with (image, text), they give (text, image) in diffusers 0.42."""
JOINT_ATTENTIONS = ("Attention", "FluxAttention")
"""Called with (image, text), they give (image, text)."""
PATCH = 2
"""Latents along a side of one token."""


class JointTransformer(LatentTextBackbone):
    """Image tokens are separated from text tokens in every stream, whatever the tuple layout."""

    TOLD: ClassVar[Mapping[str, str]] = {
        PROMPT: "encoder_hidden_states",
        POOLED: "pooled_projections",
    }

    schedule: FlowSchedule

    TEXT_FIRST: ClassVar[bool]
    """Whether text tokens come before the image's where one tensor holds both."""
    T5_TOKENS: ClassVar[int] = 0
    """T5's tokens where the condition does not say how many; 0 without a T5."""
    RAGGED_TEXT: ClassVar[bool] = False
    """Whether prompts are not padded to one length."""

    def extras(self) -> tuple[str, ...]:
        return ("t5_tokens", "t5") if self.T5_TOKENS else ()

    def n_t5_tokens(self, spec: ConditionSpec) -> int:
        """T5's tokens, or zeros in their place."""
        return self.T5_TOKENS if spec.t5_tokens is None else spec.t5_tokens

    def schedule_for(self, images: ImageSpec) -> FlowSchedule:
        _, height, width = self.input_shape(images)
        return self.schedule.for_tokens((height // PATCH) * (width // PATCH))

    def is_ragged(self, tap: ResolvedTap) -> bool:
        if not self.RAGGED_TEXT or tap.is_timeless or not tap.module:
            return False
        if tap.site == "attn.probs":
            return [part for part in tap.parts if part in ("image", "text")] != ["image", "image"]
        return is_text(tap.module) or self._is_text_part(tap)

    def streams(self, x: Tensor, kwargs: Mapping[str, Tensor]) -> Streams:
        n_image = (x.shape[-2] // PATCH) * (x.shape[-1] // PATCH)
        return Streams(n_image, kwargs["encoder_hidden_states"].shape[1], self.TEXT_FIRST)

    def arrange(
        self, tap: ResolvedTap, x: Tensor, size: tuple[int, ...]
    ) -> tuple[Tensor, tuple[str, ...]]:
        layout = TokenLayout(size[0] // PATCH, size[1] // PATCH)
        return layout.arrange(
            tap,
            x,
            text=is_text(tap.module) or self._is_text_part(tap),
            only_image=self._class_of(tap) in JOINT_BLOCKS and not tap.parts,
        )

    def _class_of(self, tap: ResolvedTap) -> str:
        return type(self.network.get_submodule(tap.module)).__name__

    def _is_text_part(self, tap: ResolvedTap) -> bool:
        kinds = [part for part in tap.parts if part in ("image", "text")]
        if kinds:
            return kinds[0] == "text"
        is_block = self._class_of(tap) in JOINT_BLOCKS
        if is_block and tap.site == "out":
            return tap.parts[:1] == ("0",)
        joint = is_block or self._class_of(tap) in JOINT_ATTENTIONS
        return joint and tap.parts[:1] == ("1",)


class SD3Backbone(JointTransformer):
    """SD3Transformer2DModel (Esser et al. 2024): two CLIPs and, if the folder has it, T5."""

    network: SD3Transformer2DModel
    TEXT_FIRST = False
    T5_TOKENS = 256

    @classmethod
    def load(cls, folder: ModelFolder, device: torch.device) -> SD3Backbone:
        """Weights on `device`, or structure only on meta; the text encoders wait for a prompt."""
        from diffusers import SD3Transformer2DModel

        network = load_network(folder, SD3Transformer2DModel, device)
        vae = load_vae(folder, device)
        schedule = load_flow_schedule(folder, shift=SD3_SHIFT)
        return cls(network, schedule, device, vae, TextEncoders(folder))

    def input_shape(self, images: ImageSpec) -> tuple[int, int, int]:
        shape = latent_shape(images, self.vae, 1)
        largest = self.network.config.pos_embed_max_size
        if max(shape[1:]) > PATCH * largest:
            raise SpecError(
                f"images.size {list(images.size)}: {shape[1] // PATCH}x{shape[2] // PATCH} "
                f"patches; the positions of this SD3 are for at most {largest}x{largest}"
            )
        return shape

    def text_shapes(self, n_tokens: int) -> dict[str, tuple[int, ...]]:
        config = self.network.config
        return {
            PROMPT: (n_tokens, config.joint_attention_dim),
            POOLED: (config.pooled_projection_dim,),
        }

    def n_prompt_tokens(self, spec: ConditionSpec) -> int:
        self.text.paths("_2")
        return self.text.clip_length("") + self.n_t5_tokens(spec)

    def encode_prompt(self, spec: ConditionSpec) -> dict[str, Tensor]:
        """[CLIP L | CLIP G | 0] tokens, then T5's; zeros stand for a T5 that was left out."""
        width = self.network.config.joint_attention_dim
        clips = [self.text.clip(suffix, spec.prompt, projected=True) for suffix in ("", "_2")]
        states = torch.cat([clip.penultimate for clip in clips], dim=-1)
        n_tokens = self.n_t5_tokens(spec)
        if spec.t5 and self.text.has("_3"):
            t5 = self.text.t5("_3", spec.prompt, n_tokens, masked=False)[0]
        else:
            t5 = states.new_zeros(n_tokens, width)
        return {
            PROMPT: torch.cat([F.pad(states, (0, width - states.shape[-1])), t5]),
            POOLED: torch.cat([clip.pooled for clip in clips]),
        }

    def forward(self, x: Tensor, model_time: Tensor, kwargs: Mapping[str, Tensor]) -> object:
        return self.network(x, timestep=model_time, **kwargs, return_dict=False)


class FluxBackbone(JointTransformer):
    """FluxTransformer2DModel (Black Forest Labs 2024): T5's tokens, CLIP's pooled vector.

    Latents are packed 2x2 into tokens; guidance-distilled models are told `condition.guidance`.
    """

    network: FluxTransformer2DModel
    TEXT_FIRST = True
    T5_TOKENS = 512

    @classmethod
    def load(cls, folder: ModelFolder, device: torch.device) -> FluxBackbone:
        """Weights on `device`, or structure only on meta; the text encoders wait for a prompt."""
        from diffusers import FluxTransformer2DModel

        network = load_network(folder, FluxTransformer2DModel, device)
        vae = load_vae(folder, device)
        # It multiplies by 1000 itself.
        schedule = load_flow_schedule(folder, time_scale=1.0, shift=FLUX_SHIFT)
        return cls(network, schedule, device, vae, TextEncoders(folder))

    def input_shape(self, images: ImageSpec) -> tuple[int, int, int]:
        return latent_shape(images, self.vae, 1)

    def text_shapes(self, n_tokens: int) -> dict[str, tuple[int, ...]]:
        config = self.network.config
        return {
            PROMPT: (n_tokens, config.joint_attention_dim),
            POOLED: (config.pooled_projection_dim,),
        }

    def n_prompt_tokens(self, spec: ConditionSpec) -> int:
        for suffix in ("", "_2"):
            self.text.paths(suffix)
        return self.n_t5_tokens(spec)

    def encode_prompt(self, spec: ConditionSpec) -> dict[str, Tensor]:
        return {
            PROMPT: self.text.t5("_2", spec.prompt, self.n_t5_tokens(spec), masked=False)[0],
            POOLED: self.text.clip("", spec.prompt, projected=False).pooled,
        }

    def other_conditions(self, spec: ConditionSpec) -> dict[str, Tensor]:
        if not spec.t5:
            raise SpecError("condition.t5 false: Flux has no other text tokens than T5's")
        if not self.network.config.guidance_embeds:
            return {}
        return {"guidance": torch.tensor([spec.guidance], device=self.device)}

    def forward(self, x: Tensor, model_time: Tensor, kwargs: Mapping[str, Tensor]) -> object:
        rows, columns = x.shape[-2] // PATCH, x.shape[-1] // PATCH
        n_text = kwargs["encoder_hidden_states"].shape[1]
        (tokens,) = self.network(
            pack(x),
            timestep=model_time,
            img_ids=position_ids(rows, columns, x.device),
            txt_ids=torch.zeros(n_text, 3, device=x.device),
            **kwargs,
            return_dict=False,
        )
        return unpack(tokens, rows, columns)


def pack(x: Tensor) -> Tensor:
    """Latents [b, c, h, w] to tokens [b, h/2 w/2, 4c], row-major; channels as (c, 2, 2)."""
    b, c, h, w = x.shape
    patches = x.reshape(b, c, h // PATCH, PATCH, w // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(b, (h // PATCH) * (w // PATCH), c * PATCH**2)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `pack`: tokens [b, rows columns, 4c] to latents [b, c, 2 rows, 2 columns]."""
    patches = tokens.reshape(len(tokens), rows, columns, -1, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(len(tokens), -1, rows * PATCH, columns * PATCH)


def position_ids(rows: int, columns: int, device: torch.device) -> Tensor:
    """(0, row, column) of each token of a grid: float32 [rows * columns, 3]."""
    y = torch.arange(rows, device=device, dtype=torch.float32).repeat_interleave(columns)
    x = torch.arange(columns, device=device, dtype=torch.float32).repeat(rows)
    return torch.stack([torch.zeros_like(x), y, x], dim=1)
