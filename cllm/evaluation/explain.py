"""Why decoding is not as fast as its tokens per forward (TPF) promise: figures, and the fault that they point to.

Shapes: N tokens of a response, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice, pairwise
from typing import Any

import torch
from transformers import PreTrainedModel

from cllm.decoding import GuessStrategy, JacobiDecoder
from cllm.decoding.engine import Prompts
from cllm.decoding.guess import CONTEXT, STARTS
from cllm.evaluation.choice import iteration_seconds
from cllm.evaluation.interval import wilson
from cllm.evaluation.method import Engine, Response
from cllm.evaluation.method_name import AR
from cllm.evaluation.speed import Measurement, measure
from cllm.evaluation.table import format_table, number, percent
from cllm.reference import drafting

PROMPTS, PLACES = 4, 16  # texts that are examined closely, and places in each
TIMED_TOKENS = 32  # of a response whose iterations are timed
NUMERICS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}  # share of the largest logit that rounding explains
EXPENSIVE = 1.25  # a window that costs this many times a forward of one token is called expensive
SOUND = 0.8  # share of the next guesses that are the same at least, near-ties aside
GAP = 0.1  # least difference between two shares that is reported, if their intervals do not overlap


@dataclass(frozen=True)
class Share:
    """How often something held: ``right`` times out of ``total``."""

    right: int
    total: int

    @property
    def value(self) -> float | None:
        return self.right / self.total if self.total else None

    def above(self, other: Share) -> bool:
        """Whether this share is larger than ``other`` by more than noise and by more than GAP."""
        mine, theirs = wilson(self.right, self.total), wilson(other.right, other.total)
        if mine is None or theirs is None:
            return False
        return mine[0] > theirs[1] and self.right / self.total - other.right / other.total > GAP


@dataclass(frozen=True)
class Cost:
    """Of one iteration after the prefill."""

    width: int
    drafts: int
    seconds: float
    times_width_1: float


@dataclass(frozen=True)
class Difference:
    """The first place where a text differs from what a plain forward over it chooses."""

    method: str
    prompt: int
    token: int
    choice: int
    plain_choice: int
    margin: float  # in logits
    numerics: bool  # rounding explains it; otherwise it is a fault


@dataclass(frozen=True)
class Explanation:
    """All figures, and ``findings`` in words, the most serious first."""

    iterations: list[Cost]
    acceptance: list[Share]  # of each guess of a window, among those whose guesses before it were right
    cold_windows: Share  # those after a forward that confirmed no guess
    gain_cold: float | None  # tokens per forward of these ...
    gain_warm: float | None  # ... and of the others
    prefill_share: float  # of all seconds
    forced: dict[str, list[Share]]  # drafts over the true text from each start: the leading 1, 2, ... are all right
    start: str  # which of the starts decoding uses
    replayed: Share  # next guesses of the decoder that a plain forward over the same window gives as well
    texts_checked: int
    differences: list[Difference]
    findings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def explain(jacobi: Engine, measured: Measurement, prompts: Prompts, batches: Sequence[Prompts]) -> Explanation:
    """Examine what :func:`cllm.evaluation.speed.measure` found for ``jacobi`` and AR decoding on these ``batches``.

    ``prompts``: those of all batches, in their order.
    """
    decoder = jacobi.decoder
    runs, responses, ar = measured.runs[jacobi.name], measured.responses(jacobi.name), measured.responses(AR)
    cold, gains = _cold(responses)
    found = Explanation(
        iterations=_costs(decoder, batches[:PROMPTS]),
        acceptance=_acceptance(responses, decoder.block_size),
        cold_windows=cold,
        gain_cold=gains[0],
        gain_warm=gains[1],
        prefill_share=sum(run.prefill_seconds for run in runs) / sum(run.seconds for run in runs),
        forced=_forced(decoder, prompts[:PROMPTS], [response.token_ids for response in ar[:PROMPTS]]),
        start=_start(decoder.guess.name),
        replayed=_replayed(decoder, prompts[:PROMPTS]),
        texts_checked=min(len(prompts), PROMPTS),
        differences=_differences(decoder.model, prompts[:PROMPTS], {jacobi.name: responses, AR: ar}),
    )
    tokens, forwards = sum(len(r.token_ids) for r in responses), sum(r.forwards for r in responses)
    found.findings.extend(_findings(found, tokens / forwards))
    return found


def _costs(decoder: JacobiDecoder, batches: Sequence[Prompts]) -> list[Cost]:
    """Iterations of this window and of narrower ones, taking turns."""
    settings = {width: width - 1 if decoder.step.drafts else 0 for width in (1, 2, 4, 8, 16, 32) if width < decoder.block_size}
    settings[decoder.block_size] = decoder.step.drafts
    adapter, stops = decoder.step.adapter, decoder.eos_ids.tolist()
    methods = []
    for width, drafts in settings.items():
        more = {"eos_token_ids": stops, "drafts": drafts, "adapter": adapter if drafts else None}
        methods.append(Engine(_like(decoder, width, decoder.guess, **more), str(width), str(width)))
    runs = measure(methods, batches, TIMED_TOKENS, context=decoder.context).runs
    seconds = {width: iteration_seconds(runs[str(width)]) for width in settings}
    return [Cost(width, settings[width], each, each / seconds[1]) for width, each in seconds.items()]


def _like(decoder: JacobiDecoder, width: int, guess: GuessStrategy | str, **more: Any) -> JacobiDecoder:
    """A decoder of the same model with another window and guess, run in the same way."""
    return JacobiDecoder(decoder.model, width, guess=guess, seed=decoder.seed, compile=decoder.compile, **more)


def _acceptance(responses: Sequence[Response], width: int) -> list[Share]:
    """The last forward of a response, which its end cuts short, does not count."""
    confirmed = [gained - 1 for response in responses for gained in (response.accepted or [])[:-1]]
    reached = [sum(count >= guess for count in confirmed) for guess in range(width)]
    return [Share(after, before) for before, after in pairwise(reached)]


def _cold(responses: Sequence[Response]) -> tuple[Share, tuple[float | None, float | None]]:
    """Windows after a forward that confirmed nothing, and what these and the others gained."""
    pairs = [pair for response in responses for pair in pairwise((response.accepted or [])[:-1])]
    cold, warm = [later for before, later in pairs if before == 1], [later for before, later in pairs if before > 1]
    gains = tuple(sum(part) / len(part) if part else None for part in (cold, warm))
    return Share(len(cold), len(pairs)), (gains[0], gains[1])


def _start(guess: str) -> str:
    """What fills the positions that a strategy leaves empty."""
    last = guess.split("+")[-1]
    return last if last in STARTS else CONTEXT.name


@torch.inference_mode()
def _forced(decoder: JacobiDecoder, prompts: Prompts, responses: Prompts) -> dict[str, list[Share]]:
    """One draft from nothing at a few places of the true texts, over plain forwards without a cache."""
    size = decoder.width - 1
    if not size:
        return {}
    vocabulary = decoder.model.config.get_text_config(decoder=True).vocab_size
    right: dict[str, list[int]] = {start: [0] * size for start in STARTS}
    count = [0] * size
    for prompt, response in zip(prompts, responses, strict=True):
        text = torch.tensor([[*prompt, *response]], device=decoder.device)
        for place in _places(len(prompt), len(response)):
            positions = torch.arange(place + 1, place + 1 + size, device=decoder.device)
            known = torch.tensor([place + 1], device=decoder.device)
            goal = text[0, place + 2 : place + 2 + size]  # what the tokens at those positions lead to
            for start, tokens_of in STARTS.items():
                guesses = tokens_of(vocabulary)(text, known, positions[None], torch.full_like(known, decoder.seed + place))
                drafted = _drafted(decoder, text[:, : place + 1], guesses)
                for distance, all_right in enumerate((drafted[: len(goal)] == goal).cumprod(dim=0).tolist()):
                    right[start][distance] += all_right
            for distance in range(len(goal)):
                count[distance] += 1
    return {start: [Share(*pair) for pair in zip(counts, count)] for start, counts in right.items()}


@torch.inference_mode()
def _replayed(decoder: JacobiDecoder, prompts: Prompts) -> Share:
    """Decode a few windows again, and draft from each by a plain forward too.

    The draft after guess j of a window is for the position after it, where the next window has moved on by what was emitted.
    """
    refined = min(decoder.step.drafts or decoder.block_size, decoder.block_size - 1)  # guesses of a window
    if not refined:
        return Share(0, 0)
    again = _like(decoder, decoder.block_size, _start(decoder.guess.name), drafts=decoder.step.drafts, adapter=decoder.step.adapter)
    same = total = 0
    for prompt in prompts:
        text = list(prompt)
        expected: list[int] = []
        for iteration in islice(again.iterate([prompt], max_new_tokens=PLACES * again.width), PLACES):
            window, emitted = iteration.window_BW[0].tolist(), int(iteration.emitted_B[0])
            same += sum(a == b for a, b in zip(expected, window[1:]))
            total += len(expected)
            if len(window) < again.block_size:  # narrower where the text is about to end
                break
            known, guesses = (torch.tensor([ids], device=again.device) for ids in (text, window[1 : 1 + refined]))
            expected = _drafted(again, known, guesses).tolist()[emitted - 1 :]
            text += iteration.choices_BW[0, :emitted].tolist()
    return Share(same, total)


def _drafted(decoder: JacobiDecoder, known_1S: torch.Tensor, guesses_1W: torch.Tensor) -> torch.Tensor:
    """What a plain forward, without a cache, drafts after each of the guesses after a text."""
    adapter, count = decoder.step.adapter, guesses_1W.shape[1]
    with drafting(decoder.model, adapter, count) if adapter else nullcontext():
        logits = decoder.model(torch.cat([known_1S, guesses_1W], dim=1), use_cache=False).logits
    drafted: torch.Tensor = logits[0, -count:].argmax(dim=-1)
    return drafted


def _places(prompt: int, response: int) -> list[int]:
    """Positions spread over a response, each followed by at least two more tokens."""
    last = prompt + response - 3
    every = max(1, response // PLACES)
    return list(range(prompt - 1, last + 1, every))[:PLACES]


@torch.inference_mode()
def _differences(model: PreTrainedModel, prompts: Prompts, texts: dict[str, list[Response]]) -> list[Difference]:
    found = []
    for name, responses in texts.items():
        for place, (prompt, response) in enumerate(zip(prompts, responses)):
            ids = torch.tensor(response.token_ids, device=model.device)
            text = torch.tensor([[*prompt, *response.token_ids]], device=model.device)
            logits_NV = model(text, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
            wrong = (logits_NV.argmax(dim=-1) != ids).nonzero()[:, 0].tolist()
            if not wrong:
                continue
            at = wrong[0]
            best, chosen = logits_NV[at].max(), logits_NV[at, ids[at]]
            margin = float(best - chosen)
            explained = margin <= NUMERICS.get(model.dtype, 0.0) * float(logits_NV[at].abs().max())
            found.append(Difference(name, place, at, int(ids[at]), int(logits_NV[at].argmax()), margin, explained))
    return found


def _findings(found: Explanation, tpf: float) -> list[str]:
    """What stands out, the most serious first."""
    findings = []
    for name in dict.fromkeys(d.method for d in found.differences if not d.numerics):
        first = next(d for d in found.differences if d.method == name and not d.numerics)
        findings.append(
            f"cache: the text of {name} is not the model's own: at token {first.token} of prompt {first.prompt} a plain "
            f"forward without a cache prefers another token by {first.margin:.2g} in logits, which no rounding explains; keys "
            "and values, their slots, or the mask are wrong"
        )
    near = [d for d in found.differences if d.numerics]
    if near:
        findings.append(
            f"near-ties: {len(near)} texts part from a plain forward's where two tokens are as likely but for rounding "
            f"(margins up to {max(d.margin for d in near):.2g} in logits)"
        )
    if found.replayed.total and found.replayed.right < SOUND * found.replayed.total:
        findings.append(
            f"cache: {found.replayed.value:.0%} of the decoder's next guesses are those that a plain forward without a cache "
            "gives for the same window; keys and values, their slots, or the mask are wrong where it drafts"
        )
    if found.forced:
        findings += _start_findings(found)
    cost = found.iterations[-1].times_width_1
    if cost > EXPENSIVE:
        findings.append(
            f"width: an iteration of this window costs {cost:.2f} times one of width 1, so {tpf:.2f} tokens per forward "
            f"give a speedup of about {tpf / cost:.2f}; `cllm tune` finds the width that pays on this device"
        )
    return findings


def _start_findings(found: Explanation) -> list[str]:
    used, best = found.start, max(found.forced, key=lambda start: found.forced[start][0].value or 0.0)
    right = {start: shares[0] for start, shares in found.forced.items()}
    if not right[best].above(right[used]):
        return []
    return [
        f"start: over the true text the first draft is right in {right[best].value:.0%} of the windows that start from "
        f"{best!r} tokens and in {right[used].value:.0%} from {used!r}, which decoding uses; the adapter was trained to start "
        f"from {best!r}"
    ]


def render_explanation(found: Mapping[str, Any]) -> str:
    """The result of :meth:`Explanation.as_dict`, as text."""
    costs = [
        [str(cost["width"]), str(cost["drafts"]), number(1000 * cost["seconds"], 1), number(cost["times_width_1"])]
        for cost in found["iterations"]
    ]
    starts = {start: f"drafted right\nfrom {start}" + " *" * (start == found["start"]) for start in found["forced"]}
    guesses = [
        [str(place), _percent(share), *(_percent(found["forced"][start][place - 1]) for start in starts)]
        for place, share in enumerate(found["acceptance"], 1)
    ]
    gains = f"{number(found['gain_cold'])} tokens per forward, the others {number(found['gain_warm'])}"
    parts = [
        format_table(["width", "drafts", "milliseconds\nper iteration", "times\nwidth 1"], costs),
        format_table(["guess", "accepted, if those\nbefore it are", *starts.values()], guesses),
        "Drafted right: this guess and all before it, over the true text; *: as windows start here.\n"
        f"Cold windows, after a forward that confirmed no guess: {_percent(found['cold_windows'])}; they gain {gains}.\n"
        f"Prefill: {percent(found['prefill_share'])} of the time. Compared with plain forwards: {found['texts_checked']} texts, and "
        f"the next guesses of windows, {_percent(found['replayed'])} of which are the same.",
        "\n".join(f"- {finding}" for finding in found["findings"]) or "Nothing stands out.",
    ]
    return "\n\n".join(parts)


def _percent(share: dict[str, int]) -> str:
    return percent(Share(**share).value)
