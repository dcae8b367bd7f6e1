"""Test doubles: a store and an expert cache made of a stock model's own weights.

They satisfy what `_quantizer.py` asks of `zipmoe.store` and `zipmoe._core`, so loading and the
experts function can be tested apart from the format, and faults can be set off at will.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def bits(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's bits as unsigned integers of its element size."""
    kind = {2: torch.uint16, 4: torch.uint32}.get(tensor.dtype.itemsize)
    contiguous = tensor.detach().contiguous()
    return (contiguous.view(kind) if kind else contiguous).numpy()


def expert_modules(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """Experts modules of a stock model, tied ones once."""
    found = []
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        tied = f"{name}.down_proj" in getattr(model, "all_tied_weights_keys", {})
        if "down_proj" in own and own["down_proj"].dim() == 3 and not tied and "shared" not in name:
            found.append((name, module))
    return found


def matrices(module: Any, expert: int) -> dict[str, torch.Tensor]:
    """An expert's matrices [out, in] by role, in order of use."""
    transposed = getattr(module, "is_transposed", False)
    out = {}
    if hasattr(module, "gate_up_proj"):
        both = module.gate_up_proj[expert]
        both = both.t() if transposed else both
        half = both.shape[0] // 2
        if getattr(module, "is_concatenated", True):
            out["gate"], out["up"] = both[:half], both[half:]
        else:
            out["gate"], out["up"] = both[::2], both[1::2]
    else:
        out["up"] = module.up_proj[expert].t() if transposed else module.up_proj[expert]
    down = module.down_proj[min(expert, module.down_proj.shape[0] - 1)]
    out["down"] = down.t() if transposed else down
    return out


class FakeCache:
    """`zipmoe._core.ExpertCache` over tensors in memory. `fail` may hold an error for the n-th decode."""

    reader, isa = "memory", "none"

    def __init__(self, weights: dict[tuple[int, int], list[np.ndarray]]) -> None:
        self.weights = weights
        self.decoded, self.prefetched = 0, []
        self.fail: dict[int, Exception] = {}
        self.closed = False

    def prefetch(self, layer: int, experts: list[int]) -> None:
        self.prefetched.append((layer, list(experts)))

    def decode(self, layer: int, expert: int, matrix: int, out: np.ndarray) -> None:
        if self.closed:
            raise ValueError("the cache is closed")
        self.decoded += 1
        if self.decoded in self.fail:
            raise self.fail[self.decoded]
        source = self.weights[layer, expert][matrix]
        assert out.shape == source.shape and out.itemsize == source.itemsize
        out[...] = source

    def counters(self) -> dict[str, int]:
        return dict(hits=0, misses=self.decoded, bytes_read=0, evictions=0, read_errors=0)

    def close(self) -> None:
        self.closed = True


def fake_weights(model: torch.nn.Module) -> dict[tuple[int, int], list[np.ndarray]]:
    return {
        (layer, expert): [bits(w) for w in matrices(module, expert).values()]
        for layer, (_, module) in enumerate(expert_modules(model))
        for expert in range(module.down_proj.shape[0])
    }


class FakeStore:
    """`zipmoe.store.Store` over a checkpoint that `save_pretrained` wrote and the model loaded from it."""

    def __init__(self, folder: Path, checkpoint: Path, stock: torch.nn.Module) -> None:
        self.path = folder
        self.manifest = SimpleNamespace(codec={"experts": "raw", "dense": "raw"})
        self.stock, self.layers = stock, []
        for name, module in expert_modules(stock):
            shapes = [
                SimpleNamespace(role=role, rows=w.shape[0], columns=w.shape[1])
                for role, w in matrices(module, 0).items()
            ]
            count = module.down_proj.shape[0]
            self.layers.append(SimpleNamespace(module=name, experts=count, matrices=shapes))
        self.files, self.phases = {}, {}
        for path in sorted(checkpoint.glob("*.safetensors")):
            handle = safe_open(path, "pt")
            self.files.update({key: handle for key in handle.keys()})
            raw = path.read_bytes()
            length = int.from_bytes(raw[:8], "little")
            for key, entry in json.loads(raw[8 : 8 + length]).items():
                if key != "__metadata__":
                    self.phases[key] = (8 + length + entry["data_offsets"][0]) % 64

    @property
    def source(self) -> Any:
        return SimpleNamespace(
            places=lambda: {k: ("", SimpleNamespace(start=v)) for k, v in self.phases.items()}
        )

    def __enter__(self) -> FakeStore:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def expert_dtypes(self, layer: int) -> tuple[str, ...]:
        return (NAMES[self.stock.get_submodule(self.layers[layer].module).down_proj.dtype],)

    def expert_table(self) -> tuple[list[str], np.ndarray]:
        rows = [
            [
                layer,
                expert,
                m,
                0,
                0,
                2,
                shape.rows,
                shape.columns,
                0,
                0,
                0,
                2 * shape.rows * shape.columns,
                0,
                0,
                0,
                0,
            ]
            for layer, entry in enumerate(self.layers)
            for expert in range(entry.experts)
            for m, shape in enumerate(entry.matrices)
        ]
        return ["none"], np.array(rows, np.uint64)

    def dense_tensors(self) -> list[Any]:
        out = []
        for key, handle in self.files.items():
            if any(part in key for part in ("experts.", "gate_up_proj")) and not any(
                part in key for part in ("bias", "shared", "norm")
            ):
                continue
            piece = handle.get_slice(key)
            tensor = handle.get_tensor(key)
            out.append(
                SimpleNamespace(
                    name=key,
                    dtype=piece.get_dtype(),
                    shape=tuple(piece.get_shape()),
                    decoded_bytes=tensor.nbytes,
                )
            )
        return out

    def read_dense(self, name: str) -> np.ndarray:
        return bits(self.files[name].get_tensor(name))
