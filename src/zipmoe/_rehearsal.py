"""A skeleton run on the meta device → how much memory its forward pass would hold at its peak.

Every tensor that an operator makes is noted when it appears and when Python lets it go. Shapes
are real, data are not, so it costs no memory and works for every family alike, reference code of
recurrent layers included.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zipmoe.budget import Growth

__all__ = ["peak"]

# Multiples of the chunks in which recurrent layers work: else padding looks like growth.
_LENGTHS = (256, 512, 768)


def peak(model: Any) -> Growth:
    """Bytes that a forward pass holds at once, batch 1, experts left out, by its tokens.

    Three short runs give the constant, the linear and the quadratic part.

    Raises
    ------
    RuntimeError, NotImplementedError
        The skeleton cannot run: its control flow depends on data.
    """
    n1, n2, n3 = _LENGTHS
    p1, p2, p3 = (_peak(model, length) for length in _LENGTHS)
    slope1, slope2 = (p2 - p1) / (n2 - n1), (p3 - p2) / (n3 - n2)
    square = max((slope2 - slope1) / (n3 - n1), 0.0)
    linear = max(slope2 - square * (n2 + n3), 0.0)
    return Growth(max(p3 - linear * n3 - square * n3 * n3, 0.0), linear, square)


@torch.no_grad()
def _peak(model: Any, tokens: int) -> int:
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    with _FusedAttention(), _Watch([*model.parameters(), *model.buffers()]) as watch:
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
    return watch.peak


class _FusedAttention(TorchFunctionMode):
    """Takes attention for what it is on the CPU: fused where keys and values are of one width."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, value = args[0], args[2]
            if query.shape[-1] == value.shape[-1]:
                return torch.empty_like(query)
        return func(*args, **kwargs)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operators make, while they live."""

    def __init__(self, there: list[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in there}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor)
        return out

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
