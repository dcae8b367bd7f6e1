"""How transformers loads a store: a quantizer class for `quant_method: "zipmoe"`.

transformers calls the hooks below while it loads; everything else of the loading is its own. The
experts' parameters are replaced before weights are looked for; the dense weights are handed over
as a file in memory. docs/decisions/0008-loading-through-transformers.md says why.
"""

from __future__ import annotations

import contextlib
import re
import weakref
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from zipmoe import _core, attention, budget, footprint, hardware, kv, packed, tiers
from zipmoe._errors import MismatchError, ZipmoeError
from zipmoe._renaming import DTYPES, dense_tensors, renamed
from zipmoe.dense import PADDING, DenseFile
from zipmoe.experts import (
    IMPLEMENTATION,
    ExpertLayer,
    ExpertSource,
    bind,
    experts_forward,
    needs_whole,
    runs_in_one_call,
)
from zipmoe.gated import replace_gated
from zipmoe.layers import replace_blocks
from zipmoe.norm import replace_norms
from zipmoe.packed import PackedDense
from zipmoe.recording import announce_request
from zipmoe.store import open_store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from zipmoe._native_block import NativeBlock

__all__ = ["METHOD", "LoadOptions", "Runtime", "ZipmoeConfig", "ZipmoeQuantizer", "loading"]

METHOD = "zipmoe"
COMPUTES = ("native", "torch")
DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class LoadOptions:
    """What the user may choose when a store is loaded.

    memory: bytes for the whole process, None for what is available less a reserve. context: most
    tokens of prompt and answer together, None for 4096 or the model's own maximum if that is
    less. policy: which expert goes when a slot is needed, "" for the default. tiers: see
    `zipmoe.tiers`, None for all compressed.
    """

    memory: int | None = None
    context: int | None = None
    compute: str = "native"
    policy: str = ""
    tiers: tiers.Amounts | None = None

    def __post_init__(self) -> None:
        if self.compute not in COMPUTES:
            raise ValueError(f"unknown compute {self.compute!r}; there is {', '.join(COMPUTES)}")
        if self.context is not None and self.context < 1:
            raise ValueError(f"the context must be at least 1 token, not {self.context}")


# Carries the options of `zipmoe.load` through from_pretrained, which has no argument for them.
_OPTIONS: ContextVar[LoadOptions] = ContextVar("zipmoe_load_options")


@contextlib.contextmanager
def loading(options: LoadOptions) -> Iterator[None]:
    """Load stores with these options inside the block (in this thread or task)."""
    token = _OPTIONS.set(options)
    try:
        yield
    finally:
        _OPTIONS.reset(token)


@register_quantization_config(METHOD)
class ZipmoeConfig(QuantizationConfigMixin):
    """What the store's config.json says; it only names the method."""

    def __init__(self, format_version: str = "", **_: Any) -> None:
        self.quant_method = METHOD
        self.format_version = format_version


class Runtime:
    """What a loaded model owns besides its weights: the expert cache, and the account of memory."""

    def __init__(
        self, source: ExpertSource, report: budget.MemoryReport, context: int, store: Any
    ) -> None:
        self.source, self.report, self.context = source, report, context
        self.folder, self.codec = str(store.path), dict(store.manifest.codec)
        self.dense = PackedDense()
        self.blocks: list[NativeBlock] = []  # what runs in one call each
        self.in_parts: list[str] = []  # classes of attentions and MoE blocks that do not
        self.compute = "torch" if source.engine is None else "native"

    @property
    def cache(self) -> Any:
        """The expert cache (`zipmoe._core.ExpertCache`)."""
        return self.source.cache

    def engaged(self) -> dict[str, str]:
        """Say what is at work: compute, codec, instruction set, reader, experts in each tier.

        in_parts: attention and MoE blocks that run natively, but not in one call each. fell_back:
        what was left to torch.
        """
        cache, engine = self.cache, self.source.engine
        return {
            "compute": self.compute,
            "codec": self.codec["experts"],
            "isa": cache.isa if engine is None else engine.isa,
            "reader": cache.reader,
            "tiers": tiers.described(cache.tiers),
            "in_parts": ", ".join(self.in_parts) or "nothing",
            "fell_back": ", ".join(self._fell_back()) or "nothing",
        }

    def _fell_back(self) -> list[str]:
        """Name what native compute left to torch, where its guarantee may not hold."""
        if self.source.engine is None:
            return []
        gates = [kind.__name__ for kind, gate in self.source.gates.items() if gate is None]
        attentions = [f"attention ({reason})" for reason in attention.FALLBACKS.reasons()]
        return sorted(gates) + sorted(attentions) + self.dense.decoded

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a model loaded by zipmoe cannot be pickled or saved; "
            "`zipmoe unpack` restores the checkpoint"
        )

    def close(self) -> None:
        """Free the cache's threads, files and memory. Idempotent; the model cannot run then."""
        for block in self.blocks:
            block.close()
        self.source.cache.close()
        self.dense.close()


@register_quantizer(METHOD)
class ZipmoeQuantizer(HfQuantizer):
    """The hooks that transformers calls while it loads a store."""

    requires_calibration = False

    def __init__(self, quantization_config: ZipmoeConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise ValueError(
                "this is not a zipmoe store: pack the checkpoint first (`zipmoe pack`)"
            )
        self.options = _OPTIONS.get(LoadOptions())
        self.base_bytes = budget.base_bytes(budget.rss_bytes())
        self._tiers: tuple[int, int, int, int] | None = None

    # -- before the weight files are looked for ------------------------------------------------

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Refuse other devices, and make the experts function known."""
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        if any(str(place) not in {"None", "cpu"} for place in places):
            raise ValueError(f"zipmoe runs on the CPU only; device_map is {device_map!r}")
        # Not at import: transformers.integrations may still be loading while this class is
        # registered.
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # noqa: PLC0415

        if IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
            ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
        attention.register()

    def update_attn_implementation(self, config: Any) -> Any:
        """Name a file that exists: else transformers looks for model.safetensors and fails."""
        config.transformers_weights = "dense-00001.safetensors"
        return config

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        """Keep what the config or the caller says; a store's U8 tensors say nothing."""
        return dtype if dtype is not None and dtype.is_floating_point else torch.bfloat16

    # -- the skeleton is there, weights are not --------------------------------------------------

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, dtype: Any = None, **_: Any
    ) -> None:
        if not checkpoint_files:
            raise ZipmoeError("a zipmoe store is loaded from its folder; give its path")
        model.eval()
        with open_store(Path(checkpoint_files[0]).parent) as store:
            source = self._bind(model, store)
            dense = self._bind_dense(model, store, dtype)
            tensors, transient = dense_tensors(model, store)
            self._paths, self._table = store.expert_table()
            context = self._context(model)
            needs = self._needs(model, source, context, dtype=dtype, loading=transient)
            needs = replace(needs, dense=needs.dense + dense.nbytes)
            memory = self.options.memory or budget.available_memory().budget
            report = budget.plan(needs, memory)
            if self.options.tiers is not None:
                self._tiers = tiers.counts(self.options.tiers, self._table, report)
            self._dense = DenseFile(tensors, store.read_dense)
            dense.load(store, source.engine)
        weakref.finalize(self, self._dense.close)
        checkpoint_files[:] = [self._dense.path]
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*ignored, f"^{re.escape(PADDING)}"}
        self._runtime = Runtime(source, report, context, store)
        self._runtime.dense = dense

    def _bind_dense(self, model: Any, store: Any, dtype: Any) -> PackedDense:
        """Put packed weights in the place of parameters that are BF16 and a tensor as it stands."""
        if self.options.compute == "torch":
            return PackedDense()
        wider = [part.strip("*.") for part in model._get_dtype_plan(dtype)]
        may = {name for name in packed.candidates(model) if not any(part in name for part in wider)}
        return packed.bind(
            model,
            {
                target: tensor
                for tensor, target, pattern in renamed(model, store)
                if pattern is None and target in may and tensor.dtype == "BF16"
            },
        )

    def _bind(self, model: nn.Module, store: Any) -> ExpertSource:
        layers = expert_layers(store)
        source = ExpertSource(_NotYet(), layers)
        if self.options.compute == "native":
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

    def _context(self, model: Any) -> int:
        config = model.config.get_text_config(decoder=True)
        most = getattr(config, "max_position_embeddings", None) or DEFAULT_CONTEXT
        return self.options.context or min(most, DEFAULT_CONTEXT)

    def _needs(
        self, model: Any, source: ExpertSource, context: int, *, dtype: Any, loading: int
    ) -> budget.Needs:
        layers = source.layers
        element = (dtype or torch.bfloat16).itemsize
        shape = footprint.activations(
            model,
            expert_width=max(sum(rows for rows, _ in layer.shapes[:-1]) for layer in layers),
            element_bytes=element,
            whole_experts=any(needs_whole(module) for module in model.modules()),
            one_call=all(runs_in_one_call(module) for module in model.modules()),
        )
        floor, everything = tiers.cache_bytes(self._table, self.options.tiers)
        return budget.Needs(
            base=self.base_bytes,
            dense=footprint.dense_bytes(model, model._get_dtype_plan(dtype)),
            kv=footprint.kv_bytes(model, context),
            scratch=ExpertSource.buffer_bytes(layers)
            + footprint.forward_bytes(model, shape, context),
            cache_floor=floor,
            cache_all=everything,
            loading=loading,
        )

    # -- weights are there ------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        _refuse_missing(model)
        _forget_quantised(model)
        tensors = [*model.parameters(), *model.buffers()]
        self._dense.release_all_but((t.data_ptr(), t.numel() * t.element_size()) for t in tensors)
        self._dense.close()
        del model.config.transformers_weights
        runtime = self._runtime
        if runtime.compute == "native":
            packed.multiply_alone(model)
            model.set_attn_implementation(attention.IMPLEMENTATION)
            replace_norms(model)
            replace_gated(model)
            runtime.blocks, left = replace_blocks(model)
            runtime.in_parts = sorted({type(module).__name__ for module in left})
            kv.attach(model)
        runtime.source.cache = _core.ExpertCache(
            self._paths,
            self._table,
            capacity_bytes=runtime.report.cache,
            policy=self.options.policy,
            tiers=self._tiers,
            **self._reading(),
        )
        model.zipmoe = runtime
        model.register_forward_pre_hook(announce_request, with_kwargs=True)
        weakref.finalize(model, runtime.close)
        return model

    def _reading(self) -> dict[str, Any]:
        """Say how the store's drive is read fastest, if that has been measured."""
        drive = hardware.known_drive(Path(self._runtime.folder))
        if drive is None:
            return {}
        return {
            "reader": drive.reader,
            "request_bytes": drive.request_bytes,
            "depth": drive.depth,
        }

    def is_serializable(self) -> bool:
        """Never: save_pretrained would write no experts. `zipmoe unpack` restores them."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Never: the experts have no gradients."""
        return False


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
        if hasattr(module, "has_gate") and module.config._experts_implementation != IMPLEMENTATION:  # type: ignore[union-attr]
            raise MismatchError(f"transformers does not let {name} use zipmoe's experts function")


def _forget_quantised(model: Any) -> None:
    """Take back the mark by which jamba computes another way: its weights are what they were."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and "_is_quantized" in vars(config):
            del config._is_quantized


def _refuse_missing(model: Any) -> None:
    """Raise if a weight was not in the store: transformers has filled it with random numbers."""
    tied = set(model.all_tied_weights_keys)
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    missing = [
        name
        for name, parameter in model.named_parameters()
        if not getattr(parameter, "_is_hf_initialized", False)
        and name not in tied
        and not any(pattern.search(name) for pattern in ignored)
    ]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise MismatchError(f"the store has no weights for {missing[0]}{more}")
