"""What every text-conditioned latent denoiser shares: the VAE before it and the text beside it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from drl_data.backbones.backbone import Backbone, Conditioning, Posterior, refuse_extras
from drl_data.backbones.text import MASK, TextEncoders, read_embeddings
from drl_data.backbones.vae import decode_latents, encode_latents
from drl_data.diffusion_spec import ConditionSpec
from drl_data.errors import SpecError
from drl_data.schedule import Schedule

if TYPE_CHECKING:
    from drl_data.backbones.vae import VAE


class LatentTextBackbone(Backbone):
    """A denoiser of VAE latents that takes text; families say which text, and how it is called."""

    vae: VAE
    text: TextEncoders

    TOLD: ClassVar[Mapping[str, str]]
    """Name of each embedding in a file (`prompt_embeds` ...) and in the network's forward."""

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        device: torch.device,
        vae: VAE,
        text: TextEncoders,
    ) -> None:
        super().__init__(network, schedule, device)
        self.vae = vae
        self.text = text

    @abstractmethod
    def text_shapes(self, n_tokens: int) -> dict[str, tuple[int, ...]]:
        """Shape of each embedding of a prompt of `n_tokens` tokens, by its name in a file."""

    @abstractmethod
    def n_prompt_tokens(self, spec: ConditionSpec) -> int:
        """Tokens of what `encode_prompt` gives, known without loading an encoder.

        Raises:
            WeightsError: if the model has no text encoders.
        """

    @abstractmethod
    def encode_prompt(self, spec: ConditionSpec) -> dict[str, Tensor]:
        """Embeddings of `spec.prompt`, named and shaped as `text_shapes` says.

        Raises:
            WeightsError: if the model has no text encoders.
        """

    def encode(self, pixels: Tensor) -> Posterior:
        return encode_latents(self.vae, pixels, self.dtype)

    def decode(self, latents: Tensor, *, scaled: bool | Literal["per_channel"]) -> object:
        return decode_latents(self.vae, latents, scaled=scaled)

    def conditioning(self, spec: ConditionSpec) -> Conditioning:
        assert not spec.per_sample
        if spec.class_label != "null":
            raise SpecError("condition.class_label: this model takes a prompt, not a class")
        refuse_extras(spec, f"this {type(self.network).__name__}", self.extras())
        named = self._embeddings(spec)
        told = {
            self.TOLD[name]: tensor.to(
                device=self.device, dtype=None if name == MASK else self.dtype
            )[None]
            for name, tensor in named.items()
        }
        return Conditioning({**told, **self.other_conditions(spec)})

    def extras(self) -> tuple[str, ...]:
        """Which of `spec.EXTRAS` this model is told."""
        return ()

    def other_conditions(self, spec: ConditionSpec) -> dict[str, Tensor]:
        """What the network is told besides text, each tensor [1, ...]."""
        return {}

    def _embeddings(self, spec: ConditionSpec) -> dict[str, Tensor]:
        if spec.prompt_embeddings is not None:
            return read_embeddings(spec.prompt_embeddings, self.text_shapes(0))
        if self.device.type != "meta":
            return self.encode_prompt(spec)
        shapes = self.text_shapes(self.n_prompt_tokens(spec))
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
