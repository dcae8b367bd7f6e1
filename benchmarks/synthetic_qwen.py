"""Checkpoints of the shape of Qwen1.5-MoE-A2.7B with random weights, and their stores, cached.

Weights are N(0, 0.02) in BF16, from seeds that are the tensors' names; norms are 1. The embedding
is scaled by 2^6 and what writes to the residual stream by 2^-2: else attention's first output,
which all tokens share, drowns the embedding, and every token goes to the same experts. Powers of
two shift exponents and nothing else, so all compresses as N(0, 0.02) does.

A shape with topics reserves hidden channels that no layer writes to: the first is the same for all
tokens, the others say which topic a token has (its number modulo topics). Routers lie in a shard of
their own; `imposed_routing` gives them the routing statistics of trained models.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch

STD = 0.02
EMBEDDING_SCALE, RESIDUAL_SCALE = 2.0**6, 2.0**-2
RESIDUAL_WRITERS = ("o_proj.weight", "down_proj.weight")
ROUTERS = "routers"  # the shard of a shape with topics
RESERVED_VALUE = 8.0  # several times what other channels have
TOPICS = 16  # of the shapes that have some


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen2-MoE model; the defaults are Qwen1.5-MoE-A2.7B but for the layers (24)."""

    layers: int = 8
    vocabulary: int = 151936
    hidden: int = 2048
    heads: int = 16
    experts: int = 60
    top_k: int = 4
    expert_width: int = 1408
    shared_width: int = 5632
    topics: int = 0  # 0: nothing is reserved, and routing is that of random weights

    @property
    def name(self) -> str:
        sizes = f"{self.layers}x{self.hidden}x{self.expert_width}-v{self.vocabulary}"
        return f"qwen2moe-{sizes}" + (f"-t{self.topics}" if self.topics else "")

    @property
    def reserved(self) -> int:
        """Channels that no layer writes to."""
        return self.topics + 1 if self.topics else 0

    def config(self) -> dict[str, object]:
        return {
            "architectures": ["Qwen2MoeForCausalLM"],
            "model_type": "qwen2_moe",
            "torch_dtype": "bfloat16",
            "num_hidden_layers": self.layers,
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.shared_width,
            "moe_intermediate_size": self.expert_width,
            "shared_expert_intermediate_size": self.shared_width,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "norm_topk_prob": False,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "max_position_embeddings": 8192,
            "use_sliding_window": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": None,
        }


def layer_shapes(shape: Shape, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    prefix, hidden = f"model.layers.{layer}.", shape.hidden
    yield prefix + "input_layernorm.weight", (hidden,)
    yield prefix + "post_attention_layernorm.weight", (hidden,)
    for name in ("q", "k", "v", "o"):
        yield f"{prefix}self_attn.{name}_proj.weight", (hidden, hidden)
        if name != "o":
            yield f"{prefix}self_attn.{name}_proj.bias", (hidden,)
    yield prefix + "mlp.gate.weight", (shape.experts, hidden)
    yield prefix + "mlp.shared_expert_gate.weight", (1, hidden)
    widths = {"shared_expert": shape.shared_width}
    widths |= {f"experts.{expert}": shape.expert_width for expert in range(shape.experts)}
    for block, width in widths.items():
        yield f"{prefix}mlp.{block}.gate_proj.weight", (width, hidden)
        yield f"{prefix}mlp.{block}.up_proj.weight", (width, hidden)
        yield f"{prefix}mlp.{block}.down_proj.weight", (hidden, width)


def is_router(name: str) -> bool:
    return name.endswith("mlp.gate.weight")


def shards(shape: Shape) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    matrix = (shape.vocabulary, shape.hidden)
    yield "embedding", {"model.embed_tokens.weight": matrix, "model.norm.weight": (shape.hidden,)}
    yield "head", {"lm_head.weight": matrix}
    routers = {}
    for layer in range(shape.layers):
        tensors = dict(layer_shapes(shape, layer))
        if shape.topics:
            router = next(filter(is_router, tensors))
            routers[router] = tensors.pop(router)
        yield f"layer-{layer:02d}", tensors
    if routers:
        yield ROUTERS, routers


def make_weights(name: str, size: tuple[int, ...], shape: Shape) -> torch.Tensor:
    import torch  # noqa: PLC0415

    if name.endswith("norm.weight"):
        return torch.ones(size, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    scale = STD
    if name == "model.embed_tokens.weight":
        scale *= EMBEDDING_SCALE
    elif name.endswith(RESIDUAL_WRITERS):
        scale *= RESIDUAL_SCALE
    weights = torch.randn(size, generator=generator).mul_(scale)
    if shape.topics:
        reserve(weights, name, shape)
    return weights.to(torch.bfloat16)


def reserve(weights: torch.Tensor, name: str, shape: Shape) -> None:
    """Keep the reserved channels to the embedding, and routers from them."""
    import torch  # noqa: PLC0415

    if name.endswith(RESIDUAL_WRITERS):
        weights[: shape.reserved] = 0
    elif is_router(name):
        weights[:, : shape.reserved] = 0
    elif name == "model.embed_tokens.weight":
        tokens = torch.arange(shape.vocabulary)
        weights[:, : shape.reserved] = 0
        weights[:, 0] = RESERVED_VALUE
        weights[tokens, 1 + tokens % shape.topics] = RESERVED_VALUE


def write_checkpoint(folder: Path, shape: Shape) -> None:
    from safetensors.torch import save_file  # noqa: PLC0415

    places: dict[str, str] = {}
    size = 0
    for shard, tensors in shards(shape):
        file = f"{shard}.safetensors"
        content = {name: make_weights(name, size, shape) for name, size in tensors.items()}
        save_file(content, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in content.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1))


def cache_folder() -> Path:
    from zipmoe._user_cache import user_cache  # noqa: PLC0415

    return user_cache() / "bench"


@dataclass(frozen=True)
class Files:
    """Where the forms of one model lie; all but the checkpoint may not exist yet."""

    folder: Path

    @classmethod
    def of(cls, shape: Shape, cache: Path, counts: Path | None = None) -> Files:
        return cls(cache / (f"{shape.name}-{counts.stem}" if counts else shape.name))

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def raw_store(self) -> Path:
        """The weights as they are, in the store's format."""
        return self.folder / "raw-store"

    @property
    def routing(self) -> Path:
        """What was imposed on the routers, and how well."""
        return self.folder / "routing.json"

    @property
    def gguf(self) -> Path:
        return self.folder / "model.gguf"


def prepare(
    shape: Shape, cache: Path, *, repack: bool = False, counts: Path | None = None
) -> Files:
    """Make checkpoint and store unless they are there, and leave none of their pages cached.

    A shape with topics gets the routing of recorded counts, or of zipmoe's synthetic routing.
    """
    files = Files.of(shape, cache, counts)
    if not files.checkpoint.exists():
        shutil.rmtree(files.folder, ignore_errors=True)  # what was made of another
        unfinished = files.folder / "unfinished"
        unfinished.mkdir(parents=True)
        write_checkpoint(unfinished, shape)
        if shape.topics:
            from imposed_routing import impose  # noqa: PLC0415

            files.routing.write_text(json.dumps(impose(unfinished, shape, counts), indent=1))
        unfinished.rename(files.checkpoint)
    if repack:
        shutil.rmtree(files.store, ignore_errors=True)
    pack_unless_packed(files.checkpoint, files.store)
    for folder in (files.checkpoint, files.store):
        forget_pages(folder)
    return files


def pack_unless_packed(checkpoint: Path, store: Path, **options: Any) -> None:
    """Make a store, unless one is there and not of an older format."""
    from zipmoe import FormatError, pack_checkpoint  # noqa: PLC0415
    from zipmoe.store import open_store  # noqa: PLC0415

    try:
        open_store(store).close()
    except FormatError:
        shutil.rmtree(store, ignore_errors=True)
        pack_checkpoint(checkpoint, store, **options)


def forget_pages(folder: Path) -> None:
    """Drop the files from the page cache: they would push out what is being measured."""
    os.sync()
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
