"""Is the text still good? Every figure of speed needs this beside it, since a model that repeats itself is fast.

Shapes: N tokens of a response, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributions import Categorical
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cllm.evaluation.interval import Interval, mean_interval, ratio_interval
from cllm.evaluation.table import format_table, percent_with_interval, with_interval
from cllm.modes import evaluating
from cllm.tasks.base import Example, Task
from cllm.trajectory.hygiene import repetition

CHUNK = 128  # positions whose logits are turned to float32 at a time


@dataclass(frozen=True)
class Quality:
    """How good a set of responses is. Shares are 0 .. 1, intervals 95%; None for what was not asked for."""

    responses: int
    score: float | None  # the task's own metric
    score_interval: Interval | None
    repetition: float  # share of all tokens that lie inside a repeated 4-gram
    repetition_interval: Interval | None
    nll_per_token: float | None  # under the target model, in nats
    nll_interval: Interval | None
    mean_length: float  # tokens
    finished: float  # share of responses that end in an end-of-sequence token
    same_as_own_ar: float | None
    same_as_target: float | None


def quality(
    responses: Sequence[Sequence[int]],
    *,
    eos_ids: Sequence[int],
    scores: Sequence[bool | float] | None = None,
    nlls: Sequence[float] | None = None,
    own_ar: Sequence[Sequence[int]] | None = None,
    target: Sequence[Sequence[int]] | None = None,
    seed: int = 0,
) -> Quality:
    """Sum up responses (token ids, end-of-sequence included). ``nlls`` is the sum over the tokens of each response.

    Raises ValueError without responses.
    """
    if not responses:
        raise ValueError("no responses to measure")
    lengths = [len(ids) for ids in responses]
    repeated = [repetition(ids) * len(ids) for ids in responses]
    tokens = max(sum(lengths), 1)
    return Quality(
        responses=len(responses),
        score=None if scores is None else sum(scores) / len(scores),
        score_interval=None if scores is None else mean_interval(scores, seed=seed),
        repetition=sum(repeated) / tokens,
        repetition_interval=ratio_interval(repeated, lengths, seed=seed),
        nll_per_token=None if nlls is None else sum(nlls) / tokens,
        nll_interval=None if nlls is None else ratio_interval(nlls, lengths, seed=seed),
        mean_length=sum(lengths) / len(lengths),
        finished=sum(bool(ids) and ids[-1] in eos_ids for ids in responses) / len(responses),
        same_as_own_ar=None if own_ar is None else share_equal(responses, own_ar),
        same_as_target=None if target is None else share_equal(responses, target),
    )


def share_equal(responses: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> float:
    """Share of responses that equal their counterpart token for token."""
    return sum(list(a) == list(b) for a, b in zip(responses, others, strict=True)) / len(responses)


def score_replies(
    task: Task, examples: Sequence[Example], responses: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase
) -> list[bool | float] | None:
    """The task's metric of every response that can be judged; None where none can."""
    texts = tokenizer.batch_decode([list(ids) for ids in responses], skip_special_tokens=True)
    answers = [(text, example) for text, example in zip(texts, examples, strict=True) if task.judgeable(example)]
    return [scores[task.metric] for scores in task.score_all(answers)] if answers else None


@torch.inference_mode()
def response_nll(model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int]) -> float:
    """Negative log-likelihood in nats of a response (summed over its tokens) under a model, given the prompt."""
    chunks = _response_logits(model, prompt, response)
    return float(sum(cross_entropy(logits, ids, reduction="sum").double() for logits, ids in chunks))


@torch.inference_mode()
def response_entropy(model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int]) -> float:
    """Entropy in nats of a model's next-token distribution, summed over the tokens of a response to the prompt."""
    chunks = _response_logits(model, prompt, response)
    return float(sum(Categorical(logits=logits, validate_args=False).entropy().sum().double() for logits, _ in chunks))


def _response_logits(model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Float32 logits [CHUNK, V] that predict the tokens of a response, with these [CHUNK], a few at a time."""
    if not response:
        return
    text = torch.tensor([[*prompt, *response]], device=model.device)
    N = len(response)
    keep = {"logits_to_keep": N + 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits_NV = model(text, use_cache=False, **keep).logits[0, -N - 1 : -1]
    for logits, ids in zip(logits_NV.split(CHUNK), text[0, -N:].split(CHUNK), strict=True):
        yield logits.float(), ids


def response_nlls(model: PreTrainedModel, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[float]:
    """:func:`response_nll` of every response, one at a time: no padding, the same figures whatever the batch."""
    with evaluating(model):
        return [response_nll(model, prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


def response_entropies(model: PreTrainedModel, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[float]:
    """:func:`response_entropy` of every response, one at a time."""
    with evaluating(model):
        return [response_entropy(model, prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


QUALITY_ROWS: tuple[tuple[str, str, str | None, bool], ...] = (  # title, field, field of the interval, in percent
    ("score", "score", "score_interval", True),
    ("tokens in repeated 4-grams", "repetition", "repetition_interval", True),
    ("NLL under the target, nats/token", "nll_per_token", "nll_interval", False),
    ("mean response length, tokens", "mean_length", None, False),
    ("responses that end by themselves", "finished", None, True),
    ("same text as own AR", "same_as_own_ar", None, True),
    ("same text as the target model", "same_as_target", None, True),
)


def quality_table(columns: dict[str, Quality], metric: str) -> str:
    """Qualities side by side, one column each."""
    rows = []
    for title, value, interval, as_percent in QUALITY_ROWS:
        cells: list[str] = []
        for each in columns.values():
            numbers: Any = getattr(each, value), getattr(each, interval) if interval else None
            cells.append(percent_with_interval(*numbers) if as_percent else with_interval(*numbers))
        rows.append([metric if title == "score" else title, *cells])
    return format_table(["", *columns], rows)
