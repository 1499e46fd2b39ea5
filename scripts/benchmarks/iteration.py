"""The engine's time per iteration over that of a bare forward of the same tokens over a cache of the same length.

The two take turns, iteration by iteration: the engine's generator gives one, then the same window goes through
``model(...)`` with transformers' own DynamicCache, which is cropped afterwards (not timed).

    python scripts/benchmarks/iteration.py --model MODEL --filename gsm8k_train.jsonl --output iteration.json
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from common import add_options, load, publish
from transformers import DynamicCache

from cllm.decoding import JacobiDecoder


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(options, prompts=3)
    options.add_argument("--widths", type=int, nargs="+", default=[1, 8, 16, 32])
    options.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    args = options.parse_args()
    model, _, prompts = load(args)
    result = {}
    for batch in args.batches:
        for width in args.widths:
            pairs = [pair for prompt in prompts for pair in race(model, prompt, batch, width, args.length)]
            ours, bare = (statistics.median(times) for times in zip(*pairs))
            result[f"batch {batch}, width {width}"] = {
                "iterations": len(pairs),
                "milliseconds, engine": 1000 * ours,
                "milliseconds, bare forward": 1000 * bare,
                "ratio of medians": ours / bare,
                "ratio of sums": sum(a for a, _ in pairs) / sum(b for _, b in pairs),
            }
            print(f"batch {batch}, width {width}: {result[f'batch {batch}, width {width}']}", flush=True)
    publish(args, model, result)


@torch.inference_mode()
def race(model, prompt: list[int], batch: int, width: int, length: int) -> list[tuple[float, float]]:
    """Seconds of the engine and of the bare forward for each iteration behind the prefill and a short warm-up."""
    cache = DynamicCache(config=model.config)
    model(torch.tensor([prompt[:-1]] * batch, device=model.device), past_key_values=cache, logits_to_keep=1)
    pairs, iterations = [], JacobiDecoder(model, width).iterate([prompt] * batch, max_new_tokens=length)
    while True:
        start = time.perf_counter()
        iteration = next(iterations, None)
        if iteration is None:
            return pairs[3:]
        engine = time.perf_counter() - start
        start = time.perf_counter()
        model(iteration.window_BW, past_key_values=cache)
        pairs.append((engine, time.perf_counter() - start))
        wrong = width - int(iteration.emitted_B[0])
        if wrong:
            cache.crop(-wrong)


if __name__ == "__main__":
    main()
