"""A prompt → an answer, streamed, with what it took.

An ordinary `model.generate` of transformers does the work; this adds the text as it comes, a way
to stop, and the measurements that the commands print.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from tokenizers.decoders import DecodeStream
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from zipmoe import budget
from zipmoe._errors import ZipmoeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from zipmoe.model import Loaded

__all__ = ["GenerateResult", "generate"]

DEFAULT_TOKENS = 256
_COUNTED = (
    "hits",
    "misses",
    "bytes_read",
    "full_hits",
    "sign_mantissa_hits",
    "exponent_hits",
    "ahead_reads",
    "ahead_used",
    "ahead_wasted",
)


@dataclass(frozen=True)
class GenerateResult:
    """An answer and what it took.

    `ttft_s`: seconds from the call to the first token. `tpot_s`: mean seconds of each token after
    it; 0 if there is none. `memory_bytes` is what was promised, `peak_rss_bytes` the most that
    this process ever had. `cache` counts experts asked for and found in memory (hits, `full_hits`
    of them decoded) or not (misses, of which `sign_mantissa_hits` and `exponent_hits` had one
    plane there), bytes read from the store, and experts that lookahead read (`ahead_reads`), of
    which `ahead_used` were then asked for and `ahead_wasted` were dropped before. `lossy`: None, or
    how the weights differ from the published ones.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    ttft_s: float
    tpot_s: float
    memory_bytes: int
    peak_rss_bytes: int
    cache: dict[str, int]
    engaged: dict[str, str]
    hit_rate: float
    bytes_per_token: float
    wait_s: float
    is_cold: bool
    lossy: dict[str, Any] | None

    def as_dict(self) -> dict[str, Any]:
        """Give all fields for --json."""
        return asdict(self)


def generate(
    loaded: Loaded,
    prompt: str | list[dict[str, str]],
    *,
    max_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    on_text: Callable[[str], object] | None = None,
    stop: Callable[[], object] | None = None,
) -> GenerateResult:
    """Answer a prompt, or the last of a list of messages.

    Parameters
    ----------
    loaded : from `zipmoe.load`.
    prompt : text, or messages with "role" and "content". Text becomes the message of a user if
    the tokenizer has
        a chat template, and is continued as it stands if not.
    max_tokens : most tokens of the answer. None: 256, or what the context of `loaded` has room for.
    temperature : 0 takes the likeliest token every time; above 0 draws, with `seed`.
    on_text : called with each piece of text as it is known.
    stop : asked after every token; a true answer ends the generation.

    Raises
    ------
    ZipmoeError
        No tokenizer, or no chat template for messages.
    BudgetError
        Prompt and answer could be longer than the context that memory was set aside for.
    FetchError, CorruptError
        An expert could not be read. The model can be used again afterwards.
    """
    if (max_tokens is not None and max_tokens < 1) or temperature < 0:
        raise ValueError("max_tokens must be at least 1 and temperature not negative")
    started = time.perf_counter()
    inputs = _encode(loaded, prompt)
    prompt_tokens = inputs["input_ids"].shape[1]
    if max_tokens is None:
        max_tokens = max(1, min(DEFAULT_TOKENS, loaded.context - prompt_tokens))
    if prompt_tokens + max_tokens > loaded.context:
        raise loaded.runtime.refusal(prompt_tokens + max_tokens)
    before = loaded.runtime.cache.counters()
    stream = _Stream(loaded.tokenizer, on_text, loaded.runtime.cache.counters)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loaded.model.generate(
            **inputs,
            max_new_tokens=max_tokens,
            streamer=stream,
            stopping_criteria=StoppingCriteriaList([_Stop(stop)] if stop else []),
            **_sampling(loaded, temperature),
        )
    return _result(loaded, stream, before, prompt_tokens, started)


def _result(
    loaded: Loaded, stream: _Stream, before: dict[str, int], prompt_tokens: int, started: float
) -> GenerateResult:
    text = stream.finish()
    after = loaded.runtime.cache.counters()
    times, decoded = stream.times, max(len(stream.times) - 1, 1)
    since = {name: after[name] - stream.at_first.get(name, after[name]) for name in after}
    visits = since["hits"] + since["misses"]
    return GenerateResult(
        text=text,
        token_ids=stream.ids,
        prompt_tokens=prompt_tokens,
        ttft_s=times[0] - started if times else 0.0,
        tpot_s=(times[-1] - times[0]) / decoded if times else 0.0,
        memory_bytes=loaded.memory.promised,
        peak_rss_bytes=budget.peak_rss_bytes(),
        cache={name: after[name] - before[name] for name in _COUNTED},
        engaged=loaded.runtime.engaged(),
        hit_rate=(since["hits"] - since["ahead_used"]) / visits if visits else 0.0,
        bytes_per_token=since["bytes_read"] / decoded,
        wait_s=since["wait_ns"] / 1e9 / decoded,
        is_cold=not before["hits"] + before["misses"],
        lossy=loaded.runtime.lossy.brief() if loaded.runtime.lossy else None,
    )


def _encode(loaded: Loaded, prompt: str | list[dict[str, str]]) -> dict[str, Tensor]:
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise ZipmoeError("the checkpoint has no tokenizer: use the model's own generate with ids")
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    elif isinstance(prompt, str):
        encoded = tokenizer(prompt, return_tensors="pt")
    else:
        raise ZipmoeError("the tokenizer has no chat template: give the prompt as plain text")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def _sampling(loaded: Loaded, temperature: float) -> dict[str, Any]:
    pad = loaded.tokenizer.pad_token_id
    options: dict[str, Any] = {"pad_token_id": 0 if pad is None else pad, "num_beams": 1}
    if temperature > 0:
        return {**options, "do_sample": True, "temperature": temperature}
    # What a generation config says of drawing does not apply, and would be warned about.
    return {**options, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}


class _Stop(StoppingCriteria):
    """Asks whoever wants the answer whether they still do."""

    def __init__(self, stop: Callable[[], object]) -> None:
        self._stop = stop

    def __call__(self, input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), bool(self._stop()), device=input_ids.device)


@dataclass
class _Stream(BaseStreamer):
    """Takes tokens from transformers, gives text to the caller, notes the times.

    At the first token it notes the counters too: what comes after it is decoding.
    """

    tokenizer: Any
    on_text: Callable[[str], object] | None
    counters: Callable[[], dict[str, int]]
    at_first: dict[str, int] = field(default_factory=dict)
    ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    _told: str = ""
    _prompt_seen: bool = False

    def __post_init__(self) -> None:
        self._decode = DecodeStream(skip_special_tokens=True)
        self._backend = getattr(self.tokenizer, "backend_tokenizer", None)

    def put(self, value: Tensor) -> None:
        """Take the prompt (once), then token after token."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for token in value.reshape(-1).tolist():
            self.ids.append(token)
            self.times.append(time.perf_counter())
            self.at_first = self.at_first or self.counters()
            self._tell(self._piece(token))

    def end(self) -> None:
        """Do nothing: `finish` does, also where transformers stops in the middle."""

    def finish(self) -> str:
        """Give the whole text, and tell what of it is not told yet (half a character, say)."""
        text = str(self.tokenizer.decode(self.ids, skip_special_tokens=True))
        if text.startswith(self._told):
            self._tell(text[len(self._told) :])
        return text

    def _piece(self, token: int) -> str:
        if self._backend is not None:
            return self._decode.step(self._backend, token) or ""
        text = str(self.tokenizer.decode(self.ids, skip_special_tokens=True))
        return "" if text.endswith("\ufffd") else text[len(self._told) :]

    def _tell(self, piece: str) -> None:
        if piece and self.on_text is not None:
            self.on_text(piece)
        self._told += piece
