"""Text encoders beside a denoiser (CLIP, T5, Gemma, Qwen), and files with what they would give.

One prompt at a time, so that an embedding does not depend on what is encoded with it, and in
float32 whatever the precision of the denoiser. Batches would change the bits: a product with one
row is computed in another order than one with several, so that CLIP's projected vector (SDXL, SD3)
moves by 1e-6 to 2e-6 in batches of 2 to 16 (torch 2.13, CPU; hidden states, which have a row for
each token, did not move). Batches of one size, padded, would be as invariant, but have other bits
than the stores that there are; on one core they saved a fifth to a third of CLIP's time and nothing
of T5's.

Shapes: n token, c channel.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from drl_data.backbones.loader import ModelFolder, load_component, weights_errors
from drl_data.errors import SpecError, WeightsError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPT = "prompt_embeds"
POOLED = "pooled_prompt_embeds"
MASK = "prompt_attention_mask"

QWEN_VL_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
"""What Qwen-Image asks (diffusers' QwenImagePipeline)."""
QWEN_VL_DROPPED = 34
"""Tokens of the instruction, which are left out."""
QWEN_VL_LONGEST = 1024 + QWEN_VL_DROPPED


@dataclass(frozen=True)
class ClipStates:
    """What families take from CLIP: hidden states [n, c] and pooled vectors [c]."""

    last: Tensor
    """After the final layer norm (Stable Diffusion)."""
    penultimate: Tensor
    """Of the layer before the last, without a norm (SDXL, SD3)."""
    pooled: Tensor
    """At the end-of-text token; after the projection if the encoder has one."""


class TextEncoders:
    """The text encoders of a model folder, loaded when first asked for and kept until released.

    They run on the CPU unless `run_on` says otherwise: for one prompt a run, the GPU's memory is
    worth more than the seconds.
    """

    def __init__(self, folder: ModelFolder) -> None:
        self._device = torch.device("cpu")
        self._folder = folder
        self._loaded: dict[str, tuple[PreTrainedTokenizerBase, PreTrainedModel]] = {}

    def has(self, suffix: str) -> bool:
        """Whether the folder has `text_encoder{suffix}/`, which some families may lack."""
        return self._folder.component(f"text_encoder{suffix}") is not None

    def paths(self, suffix: str) -> tuple[Path, Path]:
        """The folders `tokenizer{suffix}/` and `text_encoder{suffix}/`.

        Raises:
            WeightsError: if the model has none.
        """
        names = (f"tokenizer{suffix}", f"text_encoder{suffix}")
        tokenizer, encoder = (self._folder.component(name) for name in names)
        if tokenizer is None or encoder is None:
            raise WeightsError(
                f"model {self._folder.spec.model!r} has no {names[1]}/ and {names[0]}/ for the "
                "prompt; add them, or give condition.prompt_embeddings"
            )
        return tokenizer, encoder

    def clip_length(self, suffix: str) -> int:
        """Tokens that CLIP's prompts are padded to, from the tokenizer's configuration."""
        config = json.loads(
            (self.paths(suffix)[0] / "tokenizer_config.json").read_text(encoding="utf-8")
        )
        return int(config["model_max_length"])

    def clip(self, suffix: str, prompt: str, *, projected: bool) -> ClipStates:
        """CLIP (Radford et al. 2021), padded to the tokenizer's length."""
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        encoder_class = CLIPTextModelWithProjection if projected else CLIPTextModel
        tokenizer, encoder = self._load(suffix, CLIPTokenizer, encoder_class)
        ids = tokenizer(
            prompt, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids.to(self._device)
        with torch.no_grad():
            out = encoder(ids, output_hidden_states=True)
        pooled = out.text_embeds if projected else out.pooler_output
        return ClipStates(out.last_hidden_state[0], out.hidden_states[-2][0], pooled[0])

    def t5(self, suffix: str, prompt: str, n_tokens: int, *, masked: bool) -> tuple[Tensor, Tensor]:
        """T5's encoder (Raffel et al. 2020): ([n, c], mask [n]); padding counts unless `masked`."""
        from transformers import T5EncoderModel, T5Tokenizer

        return self._last(suffix, prompt, n_tokens, (T5Tokenizer, T5EncoderModel), masked=masked)

    def umt5(self, suffix: str, prompt: str, n_tokens: int) -> tuple[Tensor, Tensor]:
        """UMT5's encoder (Chung et al. 2023): ([n, c], mask [n])."""
        from transformers import T5Tokenizer, UMT5EncoderModel

        return self._last(suffix, prompt, n_tokens, (T5Tokenizer, UMT5EncoderModel), masked=True)

    def gemma(self, suffix: str, prompt: str, n_tokens: int) -> tuple[Tensor, Tensor]:
        """Gemma 2 as an encoder (Xie et al. 2024, Sana): ([n, c], mask [n])."""
        from transformers import Gemma2Model, GemmaTokenizer

        return self._last(suffix, prompt, n_tokens, (GemmaTokenizer, Gemma2Model), masked=True)

    def n_qwen3(self, suffix: str, prompt: str, n_tokens: int) -> int:
        """Tokens that `qwen3` gives, counted without loading the encoder."""
        from transformers import Qwen2Tokenizer

        tokenizer = self._tokenizer(suffix, Qwen2Tokenizer)
        return int(self._chat_ids(tokenizer, prompt, n_tokens)[1].sum())

    def qwen3(self, suffix: str, prompt: str, n_tokens: int) -> Tensor:
        """Qwen 3 (Yang et al. 2025) of a user's message in its chat template: the states [n, c] of
        the layer before the last, of at most `n_tokens` tokens and without the padding."""
        from transformers import Qwen2Tokenizer, Qwen3Model

        tokenizer, encoder = self._load(suffix, Qwen2Tokenizer, Qwen3Model)
        ids, mask = self._chat_ids(tokenizer, prompt, n_tokens)
        ids, mask = ids.to(self._device), mask.to(self._device)
        with torch.no_grad():
            out = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        states: Tensor = out.hidden_states[-2]
        return states[mask]

    def n_qwen_vl(self, suffix: str, prompt: str, n_tokens: int) -> int:
        """Tokens that `qwen_vl` gives, counted without loading the encoder."""
        from transformers import Qwen2Tokenizer

        ids = self._described_ids(self._tokenizer(suffix, Qwen2Tokenizer), prompt)
        return min(ids.shape[1] - QWEN_VL_DROPPED, n_tokens)

    def qwen_vl(self, suffix: str, prompt: str, n_tokens: int) -> Tensor:
        """Qwen 2.5 VL (Bai et al. 2025) asked to describe a prompt: its last states [n, c], of at
        most `n_tokens` tokens, without those of the instruction."""
        from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

        tokenizer, encoder = self._load(suffix, Qwen2Tokenizer, Qwen2_5_VLForConditionalGeneration)
        ids = self._described_ids(tokenizer, prompt).to(self._device)
        with torch.no_grad():
            out = encoder(
                input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True
            )
        states: Tensor = out.hidden_states[-1]
        return states[0, QWEN_VL_DROPPED:][:n_tokens]

    @staticmethod
    def _described_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tensor:
        """Ids [1, n]."""
        ids: Tensor = tokenizer(
            QWEN_VL_TEMPLATE.format(prompt),
            max_length=QWEN_VL_LONGEST,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return ids

    @staticmethod
    def _chat_ids(
        tokenizer: PreTrainedTokenizerBase, prompt: str, n_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """Ids and mask, [1, n_tokens] each."""
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=True,
        )
        tokens = tokenizer(
            text, padding="max_length", max_length=n_tokens, truncation=True, return_tensors="pt"
        )
        return tokens.input_ids, tokens.attention_mask.bool()

    @property
    def n_loaded(self) -> int:
        """Encoders in memory."""
        return len(self._loaded)

    def run_on(self, device: torch.device) -> None:
        """Run on another device from now on."""
        self.release()
        self._device = device

    def release(self) -> None:
        """Free the encoders; they are loaded again if asked for."""
        self._loaded.clear()

    def _last(
        self, suffix: str, prompt: str, n_tokens: int, classes: tuple[type, type], *, masked: bool
    ) -> tuple[Tensor, Tensor]:
        tokenizer, encoder = self._load(suffix, *classes)
        tokens = tokenizer(
            prompt,
            padding="max_length",
            padding_side="right",
            max_length=n_tokens,
            truncation=True,
            return_tensors="pt",
        ).to(self._device)
        with torch.no_grad():
            out = encoder(
                tokens.input_ids, attention_mask=tokens.attention_mask if masked else None
            )
        return out.last_hidden_state[0], tokens.attention_mask[0]

    def _load(
        self, suffix: str, tokenizer_class: type, encoder_class: type
    ) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
        if suffix not in self._loaded:
            from transformers.utils.logging import disable_progress_bar

            disable_progress_bar()  # of loading one small file
            tokenizer = self._tokenizer(suffix, tokenizer_class)
            encoder = load_component(self._folder, self.paths(suffix)[1], encoder_class).eval()
            self._loaded[suffix] = tokenizer, encoder.to(self._device)
        return self._loaded[suffix]

    def _tokenizer(self, suffix: str, tokenizer_class: type) -> PreTrainedTokenizerBase:
        path = self.paths(suffix)[0]
        with weights_errors(self._folder, path):
            tokenizer: PreTrainedTokenizerBase = tokenizer_class.from_pretrained(  # type: ignore[attr-defined]
                path, local_files_only=True
            )
        return tokenizer


def read_embeddings(path: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors of a safetensors file, named and shaped as `shapes` but for the number of tokens.

    A mask that is not in the file hides nothing.

    Raises:
        SpecError: if the file or a tensor is missing, or has another shape.
    """
    want = ", ".join(f"{name} {_shape_text(name, shapes[name])}" for name in shapes)
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in shapes if name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise SpecError(
            f"condition.prompt_embeddings {path!r}: {error}; want a safetensors file with {want}"
        ) from error
    if PROMPT in found and MASK in shapes and MASK not in found:
        found[MASK] = torch.ones(found[PROMPT].shape[0], dtype=torch.int64)
    n_tokens = found[PROMPT].shape[0] if PROMPT in found else 0
    for name, shape in shapes.items():
        got = tuple(found[name].shape) if name in found else None
        if got != (shape if name == POOLED else (n_tokens, *shape[1:])):
            raise SpecError(
                f"condition.prompt_embeddings {path!r}: {name} "
                f"{'is missing' if got is None else list(got)}; want {want}"
            )
    return found


def _shape_text(name: str, shape: tuple[int, ...]) -> str:
    sides = shape if name == POOLED else ("token", *shape[1:])
    return f"[{', '.join(map(str, sides))}]"
