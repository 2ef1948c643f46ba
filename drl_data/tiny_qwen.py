"""Tiny Qwen text encoders with random weights, for the families that read prompts with them."""

from __future__ import annotations

from pathlib import Path

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""Qwen 3's chat template for messages of text."""


def save_tiny_qwen3(folder: Path, *, width: int = 24) -> None:
    """`tokenizer/` and `text_encoder/` of Qwen 3 over single bytes."""
    from transformers import Qwen3Config, Qwen3Model

    n_tokens = _save_tokenizer(folder / "tokenizer")
    Qwen3Model(
        Qwen3Config(
            vocab_size=n_tokens,
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=12,
        )
    ).save_pretrained(folder / "text_encoder")


def save_tiny_qwen_vl(folder: Path, *, width: int = 24) -> None:
    """`tokenizer/` and `text_encoder/` of Qwen 2.5 VL over single bytes."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    n_tokens = _save_tokenizer(folder / "tokenizer")
    shape = {"hidden_size": width, "intermediate_size": 32}
    text = {
        "vocab_size": n_tokens,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [2, 2, width // 4 - 4],
        },
        **shape,
    }
    vision = {"depth": 1, "num_heads": 2, "out_hidden_size": width, **shape}
    Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    ).save_pretrained(folder / "text_encoder")


def _save_tokenizer(folder: Path) -> int:
    """Qwen's tokenizer over single bytes; returns the size of the vocabulary."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    words = ["<|endoftext|>", *sorted(ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(
        vocab={word: i for i, word in enumerate(words)},
        merges=[],
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=TEMPLATE,
        padding_side="right",
    )
    tokenizer.save_pretrained(folder)
    return len(tokenizer)
