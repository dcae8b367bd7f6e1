"""A loaded model at the service of requests: what they ask for → work for the scheduler."""

from __future__ import annotations

import secrets
import time
import uuid
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from zipmoe._errors import ZipmoeError
from zipmoe.serve.answer import Answer, Delta, Request
from zipmoe.serve.choose import Chooser, Sampling
from zipmoe.serve.constrain import Constraints
from zipmoe.serve.documents import ChatWriter, TextWriter
from zipmoe.serve.errors import no_model, refused, too_long
from zipmoe.serve.metrics import Metrics
from zipmoe.serve.pieces import Pieces
from zipmoe.serve.popularity import Popularity
from zipmoe.serve.prompts import Prompts
from zipmoe.serve.room import KvRoom
from zipmoe.serve.scheduler import Scheduler
from zipmoe.serve.schemas import ChatRequest, CompletionRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from zipmoe.model import Loaded
    from zipmoe.serve.limits import Limits
    from zipmoe.serve.scheduler import Streams

__all__ = ["Service"]

_PROBE_TOKENS = 4


class Service:
    """One model that is served under a name.

    loaded: with memory for conversations. It has computed a token when it is made. Close it, or
    threads stay.

    Raises
    ------
    ZipmoeError
        The checkpoint has no tokenizer.
    FetchError, CorruptError
        The store cannot be read.
    """

    def __init__(self, loaded: Loaded, streams: Streams, name: str, limits: Limits) -> None:
        if loaded.tokenizer is None:
            raise ZipmoeError("the checkpoint has no tokenizer: it cannot be served")
        self.loaded, self.name, self.limits = loaded, name, limits
        self.created = int(time.time())
        self.metrics = Metrics(loaded.runtime, name)
        self._tokenizer = loaded.tokenizer
        self._vocabulary = loaded.model.config.get_text_config(decoder=True).vocab_size
        self._ends = _ends(loaded)
        self._prompts = Prompts(loaded.tokenizer, self._vocabulary)
        self._constraints = Constraints(loaded.tokenizer, self._vocabulary, self._ends)
        probe = list(range(min(_PROBE_TOKENS, self._vocabulary)))
        first = streams.open()
        streams.prefill(first, probe)
        streams.close(first)
        engine = loaded.runtime.source.engine
        self.popularity = Popularity(loaded.runtime.source)
        self.scheduler = Scheduler(
            streams,
            room=KvRoom(streams, loaded.memory.kv, loaded.runtime.stream_bytes),
            limits=limits,
            metrics=self.metrics,
            probe=probe,
            popularity=self.popularity,
            urgent=nullcontext if engine is None else engine.urgent,
        )
        self.metrics.load = self.scheduler.load

    def close(self) -> None:
        """End what is left, and the threads."""
        self.scheduler.close()
        self.popularity.close()

    def request(
        self, asked: ChatRequest | CompletionRequest, sink: Callable[[Delta], object]
    ) -> tuple[Request, ChatWriter | TextWriter]:
        """Make the work that a request asks for, and what writes its responses.

        Raises
        ------
        ServingError
            It cannot be honoured.
        """
        if asked.model != self.name:
            raise no_model(asked.model, self.name)
        if (asked.n or 1) > self.limits.choices:
            raise refused("n", f"at most {self.limits.choices} answers are given at once")
        if isinstance(asked, ChatRequest):
            prompt = self._prompts.chat(asked)
            made = [self._prompts.tool_calls(asked, prompt) for _ in range(asked.n or 1)]
            kind, calls = "chatcmpl", [call for call in made if call is not None] or None
        else:
            kind, prompt, calls = "cmpl", self._prompts.text(asked), None
        request = Request(
            id=f"{kind}-{uuid.uuid4().hex}",
            prompt=prompt,
            sink=sink,
            deadline=time.monotonic() + self.limits.seconds,
        )
        longest, shown = self._longest(asked, len(prompt)), asked.shown_logprobs
        request.answers += [
            Answer(
                request,
                index,
                max_tokens=longest,
                ends=self._ends,
                chooser=chooser,
                # The marks of a tool call are special tokens.
                pieces=Pieces(self._tokenizer, keeps_special=calls is not None),
                stops=asked.stops,
            )
            for index, chooser in enumerate(self._choosers(asked))
        ]
        if isinstance(asked, ChatRequest):
            return request, ChatWriter(
                request, self.name, self._spell, is_shown=shown is not None, calls=calls
            )
        return request, TextWriter(request, self.name, self._spell, is_shown=shown is not None)

    def _longest(self, asked: ChatRequest | CompletionRequest, prompt: int) -> int:
        """Most tokens of the answer; refuses what can never be."""
        room, wanted = self.loaded.context - prompt, asked.answer_tokens
        field = "messages" if isinstance(asked, ChatRequest) else "prompt"
        longest = wanted or max(1, min(room, self.limits.answer_tokens))
        if longest > room:
            param = field if room < 1 else "max_tokens"
            raise too_long(param, prompt, longest, f"the context is {self.loaded.context}")
        if not self.scheduler.fits(prompt, longest):
            raise too_long(field, prompt, longest, "more than the memory for KV caches holds")
        return longest

    def _choosers(self, asked: ChatRequest | CompletionRequest) -> list[Chooser]:
        bias = {int(token): value for token, value in (asked.logit_bias or {}).items()}
        if bias and max(bias) >= self._vocabulary:
            raise refused("logit_bias", f"the model has tokens 0 to {self._vocabulary - 1}")
        sampling = Sampling(
            temperature=_or(asked.temperature, 1.0),
            top_p=_or(asked.top_p, 1.0),
            top_k=_or(asked.top_k, 0),
            min_p=_or(asked.min_p, 0.0),
            seed=secrets.randbits(63) if asked.seed is None else asked.seed,
            frequency_penalty=_or(asked.frequency_penalty, 0.0),
            presence_penalty=_or(asked.presence_penalty, 0.0),
            logit_bias=bias,
        )
        form = asked.response_format if isinstance(asked, ChatRequest) else None
        if form is not None and form.type != "text" and getattr(asked, "tools", None):
            raise refused("response_format", "it cannot be combined with tools")
        return [
            Chooser(
                sampling,
                index=index,
                shown=asked.shown_logprobs,
                grammar=self._constraints.grammar(form),
            )
            for index in range(asked.n or 1)
        ]

    def _spell(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _ends(loaded: Loaded) -> frozenset[int]:
    """Tokens that end an answer, by the generation config and the tokenizer."""
    said = loaded.model.generation_config.eos_token_id
    ends = {said} if isinstance(said, int) else set(said or ())
    if loaded.tokenizer.eos_token_id is not None:
        ends.add(loaded.tokenizer.eos_token_id)
    return frozenset(ends)
