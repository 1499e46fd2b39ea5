"""Which window, draft and fresh guesses are fastest on this device: what an iteration costs, and what it gains.

A wider window gains more tokens per forward (TPF) and costs more time, more draft tokens and a cleverer guess likewise; where
the best lies depends on device, batch and model. Some guesses make iterations narrower where they know little, so whole texts
are timed. Many choices lie close together, so prompts are spent on those that are still in the race: after an eighth, a quarter
and half of them the slower half drops out (successive halving: Karnin, Koren and Somekh, ICML 2013, section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from cllm.adapter import attached
from cllm.decoding import GREEDY, JacobiDecoder, Sampling
from cllm.decoding.engine import Prompts
from cllm.errors import UsageError
from cllm.evaluation.method import Engine
from cllm.evaluation.speed import Progress, Run, budget, measure
from cllm.models import DEFAULT_GUESS, TRAINED_GUESS, context_length

# What --guess auto chooses from. The last keeps all that an iteration refined, which on a CPU the three before it drop.
CANDIDATES = ("context", "prompt_lookup", "pool", "prompt_lookup+pool", "prompt_lookup+pool+context")
LEAST = 3  # batches at least
FINALISTS = 3  # choices that decode all batches at least


def lossless_candidates(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Fresh guesses to try for a model with a consistency adapter: those it was trained with, alone and after prompt lookup."""
    start = str(record.get(TRAINED_GUESS) or DEFAULT_GUESS)
    return start, f"prompt_lookup+{start}"


class Setting(NamedTuple):
    """The settings of a decoder."""

    width: int
    drafts: int  # draft tokens of a consistency adapter
    guess: str

    def __str__(self) -> str:
        return f"{self.width} {self.drafts} {self.guess}"


@dataclass(frozen=True)
class Choice:
    """A width with a number of draft tokens and a strategy for fresh guesses, at one batch size."""

    width: int
    drafts: int
    guess: str
    batch_size: int
    seconds: float  # per iteration after the prefill
    tokens_per_forward: float
    tokens_per_second: float  # prefill included
    batches: int  # that it decoded; fewer than others of its batch size where it was too slow to stay in the race


def measure_choices(
    model: PreTrainedModel,
    prompts: Prompts,
    widths: Sequence[int],
    guesses: Sequence[str],
    batch_sizes: Sequence[int],
    *,
    max_new_tokens: int,
    drafts: Sequence[int] = (),
    eos_ids: Sequence[int] = (),
    sampling: Sampling = GREEDY,
    seed: int = 0,
    progress: Progress = iter,
) -> list[Choice]:
    """Every width with every guess at every batch size; at width 1 nothing is guessed, so the first guess stands for all.

    A model with a consistency adapter is measured with those of the ``drafts`` that are no fewer than a width's guesses, or
    with as many where all are fewer; without ``drafts``, with twice as many, so that a window that is accepted whole leaves
    guesses for the next one.

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
    settings = list(_settings(model, widths, drafts, guesses))

    def run(racing: Sequence[Setting], batches: Sequence[Prompts]) -> Iterator[list[Run]]:
        for together in _together(racing, model.device.type):
            methods = []
            for setting in together:
                width, count, guess = setting
                decoder = JacobiDecoder(
                    model, width, eos_token_ids=eos_ids, guess=guess, drafts=count, seed=seed, prefix_cache=0
                )  # prompts come again, and their prefill must go on counting
                methods.append(Engine(decoder, str(setting), guess, sampling))
            yield from measure(methods, batches, max_new_tokens, context=context, progress=progress).runs.values()

    races = ((size, _race(settings, _batches(prompts, size), run)) for size in batch_sizes)
    return [_choice(setting, size, runs) for size, race in races for setting, runs in race.items()]


def _settings(model: PreTrainedModel, widths: Sequence[int], drafts: Sequence[int], guesses: Sequence[str]) -> Iterator[Setting]:
    for width in widths:
        if width == 1:
            yield Setting(1, 0, guesses[0])
            continue
        if attached(model) is None:
            counts = [0]
        elif drafts:
            counts = [count for count in drafts if count >= width - 1] or [width - 1]
        else:
            counts = [2 * width - 2]
        yield from (Setting(width, count, guess) for count in counts for guess in guesses)


def _race(
    settings: Sequence[Setting],
    batches: Sequence[Prompts],
    run: Callable[[Sequence[Setting], Sequence[Prompts]], Iterable[list[Run]]],
) -> dict[Setting, list[Run]]:
    """What ``run`` made of each setting; the slower half drops out after an eighth, a quarter and half of the batches."""
    runs: dict[Setting, list[Run]] = {setting: [] for setting in settings}
    racing, done = list(settings), 0
    for end in sorted({len(batches) // share for share in (8, 4, 2, 1)} - {0}):
        if done:
            left = max(FINALISTS, -(-len(racing) // 2))
            best = sorted(racing, key=lambda setting: _rate(runs[setting]), reverse=True)[:left]
            racing = [setting for setting in racing if setting in best]
        for setting, more in zip(racing, run(racing, batches[done:end]), strict=True):
            runs[setting] += more
        done = end
    return runs


def _together(settings: Sequence[Setting], device: str) -> list[list[Setting]]:
    """Which settings take turns: on a GPU, where decoders keep buffers and captured steps, those of a width."""
    if device == "cpu":
        return [list(settings)]
    return [list(group) for _, group in groupby(settings, key=lambda setting: setting.width)]


def fastest(measured: Sequence[Choice], batch_size: int) -> Choice:
    """The choice with the most tokens per second at a batch size, of those that stayed in the race."""
    return max((m for m in measured if m.batch_size == batch_size), key=lambda m: (m.batches, m.tokens_per_second))


def _batches(prompts: Prompts, size: int) -> list[Prompts]:
    """All prompts in LEAST full batches or more; the last ones repeat earlier prompts."""
    count = max(LEAST, -(-len(prompts) // size))
    return [[prompts[(at * size + row) % len(prompts)] for row in range(size)] for at in range(count)]


def _choice(setting: Setting, size: int, runs: Sequence[Run]) -> Choice:
    responses = [response for run in runs for response in run.responses]
    tokens, forwards = sum(len(r.token_ids) for r in responses), sum(r.forwards for r in responses)
    return Choice(
        *setting,
        size,
        seconds=iteration_seconds(runs),
        tokens_per_forward=tokens / forwards,
        tokens_per_second=_rate(runs),
        batches=len(runs),
    )


def iteration_seconds(runs: Sequence[Run]) -> float:
    """Seconds of an iteration after the prefill."""
    iterations = sum(max(r.forwards for r in run.responses) - 1 for run in runs)
    return sum(run.seconds - run.prefill_seconds for run in runs) / max(iterations, 1)


def _rate(runs: Sequence[Run]) -> float:
    """Tokens per second."""
    return sum(len(r.token_ids) for run in runs for r in run.responses) / sum(run.seconds for run in runs)
