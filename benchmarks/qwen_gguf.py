"""A Qwen2-MoE checkpoint as one BF16 GGUF file, as llama.cpp's own converter writes it.

Matrices keep their BF16 bits; vectors and the router are F32, as llama.cpp wants them. There is no
vocabulary: tokens are forced.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from safetensors import safe_open

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ARCHITECTURE = gguf.MODEL_ARCH.QWEN2MOE
BF16 = gguf.GGMLQuantizationType.BF16


class Checkpoint:
    """The tensors of a checkpoint, by name."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        self.files = {
            file: safe_open(folder / file, framework="pt")
            for file in set(index["weight_map"].values())
        }
        self.places = index["weight_map"]
        self.gguf_names = gguf.get_tensor_name_map(ARCHITECTURE, self.config["num_hidden_layers"])

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.files[self.places[name]].get_tensor(name)

    def shape(self, name: str) -> list[int]:
        return self.files[self.places[name]].get_slice(name).get_shape()


class Tensor:
    """One tensor of the GGUF file: one of the checkpoint, or a layer's experts in one."""

    def __init__(self, checkpoint: Checkpoint, name: str, parts: list[str]) -> None:
        self.checkpoint, self.parts = checkpoint, parts
        stem, suffix = name.rsplit(".", 1)
        self.name = f"{checkpoint.gguf_names.get_name(stem)}.{suffix}"
        shape = [size for size in checkpoint.shape(parts[0]) if size != 1]
        self.wide = len(shape) == 1 or stem.endswith("mlp.gate")
        self.shape = [len(parts), *shape] if ".experts." in name else shape

    def describe(self, writer: gguf.GGUFWriter) -> None:
        count = int(np.prod(self.shape))
        if self.wide:
            writer.add_tensor_info(self.name, self.shape, np.dtype(np.float32), 4 * count)
        else:
            writer.add_tensor_info(self.name, self.shape, np.dtype(np.uint16), 2 * count, BF16)

    def data(self) -> np.ndarray:
        whole = torch.stack([self.checkpoint[part] for part in self.parts]).reshape(self.shape)
        return whole.float().numpy() if self.wide else whole.view(torch.uint16).numpy()


def tensors(checkpoint: Checkpoint) -> Iterator[Tensor]:
    experts = checkpoint.config["num_experts"]
    for name in checkpoint.places:
        if ".experts." not in name:
            yield Tensor(checkpoint, name, [name])
        elif ".experts.0." in name:
            block, matrix = name.split(".experts.0.")
            parts = [f"{block}.experts.{expert}.{matrix}" for expert in range(experts)]
            yield Tensor(checkpoint, f"{block}.experts.{matrix}", parts)


def add_settings(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])


def write_gguf(folder: Path, path: Path) -> None:
    """Write the checkpoint in `folder` to `path`, which appears when it is complete."""
    checkpoint = Checkpoint(folder)
    unfinished = path.with_suffix(".unfinished")
    writer = gguf.GGUFWriter(unfinished, gguf.MODEL_ARCH_NAMES[ARCHITECTURE])
    add_settings(writer, checkpoint.config)
    listed = list(tensors(checkpoint))
    for tensor in listed:
        tensor.describe(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in listed:
        writer.write_tensor_data(tensor.data())
    writer.close()
    unfinished.rename(path)
