"""Qwen-Image (Wu et al. 2025): two streams in every block, prompts by Qwen 2.5 VL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from drl_data.backbones.joint import PATCH, JointTransformer, pack, unpack
from drl_data.backbones.loader import ModelFolder, load_flow_schedule, load_network
from drl_data.backbones.samplers import FLUX_SHIFT
from drl_data.backbones.text import MASK, PROMPT, TextEncoders
from drl_data.backbones.vae import latent_shape, load_vae
from drl_data.diffusion_spec import ConditionSpec
from drl_data.errors import WeightsError
from drl_data.spec import ImageSpec

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel

N_TOKENS = 512
"""The longest prompt; shorter ones are not padded to it."""
OTHER_KINDS = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
"""Of models that are told more than a prompt: edited images, layers, a guidance scale."""


class QwenImageBackbone(JointTransformer):
    """QwenImageTransformer2DModel: latents packed 2x2 into tokens, told t and not 1000 t.

    Prompts are as long as they are; those of a batch are padded to its longest, behind a mask.
    """

    network: QwenImageTransformer2DModel
    TEXT_FIRST = True
    RAGGED_TEXT = True

    TOLD: ClassVar[Mapping[str, str]] = {
        PROMPT: "encoder_hidden_states",
        MASK: "encoder_hidden_states_mask",
    }

    @classmethod
    def load(cls, folder: ModelFolder, device: torch.device) -> QwenImageBackbone:
        """Weights on `device`, or structure only on meta; the text encoder waits for a prompt.

        Raises:
            WeightsError: for a Qwen-Image that is told more than a prompt.
        """
        from diffusers import QwenImageTransformer2DModel

        config = folder.config(folder.network)
        other = [name for name in OTHER_KINDS if config.get(name)]
        if other:
            raise WeightsError(
                f"model {folder.spec.model!r}: a Qwen-Image with {' and '.join(other)}, which is "
                "told more than a prompt; there is an adapter for the text-to-image models"
            )
        network = load_network(folder, QwenImageTransformer2DModel, device)
        vae = load_vae(folder, device)
        # it multiplies by 1000 itself
        schedule = load_flow_schedule(folder, time_scale=1.0, shift=FLUX_SHIFT)
        return cls(network, schedule, device, vae, TextEncoders(folder))

    def input_shape(self, images: ImageSpec) -> tuple[int, int, int]:
        return latent_shape(images, self.vae, 1)

    def text_shapes(self, n_tokens: int) -> dict[str, tuple[int, ...]]:
        return {PROMPT: (n_tokens, self.network.config.joint_attention_dim), MASK: (n_tokens,)}

    def n_prompt_tokens(self, spec: ConditionSpec) -> int:
        return self.text.n_qwen_vl("", spec.prompt, N_TOKENS)

    def encode_prompt(self, spec: ConditionSpec) -> dict[str, Tensor]:
        states = self.text.qwen_vl("", spec.prompt, N_TOKENS)
        return {PROMPT: states, MASK: torch.ones(len(states), dtype=torch.int64)}

    def forward(self, x: Tensor, model_time: Tensor, kwargs: Mapping[str, Tensor]) -> object:
        rows, columns = x.shape[-2] // PATCH, x.shape[-1] // PATCH
        mask = kwargs["encoder_hidden_states_mask"]
        hides = mask.device.type != "meta" and not mask.all()
        (tokens,) = self.network(
            pack(x),
            encoder_hidden_states=kwargs["encoder_hidden_states"],
            encoder_hidden_states_mask=mask if hides else None,
            timestep=model_time,
            img_shapes=[[(1, rows, columns)]] * len(x),
            return_dict=False,
        )
        return unpack(tokens, rows, columns)
