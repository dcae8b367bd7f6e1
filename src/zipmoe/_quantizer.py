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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from zipmoe import _core, attention, budget, hardware, kv, packed, tiers
from zipmoe._errors import BudgetError, MismatchError, ZipmoeError
from zipmoe._skeleton import Skeleton, bind_skeleton
from zipmoe.decoder import replace_blocks
from zipmoe.dense import PADDING, DenseFile
from zipmoe.experts import IMPLEMENTATION, experts_forward
from zipmoe.gated import replace_gated
from zipmoe.lending import Lending
from zipmoe.norm import replace_norms
from zipmoe.pressure import Watch
from zipmoe.recording import pass_shape
from zipmoe.store import open_store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zipmoe._native_block import NativeBlock

__all__ = [
    "METHOD",
    "LoadOptions",
    "Runtime",
    "ZipmoeConfig",
    "ZipmoeQuantizer",
    "loading",
    "make_known",
]

METHOD = "zipmoe"
COMPUTES = ("native", "torch")


@dataclass(frozen=True)
class LoadOptions:
    """What the user may choose when a store is loaded.

    memory: bytes for the whole process, None for what is available less a reserve. context: most
    tokens of prompt and answer together, None for 4096 or the model's own maximum if that is
    less. batch: sequences that run together, each as long as that. conversations: how many of that
    length are held side by side (`zipmoe.streams`), 0 for one that is not. streams: how many
    answers are written while a prompt is read. policy: which expert goes when a slot is needed, ""
    for the default. lookahead: whether layers ask the next one's router what it will want. tiers:
    see `zipmoe.tiers`, None for all compressed.
    """

    memory: int | None = None
    context: int | None = None
    conversations: int = 0
    streams: int = 0
    compute: str = "native"
    policy: str = ""
    batch: int = 1
    lookahead: bool = True
    tiers: tiers.Amounts | None = None

    def __post_init__(self) -> None:
        if self.compute not in COMPUTES:
            raise ValueError(f"unknown compute {self.compute!r}; there is {', '.join(COMPUTES)}")
        if self.context is not None and self.context < 1:
            raise ValueError(f"the context must be at least 1 token, not {self.context}")
        if self.batch < 1:
            raise ValueError(f"a batch has at least 1 sequence, not {self.batch}")


_TOKENS_FOR_ALL = 2  # for each expert: with two choices each, one expert in fifty is not wanted

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
    """What the store's config.json says: the method, and of a lossy store what it has lost."""

    def __init__(
        self, format_version: str = "", lossy: dict[str, Any] | None = None, **_: Any
    ) -> None:
        self.quant_method = METHOD
        self.format_version = format_version
        self.lossy = lossy


class Runtime:
    """What a loaded model owns besides its weights: the expert cache, and the account of memory."""

    def __init__(self, skeleton: Skeleton, report: budget.MemoryReport, store: Any) -> None:
        self.source, self.dense, self.report = skeleton.source, skeleton.dense, report
        self.context, self.sizes = skeleton.context, skeleton.sizes
        self._needs, self._demand = skeleton.needs, skeleton.demand
        self.folder, self.codec = str(store.path), dict(store.manifest.codec)
        self.identity, self.lossy = store.manifest.identity, store.manifest.lossy
        self.blocks: list[NativeBlock] = []  # what runs in one call each
        self.in_parts: list[str] = []  # classes of attentions and MoE blocks that do not
        self.lookahead = False
        self.watch: Watch | None = None
        self.lending: Lending | None = None
        self.compute = "torch" if self.source.engine is None else "native"
        # A pass without a past begins a request that runs alone. Whoever runs several together sets
        # this to False, and tells the cache of each (`cache.begin_request(share)`).
        self.announces_requests = True

    def admit(self, tokens: int, sequences: int = 1) -> None:
        """Raise BudgetError for sequences that need more memory than was set aside for them.

        `tokens`: of each, prompt and answer together.
        """
        if not budget.has_room(self.report, self._demand, tokens, sequences):
            raise self.refusal(tokens, sequences)

    def look_ahead(self, tokens: int) -> None:
        """Begin to read all experts of the first layer, if a pass of so many tokens wants them.

        It does not know yet which: embeddings and attention come first. Of many tokens, each of
        which goes to several experts, hardly any expert is left out.
        """
        experts = self.source.layers[0].experts
        if self.lookahead and tokens >= _TOKENS_FOR_ALL * experts:
            self.cache.look_ahead(0, range(experts))

    def refusal(self, tokens: int, sequences: int = 1) -> BudgetError:
        """Say what sequences would need that are longer, or more, than was planned for."""
        return budget.no_room(
            self._needs, self.report, self._demand, tokens=tokens, sequences=sequences
        )

    def stream_bytes(self, tokens: int) -> int:
        """Count what a stream (`zipmoe.streams`) of so many tokens has set aside of `report.kv`."""
        return self._demand.kv_bytes(kv.room(tokens))

    @property
    def cache(self) -> Any:
        """The expert cache (`zipmoe._core.ExpertCache`)."""
        return self.source.cache

    def engaged(self) -> dict[str, str]:
        """Say what is at work: compute, codec, instruction set, reader, experts in each tier.

        in_parts: attention and MoE blocks that run natively, but not in one call each. fell_back:
        what was left to torch. watches, gave_back: what may take memory from the cache, and did.
        on_drive: dense weights of which rows are read as they are needed.
        lent: memory that the cache has beyond its share, because nothing else needs it now.
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
            "watches": self.watch.watches if self.watch else "nothing",
            "gave_back": self.watch.gave_back() if self.watch else "nothing",
            "on_drive": ", ".join(sorted(self.dense.rows_only)) or "nothing",
            "lent": budget.format_bytes(self.lending.lent if self.lending else 0),
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
        if self.watch is not None:
            self.watch.close()
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
        make_known()

    def update_attn_implementation(self, config: Any) -> Any:
        """Name a file that exists: else transformers looks for model.safetensors and fails."""
        config.transformers_weights = "dense-00001.safetensors"
        return config

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        """Keep what the config or the caller says; a store's U8 tensors say nothing."""
        return dtype if dtype is not None and dtype.is_floating_point else torch.bfloat16

    # -- the skeleton is there, weights are not --------------------------------------------------

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        if not checkpoint_files:
            raise ZipmoeError("a zipmoe store is loaded from its folder; give its path")
        model.eval()
        with open_store(Path(checkpoint_files[0]).parent) as store:
            skeleton = bind_skeleton(model, store, self.options, self.base_bytes)
            memory = self.options.memory or budget.available_memory().budget
            report = budget.plan(skeleton.needs, memory)
            if self.options.tiers is not None:
                self._tiers = tiers.counts(self.options.tiers, skeleton.table, report)
            if report.dense > skeleton.needs.dense:  # every expert has its place: there is room
                skeleton.dense.rows_only.clear()
            self._dense = DenseFile(skeleton.tensors, store.read_dense)
            skeleton.dense.load(store, skeleton.source.engine)
            self._runtime, self._skeleton = Runtime(skeleton, report, store), skeleton
        weakref.finalize(self, self._dense.close)
        checkpoint_files[:] = [self._dense.path]
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*ignored, f"^{re.escape(PADDING)}"}

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
            runtime.blocks, left = replace_blocks(model, lookahead=self.options.lookahead)
            runtime.in_parts = sorted({type(module).__name__ for module in left})
            kv.attach(model)
        report, needs = runtime.report, self._skeleton.needs
        capacity = report.cache
        if self._tiers is None:  # what is split stays as it is
            capacity = max(capacity, min(needs.cache_all, report.promised - report.dense))
        cache = runtime.source.cache = _core.ExpertCache(
            self._skeleton.paths,
            self._skeleton.table,
            capacity_bytes=capacity,
            limit_bytes=report.cache,
            policy=self.options.policy,
            tiers=self._tiers,
            **self._reading(),
        )
        runtime.lookahead = self.options.lookahead
        runtime.lending = Lending(cache, capacity, report, self._skeleton.demand)
        runtime.watch = Watch(runtime.lending, report, needs.cache_floor).start()
        model.zipmoe = runtime
        model.register_forward_pre_hook(_before_pass, with_kwargs=True)
        model.register_forward_hook(_after_pass, with_kwargs=True, always_call=True)
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


def make_known() -> None:
    """Register what models call by name: the experts function and attention."""
    # Not at import: transformers.integrations may still be loading while our class is registered.
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # noqa: PLC0415

    if IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
    attention.register()


# Functions, not methods: a copy of a model, which is refused, would begin with its hooks.
def _before_pass(model: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
    """Refuse a pass that its memory was not counted for, make room, and say if a request begins.

    Whoever runs several sequences together admits them, and tells the cache of each
    (`Runtime.announces_requests`).
    """
    runtime, (sequences, tokens) = model.zipmoe, pass_shape(args, inputs)
    past = inputs.get("past_key_values")
    known = 0 if past is None else past.get_seq_length()
    if runtime.announces_requests:
        runtime.admit(known + tokens, sequences)
    runtime.lending.begin(tokens, known, sequences)
    if runtime.announces_requests and known == 0:
        runtime.cache.begin_request()
    runtime.look_ahead(sequences * tokens)


def _after_pass(model: Any, *_: Any, **__: Any) -> None:
    model.zipmoe.lending.end()


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
