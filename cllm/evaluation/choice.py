"""Which window width and which fresh guesses are fastest on this device: what an iteration costs, and what it gains.

A wider window gains more tokens per forward (TPF) and costs more time, a cleverer guess likewise; where the best lies depends
on device, batch and model. Some guesses make iterations narrower where they know little, so whole texts are timed.
Many choices lie close together, so prompts are spent on those that are still in the race: after an eighth, a quarter and half
of them the slower half drops out (successive halving: Karnin, Koren and Somekh, ICML 2013, section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from transformers import PreTrainedModel

from cllm.decoding import GREEDY, JacobiDecoder, Sampling
from cllm.decoding.engine import Prompts
from cllm.errors import UsageError
from cllm.evaluation.method import Engine
from cllm.evaluation.speed import Run, budget, measure
from cllm.models import context_length

# What --guess auto chooses from. The last keeps all that an iteration refined, which on a CPU the three before it drop.
CANDIDATES = ("context", "prompt_lookup", "pool", "prompt_lookup+pool", "prompt_lookup+pool+context")
Pair = tuple[int, str]  # width and guess
LEAST = 3  # batches that there are
FINALISTS = 4  # choices that decode all batches, at least


@dataclass(frozen=True)
class Choice:
    """One width with one strategy for fresh guesses, at one batch size."""

    width: int
    guess: str
    batch_size: int
    seconds: float  # per iteration behind the prefill
    tokens_per_forward: float
    tokens_per_second: float  # prefill included
    batches: int  # that it decoded; fewer than others of its batch size did: it was too slow to go on


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
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[Choice]:
    """Every width with every guess at every batch size; at width 1 nothing is guessed, so the first stands for all.

    Those that stay in the race decode all prompts, which are taken again where a batch needs more, and three batches at least.
    The choices take turns, batch by batch, so that a machine that slows down slows all of them (on a GPU, those of one
    width). Raises UsageError for a width that the model cannot take, an unknown guess, and where there is nothing to measure.
    """
    if not prompts or not widths or not guesses or not batch_sizes:
        raise UsageError("measuring needs at least one prompt, one width, one guess and one batch size")
    context = context_length(model.config)
    if max_new_tokens < 2:
        raise UsageError(f"measuring needs at least two new tokens, got {max_new_tokens}")
    if budget(prompts, max_new_tokens, context) < 2:
        raise UsageError("the prompts leave no room in the model's context to measure in; take shorter ones")
    pairs = [(width, guess) for width in widths for guess in (guesses if width > 1 else guesses[:1])]

    def run(racing: Sequence[Pair], batches: Sequence[Prompts]) -> Iterator[list[Run]]:
        for together in _together(racing, model.device.type):
            methods = []
            for width, guess in together:
                decoder = JacobiDecoder(model, width, eos_token_ids=eos_ids, guess=guess, seed=seed)
                methods.append(Engine(decoder, f"{width} {guess}", guess, sampling))
            yield from measure(methods, batches, max_new_tokens, context=context, progress=progress).runs.values()

    races = ((size, _race(pairs, _batches(prompts, size), run)) for size in batch_sizes)
    return [_choice(*pair, size, runs) for size, race in races for pair, runs in race.items()]


def _race(
    pairs: Sequence[Pair], batches: Sequence[Prompts], run: Callable[[Sequence[Pair], Sequence[Prompts]], Iterable[list[Run]]]
) -> dict[Pair, list[Run]]:
    """What ``run`` made of each pair; the slower half drops out after an eighth, a quarter and half of the batches."""
    runs: dict[Pair, list[Run]] = {pair: [] for pair in pairs}
    racing, done = list(pairs), 0
    for end in sorted({len(batches) // share for share in (8, 4, 2, 1)} - {0}):
        if done:
            best = sorted(racing, key=lambda pair: _rate(runs[pair]), reverse=True)[: max(FINALISTS, -(-len(racing) // 2))]
            racing = [pair for pair in racing if pair in best]
        for pair, more in zip(racing, run(racing, batches[done:end]), strict=True):
            runs[pair] += more
        done = end
    return runs


def _together(pairs: Sequence[Pair], device: str) -> list[list[Pair]]:
    """Which pairs of width and guess take turns: on a GPU, where decoders keep buffers and captured steps, those of a width."""
    if device == "cpu":
        return [list(pairs)]
    return [list(group) for _, group in groupby(pairs, key=lambda pair: pair[0])]


def fastest(measured: Sequence[Choice], batch_size: int) -> Choice:
    """The choice with the most tokens per second at a batch size, of those that stayed in the race."""
    return max((m for m in measured if m.batch_size == batch_size), key=lambda m: (m.batches, m.tokens_per_second))


def _batches(prompts: Prompts, size: int) -> list[Prompts]:
    """All prompts in LEAST batches or more, which are full; the last are with prompts that were there before."""
    count = max(LEAST, -(-len(prompts) // size))
    return [[prompts[(at * size + row) % len(prompts)] for row in range(size)] for at in range(count)]


def _choice(width: int, guess: str, size: int, runs: Sequence[Run]) -> Choice:
    responses = [response for run in runs for response in run.responses]
    tokens, forwards = sum(len(r.token_ids) for r in responses), sum(r.forwards for r in responses)
    iterations = sum(max(r.forwards for r in run.responses) - 1 for run in runs)
    return Choice(
        width,
        guess,
        size,
        seconds=sum(run.seconds - run.prefill_seconds for run in runs) / max(iterations, 1),
        tokens_per_forward=tokens / forwards,
        tokens_per_second=_rate(runs),
        batches=len(runs),
    )


def _rate(runs: Sequence[Run]) -> float:
    """Tokens per second."""
    return sum(len(r.token_ids) for run in runs for r in run.responses) / sum(run.seconds for run in runs)
