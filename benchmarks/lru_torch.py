"""A plain LRU of uncompressed experts, as an engine of the benchmarks: what is easily had.

A Qwen2-MoE checkpoint runs in torch as it stands. Dense weights stay in memory; rows of the
embedding are read when they are needed, and experts too, past the page cache: of those a layer
needs, the ones in memory are multiplied while others are being read.
"""

from __future__ import annotations

import json
import mmap
import os
import time
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from engine import Engine, rss_bytes
from torch.nn import functional

from zipmoe._safetensors import TensorPlace, read_header

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import numpy as np
    from torch import Tensor

PAGE = 4096
READS = 4  # at once, each by a thread of its own
PIECE = 16 << 20  # bytes that a thread asks for at once
OTHER_MEMORY = 400_000_000  # Python, torch, activations, KV cache


class Reader:
    """Reads tensors of a checkpoint, or parts of them, past the page cache."""

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        self.places: dict[str, tuple[int, TensorPlace]] = {}
        for name in sorted(set(index["weight_map"].values())):
            path = folder / name
            buffered = os.open(path, os.O_RDONLY)
            header = read_header(buffered, path.stat().st_size)
            os.close(buffered)
            file = os.open(path, os.O_RDONLY | os.O_DIRECT)
            self.places |= {place.name: (file, place) for place in header.tensors}

    def read(self, name: str, start: int, size: int, buffer: mmap.mmap) -> Tensor:
        """Read `size` bytes of a tensor from `start` on; they may reach into those behind it."""
        file, place = self.places[name]
        begin = place.start + start
        first = begin // PAGE * PAGE
        view = memoryview(buffer)
        done = 0
        while done < begin - first + size:
            got = os.preadv(file, [view[done : done + PIECE]], first + done)
            if not got:
                raise OSError(f"{name} ends at byte {first + done} of its file")
            done += got
        return torch.frombuffer(buffer, dtype=torch.bfloat16, count=size // 2, offset=begin - first)

    def tensor(self, name: str) -> Tensor:
        place = self.places[name][1]
        whole = self.read(name, 0, place.num_bytes, room(place.num_bytes))
        return whole.view(place.shape)


def room(size: int) -> mmap.mmap:
    """Give pages for a read of `size` bytes from anywhere: whole pages, one more at each end."""
    return mmap.mmap(-1, -(-size // PAGE) * PAGE + PAGE)


class Experts:
    """The experts that were used last."""

    def __init__(self, reader: Reader, config: dict[str, Any], capacity_bytes: int) -> None:
        self.reader = reader
        self.hidden, self.width = config["hidden_size"], config["moe_intermediate_size"]
        self.record_bytes = 3 * self.hidden * self.width * 2
        self.slots = capacity_bytes // (self.record_bytes + 2 * PAGE)
        if self.slots < config["num_experts_per_tok"]:
            raise ValueError(f"{capacity_bytes} bytes are too few for the experts of a token")
        self.rooms: list[mmap.mmap] = []
        self.held: OrderedDict[tuple[int, int], tuple[mmap.mmap, Tensor]] = OrderedDict()
        self.threads = ThreadPoolExecutor(READS)
        self.hits = self.misses = 0
        self.wait_ns = 0

    def visit(self, layer: int, experts: list[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield each with gate and up, and down: those in memory first."""
        present = [expert for expert in experts if (layer, expert) in self.held]
        absent = deque(expert for expert in experts if (layer, expert) not in self.held)
        self.hits += len(present)
        self.misses += len(absent)
        for expert in present:
            self.held.move_to_end((layer, expert))
        pinned = {(layer, expert) for expert in present}
        reading: deque[Any] = deque()

        def start_reads() -> None:
            while absent and len(reading) < READS and (pages := self._room(pinned)):
                expert = absent.popleft()
                reading.append(
                    (expert, pages, self.threads.submit(self._read, layer, expert, pages))
                )

        start_reads()
        for expert in present:
            yield expert, *self._matrices(layer, expert)
            pinned.discard((layer, expert))
            start_reads()
        while reading:
            expert, pages, coming = reading.popleft()
            begin = time.perf_counter_ns()
            self.held[layer, expert] = pages, coming.result()
            self.wait_ns += time.perf_counter_ns() - begin
            pinned.add((layer, expert))
            start_reads()
            yield expert, *self._matrices(layer, expert)
            pinned.discard((layer, expert))
            start_reads()

    def _room(self, pinned: set[tuple[int, int]]) -> mmap.mmap | None:
        if len(self.rooms) < self.slots:
            self.rooms.append(room(self.record_bytes))
            return self.rooms[-1]
        oldest = next(iter(self.held), None)
        return None if oldest is None or oldest in pinned else self.held.pop(oldest)[0]

    def _read(self, layer: int, expert: int, pages: mmap.mmap) -> Tensor:
        # A shard's tensors are in the order of their names: down, gate and up of an expert.
        name = f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"
        return self.reader.read(name, 0, self.record_bytes, pages)

    def _matrices(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        weights = self.held[layer, expert][1]
        down = self.hidden * self.width
        return weights[down:].view(-1, self.hidden), weights[:down].view(self.hidden, self.width)


class Model:
    """The forward pass of Qwen2-MoE."""

    def __init__(self, folder: Path, memory: int) -> None:
        self.config = config = json.loads((folder / "config.json").read_text())
        self.reader = Reader(folder)
        self.dense = {
            name: self.reader.tensor(name)
            for name in self.reader.places
            if ".experts." not in name and "embed_tokens" not in name
        }
        dense = sum(tensor.nbytes for tensor in self.dense.values())
        self.experts = Experts(self.reader, config, memory - dense - OTHER_MEMORY)
        self.heads = config["num_attention_heads"]
        self.width = config["hidden_size"] // self.heads
        steps = torch.arange(0, self.width, 2).float() / self.width
        self.frequencies = 1.0 / config["rope_theta"] ** steps
        # Told of (layer, states [tokens, hidden]) before a router is used: may change its weights.
        self.before_router: Callable[[int, Tensor], object] | None = None
        self.reset()

    def reset(self) -> None:
        self.past: list[Any] = [None] * self.config["num_hidden_layers"]
        self.length = 0

    @torch.inference_mode()
    def forward(self, ids: Tensor) -> Tensor:
        """[batch, tokens] to the logits of the last tokens [batch, vocabulary]."""
        x = torch.stack([self._embedding(token) for token in ids.reshape(-1).tolist()])
        x = x.view(*ids.shape, -1)
        angles = torch.outer(torch.arange(ids.shape[1]) + float(self.length), self.frequencies)
        angles = torch.cat([angles, angles], -1)
        turn = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in range(len(self.past)):
            prefix = f"model.layers.{layer}."
            x = x + self._attention(layer, self._norm(x, prefix + "input_layernorm"), turn)
            normed = self._norm(x, prefix + "post_attention_layernorm")
            x = x + self._moe(layer, normed.flatten(0, 1)).view_as(x)
        self.length += ids.shape[1]
        return self._linear(self._norm(x[:, -1], "model.norm"), "lm_head")

    def _embedding(self, token: int) -> Tensor:
        size = 2 * self.config["hidden_size"]
        return self.reader.read("model.embed_tokens.weight", token * size, size, room(size))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        wide = x.float()
        mean = wide.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"]
        return self.dense[f"{name}.weight"] * (wide * torch.rsqrt(mean)).to(x.dtype)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return functional.linear(x, self.dense[f"{name}.weight"], self.dense.get(f"{name}.bias"))

    def _attention(self, layer: int, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        prefix = f"model.layers.{layer}.self_attn."

        def heads(name: str) -> Tensor:
            return self._linear(x, prefix + name).unflatten(-1, (self.heads, -1)).transpose(1, 2)

        def turned(states: Tensor) -> Tensor:
            first, second = states.chunk(2, -1)
            return states * turn[0] + torch.cat([-second, first], -1) * turn[1]

        queries, keys, values = turned(heads("q_proj")), turned(heads("k_proj")), heads("v_proj")
        if self.past[layer] is not None:
            keys = torch.cat([self.past[layer][0], keys], 2)
            values = torch.cat([self.past[layer][1], values], 2)
        self.past[layer] = keys, values
        is_prompt = x.shape[1] > 1
        out = functional.scaled_dot_product_attention(queries, keys, values, is_causal=is_prompt)
        return self._linear(out.transpose(1, 2).flatten(2), prefix + "o_proj")

    def _moe(self, layer: int, x: Tensor) -> Tensor:
        prefix = f"model.layers.{layer}.mlp."
        if self.before_router:
            self.before_router(layer, x)
        scores = self._linear(x, prefix + "gate").float().softmax(-1)
        weights, chosen = scores.topk(self.config["num_experts_per_tok"], -1)
        total = torch.zeros_like(x)
        for expert, gate_up, down in self.experts.visit(layer, chosen.unique().tolist()):
            tokens, places = torch.where(chosen == expert)
            gate, up = functional.linear(x[tokens], gate_up).chunk(2, -1)
            out = functional.linear(functional.silu(gate) * up, down)
            total.index_add_(0, tokens, out * weights[tokens, places, None].to(x.dtype))
        shared = functional.silu(self._linear(x, prefix + "shared_expert.gate_proj"))
        shared = shared * self._linear(x, prefix + "shared_expert.up_proj")
        opened = self._linear(x, prefix + "shared_expert_gate").sigmoid()
        return total + opened * self._linear(shared, prefix + "shared_expert.down_proj")


class LruEngine(Engine):
    """A checkpoint that is fed tokens; all of it in so much memory."""

    def __init__(self, checkpoint: Path, *, memory: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model = Model(checkpoint, memory)
        self.logits_now: Any = None

    def feed(self, ids: list[int]) -> None:
        self.logits_now = self.model.forward(torch.tensor([ids]))

    def reset(self) -> None:
        self.model.reset()

    def logits(self) -> np.ndarray:
        return self.logits_now[0].float().numpy()

    def misses(self) -> int:
        return self.model.experts.misses

    def counters(self) -> dict[str, int]:
        experts = self.model.experts
        return {
            "hits": experts.hits,
            "misses": experts.misses,
            "bytes_read": experts.misses * experts.record_bytes,
            "wait_ns": experts.wait_ns,
        }

    def facts(self) -> dict[str, Any]:
        return {
            "engine": "plain LRU in torch",
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "slots": self.model.experts.slots,
            "rss_bytes": rss_bytes(),
        }
