"""What an answer must look like → which tokens may come next. llguidance does the work."""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any

import llguidance
import numpy as np
import torch
from llguidance.hf import from_tokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from zipmoe.serve.errors import refused

if TYPE_CHECKING:
    from torch import Tensor

    from zipmoe.serve.schemas import ResponseFormat

__all__ = ["Constraints", "Grammar"]


class Grammar:
    """Where one answer stands in what it must look like."""

    def __init__(self, matcher: llguidance.LLMatcher, vocabulary: int) -> None:
        self._matcher = matcher
        self._bits = allocate_token_bitmask(1, vocabulary)

    @property
    def is_complete(self) -> bool:
        """Tell whether nothing may follow but the end."""
        return bool(self._matcher.is_stopped())

    def allowed(self, vocabulary: int) -> Tensor:
        """Which of the tokens may come next, bool [vocabulary]."""
        fill_next_token_bitmask(self._matcher, self._bits)
        bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[:vocabulary]
        return torch.from_numpy(bits.astype(bool))

    def take(self, token: int) -> None:
        """Go on by a token that was allowed."""
        if not self._matcher.consume_token(token):
            raise RuntimeError(f"the grammar does not take its own token: {self._error()}")

    def _error(self) -> str:
        return str(self._matcher.get_error())


class Constraints:
    """Makes grammars for one tokenizer. vocabulary: how many logits there are."""

    def __init__(self, tokenizer: Any, vocabulary: int, ends: frozenset[int]) -> None:
        self._tokenizer, self._vocabulary, self._ends = tokenizer, vocabulary, sorted(ends)

    @functools.cached_property
    def _tokens(self) -> llguidance.LLTokenizer:
        # Takes a second for a large vocabulary, so only when somebody asks.
        if not getattr(self._tokenizer, "is_fast", False):
            raise refused("response_format", "this model's tokenizer cannot be constrained")
        return from_tokenizer(self._tokenizer, n_vocab=self._vocabulary, eos_token=self._ends)

    def grammar(self, wanted: ResponseFormat | None) -> Grammar | None:
        """Make the grammar of an answer, None for plain text.

        Raises
        ------
        ServingError
            The schema is none, or asks for what the library does not know.
        """
        if wanted is None or wanted.type == "text":
            return None
        schema = wanted.json_schema.schema_ if wanted.json_schema else {"type": "object"}
        text = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
        matcher = llguidance.LLMatcher(self._tokens, text, log_level=0)
        if matcher.is_error():
            raise refused("response_format", str(matcher.get_error()).splitlines()[0])
        return Grammar(matcher, self._vocabulary)
