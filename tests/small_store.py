"""A small Mixtral that has a tokenizer, packed; made once per test run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

import zipmoe

if TYPE_CHECKING:
    from pathlib import Path

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def write_tokenizer(folder: Path, *, chat: bool = True) -> None:
    """Bytes are tokens; token 256 ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.chat_template = CHAT if chat else None
    fast.save_pretrained(folder)


def write_store(folder: Path, *, hidden: int = 64, inner: int = 96, layers: int = 2) -> Path:
    """`checkpoint` and `store` in the folder; returns the store."""
    config = MixtralConfig(
        vocab_size=264,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        max_position_embeddings=256,
        eos_token_id=256,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = MixtralForCausalLM(config).to(torch.bfloat16)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.normal_(std=1.5 * weight.shape[-1] ** -0.5)
    model.save_pretrained(folder / "checkpoint")
    write_tokenizer(folder / "checkpoint")
    zipmoe.pack_checkpoint(folder / "checkpoint", folder / "store")
    return folder / "store"
