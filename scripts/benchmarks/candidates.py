"""How much would verifying two candidates at once gain over the single window?

Every iteration verifies the engine's window and the window that another strategy would have filled, and the text continues
after the one that gained more. Forwards over the whole text (not timed) count tokens exactly; with the window alone, the count
is checked against the engine's. For time, two windows of W are taken to cost as much as one of 2W, without the copying of the
winner's keys and values, so the gain in tokens/s is an upper bound.

    python scripts/benchmarks/candidates.py --model CLLM --task spider --filename quickstart/data --block_size 8
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from common import load, model_parser, publish, race
from tqdm import tqdm

from cllm.decoding import GuessStrategy, JacobiDecoder, PartialWindow, make_guess
from cllm.decoding.guess_strategy import token_before
from cllm.decoding.linear import LinearPatch
from cllm.models import stop_token_ids

OTHERS = ("context", "prompt_lookup", "pool", "prompt_lookup+pool", "loser")  # loser: the candidate that gained less, refined
LOSER = OTHERS[-1]


def main() -> None:
    options = model_parser(__doc__, prompts=8)
    options.set_defaults(length=64)
    options.add_argument("--guess", default="prompt_lookup+pool+context", help="the strategy of the first window")
    args = options.parse_args()
    model, tokenizer, prompts = load(args)
    stops, W = stop_token_ids(model, tokenizer), args.block_size
    decoder = JacobiDecoder(model, W, eos_token_ids=stops, guess=args.guess)
    tokens, alone = engine(decoder, prompts, args.length)
    counts = {other: forwards(decoder, other, prompts, args.length) for other in tqdm((None, *OTHERS))}
    if counts[None] != alone:
        raise SystemExit(f"the window alone takes {counts[None]} forwards here and {alone} in the engine")
    cost = costs(model, prompts[:8], (W, 2 * W), args.guess)
    dearer = cost[2 * W] / cost[W]
    best = min(OTHERS, key=lambda other: counts[other])
    result = {
        "tokens": tokens,
        "tokens per forward, the window alone": tokens / alone,
        "tokens per forward, with a second candidate": {other: tokens / counts[other] for other in OTHERS},
        "best second candidate": best,
        "milliseconds, width W": 1000 * cost[W],
        "milliseconds, width 2W": 1000 * cost[2 * W],
        "tokens/s over the single window": alone / counts[best] / dearer,
        "the same where 2W cost no more than W": alone / counts[best],
    }
    publish(args, model, result)


def engine(decoder: JacobiDecoder, prompts: list[list[int]], length: int) -> tuple[int, int]:
    """The engine's tokens and forwards, prefills included."""
    results = [decoder.generate([prompt], max_new_tokens=length)[0] for prompt in prompts]
    return sum(len(r.token_ids) for r in results), sum(r.forwards for r in results)


def forwards(decoder: JacobiDecoder, other: str | None, prompts: list[list[int]], length: int) -> int:
    """The number of forwards that all texts take, with a second candidate or without."""
    with torch.inference_mode(), LinearPatch.refreshed(decoder.model):
        return sum(CandidateDecoding(decoder, other, prompt, length).run() for prompt in prompts)


class CandidateDecoding:
    """Decodes one text with one or two candidate windows per iteration.

    Shapes: B = 1 rows, C candidates, W width, M memory of a guess strategy.
    """

    def __init__(self, decoder: JacobiDecoder, other: str | None, prompt: list[int], length: int) -> None:
        self.decoder, self.width, self.end = decoder, decoder.width, len(prompt) + length
        self.text, self.name = list(prompt), other
        self.guess: GuessStrategy = decoder.guess
        self.other: GuessStrategy = make_guess(other) if other not in (None, LOSER) else decoder.guess
        self.memory_BM = torch.full((1, self.guess.memory_size), -1)
        self.other_memory_BM = torch.full((1, self.other.memory_size), -1)

    def run(self) -> int:
        """Decode to the end; returns the number of forwards."""
        stops = set(self.decoder.eos_ids.tolist())
        window_CW = self.candidates([self.text[-1:]])
        count = 0
        while True:
            ids = torch.tensor([self.text[:-1]] * len(window_CW), dtype=torch.long)
            logits = self.decoder.model(torch.cat([ids, window_CW], dim=1), logits_to_keep=self.width).logits
            choice_CW = logits[:, -self.width :].argmax(dim=-1)
            count += 1
            gained = [self.gained(window, choice, stops) for window, choice in zip(window_CW.tolist(), choice_CW.tolist())]
            winner = max(range(len(gained)), key=lambda c: (gained[c], -c))
            self.learn(window_CW, choice_CW, winner)
            new = choice_CW[winner, : gained[winner]].tolist()
            self.text += new
            if new[-1] in stops or len(self.text) == self.end:
                return count
            order = [winner, *(c for c in range(len(gained)) if c != winner)]
            window_CW = self.candidates([[self.text[-1], *choice_CW[c, gained[winner] :].tolist()] for c in order])

    def gained(self, window: list[int], choices: list[int], stops: set[int]) -> int:
        """The number of choices that are verified and belong to the text."""
        right = next((i for i, pair in enumerate(zip(window[1:], choices)) if pair[0] != pair[1]), self.width - 1)
        last = next((i + 1 for i, token in enumerate(choices) if token in stops), self.width)
        return min(right + 1, last, self.end - len(self.text))

    def candidates(self, refined: list[list[int]]) -> torch.Tensor:
        """The next windows [C, W]: the first from ``refined[0]``, and the second candidate."""
        rows = [self.fill(self.guess, self.memory_BM, refined[0])]
        if self.name == LOSER:
            rows.append(self.fill(self.guess, self.memory_BM, refined[-1]))
        elif self.name is not None:
            rows.append(self.fill(self.other, self.other_memory_BM, self.text[-1:]))
        return torch.cat(rows)

    def fill(self, guess: GuessStrategy, memory_BM: torch.Tensor, kept: list[int]) -> torch.Tensor:
        """A window [1, W] that starts with the tokens ``kept``, filled as the engine does."""
        room = torch.tensor([self.text + [0] * 2 * self.width])
        one, filled = torch.ones(1, dtype=torch.long), torch.tensor([len(kept)])
        window = torch.tensor([kept + [kept[-1]] * (self.width - len(kept))])
        seed, vocabulary = torch.tensor([self.decoder.seed]), self.decoder.step.vocabulary
        partial = PartialWindow(
            room, torch.tensor([len(self.text) - 1]), window, one, filled, one, seed, vocabulary, self.decoder.step.narrows
        )
        return guess.fill(memory_BM, partial).window_BW

    def learn(self, window_CW: torch.Tensor, choice_CW: torch.Tensor, winner: int) -> None:
        """Update the strategies, from the losing candidate first, since what the winner saw is closer to the truth."""
        before = token_before(torch.tensor([self.text]), torch.tensor([len(self.text) - 1]))
        for c in [*(c for c in range(len(window_CW)) if c != winner), winner]:
            for guess, memory in ((self.guess, self.memory_BM), (self.other, self.other_memory_BM)):
                guess.learn(memory, before, window_CW[c : c + 1], choice_CW[c : c + 1])


def costs(model: Any, prompts: list[list[int]], widths: tuple[int, int], guess: str) -> dict[int, float]:
    """Median seconds of the engine's iterations at each width; the widths alternate prompt by prompt."""
    times: dict[int, list[float]] = {width: [] for width in widths}
    for prompt in prompts:
        for width in widths:
            times[width] += [ours for ours, *_ in race(JacobiDecoder(model, width, guess=guess), prompt, 1, 12)]
    return {width: statistics.median(seconds) for width, seconds in times.items()}


if __name__ == "__main__":
    main()
