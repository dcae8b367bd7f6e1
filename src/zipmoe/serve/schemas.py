"""The requests and responses of OpenAI's API, as far as they are honoured.

A field that is not here is refused by its name: no field silently does nothing. `_NEUTRAL` names
fields that some clients always send, with the value that asks for nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "Chat",
    "ChatRequest",
    "Completion",
    "CompletionRequest",
    "ErrorBody",
    "Health",
    "Model",
    "Models",
    "ResponseFormat",
    "Tool",
]

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "function_call": (None,),
    "functions": (None,),
    "metadata": (None,),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None,),
    "user": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
}

Probability = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Token = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
StopText = Annotated[str, Field(min_length=1, max_length=200)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Function(_Strict):
    """A function that the model may call."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class Tool(_Strict):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class JsonSchema(_Strict):
    """The schema of an answer."""

    name: str
    description: None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(_Strict):
    """What an answer must be: text, a JSON object, or JSON after a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to type json_schema, and only there")
        return self


class StreamOptions(_Strict):
    """How an answer is streamed."""

    include_usage: bool | None = None


class CalledFunction(_Strict):
    """A call in an earlier answer."""

    name: str
    arguments: str


class ToolCall(_Strict):
    """A tool call in an earlier answer."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: None = None

    @model_validator(mode="after")
    def _complete(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content is missing")
        if self.tool_calls is not None and self.role != "assistant":
            raise ValueError("only messages of the assistant have tool_calls")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("tool_call_id belongs to messages of a tool, and only there")
        return self

    @property
    def text(self) -> str | None:
        """The content as one text."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content


class _Sampled(_Strict):
    """What both kinds of requests have."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Probability | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[Token, Annotated[float, Field(ge=-100, le=100)]] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {
            name: value
            for name, value in given.items()
            if not any(_same(value, none) for none in _NEUTRAL.get(name, ()))
        }

    @model_validator(mode="after")
    def _options_of_streams(self) -> _Sampled:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only a streamed answer has them")
        return self

    @property
    def stops(self) -> list[str]:
        """Texts that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


def _same(value: Any, neutral: Any) -> bool:
    return type(value) is type(neutral) and bool(value == neutral)


class NamedFunction(_Strict):
    """The name of a function."""

    name: str


class NamedTool(_Strict):
    """A tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class ChatRequest(_Sampled):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None

    @model_validator(mode="after")
    def _one_of_each(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_tokens or max_completion_tokens, not both")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs")
        return self

    @property
    def answer_tokens(self) -> int | None:
        """Most tokens of an answer, if the request says so."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def shown_logprobs(self) -> int | None:
        """How many alternatives of each token are to be shown; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Sampled):
    """POST /v1/completions."""

    prompt: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def answer_tokens(self) -> int | None:
        """Most tokens of an answer, if the request says so."""
        return self.max_tokens

    @property
    def shown_logprobs(self) -> int | None:
        """How many alternatives of each token are to be shown; None: no log-probabilities."""
        return self.logprobs


# ---- what comes back


class ErrorDetail(BaseModel):
    """Why a request was not answered."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every response that is not 200."""

    error: ErrorDetail


class Model(BaseModel):
    """A model that is served. max_model_len: most tokens of prompt and answer together.

    lossy: null where every bit of the weights is the published one.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "zipmoe"
    max_model_len: int
    lossy: dict[str, Any] | None = None


class Models(BaseModel):
    """GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """GET /health. Status 200 with `ok`, else 503."""

    status: Literal["ok", "unreadable", "stopping", "broken"]
    reason: str | None = None


class Usage(BaseModel):
    """Tokens of a request; `cached_tokens` of the prompt were in the KV cache already."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class _Answered(BaseModel):
    id: str
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: Usage | None = None


class Chat(_Answered):
    """A complete chat answer."""

    object: Literal["chat.completion"] = "chat.completion"


class Completion(_Answered):
    """A complete continuation of a text."""

    object: Literal["text_completion"] = "text_completion"
