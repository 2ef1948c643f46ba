"""Z-Image (Z-Image Team 2025): one stream of image and text tokens, told how clean its input is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from drl_data.backbones.joint import PATCH, JointTransformer
from drl_data.backbones.loader import ModelFolder, load_flow_schedule, load_network
from drl_data.backbones.samplers import FLUX_SHIFT
from drl_data.backbones.text import MASK, PROMPT, TextEncoders
from drl_data.backbones.vae import latent_shape, load_vae
from drl_data.capture import Streams
from drl_data.diffusion_spec import ConditionSpec
from drl_data.errors import SpecError, TapError, WeightsError
from drl_data.spec import ImageSpec
from drl_data.taps import ResolvedTap

if TYPE_CHECKING:
    from diffusers import ZImageTransformer2DModel

N_TOKENS = 512
"""The longest prompt with its template; shorter ones are not padded to it."""
MULTIPLE = 32
"""Image and text are padded to a multiple of so many tokens each, inside the network."""
EMBEDDERS = ("all_x_embedder", "cap_embedder")


class ZImageBackbone(JointTransformer):
    """ZImageTransformer2DModel: the prompt in a chat template by Qwen 3, without its padding.

    The network puts out x_0 - eps, the opposite of the velocity. The prompt's length moves the
    image's positions, so that prompts are not padded to one length.
    """

    network: ZImageTransformer2DModel
    TEXT_FIRST = False
    RAGGED_TEXT = True

    TOLD: ClassVar[Mapping[str, str]] = {
        PROMPT: "encoder_hidden_states",
        MASK: "encoder_attention_mask",
    }

    @classmethod
    def load(cls, folder: ModelFolder, device: torch.device) -> ZImageBackbone:
        """Weights on `device`, or structure only on meta; the text encoder waits for a prompt.

        Raises:
            WeightsError: for Z-Image-Omni, which is told images too, or for patches other than 2x2.
        """
        from diffusers import ZImageTransformer2DModel

        config = folder.config(folder.network)
        if config.get("siglip_feat_dim") is not None:
            raise WeightsError(
                f"model {folder.spec.model!r}: Z-Image-Omni is told images beside the text, for "
                "which there is no condition; take Z-Image or Z-Image-Turbo"
            )
        network: ZImageTransformer2DModel = load_network(folder, ZImageTransformer2DModel, device)
        if "2-1" not in network.all_x_embedder:
            raise WeightsError(
                f"model {folder.spec.model!r}: Z-Image with patches of {network.all_patch_size}; "
                "want one with 2 x 2 latents to a token"
            )
        vae = load_vae(folder, device)
        schedule = load_flow_schedule(
            folder, time_scale=1.0, shift=FLUX_SHIFT, counts_from_noise=True
        )
        return cls(network, schedule, device, vae, TextEncoders(folder))

    def input_shape(self, images: ImageSpec) -> tuple[int, int, int]:
        shape = latent_shape(images, self.vae, 1)
        rows, columns = self.network.axes_lens[1:]
        if shape[1] > PATCH * rows or shape[2] > PATCH * columns:
            raise SpecError(
                f"images.size {list(images.size)}: {shape[1] // PATCH}x{shape[2] // PATCH} "
                f"patches; the positions of this Z-Image are for at most {rows}x{columns}"
            )
        return shape

    def text_shapes(self, n_tokens: int) -> dict[str, tuple[int, ...]]:
        return {PROMPT: (n_tokens, self.network.config.cap_feat_dim), MASK: (n_tokens,)}

    def n_prompt_tokens(self, spec: ConditionSpec) -> int:
        return self.text.n_qwen3("", spec.prompt, N_TOKENS)

    def encode_prompt(self, spec: ConditionSpec) -> dict[str, Tensor]:
        states = self.text.qwen3("", spec.prompt, N_TOKENS)
        return {PROMPT: states, MASK: torch.ones(len(states), dtype=torch.int64)}

    def streams(self, x: Tensor, kwargs: Mapping[str, Tensor]) -> Streams:
        n_image = (x.shape[-2] // PATCH) * (x.shape[-1] // PATCH)
        n_text = max(len(prompt) for prompt in _prompts(kwargs))
        return Streams(n_image, n_text, self.TEXT_FIRST, MULTIPLE)

    def arrange(
        self, tap: ResolvedTap, x: Tensor, size: tuple[int, ...]
    ) -> tuple[Tensor, tuple[str, ...]]:
        if x.ndim == 2 and tap.module.startswith(EMBEDDERS):
            raise TapError(
                f"tap {tap.address}: it sees the tokens of the whole batch in one row; tap what "
                "follows, noise_refiner.0@in (image) or context_refiner.0@in (text)"
            )
        return super().arrange(tap, x, size)

    def forward(self, x: Tensor, model_time: Tensor, kwargs: Mapping[str, Tensor]) -> object:
        (images,) = self.network(
            list(x.unsqueeze(2)), model_time, _prompts(kwargs), return_dict=False
        )
        return -torch.stack(images).squeeze(2)


def _prompts(kwargs: Mapping[str, Tensor]) -> list[Tensor]:
    """The tokens of each sample's prompt, [n, c] each; a mask on meta hides nothing."""
    states, mask = kwargs["encoder_hidden_states"], kwargs["encoder_attention_mask"]
    if mask.device.type == "meta":
        return list(states)
    return [row[shown] for row, shown in zip(states, mask.bool(), strict=True)]
