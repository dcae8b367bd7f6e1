"""Test doubles: a store and an expert cache made of a stock model's own weights.

They satisfy what `_quantizer.py` asks of `zipmoe.store` and `zipmoe._core`, so loading and the
experts function can be tested apart from the format, and faults can be set off at will.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import numpy as np

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
    """Like `zipmoe._core.ExpertCache`. `fail` may hold an error for the n-th decode."""

    reader, isa = "memory", "none"

    def __init__(self, weights: dict[tuple[int, int], list[np.ndarray]]) -> None:
        self.weights = weights
        self.decoded, self.prefetched = 0, []
        self.fail: dict[int, Exception] = {}
        self.closed = False

    def prefetch(self, layer: int, experts: list[int], tokens: list[int], num_tokens: int) -> None:
        assert len(tokens) == len(experts)
        assert max(tokens, default=0) <= num_tokens
        self.prefetched.append((layer, list(experts)))

    def decode(self, layer: int, expert: int, matrix: int, out: np.ndarray) -> None:
        if self.closed:
            raise ValueError("the cache is closed")
        self.decoded += 1
        if self.decoded in self.fail:
            raise self.fail[self.decoded]
        source = self.weights[layer, expert][matrix]
        assert (out.shape, out.itemsize) == (source.shape, source.itemsize)
        out[...] = source

    def counters(self) -> dict[str, int]:
        return {"hits": 0, "misses": self.decoded, "bytes_read": 0}

    def close(self) -> None:
        self.closed = True


def fake_weights(model: torch.nn.Module) -> dict[tuple[int, int], list[np.ndarray]]:
    return {
        (layer, expert): [bits(w) for w in matrices(module, expert).values()]
        for layer, (_, module) in enumerate(expert_modules(model))
        for expert in range(module.down_proj.shape[0])
    }
