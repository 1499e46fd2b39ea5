"""Continuous batching against fixed batches: tokens per second on the same requests of mixed length.

All sides use the same engine, width and batch size. Fixed batches wait for their longest row; the usual ones compute finished
rows until then, the others let finished rows leave. The queue gives every freed place to the next request. The sides
alternate round by round.

    python scripts/benchmarks/batching.py --model MODEL --filename gsm8k_train.jsonl --block_size 1 --output batching.json
"""

from __future__ import annotations

import random

from common import load, model_parser, publish

from cllm.decoding import JacobiDecoder, Queue, Request
from cllm.decoding.runner import Runner
from cllm.evaluation.speed import now


def main() -> None:
    options = model_parser(__doc__, prompts=64)
    options.add_argument("--batch_size", type=int, default=8)
    options.add_argument("--rounds", type=int, default=2)
    args = options.parse_args()
    model, _, prompts = load(args)
    decoder, draw = JacobiDecoder(model, args.block_size, prefix_cache=0), random.Random(0)
    usual = JacobiDecoder(model, args.block_size, compile="off", prefix_cache=0)
    usual.runner = FixedBatchRunner(usual.step)
    requests = [Request(prompt, draw.randint(8, args.length)) for prompt in prompts]
    sides = {
        "fixed batches": lambda: fixed(usual, requests, args.batch_size),
        "fixed batches, finished rows leave": lambda: fixed(decoder, requests, args.batch_size),
        "continuous batching": lambda: continuous(decoder, requests, args.batch_size),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for at in range(args.rounds):
        for name in sorted(sides, reverse=at % 2 == 1):
            start = now(model.device)
            tokens = sides[name]()
            seconds[name].append(now(model.device) - start)
            print(f"round {at}, {name}: {tokens} tokens, {seconds[name][-1]:.1f} s", flush=True)
    total = {name: sum(times) for name, times in seconds.items()}
    rates = {f"tokens/s, {name}": args.rounds * tokens / time for name, time in total.items()}
    faster = {f"times faster than {name}": time / total["continuous batching"] for name, time in total.items() if "fixed" in name}
    publish(args, model, {"tokens": tokens, "seconds": seconds, **rates, **faster})


class FixedBatchRunner(Runner):
    """Keeps computing finished rows until their batch is done."""

    def size(self, used: int, room: int) -> int:
        return room


def fixed(decoder: JacobiDecoder, requests: list[Request], size: int) -> int:
    """Decode batch after batch in the order of the requests; returns the number of tokens."""
    return sum(continuous(decoder, requests[at : at + size], size) for at in range(0, len(requests), size))


def continuous(decoder: JacobiDecoder, requests: list[Request], size: int) -> int:
    """Decode by a queue; returns the number of tokens."""
    return sum(len(result.token_ids) for _, result in Queue(decoder, size).run(requests))


if __name__ == "__main__":
    main()
