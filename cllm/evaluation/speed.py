"""Speed: tokens per forward (TPF) and per second of several methods on the same prompts.

All tokens over all seconds, prefill included; methods take turns batch by batch; every generated id counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from cllm.decoding.engine import Prompts
from cllm.evaluation.interval import bootstrap, ratio_interval
from cllm.evaluation.method import Engine, Method, Response
from cllm.evaluation.method_name import AR

WARM_UP_TOKENS = 16
Progress = Callable[[Iterable[Prompts]], Iterable[Prompts]]  # what shows how far a loop over batches has come


@dataclass(frozen=True)
class Run:
    """One method on one batch."""

    seconds: float
    prefill_seconds: float  # up to the end of the forward that computes the prompts' last tokens
    responses: list[Response]


@dataclass
class Measurement:
    """Runs by method, in the order of the batches."""

    runs: dict[str, list[Run]] = field(default_factory=dict)

    def responses(self, method: str) -> list[Response]:
        return [response for run in self.runs[method] for response in run.responses]

    def texts(self, method: str) -> list[list[int]]:
        """The token ids of each response."""
        return [response.token_ids for response in self.responses(method)]


def measure(
    methods: Sequence[Method],
    batches: Sequence[Prompts],
    max_new_tokens: int,
    *,
    context: int | None = None,
    progress: Progress = iter,
) -> Measurement:
    """After a warm-up, decode every batch with every method, each time starting with another one.

    Engines begin with no prefixes; those of earlier batches stay, as far as their decoders keep any.
    All rows of a batch have the same budget: ``max_new_tokens``, or what the context leaves after its longest prompt.
    """
    measurement = Measurement({method.name: [] for method in methods})
    for method in methods if batches else ():
        _warm_up(method, batches, max_new_tokens, context)
    for index, prompts in enumerate(progress(batches)):
        at = index % len(methods)
        for method in [*methods[at:], *methods[:at]]:
            run = timed(method, prompts, budget(prompts, max_new_tokens, context))
            measurement.runs[method.name].append(run)
    return measurement


def _warm_up(method: Method, batches: Sequence[Prompts], max_new_tokens: int, context: int | None) -> None:
    """A few tokens; where steps are captured, all tokens of the batch with the longest prompt, so that most kinds of step are."""
    captures = isinstance(method, Engine) and method.decoder.runner.fixed
    prompts = max(batches, key=lambda batch: max(map(len, batch))) if captures else batches[0]
    tokens = budget(prompts, max_new_tokens, context)
    timed(method, prompts, tokens if captures else min(WARM_UP_TOKENS, tokens))
    if isinstance(method, Engine):
        method.decoder.prefixes.clear()


def budget(prompts: Prompts, max_new_tokens: int, context: int | None) -> int:
    """New tokens that every row of a batch may have."""
    return max_new_tokens if context is None else min(max_new_tokens, context - max(map(len, prompts)))


def timed(method: Method, prompts: Prompts, max_new_tokens: int) -> Run:
    """Decode one batch and take the time; a method that takes one prompt per call gets them one after the other."""
    calls = [[prompt] for prompt in prompts] if method.one_by_one else [prompts]
    parts = [_timed_call(method, part, max_new_tokens) for part in calls]
    return Run(
        sum(part.seconds for part in parts),
        sum(part.prefill_seconds for part in parts),
        [response for part in parts for response in part.responses],
    )


def _timed_call(method: Method, prompts: Prompts, max_new_tokens: int) -> Run:
    device = method.model.device
    longest, reached, prefilled = max(map(len, prompts)), 0, []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal reached
        positions = kwargs.get("position_ids")
        if positions is None:
            reached += (kwargs["input_ids"] if "input_ids" in kwargs else args[0]).shape[1]
        else:  # the reused part of a prompt does not go through the model
            reached = int(positions.max()) + 1
        if reached >= longest:
            prefilled.append(now(device))
            handle.remove()  # it would disturb compiled steps

    handle = method.model.register_forward_hook(note, with_kwargs=True)
    try:
        start = now(device)
        responses = method.decode(prompts, max_new_tokens)
        end = now(device)
    finally:
        handle.remove()
    return Run(end - start, (prefilled or [end])[0] - start, responses)


def now(device: torch.device) -> float:
    """Seconds, read once the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def summarise(measurement: Measurement, *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """The figures of every method, with 95% bootstrap intervals: TPF over prompts, speedup over batches.

    Seconds are known per batch, so that is what the speedup's interval draws; with batch size 1 a batch is a prompt.
    """
    return {name: _figures(measurement, name, seed) for name in measurement.runs}


def _figures(measurement: Measurement, name: str, seed: int) -> dict[str, Any]:
    runs, responses = measurement.runs[name], measurement.responses(name)
    lengths, forwards = [len(r.token_ids) for r in responses], [r.forwards for r in responses]
    tokens, seconds = sum(lengths), sum(run.seconds for run in runs)
    figures: dict[str, Any] = {
        "responses": len(responses),
        "tokens": tokens,
        "forwards": sum(forwards),
        "tokens_per_forward": _ratio(tokens, sum(forwards)),
        "tokens_per_forward_interval": ratio_interval(lengths, forwards, seed=seed),
        "seconds": seconds,
        "prefill_seconds": sum(run.prefill_seconds for run in runs),
        "tokens_per_second": _ratio(tokens, seconds),
    }
    figures |= _speedup(runs, measurement.runs[AR], seed)
    for key in ("fast_forwarded", "stationary"):
        counts = [getattr(r, key) for r in responses]
        total = None if None in counts else sum(counts)
        figures[f"{key}_per_response"] = None if total is None else _ratio(total, len(responses))
        figures[f"{key}_per_forward"] = None if total is None else _ratio(total, sum(forwards))
    same = [a.token_ids == b.token_ids for a, b in zip(responses, measurement.responses(AR), strict=True)]
    return figures | {"same_as_ar": _ratio(sum(same), len(same))}


def _speedup(runs: Sequence[Run], baseline: Sequence[Run], seed: int) -> dict[str, Any]:
    """Tokens per second over those of the baseline, batch by batch the same prompts."""
    columns = [*_tokens_and_seconds(runs), *_tokens_and_seconds(baseline)]
    mine, my_seconds, theirs, their_seconds = [sum(column) for column in columns]
    interval = bootstrap(columns, lambda sums: (sums[0] / sums[1]) / (sums[2] / sums[3]), seed=seed)
    value = _ratio(mine * their_seconds, my_seconds * theirs)
    return {"speedup": value, "speedup_interval": interval if runs is not baseline else None}


def _tokens_and_seconds(runs: Sequence[Run]) -> tuple[list[float], list[float]]:
    """Per batch."""
    return [float(sum(len(r.token_ids) for r in run.responses)) for run in runs], [run.seconds for run in runs]


def _ratio(top: float, bottom: float) -> float | None:
    return top / bottom if bottom else None


@torch.inference_mode()
def divergence(model: PreTrainedModel, prompt: Sequence[int], expected: Sequence[int], got: Sequence[int]) -> dict[str, Any] | None:
    """Where two greedy responses part, and by what logit margin; None if they are equal.

    The logits come from one plain forward over the prompt and what both responses share. ``margin`` is the best logit
    there minus that of the less likely of the two choices; ``margin_ulps`` the same in spacings of the dtype.
    """
    at = next((i for i, (a, b) in enumerate(zip(expected, got)) if a != b), None)
    if at is None:
        if len(expected) == len(got):
            return None
        return {"token": min(len(expected), len(got)), "ar_choice": None, "other_choice": None, "margin": None}
    text = torch.tensor([[*prompt, *expected[:at]]], device=model.device)
    logits_V = model(text, use_cache=False).logits[0, -1]
    spacing = torch.finfo(logits_V.dtype).eps * float(logits_V.abs().max())
    logits_V = logits_V.float()
    ours, theirs = float(logits_V[expected[at]]), float(logits_V[got[at]])
    margin = float(logits_V.max()) - min(ours, theirs)
    return {
        "token": at,
        "ar_choice": expected[at],
        "ar_logit": ours,
        "other_choice": got[at],
        "other_logit": theirs,
        "plain_choice": int(logits_V.argmax()),
        "margin": margin,
        "margin_ulps": margin / spacing if spacing else None,
    }


def divergences(model: PreTrainedModel, measurement: Measurement, prompts: Mapping[str, Sequence[int]]) -> list[dict[str, Any]]:
    """Every response of every method that is not AR's, by prompt id in the order measured."""
    found = []
    for name in measurement.runs:
        pairs = zip(prompts.items(), measurement.responses(AR), measurement.responses(name), strict=True)
        for (row_id, ids), expected, got in pairs:
            if where := divergence(model, ids, expected.token_ids, got.token_ids):
                found.append({"method": name, "id": row_id} | where)
    return found
