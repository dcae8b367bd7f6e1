"""Which parameter of a model each dense tensor of a store is, by transformers' own renaming."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from zipmoe.dense import DenseTensor

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["DTYPES", "dense_tensors", "renamed"]

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def renamed(model: Any, store: Any) -> Iterator[tuple[Any, str, str | None]]:
    """Yield dense tensors that the model uses: tensor, parameter, pattern of what is merged.

    Others, such as the layers for multi-token prediction, would be loaded and never read.
    """
    # Not at import, as transformers.integrations may still be loading.
    from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: PLC0415
    from transformers.core_model_loading import (  # noqa: PLC0415
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    wanted = model.state_dict()
    for tensor in store.dense_tensors():
        target, pattern = rename_source_key(
            tensor.name, renamings, converters, model.base_model_prefix, wanted
        )
        if target not in wanted and tensor.name in wanted:
            target, pattern = tensor.name, None
        if target in wanted:
            yield tensor, target, pattern


def dense_tensors(model: Any, store: Any) -> tuple[list[DenseTensor], int]:
    """Dense tensors that are loaded as they are, and the bytes of those that loading will copy."""
    wanted = model.state_dict()
    used, copied = [], 0
    places = store.source.places()
    for tensor, target, pattern in renamed(model, store):
        phase = places[tensor.name][1].start % 64
        size = tensor.decoded_bytes
        used.append(DenseTensor(tensor.name, tensor.dtype, tensor.shape, size, phase))
        if pattern is not None or wanted[target].dtype != DTYPES.get(tensor.dtype):
            copied += size
    return used, copied
