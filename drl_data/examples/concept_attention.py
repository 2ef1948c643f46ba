"""ConceptAttention (Helbling et al. 2025, arXiv:2502.04320): a third stream through Flux.

Concepts, one token each, go through the double blocks beside image and text, with the weights of
the text stream. They attend to the image and to each other; nothing attends to them, so the rest of
Flux computes what it always does. In each block the outputs of their attention and of the image's,
before the projection, have a dot product for each concept and position: the saliency of the
concept.

    backbone: {model: "python:drl_data.examples.concept_attention:schnell", revision: ...}
    condition: {prompt: "background, cat, dog"}
    taps: ["streams.*.scores"]

The prompt names the concepts, separated by commas; every sample must have as many. What Flux itself
is told is the empty text, and zeros for CLIP's vector, as the published code does for real images.

Taps besides those of Flux, which are `flux.PATH`:

    streams.I.scores     [concept, h, w]    dot products of block I, before any softmax
    streams.I.concepts   [concept, c]       outputs of the concepts' attention
    streams.I.image      [c, h, w]          outputs of the image's attention

Shapes: b batch, c channel, k concept, n token of the image, d channel of a head.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drl_data.backbones import Conditioning, CustomBackbone, ModelFolder, find_model
from drl_data.backbones.joint import PATCH, FluxBackbone
from drl_data.diffusion_spec import ConditionSpec
from drl_data.errors import SpecError
from drl_data.reduce import MAP, TOKENS
from drl_data.spec import BackboneSpec
from drl_data.taps import ResolvedTap

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel
    from diffusers.models.transformers.transformer_flux import FluxTransformerBlock

SCHNELL = "black-forest-labs/FLUX.1-schnell"


def schnell(spec: BackboneSpec, device: torch.device) -> FluxWithConcepts:
    """Flux-schnell from the hub at the revision of `spec`."""
    return _load(SCHNELL, spec, device)


def tiny(spec: BackboneSpec, device: torch.device) -> FluxWithConcepts:
    """A tiny random Flux with 19 double blocks, none told a guidance scale, for `drl try`."""
    return _load(str(tiny_folder()), spec, device)


@cache
def tiny_folder() -> Path:
    """The folder of that model, while the process lives; the same weights in every process."""
    from drl_data.tiny_models import save_tiny

    root = tempfile.mkdtemp(prefix="drl-concepts-")
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    folder = Path(root) / "model"
    return save_tiny("flux", folder, num_layers=19, num_single_layers=1, guidance_embeds=False)


def _load(model: str, spec: BackboneSpec, device: torch.device) -> FluxWithConcepts:
    inner = spec.model_copy(update={"model": model})
    folder = find_model(inner, structure_only=device.type == "meta")
    assert isinstance(folder, ModelFolder)
    plain = FluxBackbone.load(folder, device)
    return FluxWithConcepts(plain, inner)


class ConceptStream(nn.Module):
    """The concepts in one double block. It has no weights: its submodules are what taps name."""

    def __init__(self) -> None:
        super().__init__()
        self.concepts = nn.Identity()
        self.image = nn.Identity()
        self.scores = nn.Identity()

    def forward(
        self,
        block: FluxTransformerBlock,
        concepts_bkc: Tensor,
        image_bnc: Tensor,
        attended_bnc: Tensor,
        temb: Tensor,
        rotary: tuple[Tensor, Tensor],
    ) -> Tensor:
        """The concepts after the block. `image_bnc` is what enters it, `attended_bnc` the output of
        its attention for the image, `rotary` the embedding of concepts and then image."""
        from diffusers.models.embeddings import apply_rotary_emb

        attention = block.attn
        normed = block.norm1(image_bnc, emb=temb)[0]
        normed_concepts, gate, shift, scale, gate_mlp = block.norm1_context(concepts_bkc, emb=temb)

        def joined(of_concepts: nn.Module, of_image: nn.Module) -> Tensor:
            both = torch.cat([of_concepts(normed_concepts), of_image(normed)], dim=1)
            return both.reshape(*both.shape[:2], -1, attention.head_dim)

        n = concepts_bkc.shape[1]
        q, k = (
            torch.cat([concept_norm(x[:, :n]), image_norm(x[:, n:])], dim=1)
            for x, concept_norm, image_norm in (
                (joined(attention.add_q_proj, attention.to_q),
                 attention.norm_added_q, attention.norm_q),
                (joined(attention.add_k_proj, attention.to_k),
                 attention.norm_added_k, attention.norm_k),
            )
        )  # fmt: skip
        v = joined(attention.add_v_proj, attention.to_v)
        q, k = (apply_rotary_emb(x, rotary, sequence_dim=1) for x in (q, k))
        q, k, v = (x.transpose(1, 2) for x in (q[:, :n], k, v))
        found = self.concepts(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        self.scores(found @ self.image(attended_bnc).transpose(1, 2))

        concepts_bkc = concepts_bkc + gate[:, None] * attention.to_add_out(found)
        normed = block.norm2_context(concepts_bkc) * (1 + scale[:, None]) + shift[:, None]
        after: Tensor = concepts_bkc + gate_mlp[:, None] * block.ff_context(normed)
        return after


class FluxAndConcepts(nn.Module):
    """Flux as it is, and beside it a stream of concepts in each double block."""

    def __init__(self, flux: FluxTransformer2DModel) -> None:
        super().__init__()
        self.flux = flux
        self.streams = nn.ModuleList(ConceptStream() for _ in flux.transformer_blocks)
        self.config = flux.config

    def forward(
        self, hidden_states: Tensor, *, concepts: Tensor, img_ids: Tensor, **told: object
    ) -> object:
        """One forward of Flux. `concepts` [b, k, c] are their embeddings by T5."""
        ids = torch.cat([torch.zeros_like(img_ids[:1]).expand(concepts.shape[1], -1), img_ids])
        rotary = self.flux.pos_embed(ids)
        state = self.flux.context_embedder(concepts)
        entered: dict[str, Tensor] = {}

        def remember(_: nn.Module, args: object, kwargs: Mapping[str, Tensor]) -> None:
            entered.update(image=kwargs["hidden_states"], temb=kwargs["temb"])

        handles = []
        for block, stream in zip(self.flux.transformer_blocks, self.streams, strict=True):

            def attended(
                _: nn.Module,
                args: tuple[Tensor, ...],
                block: FluxTransformerBlock = block,
                stream: nn.Module = stream,
            ) -> None:
                nonlocal state
                state = stream(block, state, entered["image"], args[0], entered["temb"], rotary)

            handles.append(block.register_forward_pre_hook(remember, with_kwargs=True))
            handles.append(block.attn.to_out[0].register_forward_pre_hook(attended))
        try:
            return self.flux(hidden_states, img_ids=img_ids, **told)
        finally:
            for handle in handles:
                handle.remove()


class FluxWithConcepts(FluxBackbone, CustomBackbone):
    """Flux that is told concepts besides the text."""

    def __init__(self, plain: FluxBackbone, spec: BackboneSpec) -> None:
        network = FluxAndConcepts(plain.network)
        super().__init__(network, plain.schedule, plain.device, plain.vae, plain.text)
        self._spec = spec

    def weights_digest(self) -> str:
        # Of the configuration where the weights are not at hand, for a plan: what needs the
        # weights does not get past loading them.
        return find_model(self._spec, structure_only=True).digest()

    def conditioning(self, spec: ConditionSpec) -> Conditioning:
        names = [name.strip() for name in spec.prompt.split(",") if name.strip()]
        if not names:
            raise SpecError("condition.prompt: want concepts, separated by commas")
        told = dict(super().conditioning(spec.model_copy(update={"prompt": ""})).kwargs)
        told["pooled_projections"] = torch.zeros_like(told["pooled_projections"])
        states = told["encoder_hidden_states"]
        if self.device.type == "meta":
            concepts = states.new_empty(len(names), states.shape[-1])
        else:
            n_tokens = self.n_t5_tokens(spec)
            concepts = torch.stack(
                [self.text.t5("_2", name, n_tokens, masked=False)[0][0] for name in names]
            ).to(states)
        return Conditioning({**told, "concepts": concepts[None]})

    def arrange(
        self, tap: ResolvedTap, x: Tensor, size: tuple[int, ...]
    ) -> tuple[Tensor, tuple[str, ...]]:
        if tap.module.startswith("streams.") and tap.module.endswith(".scores"):
            return x.reshape(*x.shape[:2], size[0] // PATCH, size[1] // PATCH), MAP
        if tap.module.startswith("streams.") and tap.module.endswith(".concepts"):
            return x, TOKENS
        return super().arrange(tap, x, (size[0], size[1]))
