"""What the server counts, for Prometheus, for its page, and for one sentence to a person.

Names follow vLLM's habits where it has the same thing. The counters of cache and engine are read
when somebody asks.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from zipmoe import budget
from zipmoe.schedule import Tier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from zipmoe._quantizer import Runtime
    from zipmoe.serve.answer import Answer, Request

__all__ = ["Metrics"]

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_LONG = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150, 600)
_SIZES = (1, 2, 4, 8, 16, 32)
# Counters of the expert cache and the names they go by here; times are in nanoseconds there.
_CACHE = {
    "hits": ("expert_hits", "Experts asked for and found in memory."),
    "misses": ("expert_misses", "Experts asked for that had to be read."),
    "bytes_read": ("bytes_read", "Bytes read from the store."),
    "evictions": ("expert_evictions", "Experts that went to make room."),
    "read_errors": ("read_errors", "Reads that failed, those cured by a retry too."),
    "ahead_reads": ("lookahead_reads", "Experts read before they were asked for."),
    "ahead_used": ("lookahead_useful", "Of these, experts that were then asked for."),
    "ahead_wasted": ("lookahead_wasted", "Of these, experts dropped before anybody asked."),
}
_TIMES = {
    "wait_ns": ("disk_wait_seconds", "Time that computing waited for reads."),
    "decode_ns": ("weight_decode_seconds", "Time spent decoding weights apart from multiplying."),
}


class Metrics:
    """Counts of one server. `load`: answers waiting and running, and tokens of KV cache."""

    def __init__(self, runtime: Runtime, model: str) -> None:
        self._runtime = runtime
        self.load: Callable[[], dict[str, int]] = dict
        self._registry = CollectorRegistry()
        self._labels = {"model_name": model}
        names, values = list(self._labels), list(self._labels.values())

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            found = Histogram(
                f"zipmoe:{name}", text, names, buckets=buckets, registry=self._registry
            )
            return found.labels(*values)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"zipmoe:{name}", text, names, registry=self._registry).labels(*values)

        self._first = histogram("time_to_first_token_seconds", "From request to token.", _LONG)
        self._between = histogram("inter_token_latency_seconds", "From token to token.", _SHORT)
        self._queued = histogram("request_queue_time_seconds", "From request to prompt.", _LONG)
        self._whole = histogram("e2e_request_latency_seconds", "From request to end.", _LONG)
        self._batch = histogram("step_batch_size", "Answers of one step.", _SIZES)
        self._step = histogram("step_seconds", "One token of all running answers.", _SHORT)
        self._prefill = histogram("request_prefill_time_seconds", "Reading a prompt.", _LONG)
        self._prompt = counter("prompt_tokens", "Tokens of prompts that were computed.")
        self._reused = counter("prefix_cache_hit_tokens", "Tokens of prompts found in the cache.")
        self._written = counter("generation_tokens", "Tokens of answers.")
        self._ended = Counter(
            "zipmoe:request_success",
            "Requests by how they ended.",
            [*names, "finished_reason"],
            registry=self._registry,
        )
        self._registry.register(self)
        self._seconds_of_requests, self._requests = 0.0, 0
        self.tokens = 0  # of answers
        self.busy_seconds = 0.0  # of reading prompts and of steps

    # -- told by the scheduler -------------------------------------------------------------------

    def admitted(self, request: Request) -> None:
        """Count a request's time in the queue."""
        if request.queued_s is None:  # of its first answer
            request.queued_s = time.monotonic() - request.arrived
            self._queued.observe(request.queued_s)

    def prompt_read(self, request: Request, computed: int, seconds: float) -> None:
        """Count the tokens of a prompt, and the time that they took."""
        self._prefill.observe(seconds)
        self.busy_seconds += seconds
        self._prompt.inc(computed)
        self._reused.inc(len(request.prompt) - computed)

    def stepped(self, batch: int, seconds: float) -> None:
        """Count a step."""
        self._batch.observe(batch)
        self._step.observe(seconds)
        self.busy_seconds += seconds

    def token(self, answer: Answer, now: float) -> None:
        """Count a token of an answer, just chosen."""
        self._written.inc()
        self.tokens += 1
        request = answer.request
        if len(answer.tokens) > 1:
            self._between.observe(now - answer.last_at)
        elif request.first_token_s is None:
            request.first_token_s = now - request.arrived
            self._first.observe(request.first_token_s)

    def ended(self, request: Request, reason: str) -> None:
        """Count a request that is over."""
        seconds = time.monotonic() - request.arrived
        self._whole.observe(seconds)
        self._ended.labels(*self._labels.values(), reason).inc()
        self._seconds_of_requests += seconds
        self._requests += 1

    def mean_seconds(self) -> float:
        """Mean time of a request so far."""
        return self._seconds_of_requests / self._requests if self._requests else 1.0

    # -- read by whoever asks --------------------------------------------------------------------

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)

    def counters(self) -> dict[str, int]:
        """Counters of the cache and the engine's busy_ns, since the start."""
        engine = self._runtime.source.engine
        busy = {} if engine is None else {"busy_ns": engine.counters()["busy_ns"]}
        return {**self._runtime.cache.counters(), **busy}

    def held(self) -> dict[Tier, int]:
        """Experts by what of them is in memory, or on its way there."""
        return dict(zip(Tier, self._runtime.cache.held, strict=True))

    def collect(self) -> Iterator[Any]:
        """Give Prometheus what is read at the moment it asks."""
        counters = self.counters()
        for key, (name, text) in _CACHE.items():
            if key in counters:
                yield self._counter(name, text, counters[key])
        asked, held = asked_by_tier(counters), self.held()
        yield self._counter("experts_asked", "Experts asked for, by what of them was there.", asked)
        yield self._gauge("experts_held", "Experts by what of them is in memory.", held)
        for key, (name, text) in _TIMES.items():
            yield self._counter(name, text, counters[key] / 1e9)
        busy = counters.get("busy_ns", 0)
        multiply = max(0, busy - counters["wait_ns"] - counters["decode_ns"])
        yield self._counter("multiply_seconds", "Time in products and attention.", multiply / 1e9)
        load = self.load()
        used = load["kv_used"] / load["kv_total"] if load["kv_total"] else 0.0
        report = self._runtime.report
        yield self._gauge("num_requests_waiting", "Answers that wait.", load["waiting"])
        yield self._gauge("num_requests_running", "Answers being written.", load["running"])
        yield self._gauge("kv_cache_usage_perc", "Part of the KV memory set aside, 0 to 1.", used)
        yield self._gauge("memory_promised_bytes", "What --memory grants.", report.promised)
        yield self._gauge("memory_resident_bytes", "What the process has.", budget.rss_bytes())
        yield self._gauge("memory_peak_bytes", "The most it had.", budget.peak_rss_bytes())

    def _counter(self, name: str, text: str, value: float | Mapping[Tier, int]) -> Any:
        return self._family(CounterMetricFamily, name, text, value)

    def _gauge(self, name: str, text: str, value: float | Mapping[Tier, int]) -> Any:
        return self._family(GaugeMetricFamily, name, text, value)

    def _family(self, kind: Any, name: str, text: str, value: float | Mapping[Tier, int]) -> Any:
        """Make a metric of one sample, or of one for each tier."""
        names, values = list(self._labels), list(self._labels.values())
        if isinstance(value, (int, float)):
            family = kind(f"zipmoe:{name}", text, labels=names)
            family.add_metric(values, value)
            return family
        family = kind(f"zipmoe:{name}", text, labels=[*names, "tier"])
        for tier, count in value.items():
            family.add_metric([*values, tier.value], count)
        return family


def asked_by_tier(counters: Mapping[str, int]) -> dict[Tier, int]:
    """Say of the experts asked for what of them was in memory, by the cache's counters."""
    full, first, second = (
        counters[f"{name}_hits"] for name in ("full", "sign_mantissa", "exponent")
    )
    whole, absent = counters["hits"] - full, counters["misses"] - first - second
    return dict(zip(Tier, (full, whole, first, second, absent), strict=True))
