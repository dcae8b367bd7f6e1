"""How fast `zipmoe pack` runs, against the drive and the hash it cannot avoid.

A synthetic Qwen2-MoE checkpoint (real expert shapes, N(0, 0.02) weights, a few layers) is packed
with a cold page cache. In every round the arms alternate: packing (read, hash twice, encode, write,
fsync), reading the same files, writing as many bytes as the store has, and SHA-256 on
one core. What counts is the ratio of packing to the slowest of the others, and GB/s of BF16.

    python benchmarks/pack.py [--layers 2] [--rounds 3] [--out benchmarks/results/pack.json]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import describe_machine

CONFIG = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "torch_dtype": "bfloat16",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "vocab_size": 32000,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": False,
}
CHUNK = 8 << 20
ARMS = ("pack", "read", "write", "sha256")


class Weights:
    """Gaussian BF16 weights cut from one seeded pool at random places: every tensor differs."""

    def __init__(self, seed: int, pool_weights: int = 1 << 25) -> None:
        self.rng = np.random.default_rng(seed)
        values = self.rng.standard_normal(pool_weights, dtype=np.float32) * np.float32(0.02)
        bits = values.view(np.uint32)
        self.pool = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)

    def bytes(self, weights: int) -> bytes:
        start = int(self.rng.integers(0, self.pool.size))
        repeats = -(-(start + weights) // self.pool.size)
        return np.tile(self.pool, repeats)[start : start + weights].tobytes()


def layer_shapes(layer: int) -> dict[str, list[int]]:
    prefix, hidden = f"model.layers.{layer}.", CONFIG["hidden_size"]
    norms = ("input_layernorm", "post_attention_layernorm")
    shapes = {f"{prefix}{name}.weight": [hidden] for name in norms}
    for name in ("q", "k", "v", "o"):
        shapes[prefix + f"self_attn.{name}_proj.weight"] = [hidden, hidden]
        if name != "o":
            shapes[prefix + f"self_attn.{name}_proj.bias"] = [hidden]
    shapes[prefix + "mlp.gate.weight"] = [CONFIG["num_experts"], hidden]
    shapes[prefix + "mlp.shared_expert_gate.weight"] = [1, hidden]
    sizes = {"shared_expert": CONFIG["shared_expert_intermediate_size"]}
    for expert in range(CONFIG["num_experts"]):
        sizes[f"experts.{expert}"] = CONFIG["moe_intermediate_size"]
    for expert, size in sizes.items():
        for name in ("gate", "up"):
            shapes[prefix + f"mlp.{expert}.{name}_proj.weight"] = [size, hidden]
        shapes[prefix + f"mlp.{expert}.down_proj.weight"] = [hidden, size]
    return shapes


def write_shard(path: Path, shapes: dict[str, list[int]], weights: Weights) -> None:
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            file.write(weights.bytes(int(np.prod(shape))))


def make_checkpoint(folder: Path, layers: int) -> None:
    weights = Weights(seed=0)
    vocab, hidden = CONFIG["vocab_size"], CONFIG["hidden_size"]
    shards = {f"layer-{i:02d}.safetensors": layer_shapes(i) for i in range(layers)}
    shards["ends.safetensors"] = {
        "model.embed_tokens.weight": [vocab, hidden],
        "model.norm.weight": [hidden],
        "lm_head.weight": [vocab, hidden],
    }
    folder.mkdir(parents=True)
    for name, shapes in shards.items():
        write_shard(folder / name, shapes, weights)
    weight_map = {key: name for name, shapes in shards.items() for key in shapes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))


def drop_page_cache(folder: Path) -> None:
    """Ask the kernel to forget the folder's pages (works without root, unlike drop_caches)."""
    os.sync()
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def time_read(folder: Path) -> float:
    drop_page_cache(folder)
    buffer, total, start = bytearray(CHUNK), 0, time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total / (time.perf_counter() - start)


def time_write(folder: Path, size: int) -> float:
    block, path = os.urandom(CHUNK), folder / "write-test"
    start = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(size // CHUNK):
            file.write(block)
        os.fsync(file.fileno())
    rate = size / (time.perf_counter() - start)
    path.unlink()
    return rate


def time_sha256() -> float:
    block = os.urandom(256 << 20)
    start = time.perf_counter()
    hashlib.sha256(block).digest()
    return len(block) / (time.perf_counter() - start)


def time_pack(checkpoint: Path, store: Path) -> tuple[float, dict]:
    from zipmoe.pack import pack_checkpoint  # noqa: PLC0415  (torch: only when needed)

    shutil.rmtree(store, ignore_errors=True)
    drop_page_cache(checkpoint)
    start = time.perf_counter()
    report = pack_checkpoint(checkpoint, store)
    seconds = time.perf_counter() - start
    facts = {
        "ratio": report.ratio,
        "bits_per_weight": report.bits_per_weight,
        "source_bytes": report.source_bytes,
        "store_bytes": report.store_bytes,
        "peak_rss_bytes": report.peak_rss_bytes,
    }
    return report.source_bytes / seconds, facts


def run(folder: Path, rounds: int) -> dict:
    checkpoint, store = folder / "checkpoint", folder / "store"
    rates: dict[str, list[float]] = {name: [] for name in ARMS}
    time_pack(checkpoint, store)  # imports and first touches are not packing
    for number in range(rounds):
        packed, facts = time_pack(checkpoint, store)
        rates["pack"].append(packed)
        rates["read"].append(time_read(checkpoint))
        # The drive must take store_bytes for every source byte, so its rate counts in source bytes.
        rates["write"].append(time_write(folder, facts["store_bytes"]) / facts["ratio"])
        rates["sha256"].append(time_sha256())
        line = "  ".join(f"{name} {values[-1] / 1e9:.2f}" for name, values in rates.items())
        print(f"round {number + 1}, GB/s of BF16: {line}", file=sys.stderr)
    rows = zip(*(rates[name] for name in ARMS), strict=True)
    ratios = [pack / min(others) for pack, *others in rows]
    return {
        "benchmark": "pack",
        "machine": describe_machine(),
        "bytes_per_s": {
            name: {"median": statistics.median(v), "min": min(v), "max": max(v)}
            for name, v in rates.items()
        },
        "ratio_to_slowest": {"median": statistics.median(ratios), "rounds": ratios},
        "pack": facts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        make_checkpoint(Path(folder) / "checkpoint", options.layers)
        result = run(Path(folder), options.rounds)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
