"""What is in a routing trace: sizes, popularity, and after how long experts are used again."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from zipmoe.routing import by_held_out_prompts, in_hindsight, recency_ranks

if TYPE_CHECKING:
    from zipmoe.routing import Trace

__all__ = ["TraceSummary", "summarize"]

SHARES = (0.1, 0.25, 0.5)
_SEED = 0  # of the parting of requests into known and unknown ones


@dataclass(frozen=True)
class TraceSummary:
    """What `zipmoe trace show` says.

    Shares of the activations that go to the top tenth, quarter and half of a layer's experts:
    ranked by their popularity in the whole trace (`over_all`), by that in half of the requests for
    the other half (`on_other_requests`, None for a single request), by each request's own
    (`in_hindsight`), and by who was used last (`by_recency`), which is what LRU would hit.
    """

    layers: int
    experts: int
    top_k: int
    requests: int
    steps: int
    prompt_tokens: int
    decode_tokens: int
    distinct: float  # experts of a layer in the decoded tokens of a request
    over_all: tuple[float, ...]
    on_other_requests: tuple[float, ...] | None
    in_hindsight: tuple[float, ...]
    by_recency: tuple[float, ...]
    # Other experts of the layer that were used since: a tenth, half, nine tenths of all uses are
    # after at most so many.
    reuse_distance: tuple[int, ...]

    def as_dict(self) -> dict[str, Any]:
        """Give all fields for --json."""
        return asdict(self) | {"shares": SHARES}


def summarize(trace: Trace) -> TraceSummary:
    """Describe a trace.

    Raises
    ------
    TraceError
        It has no decode step.
    """
    reused = recency_ranks(trace).sum(axis=(0, 1))
    counts = trace.counts()
    decode = int(trace.tokens[trace.is_decode].sum())
    popular = -np.sort(-counts.sum(axis=0), axis=1)
    held_out = None
    if len(counts) > 1:
        known, unknown = (part.counts() for part in trace.split(0.5, _SEED))
        popularity = by_held_out_prompts(known, unknown, trace.top_k)
        held_out = tuple(popularity.top_share(share) for share in SHARES)
    reached = np.cumsum(reused) / reused.sum()
    return TraceSummary(
        layers=trace.num_layers,
        experts=trace.num_experts,
        top_k=trace.top_k,
        requests=len(counts),
        steps=len(np.unique(trace.step)),
        prompt_tokens=int(trace.tokens.sum()) - decode,
        decode_tokens=decode,
        distinct=float((counts > 0).sum(axis=2).mean()),
        over_all=_shares(popular.sum(axis=0)),
        on_other_requests=held_out,
        in_hindsight=tuple(in_hindsight(counts, trace.top_k).top_share(s) for s in SHARES),
        by_recency=_shares(reused),
        reuse_distance=tuple(int(np.searchsorted(reached, part)) for part in (0.1, 0.5, 0.9)),
    )


def _shares(ranked: np.ndarray[Any, Any]) -> tuple[float, ...]:
    return tuple(float(ranked[: round(s * len(ranked))].sum() / ranked.sum()) for s in SHARES)
