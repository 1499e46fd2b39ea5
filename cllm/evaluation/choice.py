"""Which window width and which fresh guesses are fastest on this device: what an iteration costs, and what it gains.

A wider window gains more tokens per forward (TPF) and costs more time, a cleverer guess likewise; where the best lies depends
on device, batch and model. Gain and cost are measured apart, since the gain does not depend on the batch.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from cllm.decoding import GREEDY, JacobiDecoder, Sampling
from cllm.decoding.engine import Prompts
from cllm.errors import UsageError
from cllm.evaluation.speed import now

# What --guess auto chooses from. The last keeps all that an iteration refined, which on a CPU the three before it drop.
CANDIDATES = ("context", "prompt_lookup", "pool", "prompt_lookup+pool", "prompt_lookup+pool+context")
SKIPPED = 2  # iterations of a round that are not timed: the prefill, and the first of a new shape


@dataclass(frozen=True)
class Choice:
    """One width with one strategy for fresh guesses, at one batch size."""

    width: int
    guess: str
    batch_size: int
    seconds: float  # per iteration: the mean of a round (iterations can differ in width), the median of the rounds
    tokens_per_forward: float

    @property
    def tokens_per_second(self) -> float:
        return self.batch_size * self.tokens_per_forward / self.seconds


def measure_choices(
    model: PreTrainedModel,
    prompts: Prompts,
    widths: Sequence[int],
    guesses: Sequence[str],
    batch_sizes: Sequence[int],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
    sampling: Sampling = GREEDY,
    seed: int = 0,
    rounds: int = 3,
    iterations: int = 12,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[Choice]:
    """Every width with every guess at every batch size; at width 1 nothing is guessed, so the first stands for all.

    The choices take turns, round by round, so that a machine that slows down slows all of them. Raises UsageError for a
    width that the model cannot take, an unknown guess, and where there is nothing to measure.
    """
    if not prompts or not widths or not guesses or not batch_sizes:
        raise UsageError("measuring needs at least one prompt, one width, one guess and one batch size")
    pairs = [(width, guess) for width in widths for guess in (guesses if width > 1 else guesses[:1])]
    gains = {}
    for width, guess in progress(pairs):
        decoder = JacobiDecoder(model, width, eos_token_ids=eos_ids, guess=guess, seed=seed)
        results = decoder.generate(prompts, max_new_tokens=max_new_tokens, sampling=sampling)
        gains[width, guess] = sum(len(r.token_ids) for r in results) / sum(r.forwards for r in results)
    seconds: dict[tuple[int, int, str], list[float]] = {(size, *pair): [] for size in batch_sizes for pair in pairs}
    for at in progress(range(rounds)):
        for size, width, guess in seconds:
            batch = [prompts[(at + row) % len(prompts)] for row in range(size)]
            decoder = JacobiDecoder(model, width, guess=guess, seed=seed)  # never ends a text: a batch keeps its rows
            if times := list(_times(decoder, batch, sampling, SKIPPED + iterations)):
                seconds[size, width, guess].append(statistics.mean(times))
    return [Choice(w, g, size, statistics.median(means), gains[w, g]) for (size, w, g), means in seconds.items()]


def fastest(measured: Sequence[Choice], batch_size: int) -> Choice:
    """The choice with the most tokens per second at a batch size."""
    return max((m for m in measured if m.batch_size == batch_size), key=lambda m: m.tokens_per_second)


def _times(decoder: JacobiDecoder, batch: Prompts, sampling: Sampling, iterations: int) -> Iterator[float]:
    """Seconds of single iterations behind the first ones. Raises UsageError for prompts that leave no room for any."""
    device, before, budget = torch.device(decoder.device), 0.0, iterations * decoder.width
    for step, iteration in enumerate(decoder.iterate(batch, max_new_tokens=budget, sampling=sampling)):
        after = now(device)
        if step == iterations or iteration.running_B.sum() < len(batch):
            return
        if step >= SKIPPED:
            yield after - before
        before = now(device)
    if step < SKIPPED:
        raise UsageError("the prompts leave no room in the model's context to measure in; take shorter ones")
