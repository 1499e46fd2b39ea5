"""Collection against the paper's procedure, on the same prompts in one run.

python scripts/benchmarks/collection.py --model MODEL --filename gsm8k_train.jsonl --output collection.json
"""

from __future__ import annotations

import time

import torch
from common import Forwarded, aligned_collector, collect, load, model_parser, publish

from cllm import reference
from cllm.decoding.guess import context_tokens
from cllm.trajectory.collect import Collector, derived_seed


def main() -> None:
    args = model_parser(__doc__, prompts=8).parse_args()
    model, tokenizer, prompts = load(args)
    collector = aligned_collector(args, model, tokenizer)
    collect(collector, [prompts[0][:20]])  # warm up

    with Forwarded(model) as ours:
        start = time.perf_counter()
        rows, dropped = collect(collector, prompts)
        fast = time.perf_counter() - start
    kept = {int(row.row_id): row for row in rows}
    slow, slow_tokens, equal, states = 0.0, 0, 0, 0
    eos = collector.stops
    for index, ids in enumerate(prompts):
        start = time.perf_counter()
        blocks, forwarded = reference.collect(model, ids, args.block_size, args.length, start_guess(collector, str(index)), eos)
        slow += time.perf_counter() - start
        slow_tokens += forwarded
        if index in kept:
            for block, states_of_block in zip(blocks, kept[index].trajectories):
                size = len(states_of_block[0])  # the last block ends with the text
                states += len(states_of_block)
                equal += sum(a[:size] == b for a, b in zip(block.states, states_of_block))
        print(f"prompt {index}: paper's procedure so far {slow:.0f} s, ours took {fast:.1f} s for all", flush=True)
    publish(
        args,
        model,
        {
            "prompts": len(prompts),
            "left out by hygiene (timed on both sides)": len(dropped),
            "seconds per response, paper": slow / len(prompts),
            "seconds per response, ours": fast / len(prompts),
            "times faster": slow / fast,
            "token-forwards per response, paper": slow_tokens / len(prompts),
            "token-forwards per response, ours": ours.tokens / len(prompts),
            "times fewer token-forwards": slow_tokens / ours.tokens,
            "states equal": f"{equal} of {states}",
        },
    )


def start_guess(collector: Collector, row_id: str) -> reference.StartGuess:
    """The starting guesses that the collector draws for this row."""
    seed = torch.tensor([derived_seed(collector.settings.seed, row_id, "guess")])

    def guess(prefix, size):
        positions = torch.arange(len(prefix), len(prefix) + size)[None]
        return context_tokens(torch.tensor([list(prefix)]), torch.tensor([len(prefix)]), positions, seed)[0].tolist()

    return guess


if __name__ == "__main__":
    main()
