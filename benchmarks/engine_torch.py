"""Stock transformers and zipmoe as engines of the benchmarks: both are ordinary models."""

from __future__ import annotations

import importlib.metadata
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from engine import Engine, Timed, measured, rss_bytes

WARM_UP_PASSES = 20
FETCHED_BEFORE = 2  # layers
EXTENT_0, EXTENT_1 = 11, 14  # columns of a store's expert table: lengths


class ModelEngine(Engine):
    """A transformers model that is fed tokens."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cache: Any = None
        self.logits_now: Any = None

    def feed(self, ids: list[int]) -> None:
        if self.cache is None:  # as `generate` does
            self.cache = transformers.DynamicCache(config=self.model.config)
        with torch.inference_mode():
            result = self.model(
                torch.tensor([ids]), past_key_values=self.cache, use_cache=True, logits_to_keep=1
            )
        self.logits_now = result.logits

    def reset(self) -> None:
        self.cache = None

    def logits(self) -> np.ndarray:
        return self.logits_now[0, -1].float().numpy()

    def layers(self, prompt: list[int], ids: list[int]) -> Timed:
        """Time decoder layers while tokens are decoded: the mean of one layer and token.

        The clock runs from the call of the first layer to the return of the last: neither
        embedding, masks and positions nor the head count.
        """
        layers = self.model.model.layers
        self.reset()
        self.feed(prompt)
        seconds, native = [0.0], [0.0]
        with measured() as usage, _clock(layers, seconds, native, self.native_seconds):
            for token in ids:
                self.feed([token])
        visits = len(ids) * len(layers)
        timed = {"layer": seconds[0] / visits}
        if native[0]:
            timed["outside"] = (seconds[0] - native[0]) / visits
        return Timed(timed, usage)

    def native_seconds(self) -> float:
        """Say how long calls of zipmoe's core have taken so far; 0 if nothing says so."""
        return 0.0

    def facts(self) -> dict[str, Any]:
        config = self.model.config
        return {
            "engine": "transformers",
            "version": transformers.__version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "experts": config._experts_implementation,
            "attention": config._attn_implementation,
            "rss_bytes": rss_bytes(),
        }


class _clock:  # noqa: N801  (used like a function)
    """Adds up the time from the first layer's call to the last layer's return."""

    def __init__(self, layers: Any, seconds: list[float], native: list[float], core: Any) -> None:
        def start(*_: Any) -> None:
            native[0] -= core()
            seconds[0] -= time.perf_counter()

        def stop(*_: Any) -> None:
            seconds[0] += time.perf_counter()
            native[0] += core()

        self.handles = [
            layers[0].register_forward_pre_hook(start),
            layers[-1].register_forward_hook(stop),
        ]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


class ZipmoeEngine(ModelEngine):
    """A model loaded from a store."""

    def __init__(
        self,
        store: str,
        *,
        memory: str | int | None,
        context: int,
        threads: int,
        compute: str = "native",
        **options: Any,
    ) -> None:
        import zipmoe  # noqa: PLC0415  (stock transformers runs without it)
        from zipmoe import _core  # noqa: PLC0415
        from zipmoe.store import open_store  # noqa: PLC0415

        torch.set_num_threads(threads)  # before: what `load` makes of it is the product's choice
        _core.set_num_threads(threads)
        self.loaded = zipmoe.load(store, memory=memory, compute=compute, context=context, **options)
        with open_store(Path(store)) as opened:
            table = opened.expert_table()[1]
        first = (table[:, 0] == 0) & (table[:, 1] == 0)
        self.record_bytes = int(table[first][:, [EXTENT_0, EXTENT_1]].sum())
        super().__init__(self.loaded.model)

    def misses(self) -> int:
        return self.loaded.runtime.cache.counters()["misses"]

    def counters(self) -> dict[str, int]:
        native = self.loaded.runtime.source.engine
        return self.loaded.runtime.cache.counters() | (native.counters() if native else {})

    def record(self, prompt: list[int], ids: list[int], path: str) -> None:
        """Note which experts these tokens choose, in a routing trace."""
        from zipmoe.recording import RoutingRecording  # noqa: PLC0415
        from zipmoe.routing import save_trace  # noqa: PLC0415

        with RoutingRecording(self.model, self.loaded.runtime.source) as recording:
            self.decode(prompt, ids, 0)
        save_trace(recording.trace(), path)

    def fetch(self) -> dict[str, float]:
        """Read all experts of one layer after the other, decode them, and do nothing else.

        cpu_s: processor time of all of it; decode_s: what decoding takes, by the cache's own clock.

        The first layers touch the cache's memory, which is not to be measured.
        """
        layers = len(self.loaded.runtime.source.layers)
        for layer in range(FETCHED_BEFORE):
            self._fetch(layer)
        decoded = self.counters()["decode_ns"]
        cpu, begin = sum(os.times()[:2]), time.perf_counter()
        read = sum(self._fetch(layer) for layer in range(FETCHED_BEFORE, layers))
        seconds = time.perf_counter() - begin
        cpu = sum(os.times()[:2]) - cpu
        decode = (self.counters()["decode_ns"] - decoded) / 1e9
        return {"seconds": seconds, "bytes": read, "cpu_s": cpu, "decode_s": decode}

    def _fetch(self, layer: int) -> int:
        cache, described = self.loaded.runtime.cache, self.loaded.runtime.source.layers[layer]
        rooms = {shape: np.empty(shape, np.uint16) for shape in described.shapes}
        before = cache.counters()["bytes_read"]
        cache.prefetch(layer, list(range(described.experts)))
        for expert in range(described.experts):
            for matrix, shape in enumerate(described.shapes):
                cache.decode(layer, expert, matrix, rooms[shape])
        return cache.counters()["bytes_read"] - before

    def fill(self, vocabulary: int, tokens: int) -> None:
        """Run prompts until every expert that they need is in memory."""
        generator = torch.Generator().manual_seed(0)
        for _ in range(WARM_UP_PASSES):
            ids = torch.randint(vocabulary, (tokens,), generator=generator).tolist()
            if not self.prefill(ids).misses:
                return
        raise RuntimeError("experts still come from the drive: grant more --memory")

    def distinct_experts(self, ids: list[int]) -> float:
        """Count the experts of a layer that a prompt goes to, in the mean over layers."""
        before = self.loaded.runtime.cache.counters()
        self.prefill(ids)
        after = self.loaded.runtime.cache.counters()
        visits = sum(after[name] - before[name] for name in ("hits", "misses"))
        return visits / len(self.model.model.layers)

    def native_seconds(self) -> float:
        engine = self.loaded.runtime.source.engine
        return engine.counters()["busy_ns"] / 1e9 if engine is not None else 0.0

    def facts(self) -> dict[str, Any]:
        return super().facts() | {
            "engine": "zipmoe",
            "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
            "engaged": self.loaded.runtime.engaged(),
            "memory": self.loaded.memory.as_dict(),
            "record_bytes": self.record_bytes,
            "dense_bytes_of_a_token": sum(
                weight.matrix.nbytes
                for name, weight in self.loaded.runtime.dense.weights.items()
                if weight.matrix and "embed_tokens" not in name
            ),
            "slots": self.loaded.runtime.cache.slots,
            "policy": self.loaded.runtime.cache.policy,
        }


class OffloadedEngine(ModelEngine):
    """Stock transformers, with what exceeds the memory offloaded to the drive by accelerate."""

    def __init__(self, checkpoint: str, *, memory: int, folder: str, threads: int) -> None:
        torch.set_num_threads(threads)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint,
            dtype=torch.bfloat16,
            device_map="auto",
            max_memory={"cpu": memory},
            offload_folder=folder,
        )
        super().__init__(model.eval())

    def facts(self) -> dict[str, Any]:
        places = list(self.model.hf_device_map.values())
        return super().facts() | {
            "engine": "transformers, offloaded by accelerate",
            "accelerate": importlib.metadata.version("accelerate"),
            "modules": {str(place): places.count(place) for place in set(places)},
        }


def open_stock(checkpoint: str, threads: int) -> ModelEngine:
    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    return ModelEngine(model.eval())
