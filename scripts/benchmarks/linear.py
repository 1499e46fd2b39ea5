"""What linear layers by oneDNN bring on a CPU (:mod:`cllm.decoding.linear`): iterations with them and with torch's own layers.

The two take turns, text by text; medians over all iterations behind the prefill.

    python scripts/benchmarks/linear.py --model MODEL --filename gsm8k_train.jsonl --output docs/results/linear.json
"""

from __future__ import annotations

import argparse
import statistics
from itertools import product

import torch
from common import add_options, add_shapes, each_shape, load, publish

from cllm.decoding import JacobiDecoder
from cllm.evaluation.speed import now


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(options, prompts=4)
    options.set_defaults(length=16)
    add_shapes(options, widths=[1, 2, 8, 16, 32], batches=[1, 8])
    args = options.parse_args()
    model, _, prompts = load(args)

    def figures(batch: int, width: int) -> dict[str, float]:
        decoder = JacobiDecoder(model, width)
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for prompt, ours in product(prompts, seconds):
            with torch.backends.mkldnn.flags(enabled=ours):
                seconds[ours] += iterations(decoder, [prompt] * batch, args.length)
        with_them, without = statistics.median(seconds[True]), statistics.median(seconds[False])
        return {
            "milliseconds, oneDNN": 1000 * with_them,
            "milliseconds, torch's own": 1000 * without,
            "times faster": without / with_them,
        }

    publish(args, model, each_shape(args, figures))


def iterations(decoder: JacobiDecoder, prompts: list[list[int]], count: int) -> list[float]:
    """Seconds of each iteration behind the prefill."""
    running, seconds = decoder.iterate(prompts, max_new_tokens=(count + 1) * decoder.width), []
    next(running)
    for _ in range(count):
        start = now(decoder.device)
        if next(running, None) is None:
            break
        seconds.append(now(decoder.device) - start)
    running.close()
    return seconds


if __name__ == "__main__":
    main()
