"""Tiny random checkpoints, made from configs: no downloads. Shared by all tests.

`build(folder, family, ...)` writes what `save_pretrained` of the stock model writes, so the keys
are those of the family's published checkpoints.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

if TYPE_CHECKING:
    from pathlib import Path

TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 160, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "intermediate_size": 160,
        "moe_intermediate_size": 144,
        "shared_expert_intermediate_size": 96,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
    },
    "gpt_oss": {
        "intermediate_size": 144,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "granitemoe": {
        "intermediate_size": 160,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}


def build(
    folder: Path,
    family: str,
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """Write a tiny random checkpoint of a family; returns the folder."""
    config = AutoConfig.for_model(family, **(TINY | FAMILIES[family] | overrides))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.copy_(values.to(parameter.dtype))
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def tensors_of(folder: Path) -> dict[str, Any]:
    """All tensors of a checkpoint folder, as torch tensors."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found
