"""What Prometheus is told."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from cllm.serving.server.protocol import Usage
from cllm.serving.server.worker import Worker

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counters of one server; tokens per forward is the quotient of two of them."""

    def __init__(self, worker: Worker) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = self._counter("requests", "Requests answered", "path", "status")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts")
        self.cached_tokens = self._counter("cached_prompt_tokens", "Tokens of prompts whose keys and values were there")
        self.generated_tokens = self._counter("generated_tokens", "Tokens generated, those of cancelled answers included")
        self.forwards = self._counter("forwards", "Forward passes, counted for each row that took part")
        self.fast_forwarded = self._counter("fast_forwarded_tokens", "Tokens gained beyond one per forward pass")
        self.cancelled = self._counter("cancelled", "Answers that were not completed, for whatever reason")
        self.seconds = self._histogram("request_seconds", "From the request to the end of its answer")
        self.first_seconds = self._histogram("first_text_seconds", "From the request to the first text")
        self._gauge("rows_running", "Responses in the batch").set_function(lambda: worker.running)
        self._gauge("requests_waiting", "Responses that wait for a place in the batch").set_function(lambda: worker.waiting)
        kept = self._gauge("prefix_cache_bytes", "Keys and values that are kept for prompts to come")
        kept.set_function(lambda: worker.queue.decoder.prefixes.bytes)
        budget = self._gauge("prefix_cache_budget_bytes", "How many may be kept")
        budget.set_function(lambda: worker.queue.decoder.prefixes.budget)

    def count(self, usage: Usage) -> None:
        """Add what an answer cost."""
        self.prompt_tokens.inc(usage.prompt_tokens)
        self.cached_tokens.inc(usage.cached_tokens)
        self.generated_tokens.inc(usage.completion_tokens)
        self.forwards.inc(usage.forwards)
        self.fast_forwarded.inc(usage.fast_forwarded)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, explain: str, *labels: str) -> Counter:
        return Counter(f"cllm_{name}", explain, labels, registry=self.registry)

    def _gauge(self, name: str, explain: str) -> Gauge:
        return Gauge(f"cllm_{name}", explain, registry=self.registry)

    def _histogram(self, name: str, explain: str) -> Histogram:
        return Histogram(f"cllm_{name}", explain, buckets=SECONDS, registry=self.registry)
