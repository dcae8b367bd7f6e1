"""What is new of an answer → the documents and chunks of OpenAI's API. Pure functions of it.

Each class is one endpoint's way of saying the same.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from zipmoe.serve.answer import Delta, Request
    from zipmoe.serve.choose import Choice
    from zipmoe.serve.prompts import ToolCalls

__all__ = ["ChatWriter", "TextWriter", "usage"]


def usage(request: Request) -> dict[str, Any]:
    """Count a request's tokens."""
    prompt, answers = len(request.prompt), request.completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answers,
        "total_tokens": prompt + answers,
        "prompt_tokens_details": {"cached_tokens": request.cached_tokens},
    }


class _Writer:
    """What both endpoints share. spell: the text of a token."""

    kind = chunk_kind = ""

    def __init__(
        self, request: Request, model: str, spell: Callable[[int], str], *, is_shown: bool
    ) -> None:
        self.request, self._spell, self._is_shown = request, spell, is_shown
        self._head = {"id": request.id, "created": int(time.time()), "model": model}

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """Make one chunk of a stream."""
        return {**self._head, "object": self.chunk_kind, "choices": choices, **more}

    def usage_chunk(self) -> dict[str, Any]:
        """Give the last chunk of a stream whose request asks for it."""
        return self.chunk([], usage=usage(self.request))

    def _document(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = {**self._head, "object": self.kind}
        return {**head, "choices": choices, "usage": usage(self.request)}


class ChatWriter(_Writer):
    """/v1/chat/completions. calls: one parser for each answer where tools are offered."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(
        self,
        request: Request,
        model: str,
        spell: Callable[[int], str],
        *,
        is_shown: bool,
        calls: list[ToolCalls] | None = None,
    ) -> None:
        super().__init__(request, model, spell, is_shown=is_shown)
        self._calls = calls

    def opening(self, index: int) -> dict[str, Any]:
        """Give the chunk that begins an answer."""
        delta = {"role": "assistant", "content": ""}
        return self.chunk([{"index": index, "delta": delta, "finish_reason": None}])

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """Give the chunks of what is new."""
        parts = self._parts(delta)
        shown = self._logprobs(delta.choices)
        if shown is not None and not parts and delta.choices:
            parts = [{}]
        choices: list[dict[str, Any]] = [
            {"index": delta.index, "delta": part, "finish_reason": None} for part in parts
        ]
        if shown is not None and choices:
            choices[0]["logprobs"] = shown
        if delta.finish is not None:
            last = {"index": delta.index, "delta": {}, "finish_reason": self._finish(delta)}
            choices.append(last)
        return [self.chunk([choice]) for choice in choices]

    def document(self, deltas: Iterable[Delta]) -> dict[str, Any]:
        """Give the whole response."""
        found: dict[int, dict[str, Any]] = {}
        for delta in deltas:
            choice = found.setdefault(delta.index, self._empty(delta.index))
            message = choice["message"]
            for part in self._parts(delta):
                for key, value in part.items():
                    if key == "tool_calls":
                        calls = [{k: v for k, v in call.items() if k != "index"} for call in value]
                        message.setdefault(key, []).extend(calls)
                    else:
                        message[key] = (message.get(key) or "") + value
            if choice["logprobs"] is not None:
                choice["logprobs"]["content"] += [self._entry(c) for c in delta.choices]
            if delta.finish is not None:
                choice["finish_reason"] = self._finish(delta)
                if message["content"] is None and "tool_calls" not in message:
                    message["content"] = ""
        return self._document([found[index] for index in sorted(found)])

    def _empty(self, index: int) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": None},
            "logprobs": {"content": []} if self._is_shown else None,
            "finish_reason": None,
        }

    def _parts(self, delta: Delta) -> list[dict[str, Any]]:
        if self._calls is None:
            return [{"content": delta.text}] if delta.text else []
        calls = self._calls[delta.index]
        parts = calls.take(delta.text) if delta.text else []
        return parts + calls.finish() if delta.finish is not None else parts

    def _finish(self, delta: Delta) -> str | None:
        called = self._calls is not None and self._calls[delta.index].count
        return "tool_calls" if called and delta.finish == "stop" else delta.finish

    def _logprobs(self, choices: Iterable[Choice]) -> dict[str, Any] | None:
        if not self._is_shown:
            return None
        return {"content": [self._entry(choice) for choice in choices]}

    def _entry(self, choice: Choice) -> dict[str, Any]:
        top = [self._token(token, logprob) for token, logprob in choice.top]
        return {**self._token(choice.token, choice.logprob or 0.0), "top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._spell(token)
        # A token may be a part of a character; its bytes are not known then.
        known = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": known}


class TextWriter(_Writer):
    """/v1/completions, with the log-probabilities of that older endpoint."""

    kind = chunk_kind = "text_completion"

    def __init__(
        self, request: Request, model: str, spell: Callable[[int], str], *, is_shown: bool
    ) -> None:
        super().__init__(request, model, spell, is_shown=is_shown)
        self._lengths: dict[int, int] = {}

    def opening(self, _: int) -> None:
        """Do nothing: nothing begins an answer here."""

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """Give the chunks of what is new."""
        choice = {
            "index": delta.index,
            "text": delta.text,
            "logprobs": self._logprobs(delta.index, delta.choices),
            "finish_reason": delta.finish,
        }
        return [self.chunk([choice])]

    def document(self, deltas: Iterable[Delta]) -> dict[str, Any]:
        """Give the whole response."""
        found: dict[int, dict[str, Any]] = {}
        for delta in deltas:
            (new,) = self.chunks(delta)[0]["choices"]
            choice = found.setdefault(delta.index, {**new, "text": ""})
            choice["text"] += new["text"]
            choice["finish_reason"] = new["finish_reason"]
            if choice["logprobs"] is not None and choice["logprobs"] is not new["logprobs"]:
                for key, values in new["logprobs"].items():
                    choice["logprobs"][key] += values
        return self._document([found[index] for index in sorted(found)])

    def _logprobs(self, index: int, choices: Iterable[Choice]) -> dict[str, Any] | None:
        if not self._is_shown:
            return None
        tokens, values, top, offsets = [], [], [], []
        for choice in choices:
            text = self._spell(choice.token)
            tokens.append(text)
            values.append(choice.logprob)
            top.append({self._spell(token): logprob for token, logprob in choice.top})
            offsets.append(self._lengths.get(index, 0))
            self._lengths[index] = offsets[-1] + len(text)
        return {
            "tokens": tokens,
            "token_logprobs": values,
            "top_logprobs": top,
            "text_offset": offsets,
        }
