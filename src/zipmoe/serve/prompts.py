"""Messages or text → the tokens of a prompt; the answer's text → messages and tool calls.

Templates, tokens and the grammar of tool calls are the model's own, by transformers.
"""

from __future__ import annotations

import json
import uuid
from typing import TYPE_CHECKING, Any

import jinja2
from transformers.utils.chat_parsing import ResponseParser

from zipmoe.serve.errors import refused

if TYPE_CHECKING:
    from zipmoe.serve.schemas import ChatRequest, CompletionRequest

__all__ = ["Prompts", "ToolCalls"]


class Prompts:
    """Makes prompts for one tokenizer. vocabulary: tokens that there are."""

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary

    def chat(self, asked: ChatRequest) -> list[int]:
        """Tokens of a conversation, up to where the answer begins.

        Raises
        ------
        ServingError
            The model has no template, the template refuses, or it knows no tools.
        """
        template = self._tokenizer.chat_template
        if not template:
            raise refused("messages", "this model has no chat template; use /v1/completions")
        tools = _offered(asked)
        if tools and "tools" not in str(template):
            raise refused("tools", "this model's chat template knows no tools")
        try:
            encoded = self._tokenizer.apply_chat_template(
                [_message(message) for message in asked.messages],
                tools=tools,
                add_generation_prompt=True,
                return_dict=True,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise refused("messages", f"the model's chat template refuses: {error}") from error
        return list(encoded["input_ids"])

    def text(self, asked: CompletionRequest) -> list[int]:
        """Tokens of a text to continue.

        Raises
        ------
        ServingError
            Tokens that the model does not have, or a text that has none.
        """
        if isinstance(asked.prompt, str):
            tokens = list(self._tokenizer(asked.prompt)["input_ids"])
        else:
            tokens = asked.prompt
            if max(tokens) >= self._vocabulary:
                raise refused("prompt", f"the model has tokens 0 to {self._vocabulary - 1}")
        if not tokens:
            raise refused("prompt", "it has no tokens")
        return tokens

    def tool_calls(self, asked: ChatRequest, prompt: list[int]) -> ToolCalls | None:
        """Make the parser of an answer's tool calls, None where nothing has to be parsed."""
        tools, template = _offered(asked), getattr(self._tokenizer, "response_template", None)
        if not tools or template is None:
            return None
        prefix = self._tokenizer.decode(prompt)
        return ToolCalls(ResponseParser(template, prefix=prefix, tools=tools))


class ToolCalls:
    """Parts an answer's text, piece by piece, into what is said and what is called."""

    def __init__(self, parser: ResponseParser) -> None:
        self._parser = parser
        self.count = 0

    def take(self, piece: str) -> list[dict[str, Any]]:
        """Give the parts of OpenAI's message that this piece completes."""
        return self._parts(self._parser.feed(piece))

    def finish(self) -> list[dict[str, Any]]:
        """Give the parts that the end completes."""
        _, events = self._parser.finalize()
        return self._parts(events)

    def _parts(self, events: list[dict[str, Any]]) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = []
        for event in events:
            kind, name = event["type"], event.get("field")
            if kind == "region_chunk" and not event.get("dirty") and event.get("text"):
                if name in {"content", "reasoning_content"}:
                    parts.append({name: event["text"]})
            elif kind == "region_close" and name == "tool_calls":
                parts.append({"tool_calls": [self._call(event["value"]["function"])]})
        return parts

    def _call(self, function: dict[str, Any]) -> dict[str, Any]:
        arguments = function["arguments"]
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        call = {
            "index": self.count,
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": function["name"], "arguments": arguments},
        }
        self.count += 1
        return call


def _offered(asked: ChatRequest) -> list[dict[str, Any]] | None:
    """Tools that the model is told of.

    Raises
    ------
    ServingError
        A call is to be enforced.
    """
    if asked.tool_choice not in (None, "none", "auto"):  # no set: a model has no hash
        raise refused("tool_choice", "a call cannot be enforced; there are auto and none")
    if not asked.tools or asked.tool_choice == "none":
        return None
    return [tool.model_dump(exclude_none=True) for tool in asked.tools]


def _message(message: Any) -> dict[str, Any]:
    """One message as templates expect it: arguments of calls as values, not as JSON text."""
    role = "system" if message.role == "developer" else message.role
    found: dict[str, Any] = {"role": role, "content": message.text}
    if message.tool_calls:
        found["tool_calls"] = [
            {"id": call.id, "type": "function", "function": _called(call.function)}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    return found


def _called(function: Any) -> dict[str, Any]:
    try:
        arguments = json.loads(function.arguments)
    except ValueError as error:
        raise refused("messages", "the arguments of a tool call are not JSON") from error
    return {"name": function.name, "arguments": arguments}
