"""Which window width is fastest on this device: what an iteration costs, and what it gains.

A wider window gains more tokens per forward (TPF) and costs more time; where the best lies depends on the device, the batch
and the model. Cost and gain are measured apart, since the gain does not depend on the batch.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from cllm.decoding import JacobiDecoder
from cllm.decoding.engine import Prompts
from cllm.errors import UsageError
from cllm.evaluation.speed import now

SKIPPED = 2  # iterations of a round that are not timed: the prefill, and the first of a new shape


@dataclass(frozen=True)
class Width:
    """One width at one batch size."""

    width: int
    batch_size: int
    seconds: float  # per iteration, the median
    tokens_per_forward: float

    @property
    def tokens_per_second(self) -> float:
        return self.batch_size * self.tokens_per_forward / self.seconds


def measure_widths(
    model: PreTrainedModel,
    prompts: Prompts,
    widths: Sequence[int],
    batch_sizes: Sequence[int],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
    seed: int = 0,
    rounds: int = 3,
    iterations: int = 12,
) -> list[Width]:
    """Every width at every batch size.

    The widths take turns, round by round, so that a machine that slows down slows all of them. Raises UsageError for a
    width that the model cannot take, and where there is nothing to measure.
    """
    if not prompts or not widths or not batch_sizes:
        raise UsageError("measuring widths needs at least one prompt, one width and one batch size")
    gains = {}
    for width in widths:
        results = JacobiDecoder(model, width, eos_token_ids=eos_ids, seed=seed).generate(
            prompts, max_new_tokens=max_new_tokens
        )
        gains[width] = sum(len(r.token_ids) for r in results) / sum(r.forwards for r in results)
    seconds: dict[tuple[int, int], list[float]] = {(b, w): [] for b in batch_sizes for w in widths}
    for at in range(rounds):
        for batch_size, width in seconds:
            batch = [prompts[(at + row) % len(prompts)] for row in range(batch_size)]
            decoder = JacobiDecoder(model, width, seed=seed)  # never ends a text: a batch keeps its rows
            seconds[batch_size, width] += _times(decoder, batch, SKIPPED + iterations)
    return [Width(w, b, statistics.median(times), gains[w]) for (b, w), times in seconds.items()]


def fastest(measured: Sequence[Width], batch_size: int) -> Width:
    """The width with the most tokens per second at a batch size."""
    return max((m for m in measured if m.batch_size == batch_size), key=lambda m: m.tokens_per_second)


def _times(decoder: JacobiDecoder, batch: Prompts, iterations: int) -> Iterator[float]:
    """Seconds of single iterations behind the first ones. Raises UsageError for prompts that leave no room for any."""
    device, before, budget = torch.device(decoder.device), 0.0, iterations * decoder.width
    for step, iteration in enumerate(decoder.iterate(batch, max_new_tokens=budget)):
        after = now(device)
        if step == iterations or iteration.running_B.sum() < len(batch):
            return
        if step >= SKIPPED:
            yield after - before
        before = now(device)
    if step < SKIPPED:
        raise UsageError("the prompts leave no room in the model's context to measure in; take shorter ones")
