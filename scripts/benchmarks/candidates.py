"""What could verifying several candidates at once gain? An upper bound, measured without building it.

The engine decodes with one window of width W. Beside it, at every iteration, the candidates that other strategies would have
put there; afterwards, when the text is known, the longest of them counts as if it had been verified along with the window, at
the cost of a forward over 2W positions, of which only one more candidate could be had. Tokens it would have gained are counted
whole, though many are gained by the next iteration anyway. So the bound is generous on both sides.

    python scripts/benchmarks/candidates.py --model CLLM --task arithmetic --filename test.jsonl --block_size 8
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from common import add_options, load, publish, race

from cllm.decoding import Draft, Guess, JacobiDecoder, make_guess
from cllm.decoding.draft import token_before
from cllm.models import stop_token_ids

OTHERS = ("context", "prompt_lookup", "pool")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(options, prompts=8)
    options.add_argument("--guess", default="prompt_lookup+pool+context", help="of the window that is there anyway")
    args = options.parse_args()
    model, tokenizer, prompts = load(args)
    stops, W = stop_token_ids(model, tokenizer), args.block_size
    decoder = JacobiDecoder(model, W, eos_token_ids=stops, guess=args.guess)
    gained = [pair for prompt in prompts for pair in gains(decoder, prompt, args.length)]
    first, best = (sum(column) for column in zip(*gained))
    cost = costs(model, prompts[:8], (W, 2 * W), args.guess)
    more_tokens, more_time = best / first, cost[2 * W] / cost[W]
    result = {
        "iterations": len(gained),
        "tokens per iteration, the window": first / len(gained),
        "tokens per iteration, the best candidate (bound)": best / len(gained),
        "share of iterations where another is longer": sum(b > a for a, b in gained) / len(gained),
        "milliseconds, width W": 1000 * cost[W],
        "milliseconds, width 2W": 1000 * cost[2 * W],
        "upper bound of tokens/s over the single window": more_tokens / more_time,
        "the same where 2W cost no more than W": more_tokens,
    }
    publish(args, model, result)


def gains(decoder: JacobiDecoder, prompt: list[int], length: int) -> list[tuple[int, int]]:
    """Tokens that each iteration behind the prefill gained, and that the longest candidate would have gained."""
    others = [make_guess(name) for name in OTHERS]
    memories = [torch.full((1, guess.memory_size), -1) for guess in others]
    text, windows = list(prompt), []
    for iteration in decoder.iterate([prompt], max_new_tokens=length):
        window, choices = iteration.window_BW.cpu(), iteration.choices_BW.cpu()
        emitted = int(iteration.emitted_B[0])
        drafts = [candidate(guess, memory, text, window.shape[1]) for guess, memory in zip(others, memories)]
        windows.append((len(text), emitted, drafts))
        before = token_before(torch.tensor([text]), torch.tensor([len(text) - 1]))
        for guess, memory in zip(others, memories):
            guess.learn(memory, before, window, choices)
        text += choices[0, :emitted].tolist()
    return [(emitted, max([emitted, *(accepted(d, text[at:]) for d in drafts)])) for at, emitted, drafts in windows[1:]]


def candidate(guess: Guess, memory_BM: torch.Tensor, text: list[int], width: int) -> list[int]:
    """The tokens that a strategy puts behind the text, with nothing there before."""
    room = torch.tensor([text + [0] * 2 * width])
    one, window = torch.ones(1, dtype=torch.long), torch.tensor([text[-1:] + [0] * (width - 1)])
    draft = Draft(room, torch.tensor([len(text) - 1]), window, one, one, one, torch.zeros(1, dtype=torch.long), 0)
    return guess.fill(memory_BM, draft).window_BW[0, 1:].tolist()


def accepted(drafted: list[int], following: list[int]) -> int:
    """Tokens that verifying a draft gains, one more than are right, as far as the text goes."""
    right = next((i for i, pair in enumerate(zip(drafted, following)) if pair[0] != pair[1]), len(drafted))
    return min(right + 1, len(following))


def costs(model: Any, prompts: list[list[int]], widths: tuple[int, int], guess: str) -> dict[int, float]:
    """Median seconds of the engine's iterations at each width; the widths take turns, prompt by prompt."""
    times: dict[int, list[float]] = {width: [] for width in widths}
    for prompt in prompts:
        for width in widths:
            times[width] += [ours for ours, _ in race(JacobiDecoder(model, width, guess=guess), prompt, 1, 12)]
    return {width: statistics.median(of) for width, of in times.items()}


if __name__ == "__main__":
    main()
