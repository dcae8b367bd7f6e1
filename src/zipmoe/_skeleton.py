"""A model without weights → bound to a store, and what it will need in memory.

`load` does this before it reads a weight; `zipmoe plan` does no more than this, also for a store
that packing would make (`_sketch.py`). So both say the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from zipmoe import _core, footprint, kv, packed, tiers
from zipmoe._errors import MismatchError
from zipmoe._index import CODECS, IS_INTEGER, PAGE, ceil_to
from zipmoe._renaming import DTYPES, dense_tensors, renamed
from zipmoe.budget import Demand, Needs
from zipmoe.experts import (
    IMPLEMENTATION,
    ExpertLayer,
    ExpertSource,
    bind,
    is_chosen,
    needs_whole,
    runs_in_one_call,
)
from zipmoe.linear import PackedWeight
from zipmoe.packed import PackedDense
from zipmoe.plan import HELD, ModelSizes, PartSize
from zipmoe.schedule import Tier

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from torch import nn

    from zipmoe._quantizer import LoadOptions
    from zipmoe.budget import Activations
    from zipmoe.dense import DenseTensor

__all__ = ["Skeleton", "bind_skeleton", "cache_slots"]

DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device whose experts and packed weights are stand-ins."""

    source: ExpertSource
    dense: PackedDense  # nothing is read yet
    tensors: list[DenseTensor]  # what is loaded as it is
    paths: list[str]  # of the expert shards
    table: NDArray[np.uint64]  # of the experts, as `ExpertCache` wants it
    context: int
    demand: Demand
    needs: Needs
    sizes: ModelSizes


def bind_skeleton(model: Any, store: Any, options: LoadOptions, base_bytes: int) -> Skeleton:
    """Put stand-ins in the places of a skeleton's weights, and count what it will need.

    `store` is an open store, or a sketch of one. `base_bytes`: the process's own.

    Raises
    ------
    MismatchError
        The store is of another model.
    """
    layers, dtype = expert_layers(store), model.config.dtype
    source = _bind_experts(model, layers, native=options.compute == "native")
    dense = PackedDense()
    if options.compute == "native":
        dense = packed.bind(model, _packable(model, store, dtype))
    tensors, transient = dense_tensors(model, store)
    paths, table = store.expert_table()
    context, shape = _context(model, options.context), _activations(model, layers, dtype)
    demand = Demand(
        states=footprint.kv_growth(model),
        forward=footprint.forward_growth(model, shape),
        decoded=ExpertSource.buffer_bytes(layers),
    )
    floor, everything = tiers.cache_bytes(table, options.tiers)
    needs = Needs(
        base=base_bytes,
        dense=footprint.dense_bytes(model, model._get_dtype_plan(dtype)) + dense.nbytes,
        kv=_kv_bytes(demand, context, options),
        scratch=demand.scratch_bytes(context, options.batch)
        + _step_bytes(demand, shape, options.streams),
        cache_floor=floor,
        cache_all=everything,
        loading=max(transient, dense.loading_bytes),
        on_drive=dense.rows_bytes,
    )
    sizes = _model_sizes(model, store, dense, table, top_k=shape.top_k)
    sizes = replace(sizes, state_bytes=demand.states.linear)
    return Skeleton(source, dense, tensors, paths, table, context, demand, needs, sizes)


def _kv_bytes(demand: Demand, context: int, options: LoadOptions) -> int:
    if options.conversations:
        return demand.kv_bytes(kv.room(context), options.conversations)
    return demand.kv_bytes(context, options.batch)


def _step_bytes(demand: Demand, shape: Activations, streams: int) -> int:
    """Bytes that one token more of each of some streams holds at once, all their logits too."""
    return demand.forward.at(streams) + streams * shape.vocabulary * 8 if streams else 0


def cache_slots(table: NDArray[np.uint64], cache_bytes: int) -> int:
    """Experts that an expert cache of this size holds."""
    total = len(_record_bytes(table))
    least, all_of_them = (_core.ExpertCache.needed_bytes(table, (0, n, 0, 0)) for n in (2, total))
    each = (all_of_them - least) // max(total - 2, 1)
    return min(2 + (cache_bytes - least) // each, total) if each else total


def _bind_experts(model: nn.Module, layers: list[ExpertLayer], *, native: bool) -> ExpertSource:
    source = ExpertSource(_NotYet(), layers)
    if native:
        source.engine = _core.Engine()
    bound: dict[str, ExpertLayer] = {}
    replaced = []
    for layer in layers:
        for name in (layer.module, *_tied_to(model, layer.module)):
            replaced += [f"{name}.{p}" for p in bind(_submodule(model, name), source, layer)]
            bound[name] = layer
    tied = getattr(model, "all_tied_weights_keys", {})
    for key in [k for k, v in tied.items() if k in replaced or v in replaced]:
        del tied[key]  # there is nothing left to tie
    left = [name for name, module in model.named_modules() if _is_experts(module)]
    if left:
        raise MismatchError(f"the store has no experts for {left[0]}; it is of another model")
    if model._can_set_experts_implementation():  # type: ignore[operator]
        model.set_experts_implementation(IMPLEMENTATION)  # type: ignore[operator]
    _check_engaged(model, bound)
    return source


def _packable(model: Any, store: Any, dtype: Any) -> dict[str, Any]:
    """Parameters that are BF16 and a tensor as it stands, and which tensor each is."""
    wider = [part.strip("*.") for part in model._get_dtype_plan(dtype)]
    may = {name for name in packed.candidates(model) if not any(part in name for part in wider)}
    return {
        target: tensor
        for tensor, target, pattern in renamed(model, store)
        if pattern is None and target in may and tensor.dtype == "BF16"
    }


def _context(model: Any, asked: int | None) -> int:
    config = model.config.get_text_config(decoder=True)
    most = getattr(config, "max_position_embeddings", None) or DEFAULT_CONTEXT
    return asked or min(most, DEFAULT_CONTEXT)


def _activations(model: Any, layers: list[ExpertLayer], dtype: Any) -> Any:
    return footprint.activations(
        model,
        expert_width=max(sum(rows for rows, _ in layer.shapes[:-1]) for layer in layers),
        element_bytes=dtype.itemsize,
        whole_experts=any(needs_whole(module) for module in model.modules()),
        one_call=all(runs_in_one_call(module) for module in model.modules()),
    )


class _NotYet:
    """The cache while weights are loading: nobody may ask for an expert then."""

    def prefetch(self, *_: Any) -> None:
        raise RuntimeError("the model is still loading")

    def decode(self, *_: Any) -> None:
        raise RuntimeError("the model is still loading")

    def close(self) -> None:
        pass


def expert_layers(store: Any) -> list[ExpertLayer]:
    """Describe the store's experts modules as `zipmoe.experts` wants them."""
    return [
        ExpertLayer(
            ordinal,
            layer.module,
            layer.experts,
            tuple(matrix.role for matrix in layer.matrices),
            tuple((matrix.rows, matrix.columns) for matrix in layer.matrices),
            _expert_dtype(store, ordinal),
        )
        for ordinal, layer in enumerate(store.layers)
    ]


def _expert_dtype(store: Any, layer: int) -> torch.dtype:
    names = set(store.expert_dtypes(layer))
    if len(names) != 1 or not names <= DTYPES.keys():
        raise MismatchError(f"the experts of {store.layers[layer].module} are of dtypes {names}")
    return DTYPES[names.pop()]


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise MismatchError(
            f"{type(model).__name__} has no module {name}, of which the store has the experts: "
            "load it with the class that its config.json names"
        ) from error


def _tied_to(model: nn.Module, module: str) -> list[str]:
    """Experts modules whose weights are those of `module` (diffusion_gemma's decoder)."""
    tied = getattr(model, "all_tied_weights_keys", {})
    return [
        target.removesuffix(".down_proj")
        for target, source in tied.items()
        if source == f"{module}.down_proj"
    ]


def _is_experts(module: nn.Module) -> bool:
    """Tell a decorated experts module whose weights are still parameters."""
    return hasattr(module, "has_gate") and "down_proj" in module._parameters


def _check_engaged(model: nn.Module, bound: dict[str, ExpertLayer]) -> None:
    """Every decorated experts module must really call our function."""
    for name in bound:
        module = model.get_submodule(name)
        if hasattr(module, "has_gate") and not is_chosen(module.config):
            raise MismatchError(f"transformers does not let {name} use zipmoe's experts function")


def _record_bytes(table: NDArray[np.uint64]) -> list[int]:
    """Bytes of every expert's record, padding included."""
    lengths = ceil_to(table[:, 11], PAGE) + ceil_to(table[:, 14], PAGE)
    _, first = np.unique(table[:, :2], axis=0, return_index=True)
    return [int(size) for size in np.add.reduceat(lengths, np.sort(first))]


def _model_sizes(
    model: Any, store: Any, dense: PackedDense, table: NDArray[np.uint64], *, top_k: int
) -> ModelSizes:
    """Give the planner its sizes: those of a mean expert, and what each token is multiplied with.

    Weights that are decoded as they are read are multiplied as if they were raw.
    """
    experts = len(np.unique(table[:, :2], axis=0))
    last = table[:, 2] == table[:, 2].max()
    parts = tuple(
        PartSize(
            weights=int((rows[:, 6] * rows[:, 7]).sum()) // experts,
            sign_mantissa_bytes=int(ceil_to(rows[:, 11], PAGE).sum()) // experts,
            exponents_bytes=int(ceil_to(rows[:, 14], PAGE).sum()) // experts,
        )
        for rows in (table[~last], table[last])
    )
    head = model.get_output_embeddings()
    by_codec: dict[str, int] = {}
    of_tensors = {tensor.name: tensor.codec for tensor in store.dense_tensors()}
    codecs = {id(weight): of_tensors[name] for name, weight in dense.weights.items()}
    for weight in _multiplied(model):
        codec = codecs.get(id(weight), "raw")
        codec = "raw" if codec in packed.WHOLE else codec
        by_codec[codec] = by_codec.get(codec, 0) + weight.shape[0] * weight.shape[1]
    return ModelSizes(
        layers=len(store.layers),
        experts=max(layer.experts for layer in store.layers),
        top_k=top_k,
        parts=parts,
        codec=CODECS[int(np.bincount(table[:, 4].astype(int)).argmax())],
        held=(Tier.COMPRESSED,) if IS_INTEGER[table[:, 4]].any() else HELD,
        dense_weights=sum(by_codec.values()),
        head_weights=0 if head is None else head.weight.shape[0] * head.weight.shape[1],
        dense_codec=max(by_codec, key=lambda codec: by_codec[codec], default="raw"),
    )


def _multiplied(model: nn.Module) -> Iterator[PackedWeight | torch.Tensor]:
    """Dense matrices that a token is multiplied with, each once."""
    seen: set[int] = set()
    for module in model.modules():
        weight = vars(module).get("weight", module._parameters.get("weight"))
        if isinstance(module, torch.nn.Embedding) or weight is None or id(weight) in seen:
            continue
        if isinstance(weight, (PackedWeight, torch.Tensor)) and len(weight.shape) == 2:
            seen.add(id(weight))
            yield weight
