"""Metrics for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from cllm.serving.server.protocol import Usage
from cllm.serving.server.worker import Worker

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """The metrics of one server. Tokens per forward is ``generated_tokens`` divided by ``forwards``."""

    def __init__(self, worker: Worker) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = self._counter("requests", "Requests answered", "path", "status")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts")
        self.cached_tokens = self._counter("cached_prompt_tokens", "Tokens of prompts whose keys and values were cached")
        self.generated_tokens = self._counter("generated_tokens", "Tokens generated, including those of cancelled answers")
        self.forwards = self._counter("forwards", "Forward passes, counted once for each row in them")
        self.fast_forwarded = self._counter("fast_forwarded_tokens", "Tokens gained beyond one per forward pass")
        self.cancelled = self._counter("cancelled", "Answers that were not completed, for any reason")
        self.seconds = self._histogram("request_seconds", "Seconds from the request to the end of its answer")
        self.first_seconds = self._histogram("first_text_seconds", "Seconds from the request to the first text")
        self._gauge("rows_running", "Responses in the batch", lambda: worker.running)
        self._gauge("requests_waiting", "Responses waiting to join the batch", lambda: worker.waiting)
        prefixes = "Keys and values kept for later prompts"
        self._gauge("prefix_cache_bytes", prefixes, lambda: worker.queue.decoder.prefixes.bytes)
        self._gauge("prefix_cache_budget_bytes", f"{prefixes}, at most", lambda: worker.queue.decoder.prefixes.budget)

    def count(self, usage: Usage) -> None:
        """Add the cost of an answer."""
        self.prompt_tokens.inc(usage.prompt_tokens)
        self.cached_tokens.inc(usage.cached_tokens)
        self.generated_tokens.inc(usage.completion_tokens)
        self.forwards.inc(usage.forwards)
        self.fast_forwarded.inc(usage.fast_forwarded)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, explain: str, *labels: str) -> Counter:
        return Counter(f"cllm_{name}", explain, labels, registry=self.registry)

    def _gauge(self, name: str, explain: str, value: Callable[[], float]) -> None:
        Gauge(f"cllm_{name}", explain, registry=self.registry).set_function(value)

    def _histogram(self, name: str, explain: str) -> Histogram:
        return Histogram(f"cllm_{name}", explain, buckets=SECONDS, registry=self.registry)
